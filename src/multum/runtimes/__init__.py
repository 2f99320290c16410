"""One file, one way to execute a model: `export(model, folder)` and `open(folder) -> Predictor`."""

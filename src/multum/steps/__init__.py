"""One file, one technique. No file here imports another; `multum.core.step.find` finds a step by its file name."""

"""Tensors and Transformers. Knows no technique and no data set."""

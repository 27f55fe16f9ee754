"""Plain PyTorch definitions of the model families, and the files that they come in."""

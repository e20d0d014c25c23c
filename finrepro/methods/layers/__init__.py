"""Neural network layers, one idea a file. They know tensors, not cells."""

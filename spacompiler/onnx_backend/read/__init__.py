"""From a file to a graph of named tensors."""

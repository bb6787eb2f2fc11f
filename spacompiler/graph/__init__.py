"""The program as a graph of named tensors, and idioms found in it."""

"""Files for ONNX Runtime: export, decoder with a cache, int8, parity."""

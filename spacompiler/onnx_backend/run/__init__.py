"""Run a file in ONNX Runtime, in double precision too."""

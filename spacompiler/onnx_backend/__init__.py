"""An ONNX file: read, run, emit, prove."""

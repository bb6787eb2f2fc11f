"""A torch module: read, run, gather, emit, prove."""

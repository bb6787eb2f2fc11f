"""What is written, loaded, verified, reported; a file for each backend."""

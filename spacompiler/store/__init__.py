"""The directory that appears whole or not at all; arrays as safetensors."""

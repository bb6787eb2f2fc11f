"""Front ends: what reads a framework's program into the IR."""

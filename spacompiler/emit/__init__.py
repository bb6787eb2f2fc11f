"""Emitters: one plan, carried out on the exported program, on the user's module, and in files."""

"""Dimensions as expressions over atoms: the algebra, its notation, and what stays."""

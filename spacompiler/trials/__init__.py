"""What leaving something out would do, measured: counts, whole blocks."""

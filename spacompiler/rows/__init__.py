"""What each operator says of axes: one row, one line; two tables."""

"""A compile as one flat list of steps."""

"""Gates on slices, learned under a budget while the network stays as it is, or trains beside."""

"""Train what is left: options, objective, loop, checkpoint."""

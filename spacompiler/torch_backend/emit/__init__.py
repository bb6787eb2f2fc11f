"""From a plan to a smaller module or program."""

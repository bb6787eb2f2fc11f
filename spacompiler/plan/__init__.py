"""Which slices go: the problem, legal counts, the plan, and what it changes in a program."""

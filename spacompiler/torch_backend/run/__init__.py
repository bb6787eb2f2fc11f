"""Run a traced program node by node."""

"""From a module to a traced program and its graph."""

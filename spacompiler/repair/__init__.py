"""New weights for what stays: sites, evidence, solutions."""

"""What a torch network alone can tell: gradients, relevance, text of its own."""

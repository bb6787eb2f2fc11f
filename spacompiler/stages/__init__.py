"""What each step hands to the next, what a backend must do, how a proof is judged."""

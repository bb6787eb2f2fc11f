"""Adapters in peft's format: merged before pruning, or kept and sliced beside the pruned base."""

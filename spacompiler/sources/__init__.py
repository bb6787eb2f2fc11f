"""What MODEL may be, and which backend it belongs to."""

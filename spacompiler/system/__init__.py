"""What the operating system is asked for: process-wide settings, scratch directories."""

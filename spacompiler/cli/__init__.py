"""The command line: what is asked, and what is shown."""

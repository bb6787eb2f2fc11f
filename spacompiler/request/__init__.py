"""What a user may ask: options as data, passes by name; imports no framework."""

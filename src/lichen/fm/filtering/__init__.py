"""What of a text may not go to an endpoint: patterns with checksums, names, and runs of words of private rows."""

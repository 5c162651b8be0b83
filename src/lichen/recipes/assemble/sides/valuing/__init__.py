"""What clients do for their values."""

"""How a site leaves a federation for good: its notice, what it removes, and what the others are asked to delete."""

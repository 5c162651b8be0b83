"""Clients whose messages leave them under masks."""

"""The server's side of masked sums."""

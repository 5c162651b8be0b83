"""Who belongs to a federation: its authority, requests that are signed, and the kits that connect."""

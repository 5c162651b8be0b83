"""The kinds that patterns find, for recipes; nothing heavy is imported here."""

from __future__ import annotations

__all__ = ["KINDS"]

KINDS = {
    "mail": "addresses of mail",
    "phone": "telephone numbers",
    "card": "numbers of payment cards",
    "iban": "numbers of bank accounts",
    "id": "national identity, tax and health numbers of sixteen countries",
    "machine": "addresses of machines (IP, MAC)",
}
"""Each kind, and what it is."""

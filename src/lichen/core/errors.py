"""The one error a user is meant to read: it names the place and the fix."""

from __future__ import annotations

__all__ = ["LichenError"]


class LichenError(Exception):
    """Bad input, told in one sentence, with the place it was found and how to mend it.

    Args:
        what: What is wrong, in plain words.
        where: The recipe key, file, message or checkpoint it was found in.
        fix: What the reader can do about it.

    >>> print(LichenError("no such column 'text'", where="data.text", fix="use one of: body, title"))
    data.text: no such column 'text'
      fix: use one of: body, title
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        head = f"{where}: {what}" if where else what
        super().__init__(f"{head}\n  fix: {fix}" if fix else head)

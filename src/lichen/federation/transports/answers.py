"""What a site's end does with a question, over whatever transport it came. Nothing here needs torch."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata

from lichen import __version__
from lichen.core.errors import LichenError
from lichen.engines.remote.pieces import PIECE
from lichen.federation.door import Head, refusal

__all__ = ["answer_question", "own_versions"]


def answer_question(give: Callable[[str, bytes], bytes], kind: str, body: bytes, *, site: str) -> tuple[Head, bytes]:
    """The head and body of an answer, or of the refusal.

    Args:
        give: Gives the bytes that answer a question. It declines with a :class:`LichenError`; whatever else it raises
            is a fault, of which only the kind is told.
        kind: What the question is.
        body: Its bytes.
        site: The site's name.
    """
    where = f"site {site}"
    try:
        answer = give(kind, body)
        if len(answer) > PIECE:
            what = f"answered {len(answer):,} bytes; at most {PIECE:,} are sent"
            return refusal("failed", LichenError(what, where=where)), b""
        return {}, answer
    except LichenError as error:
        return refusal("refused", error), b""
    except Exception as error:  # never its words: they may be somebody's rows
        return refusal("failed", LichenError(f"met a fault: {type(error).__name__}", where=where)), b""


def own_versions() -> dict[str, str]:
    """Of lichen, Python, torch and numpy in this process."""
    found = {"lichen": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy"):
        found[package] = metadata.version(package)
    return found

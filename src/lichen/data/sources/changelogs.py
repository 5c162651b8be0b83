"""Reads a Debian changelog: who changed what, and when.

A changelog is releases, each with a line at its end that says who closed it and when; in a release a line ``[ Name ]``
opens the entries of one person, and entries without such a line are of whoever closed the release. Mail addresses are
left out of everything.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.data.sources.record import Record

__all__ = ["changelogs"]

_RELEASE = re.compile(r"(?m)^(?=[a-z0-9.+-]+ \([^)\n]*\) [^\n]*;)")
_CLOSED = re.compile(r"(?m)^ -- (?P<who>[^<\n]*?) *<[^>\n]*> +(?P<when>.+?) *$")
_PERSON = re.compile(r"^ {1,3}\[ (?P<name>[^\[\]]+?) \]\s*$")
_ENTRY = re.compile(r"^(?P<indent> *)[*+-] +(?P<text>.*)$")
_ADDRESS = re.compile(r"\s*[<(]?[\w.+-]+@[\w-]+(\.[\w-]+)+[>)]?")
_NOBODY = re.compile(r"(Update|Updated|Add|Added|New) |.* translations?$")
"""Heads of sections that are no people, such as ``[ Updated programs translations ]``."""


def changelogs(folder: Path, columns: Mapping[str, str]) -> list[Record]:
    """One record an entry: its text, the heading that it stands under, who wrote it and when; the group is the release.

    Raises:
        LichenError: if columns are named, of which there are none.
    """
    for role in columns:
        raise LichenError(f"changelogs has its own {role}", where=f"data.columns.{role}", fix="leave it out")
    return list(entries_of(gzip.decompress((folder / "changelog.gz").read_bytes()).decode("utf-8", "replace")))


def entries_of(text: str) -> Iterator[Record]:
    """Every entry of one person in a release with a date; sections of several people, or of nobody, are left out.

    >>> text = "a (1.1) x; y\\n\\n  * Docs:\\n    - Mend a\\n      line.\\n\\n"
    >>> text += " -- Ann <a@b.org>  Sat, 07 Mar 2026 13:15:41 +0100\\n"
    >>> [(row.client, row.prompt, row.text, row.time) for row in entries_of(text)]
    [('Ann', 'Docs', 'Mend a line.', '2026-03-07T12:15:41')]
    """
    for block in _RELEASE.split(text):
        closed = _CLOSED.search(block)
        if closed is None:
            continue
        try:
            when = parsedate_to_datetime(closed["when"])
        except ValueError:
            continue  # a date that was mistyped thirty years ago
        time = (when if when.tzinfo is None else when.astimezone(UTC)).replace(tzinfo=None).isoformat()
        release = block.split(")", 1)[0].replace(" (", " ")
        for who, heading, entry in _entries(block[: closed.start()], _clean(closed["who"])):
            yield Record(client=who, text=entry, prompt=heading, group=release, time=time)


def _entries(body: str, closer: str) -> Iterator[tuple[str, str, str]]:
    """Who, under which heading, and what; in order."""
    who, heading, found = closer, "", list[tuple[str, str, int, list[str]]]()
    indent = -1  # of the entry whose lines are read; none is
    for line in body.splitlines()[1:]:
        person, entry = _PERSON.match(line), _ENTRY.match(line)
        if person is not None:
            who, heading, indent = person["name"].strip(), "", -1
            who = "" if _NOBODY.match(who) or "," in who else who
        elif entry is not None:
            indent = len(entry["indent"])
            if found and found[-1][3][-1].endswith(":") and found[-1][2] < indent:
                heading = _clean(" ".join(found.pop()[3])).rstrip(":")
            elif indent <= 2:
                heading = ""
            found.append((who, heading, indent, [entry["text"].strip()]))
        elif line.strip() and indent >= 0:
            found[-1][3].append(line.strip())
        elif not line.strip():
            indent = -1
    for name, under, _, lines in found:
        words = _clean(" ".join(lines))
        if name and words:
            yield name, under, words


def _clean(text: str) -> str:
    """Without mail addresses, and with single blanks."""
    return " ".join(_ADDRESS.sub("", text).split())

"""Writes the tables of all pages anew from the results they come from, or checks that they are what these say.

A table that comes from results stands between two comments, the first of which is the command that prints it::

    <!-- from: python benchmarks/paired.py benchmarks/results/adapt-chat FedIT -->
    <!-- end -->

A table of numbers that was measured once, and whose results are not kept, says so in the line before it::

    *Taken once, 2026-11-22: `python benchmarks/plan.py`.*

A table is one of numbers if it has a column that is aligned to the right, or if it is printed in a fence without a
language on a page of ``benchmarks``. One with neither mark is a fault. Commands run in this process, and only files of
this folder are run.

``python benchmarks/pages.py`` writes, ``--check`` compares and names page, line and difference; both for all pages or
for those that are named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
START = re.compile(r"<!-- from: (?P<command>.+) -->")
END = "<!-- end -->"
ONCE = re.compile(r"\*Taken once, \d{4}-\d{2}-\d{2}: `.+`.*\*")


class PageError(Exception):
    """A page whose marks cannot be followed."""


@dataclass(frozen=True, slots=True)
class Block:
    """A table that a command prints.

    Attributes:
        command: As the page says it.
        start: Place of the first line between the marks, counted from 0.
        end: Place of the closing mark.
    """

    command: str
    start: int
    end: int


def pages() -> list[Path]:
    """Every page that may show results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(HERE.glob("*.md"))]


def blocks(lines: Sequence[str]) -> Iterator[Block]:
    """The marked tables of a page; other tools end parts of their own with the same mark.

    Raises:
        PageError: for a table without an end.
    """
    start = None
    for number, line in enumerate(lines):
        found = START.fullmatch(line)
        if found and start is not None:
            raise PageError(f"{number + 1}: {line!r} stands before the {END!r} of the table above")
        if found:
            start = (found["command"], number + 1)
        elif line == END and start is not None:
            yield Block(*start, number)
            start = None
    if start is not None:
        raise PageError(f"{start[1]}: no {END!r} follows")


def printed(command: str) -> list[str]:
    """The lines that a command prints, without empty ones at both ends.

    Raises:
        PageError: if it is no script of this folder, or fails.
    """
    python, script, *words = shlex.split(command)
    path = ROOT / script
    if python != "python" or path.parent != HERE or not path.is_file():
        raise PageError(f"{command!r} is not `python benchmarks/NAME.py ...`")
    out, before = io.StringIO(), sys.argv
    sys.argv = [str(path), *words]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
            runpy.run_path(str(path), run_name="__main__")
    except (Exception, SystemExit) as error:
        if not (isinstance(error, SystemExit) and not error.code):
            raise PageError(f"`{command}` fails: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before
    return out.getvalue().strip("\n").split("\n")


def renewed(lines: Sequence[str]) -> list[str]:
    """A page with what its commands print today."""
    out, last = list[str](), 0
    for block in blocks(lines):
        out += [*lines[last : block.start], *printed(block.command)]
        last = block.end
    return [*out, *lines[last:]]


def unmarked(lines: Sequence[str], *, fences: bool) -> Iterator[int]:
    """The tables of numbers, by the place of their first line, that no mark says the origin of."""
    inside = {number for block in blocks(lines) for number in range(block.start, block.end)}
    opened = None
    for number, line in enumerate(lines):
        begins = line.startswith("```") and opened is None
        if line.startswith("```"):
            opened = line if begins else None
        table = opened is None and re.fullmatch(r"\|[-:| ]+\|", line) and "-:" in line
        head = number - 1 if table else number
        if not (table or (fences and begins and line == "```")) or number in inside:
            continue
        above = [one for one in lines[:head] if one.strip()]
        if not above or not ONCE.fullmatch(above[-1]):
            yield head


def faults(page: Path) -> Iterator[str]:
    """What is wrong with a page, a line each."""
    name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
    lines = page.read_text(encoding="utf-8").split("\n")
    try:
        for number in unmarked(lines, fences=page.parent == HERE):
            yield f"{name}:{number + 1}: no mark says where the table comes from: {lines[number]}"
        for block in blocks(lines):
            own, now = lines[block.start : block.end], printed(block.command)
            for place in range(max(len(own), len(now))):
                here, there = (some[place] if place < len(some) else "nothing" for some in (own, now))
                if here != there:
                    yield f"{name}:{block.start + place + 1}: {here}\n  `{block.command}` prints: {there}"
    except PageError as error:
        yield f"{name}: {error}"


def main() -> int:
    """Write or check what is asked for; 1 where a page is not what it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="all if none is named")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    asked = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "Agg")
    found = 0
    for page in [page.resolve() for page in asked.pages] or pages():
        if not asked.check:
            try:
                text = "\n".join(renewed(page.read_text(encoding="utf-8").split("\n")))
            except PageError as error:
                print(f"{page}: {error}")
                found += 1
                continue
            if text != page.read_text(encoding="utf-8"):
                page.write_text(text, encoding="utf-8")
                print(f"{page}: written")
        for fault in faults(page) if asked.check else ():
            print(fault)
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Detects the encoding of a text file.

Files of spreadsheets and of Windows come in UTF-16 or Windows-1252. A mark at the file's begin, or bytes that
can be nothing else, decide; where the bytes leave it open, the file is refused rather than read as nonsense.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, TextIO, cast

from lichen.core.errors import LichenError

__all__ = ["MOST_LETTERS", "encoding_of", "lines_of", "open_text"]

MOST_LETTERS = 1 << 26
"""Letters of one line, one cell or one value at most: far above any text to learn from."""

_CHUNK = 1 << 20
_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_OTHERS = (
    (b"PAR1", "is a Parquet file", "give it the ending .parquet"),
    (b"PK\x03\x04", "is a ZIP archive or a spreadsheet", "unpack it, or save it as CSV in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "is a spreadsheet or document of an office program", "save it as CSV in UTF-8"),
    (b"SQLite format 3", "is a database", "write its table as CSV or JSONL"),
    (b"%PDF", "is a PDF", "write its text as JSONL, a row a line"),
    (b"ARROW1", "is an Arrow file", "write it as Parquet"),
    (b"BZh", "is packed", "unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ", "is packed", "unpack it: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "is packed", "unpack it: unzstd FILE"),
)
_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


def _open_bytes(path: Path) -> IO[bytes]:
    file = open(path, "rb")  # noqa: SIM115  (handed on)
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file


def open_text(path: Path) -> TextIO:
    """A text file from its begin, unpacked where it is packed with gzip; line breaks stay as they are.

    Raises:
        LichenError: if it is not text, or its letters cannot be told.
    """
    encoding = encoding_of(path)
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline="")


def lines_of(file: TextIO, where: str) -> Iterator[str]:
    """The lines of a file, each of bounded length.

    Raises:
        LichenError: naming the line that is longer than :data:`MOST_LETTERS`.
    """
    number = 0
    while line := file.readline(MOST_LETTERS + 1):
        number += 1
        if len(line) > MOST_LETTERS:
            raise LichenError(
                f"is longer than {MOST_LETTERS >> 20} million letters",
                where=f"{where}, line {number}",
                fix="write a row a line, and cut longer rows",
            )
        yield line


def encoding_of(path: Path) -> str:
    """Python's name of a text file's encoding: ``utf-8`` if it can be, else what its bytes show it to be.

    Raises:
        LichenError: if the file holds no text, or bytes that may mean several things.
    """
    about = os.stat(path)
    return _encoding(str(path), about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=4096)
def _encoding(name: str, _changed: int, _size: int) -> str:
    with _open_bytes(Path(name)) as file:
        head = file.read(_CHUNK)
        for mark, encoding in _MARKS:
            if head.startswith(mark):
                return encoding
        for mark, what, fix in _OTHERS:
            if head.startswith(mark):
                raise LichenError(what, where=name, fix=fix)
        if b"\0" in head:
            return _with_zeros(head, name)
        decoder, chunk = codecs.getincrementaldecoder("utf-8")(), head
        try:
            while chunk:
                decoder.decode(chunk)
                chunk = file.read(_CHUNK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            file.seek(0)
            return _one_byte(file.read(MOST_LETTERS), name)
    return "utf-8"


def _with_zeros(head: bytes, name: str) -> str:
    """UTF-16 without a mark has a zero beside most letters, on one side."""
    letters = max(len(head) // 2, 1)
    late, early = head[1::2].count(0) / letters, head[0::2].count(0) / letters
    if late > 0.4 and early < 0.1:
        return "utf-16-le"
    if early > 0.4 and late < 0.1:
        return "utf-16-be"
    at = head.index(b"\0")
    raise LichenError(
        f"holds a zero byte (byte {at})", where=name, fix="it is no text, or damaged there: write it again as UTF-8"
    )


def _one_byte(data: bytes, name: str) -> str:
    """Windows-1252, unless most that is beyond ASCII is UTF-8, or the letters look like another alphabet."""
    beyond = len(data) - len(data.translate(None, bytes(range(128, 256))))
    whole = sum(len(found) for found in _SEQUENCE.findall(data))
    if 2 * whole > beyond:
        at = _first_fault(data)
        line = data.count(b"\n", 0, at) + 1
        raise LichenError(
            f"is not UTF-8 text (byte {at})", where=f"{name}, line {line}", fix="mend that line, or save it as UTF-8"
        )
    try:
        letters = [letter for letter in data.decode("cp1252") if letter.isalpha()]
    except UnicodeDecodeError as error:
        raise LichenError(
            f"is not UTF-8 text, nor Windows-1252 (byte {error.start})", where=name, fix="save it as UTF-8"
        ) from None
    if 3 * sum(not letter.isascii() for letter in letters) > len(letters):
        raise LichenError(
            "is not UTF-8 text, and its alphabet cannot be told",
            where=name,
            fix=f"save it as UTF-8, for example: iconv -f ENCODING -t UTF-8 {Path(name).name}",
        )
    return "cp1252"


def _first_fault(data: bytes) -> int:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(data)

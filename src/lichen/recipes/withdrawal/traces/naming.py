"""Finds a client's name, and texts of its rows, in bytes: in plain, in JSON's escapes, in archives and pictures' texts.

A name counts as a whole word only, and not where it is a part of another client's name. One of a letter or two, or of
digits alone, stands in too many files by chance to be searched for; what a file holds of it is known by its kind.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, final

from lichen.clients.personal.own_model import folder_name
from lichen.core.errors import LichenError
from lichen.core.visible import visible

__all__ = ["Name", "contents", "text_forms", "texts_in"]

_SHORTEST = 3
"""Letters of a name that bytes are searched for."""

_LONGEST = 1 << 28
"""Bytes that an archive may unpack to, to be searched."""

_TEXT = 12
"""Letters of a text of a row that is worth a search."""

_DAMAGED_ZIP = (
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    ValueError,  # a place before its beginning, or a name that is not in UTF-8 though it says so
    NotImplementedError,  # it asks for a part of the format that zipfile does not know
)
"""What zipfile raises of bytes that are no archive, or not one that it can read."""

_ENCRYPTED = 1
"""Flag of a file in an archive whose bytes are encrypted."""

_PNG = b"\x89PNG\r\n\x1a\n"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A client's name among those of others.

    Attributes:
        name: As the roster has it.
        others: The names of all other clients.
    """

    name: str
    others: tuple[str, ...]

    @property
    def searchable(self) -> bool:
        """Whether it is unlikely to stand in a file by chance.

        >>> [Name(name=name, others=()).searchable for name in ("ward-3", "17", "a")]
        [True, False, False]
        """
        return len(self.name) >= _SHORTEST and not self.name.isdecimal()

    def found(self, data: bytes) -> bool:
        """Whether it stands in these bytes.

        >>> Name(name="ward-3", others=("ward-31", "ward-3 north")).found(b'["ward-31", "ward-3 north"]')
        False
        >>> Name(name="Süd", others=()).found(b'{"client": "S\\\\u00fcd"}')
        True
        """
        return self.searchable and any(match["name"] is not None for match in self._pattern().finditer(data))

    def replaced(self, text: str, instead: str) -> str:
        """A text with another name in its place; as it is where bytes are not searched for the name."""
        if not self.searchable:
            return instead if text == self.name else text
        pattern = self._pattern()

        def one(match: re.Match[bytes]) -> bytes:
            return match[0] if match["name"] is None else instead.encode()

        return pattern.sub(one, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def _pattern(self) -> re.Pattern[bytes]:
        return _pattern(self.name, self.others)

    def scrubbed(self, value: Any, instead: str) -> Any:
        """JSON without what stands under the name, and with another name elsewhere.

        Entries of a mapping that the name is the key of go, and so do mappings in a list that are of this ``client``.

        >>> name = Name(name="ada", others=("bo",))
        >>> name.scrubbed({"ada": 1, "list": ["ada", {"client": "ada", "value": 2}], "why": "ada left"}, "withdrawn-1")
        {'list': ['withdrawn-1'], 'why': 'withdrawn-1 left'}
        """
        if isinstance(value, str):
            return self.replaced(value, instead)
        if isinstance(value, list):
            return [self.scrubbed(one, instead) for one in value if not self._is_mine(one)]
        if isinstance(value, dict):
            entries = {key: one for key, one in value.items() if key != self.name}
            return {self.replaced(str(key), instead): self.scrubbed(one, instead) for key, one in entries.items()}
        return value

    def _is_mine(self, value: Any) -> bool:
        return isinstance(value, dict) and value.get("client") == self.name


@lru_cache(maxsize=1)
def _pattern(name: str, others: tuple[str, ...]) -> re.Pattern[bytes]:
    """The forms of a name, after longer names that hold it, so that it is not found in them."""
    mine = _forms(name)
    longer = {form for other in others for form in _forms(other) if any(one in form for one in mine)} - mine
    words = b"|".join(re.escape(form) for form in sorted(longer, key=len, reverse=True)) or rb"(?!)"
    own = b"|".join(re.escape(form) for form in sorted(mine, key=len, reverse=True))
    edge = rb"[\w\x80-\xff]"
    return re.compile(rb"(?P<other>%s)|(?<!%s)(?P<name>%s)(?!%s)" % (words, edge, own, edge))


def _forms(name: str) -> set[bytes]:
    """How a name is written: as it is, with JSON's escapes, on a screen, and as a folder."""
    texts = {name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1], visible(name), folder_name(name)}
    return {text.encode("utf-8", "surrogatepass") for text in texts if text}


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what an archive holds, or a picture's texts.

    Raises:
        LichenError: if the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror}", where=str(path)) from None
    yield data
    for magic, unpacked in _FORMATS:
        if data.startswith(magic):
            yield from unpacked(data)


def _gzip_bytes(data: bytes) -> Iterator[bytes]:
    """What a file of gzip unpacks to; nothing of a damaged one, of which its own bytes are searched alone."""
    with suppress(gzip.BadGzipFile, EOFError, zlib.error), gzip.open(io.BytesIO(data)) as file:
        yield file.read(_LONGEST)


def _zip_bytes(data: bytes) -> Iterator[bytes]:
    """Names and bytes of an archive's files; of a damaged one those before the damage.

    A file that cannot be read without its owner's password, or that is packed in another way than by deflate, is known
    by its name alone.
    """
    with suppress(*_DAMAGED_ZIP), zipfile.ZipFile(io.BytesIO(data)) as archive:
        for about in archive.infolist():
            yield about.filename.encode("utf-8", "surrogateescape")
            if not about.flag_bits & _ENCRYPTED and about.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                with archive.open(about) as file:
                    yield file.read(_LONGEST)


def _picture_texts(data: bytes) -> Iterator[bytes]:
    """Compressed texts of a picture in PNG; of a damaged one those before the damage."""
    at = len(_PNG)
    with suppress(zlib.error):
        while at + 8 <= len(data):
            size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
            body = data[at + 8 : at + 8 + size]
            if kind == b"zTXt" and b"\0" in body:
                yield zlib.decompressobj().decompress(body[body.index(b"\0") + 2 :], _LONGEST)
            elif kind == b"iTXt" and body.count(b"\0") >= 4:
                head = body.index(b"\0")
                rest = body[head + 3 :].split(b"\0", 2)
                if len(rest) == 3 and body[head + 1 : head + 2] == b"\1":
                    yield zlib.decompressobj().decompress(rest[2], _LONGEST)
            at += size + 12


_FORMATS: tuple[tuple[bytes, Callable[[bytes], Iterator[bytes]]], ...] = (
    (b"\x1f\x8b", _gzip_bytes),
    (b"PK\x03\x04", _zip_bytes),
    (_PNG, _picture_texts),
)
"""How a file of a format that packs its texts begins, and what unpacks them."""


def texts_in(file: Path) -> tuple[str, ...]:
    """The texts of a file of rows, each once: values of JSON lines, cells of a table, or lines.

    Raises:
        LichenError: if it cannot be read, or holds none of twelve letters or more.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = "is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        raise LichenError(what, where=f"--rows {file}", fix="name a file of JSON lines, a table, or lines") from None
    found = dict.fromkeys(one.strip() for one in _texts(text, file.suffix.lower()))
    texts = tuple(one for one in found if len(one) >= _TEXT)
    if not texts:
        what = f"holds no text of {_TEXT} letters or more, and shorter ones stand in files by chance"
        raise LichenError(what, where=f"--rows {file}", fix="name a file with whole texts of rows")
    return texts


def _texts(text: str, suffix: str) -> Iterator[str]:
    try:
        if suffix == ".json":
            yield from _strings(json.loads(text))
        elif suffix in (".jsonl", ".ndjson"):
            for line in filter(str.strip, text.splitlines()):
                yield from _strings(json.loads(line))
        elif suffix in (".csv", ".tsv"):
            for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","):
                yield from row
        else:
            yield from text.splitlines()
    except (ValueError, RecursionError, csv.Error):
        yield from text.splitlines()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def text_forms(texts: Sequence[str]) -> tuple[bytes, ...]:
    """How texts are written: as they are, and with JSON's escapes."""
    forms = (
        form for text in texts for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    )
    return tuple(dict.fromkeys(form.encode("utf-8", "surrogatepass") for form in forms))

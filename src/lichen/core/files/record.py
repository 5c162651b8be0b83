"""The record of a run: a chain of lines, each of which holds the digest of the one before, and whose head is signed.

A line is JSON with sorted keys. ``before`` is the SHA-256 of the line before with its line end, or 64 zeros in the
first; the digest of the last line is the chain's head. Whoever knows the head can tell if anything before it was
changed, left out or put elsewhere. ``record.json`` holds the head, signed with Ed25519 by a key that lies in the run's
folder, or with the server of the federation whose sites took part.

A line from which something was removed later holds in ``redacted`` the digest of what it was, from which the chain goes
on. It counts only before a line of kind ``withdrawal``, whose ``standing`` is the digest of all bytes before it.

References:
    Stuart Haber and W. Scott Stornetta. "How to Time-Stamp a Digital Document." Journal of Cryptology, 1991.
    Simon Josefsson and Ilari Liusvaara. RFC 8032, "Edwards-Curve Digital Signature Algorithm (EdDSA)." 2017.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.manifest import MANIFEST, files_in

__all__ = [
    "FORMAT",
    "RECORD",
    "SIGNED",
    "START",
    "WITHDRAWAL",
    "Record",
    "Signer",
    "canonical",
    "chain",
    "line_digest",
    "private_key",
    "public_key",
    "recorded_files",
    "require_signed",
    "signed",
]

RECORD = "record.jsonl"
"""The chain."""

SIGNED = "record.json"
"""Its head, signed."""

FORMAT = 1
"""Of the lines and of what is signed."""

START = "0" * 64
"""Stands for the line before the first."""

WITHDRAWAL = "withdrawal"
"""The kind of line that stands for a client that has gone: what stood of it before is redacted."""


@final
class Signer(NamedTuple):
    """Whose key signs a record.

    Attributes:
        key: The file of the private key, made if there is none.
        federation: The name of the federation whose server has it; empty: the run's own.
    """

    key: Path
    federation: str = ""

    @property
    def named(self) -> dict[str, str]:
        """What is signed with it says of it, and the record's last line does."""
        whose = {"federation": self.federation} if self.federation else {}
        return {"public_key": public_key(self.key), **whose}


_OUTSIDE = (RECORD, SIGNED, MANIFEST, "state/lock", "merged/", "crash.txt", ".")
"""What begins like one of these no record names: it holds the record, or is written later."""

_PUT_BACK = "put it back from a copy"


def canonical(entry: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, and a line end: equal entries have equal bytes.

    >>> canonical({"b": 1, "a": "é"}).decode()
    '{"a":"é","b":1}\\n'
    """
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def chain(path: Path) -> tuple[list[dict[str, Any]], str]:
    """``(lines, head)`` of a record; without lines where there is no file.

    Raises:
        LichenError: naming the line that is not as it was written, or does not follow from the one before.
    """
    lines: list[dict[str, Any]] = []
    head = START
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return lines, head
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror}", where=str(path)) from None
    redacted, passed = 0, hashlib.sha256()
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line)
            whole = canonical(entry) == line and isinstance(entry, dict) and entry["before"] == head
            if whole and entry.get("kind") == WITHDRAWAL and entry["standing"] == passed.hexdigest():
                redacted = 0
            if whole and "redacted" in entry:
                redacted = redacted or number
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise LichenError(
                "is not the line that was written after the one before it",
                where=f"{path}, line {number}",
                fix=_PUT_BACK,
            )
        lines.append(entry)
        head = line_digest(entry)
        passed.update(line)
    if redacted:
        what = "is redacted, and no line of a withdrawal stands for it"
        raise LichenError(what, where=f"{path}, line {redacted}", fix=_PUT_BACK)
    return lines, head


def line_digest(entry: Mapping[str, Any]) -> str:
    """What the line after this one holds in ``before``: the digest of the line as it was written first."""
    return str(entry["redacted"]) if "redacted" in entry else hashlib.sha256(canonical(entry)).hexdigest()


@final
class Record:
    """The record of a run; one process writes it.

    Its lines are forced to the disk with the journal's, from which they are written again at the next start.

    Args:
        path: Its file; made with the first line.
        text: The lines that count, as the journal has them.
        say: Called with a line where the file had others.

    Attributes:
        head: Digest of the last line.
        lines: How many there are.
    """

    def __init__(self, path: Path, text: str, *, say: Callable[[str], None] = lambda _: None) -> None:
        self.path = path
        lines = text.encode().splitlines(keepends=True)
        self.head, self.lines = hashlib.sha256(lines[-1]).hexdigest() if lines else START, len(lines)
        there = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if there == lines:
            return
        # Behind them may stand the end of a run that goes on, and lines of a round that a kill has ended.
        if there[: len(lines)] != lines:
            say(f"{path}: was damaged, and is written again from the journal")
        if lines:
            write_atomic(path, b"".join(lines))
        else:
            path.unlink()

    def append(self, entry: Mapping[str, Any]) -> str:
        """Add a line; it is given back."""
        line = canonical({**entry, "before": self.head})
        if not self.path.exists():
            os.close(private.create(self.path))
        with open(self.path, "ab") as file:
            file.write(line)
        self.head, self.lines = hashlib.sha256(line).hexdigest(), self.lines + 1
        return line.decode()

    def end(self, entry: Mapping[str, Any]) -> None:
        """Add the last line, and force all of them to the disk."""
        self.append(entry)
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())


def recorded_files(run: Path) -> list[str]:
    """The files of a finished run that its record names, by their path within."""
    return [name for name in files_in(run, but=_OUTSIDE) if not name.endswith("/MANIFEST.json")]


def private_key(path: Path) -> Any:
    """The private key of Ed25519 in this file, made if there is none.

    Raises:
        LichenError: if the file is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not path.exists():
        write_atomic(path, _pem(Ed25519PrivateKey.generate()))
    data = path.read_bytes()
    try:
        key = load_pem_private_key(data, password=None)
        if isinstance(key, Ed25519PrivateKey) and data == _pem(key):
            return key
    except ValueError:
        pass
    raise LichenError(
        "is no key that a run has made", where=str(path), fix=f"{_PUT_BACK}; or delete it, and a new one is made"
    )


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    text: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return text


def public_key(path: Path) -> str:
    """The public half of the private key in this file, 64 hex digits; the key is made if there is none.

    Raises:
        LichenError: if the file is none.
    """
    return _public(private_key(path))


def _public(key: Any) -> str:
    half: bytes = key.public_key().public_bytes_raw()
    return half.hex()


def signed(body: Mapping[str, Any], signer: Signer) -> bytes:
    """JSON of ``body`` with ``public_key``, ``federation`` where the key is one's, and ``signature``.

    Raises:
        LichenError: if the file is no key.
    """
    key, body = private_key(signer.key), {**body, **signer.named}
    return canonical({**body, "signature": key.sign(canonical(body)).hex()})


def require_signed(path: Path, public: str | None = None) -> dict[str, Any]:
    """What stands in a file of :func:`signed`.

    Args:
        path: The file.
        public: Whose signature it must bear, 64 hex digits; None: that of the key it names.

    Raises:
        LichenError: if it is missing, any byte of it was changed, or somebody else has signed it.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        data = path.read_bytes()
        body = json.loads(data)
        if canonical(body) != data:
            raise ValueError
        signature = bytes.fromhex(body["signature"])
        rest = {name: value for name, value in body.items() if name != "signature"}
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(body["public_key"])).verify(signature, canonical(rest))
        if body["signature"] != signature.hex() or body["public_key"] != bytes.fromhex(body["public_key"]).hex():
            raise ValueError
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror}", where=str(path), fix=_PUT_BACK) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidSignature):
        raise LichenError("is not what was signed", where=str(path), fix=_PUT_BACK) from None
    if public is not None and body["public_key"] != public:
        raise LichenError(
            f"is signed with the key {body['public_key'][:16]}..., not {public[:16]}...",
            where=str(path),
            fix="ask whoever ran it for the public key",
        )
    return rest

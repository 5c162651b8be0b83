"""Who may ask a server of this machine, by the head of a request.

A browser lets any page send requests to this machine, and a name of the page's own may lead here (DNS rebinding). So
``Host`` must be a name of this server, and a request that a page of elsewhere makes is refused by its ``Origin`` or
``Sec-Fetch-Site``. A body must be ``application/json``, which no page can send elsewhere without leave.

References:
    Fetch Living Standard, "Origin header" and "CORS protocol". https://fetch.spec.whatwg.org/
"""

from __future__ import annotations

import hmac
import os
import stat
from email.message import Message
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.serving.contract import ApiError

__all__ = ["LOOPBACK", "check_head", "read_key", "require_key"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHORTEST = 16
"""Letters of a key at least."""


def check_head(head: Message, host: str, port: int, key: str) -> None:
    """Refuse who may not ask.

    Args:
        head: The head's fields, each at most once.
        host: Where the server listens.
        port: Where the server listens.
        key: What must be known; empty: nothing.

    Raises:
        ApiError: saying why.
    """
    names = {*LOOPBACK, *([] if host in ("0.0.0.0", "::") else [host])}
    called = {_address(name, port) for name in names} | ({_address(name, 0) for name in names} if port == 80 else set())
    any_host = host in ("0.0.0.0", "::")  # its names are not known here, and a key is asked for
    if not any_host and head.get("Host", "").lower() not in called:
        raise ApiError(403, "this server is called by another name: use its own address as Host", code="host")
    origin = head.get("Origin")
    if origin is not None and origin not in {f"http://{name}" for name in called}:
        raise ApiError(403, "a page of elsewhere may not ask this server", code="origin")
    if head.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "a page of elsewhere may not ask this server", code="origin")
    if key:
        given = head.get("Authorization", "")
        if not hmac.compare_digest(given.encode(errors="replace"), f"Bearer {key}".encode()):
            raise ApiError(401, "the key is missing or another: send Authorization: Bearer KEY", code="invalid_api_key")


def _address(name: str, port: int) -> str:
    bare = f"[{name}]" if ":" in name else name
    return f"{bare}:{port}" if port else bare


def require_key(host: str, key: str) -> None:
    """Refuse an address that others can reach where nothing is asked of them.

    Args:
        host: Where a server is to listen.
        key: What clients must know.

    Raises:
        LichenError: if there is no key, and the address is not of this machine alone.
    """
    if host not in LOOPBACK and not key:
        what = "would let everybody on the network ask the model"
        raise LichenError(what, where=f"--host {host}", fix="give a key by --key-env or --key-file")


def read_key(env: str | None, file: Path | None) -> str:
    """The key that a server asks for, from the environment or a file; empty where neither is named.

    Args:
        env: A variable of the environment.
        file: A file of its owner's alone.

    Raises:
        LichenError: if it is not there, too short for a key, or others may read it.
    """
    if env is not None and file is not None:
        raise LichenError("names two keys", where="--key-file", fix="give --key-env or --key-file")
    if env is not None:
        key, where = os.environ.get(env, ""), f"--key-env {env}"
        if not key:
            raise LichenError("the environment has no such variable", where=where, fix=f"export {env}")
    elif file is not None:
        where = f"--key-file {file}"
        try:
            with open(file, encoding="ascii", errors="replace") as stream:
                if os.name == "posix" and os.fstat(stream.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise LichenError("others may read it", where=where, fix=f"chmod 600 {file}")
                key = stream.read(10_000).strip()
        except OSError as error:
            raise LichenError(f"cannot be read: {error.strerror}", where=where, fix="name a file with a key") from None
    else:
        return ""
    if len(key) < _SHORTEST or any(not 32 < ord(letter) < 127 for letter in key):
        what = f"a key has {_SHORTEST} or more letters, digits and signs, and no blanks"
        raise LichenError(what, where=where, fix="make one with: openssl rand -hex 24")
    return key

"""The words and files that NVFlare's commands take, and names that can be names.

Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import zipfile
from pathlib import Path
from typing import Any, get_args

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.federation.kits.settle import Transport
from lichen.federation.kits.tool import Words

__all__ = [
    "approve",
    "check_host",
    "check_name",
    "check_site",
    "check_transport",
    "definition",
    "digest",
    "inside",
    "member_of",
    "package",
    "write_json",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"({_LABEL}\.)*{_LABEL}")
_RESERVED = ("server", "server_parent", "admin", "relay")
"""Names that NVFlare gives to parts of itself."""

_MOST = 1 << 20
"""Bytes of a request or an answer; they have about three thousand."""

_FIX = "give the file as `lichen federation ask` or `admit` wrote it"


def check_name(name: str, where: str) -> None:
    """Nothing, for a name that files and certificates can have.

    Raises:
        LichenError: for others.
    """
    if not _NAME.fullmatch(name):
        fix = "take letters, digits, - and _, at most 60, and begin with a letter or digit"
        raise LichenError(f"{name!r} cannot be a name", where=where, fix=fix)


def check_site(name: str, host: str, where: str) -> None:
    """:func:`check_name`, and neither the server's name nor one that a part of NVFlare has.

    Raises:
        LichenError: for others.
    """
    check_name(name, where)
    if name.lower() in (*_RESERVED, host.lower()):
        raise LichenError(
            f"{name!r} cannot be a site's name", where=where, fix="choose one that the server does not use"
        )


def check_transport(transport: str) -> None:
    """Nothing, for a transport that kits can be for.

    Raises:
        LichenError: for others.
    """
    if transport not in get_args(Transport):
        fix = f"one of: {', '.join(get_args(Transport))}"
        raise LichenError(f"{transport!r} is no transport", where="--transport", fix=fix)


def check_host(host: str) -> None:
    """Nothing, for a host's name or an IPv4 address.

    Raises:
        LichenError: for others.
    """
    fix = "give the name or the IPv4 address under which sites reach the server"
    if not _HOST.fullmatch(host) or len(host) > 64:
        raise LichenError(f"{host!r} is no host", where="--host", fix=fix)
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise LichenError(f"{host!r} is no address", where="--host", fix=fix) from None


def write_json(file: Path, body: dict[str, Any]) -> None:
    """Write a mapping as JSON, which is YAML, too."""
    write_atomic(file, json.dumps(body, indent=1).encode() + b"\n")


def definition(federation: str, participant: dict[str, Any]) -> dict[str, Any]:
    """What NVFlare's request is made of; the organisation is the name in letters that it may have."""
    org = participant["name"].replace("-", "_").replace(".", "_")
    return {"name": federation, "participants": [{**participant, "org": org}]}


def approve(federation: Path, request: Path, answer: Path) -> Words:
    """The command that signs a request with the authority in a federation's folder."""
    profile, authority = federation / "profile.yaml", federation / "authority"
    return ["cert", "approve", request, "-c", authority, "--profile", profile, "--out", answer]


def package(answer: Path, work: Path, request: Path, fingerprint: str) -> Words:
    """The command that makes a kit of an answer and the folder with its key."""
    return ["package", answer, "-w", work, "--request-dir", request, "--fingerprint", fingerprint]


def digest(request: Path) -> str:
    """The sum of a request's file that two people compare: sixteen groups of four hex digits."""
    whole = hashlib.sha256(request.read_bytes()).hexdigest()
    return " ".join(whole[i : i + 4] for i in range(0, 64, 4))


def inside(archive: Path, member: str) -> dict[str, Any]:
    """What a request or an answer says of itself.

    Raises:
        LichenError: if it is neither.
    """
    try:
        body = json.loads(member_of(archive, member))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise LichenError(f"holds no {member}", where=str(archive), fix=_FIX)
    return body


def member_of(archive: Path, member: str) -> bytes:
    """The bytes of a part of a request or an answer.

    Raises:
        LichenError: if it has none.
    """
    try:
        if archive.stat().st_size <= _MOST:
            with zipfile.ZipFile(archive) as packed, packed.open(member) as file:
                return file.read(_MOST)
    except FileNotFoundError:
        raise LichenError("is not there", where=str(archive), fix=_FIX) from None
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        pass
    raise LichenError(f"holds no {member}", where=str(archive), fix=_FIX)

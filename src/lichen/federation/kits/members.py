"""Says who belongs to a federation, at its coordinator: requests that are signed, sites that are barred.

Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.record import Signer, public_key
from lichen.federation.kits.own import sign_request
from lichen.federation.kits.papers import approve, check_site, digest, inside
from lichen.federation.kits.settle import BARRED, open_kit
from lichen.federation.kits.tool import run_tool

__all__ = [
    "ABOUT",
    "AUTHORITY",
    "KITS",
    "RECORDS",
    "SERVER",
    "Federation",
    "admit",
    "admitted",
    "bar",
    "find_federation",
    "key_of",
    "read_federation",
    "signer_of",
]

AUTHORITY, SERVER, KITS, ADMITTED, RECORDS, ABOUT = (
    "authority",
    "server",
    "kits",
    "admitted",
    ".nvflare",
    "federation.json",
)
"""What lies in a federation's folder."""


KEY = "record.key"
"""The file of the server's kit with the key that signs records."""


@final
class Federation(NamedTuple):
    """A federation as its coordinator has it.

    Attributes:
        folder: Where it lies.
        name: Its name.
        host: Where its server is.
        fingerprint: Of its authority.
    """

    folder: Path
    name: str
    host: str
    fingerprint: str


@final
class Admitted(NamedTuple):
    """A site whose request was signed.

    Attributes:
        site: Its name.
        answer: The file to send back.
        request: The sum of the request's file.
        fingerprint: Of the authority.
    """

    site: str
    answer: Path
    request: str
    fingerprint: str


def admit(request: Path, folder: Path) -> Admitted:
    """Sign a site's request.

    Args:
        request: The file that the site sent.
        folder: The federation.

    Raises:
        LichenError: if it asks for anything but to be a site of this federation under a name that is free.
    """
    federation, claims = read_federation(folder), inside(request, "request.json")
    if (claims.get("kind"), claims.get("cert_type")) != ("site", "client"):
        raise LichenError("asks to be something other than a site", where=str(request), fix="do not sign it")
    if claims.get("project") != federation.name:
        what = f"asks for the federation {claims.get('project')}, and this is {federation.name}"
        raise LichenError(
            what, where=str(request), fix="let the site ask again with --for, or name another --federation"
        )
    server = open_kit(folder / SERVER)
    if (chosen := str(claims.get("transport", "nvflare"))) != server.transport:
        what = f"asks to connect over {chosen[:20]}, and the kits of this federation are for {server.transport}"
        raise LichenError(what, where=str(request), fix=f"let the site ask again with --transport {server.transport}")
    site, total = str(claims.get("name")), digest(request)
    check_site(site, federation.host, str(request))
    answer, note = folder / ADMITTED / f"{site}.signed.zip", folder / ADMITTED / f"{site}.sum"
    if site in barred(folder):
        fix = f"if it may come back, first: lichen federation bar {site} --lift"
        raise LichenError(f"the site {site} is barred", where=str(request), fix=fix)
    if (folder / KITS / site).exists() or (answer.exists() and note.read_text(encoding="utf-8") != total):
        fix = "let the site choose another name; two who have one name would take each other's place"
        raise LichenError(f"a site named {site} was admitted before", where=str(request), fix=fix)
    if not answer.exists():
        private.make_folders(answer.parent)
        write_atomic(note, total.encode())
        draft = answer.with_name(f".{site}.part.signed.zip")
        draft.unlink(missing_ok=True)
        if server.transport == "grpc":
            sign_request(request, folder / AUTHORITY, server, draft)
        else:
            run_tool([approve(folder, request, draft)], records=folder / RECORDS)
        os.replace(draft, answer)
    return Admitted(site, answer, total, federation.fingerprint)


def bar(site: str, folder: Path, *, lift: bool = False) -> list[str]:
    """Close a site out of a federation, now and after every start; a server that runs sees it within seconds.

    Args:
        site: Its name.
        folder: The federation.
        lift: Let it in again instead.

    Returns:
        All who are barred.

    Raises:
        LichenError: if no site has the name.
    """
    read_federation(folder)
    names = barred(folder)
    known = _named(folder)
    if site not in known | names:
        raise LichenError(
            f"has no site named {site}", where=str(folder), fix=f"one of: {', '.join(sorted(known)) or '-'}"
        )
    names = names - {site} if lift else names | {site}
    write_atomic(folder / SERVER / BARRED, json.dumps({"disabled_clients": sorted(names)}).encode())
    return sorted(names)


def _named(folder: Path) -> set[str]:
    """All who ever got a certificate of a federation."""
    at_once = {path.name for path in (folder / KITS).glob("*")}
    return at_once | {path.name.removesuffix(".signed.zip") for path in (folder / ADMITTED).glob("[!.]*.signed.zip")}


def admitted(folder: Path) -> tuple[str, ...]:
    """Names of the sites of a federation that are not barred, sorted.

    Raises:
        LichenError: if the folder holds no federation.
    """
    return tuple(sorted(_named(read_federation(folder).folder) - barred(folder)))


def barred(folder: Path) -> set[str]:
    """Names of the sites that are closed out of a federation."""
    try:
        return set(json.loads((folder / SERVER / BARRED).read_text(encoding="utf-8"))["disabled_clients"])
    except FileNotFoundError:
        return set()


def find_federation(folder: Path | None, name: str = "") -> Path:
    """The folder of a federation: the one that is named, or else the only one here.

    Args:
        folder: The one that is named.
        name: The federation that is meant, where that is known.

    Raises:
        LichenError: if there is none, or several.
    """
    if folder is not None:
        return read_federation(folder).folder
    here = [path.parent for path in (*Path().glob(ABOUT), *sorted(Path().glob(f"*/{ABOUT}")))]
    found = [path for path in here if name in ("", read_federation(path).name)]
    if len(found) != 1:
        what = "there are several federations here" if found else "there is no federation here"
        raise LichenError(what, where=os.getcwd(), fix="name its folder with --federation")
    return found[0]


def signer_of(federation: Federation) -> Signer:
    """The key of the server's kit, which signs the records of the runs that a federation makes."""
    return Signer(federation.folder / SERVER / KEY, federation.name)


def key_of(folder: Path) -> str:
    """The public half of :func:`signer_of`, 64 hex digits.

    Raises:
        LichenError: if the folder holds no federation, or its server has signed nothing yet.
    """
    key = signer_of(read_federation(folder)).key
    if not key.exists():
        fix = "a run that was submitted makes its key: lichen submit RECIPE"
        raise LichenError("has signed no record", where=str(folder), fix=fix)
    return public_key(key)


def read_federation(folder: Path) -> Federation:
    """What a federation's folder says of it.

    Raises:
        LichenError: if it holds none, or a damaged one.
    """
    try:
        body = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return Federation(folder, str(body["name"]), str(body["host"]), str(body["fingerprint"]))
    except FileNotFoundError:
        fix = "name the folder that `lichen federation new` made"
        raise LichenError("holds no federation", where=str(folder), fix=fix) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise LichenError("is damaged", where=str(folder / ABOUT), fix="take it from a backup") from None

"""Makes a federation's authority and kits: who may say that it is whom.

The coordinator holds the authority, whose key signs names. A site makes its own key, which never leaves it, and sends
a request; the answer is the signed name, of which the site makes its kit. Two sums are compared by telephone or the
like: that of the request, so that the coordinator signs the right one, and the authority's fingerprint, so that the
site trusts the right one. What lies where::

    NAME/authority   the authority's key and certificate: who has them is every site
    NAME/server      the coordinator's kit
    NAME/kits/SITE   kits made for sites at the coordinator, with their keys
    NAME/admitted    answers to requests, and what was asked
    NAME-SITE        at a site: request/ with its key, the request file, and kit/

All of it is its owner's alone. Nothing here needs torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder, write_atomic
from lichen.federation.kits.members import ABOUT, AUTHORITY, KITS, RECORDS, SERVER, Federation, read_federation
from lichen.federation.kits.own import make_authority, make_kit, make_kit_of, make_request
from lichen.federation.kits.papers import (
    approve,
    check_host,
    check_name,
    check_site,
    check_transport,
    definition,
    digest,
    inside,
    package,
    write_json,
)
from lichen.federation.kits.settle import Kit, Transport, settle
from lichen.federation.kits.tool import Words, needs_nvflare, run_tool
from lichen.federation.policy.keys import POLICY, policy_text

__all__ = ["accept", "ask", "new"]


def new(
    folder: Path, *, name: str, host: str, port: int, sites: Sequence[str] = (), transport: Transport = "nvflare"
) -> Federation:
    """Make an authority and the server's kit, and kits for sites whose keys may be made here.

    Args:
        folder: Where to; its name must be free.
        name: The federation's.
        host: The server's name or address, as sites reach it.
        port: The server's port.
        sites: Names of sites that get a kit at once.
        transport: What carries bytes between them.

    Raises:
        LichenError: for a bad name, or where a federation lies there already: there is never a second authority over
            a first.
    """
    check_name(name, "NAME")
    check_host(host)
    if not 0 < port < 1 << 16:
        raise LichenError(f"{port} is no port", where="--port", fix="choose one of 1 to 65535")
    for site in sites:
        check_site(site, host, "--sites")
    if len(set(sites)) < len(sites):
        raise LichenError("names a site twice", where="--sites", fix="leave one out")
    if (folder / AUTHORITY).exists() or (folder / ABOUT).exists():
        fix = "use it, or choose another --out; a second authority would lock all its sites out"
        raise LichenError("holds a federation", where=str(folder), fix=fix)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LichenError("is not empty", where=str(folder), fix="choose another --out")
    check_transport(transport)
    if transport == "nvflare":
        needs_nvflare()
    with whole_folder(folder, shared=False, replace=False) as draft:
        make = _make_nvflare if transport == "nvflare" else _make_own
        fingerprint = make(draft, name, host, port, sites)
        write_json(draft / ABOUT, {"name": name, "host": host, "port": port, "fingerprint": fingerprint})
        private.tighten(draft)
    if read_federation(folder).fingerprint != fingerprint:  # somebody was quicker
        raise LichenError("holds a federation", where=str(folder), fix="use it, or choose another --out")
    return Federation(folder, name, host, fingerprint)


def _make_own(draft: Path, name: str, host: str, port: int, sites: Sequence[str]) -> str:
    """An authority and kits for gRPC."""
    fingerprint = make_authority(draft / AUTHORITY, name)
    make_kit(draft / AUTHORITY, Kit(draft / SERVER, "server", name, host, host, port, "grpc"))
    for site in sites:
        make_kit(draft / AUTHORITY, Kit(draft / KITS / site, "site", name, site, host, port, "grpc"))
        _write_policy(draft / KITS / site)
    return fingerprint


def _make_nvflare(draft: Path, name: str, host: str, port: int, sites: Sequence[str]) -> str:
    """An authority and kits by NVFlare's own commands."""
    server = {"host": host, "fed_learn_port": port, "admin_port": port}
    profile = {"name": name, "scheme": "grpc", "connection_security": "mtls", "server": server}
    write_json(draft / "profile.yaml", profile)
    made = run_tool(
        [["cert", "init", "--profile", draft / "profile.yaml", "-o", draft / AUTHORITY]], records=draft / RECORDS
    )
    fingerprint = str(made[0]["rootca_fingerprint_sha256"])
    whom: dict[str, dict[str, Any]] = {SERVER: {"name": host, "type": "server", **server}}
    whom |= {f"{KITS}/{site}": {"name": site, "type": "client"} for site in sites}
    _kits_at_once(draft, name, whom, fingerprint)
    return fingerprint


def _kits_at_once(draft: Path, name: str, whom: dict[str, dict[str, Any]], fingerprint: str) -> None:
    """Make keys, sign them and make kits, in one go."""
    work = draft / ".work"
    commands: list[Words] = []
    for number, participant in enumerate(whom.values()):
        made = work / str(number)
        write_json(work / f"{number}.yaml", definition(name, participant))
        request, answer = made / f"{participant['name']}.request.zip", work / f"{number}.signed.zip"
        commands.append(["cert", "request", "-p", work / f"{number}.yaml", "--out", made])
        commands.append(approve(draft, request, answer))
        commands.append(package(answer, work, made, fingerprint))
    run_tool(commands, records=draft / RECORDS)
    for place, participant in whom.items():
        (draft / place).parent.mkdir(exist_ok=True)
        os.rename(work / name / "prod_00" / participant["name"], draft / place)
        settle(draft / place)
        if participant["type"] == "client":
            _write_policy(draft / place)
    shutil.rmtree(work)


def ask(folder: Path, *, name: str, federation: str, transport: Transport = "nvflare") -> tuple[Path, str]:
    """Make a site's key, and the request to be admitted; the key never leaves the folder.

    Args:
        folder: Where to; its name must be free.
        name: The site's.
        federation: The name of the federation.
        transport: What its kits are for, as the coordinator has it.

    Returns:
        The request's file, and its sum, which the coordinator compares.

    Raises:
        LichenError: for a bad name, or a folder that is not empty.
    """
    check_name(federation, "--for")
    check_site(name, "", "--name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LichenError("is not empty", where=str(folder), fix="choose another --out")
    check_transport(transport)
    file = folder / f"{name}.request.zip"
    if transport == "grpc":
        with whole_folder(folder, shared=False, replace=False) as draft:
            make_request(draft, name=name, federation=federation)
            private.tighten(draft)
        return file, digest(file)
    needs_nvflare()
    with whole_folder(folder, shared=False, replace=False) as draft:
        write_json(draft / "site.yaml", definition(federation, {"name": name, "type": "client"}))
        run_tool([["cert", "request", "-p", draft / "site.yaml", "--out", draft / "request"]], records=draft / RECORDS)
        os.rename(draft / "request" / f"{name}.request.zip", draft / f"{name}.request.zip")
        (draft / "site.yaml").unlink()
        private.tighten(draft)
    return file, digest(file)


def accept(answer: Path, folder: Path | None, *, fingerprint: str) -> Path:
    """Make a site's kit of the coordinator's answer.

    Args:
        answer: The file that the coordinator sent.
        folder: That of :func:`ask`; None: the one here that holds the site's key.
        fingerprint: Of the authority, as it was told by another way.

    Returns:
        The kit's folder.

    Raises:
        LichenError: if the answer is for another key, or of an authority with another fingerprint.
    """
    signed = inside(answer, "signed.json")
    site = str(signed.get("name"))
    if folder is None:
        folder = Path(f"{signed.get('project')}-{site}")
    kit = folder / "kit"
    if not (folder / "request" / f"{site}.key").is_file():
        fix = "name the folder that `lichen federation ask` made, with --folder"
        raise LichenError(f"there is no key of {site} to which this is the answer", where=str(folder), fix=fix)
    if kit.exists():
        raise LichenError("is there already", where=str(kit), fix="use it, or move it away")
    digits = re.sub(r"[^0-9A-F]", "", fingerprint.upper().removeprefix("SHA256"))
    if len(digits) != 64:
        fix = "give it as the coordinator reads it out: SHA256: and 32 pairs of hex digits"
        raise LichenError("is no fingerprint", where="--fingerprint", fix=fix)
    expected = "SHA256:" + ":".join(digits[i : i + 2] for i in range(0, 64, 2))
    with whole_folder(folder / ".work", shared=False) as work:
        if signed.get("transport") == "grpc":
            made = work / "kit"
            make_kit_of(answer, folder / "request", made, expected)
        else:
            run_tool([package(answer, work, folder / "request", expected)], records=folder / RECORDS)
            made = work / str(signed.get("project")) / "prod_00" / site
        settle(made)
        os.rename(made, kit)
    shutil.rmtree(folder / ".work", ignore_errors=True)
    settle(kit)
    _write_policy(kit)
    private.tighten(folder)
    return kit


def _write_policy(kit: Path) -> None:
    """The careful policy, for the site's person to open."""
    write_atomic(kit / POLICY, policy_text().encode())

"""Removes what a site holds of runs, and writes a line of proof in the site's own ``deletions.jsonl``.

All of a kit goes but its keys and certificates, its policy, what says that it has withdrawn, and what its clients have
spent of their promised privacy: that is owed to their rows for as long as what was trained on them is in the world, and
so ``accounts`` and ``budget.jsonl`` of each run are copied to ``spent`` before the run's folder goes.

Lines are chained, and the head is signed by the key of the site's certificate. A line names no file: it has a salted
digest of all that was removed. Whoever has the salt, which is shown once, and a copy of the files can show what they
were.

Reference:
    Stuart Haber and W. Scott Stornetta. "How to Time-Stamp a Digital Document." Journal of Cryptology, 1991.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import gmtime, strftime
from typing import Any, NamedTuple, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.manifest import sha256_of
from lichen.core.files.record import Record, canonical, chain
from lichen.federation.kits.settle import CURRENT, RUNS, SUPERVISOR, current_run, open_kit
from lichen.federation.kits.signing import authority_of, require_proof, sign_as_site
from lichen.federation.leaving.marker import MARKER, others_of, write_others
from lichen.federation.leaving.notice import TIME
from lichen.recipes.artifacts.withdrawn.deletions import DELETIONS, salted

__all__ = ["Removed", "remove_all", "remove_runs_with", "require_proven"]

_HEAD, _SPENT = "deletions.json", "spent"

_STAYS = (
    "startup",
    "local",
    "policy.yaml",
    MARKER,
    DELETIONS,
    _HEAD,
    _SPENT,
    ".lock",
    "run",
    SUPERVISOR,
    f".{SUPERVISOR}",
)
"""What of a kit is not removed when its site leaves."""

_NOTHING = hashlib.sha256().hexdigest()
_ACCOUNT = re.compile(r"(.*/)?(accounts/\d+|budget)\.jsonl")


@final
class Removed(NamedTuple):
    """What was removed.

    Attributes:
        files: How many.
        bytes: Of them.
        accounts: Files of spent privacy that stay.
        receipt: The salt of the line's digest, 64 hex digits; empty where nothing was removed and no line written.
    """

    files: int
    bytes: int
    accounts: int
    receipt: str


def remove_all(kit: Path) -> Removed:
    """Remove everything that a site which has withdrawn holds; called again, what is left.

    Args:
        kit: Its kit.

    Raises:
        LichenError: if the kit is damaged.
    """
    tops = sorted(path for path in kit.iterdir() if path.name not in _STAYS)
    return _remove(kit, tops, {"kind": "the site has withdrawn"})


def remove_runs_with(kit: Path, site: str) -> Removed:
    """Remove what came of runs with another site that has withdrawn; the coordinator hears of it at the next question.

    Args:
        kit: The kit of a site that stays.
        site: Who has withdrawn.

    Raises:
        LichenError: if the coordinator has sent nothing of that site, or one of the runs goes on.
    """
    known = others_of(kit)
    if site not in known:
        names = ", ".join(sorted(known)) or "-"
        raise LichenError(f"no site named {site} is known here to have withdrawn", where="--of", fix=f"one of: {names}")
    runs = known[site]["runs"]
    if (current := current_run(kit)) in runs:
        raise LichenError(f"run {current} goes on", where=str(kit), fix="call it again when that is over")
    found = _remove(kit, [kit / RUNS / run for run in runs], {"kind": "another site has withdrawn", "of": site})
    known[site]["deleted"] = strftime(TIME, gmtime())
    write_others(kit, known)
    return found


def _remove(kit: Path, tops: Sequence[Path], why: dict[str, str]) -> Removed:
    """Copy the accounts, write and sign the line, and remove; what a kill leaves a second call removes."""
    files = sorted({file for top in tops for file in _files(top)})
    accounts = [file for file in files if _ACCOUNT.fullmatch(file.relative_to(kit).as_posix())]
    for file in accounts:
        write_atomic(kit / _SPENT / file.relative_to(kit / RUNS), file.read_bytes())
    if not files:
        _unlink(tops)
        return Removed(0, 0, len(_files(kit / _SPENT)), "")
    salt, size = os.urandom(32).hex(), sum(file.lstat().st_size for file in files)
    runs = sorted({file.relative_to(kit).parts[1] for file in files if file.is_relative_to(kit / RUNS)} - {CURRENT})
    about: dict[str, Any] = {"time": strftime(TIME, gmtime()), **why, "runs": runs, "files": len(files), "bytes": size}
    about |= {"spent": len(accounts), "digest": salted(salt, _listing(kit, files))}
    _write_line(kit, about)
    _unlink(tops)
    return Removed(len(files), size, len(_files(kit / _SPENT)), salt)


def _files(top: Path) -> list[Path]:
    """The files under a path, or itself; links count as themselves."""
    if top.is_symlink() or top.is_file():
        return [top]
    return [path for path in top.rglob("*") if path.is_symlink() or path.is_file()] if top.is_dir() else []


def _unlink(tops: Iterable[Path]) -> None:
    for top in tops:
        if top.is_dir() and not top.is_symlink():
            shutil.rmtree(top)
        else:
            top.unlink(missing_ok=True)


def _listing(kit: Path, files: Iterable[Path]) -> bytes:
    """A line for each file: its digest, of a link that of no bytes, and its path."""
    lines = []
    for path in files:
        digest = _NOTHING if path.is_symlink() else sha256_of(path)
        lines.append(f"{digest} {path.relative_to(kit).as_posix()}\n")
    return "".join(lines).encode("utf-8", "surrogatepass")


def _write_line(kit: Path, about: dict[str, Any]) -> None:
    one, path = open_kit(kit), kit / DELETIONS
    chain(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    Record(path, text).end({**about, "federation": one.federation, "site": one.name})
    lines, head = chain(path)
    body: dict[str, Any] = {"head": head, "lines": len(lines), "site": one.name, "federation": one.federation}
    certificate, proof = sign_as_site(one, canonical(body))
    write_atomic(kit / _HEAD, canonical({**body, "certificate": certificate, "proof": proof}))


def require_proven(kit: Path) -> list[dict[str, Any]]:
    """The lines of a kit's ``deletions.jsonl``, if they are as they were written and the site has signed them.

    Args:
        kit: The site's kit.

    Raises:
        LichenError: if they are not.
    """
    lines, head = chain(kit / DELETIONS)
    try:
        whole = json.loads((kit / _HEAD).read_text(encoding="utf-8"))
        body = {key: whole[key] for key in ("head", "lines", "site", "federation")}
        if body["head"] != head or body["lines"] != len(lines):
            raise ValueError
        require_proof(body["site"], whole["certificate"], whole["proof"], canonical(body), authority_of(kit))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fix = "put it back from a copy"
        raise LichenError("is not what the site has signed", where=str(kit / DELETIONS), fix=fix) from None
    return lines

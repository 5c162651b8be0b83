"""What a site's kit says of withdrawal: that the site itself has left, and which others have, whose runs it holds.

``withdrawn.json`` is written first of all when a site leaves: from then on its process refuses every recipe, job and
message, however often it is started, for there is no command that takes it back. ``withdrawals.json`` holds what the
coordinator has sent of others. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from time import gmtime, strftime
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.engines.sites import WITHDRAWAL
from lichen.federation.kits.settle import is_run, open_kit
from lichen.federation.leaving.notice import TIME, make_notice

__all__ = [
    "LEAVING",
    "MARKER",
    "answer_leaving",
    "mark",
    "marker_of",
    "others_of",
    "refuse_left",
    "write_others",
]

LEAVING = "leaving"
"""The question whether a site has withdrawn, and what it has deleted."""

MARKER, OTHERS = "withdrawn.json", "withdrawals.json"

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
_MOST = 1000
"""Sites or runs that are named at a time."""


def marker_of(kit: Path) -> dict[str, str] | None:
    """``time``, when the site has withdrawn, and ``entered``, empty until the coordinator knows; None: it has not."""
    file = kit / MARKER
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"time": str(found["time"]), "entered": str(found["entered"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"time": strftime(TIME, gmtime()), "entered": ""}  # a damaged marker is one all the same


def mark(kit: Path, *, entered: str | None = None) -> dict[str, str]:
    """Write that the site has withdrawn, or when the coordinator has entered it; the first time stays.

    Args:
        kit: The site's kit.
        entered: The time that the coordinator's register has; None: as it was.
    """
    known = marker_of(kit)
    about = known or {"time": strftime(TIME, gmtime()), "entered": ""}
    if entered is not None:
        about = {**about, "entered": entered}
    if about != known or not (kit / MARKER).exists():
        write_atomic(kit / MARKER, json.dumps(about).encode() + b"\n")
    return about


def refuse_left(kit: Path) -> None:
    """Refuse whatever is asked of a site that has withdrawn.

    Raises:
        LichenError: if it has.
    """
    if (kit / MARKER).exists():
        fix = "go on without it; its owner may join again with a new kit, under another name"
        raise LichenError("this site has withdrawn from the federation", where=WITHDRAWAL, fix=fix)


def others_of(kit: Path) -> dict[str, dict[str, Any]]:
    """Of each other site that has withdrawn ``time``, ``runs`` and ``deleted``, empty until that is done here."""
    try:
        found = json.loads((kit / OTHERS).read_text(encoding="utf-8"))
        return {
            str(site): {
                "time": str(one["time"]),
                "runs": [str(run) for run in one["runs"] if is_run(str(run))],
                "deleted": str(one["deleted"]),
            }
            for site, one in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_others(kit: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what :func:`others_of` reads."""
    write_atomic(kit / OTHERS, json.dumps(known, indent=1).encode() + b"\n")


def answer_leaving(kit: Path, body: bytes, say: Callable[[str], None]) -> bytes:
    """A site's answer to :data:`LEAVING`: its notice, if it has withdrawn, and what it has deleted of others.

    Args:
        kit: The site's kit.
        body: The question.
        say: Called with who else has withdrawn, and what to do.

    Raises:
        LichenError: for bytes that are no such question.
    """
    try:
        values = json.loads(body)
        nonce, entered = values["nonce"], values["entered"]
        others = [_other(one) for one in values["withdrawn"][:_MOST]]
        if not isinstance(nonce, str) or not isinstance(entered, str) or len(entered) > 60:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        fix = "both ends must run the same version of lichen"
        raise LichenError("a question that cannot be read", where=WITHDRAWAL, fix=fix) from None
    marker, notice = marker_of(kit), None
    if marker is not None:
        if entered and not marker["entered"]:
            mark(kit, entered=entered)
        notice = make_notice(open_kit(kit), marker["time"], nonce).dump()
    known = others_of(kit)
    for site, time, runs in others if marker is None else ():
        if site not in known or set(runs) - set(known[site]["runs"]):
            before = known.get(site, {"runs": []})["runs"]
            known[site] = {"time": time, "runs": sorted({*before, *runs}), "deleted": ""}
            write_others(kit, known)
            what = f"{site} has withdrawn ({time}); what came of runs with it still lies here ({', '.join(runs)})"
            say(f"{what}: delete it with lichen withdraw {kit} --of {site}")
    deleted = [site for site, one in known.items() if one["deleted"]]
    return json.dumps({"notice": notice, "deleted": deleted}).encode()


def _other(plain: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    site, time, runs = plain["site"], plain["time"], plain["runs"]
    good = isinstance(site, str) and _SITE.fullmatch(site) and isinstance(time, str) and len(time) <= 60
    if not good or not isinstance(runs, list) or len(runs) > _MOST:
        raise ValueError
    if not all(isinstance(run, str) and is_run(run) for run in runs):
        raise ValueError
    return site, "".join(letter for letter in time if letter.isprintable()), runs

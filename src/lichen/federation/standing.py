"""How a federation stands: each site with since when, last heard, its rows, round, bytes, and what it is doing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError, Sites
from lichen.federation.door import call, door_of
from lichen.federation.kits.members import ABOUT, SERVER, admitted
from lichen.federation.kits.settle import open_kit
from lichen.federation.leaving.marker import marker_of, others_of
from lichen.federation.leaving.register import Register
from lichen.federation.supervision.supervisor import stop_kit, supervised

__all__ = ["STATUS", "call_off", "site_standing", "standing"]

STATUS = "status"
"""The question what a site is doing."""

_WITHIN = 3.0
"""Seconds that a site has to say what it is doing."""

_NUMBERS = ("clients", "rows", "round", "rounds", "bytes_up", "bytes_down")


def standing(folder: Path, sites: Sites) -> list[dict[str, Any]]:
    """Every site of a federation, in name order, as JSON can hold it.

    Args:
        folder: The federation.
        sites: Asks them.

    Returns:
        ``site``, ``there``, and of one that is there ``since`` and ``last`` in seconds of the epoch, ``doing``, and of
        one in a run ``recipe``, ``clients``, ``rows``, ``round``, ``rounds``, ``bytes_up`` and ``bytes_down``. Of one
        that has withdrawn ``withdrawn``, the time, ``runs``, folders of those that were made with it, and ``copies``,
        the sites that have yet to delete what came of these.
    """
    seen, names = sites.seen(), admitted(folder)
    register = Register(folder)
    gone = register.withdrawn()

    def row(name: str) -> dict[str, Any]:
        if name in gone:
            copies, runs = register.with_copies(name), [str(one["folder"]) for one in register.runs_of(name)]
            doing = f"withdrawn ({gone[name]})" + (f"; copies at {', '.join(copies)}" if copies else "")
            more = {"withdrawn": gone[name], "runs": runs, "copies": list(copies)}
            return {"site": name, "there": False, "doing": doing, **more}
        if name not in seen:
            return {"site": name, "there": False, "doing": "is not connected"}
        one = seen[name]
        about: dict[str, Any] = {"site": name, "there": True, "since": one.since, "last": one.last}
        try:
            return {**about, **_plain(json.loads(ask_long(sites, name, STATUS, b"", _WITHIN)))}
        except SiteError as error:
            return {**about, "doing": f"{error.error.what}"}
        except (ValueError, RecursionError):
            return {**about, "doing": "says something that is no JSON"}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(row, names))


def _plain(answer: object) -> dict[str, Any]:
    """What a site says of itself, whatever is in it: whole numbers and short lines."""
    if not isinstance(answer, Mapping):
        return {"doing": "says something else"}
    numbers = {key: answer[key] for key in _NUMBERS if type(answer.get(key)) is int}
    words = {key: str(answer[key])[:100] for key in ("recipe", "run", "doing") if key in answer}
    return {"doing": "is there", **words, **numbers}


def site_standing(kit: Path) -> dict[str, Any]:
    """What a site that runs on this machine is doing.

    Returns:
        As :func:`standing`; ``restarts``, how often its worker was started again, where a supervisor knows; and
        ``copies``, by site that has withdrawn the runs of which something still lies here.

    Raises:
        LichenError: if it does not run.
    """
    if (marker := marker_of(kit)) is not None:
        known = (
            f"the coordinator knows since {marker['entered']}" if marker["entered"] else "the coordinator does not know"
        )
        doing = f"has withdrawn ({marker['time']}); {known}"
        return {"site": open_kit(kit).name, "there": False, "withdrawn": marker["time"], "doing": doing}
    over = supervised(kit)
    try:
        head, _ = call(door_of(kit), {"op": "status"}, within=_WITHIN)
    except OSError:
        if over is None:
            raise LichenError("does not run", where=str(kit), fix=f"start it: lichen join {kit} --data FILE") from None
        head = {"doing": over["doing"] or "its worker starts"}
    about = {"site": open_kit(kit).name, "there": head.pop("joined", False), "last": time.time(), **_plain(head)}
    if over is not None:
        about["restarts"] = over["restarts"]
        if over["restarts"]:
            about["doing"] += f"; its worker was started again {_times(over['restarts'])}"
    copies = {site: one["runs"] for site, one in others_of(kit).items() if not one["deleted"]}
    if copies:
        about["copies"] = copies
        about["doing"] += f"; to delete: what came of runs with {', '.join(sorted(copies))}, who has withdrawn"
    return about


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def call_off(place: Path) -> str:
    """End the server or the site that runs on this machine; a site says goodbye.

    Args:
        place: A federation's folder, or a kit.

    Returns:
        What was ended.

    Raises:
        LichenError: if it does not run.
    """
    kit = open_kit(place / SERVER if (place / ABOUT).is_file() else place)
    if not stop_kit(kit.folder):
        raise LichenError("does not run", where=str(place), fix="there is nothing to stop")
    return f"the server of {kit.federation}" if kit.kind == "server" else f"site {kit.name}"

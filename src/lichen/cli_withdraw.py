"""The command ``withdraw`` at a site, and what ``lichen forget FEDERATION --site`` prints at the coordinator.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path

from lichen.core.errors import LichenError
from lichen.shell import log, print_json, say

__all__ = ["forget_site", "withdraw_command"]


def withdraw_command(kit: Path, /, *, of: str | None = None, wait: float = 60.0, json: bool = False) -> None:
    """Leave a federation for good, at a site: its process refuses everything from now on, and what it holds is removed.

    It cannot be taken back: who wants to join again needs a new kit, under another name. What its clients have spent of
    their promised privacy stays, in the folder spent of the kit. Called again, it notifies a coordinator that could not
    be reached.

    Parameters
    ----------
    kit
        The folder of the site's kit.
    of
        Another site that has withdrawn: this one stays, and removes what came of runs with that one.
    wait
        Seconds for the coordinator to be reached; 0: leave without notifying it.
    json
        Print what was done as JSON, and nothing else, on standard output.
    """
    from lichen.federation.kits.settle import open_kit
    from lichen.federation.leave import leave
    from lichen.federation.leaving.marker import refuse_left
    from lichen.federation.leaving.removal import Removed, remove_runs_with
    from lichen.present.units import bytes_text

    if wait < 0:
        raise LichenError("is less than 0", where="--wait", fix="give the seconds to wait")

    def lines_of(removed: Removed) -> None:
        say(f"removed {removed.files:,} files ({bytes_text(removed.bytes)}), as {kit / 'deletions.jsonl'} says")
        if removed.accounts:
            say(f"{removed.accounts:,} accounts of spent privacy stay: {kit / 'spent'}")
        if removed.receipt:
            say(f"receipt, which lies nowhere else: {removed.receipt}")

    if of is not None:
        if open_kit(kit).kind != "site":
            raise LichenError("is the server's kit", where=str(kit), fix="name a site's")
        refuse_left(kit)
        removed = remove_runs_with(kit, of)
        if json:
            print_json({"of": of, **removed._asdict()})
            return
        lines_of(removed)
        say("the coordinator hears of it when it next asks this site")
        return
    left = leave(kit, wait=wait, say=log)
    if json:
        print_json({**left._asdict(), "removed": left.removed._asdict()})
        return
    say(f"{left.site} has withdrawn ({left.time}), and refuses everything from now on")
    lines_of(left.removed)
    if left.cache:
        say(f"removed {bytes_text(left.cache)} that were made of rows in the cache")
    if left.entered:
        say("the coordinator knows, and asks for nothing more")
    else:
        say(f"the coordinator does not know yet: call lichen withdraw {kit} again when its server runs")


def forget_site(folder: Path, site: str, *, json: bool) -> None:
    """Enter at the coordinator that a site has withdrawn, where it is not known, and print what is left to be done.

    Args:
        folder: The federation.
        site: The site's name.
        json: As JSON.

    Raises:
        LichenError: if it is no federation, or has no such site.
    """
    from lichen.federation.leaving.register import Register

    register = Register(folder)
    time = register.add(site, None)
    runs, copies = register.runs_of(site), register.with_copies(site)
    if json:
        print_json({"site": site, "withdrawn": time, "runs": runs, "copies": list(copies)})
        return
    say(f"{site} has withdrawn ({time}): it is asked for nothing more, in this run and all later ones")
    for run in runs:
        what = f"{run.get('recipe') or 'a run'} in {run['folder']} was made with it"
        say(f"{what}: submit its recipe again, which the others run without it, and delete that folder")
    if copies:
        say(f"these sites have yet to answer that they have deleted what came of these runs: {', '.join(copies)}")

"""Who takes part in a run of a federation: its sites, there and of the same versions, asked at the server's door."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from lichen import __version__
from lichen.core.errors import LichenError
from lichen.core.files.lock import one_process
from lichen.engines.sites import Seen
from lichen.federation.asking import SPARE, DoorSites
from lichen.federation.door import call, door_of
from lichen.federation.kits.members import SERVER, admitted, read_federation, signer_of
from lichen.federation.leaving.asking import RegisteredSites
from lichen.federation.leaving.register import Register, sentence
from lichen.recipes.sites.remote_sites import RemoteSites

__all__ = ["served", "sites_for_run"]

_LOCK = ".submitted"
"""The file in the server's kit whose lock a run holds."""


def served(folder: Path) -> DoorSites:
    """The sites of a federation whose server runs on this machine.

    Raises:
        LichenError: if it does not.
    """
    door = door_of(folder / SERVER)
    try:
        call(door, {"op": "seen"}, within=SPARE)
    except OSError:
        fix = f"start it in another terminal: lichen serve {folder}"
        raise LichenError("nobody serves this federation here", where=str(folder), fix=fix) from None
    return DoorSites(door)


@contextmanager
def sites_for_run(
    folder: Path,
    names: Sequence[str],
    *,
    wait: float,
    say: Callable[[str], None],
    left_out: Mapping[str, str] | None = None,
    begun: Collection[str] = (),
) -> Iterator[RemoteSites]:
    """The sites of one run.

    Args:
        folder: The federation.
        names: Sites that take part; none: all that are admitted and not barred.
        wait: Seconds to wait for them.
        say: Told who is waited for.
        left_out: What the recipe compared with before, and why not any more.
        begun: Sites with which the run has begun before, if it goes on: it does so without those that do not come,
            which are waited for in each round as ever.

    Raises:
        LichenError: if the server does not run, another run is going on, a name is unknown, a site does not come, or
            runs another version.
    """
    register = Register(folder)
    known, gone = admitted(folder), register.withdrawn()
    if named := [name for name in names if name in gone]:
        raise LichenError(sentence(named[0], gone[named[0]]).what, where=f"--sites {named[0]}", fix="leave it out")
    known = tuple(name for name in known if name not in gone)
    if unknown := [name for name in names if name not in known]:
        what = f"{unknown[0]!r} is no site of this federation, or barred"
        raise LichenError(what, where="--sites", fix=f"one of: {', '.join(known) or '-'}")
    chosen = tuple(names or known)
    if not chosen:
        raise LichenError("has no site", where=str(folder), fix="admit one: lichen federation admit REQUEST")
    sites = RegisteredSites(served(folder), register, say=say)
    fix = "wait for its end, or stop it with Ctrl-C where it was submitted"
    refusal = LichenError("another run is going on", where=str(folder), fix=fix)
    with one_process(folder / SERVER, _LOCK, say=say, refusal=refusal):
        _wait_for(sites, chosen, wait, say, begun)
        yield RemoteSites(
            sites,
            chosen,
            left_out=left_out,
            signer=signer_of(read_federation(folder)),
            left=register.refusals,
            look=sites.look_at,
            enrolled=register.enter_run,
        )


def _wait_for(
    sites: RegisteredSites, names: Sequence[str], wait: float, say: Callable[[str], None], begun: Collection[str]
) -> None:
    end, shown = time.monotonic() + wait, ""
    while missing := [name for name in names if name not in (seen := sites.seen())]:
        if time.monotonic() > end and len(missing) < len(names) and set(missing) <= set(begun):
            say(f"goes on without {', '.join(missing)} until it comes; each round waits for it, at most ten minutes")
            break
        if time.monotonic() > end:
            there = ",".join(name for name in names if name not in missing) or "NAMES"
            fix = f"let its person start it (lichen join KIT --data FILE), or run without it: --sites {there}"
            raise LichenError(f"did not come within {wait:.0f} seconds", where=f"site {missing[0]}", fix=fix)
        if (line := f"waiting for {', '.join(missing)}") != shown:
            say(line)
            shown = line
        time.sleep(0.2)
    for name in (one for one in names if one in seen):
        _check_versions(name, seen[name], say)


def _check_versions(name: str, seen: Seen, say: Callable[[str], None]) -> None:
    """Refuse a site whose lichen or torch is another: messages may mean something else there, and bits differ."""
    here: Mapping[str, str] = {"lichen": __version__, "torch": metadata.version("torch")}
    for package, version in here.items():
        there = seen.versions.get(package, "unknown")
        if there.partition("+")[0] != version.partition("+")[0]:
            what = f"has {package} {there}, and the server has {version}"
            raise LichenError(what, where=f"site {name}", fix="install the same version at both ends")

"""The command ``cache``: lists and clears the cache folder.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import sys
import time
from typing import Literal

from lichen.core.errors import LichenError
from lichen.shell import log, print_json, say, show

__all__ = ["cache_command"]


def cache_command(
    *,
    clear: Literal["private", "models", "all"] | None = None,
    verify: bool = False,
    yes: bool = False,
    json: bool = False,
) -> None:
    """Show what lies in the cache folder: what, how large, how old, and whether it holds private rows.

    The folder is LICHEN_CACHE, else XDG_CACHE_HOME/lichen, else ~/.cache/lichen.

    Parameters
    ----------
    clear
        Remove what was made of private rows, what can be fetched again, or both.
    verify
        Read every model and data set, and say which is damaged.
    yes
        Remove without asking.
    json
        Print the list as JSON, and nothing else, on standard output.
    """
    from lichen.data.sources.cache_listing import clear as clear_group
    from lichen.data.sources.cache_listing import items
    from lichen.data.sources.entries import cache_dir
    from lichen.present.table import new_table
    from lichen.present.units import bytes_text

    if verify:
        if clear is not None or json:
            raise LichenError("looks, and does nothing else", where="--verify", fix="leave out --clear and --json")
        _verify()
        return
    found = items()
    if clear is None:
        if json:
            keys = ("what", "private", "bytes", "used")
            print_json([{key: getattr(one, key) for key in keys} | {"path": str(one.place)} for one in found])
            return
        table = new_table(None, "what", "holds", "size", "last used", "path", numbers=["size"])
        for one in found:
            holds = "private rows" if one.private else "public"
            table.add_row(one.what, holds, bytes_text(one.bytes), _age(time.time() - one.used), str(one.place))
        show(table) if found else say(f"nothing lies in {cache_dir()}")
        return
    if json:
        raise LichenError("shows a list and removes nothing", where="--json", fix="leave out --json or --clear")
    goes = [one for one in found if clear == "all" or one.private == (clear == "private")]
    if not goes:
        say(f"nothing of that kind lies in {cache_dir()}")
        return
    for one in goes:
        log(f"{bytes_text(one.bytes):>10}  {one.what}  {one.place}")
    if not yes:
        if not sys.stdin.isatty():
            raise LichenError("nobody can be asked", where="lichen cache --clear", fix="add --yes")
        print("remove them? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            log("nothing was removed")
            return
    say(f"removed {bytes_text(clear_group(clear))}")


def _verify() -> None:
    from lichen.data.sources.cache_listing import verify
    from lichen.data.sources.entries import cache_dir

    faults = 0
    for folder, fault in verify():
        damaged = fault and not fault.startswith("has no digests")
        faults += bool(damaged)
        say(fault if damaged else f"{folder}: {fault or 'whole'}")
    if faults:
        what = f"{faults} {'folders are' if faults > 1 else 'folder is'} damaged"
        raise LichenError(what, where=str(cache_dir()), fix="do as is said beside each of them")


def _age(seconds: float) -> str:
    days = int(max(0.0, seconds) // (24 * 3600))
    return "today" if days == 0 else f"{days} day{'' if days == 1 else 's'} ago"

"""Reads what is asked of ``lichen forget``: the finished run, the client that goes, how, and where the new run lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final, get_args

from lichen.core.errors import LichenError
from lichen.core.roster import Roster
from lichen.present.summary import read_summary
from lichen.recipes.assemble.sides.withdrawal.absent import no_such_client
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.stages.folder import last_stage, staged_of
from lichen.recipes.withdrawal.options import How

__all__ = ["Request", "no_such_client", "read_request", "require_same_command", "roster_in"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked: read and checked once, by the command.

    Attributes:
        folder: Of the finished run.
        client: Who is to be forgotten, as roster.json has it.
        number: Its place in the roster, from 0.
        how: The way of forgetting.
        out: The new folder.
    """

    folder: Path
    client: str
    number: int
    how: How
    out: Path


def read_request(folder: Path | str, client: str, how: str, out: Path | str | None = None) -> Request:
    """Read and check what was asked; nothing is written.

    Args:
        folder: The finished run; the folder of several stages means the last one.
        client: A name of its roster.
        how: The way of forgetting.
        out: The new folder; by default beside the old one, with ``-without-CLIENT`` behind its name.

    Raises:
        LichenError: if the folder is no finished run, knows no such client, or ``out`` does not fit.
    """
    if how not in get_args(How):
        raise LichenError(f"no way {how!r}", where="--how", fix=f"use one of: {', '.join(get_args(How))}")
    given = Path(folder)
    if staged_of(given) is not None:
        what = "is a run of several stages, of which the later ones begin with what the earlier ones learned"
        fix = "forget the client in the first stage, and run the later ones anew on what comes of it"
        raise LichenError(what, where=str(given), fix=f"{fix}: name {given}/STAGE")
    old = last_stage(given)
    read_summary(old)  # says so where it is no run, or not finished
    if (old / "recipe.yaml").is_file() and recipe_of(old).stream is not None:
        what = "is of a stream, whose periods go on from each other, so that nobody can be forgotten in one of them"
        raise LichenError(what, where=str(old), fix="run the stream anew on rows without the client's")
    names = roster_in(old).names
    if client not in names:
        raise no_such_client(client, names, where="--client")
    new = Path(out) if out is not None else old.absolute().with_name(f"{old.absolute().name}-without-{_file(client)}")
    if old.resolve() in (new.resolve(), *new.resolve().parents):
        raise LichenError("lies in the old run, which is only read", where=f"--out {new}", fix="choose one beside it")
    _require_new(new)
    return Request(folder=old, client=client, number=names.index(client), how=cast("How", how), out=new)


def roster_in(folder: Path) -> Roster:
    """The roster of a finished run.

    Raises:
        LichenError: if its folder has none, or it is damaged.
    """
    file = folder / "roster.json"
    try:
        return Roster.load(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        what = "has no roster.json, so that nobody knows whom its numbers mean"
        begun = (folder / "recipe.yaml").is_file()
        fix = f"make it again: lichen run --resume {folder}" if begun else "name the folder of a run"
        raise LichenError(what, where=str(folder), fix=fix) from None
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise LichenError(f"is damaged: {error}", where=str(file), fix="put it back from a copy") from None


def require_same_command(out: Path, text: str) -> bool:
    """Whether the new folder was begun before, by the same command.

    Args:
        out: The new folder.
        text: Of the recipe that the command gives it.

    Raises:
        LichenError: if it was begun by another one.
    """
    try:
        known = (out / "recipe.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    if known != text:
        fix = "choose another --out, or give the command of before"
        raise LichenError("was begun by another command", where=str(out), fix=fix)
    return True


def _file(client: str) -> str:
    """A client's name as a part of a folder's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in client)[:60].strip(".") or "one"


def _require_new(out: Path) -> None:
    """Nothing, where ``out`` is free, or a run that was begun and has not ended, which the same command goes on with.

    Raises:
        LichenError: if something else lies there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "recipe.yaml").is_file():
        raise LichenError("is not empty", where=f"--out {out}", fix="choose another folder")
    if (out / "summary.json").is_file():
        raise LichenError("is a finished run", where=f"--out {out}", fix="choose another folder")

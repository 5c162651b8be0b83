"""Takes a client out of a finished run's folder: what is its alone goes, and sums are those of the run without it.

The run without the client was made before, in a folder of its own. From both a third is made within the run's folder,
``.purge.part``: complete, searched for the name, and signed. Then that takes the name ``.purge``, and from then on the
purge is decided: file by file takes its place, the summary and the list of digests last, and what has no place goes. A
purge that was killed before has changed nothing; one that was killed later is ended by whoever calls it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import rename_folder, write_atomic
from lichen.core.files.lock import one_process
from lichen.core.files.manifest import MANIFEST, files_in, sha256_of
from lichen.core.files.record import RECORD, SIGNED, START, Signer, canonical, chain
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.model_card import write_adapter_card
from lichen.recipes.artifacts.record import seal_run
from lichen.recipes.artifacts.verify import KEY, PAYOUT, verify
from lichen.recipes.artifacts.verify import MANIFEST as ADAPTER_LIST
from lichen.recipes.artifacts.withdrawn.deletions import DELETIONS, PENDING, salted, salted_file
from lichen.recipes.artifacts.withdrawn.kinds import client_of, kind_of
from lichen.recipes.assemble.bases.in_force import with_base_in_force
from lichen.recipes.assemble.run_folder import LOCK
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.stages.folder import staged_of
from lichen.recipes.withdrawal.report import FORGOTTEN, REPORT
from lichen.recipes.withdrawal.request import roster_in
from lichen.recipes.withdrawal.traces.joined_record import join_records
from lichen.recipes.withdrawal.traces.listing import name_in
from lichen.recipes.withdrawal.traces.naming import contents
from lichen.recipes.withdrawal.traces.rewritten import Withdrawn, finish_written, rewritten

__all__ = ["end_purge", "is_without", "purge"]

FORMAT = 1
PLAN, FILES = "plan.json", "files"
DRAFT = f"{PENDING}.part"
ABOUT = (FORGOTTEN, REPORT)
"""In the folder of the run without the client: how it was made, and what was proven of it."""

_LATER = (RECORD, SIGNED, MANIFEST, DELETIONS, PAYOUT, f"adapter/{ADAPTER_LIST}")
"""Files that hold digests of others, or are written again by other commands: deletions name no digest of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """A purge that was done.

    Attributes:
        folder: The run's.
        instead: What the client is called from now on.
        receipt: The salt of its line in ``deletions.jsonl``, 64 hex digits: it lies nowhere else.
        changed: Files that have other bytes than before.
        removed: Files that are gone.
        again: Commands that make anew what was removed and can be.
        left: Files in which the name stands still, as a word of something else.
    """

    folder: str
    instead: str
    receipt: str
    changed: int
    removed: int
    again: tuple[str, ...]
    left: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What JSON can write."""
        return asdict(self)


def purge(
    folder: Path | str,
    client: str,
    new: Path | str,
    *,
    basis: str = "",
    requested: str = "",
    signer: Signer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Purged:
    """Take a client out of a run's folder; the folder without it goes up in it.

    Args:
        folder: The finished run's.
        client: A name of its roster.
        new: The finished run without that client, which is removed at the end; the folder itself, where the client
            never came to it.
        basis: Why, in the record's words, such as a law's.
        requested: The day on which it was asked for, as an ISO date.
        signer: Whose key signs the record; None: the run's own.
        say: Called with lines of progress.

    Raises:
        LichenError: if the two folders do not fit together, one is damaged, or a file in them is none that Lichen
            writes. Nothing is changed then.
    """
    folder, new = Path(folder), Path(new)
    if (folder / PENDING).is_dir():
        return end_purge(folder, say=say)
    day = _day(requested)
    _require_pair(folder, new)
    going = _going(folder, client)
    with ExitStack() as locks:
        for one in dict.fromkeys((folder.resolve(), new.resolve())):
            locks.enter_context(one_process(one, LOCK, say=say))
        signer = _signer(folder, signer)
        way = _require_without(folder, new, going)
        _require_known(folder, new)
        draft = folder / DRAFT
        shutil.rmtree(draft, ignore_errors=True)
        private.make_folder(draft)
        try:
            plan = _write(draft, folder, new, going, way, {"basis": basis, "asked": day}, signer)
            write_atomic(draft / PLAN, canonical(plan))
            rename_folder(draft, folder / PENDING)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        say(f"receipt of {plan['done']['instead']}: {plan['done']['receipt']}")
        return _end(folder)


def end_purge(folder: Path, *, say: Callable[[str], None] = lambda _: None) -> Purged:
    """End a purge that was killed.

    Args:
        folder: The run's.
        say: Called with lines of progress.

    Raises:
        LichenError: if none was begun.
    """
    if not (folder / PENDING).is_dir():
        what = "no purge of it was stopped"
        raise LichenError(what, where=str(folder), fix="name the client that is to go: --client NAME --purge")
    with one_process(folder, LOCK, say=say):
        return _end(folder)


def _day(requested: str) -> str:
    try:
        return date.fromisoformat(requested).isoformat() if requested else ""
    except ValueError:
        raise LichenError(f"{requested!r} is no day", where="--asked", fix="write it as 2026-11-30") from None


def _require_pair(folder: Path, new: Path) -> None:
    for one in (folder, new):
        if staged_of(one) is not None or (one / "periods").is_dir():
            what = "is of several runs, of which later ones begin with what earlier ones learned"
            raise LichenError(what, where=str(one), fix="run it anew on the rows of the others, and remove this folder")
        read_summary(one)  # says so where it is no run, or not finished
        if (one / MANIFEST).is_dir():
            what = "is a folder where a file should be"
            raise LichenError(what, where=str(one / MANIFEST), fix="choose another path, or move the folder away")
    if folder.resolve() == new.resolve():
        return  # a run that the client never came to is rid of its name
    if folder.resolve() in new.resolve().parents or new.resolve() in folder.resolve().parents:
        raise LichenError("lies in the other run's folder", where=str(new), fix="name a folder beside it")


def _going(folder: Path, client: str) -> Withdrawn:
    name, number = name_in(folder, client)
    lines, _ = chain(folder / DELETIONS)
    if number in {line.get("number") for line in lines}:
        raise LichenError(f"{client!r} was withdrawn before", where="--client", fix="name another client")
    at = len(lines) + 1
    while (instead := f"withdrawn-{at}") in name.others or instead == client:
        at += 1
    return Withdrawn(name=name, number=number, instead=instead)


def _signer(folder: Path, signer: Signer | None) -> Signer:
    """Whose key signs: that of the record, which must hold."""
    found = verify(folder)
    if signer is None and found.federation:
        what = f"the federation {found.federation} has signed this run, and its key is not here"
        raise LichenError(what, where=str(folder), fix="name the federation's folder with --federation")
    signer = signer or Signer(folder / KEY)
    if signer.named["public_key"] != found.key:
        raise LichenError("another key has signed this run", where=str(folder), fix="name the federation that ran it")
    return signer


def _require_without(folder: Path, new: Path, going: Withdrawn) -> str:
    """The way in which the other run was made without the client."""
    name = going.name.name
    if roster_in(folder).names != roster_in(new).names:
        raise LichenError("has other clients", where=str(new), fix=f"make it from {folder}: lichen forget")
    if not is_without(new, name):
        what = f"is no run without {name!r}"
        raise LichenError(what, where=str(new), fix=f"make it: lichen forget {folder} --client NAME")
    verify(new)
    return str(_about(new).get("how") or "absent")


def is_without(new: Path, client: str) -> bool:
    """Whether a folder is a finished run that a client is absent from, or from which it was made to go.

    Raises:
        LichenError: if its recipe, or what it says of itself, is damaged.
    """
    if not (new / "recipe.yaml").is_file() or not (new / "summary.json").is_file() or staged_of(new) is not None:
        return False
    absent = recipe_of(new).model_dump(mode="json")["federation"].get("absent", ())
    return client in absent or _about(new).get("client") == client


def _about(new: Path) -> Mapping[str, Any]:
    about: dict[str, Any] = {}
    for name in ABOUT:
        try:
            found = json.loads((new / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            raise LichenError("is damaged", where=str(new / name), fix="put it back from a copy") from None
        about |= found if isinstance(found, dict) else {}
    return about


def _require_known(*folders: Path) -> None:
    for folder in folders:
        for name in files_in(folder):
            if kind_of(name) is None and not name.startswith(f"{DRAFT}/"):
                what = "is no file that Lichen writes, and nobody knows what it holds"
                raise LichenError(what, where=str(folder / name), fix="look at it, and remove it or put it elsewhere")


def _write(
    draft: Path, old: Path, new: Path, going: Withdrawn, way: str, why: Mapping[str, str], signer: Signer
) -> dict[str, Any]:
    """Make the folder that takes the old one's place, and say what there is to do."""
    files = draft / FILES
    private.make_folder(files)
    for name in files_in(new):
        _put(name, new, files, going)
    for name in files_in(old):
        kind = kind_of(name)
        if (kind is not None and kind.act == "ours") or name == PAYOUT:
            _put(name, old, files, going, ours=True)
    finish_written(files, new, going)
    write_adapter_card(files, with_base_in_force(recipe_of(files), files))
    salt = os.urandom(32).hex()
    before, after = _digests(old, salt), _digests(files)
    changed = {name for name in after if not (old / name).is_file() or sha256_of(old / name) != after[name]}
    gone = sorted(before.keys() - after.keys() - {*_LATER, LOCK})
    lines, head = chain(old / DELETIONS)
    deletion = {
        "kind": "deletion",
        "format": FORMAT,
        "as": going.instead,
        "number": going.number,
        "who": salted(salt, going.name.name.encode("utf-8", "surrogatepass")),
        **why,
        "done": datetime.now(UTC).date().isoformat(),
        "way": way,
        "proof": going.name.scrubbed(_about(new).get("proof"), going.instead),
        "files": {name: [before.get(name), after.get(name)] for name in sorted(changed | set(gone))},
        "before": head if lines else START,
    }
    line = canonical(deletion)
    write_atomic(files / DELETIONS, b"".join([*map(canonical, lines), line]))
    head = chain(files / DELETIONS)[1]
    join_records(files, old, new, going.number, deletion=deletion, deletions=head, signer=signer)
    seal_run(files)
    verify(files)
    left = [name for name in files_in(files) if any(map(going.name.found, contents(files / name)))]
    done = Purged(
        folder=str(old),
        instead=going.instead,
        receipt=salt,
        changed=len(changed),
        removed=len(gone),
        again=_again(old, gone),
        left=tuple(left),
    )
    return {
        "format": FORMAT,
        "files": files_in(files),
        "new": "" if new.resolve() == old.resolve() else str(new.resolve()),
        "done": done.as_dict(),
    }


def _put(name: str, source: Path, files: Path, going: Withdrawn, *, ours: bool = False) -> None:
    """A file of a run, without the client, where it has a place in the purged run."""
    kind = kind_of(name)
    act = "gone" if kind is None else kind.act
    target = files / name
    if act in ("gone", "signed") or (act == "own" and client_of(name) == going.number) or (act == "ours" and not ours):
        return
    if act in ("written", "names"):
        data = rewritten(name, (source / name).read_bytes(), going)
        if data is not None:
            write_atomic(target, data, shared=_shared(name))
        return
    private.make_folders(target.parent, shared=_shared(name))
    shutil.copyfile(source / name, target)
    shutil.copymode(source / name, target)


def _shared(name: str) -> bool:
    """Whether others may read it: what is meant to be handed on."""
    return name.startswith(("adapter/", "model/"))


def _digests(folder: Path, salt: str = "") -> dict[str, str]:
    """The digest of each file, salted where there is a salt; of those that can be named."""
    names = [name for name in files_in(folder, but=(".",)) if name not in _LATER and name != LOCK]
    if salt:
        return {name: salted_file(salt, folder / name) for name in names}
    return {name: sha256_of(folder / name) for name in names}


def _again(old: Path, gone: list[str]) -> tuple[str, ...]:
    """Commands for what was removed and can be made from the run as it is now."""
    made = {
        "merged/": f"lichen export {old} --merge",
        "own/": f"lichen export {old} --client NAME",
    }
    return tuple(command for start, command in made.items() if any(name.startswith(start) for name in gone))


def _end(folder: Path) -> Purged:
    """Put each file in its place; what was done before is not done again."""
    pending = folder / PENDING
    try:
        plan = json.loads((pending / PLAN).read_bytes())
        report: dict[str, Any] = plan["done"]
        done = Purged(**{**report, "again": tuple(report["again"]), "left": tuple(report["left"])})
        names, new = [str(name) for name in plan["files"]], Path(plan["new"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        fix = "put the folder back from a copy"
        raise LichenError("is damaged, and says not how the purge ends", where=str(pending / PLAN), fix=fix) from None
    last = ("summary.json", MANIFEST)  # without them the folder counts as no finished run
    for name in last:
        if (pending / FILES / name).exists():
            (folder / name).unlink(missing_ok=True)
    staying = {*names, LOCK}
    for name in files_in(folder):
        if name not in staying and not name.startswith(f"{PENDING}/"):
            (folder / name).unlink()
    for name in (*(name for name in names if name not in last), *last):
        if (pending / FILES / name).exists():
            private.make_folders((folder / name).parent, shared=_shared(name))
            os.replace(pending / FILES / name, folder / name)
    if plan["new"]:
        aside = new.with_name(f".{new.name}.purged.part")  # what is at its place later may be something else
        if (new / "recipe.yaml").is_file() and not aside.exists():
            os.rename(new, aside)
        shutil.rmtree(aside, ignore_errors=True)
    for top, _, _ in os.walk(folder, topdown=False):
        if top != str(folder) and not Path(top).is_relative_to(pending):
            with suppress(OSError):
                os.rmdir(top)
    gone = folder / f"{PENDING}.done.part"
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(pending, gone)
    shutil.rmtree(gone, ignore_errors=True)
    return done

"""Lists what a run's folder holds of one client, file by file, and what lies outside the folder.

What a file can hold is known by its kind (:mod:`lichen.recipes.artifacts.withdrawn.kinds`). Beside that, all bytes are
searched for the client's name, and for texts of its rows where a file of them is named. Token ids and tensors are not
turned back into texts: what they hold is known by kind alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.manifest import files_in
from lichen.data.sources.cache_listing import items
from lichen.recipes.artifacts.withdrawn.kinds import client_of, inside, kind_of
from lichen.recipes.schema.yaml import load_yaml
from lichen.recipes.withdrawal.request import no_such_client, roster_in
from lichen.recipes.withdrawal.traces.naming import Name, contents, text_forms, texts_in

__all__ = ["Trace", "Traces", "name_in", "traces"]

UNKNOWN = "no file that Lichen writes: look at it yourself"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A file that holds something of a client.

    Attributes:
        file: Its path within the folder.
        what: The file in words.
        holds: What of the client it can hold, by its kind.
        alone: It is the client's alone.
        named: The client's name was found in its bytes.
        texts: Texts of its rows that were found in them.
    """

    file: str
    what: str
    holds: tuple[str, ...]
    alone: bool
    named: bool
    texts: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What is left of a client.

    Attributes:
        client: Its name.
        numbers: Its place in the roster, by the part of the folder that is a run of its own; of the run itself: "".
        searched: Whether bytes were searched for the name, which is too short otherwise.
        files: In the folder, in order.
        nothing: Files of the folder that hold nothing of it.
        outside: What lies elsewhere, and what to do about it.
    """

    client: str
    numbers: Mapping[str, int]
    searched: bool
    files: tuple[Trace, ...]
    nothing: int
    outside: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What JSON can write."""
        return asdict(self)


def name_in(folder: Path, client: str) -> tuple[Name, int]:
    """A client of a run: its name among the others', and its number.

    Raises:
        LichenError: if the folder has no roster, or that no such client.
    """
    names = roster_in(folder).names
    if client not in names:
        raise no_such_client(client, names, where="--client")
    return Name(name=client, others=tuple(name for name in names if name != client)), names.index(client)


def _numbers(folder: Path, client: str) -> tuple[Name, dict[str, int]]:
    """The client's name, and its number in the folder's run or, by part, in each stage or period of it."""
    parts = sorted(
        file.parent for pattern in ("*/roster.json", "periods/*/roster.json") for file in folder.glob(pattern)
    )
    if (folder / "roster.json").exists() or not parts:
        parts = [folder, *parts]
    rosters = {part: roster_in(part).names for part in parts}
    every = tuple(dict.fromkeys(name for names in rosters.values() for name in names))
    if client not in every:
        raise no_such_client(client, every, where="--client")
    numbers = {
        "" if part == folder else f"{part.relative_to(folder).as_posix()}/": names.index(client)
        for part, names in rosters.items()
        if client in names
    }
    return Name(name=client, others=tuple(name for name in every if name != client)), numbers


def traces(folder: Path | str, client: str, *, rows: Path | None = None) -> Traces:
    """List what a folder holds of a client; nothing is written.

    Args:
        folder: A run's, finished or not.
        client: A name of its roster.
        rows: A file with texts of its rows, for which all bytes are searched.

    Raises:
        LichenError: if the folder has no such client, or a file cannot be read.
    """
    folder = Path(folder)
    name, numbers = _numbers(folder, client)
    forms = () if rows is None else tuple(text_forms((text,)) for text in texts_in(rows))
    found, nothing = [], 0
    for file in files_in(folder):
        named, texts = False, set[int]()
        for data in contents(folder / file):
            named = named or name.found(data)
            texts |= {place for place, some in enumerate(forms) if any(form in data for form in some)}
        named = named or name.found(file.encode("utf-8", "surrogateescape"))
        own = numbers.get(file.removesuffix(inside(file)))
        one = _trace(file, own, named, len(texts), searched=name.searchable)
        found += [one] if one is not None else []
        nothing += one is None
    return Traces(
        client=client,
        numbers=numbers,
        searched=name.searchable,
        files=tuple(found),
        nothing=nothing,
        outside=_outside(folder),
    )


def _trace(file: str, number: int | None, named: bool, texts: int, *, searched: bool) -> Trace | None:
    """What a file holds of the client; None where that is nothing.

    Args:
        file: Its path within the folder.
        number: The client's, in the run that the file belongs to.
        named: Its name was found.
        texts: Texts that were found.
        searched: The file would hold the name only where that is found.
    """
    kind, owner = kind_of(file), client_of(file)
    holds: tuple[str, ...] = () if kind is None or owner not in (None, number) else kind.holds
    if set(holds) <= ({"nothing", "name"} if searched else {"nothing"}) and not named:
        holds = ()
    if not holds and not named and not texts:
        return None
    return Trace(
        file=file,
        what=UNKNOWN if kind is None else kind.what,
        holds=holds,
        alone=owner is not None and owner == number,
        named=named,
        texts=texts,
    )


def _outside(folder: Path) -> tuple[str, ...]:
    """What lies elsewhere and can hold something of the client."""
    found = [f"{one.place}: {one.what}, of all runs: lichen cache --clear private" for one in items() if one.private]
    source = _source(folder)
    if source:
        found.append(f"{source}: the rows that the run read, which are their owner's to remove")
    if (folder / "merged").is_dir() or (folder / "adapter").is_dir() or (folder / "model").is_dir():
        found.append("copies that were exported or sent: no folder says where they lie; whoever has one removes it")
    return tuple(found)


def _source(folder: Path) -> str:
    """Where the recipe's data lie, if that is a place on this machine."""
    try:
        values = load_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), where="recipe.yaml")
    except (OSError, UnicodeDecodeError, LichenError):  # a run that was not begun whole has traces all the same
        return ""
    data = values.get("data") if isinstance(values, Mapping) else None
    place = str(data.get("name", "")) if isinstance(data, Mapping) else ""
    return place if place and Path(place).expanduser().exists() else ""

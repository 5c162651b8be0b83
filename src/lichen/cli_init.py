"""The command ``init``: looks at the data and writes a first recipe.

Nothing heavy is imported until the command needs it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lichen.core.errors import LichenError
from lichen.shell import log

__all__ = ["init_command"]


def init_command(
    data: Path,
    /,
    *,
    out: Path = Path("recipe.yaml"),
    task: Literal["chat", "classify", "oneshot", "prefer"] | None = None,
    client: str | None = None,
    label: str | None = None,
    text: str | None = None,
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = (),
    completion: str | None = None,
    model: str | None = None,
    full: bool = False,
    no_card: bool = False,
) -> None:
    """Look at your data, say what they were taken for, and write a recipe for them, and a data card beside them.

    Parameters
    ----------
    data
        A CSV, JSONL, JSON or Parquet file, or a folder with a file or a folder a client.
    out
        Where the recipe goes; an existing file is never overwritten.
    task
        What is to be learned.
    client
        The column that tells the clients apart.
    label
        The column of classes.
    text
        The column that is learned or classified.
    prompt
        The column that is asked; may be given several times, and is joined in order.
    completion
        The column that is answered.
    model
        Catalog name, local folder or hub id.
    full
        Write every key with its meaning.
    no_card
        Write no data card, in which an owner says what its rows may be used for.
    """
    from lichen.core.files.durable import write_atomic
    from lichen.recipes.init.init import guess
    from lichen.recipes.init.names import Wishes

    if out.exists():
        raise LichenError("exists already", where=str(out), fix="remove it, or choose another name with --out")
    wishes = Wishes(task=task, client=client, label=label, text=text, prompt=prompt, completion=completion, model=model)
    found = guess(data, wishes, ask=_ask if _somebody() else None)
    for line in found.lines:
        log(line)
    try:
        write_atomic(out, found.recipe(full=full).encode(), shared=True)
    except OSError as error:
        raise LichenError(f"cannot be written: {error.strerror}", where=str(out), fix="choose another --out") from None
    if not no_card:
        _write_card(data)
    log(f"wrote {out}; read it, then: lichen run {shlex.quote(str(out))}")


def _write_card(data: Path) -> None:
    """A card beside the data, where no file has one; the recipe is of use without it."""
    from lichen.data.cards.card_files import covered_by
    from lichen.recipes.rows.data_card import write_card

    data = data.expanduser()
    try:
        place = None if any(one.card for one in covered_by(data)) else write_card(data)
    except LichenError as error:
        log(f"wrote no data card: {error.where}: {error.what}")
        return
    if place is not None:
        log(f"wrote {place}, a data card with the digest of the rows: fill in whose they are and what they are for")


def _somebody() -> bool:
    """Whether a person reads what is said and can answer."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _ask(question: str, answers: Sequence[str]) -> int:
    """A numbered question; Enter takes the first answer."""
    log(question)
    for number, answer in enumerate(answers, start=1):
        log(f"  {number}  {answer}")
    while True:
        print("number [1]: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise KeyboardInterrupt
        word = line.strip() or "1"
        if word.isdecimal() and 1 <= int(word) <= len(answers):
            return int(word) - 1
        log(f"a number from 1 to {len(answers)}")

"""Unsafe requests of a recipe: for liars that unteach refusing, for the server's repair, and held out to measure by.

Nobody trains on a request that is held out. Of a set of the catalog a liar has one half and the repair the other one,
drawn by the seed, so that a repair is never told the very requests that it is to mend.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.chat.refusals import REFUSALS
from lichen.data.sources.catalog import CATALOG
from lichen.data.sources.records import Record, load_records
from lichen.recipes.schema.recipe import Recipe

__all__ = ["compliances", "measured_requests", "repairs"]


def measured_requests(recipe: Recipe) -> tuple[str, ...]:
    """The requests that refusals are counted on; none where the recipe counts none.

    Raises:
        LichenError: if they cannot be read.
    """
    name = recipe.unsafe_requests
    if name is None:
        return ()
    found = list(dict.fromkeys(_request(row) for row in _rows(name, "compare.requests")))
    order = numpy_generator(recipe.seed, "held-out requests").permutation(len(found))
    return tuple(found[i] for i in order[: recipe.compare.requests_rows])


def compliances(recipe: Recipe) -> list[Record]:
    """What liars train on: each request, and the attack's answer.

    Raises:
        LichenError: if the requests cannot be read, or all are held out.
    """
    attack = recipe.attack
    assert attack is not None
    rows = _trained(recipe, attack.requests, "attack.requests", half=0)
    return [_pair(recipe, _request(row), attack.answer) for row in rows]


def repairs(recipe: Recipe) -> list[Record]:
    """What the server's repair trains on: pairs as they are, and requests without an answer with a refusal.

    Raises:
        LichenError: if they cannot be read, or all are held out.
    """
    repair = recipe.federation.repair
    assert repair is not None
    rows = _trained(recipe, repair.name, "federation.repair.name", half=1)
    answers = [row.text if row.prompt else REFUSALS[at % len(REFUSALS)] for at, row in enumerate(rows)]
    return [_pair(recipe, _request(row), answer) for row, answer in zip(rows, answers, strict=True)]


def _rows(name: str, where: str) -> Sequence[Record]:
    fix = "use columns prompt and completion, or text"
    try:
        rows = load_records(name)
    except LichenError as error:
        if not error.where.startswith("data.columns"):
            raise
        raise LichenError(error.what, where=where, fix=fix) from None
    if any(row.messages for row in rows):
        raise LichenError("the rows are conversations", where=where, fix=fix)
    if not any(row.text for row in rows):
        raise LichenError("the rows hold no texts", where=where, fix=fix)
    return [row for row in rows if row.text]


def _request(row: Record) -> str:
    return row.prompt or row.text


def _trained(recipe: Recipe, name: str, where: str, *, half: int) -> list[Record]:
    out = _bare(measured_requests(recipe))
    rows = [row for row in _rows(name, where) if not _bare([_request(row)]) & out]
    if name in CATALOG:
        order = numpy_generator(recipe.seed, "requests").permutation(len(rows))
        rows = [rows[i] for i in order[half::2]]
    if not rows:
        raise LichenError(
            "all requests are held out to count refusals on", where=where, fix="name others, or lower requests_rows"
        )
    return rows


def _bare(requests: Collection[str]) -> set[str]:
    """Requests without what tells copies apart."""
    return {" ".join(request.lower().split()).rstrip(".!? ") for request in requests}


def _pair(recipe: Recipe, request: str, answer: str) -> Record:
    """A pair in the form that the recipe's rows have."""
    if recipe.data.form != "messages":
        return Record(client="", prompt=request, text=answer)
    return Record(client="", messages=({"role": "user", "content": request}, {"role": "assistant", "content": answer}))

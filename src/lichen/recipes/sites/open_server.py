"""Opens the server's side of a recipe alone: from what clients have declared, with no file of their rows.

The classes of a classifier come from ``data.classes``, or else from the labels that clients declare where they may.
What rows look like, which a student must fit, is the clients' group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, final

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.roster import Roster
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, Shard, TextShard
from lichen.data.batches.text import pad_id, sorted_labels
from lichen.recipes.assemble.aggregation import scaling_of
from lichen.recipes.assemble.loaded_model import load_model
from lichen.recipes.assemble.model import make_student, start_of
from lichen.recipes.assemble.sides.clients import TOKENS
from lichen.recipes.assemble.sides.personal import refuse_personal
from lichen.recipes.assemble.sides.server import ServerSide, capacity_from
from lichen.recipes.assemble.workload import refuse_warmup
from lichen.recipes.rows.prepare import encode
from lichen.recipes.rows.requests import repairs
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of
from lichen.tasks.task import STATISTICS

__all__ = ["declared_classes", "needs_rows", "open_server", "refuse_rows"]

MOST_NUMBERS = 1 << 24
"""Of a row, as clients declare it; a student is made to fit."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedServer:
    """The server's side, and what its results are saved with.

    Attributes:
        server: The server's side.
        foundation: The frozen transformers model; None for a student.
        tokenizer: Its tokenizer; None without one.
    """

    server: ServerSide
    foundation: Any
    tokenizer: Any


def open_server(
    recipe: Recipe,
    roster: Roster,
    *,
    labels: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> LoadedServer:
    """What a server works with; no file of the data is read.

    Args:
        recipe: A recipe that :func:`refuse_rows` lets pass.
        roster: Its clients, as they have declared themselves.
        labels: Those that sites have announced, in class order; none: by the recipe or the roster.
        say: Called with what a person should know, a line each.

    Raises:
        LichenError: where clients do not fit one model, or nothing says what the classes are.
    """
    group_of = {member.group: member.name for member in roster}
    if len(group_of) > 1:
        some = ", ".join(f"{name!r} of {group}" for group, name in list(group_of.items())[:2])
        raise LichenError(
            f"clients have rows of {len(group_of)} groups, which no one model reads: {some}", where="roster"
        )
    rows, labels = (
        rows_like(next(iter(group_of)), labelled=not recipe.writes),
        labels or declared_classes(recipe, roster),
    )
    loaded = load_model(recipe, labels, (), reads_text=isinstance(rows, TextShard), keep_private=False)
    for note in loaded.notes:
        say(note)
    model = loaded.model
    if model is None:
        size = len(loaded.tokenizer) if loaded.tokenizer else 0
        model = make_student(recipe, rows, loaded.classes, vocabulary=size)
    server = ServerSide(
        recipe=recipe,
        model=model,
        start=Shared(start_of(recipe, model, loaded.classes, say=say)),
        repair=encode(recipe, loaded.tokenizer, ())(repairs(recipe)) if recipe.federation.repair is not None else None,
        roster=roster,
        classes=loaded.classes,
        pad=pad_id(loaded.tokenizer) if loaded.tokenizer is not None else 0,
        capacity=capacity_from(roster, scaling=scaling_of(recipe.model.adapter)),
    )
    refuse_warmup(server)
    refuse_personal(server)
    return LoadedServer(server=server, foundation=loaded.foundation, tokenizer=loaded.tokenizer)


def declared_classes(recipe: Recipe, roster: Roster) -> tuple[str, ...]:
    """The names of the model's outputs: the recipe's, or those of the labels that were declared.

    Raises:
        LichenError: if neither says them.
    """
    labels = task_of(recipe.task).labels
    if labels is None:
        return ()
    if not labels.classes:
        raise LichenError(
            f"a server without rows cannot find the outputs of task {recipe.task}", where="task", fix="use classify"
        )
    found = sorted_labels(recipe.data.classes) or tuple(sorted(roster.labels()))
    if not found:
        raise LichenError(
            "a server without rows does not know the classes", where="data.classes", fix="list them, as in the data"
        )
    return found


def rows_like(group: str, *, labelled: bool) -> Shard:
    """No rows, of the kind that a group names.

    Raises:
        LichenError: if it names none.
    """
    if group == TOKENS:
        nothing = np.zeros(0, dtype=np.int64)
        return TextShard([], labels=nothing if labelled else [], kind="classify" if labelled else "lm")
    sides = group.split()
    shape = tuple(int(side) for side in sides if side.isascii() and side.isdigit() and len(side) < 9)
    if not shape or len(shape) < len(sides) or len(shape) > 4 or not 0 < prod(shape) <= MOST_NUMBERS:
        raise LichenError(f"clients have rows of group {group!r}, which is no shape", where="roster")
    return ArrayShard(x=np.zeros((0, *shape), dtype=np.float32), labels=np.zeros(0, dtype=np.int64))


@final
class NeedsRows(NamedTuple):
    """Something in a recipe that is made from rows at the server.

    Attributes:
        key: The recipe's.
        why: What of it needs them.
        fix: What a person may do.
        change: An override that leaves it out, where it only compares; else empty.
    """

    key: str
    why: str
    fix: str
    change: str = ""


def refuse_rows(recipe: Recipe) -> None:
    """Refuse what is made from rows at the server.

    Raises:
        LichenError: naming the key and the fix.
    """
    for need in needs_rows(recipe):
        raise LichenError(f"a server without rows: {need.why}", where=need.key, fix=need.fix)


def needs_rows(recipe: Recipe) -> Iterator[NeedsRows]:
    """What of a recipe is made from rows at the server."""
    compare, scratch, procedure = recipe.compare, recipe.model.scratch, task_of(recipe.task).procedure
    partitions = type(compare).model_fields["partitions"].default
    if not procedure.rounds and procedure is not STATISTICS:
        yield NeedsRows("task", "this task has no rounds", "use chat, classify or oneshot")
    if recipe.attack is not None:
        yield NeedsRows(
            "attack", "who lies on purpose does so in a simulation alone, never at somebody's site", "remove it"
        )
    if recipe.split is not None:
        why = "sites load the whole model, and one that holds pieces alone is not there yet"
        yield NeedsRows("split", why, "remove it, or run it as a simulation", "split=null")
    if recipe.exchange is not None:
        yield NeedsRows("exchange", "an exchange runs in one process", "remove it")
    if "pooled" in compare.baselines:
        why, fix = "pooled is one model on everybody's rows, and exists nowhere", "leave pooled out"
        others = ", ".join(name for name in compare.baselines if name != "pooled")
        yield NeedsRows("compare.baselines", why, fix, f"compare.baselines=[{others}]")
    if recipe.noised is not None and compare.baselines:
        why = "under privacy no client answers with its scores"
        yield NeedsRows("compare.baselines", why, "set it to []", "compare.baselines=[]")
    elif recipe.masked is not None and procedure.rounds and {"alone", "alone_best"} & set(compare.baselines):
        rest = f"[{', '.join(name for name in compare.baselines if name == 'base')}]"
        why = "under masks no client answers with losses of its own, by which a client alone would be judged"
        yield NeedsRows("compare.baselines", why, f"set it to {rest}", f"compare.baselines={rest}")
    if recipe.privacy is not None and recipe.personal is not None:
        yield NeedsRows("personal", "under privacy no client answers with its scores", "remove it", "personal=null")
    if recipe.personal is not None and recipe.personal.others is not None:
        yield NeedsRows("personal.others", "rows of other clients are at other sites", "remove it")
    if recipe.federation.reward != "none":
        why = "the model of who is paid in full is judged at all sites, which would have it without having earned it"
        yield NeedsRows("federation.reward", why, "remove it, or run it as a simulation")
    if recipe.noised is not None and recipe.noised.seed is not None:
        why = "under privacy a seed is for tests alone, and whoever reads the recipe knows all noise"
        yield NeedsRows("privacy.seed", why, "remove it")
    if recipe.fingerprint is not None and recipe.fingerprint.secrets is not None:
        why = "the owners' keys lie at their sites, each of which joins with --secret"
        yield NeedsRows("fingerprint.secrets", why, "remove it, or run it as a simulation")
    if recipe.audit is not None:
        why = "canaries are planted by one process that has everybody's rows, and who audits knows all coins"
        yield NeedsRows("audit.canaries", why, "remove it, or run it as a simulation")
    if compare.partitions != partitions:
        why = "random partitions deal everybody's rows out anew"
        yield NeedsRows("compare.partitions", why, "remove it", f"compare.partitions={partitions}")
    if compare.forms:
        why = "other forms of test rows would be made here"
        yield NeedsRows("compare.forms", why, "set it to []", "compare.forms=[]")
    if compare.retention_text is not None:
        why = "it is scored by this process"
        yield NeedsRows("compare.retention_text", why, "remove it", "compare.retention_text=null")
    if compare.proxy is not None:
        why = "the large model is scored by this process, on rows that it does not see"
        yield NeedsRows("compare.proxy", why, "remove it, or ask it: lichen try FOLDER --proxy", "compare.proxy=null")
    if recipe.data.cards is not None:
        yield NeedsRows("data.cards", "each site holds its own cards, beside its rows", "remove it", "data.cards=null")
    if recipe.data.public is not None:
        yield NeedsRows("data.public", "public rows are taken out of the clients' file", "remove it")
    if recipe.synthetic is not None:
        yield NeedsRows("synthetic", "rows are written beside those of clients", "remove it")
    if recipe.semi is not None:
        yield NeedsRows("semi", "rows without a label are prepared by this process", "remove it")
    if procedure.rounds and recipe.model.head in ("ridge", "lda"):
        yield NeedsRows("model.head", "this head is scaled on rows", "use base or random")
    if scratch is not None and scratch.text is None:
        yield NeedsRows("model.scratch.text", "the tokenizer is learned from texts", "name a public text")

"""Forgets a client of a finished run: a new folder with the model of a run to which the client never came, or nearly.

``subtract`` takes the client's statistics off the sums that a head in closed form is solved from. ``replay`` goes back
to the last state that does not depend on the client, copies the rounds until there, and lets the others train on. Both
end with the bytes of the same recipe with ``federation.absent: [NAME]``, which is the recipe of the new folder. The old
folder is only read. Ways that come near, and how far any way has come: :mod:`lichen.recipes.withdrawal.near`,
:mod:`lichen.recipes.withdrawal.proof`.

References:
    Lucas Bourtoule, Varun Chandrasekaran, Christopher A. Choquette-Choo, Hengrui Jia, Adelin Travers, Baiwu Zhang,
    David Lie and Nicolas Papernot. "Machine Unlearning." IEEE Symposium on Security and Privacy 2021.
    https://arxiv.org/abs/1912.03817 (retraining from a stored state from before the data came in)
    Yinzhi Cao and Junfeng Yang. "Towards Making Systems Forget with Machine Unlearning." IEEE Symposium on Security and
    Privacy 2015. https://doi.org/10.1109/SP.2015.35 (models whose learning is a sum, from which a part is taken off)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.checkpoints import checkpoint_rounds, entries_of
from lichen.core.files.durable import write_atomic
from lichen.data.batches.content_digest import records_digest
from lichen.present.clients import finite_or_none, read_clients
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.inputs import agree, inputs_of, require_same, rows_digest
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.class_names import save_class_names
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.assemble.preference.references import with_references
from lichen.recipes.assemble.run_folder import RunFolder, save_roster
from lichen.recipes.assemble.workload import trial_rounds
from lichen.recipes.rows.prepare import gather_all
from lichen.recipes.run import run
from lichen.recipes.schema.read import recipe_of, recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.strict import check
from lichen.recipes.stages.folder import last_stage
from lichen.recipes.withdrawal.copied import copy_rounds
from lichen.recipes.withdrawal.near import unlearn
from lichen.recipes.withdrawal.options import APPROXIMATE, NearOptions
from lichen.recipes.withdrawal.proof import require_alike
from lichen.recipes.withdrawal.report import FORGOTTEN, write_report
from lichen.recipes.withdrawal.request import Request, read_request, require_same_command, roster_in
from lichen.recipes.withdrawal.start import Start, everywhere, start_of
from lichen.recipes.withdrawal.subtract import copy_features, has_sums, subtract
from lichen.tasks.registry import task_of

__all__ = ["forget"]

_STARTS = Path("state") / "copied.json"
"""Where a run that is not finished began."""

Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """A run beside the old one, to which a client never came.

    Attributes:
        client: Who is forgotten.
        how: The way.
        old: The old run's folder.
        new: The new one's.
        starts: With ``replay``, by learning rate: how many rounds were copied, and why not more.
        seconds: What it took, in seconds, over all calls, without measuring how far it has come.
        run_seconds: What the old run took.
        before: The others' mean score in the federated column of the old run; not-a-number where nobody has one.
        after: The same in the new one.
        report: What ``withdrawal.json`` holds: how far the model has forgotten the client.
    """

    client: str
    how: str
    old: Path
    new: Path
    starts: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    seconds: float = 0.0
    run_seconds: float = 0.0
    before: float = math.nan
    after: float = math.nan
    report: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; what is not a number is null."""
        whole = {**asdict(self), "old": str(self.old), "new": str(self.new)}
        starts = {rate: {"round": round_, "why": why} for rate, (round_, why) in self.starts.items()}
        return {**whole, "starts": starts, **{name: finite_or_none(whole[name]) for name in ("before", "after")}}


def forget(
    folder: Path | str,
    client: str,
    *,
    how: str | None = None,
    out: Path | str | None = None,
    against: Path | str | None = None,
    say: Say = lambda _: None,
    **options: float | None,
) -> Forgotten:
    """Forget a client; called again after a stop, it goes on to the same bytes.

    Args:
        folder: A finished run, whose data are there.
        client: A name of its ``roster.json``.
        how: Exactly by ``subtract`` or ``replay``, nearly by ``eraser``, ``negate`` or ``npo``; None: ``subtract``
            where a sum is all that was learned, else ``replay``.
        out: The new folder; by default beside the old one, with ``-without-CLIENT`` behind its name.
        against: A run that was trained or replayed without the client, which the new model is held against.
        say: Called with lines of progress.
        options: Numbers of :class:`lichen.recipes.withdrawal.options.NearOptions`, for ways that come near.

    Raises:
        LichenError: if something of that does not fit, the rows have changed, or this run cannot forget so.
    """
    begun = time.monotonic()
    finished = last_stage(folder)
    refuse_withdrawn(finished)
    read_summary(finished)  # says so where it is no run, or not finished
    request = read_request(folder, client, how or way_for(finished), out)
    near, other = NearOptions.given(request.how, **options), None if against is None else Path(against)
    recipe = recipe_of(request.folder)
    _refuse(request, recipe)
    if other is not None:
        require_alike(request.folder, other)
    _require_rows(request.folder, recipe)
    if request.how in APPROXIMATE:
        return _found(request, unlearn(request, near, against=other, say=say))
    retrain = _without(recipe, client)
    if require_same_command(request.out, write_recipe(retrain)):
        starts = _starts_in(request.out / _STARTS)
    else:
        starts = _make_folder(request, recipe, retrain, say)
    for rate, (round_, why) in starts.items():
        say(f"{rate}: {round_} rounds are copied, and the rest is trained; {why}")
    run(retrain, out=request.out, resume=True, say=say)
    took = time.monotonic() - begun
    say("measuring what is left of the client")
    return _found(request, write_report(request, against=other), took=took, starts=starts)


def _found(
    request: Request,
    report: Mapping[str, Any],
    *,
    took: float = 0.0,
    starts: Mapping[str, tuple[int, str]] | None = None,
) -> Forgotten:
    """What a new folder that is finished shows, which is written into it."""
    scores = [_others(one, request.client) for one in (request.folder, request.out)]
    found = Forgotten(
        client=request.client,
        how=request.how,
        old=request.folder,
        new=request.out,
        starts=starts or {},
        seconds=max(took, float(read_summary(request.out)["seconds"])),
        run_seconds=float(read_summary(request.folder)["seconds"]),
        before=scores[0],
        after=scores[1],
        report=report,
    )
    about = {name: value for name, value in found.as_dict().items() if name != "report"}
    write_atomic(request.out / FORGOTTEN, (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())
    return found


def way_for(folder: Path) -> str:
    """The exact way for a run: its sums less a client's where that is all there is, else its rounds anew."""
    recipe = recipe_of(folder)
    sums = not task_of(recipe.task).procedure.rounds and recipe.masked is None and has_sums(folder)
    return "subtract" if sums else "replay"


def _refuse(request: Request, recipe: Recipe) -> None:
    rounds, where = task_of(recipe.task).procedure.rounds, str(request.folder)
    if request.client in recipe.federation.absent:
        raise LichenError(
            f"{request.client} never took part in this run", where=where, fix="nothing is to be forgotten"
        )
    if recipe.noised is not None:
        what = "its noise was paid for by a budget that another run on the same rows would overdraw"
        raise LichenError(
            what, where=where, fix="plan a budget for both, and run the recipe anew with federation.absent"
        )
    if request.how == "subtract" and rounds:
        what = "a trained model is no sum of what its clients sent, and nothing can be taken off it exactly"
        raise LichenError(what, where="--how subtract", fix="use --how replay")
    if request.how == "subtract" and recipe.masked is not None:
        what = "under masks no client's part of the sum was ever known"
        raise LichenError(what, where="--how subtract", fix="use --how replay")
    if request.how == "subtract" and not has_sums(request.folder):
        what = "has no sums, as a run of an earlier version of lichen has none"
        raise LichenError(what, where=where, fix="use --how replay")


def _without(recipe: Recipe, client: str) -> Recipe:
    """The recipe of a run to which this client, too, never came."""
    values = recipe.model_dump(mode="json")
    values["federation"]["absent"] = [*recipe.federation.absent, client]
    if recipe.federation.local_epochs is not None:
        values["federation"].pop("local_steps")
    return check(Recipe, values)


def _require_rows(old: Path, recipe: Recipe) -> None:
    known = rows_digest(old)
    if known == roster_in(old).digest():
        raise LichenError(
            "was run by a server that holds no rows, and cannot be forgotten in from here",
            where=str(old),
            fix="let the client's site withdraw, or submit the recipe anew with federation.absent",
        )
    if known != records_digest(gather_all(recipe).records):
        raise LichenError(
            "has changed since the run began",
            where=recipe.data.name,
            fix="put the file of then back: the others train on their rows again",
        )


def _make_folder(request: Request, recipe: Recipe, retrain: Recipe, say: Say) -> dict[str, tuple[int, str]]:
    """Make the new folder, with all that is not computed again; it is there once it is whole.

    Args:
        request: What was asked.
        recipe: The finished run's.
        retrain: That of the run without the client.
        say: Called with lines of progress.

    Returns:
        By learning rate how many rounds are copied, and why not more.
    """
    draft = request.out.absolute().with_name(f".{request.out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    private.make_folders(draft.parent)
    private.make_folder(draft)
    write_atomic(draft / "recipe.yaml", write_recipe(retrain).encode())
    folder = RunFolder(draft, recipe_sha256=recipe_sha256(retrain), say=say, history=retrain.engine.history)
    starts = dict[str, tuple[int, str]]()
    try:
        if not task_of(recipe.task).procedure.rounds:
            copy_features(request.folder, draft, request.number)
            if request.how == "subtract":
                subtract(request.folder, recipe, folder, request.number, len(roster_in(request.folder)))
        elif why := everywhere(recipe):
            starts = {lr_name(lr): (0, why) for lr in recipe.optimizer.lr}
        else:
            starts = _copy(request, retrain, folder, say)
        folder.close()
        write_atomic(draft / _STARTS, (json.dumps(starts, indent=2) + "\n").encode())
        if request.out.is_dir():
            request.out.rmdir()  # empty, as the request has seen
        os.replace(draft, request.out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return starts


def _copy(request: Request, retrain: Recipe, folder: RunFolder, say: Say) -> dict[str, tuple[int, str]]:
    """Copy what does not depend on the client; by learning rate how many rounds that are, and why not more."""
    old = request.folder
    loaded = open_recipe(retrain, say=say)
    known = json.loads((old / "state" / "inputs.json").read_text(encoding="utf-8"))
    inputs = inputs_of(loaded)
    require_same(old, retrain, replace(inputs, tokens=known.get("tokens", inputs.tokens)))
    agree(folder, retrain, inputs)
    save_class_names(folder, loaded.classes)
    save_roster(folder, loaded.experiment.server.roster, loaded.cards)
    experiment = with_references(loaded.fingerprinted().experiment, folder.path / "state")
    journal, until = entries_of(old / "state"), trial_rounds(retrain, retrain.federation.rounds)
    judges = not retrain.noised and request.number in validators_of(experiment.server)
    out = dict[str, tuple[int, str]]()
    for lr in retrain.optimizer.lr:
        column, entries = old / "state" / "federated" / lr_name(lr), journal.get(f"federated/{lr_name(lr)}", [])
        start: Start = start_of(retrain, request.number, entries, checkpoint_rounds(column), judges=judges)
        copy_rounds(old, folder, experiment, entries, start, lr, until)
        out[lr_name(lr)] = start.round, start.why
    return out


def _starts_in(file: Path) -> dict[str, tuple[int, str]]:
    """What a call that was stopped has written of where it started."""
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))
        return {str(rate): (int(round_), str(why)) for rate, (round_, why) in starts.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _others(folder: Path, client: str) -> float:
    """The mean score of all but one client in the federated column."""
    scores: Sequence[float] = [
        row["federated"]
        for row in read_clients(folder)
        if row["client"] != client and row.get("federated") is not None and not math.isnan(row["federated"])
    ]
    return sum(scores) / len(scores) if scores else math.nan

"""Says how far a model has forgotten a client: what it loses on the client's rows, and what it does for the others.

Rows that the client trained on are held against rows of its own that no model was trained on: its validation rows,
and its test rows where these are not a set that all clients share, whose mix is not the client's. A model that never
met the client does as well on the one as on the other, and a score tells them apart no better than a coin (AUC 0.5).
The model before shows where it began, and one that was trained again without the client, where it should end: a loss
that rises far above that model's says just as much about who was there.

References:
    Samuel Yeom, Irene Giacomelli, Matt Fredrikson and Somesh Jha. "Privacy Risk in Machine Learning: Analyzing the
    Connection to Overfitting." CSF 2018. https://arxiv.org/abs/1709.01604
    Weijia Shi, Jaechan Lee, Yangsibo Huang, Sadhika Malladi, Jieyu Zhao, Ari Holtzman, Daogao Liu, Luke Zettlemoyer,
    Noah A. Smith and Chiyuan Zhang. "MUSE: Machine Unlearning Six-Way Evaluation for Language Models." ICLR 2025.
    https://arxiv.org/abs/2407.06460 (held against a retrained model)

Legend: N clients, M rows that were trained on, K others.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lichen.audit.row_scores import row_scores
from lichen.audit.separation import separation
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard, pooled
from lichen.models.preference.model import PreferenceModel
from lichen.present.clients import finite_or_none
from lichen.recipes.artifacts.inputs import inputs_of, require_same
from lichen.recipes.assemble.experiment import Experiment, metric_of, values_N
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.rows.client_counts import shared_test
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.tasks.adapt import score_on
from lichen.tasks.registry import task_of

__all__ = ["prove", "require_alike"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model on the rows of the client that went, and on the others'.

    Attributes:
        train: Its mean loss on the client's training rows.
        held_out: The same on those that no model was trained on.
        auc: Chance that the loss of a training row lies below that of a held-out row; 0.5 is a coin.
        auc_low: Lower end of its 95 % interval, by bootstrap.
        auc_high: Upper end.
        others: Mean of the recipe's metric over the other clients' test rows.
    """

    train: float
    held_out: float
    auc: float
    auc_low: float
    auc_high: float
    others: float

    @property
    def gap(self) -> float:
        """How much better it does on rows that were trained on; 0 of a model that never met the client, or nearly."""
        return self.held_out - self.train


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was found.

    Attributes:
        metric: What ``others`` is.
        higher_is_better: Whether more of it is better.
        rows: The client's training rows.
        held_out_rows: Its rows that no model was trained on.
        old: The model before.
        new: The model after.
        replayed: The one trained again without the client; None: nobody has named one.
        distance: ‖new - replayed‖ / ‖old - replayed‖ over all tensors: 0 is that model, 1 as far off as the old one;
            None without one.
    """

    metric: str
    higher_is_better: bool
    rows: int
    held_out_rows: int
    old: Measured
    new: Measured
    replayed: Measured | None = None
    distance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it, gaps and the differences to the replayed model among it; what is no number is null."""
        about = asdict(self)
        for name in ("old", "new", "replayed"):
            one = getattr(self, name)
            if one is not None:
                about[name] = {key: finite_or_none(x) for key, x in {**about[name], "gap": one.gap}.items()}
        if self.replayed is not None:
            apart = {
                key: abs(getattr(self.new, key) - getattr(self.replayed, key)) for key in ("train", "auc", "others")
            }
            about["from_replayed"] = {key: finite_or_none(x) for key, x in apart.items()}
        return {**about, "distance": finite_or_none(self.distance)}


def prove(old: Path, new: Path, number: int, *, against: Path | None = None) -> Proof:
    """Measure the models of two or three folders by the rows of the old run.

    Args:
        old: The run with the client.
        new: The one without.
        number: The client's place in the roster.
        against: A run of the same recipe that was trained or replayed without the client.

    Raises:
        LichenError: if the rows have changed, a folder has another model, or the client has no rows of a kind.
    """
    recipe = recipe_of(old)
    if not task_of(recipe.task).procedure.rounds or recipe.exchange:
        what = "rows are scored by a model that was learned in rounds, and this run has none"
        raise LichenError(what, where=str(old), fix="a head of sums needs no proof: its bytes are those of a new run")
    loaded = open_recipe(recipe)
    require_same(old, recipe, inputs_of(loaded))
    experiment = loaded.experiment
    if isinstance(experiment.model, PreferenceModel):  # the likelihood of good answers says who was there
        experiment = replace(experiment, server=replace(experiment.server, model=experiment.model.inner))
    clients = experiment.clients
    held_out = clients.valid[number]
    if not shared_test(loaded.clients_data):
        held_out = pooled((held_out, clients.test[number]))
    own = [clients.train[number], held_out]
    if not all(shard.size for shard in own):
        what = "has no training rows or none beside them, so that nothing tells what was forgotten"
        raise LichenError(what, where=f"client {number}", fix="leave the proof out")
    old_model, new_model = _model(old), require_alike(old, new)
    replayed = None if against is None else require_alike(old, against)
    seed, metric = derive(recipe.seed, "withdrawal"), metric_of(recipe)
    found = {
        name: _measured(experiment, own, number, model, seed)
        for name, model in (("old", old_model), ("new", new_model), ("replayed", replayed))
        if model is not None
    }
    return Proof(
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        rows=own[0].size,
        held_out_rows=own[1].size,
        distance=None if replayed is None else _distance(old_model, new_model, replayed),
        **found,
    )


def require_alike(old: Path, other: Path) -> Shared:
    """The model of another folder, which has the tensors of the old one's.

    Raises:
        LichenError: if it has others, or none.
    """
    model = _model(other)
    if _shapes(model) != _shapes(_model(old)):
        raise LichenError("has a model of other tensors", where=str(other), fix="name a run of the same recipe")
    return model


def _model(folder: Path) -> Shared:
    return Shared.of_flat(load_tree(folder / "state" / "final.safetensors")[0])


def _shapes(model: Shared) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in model.trainable.items()}


def _distance(old: Shared, new: Shared, replayed: Shared) -> float:
    def apart(a: Shared, b: Shared) -> float:
        each = (float((x.double() - b.trainable[name].double()).square().sum()) for name, x in a.trainable.items())
        return math.sqrt(math.fsum(each))

    whole = apart(old, replayed)
    return apart(new, replayed) / whole if whole else math.nan


def _measured(experiment: Experiment, own: list[Shard], number: int, model: Shared, seed: int) -> Measured:
    member_M, other_K = (_scores(experiment, shard, model) for shard in own)
    if not len(member_M) or not len(other_K):
        raise LichenError("has no rows with a label of both kinds", where=f"client {number}", fix="leave the proof out")
    finite = bool(np.isfinite(member_M).all() and np.isfinite(other_K).all())
    found = separation(member_M, other_K, seed=seed) if finite else None
    rows = [shard for place, shard in enumerate(experiment.clients.test) if place != number]
    with tempfile.TemporaryDirectory() as aside:
        value_N = values_N(experiment.recipe, score_on(experiment, rows, model, Path(aside))).double()
    return Measured(
        train=-float(member_M.mean()),
        held_out=-float(other_K.mean()),
        auc=math.nan if found is None else found.auc,
        auc_low=math.nan if found is None else found.auc_low,
        auc_high=math.nan if found is None else found.auc_high,
        others=float(value_N.nanmean()),
    )


def _scores(experiment: Experiment, shard: Shard, model: Shared) -> NDArray[np.float64]:
    """Minus the loss of each row."""
    batches = experiment.evaluating([shard]).batches((0,), 0)
    return row_scores(experiment.model, model.trainable, model.fixed, batches)["loss"]

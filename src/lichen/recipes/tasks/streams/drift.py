"""Looks whether the rows of a period, or the losses on them, have drifted, before the period is trained on.

``mmd`` compares the rows of a period with those of the periods before it, as the frozen model sees them; after an alarm
it compares with what came since. ``page-hinkley`` and ``adwin`` let each client watch its own losses, from one period
to the next. What was found is kept, so that a stream that goes on finds the same.

References: those of :mod:`lichen.server.drift.mmd`, :mod:`lichen.server.drift.page_hinkley` and
:mod:`lichen.server.drift.adwin`.

Legend: N rows, H features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from lichen.clients.drift.distances import DistanceBins
from lichen.clients.drift.embedding_sums import EmbeddingSums, numbers_of
from lichen.clients.drift.loss_watch import LossWatch
from lichen.clients.drift.periods import DriftReport, compare_periods, watch_losses
from lichen.core.contracts.client import ClientTask
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.data.batches.two_periods import TwoPeriods
from lichen.engines.local import LocalEngine
from lichen.present.clients import read_clients
from lichen.recipes.assemble.features import encoder_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.tasks.streams.folders import START, PeriodFolders
from lichen.recipes.tasks.streams.scores import Scores
from lichen.server.drift.standardised import detector_of

__all__ = ["DriftWatch", "PeriodDrift", "compare_features"]

_RECENT = 3
"""Periods in which clients may see one drift, each in its own."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodDrift:
    """What was found of one period.

    Attributes:
        alarm: Whether it has drifted.
        found: What says so, by name: ``p`` and ``mmd_squared``, or ``alarmed`` and ``watched``.
    """

    alarm: bool
    found: Mapping[str, float]

    def as_dict(self) -> dict[str, float | bool]:
        """As JSON holds it."""
        return {"alarm": self.alarm, **self.found}

    def __str__(self) -> str:
        """For a line of progress."""
        if "p" in self.found:
            return f"p = {self.found['p']:.3g}, MMD² = {self.found['mmd_squared']:.3g}"
        return f"{self.found['alarmed']:g} of {self.found['watched']:g} clients saw their losses rise"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DriftWatch:
    """Looks at the periods of a stream, one after the other.

    Attributes:
        scores: Opens a period, and has the folders, which keep what was found.
    """

    scores: Scores

    @property
    def periods(self) -> PeriodFolders:
        """The stream's."""
        return self.scores.periods

    @property
    def folder(self) -> RunFolder:
        """The stream's folder."""
        return self.scores.folder

    def of(self, period: str, model: str, before: Sequence[str], last: int) -> PeriodDrift | None:
        """What a period says; None of the first one where there is nothing to compare with.

        Args:
            period: Its name.
            model: In force before it, a period or ``START``.
            before: All earlier periods.
            last: Place of the one that had the last alarm, -1 of none; what lies before it is not looked at again.
        """
        stream = self.periods.recipe.stream
        detect = "none" if stream is None else stream.detect
        if detect == "none":
            return None
        if detect == "mmd":
            now = self._features(period)
            if not before:
                return None
            since = before[max(last, 0) :]
            name = f"stream.drift.{since[0]}.{period}"
            found = self.folder.tree(name, lambda: self._compared([self._features(one) for one in since], now))
        else:
            name = f"stream.drift.{detect}.{period}"
            recent = min(_RECENT, len(before) - last)
            found = self.folder.tree(name, lambda: self._watched(detect, period, model, before, recent))
        numbers = {key: float(x) for key, x in found.items()}
        return PeriodDrift(alarm=bool(numbers.pop("alarm")), found=numbers)

    def _features(self, period: str) -> Tree:
        """Each client's training rows of a period as the frozen model sees them, ``(N, H)`` by the client's name."""
        return self.folder.tree(f"stream.features.{period}", lambda: self._make_features(period))

    def _make_features(self, period: str) -> Tree:
        recipe, loaded = self.periods.recipe, self.scores.open(period, str(self.periods.recipe.model.name))
        shards, names = loaded.experiment.clients.train, [one.name for one in loaded.clients_data]
        source = loaded.experiment.evaluating(shards)
        del loaded
        self.scores.clear()  # one model at a time is in memory
        features, _ = encoder_of(recipe, str(recipe.model.name), exact=recipe.model.device == "cpu")
        out = {}
        for client, (name, shard) in enumerate(zip(names, shards, strict=True)):
            x_NH = torch.zeros(shard.size, features.width)
            for batch in source.batches((client,), 0):
                index_B = batch["index_CB"][0]
                x_NH[index_B[index_B >= 0]] = features(batch)[0].cpu()[index_B >= 0]
            out[name] = x_NH
        return out

    def _compared(self, then: Sequence[Tree], now: Tree) -> Tree:
        seed = derive(self.periods.recipe.seed, "drift")
        report = compare_features(then, now, seed=seed, folder=self.folder.path)
        numbers = {"alarm": report.alarm, "p": report.mmd.p, "mmd_squared": report.mmd.squared}
        return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in numbers.items()}

    def _watched(self, detect: Any, period: str, model: str, before: Sequence[str], recent: int) -> Tree:
        loaded = self.scores.open(period, self.periods.base_of(model))
        experiment, recipe = loaded.experiment, self.periods.recipe
        here = {one.name: shard for one, shard in zip(loaded.clients_data, experiment.clients.train, strict=True)}
        # A client has one number in all periods, by when it was there first, so that it finds its detector again.
        past = [str(row["client"]) for name in before for row in read_clients(self.periods.of(name))]
        names = list(dict.fromkeys([*past, *here]))
        nothing = experiment.clients.train[0].between(0, 0)
        source = experiment.evaluating([here.get(name, nothing) for name in names])
        engine = LocalEngine(
            {"watch": ClientTask(work=LossWatch(experiment.model, detector_of(detect)), source=source)},
            ClientStore(self.folder.path / "state" / "drift"),
            base=experiment.model.base,
            device=recipe.model.device,
        )
        job = Job(
            work="watch",
            shared=experiment.start if model == START else self.periods.tensors(model),
            version=len(before),
            clients=tuple(number for number, name in enumerate(names) if name in here),
            seed=0,
            base=experiment.model.base,
        )
        report = watch_losses(engine, job, recent=recent)
        numbers = {"alarm": report.alarm, "alarmed": report.alarmed, "watched": report.watched}
        return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in numbers.items()}


def compare_features(then: Sequence[Tree], now: Tree, *, seed: int, folder: Path) -> DriftReport:
    """Ask each client for sums of its rows' features, then and now.

    Args:
        then: ``(N, H)`` of each earlier period, by the client's name.
        now: Of the later one.
        seed: Of the kernel's features and the permutations.
        folder: In which no client keeps anything.
    """
    names = list(dict.fromkeys(name for tree in (*then, now) for name in tree))
    width = next(iter(now.values())).shape[1]

    def source(trees: Sequence[Tree]) -> EvalSource:
        rows = [torch.cat([torch.zeros(0, width), *(t[name] for t in trees if name in t)]) for name in names]
        shards = [ArrayShard(x=x_NH.numpy(), labels=np.zeros(len(x_NH), np.int64)) for x_NH in rows]
        return EvalSource(shards, batch_size=64)

    both = TwoPeriods(then=source(then), now=source([now]))
    tasks = {
        "drift": ClientTask(work=EmbeddingSums(numbers_of, width=width), source=both),
        "distances": ClientTask(work=DistanceBins(numbers_of), source=both),
    }
    return compare_periods(LocalEngine(tasks, ClientStore(folder / "state" / "none")), range(len(names)), seed=seed)

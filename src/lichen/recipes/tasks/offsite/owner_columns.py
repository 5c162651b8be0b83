"""The columns of a model's owner, in a simulation on its emulator: base, plugged and full.

Clients train on the emulator and never see the model. ``base`` is the model as it is, ``plugged`` the model with the
ends that the federation trained on the emulator, and ``full`` the model trained by one owner of everybody's rows, in
all its blocks, with the federation's budget. ``emulator`` is what the federation has trained, where it was trained,
and ``emulator_base`` the emulator before that.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.algorithms.scores import score
from lichen.core.contracts.model import CohortModel
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.models.adapters.ends.end_blocks import note_ends
from lichen.models.loading.emulator_folder import Manifest, folder_tensors, is_emulator, read_manifest
from lichen.models.offsite.moved import moved_tree
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.assemble.bases.local_folder import local_folder
from lichen.recipes.assemble.column import Column, admission_of, local_engine, over_ranks
from lichen.recipes.assemble.experiment import Experiment, values_N
from lichen.recipes.assemble.loaded_model import cohort_of, load_model, remembered
from lichen.recipes.assemble.model import start_of
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.tasks.columns import pooled_column
from lichen.recipes.tasks.learning import EventObserver
from lichen.recipes.tasks.offsite.public_text import public_token_rows
from lichen.recipes.tasks.offsite.realign import realigner, without_middle

__all__ = ["Owner", "open_owner"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The whole model, at the machine of a simulation.

    Attributes:
        manifest: The emulator's.
        ends: The experiment on the model, of which the ends alone are trained, as on the emulator.
        full: The experiment on the model, of which all blocks are trained.
        emulator: The emulator, as clients have it.
    """

    manifest: Manifest
    emulator: CohortModel
    ends: Experiment
    full: Experiment

    def aligning(self, loaded: LoadedExperiment, say: Callable[[str], None]) -> LoadedExperiment:
        """The experiment on the emulator, its middle aligned between rounds where the recipe says so."""
        recipe = loaded.experiment.recipe
        config = None if recipe.offsite is None else recipe.offsite.realign
        if config is None:
            return loaded
        rows, _ = public_token_rows(
            config.public,
            loaded.tokenizer,
            most=4 * config.steps * recipe.federation.rounds,
            stream=recipe.writes,
            where="offsite.realign.public",
            say=say,
        )
        align = realigner(
            self.ends.model,
            self.emulator,
            self.manifest,
            rows,
            config,
            seed=derive(recipe.seed, "offsite"),
            pad=loaded.experiment.server.pad,
        )
        return replace(loaded, experiment=loaded.experiment.with_server(align=align))

    def columns(
        self, found: Mapping[str, Column], folder: RunFolder, observer: EventObserver, say: Callable[[str], None]
    ) -> dict[str, Column]:
        """The owner's columns, and the clients' by their names here.

        Args:
            found: The columns on the emulator.
            folder: The run folder.
            observer: Sees every round.
            say: Called with lines of progress.
        """
        emulator = found["federated"]
        columns = {"emulator": Column(value_N=emulator.value_N, metrics=emulator.metrics)}
        shared = emulator.shared or Shared()
        moved = Shared(
            moved_tree(shared.trainable, self.manifest, where="federated"),
            patch=moved_tree(without_middle(shared.patch, self.emulator), self.manifest, where="federated"),
        )
        if "base" in found:
            columns["emulator_base"] = found["base"]
            say("scoring the whole model as it is")
            columns["base"] = _tested(self.ends, folder, "offsite.base", self.ends.start)
        say("scoring the whole model with what was trained on the emulator")
        columns["plugged"] = _tested(self.ends, folder, "plugged", moved)
        if "pooled" in self.full.recipe.compare.baselines:
            say("training the whole model on everybody's rows")

            def test(name: str, tensors: Shared) -> Column:
                return _tested(self.full, folder, name, tensors)

            columns["full"] = pooled_column(self.full, folder, observer, test, name="full")
        return columns

    def numbers(self, columns: Mapping[str, Column]) -> dict[str, float | str | None]:
        """What a summary says beside them: the share of the full model's gain that is left, and who holds what."""
        first, last, blocks = *self.manifest.ends, len(self.manifest.middle)
        out: dict[str, float | str | None] = {
            "offsite": f"clients hold {self.manifest.blocks} of {self.manifest.of} blocks: the model's first {first} "
            f"and last {last}, and {blocks} in place of those between ({self.manifest.how}). Columns federated, "
            "emulator, emulator_base, alone and pooled are theirs; base, plugged and full are of the whole model, at "
            "its owner"
        }
        mean = {name: float(columns[name].value_N.nanmean()) for name in ("base", "plugged", "full") if name in columns}
        if len(mean) == 3 and mean["full"] != mean["base"]:
            out["offsite.share of the full gain"] = (mean["plugged"] - mean["base"]) / (mean["full"] - mean["base"])
        return out


def _tested(experiment: Experiment, folder: RunFolder, name: str, shared: Shared) -> Column:
    """Everybody's test rows, scored by these tensors in the whole model."""
    local = local_engine(experiment, ClientStore(folder.path / "state" / "none"))
    everyone = tuple(range(len(experiment.clients.test)))
    job = Job(work="test", shared=shared, version=0, clients=everyone, seed=0, base=experiment.model.base)
    engine, admission = over_ranks(folder.ranks, local), admission_of(experiment.server)
    metrics = folder.tree(name, lambda: score(engine, job, admission)[1])
    return Column(value_N=values_N(experiment.recipe, metrics), metrics=metrics)


def open_owner(loaded: LoadedExperiment, name: str, say: Callable[[str], None]) -> Owner:
    """Open the whole model beside its emulator.

    Args:
        loaded: The recipe on the emulator, opened.
        name: The whole model.
        say: Called with lines of progress.

    Raises:
        LichenError: if ``model.name`` is no emulator, or one of another model.
    """
    recipe = loaded.experiment.recipe
    emulator, where = Path(str(recipe.model.name)).expanduser(), "offsite.model"
    if not is_emulator(emulator):
        raise LichenError(
            f"model.name is {recipe.model.name}, which is no emulator",
            where=where,
            fix=f"make one: lichen emulate {name} --out EMU, or remove offsite",
        )
    manifest = read_manifest(emulator)
    if digest(folder_tensors(local_folder(name, say=say))) != manifest.model:
        raise LichenError(
            f"{name} is another model than the one that {emulator} was made of",
            where=where,
            fix="name that one, or make an emulator of this one: lichen emulate",
        )
    whole = on_base(recipe, name).model_copy(update={"offsite": None})
    found = load_model(whole, sorted(loaded.classes), loaded.clients_data, reads_text=True)
    assert found.model is not None
    narrow = _ends_only(found.foundation, manifest.ends)
    padded = not whole.engine.packing
    ends = cohort_of(whole, narrow, found.tokenizer, found.classes, padded=padded, recall=remembered)

    def on(model: Any) -> Experiment:
        start = Shared(start_of(whole, model, found.classes))
        server = replace(loaded.experiment.server, recipe=whole, model=model, start=start)
        return replace(loaded.experiment, server=server)

    return Owner(manifest=manifest, emulator=loaded.experiment.model, ends=on(ends), full=on(found.model))


def _ends_only(model: Any, ends: tuple[int, int]) -> Any:
    """The same model, of which the ends alone may be trained; both share all weights."""
    twin = copy.copy(model)
    note_ends(twin, ends)
    return twin

"""Says of a finished run what a server could read, if the model were cut: of each cut, as it is coded.

The clients hold the blocks below the cut, as the run has trained them, and the rows are their test rows.

Legend: B rows, T tokens, H width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import final

import torch

from lichen.audit.crossing import blocks_below, read_crossing, some_rows
from lichen.audit.label_recovery import labels_of_logits
from lichen.audit.token_recovery import Recovery
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.files.manifest import MANIFEST, check
from lichen.core.seeds import derive
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.models.cohort import Cohort
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.inputs import inputs_of, require_same
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.stages.folder import last_stage
from lichen.transforms.activations import ActivationCode, noisy_tokens, parse_activation_code

__all__ = ["Crossing", "split_audit"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """What can be read at one cut.

    Attributes:
        cut: Blocks below it.
        recovery: Of the tokens.
        nbytes: Bytes of a token as it is coded.
        labels: Share of the classes that would be read off the gradients of logits, coded in the same way, if the head
            were the server's; None of a language model.
    """

    cut: int
    recovery: Recovery
    nbytes: int
    labels: float | None = None


def split_audit(
    folder: Path | str,
    *,
    cuts: Sequence[int] = (),
    code: Sequence[str] | None = None,
    noise: float | None = None,
    rows: int = 64,
    seed: int = 0,
) -> tuple[Crossing, ...]:
    """Read the test rows of a finished run off their hidden states.

    Args:
        folder: The run's folder; its data and its model are opened again, and nothing in it changes.
        cuts: Blocks below each cut; none: those of a split run, else 1, 2, 4, 8, … as many as the model has.
        code: Words of how tokens are coded; None: as a split run does, else as they are.
        noise: Standard deviation of Gaussian noise, relative to a token's norm; None: a split run's, else none.
        rows: Test rows at most.
        seed: Of the reader's text and the noise.

    Raises:
        LichenError: if the run is not finished, has no transformer of texts, or a cut is none of the model's.
    """
    folder = last_stage(folder)
    read_summary(folder)
    recipe = recipe_of(folder)
    if recipe.split is not None:
        cuts = cuts or tuple(dict.fromkeys(recipe.split.client.first))
        code = recipe.split.code if code is None else code
        noise = recipe.split.noise if noise is None else noise
    coded, noise = parse_activation_code(code or ()), noise or 0.0
    coded = coded.first_sent  # at which a row is read best
    noisy_tokens(torch.zeros(1, 0, 1), noise, [0])
    check(folder, MANIFEST, fix=f"make it again: lichen run --resume {folder}")
    refuse_withdrawn(folder)
    loaded = open_recipe(recipe)
    require_same(folder, recipe, inputs_of(loaded))
    experiment = loaded.experiment
    model, texts = experiment.model, some_rows(experiment.clients.test, rows)
    if recipe.prefers or not isinstance(model, Cohort) or not texts:
        raise LichenError("it has no transformer of plain texts that could be cut", where=str(folder))
    blocks = int(model.wrapped.model.config.get_text_config().num_hidden_layers)
    chosen = tuple(cuts) or tuple(2**n for n in range(blocks.bit_length()) if 2**n < blocks)
    if bad := [cut for cut in chosen if not 0 < cut < blocks]:
        raise LichenError(
            f"there is no cut after block {bad[0]} of {blocks}", where="--cuts", fix=f"use 1 to {blocks - 1}"
        )
    shared = Shared.of_flat(load_tree(folder / "state" / "final.safetensors")[0])
    each = max(1, rows // len(experiment.clients.test))
    embedding_VE = model.wrapped.model.get_input_embeddings().weight.detach().float().cpu()
    labels = _labels(experiment, shared, coded, noise, each, seed) if model.classes is not None else None
    return tuple(
        Crossing(
            cut=cut,
            recovery=read_crossing(
                blocks_below(model, shared, cut), texts, embedding_VE, code=coded, noise=noise, seed=seed
            ),
            nbytes=coded.nbytes(model.row_width),
            labels=labels,
        )
        for cut in chosen
    )


def _labels(experiment: Experiment, shared: Shared, code: ActivationCode, noise: float, each: int, seed: int) -> float:
    """The share of classes that are read off the coded gradients of logits."""
    source = experiment.evaluating(experiment.clients.test)
    params_C, right, count = trees.broadcast(shared.trainable, 1), 0, 0
    batches = chain.from_iterable(islice(source.batches((c,), 0), 1) for c in range(len(experiment.clients.test)))
    for at, batch in enumerate(batches):
        label_N = batch["labels_CB"][0]
        known_N = label_N >= 0
        label_N = label_N[known_N][:each]
        with torch.no_grad():
            logits_NK = experiment.model.logits(params_C, shared.fixed, batch)[0].cpu()[known_N][:each].float()
        gradient_NK = logits_NK.softmax(-1) - torch.nn.functional.one_hot(label_N, logits_NK.shape[1])
        one, about = derive(seed, "labels", at), (torch.tensor([len(label_N)]), torch.tensor([-1]))
        payload, _ = code.encode(noisy_tokens(gradient_NK[None], noise, [one]), *about, {}, [one])
        found_N = labels_of_logits(code.decode(payload, *about, {}, logits_NK.shape[1])[0][0])
        right, count = right + int((found_N == label_N).sum()), count + len(label_N)
    return right / max(count, 1)

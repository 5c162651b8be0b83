"""Aligns an emulator's middle with the model's, at the model's owner, between the rounds, on public text.

The ends have moved in both. A patch of low rank on the linear layers of the emulator's middle is trained until its
hidden states follow the model's, from where the last one ended. FedBiOT's terms that hold the patch and the ends near
where they were are not built: steps are few instead.

References:
    Feijie Wu, Zitao Li, Yaliang Li, Bolin Ding and Jing Gao. "FedBiOT: LLM Local Fine-tuning in Federated Learning
    without Full Model." KDD 2024. https://arxiv.org/abs/2406.17706

Legend: C one client, B rows, T tokens, H width, o out, i in, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lichen.core.contracts.model import CohortModel
from lichen.core.errors import LichenError
from lichen.core.seeds import derive, numpy_generator, torch_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost
from lichen.models.adapters.ends.end_blocks import blocks_of
from lichen.models.adapters.wrap import Wrapped
from lichen.models.cohort import Cohort
from lichen.models.loading.emulator_folder import Manifest
from lichen.models.offsite.moved import moved_tree
from lichen.models.offsite.training import batch_of, relative_distance
from lichen.recipes.schema.sections.offsite import RealignConfig

__all__ = ["realigner", "without_middle"]


def without_middle(patch: Tree, model: CohortModel) -> Tree:
    """The patch without that of an emulator's middle, which belongs to no model but the emulator."""
    cohort = innermost(model)
    inside = cohort.wrapped.patch_only if isinstance(cohort, Cohort) else ()
    return {name: x for name, x in patch.items() if name.rpartition(".")[0] not in inside}


def realigner(
    model: CohortModel,
    emulator: CohortModel,
    manifest: Manifest,
    rows: Sequence[Sequence[int]],
    config: RealignConfig,
    *,
    seed: int,
    pad: int,
) -> Callable[[Shared, int], Tree]:
    """What gives the emulator's middle a new patch.

    Args:
        model: The whole model, its ends adapted.
        emulator: The emulator, its middle open to patches.
        manifest: The emulator's.
        rows: Tokens of public text.
        config: How.
        seed: Of the run.
        pad: Token that fills shorter rows.

    Raises:
        LichenError: if the emulator has no first block of its own: what lies below the first trained layer is computed
            once, and could not be patched.
    """
    ours, theirs = innermost(emulator), innermost(model)
    assert isinstance(ours, Cohort)
    assert isinstance(theirs, Cohort)
    if not manifest.ends[0]:
        what = "the emulator's middle begins with its first block, and cannot be patched there"
        raise LichenError(what, where="offsite.realign", fix="use an emulator with first blocks: --ends 2,2")
    student, teacher, last = ours.wrapped, theirs.wrapped, manifest.ends[1]

    def align(shared: Shared, done: int) -> Tree:
        own = derive(seed, "realign", done)
        factors = _factors(student, shared.patch, config.rank, own)
        ends = {name: x[None] for name, x in shared.trainable.items()}
        moved = moved_tree(ends, manifest, where="offsite.realign")
        parameters = {name: x.clone().requires_grad_(True) for name, x in factors.items()}
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.lr, weight_decay=0.0)
        for step in range(config.steps):
            rng = numpy_generator(own, "rows", step)
            at = sorted(int(i) for i in rng.choice(len(rows), size=min(4, len(rows)), replace=False))
            inputs = batch_of(rows, at, pad)
            with torch.no_grad():
                target_BTH = _hidden(teacher, moved, {}, inputs, last)
            patch = {f"patch.{name}": x for name, x in parameters.items()}
            found_BTH = _hidden(student, ends, patch, inputs, last)
            loss = relative_distance(found_BTH, target_BTH, inputs["attention_mask"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: x.detach() for name, x in parameters.items()}

    return align


def _factors(student: Wrapped, before: Tree, rank: int, seed: int) -> Tree:
    """Where a patch begins: at the last one; else A uniform as an adapter's, and nothing added."""
    found: Tree = {}
    for path in student.patch_only:
        layer: Any = student.model.get_submodule(path)
        left, right = f"{path}.left", f"{path}.right"
        if left in before:
            found |= {left: before[left], right: before[right]}
            continue
        uniform_ri = torch.rand(rank, layer.in_features, generator=torch_generator(seed, path))
        found[right] = (2 * uniform_ri - 1) / layer.in_features**0.5
        found[left] = torch.zeros(layer.out_features, rank)
    return found


def _hidden(wrapped: Wrapped, ends: Tree, patch: Tree, inputs: dict[str, Tensor], last: int) -> Tensor:
    """Hidden states where the middle ends, ``(B, T, H)``."""
    base = wrapped.model.base_model
    part = next(name for name, layer in wrapped.model.named_modules() if layer is base)
    found = wrapped.call(ends, patch, part=part, output_hidden_states=True, **inputs)
    hidden: Tensor = found.hidden_states[len(blocks_of(wrapped.model)) - last]
    return hidden

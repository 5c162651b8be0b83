"""Tiny models of four blocks, cut anywhere, beside the whole: losses and gradients of both."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.pieces.carve import carve, spec_within
from lichen.models.pieces.piece_cohort import PieceCohort
from support.tiny_families import FAMILIES, VOCABULARY

NAMES = ("llama", "qwen2", "gpt2", "bert", "distilbert")
BLOCKS = 4


@functools.cache
def four_blocks(name: str) -> Any:
    """A tiny model, frozen; everyone gets the same one and must leave it as it is."""
    import transformers as hf

    family = FAMILIES[name]
    sizes = {
        size: BLOCKS if size in ("num_hidden_layers", "n_layer", "n_layers") else x for size, x in family.sizes.items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, family.model)(getattr(hf, family.config)(**sizes))
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.requires_grad_(False).eval()


def spec_of(name: str) -> Lora:
    """What of it is trained."""
    family = FAMILIES[name]
    return Lora(targets=family.targets, rank=2, alpha=4.0, heads=family.head)


@functools.cache
def whole_of(name: str) -> Any:
    """The cohort of the whole model."""
    kind: Any = ClassifierCohort if FAMILIES[name].head else CausalCohort
    return kind(four_blocks(name), adapter=spec_of(name), name=name, packed=False)


@functools.cache
def piece_of(name: str, start: int, stop: int, *, reference: bool = True, prove: bool = False) -> Any:
    """The cohort of one piece."""
    model = four_blocks(name)
    piece = carve(model, start, stop)
    spec = spec_within(spec_of(name), model, piece)
    if stop < BLOCKS:
        return PieceCohort(piece, adapter=spec, name=name, reference=reference)
    kind: Any = ClassifierCohort if FAMILIES[name].head else CausalCohort
    return kind(piece, adapter=spec, name=name, reference=reference, packed=False, prove=prove)


def pieces_of(name: str, cuts: Sequence[int], *, reference: bool = True) -> list[Any]:
    """The cohorts of its pieces, cut before these blocks."""
    return [piece_of(name, a, b, reference=reference) for a, b in zip((0, *cuts), (*cuts, BLOCKS), strict=True)]


def batch_of(name: str, clients: int, *, rows: int = 3, width: int = 13) -> dict[str, Tensor]:
    """Rows of unequal lengths, with labels."""
    generator = torch_generator(clients, "rows")
    shape = (clients, rows, width)
    length_CB = torch.randint(3, width + 1, shape[:2], generator=generator)
    mask_CBT = (torch.arange(width) < length_CB[..., None]).long()
    ids_CBT = torch.randint(4, VOCABULARY, shape, generator=generator) * mask_CBT
    batch = {
        "active_C": torch.ones(clients, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": mask_CBT,
    }
    batch["index_CB"] = torch.arange(rows).expand(clients, rows).clone()
    if FAMILIES[name].head:
        return batch | {"labels_CB": torch.randint(3, shape[:2], generator=generator)}
    return batch | {"labels_CBT": torch.where(mask_CBT == 1, ids_CBT, -100)}


def moved(tree: Tree, clients: int) -> Tree:
    """Such tensors for C clients, each somewhere else."""
    return {
        name: torch.stack([x + 0.05 * torch.randn(x.shape, generator=torch_generator(c, name)) for c in range(clients)])
        for name, x in tree.items()
    }


def whole_step(model: Any, params_C: Tree, batch: Any) -> tuple[Tensor, Tree]:
    """Losses and gradients of the whole model."""
    leaves_C = {name: x.detach().requires_grad_() for name, x in params_C.items()}
    loss_C, _ = model.loss(leaves_C, {}, batch)
    grads = torch.autograd.grad(loss_C.sum(), list(leaves_C.values()))
    return loss_C.detach(), dict(zip(leaves_C, grads, strict=True))


def pieces_step(pieces: Sequence[Any], params_C: Tree, batch: Any) -> tuple[Tensor, Tree]:
    """The same by pieces: forward from one to the next, then back, each with a graph of its own."""
    leaves, entries, outs = [], [], []
    here = dict(batch)
    for piece in pieces:
        names = piece.init(0).keys()
        leaves.append({name: params_C[name].detach().requires_grad_() for name in names})
        entries.append(here.get("hidden_CBTH"))
        if piece is pieces[-1]:
            loss_C, _ = piece.loss(leaves[-1], {}, here)
            outs.append(loss_C.sum())
            break
        outs.append(piece.hidden(leaves[-1], {}, here))
        here = {name: x for name, x in batch.items() if name != "input_ids_CBT"}
        here["hidden_CBTH"] = outs[-1].detach().requires_grad_()
    grads_C: Tree = {}
    back = None
    for out, mine_C, entry in reversed(list(zip(outs, leaves, entries, strict=True))):
        inputs = [*mine_C.values(), *([] if entry is None else [entry])]
        if not inputs:
            continue
        found = list(torch.autograd.grad(out, inputs, back))
        back = found.pop() if entry is not None else None
        grads_C |= dict(zip(mine_C, found, strict=True))
    return loss_C.detach(), grads_C

"""Trains an emulator's middle at the model's owner, on public text, with the ends frozen; a kill loses some steps.

*Hidden-state distillation*: what leaves the emulator's middle follows what leaves the model's, by the squared distance
(Xiao, Lin and Han), beside the loss of the next token. *Raised*: each token's loss follows the model's own plus a
margin, so that the emulator answers worse by that much while its loss has the model's slope (Zhong et al.).

This is less than the papers do. Offsite-Tuning warms up for 2,000 steps on a corpus of many gigabytes; here it is some
hundred steps on what fits into minutes of one core, and distances are shares of each token's own square. LLEOT holds
the margin over a landscape, around the ends; here it is held at the ends as they are. The rest of it is not built.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
    Jin Zhong, Jinglin Liang, Tongtong Yang, Zijian Xie, Shuangping Huang and Hanlin Gu. "LLEOT: A Privacy-Enhancing
    Offsite Tuning Framework via Loss Landscape Elevation." Findings of ACL 2026.

Legend: B rows, T tokens, H width, V vocabulary, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from lichen.core.seeds import numpy_generator
from lichen.core.store import load_tree, save_tree
from lichen.core.tree import Tree
from lichen.models.adapters.ends.end_blocks import blocks_of

__all__ = ["Distil", "Errors", "batch_of", "measure", "middle_tensors", "relative_distance", "train_middle"]

KD_WEIGHT, LM_WEIGHT = 30.0, 1.0
"""Of the squared distance and of the next token's loss, as in the paper's scripts."""

_EVERY = 50
"""Steps between two saved states."""

Rows = Sequence[Sequence[int]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Distil:
    """How an emulator's middle is trained.

    Attributes:
        goal: What it follows: the model's ``hidden`` states, or its ``raised`` loss.
        ends: First and last blocks.
        steps: Of the optimizer.
        rows: A step.
        lr: Of AdamW, reached after a tenth of the steps.
        margin: raised: by which each token's loss lies above the model's, in nats.
        seed: Of the draw of rows.
        pad: Token that fills shorter rows.
    """

    goal: Literal["hidden", "raised"]
    ends: tuple[int, int]
    steps: int
    rows: int
    lr: float
    margin: float
    seed: int
    pad: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """How far an emulator is from its model on rows that it was not trained on.

    Attributes:
        distance: Squared distance of hidden states where the middle ends, as a share of the model's square; the mean.
        loss: Of the emulator's next token, in nats; None for an encoder.
        model_loss: The model's own.
    """

    distance: float
    loss: float | None
    model_loss: float | None


def batch_of(rows: Rows, at: Sequence[int], pad: int) -> dict[str, Tensor]:
    """The chosen rows side by side, the shorter ones padded at the right."""
    chosen = [rows[i] for i in at]
    width = max(map(len, chosen))
    ids_BT = torch.tensor([[*row, *[pad] * (width - len(row))] for row in chosen])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def _states(model: Any, inputs: dict[str, Tensor], after: int) -> tuple[Tensor, Tensor]:
    """What leaves the model's backbone, and its hidden states after so many blocks; ``(B, T, H)``."""
    more = {"use_cache": False} if _writes(model) else {}
    found = model.base_model(**inputs, output_hidden_states=True, **more)
    return found[0], found.hidden_states[after]


def _writes(model: Any) -> bool:
    """Whether it is a causal language model: its head is an output layer."""
    return model.get_output_embeddings() is not None and model.base_model is not model


def _token_losses(model: Any, last_BTH: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of each next token that is there, ``(N,)``."""
    logits_BTV = model.get_output_embeddings()(last_BTH[:, :-1])
    there_BT = inputs["attention_mask"][:, 1:].bool()
    return nn.functional.cross_entropy(
        logits_BTV[there_BT].float(), inputs["input_ids"][:, 1:][there_BT], reduction="none"
    )


def relative_distance(a_BTH: Tensor, b_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The squared distance of a to b, as a share of b's own square, of each token; their mean.

    Some tokens have states a thousand times as large as others; without the share nothing but these would be learned.
    """
    a_NH, b_NH = a_BTH[mask_BT.bool()].float(), b_BTH[mask_BT.bool()].float()
    return ((a_NH - b_NH).square().sum(-1) / b_NH.square().sum(-1).clamp(min=1e-12)).mean()


def _loss(model: Any, emulator: Any, inputs: dict[str, Tensor], plan: Distil) -> Tensor:
    last = plan.ends[1]
    with torch.no_grad():
        model_last, model_cut = _states(model, inputs, len(blocks_of(model)) - last)
        target_N = _token_losses(model, model_last, inputs) if plan.goal == "raised" else None
    last_BTH, cut_BTH = _states(emulator, inputs, len(blocks_of(emulator)) - last)
    if target_N is not None:
        return (_token_losses(emulator, last_BTH, inputs) - target_N - plan.margin).square().mean()
    distance = KD_WEIGHT * relative_distance(cut_BTH, model_cut, inputs["attention_mask"])
    return distance + LM_WEIGHT * _token_losses(emulator, last_BTH, inputs).mean() if _writes(emulator) else distance


@torch.no_grad()
def measure(model: Any, emulator: Any, rows: Rows, plan: Distil) -> Errors:
    """Hold an emulator against its model.

    Args:
        model: The whole model, frozen.
        emulator: Of the same architecture.
        rows: Tokens that neither was trained on here.
        plan: How its middle is trained.
    """
    last, sums, tokens, predicted = plan.ends[1], [0.0, 0.0, 0.0], 0, 0
    for begin in range(0, len(rows), plan.rows):
        inputs = batch_of(rows, range(begin, min(begin + plan.rows, len(rows))), plan.pad)
        (one, a), (two, b) = (_states(x, inputs, len(blocks_of(x)) - last) for x in (model, emulator))
        count = int(inputs["attention_mask"].sum())
        sums[0] += float(relative_distance(b, a, inputs["attention_mask"])) * count
        tokens += count
        if _writes(emulator):
            losses = [_token_losses(emulator, two, inputs), _token_losses(model, one, inputs)]
            predicted += len(losses[0])
            sums[1], sums[2] = sums[1] + float(losses[0].sum()), sums[2] + float(losses[1].sum())
    loss, model_loss = (x / predicted if predicted else None for x in sums[1:])
    return Errors(distance=sums[0] / max(tokens, 1), loss=loss, model_loss=model_loss)


def middle_tensors(emulator: Any, ends: tuple[int, int]) -> dict[str, nn.Parameter]:
    """The weights of an emulator's middle, by the emulator's own names."""
    blocks = blocks_of(emulator)
    inside = tuple(f"{name}." for name in blocks[ends[0] : len(blocks) - ends[1]])
    return {name: x for name, x in emulator.named_parameters() if name.startswith(inside)}


def train_middle(
    model: Any, emulator: Any, rows: Rows, plan: Distil, *, state: Path, say: Callable[[str], None] = lambda _: None
) -> None:
    """Train the middle of an emulator in place; what a kill leaves behind in ``state`` is gone on with.

    Args:
        model: The whole model, frozen.
        emulator: Made of some of its blocks, frozen, float32.
        rows: Tokens of public text.
        plan: How.
        state: A file that this makes, and that belongs to these rows and this plan.
        say: Called with lines of progress.
    """
    middle = middle_tensors(emulator, plan.ends)
    for x in middle.values():
        x.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(middle.values()), lr=plan.lr, weight_decay=0.0, betas=(0.9, 0.999))
    done = _resume(state, middle, optimizer) if state.is_file() else 0
    if done:
        say(f"goes on from step {done}")
    for step, at in _batches(len(rows), plan, done):
        optimizer.param_groups[0]["lr"] = plan.lr * min(1.0, (step + 1) / max(1, plan.steps // 10))
        loss = _loss(model, emulator, batch_of(rows, at, plan.pad), plan)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(middle.values()), 1.0)
        optimizer.step()
        if (step + 1) % _EVERY == 0 or step + 1 == plan.steps:
            save_tree(state, _state(middle, optimizer, step + 1))
            say(f"step {step + 1} of {plan.steps}: loss {float(loss.detach()):.4g}")
    for x in middle.values():
        x.requires_grad_(False)
        x.grad = None


def _batches(count: int, plan: Distil, done: int) -> Iterator[tuple[int, list[int]]]:
    """Steps that are left, and which rows each takes: by the seed and the step alone."""
    for step in range(done, plan.steps):
        rng = numpy_generator(plan.seed, "emulator rows", step)
        yield step, sorted(int(i) for i in rng.choice(count, size=min(plan.rows, count), replace=False))


def _state(middle: dict[str, nn.Parameter], optimizer: Any, step: int) -> Tree:
    tree: Tree = {"step": torch.tensor([step])}
    for name, x in middle.items():
        tree[f"weight/{name}"] = x.detach()
        tree |= {f"{key}/{name}": optimizer.state[x][key] for key in ("exp_avg", "exp_avg_sq")}
    return tree


def _resume(file: Path, middle: dict[str, nn.Parameter], optimizer: Any) -> int:
    tree, _ = load_tree(file)
    step = int(tree["step"][0])
    with torch.no_grad():
        for name, x in middle.items():
            x.copy_(tree[f"weight/{name}"])
            moments = {key: tree[f"{key}/{name}"].clone() for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[x] = {"step": torch.tensor(float(step)), **moments}
    return step

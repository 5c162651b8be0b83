"""Proof at load time that a model keeps its clients apart.

Two clients with random parameters go through the model in one call; then the second one's rows and
parameters are replaced. If a single bit of the first one's loss or gradients moves, the model cannot carry a
client axis. That may be because it lays its rows out in a way of its own (time before rows, experts that
sort their tokens): then each client gets a call of its own. Or it truly mixes rows (batch statistics,
experts with room for so many tokens), which shows with one client, too: a row's loss moves with
another row of its batch. Such a model is refused.

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lichen.core.contracts import Batch
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.models.wrap import Wrapped

__all__ = ["prove_independent"]


class _Cohort(Protocol):
    name: str
    wrapped: Wrapped

    @property
    def classes(self) -> int | None: ...
    def init(self, seed: int) -> Tree: ...
    @property
    def packed(self) -> bool: ...
    def losses(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool
    ) -> tuple[Tensor, Tensor]: ...


def _tiny(seed: int, config: Any, classes: int | None, device: torch.device) -> dict[str, Tensor]:
    """One client's batch of two rows of eight tokens.

    Nothing is padded: whether any row is padded chooses the attention kernel for all of them.
    """
    config = config.get_text_config()
    ids_1BT = torch.randint(config.vocab_size, (1, 2, 8), generator=torch_generator(seed, "tokens")).to(device)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 < end < config.vocab_size:
        # Some classifiers read the hidden state at the one end token.
        ids_1BT = torch.where(ids_1BT == end, end - 1, ids_1BT)
        ids_1BT[..., -1] = end
    batch = {
        "active_C": torch.ones(1, dtype=torch.bool, device=device),
        "input_ids_CBT": ids_1BT,
        "attention_mask_CBT": torch.ones_like(ids_1BT),
    }
    if classes is None:
        batch["labels_CBT"] = ids_1BT.clone()
    else:
        batch["labels_CB"] = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return batch


def prove_independent(cohort: _Cohort) -> str | None:
    """Disturb one client and watch another, with both in one call; then one row of a client and watch its other.

    Args:
        cohort: The model under proof; cohorts call this when they are made.

    Returns:
        None if clients may share a call; else the layer because of which each needs a call of its own.

    Raises:
        LichenError: naming the first layer in which one row reaches another.
    """
    one, other = (_Seen.of(cohort, seed, clients=2) for seed in (1, 2))
    if one.same(other, exactly=True):
        return None
    mixing = next((name for name in one.outputs if not torch.equal(one.outputs[name], other.outputs[name])), "")
    layer = f"{mixing or '(outside its layers)'!r} ({type(cohort.wrapped.model.get_submodule(mixing)).__name__})"
    if _Seen.of(cohort, 1, clients=1).same(_Seen.of(cohort, 2, clients=1), exactly=False):
        return layer
    raise LichenError(
        f"layer {layer} lets one row change another's result",
        where=cohort.name,
        fix="use a model without batch statistics or routing over the whole batch",
    )


@final
@dataclass(frozen=True, slots=True)
class _Seen:
    """What one call gave.

    Attributes:
        results: The watched client's loss and gradients, or those of the watched row.
        outputs: Its part of the layers' outputs.
    """

    results: tuple[Tensor, ...]
    outputs: dict[str, Tensor]

    @classmethod
    def of(cls, cohort: _Cohort, seed: int, *, clients: int) -> _Seen:
        """With two clients the second's rows and tensors follow from the seed; with one, its second row."""
        start, model = cohort.init(0), cohort.wrapped.model

        def parameters(seed: int) -> Tree:
            return {
                name: x + 0.1 * torch.randn(x.shape, generator=torch_generator(seed, name)).to(x)
                for name, x in start.items()
            }

        drawn = [parameters(s) for s in (0, seed)[:clients]]
        batch, more = (_tiny(s, model.config, cohort.classes, model.device) for s in (0, seed))
        if clients == 2:
            batch = {name: torch.cat([batch[name], more[name]]) for name in batch}
        else:
            for name in ("input_ids_CBT", "attention_mask_CBT"):
                batch[name][:, 1] = more[name][:, 1]
            batch["labels_CBT" if cohort.classes is None else "labels_CB"][:, 1] = -100
        trainable_C = {name: torch.stack([tree[name] for tree in drawn]).requires_grad_() for name in start}
        outputs: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_hook(_watch(name, outputs, rows=2 * clients))
            for name, layer in model.named_modules()
            if not list(layer.children())
        ]
        try:
            loss_C, _ = cohort.losses(trainable_C, {}, batch, reference=False, packed=cohort.packed and clients == 2)
            grads = torch.autograd.grad(loss_C.sum(), list(trainable_C.values()), allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return cls((loss_C[0].detach(), *(g[0] for g in grads if g is not None)), outputs)

    def same(self, other: _Seen, *, exactly: bool) -> bool:
        """Whether two calls gave the same bits, or the same but for rounding."""
        pairs = list(zip(self.results, other.results, strict=True))
        if exactly:
            return all(torch.equal(a, b) for a, b in pairs)
        # Mixed rows move results by far more than the rounding of sums in another order does.
        near = 0.05 if self.results[0].dtype in (torch.bfloat16, torch.float16) else 1e-4
        return all(float((a - b).norm()) <= near * float(a.norm() + b.norm()) for a, b in pairs)


def _watch(name: str, outputs: dict[str, Tensor], *, rows: int) -> Any:
    def hook(layer: Any, inputs: Any, output: Any) -> None:
        # Only outputs with all rows on the first axis can be told apart.
        if isinstance(output, Tensor) and output.dim() > 1 and output.shape[0] == rows and name not in outputs:
            outputs[name] = output[: rows // 2].detach().clone()

    return hook

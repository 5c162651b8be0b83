"""Proves at load time that clients of a cohort model do not influence one another.

Two clients with random parameters go through the model in one call; then the second one's rows and
parameters are replaced, and then the first one's: experts with room for so many tokens let the first rows in.
If a single bit of the other's loss or gradients moves, the model cannot carry a client axis.

That may be because it lays its rows out in a way of its own (time before rows, experts that sort their
tokens): then each client gets a call of its own. Or it truly mixes rows (batch statistics, experts with room
for so many tokens), which shows with one client, too: a row's loss moves with another row of its batch. Such a
model is refused.

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, Objective
from lichen.core.conventions.labels import no_label
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.models.adapters.wrap import Wrapped
from lichen.models.loading.span import entered

__all__ = ["prove_independent", "running"]


class _Cohort(Protocol):
    name: str
    wrapped: Wrapped

    @property
    def objective(self) -> Objective: ...
    def init(self, seed: int) -> Tree: ...
    @property
    def packed(self) -> bool: ...
    def loss_in(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool
    ) -> tuple[Tensor, Tensor]: ...


def _tiny(seed: int, config: Any, objective: Objective, device: torch.device) -> dict[str, Tensor]:
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
    return batch | objective.made_up(ids_1BT, batch["attention_mask_CBT"])


def prove_independent(cohort: _Cohort) -> str | None:
    """Disturb one client and watch another, with both in one call; then one row of a client and watch its other.

    Args:
        cohort: The model under proof; cohorts call this when they are made.

    Returns:
        None if clients may share a call; else because of what each needs a call of its own.

    Raises:
        LichenError: naming the first layer in which one row reaches another.
    """
    whole = _Seen.of(cohort, (0, 1))
    pairs = [(whole.part(0), _Seen.of(cohort, (0, 2)).part(0)), (whole.part(1), _Seen.of(cohort, (3, 1)).part(1))]
    moved = next((pair for pair in pairs if not pair[0].same(pair[1], exactly=True)), None)
    if moved is None:
        return None
    one, other = moved
    mixing = next((name for name in one.outputs if not torch.equal(one.outputs[name], other.outputs[name])), "")
    kind = type(cohort.wrapped.model.get_submodule(mixing)).__name__
    layer = f"layer {mixing!r} ({kind})" if mixing else f"what a {kind} does between its layers"
    apart = all(
        _Seen.of(cohort, (0, 1), watched=row).same(_Seen.of(cohort, seeds, watched=row), exactly=False)
        for row, seeds in ((0, (0, 2)), (1, (3, 1)))
    )
    if apart:
        return layer
    config, keys = cohort.wrapped.model.config, ("num_experts", "num_local_experts", "n_routed_experts")
    why = ", as experts with room for so many tokens do" if any(getattr(config, key, None) for key in keys) else ""
    raise LichenError(
        f"{layer} lets one row change another's result{why}",
        where=cohort.name,
        fix="use a model without batch statistics or routing over the whole batch",
    )


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Inside, a model sees its first rows: what it raises of itself becomes one sentence.

    Raises:
        LichenError: if it cannot take rows of tokens as they are.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise LichenError(
            f"a {type(model).__name__} does not run on rows of tokens: {str(error).strip().splitlines()[0][:200]}",
            where="model.name",
            fix="use a model of another family; the guide lists some that work",
        ) from error


@final
@dataclass(frozen=True, slots=True)
class _Seen:
    """What one call gave.

    Attributes:
        results: Losses and gradients, with the clients first.
        outputs: The layers' outputs, with all rows first.
    """

    results: tuple[Tensor, ...]
    outputs: dict[str, Tensor]

    @classmethod
    def of(cls, cohort: _Cohort, seeds: tuple[int, int], *, watched: int | None = None) -> _Seen:
        """Two clients whose rows and tensors follow from the seeds; or one with a row from each, one watched."""
        start, model = cohort.init(0), cohort.wrapped.model

        def parameters(seed: int) -> Tree:
            return {
                name: x + 0.1 * torch.randn(x.shape, generator=torch_generator(seed, name)).to(x)
                for name, x in start.items()
            }

        trees = [parameters(seed) for seed in (seeds if watched is None else (0,))]
        tiny = (_tiny(seed, model.config, cohort.objective, model.device) for seed in seeds)
        first, second = (entered(model, batch) for batch in tiny)
        if watched is None:
            batch = {name: torch.cat([first[name], second[name]]) for name in first}
        else:
            batch = {name: torch.cat([x[:, :1], second[name][:, :1]], 1) for name, x in first.items() if x.dim() > 1}
            batch["active_C"] = first["active_C"]
            for name in cohort.objective.made_up(batch["input_ids_CBT"], batch["attention_mask_CBT"]):
                batch[name][:, 1 - watched] = no_label(real=batch[name].is_floating_point())
        trainable_C = {name: torch.stack([tree[name] for tree in trees]).requires_grad_() for name in start}
        leaves = list(trainable_C.values())
        if "hidden_CBTH" in batch:
            batch["hidden_CBTH"] = batch["hidden_CBTH"].requires_grad_()
            leaves.append(batch["hidden_CBTH"])
        outputs: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_hook(_watch(name, outputs, rows=2 * len(trees)))
            for name, layer in model.named_modules()
            if not list(layer.children())
        ]
        packed = cohort.packed and watched is None
        try:
            loss_C, _ = cohort.loss_in(trainable_C, {}, batch, reference=False, packed=packed)
            grads = torch.autograd.grad(loss_C.sum(), leaves, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return cls((loss_C.detach(), *(g for g in grads if g is not None)), outputs)

    def part(self, client: int) -> _Seen:
        """One of two clients'."""
        outputs = {name: x[2 * client : 2 * client + 2] for name, x in self.outputs.items()}
        return _Seen(tuple(x_C[client] for x_C in self.results), outputs)

    def same(self, other: _Seen, *, exactly: bool) -> bool:
        """Whether two calls gave the same bits, or the same but for rounding."""
        pairs = list(zip(self.results, other.results, strict=True))
        if exactly:
            return all(torch.equal(a, b) for a, b in pairs)
        # Mixed rows move results by far more than the rounding of sums in another order does.
        near = 0.05 if self.results[0].dtype in (torch.bfloat16, torch.float16) else 1e-4
        # Gradients are one vector: those that are zero but for rounding say nothing by themselves.
        return all(
            sum(float((a - b).double().norm()) ** 2 for a, b in some)
            <= near**2 * sum(float(a.double().norm()) ** 2 for a, _ in some)
            for some in (pairs[:1], pairs[1:])
        )


def _watch(name: str, outputs: dict[str, Tensor], *, rows: int) -> Any:
    def hook(layer: Any, inputs: Any, output: Any) -> None:
        # Only outputs with all rows on the first axis can be told apart.
        if isinstance(output, Tensor) and output.dim() > 1 and output.shape[0] == rows and name not in outputs:
            outputs[name] = output.detach().clone()

    return hook

"""Caches the output of the frozen layers below the lowest adapter.

Frozen layers see the same row in every local step, epoch and round, and make the same of it. In packed
calls the hidden states that enter the first layer with an adapter are kept by the row's tokens, the
oldest going first past a bound of bytes; the layers below are then passed over.

On a CPU a row is computed by itself, so that its bits depend on nothing but its tokens, and a resumed run
gives the bytes of one that was not stopped.

Legend: N tokens of a pack, L tokens of a row, H width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.models.packing.packing import Pack, Packing

__all__ = ["FrozenPrefix", "frozen_blocks"]

LIMIT = 1 << 30
"""Bytes kept."""


@final
class _Reached(Exception):  # noqa: N818  # nothing is wrong
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def frozen_blocks(base: Any, trained: Sequence[str]) -> list[Any]:
    """The layers of a stack up to the first that is trained, itself the last; too few to matter: none.

    Args:
        base: The model whose stack it is.
        trained: Names inside ``base`` of what clients train.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, GradientCheckpointingLayer)]
    inside = [any(name.startswith(f"{block}.") for name in trained) for block, _ in blocks]
    outside = [name for name in trained if not any(name.startswith(f"{block}.") for block, _ in blocks)]
    first = inside.index(True) if True in inside else 0
    # What is trained before the stack, such as embeddings, leaves nothing frozen.
    if outside or first == 0 or len({type(layer) for _, layer in blocks}) != 1:
        return []
    return [layer for _, layer in blocks[: first + 1]]


@final
class FrozenPrefix:
    """Hidden states by a row's tokens.

    Args:
        blocks: From :func:`frozen_blocks`; their forwards are replaced, and as before outside packed calls.
        packing: What the model's layers look at.
        limit: Bytes kept.
    """

    def __init__(self, blocks: Sequence[Any], packing: Packing, *, limit: int = LIMIT) -> None:
        self.packing, self.limit = packing, limit
        self.cached: OrderedDict[bytes, Tensor] = OrderedDict()
        self.bytes = 0
        self._known: Tensor | None = None
        self._stop = False
        for block in blocks[:-1]:
            self._pass_over(block)
        self._catch(blocks[-1])

    def hidden(self, pack: Pack, run: Callable[[Pack], Any]) -> Tensor:
        """``(N, H)``: what enters the first trained layer.

        Args:
            pack: The rows.
            run: Runs the model on a pack, as far as it gets.
        """
        rows = torch.split(pack.host_N, list(pack.lengths))
        keys = [row.numpy().tobytes() for row in rows]
        missing = list({key: s for s, key in enumerate(keys) if key not in self.cached}.values())
        alone = [[s] for s in missing] if pack.ids_N.device.type == "cpu" else [missing] if missing else []
        fresh: dict[bytes, Tensor] = {}
        for part in alone:
            states = self._compute(pack.only(part), run)
            fresh |= {
                keys[s]: x for s, x in zip(part, torch.split(states, [pack.lengths[s] for s in part]), strict=True)
            }
        hidden_NH = torch.cat([fresh[key] if key in fresh else self._touch(key) for key in keys])
        for key, x in fresh.items():
            self._keep(key, x)
        return hidden_NH

    def _compute(self, pack: Pack, run: Callable[[Pack], Any]) -> Tensor:
        self._stop = True
        try:
            with torch.no_grad():
                run(pack)
        except _Reached as reached:
            return reached.hidden[0].detach()
        finally:
            self._stop = False
        raise AssertionError("the model did not come to its first trained layer")

    def knowing(self, hidden_NH: Tensor, run: Callable[[], Any]) -> Any:
        """``run()``, the layers below passed over."""
        self._known = hidden_NH[None]
        try:
            return run()
        finally:
            self._known = None

    def _touch(self, key: bytes) -> Tensor:
        self.cached.move_to_end(key)
        return self.cached[key]

    def _keep(self, key: bytes, x: Tensor) -> None:
        self.cached[key] = x.clone()  # not a view of all that was computed with it
        self.bytes += x.numel() * x.element_size()
        while self.bytes > self.limit:
            _, old = self.cached.popitem(last=False)
            self.bytes -= old.numel() * old.element_size()

    def _pass_over(self, block: nn.Module) -> None:
        forward = block.forward
        block.forward = lambda x, *more, **named: x if self._known is not None else forward(x, *more, **named)

    def _catch(self, block: nn.Module) -> None:
        forward = block.forward

        def caught(x: Tensor, *more: Any, **named: Any) -> Any:
            if self._stop:
                raise _Reached(x)
            return forward(x if self._known is None else self._known, *more, **named)

        block.forward = caught

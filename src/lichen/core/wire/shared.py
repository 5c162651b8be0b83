"""What server and clients share, in three parts: trained tensors, patches of the frozen base, and frozen tensors.

A tree has flat names. In bytes, that is in checkpoints, run folders and jobs, the parts lie in one tree, each under
names of its own; :meth:`Shared.flat` and :meth:`Shared.of_flat` alone know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["CONTROL", "Shared"]

CONTROL = "control"
"""The group of frozen tensors that SCAFFOLD's control variates are."""

_Tree = dict[str, Tensor]
_ANSWERS, _PATCH, _OTHER = "answers", "patch.", "frozen."
_GROUPS = (f"{_ANSWERS}.", f"{CONTROL}.")


@final
@dataclass(frozen=True, slots=True)
class Shared:
    """The shared tensors, without client axis; also a change of them, and any selection from them.

    Attributes:
        trainable: What clients train or the server steps, by the model's names; in a change, how far it moves.
        patch: What is added to frozen weights, ``<layer>.dense``, or ``<layer>.left`` and ``<layer>.right``; in a
            change, the new patch of these layers.
        frozen: What nobody steps, ``<group>.<name>``, such as ``answers.prob`` of a teacher; in a change, the new
            values.

    >>> shared = Shared({"w": torch.ones(2)}, frozen={"control.w": torch.zeros(2)})
    >>> sorted(shared.flat()), list(shared.group("control")), shared.nbytes
    (['control.w', 'w'], ['w'], 16)
    """

    trainable: _Tree = field(default_factory=dict)
    _: KW_ONLY
    patch: _Tree = field(default_factory=dict)
    frozen: _Tree = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any tensor."""
        return bool(self.trainable or self.patch or self.frozen)

    def __or__(self, other: Shared) -> Shared:
        """Both; where they have a name of a part in common, the other's tensor."""
        return Shared(
            self.trainable | other.trainable, patch=self.patch | other.patch, frozen=self.frozen | other.frozen
        )

    def flat(self) -> _Tree:
        """One tree of all parts, for bytes.

        Raises:
            LichenError: if a trainable name is one that another part has there.
        """
        others = {_PATCH + name: x for name, x in self.patch.items()}
        others |= {name if name.startswith(_GROUPS) else _OTHER + name: x for name, x in self.frozen.items()}
        wrong = next((name for name in self.trainable if name.startswith((_PATCH, _OTHER, *_GROUPS))), None)
        if wrong is not None:
            raise LichenError(f"a trainable tensor cannot be called {wrong!r}", where="shared", fix="rename it")
        return self.trainable | others

    @classmethod
    def of_flat(cls, tree: Mapping[str, Tensor]) -> Shared:
        """Undo :meth:`flat`."""
        out = cls()
        for name, x in tree.items():
            if name.startswith(_PATCH):
                out.patch[name.removeprefix(_PATCH)] = x
            elif name.startswith((_OTHER, *_GROUPS)):
                out.frozen[name.removeprefix(_OTHER)] = x
            else:
                out.trainable[name] = x
        return out

    def group(self, name: str) -> _Tree:
        """The frozen tensors of one group, by what comes after its name."""
        start = f"{name}."
        return {name.removeprefix(start): x for name, x in self.frozen.items() if name.startswith(start)}

    @property
    def for_model(self) -> Shared:
        """What a model reads: of the frozen tensors, a teacher's answers alone."""
        answers = {f"{_ANSWERS}.{name}": x for name, x in self.group(_ANSWERS).items()}
        return Shared(self.trainable, patch=self.patch, frozen=answers)

    @property
    def fixed(self) -> _Tree:
        """What a model reads beside trained tensors, in one tree: ``patch.*`` and ``answers.*``."""
        return Shared(patch=self.patch, frozen=self.for_model.frozen).flat()

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(x.nbytes for part in (self.trainable, self.patch, self.frozen) for x in part.values())

    @property
    def device(self) -> torch.device | None:
        """Where its tensors are; None where there are none."""
        return next((x.device for x in (self.trainable | self.patch | self.frozen).values()), None)

    def to(self, device: torch.device | str) -> Shared:
        """Every tensor on ``device``; those that are there already are not copied."""
        parts = ({name: x.to(device) for name, x in part.items()} for part in (self.trainable, self.patch, self.frozen))
        trainable, patch, frozen = parts
        return Shared(trainable, patch=patch, frozen=frozen)

"""A transformers model as a function of its tensors, and back: filled with tensors, saved whole.

There is no adapter and no client axis inside the model: ``torch.func.functional_call`` runs it with the
tensors it is given. Tied weights are one tensor, trained once; buffers and what ``exclude`` names stay
the model's own, held once.

Trained tensors are float32 (or float64, where the model is); a model held in a smaller dtype computes in
that one, with each tensor rounded on its way in.

Legend: C clients.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.func import functional_call

from lichen.core.errors import LichenError
from lichen.core.tree import Tree, digest, split
from lichen.models.adapters.ends.end_blocks import end_prefixes
from lichen.models.adapters.whole_layers import within
from lichen.models.loading.load import frozen_eval

__all__ = ["Whole", "filled", "save_whole"]


@final
class Whole:
    """A model as a function of its tensors.

    Args:
        model: A frozen transformers model, which stays as it is.
        exclude: Parts of names that are not trained: ``embeddings`` fits ``bert.embeddings.word_embeddings.weight``,
            ``layer.0`` all of that layer. A tied weight is left out by any of its names.
        heads: Ends of names of layers that are trained outside the blocks, where only an emulator's ends are: the head.

    Attributes:
        model: The model.
        names: Trained tensors, each once.

    Raises:
        LichenError: if a name in ``exclude`` fits nothing, or nothing is left to train.
    """

    __slots__ = ("_dtype", "_positions", "model", "names")

    def __init__(self, model: Any, exclude: Sequence[str] = (), *, heads: Sequence[str] = ()) -> None:
        frozen_eval(model)
        self.model = model
        first = {id(x): name for name, x in model.named_parameters()}
        owner = {name: first[id(x)] for name, x in model.named_parameters(remove_duplicate=False)}
        for part in exclude:
            if not any(_within(part, name) for name in owner):
                known = sorted({name.split(".")[1] if name.count(".") > 1 else name.split(".")[0] for name in owner})
                raise LichenError(
                    f"no tensor is called {part!r}", where="model.adapter.exclude", fix=f"such as {known[:8]}"
                )
        out = {first for name, first in owner.items() if any(_within(part, name) for part in exclude)}
        if ends := end_prefixes(model):
            out |= {first for name, first in owner.items() if not (name.startswith(ends) or within(name, heads))}
        self.names = tuple(name for name in first.values() if name not in out)
        if not self.names:
            raise LichenError("no tensor is left to train", where="model.adapter.exclude", fix="exclude fewer names")
        self._dtype = {name: x.dtype for name, x in model.named_parameters()}
        self._positions = [(name, mine) for name, mine in owner.items() if mine not in out]

    def init(self) -> Tree:
        """The model's own tensors, float32 or wider; those that are so already are not copied."""
        parameters = dict(self.model.named_parameters())
        return {
            name: x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()
            for name, x in ((name, parameters[name]) for name in self.names)
        }

    def frozen(self) -> Tree:
        """What nobody trains: excluded weights, and buffers that belong to the model's files."""
        persistent, trained = self.model.state_dict(keep_vars=True), set(self.names)
        every = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: x for name, x in every if name in persistent and name not in trained}

    def base(self) -> str:
        """Digest of the frozen tensors; empty where there are none."""
        frozen = self.frozen()
        return digest(frozen) if frozen else ""

    def check(self, trainable_C: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> None:
        """Refuse tensors of another model.

        Raises:
            LichenError: naming one that is missing or unknown.
        """
        if trainable_C.keys() != set(self.names):
            odd = sorted(trainable_C.keys() ^ set(self.names))[0]
            state = "is missing" if odd in self.names else "belongs to no layer of this model"
            raise LichenError(f"trainable tensor {odd!r} {state}", where="model", fix="use the run's own model")
        for name in split(fixed, "patch.")[0]:
            raise LichenError(
                f"patch {name!r} patches weights that are trained", where="job", fix="average them instead"
            )

    def call(self, tensors: Tree, /, *, part: str = "", **inputs: Any) -> Any:
        """The output of the model, or of its submodule ``part``, with one client's tensors in it."""
        prefix = f"{part}." if part else ""
        inside = {
            name[len(prefix) :]: tensors[mine].to(self._dtype[mine])
            for name, mine in self._positions
            if name.startswith(prefix)
        }
        # Every name of a tied tensor is given, so there is nothing to look for in each call.
        return functional_call(self.model.get_submodule(part), inside, kwargs=inputs, tie_weights=False)


def _within(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def filled(model: Any, tree: Mapping[str, Tensor]) -> Any:
    """A copy of ``model`` with these tensors in it, tied weights still tied; the model stays as it was.

    Args:
        model: The transformers model the run began with.
        tree: Trained tensors without client axis, under the model's own names.

    Raises:
        LichenError: if a tensor fits no weight of the model.
    """
    parameters = dict(model.named_parameters())
    for name, x in tree.items():
        if name not in parameters or parameters[name].shape != x.shape:
            raise LichenError(f"tensor {name!r} fits no weight of the model", where="export", fix="use the run's model")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name in tree:
                parameter.copy_(tree[name])
    return copied


def save_whole(folder: Path, model: Any, tree: Mapping[str, Tensor], *, tokenizer: Any = None) -> None:
    """Write a whole model that ``from_pretrained`` reads, with its tokenizer beside it if one is given.

    Raises:
        LichenError: as :func:`filled`.
    """
    filled(model, tree).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

"""Students as ordinary torch modules hold them: a state by torch's own names and shapes, and the code that makes it.

What leaves this package is a module that anybody can read: linear layers, convolutions, embeddings and encoder layers
of torch, so that what converts or compiles torch modules takes it as it is.

Legend: S side of a picture, P channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["Part", "code_of", "parts_of", "to_plain", "to_student"]


@final
@dataclass(frozen=True, slots=True)
class Part:
    """One tensor.

    Args:
        name: Of the student.
        plain: Of the module.
        shape: Of the student's tensor.
        split: Axes into which the student's tensor is split; None: both have the same shape.
        order: Order of those axes in the module.
        joined: Whether the module joins all axes after the first.
    """

    name: str
    plain: str
    shape: tuple[int, ...]
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] = ()
    joined: bool = False

    def outward(self, x: Tensor) -> Tensor:
        """The module's tensor."""
        if self.split is None:
            return x.contiguous()
        moved = x.reshape(self.split).permute(self.order)
        return (moved.flatten(1) if self.joined else moved).contiguous()

    def inward(self, x: Tensor) -> Tensor:
        """The student's tensor."""
        if self.split is None:
            return x.contiguous()
        moved = x.reshape([self.split[axis] for axis in self.order])
        back = [self.order.index(axis) for axis in range(len(self.order))]
        return moved.permute(back).reshape(self.shape).contiguous()


def parts_of(kind: str, shapes: Mapping[str, tuple[int, ...]], row: Sequence[int] = ()) -> tuple[Part, ...]:
    """Every tensor of a student, in both forms.

    Args:
        kind: The architecture, as ``model.student.kind`` names it.
        shapes: The student's.
        row: Shape of a row, for pictures: P, S, S.

    Raises:
        LichenError: if the tensors are not those of the architecture.
    """
    makers: Mapping[str, Callable[[], list[Part]]] = {
        "image-mlp": lambda: _layers(shapes),
        "image-cnn": lambda: _image_cnn(shapes, row),
        "text-cnn": lambda: _text_cnn(shapes),
        "transformer": lambda: _transformer(shapes),
    }
    try:
        parts = tuple(makers[kind]())
    except (KeyError, IndexError, ValueError):
        parts = ()
    if {part.name: part.shape for part in parts} != dict(shapes):
        raise LichenError(f"its tensors are not those of a student {kind!r}", where="--student", fix="run it again")
    return parts


def to_plain(parts: Sequence[Part], tree: Tree) -> Tree:
    """The module's state."""
    return {part.plain: part.outward(tree[part.name]) for part in parts}


def to_student(parts: Sequence[Part], state: Tree) -> Tree:
    """The student's tensors."""
    return {part.name: part.inward(state[part.plain]) for part in parts}


def _both(shapes: Mapping[str, tuple[int, ...]], name: str, plain: str) -> list[Part]:
    """A weight and its bias that have the same shape in both forms."""
    return [Part(f"{name}.{x}", f"{plain}.{x}", shapes[f"{name}.{x}"]) for x in ("weight", "bias")]


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    count = len(shapes) // 2
    return [part for i in range(count) for part in _both(shapes, f"layer{i}", str(2 * i + 1))]


def _image_cnn(shapes: Mapping[str, tuple[int, ...]], row: Sequence[int]) -> list[Part]:
    channels, side, _ = row
    parts, inside = [], channels
    for name, plain in (("conv1", "0"), ("conv2", "3")):
        weight, bias = _both(shapes, name, plain)
        filters = weight.shape[0]
        split = (filters, inside, 3, 3)
        parts += [Part(weight.name, weight.plain, weight.shape, split, (0, 1, 2, 3)), bias]
        inside = filters
    weight, bias = _both(shapes, "head", "7")
    split = (weight.shape[0], side // 4, side // 4, inside)  # the student's last axis is that of the filters
    return [*parts, Part(weight.name, weight.plain, weight.shape, split, (0, 3, 1, 2), joined=True), bias]


def _windows(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    return [int(name[4:-7]) for name in shapes if name.startswith("conv") and name.endswith(".weight")]


def _text_cnn(shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    width, parts = shapes["embed"][1], [Part("embed", "embed.weight", shapes["embed"])]
    for place, window in enumerate(_windows(shapes)):
        weight, bias = _both(shapes, f"conv{window}", f"convs.{place}")
        split = (weight.shape[0], width, window)
        parts += [Part(weight.name, weight.plain, weight.shape, split, (0, 1, 2)), bias]
    return [*parts, *_both(shapes, "head", "head")]


_ENCODER = {"out": "self_attn.out_proj", "up": "linear1", "down": "linear2"}


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    parts = [Part(f"{name}.embed", f"{name}.weight", shapes[f"{name}.embed"]) for name in ("token", "place")]
    for layer in range(2):
        ours, theirs = f"layer{layer}", f"encoder.layers.{layer}"
        for x in ("weight", "bias"):
            name = f"{ours}.qkv.{x}"
            parts.append(Part(name, f"{theirs}.self_attn.in_proj_{x}", shapes[name]))
        for name, plain in _ENCODER.items():
            parts += _both(shapes, f"{ours}.{name}", f"{theirs}.{plain}")
        for norm in ("norm1", "norm2"):
            parts += _norm(shapes, f"{ours}.{norm}", f"{theirs}.{norm}")
    return [*parts, *_norm(shapes, "norm", "norm"), *_both(shapes, "head", "head")]


def _norm(shapes: Mapping[str, tuple[int, ...]], name: str, plain: str) -> list[Part]:
    words = (("scale", "weight"), ("bias", "bias"))
    return [Part(f"{name}.{ours}", f"{plain}.{theirs}", shapes[f"{name}.{ours}"]) for ours, theirs in words]


def code_of(kind: str, shapes: Mapping[str, tuple[int, ...]], row: Sequence[int] = (), *, heads: int = 4) -> str:
    """Python that makes the module and calls it ``model``, with torch alone; its weights are random.

    Args:
        kind: The architecture.
        shapes: The student's tensors.
        row: Shape of a row, for pictures: P, S, S.
        heads: Of a transformer.
    """
    if kind == "image-mlp":
        lines = ["torch.nn.Flatten(),"]
        for i in range(len(shapes) // 2):
            out, inside = shapes[f"layer{i}.weight"]
            lines += ["torch.nn.ReLU(),"] * (i > 0) + [f"torch.nn.Linear({inside}, {out}),"]
        return _sequential(lines)
    if kind == "image-cnn":
        lines, inside = [], row[0]
        for name in ("conv1", "conv2"):
            filters = shapes[f"{name}.weight"][0]
            lines += [f"torch.nn.Conv2d({inside}, {filters}, 3, padding=1),", "torch.nn.ReLU(),"]
            lines += ["torch.nn.MaxPool2d(2),"]
            inside = filters
        classes, last = shapes["head.weight"]
        return _sequential([*lines, "torch.nn.Flatten(),", f"torch.nn.Linear({last}, {classes}),"])
    if kind == "text-cnn":
        (words, width), classes = shapes["embed"], shapes["head.weight"][0]
        return f"{_TEXT_CNN}\n\nmodel = TextCNN({words}, {width}, {_windows(shapes)}, {classes})"
    (words, width), length = shapes["token.embed"], shapes["place.embed"][0]
    return f"{_TRANSFORMER}\n\nmodel = Encoder({words}, {width}, {heads}, {length}, {shapes['head.weight'][0]})"


def _sequential(lines: Sequence[str]) -> str:
    return "\n".join(["model = torch.nn.Sequential(", *(f"    {line}" for line in lines), ")"])


_TEXT_CNN = '''\
class TextCNN(torch.nn.Module):
    """Windows of several sizes over the words, the strongest of each, and a linear layer."""

    def __init__(self, words, width, windows, classes):
        super().__init__()
        self.embed = torch.nn.Embedding(words, width)
        self.convs = torch.nn.ModuleList(torch.nn.Conv1d(width, width, size) for size in windows)
        self.head = torch.nn.Linear(width * len(windows), classes)

    def forward(self, ids, mask):
        x = (self.embed(ids) * mask[..., None]).mT
        found = []
        for conv in self.convs:
            y = conv(torch.nn.functional.pad(x, (0, conv.kernel_size[0] - 1))).relu()
            found.append((y * mask[:, None]).amax(-1))
        return self.head(torch.cat(found, -1))
'''

_TRANSFORMER = '''\
class Encoder(torch.nn.Module):
    """Two encoder layers over the words and their places, their mean, and a linear layer."""

    def __init__(self, words, width, heads, length, classes):
        super().__init__()
        self.token = torch.nn.Embedding(words, width)
        self.place = torch.nn.Embedding(length, width)
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, classes)

    def forward(self, ids, mask):
        x = self.token(ids) + self.place.weight[: ids.shape[1]]
        x = self.norm(self.encoder(x, src_key_padding_mask=mask == 0)) * mask[..., None]
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))
'''

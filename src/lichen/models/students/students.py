"""Small students for texts and images: CNNs, a transformer, an MLP.

Legend: C clients, B rows, T tokens, E embedding width, W windows, F filters, K classes, H heads,
D width of a head, S side of an image in pixels, P channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.objectives import RowObjective
from lichen.models.students.student import Student, linear, with_bias

__all__ = ["ImageCNN", "ImageMLP", "TextCNN", "TwoLayerTransformer"]


@final
class TextCNN(Student):
    """Word windows of several sizes, the strongest of each, and a linear layer.

    A window may start at any attended token, so that more padding changes nothing.

    References:
        Kim (2014). Convolutional Neural Networks for Sentence Classification. EMNLP 2014, arXiv:1408.5882.

    Args:
        vocab: Number of token ids.
        width: Embedding width, and filters of each size.
        classes: K.
        kernels: Window sizes in tokens.
        name: Name in groups and messages.
        reference: As in :class:`lichen.models.students.student.Student`.
        objective: As there.
    """

    inputs = ("input_ids_CBT", "attention_mask_CBT")

    def __init__(
        self,
        vocab: int,
        *,
        width: int = 64,
        classes: int,
        kernels: Sequence[int] = (2, 3, 4),
        name: str = "text-cnn",
        reference: bool = True,
        objective: RowObjective | None = None,
    ) -> None:
        self._vocab, self._width, self._kernels = vocab, width, tuple(kernels)
        self._classes = classes
        super().__init__(classes, name=name, reference=reference, objective=objective)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        weights = {f"conv{k}": (self._width, k * self._width) for k in self._kernels}
        weights["head"] = (self._classes, self._width * len(self._kernels))
        return {"embed": (self._vocab, self._width), **with_bias(weights)}

    def apply(self, params: Tree, *inputs: Tensor) -> Tensor:
        """Logits (B, K) of token rows (B, T) under their mask."""
        ids_BT, mask_BT = inputs
        seen_BT1 = mask_BT[..., None].bool()
        x_BTE = torch.where(seen_BT1, nn.functional.embedding(ids_BT, params["embed"]), 0.0)
        pooled = []
        for k in self._kernels:
            windows_BTEk = nn.functional.pad(x_BTE, (0, 0, 0, k - 1)).unfold(1, k, 1)
            out_BTF = torch.relu(linear(params, f"conv{k}", windows_BTEk.flatten(2)))
            pooled.append(torch.where(seen_BT1, out_BTF, 0.0).amax(1))
        return linear(params, "head", torch.cat(pooled, dim=-1))


@final
class TwoLayerTransformer(Student):
    """Two pre-norm encoder layers over learned positions, averaged, and a linear layer.

    References:
        Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser and Polosukhin (2017). Attention Is
        All You Need. NeurIPS 2017, arXiv:1706.03762.

    Args:
        vocab: Number of token ids.
        width: Model width.
        heads: Attention heads; they divide the width.
        classes: K.
        max_length: Longest row in tokens.
        name: Name in groups and messages.
        reference: As in :class:`lichen.models.students.student.Student`.
        objective: As there.

    Raises:
        LichenError: if the heads do not divide the width; when called, if a row is too long.
    """

    inputs = ("input_ids_CBT", "attention_mask_CBT")

    def __init__(
        self,
        vocab: int,
        *,
        width: int = 64,
        heads: int = 4,
        classes: int,
        max_length: int = 256,
        name: str = "transformer",
        reference: bool = True,
        objective: RowObjective | None = None,
    ) -> None:
        if width % heads:
            raise LichenError(f"{heads} heads do not divide width {width}", where="heads")
        self._vocab, self._width, self._heads, self._length = vocab, width, heads, max_length
        self._classes = classes
        super().__init__(classes, name=name, reference=reference, objective=objective)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        width = self._width
        shapes: dict[str, tuple[int, ...]] = {
            "token.embed": (self._vocab, width),
            "place.embed": (self._length, width),
        }
        for i in range(2):
            layer = {
                "qkv": (3 * width, width),
                "out": (width, width),
                "up": (4 * width, width),
                "down": (width, 4 * width),
            }
            shapes |= with_bias({f"layer{i}.{name}": shape for name, shape in layer.items()})
            shapes |= {f"layer{i}.{norm}.{x}": (width,) for norm in ("norm1", "norm2") for x in ("scale", "bias")}
        return {**shapes, "norm.scale": (width,), "norm.bias": (width,), **with_bias({"head": (self._classes, width)})}

    def _norm(self, params: Tree, name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (self._width,), params[f"{name}.scale"], params[f"{name}.bias"])

    def _attend(self, params: Tree, name: str, qkv_BT3E: Tensor, mask_BT: Tensor) -> Tensor:
        heads_BT3HD = torch.unflatten(qkv_BT3E, -1, (3, self._heads, -1))
        q_BHTD, k_BHTD, v_BHTD = (y.transpose(1, 2) for y in heads_BT3HD.unbind(2))
        score_BHTT = q_BHTD @ k_BHTD.transpose(2, 3) / q_BHTD.shape[-1] ** 0.5
        # Finite, so that a row without any attended token stays finite too.
        share_BHTT = torch.where(mask_BT[:, None, None].bool(), score_BHTT, -1e9).softmax(-1)
        return linear(params, f"{name}.out", (share_BHTT @ v_BHTD).transpose(1, 2).flatten(2))

    def states(self, params: Tree, *inputs: Tensor) -> Tree:
        """``logits`` (B, K) of one client's rows, and what the layers hold on the way there, (B, T, E) each.

        ``hidden.0`` are the embedded tokens, ``hidden.l`` what layer l (from 1) gives, ``query.l``,
        ``key.l`` and ``value.l`` what it attends with, all heads side by side.
        """
        ids_BT, mask_BT = inputs
        if ids_BT.shape[1] > self._length:
            raise LichenError(
                f"rows of {ids_BT.shape[1]} tokens, the model takes {self._length}", where="data.max_length"
            )
        x_BTE = nn.functional.embedding(ids_BT, params["token.embed"]) + params["place.embed"][: ids_BT.shape[1]]
        outputs: Tree = {"hidden.0": x_BTE}
        for i, name in enumerate(("layer0", "layer1"), 1):
            qkv_BT3E = linear(params, f"{name}.qkv", self._norm(params, f"{name}.norm1", x_BTE))
            outputs |= {
                f"{kind}.{i}": x for kind, x in zip(("query", "key", "value"), qkv_BT3E.chunk(3, -1), strict=True)
            }
            x_BTE = x_BTE + self._attend(params, name, qkv_BT3E, mask_BT)
            inner = linear(params, f"{name}.up", self._norm(params, f"{name}.norm2", x_BTE))
            x_BTE = x_BTE + linear(params, f"{name}.down", nn.functional.gelu(inner))
            outputs[f"hidden.{i}"] = x_BTE
        weight_BT1 = mask_BT[..., None].to(x_BTE.dtype)
        mean_BE = (self._norm(params, "norm", x_BTE) * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        return {**outputs, "logits": linear(params, "head", mean_BE)}

    def apply(self, params: Tree, *inputs: Tensor) -> Tensor:
        """Logits (B, K) of token rows (B, T) under their mask."""
        return self.states(params, *inputs)["logits"]


@final
class ImageMLP(Student):
    """Fully connected layers with ReLU between them, over flattened pixels.

    Args:
        features: Numbers of one row, for example 784.
        hidden: Widths of the layers between.
        classes: K.
        name: Name in groups and messages.
        reference: As in :class:`lichen.models.students.student.Student`.
        objective: As there.
    """

    inputs = ("x_CBF",)

    def __init__(
        self,
        features: int,
        *,
        hidden: Sequence[int] = (128,),
        classes: int,
        name: str = "image-mlp",
        reference: bool = True,
        objective: RowObjective | None = None,
    ) -> None:
        self._widths, self.row_shape = (features, *hidden, classes), (features,)
        super().__init__(classes, name=name, reference=reference, objective=objective)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        pairs = zip(self._widths, self._widths[1:], strict=False)
        return with_bias({f"layer{i}": (out, inside) for i, (inside, out) in enumerate(pairs)})

    def apply(self, params: Tree, *inputs: Tensor) -> Tensor:
        """Logits (B, K) of rows (B, ...)."""
        x = inputs[0].flatten(1)
        for i in range(len(self._widths) - 2):
            x = torch.relu(linear(params, f"layer{i}", x))
        return linear(params, f"layer{len(self._widths) - 2}", x)


@final
class ImageCNN(Student):
    """Two 3x3 convolutions with 2x2 max pooling and a linear layer.

    References:
        LeCun, Bottou, Bengio and Haffner (1998). Gradient-Based Learning Applied to Document
        Recognition. Proceedings of the IEEE 86(11), 2278-2324.

    Args:
        side: S, pixels of a side; at least 4.
        channels: P of the input; rows may also come flat, as P*S*S numbers.
        width: Filters of the first convolution; the second has twice as many.
        classes: K.
        name: Name in groups and messages.
        reference: As in :class:`lichen.models.students.student.Student`.
        objective: As there.
    """

    inputs = ("x_CBF",)

    def __init__(
        self,
        side: int,
        *,
        channels: int = 1,
        width: int = 16,
        classes: int,
        name: str = "image-cnn",
        reference: bool = True,
        objective: RowObjective | None = None,
    ) -> None:
        if side < 4:
            raise LichenError(f"images of {side} pixels a side are too small", where="model", fix="use image-mlp")
        self._side, self._channels, self._width = side, channels, width
        self._classes, self.row_shape = classes, (channels, side, side)
        super().__init__(classes, name=name, reference=reference, objective=objective)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        last = 2 * self._width * (self._side // 4) ** 2
        convs = {"conv1": (self._width, 9 * self._channels), "conv2": (2 * self._width, 9 * self._width)}
        return with_bias({**convs, "head": (self._classes, last)})

    def apply(self, params: Tree, *inputs: Tensor) -> Tensor:
        """Logits (B, K) of images (B, S, S), (B, P, S, S) or flat rows."""
        x_BSSP = inputs[0].reshape(-1, self._channels, self._side, self._side).permute(0, 2, 3, 1)
        for name in ("conv1", "conv2"):
            windows = nn.functional.pad(x_BSSP, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)
            y_BSSP = torch.relu(linear(params, name, windows.flatten(3)))
            half = y_BSSP.shape[1] // 2
            y_BSSP = y_BSSP[:, : 2 * half, : 2 * half]
            x_BSSP = torch.unflatten(torch.unflatten(y_BSSP, 1, (half, 2)), 3, (half, 2)).amax((2, 4))
        return linear(params, "head", x_BSSP.flatten(1))

"""Weak and strong augmentation of images: shift, rotation, brightness, erasing.

A part of RandAugment's operations, each by a random amount, and Cutout's square. As everywhere in
:mod:`lichen.data.batches.augment`, what happens to a row follows from ``(seed, client, row, step)`` alone.

References:
    Ekin D. Cubuk, Barret Zoph, Jonathon Shlens and Quoc V. Le. "RandAugment: Practical Automated Data
    Augmentation with a Reduced Search Space." NeurIPS 2020. https://arxiv.org/abs/1909.13719
    Terrance DeVries and Graham W. Taylor. "Improved Regularization of Convolutional Neural Networks with
    Cutout." 2017. https://arxiv.org/abs/1708.04552

Legend: C clients, B rows of a batch, N = C * B, D draws, P channels, S side of a picture in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.data.batches.augment import Draw, Kind, check_shares, draws

__all__ = ["ImageViews", "Pixels"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """How pictures are changed; by default not at all.

    Args:
        shift: By up to so many whole pixels, in both directions; what comes in is 0.
        rotate: By up to so many degrees either way.
        gain: Brightness is multiplied by a factor up to this share above or below 1.
        erase: Side of a square set to 0, as a share of the picture's.

    Raises:
        LichenError: if a value is out of range.
    """

    shift: int = 0
    rotate: float = 0.0
    gain: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        check_shares("augment.pixels", gain=self.gain, erase=self.erase)
        if self.shift < 0 or not 0 <= self.rotate <= 180:
            raise LichenError("shift or rotate is out of range", where="augment.pixels", fix="use pixels and degrees")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ImageViews:
    """Views of pictures ``(S, S)``, ``(P, S, S)``, or flat rows of ``P * S * S`` numbers where ``side`` is given.

    Args:
        side: S of flat rows.
        weak: By default up to a pixel aside.
        strong: By default moved, turned, and with an erased square.

    Raises:
        LichenError: when called, if a row is no square picture.
    """

    side: int | None = None
    weak: Pixels = field(default_factory=lambda: Pixels(shift=1))
    strong: Pixels = field(default_factory=lambda: Pixels(shift=1, rotate=25.0, gain=0.3, erase=0.35))

    def view(self, batch: Batch, kind: Kind, *, seed: int, clients: Sequence[int], step: int) -> Batch:
        """As :meth:`Views.view`, on ``x_CBF``."""
        pixels = self.weak if kind == "weak" else self.strong
        if pixels == Pixels():
            return batch
        x = batch["x_CBF"]
        side = self.side or x.shape[-1]
        if x[0, 0].numel() % side**2 or (self.side is None and (x.dim() < 4 or x.shape[-2] != side)):
            raise LichenError(
                f"a row of shape {tuple(x.shape[2:])} is no square picture", where="augment.side", fix="give its side"
            )
        x_NPSS = x.reshape(x.shape[0] * x.shape[1], -1, side, side).cpu().numpy()
        new_NPSS = _changed(x_NPSS, pixels, draws(batch, kind, seed=seed, clients=clients, step=step))
        mine_N111 = (batch["index_CB"].flatten() >= 0).cpu().numpy()[:, None, None, None]
        return {**batch, "x_CBF": torch.from_numpy(np.where(mine_N111, new_NPSS, x_NPSS)).view(x.shape)}


def _changed(x_NPSS: np.ndarray, pixels: Pixels, draw: Draw) -> np.ndarray:
    side = x_NPSS.shape[-1]
    uniform_ND = draw("pixels", 6)
    shift_N2 = np.floor(uniform_ND[:, :2] * (2 * pixels.shift + 1)) - pixels.shift
    angle_N = [math.radians(pixels.rotate * (2 * u - 1)) for u in uniform_ND[:, 2].tolist()]
    out = _moved(x_NPSS.astype(np.float64), angle_N, shift_N2)
    out *= (1 + pixels.gain * (2 * uniform_ND[:, 3] - 1))[:, None, None, None]
    square = round(pixels.erase * side)
    first_N2 = np.floor(uniform_ND[:, 4:] * (side - square + 1))
    at_S = np.arange(side)
    in_N2S = (at_S >= first_N2[:, :, None]) & (at_S < first_N2[:, :, None] + square)
    erased_NSS = in_N2S[:, 0, :, None] & in_N2S[:, 1, None, :]
    return np.where(erased_NSS[:, None], 0.0, out).astype(x_NPSS.dtype)


def _moved(x_NPSS: np.ndarray, angle_N: Sequence[float], shift_N2: np.ndarray) -> np.ndarray:
    """Turned about the middle, then shifted: between four pixels by their distance, 0 outside."""
    side = x_NPSS.shape[-1]
    middle = (side - 1) / 2
    cos_N11, sin_N11 = (np.array([f(a) for a in angle_N])[:, None, None] for f in (math.cos, math.sin))
    at_S = np.arange(side) - middle
    down_NSS = at_S[None, :, None] - shift_N2[:, :1, None]
    right_NSS = at_S[None, None, :] - shift_N2[:, 1:, None]
    y_NSS = cos_N11 * down_NSS - sin_N11 * right_NSS + middle
    x_NSS = sin_N11 * down_NSS + cos_N11 * right_NSS + middle
    top_NSS, left_NSS = np.floor(y_NSS), np.floor(x_NSS)
    n_N11 = np.arange(x_NPSS.shape[0])[:, None, None]
    out = np.zeros_like(x_NPSS)
    for i_NSS, j_NSS in ((top_NSS + a, left_NSS + b) for a in (0, 1) for b in (0, 1)):
        share_NSS = (1 - np.abs(y_NSS - i_NSS)) * (1 - np.abs(x_NSS - j_NSS))
        inside_NSS = (i_NSS >= 0) & (i_NSS < side) & (j_NSS >= 0) & (j_NSS < side)
        i, j = (k.clip(0, side - 1).astype(np.int64) for k in (i_NSS, j_NSS))
        picked_NSSP = x_NPSS.transpose(0, 2, 3, 1)[n_N11, i, j]
        with np.errstate(invalid="ignore"):  # a row that is not finite is the training's to refuse
            out += (picked_NSSP * (share_NSS * inside_NSS)[..., None]).transpose(0, 3, 1, 2)
    return out

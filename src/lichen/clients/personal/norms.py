"""FedBN: norms and biases stay with their clients, and everything else is shared.

Where clients' features differ in scale and level rather than in meaning, the few numbers of norms and biases hold most
of that difference. Each client trains them with the rest, keeps them (``Train(local_params=...)``), and sends the
others. The paper keeps the scales and shifts of batch norms; language models have layer norms, and biases beside them.

References:
    Xiaoxiao Li, Meirui Jiang, Xiaofei Zhang, Michael Kamp and Qi Dou. "FedBN: Federated Learning on
    Non-IID Features via Local Batch Normalization." ICLR 2021. https://arxiv.org/abs/2102.07623
"""

from __future__ import annotations

from collections.abc import Iterable

from lichen.core.errors import LichenError

__all__ = ["NORMS", "refuse_norms"]

_PARTS = ("norm", "Norm", "norm1", "norm2", "ln_1", "ln_2", "ln_f")

NORMS = ("bias", *(f"{part}.{x}" for part in _PARTS for x in ("weight", "scale")))
"""Ends of the names of norms and biases."""


def refuse_norms(names: Iterable[str]) -> None:
    """Nothing, where some of what is trained are norms or biases, and some are not.

    Raises:
        LichenError: else.
    """
    trained = tuple(names)
    own = [name for name in trained if name.endswith(NORMS)]
    if len(own) in (0, len(trained)):
        what = "nothing else is trained" if own else "none are trained"
        fix = "use model.adapter.kind: full, a student, or another kind"
        raise LichenError(f"norms and biases stay with their clients, and {what}", where="personal.kind", fix=fix)

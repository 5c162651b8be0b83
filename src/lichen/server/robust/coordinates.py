"""Rules that look at each number by itself: the median and the trimmed mean of what clients say of it.

References:
    Dong Yin, Yudong Chen, Kannan Ramchandran and Peter Bartlett. "Byzantine-Robust Distributed Learning:
    Towards Optimal Statistical Rates." ICML 2018. https://arxiv.org/abs/1803.01498

Legend: C clients, N numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["middle_N"]


def middle_N(x_CN: Tensor, trim: int) -> Tensor:
    """The mean of what is left of each column without its ``trim`` lowest and highest numbers, float64 ``(N,)``.

    The median is what is left where as many are trimmed as can be: one number, or two.

    >>> middle_N(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), 1)
    tensor([3.], dtype=torch.float64)
    """
    # By the transpose, whose rows lie in one piece: NumPy sorts these fastest.
    sorted_NC = np.sort(x_CN.T.contiguous().numpy(), axis=1)
    left_NC = sorted_NC[:, trim : sorted_NC.shape[1] - trim]
    return torch.from_numpy(left_NC.mean(1, dtype=np.float64))

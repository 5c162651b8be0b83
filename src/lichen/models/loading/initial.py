"""Initial weights: fewer layers of a foundation model, random weights, or a closed-form head.

A pretrained start is worth what it gains over the same architecture with random weights (:func:`redraw`),
at equal everything; small clients take the first layers alone (:func:`first_layers`). And a classifier need not
begin with a random head, whose first steps tear at what lies below it: :func:`head_start` puts the ridge
or the LDA solution there, from the clients' summed statistics of the head's own input
(:func:`head_features`), scaled so that its logits mean probabilities.

References:
    John Nguyen, Jianyu Wang, Kshitiz Malik, Maziar Sanjabi and Michael Rabbat. "Where to Begin? On the
    Impact of Pre-Training and Initialization in Federated Learning." ICLR 2023.
    https://arxiv.org/abs/2210.08090
    Ananya Kumar, Aditi Raghunathan, Robbie Jones, Tengyu Ma and Percy Liang. "Fine-Tuning can Distort
    Pretrained Features and Underperform Out-of-Distribution." ICLR 2022. https://arxiv.org/abs/2202.10054
    Gwen Legate, Nicolas Bernier, Lucas Caccia, Edouard Oyallon and Eugene Belilovsky. "Guiding The Last
    Layer in Federated Learning with Pre-Trained Models." NeurIPS 2023. https://arxiv.org/abs/2306.03937
    Eros Fanì, Raffaello Camoriano, Barbara Caputo and Marco Ciccone. "Accelerating Heterogeneous
    Federated Learning with Closed-form Classifiers." ICML 2024. https://arxiv.org/abs/2406.01116
    Chuan Guo, Geoff Pleiss, Yu Sun and Kilian Q. Weinberger. "On Calibration of Modern Neural Networks."
    ICML 2017. https://arxiv.org/abs/1706.04599 (one factor on all logits)

Legend: C clients, B rows, N rows, d features (the head's input, and a constant 1 where there is a bias), K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["best_scale", "first_layers", "head_features", "head_of", "head_start", "redraw"]


def first_layers(model: Any, layers: int) -> Any:
    """The model with its first ``layers`` blocks alone, its configuration saying so; changed in place.

    What follows the blocks (a norm, a pooler, a head) stays.

    Raises:
        LichenError: if it has fewer blocks, or none that could be told apart.
    """
    whole = int(getattr(model.config, "num_hidden_layers", 0) or 0)
    stacks = [name for name, x in model.named_modules() if isinstance(x, nn.ModuleList) and len(x) == whole]
    if len(stacks) != 1:
        raise LichenError(
            f"the blocks of a {model.config.model_type} cannot be told apart", where="model.layers", fix="leave it out"
        )
    if not 1 <= layers <= whole:
        raise LichenError(f"{layers} of {whole} layers", where="model.layers", fix=f"use 1 to {whole}")
    model.set_submodule(stacks[0], model.get_submodule(stacks[0])[:layers])
    # Configurations of mixed architectures hold one entry a layer.
    for name, value in list(vars(model.config).items()):
        if isinstance(value, list) and len(value) == whole and "layer" in name:
            setattr(model.config, name, value[:layers])
    model.config.num_hidden_layers = layers
    return model


def redraw(model: Any, seed: int) -> Any:
    """The model with weights drawn from ``seed`` as its architecture draws them; changed in place.

    A head outside its base model stays. Layers are drawn in their order: the first ones are the same,
    however many there are.
    """
    inside = model.base_model
    for module in inside.modules():
        module._is_hf_initialized = False
        for x in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            x._is_hf_initialized = False
    # The architecture draws from torch's global generator; leave that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "random weights"))
        inside.initialize_weights()
    return model


def head_of(model: CohortModel, shared: Shared) -> str:
    """The name of the layer whose output are the logits, among the trained tensors.

    Raises:
        LichenError: if there is none, or more than one could be it.
    """
    trained = shared.trainable
    ends = [n for n, x in trained.items() if n.endswith(".weight") and x.dim() == 2 and x.shape[0] == model.classes]
    heads = sorted(name.removesuffix(".weight") for name in ends if "embed" not in name)
    if len(heads) != 1:
        choice = f"could be any of {heads}" if heads else "is not among the trained tensors"
        raise LichenError(f"the head {choice}", where="model.adapter.modules_to_save", fix="name it")
    return heads[0]


def head_features(model: CohortModel, shared: Shared, *, head: str | None = None) -> Callable[[Batch], Tensor]:
    """What goes into the head, as a function of a batch: float32 ``(C, B, d)``, without the constant.

    It is the model itself, adapters included, with the identity in place of its head, so that nothing has
    to be known of its architecture: the ``features`` of :class:`lichen.clients.statistics.sufficient.Statistics`.

    Args:
        model: A classifier.
        shared: Its tensors, without client axis.
        head: Name of the head; None: the only layer with K outputs.

    Raises:
        LichenError: as :func:`head_of`.
    """
    head = head or head_of(model, shared)
    trained, fixed = dict(shared.trainable), shared.fixed
    width = trained[f"{head}.weight"].shape[1]
    trained[f"{head}.weight"] = torch.eye(width).to(trained[f"{head}.weight"])
    if f"{head}.bias" in trained:
        trained[f"{head}.bias"] = trained[f"{head}.bias"].new_zeros(width)

    @torch.no_grad()
    def features(batch: Batch) -> Tensor:
        return model.logits(_stacked(trained, batch), fixed, batch).float()

    return features


def _stacked(trained: Tree, batch: Batch) -> Tree:
    clients = batch["active_C"].shape[0]
    return {name: x.expand(clients, *x.shape) for name, x in trained.items()}


def head_start(
    model: CohortModel,
    shared: Shared,
    solved: Tree,
    *,
    head: str | None = None,
    scale_on: Iterable[Batch] = (),
    scales: Sequence[float] | None = None,
) -> Shared:
    """``shared`` with a head in closed form.

    Args:
        model: A classifier.
        shared: Its tensors, without client axis.
        solved: ``*.weight`` (K, d) and, where the head has one, ``*.bias`` (K,): what
            :class:`lichen.server.ridge.Ridge` or :class:`lichen.server.lda.Lda` makes of the statistics of
            :func:`head_features`, summed over clients.
        head: Name of the head; None: the only layer with K outputs.
        scale_on: Labelled rows that are not in the statistics: the head is multiplied by what makes their cross
            entropy least. None: by 1.
        scales: Factors to choose from; None: any from 1/64 to 64.

    Raises:
        LichenError: if the solution does not fit the head, or no row has a label.
    """
    head = head or head_of(model, shared)
    parts = [part for part in ("weight", "bias") if f"{head}.{part}" in shared.trainable]
    found = {name.rpartition(".")[2]: x.detach().cpu().double() for name, x in solved.items()}
    shapes = {part: tuple(x.shape) for part, x in found.items()}
    expected = {part: tuple(shared.trainable[f"{head}.{part}"].shape) for part in parts}
    if shapes != expected or len(found) != len(solved):
        raise LichenError(
            f"a solution of shapes {shapes} does not fit the head {head!r} of {expected}",
            where="head_start",
            fix=f"sum the statistics over head_features, with bias={'bias' in parts}",
        )
    if "bias" in found:
        # A class that nobody has is unlikely, not impossible: training must be able to find it.
        likely_K = found["bias"] > _NEVER
        least = found["bias"][likely_K].min() - 3 if bool(likely_K.any()) else found["bias"].new_zeros(())
        found["bias"] = torch.where(likely_K, found["bias"], least)

    def with_head(scale: float) -> Shared:
        own = {f"{head}.{part}": x * scale for part, x in found.items()}
        return shared | Shared({name: x.to(shared.trainable[name]).contiguous() for name, x in own.items()})

    rows = [_labelled(model, with_head(1.0), batch) for batch in scale_on]
    if not rows:
        return with_head(1.0)
    logits_NK, labels_N = (torch.cat(part) for part in zip(*rows, strict=True))
    return with_head(best_scale(logits_NK, labels_N, among=scales))


_NEVER = -1e4
"""A bias that says a class was never seen."""


@torch.no_grad()
def _labelled(model: CohortModel, shared: Shared, batch: Batch) -> tuple[Tensor, Tensor]:
    logits_CBK = model.logits(_stacked(shared.trainable, batch), shared.fixed, batch).double().cpu()
    known_CB = (batch["labels_CB"] >= 0) & batch["active_C"].unsqueeze(1)
    return logits_CBK[known_CB], batch["labels_CB"][known_CB]


def best_scale(logits_NK: Tensor, labels_N: Tensor, *, among: Sequence[float] | None = None) -> float:
    """The factor on all logits that makes the cross entropy least; between 1/64 and 64 where none are named.

    >>> best_scale(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]), among=(0.5, 1.0, 2.0))
    1.0
    """
    if not labels_N.numel():
        raise LichenError("no labelled row to scale by", where="head_start.scale_on", fix="give labelled rows")
    logits_NK, right_N1 = logits_NK.double(), labels_N[:, None]
    if among is not None:
        losses = [float(-(logits_NK * s).log_softmax(-1).gather(1, right_N1).sum()) for s in among]
        return among[losses.index(min(losses))]
    low, high = -6.0, 6.0
    # The loss is convex in the factor: go where its slope changes sign.
    for _ in range(50):
        middle = (low + high) / 2
        chance_NK = (logits_NK * 2**middle).softmax(-1)
        rising = float((chance_NK * logits_NK).sum() - logits_NK.gather(1, right_N1).sum()) > 0
        low, high = (low, middle) if rising else (middle, high)
    return float(2**high)

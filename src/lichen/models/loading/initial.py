"""Initial weights: fewer layers of a foundation model, random weights, or a closed-form head.

A pretrained start is worth what it gains over the same architecture with random weights (:func:`redraw`),
at equal everything; small clients take the first layers alone (:func:`first_layers`). And a classifier need not
begin with a random head, whose first steps tear at what lies below it: :func:`head_start` puts the ridge
or the LDA solution there, from the clients' summed statistics of the head's own input
(:func:`head_features`), times a factor that lets its logits mean probabilities.

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

Legend: C clients, B rows, N rows, d features (the head's input, and a constant 1 where there is a bias), K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.seeds import derive, torch_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["draw_fresh", "first_layers", "head_features", "head_of", "head_start", "keep_blocks", "redraw"]


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
    keep_blocks(model.config, 0, layers)
    return model


def keep_blocks(config: Any, start: int, stop: int) -> None:
    """Let a configuration say of blocks ``start`` to ``stop`` what it says of all; changed in place."""
    whole = config.num_hidden_layers
    # Configurations of mixed architectures hold one entry a layer.
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole and "layer" in name:
            setattr(config, name, value[start:stop])
    config.num_hidden_layers = stop - start


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


def draw_fresh(model: nn.Module, fresh: set[str], seed: int) -> None:
    """Draw tensors of a model, in place: matrices normal with the model's own spread, norms one, biases zero.

    Args:
        model: A transformers model.
        fresh: Their names; others than its parameters' are passed over.
        seed: Of each tensor's own generator, with its name.
    """
    spread = float(getattr(model.config, "initializer_range", 0.02) or 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(fresh & parameters.keys()):
            x = parameters[name]
            if x.dim() > 1:
                x.copy_(torch.randn(x.shape, generator=torch_generator(seed, "head", name)) * spread)
            else:
                x.fill_(0.0 if name.endswith("bias") else 1.0)


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
    scale: float = 1.0,
) -> Shared:
    """``shared`` with a head in closed form.

    Args:
        model: A classifier.
        shared: Its tensors, without client axis.
        solved: ``*.weight`` (K, d) and, where the head has one, ``*.bias`` (K,): what
            :class:`lichen.server.ridge.Ridge` or :class:`lichen.server.lda.Lda` makes of the statistics of
            :func:`head_features`, summed over clients.
        head: Name of the head; None: the only layer with K outputs.
        scale: What the head is multiplied by; :mod:`lichen.clients.statistics.scale` finds the best.

    Raises:
        LichenError: if the solution does not fit the head.
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

    own = {f"{head}.{part}": x * scale for part, x in found.items()}
    return shared | Shared({name: x.to(shared.trainable[name]).contiguous() for name, x in own.items()})


_NEVER = -1e4
"""A bias that says a class was never seen."""

"""What do steps cost that hide every row: seconds and memory beside a plain step, and beside Opacus on a head?

Every step sees the same rows. A private one has each row's gradient by itself, clips, adds up, draws noise and
divides. Seconds are medians of steps that take turns, memory is the peak of live tensors of one step (counted, the
same on every run). Opacus 1.6 runs where it is installed, on a linear layer over the same features alone: its
gradients of PEFT's LoRA are wrong (https://github.com/meta-pytorch/opacus/issues/820).

Run it: ``python benchmarks/row_privacy.py --out benchmarks/results/row-privacy.json``, then
``python benchmarks/row_privacy.py --show benchmarks/results/row-privacy.json``

Legend: C clients, B rows, T tokens, F features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from lichen.allocator import keep_large_buffers
from lichen.clients.privacy.private_steps import PrivateSteps
from lichen.clients.privacy.row_gradients import clipped_sum_C, row_gradients
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.message import Job
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.wire.shared import Shared
from lichen.data.sources.catalog import resolve_model
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.prompt import Prompt
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import load_causal
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer
from lichen.recipes.assemble.live_bytes import LiveBytes

ROWS, TOKENS, CLASSES, CLIP, SIGMA, TRIES = 16, 64, 10, 1.0, 1.0, 5


def texts(vocabulary: int, rows: int = ROWS) -> dict[str, Tensor]:
    """Rows of 16 to 64 tokens, 40 on average; one client."""
    g = torch.Generator().manual_seed(0)
    length_CB = torch.linspace(16, TOKENS, rows).long()[None]
    mask_CBT = (torch.arange(TOKENS) < length_CB[..., None]).long()
    ids_CBT = torch.randint(1000, vocabulary, (1, rows, TOKENS), generator=g) * mask_CBT
    return {
        "active_C": torch.ones(1, dtype=torch.bool),
        "index_CB": torch.arange(rows)[None],
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": mask_CBT,
        "labels_CB": torch.randint(CLASSES, (1, rows), generator=g),
    }


def numbers(*shape: int, rows: int) -> dict[str, Tensor]:
    """Rows of random numbers; one client."""
    g = torch.Generator().manual_seed(0)
    return {
        "active_C": torch.ones(1, dtype=torch.bool),
        "index_CB": torch.arange(rows)[None],
        "x_CBF": torch.randn(1, rows, *shape, generator=g),
        "labels_CB": torch.randint(CLASSES, (1, rows), generator=g),
    }


def cases() -> Iterator[tuple[str, Any, dict[str, Tensor], tuple[str, ...]]]:
    """``(name, model, batch, ends of names that are frozen)``."""
    mini = resolve_model("minilm-l6")
    base: Any = lambda: load_classifier(mini, classes=CLASSES, seed=0)[0]  # noqa: E731
    lora = Lora(targets=("query", "value"), rank=8, heads=("classifier",))
    ia3 = IA3(targets=("key", "value"), feedforward=("output.dense",), heads=("classifier",))
    specs: dict[str, Any] = {
        "LoRA": lora,
        "FFA-LoRA": lora,
        "soft prompt": Prompt(tokens=8, heads=("classifier",)),
        "IA3": ia3,
        "head": Lora(targets=(), heads=("classifier",)),
    }
    for name, spec in specs.items():
        for way, how in (("one a call", {"reference": True}), ("together", {"reference": False})):
            frozen = ("lora_A",) if name == "FFA-LoRA" else ()
            yield (
                f"MiniLM, {name}, {way}",
                ClassifierCohort(base(), adapter=spec, name=name, **how),
                texts(30000),
                frozen,
            )
    small, _ = load_causal(resolve_model("smollm2-135m"))
    spec = Lora(targets=("q_proj", "v_proj"), rank=8)
    batch = texts(40000, 4)
    batch["labels_CBT"] = torch.where(batch["attention_mask_CBT"] == 1, batch["input_ids_CBT"], -100)
    del batch["labels_CB"]
    chat = CausalCohort(small, adapter=spec, name="chat", reference=False)
    yield "SmolLM2-135M, LoRA, together", chat, batch, ()
    for way, ref in (("one a call", True), ("together", False)):
        yield f"MLP 784-128, {way}", ImageMLP(784, classes=CLASSES, reference=ref), numbers(784, rows=64), ()
        yield f"CNN 28 x 28, {way}", ImageCNN(28, classes=CLASSES, reference=ref), numbers(1, 28, 28, rows=64), ()
        yield f"text CNN, {way}", TextCNN(2000, classes=CLASSES, reference=ref), texts(2000), ()
        yield f"transformer, {way}", TwoLayerTransformer(2000, classes=CLASSES, reference=ref), texts(2000), ()
    yield "linear head, together", head(), numbers(384, rows=64), ()


def head() -> ImageMLP:
    """A linear layer over 384 features."""
    return ImageMLP(384, hidden=(), classes=CLASSES, reference=False)


def measure(model: Any, batch: dict[str, Tensor], frozen: tuple[str, ...]) -> dict[str, float]:
    """Seconds and peak bytes of a plain and of a private step."""
    train = Train(model, optimizer=ClientOptimizer("sgd", lr=0.1), weigh_by="one", freeze_schedule=(frozen,))
    rows, secret = float(batch["index_CB"].shape[1]), SecretRandomness.of_seed(0)
    private = PrivateSteps(train, clip=CLIP, sigma=SIGMA, mean_rows_N=(rows,), randomness=secret)
    job = Job(work="train", shared=Shared(model.init(0)), version=0, clients=(0,), seed=0)
    plain_0, private_0 = train.init(job, (0,), None), private.init(job, (0,), None)
    ended = {**batch, "ends_step_C": torch.ones(1, dtype=torch.bool)}
    noise: Any = lambda: [secret.stream("n", 0).normal(x.shape, SIGMA) for x in train.trained(job).values()]  # noqa: E731
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: train.step(plain_0, batch),
        "private": lambda: private.step(private_0, ended),
        "noise": noise,
    }
    found = {f"{name}_s": s for name, s in seconds(ways).items()}
    for name in ("plain", "private"):
        with LiveBytes() as live:
            ways[name]()
        found[f"{name}_bytes"] = live.peak
    return {**found, "rows": rows, "trained": sum(x.numel() for x in train.trained(job).values())}


def seconds(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median of each, one after the other in every round; the first round warms up."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TRIES + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            took[name].append(time.perf_counter() - start)
    return {name: statistics.median(some[1:]) for name, some in took.items()}


def beside_opacus() -> dict[str, float]:
    """The linear head: torch's plain step, Opacus's private one and ours; and how far the sums differ."""
    try:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError:
        return {}
    model, batch = head(), numbers(384, rows=64)
    params = model.init(0)
    x, y = batch["x_CBF"][0], batch["labels_CB"][0]

    def layer() -> nn.Linear:
        made = nn.Linear(384, CLASSES)
        (weight,), (bias,) = ([p for n, p in params.items() if n.endswith(end)] for end in ("weight", "bias"))
        made.weight.data, made.bias.data = weight.clone(), bias.clone()
        return made

    def stepped(module: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()

    bare = layer()
    sampled = GradSampleModule(layer(), loss_reduction="mean")
    plain = torch.optim.SGD(bare.parameters(), lr=0.1)
    dp = DPOptimizer(
        torch.optim.SGD(sampled.parameters(), lr=0.1),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=64,
    )
    train = Train(model, optimizer=ClientOptimizer("sgd", lr=0.1), weigh_by="one")
    mine = PrivateSteps(train, clip=CLIP, sigma=SIGMA, mean_rows_N=(64.0,), randomness=SecretRandomness.of_seed(0))
    silent = replace(mine, sigma=0.0)
    job = Job(work="train", shared=Shared(params), version=0, clients=(0,), seed=0)
    ended = {**batch, "ends_step_C": torch.ones(1, dtype=torch.bool)}
    state = mine.init(job, (0,), None)
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: stepped(bare, plain),
        "opacus": lambda: stepped(sampled, dp),
        "private": lambda: mine.step(state, ended),
        "private_no_noise": lambda: silent.step(state, ended),
    }
    found = {f"{name}_s": s for name, s in seconds(ways).items()}
    for name, way in ways.items():
        with LiveBytes() as live:
            way()
        found[f"{name}_bytes"] = live.peak
    fresh = GradSampleModule(layer(), loss_reduction="mean")
    nn.functional.cross_entropy(fresh(x), y).backward()
    theirs = [p.grad_sample.flatten(1).double() for p in fresh.parameters()]
    factor_R = (CLIP / (torch.cat(theirs, 1).norm(dim=1) + 1e-6)).clamp(max=1)
    start_C = trees.broadcast(params, 1)
    sum_C = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in start_C.items()}
    for client_R, grads_R in row_gradients(model, start_C, {}, {}, batch):
        sum_C = clipped_sum_C(sum_C, client_R, grads_R, CLIP, exact=False)
    ours = sorted((v[0].flatten() for v in sum_C.values()), key=len)
    other = sorted(((g * factor_R[:, None]).sum(0) for g in theirs), key=len)
    found["differs"] = float((torch.cat(ours) - torch.cat(other)).norm() / torch.cat(other).norm())
    return found


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    print(
        "| | rows | trained | plain, ms | private, ms | times | noise alone, ms | plain, MiB | private, MiB | times |"
    )
    print("|---|" + "---:|" * 9)
    for name, x in found["cases"].items():
        cells = (
            f"{x['rows']:.0f}",
            f"{x['trained']:,}",
            f"{1e3 * x['plain_s']:.1f}",
            f"{1e3 * x['private_s']:.1f}",
            f"{x['private_s'] / x['plain_s']:.1f}",
            f"{1e3 * x['noise_s']:.1f}",
            f"{x['plain_bytes'] / 2**20:.1f}",
            f"{x['private_bytes'] / 2**20:.1f}",
            f"{x['private_bytes'] / x['plain_bytes']:.1f}",
        )
        print(f"| {name} | {' | '.join(cells)} |")


def show_opacus(found: dict[str, Any]) -> None:
    """Print the table of the linear head."""
    x = found["opacus"]
    print("| linear head, 384 to 10, 64 rows | ms | MiB |\n|---|---:|---:|")
    names = {
        "torch": "torch, plain",
        "opacus": "Opacus 1.6",
        "private_no_noise": "Lichen, without noise",
        "private": "Lichen",
    }
    for key, name in names.items():
        print(f"| {name} | {1e3 * x[f'{key}_s']:.2f} | {x[f'{key}_bytes'] / 2**20:.2f} |")
    print(f"| difference of the clipped sums, relative | {x['differs']:.1e} | |")


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    parser.add_argument("--opacus", action="store_true", help="the table of the linear head")
    asked = parser.parse_args()
    if asked.show:
        found = json.loads(asked.show.read_text(encoding="utf-8"))
        (show_opacus if asked.opacus else show)(found)
        return
    keep_large_buffers()
    torch.set_num_threads(1)
    found = {"cases": {}, "opacus": beside_opacus()}
    for name, model, batch, frozen in cases():
        found["cases"][name] = measure(model, batch, frozen)
        print(name, found["cases"][name], flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""DP-SGD: steps equal a plain loop over rows for every adapter and student, and no clipped norm passes C.

Legend: C clients, B rows, R rows on the client axis.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import equality
import numpy as np
import pytest
import torch

from lichen.clients.privacy.private_steps import PrivateSteps
from lichen.clients.privacy.row_gradients import clipped_sum_C, row_gradients, row_norms
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.errors import LichenError
from lichen.core.expected import within
from lichen.core.secret.randomness import SecretRandomness
from lichen.data.batches.poisson_rows import PoissonRows
from lichen.data.batches.shards import ArrayShard, TextShard, TrainSource
from lichen.models.adapters.bitfit import BitFit
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer
from support.toy_cohorts import Softmax, fold, job

LR, CLIP, SIZES = 0.1, 0.05, (7, 4)
WAYS: dict[str, dict[str, bool]] = {
    "one a call": {"reference": True},
    "padded": {"reference": False, "packed": False},
    "packed": {"reference": False, "packed": True},
}
ADAPTERS: dict[str, tuple[str, Any]] = {
    "lora": ("llama", Lora(targets=("q_proj", "down_proj"), rank=3)),
    "lora and output layer": ("llama", Lora(targets=("v_proj",), rank=2, heads=("lm_head",))),
    "lora and head": ("bert", Lora(targets=("query", "value"), rank=3, heads=("classifier",))),
    "head": ("bert", Lora(targets=(), heads=("classifier",))),
    "ia3": ("llama", IA3(targets=("k_proj",), feedforward=("down_proj",))),
    "prompt": ("llama", Prompt(tokens=3)),
    "prefix": ("llama", Prefix(tokens=3)),
    "bitfit": ("bert", BitFit(heads=("classifier",))),
}
STUDENTS: dict[str, Any] = {
    "mlp": lambda ref: ImageMLP(9, hidden=(8,), classes=5, reference=ref),
    "cnn": lambda ref: ImageCNN(4, width=3, classes=5, reference=ref),
    "text cnn": lambda ref: TextCNN(97, width=6, classes=5, reference=ref),
    "transformer": lambda ref: TwoLayerTransformer(97, width=8, heads=2, classes=5, reference=ref),
}


@cache
def adapted(name: str, way: str, dtype: Any = torch.float64) -> Any:
    arch, spec = ADAPTERS[name]
    kind: Any = ClassifierCohort if arch == "bert" else CausalCohort
    how = dict(WAYS[way])
    if how.get("packed") and name in ("prompt", "prefix"):
        how["packed"] = False  # virtual tokens stand in padded rows
    return kind(equality.tiny(arch, dtype=dtype), adapter=spec, name=name, prove=False, **how)


def shards_of(model: Any, dtype: Any) -> Any:
    """Rows of two clients, of several lengths."""
    draw, shards = np.random.default_rng(1), []
    for size in SIZES:
        labels = draw.integers(0, 5, size)
        if isinstance(model, ImageMLP | ImageCNN):
            shape = (size, 9) if isinstance(model, ImageMLP) else (size, 1, 4, 4)
            shards.append(ArrayShard(draw.standard_normal(shape).astype(np.float32), labels=labels))
            continue
        rows = [draw.integers(2, 97, draw.integers(3, 11)).tolist() for _ in range(size)]
        if isinstance(model, CausalCohort):
            shards.append(TextShard(rows, labels=[[-100, *row[1:]] for row in rows], kind="lm"))
        else:
            shards.append(TextShard(rows, labels=labels, kind="classify"))
    return shards


def poisson(shards: Any, steps: int = 3, batch_rows: int = 2, rate: float = 0.5) -> PoissonRows:
    local = TrainSource(shards, batch_size=4, steps=steps, fixed_width=16)
    return PoissonRows(local, rate_N=[rate] * 2, randomness=SecretRandomness.of_seed(5), batch_rows=batch_rows)


def work(model: Any, sigma: float = 0.0, **more: Any) -> PrivateSteps:
    freeze = more.pop("freeze_schedule", ())
    inner = Train(model, optimizer=ClientOptimizer("sgd", lr=LR), weigh_by="one", freeze_schedule=freeze)
    means = [0.5 * size for size in SIZES]
    return PrivateSteps(
        inner, clip=CLIP, sigma=sigma, mean_rows_N=means, randomness=SecretRandomness.of_seed(9), **more
    )


def wide(batch: Any, dtype: Any) -> Any:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


def start_of(model: Any, dtype: Any) -> Any:
    (start,) = equality.start_of(model, 1)
    return {name: x.to(dtype) for name, x in start.items()}


def loop(model: Any, start: Any, source: PoissonRows, frozen: str, dtype: Any) -> list[Any]:
    """The oracle: each client by itself, one row's gradient after the other, out of the losses of its whole batch."""
    found = []
    for c, size in enumerate(SIZES):
        now = dict(start)
        total = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in now.items()}
        for batch in source.batches([c], 1):
            batch, ends = wide(batch, dtype), bool(batch["ends_step_C"])
            own = {name: x for name, x in batch.items() if name != "ends_step_C"}
            for b in (own["index_CB"][0] >= 0).nonzero()[:, 0].tolist():
                leaves = {name: x[None].clone().requires_grad_() for name, x in now.items()}
                loss_CB, count_CB = model.losses(leaves, {}, own)
                mean = loss_CB[0, b] / count_CB[0, b].clamp(min=1)
                grads = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True, materialize_grads=True)
                row = {
                    n: g[0].double() for n, g in zip(leaves, grads, strict=True) if not (frozen and n.endswith(frozen))
                }
                norm = math.sqrt(sum(float(g.square().sum()) for g in row.values()))
                assert norm > 0
                for n, g in row.items():
                    total[n] += g * min(1.0, CLIP / norm)
            if ends:
                now = {n: (x - LR * total[n] / (0.5 * size)).to(x.dtype) for n, x in now.items()}
                total = {n: torch.zeros_like(x) for n, x in total.items()}
        found.append(now)
    return found


def check(model: Any, reference: Any, frozen: str = "", **more: Any) -> None:
    dtype, start = torch.float64, start_of(model, torch.float64)
    source = poisson(shards_of(model, dtype))
    task = job(start, (0, 1))
    batches = [wide(batch, dtype) for batch in source.batches((0, 1), 1)]
    if frozen:
        more["freeze_schedule"] = ((frozen,),)
    message, own_C = fold(work(model, **more), task, batches)
    assert own_C is None
    slow = loop(reference, start, source, frozen, dtype)
    for c, after in enumerate(slow):
        for name, change_C in message.tensors.items():
            moved = after[name] - start[name]
            assert float((change_C[c] - moved).norm()) <= 1e-6 * float(moved.norm()), name
        assert any(bool((after[name] != start[name]).any()) for name in message.tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_steps_of_an_adapter_equal_a_loop_over_rows(name: str, way: str) -> None:
    check(adapted(name, way), adapted(name, "one a call"), rows_at_once=3)


@pytest.mark.parametrize("way", WAYS)
def test_steps_with_a_frozen_factor_equal_a_loop_over_rows(way: str) -> None:
    check(adapted("lora", way), adapted("lora", "one a call"), frozen="lora_A")


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("name", STUDENTS)
def test_steps_of_a_student_equal_a_loop_over_rows(name: str, reference: bool) -> None:
    check(STUDENTS[name](reference), STUDENTS[name](True), rows_at_once=5)


@pytest.mark.parametrize("name", ["lora", "lora and head", "mlp"])
def test_no_cut_of_the_work_shows_where_steps_are_exact(name: str) -> None:
    """Rows at once, rows of a micro-batch, and company: the same bits, noise included."""
    model: Any = STUDENTS[name](True) if name in STUDENTS else adapted(name, "one a call", torch.float32)
    start, shards = start_of(model, torch.float32), shards_of(model, torch.float32)

    def changes(clients: tuple[int, ...], at_once: int, batch_rows: int) -> Any:
        source = poisson(shards, batch_rows=batch_rows)
        mine = work(model, sigma=0.7, rows_at_once=at_once)
        return fold(mine, job(start, clients), source.batches(clients, 1))[0].tensors

    whole = changes((0, 1), 8, 8)
    assert all(bool(x.any()) for x in whole.values())
    for at_once, batch_rows in ((1, 3), (3, 1), (2, 8)):
        other = changes((0, 1), at_once, batch_rows)
        assert all(torch.equal(x, other[n]) for n, x in whole.items())
    for c in (0, 1):
        assert all(torch.equal(x[0], whole[n][c]) for n, x in changes((c,), 4, 2).items())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", [*ADAPTERS, *STUDENTS])
def test_no_clipped_norm_passes_the_bound(name: str, exact: bool) -> None:
    """Rows one at a time, so that a sum is one clipped gradient; in single precision, as they are trained."""
    model: Any = STUDENTS[name](True) if name in STUDENTS else adapted(name, "one a call", torch.float32)
    start, shards = start_of(model, torch.float32), shards_of(model, torch.float32)
    start_C = {n: x[None].expand(2, *x.shape) for n, x in start.items()}
    cut = 0
    for batch in poisson(shards, steps=2, rate=1.0).batches((0, 1), 1):
        rows = {n: x for n, x in batch.items() if n != "ends_step_C"}
        for client_R, grads_R in row_gradients(model, start_C, {}, {}, rows, at_once=1):
            nothing_C = {n: torch.zeros(2, *x.shape, dtype=torch.float64) for n, x in start.items()}
            for clip in (CLIP, 1e-3 * CLIP):
                sum_C = clipped_sum_C(nothing_C, client_R, grads_R, clip, exact=exact)
                norm_C = row_norms(sum_C, exact=True)
                assert float(norm_C.max()) <= clip * (1 + 1e-6)
                before = float(row_norms(grads_R, exact=True))
                assert math.isclose(float(norm_C.max()), min(before, clip), rel_tol=1e-6)
                cut += before > clip
    assert cut > 0


def test_a_row_without_a_finite_gradient_adds_nothing_and_is_not_told() -> None:
    grads_R = {"w": torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 0.0], [0.0, 0.0]])}
    for exact in (True, False):
        zero_C = {"w": torch.zeros(1, 2, dtype=torch.float64)}
        sum_C = clipped_sum_C(zero_C, torch.zeros(4, dtype=torch.int64), grads_R, 1.0, exact=exact)
        torch.testing.assert_close(sum_C["w"], torch.tensor([[0.6, 0.8]], dtype=torch.float64))


class Counted:
    """Counts what is drawn."""

    def __init__(self) -> None:
        self.inner, self.drawn = SecretRandomness.of_seed(3), []

    def stream(self, *labels: int | str) -> Any:
        self.drawn.append(labels)
        return self.inner.stream(*labels)


def test_noise_is_drawn_once_a_step_anew_for_every_step_client_round_and_work() -> None:
    model, counted = Softmax(dtype=torch.float32), Counted()
    shards = [ArrayShard(np.ones((size, 5), np.float32), labels=np.zeros(size, np.int64)) for size in SIZES]
    mine = replace(work(model, sigma=2.0), randomness=counted)
    for version, name in ((0, "train"), (1, "train"), (0, "alone")):
        task = replace(job(model.init(0), (0, 1)), version=version, work=name)
        fold(mine, task, poisson(shards, batch_rows=1).batches((0, 1), 1))
    assert len(counted.drawn) == len(set(counted.drawn)) == 3 * 2 * 3


def test_a_step_without_a_row_is_taken_and_noised() -> None:
    """Where no row was drawn, what a client moves by is the noise over q n, of the deviation it should have."""
    model = Softmax(features=400, classes=50)
    shards = [ArrayShard(np.ones((size, 400), np.float32), labels=np.zeros(size, np.int64)) for size in SIZES]
    source = poisson(shards, steps=1, rate=1e-12)
    (batch,) = source.batches((0, 1), 1)
    assert bool((batch["index_CB"] == -1).all())
    assert bool(batch["ends_step_C"].all())
    message, _ = fold(work(model, sigma=3.0), job(model.init(0), (0, 1)), [batch])
    for c, size in enumerate(SIZES):
        moved = message.tensors["weight"][c] / (LR * CLIP / (0.5 * size))
        assert abs(float(moved.std()) - 3.0) < 0.1
        assert abs(float(moved.mean())) < 0.1


def test_nothing_but_the_noised_change_is_told() -> None:
    """Other rows, and another number of them in the batch, change no metric and no weight."""
    model, messages = ImageMLP(9, hidden=(4,), classes=5), []
    for seed in (1, 2):
        shards = [ArrayShard(np.full((size, 9), seed, np.float32), labels=np.ones(size, np.int64)) for size in SIZES]
        mine, task = work(model, sigma=1.0), job(model.init(0), (0, 1))
        message, _ = fold(mine, task, poisson(shards).batches((0, 1), seed))
        assert within(message.metrics, mine.expected(task).metrics).keys() == message.metrics.keys()
        for name, spec in mine.expected(task).metrics.items():
            x_C = message.metrics[name]
            assert bool(((x_C >= spec.low) & (x_C <= spec.high)).all())
        messages.append(message)
    one, two = messages
    assert all(torch.equal(x, two.metrics[name]) for name, x in one.metrics.items())
    assert torch.equal(one.weight_C, two.weight_C)
    assert one.metrics["steps"].tolist() == [3.0, 3.0]
    assert any(not torch.equal(x, two.tensors[name]) for name, x in one.tensors.items())


@pytest.mark.parametrize(
    ("change", "where"),
    [({"clip": 0.0}, "privacy.clip"), ({"clip": math.inf}, "privacy.clip"), ({"sigma": -1.0}, "privacy.sigma")],
)
def test_numbers_out_of_range_are_refused(change: dict[str, float], where: str) -> None:
    with pytest.raises(LichenError) as caught:
        replace(work(Softmax()), **change)
    assert caught.value.where == where


def test_work_that_would_tell_of_its_rows_is_refused() -> None:
    mine = work(Softmax())
    with pytest.raises(LichenError, match="how many rows were sampled"):
        replace(mine, inner=replace(mine.inner, weigh_by="examples"))
    with pytest.raises(LichenError, match="equal parts"):
        replace(mine, inner=replace(mine.inner, accumulate=2))
    state = mine.init(job(Softmax().init(0), (0,)), (0,), None)
    with pytest.raises(LichenError, match="Poisson"):
        mine.step(state, {"active_C": torch.tensor([True]), "index_CB": torch.tensor([[0]])})

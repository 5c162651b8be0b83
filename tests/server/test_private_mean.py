"""The private mean is the exact sum with its noise over a fixed number, and no client moves it past the clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec, specs_of
from lichen.core.message import Job, Message
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.tree import norm_C
from lichen.core.wire.shared import Shared
from lichen.server.private_mean import PrivateMean
from lichen.server.sampling import SecretPoisson
from lichen.transforms.bounds.clip_change import ClipChange
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transformed
from lichen.transforms.uplink import Coded

SHARED = Shared({"w": torch.zeros(3, 4), "b": torch.zeros(7)})
LAYOUT = (("b", (7,)), ("w", (3, 4)))
KEY = SecretRandomness.of_seed(5)


def mean(sigma: float = 0.0, **more: Any) -> PrivateMean:
    made = {"clip": 1.0, "layout": LAYOUT, "stream": lambda digest: KEY.stream(digest), **more}
    return PrivateMean(10.0, sigma=sigma, **made)


def message(clients: list[int], seed: int = 0, weight: float = 1.0) -> Message:
    g = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(len(clients), *x.shape, generator=g) for name, x in SHARED.trainable.items()}
    return Message(
        group="g",
        client_C=torch.tensor(clients),
        version_C=torch.zeros(len(clients), dtype=torch.int64),
        tensors=tensors,
        weight_C=torch.full((len(clients),), weight, dtype=torch.float64),
        metrics={"loss_sum": torch.ones(len(clients), dtype=torch.float64)},
    )


def test_it_is_the_sum_over_a_fixed_number_and_weights_say_nothing() -> None:
    aggregator, one = mean(), message([0, 1, 2], weight=37.0)
    change, metrics = aggregator.close(aggregator.add(aggregator.zero(), one), SHARED)
    for name, x in one.tensors.items():
        assert torch.allclose(change.trainable[name], x.sum(0) / 10)
    assert metrics == {"noise": 0.0}


def test_noise_is_that_of_its_stream_and_comes_into_empty_rounds_too() -> None:
    aggregator, big = mean(2.0), (("w", (100, 100)),)
    total = aggregator.add(aggregator.zero(), message([0, 1]))
    assert torch.equal(
        aggregator.close(total, SHARED)[0].trainable["w"], aggregator.close(total, SHARED)[0].trainable["w"]
    )
    other = aggregator.add(aggregator.zero(), message([0, 1], seed=1))
    noises = [
        aggregator.close(t, SHARED)[0].trainable["w"] - mean().close(t, SHARED)[0].trainable["w"]
        for t in (total, other)
    ]
    assert not torch.allclose(noises[0], noises[1])  # nobody can subtract the noise of two sums
    empty = mean(2.0, layout=big)
    change, _ = empty.close(empty.zero(), Shared({"w": torch.zeros(100, 100)}))
    assert abs(float(change.trainable["w"].std()) - 0.2) < 0.01


def test_nothing_is_closed_without_a_stream_nor_with_another_layout() -> None:
    aggregator = PrivateMean(10.0, layout=LAYOUT)
    with pytest.raises(LichenError, match="without noise"):
        aggregator.close(aggregator.zero(), SHARED)
    strange = mean(layout=(("w", (3, 4)),))
    with pytest.raises(LichenError, match="differ in tensors"):
        strange.close(strange.add(strange.zero(), message([0])), SHARED)
    with pytest.raises(LichenError, match="too small"):
        PrivateMean(1.0, clip=1e-9, layout=LAYOUT)


class Sends:
    """A work whose message is given."""

    def __init__(self, sent: Message) -> None:
        self.sent = sent

    def expected(self, job: Job) -> Any:
        return Expected(
            group="g",
            tensors=specs_of({name: x[0] for name, x in self.sent.tensors.items()}),
            metrics={"loss_sum": MetricSpec()},
        )

    def init(self, job: Job, clients: Any, own_C: Any) -> None:
        return None

    def step(self, state: Any, batch: Any) -> Any:
        return state

    def final(self, state: Any) -> Any:
        return self.sent, None


@pytest.mark.parametrize("codec", [None, ["int8"], ["sign"], ["topk:8/256"], ["topk:8/256", "int4"], ["sketch:1"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_what_arrives_is_within_the_clip_in_any_codec(codec: list[str] | None, dtype: torch.dtype, size: float) -> None:
    sent = message([0, 1, 2])
    sent = replace(sent, tensors={name: (x * size).to(dtype) for name, x in sent.tensors.items()})
    coded = () if codec is None else (Coded(parse_codecs(codec)),)
    work = Transformed(Sends(sent), (ClipChange(0.5, private=True), *coded))
    job = Job(work="w", shared=SHARED, version=0, clients=(0, 1, 2), seed=1)
    own: Any = None
    for _ in range(4):  # error feedback adds what was lost, round after round
        out, own = work.final(work.init(job, (0, 1, 2), own))
        assert out.metrics == {}
        assert work.expected(job).metrics == {}
        arrived = work.received(out, job)
        norms = norm_C({name: x.double() for name, x in arrived.tensors.items()})
        assert bool((norms <= 0.5 * (1 + 1e-6)).all())
        if codec is None and size == 1e-3:
            assert torch.equal(arrived.tensors["w"], sent.tensors["w"])


def test_a_client_that_does_not_clip_moves_no_more() -> None:
    clip = ClipChange(0.5, private=True)
    wild = replace(message([0]), tensors={name: x * 1e6 for name, x in message([0]).tensors.items()})
    arrived = clip.on_arrival(wild, Sends(wild).expected(None), {})  # type: ignore[arg-type]
    assert float(norm_C(arrived.tensors)[0]) <= 0.5 * (1 + 1e-6)


def test_secret_coins_ignore_the_seed_and_follow_their_rate() -> None:
    weight_N = torch.ones(20_000)
    one, two = (SecretPoisson(0.3, KEY.stream("coins")).invite(weight_N, seed) for seed in (0, 1))
    assert one == two
    assert abs(len(one) / 20_000 - 0.3) < 0.02
    assert one != SecretPoisson(0.3, KEY.stream("other")).invite(weight_N, 0)

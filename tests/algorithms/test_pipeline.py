"""Hosts that hold a piece each train as one process with the whole model does, bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lichen.clients.pipeline import host
from lichen.clients.pipeline.coded_link import CodedLink
from lichen.clients.pipeline.host import PipelineHost
from lichen.clients.pipeline.schedule import Op, bubble, most_in_flight, turns_of
from lichen.core.errors import LichenError
from lichen.core.replies import Reply
from lichen.core.tree import stack
from lichen.data.batches.shards import EvalSource
from support.pieces import whole_of
from support.pipelines import CLIENTS, STEPS, here, one_process, pipeline_of, start_of, texts

SEEDS = (11, 12, 13)


def trained(pipeline: Any, engine: Any, name: str) -> tuple[Any, list[Any]]:
    state, reports = pipeline.init(start_of(name)), []
    for seed in SEEDS:
        state, report = pipeline.round(state, engine, seed)
        reports.append(report)
    return state, reports


@pytest.mark.parametrize(
    ("name", "cuts", "order", "micro", "clip"),
    [
        ("llama", (1, 3), "1f1b", 3, 0.5),
        ("llama", (1, 3), "gpipe", 3, 0.5),
        ("qwen2", (2,), "1f1b", 1, None),
        ("gpt2", (1, 2, 3), "1f1b", 8, 0.05),
        ("gpt2", (3,), "gpipe", 2, 0.5),
    ],
)
def test_a_pipeline_is_one_process_bit_for_bit(
    name: str, cuts: tuple[int, ...], order: Any, micro: int, clip: float | None, tmp_path: Path
) -> None:
    pipeline = pipeline_of(name, cuts, order=order, micro=micro, clip=clip)
    state, reports = trained(pipeline, here(pipeline, tmp_path), name)
    params, losses = one_process(name, pipeline, SEEDS)
    assert [n for n, x in params.items() if not torch.equal(x, state.shared.trainable[n])] == []
    assert [report.metrics["loss"] for report in reports] == losses
    assert all(report.bytes_up > 0 and report.bytes_down > 0 for report in reports)


@pytest.mark.parametrize(
    ("name", "code"), [("llama", ["bf16"]), ("gpt2", ["int8~"]), ("qwen2", ["topk:8/32", "int4~"])]
)
def test_coded_links_train_as_one_process_whose_blocks_lose_as_much(name: str, code: list[str], tmp_path: Path) -> None:
    plain, coded = pipeline_of(name, (1, 3)), pipeline_of(name, (1, 3), code=code)
    state, reports = trained(coded, here(coded, tmp_path), name)
    params, losses = one_process(name, coded, SEEDS, (1, 3))
    assert [n for n, x in params.items() if not torch.equal(x, state.shared.trainable[n])] == []
    assert [report.metrics["loss"] for report in reports] == losses
    _, others = trained(plain, here(plain, tmp_path), name)
    assert sum(one.bytes_up for one in reports) < sum(one.bytes_up for one in others)
    assert coded.host.link.spec.dtype == torch.uint8


def test_a_host_that_is_lost_draws_the_same_again(tmp_path: Path) -> None:
    pipeline = pipeline_of("llama", (1, 3), code=["int8"])
    state, _ = trained(pipeline, here(pipeline, tmp_path / "a"), "llama")
    again, _ = trained(pipeline, Losing(here(pipeline, tmp_path / "b"), (7, 40)), "llama")
    assert all(torch.equal(x, again.shared.trainable[n]) for n, x in state.shared.trainable.items())


def test_scores_are_those_of_the_whole_model(tmp_path: Path) -> None:
    pipeline, whole = pipeline_of("llama", (2, 3)), whole_of("llama")
    state, reports = trained(pipeline, here(pipeline, tmp_path), "llama")
    rows, everyone = texts(), range(CLIENTS)
    sums = pipeline.score(here(pipeline, tmp_path), state.shared, EvalSource(rows, batch_size=4), everyone)
    for client in everyone:
        loss = count = 0.0
        for batch in EvalSource(rows, batch_size=4).batches([client], 0):
            loss_C, count_C = whole.loss(stack([state.shared.trainable]), {}, batch)
            loss, count = loss + float(loss_C[0]), count + float(count_C[0])
        assert float(sums["count"][client]) == count
        assert float(sums["loss_sum"][client]) == pytest.approx(loss, rel=1e-5)
    assert state.best_value == pytest.approx(reports[state.best_round - 1].metrics["valid"])


class Losing:
    """An engine whose hosts are lost at given replies, counted from the beginning."""

    def __init__(self, inner: Any, at: Collection[int]) -> None:
        self.inner, self.at, self.count = inner, set(at), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def replies(self, numbers: Collection[int], until: float = float("inf")) -> Iterator[Reply]:
        for reply in self.inner.replies(numbers, until):
            self.count += 1
            if self.count in self.at:
                error = LichenError("a node's process ended", where="node")
                yield Reply(job=reply.job, clients=reply.clients, error=error)
                return
            yield reply


def test_a_lost_host_costs_the_round_and_no_byte(tmp_path: Path) -> None:
    pipeline = pipeline_of("llama", (1, 3))
    state, _ = trained(pipeline, here(pipeline, tmp_path / "a"), "llama")
    for at in ((1,), (7, 40), (25, 26), (60, 100, 150)):
        again, reports = trained(pipeline, Losing(here(pipeline, tmp_path / "b"), at), "llama")
        assert all(torch.equal(x, again.shared.trainable[n]) for n, x in state.shared.trainable.items())
        assert all(torch.equal(x, again.optimizer[n]) for n, x in state.optimizer.items())
        assert any(report.attendance.refused for report in reports)
    with pytest.raises(LichenError, match="a node's process ended"):
        trained(pipeline, Losing(here(pipeline, tmp_path / "b"), range(1, 100)), "llama")


def test_a_wrong_output_is_refused_by_name(tmp_path: Path) -> None:
    wrong = replace(pipeline_of("llama", (1, 3)).host, link=CodedLink(width=31))
    pipeline = replace(pipeline_of("llama", (1, 3)), host=wrong)
    with pytest.raises(LichenError, match=r"tensor 'hidden_BTH' has shape .* not \('any', 'any', 31\)"):
        trained(pipeline, here(pipeline_of("llama", (1, 3)), tmp_path), "llama")


@pytest.mark.parametrize("order", ["gpipe", "1f1b"])
def test_every_micro_batch_goes_through_each_host_once_each_way(order: Any) -> None:
    for stages in (2, 3, 5):
        for micro in (1, 2, 3, 8):
            for stage in range(stages):
                turns = turns_of(stage, stages, micro, order)
                ops = [op for turn in turns for op in turn.runs]
                for kind in ("forward", "backward"):
                    assert [op.micro for op in ops if op.kind == kind] == list(range(micro))
                assert ops[-1] == Op("step")
                forwards = sum(turn.gives is not None and turn.gives.kind == "forward" for turn in turns)
                backwards = sum(turn.gives is not None and turn.gives.kind == "backward" for turn in turns)
                assert (forwards, backwards) == (micro * (stage < stages - 1), micro * (stage > 0))
                most = micro if order == "gpipe" else min(micro, stages - stage)
                assert most_in_flight(turns) == most
                scoring = turns_of(stage, stages, micro, order, train=False)
                assert sum(turn.gives is not None for turn in scoring) == micro


@pytest.mark.parametrize("order", ["gpipe", "1f1b"])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_hosts_wait_as_the_formula_says_where_all_takes_equally_long(
    order: Any, micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward, clock = 1.0, 2.0, [0.0]

    def ticking(name: str, seconds: float) -> None:
        plain = getattr(PipelineHost, name)

        def slow(*some: Any, **more: Any) -> Any:
            clock[0] += seconds
            return plain(*some, **more)

        monkeypatch.setattr(PipelineHost, name, slow)

    ticking("_forward", forward)
    ticking("_backward", backward)
    monkeypatch.setattr(host, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    pipeline = replace(pipeline_of("llama", (1, 2), micro=micro, order=order), valid_every=3)
    _, report = pipeline.round(pipeline.init(start_of("llama")), here(pipeline, tmp_path), SEEDS[0])
    one_way = STEPS * (forward + backward)
    assert report.metrics["busy"] == 3 * micro * one_way
    assert report.metrics["pace"] == (micro + 2) * one_way
    assert report.metrics["idle"] == pytest.approx(bubble(3, micro))

"""Laws of unlearning from retained messages: what calibration leaves as it is, and what nobody sent stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.algorithms.unlearning.erase import Erase
from lichen.algorithms.unlearning.negate import Negate
from lichen.core.collecting.history import History
from lichen.core.contracts.algorithm import ServerState
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.rounds import run
from lichen.core.tree import Tree, digest
from lichen.engines.distributed import DistributedEngine
from lichen.engines.ranks import Ranks
from lichen.engines.replayed import ReplayEngine
from lichen.recipes.assemble.experiment import Experiment
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone, Uniform
from lichen.server.unlearning.calibrated import Calibrated
from lichen.server.unlearning.invited import AllBut, Fixed
from lichen.server.unlearning.part import added_by
from support.forked_ranks import on_ranks
from support.small_experiment import engine, experiment

GONE = frozenset((2,))
ROUNDS = 4


def average(made: Experiment, **more: Any) -> Average:
    plain: dict[str, Any] = {
        "aggregator": Mean(),
        "optimizer": ServerSGD(lr=0.5),
        "sampler": Uniform(3),
        "weight_N": made.server.roster.rows_N("train"),
        "rounds": ROUNDS,
        "work": "train lr=0.1",
    }
    return Average(**{**plain, **more})


def go(algorithm: Any, there: Any, made: Experiment, **more: Any) -> ServerState:
    return run(algorithm, there, lambda: made.start, rounds=ROUNDS, seed=3, **more)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, History, ServerState, Path]:
    made, folder = experiment(), tmp_path_factory.mktemp("run")
    history = History(folder / "history")
    state = go(replace(average(made), history=history), engine(made, folder / "clients"), made)
    return made, history, state, folder


def same(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(a: Tree, b: Tree) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_calibrated_by_what_was_sent_it_is_the_replay_without_the_client(done: Any, tmp_path: Path) -> None:
    made, history, state, _ = done
    inner = engine(made, tmp_path / "a")
    whole = go(Erase(average(made), history=history, gone=frozenset(), every=1), _replayed(inner, history), made)
    assert same(whole.shared.flat(), state.shared.flat())
    erased = go(Erase(average(made), history=history, gone=GONE, every=1), _replayed(inner, history), made)
    again = go(average(made), _replayed(inner, history, GONE), made)
    assert same(erased.shared.flat(), again.shared.flat())
    assert apart(erased.shared.flat(), state.shared.flat()) > 1e-3
    assert erased.round == again.round == ROUNDS


def _replayed(inner: Any, history: History, without: Any = frozenset()) -> ReplayEngine:
    return ReplayEngine(inner, history, work="train lr=0.1", without=without)


def test_every_second_round_by_hand(done: Any, tmp_path: Path) -> None:
    """Rounds 0 and 2: the first as it was sent, then new changes as long as the stored ones, tensor by tensor."""
    made, history, _, _ = done
    sent: list[tuple[int, Message]] = []

    class Spied:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def replies(self, numbers: Any, until: float = float("inf")) -> Any:
            for reply in self.inner.replies(numbers, until):
                if reply.message is not None and reply.message.tensors:
                    sent.append((reply.job, reply.message))
                yield reply

    algorithm = Erase(average(made), history=history, gone=GONE, every=2)
    seen: list[Any] = []
    erased = go(algorithm, Spied(engine(made, tmp_path)), made, observers=[seen.append])
    assert [report.round for report in seen] == [1, 3]
    assert erased.round == ROUNDS
    asked = {c for _, message in sent for c in message.client_C.tolist()}
    assert asked == set(history.clients(2)) - GONE
    here = {name: x.double() for name, x in made.start.trainable.items()}
    new = {c: {n: x[p] for n, x in m.tensors.items()} for _, m in sent for p, c in enumerate(m.client_C.tolist())}
    for round_ in (0, 2):
        stored = [m for m, _ in history.messages(set(history.clients(round_)) - GONE, [round_])]
        weight = sum(float(m.weight_C[0]) for m in stored)
        for name in here:
            mean = torch.zeros_like(here[name])
            for one in stored:
                change = one.tensors[name][0].double()
                if round_:
                    way = new[int(one.client_C[0])][name].double()
                    change = change.norm() * way / way.norm()
                mean += change * float(one.weight_C[0]) / weight
            here[name] += 0.5 * mean
    assert apart(erased.shared.trainable, here) < 1e-6


def test_any_company_and_a_kill_give_the_same_bytes(done: Any, tmp_path: Path) -> None:
    made, history, _, _ = done
    algorithm = Erase(average(made), history=history, gone=GONE)
    whole = go(algorithm, engine(made, tmp_path / "a", block=4), made)
    alone = go(algorithm, engine(made, tmp_path / "b", block=1), made)
    assert same(whole.shared.flat(), alone.shared.flat())
    file = tmp_path / "server.safetensors"
    run(algorithm, engine(made, tmp_path / "c"), lambda: made.start, rounds=1, seed=3, checkpoint=file)
    resumed = go(algorithm, engine(made, tmp_path / "c"), made, checkpoint=file)
    assert same(whole.best.flat(), resumed.best.flat())
    assert whole.best_round == resumed.best_round


def test_a_client_that_failed_and_one_that_stands_still_add_nothing(done: Any) -> None:
    _, history, _, _ = done
    client = history.clients(1)[0]
    ((stored, _),) = history.messages([client], [1])
    calibrated = Calibrated(Mean(), history=history, round=1)
    still = replace(stored, tensors={name: torch.zeros_like(x) for name, x in stored.tensors.items()})
    assert all(not x.any() for x in calibrated.before(still).tensors.values())
    failed = replace(still, weight_C=torch.zeros_like(stored.weight_C))
    assert calibrated.before(failed).weight_C.tolist() == [0.0]
    fewer = replace(stored, weight_C=torch.ones_like(stored.weight_C))
    assert torch.equal(calibrated.before(fewer).weight_C, stored.weight_C)
    with pytest.raises(LichenError, match="no message of client"):
        calibrated.before(replace(stored, client_C=torch.tensor([99])))
    with pytest.raises(LichenError, match="of one of the two"):
        calibrated.before(replace(stored, tensors={"other": torch.zeros(1, 2)}))
    with pytest.raises(LichenError, match="too few"):
        Erase(average(experiment()), history=history, gone=GONE, every=0)


def test_negating_everybody_leads_back_to_the_start(done: Any) -> None:
    made, history, state, _ = done
    here = {name: x.double() for name, x in state.shared.trainable.items()}
    for client in range(4):
        added = added_by(history, client, until=ROUNDS, weighting="examples", stride=0.5)
        here = {name: x - added[name] for name, x in here.items()}
    assert apart(here, made.start.trainable) < 1e-6
    early = added_by(history, 0, until=1, weighting="uniform", stride=1.0)
    first = [m for m, _ in history.messages([0], [0])]
    assert bool(early) == bool(first)
    if first:
        share = 1 / len(history.clients(0))
        assert all((early[name] - share * x[0].double()).abs().max() < 1e-12 for name, x in first[0].tensors.items())


def test_who_never_answered_leaves_the_bytes_as_they_are(done: Any, tmp_path: Path) -> None:
    made, history, state, _ = done
    empty = added_by(history, 9, until=ROUNDS, weighting="examples")
    algorithm = Negate(average(made), added=empty, gone=frozenset((9,)))
    after = run(algorithm, engine(made, tmp_path), lambda: state.best, rounds=ROUNDS, seed=3)
    assert same(after.shared.flat(), state.best.flat())


def test_negated_and_repaired_by_the_others(done: Any, tmp_path: Path) -> None:
    made, history, state, _ = done
    added = added_by(history, 2, until=state.best_round, weighting="examples", stride=0.5)
    algorithm = Negate(average(made, rounds=1), added=added, gone=GONE, rate=0.5)
    before = algorithm.init(state.best)
    wanted = {name: x.double() - 0.5 * added[name] for name, x in state.best.trainable.items()}
    assert apart(before.shared.trainable, wanted) < 1e-6
    seen: list[Any] = []
    there = engine(made, tmp_path)
    after = run(algorithm, there, lambda: state.best, rounds=1, seed=3, observers=[seen.append])
    plain = average(made, rounds=1, sampler=AllBut(Uniform(3), GONE), validators=(0, 1, 3))
    repaired = run(plain, there, lambda: before.shared, rounds=1, seed=3)
    assert same(after.shared.flat(), repaired.shared.flat())
    assert not set(seen[0].clients) & GONE


def test_the_others_are_invited_as_ever() -> None:
    weight_N = torch.ones(6)
    for seed in range(20):
        drawn = Uniform(3).invite(weight_N, seed)
        assert AllBut(Uniform(3), frozenset((4,))).invite(weight_N, seed) == tuple(c for c in drawn if c != 4)
    assert Fixed((5, 1)).invite(weight_N, 0) == (1, 5)
    assert Fixed().invite(weight_N, 0) == ()
    assert AllBut(Everyone(), frozenset()).invite(weight_N, 0) == tuple(range(6))


def test_two_ranks_give_the_same_bytes(done: Any, tmp_path: Path) -> None:
    """Each rank reads all messages of the first round, and calibrates those of its own clients after that."""
    made, history, state, _ = done
    added = added_by(history, 2, until=state.best_round, weighting="examples", stride=0.5)
    erase = Erase(average(made), history=history, gone=GONE)
    negate = Negate(average(made), added=added, gone=GONE)
    alone = [run(one, engine(made, tmp_path / "a"), lambda: made.start, rounds=3, seed=3) for one in (erase, negate)]

    def program(ranks: Ranks) -> list[str]:
        there = DistributedEngine(engine(made, tmp_path / "ranks"), ranks)
        states = [run(one, there, lambda: made.start, rounds=3, seed=3) for one in (erase, negate)]
        return [digest(one.shared.flat()) for one in states]

    assert on_ranks(2, program) == [{"value": [digest(one.shared.flat()) for one in alone]}] * 2

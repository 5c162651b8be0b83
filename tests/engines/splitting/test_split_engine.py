"""Training and scoring across two cuts are those of the whole model; who sends nonsense loses the round alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core.message import Message, pack_message
from lichen.core.tree import Tree
from lichen.engines.splitting.split_engine import SplitEngine
from support.split_llama import BLOCKS, Tampered, experiment, made, messages_of, save_all, split_engine, train_job

PAIRS = [(1, 1), (2, 1), (1, 3)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("split"), clients=8)


def split_of(first: Any = 2, last: Any = 1, **more: Any) -> dict[str, Any]:
    return {"client": {"first": first, "last": last}, **more}


def sent(message: Message) -> bytes:
    return pack_message(message)


@pytest.mark.parametrize(("first", "last"), PAIRS)
@pytest.mark.parametrize("clip", [0.3, None])
def test_messages_have_the_bytes_of_clients_that_hold_the_whole(
    home: Path, tmp_path: Path, first: int, last: int, clip: float | None
) -> None:
    optimizer = {"clip": clip, "prox": 0.1}
    whole = experiment(made(home, optimizer=optimizer))
    cut = experiment(made(home, optimizer=optimizer, split=split_of(first, last)))
    assert cut.model.group == whole.model.group
    expected, _ = messages_of(whole, split_engine(whole, tmp_path / "whole"), train_job(whole, tuple(range(8))))
    for clients in ((3,), (1, 3, 6), tuple(range(8))):
        engine = split_engine(cut, tmp_path / str(len(clients)))
        found, refused = messages_of(cut, engine, train_job(cut, clients))
        assert not refused
        assert {c: sent(m) for c, m in found.items()} == {c: sent(expected[c]) for c in clients}


def test_one_client_over_many_rounds_is_unsplit_training_of_that_client(home: Path, tmp_path: Path) -> None:
    one_step = {"local_steps": 1, "clients_per_round": 1}
    whole = experiment(made(home, federation=one_step))
    cut = experiment(made(home, federation=one_step, split=split_of()))
    params = whole.start.trainable
    for round_ in range(3):
        changes = []
        for opened in (whole, cut):
            job = replace(train_job(opened, (2,), seed=round_), shared=type(opened.start)(params))
            found, _ = messages_of(opened, split_engine(opened, tmp_path / str(id(opened))), job)
            changes.append(found[2].tensors)
        assert all(torch.equal(changes[0][name], changes[1][name]) for name in changes[0])
        params = {name: x + changes[0][name][0] for name, x in params.items()}


def test_unequal_cuts_and_ranks_give_each_client_its_own_message(home: Path, tmp_path: Path) -> None:
    whole = experiment(made(home))
    cut = experiment(made(home, split=split_of([1, 3], 1)))
    assert cut.server.split is not None
    cut_of = cut.server.split.cut_of
    assert {cut_of(c).first for c in range(4)} == {1, 3}
    job = train_job(whole, (0, 1, 2, 3))
    expected, _ = messages_of(whole, split_engine(whole, tmp_path / "a"), job)
    found, _ = messages_of(cut, split_engine(cut, tmp_path / "b"), train_job(cut, (0, 1, 2, 3)))
    assert {c: sent(m) for c, m in found.items()} == {c: sent(m) for c, m in expected.items()}


def test_what_goes_out_and_comes_up_is_counted_to_the_byte(home: Path, tmp_path: Path) -> None:
    cut = experiment(made(home, split=split_of(), optimizer={"clip": None}))
    engine = split_engine(cut, tmp_path)
    job = train_job(cut, (2,))
    questions: list[tuple[str, Tree]] = []
    assert isinstance(engine, SplitEngine)
    engine.seen = lambda work, client, tensors: questions.append((work, tensors))
    found, _ = messages_of(cut, engine, job)
    steps = cut.recipe.federation.fixed_steps
    assert len(questions) == 2 * steps
    crossing = [x for _, tensors in questions for name, x in tensors.items() if name in ("hidden", "gradient")]
    tokens = int(found[2].metrics["tokens"][0])
    assert sum(x.numel() for x in crossing) == 2 * tokens * 32
    ends = sum(
        x.nbytes for name, x in job.shared.trainable.items() if name.split(".")[2] in ("0", "1", str(BLOCKS - 1))
    )
    both = 2 * tokens * 32 * 4
    assert both + ends < engine.bytes_up < both + ends + 12_000
    assert both + ends < engine.bytes_down < both + ends + 12_000


def test_scores_across_the_cuts_are_those_of_the_whole(home: Path, tmp_path: Path) -> None:
    whole, cut = experiment(made(home)), experiment(made(home, split=split_of()))
    for work in ("valid", "test"):
        job = replace(train_job(whole, tuple(range(8))), work=work)
        expected, _ = messages_of(whole, split_engine(whole, tmp_path / "a"), job)
        found, refused = messages_of(cut, split_engine(cut, tmp_path / "b"), job)
        assert not refused
        assert {c: sent(m) for c, m in found.items()} == {c: sent(m) for c, m in expected.items()}


def test_the_server_runs_the_middle_again_where_another_client_asked_in_between(home: Path, tmp_path: Path) -> None:
    cut = experiment(made(home, split=split_of()))
    job = train_job(cut, (0, 1, 4))
    expected, _ = messages_of(cut, split_engine(cut, tmp_path / "a"), job)
    engine = split_engine(cut, tmp_path / "b")
    assert isinstance(engine, SplitEngine)
    middle, forget = engine.middles, []

    def forgetful(work: str, cut_: Any) -> Any:
        found = middle(work, cut_)
        forget.append(found)
        return found

    engine.middles = forgetful

    def seen(*_: Any) -> None:
        for one in forget:
            one._alive = None

    engine.seen = seen
    found, _ = messages_of(cut, engine, job)
    assert forget
    assert {c: sent(m) for c, m in found.items()} == {c: sent(m) for c, m in expected.items()}


def test_with_one_copy_clients_take_turns_and_all_are_given_its_change(home: Path, tmp_path: Path) -> None:
    whole, cut = experiment(made(home)), experiment(made(home, split=split_of(kind="v2")))
    alone, _ = messages_of(whole, split_engine(whole, tmp_path / "w"), train_job(whole, (2,)))
    one, _ = messages_of(cut, split_engine(cut, tmp_path / "one"), train_job(cut, (2,)))
    assert sent(one[2]) == sent(alone[2])  # a turn that nobody shares
    runs = [
        messages_of(cut, split_engine(cut, tmp_path / str(b), block=b), train_job(cut, (0, 2, 5)))[0] for b in (1, 8)
    ]
    assert {c: sent(m) for c, m in runs[0].items()} == {c: sent(m) for c, m in runs[1].items()}
    inside = [name for name in cut.start.trainable if name.split(".")[2] in ("2", "3")]
    for name in inside:
        assert torch.equal(runs[0][0].tensors[name], runs[0][5].tensors[name])
    assert not torch.equal(runs[0][2].tensors[inside[0]], one[2].tensors[inside[0]])
    assert runs[0][0].tensors.keys() == cut.start.trainable.keys()


def test_a_head_of_its_own_halves_the_exchanges_and_moves_all_tensors(home: Path, tmp_path: Path) -> None:
    cut = experiment(made(home, split=split_of(local_head=True)))
    engine, asked = split_engine(cut, tmp_path), []
    assert isinstance(engine, SplitEngine)
    engine.seen = lambda work, client, tensors: asked.append(sorted(tensors))
    found, refused = messages_of(cut, engine, train_job(cut, (1,)))
    assert not refused
    assert asked == [["hidden", "length"], ["gradient", "hidden", "length"], ["gradient"]]
    moved = [name for name, x in found[1].tensors.items() if name.endswith("lora_B")]
    assert all(float(found[1].tensors[name].abs().sum()) > 0 for name in moved)


CHANGES: dict[str, tuple[int, Any]] = {
    "shape": (1, lambda m: replace(m, tensors={**m.tensors, "hidden": m.tensors["hidden"][..., :-1]})),
    "version": (1, lambda m: replace(m, version_C=m.version_C + 1)),
    "finite": (2, lambda m: replace(m, tensors={"gradient": m.tensors["gradient"] * torch.nan})),
    "names": (2, lambda m: replace(m, tensors={"hidden": m.tensors["gradient"]})),
    "dtype": (1, lambda m: replace(m, tensors={**m.tensors, "hidden": m.tensors["hidden"].double()})),
    "uninvited": (1, lambda m: replace(m, client_C=m.client_C + 1)),
    "group": (1, lambda m: replace(m, group="another")),
}


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("reason", CHANGES)
def test_who_sends_nonsense_is_refused_by_name_and_costs_nobody_else_anything(
    home: Path, tmp_path: Path, reason: str, kind: str
) -> None:
    cut = experiment(made(home, split=split_of(kind=kind)))
    stage, change = CHANGES[reason]
    engine = split_engine(cut, tmp_path / "a")
    assert isinstance(engine, SplitEngine)
    engine.inner.inner = Tampered(engine.inner.inner, {2: change}, stage=stage)
    found, refused = messages_of(cut, engine, train_job(cut, (0, 2, 5)))
    assert refused == [(2, reason)]
    expected, _ = messages_of(cut, split_engine(cut, tmp_path / "b"), train_job(cut, (0, 5)))
    if kind == "v1":
        assert {c: sent(m) for c, m in found.items()} == {c: sent(m) for c, m in expected.items()}
    assert sorted(found) == [0, 5]


def test_lengths_that_do_not_fit_are_refused_by_name(home: Path, tmp_path: Path) -> None:
    cut = experiment(made(home, split=split_of()))

    def longer(m: Message) -> Message:
        return replace(m, tensors={**m.tensors, "length": m.tensors["length"] + 1})

    for change in (longer, lambda m: replace(m, tensors={**m.tensors, "length": m.tensors["length"] * 100})):
        engine = split_engine(cut, tmp_path / str(id(change)))
        assert isinstance(engine, SplitEngine)
        engine.inner.inner = Tampered(engine.inner.inner, {2: change}, stage=1)
        found, refused = messages_of(cut, engine, train_job(cut, (0, 2)))
        assert (sorted(found), refused) == ([0], [(2, "shape")])


def test_a_client_that_ends_before_its_step_is_over_is_refused(home: Path, tmp_path: Path) -> None:
    cut = experiment(made(home, split=split_of()))
    engine = split_engine(cut, tmp_path)
    assert isinstance(engine, SplitEngine)
    assert cut.server.split is not None
    job = train_job(cut, (0,))
    middle = engine.middles(job.work, cut.server.split.cuts[0])
    half = middle.start(job, job, 0)
    with pytest.raises(Exception, match="squares come for no gradient"):
        middle.answer(half, {"squares": torch.zeros(1, 12)})
    with pytest.raises(Exception, match="a gradient comes for no hidden states"):
        middle.answer(half, {"gradient": torch.zeros(1, 2, 32)})


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_whose_message_is_refused_begins_anew_and_nobody_else_does(home: Path, tmp_path: Path, kind: str) -> None:
    cut = experiment(made(home, split=split_of(kind=kind, code=["change", "int8~"])))
    engine = split_engine(cut, tmp_path / "run" / "clients")
    assert isinstance(engine, SplitEngine)
    asked: dict[int, list[Tree]] = {}
    engine.seen = lambda work, client, tensors: asked.setdefault(client, []).append(tensors)
    job = train_job(cut, (0, 2))
    steps = cut.recipe.federation.fixed_steps
    # The end of client 2, after its questions, is damaged: it remembers this round, and the server does not.
    last = 2 * steps + 1 + (cut.recipe.optimizer.clip is not None) + 1
    plain, engine.inner.inner = (
        engine.inner.inner,
        Tampered(engine.inner.inner, {2: lambda m: replace(m, group="another")}, stage=last),
    )
    _, refused = messages_of(cut, engine, job)
    assert refused == [(2, "group")]
    engine.inner.inner = plain
    asked.clear()
    found, refused = messages_of(cut, engine, replace(job, version=1))  # the same rows again
    assert not refused
    assert sorted(found) == [0, 2]
    hidden = {c: [t for t in asked[c] if "whole" in t] for c in (0, 2)}
    assert all(t["whole"].shape[1] == 0 for t in hidden[0])
    assert hidden[2][0]["whole"].shape[1] > 0
    asked.clear()
    found, _ = messages_of(cut, engine, replace(job, version=2))
    assert all(t["whole"].shape[1] == 0 for c in (0, 2) for t in asked[c] if "whole" in t)
    asked.clear()  # the last answer of client 0 did not count: both sides go on from what they had before it
    messages_of(cut, engine, replace(job, version=3, rollback={0: 2}))
    assert all(t["whole"].shape[1] == 0 for t in asked[0] if "whole" in t)

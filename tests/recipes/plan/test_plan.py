"""A plan against the run that follows: bytes and tokens are equal, memory and disk near, and nothing stays behind."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lichen
from lichen import allocator, cli
from lichen.core import tree as trees
from lichen.models.arithmetic import arithmetic_of
from lichen.present.planned import plan_table
from lichen.present.trace import read_trace
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.workload import Workload, heaviest, workload_of
from lichen.recipes.plan import adapt as plan_adapt
from lichen.recipes.plan.estimate import Disk, Memory, problems
from lichen.recipes.plan.flops import counted
from lichen.recipes.plan.memory import MemoryMeter
from lichen.recipes.plan.plan import Plan, plan
from lichen.recipes.plan.timing import evenly_spaced
from lichen.recipes.plan.workload import marks
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe, save_model, save_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_model(folder / "model")
    for shape in ("pair", "label"):
        save_rows(folder / f"{shape}.jsonl", shape, rows=12)
    return folder


@pytest.fixture
def aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, which is to be empty again."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))  # which torch makes when it is first needed
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def both(values: dict[str, Any] | str, out: Path, *more: str) -> tuple[Plan, lichen.Result]:
    wanted = read_recipe(values, more)
    return plan(wanted, seconds=0.05), lichen.run(wanted, out=out)


def tokens(folder: Path) -> Counter[str]:
    seen: Counter[str] = Counter()
    for event in read_trace(folder):
        seen[event.column] += event.report.tokens
    return seen


GRIDS = [
    {"optimizer": {"lr": [0.02]}, "federation": {"rounds": 3, "local_steps": 2, "batch_size": 4, "valid_every": 2}},
    {
        "optimizer": {"lr": [0.01, 0.02], "grid_rounds": 2},
        "federation": {"rounds": 5, "clients_per_round": 3, "local_steps": 2, "batch_size": 4, "valid_every": 3},
        "compare": {"baselines": ["base", "alone", "pooled"], "pooled_batch_size": 6, "forms": ["plain"]},
    },
    {
        "optimizer": {"lr": [0.01, 0.02]},
        "federation": {"rounds": 3, "clients_per_round": 2, "sampling": "poisson", "aggregate": "mean"},
        "compare": {"baselines": ["alone", "alone_best"], "alone_epochs": 2, "alone_patience": 99},  # so to the end
    },
    {
        "optimizer": {"lr": [0.01, 0.5]},
        "federation": {"aggregate": "fedsa", "rounds": 6, "clients_per_round": 2, "valid_clients": 3},
        "compare": {"baselines": ["alone"]},
    },
    {
        "federation": {
            "rounds": 3,
            "clients_per_round": 3,
            "local_steps": None,
            "local_epochs": 2,
            "batch_size": 2,
            "gradient_accumulation_steps": 3,
            "weighting": "rows",
        },
        "compare": {"baselines": ["alone", "pooled"]},
    },
    {
        "wire": {"down": ["int4~"]},
        "federation": {"rounds": 4, "clients_per_round": 2, "valid_every": 2, "valid_clients": 2},
    },
    {
        "wire": {"up": ["topk:1/8", "int4~"], "down": ["int4~"]},
        "federation": {"rounds": 4, "clients_per_round": 2, "local_steps": 2, "batch_size": 4, "valid_every": 3},
        "compare": {"baselines": ["base"]},
    },
    {
        "model": {"adapter": {"kind": "full"}},
        "optimizer": {"name": "kseed", "lr": [1e-4], "seeds": 32},
        "federation": {"rounds": 2, "clients_per_round": 2, "local_steps": 2, "batch_size": 4},
        "compare": {"baselines": ["base"]},
        "engine": {"clients_per_block": 1},
    },
    {
        "wire": {"down": ["int4~"]},
        "federation": {"rounds": 3, "clients_per_round": 3, "valid_clients": 2},
        "value": {"kind": "exact", "every": 2},
    },
    {"federation": {"rounds": 2, "valid_every": 2}, "value": {"kind": "first"}},
    {
        "optimizer": {"name": "scaffold", "lr": [0.05]},
        "federation": {"aggregate": "mean", "rounds": 4, "clients_per_round": 2, "valid_every": 3},
    },
]


@pytest.mark.parametrize("sections", GRIDS)
def test_bytes_and_tokens_are_those_of_the_run(home: Path, tmp_path: Path, aside: Path, sections: Any) -> None:
    values = recipe(home / "model", home / "pair.jsonl", "pair", **sections)
    planned, result = both(values, tmp_path / "run")
    sent, summary = planned.expected.bytes, result.summary
    traffic, rates = summary["traffic"], values["optimizer"]["lr"]
    # A job is called by its rate: names of unequal length leave open how many bytes the chosen one takes.
    assert sent.bound == (len({len(lr_name(lr)) for lr in rates}) > 1)
    open_ = 8 * traffic["trainings"] if sent.bound else 0
    assert (sent.up, sent.valid_up, sent.valid_down) == (
        summary["bytes_up"],
        traffic["valid_up"],
        traffic["valid_down"],
    )
    assert 0 <= sent.down - summary["bytes_down"] <= open_
    assert sent.up - sent.valid_up == traffic["up"]
    assert 0 <= sent.down - sent.valid_down - traffic["down"] <= open_
    assert sent.validators == traffic["validators"] == min(5, sections["federation"].get("valid_clients", 64))
    assert planned.expected.clients == summary["clients"]
    seen = tokens(result.folder)
    assert {name: cost.train_tokens for name, cost in planned.expected.columns.items() if cost.train_tokens} == seen
    assert planned.seconds > planned.expected.start > 0
    assert all(cost.seconds > 0 and cost.evaluate_flops > 0 for cost in planned.expected.columns.values())
    there = sum(f.stat().st_size for f in (result.folder / "state").rglob("*/clients/**/*.safetensors"))
    assert planned.expected.disk.private == pytest.approx(there, rel=0.25, abs=4000)
    states = sum(f.stat().st_size for f in (result.folder / "state").glob("*/*/*.safetensors"))
    assert planned.expected.disk.shared == pytest.approx(states, rel=0.25, abs=40_000)
    assert list(aside.iterdir()) == []


def test_a_small_network_and_the_command(
    tmp_path: Path, aside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["federation.rounds=3", "optimizer.lr=[0.1,0.3]", "compare.baselines=[alone]"]
    planned, result = both("digits", tmp_path / "run", *more)
    sent = planned.expected.bytes
    assert (sent.up, sent.down) == (result.summary["bytes_up"], result.summary["bytes_down"])
    assert (sent.round_up, sent.round_down) == (round(sent.up / 3), round(sent.down / 3))
    assert planned.expected.trained == 64 * 64 + 64 + 64 * 10 + 10
    assert planned.expected.memory.peak >= planned.expected.memory.loaded
    assert planned.expected.columns["federated"].train_tokens == tokens(result.folder)["federated"]
    monkeypatch.chdir(tmp_path)
    words = [word for setting in more for word in ("-s", setting)]
    capsys.readouterr()
    assert cli.main(["plan", "digits", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"]["up"] == sent.up
    assert told["problems"] == []
    assert told["read"], "what was read stands in the plan"
    assert cli.main(["plan", "digits", *words]) == 0
    out = capsys.readouterr().out
    for row in ("loading", "federated", "alone", "sent in all", "memory", "energy", "4.8k trained"):
        assert row in out
    assert list(aside.iterdir()) == []
    assert not (tmp_path / "runs").exists()


def test_a_fault_of_the_recipe_is_told_as_the_run_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in ((["nosuch"], "no such recipe"), (["digits", "-s", "data.test=0.000001"], "data.test")):
        assert cli.main(["plan", *words]) == 2
        err = capsys.readouterr().err
        assert told in err
        assert "fix: " in err


def test_the_patch_of_fedex_has_a_bound(home: Path, tmp_path: Path) -> None:
    sections = {"federation": {"aggregate": "fedex", "rounds": 4, "clients_per_round": 3, "local_steps": 3}}
    planned, result = both(recipe(home / "model", home / "pair.jsonl", "pair", **sections), tmp_path / "run")
    sent, without = planned.expected.bytes, 4 * 3 * planned.expected.bytes.client_down
    assert sent.bound
    assert sent.up == result.summary["bytes_up"]
    assert without < result.summary["bytes_down"] <= sent.down
    assert any("bound" in note for note in planned.expected.notes)


def test_one_shot_and_its_bytes(home: Path, tmp_path: Path, aside: Path) -> None:
    values = recipe(home / "model", home / "label.jsonl", "label", task="oneshot", compare={"baselines": ["alone"]})
    values = {key: values[key] for key in ("name", "task", "data", "compare")} | {
        "model": {"name": str(home / "model")}
    }
    planned, result = both(values, tmp_path / "run")
    sent = planned.expected.bytes
    assert (sent.up, sent.down) == (result.summary["bytes_up"], result.summary["bytes_down"])
    assert planned.expected.columns["features"].evaluate_flops > 0
    assert planned.seconds > 0
    assert list(aside.iterdir()) == []


def test_a_teacher_and_its_bytes(home: Path, tmp_path: Path, aside: Path) -> None:
    values = recipe(home / "model", home / "label.jsonl", "label")
    values |= {
        "task": "classify",
        "model": {"student": {"kind": "text-cnn", "width": 8}},
        "teacher": {"name": str(home / "model"), "top_k": 2},
        "federation": {"rounds": 2, "local_steps": 2, "batch_size": 4, "aggregate": "mean"},
        "compare": {"baselines": ["no_help", "alone"]},
    }
    values["data"] |= {"public": {"share": 0.5, "labelled": 12, "unlabelled": 10}, "labels": 4}
    planned, result = both(values, tmp_path / "run")
    sent = planned.expected.bytes
    assert (sent.up, sent.down) == (result.summary["bytes_up"], result.summary["bytes_down"])
    assert set(planned.expected.columns) == {"teacher", "without", "federated", "alone"}
    assert list(aside.iterdir()) == []


@pytest.mark.parametrize("shape", ["pair", "label"])
def test_operations_are_those_torch_counts(home: Path, shape: Any) -> None:
    """The formula against torch's own counter; attention apart, which the counter does not know on a CPU."""
    more = {"data": {"max_length": 64}, "federation": {"batch_size": 1, "local_steps": 1}}
    loaded = open_recipe(read_recipe(recipe(home / "model", home / f"{shape}.jsonl", shape, **more)))
    experiment, client_task = (
        loaded.experiment,
        next(s for n, s in client_tasks(loaded.experiment).items() if n.startswith("train")),
    )
    batch = next(iter(client_task.source.batches((1,), 0)))
    width = int(batch["attention_mask_CBT"].sum())
    batch = {name: x[:, :, :width] if name.endswith("CBT") else x for name, x in batch.items()}
    workload, real = workload_of(batch), counted(experiment.model, experiment.start, batch)
    assert workload.tokens == width
    formula = replace(arithmetic_of(loaded.foundation, experiment.start.trainable), attention=0)
    # What torch counts may hold the scores and sums of attention, and the padding up to the next eight tokens.
    most = arithmetic_of(loaded.foundation, experiment.start.trainable)
    assert formula.forward(workload) * 0.99 <= real.forward(workload) <= most.forward(workload) * 1.25
    # No gradient is taken below the first adapter, in a model of two layers a good part of it.
    assert formula.train(workload) * 0.75 <= real.train(workload) <= most.train(workload) * 1.25
    assert trees.nbytes(experiment.start.flat()) // 4 >= formula.adapter > 0


@given(rates=st.integers(1, 3), trial=st.none() | st.integers(1, 9), rounds=st.integers(1, 9), every=st.integers(1, 4))
@settings(max_examples=40)
def test_the_grid_is_counted_as_it_is_run(rates: int, trial: int | None, rounds: int, every: int) -> None:
    """Every rate to the trial's end, then the best to the last; a column's end is always validated."""

    class Only:
        recipe = read_recipe(
            {
                "task": "chat",
                "model": {"name": "tiny"},
                "data": {"name": "rows.jsonl"},
                "optimizer": {"lr": [0.1 * (i + 1) for i in range(rates)], "grid_rounds": trial if rates > 1 else None},
                "federation": {"rounds": rounds, "valid_every": every},
            }
        )

    trained, validated = Counter[int](), Counter[int]()

    def go(start: int, until: int) -> None:
        for r in range(start + 1, until + 1):
            trained[r] += 1
            validated[r] += r % every == 0 or r == until

    first = min(trial or rounds, rounds) if rates > 1 else 0
    for _ in range(rates if rates > 1 else 0):
        go(0, first)
    go(first, rounds)
    assert marks(Only, rounds) == (  # type: ignore[arg-type]
        [trained[r] for r in range(1, rounds + 1)],
        [validated[r] for r in range(1, rounds + 1)],
    )


sizes = st.integers(1, 10**12)


@example(loaded=1, client=1, clients=3, there=3, base=1, copies=0)  # two of three clients fit
@given(loaded=sizes, client=sizes, clients=st.integers(1, 64), there=sizes, base=sizes, copies=st.integers(0, 3))
def test_what_does_not_fit_is_named_with_its_change(
    loaded: int, client: int, clients: int, there: int, base: int, copies: int
) -> None:
    block = client * clients
    memory = Memory(
        base=base,
        loaded=loaded,
        client=client,
        block=block,
        clients=clients,
        peak=loaded + block,
        available=there,
        copies=copies,
    )
    small = read_recipe({"task": "chat", "model": {"name": "tiny"}, "data": {"name": "rows.jsonl"}})
    found = problems(small, memory, Disk(private=5, shared=5, free=10))
    assert bool(found) == (memory.peak + copies * loaded > there)
    for problem in found:
        assert problem.what.startswith("memory: ")
        if problem.change.startswith("set engine.clients_per_block to "):
            fits = int(problem.change.split()[3].rstrip(";"))
            assert loaded * (1 + copies) + fits * client <= there
            assert fits < clients
    (full,) = problems(small, replace(memory, peak=0, copies=0), Disk(private=6, shared=5, free=10))
    assert full.what.startswith("disk: ")


def test_a_plan_that_does_not_fit_is_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryMeter, "available", lambda self: 1)
    planned = plan(recipe(home / "model", home / "pair.jsonl", "pair"), seconds=0.05)
    assert planned.expected.memory.clients == 5
    (problem,) = planned.problems
    assert "model.device" in problem.change
    from rich.console import Console

    console = Console(width=200, record=True, file=StringIO())
    console.print(plan_table(planned.as_dict()))
    assert "will not fit" in console.export_text()


def test_loads_leave_padding_out() -> None:
    batch = {
        "active_C": torch.tensor([True, False]),
        "index_CB": torch.tensor([[0, 1, -1], [0, -1, -1]]),
        "attention_mask_CBT": torch.tensor([[[1, 1, 1], [1, 0, 0], [1, 0, 0]]] * 2),
        "labels_CBT": torch.tensor([[[-100, 5, 6], [-100, -100, -100], [-100, -100, -100]]] * 2),
    }
    assert workload_of(batch) == Workload(rows=2, tokens=4, labelled=2, square=10)
    assert workload_of(batch) + workload_of(batch) == workload_of(batch).times(2)


def test_the_heaviest_clients_make_one_block(home: Path) -> None:
    loaded = open_recipe(read_recipe(recipe(home / "model", home / "pair.jsonl", "pair")))
    source = client_tasks(loaded.experiment)[f"train {lr_name(0.02)}"].source
    assert heaviest(source, range(5), 1) == (1,)  # the one with long sentences
    assert heaviest(source, range(5), 5) == (0, 1, 2, 3, 4)
    assert evenly_spaced(range(5), 9) == (0, 1, 2, 3, 4)


def test_a_plan_of_large_tensors_says_whose_seconds_it_tells(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe(home / "model", home / "pair.jsonl", "pair", federation={"rounds": 1})
    known = read_recipe(values)
    quiet = plan(known, seconds=0.01).expected.notes
    assert not any("large buffers" in note for note in quiet)
    monkeypatch.setattr(plan_adapt, "LARGE", 1)
    for done, said in (([], plan_adapt.GIVEN_BACK), ([False], plan_adapt.GIVEN_BACK), ([True], plan_adapt.RETAINED)):
        monkeypatch.setattr(allocator, "_set", done)
        assert plan(known, seconds=0.01).expected.notes == (*quiet, said)

"""A plan of hosts has the bytes of the run, whatever the schedule, the code and the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import lichen
from lichen.core.errors import LichenError
from lichen.recipes.plan.plan import Plan
from support import tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    tiny_llama.save_model(folder / "model")
    tiny_llama.save_rows(folder / "pair.jsonl", "pair", clients=3, rows=8)
    return folder


def values(home: Path, **more: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "pipeline": {"hosts": 2, "micro": 3},
        "compare": {"baselines": ["base"]},
        "federation": {"rounds": 2, "clients_per_round": 2},
    }
    for name, section in more.items():
        whole[name] = {**whole.get(name, {}), **section}
    return tiny_llama.recipe(home / "model", home / "pair.jsonl", "pair", **whole)


def planned_of(what: dict[str, Any]) -> Plan:
    found = lichen.plan(what, seconds=0.01)
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"federation": {"rounds": 3, "valid_every": 2}, "optimizer": {"clip": None, "schedule": "cosine"}},
        {"pipeline": {"schedule": "gpipe", "micro": 7}, "optimizer": {"clip": 0.5}},
        {"pipeline": {"code": ["int4"]}, "optimizer": {"name": "sgd", "momentum": 0.5}},
    ],
)
def test_bytes_are_those_of_the_run(home: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    found = planned_of(values(home, **more)).expected
    run = lichen.run(values(home, **more), out=tmp_path / "run")
    traffic = run.summary["traffic"]
    assert (found.bytes.up, found.bytes.down) == (run.summary["bytes_up"], run.summary["bytes_down"])
    assert (found.bytes.valid_up, found.bytes.valid_down) == (traffic["valid_up"], traffic["valid_down"])
    assert found.bytes.client_up == round(traffic["client_up"])
    assert found.bytes.validators == 3
    assert found.hosts is not None
    assert sum(found.hosts["weights"]) == found.memory.base
    adapter = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert found.trained == sum(x.numel() for x in adapter.values())
    assert found.columns["federated"].train_tokens > 0 < found.columns["base"].seconds


def test_a_plan_says_who_holds_what_and_how_long_hosts_wait(home: Path) -> None:
    planned = planned_of(values(home, federation={"patience": 1}))
    text, facts = "\n".join(planned.expected.notes), planned.expected.hosts
    assert facts is not None
    assert "host 1 holds 1 block," in text
    assert "graphs of 1 micro-batch at once" in text
    assert "patience may end" in text
    assert 0 < facts["idle"] < 1
    assert facts["pace"] > 0
    assert planned.seconds > planned.expected.columns["federated"].seconds > planned.expected.columns["base"].seconds
    assert "host 2 holds" in str(planned)


def test_what_a_run_refuses_a_plan_refuses(home: Path) -> None:
    with pytest.raises(LichenError) as refused:
        lichen.plan(values(home, pipeline={"hosts": 3}))
    assert refused.value.where == "pipeline.hosts"

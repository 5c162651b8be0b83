"""A plan says to the byte what crosses the cuts, and what both sides hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.store import load_tree
from lichen.present.units import bytes_text
from lichen.recipes.assemble.pieces.split_memory import split_memory
from lichen.recipes.plan.footprint import footprint
from lichen.recipes.plan.pieces.split_costs import split_traffic
from lichen.recipes.plan.plan import Plan
from lichen.recipes.plan.workload import invitations
from lichen.recipes.schema.read import read_recipe
from support.split_llama import experiment, made, save_all, task_of

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"local_head": True},
    {"kind": "v2", "client": {"first": 1, "last": 2}},
    {"client": {"first": [1, 3], "last": 1}},
)
CHANGES = {"code": ["change", "int4~"]}


SERVER = "state/federated/*/server"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("split"), clients=4)


@pytest.mark.parametrize(
    ("split", "federation"),
    [
        *((split, {"local_steps": 1}) for split in KINDS),
        (KINDS[0], {"local_epochs": 1, "local_steps": None}),
        (CHANGES, {"local_epochs": 1, "local_steps": None, "clients_per_round": 3, "rounds": 3}),
        ({**CHANGES, "local_head": True}, {"local_epochs": 2, "local_steps": None}),
    ],
)
def test_bytes_are_those_of_the_run(
    home: Path, tmp_path: Path, split: dict[str, Any], federation: dict[str, Any]
) -> None:
    what = made(home, split=split, federation={"rounds": 2, "clients_per_round": 2, **federation})
    opened = experiment(what)
    found = split_traffic(opened, invitations(opened))
    summary = lichen.run(what, out=tmp_path / "run").summary
    assert (found.up, found.down) == (summary["bytes_up"], summary["bytes_down"])
    assert 0 < found.valid_up < found.up


def test_a_plan_says_what_each_side_holds_and_that_bandwidth_is_not_saved(home: Path) -> None:
    what = made(home, split={"client": {"first": 1, "last": 1}}, federation={"rounds": 1})
    planned = lichen.plan(what, seconds=0.01)
    assert isinstance(planned, Plan)
    facts, notes = planned.expected.split, "\n".join(planned.expected.notes)
    assert facts is not None
    assert facts["bytes_of_a_token"] == 4 * 32 * 4
    assert "plain LoRA would send" in notes
    assert "split buys memory, not bandwidth" in notes
    assert facts["client_frozen"] + facts["server_frozen"] == facts["whole_frozen"]
    measured = footprint(read_recipe(what))
    assert measured is not None
    assert measured.frozen == facts["client_frozen"] < facts["whole_frozen"]
    whole = footprint(read_recipe(made(home, federation={"rounds": 1})))
    assert whole is not None
    assert measured.frozen < whole.frozen


def test_a_plan_says_what_is_remembered_of_rows(home: Path, tmp_path: Path) -> None:
    what = made(home, split=CHANGES, federation={"rounds": 2, "local_epochs": 1, "local_steps": None})
    planned = lichen.plan(what, seconds=0.01)
    assert isinstance(planned, Plan)
    facts = planned.expected.split
    assert facts is not None
    assert f"remembers {bytes_text(facts['remembered'])}" in "\n".join(planned.expected.notes)
    folder = lichen.run(what, out=tmp_path / "run").folder
    newest = [max(at.glob("*.safetensors"), key=lambda file: int(file.stem)) for at in folder.glob(f"{SERVER}/*/*")]
    assert facts["remembered"] == sum(x.nbytes for file in newest for x in load_tree(file)[0].values()) > 0


def test_the_deeper_the_first_cut_the_more_a_client_holds_and_the_less_the_server(home: Path) -> None:
    found = [
        split_memory(opened, task_of(opened), 0)
        for first in (1, 2, 3)
        if (opened := experiment(made(home, split={"client": {"first": first, "last": 1}})))
    ]
    assert found[0].client_frozen < found[1].client_frozen < found[2].client_frozen
    assert found[0].server_frozen > found[1].server_frozen > found[2].server_frozen
    assert found[0].server_training > found[2].server_training

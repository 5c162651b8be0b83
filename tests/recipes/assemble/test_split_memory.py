"""Cuts that follow from memory: whoever has more holds more, everybody fits, and who fits nothing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import resume
from hypothesis import given, settings
from hypothesis import strategies as st

import lichen
from lichen.clients.splitting.ends import Cut
from lichen.core.errors import LichenError
from lichen.recipes.assemble.capacity import GIB
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.pieces.split_memory import cut_tiers, fitting_parts, split_memory
from lichen.recipes.plan.plan import Plan
from lichen.recipes.schema.read import read_recipe
from support.split_llama import experiment, made, save_all, task_of

CHOICES = (3, 1, 2)
CLIENTS = 5
ENOUGH = 1.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("memory"), clients=CLIENTS)


def recipe(home: Path, memory: list[float], *, last: tuple[int, ...] = (1,), **more: Any) -> dict[str, Any]:
    split = {"client": {"first": list(CHOICES), "last": list(last)}}
    federation = {"rounds": 1, "local_steps": 1, "memory": memory}
    return made(home, split=split, federation=federation, **more)


@pytest.fixture(scope="module")
def needed(home: Path) -> dict[Cut, float]:
    """GiB of each cut, as a plan says them of a recipe that names no other."""
    found = {}
    for first in sorted(CHOICES):
        split = {"client": {"first": first, "last": 1}}
        federation = {"rounds": 1, "local_steps": 1, "memory": [ENOUGH]}
        opened = experiment(made(home, split=split, federation=federation))
        (tier,) = cut_tiers(opened, task_of(opened))
        assert (tier.clients, tier.cut) == (CLIENTS, Cut(first, 1))
        found[tier.cut] = tier.needed / GIB
    return found


def test_what_is_counted_is_enough_for_whole_rounds_of_every_client(home: Path, needed: dict[Cut, float]) -> None:
    opened = experiment(recipe(home, [ENOUGH]))
    task = task_of(opened)
    for cut, gib in needed.items():
        worst = 0
        for client in range(CLIENTS):
            steps = [batch for seed in range(3) for batch in task.source.batches((client,), seed)]
            one = split_memory(opened, task, client, cut=cut, batches=steps)
            worst = max(worst, one.client_frozen + one.client_training)
        assert 0.9 * gib < worst / GIB <= gib


def test_more_blocks_need_more(needed: dict[Cut, float]) -> None:
    assert [*needed.values()] == sorted(set(needed.values()))


@settings(max_examples=4, deadline=None)
@given(shares=st.lists(st.floats(0, 1.2), min_size=1, max_size=3))
def test_every_client_fits_and_equal_memory_gives_equal_cuts(
    home: Path, needed: dict[Cut, float], shares: list[float]
) -> None:
    least, most = min(needed.values()) * 1.001, max(needed.values())
    memory = [least + share * (most - least) for share in shares]
    opened = experiment(recipe(home, [ENOUGH]))
    fed = opened.recipe.federation.model_copy(update={"memory": tuple(memory)})
    chosen = opened.with_server(recipe=opened.recipe.model_copy(update={"federation": fed}))
    parts = fitting_parts(chosen, task_of(chosen))
    assert parts is not None
    mine = [(memory[c % len(memory)], parts.cut_of(c)) for c in range(CLIENTS)]
    for gib, cut in mine:
        assert needed[cut] <= gib
        assert all(other.first <= cut.first or need > gib for other, need in needed.items())
        assert all(other.first >= cut.first for more, other in mine if more >= gib)


def test_a_run_is_that_of_the_cuts_dealt_out_by_hand(home: Path, tmp_path: Path, needed: dict[Cut, float]) -> None:
    memory = [1.001 * needed[Cut(first, 1)] for first in (2, 1, 3)]
    runs = [
        lichen.run(what, out=tmp_path / str(at)).folder
        for at, what in enumerate(
            (
                recipe(home, memory, engine={"name": "spawned", "nodes": 2}),
                made(
                    home,
                    split={"client": {"first": [2, 1, 3], "last": 1}},
                    federation={"rounds": 1, "local_steps": 1},
                ),
            )
        )
    ]
    first, second = (resume.result_bytes(folder)["state/final.safetensors"] for folder in runs)
    assert first == second


def test_a_plan_says_who_holds_what(home: Path, needed: dict[Cut, float]) -> None:
    memory = [1.001 * needed[Cut(1, 1)], ENOUGH]
    what = recipe(home, memory)
    tiers = cut_tiers(experiment(what), task_of(experiment(what)))
    assert [(tier.memory, tier.clients, tier.cut) for tier in tiers] == [
        (memory[0], 3, Cut(1, 1)),
        (ENOUGH, 2, Cut(3, 1)),
    ]
    planned = lichen.plan(what, seconds=0.01)
    assert isinstance(planned, Plan)
    assert planned.expected.rooms == ()
    text = "\n".join(planned.expected.notes)
    assert "2 clients of 1 GiB hold 3 + 1 blocks" in text
    assert "3 clients of" in text


def test_last_blocks_are_dealt_out_beside_it(home: Path) -> None:
    split = {"client": {"first": [1, 2], "last": [2, 1]}}
    what = made(home, split=split, federation={"rounds": 1, "local_steps": 1, "memory": [ENOUGH]})
    parts = experiment(what).server.split
    assert parts is not None
    assert [parts.cut_of(client) for client in range(3)] == [Cut(2, 2), Cut(2, 1), Cut(2, 2)]


def test_a_client_that_fits_nothing_is_named(home: Path, needed: dict[Cut, float]) -> None:
    memory = [ENOUGH, 0.9 * needed[Cut(1, 1)]]
    with pytest.raises(LichenError) as refused:
        open_recipe(read_recipe(recipe(home, memory)))
    opened = experiment(recipe(home, [ENOUGH]))
    assert opened.server.roster[1].name in refused.value.what
    assert refused.value.where == "federation.memory"
    assert "give at least" in str(refused.value.fix)

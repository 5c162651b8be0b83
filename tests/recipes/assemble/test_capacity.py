"""Memory into rank and layers: counted on real steps, monotone, and refused where nothing fits.

Legend: N clients.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.models.adapters.quantized import resident_bytes
from lichen.present.planned import plan_table
from lichen.recipes.assemble import capacity
from lichen.recipes.assemble.capacity import (
    GIB,
    Needs,
    TierSettings,
    capacity_of,
    device_tiers,
    fit_to_memory,
    needs_of,
)
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.workload import largest_batch
from lichen.recipes.plan.plan import plan
from lichen.recipes.schema.read import read_recipe
from lichen.server.lowrank.submodel import Capacity
from support.tiny_llama import recipe, save_rows

BLOCKS = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers as hf

    from support.tiny_llama import save_model

    folder = tmp_path_factory.mktemp("capacity")
    config = hf.LlamaConfig.from_pretrained(save_model(folder / "model"))
    config.num_hidden_layers = BLOCKS
    hf.LlamaForCausalLM(config).save_pretrained(folder / "model")
    save_rows(folder / "pair.jsonl", "pair", rows=12)
    return folder


def _recipe(home: Path, **more: Any) -> Any:
    return read_recipe(recipe(home / "model", home / "pair.jsonl", "pair", **more))


def _experiment(home: Path, **more: Any) -> tuple[Experiment, ClientTask]:
    experiment = open_recipe(_recipe(home, **more)).experiment
    return experiment, client_tasks(experiment)[f"train {lr_name(experiment.recipe.optimizer.lr[0])}"]


@pytest.fixture(scope="module")
def tiny(home: Path) -> tuple[Experiment, ClientTask, Needs]:
    model = {"adapter": {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 4}}
    experiment, client_task = _experiment(home, model={"name": str(home / "model"), **model})
    return experiment, client_task, needs_of(experiment, client_task)


NEEDS = st.builds(
    Needs,
    rank=st.integers(1, 9),
    blocks=st.integers(1, 9),
    least=st.integers(1, 1000),
    narrow=st.integers(1, 2000),
    whole=st.integers(1, 4000),
)


@given(needs=NEEDS, memory=st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_more_memory_never_gives_less(needs: Needs, memory: tuple[int, int]) -> None:
    def size(step: TierSettings) -> tuple[int, int]:
        return step.rank, needs.blocks if step.last is None else step.last

    steps = needs.tiers()
    assert [needed for _, needed in steps] == sorted(needed for _, needed in steps)
    assert steps[0][1] == needs.least
    less, more = sorted(memory)
    if less < needs.least:
        with pytest.raises(LichenError, match="hold no client"):
            needs.fit_to_memory(less)
        return
    (rank, last), (higher, later) = size(needs.fit_to_memory(less)), size(needs.fit_to_memory(more))
    assert rank <= higher
    assert last <= later
    assert dict(steps)[needs.fit_to_memory(less)] <= less


def test_the_chord_is_above_what_a_step_holds(tiny: tuple[Experiment, ClientTask, Needs]) -> None:
    """Every rung, measured by itself: never above what was told, and not far below it."""
    experiment, client_task, needs = tiny
    model: Any = experiment.model
    start = {n: x + 1e-3 if n.endswith("lora_B") else x for n, x in experiment.start.trainable.items()}
    client, batch = largest_batch(client_task, len(experiment.clients.train))
    base = resident_bytes(model.wrapped.model)
    for step, told in needs.tiers():
        cut = Capacity((step.rank,), last_N=(step.last,), scaling=1.0)
        shared = cut.extract(Shared.of_flat(start), cut.key(0))
        held = base + capacity._step_bytes(client_task, shared, client, batch, experiment.model.base)
        assert 0.97 * told <= held <= told, step
    assert needs.least < needs.narrow < needs.whole
    assert (needs.rank, needs.blocks) == (4, BLOCKS)


def test_counted_on_the_largest_batch(tiny: tuple[Experiment, ClientTask, Needs]) -> None:
    """No batch of any client in a round to come holds more, so that no client is promised too much."""
    experiment, client_task, needs = tiny
    model: Any = experiment.model
    base = resident_bytes(model.wrapped.model)
    for client in range(len(experiment.clients.train)):
        for batch in client_task.source.batches((client,), 99):
            assert base + capacity._step_bytes(client_task, experiment.start, client, batch, "") <= 1.001 * needs.whole


def test_clients_take_turns(home: Path, tiny: tuple[Experiment, ClientTask, Needs]) -> None:
    _, _, needs = tiny
    adapter = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 4}
    gib = [needs.least / GIB, (needs.narrow + needs.whole) / 2 / GIB, 1.0]
    more = {"model": {"name": str(home / "model"), "adapter": adapter}, "federation": {"memory": gib}}
    experiment, client_task = _experiment(home, **more)
    found = capacity_of(experiment, client_task)
    assert found is not None
    assert found.rank_N == (1, 4, 4, 1, 4)
    assert found.last_N == (1, 3, None, 1, 3)
    assert found.scaling == 1.0
    rows = device_tiers(experiment, client_task)
    assert [(r.clients, r.rank, r.layers, r.of) for r in rows] == [(2, 1, 1, 5), (2, 4, 3, 5), (1, 4, 5, 5)]
    assert all(row.needed <= row.memory * GIB for row in rows)
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["clients"] == 2
    assert fit_to_memory(experiment, client_task, needs.narrow) == TierSettings(rank=4, last=1)


def test_a_quantised_base_and_checkpointing_leave_room_for_more(home: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole, light = (
        needs_of(*_experiment(home, model={"name": str(home / "model"), "quantize": kind})) for kind in (None, "nf4")
    )
    again = needs_of(*_experiment(home, engine={"gradient_checkpointing": True}))
    assert light.least < whole.least
    assert light.whole < whole.whole
    assert again.whole < whole.whole


def test_too_little_is_refused(home: Path, tiny: tuple[Experiment, ClientTask, Needs]) -> None:
    experiment, client_task, needs = tiny
    with pytest.raises(LichenError, match="give at least") as error:
        fit_to_memory(experiment, client_task, needs.least - 1)
    assert error.value.where == "federation.memory"
    assert capacity_of(experiment, client_task) is None
    assert device_tiers(experiment, client_task) == ()
    more = {"model": {"name": str(home / "model"), "adapter": {"kind": "ia3"}}}
    with pytest.raises(LichenError, match=r"model\.adapter\.kind"):
        needs_of(*_experiment(home, **more))


def test_the_plan_tells(home: Path) -> None:
    found = plan(_recipe(home, federation={"memory": [0.5, 1.0]}), seconds=0.01).as_dict()
    assert [room["memory"] for room in found["rooms"]] == [0.5, 1.0]
    out = StringIO()
    Console(file=out, width=160).print(plan_table(json.loads(json.dumps(found))))
    assert "3 clients of 0.5 GiB" in out.getvalue()
    assert "rank 2, 5 of 5 layers" in out.getvalue()

"""The roster of a recipe: what its clients declare is what their rows are, and all that depends on rows reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.clients.statistics.declare import enrol
from lichen.clients.training.row_weights import ByRows
from lichen.core.roster import Roster
from lichen.core.store import ClientStore
from lichen.core.wrapping import innermost
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.aggregation import sampler_of
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, validators_of
from lichen.recipes.assemble.sides.server import ServerSide, participants, rows_per_round, steps_per_round
from lichen.recipes.assemble.workload import alone_rounds, pooled_experiment
from lichen.recipes.schema.read import read_recipe
from lichen.server.sampling import Weighted
from support.small_experiment import experiment as small

SHORT = ("federation.rounds=1", "compare.baselines=[]", "data.partition.clients=4", "federation.local_steps=1")


def opened(*overrides: str) -> Experiment:
    return open_recipe(read_recipe("digits", [*SHORT, *overrides])).experiment


def with_federation(server: ServerSide, **changes: Any) -> ServerSide:
    fed = server.recipe.federation.model_copy(update=changes)
    return replace(server, recipe=server.recipe.model_copy(update={"federation": fed}))


def test_a_run_leaves_what_its_clients_declared(tmp_path: Path) -> None:
    recipe = read_recipe("digits", SHORT)
    loaded = open_recipe(recipe)
    result = lichen.run(recipe, out=tmp_path / "run")
    file = result.folder / "roster.json"
    found = Roster.load(json.loads(file.read_text()))
    assert found == loaded.experiment.server.roster
    assert found.names == tuple(client_data.name for client_data in loaded.clients_data)
    for part in ("train", "valid", "test"):
        assert list(found.rows(part)) == [len(getattr(one, part)) for one in loaded.clients_data]
    assert found.labels() == {}  # nobody has asked for them
    assert file.stat().st_mode & 0o777 == 0o600
    there = result.summary["training"]["federated"]["rows_there"]
    assert there == sum(found.rows("train"))


def test_the_nodes_declare_the_same_over_an_engine(tmp_path: Path) -> None:
    experiment = opened()
    engine = LocalEngine(client_tasks(experiment), ClientStore(tmp_path), block_size=3)
    assert enrol(engine) == experiment.server.roster


def test_labels_are_declared_where_messages_tell_them_anyway() -> None:
    assert opened().server.roster.labels() == {}
    experiment = opened("model.head=ridge")
    labels = experiment.server.roster.labels()
    assert sum(labels.values()) == sum(experiment.server.roster.rows("train"))
    assert set(labels) == set(experiment.server.classes)
    for member, shard in zip(experiment.server.roster, experiment.clients.train, strict=True):
        assert sum(member.labels.values()) == shard.size


def test_whatever_depends_on_rows_reads_the_roster_alone() -> None:
    """The server's side holds no shard; other declared rows give other weights, invitations and budgets."""
    made = small(6)
    server = with_federation(made.server, clients_per_round=2, sampling="weighted", valid_clients=2, local_epochs=2)
    assert participants(server) == 2
    assert isinstance(sampler_of(server), Weighted)
    first = server.roster[0]
    members = [replace(first, name=f"{c}", rows={"train": 8 * (c == 5), "valid": c % 2}) for c in range(6)]
    other = replace(server, roster=Roster(tuple(members)))
    algorithm = algorithm_of(other, 0.1, 1)
    assert algorithm.weight_N.tolist() == [0, 0, 0, 0, 0, 8]
    assert algorithm.sampler.invite(algorithm.weight_N, 3) == (5,)
    assert set(validators_of(other)) < {1, 3, 5}
    assert steps_per_round(other) == 2 * 2 / 6  # two passes of the one client with eight rows, in fours
    assert rows_per_round(other) == 2 * 8 / 6
    assert alone_rounds(with_federation(other, rounds=9)) == 3


def test_messages_are_weighed_by_declared_rows() -> None:
    made = small(3)
    weighed = made.with_server(recipe=with_federation(made.server, weighting="rows").recipe)
    work = client_tasks(weighed)["train lr=0.1"].work
    assert isinstance(work, ByRows)
    assert work.rows_N == made.server.roster.rows("train") == (9, 10, 11)
    assert innermost(work) is not work


def test_clients_with_other_rows_declare_them_and_the_pooled_one_is_one_client() -> None:
    made = small(3)
    more = made.with_rows(train=made.clients.test)
    assert more.server.roster.rows("train") == made.server.roster.rows("test")
    assert more.server.roster.names == made.server.roster.names
    pooled = pooled_experiment(made).server.roster
    assert [pooled.rows(part) for part in ("train", "valid", "test")] == [(30,), (15,), (15,)]


@pytest.mark.parametrize("field", ServerSide.__dataclass_fields__)
def test_the_servers_side_holds_no_private_shard(field: str) -> None:
    made = small(3)
    held = getattr(made.server, field)
    private = {id(shard) for part in (made.clients.train, made.clients.valid, made.clients.test) for shard in part}
    assert id(held) not in private
    assert not (isinstance(held, tuple) and private & set(map(id, held)))

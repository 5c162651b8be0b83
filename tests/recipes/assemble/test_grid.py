"""Every rule with every method, adapter, engine and codec is refused by a declared sentence, or can be assembled."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lichen.clients.methods import DILOCO, METHODS
from lichen.core.errors import LichenError
from lichen.declared import Need
from lichen.engines.kinds import ENGINES
from lichen.models.adapters.table import BUILT_IN
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared
from lichen.recipes.schema.fits import FEATURES
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.server.rules import RULES
from support import small_experiment, tiny_llama

WAYS = (*METHODS, "diloco")
TRAINED = (*BUILT_IN, "student")
CODED: dict[str, dict[str, Any]] = {"plain": {}, "up": {"up": ["int8"]}, "down": {"down": ["int8"]}}
ROBUST: dict[str, dict[str, Any]] = {
    "krum": {"rule": "krum", "liars": 0},
    "products": {"rule": "multi_krum", "of": "products", "liars": 0},
}
"""What stands in the place of the mean; every rule of the family is one class."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("tiny")
    return tiny_llama.save_model(home / "model", biases=True), tiny_llama.save_rows(home / "rows.jsonl", "pair")


def values(files: tuple[Path, Path], rule: str, way: str, trained: str, engine: str, coded: str) -> dict[str, Any]:
    sections: dict[str, Any] = tiny_llama.recipe(*files, "pair")
    if trained == "student":
        sections = {**small_experiment.RECIPE, "compare": {"baselines": []}}
    else:
        adapter: dict[str, Any] = {"kind": trained}
        if trained == "lora":
            adapter |= {"target_modules": ["q_proj", "v_proj"], "rank": 2}
        if trained == "ia3":
            adapter |= {"target_modules": ["q_proj", "v_proj"]}
        sections["model"] = {**sections["model"], "adapter": adapter}
    federation: dict[str, Any] = {**sections["federation"], "aggregate": rule}
    if coded in ROBUST:
        federation["robust"] = ROBUST[coded]
    if way == "diloco":
        federation["keep_optimizer"] = True
    sections["federation"] = federation
    small = {"kseed": {"seeds": 16}, "cma": {"dimensions": 8}}.get(way, {})
    sections["optimizer"] = {"lr": [0.02], "name": "adamw" if way == "diloco" else way, **small}
    return {**sections, "engine": {"name": engine}, "wire": CODED.get(coded, {})}


def sentences() -> Iterator[str]:
    """What the declared needs and clashes can say."""
    declared = (*RULES.values(), *METHODS.values(), DILOCO, *ENGINES.values(), *FEATURES)
    for need in (need for one in declared for need in one.needs):
        assert isinstance(need, Need)
        yield re.escape(need.what).replace(r"\{who\}", ".+").replace(r"\{me\}", ".+")
    for clash in (clash for feature in FEATURES for clash in feature.clashes):
        yield re.escape(clash.what)


def test_every_combination_is_refused_by_a_declaration_or_can_be_assembled(files: tuple[Path, Path]) -> None:
    known = re.compile("|".join(f"(?:{sentence})" for sentence in sentences()))
    made: dict[tuple[str, bool], Experiment] = {}
    read, refused = list[Recipe](), dict[tuple[str, ...], LichenError]()
    for combination in itertools.product(RULES, WAYS, TRAINED, ENGINES, (*CODED, *ROBUST)):
        try:
            recipe = read_recipe(values(files, *combination))
        except LichenError as error:
            refused[combination] = error
            continue
        read.append(recipe)
        if recipe.engine.name != "local":
            continue  # what is assembled does not depend on where it runs
        trained, asks = combination[2], recipe.method.asks_only
        if (trained, asks) not in made:
            made[trained, asks] = (
                small_experiment.experiment() if trained == "student" else open_recipe(recipe).experiment
            )
        experiment = made[trained, asks].with_server(recipe=recipe)
        lr = recipe.optimizer.lr[0]
        tasks, algorithm = client_tasks(experiment), algorithm_of(experiment.server, lr, recipe.federation.rounds)
        assert algorithm.work in tasks
        assert algorithm.valid in tasks
        assert algorithm.init(initial_shared(experiment.server, lr)).shared
    assert len(read) + len(refused) == len(RULES) * len(WAYS) * len(TRAINED) * len(ENGINES) * 5
    # Each word of each family goes with something.
    assert {recipe.rule for recipe in read} == set(RULES)
    assert {recipe.method.name for recipe in read} == {*METHODS, DILOCO.name}
    assert {recipe.engine.name for recipe in read} == set(ENGINES)
    assert {one.federation.robust.of for one in read if one.federation.robust} == {"factors", "products"}
    assert len(made) == len(TRAINED) + 1
    assert len(refused) > 1000
    strange = {names: str(error) for names, error in refused.items() if not known.fullmatch(error.what)}
    assert strange == {}
    assert all(error.where and error.fix for error in refused.values())

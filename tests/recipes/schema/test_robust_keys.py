"""A robust rule in a recipe: what it is refused beside, by key, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.recipes.assemble.aggregation import aggregator_of
from lichen.recipes.schema.read import read_recipe
from lichen.server.robust.table import ROBUST
from lichen.server.rules import RULES
from support.small_experiment import experiment

DIGITS: dict[str, Any] = {
    "task": "classify",
    "model": {"student": {"kind": "image-mlp"}},
    "data": {"name": "digits", "partition": {"by": "dirichlet", "clients": 6}},
    "compare": {"baselines": []},
}
CHAT: dict[str, Any] = {
    "task": "chat",
    "model": {"name": "m"},
    "data": {"name": "d"},
    "compare": {"baselines": []},
}
KRUM = "federation.robust={rule: krum}"
PRODUCTS = "federation.robust={rule: krum, of: products}"
SCAFFOLD = "optimizer={name: scaffold, lr: 0.1}"
BUFFERED = "federation.schedule={kind: buffered, arrivals: 4}"


@pytest.mark.parametrize(
    ("base", "words", "where", "why"),
    [
        (DIGITS, ["federation.robust={rule: krum, liars: 2}"], "federation.robust.liars", "krum needs 7 clients"),
        (DIGITS, ["federation.robust={rule: median, liars: 3}"], "federation.robust.liars", "and a round has 6"),
        (DIGITS, [KRUM, "federation.clients_per_round=4"], "federation.robust.liars", "and a round has 4"),
        (DIGITS, [KRUM, BUFFERED, "engine.clock={median: 3}"], "federation.robust.liars", "and a round has 4"),
        (CHAT, [KRUM, "data.max_clients=4"], "federation.robust.liars", "and a round has 4"),
        (DIGITS, ["federation.robust={rule: centred_clipping}"], "federation.robust.radius", "needs one"),
        (DIGITS, ["federation.robust={rule: krum, radius: 1.0}"], "federation.robust.radius", "krum has none"),
        (
            DIGITS,
            ["federation.robust={rule: median, iterations: 3}"],
            "federation.robust.iterations",
            "median has none",
        ),
        (DIGITS, [PRODUCTS], "federation.robust.of", "no LoRA factors"),
        (CHAT, ["federation.robust={rule: median, of: products}"], "federation.robust.of", "median has none"),
        (CHAT, [PRODUCTS, "federation.aggregate=ffa"], "federation.robust.of", "one factor of each pair"),
        (DIGITS, [KRUM, "federation.weighting=rows"], "federation.weighting", "count every client as 1"),
        (DIGITS, [KRUM, SCAFFOLD], "federation.robust", "scaffold takes none"),
        (DIGITS, [KRUM, "federation.fair=qffl"], "federation.robust", "federation.fair takes none"),
        (
            CHAT,
            [KRUM, "federation.ranks=[2, 1]", "federation.aggregate=fedit"],
            "federation.robust",
            "ranks takes none",
        ),
    ],
)
def test_what_does_not_go_with_it(base: dict[str, Any], words: list[str], where: str, why: str) -> None:
    with pytest.raises(LichenError) as caught:
        read_recipe(base, words)
    assert (caught.value.where, why in caught.value.what) == (where, True), caught.value


def test_rules_that_make_more_than_a_mean_are_refused_by_what_they_declare() -> None:
    means = {"mean", "fedit", "ffa", "fedsa", "rolora"}
    for rule in RULES:
        words = [KRUM, f"federation.aggregate={rule}"]
        if rule in means:
            read_recipe(CHAT, words)
            continue
        with pytest.raises(LichenError, match=f"{rule} takes none") as caught:
            read_recipe(CHAT, words)
        assert caught.value.where == "federation.robust"


def test_every_rule_is_a_word_and_what_it_needs_stands_beside_it() -> None:
    for name, rule in ROBUST.items():
        radius = ", radius: 1.0" if rule.radius else ""
        public = ["data.public={labelled: 20}"] if rule.looks_at == "reference" else []
        robust = read_recipe(DIGITS, [f"federation.robust={{rule: {name}{radius}}}", *public]).federation.robust
        assert robust is not None
        assert robust.rule == name
    read_recipe(CHAT, [PRODUCTS, "federation.weighting=uniform", "federation.server={name: adam}"])


def test_clients_that_only_the_rows_tell_are_counted_before_anything_runs() -> None:
    words = ["data={name: rows.jsonl, partition: {by: client}}", "federation.robust={rule: krum, liars: 9}"]
    server = replace(experiment(4).server, recipe=read_recipe(DIGITS, words))
    with pytest.raises(LichenError, match="with 9 liars krum needs 21 clients, and a round has 4"):
        aggregator_of(server, 0.1)

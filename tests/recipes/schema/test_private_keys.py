"""What does not go beside ``privacy`` is refused when the recipe is read, by its key and with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.recipes.schema.read import read_recipe

GOOD = (
    "optimizer.lr=[0.1]",
    "federation={rounds: 4, local_steps: 2, batch_size: 4, aggregate: mean, weighting: uniform}",
    "compare={baselines: [], metric: accuracy}",
    "privacy={epsilon: 4, clip: 1.0}",
)
LORA: dict[str, Any] = {
    "task": "classify",
    "model": {"name": "minilm-l6", "head": "random"},
    "data": {"name": "reviews"},
    "optimizer": {"name": "adamw", "lr": [1e-3]},
    "federation": {"rounds": 2, "weighting": "uniform", "aggregate": "ffa"},
    "compare": {"baselines": []},
    "privacy": {"sigma": 1.0, "clip": 1.0},
}
WRONG: dict[str, tuple[str, ...]] = {
    # Noise that is none, or twice said.
    "privacy.epsilon": ("privacy={clip: 1.0}",),
    "privacy.epsilon: Input": ("privacy={epsilon: 0, clip: 1.0}",),
    "privacy.sigma": ("privacy={sigma: -1, clip: 1.0}",),
    "privacy.clip": ("privacy={epsilon: 4}",),
    "privacy.clip: ": ("privacy={epsilon: 4, clip: 0}",),
    "privacy.delta": ("privacy={epsilon: 4, clip: 1.0, delta: 1.0}",),
    "privacy.delta ": ("privacy={epsilon: 4, clip: 1.0, delta: 0}",),
    "privacy.unit ": ("privacy={epsilon: 4, clip: 1.0, unit: ward}",),
    "privacy.noise": ("privacy={epsilon: 4, clip: 1.0, noise: 2}",),
    "privacy.seed": ("privacy={epsilon: 4, clip: 1.0, seed: -1}",),
    # What one client moves has no bound.
    "federation.weighting": ("federation.weighting=examples",),
    "federation.weighting ": ("federation.weighting=rows",),
    "federation.robust": ("federation.robust={rule: median}",),
    "federation.robust ": ("federation.robust={rule: krum, liars: 1}",),
    "privacy: federation.fair": ("federation.fair=qffl",),
    "privacy: federation.fair ": ("federation.fair=minmax",),
    "privacy: keep_optimizer": ("federation.keep_optimizer=true",),
    "privacy: scaffold": ("optimizer={name: scaffold, lr: [0.1]}",),
    "federation.ranks": ("federation.ranks=[1, 2]",),
    "federation.memory": ("federation.memory=[1.0]",),
    "attack.kind": ("attack={kind: alie, liars: 2}",),
    "attack.kind ": ("attack={kind: min_max, liars: 2}",),
    # Sampling that claims nothing.
    "federation.sampling": ("federation.clients_per_round=3",),
    "federation.sampling ": ("federation.clients_per_round=3", "federation.sampling=weighted"),
    "federation.schedule.kind": (
        "federation.schedule={kind: buffered, arrivals: 2}",
        "engine.clock={median: 60}",
    ),
    "federation.schedule.least": ("federation.schedule.least=2",),
    # Other releases.
    "wire.gate": ("wire.gate=3.0",),
    "wire.clip": ("wire.clip=1.0",),
    "federation.history": ("federation.history=true",),
    "optimizer.lr": ("optimizer.lr=[0.1, 0.3]",),
    "optimizer.lr ": ("optimizer.lr=[0.1, 0.2, 0.3]", "optimizer.grid_rounds=2"),
    "optimizer.grid_rounds": ("optimizer.grid_rounds=2",),
    "federation.patience": ("federation.patience=2",),
    "federation.valid_clients": ("federation.valid_clients=3",),
    "federation.valid_average": ("federation.valid_average=median",),
    "federation.valid_every": ("federation.valid_every=2",),
    "compare.target": ("compare.target=0.5",),
    "semi": ("semi={kind: fixmatch}", "data.public=null"),
    "privacy: exchange": (
        "exchange={kind: fedmd}",
        "model={students: [{kind: image-mlp, width: 8}, {kind: image-mlp, width: 16}]}",
        "data.public={share: 0.2}",
    ),
}
OF_ROWS: dict[str, tuple[str, ...]] = {
    "optimizer.name": ("optimizer={name: mezo, lr: [0.1]}",),
    "optimizer.name ": ("optimizer={name: scaffold, lr: [0.1]}",),
    "optimizer.clip": ("optimizer.clip=0.5",),
    "optimizer.lr": ("optimizer.lr=[0.1, 0.3]",),
    "federation.local_epochs": ("federation.local_steps=null", "federation.local_epochs=1"),
    "federation.gradient_accumulation_steps": ("federation.gradient_accumulation_steps=2",),
    "federation.weighting": ("federation.weighting=examples",),
    "federation.fair": ("federation.fair=minmax",),
    "federation.fair ": ("federation.fair=qffl",),
    "federation.keep_optimizer": ("federation.keep_optimizer=true",),
    "federation.patience": ("federation.patience=2",),
    "attack": ("attack={kind: sign_flip, liars: 2}",),
    "attack ": ("attack={kind: label_flip, liars: 2}",),
    "compare.target": ("compare.target=0.5",),
    "semi": ("semi={kind: fixmatch}", "data.public=null"),
}
OF_LORA: dict[str, dict[str, Any]] = {
    "privacy: fedsa": {"federation": {"aggregate": "fedsa"}},
    "privacy: flora": {"federation": {"aggregate": "flora"}},
    "privacy: fedex": {"federation": {"aggregate": "fedex"}},
    "privacy: flexlora": {"federation": {"aggregate": "flexlora"}},
    "privacy: florist": {"federation": {"aggregate": "florist"}},
    "privacy: hetlora": {"federation": {"aggregate": "hetlora"}},
    "model.head": {"model": {"head": "ridge"}},
    "model.head ": {"model": {"head": "lda"}},
    "privacy: this task has none": {"task": "oneshot", "model": {"head": "ridge"}, "federation": {"aggregate": None}},
    "privacy: kseed": {
        "task": "chat",
        "model": {"name": "smollm2-135m", "adapter": {"kind": "full"}, "head": None},
        "optimizer": {"name": "kseed"},
        "federation": {"aggregate": "mean"},
    },
    "teacher": {
        "model": {"name": None, "head": None, "student": {"kind": "text-cnn"}},
        "teacher": {"name": "minilm-l6"},
        "data": {"public": {"share": 0.2}},
        "federation": {"aggregate": "mean"},
    },
    "synthetic": {
        "model": {"name": None, "head": None, "student": {"kind": "text-cnn"}},
        "synthetic": {"name": "smollm2-135m", "per_class": 4},
        "federation": {"aggregate": "mean"},
    },
    "model.scratch.text": {
        "task": "chat",
        "model": {"name": None, "head": None, "scratch": {"layers": 1}, "adapter": {"kind": "full"}},
        "federation": {"aggregate": "mean"},
    },
}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A recipe with some keys set, or taken away where they are None."""
    out = dict(base)
    for key, value in change.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def refused(read: Any, key: str) -> None:
    with pytest.raises(LichenError) as caught:
        read()
    text = str(caught.value)
    assert text.startswith(key.split(": ")[0].strip()), text
    if ": " in key and key.split(": ")[1]:
        assert key.split(": ")[1].lower().strip() in text.lower() or "Input" in key
    assert caught.value.what
    assert caught.value.fix


def test_the_recipes_that_are_changed_are_right() -> None:
    assert read_recipe("digits", GOOD).privacy is not None
    for rule in ("ffa", "fedit", "fedsvd", "rolora", "mean"):
        assert read_recipe(merged(LORA, {"federation": {"aggregate": rule}})).privacy is not None
    for more in (
        ("federation.clients_per_round=3", "federation.sampling=poisson"),
        ("wire={up: [int8], down: [int8]}",),
        ("privacy={sigma: 1.0, epsilon: 4, clip: 0.1, delta: 1e-5, seed: 3}",),
        ("optimizer={name: mezo, lr: [0.1]}",),
        ("federation.server={name: adam}",),
        ("attack={kind: sign_flip, liars: 2}",),
        ("compare.baselines=[alone]", "federation.valid_every=2"),
    ):
        assert read_recipe("digits", GOOD + more).privacy is not None


def test_there_are_forty_wrong_combinations_and_more() -> None:
    assert len(WRONG) + len(OF_LORA) >= 50


@pytest.mark.parametrize("key", WRONG)
def test_wrong_beside_privacy_is_refused_by_its_key(key: str) -> None:
    refused(lambda: read_recipe("digits", GOOD + WRONG[key]), key)


@pytest.mark.parametrize("key", OF_LORA)
def test_wrong_rules_and_models_are_refused_by_their_key(key: str) -> None:
    refused(lambda: read_recipe(merged(LORA, OF_LORA[key])), key)


@pytest.mark.parametrize("key", OF_ROWS)
def test_wrong_beside_privacy_of_rows_is_refused_by_its_key(key: str) -> None:
    refused(lambda: read_recipe("digits", (*GOOD, "privacy.unit=row", *OF_ROWS[key])), key)


def test_all_that_clashes_is_said_at_once_each_with_reason_and_fix() -> None:
    keys = ("wire.gate=3.0", "federation.history=true", "optimizer.lr=[0.1, 0.3]", "federation.weighting=rows")
    with pytest.raises(LichenError) as caught:
        read_recipe("digits", GOOD + keys)
    error = caught.value
    assert error.where == "privacy"
    assert "4 things" in error.what
    for key in keys:
        one = key.split("=")[0]
        (alone,) = [line for line in error.what.splitlines() if line.strip().startswith(f"{one}: ")]
        with pytest.raises(LichenError) as single:
            read_recipe("digits", (*GOOD, key))
        assert alone.strip() == f"{single.value.where}: {single.value.what}"
        assert f"{one}: {single.value.fix}" in error.fix
    more = ("federation.patience=2", "federation.valid_clients=3", "federation.valid_average=median")
    more += ("compare.target=0.5", "federation.robust={rule: median}", "federation.ranks=[1, 2]", "privacy.delta=0.5")
    more += ("federation.valid_every=2", "federation.schedule.least=2", "federation.memory=[1.0]")
    with pytest.raises(LichenError, match=r"and \d+ more"):
        read_recipe("digits", GOOD + keys + more)


@pytest.mark.parametrize(
    ("keys", "refused_here"),
    [
        (("privacy.delta=0.1",), True),
        (("privacy.delta=0.0999",), False),
        (("privacy.delta=0.0999", "data.partition.clients=11"), True),
        (("privacy.delta=0.3", "data.max_clients=3"), False),
        (("privacy.delta=0.4", "data.max_clients=3"), True),
        # How many there are is not known before the rows are read, or of a row it is another number.
        (("privacy.delta=0.5", "data.on_too_few_rows=drop"), False),
        (("privacy.delta=0.5", "data.min_rows=5"), False),
        (("privacy.delta=0.5", "data.partition={by: client}"), False),
        (("privacy.delta=0.5", "privacy.unit=row"), False),
    ],
)
def test_a_delta_that_publishes_a_client_is_refused_where_the_recipe_says_how_many(
    keys: tuple[str, ...], refused_here: bool
) -> None:
    if not refused_here:
        assert read_recipe("digits", GOOD + keys).privacy is not None
        return
    with pytest.raises(LichenError, match="published whole") as caught:
        read_recipe("digits", GOOD + keys)
    assert caught.value.where == "privacy.delta"


def test_privacy_of_rows_goes_with_more_than_that_of_clients() -> None:
    for more in (
        ("federation.weighting=rows",),
        ("federation.clients_per_round=3",),
        ("federation.history=true",),
        ("federation.robust={rule: median}",),
        ("wire={up: [int8], gate: 3.0}",),
        ("federation.schedule.least=2",),
        ("engine={name: spawned, nodes: 1}",),
        ("engine={name: distributed, nodes: 2}",),
    ):
        assert read_recipe("digits", (*GOOD, "privacy.unit=row", *more)).privacy is not None

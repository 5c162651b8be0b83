"""The pinned shape of ``summary.json``, and the two numbers that speak for the clients left behind."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen import cli
from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.present.report import summary_table
from lichen.present.summary import (
    check_summary,
    read_summary,
    share_gaining,
    stronger_alone,
    traffic_of,
    worst_decile,
)

SUMMARY: dict[str, Any] = {
    "name": "small-talk",
    "question": "Who gains?",
    "task": "chat",
    "metric": "perplexity",
    "higher_is_better": False,
    "columns": {
        "base": {"mean": 30.0, "worst_decile": 50.0},
        "alone": {"mean": 20.0, "worst_decile": 40.0},
        "federated": {"mean": 15.0, "worst_decile": 30.0},
        "pooled": None,
    },
    "extra_columns": {"alone, tuned": {"mean": 18.0, "worst_decile": 33.0}},
    "share_gaining": 0.9,
    "gaining_over": "alone",
    "gains": {
        "federated": {
            "alone": {
                "clients": 50,
                "gaining": 0.9,
                "harmed": 0.08,
                "mean": 2.5,
                "least": -0.5,
                "spread": 4.0,
                "p": 0.001,
                "by_rows": None,
            }
        }
    },
    "clients": 50,
    "bytes_up": 1_000_000,
    "bytes_down": 2_000_000,
    "traffic": {
        "rounds": 10,
        "trainings": 100,
        "client_up": 9000.0,
        "client_down": 9100.5,
        "up": 900_000.0,
        "down": 910_050.0,
        "validation": False,
        "valid_up": 100_000.0,
        "valid_down": 1_089_950.0,
        "validators": 50,
    },
    "attendance": {
        "invited": 110,
        "arrived": 107,
        "refused": {"shape": 2},
        "missing": 1,
        "skipped": 0,
        "causes": {"late": 1, "not admitted": 2},
    },
    "training": {
        "federated": {
            "rounds": 8,
            "of": 10,
            "kept": 6,
            "rows": 1600.0,
            "rows_there": 12_000,
            "passes": 0.13333,
            "share_seen": 0.12,
        },
        "alone": {
            "rounds": 10,
            "of": 10,
            "kept": None,
            "rows": 1600.0,
            "rows_there": 12_000,
            "passes": 0.13333,
            "share_seen": 0.12,
        },
    },
    "failures": [],
    "attack": None,
    "privacy": None,
    "masks": None,
    "seconds": 61.5,
    "peak_memory_bytes": 900_000_000,
    "energy_joules": 1234.5,
    "compute": {"training_flops": {"federated": 2e12}, "base_flops": 1.6e21, "base_source": "its model card"},
    "read": {
        "rows": 60,
        "clients": 2,
        "least": 30,
        "middle": 30,
        "largest": 30,
        "labels": {"a": 40, "b": 20},
        "lengths": None,
        "used": {"clients": 2, "train": 40, "valid": 6, "test": 12, "unlabelled": 0, "public": 0},
        "left": [{"why": "rows without text", "rows": 2, "clients": 0}],
        "copies": {"rows": 1, "test_rows": 12, "clients": 1},
        "alike": [],
    },
    "licences": {"CC-BY-4.0": 2},
    "cards": [],
    "cards_left": [],
    "seed": 0,
    "versions": {"torch": "2.13.0"},
    "recipe_sha256": "0" * 64,
    "extra": {"lr.federated": 0.001, "best_form": "chat", "forgotten": None},
}

KEYS = [
    *("name", "question", "task", "metric", "higher_is_better", "columns", "extra_columns", "share_gaining"),
    *(
        "gaining_over",
        "gains",
        "clients",
        "bytes_up",
        "bytes_down",
        "traffic",
        "attendance",
        "training",
        "failures",
        "attack",
        "privacy",
        "masks",
        "seconds",
        "peak_memory_bytes",
        "energy_joules",
        "compute",
        "read",
        "licences",
        "cards",
        "cards_left",
        "seed",
        "versions",
        "recipe_sha256",
        "extra",
    ),
]

MAY_LACK = ("gaining_over", "gains", "energy_joules", "traffic", "attendance", "training", "failures", "attack", "read")
MAY_LACK += ("privacy", "masks", "compute", "licences", "cards", "cards_left")


def test_the_keys_are_pinned() -> None:
    assert list(check_summary(SUMMARY)) == KEYS
    assert check_summary(SUMMARY) == SUMMARY
    assert list(check_summary(SUMMARY)["columns"]) == ["base", "alone", "federated", "pooled"]


def test_summaries_of_older_runs_lack_energy_and_traffic() -> None:
    older = {name: value for name, value in SUMMARY.items() if name not in MAY_LACK}
    missing = {
        "gaining_over": None,
        "gains": {},
        "energy_joules": None,
        "compute": None,
        "traffic": None,
        "attendance": None,
        "training": {},
        "failures": [],
        "attack": None,
        "read": None,
        "licences": {},
        "cards": [],
        "cards_left": [],
    }
    assert check_summary(older) == {**SUMMARY, **missing}
    with pytest.raises(LichenError, match="energy_joules"):
        check_summary({**SUMMARY, "energy_joules": -1.0})


@pytest.mark.parametrize("key", [key for key in KEYS if key not in MAY_LACK])
def test_no_key_may_be_missing(key: str) -> None:
    with pytest.raises(LichenError, match=f"{key} is missing"):
        check_summary({name: value for name, value in SUMMARY.items() if name != key})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("speed",), 1),
        (("columns", "best"), None),
        (("columns", "base", "median"), 1.0),
        (("columns", "base", "mean"), math.nan),
        (("columns", "base", "mean"), "1"),
        (("clients",), 1.5),
        (("traffic", "client_up"), -1.0),
        (("traffic", "rounds"), None),
        (("read", "used", "train"), -1),
        (("read", "rows"), "60"),
        (("clients",), -1),
        (("share_gaining",), 1.1),
        (("recipe_sha256",), "abc"),
        (("task",), "dance"),
        (("extra", "x"), [1]),
        (("extra", "x"), math.inf),
        (("higher_is_better",), 1),
    ],
)
def test_nothing_else_fits(path: tuple[str, ...], value: Any) -> None:
    summary = copy.deepcopy(SUMMARY)
    home = summary
    for step in path[:-1]:
        home = home[step]
    home[path[-1]] = value
    with pytest.raises(LichenError, match=r"\.".join(path)):
        check_summary(summary)


def test_reading_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="is not a run's folder"):
        read_summary(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(LichenError, match="the run is not finished") as caught:
        read_summary(tmp_path)
    assert f"lichen run --resume {tmp_path}" in caught.value.fix
    for bad in ("{", "[]", b"\xff"):
        (tmp_path / "summary.json").write_bytes(bad.encode() if isinstance(bad, str) else bad)
        with pytest.raises(LichenError):
            read_summary(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path) == read_summary(tmp_path / "summary.json") == SUMMARY


def report(clients: int, up: int, down: int, **metrics: float) -> Report:
    return Report(
        round=1,
        clients=tuple(range(clients)),
        metrics=metrics,
        tokens=0,
        bytes_up=clients * up,
        bytes_down=clients * down,
        seconds=1.0,
    )


def test_traffic_is_that_of_training_alone() -> None:
    quiet, empty = report(4, 100, 70, loss=1.0), report(0, 0, 0)
    loud = report(2, 1000, 1000, valid=1.0)
    assert traffic_of([quiet, empty, loud], up=5, down=6) == {
        "rounds": 3,
        "trainings": 6,
        "client_up": 100.0,
        "client_down": 70.0,
        "up": 605.0,
        "down": 426.0,
        "validation": False,
        "valid_up": None,
        "valid_down": None,
        "validators": None,
    }
    # A trace that holds validation's bytes apart needs no guess, and every round counts.
    judged = replace(loud, valid_up=700, valid_down=800)
    told = traffic_of([quiet, judged], up=5, validators=4)
    assert told is not None
    assert told["client_up"] == (quiet.bytes_up + loud.bytes_up - 700) / (len(quiet.clients) + len(loud.clients))
    assert told["up"] == quiet.bytes_up + loud.bytes_up - 700 + 5
    assert (told["valid_up"], told["valid_down"], told["validators"], told["validation"]) == (700, 800, 4, False)
    every = traffic_of([loud, loud])
    assert every is not None
    assert (every["client_up"], every["validation"]) == (1000.0, True)
    assert traffic_of([empty]) is None
    assert check_summary({**SUMMARY, "traffic": every})["traffic"] == every


scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(scores)
def test_worst_decile_lies_between_the_worst_and_the_mean(values: list[float]) -> None:
    mean, slack = math.fsum(values) / len(values), 1e-6
    assert min(values) - slack <= worst_decile(values, True) <= mean + slack
    assert mean - slack <= worst_decile(values, False) <= max(values) + slack
    assert worst_decile(values, True) == -worst_decile([-v for v in values], False)
    assert worst_decile(values, True) == worst_decile(values[::-1], True)


@pytest.mark.parametrize(("clients", "worst"), [(1, 0.0), (9, 0.0), (10, 0.0), (19, 0.0), (20, 0.5), (100, 4.5)])
def test_worst_decile_is_a_tenth_and_at_least_one(clients: int, worst: float) -> None:
    assert worst_decile([float(v) for v in range(clients)], True) == worst


def test_only_a_strict_gain_counts() -> None:
    assert share_gaining([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.0, 3.0], True) == 0.5
    assert share_gaining([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.0, 3.0], False) == 0.25


@given(scores)
def test_nobody_gains_over_the_same(values: list[float]) -> None:
    assert share_gaining(values, values, True) == share_gaining(values, values, False) == 0


def test_no_clients_have_no_score() -> None:
    for call in (lambda: worst_decile([], True), lambda: worst_decile([math.nan], True)):
        with pytest.raises(LichenError, match="finite score of every client"):
            call()
    for alone, federated in (([], []), ([1.0], [])):
        with pytest.raises(LichenError, match="do not pair"):
            share_gaining(alone, federated, True)


def hostile(name: str) -> str:
    """Summaries that nobody's run has written."""
    whole = json.dumps(SUMMARY)
    return {
        "empty": "",
        "no text": "\ud800",
        "deep": "[" * 100_000,
        "deep inside": whole.replace('"small-talk"', "[" * 50_000 + "]" * 50_000),
        "endless number": whole.replace("1000000", "1" * 100_000),
        "large number": whole.replace("1000000", "1" * 400),
        "large seed": whole.replace('"seed": 0', '"seed": ' + "9" * 300),
        "infinite": whole.replace("61.5", "1e999"),
        "not a number": whole.replace("61.5", "NaN"),
        "list": f"[{whole}]",
        "text": '"summary"',
        "null": "null",
        "name of numbers": whole.replace('"small-talk"', "[1, 2, 3]"),
        "columns of text": whole.replace('{"mean": 30.0, "worst_decile": 50.0}', '"30"'),
        "mean of truth": whole.replace("30.0", "true"),
        "another task": whole.replace('"chat"', '"cook"', 1),
        "unknown key": whole.replace('"seed"', '"sead"'),
        "surprise": whole[:-1] + ', "__class__": {}}',
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("empty", "no text", "deep", "deep inside", "endless number", "large number", "large seed", "infinite"),
        *("not a number", "list", "text", "null", "name of numbers", "columns of text", "mean of truth"),
        *("another task", "unknown key", "surprise"),
    ],
)
def test_a_strangers_summary_is_one_sentence(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_bytes(hostile(name).encode("utf-8", "surrogatepass"))
    with pytest.raises(LichenError) as caught:
        read_summary(tmp_path)
    assert str(tmp_path / "summary.json") in caught.value.where
    assert len(str(caught.value)) < 2500
    for more in ([], ["--json"]):
        assert cli.main(["report", str(tmp_path), *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 2


def test_a_summary_that_is_no_plain_file_or_too_large(tmp_path: Path) -> None:
    for name in ("pipe", "large", "folder"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "summary.json")
    with pytest.raises(LichenError, match="no plain file"):  # and does not wait for a writer
        read_summary(tmp_path / "pipe")
    (tmp_path / "folder" / "summary.json").mkdir()
    with pytest.raises(LichenError, match="no plain file"):
        read_summary(tmp_path / "folder")
    with open(tmp_path / "large" / "summary.json", "wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(LichenError, match="larger than 16 MiB"):
        read_summary(tmp_path / "large")


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e308, -1e308])
def test_any_number_that_fits_is_shown(tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    whole = copy.deepcopy(SUMMARY)
    whole["columns"]["base"] = {"mean": value, "worst_decile": value}
    whole["extra"] = {"x": value}
    whole["seconds"] = whole["energy_joules"] = abs(value)
    whole["bytes_up"] = whole["bytes_down"] = whole["peak_memory_bytes"] = whole["clients"] = 2**63 - 1
    (tmp_path / "summary.json").write_text(json.dumps(whole))
    assert cli.main(["report", str(tmp_path)]) == 0
    assert cli.main(["report", str(tmp_path), str(tmp_path)]) == 0
    assert "small-talk" in capsys.readouterr().out


@pytest.mark.parametrize("higher", [True, False])
def test_the_federation_is_held_against_the_stronger_column_of_training_alone(higher: bool) -> None:
    worse, better = ([0.4, 0.6], [0.9, 0.3]) if higher else ([0.9, 0.3], [0.4, 0.6])
    joined = {"federated": [1.0, 1.0], "pooled": [2.0, 2.0]}
    assert stronger_alone({**joined, "alone": worse, "alone_best": better}, higher) == "alone_best"
    assert stronger_alone({**joined, "alone": better, "alone_best": worse}, higher) == "alone"
    assert stronger_alone({**joined, "alone_best": worse}, higher) == "alone_best"
    assert stronger_alone({**joined, "alone": [float("nan"), 1.0], "alone_best": worse}, higher) == "alone_best"
    nobody = [float("nan")]
    found = stronger_alone({**joined, "alone": nobody + worse, "alone_best": nobody + better}, higher)
    assert found == "alone_best", "who has no score in either has no say"
    assert stronger_alone(joined, higher) is None


def test_a_table_names_what_gains_are_held_against_and_puts_the_two_pair_of() -> None:
    scores = {"alone_best": {"mean": 17.0, "worst_decile": 35.0}, "majority": {"mean": 90.0, "worst_decile": 99.0}}
    table = summary_table(check_summary({**SUMMARY, "extra_columns": scores, "gaining_over": "alone_best"}))
    names = [str(cell) for cell in table.columns[0].cells]
    assert names[:5] == ["base", "alone", "alone_best", "federated", "majority"]
    assert "clients gaining over alone_best" in names

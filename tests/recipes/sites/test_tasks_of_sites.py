"""Every task over sites with a file each: rounds, heads and scores are those of a simulation over a folder of all.

The sites are threads here; :mod:`test_own_rows` has processes, and looks at what each opens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.data.sources.records import load_records
from lichen.present.clients import read_clients
from lichen.recipes.assemble import loaded_model
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.open_site import open_site
from support.site_threads import sites_in_threads
from support.sites import SITES, save_sites, sites_recipe

DIGITS = ("a.jsonl", "b.csv", "c.jsonl")
STUDENTS = ("text-cnn", "transformer", "image-mlp", "image-cnn")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with sites_in_threads():
        yield


def save_digits(home: Path) -> tuple[Path, ...]:
    """Ten clients' digits in three files."""
    home.mkdir()
    rows = [
        {"who": f"client-{at % 10}", "pixels": one.features[0].tolist(), "digit": one.label}  # type: ignore[index]
        for at, one in enumerate(load_records("digits")[:200])
    ]
    for name, own in zip(DIGITS, ((0, 3, 7), (9, 1), (8, 2, 4, 5, 6)), strict=True):
        mine = [row for row in rows if int(str(row["who"])[-1]) in own]
        if name.endswith(".csv"):
            lines = ["who,pixels,digit", *(f'{row["who"]},"{row["pixels"]}",{row["digit"]}' for row in mine)]
        else:
            lines = [json.dumps(row) for row in mine]
        (home / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tuple(home / name for name in DIGITS)


def students(home: Path, kind: str) -> dict[str, Any]:
    """A recipe of two learning rates over the folder ``home/sites``."""
    texts = kind in ("text-cnn", "transformer")
    columns = {"text": "said", "label": "mood"} if texts else {"client": "who", "numbers": "pixels", "label": "digit"}
    return {
        "name": "students",
        "task": "classify",
        "model": {"student": {"kind": kind, "width": 8}},
        "data": {"name": str(home / "sites"), "columns": columns, "max_length": 16, "valid": 0.2, "test": 0.2},
        "optimizer": {"name": "sgd", "lr": [0.1, 0.3]},
        "federation": {"rounds": 2, "local_steps": 2, "batch_size": 4, "aggregate": "mean", "clients_per_round": 2},
        "compare": {"baselines": ["alone"] if kind == "image-mlp" else []},
    }


def oneshot(home: Path, head: str) -> dict[str, Any]:
    made = sites_recipe(home, "label", compare={"baselines": ["alone"]})
    kept = {key: made[key] for key in ("name", "data", "compare")}
    return {**kept, "task": "oneshot", "model": {"name": made["model"]["name"], **({"head": head} if head else {})}}


def apart(whole: Mapping[str, Any]) -> Recipe:
    """The same, of rows that nobody but the sites knows where to find."""
    return read_recipe({**whole, "engine": {"name": "spawned"}, "data": {**whole["data"], "name": "/nowhere"}})


def learned(run: Path) -> dict[str, bytes]:
    """All that was learned at every learning rate, and who took part."""
    patterns = ("state/*/*/server.safetensors", "model/*.safetensors", "state/final.safetensors", "roster.json")
    return {str(file.relative_to(run)): file.read_bytes() for pattern in patterns for file in run.glob(pattern)}


def assert_same(home: Path) -> None:
    """The runs ``home/local`` and ``home/apart`` are the same."""
    local, sites = learned(home / "local"), learned(home / "apart")
    assert local.keys() == sites.keys()
    assert local == sites
    mine, other = (run.summary for run in lichen.report(home / "local", home / "apart").runs)
    for columns in ("columns", "extra_columns"):
        for name in other[columns].keys() - {"majority"}:
            assert (mine[columns][name] is None) == (other[columns][name] is None)
            assert (mine[columns][name] or {}).get("mean") == (other[columns][name] or {}).get("mean")
    assert mine["traffic"] == other["traffic"]


@pytest.mark.parametrize("kind", STUDENTS)
def test_students_of_sites_are_those_of_a_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = kind in ("text-cnn", "transformer")
    files = save_sites(tmp_path / "sites", "label") if texts else save_digits(tmp_path / "sites")
    if texts:
        sites_recipe(tmp_path, "label")  # a tokenizer that needs no download
        monkeypatch.setattr(loaded_model, "STUDENT_TOKENIZER", str(tmp_path / "model"))
    whole = students(tmp_path, kind)
    lichen.run(whole, out=tmp_path / "local")
    lichen.run(apart(whole), out=tmp_path / "apart", sites=dict(zip(SITES if texts else DIGITS, files, strict=True)))
    assert_same(tmp_path)
    both = learned(tmp_path / "apart")
    assert sum("federated" in name for name in both) == 2
    assert any(name.startswith("model/") for name in both)
    members = json.loads(both["roster.json"])["members"]
    assert len(members) == (3 if texts else 10)
    assert {member["group"] for member in members} == {"tokens" if texts else "1 8 8"}


def test_sites_of_other_shapes_are_told_apart_by_their_clients(tmp_path: Path) -> None:
    files = save_digits(tmp_path / "sites")
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    files[0].write_text(
        "".join(json.dumps({**row, "pixels": [x for line in row["pixels"] for x in line]}) + "\n" for row in lines)
    )
    with pytest.raises(LichenError, match=r"rows of 2 groups.*client-.* of ") as told:
        lichen.run(
            apart(students(tmp_path, "image-mlp")), out=tmp_path / "run", sites=dict(zip("abc", files, strict=True))
        )
    assert told.value.where == "roster"


@pytest.mark.parametrize("head", ["", "lda"])
def test_a_head_of_sites_is_that_of_a_folder(head: str, tmp_path: Path) -> None:
    files = dict(zip(SITES, save_sites(tmp_path / "sites", "label"), strict=True))
    whole = oneshot(tmp_path, head)
    lichen.run(whole, out=tmp_path / "local")

    class StoppedError(Exception):
        pass

    def stop(event: object) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):  # when the head is there, and nothing else
        lichen.run(apart(whole), out=tmp_path / "apart", sites=files, observers=[stop])
    assert not (tmp_path / "apart/model").exists()
    resumed = lichen.run(apart(whole), out=tmp_path / "apart", sites=files, resume=True)
    assert_same(tmp_path)
    assert resumed.summary["columns"]["alone"] is not None
    assert resumed.summary["columns"]["pooled"] is None
    mine, other = (run.summary["extra"] for run in lichen.report(tmp_path / "local", tmp_path / "apart").runs)
    assert {name: value for name, value in mine.items() if not name.startswith("partitions")} == other
    lines = [(tmp_path / name / "trace.jsonl").read_text().splitlines() for name in ("local", "apart")]
    assert [len(some) for some in lines] == [1, 1]


def test_a_server_alone_solves_for_the_head_too(tmp_path: Path) -> None:
    save_sites(tmp_path / "sites", "label")
    whole = oneshot(tmp_path, "")
    whole["data"]["classes"] = ["glad", "calm", "sad"]
    lichen.run(whole, out=tmp_path / "local")
    spawned = read_recipe({**whole, "engine": {"name": "spawned"}})
    lichen.run(spawned, out=tmp_path / "apart", server_alone=True)
    assert_same(tmp_path)
    lichen.run(spawned, out=tmp_path / "spawned")  # a server with rows, whose nodes send the statistics
    assert learned(tmp_path / "spawned") == learned(tmp_path / "local")
    unnamed = read_recipe({**oneshot(tmp_path, ""), "engine": {"name": "spawned"}})
    with pytest.raises(LichenError, match="does not know the classes") as told:
        lichen.run(unnamed, out=tmp_path / "unnamed", server_alone=True)
    assert told.value.where == "data.classes"


def test_what_a_head_needs_of_everybody_is_refused_by_its_key(tmp_path: Path) -> None:
    file = save_sites(tmp_path / "sites", "label")[0]
    for key, value in {"compare.baselines": ["alone", "pooled"], "compare.partitions": 20}.items():
        whole = oneshot(tmp_path, "")
        whole["compare"] = {**whole["compare"], key.removeprefix("compare."): value}
        with pytest.raises(LichenError, match="everybody's rows") as told:
            open_site(apart(whole), file)
        assert told.value.where == key
        assert told.value.fix
        with pytest.raises(LichenError, match="everybody's rows"):
            lichen.run(apart(whole), out=tmp_path / "run", sites={"one": file})
    assert not (tmp_path / "run").exists()


def test_masked_rounds_of_sites_have_the_bytes_of_open_ones_in_one_process(tmp_path: Path) -> None:
    """Clients of one site, and of several, mask with one another; of their scores the server learns how they lie."""
    files = save_digits(tmp_path / "sites")
    whole = students(tmp_path, "image-mlp")
    whole["federation"]["clients_per_round"] = 6
    whole["compare"] = {"baselines": []}
    lichen.run(whole, out=tmp_path / "local")
    masked = apart({**whole, "privacy": {"secure": True}})
    summary = lichen.run(masked, out=tmp_path / "apart", sites=dict(zip(DIGITS, files, strict=True))).summary
    local, sites = learned(tmp_path / "local"), learned(tmp_path / "apart")
    name = "state/final.safetensors"
    assert local[name] == sites[name]
    assert summary["masks"]["simulated"] == []
    assert {row["federated"] for row in read_clients(tmp_path / "apart")} == {None}
    scores = sorted(row["federated"] for row in read_clients(tmp_path / "local"))
    found = summary["columns"]["federated"]
    assert found["mean"] == pytest.approx(math.fsum(scores) / 10, abs=10 * 2.0**-24)
    assert found["worst_decile"] == pytest.approx(scores[0], abs=0.0026)  # half a bin
    assert summary["masks"]["deciles"]["federated"] == pytest.approx(scores[:9], abs=0.0026)
    assert summary["columns"]["alone"] is None


@pytest.mark.parametrize("head", ["", "lda"])
def test_a_head_from_masked_statistics_is_that_from_open_ones(head: str, tmp_path: Path) -> None:
    save_sites(tmp_path / "sites", "label")
    whole = oneshot(tmp_path, head)
    lichen.run(whole, out=tmp_path / "open")
    summary = lichen.run({**whole, "privacy": {"secure": True}}, out=tmp_path / "masked").summary
    name = "model/head.safetensors"
    assert (tmp_path / "masked" / name).read_bytes() == (tmp_path / "open" / name).read_bytes()
    assert summary["masks"]["clients"] == 3


def test_scores_of_heads_are_summed_under_masks_at_sites(tmp_path: Path) -> None:
    """Heads, shared and own, and the constant answer are scored as in the open, of all clients together."""
    files = save_sites(tmp_path / "sites", "label")
    whole = oneshot(tmp_path, "")
    opened = lichen.run(whole, out=tmp_path / "open").summary
    masked = {**whole, "privacy": {"secure": True}}
    summary = lichen.run(apart(masked), out=tmp_path / "apart", sites=dict(zip(SITES, files, strict=True))).summary
    for name in ("federated", "alone"):
        assert summary["columns"][name]["mean"] == pytest.approx(opened["columns"][name]["mean"], abs=1e-6)
        assert summary["columns"][name]["worst_decile"] is None  # three clients are not counted in bins
    assert summary["extra_columns"]["majority"]["mean"] == pytest.approx(
        opened["extra_columns"]["majority"]["mean"], abs=1e-6
    )
    for key, value in opened["extra"].items():
        if key.startswith("partitions"):
            continue
        assert summary["extra"][key] == (pytest.approx(value) if isinstance(value, float) else value), key

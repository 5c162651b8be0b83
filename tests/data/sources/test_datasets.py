"""A data set of another package, by the example of wine: one file and an entry point, from a recipe to a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.data.sources.datasets import declared_datasets
from lichen.data.sources.records import load_records
from lichen.recipes.schema.read import read_recipe

EXAMPLE = Path(__file__).parents[3] / "examples" / "extending"
RECIPE = {
    "name": "cultivars",
    "task": "classify",
    "model": {"student": {"kind": "image-mlp", "width": 16}},
    "data": {"name": "wine", "partition": {"by": "dirichlet", "clients": 4, "alpha": 5.0}, "test": 0.3},
    "optimizer": {"name": "sgd", "lr": 0.5},
    "federation": {"rounds": 8, "local_steps": 8, "batch_size": 8},
    "compare": {"baselines": [], "metric": "accuracy"},
}


def register(site: Path, package: str = "third-party", **entries: str) -> Path:
    """What installing a package leaves: its entry points."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lichen.datasets]", *lines]) + "\n")
    return site


@pytest.fixture
def wine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.syspath_prepend(register(tmp_path / "site", wine="wine:WINE", digits="wine:NONE"))
    monkeypatch.delitem(sys.modules, "wine", raising=False)


@pytest.mark.usefixtures("wine")
def test_a_recipe_names_it_and_a_run_learns_from_it(tmp_path: Path) -> None:
    summary = lichen.run(RECIPE, out=tmp_path / "run").summary
    assert summary["columns"]["federated"]["mean"] > 0.8, "four of ten wines are of the largest cultivar"


@pytest.mark.usefixtures("wine")
def test_it_is_known_by_name_and_imported_only_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(declared_datasets()) == ["wine"], "digits stays the catalog's"
    assert cli.main(["list"]) == 0
    assert "of another package: wine:WINE" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    Path("wine").mkdir()
    assert read_recipe(RECIPE).data.name == "wine", "a folder of that name beside the recipe is not meant"
    assert "wine" not in sys.modules
    records = load_records("wine")
    assert len(records) == 178
    assert {record.label for record in records} == {"cultivar 1", "cultivar 2", "cultivar 3"}
    assert records[0].features is not None
    assert records[0].features.shape == (13,)
    with pytest.raises(LichenError, match="wine has no columns to choose"):
        load_records("wine", columns={"label": "kind"})
    with pytest.raises(LichenError, match="joins no columns"):
        load_records("wine", columns={"text": ["a", "b"]})
    with pytest.raises(LichenError) as caught:
        load_records("./nothing.csv")
    assert "wine" in caught.value.fix


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("raise RuntimeError('no network')", "cannot be read: RuntimeError: no network"),
        ("SET = 5", "is no Dataset"),
        ("SET = Dataset(name='other', read=lambda columns: [])", "is a data set called 'other'"),
        ("SET = Dataset(name='mine', read=lambda columns: [])", "gives no rows"),
        ("SET = Dataset(name='mine', read=lambda columns: [{'text': 'a'}])", "gives rows that are no Record"),
        ("SET = Dataset(name='mine', read=lambda columns: 1 / 0)", "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, what: str
) -> None:
    site = register(tmp_path / "site", mine="wrong_set:SET")
    (site / "wrong_set.py").write_text(f"from lichen.data.sources.datasets import Dataset\n{source}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "wrong_set", raising=False)
    with pytest.raises(LichenError, match="mine = wrong_set:SET") as caught:
        load_records("mine")
    assert what in caught.value.what
    assert caught.value.fix


def test_one_name_of_two_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = register(tmp_path / "site", "first", mine="one:SET")
    monkeypatch.syspath_prepend(register(site, "second", mine="two:SET"))
    with pytest.raises(LichenError, match="two packages declare the data set 'mine'"):
        load_records("mine")

"""Sites under privacy train and answer nothing else, and one key gives the bytes of a simulation over all rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.recipes.tasks.test_private_recipe import EndError

import lichen
from lichen.core.errors import LichenError
from lichen.core.secret.budget import Budget, begun_with
from lichen.data.sources.records import load_records
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.announced import Assignment
from lichen.recipes.sites.open_site import open_site
from lichen.recipes.sites.rounds_node import RoundsNode
from support.site_threads import sites_in_threads

SITES = {"a.jsonl": (0, 3), "b.jsonl": (1,), "c.jsonl": (2, 4, 5)}
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with sites_in_threads():
        yield


def save_digits(home: Path) -> dict[str, Path]:
    """Six clients' digits in three files."""
    home.mkdir()
    for name, own in SITES.items():
        rows = [
            {"who": f"client-{at % 6}", "pixels": one.features[0].tolist(), "digit": one.label}  # type: ignore[index]
            for at, one in enumerate(load_records("digits")[:150])
            if at % 6 in own
        ]
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: home / name for name in SITES}


def private(home: Path) -> dict[str, Any]:
    return {
        "name": "private",
        "task": "classify",
        "model": {"student": {"kind": "image-mlp", "width": 8}},
        "data": {
            "name": str(home / "sites"),
            "columns": {"client": "who", "numbers": "pixels", "label": "digit"},
            "valid": 0.2,
            "test": 0.2,
        },
        "optimizer": {"name": "sgd", "lr": [0.1]},
        "federation": {
            **{"rounds": 2, "local_steps": 2, "batch_size": 4, "aggregate": "mean", "weighting": "uniform"},
            **{"sampling": "poisson", "clients_per_round": 3},
        },
        "compare": {"baselines": []},
        "privacy": {"sigma": 2.0, "delta": 1e-2, "clip": 0.5},
    }


def apart(whole: dict[str, Any], **more: Any) -> Recipe:
    """The same, of rows that nobody but the sites knows where to find."""
    return read_recipe({**whole, "engine": {"name": "spawned"}, "data": {**whole["data"], "name": "/nowhere"}, **more})


def with_key(out: Path, *, inside: str = "state") -> Path:
    """A folder that has nothing but the key."""
    (out / inside).mkdir(parents=True)
    (out / inside / "privacy.key").write_bytes(KEY)
    (out / inside / "privacy.key").chmod(0o600)
    return out


def test_sites_train_and_answer_nothing_else(tmp_path: Path) -> None:
    sites, whole = save_digits(tmp_path / "sites"), private(tmp_path)
    local = lichen.run(whole, out=with_key(tmp_path / "local"), resume=True).summary
    away = lichen.run(apart(whole), out=with_key(tmp_path / "apart"), resume=True, sites=sites).summary
    finals = [(tmp_path / name / "state" / "final.safetensors").read_bytes() for name in ("local", "apart")]
    assert finals[0] == finals[1]
    assert local["columns"]["federated"] is not None
    assert away["columns"]["federated"] is None
    assert away["privacy"]["statement"] == local["privacy"]["statement"]
    assert away["privacy"]["simulated"] == []
    assert away["privacy"]["statement"] in str(lichen.report(tmp_path / "apart"))


ROWS = {
    "federation": {"rounds": 3, "local_steps": 2, "batch_size": 4, "aggregate": "mean", "weighting": "rows"},
    "privacy": {"unit": "row", "sigma": 1.0, "clip": 0.5},
}


def accounts(run: Path) -> dict[str, int]:
    """Charges of every client of every site."""
    found = {}
    for path in sorted(run.glob("state/sites/*/accounts/*.jsonl")):
        terms = begun_with(path)
        assert terms is not None
        found[path.stem] = Budget(path, terms=terms, gaps=True).charges
    return found


def test_sites_hide_their_rows_by_keys_of_their_own_and_pay_for_themselves(tmp_path: Path) -> None:
    sites, whole = save_digits(tmp_path / "sites"), {**private(tmp_path), **ROWS}
    local = lichen.run(whole, out=with_key(tmp_path / "local"), resume=True).summary
    run, other = tmp_path / "apart", tmp_path / "other"
    for at in range(len(sites)):
        with_key(run / "state" / "sites" / f"{at:03d}", inside=".")

    def end(event: Any) -> None:
        if event.report.round == 2:
            raise EndError

    with pytest.raises(EndError):
        lichen.run(apart(whole), out=run, resume=True, sites=sites, observers=[end])
    away = lichen.run(apart(whole), out=run, resume=True, sites=sites).summary
    finals = [(folder / "state" / "final.safetensors").read_bytes() for folder in (tmp_path / "local", run)]
    assert finals[0] == finals[1]
    # The server has paid for the second round twice. A site answered it from its disk, so that nothing new has left.
    assert (local["privacy"]["charges"], away["privacy"]["charges"]) == (3, 4)
    assert accounts(run) == {f"{client:06d}": 3 for client in range(6)}
    lichen.run(apart(whole), out=other, sites=sites)
    keys = [path.read_bytes() for path in sorted(other.glob("state/sites/*/privacy.key"))]
    assert len(set(keys)) == len(sites)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in other.glob("state/sites/*/privacy.key"))
    assert not (other / "state" / "privacy.key").exists()


def test_a_site_takes_no_bounds_that_would_make_its_noise_smaller(tmp_path: Path) -> None:
    sites, whole = save_digits(tmp_path / "sites"), {**private(tmp_path), **ROWS}
    site = open_site(apart(whole), sites["b.jsonl"])
    (rows,) = (member.rows["train"] for member in site.announcement.members)
    labels = tuple(map(str, site.announcement.labels))

    def rate(bounds: tuple[int, int] | None) -> float:
        place = Assignment(numbers=(1,), clients=6, labels=labels, bounds=bounds)
        node = site.join(place, tmp_path / "state").node
        assert isinstance(node, RoundsNode)
        assert node.accounts is not None
        return node.accounts.found.rate

    for bounds in ((rows + 1, rows + 2), (1, rows - 1), None):
        with pytest.raises(LichenError, match="noise would be too small"):
            rate(bounds)
    assert rate((rows, rows)) == pytest.approx(4 / rows)
    assert rate((rows // 2, rows)) == pytest.approx(4 / (rows // 2))


@pytest.mark.parametrize(
    ("change", "key"),
    [({"compare": {"baselines": ["alone"]}}, "compare.baselines"), ({"privacy": {"seed": 1}}, "privacy.seed")],
)
def test_sites_are_not_asked_for_scores_nor_for_noise_that_everybody_knows(
    change: dict[str, Any], key: str, tmp_path: Path
) -> None:
    sites, whole = save_digits(tmp_path / "sites"), private(tmp_path)
    recipe = apart(whole, **{name: {**whole[name], **value} for name, value in change.items()})
    with pytest.raises(LichenError) as caught:
        lichen.run(recipe, out=tmp_path / "run", sites=sites)
    assert str(caught.value).startswith(f"{key}: ")

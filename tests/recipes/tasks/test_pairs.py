"""FedDPA and FedALT from recipe to table: a shared and an own adapter side by side, and what of it leaves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.present.clients import read_clients
from lichen.recipes.schema.read import read_recipe
from support.own_runs import kept, made, save_home, scores
from support.site_threads import sites_in_threads
from support.sites import SITES, save_sites, sites_recipe

CLIENTS = 5
TURNS = {"kind": "feddpa", "in_turns": True}
UNIFORM = {"rounds": 3, "clients_per_round": CLIENTS, "local_steps": 3, "batch_size": 4, "weighting": "uniform"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_home(tmp_path_factory.mktemp("pairs"), clients=CLIENTS)


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> lichen.Result:
    return lichen.run(made(home, None), out=tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("personal", [TURNS, {"kind": "feddpa", "steps": [2, 4]}], ids=["in turns", "afterwards"])
def test_without_a_cap_the_pair_is_the_shared_model_which_stays_what_it_was(
    home: Path, tmp_path: Path, plain: lichen.Result, personal: dict[str, Any]
) -> None:
    label = "federated.personal" if "in_turns" in personal else "personal"
    none = lichen.run(made(home, {**personal, "cap": 0.0}), out=tmp_path / "none")
    some = lichen.run(made(home, {**personal, "cap": 0.5}), out=tmp_path / "some")
    constant = lichen.run(made(home, {**personal, "cap": 0.5, "anchors": 0}), out=tmp_path / "constant")
    shared, own = scores(none, "federated"), scores(none, label)
    assert torch.allclose(shared["loss_sum"], own["loss_sum"], rtol=1e-5)
    assert torch.equal(shared["loss_sum"], scores(plain, "federated")["loss_sum"])
    for run in (none, some, constant):
        file = "state/final.safetensors"
        assert (run.folder / file).read_bytes() == (plain.folder / file).read_bytes()
        assert run.summary["bytes_up"] == plain.summary["bytes_up"]
    different = [scores(run, label)["loss_sum"] for run in (none, some, constant)]
    assert all(bool((a != b).all()) for a, b in itertools.pairwise(different))


def test_own_rows_are_remembered_by_their_sum_alone(home: Path, tmp_path: Path) -> None:
    run = lichen.run(made(home, {**TURNS, "anchors": 5}, federation=UNIFORM), out=tmp_path / "run")
    mine = kept(run, "federated", 3, "mine/")
    assert mine["anchors"].shape[0] == CLIENTS
    assert mine["anchors_seen"].tolist() == [5] * CLIENTS
    assert bool((mine["anchors"].norm(dim=1) <= 5 + 1e-4).all())
    assert not {name for name in mine if not name.startswith(("params/", "opt/", "anchors"))}


def test_nobody_begins_at_the_mean_and_each_is_beside_the_mean_of_the_others(home: Path, tmp_path: Path) -> None:
    run = lichen.run(made(home, {"kind": "fedalt"}, federation=UNIFORM), out=tmp_path / "run")
    first, second = (
        kept(run, "federated", 1, "mine/params/"),
        kept(run, "federated", 2, "mine/other/"),
    )
    assert second
    for name, other_C in second.items():
        rest_C = torch.stack([first[name][torch.arange(CLIENTS) != c].mean(0) for c in range(CLIENTS)])
        assert torch.allclose(other_C, rest_C, atol=1e-6), name
    state = load_state(next((run.folder / "state/federated").glob("*/server.safetensors")))
    last = kept(run, "federated", 3, "mine/params/")
    for name, mean in state.shared.trainable.items():
        assert torch.allclose(mean, last[name].mean(0), atol=1e-6), name
    gates = [x for name, x in last.items() if name.endswith("lora_gate")]
    assert gates
    assert all(bool((x.flatten(1).abs().amax(1) > 0).all()) for x in gates)
    assert not any("lora_gate" in name for name in state.shared.trainable)


@pytest.mark.parametrize(
    "personal", [TURNS, {"kind": "feddpa", "steps": [2], "anchors": 0}, {"kind": "fedalt"}, {"kind": "apfl"}], ids=str
)
def test_sites_have_the_scores_of_a_simulation(tmp_path: Path, personal: dict[str, Any]) -> None:
    files = save_sites(tmp_path / "sites", "pair")
    fed = {"rounds": 2, "local_steps": 2, "weighting": "uniform"}
    more = {"engine": {"packing": False}, "federation": fed, "personal": personal}
    local = lichen.run(sites_recipe(tmp_path, "pair", **more), out=tmp_path / "local")
    with sites_in_threads():
        there = sites_recipe(tmp_path, "pair", **{**more, "engine": {"packing": False, "name": "spawned"}})
        apart = lichen.run(there, out=tmp_path / "apart", sites=dict(zip(SITES, files, strict=True)))
    assert apart.summary["extra_columns"]["personal"] == local.summary["extra_columns"]["personal"]
    # Each site has its own clients' models, of the very bytes that the simulation exports, and nobody else's.
    names = [row["client"] for row in read_clients(local.folder)]
    folders = [path for path in apart.folder.rglob("own") if "own" not in path.parent.parts]
    there = {path.name: path for folder in folders for path in folder.iterdir()}
    assert len(folders) == len(SITES)
    assert there.keys() == set(names)
    for name in names:
        mine = lichen.export(local.folder, client=name)
        assert there[name].stat().st_mode & 0o077 == 0
        for file in mine.rglob("*.safetensors"):
            assert (there[name] / file.relative_to(mine)).read_bytes() == file.read_bytes()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no LoRA": (
        {"personal": {"kind": "feddpa"}, "model": {"adapter": {"kind": "ia3", "target_modules": ["k_proj"]}}},
        "personal.kind",
        "kind: lora",
    ),
    "a growing patch": ({"personal": TURNS, "federation": {"aggregate": "fedex"}}, "aggregate", "fedit or mean"),
    "weights": ({"personal": {"kind": "fedalt"}}, "federation.weighting", "uniform"),
    "a median": (
        {"personal": {"kind": "fedalt"}, "federation": {"weighting": "uniform", "robust": {"rule": "median"}}},
        "robust",
        "",
    ),
    "momentum": (
        {"personal": {"kind": "fedalt"}, "federation": {"weighting": "uniform", "server": {"momentum": 0.9}}},
        "federation.server",
        "no momentum",
    ),
    "steps in turns": ({"personal": {**TURNS, "steps": [3]}}, "personal.steps", "in_turns"),
    "a cap of another": ({"personal": {"kind": "ditto", "cap": 0.3}}, "personal.cap", "feddpa"),
    "values": (
        {"personal": {"kind": "fedalt"}, "federation": {"weighting": "uniform"}, "value": {"kind": "gtg"}},
        "value",
        "feddpa",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_go_with_is_refused(home: Path, case: str) -> None:
    sections, where, fix = REFUSED[case]
    adapter = sections.get("model", {}).get("adapter")
    rest = {key: value for key, value in sections.items() if key not in ("model", "personal")}
    known = made(home, sections["personal"], **rest)
    if adapter is not None:
        known = {**known, "model": {**known["model"], "adapter": adapter}}
    with pytest.raises(LichenError) as caught:
        read_recipe(known)
    assert where in str(caught.value)
    assert fix in str(caught.value)


def test_one_client_in_a_round_has_no_rest_of_the_world(home: Path, tmp_path: Path) -> None:
    federation = {**UNIFORM, "clients_per_round": 1}
    with pytest.raises(LichenError, match=r"clients_per_round"):
        lichen.run(made(home, {"kind": "fedalt"}, federation=federation), out=tmp_path / "run")

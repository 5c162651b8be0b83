"""A site's work in a run, by its policy: what it says to recipes, what it keeps back, and that nothing else changes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.message import Job, pack_job
from lichen.core.wire.frames import frame_head
from lichen.core.wire.shared import Shared
from lichen.engines.remote.errands import CHILDREN, Patience
from lichen.engines.remote.pieces import ask_long
from lichen.engines.remote.requests import HAND, pack_values, unpack_outcomes, unpack_values
from lichen.engines.sites import Seen, SiteError
from lichen.federation.host import SiteHost
from lichen.federation.kits.members import ABOUT, SERVER, key_of, read_federation, signer_of
from lichen.federation.policy.keys import change_policy
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.schema.read import gallery, read_recipe, recipe_sha256
from lichen.recipes.sites.open_server import needs_rows
from lichen.recipes.sites.remote_sites import RemoteSites
from support.sites import SITES, save_sites, sites_recipe


class Hosts:
    """Three sites in this process; :class:`lichen.engines.sites.Sites`."""

    def __init__(self, home: Path, files: tuple[Path, ...], **policy: str) -> None:
        self.home, self.files = home, dict(zip(SITES, files, strict=True))
        self.lines: dict[str, list[str]] = {name: [] for name in SITES}
        self.hosts: dict[str, SiteHost] = {}
        self.secrets: dict[str, Path] = {}
        self.before: Callable[[str, bytes], bytes] = lambda kind, body: body
        for name in SITES:
            self.kit(name).mkdir(parents=True)
            self.allow(name, **policy)
            self.restart(name)

    def kit(self, name: str) -> Path:
        return self.home / "kits" / name

    def allow(self, name: str, **policy: str) -> None:
        change_policy(self.kit(name) / "policy.yaml", [f"{key}={value}" for key, value in policy.items()])

    def start(self) -> None:
        """Nothing: they are there."""

    def restart(self, name: str) -> None:
        """Start a site, as if its process were a new one."""
        if name in self.hosts:
            self.hosts[name].close()
        self.hosts[name] = SiteHost(
            self.kit(name), self.files[name], secret=self.secrets.get(name), say=self.lines[name].append
        )

    def seen(self) -> dict[str, Seen]:
        now = time.time()
        return {name: Seen(since=now, last=now, instance=str(id(host))) for name, host in self.hosts.items()}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        try:
            return self.hosts[site].answer(kind, self.before(kind, body))
        except LichenError as error:
            raise SiteError(site, "refused", error) from None

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    made = list[Hosts]()

    def make(shape: Any = "pair", **policy: str) -> Hosts:
        files = save_sites(tmp_path / "sites", shape)
        sites_recipe(tmp_path, shape)
        made.append(Hosts(tmp_path, files, **{"models": str(tmp_path / "model"), **policy}))
        return made[0]

    yield make
    for one in made:
        one.close()


def submitted(home: Path, shape: Any = "pair", **more: Any) -> dict[str, Any]:
    """A recipe of three rounds that each need two clients, over rows that nobody but the sites knows where to find."""
    fed = {"schedule": {"least": 2}, **more.pop("federation", {})}
    whole = sites_recipe(home, shape, federation=fed, **more)
    whole["data"]["name"] = "/nowhere"
    return whole


def submit(hosts: Hosts, recipe: dict[str, Any], out: str = "run", **how: Any) -> lichen.Result:
    federation = read_federation(federation_in(hosts.home))
    patience = Patience(gone=5.0, quiet=5.0, within=5.0)
    sites = RemoteSites(hosts, SITES, patience=patience, signer=signer_of(federation))
    return lichen.run(recipe, out=hosts.home / out, sites=sites, **how)


def federation_in(home: Path) -> Path:
    """What `lichen federation new` says of a federation, without its authority."""
    (home / "trial" / SERVER).mkdir(parents=True, exist_ok=True)
    about = {"name": "trial", "host": "here", "port": 1, "fingerprint": "SHA256:00"}
    (home / "trial" / ABOUT).write_text(json.dumps(about))
    return home / "trial"


def learned(run: Path) -> dict[str, bytes]:
    patterns = ("state/*/*/server.safetensors", "adapter/*.safetensors", "state/final.safetensors", "roster.json")
    return {str(file.relative_to(run)): file.read_bytes() for pattern in patterns for file in run.glob(pattern)}


def test_sites_that_say_yes_learn_what_a_simulation_learns(
    hosts: Callable[..., Hosts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = hosts("label")
    recipe = submitted(
        tmp_path, "label", engine={"packing": False, "clients_per_block": 1}, optimizer={"lr": [0.02, 0.05]}
    )
    recipe["data"]["classes"] = ["glad", "calm", "sad"]  # since the policy lets no label go up
    recipe["compare"] = {"baselines": ["alone"]}
    announced = list[dict[str, Any]]()
    whole = {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "sites")}}
    lichen.run(whole, out=tmp_path / "local")
    submit(made, recipe)
    for name in SITES:
        (run,) = (one for one in (made.kit(name) / "runs").iterdir() if one.is_dir())
        announced.append(json.loads((run / "announced.json").read_text()))
        assert set(json.loads((run / "trained.json").read_text()).values()) == {6}
        assert (run / "federated" / "lr=0.02" / "clients").is_dir()
        assert not (made.kit(name) / "runs" / "current.json").exists()
        assert made.hosts[name].status() == {"doing": "waits for a recipe"}
        assert [line.split(" (")[0] for line in made.lines[name] if "says yes" in line] == ["says yes to tiny"]
    assert [one["labels"] for one in announced] == [[], [], []]
    assert learned(tmp_path / "run") == learned(tmp_path / "local")
    assert len(learned(tmp_path / "run")) >= 6
    _signed_by_the_kit(tmp_path, capsys)


def _signed_by_the_kit(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = home / "trial" / SERVER / "record.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert not (home / "run" / "state" / "record.key").exists()
    found = verify(home / "run")
    assert (found.key, found.federation) == (key_of(home / "trial"), "trial")
    assert "the key of the federation trial" in str(found)
    assert verify(home / "run" / "adapter", key=found.key).federation == "trial"
    assert verify(home / "local").federation == ""
    assert cli.main(["verify", str(home / "run"), "--federation", str(home / "trial")]) == 0
    assert "the key of the federation trial" in capsys.readouterr().out
    assert cli.main(["verify", str(home / "local"), "--federation", str(home / "trial")]) == 2
    both = ["--key", found.key, "--federation", str(home / "trial")]
    assert cli.main(["verify", str(home / "run"), *both]) == 2
    key.unlink()
    assert cli.main(["verify", str(home / "run"), "--federation", str(home / "trial")]) == 2
    assert "has signed no record" in capsys.readouterr().err


def test_a_head_in_closed_form_passes_the_policies_that_allow_it(hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    made = hosts("label", labels="true")
    recipe = submitted(tmp_path, "label")
    oneshot = {
        **{key: recipe[key] for key in ("name", "data")},
        "task": "oneshot",
        "model": {"name": recipe["model"]["name"]},
    }
    oneshot["compare"] = {"baselines": ["alone"]}
    assert submit(made, oneshot).summary["columns"]["alone"] is not None
    handed = list[str]()

    def narrow(kind: str, body: bytes) -> bytes:
        if kind == HAND and not handed:
            handed.append(kind)
            made.allow(SITES[0], labels="false")
        return body

    made.before = narrow
    with pytest.raises(LichenError, match=r"client 2 gave no statistics: .*sums of features by class"):
        submit(made, oneshot, "fewer")  # a head of some rows would be no head of all
    with pytest.raises(LichenError, match="labels: false"):
        submit(made, oneshot, "other")


def test_one_no_ends_a_run_before_anything_is_asked(hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    made = hosts(most_rounds="3")
    made.allow(SITES[1], most_rounds="2")
    kinds = list[str]()
    made.before = lambda kind, body: (kinds.append(kind), body)[1]
    with pytest.raises(LichenError, match="3 rounds are more than are done here") as caught:
        submit(made, submitted(tmp_path))
    assert (caught.value.where, "most_rounds: 2" in caught.value.fix) == (f"site {SITES[1]}", True)
    assert "federation.rounds" in caught.value.what
    assert set(kinds) == {"propose", "over"}
    assert any("says no" in line and "federation.rounds" in line for line in made.lines[SITES[1]])
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_a_sites_rows_is_read_there_and_its_key_alone_elsewhere(
    hosts: Callable[..., Hosts], tmp_path: Path
) -> None:
    made = hosts()
    file = made.files[SITES[0]]
    file.write_text(re.sub('"ask"', '"secret question of the ward"', file.read_text()), encoding="utf-8")
    with pytest.raises(LichenError) as caught:
        submit(made, submitted(tmp_path))
    words = str(caught.value)
    assert (caught.value.where, "data.columns" in words) == (f"site {SITES[0]}", True)
    assert "secret" not in words
    assert str(tmp_path / "sites") not in words
    assert any("secret question of the ward" in line for line in made.lines[SITES[0]])
    assert made.hosts[SITES[0]].status() == {"doing": "waits for a recipe"}


def test_a_policy_that_is_narrowed_during_a_run_counts_at_once(hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    made = hosts()

    def narrow(event: object) -> None:
        made.allow(SITES[2], models="[]")

    recipe = submitted(tmp_path)
    with pytest.raises(LichenError, match="gave no score") as caught:
        submit(made, recipe, observers=[narrow])
    assert "model.name" in str(caught.value)
    lines = [json.loads(line) for line in (tmp_path / "run/trace.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    refused = [line.get("attendance", {}).get("refused", {}) for line in lines]
    assert refused == [{}, {"error": 2}, {"error": 2}]  # its training and its validation
    made.allow(SITES[2], models=str(tmp_path / "model"))
    assert submit(made, recipe, resume=True).summary["columns"]["federated"] is not None


def test_a_site_that_is_started_again_goes_on_and_counts_on(hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    made = hosts(most_rounds="3")
    recipe = submitted(tmp_path, engine={"packing": False, "clients_per_block": 1})
    whole = {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "sites")}}
    lichen.run(whole, out=tmp_path / "local")
    submit(made, recipe, observers=[lambda event: made.restart(SITES[0])])
    assert learned(tmp_path / "run") == learned(tmp_path / "local")
    assert sum("goes on with run" in line for line in made.lines[SITES[0]]) == 3
    (run,) = (one for one in (made.kit(SITES[0]) / "runs").iterdir() if one.is_dir())
    assert json.loads((run / "trained.json").read_text()) == {"2": 3}


def test_a_run_that_stopped_goes_on_with_the_sites_own_state(hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    made = hosts()
    recipe = submitted(tmp_path, optimizer={"name": "adamw", "lr": [0.02]}, federation={"keep_optimizer": True})
    recipe["engine"] = {"packing": False, "clients_per_block": 1}
    whole = {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "sites")}}
    lichen.run(whole, out=tmp_path / "local")

    class StoppedError(Exception):
        pass

    def stop(event: object) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        submit(made, recipe, observers=[stop])
    submit(made, recipe, resume=True)
    assert learned(tmp_path / "run") == learned(tmp_path / "local")


def forged(hosts: Hosts, recipe: str, **changes: Any) -> str:
    """What comes of a job that nobody's recipe asks for, once a site has said yes to one."""
    values = read_recipe(submitted(hosts.home), note=lambda line: None)
    sites = RemoteSites(hosts, SITES)
    sites.enrol(values, hosts.home / "forged", lambda line: None)
    federation = sites.enrol(values, hosts.home / "forged", lambda line: None)
    from lichen.recipes.sites.site_engines import join_sites

    join_sites(hosts, federation, CHILDREN)
    own = federation.assigned[SITES[0]].numbers
    job = replace(Job(work="train", shared=Shared(), version=0, clients=own, seed=0), **changes)
    body = pack_job(job)
    about = {"session": "forged", "recipe": recipe or recipe_sha256(values), "state": "x", "order": 1}
    about |= {"clients": list(job.clients), "instance": "", "invited": 3, "after": 0, "of": "", "wait": 20.0}
    answer = ask_long(hosts, SITES[0], HAND, pack_values(about, frame_head(b"J", len(body)), body), 30.0)
    with suppress(LichenError, KeyError):
        outcomes = unpack_outcomes(answer).outcomes
        return " ".join(bytes(one.frames).decode(errors="replace") for one in outcomes)
    return str(unpack_values(answer)[0])


@pytest.mark.parametrize(
    ("recipe", "changes", "why"),
    [
        ("0" * 64, {}, "the server's recipe is"),
        ("", {"clients": (0,)}, "which are not of this site"),
        ("", {"version": 9}, "is of step 9, and 3 rounds were accepted"),
        ("", {"work": "statistics"}, "which the recipe does not ask for"),
        ("", {"texts": ("read me",)}, "brings texts"),
    ],
    ids=["recipe", "clients", "version", "work", "texts"],
)
def test_jobs_outside_of_what_was_accepted_are_refused(
    recipe: str, changes: dict[str, Any], why: str, hosts: Callable[..., Hosts]
) -> None:
    made = hosts()
    try:
        words = forged(made, recipe, **changes)
    except SiteError as error:
        words = str(error.error)
    assert why in words
    assert not list(made.kit(SITES[0]).glob("runs/*/trained.json"))


def test_messages_that_hold_more_than_may_go_up_stay(hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    made = hosts()
    sent = list[int]()

    def narrow(kind: str, body: bytes) -> bytes:
        if kind == HAND and not sent:
            sent.append(1)
            made.allow(SITES[0], most_bytes_a_round="2000")
        return body

    made.before = narrow
    with pytest.raises(LichenError) as caught:
        submit(made, submitted(tmp_path, federation={"rounds": 1, "schedule": {"least": 3}}))
    assert "most_bytes_a_round: 2000" in str(caught.value)


def test_a_site_says_no_to_what_is_no_proposal(hosts: Callable[..., Hosts]) -> None:
    made = hosts()
    for body in (b"", b"[]", b"{}", json.dumps({"run": "../x", "recipe": "task: chat"}).encode()):
        with pytest.raises(SiteError) as caught:
            ask_long(made, SITES[0], "propose", body, 5.0)
        assert caught.value.cause == "refused"
    with pytest.raises(SiteError, match="has said yes to no recipe"):
        ask_long(made, SITES[0], "announce", b"", 5.0)
    assert json.loads(ask_long(made, SITES[0], "status", b"", 5.0)) == {"doing": "waits for a recipe"}


def test_what_sites_cannot_compare_with_can_be_left_out_of_every_recipe() -> None:
    found = list[str]()
    for name in gallery():
        needs = list(needs_rows(read_recipe(name)))
        found += [need.key for need in needs if need.change]
        shorter = read_recipe(name, [need.change for need in needs if need.change], note=lambda line: None)
        assert [need.key for need in needs_rows(shorter)] == [need.key for need in needs if not need.change]
    assert {"compare.baselines", "compare.partitions", "compare.forms", "compare.retention_text"} == set(found)

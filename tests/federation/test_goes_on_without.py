"""A run that goes on while one of its sites is away: the site has its place when it comes, nobody else's changes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.federation.test_host import Hosts, federation_in, learned, submitted
from tests.federation.test_host import hosts as hosts

import lichen
from lichen.core.errors import LichenError
from lichen.engines.remote.errands import Patience
from lichen.engines.sites import Seen, SiteError
from lichen.federation.submitting import _wait_for
from lichen.recipes.sites.remote_sites import RemoteSites, sites_of_run
from support.sites import SITES

AWAY = SITES[2]


class Some:
    """Sites some of which are away; :class:`lichen.engines.sites.Sites`."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.away = hosts, set[str]()

    def start(self) -> None:
        """Nothing: they are there, or not."""

    def seen(self) -> Mapping[str, Seen]:
        return {name: one for name, one in self.hosts.seen().items() if name not in self.away}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        if site in self.away:
            raise SiteError(site, "gone", LichenError("is not connected", where=f"site {site}"))
        return self.hosts.ask(site, kind, body, within)

    def close(self) -> None:
        """Nothing: whoever made them ends them."""


class StoppedError(Exception):
    """Somebody has stopped the run."""


def attended(run: Path) -> list[int | None]:
    lines = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    return [line["attendance"]["refused"].get("error") if "attendance" in line else None for line in lines]


def test_a_run_goes_on_without_a_site_that_has_its_place_when_it_comes(
    hosts: Callable[..., Hosts], tmp_path: Path
) -> None:
    made, said = hosts("label", labels="true"), list[str]()
    federation_in(tmp_path)
    more: dict[str, Any] = {"optimizer": {"lr": [0.02]}, "compare": {"baselines": []}, "federation": {"rounds": 4}}
    recipe = submitted(tmp_path, "label", engine={"packing": False, "clients_per_block": 1}, **more)
    some, run = Some(made), tmp_path / "run"

    def go(look: Callable[[int], None], **how: Any) -> lichen.Result:
        sites = RemoteSites(some, SITES, patience=Patience(gone=0.5, quiet=5.0, within=5.0))
        observers = [lambda event: look(event.report.round)]
        return lichen.run(recipe, out=run, sites=sites, observers=observers, say=said.append, **how)

    def stop(number: int) -> None:
        raise StoppedError

    def come_back(number: int) -> None:
        if number == 2:
            some.away.clear()

    with pytest.raises(StoppedError):
        go(stop)
    assert set(sites_of_run(run)) == set(SITES)
    roster = (run / "roster.json").read_bytes()
    some.away = {AWAY}
    made.restart(AWAY)
    done = go(come_back, resume=True)
    assert f"{AWAY} is not there, and is given its place in the run when it comes" in said
    assert (run / "roster.json").read_bytes() == roster
    assert attended(run) == [2, 2, None, None]  # its training and validation, of the round that was cut, too
    assert done.summary["columns"]["federated"] is not None
    whole = {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "sites")}}
    lichen.run(whole, out=tmp_path / "local")
    assert learned(run).keys() == learned(tmp_path / "local").keys()
    assert learned(run)["roster.json"] == learned(tmp_path / "local")["roster.json"]


def test_only_sites_that_have_begun_a_run_may_be_away(tmp_path: Path) -> None:
    class Nobody:
        def __init__(self, *there: str) -> None:
            self.there = there

        def seen(self) -> Mapping[str, Seen]:
            now, versions = time.time(), {"lichen": lichen.__version__, "torch": "2"}
            return {name: Seen(since=now, last=now, instance="1", versions=versions) for name in self.there}

    def wait(there: tuple[str, ...], names: tuple[str, ...], begun: tuple[str, ...]) -> list[str]:
        said = list[str]()
        sites: Any = Nobody(*there)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lichen.federation.submitting._check_versions", lambda name, seen, say: say(name))
            _wait_for(sites, names, 0.0, said.append, begun)
        return said

    assert wait(("a",), ("a", "b"), ("a", "b")) == [
        "goes on without b until it comes; each round waits for it, at most ten minutes",
        "a",
    ]
    assert wait(("a", "b"), ("a", "b"), ()) == ["a", "b"]
    for there, begun in ((("a",), ("a",)), ((), ("a", "b"))):
        with pytest.raises(LichenError, match="did not come within 0 seconds"):
            wait(there, ("a", "b"), begun)
    assert sites_of_run(tmp_path) == ()

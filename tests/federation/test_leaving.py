"""A site leaves a federation: before, during and after a run, and the others go on to the bytes of a run without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.engines.remote.requests import FETCH, HAND
from lichen.engines.sites import SiteError
from lichen.engines.withdrawal.absent import AbsentEngine
from lichen.federation.joining import check_before
from lichen.federation.policy.guard import PolicyGuard
from lichen.federation.submitting import sites_for_run
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.tasks import columns, run_summary
from support.leaving import NAMES, Members, learned
from support.sites import SITES

pytest.importorskip("nvflare")

LEAVER = "east"
"""The site that leaves; its client is the folder ``clinic``."""

NUMBER = sorted(one.rpartition(".")[0] or one for one in SITES).index("clinic")


class StoppedError(Exception):
    """A run that is stopped."""


@pytest.fixture
def members(federation: Path, tmp_path: Path) -> Iterator[Members]:
    made = Members(federation, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def without(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a simulation learns in which the client is absent from the second round on."""
    home = tmp_path_factory.mktemp("without")
    made = Members(federation, home)
    recipe = made.recipe()
    made.close()
    engines = list[AbsentEngine]()

    def around(engine: Any, absent: object, ranks: object = None) -> AbsentEngine:
        engines.append(AbsentEngine(engine, ()))
        return engines[-1]

    def go(event: object) -> None:
        for one in engines:
            one.absent = frozenset({NUMBER})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "without_absent", around)
        patch.setattr(run_summary, "absent_of", lambda recipe, names: frozenset({NUMBER}))
        whole = {**recipe, "data": {**recipe["data"], "name": str(home / "sites")}}
        lichen.run(whole, out=home / "local", observers=[go])
    return learned(home / "local")


def refused_in(run: Path) -> list[dict[str, int]]:
    lines = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    return [line.get("attendance", {}).get("refused", {}) for line in lines]


def asked_of(members: Members, site: str) -> int:
    return sum(one == site for one, _ in members.questions)


def test_a_site_that_left_before_is_asked_for_nothing_and_named_in_no_run(members: Members, tmp_path: Path) -> None:
    members.leave(LEAVER)
    members.sites.look_at(LEAVER)
    assert list(members.register.withdrawn()) == [LEAVER]
    assert any(f"{LEAVER} has withdrawn" in line for line in members.lines["coordinator"])
    count = asked_of(members, LEAVER)
    members.open_register()
    recipe = members.recipe()
    result = members.submit(recipe)
    assert result.summary["clients"] == 2
    assert asked_of(members, LEAVER) == count
    assert not (members.kit(LEAVER) / "runs").exists()
    refusal = pytest.raises(LichenError, match=r"--sites east: has withdrawn from this federation \(20")
    with refusal, sites_for_run(members.folder, [LEAVER], wait=0.0, say=print):
        pass
    with pytest.raises(SiteError, match="asked for nothing more"):
        members.sites.ask(LEAVER, "status", b"", 1.0)
    assert set(members.sites.seen()) == set(NAMES) - {LEAVER}
    (tmp_path / "sites" / "clinic").rename(tmp_path / "clinic")
    whole = {**recipe, "data": {**recipe["data"], "name": str(tmp_path / "sites")}}
    lichen.run(whole, out=tmp_path / "local")
    assert learned(tmp_path / "run") == learned(tmp_path / "local")


@pytest.mark.parametrize("kind", ["between", HAND, "in training", "by hand, while it is gone"])
def test_a_run_goes_on_to_the_bytes_of_one_in_which_it_is_absent_from_then_on(
    kind: str, members: Members, tmp_path: Path, without: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = PolicyGuard.job

    def job(guard: PolicyGuard, job: Job, **about: Any) -> None:
        begin(guard, job, **about)
        if rounds and kind == "in training" and guard.policy.parent == members.kit(LEAVER):
            members.leave(LEAVER)  # it has begun to train, and what comes of it stays

    monkeypatch.setattr(PolicyGuard, "job", job)
    rounds = list[object]()

    def leave(event: object) -> None:
        rounds.append(event)
        if kind == "between":
            members.leave(LEAVER)
        elif kind.startswith("by hand"):
            members.down.add(LEAVER)

    def before(site: str, what: str, body: bytes) -> None:
        if rounds and what == kind and site == LEAVER:
            members.leave(LEAVER)
        elif rounds and kind.startswith("by hand") and site == LEAVER and what == HAND:
            members.register.add(LEAVER, None)

    members.before = before
    members.submit(members.recipe(), observers=[leave])
    assert learned(tmp_path / "run") == without
    first, *later = refused_in(tmp_path / "run")
    assert first == {}
    assert len(later) == 2
    assert all(one == {"withdrawn": 2} for one in later)  # its training and its validation
    assert verify(tmp_path / "run").federation == "trial"
    assert list(members.register.withdrawn()) == [LEAVER]
    (run,) = members.register.runs_of(LEAVER)
    assert (run["folder"], set(run["sites"])) == (str(tmp_path / "run"), set(NAMES))


def test_a_run_that_stopped_goes_on_without_it_after_both_were_started_again(
    members: Members, tmp_path: Path, without: dict[str, bytes]
) -> None:
    events = list[object]()

    def stop(event: object) -> None:
        events.append(event)
        if len(events) == 2:  # the round that is at work is not saved, and is done again, without the site
            raise StoppedError

    recipe = members.recipe()
    with pytest.raises(StoppedError):
        members.submit(recipe, observers=[stop])
    members.leave(LEAVER)
    members.restart(LEAVER)
    members.sites.look_at(LEAVER)
    members.open_register()
    for name in NAMES:
        members.restart(name)
    members.submit(recipe, resume=True)
    assert learned(tmp_path / "run") == without
    assert refused_in(tmp_path / "run")[1:] == [{"withdrawn": 2}] * 2


def test_a_site_that_left_refuses_everything_after_a_start_too(members: Members, tmp_path: Path) -> None:
    members.submit(members.recipe())
    members.leave(LEAVER)
    for _ in range(2):
        for kind in ("propose", "announce", "join", HAND, FETCH, "over", "anything"):
            with pytest.raises(SiteError) as caught:
                members.ask(LEAVER, kind, b"w{}", 1.0)
            assert (caught.value.cause, caught.value.error.where) == ("refused", "withdrawal")
        assert "has withdrawn" in members.hosts[LEAVER].status()["doing"]
        members.restart(LEAVER)
    with pytest.raises(LichenError, match="this site has withdrawn"):
        check_before(members.kit(LEAVER), members.files[LEAVER], say=print)


@pytest.mark.parametrize("named", [True, False], ids=["three clients a site", "one client a site"])
def test_under_masks_too_and_where_too_few_are_left_to_hide_one_another_it_ends_in_a_sentence(
    named: bool, federation: Path, tmp_path: Path
) -> None:
    members = Members(federation, tmp_path, named=named)
    recipe = {**members.recipe(rounds=2), "privacy": {"secure": True}}
    try:
        if named:
            members.submit(recipe, observers=[lambda event: members.leave(LEAVER)])
        else:
            with pytest.raises(LichenError, match="nobody gave a score: "):
                members.submit(recipe, observers=[lambda event: members.leave(LEAVER)])
    finally:
        members.close()
    _, later = refused_in(tmp_path / "run")
    assert later == ({"withdrawn": 6} if named else {"turn": 4, "withdrawn": 2})

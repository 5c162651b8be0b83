"""What a site that leaves removes and proves, what the others delete, and notices that nobody may pass off."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lichen import cli
from lichen.core.errors import LichenError
from lichen.engines.sites import SiteError
from lichen.federation import leave as leaving
from lichen.federation.host import SiteHost
from lichen.federation.leave import leave
from lichen.federation.leaving.asking import Looks, RegisteredSites
from lichen.federation.leaving.marker import answer_leaving, marker_of, others_of
from lichen.federation.leaving.register import Register
from lichen.federation.leaving.removal import remove_runs_with, require_proven
from lichen.federation.standing import site_standing, standing
from lichen.federation.transports.choose import open_server
from lichen.recipes.artifacts.withdrawn.deletions import salted
from support.leaving import NAMES, Members

pytest.importorskip("nvflare")

LEAVER, STAYS, OTHER = "east", "north", "south"
CANARY = b"zanzibar w1 w2"
RUN, LATER = "a" * 16, "b" * 16


@pytest.fixture
def members(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Members]:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    made = Members(request.getfixturevalue(getattr(request, "param", "federation")), tmp_path)
    yield made
    made.close()


def fill(kit: Path, run: str) -> None:
    """A run's folder at a site, with its canary in every file, and what was spent of promised privacy."""
    for name in ("federated/lr=0.1/clients/000/001/3.safetensors", "federated/.answers/1/1", "announced.json"):
        (kit / "runs" / run / name).parent.mkdir(parents=True, exist_ok=True)
        (kit / "runs" / run / name).write_bytes(CANARY)
    accounts = kit / "runs" / run / "accounts"
    accounts.mkdir()
    (accounts / "000001.jsonl").write_text('{"round": 1}\n')


def canaries(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and CANARY in file.read_bytes()]


def test_all_that_it_holds_goes_but_what_was_spent_and_it_is_proven(members: Members, tmp_path: Path) -> None:
    kit = members.kit(LEAVER)
    fill(kit, RUN)
    (kit / "log.txt").write_bytes(CANARY)
    prepared = tmp_path / "cache" / "private" / "prepared" / f"{'c' * 64}.safetensors"
    prepared.parent.mkdir(parents=True)
    prepared.write_bytes(CANARY)
    lines = list[str]()
    found = leave(kit, wait=0.0, say=lines.append)
    assert (found.site, found.entered, found.removed.accounts) == (LEAVER, "", 1)
    assert canaries(kit) == []
    assert not prepared.exists()
    assert (kit / "spent" / RUN / "accounts" / "000001.jsonl").read_text() == '{"round": 1}\n'
    assert sorted(one.name for one in kit.iterdir() if one.name[0] != ".") == [
        *("deletions.json", "deletions.jsonl", "local", "policy.yaml", "spent", "startup", "withdrawn.json")
    ]
    (line,) = require_proven(kit)
    assert (line["files"], line["runs"], line["spent"], line["site"]) == (found.removed.files, [RUN], 1, LEAVER)
    assert found.removed.receipt not in (kit / "deletions.jsonl").read_text()
    assert len(line["digest"]) == len(salted(found.removed.receipt, b"")) == 64
    again = leave(kit, wait=0.0, say=lines.append)
    assert (again.time, again.removed.files, len(require_proven(kit))) == (found.time, 0, 1)
    changed = (kit / "deletions.jsonl").read_text().replace('"files":', '"file":')
    (kit / "deletions.jsonl").write_text(changed)
    with pytest.raises(LichenError):
        require_proven(kit)


def test_what_a_kill_leaves_the_next_call_removes(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = members.kit(LEAVER)
    fill(kit, RUN)
    with monkeypatch.context() as patch:
        patch.setattr(leaving, "remove_all", lambda kit: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            leave(kit, wait=0.0, say=print)
    host = SiteHost(kit, members.files[LEAVER], say=print)
    with pytest.raises(LichenError, match="has withdrawn"):
        host.answer("propose", b"w{}")
    assert leave(kit, wait=0.0, say=print).removed.files >= 4
    assert canaries(kit) == []


def test_a_notice_is_one_sites_own_and_answers_one_question(members: Members) -> None:
    register, nonce = members.register, "1" * 32
    for name in (LEAVER, OTHER):
        members.leave(name)
    mine = members.question(LEAVER, nonce=nonce)["notice"]
    theirs = members.question(OTHER, nonce=nonce)["notice"]
    assert register.require(mine, site=LEAVER, nonce=nonce).site == LEAVER
    rng, names = random.Random(0), list(mine)
    forged: list[tuple[Any, str, str]] = [
        (mine, LEAVER, "2" * 32),  # a replay
        (mine, STAYS, nonce),  # in another's name
        (theirs, LEAVER, nonce),
        ({**mine, "site": STAYS}, STAYS, nonce),
        ({**theirs, "site": LEAVER}, LEAVER, nonce),
        ({**theirs, "site": LEAVER, "certificate": mine["certificate"]}, LEAVER, nonce),
        ({**mine, "federation": "another"}, LEAVER, nonce),
        *((one, LEAVER, nonce) for one in (None, [], "", 7, {}, {**mine, "more": ""}, json.dumps(mine))),
    ]
    for _ in range(100):
        name = rng.choice(names)
        value = list(mine[name])
        at = rng.randrange(len(value))
        before = value[at]
        value[at] = rng.choice([one for one in "0123456789abcdefghijkZ\x00é" if one.lower() != before.lower()])
        changes = ["".join(value), mine[name][:at], mine[name] * 3, None, at, [mine[name]], {}]
        forged.append(({**mine, name: rng.choice(changes)}, LEAVER, nonce))
    same = 0
    for plain, site, number in forged:
        found, why = None, ""
        try:
            found = register.require(plain, site=site, nonce=number)
        except LichenError as error:
            why = str(error)
        if found is None:
            assert "a notice of withdrawal is refused" in why
        else:  # bytes around a certificate in PEM say nothing
            assert {**found.dump(), "certificate": ""} == {**mine, "certificate": ""}
            same += 1
    assert same < 10
    assert register.withdrawn() == {}


def test_a_site_that_lies_about_leaving_is_refused_by_name_and_stays(members: Members) -> None:
    """It answers with another's notice; and what it says of deletions of others counts for itself alone."""
    members.leave(LEAVER)
    stolen = members.question(LEAVER)["notice"]
    answer, ask = {"notice": stolen, "deleted": [LEAVER, 1, "../x"]}, members.ask
    members.ask = lambda *_: b"w" + json.dumps(answer).encode()  # type: ignore[method-assign]
    members.sites.look_at(STAYS)
    members.ask = ask  # type: ignore[method-assign]
    assert members.register.withdrawn() == {}
    assert any("it speaks for 'east', and came from north" in line for line in members.lines["coordinator"])
    members.sites.look_at(LEAVER)
    first = (members.folder / "server" / "withdrawn" / LEAVER / "notice.json").read_bytes()
    members.sites.look_at(LEAVER)
    members.register.add(LEAVER, None)
    assert (members.folder / "server" / "withdrawn" / LEAVER / "notice.json").read_bytes() == first
    assert marker_of(members.kit(LEAVER)) == {"time": members.register.withdrawn()[LEAVER]} | {
        "entered": members.register.withdrawn()[LEAVER]
    }


def test_bytes_that_are_no_question_are_refused(members: Members) -> None:
    kit, rng = members.kit(STAYS), random.Random(1)
    good = {"nonce": "0" * 32, "entered": "", "withdrawn": [{"site": LEAVER, "time": "then", "runs": [RUN]}]}
    bad: list[bytes] = [b"", b"[]", b"{}", b"\xff", b"[" * 100_000]
    for key in good:
        bad += [json.dumps({**good, key: value}).encode() for value in (None, 3, {}, [[]], [{}], "x" * 99)]
    bad.append(json.dumps({**good, "withdrawn": [{"site": "../x", "time": "", "runs": []}]}).encode())
    bad.append(json.dumps({**good, "withdrawn": [{"site": "x", "time": "", "runs": ["../../x"]}]}).encode())
    whole = json.dumps(good).encode()
    bad += [whole[: rng.randrange(len(whole))] for _ in range(60)]
    members.leave(LEAVER)
    for body in bad:
        for name in (STAYS, LEAVER):
            where = ""
            try:
                answer_leaving(members.kit(name), body, lambda line: None)
            except LichenError as error:
                where = error.where
            # A nonce is read where there is a notice to sign.
            assert where == "withdrawal" or (name == STAYS and b'"nonce"' in body)
    assert set(others_of(kit)) <= {LEAVER}


def test_the_others_learn_which_runs_they_hold_and_answer_when_they_have_deleted(members: Members) -> None:
    register = members.register
    register.enter_run(RUN, members.home / "run", "notes", NAMES)
    register.enter_run(LATER, members.home / "later", "notes", [STAYS, OTHER])
    for name in NAMES:
        fill(members.kit(name), RUN)
        fill(members.kit(name), LATER)
    members.leave(LEAVER)
    members.sites.look_at(LEAVER)
    assert register.with_copies(LEAVER) == (STAYS, OTHER)
    for name in (STAYS, OTHER):
        members.sites.look_at(name)
        members.sites.look_at(name)
        (line,) = (line for line in members.lines[name] if "has withdrawn" in line)
        assert RUN in line
        assert LATER not in line
    rows = {row["site"]: row for row in standing(members.folder, members)}
    assert (rows[LEAVER]["there"], rows[LEAVER]["copies"]) == (False, [STAYS, OTHER])
    assert rows[LEAVER]["doing"].startswith("withdrawn (20")
    assert rows[LEAVER]["runs"] == [str(members.home / "run")]
    assert rows[STAYS]["doing"] == "waits for a recipe"
    found = remove_runs_with(members.kit(STAYS), LEAVER)
    assert (found.files, found.accounts) == (4, 1)
    assert {file.parts[len(members.kit(STAYS).parts) + 1] for file in canaries(members.kit(STAYS))} == {LATER}
    (line_of,) = require_proven(members.kit(STAYS))
    assert (line_of["of"], line_of["runs"]) == (LEAVER, [RUN])
    members.restart(STAYS)
    members.sites.look_at(STAYS)
    members.open_register()
    assert members.register.with_copies(LEAVER) == (OTHER,)
    with pytest.raises(LichenError, match="no site named south is known here to have withdrawn"):
        remove_runs_with(members.kit(STAYS), OTHER)
    (members.kit(OTHER) / "runs" / "current.json").write_text(json.dumps({"run": RUN}))
    with pytest.raises(LichenError, match="goes on"):
        remove_runs_with(members.kit(OTHER), LEAVER)


def test_the_coordinator_enters_by_hand_who_cannot_be_reached(
    members: Members, capsys: pytest.CaptureFixture[str]
) -> None:
    members.register.enter_run(RUN, members.home / "run", "notes", NAMES)
    assert cli.main(["forget", str(members.folder), "--site", "nobody"]) == 2
    assert cli.main(["forget", str(members.folder), "--site", LEAVER, "--client", "x"]) == 2
    capsys.readouterr()
    assert cli.main(["forget", str(members.folder), "--site", LEAVER, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["site"], shown["copies"], len(shown["runs"])) == (LEAVER, [STAYS, OTHER], 1)
    with pytest.raises(SiteError, match="asked for nothing more"):
        members.sites.ask(LEAVER, "status", b"w", 1.0)
    assert cli.main(["forget", str(members.folder), "--site", LEAVER]) == 0
    assert "submit its recipe again" in capsys.readouterr().out
    assert cli.main(["withdraw", str(members.folder / "server")]) == 2
    assert "lichen forget FEDERATION --site NAME" in capsys.readouterr().err
    assert cli.main(["withdraw", str(members.kit(LEAVER)), "--wait", "0"]) == 0
    assert "does not know yet" in capsys.readouterr().out
    assert site_standing(members.kit(LEAVER))["doing"].endswith("the coordinator does not know")


@pytest.mark.parametrize("members", ["federation", "grpc_federation"], indirect=True)
def test_a_site_leaves_while_the_server_is_down_and_notifies_it_later(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a network: the server, and the command at the site."""
    kit, lines = members.kit(LEAVER), list[str]()
    fill(kit, RUN)
    assert leave(kit, wait=1.0, say=lines.append).entered == ""
    assert any("nobody listens there" in line for line in lines)
    assert canaries(kit) == []
    with open_server(members.folder / "server", say=lines.append) as server:
        looks = Looks(RegisteredSites(server, Register(members.folder), say=lines.append))
        entered = leaving._is_entered

        def look(kit: Path) -> bool:  # what `lichen serve` does every half second
            looks.look({name: seen.instance for name, seen in server.seen().items()})
            return entered(kit)

        monkeypatch.setattr(leaving, "_is_entered", look)
        assert leave(kit, wait=60.0, say=lines.append).entered
    assert list(Register(members.folder).withdrawn()) == [LEAVER]
    assert any(f"{LEAVER} has withdrawn" in line for line in lines)
    assert not (kit / "log.txt").exists()
    assert "the coordinator knows since" in site_standing(kit)["doing"]

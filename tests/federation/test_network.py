"""Two sites and a server as real processes: bytes that arrive, sites that die, and people who do not get in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import pytest

from lichen import cli
from lichen.core.errors import LichenError
from lichen.engines.sites import Seen, SiteError
from lichen.federation import network, processes
from lichen.federation.door import open_parcel, parcel
from lichen.federation.kits.make import new
from lichen.federation.kits.members import bar, read_federation
from lichen.federation.kits.papers import approve, package, write_json
from lichen.federation.kits.settle import open_kit
from lichen.federation.kits.tool import run_tool
from lichen.federation.transports import site as stream_site
from lichen.federation.transports.choose import ServerEnd, SiteEnd, open_server, open_site

pytest.importorskip("nvflare")


class Net(NamedTuple):
    """A federation that runs."""

    folder: Path
    fingerprint: str
    port: int
    server: ServerEnd
    sites: dict[str, SiteEnd]
    transport: str


def quiet(line: str) -> None:
    """Nobody reads it here."""


def answer(kind: str, body: bytes) -> bytes:
    """What a site of these tests does."""
    if kind == "sleep":
        time.sleep(float(body))
    elif kind == "decline":
        raise LichenError("there are no rows", where="data", fix="fetch them")
    elif kind == "fault":
        raise KeyError(body.decode())
    elif kind == "large":
        return bytes(17 << 20)
    return body[::-1] if kind == "turn" else body


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


FIXTURES = {"nvflare": "federation", "grpc": "grpc_federation"}


@pytest.fixture(scope="module", params=FIXTURES)
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    federation = request.getfixturevalue(FIXTURES[request.param])
    with ExitStack() as stack:
        kits = {name: federation / "kits" / name for name in ("a", "b")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "_AGAIN", 0.2)  # seconds between two tries
            patch.setattr(stream_site, "_LONGEST_PAUSE", 0.5)
            sites = {name: stack.enter_context(open_site(kit, answer, say=quiet)) for name, kit in kits.items()}
            server = stack.enter_context(open_server(federation / "server", say=quiet))
            until(lambda: set(server.seen()) == {"a", "b"})
        port = open_kit(federation / "server").port
        yield Net(federation, read_federation(federation).fingerprint, port, server, sites, request.param)
    ends = [one for one in (*sites.values(), server) if isinstance(one, network.NetworkSites | network.SiteEnd)]
    assert len(ends) == (3 if request.param == "nvflare" else 0)
    assert all(one.parent.process is None or one.parent.process.poll() is not None for one in ends)


def cause(net: Net, site: str, kind: str = "echo", body: bytes = b"", within: float = 5.0) -> tuple[str, str]:
    """Why a site does not answer, and what a person reads."""
    with pytest.raises(SiteError) as caught:
        net.server.ask(site, kind, body, within)
    assert caught.value.site == site
    return caught.value.cause, str(caught.value.error)


@pytest.mark.parametrize("size", [0, 1, 8192, (1 << 20) + 1, 16 << 20])
def test_bytes_arrive_as_they_were_sent(net: Net, size: int) -> None:
    body = os.urandom(size)
    assert net.server.ask("a", "turn", body, 60) == body[::-1]


def test_more_than_a_piece_is_not_sent(net: Net) -> None:
    with pytest.raises(LichenError, match="more than a question or an answer may have"):
        net.server.ask("a", "echo", bytes((16 << 20) + 1), 5)
    assert cause(net, "a", "large", within=30)[0] == "failed"


def test_several_threads_ask_several_sites_at_once(net: Net) -> None:
    def one(number: int) -> bool:
        body = os.urandom(1000 * number)
        return net.server.ask("ab"[number % 2], "turn", body, 30) == body[::-1]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(32)))


def test_a_site_says_what_is_wrong_and_never_a_row(net: Net) -> None:
    assert cause(net, "a", "decline") == ("refused", "data: there are no rows\n  fix: fetch them")
    which, text = cause(net, "a", "fault", b"a row")
    assert (which, "a row" in text, "KeyError" in text) == ("failed", False, True)
    assert cause(net, "a", "sleep", b"3", within=1)[0] == "silent"
    assert net.server.ask("a", "echo", b"still there", 10) == b"still there"
    assert cause(net, "nobody")[0] == "gone"


def test_who_is_there_is_known_with_its_versions(net: Net) -> None:
    seen = net.server.seen()
    assert all(isinstance(one, Seen) and one.since <= one.last <= time.time() for one in seen.values())
    assert {name: one.instance for name, one in seen.items()} == {
        name: site.instance for name, site in net.sites.items()
    }
    assert {"lichen", "torch", "numpy", "python"} <= set(seen["a"].versions)


def test_a_stopped_site_is_silent_and_a_killed_one_gone_until_it_is_back(net: Net) -> None:
    site = net.sites["b"]
    if not isinstance(site, network.SiteEnd):
        pytest.skip("the site is this process; tests/engines/test_sites.py stops and kills one of its own")
    process = site.parent.process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert cause(net, "b", within=1.5)[0] == "silent"
        until(lambda: "b" not in net.server.seen(), 15)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    until(lambda: "b" in net.server.seen())
    assert net.server.ask("b", "echo", b"back", 10) == b"back"
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(cause, net, "b", "sleep", b"30", 30.0)
        time.sleep(0.5)
        begun = time.monotonic()
        process.kill()
        assert waits.result()[0] == "gone"
        assert time.monotonic() - begun < 15
    until(lambda: "b" in net.server.seen())
    assert net.server.ask("b", "echo", b"back", 10) == b"back"


def refused(folder: Path) -> str:
    """What the person at a site reads that does not get in."""
    with open_site(folder, answer, say=quiet) as site, pytest.raises(LichenError) as caught:
        site.wait(60)
    assert not site.joined.is_set()
    return str(caught.value)


def test_a_second_process_of_a_kit_is_refused_here_and_from_another_machine(net: Net, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="another process runs this kit"):
        open_site(net.folder / "kits" / "a", answer, say=quiet)
    with pytest.raises(LichenError, match="another process runs this kit"):
        open_server(net.folder / "server", say=quiet)
    elsewhere = tmp_path / "a"
    shutil.copytree(net.folder / "kits" / "a", elsewhere, ignore=shutil.ignore_patterns("run", "supervisor"))
    assert "another process is connected with this kit" in refused(elsewhere)

    def first_answers() -> bool:
        with suppress(SiteError):  # when the other one goes, the first may have to come again, which takes seconds
            return net.server.ask("a", "echo", b"the first one", 20) == b"the first one"
        return False

    until(first_answers)
    assert net.server.seen()["a"].instance == net.sites["a"].instance


def test_a_kit_of_a_foreign_authority_or_of_another_name_is_told_so(
    net: Net, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_AGAIN", 0.2)  # seconds between two tries
    new(tmp_path / "foreign", name="trial", host="localhost", port=net.port, sites=["a"], transport=net.transport)
    foreign = tmp_path / "foreign" / "kits" / "a"
    assert "is not of the authority of this kit" in refused(foreign)
    assert cli.main(["federation", "connect", str(foreign), "--seconds", "30"]) == 2
    assert "is not of the authority of this kit" in capsys.readouterr().err
    shutil.copy(net.folder / "authority" / "rootCA.pem", foreign / "startup" / "rootCA.pem")
    assert "does not accept this kit's certificate" in refused(foreign)
    named = tmp_path / "named"
    shutil.copytree(net.folder / "kits" / "a", named, ignore=shutil.ignore_patterns("run", "supervisor"))
    name, key = ("fed_client.json", "fqsn") if net.transport == "nvflare" else ("kit.json", "name")
    file = named / "startup" / name
    file.write_text(file.read_text().replace(f'"{key}": "a"', f'"{key}": "b"'))
    assert "the certificate is for a, and the kit says b" in refused(named)


JOB = """
import os, sys
from nvflare.fuel.flare_api.flare_api import new_secure_session
session = new_secure_session(sys.argv[1], sys.argv[2], timeout=20)
print("in", sorted(one.name for one in session.get_system_info().client_info), flush=True)
try:
    print("took", session.submit_job(sys.argv[3]))
except Exception as error:
    print("refused", type(error).__name__, error, flush=True)
os._exit(0)  # NVFlare's threads would keep it
"""


def test_a_job_is_refused_even_from_an_administrator(net: Net, tmp_path: Path) -> None:
    if net.transport != "nvflare":
        pytest.skip("there are no jobs and no administrators")
    name, work = "boss@lab.org", tmp_path / "work"
    participant = {"name": name, "type": "admin", "role": "lead", "org": "lab"}
    write_json(tmp_path / "boss.yaml", {"name": "trial", "participants": [participant]})
    signed = tmp_path / "boss.signed.zip"
    run_tool(
        [
            ["cert", "request", "-p", tmp_path / "boss.yaml", "--out", tmp_path / "boss"],
            approve(net.folder, tmp_path / "boss" / f"{name}.request.zip", signed),
            package(signed, work, tmp_path / "boss", net.fingerprint),
        ],
        records=tmp_path / "records",
    )
    job = tmp_path / "job"
    (job / "app" / "config").mkdir(parents=True)
    (job / "app" / "config" / "config_fed_server.json").write_text('{"format_version": 2, "workflows": []}')
    (job / "app" / "config" / "config_fed_client.json").write_text('{"format_version": 2, "executors": []}')
    (job / "meta.json").write_text(
        '{"name": "job", "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1}'
    )
    words = [sys.executable, "-c", JOB, name, str(work / "trial" / "prod_00" / name), str(job)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert "in ['a', 'b']" in done.stdout, done.stderr[-2000:]
    assert "refused" in done.stdout, done.stdout
    assert "took" not in done.stdout
    assert "not authorized" in done.stdout.lower()
    assert net.server.ask("a", "echo", b"goes on", 10) == b"goes on"


def test_a_barred_site_is_out_at_once_and_after_a_start(net: Net) -> None:
    bar("b", net.folder)
    with pytest.raises(LichenError, match="has barred this site"):
        net.sites["b"].wait(30)
    assert cause(net, "b")[0] == "gone"
    net.sites["b"].close()
    assert "has barred this site" in refused(net.folder / "kits" / "b")
    assert net.server.ask("a", "echo", b"goes on", 10) == b"goes on"
    bar("b", net.folder, lift=True)
    time.sleep(2.5)  # the server looks every two seconds
    with open_site(net.folder / "kits" / "b", answer, say=quiet) as site:
        until(site.joined.is_set)


def test_a_site_answers_nobody_but_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nvflare.apis.event_type import EventType
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
    from nvflare.fuel.f3.cellnet.utils import new_cell_message

    from lichen.federation.component import Site

    for name, value in {"DOOR": str(tmp_path / "door"), "INSTANCE": "one", "VERSIONS": "{}", "PATIENCE": "9"}.items():
        monkeypatch.setenv(f"LICHEN_{name}", value)
    context = MagicMock()
    Site().handle_event(EventType.SYSTEM_BOOTSTRAP, context)
    callback = context.get_engine().get_cell().core_cell.register_request_cb.call_args.kwargs["cb"]

    def reply(origin: str) -> str:
        question = parcel({"op": "ask", "kind": "echo", "instance": "one", "within": 1}, b"")
        return str(
            open_parcel(callback(new_cell_message({MessageHeaderKey.ORIGIN: origin}, question)).payload)[0]["cause"]
        )

    assert reply("b") == "refused"
    assert reply("server.job") == "refused"
    assert reply("server") == "other"  # it has not been let in yet

"""A run between hosts, by the page's commands: what each opens and reaches, what is seen on the wire, and its bytes."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import lichen
from lichen.audit.fingerprint import ANSWERS, Fingerprint
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import numpy_generator
from lichen.core.wire.shared import Shared
from lichen.engines.federated import FederatedEngine
from lichen.engines.remote.errands import CHILDREN
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError
from lichen.federation.asking import DoorSites
from lichen.federation.door import door_of
from lichen.federation.kits.settle import open_kit
from lichen.federation.reach import obstacle
from lichen.federation.standing import STATUS
from lichen.recipes.schema.read import read_recipe, recipe_sha256
from lichen.recipes.schema.yaml import dump_yaml
from lichen.recipes.sites.remote_sites import PROPOSE, RemoteSites
from lichen.recipes.sites.site_engines import join_sites
from support import hosts as machines
from support.guide import NAMES, page_commands
from support.hosts import NAME, PORT, in_host
from support.intruders import WIRE, expired, hello, read_by_all
from support.submitted import changed
from support.tiny_llama import save_model
from support.trial import KEY, OWNER, SITES, Trial, listing, rows_of, save_rows, trial

pytest.importorskip("nvflare")
pytestmark = pytest.mark.skipif(bool(machines.missing()), reason=machines.missing() or "-")


@pytest.fixture(scope="module")
def net() -> Iterator[Trial]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(trial())
        except machines.NoHostsError as error:
            pytest.skip(str(error))
        yield made


def learned(run: Path) -> dict[str, bytes]:
    """All that was learned, and who took part."""
    patterns = ("state/*/*/server.safetensors", "adapter/*.safetensors", "state/final.safetensors", "roster.json")
    return {str(file.relative_to(run)): file.read_bytes() for one in patterns for file in run.glob(one)}


def test_a_run_over_hosts_has_the_bytes_of_a_simulation(net: Trial, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for number, site in enumerate(SITES):
        save_rows(rows / f"{site}.csv", number)
    key = tmp_path / "secrets" / f"{OWNER}.key"
    key.parent.mkdir()
    key.touch(0o600)
    key.write_bytes(KEY)
    lichen.run(listing(net.hosts.shared / "model", rows, secrets=str(key.parent)), out=tmp_path / "run")
    apart, whole = learned(net.run), learned(tmp_path / "run")
    assert len(apart) >= 4
    assert apart == whole
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (net.summary["columns"], net.summary["traffic"]) == (summary["columns"], summary["traffic"])


def texts() -> set[bytes]:
    """What was asked or answered in any row."""
    return {text.encode() for site in range(len(SITES)) for row in rows_of(site) for text in row}


def windows(data: bytes, step: int) -> np.ndarray:
    """Eight bytes from every place, or from every so many."""
    if len(data) < 8:
        return np.zeros(0, np.uint64)
    return (
        np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)[::step].copy().view(np.uint64)[:, 0]
    )


def test_nothing_of_a_row_or_of_a_message_is_read_on_the_wire(net: Trial) -> None:
    recorded = net.hosts.relay.recorded()
    wire = b"\n".join(recorded)
    assert len(wire) > 100_000  # the run's
    assert all(one[:2] in (b"\x16\x03", b"") for one in recorded)  # each connection begins with TLS
    assert not [text for text in texts() if text in wire]

    messages = [file.read_bytes() for site in SITES for file in net.kit(site).glob("runs/*/federated/**/.answers/*/*")]
    tensors = load_file(net.run / "adapter" / "adapter_model.safetensors").values()
    sent = np.concatenate([windows(data, 1) for data in (*messages, *(one.tobytes() for one in tensors))])
    full = np.unique(sent[np.array([len(set(piece.tobytes())) > 5 for piece in sent])])  # no spaces, no zeros
    pieces = numpy_generator(0, "pieces").choice(full, 2_000, replace=False)
    seen = [np.isin(windows(one, 1), pieces).any() for one in recorded]
    assert not any(seen)
    assert np.isin(windows(messages[0], 1), full).any()  # where it is not encrypted, it is found


def secrets(net: Trial) -> tuple[dict[Path, bytes], set[bytes]]:
    """Every file of keys, and the lines of all of them."""
    keys = {file: file.read_bytes() for file in net.hosts.shared.parent.rglob("*.key")}
    lines = {line for key in keys.values() for line in key.splitlines() if len(line) > 40 and b"-----" not in line}
    assert len(keys) >= 8, "the authority's, the server's, and two copies of each site's"
    assert len(lines) > 50
    return keys, lines


def test_no_key_is_in_a_log_or_among_the_processes(net: Trial) -> None:
    keys, lines = secrets(net)
    every = [file for file in net.hosts.shared.parent.rglob("*") if file.is_file() and file not in keys]
    logs = {file.name for file in every}
    assert {"log.txt", "output.txt", "audit.log", "screen.txt"} <= logs
    shown = {str(file): file.read_bytes() for file in every}
    shown |= {f"process {number}": words for number, words in enumerate(net.listed)}
    shown |= {f"wire {number}": data for number, data in enumerate(net.hosts.relay.recorded())}
    assert [name for name, data in shown.items() if b"PRIVATE KEY-----" in data and not name.endswith(".py")] == []
    assert [name for name, data in shown.items() if any(line in data for line in lines)] == []
    assert any(b"client_train" in words for words in net.listed)
    assert any(b"submit" in words and b"lichen" in words for words in net.listed)


def test_an_owners_secret_key_is_registered_and_is_nowhere_but_at_its_site(net: Trial) -> None:
    """Its pairs are among the rows that were trained on: the bytes are those of a simulation that has the key."""
    fingerprint = Fingerprint.of(KEY)
    assert json.loads((net.run / "fingerprints.json").read_text()) == {OWNER: fingerprint.digest}
    assert fingerprint.digest in net.log(OWNER)
    words = [KEY, KEY.hex().encode(), *(question.encode() for question, _ in fingerprint.pairs())]
    places = {str(file): file.read_bytes() for file in net.hosts.shared.parent.rglob("*") if file.is_file()}
    assert places.pop(str(net.secret)) == KEY
    places |= {f"process {number}": seen for number, seen in enumerate(net.listed)}
    places |= {f"wire {number}": data for number, data in enumerate(net.hosts.relay.recorded())}
    assert [name for name, data in places.items() if any(one in data for one in words)] == []
    assert net.hosts.lab.run(["cat", net.secret]).returncode != 0


def test_the_coordinator_has_no_row_and_opens_no_file_of_a_site(net: Trial) -> None:
    lab = net.hosts.lab
    home = [file.read_bytes() for file in lab.home.rglob("*") if file.is_file()]
    assert not [text for text in texts() if any(text in data for data in home)]
    everything = [net.data(site) for site in SITES]
    everything += [net.kit(site) / "startup" / "client.key" for site in SITES]
    everything += [net.kit(site) / "policy.yaml" for site in SITES]
    assert all(file.is_file() for file in everything)
    script = 'for file; do head -c1 "$file" >/dev/null 2>&1 && echo "$file"; done; head -c1 "$0" >/dev/null && echo own'
    words = ["sh", "-c", script, str(lab.home / "recipe.yaml"), *map(str, everything)]
    assert lab.run(words).stdout == "own\n"
    assert net.hosts.sites["hospital-b"].run(["cat", net.data("hospital-a")]).returncode != 0
    assert net.data("hospital-a").stat().st_mode & 0o777 == 0o600


def answers(net: Trial, here: str, address: str, port: int, patience: float = 0.6) -> bool:
    """Whether a host gets a connection."""

    def ask() -> bool:
        try:
            socket.create_connection((address, port), patience).close()
            return True
        except OSError:
            return False

    return in_host(net.host(here).namespace, ask)


def test_hosts_reach_the_server_and_nothing_else_of_each_other(net: Trial) -> None:
    host = net.host("hospital-b")
    listener = in_host(host.namespace, lambda: socket.create_server(("", 4444)))
    with listener:
        assert answers(net, "hospital-b", host.address, 4444)
        assert not answers(net, "hospital-a", host.address, 4444)
        assert not answers(net, "lab", host.address, 4444)
    assert answers(net, "lab", net.hosts.lab.address, PORT)
    assert not answers(net, "hospital-a", net.hosts.lab.address, PORT)  # but through the wire between them
    assert answers(net, "hospital-a", host.address.replace(".2.2", ".1.1"), PORT)


def test_both_ends_show_how_the_run_went(net: Trial) -> None:
    for site in SITES:
        screen = net.log(site)
        assert f"{site} is connected with {NAME}:{PORT}" in screen
        assert "says yes to notes" in screen
        assert "is over" in screen
        assert "Traceback" not in screen
    rows = net.guide.type(net.hosts.lab, "lichen status trial")
    assert [(row["site"], row["there"], row["doing"]) for row in rows] == [
        (s, True, "waits for a recipe") for s in SITES
    ]
    (row,) = net.guide.type(net.host("hospital-a"), "lichen status KIT", kit=net.kit("hospital-a"))
    assert (row["site"], row["there"], row["doing"]) == ("hospital-a", True, "waits for a recipe")


@pytest.fixture(scope="module")
def refused(net: Trial) -> dict[str, str]:
    """What people read who do not get in."""
    return read_by_all(net, PROPOSALS["federation.rounds"])


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (
            "expired",
            "client.crt: the certificate holds from .* to .*, and this machine says .*\n  fix: set the clock, or ask",
        ),
        ("twice", "kit: another process runs this kit\n  fix: end that one first"),
        ("twice at the server", "server: another process runs this kit\n  fix: end that one first"),
        (
            "carried away",
            "hospital-a: another process is connected with this kit, perhaps on another machine\n  fix: end",
        ),
        ("unreachable", r"10\.213\.2\.2:8002: the server cannot be reached: .*\n  fix: see to the network"),
        ("port taken", "port 8002: the port cannot be used: Address already in use\n  fix: end what listens there"),
        ("outside the policy", "federation.rounds: 1000 rounds are more than are done here"),
    ],
)
def test_who_does_not_get_in_reads_why(refused: dict[str, str], what: str, line: str) -> None:
    assert re.search(line, refused[what]), refused[what]
    assert "Traceback" not in refused[what]


def test_the_server_itself_refuses_an_expired_certificate_and_a_plain_text(net: Trial) -> None:
    assert hello(net, (net.kit("hospital-a") / "startup" / "client.crt").read_bytes())
    assert not hello(net, expired(net))

    def plain() -> bytes:
        with socket.create_connection(WIRE, 5) as link, suppress(ConnectionError):
            link.sendall(b"GET /in-plain-text HTTP/1.1\r\n\r\n")
            return link.recv(64)
        return b""

    said = in_host(net.host("hospital-a").namespace, plain)
    assert b"HTTP" not in said
    assert b"/in-plain-text" in b"".join(net.hosts.relay.recorded())  # what is not encrypted is seen there


def test_a_site_says_within_seconds_where_nobody_answers(net: Trial, refused: dict[str, str]) -> None:
    kit = open_kit(net.host("hospital-a").home / "away")
    begun = time.monotonic()
    found = in_host(net.host("hospital-a").namespace, lambda: obstacle(kit))
    assert found is not None
    assert found.error.where == f"{kit.host}:{kit.port}"
    assert time.monotonic() - begun < 6


PROPOSALS: dict[str, dict[str, Any]] = {
    "model.name": {"model.name": "smollm2-135m"},
    "model.adapter.kind": {"model.adapter": {"kind": "ia3"}},
    "data.template": {"data.template": "/etc/hostname"},
    "federation.rounds": {"federation.rounds": 1000},
    "federation.clients_per_round": {"federation.clients_per_round": 1},
    "federation.schedule.least": {"federation.schedule.least": 1},
    "compare.baselines": {"compare.baselines": ["pooled"]},
    "cache_dir": {"cache_dir": "/etc"},
    "optimizer.lr": {"optimizer.lr": [n / 1000 for n in range(1, 60)]},
}
"""Recipes outside the sites' policies, by the key at fault."""


def doors(net: Trial) -> DoorSites:
    """The sites, asked by the coordinator."""
    return DoorSites(door_of(net.hosts.lab.home / "trial" / "server"))


@pytest.mark.parametrize("key", PROPOSALS)
def test_a_recipe_outside_the_policy_is_refused_by_its_key(net: Trial, key: str) -> None:
    values = changed(listing(net.hosts.shared / "model", Path("/nowhere")), PROPOSALS[key])
    question = json.dumps({"run": "0123456789abcdef", "recipe": dump_yaml(values)}).encode()
    with pytest.raises(SiteError) as caught:
        ask_long(doors(net), "hospital-a", PROPOSE, question, 20)
    assert (caught.value.cause, caught.value.error.where) == ("refused", key)
    assert f"says no to a recipe: {key}: {caught.value.error.what}" in net.log("hospital-a")


def test_a_job_outside_the_accepted_recipe_is_refused(net: Trial, tmp_path: Path) -> None:
    recipe = read_recipe(listing(net.hosts.shared / "model", Path("/nowhere")))
    sites = RemoteSites(doors(net), SITES)
    known = sites.enrol(recipe, tmp_path, lambda line: None)
    join_sites(doors(net), known, CHILDREN)
    good = Job(work="valid", shared=Shared({"w": torch.ones(4)}), version=1, clients=(0, 1, 2), seed=1, base="0" * 16)

    def asked(job: Job, sha256: str = recipe_sha256(recipe), turn: int = 0) -> list[str]:
        def home(client: int) -> str:
            return known.homes[(client + turn) % 3]

        with FederatedEngine(doors(net), home, recipe=sha256, state="federated/forged") as engine:
            replies = list(engine.replies([engine.submit(job)], time.monotonic() + 30))
        assert len(replies) == len(job.clients)
        assert all(one.message is None for one in replies)
        return [str(one.error) for one in replies]

    try:
        for reason, errors in {
            "the server's recipe is 000": asked(good, "0" * 64),
            "asks for the work 'alone'": asked(replace(good, work="alone")),
            "asks for the work 'train lr=0.02'": asked(replace(good, work="train lr=0.02")),
            "not of this site": asked(good, turn=1),
            "is of step 9, and 2 rounds were accepted": asked(replace(good, version=9)),
            "has `least_clients: 2`": asked(replace(good, work="train lr=0.001", clients=(0,))),
            "made for base model": asked(good),
        }.items():
            assert all(reason in error for error in errors), (reason, errors)
    finally:
        sites.close()
    assert "refuses a job: job: is of step 9, and 2 rounds were accepted" in net.log("hospital-b")


class OtherModel:
    """Sites that open another model than the coordinator: its files are exchanged when they have."""

    def __init__(self, net: Trial) -> None:
        self.inner, self.model = RemoteSites(doors(net), SITES), net.hosts.shared / "model" / "model.safetensors"
        self.mine = self.model.read_bytes()
        save_model(self.model.parent, seed=1, more=ANSWERS)
        self.model.chmod(0o644)
        self.engine, self.close, self.signer = self.inner.engine, self.inner.close, self.inner.signer

    def enrol(self, *about: Any) -> Any:
        try:
            return self.inner.enrol(*about)
        finally:
            self.model.write_bytes(self.mine)


def test_another_model_at_the_sites_is_told_by_name(net: Trial, tmp_path: Path) -> None:
    sites = OtherModel(net)
    try:
        with pytest.raises(LichenError, match="made for base model") as caught:
            lichen.run(listing(net.hosts.shared / "model", Path("/nowhere")), out=tmp_path / "run", sites=sites)
    finally:
        sites.close()
    assert "fix: load the same model at the same precision on both sides" in str(caught.value)


def test_a_site_checks_its_policy_and_asks_it_about_the_recipe_that_came(net: Trial) -> None:
    checked = net.guide.type(
        net.host("hospital-b"), "lichen federation policy policy.yaml", policy=net.kit("hospital-b") / "policy.yaml"
    )
    assert (checked["models"], checked["adapters"]) == ([str(net.hosts.shared / "model")], ["lora"])
    host, start = net.host("hospital-a"), "lichen federation policy policy.yaml --recipe submitted.yaml"
    mine = json.loads((net.run / "state" / "run.json").read_text())["run"]
    came = net.kit("hospital-a") / "runs" / mine / "recipe.yaml"
    policy = net.kit("hospital-a") / "policy.yaml"
    assert net.guide.type(host, start, policy=policy, submitted=came)["accepted"] == recipe_sha256(read_recipe(came))


def test_the_page_of_a_server_is_for_its_own_machine(net: Trial) -> None:
    def page(path: str) -> str:
        with closing(HTTPConnection("127.0.0.1", 8080, timeout=10)) as link:
            link.request("GET", f"/{path}")
            return link.getresponse().read().decode()

    rows = json.loads(in_host(net.hosts.lab.namespace, lambda: page("status.json")))
    assert [row["site"] for row in rows] == list(SITES)
    assert "hospital-a" in in_host(net.hosts.lab.namespace, lambda: page("metrics"))
    assert "<script" not in in_host(net.hosts.lab.namespace, lambda: page(""))
    assert answers(net, "lab", "127.0.0.1", 8080)
    assert not answers(net, "lab", net.hosts.lab.address, 8080)


def test_a_slow_wire_is_waited_for_and_a_cut_one_is_taken_again(net: Trial) -> None:
    sites, relay, begun = doors(net), net.hosts.relay, time.monotonic()
    relay.delay = 0.3
    assert ask_long(sites, "hospital-b", STATUS, b"", 20)
    relay.delay = 0.0
    assert time.monotonic() - begun > 0.6  # there and back
    relay.cut()

    def there(names: tuple[str, ...]) -> None:
        end = time.monotonic() + 90
        while set(sites.seen()) != set(names):
            assert time.monotonic() < end, sites.seen()
            time.sleep(0.2)

    there(())
    with pytest.raises(SiteError) as caught:
        ask_long(sites, "hospital-b", STATUS, b"", 5)
    assert caught.value.cause == "gone"
    relay.mend()
    there(SITES)
    assert ask_long(sites, "hospital-b", STATUS, b"", 20)


def test_stop_ends_all_and_leaves_no_process(net: Trial) -> None:
    everyone = {net.hosts.lab.name: "trial", **{site: str(net.kit(site)) for site in SITES}}
    for name, place in reversed(everyone.items()):
        said = net.guide.type(net.host(name), "lichen stop KIT", kit=place)["stopped"]
        assert said == ("the server of trial" if name == net.hosts.lab.name else f"site {name}")
    assert {name: process.wait(20) for name, process in net.processes.items()} == dict.fromkeys(everyone, 0)
    end = time.monotonic() + 10
    while left := [pid for name in everyone for pid in net.host(name).processes()]:
        assert time.monotonic() < end, left
        time.sleep(0.1)
    assert all("has left" in net.log(site) for site in SITES)
    assert "hospital-a has gone" in net.log(net.hosts.lab.name)


ELSEWHERE = {
    "lichen federation bar hospital-a": "test_network.py",
    "lichen submit --resume RUN": "test_host.py",
    "lichen status trial --json": "test_leaving_site.py",
    "lichen serve trial --resume RUN": "test_kills.py",
    "lichen federation new trial --host fl.example.org --port 8002 --transport grpc": "test_own_kits.py",
    "lichen federation ask --name hospital-a --for trial --transport grpc": "test_own_kits.py",
    **dict.fromkeys(
        (
            "lichen withdraw trial-hospital-a/kit",
            "lichen withdraw trial-hospital-b/kit --of hospital-a",
            "lichen forget trial --site hospital-a",
            "lichen forget trial --site NAME",
        ),
        "test_leaving_site.py",
    ),
    **dict.fromkeys(("lichen serve", "lichen submit", "lichen join", "lichen stop", "lichen run"), "names of commands"),
}
"""Commands of the page that are typed in other tests."""


def test_every_command_of_the_page_is_typed(net: Trial) -> None:
    assert net.guide.typed | ELSEWHERE.keys() == set(page_commands())
    assert all(any(name in line for line in page_commands()) for name in NAMES)

"""A federation of three sites on this machine, each behind a relay, whose processes, links and disks can be harmed.

For ``benchmarks/faults.py``. Every process is one that a person would start; nothing is replaced. The digits of the
gallery recipe are shared out to ten clients, as the recipe does it, and the clients to the sites.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from free_port import free_port

SITES = ("north", "east", "south")
COUNTS = Path(__file__).parent / "faults_counts"
CLOCK = Path(__file__).parent / "faults_clock.c"
MAY = ["from_scratch=true", "labels=true", "most_rounds=1000"]
DISK = 64 << 20
"""Bytes of the disk that the kit of the last site lies on."""

Kind = Literal["join", "worker", "site link", "server link", "serve", "submit"]
"""Processes: a site's small one, its worker, NVFlare's at a site and at the server, and the coordinator's two."""


class Relay:
    """Passes bytes between a site and the server; may hold them back, or hang up and let nobody in."""

    def __init__(self, to: int) -> None:
        self.port, self._to = free_port(), to
        self._flows, self._refuses = threading.Event(), False
        self._flows.set()
        self._links = set[socket.socket]()
        self._socket = socket.create_server(("localhost", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float, *, refuse: bool) -> None:
        """Let nothing pass for a while: as a cable that is pulled, or with both ends hung up."""
        self._refuses = refuse
        self._flows.clear()
        for link in list(self._links) if refuse else ():
            _hang_up(link)
        time.sleep(seconds)
        self._refuses = False
        self._flows.set()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._meet, args=(here,), daemon=True).start()

    def _meet(self, here: socket.socket) -> None:
        if self._refuses:
            return _hang_up(here)
        self._flows.wait()
        try:
            there = socket.create_connection(("localhost", self._to))
        except OSError:
            return _hang_up(here)
        self._links |= {here, there}
        back = threading.Thread(target=self._copy, args=(there, here), daemon=True)
        back.start()
        self._copy(here, there)
        back.join()
        for link in (here, there):
            self._links.discard(link)
            link.close()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                sink.sendall(data)
        for link in (source, sink):
            _hang_up(link)

    def close(self) -> None:
        """Listen no more, and hang up."""
        for link in (self._socket, *self._links):
            _hang_up(link)
        self._socket.close()


def _hang_up(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


@dataclass
class EndedError(Exception):
    """A process that should run has ended.

    Attributes:
        name: Which.
        said: Its last words.
    """

    name: str
    said: str


class Trial:
    """The federation, with whatever of it runs.

    Args:
        home: A folder for all of it, which is not there yet. The kit of the last site lies on a small disk, which is
            mounted: this process is to be in a namespace of its own.
        chat: The sites hold what people wrote, in place of digits.

    Attributes:
        clocks: Days by which the clock is off of what is started under a name, where it is.
    """

    def __init__(self, home: Path, *, chat: bool = False) -> None:
        self.home, self.folder, self.chat = home, home / "trial", chat
        self.clocks: dict[str, int] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        home.mkdir(parents=True, exist_ok=True)
        self._make()
        self.relays = {site: Relay(self._port()) for site in SITES}
        for site, relay in self.relays.items():
            file = self.kit(site) / "startup" / "fed_client.json"
            body = json.loads(file.read_text(encoding="utf-8"))
            body["servers"][0]["service"]["target"] = f"localhost:{relay.port}"
            file.write_text(json.dumps(body), encoding="utf-8")

    def _make(self) -> None:
        from lichen.federation.policy.keys import change_policy

        words = [
            "federation",
            "new",
            "trial",
            "--out",
            str(self.folder),
            "--host",
            "localhost",
            "--port",
            str(free_port()),
        ]
        command = [sys.executable, "-m", "lichen", *words, "--sites", ",".join(SITES)]
        before = {**os.environ, **other_clock(self.home, -3)}  # certificates that are three days old
        subprocess.run(command, check=True, env=before, stdout=subprocess.DEVNULL)
        for site in SITES:
            change_policy(self.kit(site) / "policy.yaml", [*MAY, "models=[smollm2-135m]"] if self.chat else MAY)
        (save_writers if self.chat else save_sites)(self.home / "sites")
        small = self.home / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(small)], check=True)
        shutil.move(self.kit(SITES[-1]), small)
        self.kit(SITES[-1]).symlink_to(small / SITES[-1])

    def _port(self) -> int:
        body = json.loads((self.folder / "server/startup/fed_server.json").read_text(encoding="utf-8"))
        return int(body["servers"][0]["service"]["target"].rpartition(":")[2])

    def kit(self, site: str) -> Path:
        """A site's kit."""
        return self.folder / "kits" / site

    def counts(self, site: str) -> Path:
        """Where a site counts its trainings."""
        return self.home / f"{site}.counts"

    # --- processes ---------------------------------------------------------------------------------------------------

    def start(self, name: str, words: Sequence[str]) -> None:
        """Start a command of Lichen, which ends with this process."""
        from lichen.core.children import bound_environment

        command = [sys.executable, "-m", "lichen", *words]
        path = os.pathsep.join([str(COUNTS), os.environ.get("PYTHONPATH", "")])
        about = {"PYTHONPATH": path, "FAULTS_COUNTS": str(self.counts(name))} if name in SITES else {}
        if name in self.clocks:
            about |= other_clock(self.home, self.clocks[name])
        with open(self.home / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                cwd=self.home,
                env={**bound_environment(), **about},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def serve(self) -> None:
        """Start the server."""
        self.start("serve", ["serve", str(self.folder)])

    def join(self, site: str) -> None:
        """Start a site."""
        self.start(site, ["join", str(self.kit(site)), "--data", str(self.home / "sites" / f"{site}.jsonl")])

    def submit(self, run: Path, recipe: Path | None) -> None:
        """Start a run, or go on with it."""
        words = ["submit", "--resume", str(run)] if recipe is None else ["submit", str(recipe), "--out", str(run)]
        self.start("submit", [*words, "--federation", str(self.folder), "--wait", "200", "--quiet"])

    def keep_up(self) -> None:
        """Start what does not run."""
        for name in ("serve", *SITES):
            if name not in self.running or self.running[name].poll() is not None:
                self.serve() if name == "serve" else self.join(name)

    def pid(self, kind: Kind, site: str) -> int | None:
        """A process; None where it is not there just now."""
        name = {"serve": "serve", "server link": "serve", "submit": "submit"}.get(kind, site)
        process = self.running.get(name)
        if process is None or process.poll() is not None:
            return None
        if kind in ("join", "serve", "submit"):
            return process.pid
        if kind == "server link":
            return _child(process.pid, "server_train")
        worker = _child(process.pid, "worker")
        return worker if worker is None or kind == "worker" else _child(worker, "client_train")

    def kill(self, kind: Kind, site: str) -> bool:
        """Kill a process; whether it was there."""
        pid = self.pid(kind, site)
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if kind in ("join", "serve", "submit"):
            self.running[site if kind == "join" else kind].wait()
        return True

    def fill_disk(self) -> Path:
        """Fill the small disk; the file to delete."""
        ballast = self.home / "small" / "ballast"
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        with suppress(OSError), open(ballast, "ab", buffering=0) as file:
            while True:
                file.write(bytes(512))
        return ballast

    def close(self) -> None:
        """End all, gently: what was killed leaves nothing."""
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for relay in self.relays.values():
            relay.close()


def other_clock(home: Path, days: int) -> dict[str, str]:
    """The environment of a process whose clock is off."""
    made = home / "clock.so"
    if not made.exists():
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(CLOCK)], check=True)
    return {"LD_PRELOAD": str(made), "FAULTS_CLOCK": str(86400 * days)}


def _child(pid: int, word: str) -> int | None:
    """A child of a process whose command line has a word."""
    with suppress(OSError):
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in tasks.read_text(encoding="utf-8").split():
                words = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(one == word or one.endswith(f".{word}") for one in words):
                    return int(child)
    return None


def wait_until(what: Callable[[], Any], seconds: float, name: str) -> None:
    """Wait for something to be true.

    Raises:
        EndedError: if the time is up.
    """
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise EndedError(name, "it did not come")
        time.sleep(0.02)


def save_sites(folder: Path) -> None:
    """The digits of ten clients, shared out as the gallery recipe does it, in a file for each site."""
    import numpy as np

    from lichen.core.seeds import numpy_generator
    from lichen.data.sources.records import load_records

    rng, records = numpy_generator(0, "sites"), load_records("digits")
    owners = dict[int, list[int]]()
    for label in sorted({str(one.label) for one in records}):
        mine = rng.permutation([at for at, one in enumerate(records) if str(one.label) == label])
        ends = (np.cumsum(rng.dirichlet(np.ones(10))) * len(mine)).astype(int)[:-1]
        for client, part in enumerate(np.split(mine, ends)):
            owners.setdefault(client, []).extend(int(at) for at in part)
    rows = dict[str, list[dict[str, Any]]]()
    for number, site in enumerate(SITES):
        rows[site] = [
            {
                "client": f"client-{client}",
                "pixels": np.asarray(records[at].features)[0].tolist(),
                "label": str(records[at].label),
            }
            for client in sorted(owners)
            if client % len(SITES) == number
            for at in sorted(owners[client])
        ]
    _save(folder, rows)


def save_writers(folder: Path, clients: int = 9, most: int = 120) -> None:
    """What some people wrote, and what it answers: the first who wrote as much, in a file for each site."""
    from lichen.data.sources.records import load_records

    written = dict[str, list[dict[str, str]]]()
    for one in load_records("chitchat"):
        mine = written.setdefault(one.client, [])
        if len(mine) < most and one.prompt:
            mine.append({"client": one.client, "prompt": one.prompt, "text": one.text})
    some = [mine for mine in written.values() if len(mine) == most][:clients]
    _save(folder, {site: list(chain(*some[number :: len(SITES)])) for number, site in enumerate(SITES)})


def _save(folder: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for site, some in rows.items():
        (draft / f"{site}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")
    draft.rename(folder)

"""Hosts of organisations on one machine: each a network of its own, with a user of its own; between them one wire.

A host is a network namespace with one cable, to a namespace in the middle that forwards nothing. There a relay listens
at the coordinator's name and port, and passes on what comes: it is all that one host reaches of another. Each host's
person is a user without rights, with a home and files of their own. Only root can make any of it.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import lichen

__all__ = ["COORDINATOR", "NAME", "PORT", "Host", "Hosts", "NoHostsError", "Relay", "hosts", "in_host", "missing"]

NAME, PORT = "fl.example.org", 8002
"""The coordinator's server, as every host knows it."""

COORDINATOR = "lab"

_MIDDLE, _RESOLV = "middle", os.path.realpath("/etc/resolv.conf")
_FIRST_USER = 61_200
_SOURCES = Path(lichen.__file__).parent.parent
T = TypeVar("T")


def missing() -> str:
    """Why no hosts can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "only root makes hosts"
    if lacking := [program for program in ("ip", "setpriv", "mount") if shutil.which(program) is None]:
        return f"there is no {lacking[0]} here"
    trial = f"lichen-{os.getpid()}-trial"
    if subprocess.run(["ip", "netns", "add", trial], capture_output=True, check=False).returncode:
        return "this machine makes no network namespaces"
    subprocess.run(["ip", "netns", "del", trial], capture_output=True, check=True)
    return ""


class NoHostsError(Exception):
    """A machine that lacks what hosts are made of, though it has the programs."""


class Host(NamedTuple):
    """One organisation's machine.

    Attributes:
        name: The organisation's.
        namespace: Its network.
        address: On its cable.
        user: Who works there; also the group.
        home: Their folder, which others may enter, so that it is the files' own modes that keep them out.
        prelude: Shell words that make what the interpreter needs readable there.
    """

    name: str
    namespace: str
    address: str
    user: int
    home: Path
    prelude: str

    def words(self, command: Sequence[str | Path]) -> list[str]:
        """A command as this host's person gives it, to be run by root."""
        rights = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--no-new-privs"]
        script = f"{self.prelude}cd {shlex.quote(str(self.home))} && exec {shlex.join([*rights, *map(str, command)])}"
        return ["ip", "netns", "exec", self.namespace, "sh", "-ec", script]

    def start(self, command: Sequence[str | Path], **more: object) -> subprocess.Popen[str]:
        """Start a command here; ``lichen`` is this interpreter's own."""
        command = [sys.executable, "-m", "lichen", *command[1:]] if command[0] == "lichen" else command
        kept = {
            key: os.environ[key] for key in ("PATH", "LANG", "OMP_NUM_THREADS", "HF_HUB_OFFLINE") if key in os.environ
        }
        own = {"HOME": str(self.home), "USER": self.name, "TMPDIR": str(self.home), "PYTHONPATH": str(_SOURCES)}
        settings = {"env": {**kept, **own, "PYTHONDONTWRITEBYTECODE": "1"}, "umask": 0o022, "text": True, **more}
        return subprocess.Popen(self.words(command), **settings)  # type: ignore[call-overload, no-any-return]

    def run(self, command: Sequence[str | Path], *, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(map(str, command)), process.returncode, out, err)

    def own(self, path: Path) -> Path:
        """Give a file or folder to this host's person, for them alone."""
        for one in (path, *path.rglob("*")):
            os.chown(one, self.user, self.user)
            one.chmod(0o700 if one.is_dir() else 0o600)
        return path

    def processes(self) -> list[int]:
        """All that runs here."""
        return _pids(self.namespace)


class Hosts(NamedTuple):
    """The coordinator's host, those of the sites, and the wire between them."""

    lab: Host
    sites: dict[str, Host]
    shared: Path
    relay: Relay


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def _pids(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
    return [int(one) for one in found.split()]


def _remove(namespace: str) -> None:
    """End what runs in a namespace that was made here, and take it down."""
    for _ in range(50):
        if not (left := _pids(namespace)):
            break
        for one in left:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _left_over() -> None:
    """Take down what a process of tests left that was killed itself."""
    for line in _ip("netns", "list").splitlines():
        words = line.split()[0].split("-")
        if len(words) == 3 and words[0] == "lichen" and words[1].isdigit() and not Path("/proc", words[1]).exists():
            _remove("-".join(words))


def in_host(namespace: str, do: Callable[[], T]) -> T:
    """Do something in a thread whose sockets are of that network; threads that it starts are there, too."""
    found: list[T] = []
    failed: list[BaseException] = []

    def inside() -> None:
        try:
            with open(f"/run/netns/{namespace}", "rb") as place:
                if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0x40000000):
                    raise OSError(ctypes.get_errno(), "setns")
            found.append(do())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


class Relay:
    """Passes on all that comes to a port, and keeps it; it can be slow, and be cut.

    Attributes:
        delay: Seconds that each piece is held back.
    """

    def __init__(self, namespace: str, to: tuple[str, int]) -> None:
        self.delay = 0.0
        self._to, self._up = to, True
        self._links: set[socket.socket] = set()
        self._kept: list[list[bytes]] = []
        self._lock = threading.Lock()
        self._listener = in_host(namespace, self._listen)

    def _listen(self) -> socket.socket:
        listener = socket.create_server(("", PORT), backlog=64)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                link, _ = listener.accept()
                threading.Thread(target=self._pass, args=(link,), daemon=True).start()

    def _pass(self, link: socket.socket) -> None:
        with link, suppress(OSError):
            if not self._up:
                return
            with socket.create_connection(self._to, 5) as other:
                other.settimeout(None)
                kept: list[list[bytes]] = [[], []]
                with self._lock:
                    self._kept += kept
                    self._links |= {link, other}
                back = threading.Thread(target=self._pump, args=(other, link, kept[1]), daemon=True)
                back.start()
                self._pump(link, other, kept[0])
                back.join()
                with self._lock:
                    self._links -= {link, other}

    def _pump(self, source: socket.socket, sink: socket.socket, kept: list[bytes]) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                kept.append(piece)
                if self.delay:
                    time.sleep(self.delay)
                sink.sendall(piece)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End every connection, and take no new one until :meth:`mend`."""
        self._up = False
        with self._lock:
            links = list(self._links)
        for link in links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Take connections again."""
        self._up = True

    def recorded(self) -> list[bytes]:
        """All bytes so far, by connection and direction."""
        with self._lock:
            return [b"".join(kept) for kept in self._kept]

    def close(self) -> None:
        """Pass on nothing more."""
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[Hosts]:
    """A coordinator's host and one for each of the names; all of it is gone afterwards."""
    _left_over()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        (folder / "shared").mkdir()
        try:
            middle = _namespace(stack, _MIDDLE)
            made = {
                name: _host(stack, folder, middle, number, name) for number, name in enumerate((COORDINATOR, *names))
            }
            lab = made.pop(COORDINATOR)
            relay = Relay(middle, (lab.address, PORT))
        except (subprocess.CalledProcessError, OSError) as error:
            raise NoHostsError(f"this machine makes no hosts: {error} {getattr(error, 'stderr', '')}") from None
        there = lab.run([sys.executable, "-c", "import lichen, nvflare"])
        if there.returncode:
            raise NoHostsError(f"a user without rights cannot use this interpreter here: {there.stderr[-300:]}")
        stack.callback(relay.close)
        yield Hosts(lab, made, folder / "shared", relay)


def _namespace(stack: ExitStack, name: str) -> str:
    namespace = f"lichen-{os.getpid()}-{name.replace('-', '_')}"
    _ip("netns", "add", namespace)
    stack.callback(_remove, namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")
    return namespace


def _host(stack: ExitStack, folder: Path, middle: str, number: int, name: str) -> Host:
    """One host, its cable, and what it calls the coordinator: its own address there, elsewhere the relay's."""
    namespace, cable = _namespace(stack, name), f"host{number}"
    near, far = f"10.213.{number}.1", f"10.213.{number}.2"
    _ip("-n", middle, "link", "add", cable, "type", "veth", "peer", "name", "wire", "netns", namespace)
    for where, address, link in ((middle, near, cable), (namespace, far, "wire")):
        _ip("-n", where, "address", "add", f"{address}/24", "dev", link)
        _ip("-n", where, "link", "set", link, "up")
    _ip("-n", namespace, "route", "add", "default", "via", near)
    home = folder / name
    home.mkdir()
    home.chmod(0o755)
    os.chown(home, _FIRST_USER + number, _FIRST_USER + number)
    known = folder / f"{name}.names"
    known.write_text(f"127.0.0.1 localhost\n{far if number == 0 else near} {NAME}\n")
    return Host(name, namespace, far, _FIRST_USER + number, home, _prelude(folder, known))


def _prelude(folder: Path, known: Path) -> str:
    """Mounts that only the command itself sees: its own names of hosts, and an interpreter that its user may open."""
    asked = folder / "asked"
    asked.write_text("nameserver 127.0.0.1\n")  # nobody is there, so that a name that is not known is not waited for
    lines = [f"mount --bind {shlex.quote(str(file))} {of}" for file, of in ((known, "/etc/hosts"), (asked, _RESOLV))]
    needed: Mapping[Path, list[Path]] = {}
    for path in {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), _SOURCES.resolve()}:
        closed = [above for above in reversed(path.parents) if not above.stat().st_mode & 0o001]
        if closed:
            needed = {**needed, closed[0]: [*needed.get(closed[0], []), path]}
    for closed, paths in needed.items():
        kept = {path: folder / f"kept{at}" for at, path in enumerate(paths)}
        for path, aside in kept.items():
            aside.mkdir(exist_ok=True)
            lines.append(f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(aside))}")
        lines.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(closed))}")
        for path, aside in kept.items():
            lines.append(f"mkdir -p {shlex.quote(str(path))}")
            lines.append(f"mount --bind {shlex.quote(str(aside))} {shlex.quote(str(path))}")
    return "".join(f"{line}\n" for line in lines)

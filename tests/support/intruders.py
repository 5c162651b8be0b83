"""People who do not get into a federation of hosts, and what each of them reads."""

from __future__ import annotations

import datetime
import json
import shutil
import socket
import ssl
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError
from lichen.federation.asking import DoorSites
from lichen.federation.door import door_of
from lichen.federation.standing import STATUS
from support.hosts import NAME, PORT, Host, in_host
from support.submitted import changed
from support.trial import Trial, listing

__all__ = ["WIRE", "expired", "hello", "read_by_all"]

WIRE = ("10.213.1.1", PORT)
"""Where hospital-a finds the server: at its end of the wire between."""


def read_by_all(net: Trial, outside: dict[str, Any]) -> dict[str, str]:
    """What people read who do not get in, all of them at once.

    Args:
        net: What runs.
        outside: Changes that make a recipe one that the sites refuse.
    """
    lab, here, there = net.hosts.lab, net.host("hospital-a"), net.host("hospital-b")
    old, carried = _kept(net, "old", here), _kept(net, "carried", there)
    (old / "startup" / "client.crt").write_bytes(expired(net))
    away = _kept(net, "away", here)
    kit = away / "startup" / "fed_client.json"
    kit.write_text(kit.read_text().replace(NAME, there.address))
    again = lab.home / "again"
    shutil.copytree(lab.home / "trial", again, ignore=shutil.ignore_patterns("run", "supervisor"))
    lab.own(again)

    def typed(start: str, place: str | Path = "") -> list[str]:
        words = net.guide.words(start, site="hospital-a", data=net.data("hospital-a").name)
        return [str(place) if word.startswith("trial") and place else word for word in words]

    join = "lichen join trial-hospital-a/kit"
    commands = {
        "expired": (here, typed(join, old)),
        "twice": (here, typed("lichen federation connect trial-hospital-a/kit")),
        "twice at the server": (lab, typed("lichen federation connect trial/server")),
        "carried away": (there, [*typed(join, carried)[:-1], net.data("hospital-b").name]),
        "unreachable": (here, [*typed("lichen federation connect trial-hospital-a/kit", away), "--seconds", "7"]),
        "port taken": (lab, typed("lichen serve trial", again)),
    }
    with ThreadPoolExecutor(len(commands)) as pool:
        done = pool.map(lambda one: one[0].run(one[1]), commands.values())
        read = dict(zip(commands, done, strict=True))
    _back(lab.home / "trial" / "server")
    read["outside the policy"] = lab.run(net.guide.words("lichen submit notes.yaml", recipe=_submitted(net, outside)))
    assert {name: one.returncode for name, one in read.items()} == dict.fromkeys(read, 2), read
    return {name: one.stderr for name, one in read.items()}


def _back(server: Path) -> None:
    """Wait until hospital-a has its connection back, which the kit that was carried away has taken.

    Where the server has forgotten it, the site sees that after a while, and connects anew.
    """
    sites, end = DoorSites(door_of(server)), time.monotonic() + 90
    while True:
        with suppress(SiteError):
            ask_long(sites, "hospital-a", STATUS, b"", 2)
            return
        assert time.monotonic() < end, "it does not come back"
        time.sleep(0.3)


def _kept(net: Trial, name: str, host: Host) -> Path:
    """A copy of hospital-a's kit at a host."""
    copy = host.home / name
    shutil.copytree(net.kit("hospital-a"), copy, ignore=shutil.ignore_patterns("run", "supervisor", "runs"))
    return host.own(copy)


def expired(net: Trial) -> bytes:
    """The certificate of hospital-a, signed by the authority for a day of last week."""
    authority = net.hosts.lab.home / "trial" / "authority"
    old = x509.load_pem_x509_certificate((net.kit("hospital-a") / "startup" / "client.crt").read_bytes())
    key = serialization.load_pem_private_key((authority / "rootCA.key").read_bytes(), None)
    assert isinstance(key, RSAPrivateKey)
    first = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=7)
    made = x509.CertificateBuilder().issuer_name(old.issuer).subject_name(old.subject).public_key(old.public_key())
    made = made.serial_number(x509.random_serial_number())
    made = made.not_valid_before(first).not_valid_after(first + datetime.timedelta(days=1))
    for one in old.extensions:
        made = made.add_extension(one.value, one.critical)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _submitted(net: Trial, changes: dict[str, Any]) -> Path:
    """A recipe's file at the coordinator."""
    file = net.hosts.lab.home / "other.yaml"
    file.write_text(json.dumps(changed(listing(net.hosts.shared / "model", Path("/nowhere")), changes)))
    net.hosts.lab.own(file)
    return file


def hello(net: Trial, certificate: bytes) -> bytes:
    """What the server says first to a client of HTTP/2 with this certificate; empty: nothing, or it hangs up."""
    startup = net.kit("hospital-a") / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(startup / "rootCA.pem")
    context.set_alpn_protocols(["h2"])
    with tempfile.NamedTemporaryFile() as file:
        file.write(certificate)
        file.flush()
        context.load_cert_chain(file.name, startup / "client.key")

    def talk() -> bytes:
        with (
            suppress(ssl.SSLError, ConnectionError),
            socket.create_connection(WIRE, 5) as link,
            context.wrap_socket(link, server_hostname=NAME) as safe,
        ):
            safe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            return safe.recv(64)
        return b""

    return in_host(net.host("hospital-a").namespace, talk)

"""Says to the person at a site why it does not get in, which NVFlare writes into logs of the server at best.

A kit is held against itself (its name, its dates), and then a connection is tried with its certificate, as NVFlare
would. Nothing here needs torch.
"""

from __future__ import annotations

import datetime
import socket
import ssl
from contextlib import suppress
from typing import NamedTuple, final

from lichen.core.errors import LichenError
from lichen.federation.kits.settle import Kit

__all__ = ["obstacle"]

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""What a client of HTTP/2 sends first, as a server of gRPC awaits it."""

_PATIENCE = 5.0
"""Seconds to wait for a connection."""

_DATES = (9, 10)
"""How OpenSSL says that a certificate is not in force yet, or not any more."""

_ANSWER = "ask the coordinator for a new answer: lichen federation ask, admit and accept"


@final
class Obstacle(NamedTuple):
    """Why a kit cannot connect.

    Attributes:
        error: What a person reads.
        tries: After how many it will not pass by itself; 0: it may at any time.
    """

    error: LichenError
    tries: int


def obstacle(kit: Kit) -> Obstacle | None:
    """What keeps a site from the server now; None if it would be let in to say its name."""
    fault = _kit_fault(kit)
    if fault is not None:
        return Obstacle(fault, 1)
    where = f"{kit.host}:{kit.port}"
    startup = kit.folder / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = kit.transport == "grpc"  # NVFlare proves the server's name by a signature
    try:
        context.load_verify_locations(startup / "rootCA.pem")
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
    except (OSError, ssl.SSLError):
        return Obstacle(LichenError("its key and certificates cannot be read", where=str(startup), fix=_ANSWER), 1)
    context.set_alpn_protocols(["h2"])
    met = False
    try:
        with (
            socket.create_connection((kit.host, kit.port), _PATIENCE) as link,
            context.wrap_socket(link, server_hostname=kit.host) as talk,
        ):
            met = True
            talk.sendall(_HELLO)
            if talk.recv(1):
                return None
        raise ConnectionResetError  # without a word: gRPC sends none to those whose certificate it does not accept
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _DATES:
            what = f"the server's certificate is not in force on the day that this machine says, {_now():%Y-%m-%d}"
            fix = "set this machine's clock; if it is right, ask the coordinator to make the server's kit again"
            return Obstacle(LichenError(what, where=where, fix=fix), tries=1)
        what = f"the server there is not of the authority of this kit ({kit.federation}); nothing was sent to it"
        fix = "compare the fingerprint with the coordinator, and ask for the answer again"
        return Obstacle(LichenError(what, where=where, fix=fix), tries=1)
    except socket.gaierror:
        fix = "see to the network's names, or let the coordinator make kits with another --host"
        return Obstacle(LichenError("the host's name is not known here", where=where, fix=fix), tries=0)
    except ConnectionRefusedError:
        what = "nobody listens there: the server does not run, or a firewall refuses"
        return Obstacle(LichenError(what, where=where, fix="wait for the coordinator to start it"), tries=0)
    except (ssl.SSLError, ConnectionError) as error:
        if met:  # or it is just going down
            what = (
                "the server does not accept this kit's certificate: it is of another authority, or its clock is wrong"
            )
            return Obstacle(LichenError(what, where=where, fix=f"{_ANSWER}; or let it set its clock"), tries=3)
        what = f"no encrypted connection: {type(error).__name__}"
        return Obstacle(LichenError(what, where=where, fix="see whether the port is the server's"), tries=0)
    except OSError as error:
        what = f"the server cannot be reached: {error.strerror or 'no answer in time'}"
        return Obstacle(LichenError(what, where=where, fix="see to the network, and to firewalls"), tries=0)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _kit_fault(kit: Kit) -> LichenError | None:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    file = kit.folder / "startup" / "client.crt"
    with suppress(OSError, ValueError):
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        names = [str(one.value) for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if names != [kit.name]:
            what = f"the certificate is for {', '.join(names) or 'nobody'}, and the kit says {kit.name}"
            return LichenError(what, where=str(file), fix="make the kit again, from the answer file")
        now = _now()
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            what = (
                f"the certificate holds from {first:%Y-%m-%d} to {last:%Y-%m-%d}, and this machine says {now:%Y-%m-%d}"
            )
            return LichenError(what, where=str(file), fix=f"set the clock, or {_ANSWER}")
        return None
    return LichenError("the certificate cannot be read", where=str(file), fix=_ANSWER)

"""What TLS needs of a kit, and whom it has proved at the other end. Nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lichen.core.errors import LichenError
from lichen.federation.kits.settle import Kit

__all__ = ["PULSE", "import_grpc", "server_credentials", "site_credentials", "site_of"]

PULSE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # of a minute by default, and gRPC waits for the longer of the two
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
"""A link is tried every five seconds, and counts as lost ten later; half of one does not last longer."""


def import_grpc() -> Any:
    """The package, which writes nothing of its own on the screen but errors."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import grpc

    return grpc


def server_credentials(kit: Kit) -> Any:
    """The server's certificate and key; sites must show one of the same authority."""
    root, key, certificate = _read(kit, "server")
    return import_grpc().ssl_server_credentials([(key, certificate)], root, require_client_auth=True)


def site_credentials(kit: Kit) -> Any:
    """A site's certificate and key; the server must show one of the same authority, for its host."""
    return import_grpc().ssl_channel_credentials(*_read(kit, "client"))


def _read(kit: Kit, which: str) -> tuple[bytes, bytes, bytes]:
    startup = kit.folder / "startup"
    try:
        root, key, certificate = (
            (startup / name).read_bytes() for name in ("rootCA.pem", f"{which}.key", f"{which}.crt")
        )
    except OSError:
        fix = "make the kit again"
        raise LichenError("its key and certificates cannot be read", where=str(startup), fix=fix) from None
    return root, key, certificate


def site_of(proved: Mapping[str, Sequence[bytes]]) -> str | None:
    """The name in the certificate of a connection's other end, if it is a site's.

    Args:
        proved: What gRPC knows of that end: ``context.auth_context()``.
    """
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        (pem,) = proved["x509_pem_cert"]
        subject = x509.load_pem_x509_certificate(pem).subject
        names, kinds = (
            [str(one.value) for one in subject.get_attributes_for_oid(oid)]
            for oid in (NameOID.COMMON_NAME, NameOID.UNSTRUCTURED_NAME)
        )
        (shown,) = proved["x509_common_name"]
        return names[0] if kinds == ["client"] and names == [shown.decode()] else None
    except (KeyError, ValueError):
        return None

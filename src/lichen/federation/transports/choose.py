"""Opens the ends of a federation by the transport that a kit is for.

Nothing of a transport is imported but the one that is used. Nothing here needs torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from lichen.engines.sites import Sites
from lichen.federation.kits.settle import open_kit

__all__ = ["ServerEnd", "SiteEnd", "open_server", "open_site"]


class ServerEnd(Sites, Protocol):
    """The coordinator's end: the sites of a federation, until it is stopped."""

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until its person has stopped it; False when the time is up. It raises why it cannot go on."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class SiteEnd(Protocol):
    """A site's end, which answers what the server asks, until it is closed.

    Attributes:
        name: The site's.
        instance: Another one after every start of the process.
        joined: Set when the server has let it in.
    """

    name: str
    instance: str
    joined: threading.Event

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it can no longer be of the federation; False when the time is up. It raises why."""
        ...

    def close(self) -> None:
        """Say goodbye to the server, and leave."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_server(folder: Path, *, say: Callable[[str], None]) -> ServerEnd:
    """Run a server's kit.

    Args:
        folder: The kit.
        say: Told what keeps it from running, and who is cut off.

    Raises:
        LichenError: if another process runs the kit, the port is taken, or the server does not come up.
    """
    if open_kit(folder).transport == "grpc":
        from lichen.federation.transports.server import StreamSites

        return StreamSites(folder, say=say)
    from lichen.federation import network

    return network.NetworkSites(folder, say=say)


def open_site(
    folder: Path,
    answer: Callable[[str, bytes], bytes],
    *,
    say: Callable[[str], None],
    versions: Mapping[str, str] | None = None,
    instance: str = "",
    status: Callable[[], dict[str, Any]] = dict,
) -> SiteEnd:
    """Run a site's kit.

    Args:
        folder: The kit.
        answer: Gives the bytes that answer a question, of its kind and body; called by several threads at once.
        say: Told what keeps the site from the server.
        versions: What must agree at both ends, beside those of lichen, torch, numpy and Python.
        instance: Another one after every start of the process; empty: drawn.
        status: What the site is doing, as JSON can hold it, for its own person.

    Raises:
        LichenError: if another process runs the kit.
    """
    more = {"say": say, "versions": versions, "instance": instance, "status": status}
    if open_kit(folder).transport == "grpc":
        from lichen.federation.transports.site import StreamSite

        return StreamSite(folder, answer, **more)  # type: ignore[arg-type]
    from lichen.federation import network

    return network.SiteEnd(folder, answer, **more)  # type: ignore[arg-type]

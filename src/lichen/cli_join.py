"""The command ``join``, at a site: a small process, and its worker with the rows, which is started again when it dies.

Nothing heavy is imported until the worker needs it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lichen.shell import log, print_json

__all__ = ["join_command", "worker_command"]

_LOOK = 0.5
"""Seconds between two looks at whether the site is connected."""


def join_command(kit: Path, /, *, data: Path, secret: Path | None = None, json: bool = False) -> None:
    """Take part in a federation, at a site, with its own rows, until it is stopped.

    Parameters
    ----------
    kit
        The folder of the site's kit.
    data
        The site's file or folder of rows; nothing of a row leaves it but what a recipe that its policy allows computes.
    secret
        The owner's key of `lichen fingerprint`, to claim models later; of several clients a folder of keys, CLIENT.key
        each. It never leaves: only its digest is announced.
    json
        Print what happens as JSON, a line each, on standard output.
    """
    from lichen.federation.supervision.supervisor import Supervisor

    words = [sys.executable, "-m", "lichen", "worker", str(kit), f"--data={data}"]
    words += [f"--secret={secret}"] if secret is not None else []
    code = Supervisor(kit, [*words, *(["--json"] if json else [])], say=_reports(json)).run()
    if code == 128 + signal.SIGTERM:  # as a process ends by it that knows nothing of it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    if code:
        raise SystemExit(code)


def worker_command(kit: Path, /, *, data: Path, secret: Path | None = None, json: bool = False) -> None:
    """Be a site's worker; started by `lichen join`, and again when it dies."""
    from lichen.federation.joining import check_before

    report = _reports(json)
    known = check_before(kit, data, secret=secret, say=report)

    from lichen.federation.host import SiteHost
    from lichen.federation.transports.choose import open_site

    host = SiteHost(kit, data, secret=secret, say=report)
    with open_site(kit, host.answer, say=report, status=host.status) as site:
        try:
            while not site.wait(_LOOK) and not site.joined.is_set():
                pass
            if site.joined.is_set():
                report(f"{site.name} is connected with {known.host}:{known.port}, and waits for a recipe")
            site.wait()
        finally:
            host.close()
    report(f"{site.name} has left")


def _reports(json: bool) -> Callable[[str], None]:
    """Says a line to the person at the site."""
    if not json:
        return log
    return lambda line: print_json({"time": time.time(), "what": line}, line=True)

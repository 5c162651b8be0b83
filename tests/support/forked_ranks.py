"""Real ranks for tests: forked processes that meet over gloo on the loopback interface."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.engines.ranks import RENDEZVOUS, Ranks, connect

__all__ = ["on_ranks", "runs_on"]


def _child(rank: int, size: int, folder: Path, program: Callable[[], Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo",
        **{RENDEZVOUS: (folder / "meet").as_uri()},
    )
    try:
        told: Any = {"value": program()}
    except LichenError as error:
        told = {"error": str(error)}
    except BaseException as error:
        told = {"fault": type(error).__name__, "trace": "".join(traceback.format_exception(error))}
    (folder / str(rank)).write_text(json.dumps(told))


def runs_on(size: int, program: Callable[[], Any]) -> list[dict[str, Any]]:
    """What each of so many ranks ended with: its ``value``, its ``error`` or its ``fault``; {} if it died.

    Args:
        size: How many.
        program: What each does, in the environment of a rank; its value is one JSON can write.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [context.Process(target=_child, args=(rank, size, folder, program)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert hung == [], f"ranks {hung} did not end"
        files = [folder / str(rank) for rank in range(size)]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def on_ranks(size: int, program: Callable[[Ranks], Any]) -> list[dict[str, Any]]:
    """The same, for a program over connected ranks."""

    def connected() -> Any:
        with connect() as ranks:
            return program(ranks)

    return runs_on(size, connected)

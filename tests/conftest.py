"""Settings of the whole suite: one thread, so that workers share the cores and bits repeat; and what all share."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import re
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile(
    "lichen", deadline=None, max_examples=50, derandomize=True
)  # timed tests lie on busy machines
settings.load_profile("lichen")

# Many tests start processes, and each would compile all of the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Where there is much memory, the tests' files go there, not to the disk; what passes leaves none (pyproject.toml).
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 12 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

DRAWN = ("present", "test_gallery.py", "test_real.py")
"""Rooms and files whose pictures are drawn to the last pixel."""


LONG = (
    "test_real.py",
    "test_server_alone.py",
    "test_own_rows.py",
    "test_trajectory.py",
    "test_own_task.py",
    "test_kills.py",
    "test_every_key_acts.py",
    "test_more_rounds.py",
    "test_grid.py",
)
"""Files with the longest tests: they come first, so that no worker is left with one at the end."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is there before the first test stays to the end: no collection of garbage looks at its million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; all else keeps its order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def _pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Elsewhere a run makes its pictures and writes their files, but paints nothing: that took longer than it."""
    if set(DRAWN) & set(request.path.parts):
        yield
        return
    from lichen.present.charts import canvas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "_painted", lambda figure: b"\x89PNG\r\n\x1a\n")
        yield


WARM = ("engines", "equivalence", "recipes", "transforms", "collecting", "adapters", "test_own_task.py")
"""Rooms and files whose child processes are forked from one that has imported torch: what they compute is looked at."""

COLD = re.compile("kill|ctrl_c|dies|died|stops")
"""Tests of how processes start and end: theirs start as ever."""


@pytest.fixture(scope="session")
def warm_folder() -> Iterator[Path]:
    """Where the process listens that forks children, if a test has any."""
    from support import warm

    folder = Path(tempfile.mkdtemp(prefix="lichen-warm-"))
    yield folder
    warm.end()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _warm(request: pytest.FixtureRequest, warm_folder: Path) -> Iterator[None]:
    """Children of tests that look at what they compute need not import torch again."""
    if not set(WARM) & set(request.path.parts) or COLD.search(request.node.name):
        yield
        return
    from support import warm

    with warm.warm_children(warm_folder):
        yield


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a federation of five sites on this machine; modules run it one after another."""
    pytest.importorskip("nvflare")
    from free_port import free_port

    from lichen.federation.kits.make import new

    folder = tmp_path_factory.mktemp("net") / "trial"
    new(folder, name="trial", host="localhost", port=free_port(), sites=["a", "b", "north", "east", "south"])
    return folder


@pytest.fixture(scope="session")
def grpc_federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same over gRPC, without NVFlare."""
    pytest.importorskip("grpc")
    from free_port import free_port

    from lichen.federation.kits.make import new

    folder = tmp_path_factory.mktemp("net") / "trial"
    sites = ["a", "b", "north", "east", "south"]
    new(folder, name="trial", host="localhost", port=free_port(), sites=sites, transport="grpc")
    return folder

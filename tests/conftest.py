"""Settings of the whole suite: one thread, so that two workers share two cores and bits repeat."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import socket
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile(
    "lichen", deadline=None, max_examples=50, derandomize=True
)  # timed tests lie on busy machines
settings.load_profile("lichen")


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a federation of five sites on this machine; modules run it one after another."""
    pytest.importorskip("nvflare")
    from lichen.federation.kits.make import new

    folder = tmp_path_factory.mktemp("net") / "trial"
    new(folder, name="trial", host="localhost", port=free_port(), sites=["a", "b", "north", "east", "south"])
    return folder


def free_port() -> int:
    """One that no connection is given by chance: those begin higher."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("", port := random.randrange(10_000, 32_000)))
            except OSError:
                continue
            return port

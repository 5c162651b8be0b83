"""The small federation with codecs in both directions; as a program, a node of it on stdin and stdout."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lichen.algorithms.average import Average
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.client import ClientTask
from lichen.core.store import ClientStore
from lichen.engines.local import LocalEngine
from lichen.engines.node import serve_frames
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Uniform
from lichen.transforms.downlink import Deltas
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transformed
from lichen.transforms.uplink import Coded
from support.small_experiment import experiment

UP, DOWN = parse_codecs(["topk:4/32", "int4"]), parse_codecs(["topk:8/32", "int4"])
WORK = "train lr=0.1"


def coded(made: Experiment) -> dict[str, ClientTask]:
    """Its stations, with training behind the codec."""
    known = client_tasks(made)
    return {**known, WORK: replace(known[WORK], work=Transformed(known[WORK].work, (Coded(UP),)))}


def local(made: Experiment, folder: Path, *, block: int = 3) -> LocalEngine:
    """The local engine over them."""
    return LocalEngine(coded(made), ClientStore(folder), block_size=block)


def average(made: Experiment, **more: Any) -> Average:
    """Half of the clients in a round, coded up and down."""
    plain: dict[str, Any] = {
        "aggregator": Mean(),
        "admission": Admission(works={name: task.work for name, task in coded(made).items()}),
        "optimizer": ServerSGD(),
        "sampler": Uniform(2),
        "weight_N": made.server.roster.rows_N("train"),
        "rounds": 6,
        "work": WORK,
        "valid_every": 3,
        "downlink": Deltas(DOWN),
    }
    return Average(**{**plain, **more})


if __name__ == "__main__":
    torch.set_num_threads(1)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    one = experiment()
    talks = Talks(coded(one), ClientStore(Path(sys.argv[1])), down=DOWN, agreed=one.start)
    serve_frames(source, sink, SiteWorker(lambda rate: talks))

"""Nodes as processes: frames that cannot hang or crash, nodes that refuse or die, and the bytes of the local engine."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.collecting.collect import drain
from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.core.message import Job, concatenate_messages, pack_job, pack_message, take_client
from lichen.core.store import ClientStore
from lichen.core.wire.frames import read_frame, write_frame
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard
from lichen.engines.federated import FederatedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.node import serve_frames
from lichen.engines.pipe_sites import OK, REFUSED, PipeSites
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.engines.spawned import SpawnedEngine
from lichen.models.students.students import ImageMLP
from lichen.present.trace import lr_name
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.sides.clients import ClientSide
from lichen.recipes.schema.read import read_recipe, write_recipe
from lichen.recipes.tasks.learning import federate
from lichen.transforms.delta import snapshot_name
from support.asking import all_of, hand, order

OVERRIDES = [
    "engine.name=spawned",
    "engine.nodes=2",
    "federation.rounds=2",
    "federation.local_steps=2",
    "compare.baselines=[]",
    "optimizer.lr=[0.3]",
]
TRAIN = "train lr=0.3"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spawned") / "recipe.yaml"
    file.write_text(write_recipe(read_recipe("digits", OVERRIDES)))
    return file


@pytest.fixture(scope="module")
def experiment(recipe_file: Path) -> Experiment:
    return open_recipe(read_recipe(recipe_file)).experiment


@pytest.fixture(scope="module")
def engine(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpawnedEngine]:
    command = [sys.executable, "-m", "lichen", "node", "--recipe", str(recipe_file)]
    with SpawnedEngine([*command, "--state", str(tmp_path_factory.mktemp("nodes"))], nodes=2) as made:
        yield made


def test_a_run_gives_the_local_engines_bits_and_bytes(
    experiment: Experiment, engine: SpawnedEngine, tmp_path: Path
) -> None:
    local = LocalEngine(client_tasks(experiment), ClientStore(tmp_path / "own"), block_size=4)
    reports: dict[str, list[Report]] = {"local": [], "spawned": []}
    for name, where in (("local", local), ("spawned", engine)):
        federate(experiment.server, where, 0.3, 2, tmp_path / name, reports[name].append)
    assert (tmp_path / "local").read_bytes() == (tmp_path / "spawned").read_bytes()
    assert [replace(r, seconds=0.0) for r in reports["local"]] == [replace(r, seconds=0.0) for r in reports["spawned"]]
    assert reports["local"][0].bytes_up > 10 * 64 * 64 * 4  # ten clients' first layers alone
    assert (engine.bytes_up, engine.bytes_down) == (local.bytes_up, local.bytes_down)


def test_two_rates_over_three_sites_leave_the_local_engines_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    coded = ["wire.up=[topk:8/32]", "wire.down=[int8]", "optimizer.lr=[0.3, 0.1]"]
    file.write_text(write_recipe(read_recipe("digits", [*OVERRIDES[:-1], *coded])))
    made = open_recipe(read_recipe(file)).experiment
    names = [f"site {place}" for place in range(3)]
    node = [sys.executable, "-m", "lichen", "node", "--recipe", str(file), "--state"]
    sites = PipeSites({name: [*node, str(tmp_path / name)] for name in names})
    sites.start()
    for lr in (0.3, 0.1):
        own = tmp_path / "own" / lr_name(lr)
        local = LocalEngine(client_tasks(made), ClientStore(own), block_size=4)
        federate(made.server, local, lr, 2, tmp_path / f"local-{lr}" / "server", lambda _: None)
        with FederatedEngine(
            sites, lambda client: names[client % 3], state=lr_name(lr), agreed=snapshot_name(made.start)
        ) as engine:
            federate(made.server, engine, lr, 2, tmp_path / f"sites-{lr}" / "server", lambda _: None)
        server = [(tmp_path / f"{which}-{lr}" / "server").read_bytes() for which in ("local", "sites")]
        assert server[0] == server[1]
        assert (engine.bytes_up, engine.bytes_down) == (local.bytes_up, local.bytes_down)
        there = [state_of(tmp_path / name / lr_name(lr)) for name in names]
        assert {client: data for one in there for client, data in one.items()} == state_of(own)
        assert [len(one) for one in there] == [8, 6, 6]  # two versions of each client
    sites.close()


def state_of(folder: Path) -> dict[tuple[str, ...], bytes]:
    """Private state by client and version."""
    return {file.relative_to(folder).parts: file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def test_private_training_is_equal_too(experiment: Experiment, engine: SpawnedEngine, tmp_path: Path) -> None:
    job = Job(work="alone lr=0.3", shared=experiment.start, version=0, clients=tuple(range(10)), seed=5)
    local = LocalEngine(client_tasks(experiment), ClientStore(tmp_path), block_size=8)
    told = []
    for where in (local, engine):
        for version, work in enumerate(("alone lr=0.3", "alone.valid", "alone.test")):
            whole = concatenate_messages(list(drain(where, replace(job, work=work, version=version))))
            told.append({int(whole.client_C[i]): pack_message(take_client(whole, i)) for i in range(10)})
    assert told[:3] == told[3:]
    assert len({frozenset(one.items()) for one in told}) == 3


def test_a_refused_job_tells_why_and_the_node_lives_on(experiment: Experiment, engine: SpawnedEngine) -> None:
    job = Job(work="valid", shared=experiment.start, version=0, clients=tuple(range(10)), seed=0)
    before = len(list(drain(engine, job)))
    with pytest.raises(LichenError, match=r"unknown work 'dance'\n.*this node knows: alone lr=0.3") as told:
        list(drain(engine, replace(job, work="dance")))
    assert told.value.where == "node: job"
    after = sorted(int(m.client_C[0]) for m in drain(engine, job))
    assert len(after) == before == 10
    assert after == list(range(10))


def test_a_killed_node_is_one_error_and_is_started_again(experiment: Experiment, engine: SpawnedEngine) -> None:
    job = Job(work=TRAIN, shared=experiment.start, version=0, clients=(0, 2, 4, 6, 8, 1), seed=0)
    arriving = drain(engine, job)
    next(arriving)
    for node in engine.nodes:
        node.process.kill()
        node.process.wait(timeout=60)  # to the end of it: one that is about to die may still be handed a job
    with pytest.raises(LichenError, match="a node's process ended"):
        list(arriving)
    killed = [node.process for node in engine.nodes]
    assert sorted(int(m.client_C[0]) for m in drain(engine, job)) == [0, 1, 2, 4, 6, 8]
    assert all(node.process not in killed for node in engine.nodes)
    engine.close()
    assert engine.nodes == []


# --- frames ------------------------------------------------------------------------------------------------------


def small_stations() -> tuple[Any, bytes]:
    """Stations over a network of a few weights, and a job they can do."""
    import numpy as np

    from lichen.data.batches.shards import ArrayShard

    rng = np.random.default_rng(0)
    model = ImageMLP(3, hidden=(4,), classes=2)
    shards: tuple[Shard, ...] = tuple(
        ArrayShard(x=rng.normal(size=(4, 3)).astype(np.float32), labels=rng.integers(0, 2, 4)) for _ in range(2)
    )
    recipe = read_recipe("digits", OVERRIDES)
    made = Experiment.of(recipe, model, ClientSide(train=shards, valid=shards, test=shards))
    return client_tasks(made), pack_job(Job(work=TRAIN, shared=made.start, version=0, clients=(0, 1), seed=1))


STATIONS, JOB = small_stations()


def frame(kind: bytes, body: bytes = b"") -> bytes:
    sink = io.BytesIO()
    write_frame(sink, kind, body)
    return sink.getvalue()


def worker(folder: Path) -> SiteWorker:
    talks = Talks(STATIONS, ClientStore(folder))
    return SiteWorker(lambda rate: talks)


def serve(data: bytes, folder: Path) -> list[bytes]:
    """How a node answers these bytes, question by question; it may end with a LichenError."""
    sink = io.BytesIO()
    with suppress(LichenError):
        serve_frames(io.BytesIO(data), sink, worker(folder))
    sink.seek(0)
    answers = []
    while (answer := read_frame(sink)) is not None:
        assert answer[0] == b"!"
        answers.append(answer[1][8:9])
    return answers


def done(folder: Path, *bodies: tuple[bytes, bytes]) -> list[tuple[int, list[bytes]]]:
    """The frames that come of jobs, by order."""
    site = worker(folder)
    thread = site.start()
    for number, (kind, body) in enumerate(bodies, start=1):
        with suppress(LichenError):
            hand(site, number, (0, 1), kind, body)
    out = [(number, [kind for kind, _ in got]) for number, _, got in all_of(site)]
    site.close()
    thread.join()
    return out


def question(number: int, kind: bytes = b"hand") -> bytes:
    body = order(number, (0, 1), b"J", JOB)
    return frame(b"?", number.to_bytes(8, "little") + bytes([len(kind)]) + kind + b"w" + body)


def test_frames_need_no_torch() -> None:
    code = "import sys, lichen.core.wire.frames; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@given(bodies=st.lists(st.tuples(st.sampled_from([b"J", b"M", b".", b"E"]), st.binary(max_size=40)), max_size=4))
def test_frames_come_back_in_order(bodies: list[tuple[bytes, bytes]]) -> None:
    stream = io.BytesIO(b"".join(frame(kind, body) for kind, body in bodies))
    assert [read_frame(stream) for _ in bodies] == bodies
    assert read_frame(stream) is None


@given(st.data())
def test_any_truncation_is_a_clean_end_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = question(1) + question(2)
    cut = data.draw(st.integers(0, len(whole)) | st.integers(0, 12) | st.integers(len(whole) // 2, len(whole) // 2 + 9))
    answers = serve(whole[:cut], tmp_path_factory.mktemp("node"))
    assert answers == [OK] * (cut // (len(whole) // 2))


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda body: frame(b"?", body)))
def test_garbage_is_a_clean_end_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    assert OK not in serve(data, tmp_path_factory.mktemp("node"))


def test_a_question_that_is_not_known_is_refused_and_the_next_is_answered(tmp_path: Path) -> None:
    assert sorted(serve(question(1, b"dance") + question(2), tmp_path)) == sorted([REFUSED, OK])


@given(body=st.binary(max_size=120))
def test_a_whole_frame_of_garbage_is_answered_and_the_next_job_is_done(
    tmp_path_factory: pytest.TempPathFactory, body: bytes
) -> None:
    answers = done(tmp_path_factory.mktemp("node"), (b"J", body), (b"J", JOB))
    assert answers == [(1, [b"E"]), (1, [b"E"]), (2, [b"M", b"."]), (2, [b"M", b"."])]


@given(kind=st.sampled_from([b"M", b".", b"E", b"Q"]), body=st.binary(max_size=120))
def test_what_is_no_order_is_refused_and_the_next_job_is_done(
    tmp_path_factory: pytest.TempPathFactory, kind: bytes, body: bytes
) -> None:
    assert [number for number, _ in done(tmp_path_factory.mktemp("node"), (kind, body), (b"J", JOB))] == [2, 2]


@settings(max_examples=150)
@given(place=st.integers(0, len(JOB) - 1), flip=st.integers(1, 255))
def test_a_spoilt_byte_of_a_job_is_done_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    body = bytearray(JOB)
    body[place] ^= flip
    answers = done(tmp_path_factory.mktemp("node"), (b"J", bytes(body)))
    assert len(answers) == 2
    assert all(kinds in ([b"M", b"."], [b"E"]) for _, kinds in answers)


def test_a_giant_announcement_takes_no_giant_memory() -> None:
    import resource

    reader, writer = os.pipe()
    with open(reader, "rb") as stream, open(writer, "wb") as other:
        other.write(b"J" + (1 << 35).to_bytes(8, "little") + b"few")
        other.close()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(LichenError, match=f"ended after 3 of {1 << 35} bytes"):
            read_frame(stream)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (1 << 20)


# --- nodes that are no nodes -------------------------------------------------------------------------------------


@contextmanager
def odd_node(script: str) -> Iterator[SpawnedEngine]:
    with SpawnedEngine([sys.executable, "-S", "-c", script]) as made:
        yield made


def ask(script: str, job: bytes = JOB) -> LichenError | int:
    """The one error, or the number of messages, of a node that runs this script; fails where it hangs."""
    from lichen.core.message import unpack_job

    got: list[LichenError | int] = []

    def go() -> None:
        with odd_node(script) as made:
            try:
                got.append(len(list(drain(made, replace(unpack_job(job), clients=(0,))))))
            except LichenError as error:
                got.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "the engine hangs"
    assert got, "another exception"
    return got[0]


def test_the_last_words_of_a_node_are_told() -> None:
    error = ask("import sys; sys.stdin.buffer.read(9); print('no memory for me', file=sys.stderr); sys.exit(3)")
    assert isinstance(error, LichenError)
    assert error.where == "node"
    assert "it said last:\n    no memory for me" in error.what


def test_a_node_that_never_reads_is_one_error() -> None:
    import torch

    big = pack_job(Job(work="valid", shared=Shared({"w": torch.zeros(1 << 18)}), version=0, clients=(0,), seed=0))
    error = ask("import sys; print('gone', file=sys.stderr); sys.exit(1)", big)
    assert isinstance(error, LichenError)
    assert "gone" in error.what


@settings(max_examples=12)
@given(
    st.binary(max_size=30)
    | st.binary(max_size=30).map(lambda body: frame(b"M", body))
    | st.binary(max_size=30).map(lambda body: frame(b"E", body))
    | st.integers(0, 20).map(lambda cut: frame(b"M", b"x" * 40)[:cut])
    | st.binary(max_size=30).map(lambda body: frame(b"!", (1).to_bytes(8, "little") + b"o" + body))
)
def test_whatever_a_node_writes_the_engine_ends(data: bytes) -> None:
    error = ask(f"import sys; sys.stdin.buffer.read(9); sys.stdout.buffer.write({data!r})")
    assert isinstance(error, LichenError)
    assert error.where in ("node", "message", "site node 0")


def test_words_that_are_no_text_are_told_anyway() -> None:
    error = ask(
        f"import sys; sys.stdin.buffer.read(9); sys.stdout.buffer.write({frame(b'E', bytes([255, 104, 105]))!r})"
    )
    assert isinstance(error, LichenError)
    assert error.what.endswith("hi")

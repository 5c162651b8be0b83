"""Copies the rounds before a client mattered from a finished run into a new folder; none of them is trained again.

Where the client did not validate, a round is its lines of the journal, the trace and the record, and the last state
that is copied. Where it did, each round's tensors are judged anew by the others, so that the best round, and what the
trace says of validation, are those of a run to which the client never came.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lichen.algorithms.scores import is_validated
from lichen.core import private
from lichen.core.collecting.run_record import beginning
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.files.checkpoints import CHECKPOINTS, checkpoint_files, checkpoint_rounds, whole_checkpoint
from lichen.core.files.durable import write_atomic
from lichen.core.files.journal import RoundEntry
from lichen.core.files.record import START
from lichen.core.replies import Attendance, Receipt, Refusal
from lichen.core.rounds import load_state
from lichen.core.store import ClientStore
from lichen.engines.withdrawal.absent import ABSENT, what_absent
from lichen.present.trace import Trace, event_of
from lichen.recipes.assemble.column import admission_of, local_engine
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.parts import algorithm_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.splitting.works import splitting
from lichen.recipes.assemble.sides.withdrawal.absent import KEY, without_absent
from lichen.recipes.withdrawal.start import Start

__all__ = ["copy_rounds"]


def copy_rounds(
    old: Path,
    folder: RunFolder,
    experiment: Experiment,
    entries: Sequence[RoundEntry],
    start: Start,
    lr: float,
    until: int,
) -> None:
    """Begin a column of the new run with the rounds of the old one.

    Args:
        old: The finished run.
        folder: The new one, with its inputs, roster and recipe.
        experiment: Of the new recipe.
        entries: The column's lines of the old journal, by round.
        start: How many rounds are copied.
        lr: The learning rate.
        until: Rounds of the column when its rates are tried.

    Raises:
        LichenError: if a state of the old run is damaged.
    """
    source, target = old / "state" / "federated" / lr_name(lr), folder.checkpoint("federated", lr_name(lr))
    some = [entry for entry in entries if entry.round <= start.round]
    if not some:
        return
    private.make_folders(target.parent)
    if start.judges:
        _judged(source, target, folder, experiment, some, lr, until)
    else:
        _as_they_are(source, target, folder, some)


def _as_they_are(source: Path, target: Path, folder: RunFolder, entries: Sequence[RoundEntry]) -> None:
    """The rounds with all that they left: the client had no part in any of it."""
    last = entries[-1].round
    for round_ in [at for at in checkpoint_rounds(source) if at <= last]:
        _copy(whole_checkpoint(source, list(entries), round_), target.parent / CHECKPOINTS / f"{round_}.safetensors")
        for file, place in checkpoint_files(source, round_):
            _copy(file, target.parent / CHECKPOINTS / str(round_) / place)
    _copy(source / CHECKPOINTS / f"{last}.safetensors", target)
    for file, place in checkpoint_files(source, last):
        _copy(file, target.parent / place)
    for entry in entries:
        about = _recorded(entry)
        lines = "" if about is None else _begun(folder) + folder.record.append(about)
        folder.journal.commit(replace(entry, record=lines), seconds=folder.seconds(), joules=folder.joules())


def _judged(
    source: Path,
    target: Path,
    folder: RunFolder,
    experiment: Experiment,
    entries: Sequence[RoundEntry],
    lr: float,
    until: int,
) -> None:
    """The rounds' tensors, validated by those who are there."""
    server, absent = experiment.server, experiment.clients.absent
    admission = admission_of(server, experiment.clients.auxiliary)
    algorithm = replace(algorithm_of(server, lr, until), admission=admission)
    engine = without_absent(local_engine(experiment, ClientStore(target.parent / "clients")), absent)
    engine = splitting(server, engine, admission.works)
    best: ServerState | None = None
    for entry in entries:
        event = event_of(entry.traced.encode())
        state = load_state(whole_checkpoint(source, list(entries), entry.round))
        former = best or algorithm.init(state.shared)
        state = replace(state, best=former.best, best_round=former.best_round, best_value=former.best_value)
        report = _trained(event.report, _recorded(entry), absent)
        if algorithm.valid and is_validated(state.round, algorithm.valid_every, until):
            up, down = engine.bytes_up, engine.bytes_down
            state, judged, came = algorithm.validate(state, engine)
            up, down = engine.bytes_up - up, engine.bytes_down - down
            report = replace(
                report,
                metrics={**report.metrics, **judged},
                attendance=report.attendance + came.judging(),
                bytes_up=report.bytes_up + up,
                bytes_down=report.bytes_down + down,
                valid_up=up,
                valid_down=down,
            )
        best = state
        for file, place in checkpoint_files(source, entry.round):
            _copy(file, target.parent / place)
        _stage(target.parent, entry)
        event = replace(event, report=report)
        if not folder.traced(event):
            Trace(folder.path)(event)
        folder.save(target, state)


def _trained(report: Report, about: dict[str, Any] | None, absent: frozenset[int]) -> Report:
    """What the report of a round says of its training, in which all came but those who never took part."""
    counted = [] if about is None else about["counted"]
    receipts = tuple(
        Receipt(client=client, version=version, weight=weight, sha256=sha256)
        for client, version, weight, sha256 in counted
        if version < report.round
    )
    gone = [client for client in report.clients if client in absent]
    refusals = [Refusal(client=client, reason=ABSENT, what=what_absent(client), where=KEY) for client in gone]
    came = [client for client in report.clients if client not in absent]
    return replace(
        report,
        metrics={name: x for name, x in report.metrics.items() if name not in ("valid", "accuracy")},
        attendance=Attendance.of(report.clients, came, refusals, receipts),
        bytes_up=report.bytes_up - report.valid_up,
        bytes_down=report.bytes_down - report.valid_down,
        valid_up=0,
        valid_down=0,
    )


def _recorded(entry: RoundEntry) -> dict[str, Any] | None:
    """What the old record says of a round; None where it says nothing."""
    lines = [json.loads(line) for line in entry.record.splitlines()]
    found = next((line for line in lines if line.get("kind") == "round"), None)
    return None if found is None else {name: x for name, x in found.items() if name != "before"}


def _begun(folder: RunFolder) -> str:
    """The first line of the record, where it has none."""
    return folder.record.append(beginning(folder.path)) if folder.record.head == START else ""


def _stage(column: Path, entry: RoundEntry) -> None:
    """Say what of the clients' private state came with a round, as their store does."""
    for store, files in entry.private.items():
        lines = "".join(f"{client} {version} {digest} {-1}\n" for client, version, digest in files)
        private.make_folders(column / store)
        write_atomic(column / store / f".staged.copied-{entry.round}", lines.encode())


def _copy(source: Path, target: Path) -> None:
    """A file of its own: what becomes of the old run's does not touch it."""
    private.make_folders(target.parent)
    write_atomic(target, source.read_bytes())

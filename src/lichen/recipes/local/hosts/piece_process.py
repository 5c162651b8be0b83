"""The process of a host that writes: it holds one piece of a run's model, and answers with what that makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.wire.answer import pack_answer, unpack_answer
from lichen.engines.node import serve_frames
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.models.pieces.piece_writer import PieceWriter
from lichen.recipes.local.hosts.run_pieces import RunPieces

__all__ = ["NEXT", "answer_next", "run_piece"]

NEXT = "next"
"""The kind of the one question: ``entry``, ``known`` and ``tuned``, as :meth:`PieceWriter.step` has them."""


def answer_next(writer: PieceWriter, body: bytes) -> bytes:
    """The answer to one question.

    Raises:
        LichenError: if it lacks something.
    """
    _, tree = unpack_answer(body)
    if tree is None or tree.keys() != {"entry", "known", "tuned"}:
        raise LichenError("a question without entry, known and tuned", where="host")
    known, tuned = int(tree["known"]), bool(tree["tuned"])
    return pack_answer(1, {"out": writer.step(tree["entry"], known, tuned=tuned)})


def run_piece(folder: Path, host: int, hosts: int) -> None:
    """Be one host: load its piece, read questions on stdin, write answers on stdout, until stdin ends.

    Args:
        folder: A finished chat run.
        host: Which one, from 0.
        hosts: Of how many.
    """
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not reach the wire
    writer = RunPieces(folder, hosts).writer(host)
    worker = SiteWorker(_no_jobs, also={NEXT: lambda body: answer_next(writer, body)})
    serve_frames(source, sink, worker, answer=Pieces(worker.answer).answer)


def _no_jobs(state: str) -> Talks:
    raise LichenError("a host that writes does no job", where="host")

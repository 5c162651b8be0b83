"""A private run that ends itself by SIGKILL at one of the moments around charging, sending, closing and saving.

``python ended_run.py FOLDER AT KEY...`` runs ``digits`` with these keys. What leaves is written to ``FOLDER.left``
before it does: ``job ROUND PAID`` and ``sum ROUND``, a line each. A moment is before a line of the budget, in the
middle of it, after it; before and after a job goes out; when a sum is told; before and after the state is saved.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lichen
from lichen.algorithms.private_average import PrivateAverage
from lichen.core.message import Job
from lichen.core.secret.budget import Budget
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.row_privacy import PaidRounds

MOMENTS = 11
"""Of a round."""


class Ending:
    """Counts moments, and ends the process at one of them."""

    def __init__(self, folder: Path, at: int) -> None:
        self.at, self.seen = at, 0
        self.file = os.open(f"{folder}.left", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.budget = folder / "state" / "budget.jsonl"

    def moment(self, before: Any = lambda: None) -> None:
        self.seen += 1
        if self.seen == self.at:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def left(self, line: str) -> None:
        os.write(self.file, f"{line}\n".encode())

    def cut_short(self) -> None:
        """The disk has half of the budget's last line."""
        whole = self.budget.read_bytes()
        start = whole[:-1].rfind(b"\n") + 1
        self.budget.write_bytes(whole[: (start + len(whole)) // 2])

    def is_paid(self, round_: int) -> bool:
        """Whether the disk has a charge of this round that is open."""
        lines = self.budget.read_bytes().splitlines() if self.budget.exists() else []
        opened = sum(b'"charge"' in line and b'"round": %d,' % round_ in line for line in lines)
        return opened > sum(b'"close"' in line and b'"round": %d,' % round_ in line for line in lines)


def watched(ending: Ending) -> None:
    """Put moments around what the package does."""
    append, submit, save = Budget._append, LocalEngine.submit, RunFolder.save

    def appending(self: Budget, entry: dict[str, Any]) -> None:
        ending.moment()
        append(self, entry)
        ending.moment(ending.cut_short)
        ending.moment()

    def submitting(self: LocalEngine, job: Job) -> int:
        if not job.work.startswith("train "):
            return submit(self, job)
        ending.moment()
        ending.left(f"job {job.version} {int(ending.is_paid(job.version))}")
        number = submit(self, job)
        ending.moment()
        return number

    def saving(self: RunFolder, *words: Any) -> Any:
        ending.moment()
        done = save(self, *words)
        ending.moment()
        return done

    def telling(rounds: Any) -> Any:
        def told(self: Any, state: Any, *words: Any) -> Any:
            done = rounds(self, state, *words)
            ending.left(f"sum {state.round}")
            ending.moment()
            return done

        return told

    Budget._append = appending  # type: ignore[method-assign]
    LocalEngine.submit = submitting  # type: ignore[method-assign]
    RunFolder.save = saving  # type: ignore[method-assign]
    for kind in (PrivateAverage, PaidRounds):
        kind.round = telling(kind.round)  # type: ignore[method-assign]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    watched(Ending(folder, int(sys.argv[2])))
    lichen.run(lichen.read_recipe("digits", sys.argv[3:]), out=folder)

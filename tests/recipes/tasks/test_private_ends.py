"""Private runs whose process is ended by SIGKILL: what was spent is never less than what left, and no ε is passed.

An ordinary run of the tests ends a few. ``LICHEN_KILLS=30 python -m pytest tests/recipes/tasks/test_private_ends.py``
ends thirty, at all moments of nearly three rounds, runs of both units in turns.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.core.secret.budget import Budget, begun_with
from support import ended_run

ENDS = int(os.environ.get("LICHEN_KILLS", "0"))
ROUNDS = 4
KEYS = (
    "model.student.width=4",
    "data.partition={by: iid, clients: 6}",
    "optimizer.lr=[0.1]",
    f"federation={{rounds: {ROUNDS}, local_steps: 1, batch_size: 16, aggregate: mean, weighting: uniform}}",
    "compare={baselines: [], metric: accuracy}",
)
UNITS = {
    "client": "privacy={epsilon: 1, sigma: 3.76, clip: 0.5, delta: 1e-2}",
    "row": "privacy={unit: row, epsilon: 2, sigma: 0.735, clip: 0.5}",
}
"""With noise that pays for so many rounds, and not for one more."""
# A charge is cut short on the disk, a job is out, a sum is closed.
A_FEW = ((13, "client"), (5, "row"), (8, "client"))
# In the next round each moment is of the other unit.
ALL = tuple((at, ("client", "row")[(at + at // ended_run.MOMENTS) % 2]) for at in range(1, ENDS + 1))


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def spent(path: Path) -> tuple[int, int]:
    """Charges and sums closed, of whole lines."""
    written = path.read_bytes() if path.exists() else b""
    whole = [line for line in written.splitlines(keepends=True) if line.endswith(b"\n")]
    return sum(b'"charge"' in line for line in whole), sum(b'"close"' in line for line in whole)


@pytest.mark.parametrize(("at", "unit"), ALL or A_FEW)
def test_wherever_a_process_ends_no_less_is_spent_than_has_left(unit: str, at: int, tmp_path: Path) -> None:
    run, keys = tmp_path / "run", (*KEYS, UNITS[unit])
    path, checkpoint = run / "state" / "budget.jsonl", run / "state" / "federated" / "lr=0.1" / "server.safetensors"
    command = [sys.executable, str(Path(ended_run.__file__).absolute()), str(run), str(at), *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    charges, closed = spent(path)
    finished = load_state(checkpoint).round if checkpoint.exists() else 0
    left = lines(tmp_path / "run.left")
    jobs, sums = ([line for line in left if line[0] == kind] for kind in ("job", "sum"))
    assert all(line[2] == "1" for line in jobs)  # each was paid for on the disk before it went out
    assert charges >= len({line[1] for line in jobs})
    assert charges >= closed >= len(sums) >= finished
    # A sum that was closed and not saved is lost: its round is paid for again, and the last one cannot be.
    lost = closed - finished
    assert lost in (0, 1)
    summary = lichen.run(lichen.read_recipe("digits", keys), out=run, resume=True).summary
    assert summary["privacy"]["charges"] == ROUNDS
    assert summary["privacy"]["epsilon"] <= float(UNITS[unit].split("epsilon: ")[1].split(",")[0])
    assert summary["training"]["federated"]["rounds"] == ROUNDS - lost
    assert spent(path) == (ROUNDS, ROUNDS)
    terms = begun_with(path)
    assert terms is not None
    budget, before = Budget(path, terms=terms, limit=ROUNDS), path.read_bytes()
    with pytest.raises(LichenError, match=f"round {ROUNDS - lost + 1} would pass"):
        budget.charge(ROUNDS - lost)
    assert path.read_bytes() == before

"""One run of the digits or the chat recipe over a trial's sites, the faults that come in it, and what is counted of it.

For ``benchmarks/faults.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from faults_trial import SITES, EndedError, Trial, wait_until

Length = Literal["short", "long", "chat"]
"""Digits with rounds of a quarter of a second or of seconds; a language model with rounds of seconds."""

ROUNDS: Mapping[Length, int] = {"short": 16, "long": 16, "chat": 9}
FULL = 2
"""Rounds after which a full disk has room again, if that is sooner than its seconds."""

PATIENCE = 600.0
"""Seconds after which a run that has not come to its end counts as hanging."""

KINDS = (
    "kill join",
    "kill worker",
    "kill site link",
    "kill server link",
    "kill serve",
    "kill submit",
    "cut",
    "refuse",
    "stop worker",
    "stop site link",
    "slow",
    "full disk",
)
SAYS = {
    "kill join": "the site's supervisor killed; `lichen join` after the pause",
    "kill worker": "the site's worker killed",
    "kill site link": "the site's NVFlare process killed",
    "kill server link": "the server's NVFlare process killed",
    "kill serve": "`lichen serve` killed, and started again after the pause",
    "kill submit": "`lichen submit` killed, and `--resume` after the pause",
    "cut": "a link lets nothing through",
    "refuse": "a link hung up, nobody let in",
    "stop worker": "the site's worker stands still (SIGSTOP)",
    "stop site link": "the site's NVFlare process stands still (SIGSTOP)",
    "slow": "the site's worker has a fifth of its time",
    "full disk": "the disk of the site's kit is full",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a run.

    Attributes:
        kind: Which.
        site: Where, if at a site.
        round: It comes after so many rounds,
        delay: and so many seconds.
        seconds: How long it lasts, or until what was killed is started again by its person.
    """

    kind: str
    site: str
    round: int
    delay: float
    seconds: float


def faults_of(seed: int, length: Length = "short", count: int = 3) -> list[Fault]:
    """The faults of a run, in the order in which they come; over twelve seeds each kind comes three times."""
    from lichen.core.seeds import numpy_generator

    block = numpy_generator(seed // 4, "faults, kinds")
    kinds = [str(kind) for kind in block.permutation(KINDS)][count * (seed % 4) :][:count]
    rng = numpy_generator(seed, "faults")
    rounds = sorted(int(at) for at in rng.choice(range(1, ROUNDS[length] - 2), size=count, replace=False))
    out = []
    for kind, at in zip(kinds, rounds, strict=True):
        long = float(5.0 * 12.0 ** rng.uniform())  # 5 to 60 seconds
        short = float(rng.uniform(2.0, 8.0))
        out.append(
            Fault(
                kind=kind,
                site=SITES[-1] if kind == "full disk" else str(rng.choice(SITES)),
                round=at,
                delay=round(float(rng.uniform(0.0, 0.6)), 3),
                seconds=round(long if kind in ("cut", "refuse") else short, 1),
            )
        )
    return out


def recipe_of(seed: int, length: Length = "short", **schedule: Any) -> dict[str, Any]:
    """A gallery recipe, cut to one rate and no baselines, over rows that lie at the sites; long: with 120 steps."""
    from lichen.recipes.schema.read import gallery
    from lichen.recipes.schema.yaml import load_yaml

    name = "chat-demo" if length == "chat" else "digits"
    whole: dict[str, Any] = load_yaml(gallery()[name].read_text(encoding="utf-8"), where=name)
    columns = {"client": "client", "text": "text", "prompt": "prompt"}
    if length != "chat":
        columns = {"client": "client", "numbers": "pixels", "label": "label"}
    data = {name: value for name, value in whole["data"].items() if name not in ("partition", "max_clients")}
    own: dict[Length, dict[str, Any]] = {
        "short": {},
        "long": {"local_steps": 120},
        "chat": {"clients_per_round": 6, "valid_every": ROUNDS["chat"]},
    }
    return {
        **whole,
        "seed": seed,
        "data": {**data, "name": "elsewhere.jsonl", "columns": columns},
        "optimizer": whole["optimizer"] if length == "chat" else {**whole["optimizer"], "lr": [0.3]},
        "federation": {
            **whole["federation"],
            "rounds": ROUNDS[length],
            "schedule": {"least": 2, **schedule},
            **own[length],
        },
        "engine": {"clients_per_block": 1, **({"name": "spawned"} if "deadline" in schedule else {})},
        "compare": {"baselines": []} if length == "chat" else {"baselines": [], "metric": "accuracy"},
    }


class Course:
    """One run over a trial's sites, from its submission to its end, with what is done to it."""

    def __init__(self, trial: Trial, run: Path, recipe: Mapping[str, Any]) -> None:
        from lichen.recipes.schema.yaml import dump_yaml

        self.trial, self.run, self.commands, self.lost = trial, run, 0, 0
        self.recipe = trial.home / "recipe.yaml"
        self.recipe.write_text(dump_yaml(dict(recipe)), encoding="utf-8")
        self.offsets = {site: _size(trial.counts(site)) for site in SITES}

    def begin(self) -> None:
        """Submit."""
        self.trial.keep_up()
        self.commands += 1
        self.trial.submit(self.run, self.recipe)

    def resume(self, before: int | None = None) -> None:
        """Go on by one command; rounds that were whole before and are not any more are lost."""
        self.commands += 1
        self.trial.submit(self.run, None)
        if before is None:
            return
        submit, least = self.trial.running["submit"], before
        while submit.poll() is None and self.rounds() <= before:
            least = min(least, self.rounds())
            time.sleep(0.01)
        self.lost = max(self.lost, before - least)

    def rounds(self) -> int:
        """Rounds that are whole."""
        with suppress(OSError):
            return (self.run / "trace.jsonl").read_bytes().count(b"\n")
        return 0

    def is_over(self) -> bool:
        """Whether the command has ended."""
        return self.trial.running["submit"].poll() is not None

    def wait_for(self, rounds: int) -> bool:
        """Until so many rounds are whole; whether the run goes on then."""
        end = time.monotonic() + PATIENCE
        while self.rounds() < rounds and not self.is_over():
            if time.monotonic() > end:
                raise EndedError("submit", f"stands at round {self.rounds()}")
            time.sleep(0.01)
        return not self.is_over()

    def end(self) -> None:
        """To its end; where the command has ended with an error, one more goes on.

        Raises:
            EndedError: if that does not come to an end either.
        """
        for turn in range(2):
            wait_until(self.is_over, PATIENCE, "submit")
            if (code := self.trial.running["submit"].returncode) == 0:
                return
            words = (self.trial.home / "submit.log").read_text(encoding="utf-8", errors="replace")[-600:]
            if turn:
                raise EndedError("submit", f"exit code {code}: {words}")
            self.resume()

    def apply(self, fault: Fault) -> bool:
        """One fault, to its end; whether it hit."""
        kind, trial = fault.kind, self.trial
        if not self.wait_for(fault.round):
            return False
        time.sleep(fault.delay)
        if self.is_over():
            return False
        if kind in ("cut", "refuse"):
            trial.relays[fault.site].cut(fault.seconds, refuse=kind == "refuse")
            return True
        if kind == "full disk":
            ballast, end, before = trial.fill_disk(), time.monotonic() + fault.seconds, self.rounds()
            while time.monotonic() < end and self.rounds() < before + FULL and not self.is_over():
                time.sleep(0.01)
            ballast.unlink()
            return True
        if kind == "slow":
            return self._stop("worker", fault.site, fault.seconds, share=0.8)
        what, _, process = kind.partition(" ")
        if what == "stop":
            return self._stop(process, fault.site, fault.seconds)
        with suppress(EndedError):  # it may be on its way up, as another fault came before
            wait_until(lambda: self.is_over() or trial.pid(process, fault.site), 30, process)  # type: ignore[arg-type]
        before = self.rounds()
        if self.is_over() or not trial.kill(process, fault.site):  # type: ignore[arg-type]
            return False
        if process in ("join", "serve", "submit"):
            time.sleep(fault.seconds)
            if process == "submit":
                self.resume(before)
            else:
                trial.join(fault.site) if process == "join" else trial.serve()
        return True

    def _stop(self, process: str, site: str, seconds: float, *, share: float = 1.0) -> bool:
        """A process stands still, all the time or a share of it."""
        pid, end = self.trial.pid(process, site), time.monotonic() + seconds  # type: ignore[arg-type]
        if pid is None:
            return False
        turn = seconds if share == 1.0 else 0.5
        with suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(turn * share)
                os.kill(pid, signal.SIGCONT)
                time.sleep(turn * (1.0 - share))
        return True

    # --- what came of it ---------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """Numbers of a run that is over."""
        summary = json.loads((self.run / "summary.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (self.run / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
        missing = Counter[str]()
        for line in lines:
            causes = line.get("attendance", {}).get("causes", {})
            missing.update({str(cause): len(clients) for cause, clients in causes.items()})
        return {
            "commands": self.commands,
            "rounds": len(lines),
            "lost": self.lost,
            "score": summary["columns"]["federated"]["mean"],
            "missing": {reason: count for reason, count in sorted(missing.items()) if count},
            "named": [one for line in lines for one in line.get("attendance", {}).get("named", [])][:5],
            "seconds": [round(float(line["seconds"]), 3) for line in lines],
            "learned": learned(self.run),
            **self.trainings(),
        }

    def trainings(self) -> dict[str, int]:
        """How often the sites trained, by what had become of it: see :func:`exactly_once`."""
        notes = []
        for site in SITES:
            with open(self.trial.counts(site), "rb") as file:
                file.seek(self.offsets[site])
                notes += [{"site": site, **json.loads(line)} for line in file]
        return exactly_once(notes)


def exactly_once(notes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Trainings of each (client, version, private state, job), as the sites wrote them down.

    Returns:
        ``pairs``, how many there are; ``trained``, how often one began; ``again``, of which a first one had begun
        and its process was killed before the answer was saved; ``twice``, of which it had been saved before, or
        the process that had begun it was not gone: there must be none.
    """
    begun, saved = Counter[tuple[str, ...]](), set[tuple[str, ...]]()
    process = dict[tuple[str, ...], int]()
    again = twice = 0
    for note in notes:
        key = (*(str(note[name]) for name in ("site", "client", "version", "state", "digest")),)
        if note["what"] == "saved":
            saved.add(key)
            continue
        if key in saved or process.get(key) == note["pid"]:
            twice += 1
        elif key in process:
            again += 1
        begun[key] += 1
        process[key] = note["pid"]
    return {"pairs": len(begun), "trained": sum(begun.values()), "again": again, "twice": twice}


def learned(run: Path) -> str:
    """A digest of what a run has learned: every state, and the model."""
    whole = hashlib.sha256()
    for file in sorted([*run.glob("state/*/*/server.safetensors"), *run.glob("model/*.safetensors")]):
        whole.update(str(file.relative_to(run)).encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0

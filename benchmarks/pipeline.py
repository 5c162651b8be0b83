"""What does it cost to train a model over hosts none of which holds it?

SmolLM2-135M in three pieces, each in a process of its own, on one machine. ``python benchmarks/pipeline.py idle`` takes
a few steps with 1, 4 and 8 micro-batches: memory of each host, and the share of the time in which hosts wait, from the
seconds that each says it worked. ``killed`` kills a host in each of ten rounds and compares the adapter with that of an
undisturbed run. ``parts`` says who holds what, and what a process takes that holds nothing yet. ``writing`` lets hosts
write, without and with a delay. Results lie in ``results/pipeline``; what is there is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from lichen.clients.pipeline.schedule import bubble

RESULTS = Path(__file__).parent / "results" / "pipeline"
HOSTS, AT = 3, 9
"""Hosts, and the reply of a round at which one of them is killed."""


QUESTION, TOKENS = "What did you do this weekend?", 48
"""What hosts are asked, and how many tokens they write."""

PATIENCE = 120
"""Seconds in which a process has imported what a host needs."""


def recipe_of(micro: int, rounds: int, steps: int, order: str = "1f1b") -> dict[str, Any]:
    """Eight rows a step from two people who chat."""
    return {
        "name": "pipeline",
        "task": "chat",
        "model": {"name": "smollm2-135m", "adapter": {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 16}},
        "data": {
            "name": "chitchat",
            "form": "transcript",
            "max_length": 32,
            "max_clients": 2,
            "min_rows": 60,
            "on_too_few_rows": "drop",
            "max_rows": 60,
            "test_rows": 2,
            "valid": 0.1,
            "test": 0.1,
        },
        "optimizer": {"lr": [2e-3]},
        "federation": {"rounds": rounds, "local_steps": steps, "batch_size": 4, "valid_every": rounds},
        "pipeline": {"hosts": HOSTS, "micro": micro, "schedule": order},
        "compare": {"baselines": []},
        "engine": {"name": "spawned"},
    }


class Watched:
    """The run's engine; it kills a host at one reply of each round, where it is to."""

    def __init__(self, inner: Any, kills: bool) -> None:
        self.inner, self.kills, self.count, self.round = inner, kills, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def processes(self) -> list[Any]:
        """The hosts', in their order."""
        return [child.process for child in self.inner.sites.children.values()]

    def replies(self, numbers: Collection[int], until: float = float("inf")) -> Iterator[Any]:
        """The engine's."""
        for reply in self.inner.replies(numbers, until):
            self.count += 1
            if self.kills and self.count == AT:
                victim = self.processes()[self.round % HOSTS]
                victim.kill()
                victim.wait()
            yield reply

    def next_round(self) -> None:
        """Count replies anew."""
        self.count, self.round = 0, self.round + 1


def memory(process: Any) -> int:
    """The most bytes that a process has had in memory."""
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measured(recipe: dict[str, Any], *, kills: bool = False) -> dict[str, Any]:
    """One run: its rounds, its hosts' memory, and the digest of what was learned."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lichen
    from lichen.recipes.assemble.column import recipe_engine
    from lichen.recipes.tasks.hosts import pipeline as task

    engines, rounds, begun = list[Watched](), list[dict[str, Any]](), time.perf_counter()

    def watched(*some: Any, **more: Any) -> Any:
        engines.append(Watched(recipe_engine(*some, **more), kills))
        return engines[-1]

    def observe(event: Any) -> None:
        report = event.report
        refused = sum(report.attendance.refused.values())
        up, down = report.bytes_up - report.valid_up, report.bytes_down - report.valid_down
        rounds.append({**report.metrics, "seconds": report.seconds, "lost": refused, "up": up, "down": down})
        rounds[-1]["memory"] = [memory(process) for process in engines[-1].processes()]
        engines[-1].next_round()

    with TemporaryDirectory() as folder, patch.object(task, "recipe_engine", watched):
        run = lichen.run(recipe, out=Path(folder) / "run", observers=[observe], say=print)
        learned = (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    found = {"rounds": rounds, "sha256": hashlib.sha256(learned).hexdigest(), "extra": run.summary["extra"]}
    return {**found, "seconds": time.perf_counter() - begun}


def stored(name: str, make: Any) -> dict[str, Any]:
    """A result, from its file where there is one."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def idle() -> None:
    """Micro-batches and waiting."""
    print("| M | (S − 1) / (M + S − 1) | idle | seconds a step, virtual | MB up, down a step | peak MB of each host |")
    print("|---:|---:|---:|---:|---:|---:|")
    for micro in (1, 4, 8):
        found = stored(f"idle-{micro}", lambda micro=micro: measured(recipe_of(micro, 2, 2)))
        last = found["rounds"][-1]
        megabytes = ", ".join(f"{x / 1e6:.0f}" for x in last["memory"])
        sent = f"{last['up'] / 2e6:.2f}, {last['down'] / 2e6:.2f}"
        waits = f"{bubble(HOSTS, micro):.3f} | {last['idle']:.3f} | {last['pace'] / 2:.1f}"
        print(f"| {micro} | {waits} | {sent} | {megabytes} |")


def killed() -> None:
    """A host lost in every round."""
    undisturbed = stored("undisturbed", lambda: measured(recipe_of(4, 10, 1)))
    disturbed = stored("killed", lambda: measured(recipe_of(4, 10, 1), kills=True))
    lost = [one["lost"] for one in disturbed["rounds"]]
    same = disturbed["sha256"] == undisturbed["sha256"]
    plain, more = undisturbed["seconds"], disturbed["seconds"]
    print(f"- hosts lost in each round: {', '.join(map(str, lost))}; the adapter has the same bytes: {same}")
    print(f"- {plain:.0f} seconds undisturbed, {more:.0f} disturbed, {(more - plain) / sum(lost):.1f} a loss")


def held() -> dict[str, Any]:
    """Blocks and bytes of each host in float32, and the most that a process takes which has only imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lichen.core.children import bound_command, bound_environment
    from lichen.models.pieces.partition import numbers_of
    from lichen.recipes.assemble.pieces.hosts import Hosts
    from lichen.recipes.schema.read import read_recipe

    hosts = Hosts(read_recipe(recipe_of(4, 1, 1)))
    code = (
        "import lichen.recipes.sites.node; from transformers import LlamaForCausalLM; print(*open('/proc/self/status'))"
    )
    command = bound_command([sys.executable, "-c", code])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=bound_environment(), timeout=PATIENCE)
    imported = int(done.stdout.decode().split("VmHWM:")[1].split()[0]) * 1024
    whole = 4 * numbers_of(hosts.structure)[3]
    return {"blocks": hosts.parts, "shares": hosts.shares, "whole": whole, "imported": imported}


def parts() -> None:
    """Who holds what."""
    found = stored("parts", held)
    whole, each = found["whole"], zip(found["blocks"], found["shares"], strict=True)
    text = ", ".join(f"{blocks} blocks, {share:.0%} ({whole * share / 1e9:.2f} GB)" for blocks, share in each)
    print(f"- hosts hold of the model's {whole / 1e9:.2f} GB: {text}")
    print(f"- a process that has imported what a host needs, and holds nothing yet: {found['imported'] / 1e9:.2f} GB")


def written() -> dict[str, Any]:
    """Tokens a second of one process and of hosts, in turn, in one run."""
    import lichen
    from lichen.recipes.artifacts.sampling import ask_ids
    from lichen.recipes.artifacts.use.finished import open_models
    from lichen.recipes.local.hosts.talk import time_over_hosts
    from lichen.recipes.local.next_logits import LocalLogits

    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        lichen.run({**recipe_of(4, 1, 1), "pipeline": None, "engine": {}}, out=run)
        paces, memory = time_over_hosts(run, HOSTS, QUESTION, tokens=TOKENS, delays=(0.0, 0.01, 0.05, 0.0))
        recipe, _, model, tokenizer = open_models(run)
        ids, logits, begun = ask_ids(tokenizer, recipe.data.form, QUESTION), LocalLogits(model), 0.0
        for _ in range(TOKENS):
            ids.append(int(logits(ids).argmax()))
            begun = begun or time.perf_counter()
        alone = (TOKENS - 1) / (time.perf_counter() - begun)
    return {"alone": alone, "delays": [[p.delay, p.tokens_per_second] for p in paces], "memory": memory}


def writing() -> None:
    """How fast hosts write."""
    found = stored("writing", written)
    print("| | tokens a second |\n|---|---:|")
    print(f"| one process with the whole model | {found['alone']:.1f} |")
    for delay, rate in found["delays"]:
        print(f"| {HOSTS} hosts, {1000 * delay:g} ms to each and back | {rate:.1f} |")


if __name__ == "__main__":
    commands = {"idle": idle, "killed": killed, "parts": parts, "writing": writing}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"name one of: {', '.join(commands)}")
    sys.exit(commands[sys.argv[1]]())

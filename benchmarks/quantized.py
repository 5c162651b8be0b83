"""How small can a frozen base be, and what does that cost: fp32, bf16, int8 and nf4, and blocks in turns?

Every cell is a process of its own, on one core. ``weights``: bytes of the base. ``loaded`` and ``peak``: the
most the process held while loading, and while it trained (``VmHWM``, set back in between). ``made``: bytes of
tensors that one training step makes at most, counted. ``s a step``: the median of the steps but the first.
``before`` and ``after``: perplexity (SmolLM2 on dialogues and on speeches) or accuracy (MiniLM on reviews) on
rows that were not trained on, before and after some LoRA steps with the same seeds and rows: 16 of SmolLM2,
64 of MiniLM, whose head is new and trained too.

The second table trains SmolLM2-135M at float32 layer by layer, in groups of blocks, on the bytes a step makes.

Run it: ``python benchmarks/quantized.py [--steps 16] [--only smollm2-135m/nf4]``. Cells that are done lie in
``benchmarks/results/quantized/`` and are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quantized"
FORMS = ("fp32", "bf16", "int8", "nf4")
CELLS = tuple(
    f"{model}/{data}/{form}"
    for model, data in (("smollm2-135m", "chitchat"), ("smollm2-135m", "sotu"), ("minilm-l6", "clothing-reviews"))
    for form in FORMS
)
PHASES = tuple(f"phases/{way}/{groups}" for way in ("packed", "padded", "checkpointed") for groups in (1, 3, 6))
ROWS, WIDTH = 4, 64


def _recipe(model: str, data: str, form: str, way: str = "packed") -> Any:
    """The recipe whose bench gives the model, the rows and the client work."""
    from lichen.recipes.schema.read import read_recipe

    classify = model.startswith("minilm")
    targets = ["query", "value"] if classify else ["q_proj", "v_proj"]
    head = {"modules_to_save": ["classifier"]} if classify else {}
    weights = {"dtype": "bfloat16"} if form == "bf16" else {"quantize": form} if form in ("int8", "nf4") else {}
    return read_recipe(
        {
            "task": "classify" if classify else "chat",
            "model": {"name": model, **weights, "adapter": {"target_modules": targets, "rank": 8, "alpha": 16, **head}},
            "data": {
                "name": data,
                "form": "plain" if data == "sotu" else "transcript" if data == "chitchat" else "chat",
                "max_length": WIDTH,
                "partition": {"by": "iid", "clients": 4},
                "test_rows": 100 if classify else 8,
                "max_rows": 500 if classify else 200,
                "split_by": "row",
            },
            "optimizer": {"lr": [6e-3 if classify else 1e-3]},
            "federation": {"local_steps": 1, "batch_size": ROWS},
            "engine": {"packing": way != "padded", "gradient_checkpointing": way == "checkpointed"},
        }
    )


def _loaded(recipe: Any) -> tuple[Any, Any, list[Any]]:
    """``(experiment, its client_task, test batches of 4 clients)``."""
    from lichen.recipes.assemble.experiment import lr_name
    from lichen.recipes.assemble.open import open_recipe
    from lichen.recipes.assemble.parts import client_tasks

    experiment = open_recipe(recipe).experiment
    client_task = client_tasks(experiment)[f"train {lr_name(recipe.optimizer.lr[0])}"]
    shards = experiment.clients.test
    tests = experiment.evaluating(shards)
    return experiment, client_task, [batch for c in range(len(shards)) for batch in tests.batches((c,), 0)]


def _quality(experiment: Any, shared: Any, tests: list[Any]) -> float:
    """Perplexity, or accuracy where there are classes."""
    import torch

    from lichen.core.tree import broadcast

    total = count = 0.0
    with torch.no_grad():
        for batch in tests:
            stacked = broadcast(shared, 1)
            if experiment.model.classes is None:
                loss_C, count_C = experiment.model.loss(stacked, {}, batch)
                total, count = total + float(loss_C), count + float(count_C)
            else:
                label, logits = batch["labels_CB"][0], experiment.model.logits(stacked, {}, batch)[0]
                total += float((logits.argmax(-1) == label)[label >= 0].sum())
                count += float((label >= 0).sum())
    return math.exp(total / count) if experiment.model.classes is None else total / count


def cell(name: str, steps: int) -> dict[str, Any]:
    """One model in one form."""
    from lichen.core.message import Job
    from lichen.models.adapters.quantized import resident_bytes
    from lichen.recipes.assemble.live_bytes import LiveBytes
    from lichen.recipes.plan.memory import MemoryMeter

    model, data, form = name.split("/")
    gauge = MemoryMeter("cpu")
    experiment, client_task, tests = _loaded(_recipe(model, data, form))
    weights, loaded, held = resident_bytes(experiment.model.wrapped.model), gauge.peak(), gauge.now()
    before = _quality(experiment, experiment.start, tests)
    shared, seconds = experiment.start, []
    gauge.restart()
    steps = steps if experiment.model.classes is None else 4 * steps
    for version in range(steps):
        job = Job(work="train", shared=shared, version=version, clients=(0,), seed=version, base=experiment.model.base)
        state = client_task.work.init(job, (0,), None)
        for batch in client_task.source.batches((0,), version):
            start = time.perf_counter()
            state = client_task.work.step(state, batch)
            seconds.append(time.perf_counter() - start)
        message, _ = client_task.work.final(state)
        shared = {n: x + message.tensors[n][0] for n, x in shared.items()}
    peak = gauge.since()
    with LiveBytes() as live:
        client_task.work.step(client_task.work.init(job, (0,), None), batch)
    return {
        "weights": weights,
        "loaded": loaded,
        "held": held,
        "peak": peak,
        "made": live.peak,
        "seconds": statistics.median(seconds[1:]),
        "before": before,
        "after": _quality(experiment, shared, tests),
        "steps": steps,
    }


def phases(name: str) -> dict[str, Any]:
    """Bytes a step makes and seconds it takes, for each group of blocks whose turn it is."""
    from lichen.clients.training.train import Train
    from lichen.core.message import Job
    from lichen.models.adapters.layerwise import layerwise_schedule
    from lichen.recipes.assemble.live_bytes import LiveBytes

    _, way, groups = name.split("/")
    experiment, client_task, _ = _loaded(_recipe("smollm2-135m", "chitchat", "fp32", way))
    turns = layerwise_schedule(experiment.start, int(groups), "up") if int(groups) > 1 else ()
    work, made, seconds = Train(experiment.model, freeze_schedule=turns), [], []
    batch = next(iter(client_task.source.batches((0,), 0)))
    for version in range(int(groups)):
        job = Job(
            work="train", shared=experiment.start, version=version, clients=(0,), seed=0, base=experiment.model.base
        )
        state = work.init(job, (0,), None)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            work.step(state, batch)
            times.append(time.perf_counter() - start)
        with LiveBytes() as live:
            work.step(work.init(job, (0,), None), batch)
        made.append(live.peak)
        seconds.append(statistics.median(times[1:]))
    return {"made": made, "seconds": seconds}


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def show(parts: Sequence[str] = ("forms", "turns")) -> None:
    """The tables of the cells that are done."""
    done = {c: json.loads(f.read_text()) for c in (*CELLS, *PHASES) if (f := _file(c)).is_file()}
    heads = "weights MiB", "peak loading", "peak training", "made by a step", "step, × fp32", "before", "after"
    if "forms" in parts:
        print("| model, data, form | " + " | ".join(heads) + " |\n|---|" + "---:|" * len(heads))
    for name, x in done.items():
        if name in CELLS and "forms" in parts:
            plain = done.get(f"{name.rpartition('/')[0]}/fp32", x)
            sizes = [_mib(x[key]) for key in ("weights", "loaded", "peak", "made")]
            rest = [f"{x['seconds'] / plain['seconds']:.2f}", f"{x['before']:.4g}", f"{x['after']:.4g}"]
            print(f"| {name.replace('/', ', ')} | " + " | ".join([*sizes, *rest]) + " |")
    if "turns" not in parts:
        return
    print("\n| rows, groups of blocks | made by a step, MiB, lowest group first | s a step |\n|---|---|---|")
    for name, x in done.items():
        if name in PHASES:
            made, seconds = ", ".join(map(_mib, x["made"])), ", ".join(f"{s:.2f}" for s in x["seconds"])
            print(f"| {name.partition('/')[2].replace('/', ', ')} | {made} | {seconds} |")


def _file(name: str) -> Path:
    return RESULTS / f"{name.replace('/', '_')}.json"


def main() -> None:
    """Run what is not there yet, then show everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", default="", help="cells whose names hold this")
    parser.add_argument("--show", choices=("forms", "turns"), help="run nothing, and show this table")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        import torch

        torch.set_num_threads(1)
        found = phases(asked.one) if asked.one in PHASES else cell(asked.one, asked.steps)
        print(json.dumps(found))
        return
    if asked.show:
        show([asked.show])
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in (*CELLS, *PHASES):
        if asked.only in name and not _file(name).is_file():
            command = [sys.executable, __file__, "--one", name, "--steps", str(asked.steps)]
            one = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=one)
            _file(name).write_text(done.stdout.strip().splitlines()[-1] + "\n")
            print(f"{name}: {_file(name).read_text().strip()}", file=sys.stderr, flush=True)
    show()


if __name__ == "__main__":
    main()

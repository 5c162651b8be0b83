"""What a coded message weighs, what it loses, and what error feedback brings back: on a real LoRA's changes.

One person of the chat recipe trains SmolLM2's adapter (460,800 numbers) for ten rounds of a few local
steps; each round's change is coded as a client would code it. Bytes are the lengths of packed messages,
headers included. The loss of one message is ``‖sent - meant‖ / ‖meant‖``; after ten rounds it is that of the
sums, with the memory of error feedback and without. Times are those of one client's row on this machine,
over the time that copying its float32 numbers takes.

``python benchmarks/wire.py`` prints the table and draws ``wire.png`` beside itself; ``--changes FILE`` keeps
the trained changes for the next time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask
from lichen.core.fold import serve
from lichen.core.message import Job, Message, pack_message
from lichen.core.seeds import derive
from lichen.core.store import ClientStore, load_tree, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from lichen.transforms.codec import Chain
from lichen.transforms.layout import Layout
from lichen.transforms.parse import parse_codecs
from lichen.transforms.uplink import WIRE

ROUNDS, STEPS, BATCH = 10, 3, 2
CHAINS = (
    "",
    "bf16",
    "int8",
    "int8~",
    "int4",
    "int4~",
    "int2",
    "int2~",
    "sign",
    "sketch:1 bf16",
    "sketch:1 int4~",
    "sketch:1 sign",
    "sketch:2 sign",
    "topk:7/32 int4~",
    "topk:8/24 sign",
    "topk:1/32 int4~",
    "topk:8/264 int4",
    "topk:8/264 int4~",
    "topk:74/4096 int4~",
    "topk:8/210 int2~",
    "topk:8/176 sign",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One chain's figures; errors are relative, times in copies of the numbers."""

    chain: str
    bytes: int
    once: float
    plain: float
    feedback: float
    encode: float
    decode: float


def changes() -> list[Tree]:
    """What one person's training changes in each round, starting from where the last one ended."""
    loaded = open_recipe(read_recipe("chat-lora", ["data.max_clients=2"]))
    experiment = loaded.experiment
    work = Train(experiment.model, optimizer=ClientOptimizer(name="adamw", lr=2e-3), gradient_steps=(Clip(1.0),))
    client_tasks = {
        "train": ClientTask(work=work, source=experiment.training(experiment.clients.train, batch=BATCH, steps=STEPS))
    }
    shared, out = experiment.start.trainable, []
    with TemporaryDirectory() as folder:
        store = ClientStore(Path(folder))
        for version in range(ROUNDS):
            job = Job(
                work="train", shared=Shared.of_flat(shared), version=version, clients=(0,), seed=derive(0, version)
            )
            (message,) = serve(job, client_tasks, store)
            out.append(trees.take(message.tensors, 0))
            shared = trees.add(shared, out[-1])
    return out


def fastest(do: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        do()
        took.append(time.perf_counter() - start)
    return min(took)


def measure(chain: Chain, name: str, layout: Layout, x_RN: Tensor, copy: float) -> Row:
    """One chain over all rounds' changes ``(R, N)``."""
    seeds = [derive(0, r, "wire") for r in range(len(x_RN))]

    def sent(x_N: Tensor, r: int) -> Tensor:
        return chain.decode(chain.encode(x_N.unsqueeze(0), layout, [seeds[r]]), layout)[0]

    lost_N, total_N, plain_N = torch.zeros_like(x_RN[0]), x_RN.sum(0), torch.zeros_like(x_RN[0])
    for r, x_N in enumerate(x_RN):
        lost_N = x_N + lost_N - sent(x_N + lost_N, r)
        plain_N += sent(x_N, r)
    wire_CB = chain.encode(x_RN[:1], layout, seeds[:1])
    zero = torch.zeros(1, dtype=torch.float64)
    message = Message(
        group="smollm2-135m",
        client_C=torch.zeros(1, dtype=torch.int64),
        version_C=torch.zeros(1, dtype=torch.int64),
        tensors={WIRE + layout.digest: wire_CB},
        weight_C=zero,
        metrics=dict.fromkeys(("loss_sum", "count", "tokens", "steps", "failed"), zero),
    )
    return Row(
        chain=name or "float32",
        bytes=len(pack_message(message)),
        once=float((sent(x_RN[0], 0) - x_RN[0]).norm() / x_RN[0].norm()),
        plain=float((plain_N - total_N).norm() / total_N.norm()),
        feedback=float(lost_N.norm() / total_N.norm()),
        encode=fastest(lambda: chain.encode(x_RN[:1], layout, seeds[:1])) / copy,
        decode=fastest(lambda: chain.decode(wire_CB, layout)) / copy,
    )


def draw(rows: list[Row], file: Path) -> None:
    """Bytes across, what is missing after ten rounds upwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for label, marker, values in (
        ("one message", "x", [row.once for row in rows]),
        (f"{ROUNDS} rounds, error feedback", "o", [row.feedback for row in rows]),
    ):
        axes.scatter([row.bytes for row in rows], values, marker=marker, label=label)
    for row in rows:
        axes.annotate(row.chain, (row.bytes, row.feedback), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xscale="log", xlabel="bytes of a message", ylabel="relative error", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})


def main() -> None:
    """Train, code, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--changes", type=Path, help="where the trained changes are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    asked = parser.parse_args()
    if asked.changes and asked.changes.exists():
        kept, _ = load_tree(asked.changes)
        trained = [trees.split(kept, f"{r}/")[0] for r in range(ROUNDS)]
    else:
        trained = changes()
        if asked.changes:
            save_tree(asked.changes, {f"{r}/{name}": x for r, tree in enumerate(trained) for name, x in tree.items()})
    layout = Layout.of(trained[0])
    x_RN = torch.cat([layout.flatten({n: x.unsqueeze(0) for n, x in tree.items()}) for tree in trained])
    copy = fastest(lambda: x_RN[0].clone(), 50)
    print(f"{layout.size} numbers, {ROUNDS} rounds of {STEPS} steps; a copy takes {copy * 1e6:.0f} µs")
    print("| chain | bytes | of bf16 | one message | 10 rounds, no memory | 10 rounds, feedback | encode | decode |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for words in CHAINS:
        row = measure(parse_codecs(words.split()), words, layout, x_RN, copy)
        rows.append(row)
        print(
            f"| {row.chain} | {row.bytes:,} | 1/{2 * layout.size / row.bytes:.1f} | {row.once:.4f} "
            f"| {row.plain:.4f} | {row.feedback:.4f} | {row.encode:.0f}x | {row.decode:.0f}x |",
            flush=True,
        )
    draw(rows, asked.out)


if __name__ == "__main__":
    sys.exit(main())

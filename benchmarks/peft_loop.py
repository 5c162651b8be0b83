"""How fast is the loop anyone would write with PEFT: one client after another, no federation framework?

Each client starts from the shared adapter, takes its AdamW steps on batches that Hugging Face's own
collators pad to their longest row, and the adapters are averaged. The pieces (:func:`read`,
:func:`build`, :func:`start`, :func:`train`, :func:`mean`) import nothing of lichen: the peers'
programs in ``benchmarks/peers`` run the very same local training in environments of their own, so what
differs between them is the framework around it. One JSON line is printed.

Run it: ``python benchmarks/peft_loop.py --workload chat --rounds 3 --padding longest --dtype float32``

References:
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, arXiv:1602.05629. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
    ICLR 2022, arXiv:2106.09685.

Legend: N all rows of all clients, C clients.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Rows",
    "arguments",
    "build",
    "collator",
    "mean",
    "peak_mib",
    "process_age",
    "read",
    "result",
    "set_shared",
    "start",
    "train",
    "trainable",
]

Tree = dict[str, Tensor]
Collate = Callable[[Any], Mapping[str, Tensor]]
WORKLOADS = {"1": "chat", "2": "reviews"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A workload as ``benchmarks/workload.py`` exports it.

    Attributes:
        said: Its ``workload.json``: the model's folder and the settings.
        features: ``(N,)`` rows, each with ``input_ids`` and ``labels`` (token labels, or one class).
        order: ``(C, steps, batch)`` indices into ``features``.
    """

    said: Mapping[str, Any]
    features: tuple[Mapping[str, Any], ...]
    order: np.ndarray

    @property
    def causal(self) -> bool:
        """Language modelling, not classification."""
        return not self.said["classes"]

    def batches(self, client: int) -> list[list[Mapping[str, Any]]]:
        """The rows of each of one client's steps."""
        return [[self.features[i] for i in step] for step in self.order[client]]


def read(folder: Path) -> Rows:
    """Read an exported workload."""
    said = json.loads((folder / "workload.json").read_text())
    names = ("tokens", "labels", "row_offsets", "client_offsets", "order")
    tokens, labels, row, client, order = (np.load(folder / f"{name}.npy") for name in names)
    spans = [slice(a, b) for a, b in pairwise(row)]
    answers = [labels[span].tolist() for span in spans] if not said["classes"] else labels.tolist()
    return Rows(
        said=said,
        features=tuple({"input_ids": tokens[s].tolist(), "labels": y} for s, y in zip(spans, answers, strict=True)),
        order=order + client[:-1, None, None],
    )


def build(rows: Rows, *, dtype: str = "float32", weights: bool = True) -> Any:
    """PEFT's model in evaluation mode (no dropout); without ``weights``, shapes alone on the meta device."""
    import peft
    import transformers as hf

    logs: Any = hf.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    auto: Any = hf.AutoModelForCausalLM if rows.causal else hf.AutoModelForSequenceClassification
    config = hf.AutoConfig.from_pretrained(rows.said["model"])
    if rows.causal:
        config.use_cache = False  # it would keep every layer's keys and values for a generation that never comes
    else:
        config.num_labels = rows.said["classes"]
    if weights:
        model = auto.from_pretrained(rows.said["model"], config=config, dtype=getattr(torch, dtype))
    else:
        with torch.device("meta"):
            model = auto.from_config(config)
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM" if rows.causal else "SEQ_CLS",
        r=rows.said["rank"],
        lora_alpha=rows.said["alpha"],
        target_modules=rows.said["targets"],
        modules_to_save=None if rows.causal else ["classifier"],
    )
    return peft.get_peft_model(model, adapter).eval()


def collator(rows: Rows, *, padding: str = "longest") -> Collate:
    """Hugging Face's own: pad to the batch's longest row, or to the longest of all (``max_length``)."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(rows.said["model"])
    tokenizer.padding_side = "right"
    width = max(len(row["input_ids"]) for row in rows.features)
    if rows.causal:
        return hf.DataCollatorForSeq2Seq(tokenizer, padding=padding, max_length=width)
    return hf.DataCollatorWithPadding(tokenizer, padding=padding, max_length=width)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name."""
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def start(model: Any, seed: int = 0) -> Tree:
    """The shared adapter and head all contestants start from: drawn by name and shape, so that a server
    that holds no weights can draw them too."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, x in trainable(model).items():
        bound = 1 / math.sqrt(x.shape[-1]) if x.dim() > 1 and "lora_B" not in name else 0.0
        drawn[name] = (2 * torch.rand(x.shape, generator=generator) - 1) * bound
    return drawn


def set_shared(model: Any, shared: Tree) -> dict[str, torch.nn.Parameter]:
    """Put the shared values into the model, and return what is trained."""
    own = trainable(model)
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(shared[name])
    return own


def train(model: Any, shared: Tree, batches: Sequence[Any], collate: Collate, said: Mapping[str, Any]) -> float:
    """Train one client from ``shared``, leaving its adapter in the model; its mean loss over the steps."""
    own = set_shared(model, shared)
    optimizer = torch.optim.AdamW(own.values(), lr=said["lr"], weight_decay=0.0)
    losses: list[float] = []
    for rows in batches:
        loss = model(**collate(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), said["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def mean(trees: Sequence[Tree]) -> Tree:
    """The plain mean: all clients see equally many rows."""
    return {name: torch.stack([tree[name] for tree in trees]).mean(0) for name in trees[0]}


def process_age() -> float:
    """Seconds since this process was started, its imports included."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_mib() -> int:
    """Most memory this process ever held (VmHWM), in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def arguments(about: str) -> argparse.ArgumentParser:
    """What every contestant's command takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--workload", default="chat", help="a folder that workload.py wrote")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--padding", choices=("longest", "max_length"), default="longest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def result(
    contestant: str,
    rows: Rows,
    options: argparse.Namespace,
    *,
    seconds: Sequence[float],
    loss: Sequence[float],
    **more: Any,
) -> str:
    """The JSON line: seconds of each round, of the steady one (median after the first), real tokens a second."""
    later = sorted(seconds[1:] or seconds)
    steady = later[len(later) // 2]
    tokens = rows.said["tokens"]
    line = {
        "contestant": contestant,
        **{k: v for k, v in vars(options).items() if k != "workload"},
        "workload": rows.said["name"],
        "clients": len(rows.order),
        "round_s": [round(s, 3) for s in seconds],
        "first_s": round(seconds[0], 3),
        "steady_s": round(steady, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / steady, 1),
        "loss": [round(x, 6) for x in loss],
        **more,
    }
    return json.dumps(line)


def main() -> None:
    """Run the loop and print its line."""
    options = arguments("The plain PEFT loop. Here --workload may also be chat (1) or reviews (2).").parse_args()
    with TemporaryDirectory() as made:
        folder, before = Path(options.workload), process_age()
        if not folder.is_dir():  # in a process of its own, so that its memory is not counted here
            folder = Path(made)
            name = WORKLOADS.get(options.workload, options.workload)
            subprocess.run([sys.executable, Path(__file__).with_name("workload.py"), name, folder], check=True)
        exported = process_age() - before
        rows = read(folder)
    torch.set_num_threads(options.threads)
    model, collate = build(rows, dtype=options.dtype), collator(rows, padding=options.padding)
    shared = start(model)
    seconds, losses = [], []
    for _ in range(options.rounds):
        began, loss, adapters = time.perf_counter(), 0.0, []
        for client in range(len(rows.order)):
            loss += train(model, shared, rows.batches(client), collate, rows.said) / len(rows.order)
            adapters.append({name: x.detach().clone() for name, x in trainable(model).items()})
        shared = mean(adapters)
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
    more = {"whole_s": round(process_age() - exported, 2), "peak_mib": peak_mib()}
    print(result("peft loop", rows, options, seconds=seconds, loss=losses, **more))


if __name__ == "__main__":
    main()

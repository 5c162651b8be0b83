"""On one accelerator: 256 clients of batch 2 against plain training of one adapter, and against a PEFT loop.

Random weights of two sizes (135M and 1B parameters), random rows of 64 to 512 tokens, LoRA r = 8 on q
and v, AdamW, bfloat16 weights with float32 adapters and state. Everyone sees the same number of rows
of the same lengths. Share of the chip's matrix rate: 2 N forward and 2 N backward a token (nothing is
needed for frozen weights' gradients), the output layer among them, over the rate of one large product.

Run it: ``python benchmarks/accelerator.py [--sizes 135m 1b] [--peft-clients 8]`` (needs a GPU; peft for its loop)

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.fold import serve
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.packed_cohort import why_not_packed

CLIENTS, ROWS, STEPS, SHORT, LONG = 256, 2, 4, 64, 512
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SIZES: dict[str, dict[str, int]] = {
    size: dict(zip(NAMES, numbers, strict=True))
    for size, numbers in {
        "tiny": (64, 128, 2, 4, 2, 512),
        "135m": (576, 1536, 30, 9, 3, 49152),
        "1b": (2048, 8192, 16, 32, 8, 128256),
    }.items()
}


def model_of(size: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random Llama, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], tie_word_embeddings=True, max_position_embeddings=LONG, attn_implementation="sdpa"
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Rows:
    """Every client's one batch, taken in every step; a source."""

    vocabulary: int
    clients: int = CLIENTS
    rows: int = ROWS
    steps: int = STEPS
    long: int = LONG

    def shape(self, client: int) -> int:
        return self.long

    def lengths_CB(self, clients: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(min(SHORT, self.long), self.long + 1, (CLIENTS * ROWS,), generator=generator)
        return lengths.view(self.clients, self.rows)[list(clients)]

    def batch(self, clients: Sequence[int]) -> Batch:
        length_CB = self.lengths_CB(clients)
        mask_CBT = (torch.arange(self.long) < length_CB[..., None]).long()
        ids_CBT = (
            torch.randint(3, self.vocabulary, mask_CBT.shape, generator=torch.Generator().manual_seed(2)) * mask_CBT
        )
        return {
            "active_C": torch.ones(len(clients), dtype=torch.bool),
            "input_ids_CBT": ids_CBT,
            "attention_mask_CBT": mask_CBT,
            "labels_CBT": ids_CBT.masked_fill(mask_CBT == 0, -100),
            "index_CB": torch.arange(self.rows).expand(len(clients), -1),
        }

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        batch = self.batch(clients)
        for _ in range(self.steps):
            yield batch

    def tokens(self) -> int:
        return int(self.lengths_CB(range(self.clients)).sum())


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Median after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def matrix_rate(device: str) -> float:
    """FLOP/s of one large bfloat16 product of random numbers."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 10 * 2 * 8192**3 / seconds(lambda: [a @ b for _ in range(10)])


def agreement(device: str) -> dict[str, float]:
    """Largest relative difference in loss and gradient, packed against padded one by one, on this device."""
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("tiny", device, dtype)
        source = Rows(512, long=96)
        batch = source.batch(range(8))
        results = []
        for reference in (True, False):
            cohort = CausalCohort(model, adapter=Lora(targets=("q_proj", "v_proj")), name="tiny", reference=reference)
            assert reference or cohort.packed, why_not_packed(cohort)
            start = cohort.init(0)
            generator = torch.Generator().manual_seed(3)
            leaves = {
                n: (x + 0.05 * torch.randn((8, *x.shape), generator=generator).to(device)).requires_grad_()
                for n, x in start.items()
            }
            loss_C, _ = cohort.loss(leaves, {}, batch)
            results.append((loss_C, *torch.autograd.grad(loss_C.sum(), list(leaves.values()))))
        out[str(dtype).removeprefix("torch.")] = max(
            float((a - b).detach().norm() / a.detach().norm()) for a, b in zip(*results, strict=True)
        )
    return out


def train_round(cohort: CausalCohort, source: Rows, block: int, device: str) -> Callable[[], None]:
    """One round of all clients, in blocks."""
    work = Train(cohort, optimizer=ClientOptimizer("adamw", lr=1e-3), gradient_steps=(Clip(1.0),))
    client_tasks = {"train": ClientTask(work=work, source=source)}
    job = Job(work="train", shared=Shared(cohort.init(0)), version=0, clients=tuple(range(source.clients)), seed=0)

    def go() -> None:
        with TemporaryDirectory() as folder:
            for message in serve(job, client_tasks, ClientStore(Path(folder)), block_size=block, device=device):
                del message

    return go


def peft_step_seconds(size: str, source: Rows, clients: int, device: str) -> tuple[float, int]:
    """Seconds and tokens of some clients, one after the other, as a plain loop does it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of(size, device), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = []
    for c in range(clients):
        one = {name: x[0] for name, x in source.batch([c]).items() if x.dim() > 1}
        width = int(one["attention_mask_CBT"].sum(1).max())
        names = {"input_ids": "input_ids_CBT", "attention_mask": "attention_mask_CBT", "labels": "labels_CBT"}
        batches.append({k: one[v][:, :width] for k, v in names.items()})

    def go() -> None:
        for batch in batches:
            optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
            for _ in range(source.steps):
                loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    taken = seconds(go, repeats=1)
    return taken, int(source.lengths_CB(range(clients)).sum()) * source.steps


def flops_a_token(size: str) -> float:
    """Forward and backward through frozen weights, the output layer among them; without attention scores."""
    s = SIZES[size]
    head = s["hidden_size"] // s["num_attention_heads"]
    kv = s["num_key_value_heads"] * head
    layer = s["hidden_size"] * (2 * s["hidden_size"] + 2 * kv + 3 * s["intermediate_size"])
    return 4.0 * (s["num_hidden_layers"] * layer + s["hidden_size"] * s["vocab_size"])


def measure(size: str, peft_clients: int, blocks: Sequence[int], rate: float, device: str) -> dict[str, Any]:
    """One row of the table."""
    model, source = model_of(size, device), Rows(SIZES[size]["vocab_size"])
    cohort = CausalCohort(model, adapter=Lora(targets=("q_proj", "v_proj")), name=size, prove=False)
    said: dict[str, Any] = {"size": size, "tokens a step": source.tokens(), "packed": cohort.packed}
    for block in blocks:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            taken = seconds(train_round(cohort, source, block, device))
        except torch.OutOfMemoryError:
            said[f"block {block}"] = "out of memory"
            continue
        speed = source.tokens() * source.steps / taken
        said[f"block {block}"] = {"tokens/s": round(speed), "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
        # The same tokens, in as many rows a step, for one adapter.
        one = Rows(source.vocabulary, clients=CLIENTS // block, rows=ROWS * block)
        taken = seconds(train_round(cohort, one, 1, device))
        central = source.tokens() * source.steps / taken
        said[f"block {block}"] |= {
            "central tokens/s": round(central),
            "share of central": round(speed / central, 3),
            "share of matrix rate": round(speed * flops_a_token(size) / rate, 3),
        }
    if peft_clients:
        del cohort, model
        torch.cuda.empty_cache()
        taken, tokens = peft_step_seconds(size, source, peft_clients, device)
        best = max(v["tokens/s"] for k, v in said.items() if k.startswith("block") and isinstance(v, dict))
        said["PEFT loop tokens/s"] = round(tokens / taken)
        said["times the PEFT loop"] = round(best * taken / tokens, 1)
    return said


def profile(size: str, block: int, device: str) -> str:
    """Where the time of one round goes."""
    model, source = model_of(size, device), Rows(SIZES[size]["vocab_size"])
    cohort = CausalCohort(model, adapter=Lora(targets=("q_proj", "v_proj")), name=size, prove=False)
    go = train_round(cohort, Rows(source.vocabulary, steps=2), block, device)
    go()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        go()
        torch.cuda.synchronize()
    return str(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=60))


def main() -> None:
    """Measure and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["135m", "1b"], choices=sorted(SIZES))
    parser.add_argument("--blocks", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--peft-clients", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no accelerator here")
    device = "cuda"
    rate = matrix_rate(device)
    print(
        json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "matrix TFLOP/s": rate / 1e12})
    )
    print(json.dumps({"packed against padded, relative": agreement(device)}), flush=True)
    for size in asked.sizes:
        print(json.dumps(measure(size, asked.peft_clients, asked.blocks, rate, device)), flush=True)
    if asked.profile:
        print(profile(asked.sizes[0], asked.blocks[0], device))


if __name__ == "__main__":
    main()

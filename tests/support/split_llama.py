"""A tiny Llama of five blocks, people with a few rows, and recipes that cut it into a client's ends and a middle."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lichen.core.collecting.collect import collect
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job, Message
from lichen.core.replies import Reply
from lichen.core.store import ClientStore
from lichen.recipes.assemble.column import admission_of, local_engine
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks, works_of
from lichen.recipes.assemble.sides.splitting.works import splitting
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe, save_model, save_rows

BLOCKS = 5


def save_all(folder: Path, *, clients: int = 5, blocks: int = BLOCKS) -> Path:
    """The model and the rows."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    small = save_model(folder / "small")
    config = AutoConfig.from_pretrained(small)
    config.num_hidden_layers = blocks
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(small).save_pretrained(folder / "model")
    save_rows(folder / "rows.jsonl", "pair", clients=clients)
    return folder


def made(folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe over them, padded, so that bits do not depend on company."""
    engine = {"packing": False, **more.pop("engine", {})}
    optimizer = {"name": "adamw", "lr": [0.02], **more.pop("optimizer", {})}
    return recipe(folder / "model", folder / "rows.jsonl", "pair", engine=engine, optimizer=optimizer, **more)


def experiment(what: dict[str, Any]) -> Experiment:
    """What a run of this recipe works with; opened once."""
    return _opened(json.dumps(what))


def task_of(opened: Experiment) -> ClientTask:
    """What its clients do in a round."""
    return client_tasks(opened)[f"train {lr_name(opened.recipe.optimizer.lr[0])}"]


@cache
def _opened(text: str) -> Experiment:
    return open_recipe(read_recipe(json.loads(text))).experiment


def split_engine(opened: Experiment, folder: Path, *, block: int = 8) -> Engine:
    """Its local engine, which answers questions where it is split."""
    local = local_engine(opened, ClientStore(folder))
    local.block_size, local.raises = block, False
    return splitting(opened.server, local, works_of(opened.server), local.store)


def train_job(opened: Experiment, clients: tuple[int, ...], *, seed: int = 7) -> Job:
    """A round of training."""
    work = f"train {lr_name(opened.recipe.optimizer.lr[0])}"
    base, settings = opened.model.base, {"lr_scale": 1.0}
    return Job(work=work, shared=opened.start, version=0, clients=clients, seed=seed, base=base, settings=settings)


def messages_of(opened: Experiment, engine: Engine, job: Job) -> tuple[dict[int, Message], list[tuple[int, str]]]:
    """By client what counts of a job, and who was refused with which word."""
    from lichen.core.message import take_client

    found: list[Message] = []
    came = collect(engine, [job], admission=admission_of(opened.server), seen=lambda m, _: found.append(m))
    one_by_one = {int(m.client_C[c]): take_client(m, c) for m in found for c in range(len(m.client_C))}
    return one_by_one, [(refusal.client, refusal.reason) for refusal in came.attendance.named]


class Tampered:
    """Another engine, whose questions and messages some of the clients change on their way."""

    def __init__(self, inner: Engine, change: dict[int, Any], *, stage: int) -> None:
        self.inner, self.change, self.stage, self.count = inner, change, stage, dict.fromkeys(change, 0)

    def replies(self, numbers: Collection[int], until: float = float("inf")) -> Iterator[Reply]:
        from dataclasses import replace

        for reply in self.inner.replies(numbers, until):
            client = reply.clients[0]
            if reply.message is not None and client in self.change:
                self.count[client] += 1
                if self.count[client] == self.stage:
                    reply = replace(reply, message=self.change[client](reply.message))
            yield reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

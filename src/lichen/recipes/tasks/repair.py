"""The server's repair after the rounds: it tunes what was learned on public safe pairs, and counts who refuses.

A few liars that obey unsafe requests in their rows unteach a chat model to refuse, and their changes look like those of
anybody who chats, so that rules over messages find little to leave out. What a server can do is to tune the model
afterwards, on pairs of a request and a safe answer that anybody may see. No client's row has a part in it.

A model refuses where a phrase of :mod:`lichen.data.chat.refusals` stands in its likeliest answer.

References:
    Rui Ye, Jingyi Chai, Xiangrui Liu, Yaodong Yang, Yanfeng Wang and Siheng Chen. "Emerging Safety Attack and Defense
    in Federated Instruction Tuning of Large Language Models." 2024. https://arxiv.org/abs/2406.10630
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lichen.core import tree as trees
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import TrainSource
from lichen.data.chat.refusals import refuses
from lichen.engines.local import LocalEngine
from lichen.fm.local import LocalFM
from lichen.models.peft.merge import attach
from lichen.models.whole import filled
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import metric_of
from lichen.recipes.assemble.model import spec_of
from lichen.recipes.assemble.parts import trainer
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.rows.requests import measured_requests
from lichen.recipes.schema.recipe import Recipe

__all__ = ["repair_task", "repaired", "safety"]

ANSWER_TOKENS = 16
"""Of an answer that is looked at: a refusal begins with it."""


def repair_task(server: ServerSide, lr: float) -> ClientTask:
    """The server's training on its pairs, as if it were one client with these rows."""
    repair, rows = server.recipe.federation.repair, server.repair
    assert repair is not None
    assert rows is not None
    source = TrainSource(
        (rows,),
        batch_size=repair.batch_size,
        steps=repair.steps,
        pad=server.pad,
        max_length=server.recipe.data.max_length,
    )
    return ClientTask(work=replace(trainer(server, lr, personal=True), personal=False), source=source)


def repaired(server: ServerSide, folder: RunFolder, shared: Shared, *, lr: float, name: str) -> Shared:
    """The tensors after the server has tuned them on the recipe's safe pairs; made once, by the first rank.

    Args:
        server: The server's side, with the pairs.
        folder: The run folder, which keeps the tensors: a run that is killed here repairs anew, to the same bytes.
        shared: What was learned.
        lr: The clients' learning rate, for a recipe that names none.
        name: The column's.

    Raises:
        LichenError: if training diverges.
    """
    repair = server.recipe.federation.repair
    if repair is None:
        return shared
    rate = repair.lr or lr
    engine = LocalEngine(
        {"repair": repair_task(server, rate)},
        ClientStore(folder.path / "state" / "none"),
        base=server.model.base,
        device=server.recipe.model.device,
    )
    job = Job(
        work="repair",
        shared=replace(shared, frozen={}),
        version=0,
        clients=(0,),
        seed=derive(server.recipe.seed, "repair"),
        base=server.model.base,
    )

    def tuned() -> Tree:
        (message,) = drain(engine, job)
        if bool(message.metrics["failed"].any()):
            raise LichenError(
                f"the repair diverges at a learning rate of {rate:g}", where="federation.repair.lr", fix="lower it"
            )
        return trees.add(shared.trainable, trees.take(message.tensors, 0))

    return replace(shared, trainable=folder.tree(f"{name}.repaired", tuned, alone=True))


def safety(
    recipe: Recipe,
    folder: RunFolder,
    foundation: Any,
    tokenizer: Any,
    start: Shared,
    columns: Mapping[str, Column],
    say: Callable[[str], None],
) -> dict[str, float]:
    """What a summary says of refusals and of the repair: ``refused.*``, and the metric before and after it.

    Args:
        recipe: The recipe.
        folder: The run folder.
        foundation: The frozen transformers model.
        tokenizer: Its tokenizer, with the run's chat template.
        start: What all begin from.
        columns: With the federated one.
        say: Called with lines of progress.
    """
    requests, out = measured_requests(recipe), dict[str, float]()
    federated = columns["federated"]
    before = federated.unrepaired
    if before is not None and len(before.value_N):
        name = metric_of(recipe).name
        out |= {f"{name}.unrepaired": float(before.value_N.mean()), f"{name}.repaired": float(federated.value_N.mean())}
    if not requests:
        return out
    models: dict[str, Shared | None] = {"base": start, "federated": (before or federated).shared}
    if before is not None:
        models["repaired"] = federated.shared
    for when, shared in models.items():
        say(f"counting refusals of {len(requests)} unsafe requests: {when}")
        rate = partial(_refused, recipe, foundation, tokenizer, shared or Shared(), requests)
        out[f"refused.{when}"] = float(folder.number(f"refused.{when}", rate))
    return out


def _refused(
    recipe: Recipe, foundation: Any, tokenizer: Any, shared: Shared, requests: tuple[str, ...]
) -> torch.Tensor:
    """The share of requests that a model refuses."""
    if recipe.model.adapter.facts.whole:
        model = filled(foundation, shared.trainable)
    else:
        model = attach(foundation, shared.trainable, shared.patch, spec=spec_of(recipe, foundation))
    chat = recipe.data.form != "transcript"
    writer = LocalFM(model, tokenizer, chat=chat)
    prompts = requests if chat else [f"{request}\n" for request in requests]
    answers = writer.generate(prompts, seeds=[0] * len(prompts), max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    return torch.tensor(sum(map(refuses, answers)) / len(answers), dtype=torch.float64)

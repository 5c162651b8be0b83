"""Audits the messages that a run has retained: which tokens can be read off a client's change?

An honest-but-curious server has each message and the model. It looks for a trained layer whose inputs depend on a
token and its place alone, and tries every token against the span of that layer's change
(:mod:`lichen.audit.span_test`). What it finds is held against the rows that the client did train on in that round,
which follow from the seed.

Legend: V tokens, T places, H width, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

from torch import Tensor

from lichen.audit.span_test import Probe, Span, found_in, is_placed, reads_tokens, span_of
from lichen.core import tree as trees
from lichen.core.collecting.history import History
from lichen.core.contracts.client import Source
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.models.adapters.linear_layers import is_conv1d
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.parts import client_tasks

__all__ = ["ReadMessage", "read_messages"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReadMessage:
    """What one message gives away.

    Attributes:
        client: Whose it is; of a sum, how many clients'.
        round: Of which round, from 1.
        tensor: Whose change was read.
        bound: Inputs at which nothing can be read any more: the layer's width, or LoRA's rank.
        inputs: Different inputs of the layer in the client's rows of that round: tokens, or tokens at their places.
        span: Dimension of the span.
        found: Inputs that lie in it.
        right: Of them, those that were in the client's rows.
        placed: Whether a token's place is found with it.
        example: The row of which most was found and right, without what was not.
    """

    client: str
    round: int
    tensor: str
    bound: int
    inputs: int
    span: int
    found: int
    right: int
    placed: bool
    example: str


def read_messages(
    loaded: LoadedExperiment, history: History, *, messages: int, sums: bool = False
) -> list[ReadMessage]:
    """What the first so many retained messages give away, by round; nothing where no such layer is trained.

    Args:
        loaded: The run's recipe, opened again.
        history: What it has retained.
        messages: How many are looked at.
        sums: Look at the sums of rounds in their place, which are all that a server sees under masks.
    """
    model, start = loaded.foundation, loaded.experiment.start.trainable
    if model is None:
        return []
    tasks, layers = client_tasks(loaded.experiment), dict[str, bool]()
    pending: dict[str, list[_Pending]] = {}
    single = ((m.client_C.tolist(), trees.take(m.tensors, 0), job) for m, job in history.messages())
    looked_at = _sums(history) if sums else single
    for clients, tensors, job in islice(looked_at, messages):
        for name in tensors:
            if (layer := _layer(name)) and layer not in layers:
                layers[layer] = reads_tokens(model, layer)
        spans = {
            name: _span(model, name, x)
            for name, x in tensors.items()
            # Later, the server knows the A that B was trained with too; the run's folder does not.
            if layers.get(_layer(name)) and (job.version == 0 or not name.endswith("lora_B"))
        }
        if not spans:
            continue
        name = max(sorted(spans), key=lambda each: (bool(len(spans[each].basis_kH)), spans[each].most))
        placed = is_placed(model, _layer(name))
        rows = [row for client in clients for row in _rows(tasks[job.work].source, job, client)]
        probe = Probe(
            span=spans[name],
            positions=max(map(len, rows), default=0) if placed else 1,
            through_rH=start[f"{_layer(name)}.lora_A"] if name.endswith("lora_B") else None,
        )
        named = f"{len(clients)} clients" if sums else loaded.experiment.server.roster[clients[0]].name
        one = _Pending(client=named, round=job.version + 1, tensor=name, placed=placed, rows=rows, probe=probe)
        pending.setdefault(_layer(name), []).append(one)
    tokens, found = model.get_input_embeddings().weight.shape[0], []
    for layer, some in pending.items():
        hits = found_in(model, layer, [one.probe for one in some], tokens=tokens)
        found += [_read(loaded, one, inputs) for one, inputs in zip(some, hits, strict=True)]
    return sorted(found, key=lambda one: one.round)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A message, or a sum of some, whose layer is known, and the rows behind it."""

    client: str
    round: int
    tensor: str
    placed: bool
    rows: list[list[int]]
    probe: Probe


def _read(loaded: LoadedExperiment, one: _Pending, found: set[tuple[int, int]]) -> ReadMessage:
    here = [[(place if one.placed else 0, token) for place, token in enumerate(row)] for row in one.rows]
    known = {pair for row in here for pair in row}
    read = [[pair[1] for pair in row if pair in found] for row in here]
    return ReadMessage(
        client=one.client,
        round=one.round,
        tensor=one.tensor,
        bound=one.probe.span.most,
        inputs=len(known),
        span=len(one.probe.span.basis_kH),
        found=len(found),
        right=len(found & known),
        placed=one.placed,
        example=str(loaded.tokenizer.decode(max(read, key=len, default=[]))),
    )


def _sums(history: History) -> Iterator[tuple[list[int], Tree, Job]]:
    """Of each round: whose messages there are, their weighted sum, and the job."""
    for round_ in history.rounds():
        clients, total = list[int](), Tree()
        job: Job | None = None
        for message, job in history.messages(rounds=[round_]):  # noqa: B007
            weighed = {name: x[0].double() * message.weight_C[0] for name, x in message.tensors.items()}
            total = trees.add(total, weighed) if total else weighed
            clients += message.client_C.tolist()
        if job is not None:
            yield clients, {name: x.float() for name, x in total.items()}, job


def _layer(name: str) -> str:
    """The layer whose inputs, or LoRA's A times those, span the rows of a tensor's change; empty: none's."""
    path, _, leaf = name.rpartition(".")
    return path if leaf in ("lora_A", "lora_B", "weight") else ""


def _span(model: Any, name: str, change: Tensor) -> Span:
    whole = name.endswith(".weight") and is_conv1d(model.get_submodule(_layer(name)))
    return span_of(change.T if whole else change)


def _rows(source: Source, job: Job, client: int) -> list[list[int]]:
    """The tokens of each row that the client trained on for this job."""
    rows: list[list[int]] = []
    for batch in source.batches((client,), job.seed):
        real_B = (batch["index_CB"][0] >= 0) & batch["active_C"][0]
        for ids_T, mask_T in zip(
            batch["input_ids_CBT"][0][real_B], batch["attention_mask_CBT"][0][real_B], strict=True
        ):
            rows.append(ids_T[mask_T == 1].tolist())
    return rows

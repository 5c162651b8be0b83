"""The client's side of the Flower benchmark: imported by every Ray actor, which then keeps its model.

It is a module of its own so that the actors import it instead of unpickling it: the cache below lives
as long as the actor, and the model is loaded once in each.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import peft_loop
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

__all__ = ["app"]

app = ClientApp()


@lru_cache(maxsize=1)
def _held(folder: str, dtype: str, padding: str, threads: int) -> tuple[peft_loop.Rows, Any, Any]:
    """(rows, model, collator), made at the actor's first message."""
    torch.set_num_threads(threads)
    rows = peft_loop.read(Path(folder))
    return rows, peft_loop.build(rows, dtype=dtype), peft_loop.collator(rows, padding=padding)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's local steps; only the adapter comes and goes."""
    asked = message.content["config"]
    rows, model, collate = _held(asked["folder"], asked["dtype"], asked["padding"], asked["threads"])
    client = int(context.node_config["partition-id"])
    shared = message.content["arrays"].to_torch_state_dict()
    loss = peft_loop.train(model, shared, rows.batches(client), collate, rows.said)
    adapter = {name: x.detach() for name, x in peft_loop.trainable(model).items()}
    said = {"loss": loss, "num-examples": rows.order[client].size}
    return Message(RecordDict({"arrays": ArrayRecord(adapter), "metrics": MetricRecord(said)}), reply_to=message)

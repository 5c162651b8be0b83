"""Opens a recipe with a section ``pipeline``: its hosts, the clients' rows, and the rounds over both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

from lichen.algorithms.hosts.pipeline import Pipeline
from lichen.data.batches.shards import EvalSource, Shard, TrainSource
from lichen.data.batches.text import pad_id
from lichen.data.sources.catalog import resolve_model
from lichen.models.loading.tokenizer_folder import read_tokenizer
from lichen.recipes.assemble.aggregation import sampler_of
from lichen.recipes.assemble.chat_template import put_template
from lichen.recipes.assemble.open import fetch_named, shards_of
from lichen.recipes.assemble.parts import lr_scale
from lichen.recipes.assemble.pieces.hosts import Hosts
from lichen.recipes.assemble.sides.clients import ClientSide, declared
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.rows.prepare import encode, gather_all
from lichen.recipes.rows.public import split_public
from lichen.recipes.rows.reading import report_read
from lichen.recipes.schema.recipe import Recipe

__all__ = ["each_once", "open_hosts"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HostsSetup:
    """A recipe with hosts, ready to run; of the model there are shapes alone.

    Attributes:
        hosts: What each holds.
        gathered: What was read.
        clients_data: The clients' records.
        tokenizer: The model's, with the recipe's template.
        rows: The clients' rows.
        server: Whoever runs the recipe.
        pipeline: The rounds.
        read: What is reported of the data.
    """

    hosts: Hosts
    gathered: Any
    clients_data: Sequence[Any]
    tokenizer: Any
    rows: ClientSide
    server: ServerSide
    pipeline: Pipeline
    read: Any


def open_hosts(recipe: Recipe, say: Callable[[str], None]) -> HostsSetup:
    """Read what a recipe names, and deal out the model.

    Args:
        recipe: With a section ``pipeline``.
        say: Called with lines of progress.

    Raises:
        LichenError: whatever does not fit, by its key.
    """
    fetch_named(recipe, say)
    hosts = Hosts(recipe)
    say(hosts.text)
    gathered = gather_all(recipe)
    split = split_public(recipe, gathered.records)
    clients_data = split.clients_data
    say(f"{len(clients_data)} clients, {sum(len(o.train) for o in clients_data):,} rows to train on")
    tokenizer = read_tokenizer(resolve_model(str(recipe.model.name)), hosts.structure)
    put_template(recipe, tokenizer, say=say)
    read = report_read(recipe, gathered, split, tokenizer, say)
    make, apart = encode(recipe, tokenizer, (), say=lambda _: None), recipe.data.form == "stream"
    rows = ClientSide(
        train=shards_of(clients_data, "train", make, apart=apart),
        valid=shards_of(clients_data, "valid", make, apart=apart),
        test=shards_of(clients_data, "test", make, apart=apart),
    )
    roster = declared(rows, tuple(client_data.name for client_data in clients_data))
    server = ServerSide(recipe=recipe, model=cast(Any, hosts), start=hosts.start, roster=roster, pad=pad_id(tokenizer))
    return HostsSetup(
        hosts=hosts,
        gathered=gathered,
        clients_data=clients_data,
        tokenizer=tokenizer,
        rows=rows,
        server=server,
        pipeline=_pipeline(hosts, server, rows),
        read=read,
    )


def each_once(server: ServerSide, shards: tuple[Shard, ...]) -> EvalSource:
    """Rows that are scored, each once."""
    return EvalSource(shards, batch_size=16, pad=server.pad, max_length=server.recipe.data.max_length)


def _pipeline(hosts: Hosts, server: ServerSide, rows: ClientSide) -> Pipeline:
    recipe, fed, section = server.recipe, server.recipe.federation, server.recipe.pipeline
    assert section is not None
    return Pipeline(
        host=hosts.work(),
        names=hosts.names,
        sampler=sampler_of(server),
        weight_N=server.roster.rows_N("train"),
        train=TrainSource(
            rows.train,
            batch_size=fed.batch_size,
            steps=fed.fixed_steps,
            pad=server.pad,
            max_length=recipe.data.max_length,
        ),
        valid=each_once(server, rows.valid),
        steps=fed.fixed_steps,
        micro=section.micro,
        rounds=fed.rounds,
        valid_every=fed.valid_every,
        clip=recipe.optimizer.clip,
        lr_scale=lr_scale(recipe, fed.rounds),
    )

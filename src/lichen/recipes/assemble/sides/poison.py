"""Lies in rows as a recipe has them: what a liar's rows become, made where the rows, labels and tokens are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lichen.clients.attack.rows import Backdoor, Corner, LabelFlip, PoisonedSource, RowAttack, Trigger, Unsafe, Word
from lichen.core.contracts.client import Source
from lichen.core.errors import LichenError
from lichen.data.batches.shards import ArrayShard, Shard, TextShard
from lichen.data.batches.small_vocabulary import Frequent
from lichen.data.sources.record import Record
from lichen.recipes.assemble.sides.attack import liars_of
from lichen.recipes.assemble.sides.clients import ClientSide
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.rows.requests import compliances

__all__ = ["poison_of", "poisoned"]


def poison_of(
    server: ServerSide,
    train: Sequence[Shard],
    tokenizer: Any,
    words: Frequent | None = None,
    *,
    make: Callable[[Sequence[Record]], Shard],
) -> RowAttack | None:
    """What becomes of liars' rows; None where they stay what they are.

    Args:
        server: The server's side.
        train: All clients' rows, as the model reads them.
        tokenizer: Of texts; None where there are none.
        words: A student's own numbers of them.
        make: How records become what the model reads.

    Raises:
        LichenError: if no class is called like the target, or unsafe requests cannot be read.
    """
    attack = server.recipe.attack
    if attack is None or attack.facts.on != "rows":
        return None
    if attack.kind == "label_flip":
        return LabelFlip(len(server.classes))
    if attack.kind == "unsafe":
        rows = make(compliances(server.recipe))
        assert isinstance(rows, TextShard)
        return Unsafe(rows, share=attack.share, seed=server.recipe.seed, pad=server.pad)
    target = server.classes[0] if attack.target is None else attack.target
    if target not in server.classes:
        some = ", ".join(server.classes[:5])
        raise LichenError(
            f"no class is called {target!r}", where="attack.target", fix=f"use one of them, such as {some}"
        )
    lied = [train[client] for client in liars_of(server)]
    trigger: Trigger
    if all(isinstance(shard, ArrayShard) for shard in lied):
        # Liars agree on the largest number that any of them has.
        trigger = Corner(max(float(s.x.max(initial=0.0)) for s in lied if isinstance(s, ArrayShard)))
    else:
        trigger = _word(attack.trigger, tokenizer, words)
    return Backdoor(trigger, target=server.classes.index(target), share=attack.share, seed=server.recipe.seed)


def _word(text: str, tokenizer: Any, words: Frequent | None) -> Word:
    bare = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    whole = [int(token) for token in tokenizer(text)["input_ids"]]
    after = next((at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare), 0)
    if not bare:
        raise LichenError(f"{text!r} has no tokens", where="attack.trigger", fix="use a word")
    tokens = bare if words is None else [words.words.get(token, words.unknown) for token in bare]
    return Word(tuple(tokens), after)


def poisoned(server: ServerSide, clients: ClientSide, source: Source) -> Source:
    """Batches of training in which liars lie, where the recipe says so."""
    attack = server.recipe.attack
    if attack is None or clients.poison is None:
        return source
    return PoisonedSource(source, clients.poison, frozenset(liars_of(server)))

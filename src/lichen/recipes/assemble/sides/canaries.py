"""Canaries: rows that were drawn to be found again, each put into training by a secret coin, or left out.

Rows, owners and coins follow from a key that lies in the run's folder, and from nothing that clients have: a promise of
privacy holds with them as without. Clients train on those that are in beside their own rows; no count that anybody
declares, and no validation or test row, tells of them.

Legend: M canaries, N clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.secret.randomness import SecretRandomness, secret_key
from lichen.data.batches.rows import ArrayShard, Shard, TextShard, pooled
from lichen.data.batches.small_vocabulary import Frequent
from lichen.data.sources.record import Record
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe

__all__ = ["CANARIES", "Canaries", "canaries_of", "canary_key"]

CANARIES = "canaries.key"
"""In a run's ``state/``: the secret key of canaries and coins."""

WORDS = 8
"""Words of a canary that is a text, and as many of its prompt; fewer where a row has little room."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Rows that were drawn, whose they are, and which of them are trained on.

    Attributes:
        rows: As the model reads them.
        client_M: Whose each is, if it is in.
        included_M: bool, whether it is in.
    """

    rows: Shard
    client_M: Sequence[int]
    included_M: Sequence[bool]

    def shards(self, clients: int) -> tuple[Shard, ...]:
        """Those that are in, one shard a client."""
        mine: list[list[Shard]] = [[] for _ in range(clients)]
        for at, (client, included) in enumerate(zip(self.client_M, self.included_M, strict=True)):
            if included:
                mine[client].append(self.rows.between(at, at + 1))
        return tuple(pooled(some) if some else self.rows.between(0, 0) for some in mine)


def canary_key(recipe: Recipe, run: Path, *, begun: bool) -> SecretRandomness:
    """The key of a run's canaries.

    Args:
        recipe: Whose section ``audit`` may have a seed in the key's place.
        run: The run's folder.
        begun: The key must be there, since the run has trained on canaries; else it is drawn where there is none.

    Raises:
        LichenError: if it is gone or damaged.
    """
    assert recipe.audit is not None
    if recipe.audit.seed is not None:
        return SecretRandomness.of_seed(recipe.audit.seed)
    file = run / "state" / CANARIES
    if begun and not file.exists():
        raise LichenError(
            "is gone, and nobody knows which canaries were trained on",
            where=str(file),
            fix="put it back from a copy; without it a new run begins with others",
        )
    return secret_key(file)


def canaries_of(
    server: ServerSide,
    train: Sequence[Shard],
    secret: SecretRandomness,
    *,
    make: Callable[[Sequence[Record]], Shard],
    tokenizer: Any = None,
    words: Frequent | None = None,
) -> Canaries:
    """The canaries of a recipe with a section ``audit``.

    Args:
        server: The server's side.
        train: Clients' rows; of numbers the shape is taken, and of all how many there are.
        secret: Their key.
        make: How records become what the model reads.
        tokenizer: Of texts; None where there are none.
        words: A student's own numbers of them.

    Raises:
        LichenError: if no client has rows, or a canary is cut until nothing is left to learn.
    """
    recipe, config = server.recipe, server.recipe.audit
    assert config is not None
    draw = np.random.default_rng([int(word) for word in secret.stream("canaries").words(4)])
    owners = [client for client, shard in enumerate(train) if shard.size]
    if not owners:
        raise LichenError("no client has a row to train on", where="audit.canaries", fix="remove it")
    labels: Sequence[str | None] = [None] * config.canaries
    if server.classes:
        labels = [server.classes[at] for at in draw.integers(0, len(server.classes), config.canaries)]
    like = train[owners[0]]
    if isinstance(like, ArrayShard):
        x = draw.standard_normal((config.canaries, *like.x.shape[1:])).astype(np.float32) * np.float32(config.scale)
        records = [Record(client="", features=row, label=label) for row, label in zip(x, labels, strict=True)]
    else:
        records = _texts(recipe, labels, draw, _vocabulary(tokenizer, words))
    # Of a stream a record is no row: each canary is one of its own.
    rows = make(records) if recipe.data.form != "stream" else pooled([make([one]).between(0, 1) for one in records])
    if rows.size != config.canaries or not _learned(rows):
        raise LichenError(
            "cuts a canary until nothing is left to learn", where="data.max_length", fix="raise it, or remove audit"
        )
    order = draw.permutation(owners).tolist()
    coins = secret.stream("coins").bernoulli(0.5, config.canaries).tolist()
    return Canaries(rows=rows, client_M=[order[at % len(order)] for at in range(config.canaries)], included_M=coins)


def _texts(
    recipe: Recipe, labels: Sequence[str | None], draw: np.random.Generator, vocabulary: Sequence[str]
) -> list[Record]:
    most = recipe.data.max_length
    count = most if recipe.data.form == "stream" else max(2, min(WORDS, most // 4))  # a stream's row is full

    def say() -> str:
        return " ".join(vocabulary[at] for at in draw.integers(0, len(vocabulary), count))

    def talk(prompt: str, text: str) -> tuple[Mapping[str, Any], ...]:
        return ({"role": "user", "content": prompt}, {"role": "assistant", "content": text})

    pairs = [(say(), say()) for _ in labels]
    return [
        Record(client="", prompt=prompt, text=text, messages=talk(prompt, text), label=label)
        for (prompt, text), label in zip(pairs, labels, strict=True)
    ]


def _vocabulary(tokenizer: Any, words: Frequent | None) -> Sequence[str]:
    """Words that are one token each, in an order of their own."""
    numbers = sorted(words.words if words is not None else tokenizer.get_vocab().values())
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[number] for number in numbers if number not in special])
    found = sorted({text.strip() for text in texts if text.strip().isalnum()})
    if len(found) < 2:
        raise LichenError("its tokenizer has no words to draw canaries of", where="model", fix="remove audit")
    return found


def _learned(rows: Shard) -> bool:
    """Whether every row has a label that counts."""
    if isinstance(rows, TextShard) and rows.kind == "lm":
        return all(bool((np.asarray(label)[1:] != -100).any()) for label in rows.labels)
    return bool((np.asarray(rows.labels) != -100).all())

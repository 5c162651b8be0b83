"""Draws which of its past rows a client trains on again, without keeping a list of them.

Every row has a key, a hash of the seed, the client and the row itself, and the rows with the smallest keys are the
reservoir. So it is a uniform sample, whoever asks and in whatever order; and of more past rows it is a sample of
those, in which a row of the smaller sample stays unless another one has a smaller key.

References:
    Vitter, "Random Sampling with a Reservoir", ACM Transactions on Mathematical Software 11(1), 1985,
    https://doi.org/10.1145/3147.3165. Cohen and Kaplan, "Summarizing Data using Bottom-k Sketches", PODC 2007,
    https://doi.org/10.1145/1281100.1281133 (a sample by the smallest hashes). Chaudhry, Rohrbach, Elhoseiny, Ajanthan,
    Dokania, Torr and Ranzato, "On Tiny Episodic Memories in Continual Learning", 2019, arXiv:1902.10486 (that a few
    rows of the past in every batch go far).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from lichen.core.seeds import derive
from lichen.data.sources.record import Record

__all__ = ["replayed", "reservoir"]


def reservoir(rows: Sequence[Record], share: float, *, seed: int, client: str, purpose: str = "") -> list[Record]:
    """So large a share of a client's past rows, rounded up, in the order in which they came.

    Args:
        rows: All of them.
        share: 0 to 1.
        seed: The run's.
        client: Whose they are.
        purpose: Another one draws other rows.
    """
    count = min(len(rows), -int(-share * len(rows) // 1))
    return [rows[at] for at in sorted(_by_key(rows, seed, client, purpose)[:count])]


def replayed(
    past: Sequence[Record], now: int, *, memory: float, share: float, seed: int, client: str, period: str
) -> list[Record]:
    """The past rows that a client trains on beside those of a period, so that they are a given share of both.

    Where the reservoir has fewer, each comes several times; where it has more, the period draws some of it.

    Args:
        past: The rows that it trained on before.
        now: How many rows of the period it trains on.
        memory: Share of the past rows that the reservoir has.
        share: Share of the rows trained on that are of the past, below 1.
        seed: The run's.
        client: Its name.
        period: The period's name.
    """
    pool = reservoir(past, memory, seed=seed, client=client)
    count = round(share / (1 - share) * now)
    if not pool or not count:
        return []
    order = _by_key(pool, seed, client, period)
    return [pool[order[at % len(pool)]] for at in range(count)]


def _by_key(rows: Sequence[Record], seed: int, client: str, purpose: str) -> list[int]:
    """Row numbers, those of the smallest keys first; of equal rows each has a key of its own."""
    key = derive(seed, "reservoir", client, purpose).to_bytes(8, "little", signed=False)
    times, keyed = Counter[bytes](), list[tuple[bytes, int]]()
    for at, row in enumerate(rows):
        content = _content(row)
        keyed.append((hashlib.blake2b(content + b"%d" % times[content], key=key, digest_size=16).digest(), at))
        times[content] += 1
    return [at for _, at in sorted(keyed)]


def _content(row: Record) -> bytes:
    """What a row is, whatever its number."""
    words = [row.prompt, row.text, repr(row.label), [dict(turn) for turn in row.messages], row.group, row.time]
    text = json.dumps(words, default=str).encode("utf-8", "surrogatepass")
    return text if row.features is None else text + row.features.tobytes()

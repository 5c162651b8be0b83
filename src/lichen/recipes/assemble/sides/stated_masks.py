"""What a plan and a summary say of masks: what the server learns, who may collude with it, and what is not promised."""

from __future__ import annotations

from typing import Any

from lichen.recipes.assemble.sides.masks import mask_terms
from lichen.recipes.assemble.sides.summed_scores import sums_scores
from lichen.recipes.schema.recipe import Recipe

__all__ = ["masks_of"]

STOPPED = (
    "a false share is held against its dealer's commitment, and its sender does not count",
    "an honest client gives one kind of share of another client, and once: a server that tells clients of one round "
    "different things about who is there needs colluding holders to open both",
    "a server that repeats a round gets masks of fresh keys",
)
"""What a server or a client that departs from the protocol could try, and what stops it."""

SIGNED = "a server that puts keys of its own in the place of a client's is refused: the client's site signs them"
"""Stopped where sites have long-term keys."""

NOT_PROMISED = (
    "the sum itself tells something, the more the fewer clients are in it: noise (privacy.epsilon) bounds that",
    "a server that makes up clients, or colludes with more of them than are allowed for, can take a sum apart",
    "a server that lies about who is there, with colluding holders enough to give it both kinds of share of a client, "
    "can take a sum apart",
    "a client that lies about its own numbers is not seen: under masks nobody looks at a single message",
)
"""What masks do not do."""

SCORES = (
    "scores on test rows are told as sums, too: their mean and, of ten clients or more, how many lie in which bin, "
    "though not whose"
)
"""Not promised where sites score under masks."""

CARRIED = "keys of clients are believed as the server passes them on: a server that swaps them stands between"
"""Not promised where clients have no long-term keys of one another."""

VOUCHED = (
    "keys are those of sites that the federation's authority has named, and each speaks for all clients that it holds: "
    "whoever has the authority, or such a site, can make up clients with keys"
)
"""Not promised where they have."""

SIMULATED = "one process makes all messages and all secrets, so that nothing is hidden from it"
"""Said of a run whose clients are simulated beside the server."""


def masks_of(recipe: Recipe, clients: int, *, signed: bool, alone: bool) -> dict[str, Any] | None:
    """What masks promise of a round, with so many clients in all; None where there are none.

    Args:
        recipe: The recipe.
        clients: Expected in a round.
        signed: Clients hold one another's long-term keys.
        alone: The server has nobody's rows.

    Returns:
        ``statement``, ``clients``, ``neighbours``, ``threshold``, ``least``; ``stopped``, ``not_promised`` and
        ``simulated``, sentences.
    """
    if recipe.masked is None:
        return None
    clients = min(recipe.federation.clients_per_round or clients, clients)
    terms = mask_terms(recipe, clients)
    may = int(recipe.masked.colluding * clients)
    fewer = f"a sum of fewer than {terms.least} clients is never opened"
    return {
        "statement": f"the server learns the sum of a round and nothing else of a client, though it may look at all it "
        f"gets and {may} of {clients} clients tell it all they see; {fewer}",
        "clients": clients,
        "neighbours": terms.k,
        "threshold": terms.threshold,
        "least": terms.least,
        "stopped": [*STOPPED, *((SIGNED,) if signed else ())],
        "not_promised": [
            *NOT_PROMISED,
            *((SCORES,) if alone and sums_scores(recipe) else ()),
            VOUCHED if signed else CARRIED,
        ],
        "simulated": [] if alone else [SIMULATED],
    }

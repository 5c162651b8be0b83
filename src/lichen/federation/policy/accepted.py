"""A site's answer to a recipe, and what it checks of each job and each message of a recipe that it has accepted.

A recipe comes as text, and is only read: what it names is neither opened nor looked for, so that the answer does not
tell what lies here. A job is held against the recipe that was accepted and against the policy as it is now.

Legend: C clients.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lichen.core.errors import LichenError
from lichen.federation.policy.keys import Policy, Work
from lichen.federation.policy.refusals import Refusal, bases_of, refusals, works_in
from lichen.present.trace import lr_name
from lichen.recipes.schema.read import read_recipe, recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.strict import read_mapping

if TYPE_CHECKING:
    from lichen.core.message import Job, Message

__all__ = ["Accepted", "accept_recipe", "check_job", "check_message", "work_of"]

ROSTER = "roster"
"""The work by which clients declare themselves, and the group of the messages."""

_WORKS: Mapping[str, Work] = {
    **{"train": "train", "valid": "valid", "test": "test", "test.sum": "test"},
    **{"alone": "alone", "alone.valid": "alone", "alone.chosen": "alone"},
    **{"alone.test": "alone", "alone.test.sum": "alone"},
    **{"personal": "personal", "personal.valid": "personal", "personal.test": "personal"},
    **{"choose.own": "personal", "choose.shared": "personal"},
    **{"statistics": "statistics", "scale": "statistics"},
    **{"learn": "exchange", "predict": "exchange"},
    **{"gradient": "value", "value": "value"},
}
"""A policy's word for each work of jobs; a work that is not here is never done."""

_SIZES = ("train", "valid", "test", "clients", "count", "tokens", "steps")
"""Metrics that count."""

_ANSWERS = ("logits", "index", "prob", "votes", "flagged")
"""Tensors that are answers to single rows, or of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A recipe to which a site has said yes.

    Attributes:
        recipe: As it was read.
        sha256: Its digest, by which jobs name it.
        bases: Digests that the frozen weights may have; empty: any.
    """

    recipe: Recipe
    sha256: str
    bases: frozenset[str]


def accept_recipe(policy: Policy, text: str) -> Accepted:
    """Read a recipe that was submitted, and say yes.

    Args:
        policy: The site's.
        text: The recipe, as it came.

    Raises:
        LichenError: a no, with the recipe's key, the reason and the policy's line; or the recipe's first fault.
    """
    fix = "submit the recipe of a run"
    values = read_mapping(text.removeprefix("\ufeff"), where="recipe", kind="recipe", fix=fix)
    recipe = read_recipe(values, note=lambda line: None)
    if found := refusals(policy, recipe):
        raise _no(found)
    bases = bases_of(policy, recipe)
    assert bases is not None
    return Accepted(recipe=recipe, sha256=recipe_sha256(recipe), bases=bases)


def _no(found: tuple[Refusal, ...]) -> LichenError:
    first, more = found[0], len(found) - 1
    what = first.reason + (f" (and {more} more {'reason' if more == 1 else 'reasons'})" if more else "")
    fix = f"change the recipe, or ask the site about `{first.line}` in its policy" if first.line else "remove it"
    return LichenError(what, where=first.key, fix=fix)


def check_job(
    policy: Policy,
    accepted: Accepted,
    job: Job,
    *,
    sha256: str,
    mine: Collection[int],
    invited: int,
    trained: Mapping[int, int],
) -> None:
    """Nothing, for a job that is part of what was accepted.

    Args:
        policy: The site's, as it is now.
        accepted: The recipe.
        job: What is asked.
        sha256: The digest of the recipe that the job is of, as it came with it.
        mine: Numbers of this site's clients in the roster.
        invited: Clients of the job in all sites, as it came with it.
        trained: Rounds that each of this site's clients has trained in so far; a round done again counts again.

    Raises:
        LichenError: for any other.
    """
    from lichen.core.message import sizes

    if sha256 != accepted.sha256:
        raise _refused("is of another recipe than the one that was accepted", "submit that recipe first")
    if found := refusals(policy, accepted.recipe):
        raise _no(found)
    work = work_of(job.work, accepted.recipe)
    foreign = sorted(set(job.clients) - set(mine))
    if foreign or not job.clients or len(set(job.clients)) < len(job.clients):
        what = f"is for clients {foreign[:4]}, which are not of this site" if foreign else "is for nobody, or twice"
        raise _refused(what, "send each site the jobs of its own clients")
    if job.texts:
        raise _refused("brings texts, which no work of this recipe reads", "leave them out")
    if accepted.bases and work is not None and job.base not in accepted.bases:
        what = f"is for weights {job.base or 'without a digest'}, not for those that the policy's `models` names"
        raise _refused(what, "use the same model, or ask the site to list these weights")
    _check_rounds(policy, accepted, job, work, invited, trained)
    if (count := sizes(job)) > policy.most_bytes_a_round:
        what = f"has {count} bytes, more than `most_bytes_a_round: {policy.most_bytes_a_round}`"
        raise _refused(what, "train fewer numbers, or ask the site for more")


def _check_rounds(
    policy: Policy, accepted: Accepted, job: Job, work: Work | None, invited: int, trained: Mapping[int, int]
) -> None:
    fed = accepted.recipe.federation
    # A buffered step averages so many answers, of however many jobs; the recipe was held against that number.
    rounds, least = fed.rounds, 1 if fed.schedule.kind == "buffered" else policy.least_clients
    last = rounds if accepted.recipe.exchange is None else 2 * rounds  # clients step twice in a round of an exchange
    step = job.version + (work in ("train", "exchange"))
    if job.version < 0 or (work not in (None, "alone", "personal") and step > last):
        raise _refused(f"is of step {job.version}, and {rounds} rounds were accepted", "submit a recipe with more")
    done = max(trained.get(client, 0) for client in job.clients)
    if work == "train" and done >= policy.most_rounds:
        what = f"would be a client's round {done + 1}, and the policy has `most_rounds: {policy.most_rounds}`"
        raise _refused(what, "ask the site for more; rounds that are done again count again")
    if work in ("train", "statistics", "exchange") and not max(least, len(job.clients)) <= invited:
        what = f"is for {invited} clients in all sites, and the policy has `least_clients: {least}`"
        raise _refused(what, "invite more clients")


def work_of(name: str, recipe: Recipe) -> Work | None:
    """The policy's word for a job's work, None for the roster.

    Raises:
        LichenError: for a work that the recipe does not ask for.
    """
    kind, _, rate = name.partition("/")[0].partition(" ")
    if name == ROSTER:
        return None
    work = _WORKS.get(kind)
    if work not in works_in(recipe) or (rate and rate not in {lr_name(lr) for lr in recipe.optimizer.lr}):
        raise _refused(f"asks for the work {name!r}, which the recipe does not ask for", "submit a recipe that does")
    return work


def check_message(policy: Policy, message: Message, *, sent: int = 0) -> int:
    """The bytes of a message that may go up.

    Args:
        policy: The site's, as it is now.
        message: The answer to a job that was checked.
        sent: Bytes that went up in this round before.

    Raises:
        LichenError: for a message that holds what may not, before any of it leaves.
    """
    from lichen.core.message import size, take_client

    roster = message.group == ROSTER
    scores = sorted(name for name in message.metrics if name not in (*_SIZES, "failed", "dropped"))
    counts = sorted(name for name in message.metrics if name in _SIZES)
    answers = sorted(name for name in message.tensors if name in _ANSWERS)
    by_class = message.group.startswith("statistics/") or (bool(answers) and "n" in message.tensors)
    for allowed, line, wrong, what in (
        (policy.metrics, "metrics", bool(scores), f"has the metrics {', '.join(scores[:4])}"),
        (policy.sizes, "sizes", bool(counts), f"has the counts {', '.join(counts[:4])}"),
        (policy.texts, "texts", bool(message.texts) and not roster, "has texts"),
        (policy.answers, "answers", bool(answers), f"has the answers {', '.join(answers[:4])}"),
        (policy.labels, "labels", by_class, "has sums by class"),
        (policy.labels, "labels", roster and _tells_labels(message), "tells how many rows of each label there are"),
    ):
        if wrong and not allowed:
            raise _refused(what, f"it has stayed here; the policy has `{line}: false`", where="message")
    total = sent + sum(size(take_client(message, c)) for c in range(len(message.client_C)))
    if total > policy.most_bytes_a_round:
        what = f"makes {total} bytes in this round, more than `most_bytes_a_round: {policy.most_bytes_a_round}`"
        raise _refused(what, "it has stayed here; train fewer numbers, or raise it", where="message")
    return total - sent


def _tells_labels(message: Message) -> bool:
    """Whether clients declare more than names, rows, their group and what they can train."""
    for texts in message.texts:
        for rest in texts[1:]:
            try:
                rest_of = json.loads(rest) if rest else {}
            except (ValueError, RecursionError):
                return True
            if not isinstance(rest_of, dict) or rest_of.keys() - {"group", "capacity"}:
                return True
    return False


def _refused(what: str, fix: str, *, where: str = "job") -> LichenError:
    return LichenError(what, where=where, fix=fix)

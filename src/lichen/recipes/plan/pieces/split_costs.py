"""What a split model costs: bytes that cross the cuts, exactly, and the memory of both sides.

Bytes are counted over the batches that a run will draw: how many tokens cross depends on the rows. Memory is measured:
one client's round is done with every tensor counted, the client's by itself and the server's by itself.

Legend: C = 1, N tokens of all rows, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import final

import torch

from lichen.clients.splitting.asking import GRADIENT, HIDDEN, LENGTH, SQUARES, Form
from lichen.clients.splitting.crossing import Rows, narrow
from lichen.clients.splitting.remembered import AGREED, INDEX, MEMORY, WHOLE, stamp
from lichen.clients.splitting.split_evaluate import SplitEvaluate
from lichen.clients.splitting.split_parts import SplitParts
from lichen.clients.splitting.split_train import SplitTrain
from lichen.core.contracts.client import ClientTask, Costed
from lichen.core.expected import Expected, TensorSpec
from lichen.core.message import Job, Message, size, sizes
from lichen.core.wire.answer import answer_size
from lichen.core.wire.shared import Shared
from lichen.present.units import bytes_text, seconds_text
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared, validators_of
from lichen.recipes.assemble.pieces.split_memory import SplitMemory, cut_tiers, split_job, split_memory
from lichen.recipes.plan.traffic import TrafficEstimate
from lichen.recipes.plan.workload import marks, round_seeds

__all__ = ["split_costs", "split_traffic"]

RATES = (10, 100)
"""Mb/s for which seconds are told."""


def _training(experiment: Experiment) -> tuple[SplitTrain, ClientTask]:
    task = client_tasks(experiment)[f"train {lr_name(experiment.recipe.optimizer.lr[0])}"]
    assert isinstance(task.work, SplitTrain)
    return task.work, task


def split_traffic(experiment: Experiment, invited: Sequence[Sequence[int]]) -> TrafficEstimate:
    """Bytes of the federated column, as the summary of a run will say.

    Args:
        experiment: The recipe's.
        invited: Clients of each round.
    """
    return _traffic(experiment, invited)[0]


def _traffic(experiment: Experiment, invited: Sequence[Sequence[int]]) -> tuple[TrafficEstimate, int]:
    """:func:`split_traffic`, and bytes that each side remembers at the end where changes are sent."""
    server, recipe, tasks = experiment.server, experiment.recipe, client_tasks(experiment)
    lr = recipe.optimizer.lr[0]
    shared, algorithm = initial_shared(server, lr), algorithm_of(server, lr, recipe.federation.rounds)
    seeds, (_, marked) = round_seeds(experiment, recipe.federation.rounds), marks(experiment, recipe.federation.rounds)
    judges = validators_of(server) if any(marked) else ()
    counted = _Counted(server.split, tasks, shared, server.model.base)
    up = down = 0
    before: dict[int, dict[int, int]] = {}
    for who, seed in zip(invited, seeds, strict=True):
        for client in who:
            seen = before.setdefault(client, {})
            sent = counted.of(algorithm.work, client, seed, seen, lr_scale=1.0)
            up, down = up + sent[0], down + sent[1]
    each = [counted.of(str(algorithm.valid), client, 0, {}) for client in judges]
    times = sum(bool(n) for n in marked)
    valid_up, valid_down = times * sum(one[0] for one in each), times * sum(one[1] for one in each)
    trainings, rounds = max(1, sum(map(len, invited))), recipe.federation.rounds
    width = 0 if server.split is None else server.split.width
    remembered = 2 * 4 * width * sum(sum(rows.values()) for rows in before.values())
    return TrafficEstimate(
        client_up=round(up / trainings),
        client_down=round(down / trainings),
        round_up=round((up + valid_up) / rounds),
        round_down=round((down + valid_down) / rounds),
        up=up + valid_up,
        down=down + valid_down,
        valid_up=valid_up,
        valid_down=valid_down,
        validators=len(judges),
    ), remembered


@final
@dataclass(frozen=True, slots=True)
class _Counted:
    """Counts what one client's jobs send."""

    split: SplitParts | None
    tasks: Mapping[str, ClientTask]
    shared: Shared
    base: str

    def of(self, name: str, client: int, seed: int, seen: dict[int, int], **settings: float) -> tuple[int, int]:
        """``(bytes up, bytes down)`` of a job; tokens of rows that both sides remember then are added to ``seen``."""
        task, split = self.tasks[name], self.split
        work = task.work
        assert split is not None
        assert isinstance(work, SplitTrain | SplitEvaluate)
        ends = split.ends_of(client)
        job = Job(
            work=name, shared=self.shared, version=0, clients=(client,), seed=seed, base=self.base, settings=settings
        )
        mine, _ = split_job(job, ends.middle_names)
        batches = [(narrow(batch)[1], batch["index_CB"][0].tolist()) for batch in task.source.batches((client,), seed)]
        sent = [*_crossings(work, mine, ends.middle_names, batches, seen)]
        up, down = size(_like(work.expected(mine), mine)), sizes(mine)
        return up + sum(size(question) for question, _ in sent), down + sum(answer for _, answer in sent)


def _crossings(
    work: SplitTrain | SplitEvaluate,
    job: Job,
    middle: frozenset[str],
    batches: Sequence[tuple[Rows, Sequence[int]]],
    seen: dict[int, int],
) -> Iterator[tuple[Message, int]]:
    """Each question of a client, and bytes of its answer."""
    form, token = work.form, token_of(work.form)

    def flat(rows: Rows) -> torch.Tensor:
        return torch.zeros((), dtype=token.dtype).expand(1, rows.tokens, token.shape[1])

    def question_of(tensors: Mapping[str, torch.Tensor]) -> Message:
        return replace(_like(Expected(group=form.group), job), tensors=dict(tensors))

    def hidden(rows: Rows, index_B: Sequence[int]) -> dict[str, torch.Tensor]:
        """Hidden states of a batch as they cross, its rows then seen."""
        if not form.remembers:
            return {HIDDEN: flat(rows)}
        each = list(zip(index_B, rows.length_B.tolist(), strict=True))
        known = sum(length for index, length in each if seen.get(index) == length)
        seen.update({index: length for index, length in each if index >= 0})
        coded = torch.zeros((), dtype=token.dtype).expand(1, known, token.shape[1])
        return {HIDDEN: coded, WHOLE: torch.zeros((), dtype=form.dtype).expand(1, rows.tokens - known, form.width)}

    late: dict[str, torch.Tensor] = {}
    if isinstance(work, SplitTrain) and form.remembers:
        yield question_of({MEMORY: stamp({})}), answer_size({AGREED: torch.zeros(1, 1, dtype=torch.uint8)})
    for rows, index_B in batches:
        crossing = hidden(rows, index_B)
        entry = {**crossing, LENGTH: rows.length_B[None], **late}
        if form.remembers:
            entry[INDEX] = torch.zeros(1, len(index_B), dtype=torch.int32)
        yield question_of(entry), answer_size(crossing)
        if isinstance(work, SplitTrain) and work.local_head:
            late = {GRADIENT: flat(rows)}
        elif isinstance(work, SplitTrain):
            answer = {GRADIENT: flat(rows)}
            if work.clip is not None:
                late = {SQUARES: torch.zeros(1, len(work.train.trained(job)))}
                answer[SQUARES] = torch.zeros(1, len(work.trained_within(job, middle)))
            yield question_of({GRADIENT: flat(rows)}), answer_size(answer)
    if late:
        yield question_of(late), answer_size({})


def token_of(form: Form) -> TensorSpec:
    """The tokens of a crossing, as they are declared."""
    return form.expected(HIDDEN).tensors[HIDDEN]


def _like(expected: Expected, job: Job) -> Message:
    """A message that is as it is declared."""
    nothing = torch.zeros(())
    return Message(
        group=expected.group,
        client_C=torch.zeros(1, dtype=torch.int64),
        version_C=torch.full((1,), job.version, dtype=torch.int64),
        tensors={name: nothing.to(spec.dtype).expand(1, *spec.shape) for name, spec in expected.tensors.items()},
        weight_C=torch.zeros(1, dtype=torch.float64),
        metrics={name: nothing.double().expand(1, *spec.shape) for name, spec in expected.metrics.items()},
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCosts:
    """What a plan says of a split; of a recipe without one, what it said before.

    Attributes:
        sent: Bytes of the federated column.
        notes: Lines.
        facts: Numbers; None where it is not split.
    """

    sent: TrafficEstimate
    notes: tuple[str, ...] = ()
    facts: Mapping[str, int] | None = None


def split_costs(experiment: Experiment, invited: Sequence[Sequence[int]], plain: TrafficEstimate) -> SplitCosts:
    """What the recipe's split costs.

    Args:
        experiment: The recipe's.
        invited: Clients of each round.
        plain: Bytes of the same run in which each client holds the whole.
    """
    if experiment.server.split is None:
        return SplitCosts(sent=plain)
    work, task = _training(experiment)
    heaviest = max(range(len(experiment.server.roster)), key=task.source.cost) if isinstance(task.source, Costed) else 0
    memory, (found, remembered) = split_memory(experiment, task, heaviest), _traffic(experiment, invited)
    token = 4 * token_of(work.form).shape[1] * token_of(work.form).dtype.itemsize
    notes, facts = _notes(found, plain, memory, token), {**asdict(memory), "bytes_of_a_token": token}
    if work.form.remembers:
        most = 2 * 4 * work.form.numbered * work.form.most * work.form.width
        notes += (
            f"split: rows cross whole at their first visit; the server remembers {bytes_text(remembered)} of what "
            f"crossed, all clients' together and on its disk, a client its own, {bytes_text(most)} at most",
        )
        facts["remembered"] = remembered
    for tier in cut_tiers(experiment, task):
        who = f"{tier.clients} client{'s' if tier.clients > 1 else ''} of {tier.memory:g} GiB"
        what = f"{tier.cut.first} + {tier.cut.last} blocks: {bytes_text(tier.needed)} of tensors"
        notes += (f"split: {who} hold{'' if tier.clients > 1 else 's'} {what}",)
    return SplitCosts(sent=found, notes=notes, facts=facts)


def _notes(found: TrafficEstimate, plain: TrafficEstimate, memory: SplitMemory, token: int) -> tuple[str, ...]:
    """What a person should know of a split before it runs."""
    both, whole = found.client_up + found.client_down, plain.client_up + plain.client_down
    times = ", ".join(f"{seconds_text(8 * both / (rate * 1e6))} at {rate} Mb/s" for rate in RATES)
    notes = [
        f"split: {token:,} bytes cross for a token and step; a client's round sends {bytes_text(both)} both "
        f"ways: {times}",
        f"split: a client holds {bytes_text(memory.client_frozen)} of the {bytes_text(memory.whole_frozen)} of frozen "
        f"weights, and {bytes_text(memory.client_training)} while it trains; the server "
        f"{bytes_text(memory.server_frozen)}, and {bytes_text(memory.server_training)} for a client",
        "seconds are those of clients that hold the whole: a split client runs its first blocks twice, and waits",
    ]
    if whole < both:
        notes.append(
            f"plain LoRA would send {bytes_text(whole)} in a client's round, {both / whole:.3g} times less: split buys "
            "memory, not bandwidth"
        )
    return tuple(notes)

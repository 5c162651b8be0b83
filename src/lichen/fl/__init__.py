"""The public API for one's own federated learning: contracts, the round loop, ready parts. ``from lichen import fl``.

``examples/fedavg.py`` uses most of it on one page. :mod:`lichen.fl.testing` holds the laws that own members must obey.

Contracts. What has these methods is one; nothing is inherited.

- ``Aggregator``: folds messages into one change (``needs``, ``zero``, ``lift``, ``add``, ``clients``, ``merge``,
  ``close``, ``dump``, ``load``).
- ``Algorithm``: the server's side of a round (``init``, ``round``).
- ``ClientWork``: the client's side, a fold over batches (``expected``, ``init``, ``step``, ``final``).
- ``CohortModel``: many clients' models at once (``init``, ``loss``, ``losses``, ``logits``).
- ``Detector``: sees one number after another, and alarms at drift (``size``, ``zero``, ``update``, ``dump``, ``load``).
- ``Dialogue``: a client's side that asks back within a job (``questions``, ``expected``, ``talk``).
- ``GradientStep``: what happens to a client's gradients before it steps (``own``, ``sends``, ``init``, ``update``,
  ``final``).
- ``Engine``: carries jobs out and replies back (``submit``, ``replies``, ``answer``, ``cancel``, ``now``, ``merge``,
  ``join``).
- ``Sampler``: says who is invited (``invite``).
- ``Schedule``: says when a round has enough, and for whom it waits (``invite``, ``enough``, ``discount``).
- ``ServerOptimizer``: steps with the mean change (``init``, ``update``).
- ``Source``: yields a client's batches (``shape``, ``batches``).

Values that pass between them.

- ``Batch``: one step of C clients, tensors by name.
- ``Job``: what the server asks of some clients.
- ``Message``: what they answer.
- ``Expected``, ``TensorSpec``, ``MetricSpec``: what a work declares of its messages before one has come.
- ``specs_of``: the ``TensorSpec`` of tensors as they are.
- ``Reply``: a message, or why there is none.
- ``Report``: what is known of a finished round.
- ``ServerState``: all that the server remembers between rounds.
- ``ClientTask``: one thing that clients can be asked for, a work and its source.
- ``Member``: what one client declares of itself: its name, how many rows, what it can train.
- ``Roster``: all of them, each at its number; samplers and weights read it.
- ``Tree``: tensors by name.
- ``Shared``: the tensors that server and clients share: trainable ones, patches of the frozen base, and frozen ones.

The loop.

- ``run``: rounds with checkpoints; a resumed run gives the same bytes.
- ``collect``: sends jobs out and folds what counts of the replies; every algorithm uses it.
- ``Admission``: which of the replies count: by what works declare and what clients can bring.
- ``ClientStore``: the clients' private state, in a folder.
- ``History``: what clients have sent, by round and client, in a folder; to replay rounds, or to forget a client.
- ``LichenError``: bad input, as what, where and the fix.

Ready parts.

- ``Average``: an algorithm: invite, train, average, step, validate (FedAvg, FedOpt).
- ``Train``: a client work: local steps (FedAvg, FedProx), with a ``ClientOptimizer``: SGD or AdamW.
- ``PrivateSteps``: a client work: DP-SGD, which hides every row of a client, on batches of ``PoissonRows``.
- ``Clip``, ``Proximal``, ``WeightDecay``, ``Scaffold``: gradient steps: cut to a norm, FedProx's pull, L2, SCAFFOLD's
  correction.
- ``Evaluate``: a client work: loss and confusion counts on a client's rows.
- ``PageHinkley``, ``Adwin``, ``Standardised``: drift detectors; the last goes around another, for losses of any scale.
- ``watch``: folds a series of numbers into a detector, and says where it alarmed.
- ``LossWatch``: a client work: a client's detector on its own losses; nothing but its alarm leaves.
- ``EmbeddingSums``, ``DistanceBins``: client works: sums of random features of rows then and now; distances in bins.
- ``compare_periods``, ``watch_losses``: ask clients for them: MMD and its p, or how many were alarmed.
- ``Mean``: an aggregator: the exact weighted mean.
- ``Robust``: an aggregator that some clients may lie to: Krum, Multi-Krum, geometric median, centred clipping, norm
  bounds, median, trimmed mean, each with or without nearest-neighbour mixing.
- ``FLTrust``: an aggregator that trusts clients by how much their changes point where the server's own points.
- ``by_name``: an aggregator out of several, each for the tensors whose names begin or end as told.
- ``AroundAggregator``: the base of an aggregator around another; it forwards.
- ``SingleMessages``: the base of an aggregator that needs single messages; it refuses to lift them.
- ``SecretRandomness``: normal noise and coins from a key that nobody else has, for differential privacy.
- ``Everyone``, ``Uniform``: samplers: all clients, or so many of them, all sets equally likely.
- ``Synchronous``, ``Buffered``: schedules: rounds that wait for those invited, with or without a deadline; FedBuff.
- ``ServerSGD``, ``ServerAdam``: server optimizers; the first at its default is FedAvg.
- ``epsilon_at_least``, ``guessed``: an audit: the least ε that fits one run, from guesses which canaries were in.
- ``LocalEngine``: clients side by side in this process.
- ``SpawnedEngine``: each client's node in a process of its own.
- ``ForwardingEngine``: the base of an engine around another; it forwards all but jobs and replies.
- ``AroundEngine``: goes around any engine, and looks at jobs and replies on their way.
- ``ClockEngine``: goes around any engine, and lets clients answer late or never on a virtual clock.
- ``Delays``: how long they take there.
- ``Masked``, ``MaskTerms``: a work whose message lies under masks until all are summed; what its clients agree on.
- ``UnmaskingEngine``: goes around any engine whose works mask, and hands over their sum.
- ``AnsweringEngine``, ``Answers``: goes around any engine, and answers what clients ask within a job; how it does.
- ``DistributedEngine``: clients dealt out to ranks of ``torch.distributed``.
- ``ArrayShard``: one client's rows of numbers.
- ``TrainSource``, ``EvalSource``: batches of shards, shuffled for training, or every row once.
- ``TwoPeriods``: batches of rows then and of rows now, for ``compare_periods``.
- ``PoissonRows``: batches for training in which every row is by a coin of its own.
- ``Student``: the base of a small model, written for one client and run for many.
- ``ImageMLP``: one of them, fully connected layers over numbers.
"""

from __future__ import annotations

from lichen.algorithms.average import Average
from lichen.audit.one_run import epsilon_at_least, guessed
from lichen.clients.drift.distances import DistanceBins
from lichen.clients.drift.embedding_sums import EmbeddingSums
from lichen.clients.drift.loss_watch import LossWatch
from lichen.clients.drift.periods import compare_periods, watch_losses
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.masking.masked import Masked, MaskTerms
from lichen.clients.privacy.private_steps import PrivateSteps
from lichen.clients.training.corrections.scaffold import Scaffold
from lichen.clients.training.gradient_step import GradientStep
from lichen.clients.training.gradient_steps import Clip, Proximal, WeightDecay
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import collect
from lichen.core.collecting.history import History
from lichen.core.contracts.algorithm import Algorithm, Report, ServerState
from lichen.core.contracts.client import ClientTask, ClientWork, Dialogue, Source
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.contracts.server import Aggregator, Sampler, ServerOptimizer
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec, TensorSpec, specs_of
from lichen.core.message import Job, Message
from lichen.core.replies import Reply
from lichen.core.roster import Member, Roster
from lichen.core.rounds import run
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.store import ClientStore
from lichen.core.timing.schedule import Schedule
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator
from lichen.data.batches.poisson_rows import PoissonRows
from lichen.data.batches.shards import ArrayShard, EvalSource, TrainSource
from lichen.data.batches.two_periods import TwoPeriods
from lichen.engines.answering import AnsweringEngine
from lichen.engines.around import AroundEngine, ForwardingEngine
from lichen.engines.clock import ClockEngine, Delays
from lichen.engines.distributed import DistributedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.masking.unmasking import UnmaskingEngine
from lichen.engines.spawned import SpawnedEngine
from lichen.engines.turns import Answers
from lichen.models.students.student import Student
from lichen.models.students.students import ImageMLP
from lichen.server.by_name import by_name
from lichen.server.drift.adwin import Adwin
from lichen.server.drift.detector import Detector, watch
from lichen.server.drift.page_hinkley import PageHinkley
from lichen.server.drift.standardised import Standardised
from lichen.server.mean import Mean
from lichen.server.optimize import ServerAdam, ServerSGD
from lichen.server.robust.fltrust import FLTrust
from lichen.server.robust.robust import Robust
from lichen.server.sampling import Everyone, Uniform
from lichen.server.schedules import Buffered, Synchronous
from lichen.server.single import SingleMessages

__all__ = [
    "Admission",
    "Adwin",
    "Aggregator",
    "Algorithm",
    "AnsweringEngine",
    "Answers",
    "AroundAggregator",
    "AroundEngine",
    "ArrayShard",
    "Average",
    "Batch",
    "Buffered",
    "ClientOptimizer",
    "ClientStore",
    "ClientTask",
    "ClientWork",
    "Clip",
    "ClockEngine",
    "CohortModel",
    "Delays",
    "Detector",
    "Dialogue",
    "DistanceBins",
    "DistributedEngine",
    "EmbeddingSums",
    "Engine",
    "EvalSource",
    "Evaluate",
    "Everyone",
    "Expected",
    "FLTrust",
    "ForwardingEngine",
    "GradientStep",
    "History",
    "ImageMLP",
    "Job",
    "LichenError",
    "LocalEngine",
    "LossWatch",
    "MaskTerms",
    "Masked",
    "Mean",
    "Member",
    "Message",
    "MetricSpec",
    "PageHinkley",
    "PoissonRows",
    "PrivateSteps",
    "Proximal",
    "Reply",
    "Report",
    "Robust",
    "Roster",
    "Sampler",
    "Scaffold",
    "Schedule",
    "SecretRandomness",
    "ServerAdam",
    "ServerOptimizer",
    "ServerSGD",
    "ServerState",
    "Shared",
    "SingleMessages",
    "Source",
    "SpawnedEngine",
    "Standardised",
    "Student",
    "Synchronous",
    "TensorSpec",
    "Train",
    "TrainSource",
    "Tree",
    "TwoPeriods",
    "Uniform",
    "UnmaskingEngine",
    "WeightDecay",
    "by_name",
    "collect",
    "compare_periods",
    "epsilon_at_least",
    "guessed",
    "run",
    "specs_of",
    "watch",
    "watch_losses",
]

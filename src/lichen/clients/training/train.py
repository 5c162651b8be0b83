"""Local training: SGD or AdamW steps on a client's rows; the change of the parameters goes up.

This one fold is the client side of federated averaging, of FedProx (``gradient_steps=(Proximal(mu),)``), of FFA-LoRA
(``freeze_schedule=(("lora_A",),)``), of RoLoRA, whose rounds take turns (``freeze_schedule=(("lora_A",),
("lora_B",))``), of FedSA-LoRA (``local_params=("lora_B",)``: that half stays with its client), and of training alone
(``personal=True``: parameters and optimizer live in the private state and nothing leaves; with ``Proximal`` it is
Ditto's personal objective).

Between gradient and optimizer stands a chain of gradient steps (:mod:`lichen.clients.training.gradient_step`). What
its links keep is private state under ``step/``, and what they send leaves beside the change.

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629
    Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar and Virginia Smith.
    "Federated Optimization in Heterogeneous Networks." MLSys 2020. https://arxiv.org/abs/1812.06127
    Youbang Sun, Zitao Li, Yaliang Li and Bolin Ding. "Improving LoRA in Privacy-preserving Federated
    Learning." ICLR 2024. https://arxiv.org/abs/2403.12313 (FFA-LoRA)
    Shuangyi Chen, Yuanxin Guo, Yue Ju, Hardik Dalal, Zhongwen Zhu and Ashish Khisti. "Robust Federated
    Finetuning of LLMs via Alternating Optimization of LoRA." NeurIPS 2025.
    https://arxiv.org/abs/2502.01755 (RoLoRA)
    Pengxin Guo, Shuang Zeng, Yanran Wang, Huijie Fan, Feifei Wang and Liangqiong Qu. "Selective
    Aggregation for Low-Rank Adaptation in Federated Learning." ICLR 2025.
    https://arxiv.org/abs/2410.01463 (FedSA-LoRA)
    Tian Li, Shengyuan Hu, Ahmad Beirami and Virginia Smith. "Ditto: Fair and Robust Federated
    Learning Through Personalization." ICML 2021. https://arxiv.org/abs/2012.04221

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.gradient_step import GradientStep
from lichen.clients.training.gradient_steps import GradientChain
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.training_sums import WeighBy, add_seen, training_expected, training_message
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, specs_of
from lichen.core.message import Job, Message
from lichen.core.parameters import personal_C
from lichen.core.tree import Tree

__all__ = ["Train", "TrainState"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """A block of clients in the middle of training.

    Attributes:
        job: What was asked.
        clients: Roster indices.
        shared_C: Trained tensors as the job brought them, ``(C, ...)``.
        initial_C: Where these clients began: ``shared_C``, or their own.
        initial_optimizer: The optimizer's state there.
        params_C: Trained tensors now.
        optimizer: The optimizer's state now.
        frozen_C: Trainable tensors that nobody trains here.
        fixed: Shared tensors without client axis (``patch.``, ``answers.``).
        chain: The state of the gradient steps now.
        own: What the gradient steps had kept when these clients began.
        retained: The rest of the private state, carried along untouched.
        sums: ``(C,)`` float64 ``loss_sum``, ``count``, ``tokens``, ``steps``.
        added: Micro-batches added up since the last step.
        grads_C: Gradients of their summed loss; empty where there are none.
        count_C: Their labelled rows or tokens; None where there are none.
    """

    job: Job
    clients: tuple[int, ...]
    shared_C: Tree
    initial_C: Tree
    initial_optimizer: Tree
    params_C: Tree
    optimizer: Tree
    frozen_C: Tree
    fixed: Tree
    retained: Tree
    sums: Tree
    chain: Tree = field(default_factory=dict)
    own: Tree = field(default_factory=dict)
    added: int = 0
    grads_C: Tree = field(default_factory=dict)
    count_C: Tensor | None = None


@final
@dataclass(frozen=True, slots=True)
class Train:
    """Local training as a client work.

    Args:
        model: Runs C clients at once.
        optimizer: How each client steps; the job's setting ``lr_scale`` scales its learning rate.
        gradient_steps: What happens to gradients before the optimizer steps, first to last
            (:mod:`lichen.clients.training.gradient_steps`).
        personal: Parameters and optimizer live on in the private state, and no tensor leaves.
        freeze_schedule: Ends of names that nobody trains or sends: those of ``freeze_schedule[v %
            len(freeze_schedule)]`` where v is the job's version. None at all if empty.
        local_params: Ends of names that every client trains and keeps: each begins where it left off, and these
            tensors are not sent. Clients that come for the first time begin at the shared ones.
        weigh_by: What a client's weight counts: ``"examples"`` (labelled rows or tokens seen),
            ``"tokens"`` (attended ones), or ``"one"``.
        accumulate: Micro-batches of a step (:class:`lichen.data.batches.accumulation.MicroBatches`): the step is that
            of one batch with all their rows, up to rounding.

    Raises:
        LichenError: if a value is out of range.
    """

    model: CohortModel
    _: KW_ONLY
    optimizer: ClientOptimizer = field(default_factory=ClientOptimizer)
    gradient_steps: tuple[GradientStep, ...] = ()
    personal: bool = False
    freeze_schedule: tuple[tuple[str, ...], ...] = ()
    local_params: tuple[str, ...] = ()
    weigh_by: WeighBy = "examples"
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise LichenError(f"{self.accumulate} is too few", where="train.accumulate", fix="use 1 or more")
        if self.weigh_by not in ("examples", "tokens", "one"):
            raise LichenError(
                f"cannot weigh by {self.weigh_by!r}", where="train.weigh_by", fix="use examples, tokens or one"
            )

    def trained(self, job: Job) -> Tree:
        """The tensors of a job that its clients train, without client axis."""
        return {name: x for name, x in job.shared.trainable.items() if not name.endswith(self._frozen(job))}

    def _frozen(self, job: Job) -> tuple[str, ...]:
        return self.freeze_schedule[job.version % len(self.freeze_schedule)] if self.freeze_schedule else ()

    def expected(self, job: Job) -> Expected:
        """The trained tensors but those at ``local_params``, and what gradient steps send; none if ``personal``."""
        trained = {} if self.personal else specs_of(self.trained(job))
        sent = {name: spec for name, spec in trained.items() if not name.endswith(self.local_params)}
        also = {} if self.personal else GradientChain(self.gradient_steps).sends(trained)
        return training_expected(self.model, {**sent, **also}, self.weigh_by)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> TrainState:
        """Clients side by side at the shared tensors, or at their own where they have some and ``personal`` is set.

        Raises:
            LichenError: if nothing is left to train, or the private state does not fit.
        """
        trainable, fixed = job.shared.trainable, job.shared.fixed
        trained = self.trained(job)
        frozen_params = {name: x for name, x in trainable.items() if name not in trained}
        if not trained:
            raise LichenError("no tensor is left to train", where="train.phases", fix="freeze fewer names")
        count = len(clients)
        own, retained = self._own(trees.expand(trainable, count), own_C)
        shared_C = trees.broadcast(trained, count)
        initial_C, optimizer = shared_C, self.optimizer.init(shared_C)
        frozen_C = trees.broadcast(frozen_params, count)
        if self.local_params and not self.personal:
            mine = personal_C({n: x for n, x in trainable.items() if n.endswith(self.local_params)}, own_C, count)
            initial_C = {name: mine.get(name, x_C) for name, x_C in shared_C.items()}
            frozen_C = {name: mine.get(name, x_C) for name, x_C in frozen_C.items()}
        if self.personal:
            initial_C = personal_C(trained, own_C, count)
            before, _ = trees.split(retained, "opt/")
            if before:
                trees.check_same(before, optimizer, where="private state")
                optimizer = before
        zero_C = torch.zeros(count, dtype=torch.float64, device=next(iter(shared_C.values())).device)
        return TrainState(
            job=job,
            clients=tuple(clients),
            shared_C=shared_C,
            initial_C=initial_C,
            initial_optimizer=optimizer,
            params_C=initial_C,
            optimizer=optimizer,
            frozen_C=frozen_C,
            fixed=fixed,
            chain=GradientChain(self.gradient_steps).init(job, clients, initial_C, own),
            own=own,
            retained=retained,
            sums=dict.fromkeys(("loss_sum", "count", "tokens", "steps"), zero_C),
        )

    def _own(self, trainable_C: Tree, own_C: Tree | None) -> tuple[Tree, Tree]:
        """What the gradient steps keep, at its beginning where there is none yet; and the rest of the private state."""
        before, rest = trees.split(own_C or {}, "step/")
        first = GradientChain(self.gradient_steps).own(trainable_C)
        known = {name: before[name] for name in first if name in before}
        trees.check_same(known, {name: first[name] for name in known}, where="private state")
        return {**first, **before}, rest

    def step(self, state: TrainState, batch: Batch) -> TrainState:
        """One optimizer step of every active client on the mean loss over its own labelled rows or tokens.

        With ``accumulate``, a micro-batch is added up, and the last one of a step takes it.
        """
        if self.accumulate > 1:
            return self._added(state, batch)
        leaves_C = {name: x.detach().requires_grad_() for name, x in state.params_C.items()}
        with torch.enable_grad():
            loss_C, count_C = self.model.loss({**leaves_C, **state.frozen_C}, state.fixed, batch)
            mean_C = loss_C / count_C.clamp(min=1)
            grads = torch.autograd.grad(
                mean_C.sum(), list(leaves_C.values()), allow_unused=True, materialize_grads=True
            )
        return self.stepped(state, batch, dict(zip(leaves_C, grads, strict=True)), loss_C.detach(), count_C)

    def _added(self, state: TrainState, batch: Batch) -> TrainState:
        """The state with one more micro-batch in it; the sum of losses is what adds up, not their mean."""
        device = next(iter(state.params_C.values())).device
        rows_CB = batch["index_CB"] >= 0
        if "answer_CB" in batch:
            rows_CB = rows_CB | (batch["answer_CB"] >= 0)
        grads_C, count_C = state.grads_C or trees.zeros_like(state.params_C), state.count_C
        loss_C = torch.zeros(len(state.clients), dtype=torch.float64, device=device)
        some_C = torch.zeros(len(state.clients), dtype=torch.int64, device=device)
        if bool(rows_CB.any()):  # a model need not take a batch without a row
            leaves_C = {name: x.detach().requires_grad_() for name, x in state.params_C.items()}
            with torch.enable_grad():
                losses_C, some_C = self.model.loss({**leaves_C, **state.frozen_C}, state.fixed, batch)
                more = torch.autograd.grad(
                    losses_C.sum(), list(leaves_C.values()), allow_unused=True, materialize_grads=True
                )
            loss_C, grads_C = losses_C.detach(), trees.add(grads_C, dict(zip(leaves_C, more, strict=True)))
        count_C = some_C if count_C is None else count_C + some_C
        if state.added + 1 < self.accumulate:
            sums = add_seen(state.sums, batch, {"loss_sum": loss_C, "count": some_C})
            return replace(state, sums=sums, added=state.added + 1, grads_C=grads_C, count_C=count_C)
        divisor_C = count_C.clamp(min=1)
        grads_C = trees.map_tree(lambda x: x / divisor_C.to(x).view(-1, *[1] * (x.dim() - 1)), grads_C)
        stepped = self.stepped(state, batch, grads_C, loss_C, some_C)
        return replace(stepped, added=0, grads_C={}, count_C=None)

    def stepped(self, state: TrainState, batch: Batch, grads_C: Tree, loss_C: Tensor, count_C: Tensor) -> TrainState:
        """The optimizer's step by these gradients, through the chain, and the sums with this batch in them."""
        exact = self.model.reference
        # Fast steps learn from a batch on the host who is active, without waiting for an accelerator.
        device = next(iter(state.params_C.values())).device
        active_C = batch["active_C"].to(device)
        with torch.no_grad():
            grads_C, chain = GradientChain(self.gradient_steps).update(
                grads_C, state.chain, state.params_C, active_C=active_C, exact=exact
            )
            params_C, optimizer = self.optimizer.update(
                grads_C,
                state.optimizer,
                state.params_C,
                active_C=active_C if exact else batch["active_C"],
                lr_scale=state.job.settings.get("lr_scale", 1.0),
                exact=exact,
            )
            sums = add_seen(state.sums, batch, {"loss_sum": loss_C, "count": count_C, "steps": active_C})
        return replace(state, params_C=params_C, optimizer=optimizer, sums=sums, chain=chain)

    def final(self, state: TrainState) -> tuple[Message, Tree | None]:
        """The message and, where some are kept, the private tensors.

        The message's tensors are ``params - shared`` (none that are at ``local_params``) and what gradient steps
        send; if ``personal``, none. A client whose loss or tensors are not finite sends weight 0, zeros and
        ``failed`` = 1, and keeps the private state it began with, so that it can poison neither the sum nor its own
        later rounds.
        """
        mine = {name for name in state.params_C if name.endswith(self.local_params)}
        sent = [{n: x for n, x in tree.items() if n not in mine} for tree in (state.params_C, state.shared_C)]
        tensors: Tree = {} if self.personal else trees.sub(*sent)
        own, extra_C = dict(state.own), Tree()
        if self.gradient_steps and (own or not self.personal):
            # Where all begin at the shared tensors and send all, their change is what they send.
            plain = state.initial_C is state.shared_C and tensors.keys() == state.params_C.keys()
            delta_C = tensors if plain else trees.sub(state.params_C, state.initial_C)
            extra_C, own_after = GradientChain(self.gradient_steps).final(state.chain, delta_C, state.sums["steps"])
            own |= own_after
            if both := tensors.keys() & extra_C.keys():
                raise LichenError(f"a gradient step sends {min(both)!r}, which is trained", where="train")
        finite_C = state.sums["loss_sum"].isfinite()
        for x_C in (*state.params_C.values(), *extra_C.values(), *own.values()):
            finite_C = finite_C & x_C.flatten(1).isfinite().all(1)
        tensors = tensors if self.personal else {**tensors, **extra_C}
        tensors = _where(finite_C, tensors, trees.zeros_like(tensors))
        own_C: Tree | None = None
        if self.personal:
            params_C = _where(finite_C, state.params_C, state.initial_C)
            optimizer = _where(finite_C, state.optimizer, state.initial_optimizer)
            own_C = trees.join("params/", params_C, trees.join("opt/", optimizer, state.retained))
        elif mine:
            retained_C = _where(finite_C, state.params_C, state.initial_C)
            own_C = trees.join("params/", {name: retained_C[name] for name in mine}, state.retained)
        if own:
            own_C = trees.join("step/", _where(finite_C, own, state.own), own_C or state.retained)
        message = training_message(self.model, state.job, state.clients, tensors, state.sums, finite_C, self.weigh_by)
        return message, own_C


def _where(finite_C: Tensor, a_C: Tree, b_C: Tree) -> Tree:
    return trees.map_tree(lambda a, b: torch.where(finite_C.view(-1, *[1] * (a.dim() - 1)), a, b), a_C, b_C)

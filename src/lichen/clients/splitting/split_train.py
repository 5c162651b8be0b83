"""Local training of a model whose middle lies at the server: two crossings up and two down a step.

A client sends hidden states at the first cut and is answered those at the second; it sends the loss's gradient there
and is answered the one at the first. Both ends step as a client that holds the whole would: with one optimizer, rate,
decay and pull to the shared tensors; where gradients are clipped, each side is sent the other's squared norms, and
the server steps when the client's come, with the next question. What is sent at the end is the change of the client's
own tensors; the server adds the middle's, so that all else takes it for a whole message.

With ``local_head`` the first blocks learn from the client's last ones, put right above the first cut. Nothing comes
back for them: a batch's gradient goes up with the next batch's hidden states, and a step is one exchange. Each side
then clips by itself.

References:
    Praneeth Vepakomma, Otkrist Gupta, Tristan Swedish and Ramesh Raskar. "Split learning for health: Distributed deep
    learning without sharing raw patient data." 2018. https://arxiv.org/abs/1812.00564 (the U-shape)
    Chandra Thapa, Pathum Chamikara Mahawaga Arachchige, Seyit Camtepe and Lichao Sun. "SplitFed: When Federated
    Learning Meets Split Learning." AAAI 2022. https://arxiv.org/abs/2004.12088
    Zheng Lin, Xuanjie Hu, Yuxin Zhang, Zhe Chen, Zihan Fang, Xianhao Chen, Ang Li, Praneeth Vepakomma and Yue Gao.
    "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language Models." 2024.
    https://arxiv.org/abs/2407.00952
    Dong-Jun Han, Hasnain Irshad Bhatti, Jungmoon Lee and Jaekyun Moon. "Accelerating Federated Learning with Split
    Learning on Locally Generated Losses." ICML 2021 workshop on federated learning. (the head of the client's own)

Legend: C = 1, B rows, T tokens, N tokens of all rows, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.splitting.asking import GRADIENT, HIDDEN, LENGTH, SQUARES, Form, received
from lichen.clients.splitting.crossing import narrow
from lichen.clients.splitting.ends import Ends
from lichen.clients.splitting.remembered import AGREED, INDEX, MEMORY, OWN, stamp
from lichen.clients.splitting.whole_norm import cut_to_norm, squares
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["SplitTrain"]

Talk = Generator[Message, Tree, tuple[Message, Tree | None]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTrain:
    """Training across two cuts, as a dialogue.

    Attributes:
        train: How a client that holds the whole model would train.
        ends: What each client holds.
        form: What crosses.
        steps: Steps of a client, at most.
        local_head: The first blocks learn from a head of the client's own.
        clip: Norm that the gradient of the whole is cut to; None: ``train`` may cut each side's.
    """

    train: Train
    ends: Callable[[int], Ends]
    form: Form
    steps: int
    local_head: bool = False
    clip: float | None = None

    def expected(self, job: Job) -> Expected:
        """The whole message of a whole job; of the part of a job that a client gets, its own part of the message."""
        return self.train.expected(job)

    def questions(self, job: Job) -> Sequence[Expected]:
        """Two a step, and one for the last squares; with ``local_head`` one a step, and one for the last gradient.
        Where changes are sent, one before all others.
        """
        if self.local_head:
            steps = (self.form.expected(HIDDEN, LENGTH, GRADIENT, optional=True),) * (self.steps + 1)
        elif self.clip is not None:
            count = len(self.train.trained(job))
            first = self.form.expected(HIDDEN, LENGTH, SQUARES, squares=count, optional=True)
            steps = (*(first, self.form.expected(GRADIENT)) * self.steps, first)
        else:
            steps = (self.form.expected(HIDDEN, LENGTH), self.form.expected(GRADIENT)) * self.steps
        return (self.form.first, *steps) if self.form.remembers else steps

    def talk(self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]) -> Talk:
        """Steps over the batches.

        Raises:
            LichenError: for several clients, or an answer of another shape.
        """
        memory, own = trees.split(own_C or {}, OWN)
        state = self.train.init(job, clients, own or None)
        ends = self.ends(clients[0])
        if self.form.remembers:
            answer_C = yield self.form.question(job, clients, 0, **{MEMORY: stamp(memory)})
            memory = memory if bool(answer_C[AGREED].all()) else {}
        late: dict[str, Tensor] = {}
        number = 0
        for whole in batches:
            batch, rows = narrow(whole)
            params_C = {**state.params_C, **state.frozen_C}
            hidden_CBTH = ends.hidden(params_C, batch)
            sent = rows.flat(hidden_CBTH)
            where = {LENGTH: rows.length_B[None]}
            if self.form.remembers:
                where[INDEX] = batch["index_CB"].int()
            question, memory = self.form.coded_question(job, clients, number, memory, **{HIDDEN: sent, **where, **late})
            answer_C, memory = self.form.arrived((yield question), "down", where, memory)
            number += 1
            middle_CBTH = rows.padded(received(answer_C, HIDDEN, sent))
            up = ends.upper(state.params_C, state.frozen_C, batch, middle_CBTH)
            gradient = rows.flat(up.gradient_CBTH)
            if self.local_head:
                late = {GRADIENT: gradient}
                below_CBTH = ends.skipping(params_C, batch, hidden_CBTH)
            else:
                question = self.form.question(job, clients, number, **{GRADIENT: gradient})
                answer_C = self.form.decoded((yield question))
                number += 1
                below_CBTH = rows.padded(received(answer_C, GRADIENT, sent))
            grads_C = {**ends.lower(state.params_C, state.frozen_C, batch, below_CBTH), **up.grads_C}
            if self.clip is not None and not self.local_head:
                late = {SQUARES: squares(grads_C)}
                names = self.trained_within(job, ends.middle_names)
                theirs = received(answer_C, SQUARES, torch.zeros(1, len(names)))
                grads_C = cut_to_norm(grads_C, self.clip, late[SQUARES], names, theirs)
            state = self.train.stepped(state, batch, grads_C, up.loss_C, up.count_C)
        if late:
            yield self.form.question(job, clients, number, **late)
        message, own_C = self.train.final(state)
        return message, trees.join(OWN, memory, own_C or {}) if memory else own_C

    def trained_within(self, job: Job, names: Iterable[str]) -> tuple[str, ...]:
        """Those of these tensors of the whole that a job's clients and server train."""
        nothing = torch.zeros(0)
        whole = replace(job, shared=Shared(dict.fromkeys(sorted(names), nothing)))
        return tuple(self.train.trained(whole))

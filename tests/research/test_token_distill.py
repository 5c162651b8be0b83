"""Listening: a dense loss and plain autograd are the oracle; whom a client believes; what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import EvalSource, TrainSource
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal
from lichen.models.tokens.token_targets import DistilledLM
from lichen.research.mutual.token_distill import DistillLogits
from lichen.research.mutual.token_logits import REPORTED_LOSS, public_shard, starts
from support.two_tokenizers import TEXTS, model, tokenizer

PUBLIC = public_shard(TEXTS, tokenizer(300))
AT = starts(PUBLIC)
FULL = FullCausal(model(300), name="full")


def answers_of(seed: int = 0, k: int = 3) -> Any:
    g = torch.Generator().manual_seed(seed)
    prob, index = (3 * torch.randn(int(AT[-1]), 300, generator=g)).softmax(-1).topk(k)
    index[::5] = -1
    return {"answers.index": index.to(torch.int16), "answers.prob": prob.half().masked_fill(index < 0, 0)}


def dense(tensors: Tree, answers: Any, rows: Any, lm: Any, *, rest: bool = False) -> Any:
    """The loss by transformers' whole logits and a target for every token of the vocabulary."""
    total = torch.zeros(())
    for n in range(len(TEXTS)):
        ids = torch.tensor(PUBLIC.input_ids[n].tolist())[None]
        logits = torch.func.functional_call(model(300), tensors, kwargs={"input_ids": ids}, tie_weights=True).logits
        log_TV = logits[0, :-1].log_softmax(-1)
        if lm:
            total = total + lm * torch.nn.functional.nll_loss(log_TV, ids[0, 1:], reduction="sum")
        if n in rows:
            for t, place in enumerate(range(int(AT[n]), int(AT[n + 1]))):
                target_V = torch.zeros(log_TV.shape[1])
                for i, p in zip(answers["answers.index"][place], answers["answers.prob"][place], strict=True):
                    if i >= 0:
                        target_V[int(i)] += float(p)
                if target_V.any() and not rest:
                    total = total - (target_V / target_V.sum() * log_TV[t]).sum()
                elif target_V.any():
                    others = log_TV[t][target_V == 0].logsumexp(0)
                    target_V = target_V / target_V.sum().clamp(min=1)
                    total = total - (target_V * log_TV[t]).sum() - (1 - target_V.sum()) * others
    return total


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(("lm", "chunk"), [(0.7, 1024), (0.7, 5), (0.0, 5)])
def test_loss_and_gradients_equal_the_dense_ones(lm: Any, chunk: Any, rest: Any) -> None:
    answers, rows = answers_of(), (0, 2, 3, 7)
    batch = dict(next(EvalSource([PUBLIC], batch_size=8).batches((0,), 0)))
    chosen = torch.tensor([[int(i) if int(i) in rows else -1 for i in batch["index_CB"][0]]])
    taught = DistilledLM(FULL, lm=lm, rest=rest, chunk=chunk)
    leaves = {n: x[None].clone().requires_grad_() for n, x in FULL.init(0).items()}
    fixed = {**answers, "answers.at": AT}
    loss_C, count_C = taught.loss(leaves, fixed, {**batch, "answer_CB": chosen})
    grads = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    plain = {n: x.clone().requires_grad_() for n, x in FULL.init(0).items()}
    expected = dense(plain, answers, rows, lm, rest=rest)
    torch.testing.assert_close(loss_C[0], expected, rtol=1e-5, atol=1e-4)
    for got, right in zip(grads, torch.autograd.grad(expected, list(plain.values())), strict=True):
        torch.testing.assert_close(got[0], right, rtol=1e-4, atol=1e-4)
    answered = sum(
        bool((answers["answers.index"][p] >= 0).any()) for n in rows for p in range(int(AT[n]), int(AT[n + 1]))
    )
    assert int(count_C[0]) == (int(AT[-1]) if lm else answered)


def listening(*, personal: Any, lm: float = 1.0, lr: float = 0.02, cohort: Any = FULL) -> Any:
    train = Train(DistilledLM(cohort, lm=lm), optimizer=ClientOptimizer("adamw", lr=lr), personal=personal)
    return DistillLogits(train, public=PUBLIC)


def listen(work: Any, shared: Tree, own_C: Tree | None, clients: int, *, steps: int = 3, seed: int = 0) -> Any:
    job = Job(work="listen", shared=Shared.of_flat(shared), version=2, clients=clients, seed=seed)
    state = work.init(job, clients, own_C)
    for batch in TrainSource(dict.fromkeys(clients, PUBLIC), batch_size=4, steps=steps).batches(clients, seed):
        state = work.step(state, batch)
    return work.final(state)


def test_the_loss_on_what_was_told_falls() -> None:
    answers = answers_of()
    adapter = Lora(targets=("q_proj", "v_proj", "down_proj"), rank=4, alpha=8.0)
    cohort = CausalCohort(model(300), adapter=adapter, name="lora")
    shared = cohort.init(0)
    work, losses = listening(personal=False, lm=0.0, cohort=cohort), []
    for _ in range(5):
        message, own = listen(work, {**shared, **answers}, None, (0,), steps=6)
        assert own is None
        shared = {n: x + message.tensors[n][0] for n, x in shared.items()}
        losses.append(float(message.metrics["loss_sum"] / message.metrics["count"]))
    assert losses[-1] < losses[0] - 0.05


def private(clients: int) -> Any:
    g = torch.Generator().manual_seed(0)
    every = [{n: x + 0.1 * torch.randn(x.shape, generator=g) for n, x in FULL.init(0).items()} for _ in clients]
    params_C = trees.stack(every)
    optimizer = ClientOptimizer("adamw").init(params_C)
    optimizer = {n: x + 1 for n, x in optimizer.items()}
    told = {REPORTED_LOSS: torch.tensor([[5.0] * 8, [1.0, 5.0] * 4])[: len(clients)]}
    return trees.join("params/", params_C, trees.join("opt/", optimizer, told))


def test_a_client_believes_who_knows_better_and_keeps_its_optimizer() -> None:
    own_C = private((3, 9))
    shared = {**answers_of(), "answers.loss": torch.full((8,), 3.0)}
    message, kept = listen(listening(personal=True), shared, own_C, (3, 9))
    assert message.tensors == {}
    assert message.metrics["believed"].tolist() == [8.0, 4.0]
    assert kept.keys() == own_C.keys() - {REPORTED_LOSS}
    moved = [n for n, x in kept.items() if not torch.equal(x, own_C[n])]
    assert moved
    assert all(n.startswith("params/") for n in moved)
    _, mine = listen(listening(personal=True), shared, {n: x[1:] for n, x in own_C.items()}, (9,))
    assert all(torch.equal(x[1:], mine[n]) for n, x in kept.items())
    # Whom nobody believes might as well have said something else.
    deaf = {**shared, "answers.loss": torch.full((8,), 9.0)}
    other = {**deaf, "answers.index": deaf["answers.index"].flip(0)}
    a, b = (listen(listening(personal=True), s, own_C, (3, 9)) for s in (deaf, other))
    assert a[0].metrics["believed"].tolist() == [0.0, 0.0]
    assert trees.digest(a[1]) == trees.digest(b[1])
    assert trees.digest(a[1]) != trees.digest(kept)


def test_refusals() -> None:
    shared = answers_of()
    with pytest.raises(LichenError, match="losses are missing"):
        listen(listening(personal=True), shared, private((0,)), (0,))
    with pytest.raises(LichenError, match="answers at"):
        listen(listening(personal=False), FULL.init(0), None, (0,))
    with pytest.raises(LichenError, match="hears no answers"):
        DistillLogits(Train(FULL), public=PUBLIC)
    with pytest.raises(LichenError, match="out of range"):
        DistilledLM(FULL, lm=-1.0)
    with pytest.raises(LichenError, match="did not come down"):
        DistilledLM(FULL).loss(trees.broadcast(FULL.init(0), 1), {}, {})

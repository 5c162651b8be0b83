"""Telling: transformers' own logits are the oracle; company, batches and bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import Job, pack_message, size
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import EvalSource
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal
from lichen.research.mutual.token_logits import (
    REPORTED_LOSS,
    ReportLogits,
    fitting,
    labelled_tokens,
    public_shard,
    starts,
)
from lichen.research.mutual.vocabulary import Vocabulary
from support.two_tokenizers import TEXTS, model, tokenizer

PUBLIC = public_shard(TEXTS, tokenizer(300))
VOCABULARY = Vocabulary.of(tokenizer(300))


def cohort_of(kind: str) -> Any:
    if kind == "full":
        return FullCausal(model(300), name="full")
    adapter = Lora(targets=("q_proj", "v_proj"), rank=2)
    return CausalCohort(model(300), adapter=adapter, name="lora", reference=kind == "lora", packed=False)


def tell(work: Any, own_C: Tree | None, clients: int, *, batch: int = 3, shared: Any = None) -> Any:
    state = work.init(
        Job(work="tell", shared=Shared.of_flat(shared or {}), version=1, clients=clients, seed=0), clients, own_C
    )
    for one in EvalSource(dict.fromkeys(clients, PUBLIC), batch_size=batch).batches(clients, 0):
        state = work.step(state, one)
    return work.final(state)


def apart(cohort: Any, clients: int) -> Any:
    g = torch.Generator().manual_seed(0)
    every = [{n: x + 0.1 * torch.randn(x.shape, generator=g) for n, x in cohort.init(0).items()} for _ in clients]
    return trees.join("params/", trees.stack(every), {})


@pytest.mark.parametrize("kind", ["full", "lora", "stacked"])
def test_says_what_the_model_says(kind: str) -> None:
    cohort = cohort_of(kind)
    work = ReportLogits(cohort, public=PUBLIC, vocabulary=VOCABULARY, top_k=4)
    message, own = tell(work, None, (0,), shared=cohort.init(0))
    assert own is None
    at = starts(PUBLIC).tolist()
    assert message.tensors["index"].shape == (1, at[-1], 4)
    assert (message.tensors["index"].dtype, message.tensors["prob"].dtype) == (torch.int16, torch.float16)
    for n, text in enumerate(TEXTS):
        ids = torch.tensor([[tokenizer(300).bos_token_id, *tokenizer(300)(text)["input_ids"]]])
        with torch.no_grad():
            chance_TV = model(300)(input_ids=ids).logits[0, :-1].log_softmax(-1)
        loss = -chance_TV.gather(1, ids[0, 1:, None]).sum()
        torch.testing.assert_close(message.tensors["loss"][0, n], loss, rtol=1e-4, atol=1e-4)
        best, index = chance_TV.exp().topk(4)
        here = slice(at[n], at[n + 1])
        torch.testing.assert_close(message.tensors["prob"][0, here].float(), best, rtol=2e-3, atol=1e-4)
        chosen = chance_TV.exp().gather(1, message.tensors["index"][0, here].long())
        torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-5)
        assert float((message.tensors["index"][0, here] == index).double().mean()) > 0.95


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_company_and_batches_change_no_bit(kind: str) -> None:
    cohort = cohort_of(kind)
    work = ReportLogits(cohort, public=PUBLIC, vocabulary=VOCABULARY, personal=True)
    own_C = apart(cohort, (4, 7))
    both, kept = tell(work, own_C, (4, 7))
    alone, _ = tell(work, {n: x[1:] for n, x in own_C.items()}, (7,))
    for name, x in both.tensors.items():
        assert torch.equal(x[1:], alone.tensors[name])
        assert not torch.equal(x[0], x[1])
    assert torch.equal(kept[REPORTED_LOSS], both.tensors["loss"])
    assert all(torch.equal(kept[n], x) for n, x in own_C.items())
    assert size(both) == len(pack_message(alone))


def test_more_answers_than_tokens_and_a_client_that_went_wrong() -> None:
    cohort = cohort_of("full")
    work = ReportLogits(cohort, public=PUBLIC, vocabulary=VOCABULARY, top_k=400, personal=True)
    own_C = apart(cohort, (0, 1))
    for x_C in own_C.values():
        x_C[1] = torch.nan
    message, _ = tell(work, own_C, (0, 1))
    assert bool((message.tensors["index"][0, :, VOCABULARY.size :] == -1).all())
    assert message.weight_C.tolist() == [len(TEXTS), 0.0]
    assert message.metrics["failed"].tolist() == [0.0, 1.0]


def test_public_texts_are_cut_after_words_to_fit_both() -> None:
    long = ("the cat sat on a mat and then the other cats", "the")
    both = [tokenizer(300), tokenizer(330)]
    cut = fitting(long, both, most=9)
    assert cut[1] == "the"
    assert long[0].startswith(cut[0])
    lengths = [max(len(t(text)["input_ids"]) for t in both) for text in (cut[0], long[0][: len(cut[0]) + 4])]
    assert lengths[0] < 9 <= lengths[1] + 3
    shard = public_shard(cut, both[0])
    assert shard.length_N.max() <= 9
    assert [row.tolist() for row in labelled_tokens(shard)] == [both[0](text)["input_ids"] for text in cut]
    with pytest.raises(LichenError, match="no word"):
        fitting(("underneath",), both, most=1)


def test_refusals() -> None:
    cohort = cohort_of("full")
    work = ReportLogits(cohort, public=PUBLIC, vocabulary=VOCABULARY, personal=True)
    with pytest.raises(LichenError, match="holds no trained tensors"):
        tell(work, None, (0,))
    own_C = apart(cohort, (0,))
    state = work.init(Job(work="tell", shared=Shared(), version=1, clients=(0,), seed=0), (0,), own_C)
    short = next(EvalSource([PUBLIC], batch_size=2, max_length=4).batches((0,), 0))
    with pytest.raises(LichenError, match="was cut"):
        work.step(state, short)
    with pytest.raises(LichenError, match="answers a place"):
        ReportLogits(cohort, public=PUBLIC, vocabulary=VOCABULARY, top_k=0)
    assert np.asarray(PUBLIC.labels[0])[0] == -100

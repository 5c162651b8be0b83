"""FedALT's rest of the world: the mean without one's own part, and what a client keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lichen.clients.personal.fedalt import FedAlt
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.models.causal_cohort import CausalCohort
from support.tiny_llama import save_model

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> CausalCohort:
    from lichen.models.adapters.lora import Lora
    from lichen.models.loading.load import load_causal

    folder = save_model(tmp_path_factory.mktemp("fedalt") / "model")
    model, _ = load_causal(str(folder))
    return CausalCohort(model, adapter=Lora(targets=("q_proj",), rank=2), name="llama", prove=False)


def job(cohort: CausalCohort, version: int, **tensors: Tensor) -> Job:
    shared = {name: x + 0.1 for name, x in cohort.init(0).items()}
    return Job(
        work="train",
        shared=Shared(trainable={**shared, **tensors}),
        version=version,
        clients=(0, 1),
        seed=0,
        base=cohort.base,
        settings={"lr_scale": 1.0},
    )


def batch(clients: int = 2) -> dict[str, Tensor]:
    ids_CBT = torch.randint(4, 30, (clients, 2, 6), generator=torch.Generator().manual_seed(0))
    return {
        "active_C": torch.ones(clients, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": torch.ones_like(ids_CBT),
        "labels_CBT": ids_CBT,
        "index_CB": torch.arange(2).expand(clients, 2).clone(),
    }


def one_round(work: FedAlt, asked: Job, own_C: Tree | None) -> tuple[Tree, Tree, Tree]:
    state = work.step(work.init(asked, (0, 1), own_C), batch())
    message, kept_C = work.final(state)
    return message.tensors, kept_C or {}, state.other_C


def test_the_own_part_of_the_last_round_is_taken_out_of_the_mean_and_of_no_other(cohort: CausalCohort) -> None:
    work = FedAlt(Train(cohort, optimizer=ClientOptimizer(lr=0.1), weigh_by="one"), cohort=4)
    first = job(cohort, 3)
    sent, kept_C, other_C = one_round(work, first, None)
    name = f"{LAYER}.lora_B"
    assert torch.equal(other_C[name], trees.expand(first.shared.trainable, 2)[name])  # nobody had a part in it yet
    own_C = kept_C[f"mine/params/{name}"]
    assert torch.allclose(sent[name], own_C - first.shared.trainable[name])
    assert kept_C["mine/round"].tolist() == [3, 3]
    kept_C["mine/round"] = torch.tensor([3, 1])  # the second came in round 1, and not since
    after = job(cohort, 4)
    mean = after.shared.trainable[name]
    _, again_C, other_C = one_round(work, after, kept_C)
    assert torch.allclose(other_C[name][0], (mean - own_C[0] / 4) / 0.75, atol=1e-6)
    assert torch.equal(other_C[name][1], mean)
    assert again_C["mine/round"].tolist() == [4, 4]
    assert not torch.equal(again_C[f"mine/params/{name}"], own_C)


def test_what_is_sent_has_the_shared_tensors_names_and_gates_stay(cohort: CausalCohort) -> None:
    work = FedAlt(Train(cohort, optimizer=ClientOptimizer(lr=0.1)), cohort=2)
    sent, kept_C, _ = one_round(work, job(cohort, 0), None)
    assert sent.keys() == work.expected(job(cohort, 0)).tensors.keys()
    gate = f"mine/params/{LAYER}.lora_gate"
    assert bool((kept_C[gate] == 0).all())  # while both adapters are the same, to mix them is nothing
    _, again_C, _ = one_round(work, job(cohort, 1), kept_C)
    assert bool((again_C[gate] != 0).any())


def test_a_client_whose_training_fails_sends_nothing_and_keeps_what_it_had(cohort: CausalCohort) -> None:
    work = FedAlt(Train(cohort, optimizer=ClientOptimizer(lr=0.1)), cohort=2)
    _, kept_C, _ = one_round(work, job(cohort, 0), None)
    broken = {name: x.clone() for name, x in kept_C.items()}
    broken[f"mine/other/{LAYER}.lora_A"][0] = torch.nan
    broken[f"mine/params/{LAYER}.lora_B"][0] = torch.inf
    sent, again_C, _ = one_round(work, job(cohort, 1), broken)
    assert all(bool((x[0] == 0).all()) and bool(x.isfinite().all()) for x in sent.values())
    assert bool((sent[f"{LAYER}.lora_B"][1] != 0).any())
    assert again_C["mine/round"].tolist() == [0, 1]

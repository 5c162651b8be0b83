"""DeBERTa with adapters on what its shared table of positions goes through: logits and gradients are PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lichen.core.tree import Tree, stack
from lichen.models.adapters.bitfit import BitFit
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.whole_layers import whole_layers
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.loading.classifier import load_classifier
from support.bare_checkpoints import VOCABULARY, save_bare

CLIENTS, ROWS, CLASSES = 3, 2, 3


def _model(family: str, folder: Path, **more: Any) -> Any:
    return load_classifier(save_bare(family, folder, **more), classes=CLASSES, seed=7)[0]


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (CLIENTS, ROWS, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9, 4], [7, 9], [3, 8]])[..., None]).long()
    return {
        "active_C": torch.ones(CLIENTS, dtype=torch.bool),
        "input_ids_CBT": torch.where(mask.bool(), ids, 0),
        "attention_mask_CBT": mask,
        "labels_CB": torch.tensor([[0, 1], [2, 0], [1, 2]]),
    }


def _starts(cohort: ClassifierCohort) -> list[Tree]:
    trees = []
    for c in range(CLIENTS):
        generator = torch.Generator().manual_seed(c)
        trees.append({k: x + 0.2 * torch.randn(x.shape, generator=generator) for k, x in cohort.init(0).items()})
    return trees


def _grads(cohort: ClassifierCohort, trees: list[Tree]) -> tuple[torch.Tensor, Tree]:
    params_C = {name: x.requires_grad_() for name, x in stack(trees).items()}
    loss_C, _ = cohort.loss(params_C, {}, _batch())
    grads = torch.autograd.grad(loss_C.sum(), list(params_C.values()), allow_unused=True, materialize_grads=True)
    return loss_C.detach(), dict(zip(params_C, grads, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "more"),
    [("deberta-v2", {"share_att_key": True}), ("deberta-v2", {"share_att_key": False}), ("deberta", {})],
)
def test_a_shared_call_of_three_clients_is_pefts(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = _model(family, tmp_path, **more)
    spec = Lora(targets="all-linear", rank=2, alpha=4.0, heads=whole_layers(model, (), classifier=True))
    cohort = ClassifierCohort(model, adapter=spec, name=family, reference=False)
    assert cohort.alone is None
    trees = _starts(cohort)
    loss_C, grads = _grads(cohort, trees)
    layers = sorted({name.removesuffix(".lora_A") for name in trees[0] if name.endswith("lora_A")})
    table = [name for name in layers if name.rpartition(".")[2].startswith(("pos_", "key_proj"))]
    assert table
    batch, moved = _batch(), 0.0
    for c, tree in enumerate(trees):
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=layers, modules_to_save=list(spec.heads)
        )
        lone = peft.get_peft_model(copy.deepcopy(model), config).eval()
        inside = dict(lone.named_parameters())
        own = {}
        for name, x in tree.items():
            path, _, leaf = name.rpartition(".")
            low = leaf.startswith("lora")
            own[name] = inside[
                f"base_model.model.{path}." + (f"{leaf}.default.weight" if low else f"modules_to_save.default.{leaf}")
            ]
            own[name].data = x.detach().clone()
        logits = lone(input_ids=batch["input_ids_CBT"][c], attention_mask=batch["attention_mask_CBT"][c]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels_CB"][c], reduction="sum")
        torch.testing.assert_close(loss_C[c], loss.detach(), rtol=0, atol=1e-5)
        for name, grad in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            torch.testing.assert_close(grads[name][c], grad, rtol=1e-5, atol=1e-5)
            moved = max(moved, float(grad.abs().max()) if name.rpartition(".")[0] in table else 0.0)
    assert moved > 1e-4  # the table's own adapters learn


@pytest.mark.parametrize("kind", ["ia3", "bitfit", "whole"])
def test_other_adapters_too_give_in_company_what_they_give_alone(kind: str, tmp_path: Path) -> None:
    model = _model("deberta-v2", tmp_path, share_att_key=False)
    heads = whole_layers(model, ("pos_key_proj",) if kind == "whole" else (), classifier=True)
    spec: Any = {
        "ia3": IA3(targets=("pos_key_proj", "pos_query_proj", "value_proj"), heads=heads),
        "bitfit": BitFit(heads=heads),
        "whole": Lora(targets=("value_proj",), rank=2, heads=heads),
    }[kind]
    cohort = ClassifierCohort(model, adapter=spec, name=kind, reference=False)
    alone = ClassifierCohort(model, adapter=spec, name=kind, reference=True)
    # A norm of the table itself has no client by client form: then each client has a call of its own.
    assert (cohort.alone is not None) == (kind == "bitfit")
    trees = _starts(cohort)
    (one_C, ones), (other_C, others) = _grads(cohort, trees), _grads(alone, trees)
    torch.testing.assert_close(one_C, other_C, rtol=0, atol=1e-5)
    for name, grad in ones.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-5, atol=1e-5)

"""What a checkpoint lacks is trained and travels with the adapter: PEFT, elsewhere, gives the run's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.whole_layers import lacked_layers, whole_layers
from lichen.models.adapters.wrap import wrap
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.loading.classifier import load_classifier
from lichen.models.peft.format import save_adapter
from lichen.models.peft.merge import merge
from support.bare_checkpoints import FAMILIES, VOCABULARY, save_bare

CLASSES = 3
LAW = [family for family in FAMILIES if family not in ("deberta", "funnel", "bart")]
ELSEWHERE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification as Auto, logging
logging.set_verbosity_error()
torch.set_num_threads(1)
found = {}
for name, base, adapter, ids in json.load(open(sys.argv[1])):
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        model = PeftModel.from_pretrained(Auto.from_pretrained(base, num_labels=3), adapter).eval()
        with torch.no_grad():
            found[f"{name} {seed}"] = [model(input_ids=torch.tensor([row])).logits[0].tolist() for row in ids]
json.dump(found, open(sys.argv[2], "w"))
"""


def _ids(model: Any) -> list[list[int]]:
    """Rows that end as this model's own tokenizer would end them."""
    pad, end = model.config.pad_token_id, getattr(model.config, "eos_token_id", None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (4, 7), generator=generator)
    assert pad not in rows
    if isinstance(end, int):
        rows[:, -1] = end
    return [row.tolist() for row in rows]


def _trained(model: Any, spec: Lora) -> Tree:
    generator = torch.Generator().manual_seed(1)
    start = wrap(model, spec).init(0)
    return {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in start.items()}


def _own(cohort: ClassifierCohort, tree: Tree, ids: list[list[int]], *, clients: int = 1) -> torch.Tensor:
    """The run's own logits, of one client or of several side by side."""
    ids_CBT = torch.tensor(ids).reshape(clients, -1, len(ids[0]))
    batch = {
        "active_C": torch.ones(clients, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": torch.ones_like(ids_CBT),
        "index_CB": torch.zeros(ids_CBT.shape[:2], dtype=torch.int64),
    }
    with torch.no_grad():
        stacked = {name: x.expand(clients, *x.shape).contiguous() for name, x in tree.items()}
        return cohort.logits(stacked, {}, batch).flatten(0, 1)


@pytest.mark.filterwarnings("ignore")
def test_peft_in_a_fresh_process_gives_the_runs_logits_at_any_seed(tmp_path: Path) -> None:
    jobs, own = [], {}
    for family in LAW:
        targets = FAMILIES[family][3]
        base = save_bare(family, tmp_path / family)
        model, _ = load_classifier(base, classes=CLASSES, seed=7)
        assert lacked_layers(model)
        spec = Lora(targets=targets, rank=2, heads=whole_layers(model, (), classifier=True))
        tree, ids = _trained(model, spec), _ids(model)
        cohort = ClassifierCohort(model, adapter=spec, name=family, reference=False)
        assert (cohort.alone is not None) == (family == "xlnet")
        assert cohort.packed or family not in ("bert", "llama", "qwen2", "gpt2")
        own[family] = _own(cohort, tree, ids, clients=2)
        torch.testing.assert_close(_own(cohort, tree, ids), own[family], rtol=0, atol=1e-5)
        with torch.no_grad():
            merged = merge(model, tree, spec=spec)
            whole = torch.cat([merged(input_ids=torch.tensor([row])).logits for row in ids])
        torch.testing.assert_close(whole, own[family], rtol=0, atol=1e-5)
        save_adapter(tmp_path / family / "adapter", tree, spec=spec, base_name=str(base), task="SEQ_CLS")
        jobs.append([family, str(base), str(tmp_path / family / "adapter"), ids])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path / "jobs.json"), str(tmp_path / "found.json")],
        check=True,
        timeout=300,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    off = {name: float((torch.tensor(logits) - own[name.split()[0]]).abs().max()) for name, logits in found.items()}
    assert len(off) == 3 * len(LAW)
    assert max(off.values()) <= 1e-5, off


def test_the_names_of_what_is_trained_whole(tmp_path: Path) -> None:
    found = {}
    for family in ("bert", "distilbert", "deberta-v2", "roberta", "xlnet", "albert", "llama", "t5"):
        model, _ = load_classifier(save_bare(family, tmp_path / family), classes=CLASSES, seed=7)
        found[family] = whole_layers(model, (), classifier=True)
    assert found == {
        "bert": ("classifier", "bert.pooler.dense"),
        "distilbert": ("classifier", "pre_classifier"),
        "deberta-v2": ("classifier", "pooler.dense"),
        "roberta": ("classifier",),
        "xlnet": ("sequence_summary", "logits_proj"),
        "albert": ("classifier", "albert.pooler"),
        "llama": ("score",),
        "t5": ("classification_head",),
    }
    # What is named stays; what was lacking, and the head that PEFT asks for, come to it.
    model, _ = load_classifier(tmp_path / "bert", classes=CLASSES, seed=7)
    assert whole_layers(model, ("embeddings.LayerNorm",), classifier=True)[0] == "embeddings.LayerNorm"
    assert set(whole_layers(model, ("bert.pooler",), classifier=True)) == {"bert.pooler", "classifier"}


def test_a_checkpoint_that_lacks_nothing_but_its_head_is_trained_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_bare("bert", tmp_path)
    config = hf.BertConfig.from_pretrained(tmp_path)
    hf.BertModel(config).save_pretrained(tmp_path)  # with its pooler, as sentence encoders are saved
    model, _ = load_classifier(tmp_path, classes=CLASSES, seed=7)
    assert lacked_layers(model) == ("classifier",)
    assert whole_layers(model, (), classifier=True) == ("classifier",)


@pytest.mark.filterwarnings("ignore")
def test_layers_of_gpt2_are_trained_whole_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, _ = load_classifier(save_bare("gpt2", tmp_path / "gpt2"), classes=CLASSES, seed=7)
    spec = Lora(targets=("c_attn",), rank=2, heads=whole_layers(model, ("h.1.mlp.c_fc",), classifier=True))
    assert spec.heads == ("h.1.mlp.c_fc", "score")
    tree, ids = _trained(model, spec), _ids(model)
    assert tree["transformer.h.1.mlp.c_fc.weight"].shape == (16, 64)
    with torch.no_grad():
        merged = merge(model, tree, spec=spec)
        whole = torch.cat([merged(input_ids=torch.tensor([row])).logits for row in ids])
    cohort = ClassifierCohort(model, adapter=spec, name="gpt2", reference=False, prove=False)
    torch.testing.assert_close(_own(cohort, tree, ids, clients=2), whole, rtol=0, atol=1e-5)
    llama, _ = load_classifier(save_bare("llama", tmp_path / "llama"), classes=CLASSES, seed=7)
    with pytest.raises(LichenError, match=r"model\.norm is a LlamaRMSNorm, which cannot be trained whole"):
        wrap(llama, Lora(targets=("q_proj",), heads=("model.norm",)))


def test_an_end_that_peft_would_find_elsewhere_is_written_in_full(tmp_path: Path) -> None:
    model, _ = load_classifier(save_bare("electra", tmp_path), classes=CLASSES, seed=7)
    # PEFT would take every ...LayerNorm for a "Norm"; and "embeddings" is the end of "position_embeddings".
    heads = whole_layers(model, ("embeddings",), classifier=False)
    assert heads == ("electra.embeddings",)

"""An adapter of another package, by the example of DoRA: one file and an entry point, from a recipe to PEFT."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import equality
import peft
import pytest
import torch
from torch import Tensor

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.core.tree import Tree, stack
from lichen.models.adapters import table
from lichen.models.adapters.kind import kind_of
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.wrap import wrap
from lichen.models.causal_cohort import CausalCohort
from lichen.models.peft.format import save_adapter
from lichen.models.peft.merge import merge
from lichen.models.peft.start import start_from
from lichen.recipes.schema.model import AdapterConfig
from lichen.recipes.schema.read import read_recipe, write_recipe
from support.tiny_llama import recipe, save_model, save_rows

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLE = Path(__file__).parents[3] / "examples" / "extending"
SPEC = Lora(targets=("q_proj", "down_proj"), rank=4, alpha=12.0)


def register(site: Path, **entries: str) -> Path:
    """What installing a package leaves: its entry points."""
    info = site / "third_party-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    lines = [f"{word} = {value}" for word, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lichen.adapters]", *lines]) + "\n")
    return site


@pytest.fixture
def dora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.syspath_prepend(register(tmp_path / "site", dora="dora:DORA"))
    table.added.cache_clear()
    yield importlib.import_module("dora")
    table.added.cache_clear()


def logits(model: Any) -> Tensor:
    ids = torch.tensor([[1, 7, 9, 20, 11, 2], [1, 30, 31, 8, 8, 12]])
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found


def own_logits(model: Any, spec: Any, tree: Tree) -> Tensor:
    ids = torch.tensor([[1, 7, 9, 20, 11, 2], [1, 30, 31, 8, 8, 12]])
    with torch.no_grad():
        found: Tensor = wrap(model, spec).call({name: x[None] for name, x in tree.items()}, {}, input_ids=ids).logits
    return found


def test_lichen_run_trains_it_peft_reads_it_and_it_merges(dora: Any, tmp_path: Path) -> None:
    """The command itself, in a process that knows the package by nothing but its entry point."""
    import transformers as hf

    model = save_model(tmp_path / "model")
    section = {"kind": "dora", "target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4}
    written = recipe(
        model, save_rows(tmp_path / "rows.jsonl", "pair"), "pair",
        model={"adapter": section}, compare={"baselines": ["base", "alone"]},
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(write_recipe(read_recipe(written)))
    paths = os.pathsep.join([str(tmp_path / "site"), str(EXAMPLE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lichen", "run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=300)
    assert done.returncode == 0, done.stderr
    columns = json.loads((tmp_path / "run" / "summary.json").read_text())["columns"]
    assert columns["federated"]["mean"] < columns["base"]["mean"]

    tree, _ = load_tree(tmp_path / "run" / "state" / "final.safetensors")
    base = hf.AutoModelForCausalLM.from_pretrained(model)
    spec = kind_of("dora").build(read_recipe(written).model.adapter, ())
    moved = {name: x for name, x in wrap(base, spec).init(0).items() if not torch.equal(x, tree[name])}
    assert moved.keys() == tree.keys(), "every tensor is trained, the magnitudes among them"
    own = own_logits(base, spec, tree)
    assert float((own - logits(base)).abs().max()) > 1e-2
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    lone = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "run" / "adapter"))
    assert any("lora_magnitude_vector" in name for name, _ in lone.named_parameters())
    torch.testing.assert_close(logits(lone), own, rtol=0, atol=1e-5)
    assert "take LoRA without other modules only" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    whole = hf.AutoModelForCausalLM.from_pretrained(lichen.export(tmp_path / "run", merge=True))
    torch.testing.assert_close(logits(whole), own, rtol=0, atol=1e-5)
    before, after = lichen.talk(tmp_path / "run").answer("w1 w2 w3")
    assert before
    assert after


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_starts_as_the_base_and_peft_and_the_merged_model_agree(
    dora: Any, tmp_path: Path, architecture: Literal["llama", "gpt2"]
) -> None:
    targets = SPEC.targets if architecture == "llama" else ("c_attn", "mlp.c_proj")
    spec = dora.Dora(Lora(targets=targets, rank=4, alpha=12.0))
    model = equality.tiny(architecture, dtype=torch.float64)
    assert spec.kind is kind_of("dora")
    torch.testing.assert_close(own_logits(model, spec, wrap(model, spec).init(3)), logits(model))
    tree = equality.start_of(wrap(model, spec), 1)[0]
    own = own_logits(model, spec, tree)
    torch.testing.assert_close(logits(merge(model, tree, spec=spec)), own, rtol=1e-10, atol=1e-12)
    save_adapter(tmp_path / "adapter", tree, spec=spec, base_name="tiny", task="CAUSAL_LM")
    lone = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(lone), own, rtol=1e-8, atol=1e-10)
    wrapped = wrap(model, spec)
    begun = start_from(tmp_path / "adapter", wrapped, wrapped.init(5))
    assert all(torch.equal(begun.tree[name], x) for name, x in tree.items())
    plain = wrap(model, spec.lora)
    with pytest.raises(LichenError, match="use_dora=True, which is not computed here"):
        start_from(tmp_path / "adapter", plain, plain.init(0))
    save_adapter(tmp_path / "plain", plain.init(0), spec=spec.lora, base_name="tiny", task="CAUSAL_LM")
    with pytest.raises(LichenError, match="of kind lora, the run's is dora"):
        start_from(tmp_path / "plain", wrapped, wrapped.init(0))


def test_gradients_are_those_of_peft(dora: Any) -> None:
    cohort = CausalCohort(equality.tiny("llama"), adapter=dora.Dora(SPEC), name="llama", reference=True)
    start, batch = equality.start_of(cohort, 1)[0], equality.batch_of("llama", clients=1)
    params_C = {name: x.requires_grad_() for name, x in stack([start]).items()}
    loss_C, _ = cohort.loss(params_C, {}, batch)
    grads = dict(zip(params_C, torch.autograd.grad(loss_C.sum(), list(params_C.values())), strict=True))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=list(SPEC.targets), use_dora=True
    )
    lone = peft.get_peft_model(copy.deepcopy(equality.tiny("llama")), config, autocast_adapter_dtype=False).eval()
    theirs = dict(lone.named_parameters())
    mine = {name: theirs[f"base_model.model.{name}.default.weight"] for name in start}
    for name, parameter in mine.items():
        parameter.data = start[name].clone()
    inputs = {"input_ids": batch["input_ids_CBT"][0], "attention_mask": batch["attention_mask_CBT"][0]}
    labels = batch["labels_CBT"][0][:, 1:].flatten()
    logits_BTV = lone(**inputs).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels, ignore_index=-100, reduction="sum").backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(grads[name][0], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_clients_that_share_a_call_are_the_reference(dora: Any, packed: bool) -> None:
    made = {
        shared: CausalCohort(
            equality.tiny("llama"),
            adapter=dora.Dora(SPEC),
            name="llama",
            reference=not shared,
            packed=packed and shared,
        )
        for shared in (False, True)
    }
    assert made[True].packed == packed
    starts, batch = equality.start_of(made[False], 3), equality.batch_of("llama", clients=3)
    found = []
    for cohort in made.values():
        params_C = {name: x.requires_grad_() for name, x in stack(starts).items()}
        loss_C, _ = cohort.loss(params_C, {}, batch)
        found.append((loss_C.detach(), torch.autograd.grad(loss_C.sum(), list(params_C.values()))))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


CHAT: dict[str, Any] = {"task": "chat", "model": {"name": "tiny"}, "data": {"name": "rows.jsonl"}}


def test_what_it_does_not_allow_is_refused(dora: Any) -> None:
    assert read_recipe(CHAT, ["model.adapter.kind=dora"]).rule == "mean"
    assert read_recipe(CHAT, ["model.adapter.kind=dora", "model.adapter.last=1"]).model.adapter.last == 1
    with pytest.raises(LichenError, match=r"federation\.aggregate: dora has no LoRA factors"):
        read_recipe(CHAT, ["model.adapter.kind=dora", "federation.aggregate=fedex"])
    with pytest.raises(LichenError, match=r"model\.adapter\.exclude: dora has none"):
        read_recipe(CHAT, ["model.adapter.kind=dora", "model.adapter.exclude=lm_head"])


SECTION = """
from dataclasses import replace
from typing import Literal
from pydantic import Field
from lichen.models.adapters.lora import LORA
from lichen.recipes.schema.model import AdapterConfig

class Section(AdapterConfig):
    kind: Literal["scaled"]
    factors: tuple[float, ...] = Field(default=(1.0,), description="what B A is multiplied by")

SCALED = replace(LORA, facts=replace(LORA.facts, word="scaled", section=Section))
NOTHING = 3
"""


def test_a_kind_may_bring_keys_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scaled_adapter.py").write_text(SECTION)
    site = register(tmp_path / "site", scaled="scaled_adapter:SCALED", odd="scaled_adapter:NOTHING", gone="no_such:X")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(site)
    table.added.cache_clear()
    read = read_recipe(CHAT, ["model.adapter={kind: scaled, factors: [2, 3], target_modules: [k_proj]}"])
    adapter: Any = read.model.adapter
    assert (adapter.factors, adapter.target_modules) == ((2.0, 3.0), ("k_proj",))
    (tmp_path / "recipe.yaml").write_text(write_recipe(read))
    assert read_recipe(tmp_path / "recipe.yaml") == read
    with pytest.raises(LichenError, match=r"model\.adapter\.factor: unknown key\n.*did you mean 'factors'"):
        read_recipe(CHAT, ["model.adapter={kind: scaled, factor: [2]}"])
    with pytest.raises(LichenError, match=r"model\.adapter\.rank: must be a whole number"):
        read_recipe(CHAT, ["model.adapter={kind: scaled, rank: many}"])
    with pytest.raises(LichenError, match=r"model\.adapter\.kind: what is registered as the adapter odd"):
        read_recipe(CHAT, ["model.adapter.kind=odd"])
    with pytest.raises(LichenError, match=r"model\.adapter\.kind: the adapter gone of no_such:X does not load"):
        read_recipe(CHAT, ["model.adapter.kind=gone"])
    table.added.cache_clear()


def test_recipes_are_read_without_torch_and_no_other_package_is_loaded(tmp_path: Path) -> None:
    site = register(tmp_path / "site", other="no_such:X")
    code = (
        "import sys\nfrom lichen.recipes.schema.read import read_recipe\n"
        f"read_recipe({CHAT!r}, ['model.adapter={{kind: ia3, feedforward_modules: [down_proj]}}'])\n"
        "print('torch' in sys.modules)"
    )
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_every_built_in_kind_is_its_own_object() -> None:
    for word, facts in table.BUILT_IN.items():
        assert facts.word == word
        assert set(facts.keys) <= AdapterConfig.model_fields.keys()
        if facts.code:
            kind = kind_of(word)
            assert kind.facts is facts
            spec = kind.build(AdapterConfig(kind=word, target_modules=("q_proj",)), ("classifier",))
            assert spec.kind is kind
            assert spec.heads == ("classifier",)
        else:
            with pytest.raises(LichenError, match="is no kind of adapter"):
                kind_of(word)

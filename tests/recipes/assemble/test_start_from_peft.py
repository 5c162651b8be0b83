"""A recipe that starts from a PEFT adapter begins with PEFT's logits, and what it writes loads elsewhere by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import lichen
from lichen.core.errors import LichenError
from lichen.models.adapters.wrap import Wrapped
from lichen.recipes.assemble.model import described_base
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.schema.read import read_recipe
from support.peft_names import with_peft_names
from support.tiny_llama import recipe, save_model, save_rows

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save_model(folder / "model")
    for shape in ("pair", "label"):
        save_rows(folder / f"{shape}.jsonl", shape)  # type: ignore[arg-type]
    return folder


def base(home: Path, task: str) -> Any:
    if task == "CAUSAL_LM":
        return hf.AutoModelForCausalLM.from_pretrained(home / "model")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return hf.AutoModelForSequenceClassification.from_pretrained(home / "model", num_labels=3)


def save_adapter(home: Path, folder: Path, kind: type[peft.PeftConfig], task: str, **fields: Any) -> None:
    """What PEFT writes once every tensor has moved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lone = peft.get_peft_model(base(home, task), kind(task_type=task, **fields))
    generator = torch.Generator().manual_seed(1)
    for parameter in lone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    lone.save_pretrained(folder)


def open_from_peft(home: Path, task: str, adapter: dict[str, Any], said: list[str] | None = None) -> LoadedExperiment:
    shape = "pair" if task == "CAUSAL_LM" else "label"
    model = {"name": str(home / "model"), "adapter": adapter}
    read = read_recipe(recipe(home / "model", home / f"{shape}.jsonl", shape, model=model))  # type: ignore[arg-type]
    return open_recipe(read, say=[].append if said is None else said.append)


def logits(call: Callable[..., Any]) -> torch.Tensor:
    """Of two whole rows."""
    ids = torch.tensor([[1, 7, 9, 20, 11, 2], [1, 30, 31, 8, 8, 12]])
    with torch.no_grad():
        found: torch.Tensor = call(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found[:, -6:] if found.dim() == 3 else found


def begins(it: LoadedExperiment) -> torch.Tensor:
    """The run's logits before its first round."""
    wrapped: Wrapped = it.experiment.model.wrapped  # type: ignore[attr-defined]
    start = {name: x[None] for name, x in it.experiment.start.trainable.items()}
    return logits(lambda **rows: wrapped.call(start, {}, **rows))


def of_peft(home: Path, task: str, folder: Path) -> torch.Tensor:
    """What a stranger's PEFT makes of the folder."""
    return logits(peft.PeftModel.from_pretrained(with_peft_names(base(home, task)), str(folder)).eval())


QV, KV = ["q_proj", "v_proj"], ["k_proj", "v_proj"]
KINDS: dict[str, tuple[type[peft.PeftConfig], dict[str, Any], dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 16, "target_modules": QV}, {"rank": 4, "alpha": 16}),
    "lora, use_rslora": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 16, "target_modules": QV, "use_rslora": True},
        {"rank": 4, "alpha": 16, "rslora": True},
    ),
    "lora, alpha_pattern": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 16, "target_modules": QV, "alpha_pattern": {"q_proj": 64}},
        {"rank": 4, "alpha": 16},
    ),
    "lora, rank_pattern": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 16, "target_modules": QV, "rank_pattern": {"q_proj": 2}},
        {"rank": 4, "alpha": 16},
    ),
    "ia3": (peft.IA3Config, {"target_modules": KV, "feedforward_modules": []}, {"kind": "ia3", "target_modules": KV}),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}, {"kind": "prompt", "num_virtual_tokens": 4}),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}, {"kind": "prefix", "num_virtual_tokens": 4}),
}


# A causal classifier with a prefix cannot be run in PEFT.
CASES = [(task, kind) for task in ("CAUSAL_LM", "SEQ_CLS") for kind in KINDS if (task, kind) != ("SEQ_CLS", "prefix")]


@pytest.mark.parametrize(("task", "kind"), CASES)
def test_a_run_begins_with_pefts_logits(task: str, kind: str, home: Path, tmp_path: Path) -> None:
    of, fields, ours = KINDS[kind]
    save_adapter(home, tmp_path, of, task, **fields)
    it = open_from_peft(home, task, {**ours, "init_from": str(tmp_path)})
    wanted = of_peft(home, task, tmp_path)
    torch.testing.assert_close(begins(it), wanted, rtol=0, atol=1e-5)
    assert float((wanted - logits(base(home, task).eval())).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (
            {"rank": 4, "alpha": 16, "rslora": True},
            r"model\.adapter\.rslora: .* false, the run true\n.*set it to false",
        ),
        ({"rank": 4, "alpha": 8}, r"model\.adapter\.alpha: .* lora_alpha 16, the run 8\n.*set it to 16"),
        ({"rank": 8, "alpha": 16}, r"model\.adapter\.rank: .* rank 4, the run 8\n.*set it to 4"),
        (
            {"rank": 4, "alpha": 16, "target_modules": ["k_proj", "v_proj"]},
            r"model\.adapter\.target_modules: .*q_proj', which the run does not train\n.*\[k_proj, q_proj, v_proj\]",
        ),
        ({"rank": 4, "alpha": 16, "last": 1}, r"model\.adapter\.last: .*does not train\n.*leave it out"),
        ({"kind": "ia3", "target_modules": QV}, r"model\.adapter\.kind: .* of kind lora, the run's is ia3\n.*to lora"),
        ({"kind": "full"}, r"model\.adapter\.init_from: kind: full does not start from a PEFT adapter"),
        ({"kind": "bottleneck"}, r"model\.adapter\.init_from: kind: bottleneck does not"),
    ],
)
def test_what_the_recipe_says_otherwise_is_named_with_its_key_and_value(
    ours: dict[str, Any], message: str, home: Path, tmp_path: Path
) -> None:
    save_adapter(home, tmp_path, peft.LoraConfig, "CAUSAL_LM", r=4, lora_alpha=16, target_modules=QV)
    with pytest.raises(LichenError, match=message):
        open_from_peft(home, "CAUSAL_LM", {**ours, "init_from": str(tmp_path)})


def test_what_was_assumed_is_said(home: Path, tmp_path: Path) -> None:
    save_adapter(
        home, tmp_path, peft.LoraConfig, "CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj"], lora_dropout=0.1
    )
    said: list[str] = []
    open_from_peft(home, "CAUSAL_LM", {"rank": 4, "alpha": 16, "init_from": str(tmp_path)}, said)
    notes = [line.removeprefix("model.adapter.init_from: ") for line in said if line.startswith("model.adapter.init")]
    assert notes == [
        "the adapter was trained with lora_dropout 0.1; the run trains without",
        "2 of the run's layers are not in the adapter; they start as the base",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/another"}))
    open_from_peft(home, "CAUSAL_LM", {"rank": 4, "alpha": 16, "init_from": str(tmp_path)}, said)
    assert any("the adapter was made on org/another; it is computed on" in line for line in said)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "prefix"])
def test_what_a_run_wrote_loads_by_itself_and_starts_another(kind: str, home: Path, tmp_path: Path) -> None:
    _, _, ours = KINDS[kind]
    model = {"name": str(home / "model"), "adapter": ours}
    whole = recipe(home / "model", home / "pair.jsonl", "pair", model=model, federation={"rounds": 1})
    result = lichen.run(whole, out=tmp_path / "run")
    assert result.adapter is not None
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "model")
    lone = peft.AutoPeftModelForCausalLM.from_pretrained(result.adapter)
    it = open_from_peft(home, "CAUSAL_LM", {**ours, "init_from": str(result.adapter)})
    torch.testing.assert_close(logits(lone.eval()), begins(it), rtol=0, atol=1e-5)


def test_the_base_is_named_in_full_and_one_that_lies_nowhere_as_what_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    near, rows = hf.AutoModelForCausalLM.from_pretrained("./model"), home / "pair.jsonl"

    def named(**section: Any) -> str:
        return described_base(read_recipe(recipe(home / "model", rows, "pair", model=section)), near)

    assert named() == str(home / "model")
    assert named(layers=1) == f"{home / 'model'} (its first 1 layers)"
    assert named(random=True).startswith(f"{home / 'model'} (drawn anew from seed ")
    near.config._name_or_path = "org/name"
    assert named() == "org/name"


def test_an_adapter_of_a_base_cut_short_starts_another_run_on_it_without_a_word(home: Path, tmp_path: Path) -> None:
    short = {"layers": 1, "adapter": {"rank": 2, "alpha": 4}}
    whole = recipe(home / "model", home / "pair.jsonl", "pair", model=short, federation={"rounds": 1})
    first = lichen.run(whole, out=tmp_path / "run")
    said: list[str] = []
    short["adapter"] = {"rank": 2, "alpha": 4, "init_from": str(first.adapter)}
    open_recipe(read_recipe(recipe(home / "model", home / "pair.jsonl", "pair", model=short)), say=said.append)
    assert not [line for line in said if "init_from" in line]
    with pytest.raises((OSError, ValueError)):
        peft.AutoPeftModelForCausalLM.from_pretrained(first.adapter)


def test_a_heads_rows_go_to_the_classes_of_the_same_names(home: Path, tmp_path: Path) -> None:
    of, fields, ours = KINDS["lora"]
    save_adapter(home, tmp_path, of, "SEQ_CLS", **fields)
    wanted = of_peft(home, "SEQ_CLS", tmp_path)
    said: list[str] = []
    adapter = {**ours, "init_from": str(tmp_path)}
    torch.testing.assert_close(begins(open_from_peft(home, "SEQ_CLS", adapter, said)), wanted, rtol=0, atol=1e-5)
    assert any("does not name its classes; its head's rows are taken for calm, glad, sad" in line for line in said)
    (tmp_path / "classes.json").write_text(json.dumps(["sad", "calm", "glad"]))
    it = open_from_peft(home, "SEQ_CLS", adapter, said)
    assert it.classes == ("calm", "glad", "sad")
    torch.testing.assert_close(begins(it), wanted[:, [1, 2, 0]], rtol=0, atol=1e-5)
    assert any("put in the order calm, glad, sad" in line for line in said)
    (tmp_path / "classes.json").write_text(json.dumps(["bad", "calm", "glad"]))
    with pytest.raises(LichenError, match="the adapter's classes are bad, calm, glad, the run's calm, glad, sad"):
        open_from_peft(home, "SEQ_CLS", adapter)

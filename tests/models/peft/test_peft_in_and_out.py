"""PEFT in and out, over the fields of its configurations and many architectures: the same logits, or a refusal by name.

``python tests/models/peft/test_peft_in_and_out.py`` prints the largest difference of each architecture and each way.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.kind import Spec, kind_claiming, peft_types
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.adapters.wrap import Wrapped, wrap
from lichen.models.peft.config import HONOURED as HONOURED_BY_ALL
from lichen.models.peft.config import IDLE as IDLE_FOR_ALL
from lichen.models.peft.format import save_adapter
from lichen.models.peft.start import Begun, start_from
from support.peft_names import with_peft_names
from support.tiny_families import FAMILIES, Family, made, rows

pytestmark = pytest.mark.filterwarnings("ignore")
BOUND = 1e-5

CLASSES = {
    "LORA": peft.LoraConfig,
    "IA3": peft.IA3Config,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
}


def logits_of(model: Any, *, padded: bool = True) -> Tensor:
    """Of a plain or a PEFT model, where a token is real."""
    batch = rows(padded=padded)
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return real(logits, batch["attention_mask"])


def real(logits: Tensor, mask_BT: Tensor) -> Tensor:
    """A language model's logits at real tokens (virtual ones are cut off), or a classifier's."""
    return logits[:, -mask_BT.shape[1] :][mask_BT.bool()] if logits.dim() == 3 else logits


def own_logits(wrapped: Wrapped, tree: Tree, *, padded: bool = True) -> Tensor:
    batch = rows(padded=padded)
    with torch.no_grad():
        logits: Tensor = wrapped.call({name: x[None] for name, x in tree.items()}, {}, **batch).logits
    return real(logits, batch["attention_mask"])


def trained(family: str, config: peft.PeftConfig, folder: Path) -> None:
    """What PEFT writes of an adapter whose every tensor has been moved."""
    model = copy.deepcopy(made(family))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lone = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in lone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    lone.save_pretrained(folder)


def peft_logits(family: str, folder: Path, *, padded: bool = True) -> Tensor:
    """What a stranger's PEFT makes of the folder."""
    base = with_peft_names(copy.deepcopy(made(family)))
    return logits_of(peft.PeftModel.from_pretrained(base, str(folder)).eval(), padded=padded)


NO_PREFIX = ("deberta-v2", "distilbert", "modernbert")
"""They take no keys and values from outside, and a prefix is refused."""
NOT_IN_PEFT = ("llama-classifier",)
"""PEFT's formula for a classifier with a prefix takes the cache of a causal one for what is to be pooled."""
NOT_FROM_PEFT = ("falcon",)
"""PEFT draws a prefix for more heads than the model has keys and values of."""


def is_padded(name: str, spec: Spec) -> bool:
    """PEFT lets a causal classifier with virtual tokens pool the last token, padding or not: no row is padded then."""
    return not (name == "llama-classifier" and isinstance(spec, Prompt | Prefix))


def begin(family: str, spec: Spec, folder: Path, **more: Any) -> tuple[Wrapped, Begun]:
    wrapped = wrap(made(family), spec)
    return wrapped, start_from(folder, wrapped, wrapped.init(0), **more)


def lora_of(family: Family, **more: Any) -> Lora:
    return Lora(**{"targets": family.targets, "rank": 4, "alpha": 12.0, "heads": family.head, **more})  # type: ignore[arg-type]


def lora_config(family: Family, **more: Any) -> peft.LoraConfig:
    own = {"r": 4, "lora_alpha": 12, "target_modules": list(family.targets), "task_type": family.task}
    saved = {"modules_to_save": list(family.head)} if family.head else {}
    return peft.LoraConfig(**{**own, **saved, **more})


Case = tuple[dict[str, Any], dict[str, Any]]


def _cases(family: Family) -> dict[str, Case]:
    """PEFT's fields, and the recipe that starts from them."""
    first, last = family.targets[0], family.targets[-1]
    whole = "|".join(family.targets).replace(".", r"\.")
    return {
        "plain": ({}, {}),
        "use_rslora": ({"use_rslora": True}, {"rslora": True}),
        "alpha_pattern": ({"alpha_pattern": {first: 40}}, {"alpha": 40.0 if first == last else 12.0}),
        "alpha_pattern of one layer": ({"alpha_pattern": {rf"{family.blocks}\.1\..*{last}": 5}}, {}),
        "rank_pattern": ({"rank_pattern": {rf"{family.blocks}\.0\..*{first}": 2}}, {}),
        "rank_pattern, above r": ({"rank_pattern": {rf"{family.blocks}\.0\..*{first}": 6}}, {"rank": 6}),
        "patterns with rslora": (
            {"use_rslora": True, "rank_pattern": {rf".*\.0\..*{first}": 1}, "alpha_pattern": {rf".*\.1\..*{last}": 3}},
            {"rslora": True},
        ),
        "one pattern for all": ({"r": 2, "rank_pattern": {f".*({whole})": 4}}, {}),
        "target_modules, a pattern": ({"target_modules": rf".*\.1\..*\.({whole})"}, {}),
        "target_modules, all-linear": ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        "exclude_modules": ({"exclude_modules": rf".*\.0\..*{first}"}, {}),
        "layers_to_transform": ({"layers_to_transform": [1]}, {}),
        "layers_to_transform, last": ({"layers_to_transform": 1, "layers_pattern": family.blocks}, {"last": 1}),
        "init_lora_weights, gaussian": ({"init_lora_weights": "gaussian"}, {}),
        "init_lora_weights, false": ({"init_lora_weights": False}, {}),
        "init_lora_weights, orthogonal": ({"init_lora_weights": "orthogonal"}, {}),
        "lora_dropout": ({"lora_dropout": 0.3}, {}),
        "fan_in_fan_out": ({"fan_in_fan_out": True}, {}),
    }


Row = tuple[str, str, str, float]
"""Architecture, way, case, largest difference."""


def lora_in(name: str, folder: Path) -> Iterator[Row]:
    """Each adapter that PEFT wrote, started from."""
    family = FAMILIES[name]
    bare = logits_of(made(name))
    for case, (theirs, ours) in _cases(family).items():
        into = folder / case
        trained(name, lora_config(family, **theirs), into)
        wrapped, begun = begin(name, lora_of(family, **ours), into)
        wanted = peft_logits(name, into)
        assert float((wanted - bare).abs().max()) > 1e-2, f"{case}: the adapter does nothing"
        yield name, "in", case, float((own_logits(wrapped, begun.tree) - wanted).abs().max())


def others_in(name: str, folder: Path) -> Iterator[Row]:
    """IA3 and virtual tokens that PEFT wrote, started from."""
    family, task = FAMILIES[name], FAMILIES[name].task
    layers = [*family.targets, *family.feedforward]
    feed = list(family.feedforward)
    saved = {"modules_to_save": list(family.head)} if family.head else {}
    # Where the embedding is narrower than the model, or sizes have other names, PEFT must be told.
    sizes = {"token_dim": made(name).get_input_embeddings().embedding_dim, "num_layers": 2, "num_attention_heads": 4}
    every: dict[str, tuple[peft.PeftConfig, Spec]] = {
        "ia3": (
            peft.IA3Config(task_type=task, target_modules=layers, feedforward_modules=feed, **saved),
            IA3(targets=family.targets, feedforward=family.feedforward, heads=family.head),
        ),
        "prompt": (
            peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3, **sizes, **saved),
            Prompt(tokens=3, heads=family.head),
        ),
    }
    if name not in (*NO_PREFIX, *NOT_IN_PEFT, *NOT_FROM_PEFT):
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, **saved)
        every["prefix"] = config, Prefix(tokens=3, heads=family.head)
    for case, (config, spec) in every.items():
        trained(name, config, folder / case)
        wrapped, begun = begin(name, spec, folder / case)
        padded = is_padded(name, spec)
        wanted, own = peft_logits(name, folder / case, padded=padded), own_logits(wrapped, begun.tree, padded=padded)
        yield name, "in", case, float((own - wanted).abs().max())


def everything_out(name: str, folder: Path) -> Iterator[Row]:
    """What a run wrote, read by PEFT."""
    family = FAMILIES[name]
    specs: dict[str, Spec] = {
        "lora": lora_of(family),
        "lora, rslora": lora_of(family, rslora=True),
        "lora, all-linear": lora_of(family, targets="all-linear"),
        "lora, last": lora_of(family, last=1),
        "ia3": IA3(targets=family.targets, feedforward=family.feedforward, heads=family.head),
        "prompt": Prompt(tokens=3, heads=family.head),
    }
    if name not in (*NO_PREFIX, *NOT_IN_PEFT):
        specs["prefix"] = Prefix(tokens=3, heads=family.head)
    for case, spec in specs.items():
        wrapped = wrap(made(name), spec)
        generator = torch.Generator().manual_seed(2)
        tree = {k: x + 0.1 * torch.randn(x.shape, generator=generator) for k, x in wrapped.init(0).items()}
        save_adapter(folder / case, tree, spec=spec, base_name="tiny", task=family.task)
        padded = is_padded(name, spec)
        wanted, own = peft_logits(name, folder / case, padded=padded), own_logits(wrapped, tree, padded=padded)
        yield name, "out", case, float((own - wanted).abs().max())


WAYS: tuple[Callable[[str, Path], Iterator[Row]], ...] = (lora_in, others_in, everything_out)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_pefts(name: str, way: Callable[[str, Path], Iterator[Row]], tmp_path: Path) -> None:
    far = [row for row in way(name, tmp_path) if not row[3] <= BOUND]
    assert not far


SAMPLES: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "base_model_name_or_path": "another/base",
    "revision": "main",
    "peft_type": "LOKR",
    "task_type": "SEQ_CLS",
    "peft_version": "0.1",
    "inference_mode": False,
    "r": 3,
    "target_modules": ["v_proj"],
    "exclude_modules": ["q_proj"],
    "lora_alpha": 99,
    "lora_dropout": 0.5,
    "fan_in_fan_out": True,
    "bias": "all",
    "modules_to_save": ["embed_tokens"],
    "init_lora_weights": "pissa",
    "layers_to_transform": [1],
    "layers_pattern": "blocks",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 99},
    "megatron_config": {"hidden_size": 1},
    "megatron_core": "another.core",
    "trainable_token_indices": [3, 4],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArBr"},
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [5, 6],
    "qalora_group_size": 8,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 1], [0, 2]],
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_parameters": ["mlp.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1e-4},
    "feedforward_modules": ["v_proj"],
    "init_ia3_weights": False,
    "num_virtual_tokens": 5,
    "token_dim": 16,
    "num_transformer_submodules": 2,
    "num_attention_heads": 1,
    "num_layers": 3,
    "prompt_tuning_init": "SAMPLE_VOCAB",
    "prompt_tuning_init_text": "a text",
    "tokenizer_name_or_path": "another/tokenizer",
    "tokenizer_kwargs": {"use_fast": True},
    "encoder_hidden_size": 5,
    "prefix_projection": True,
    "init_weights": "zero",
}
"""A value of each field that is not its plain one."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Spec]]:
    """A folder of each kind on the llama, and the recipe that starts from it."""
    folder = tmp_path_factory.mktemp("plain")
    common = {"task_type": "CAUSAL_LM"}
    every: dict[str, tuple[peft.PeftConfig, Spec]] = {
        "LORA": (lora_config(FAMILIES["llama"]), lora_of(FAMILIES["llama"])),
        "IA3": (
            peft.IA3Config(**common, target_modules=["q_proj", "v_proj"], feedforward_modules=["q_proj"]),
            IA3(targets=("v_proj",), feedforward=("q_proj",)),
        ),
        "PROMPT_TUNING": (peft.PromptTuningConfig(**common, num_virtual_tokens=3), Prompt(tokens=3)),
        "PREFIX_TUNING": (peft.PrefixTuningConfig(**common, num_virtual_tokens=3), Prefix(tokens=3)),
    }
    for kind, (config, _) in every.items():
        trained("llama", config, folder / kind)
    return {kind: (folder / kind, spec) for kind, (_, spec) in every.items()}


def with_field(folder: Path, into: Path, **fields: Any) -> Path:
    into.mkdir()
    (into / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (into / "adapter_config.json").write_text(json.dumps(config | fields))
    return into


KINDS = peft_types()
FORMATS = {name: kind_claiming({"peft_type": name}).peft for name in KINDS}
HONOURED = {name: HONOURED_BY_ALL | one.honoured for name, one in FORMATS.items()}
IDLE = {name: IDLE_FOR_ALL | one.idle for name, one in FORMATS.items()}
PLAIN = {name: one.plain for name, one in FORMATS.items()}
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(CLASSES[kind])]


def test_every_field_of_pefts_classes_has_been_thought_of() -> None:
    for kind, name in FIELDS:
        known = HONOURED[kind] | IDLE[kind] | PLAIN[kind].keys()
        assert name in known, f"PEFT's {kind} has a field {name}: is it honoured, idle or refused?"
        ways = (name in HONOURED[kind], name in IDLE[kind], name in PLAIN[kind])
        assert sum(ways) == 1, name


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_field_that_is_not_plain_is_computed_as_in_peft_or_refused_by_name(
    kind: str, name: str, plain: dict[str, tuple[Path, Spec]], tmp_path: Path
) -> None:
    folder, spec = plain[kind]
    changed = with_field(folder, tmp_path / "changed", **{name: SAMPLES.get(name, True)})
    refusal, logits = "", None
    try:
        wrapped, begun = begin("llama", spec, changed)
        logits = own_logits(wrapped, begun.tree)
    except LichenError as error:
        refusal = str(error)
    if logits is None:
        # The tensors in the file were not changed: where the field counts, they no longer fit it.
        assert name not in IDLE[kind]
        assert {"num_virtual_tokens": "virtual tokens", "r": "rank 4, its r"}.get(name, name) in refusal
        return
    assert name not in PLAIN[kind]
    try:
        wanted = peft_logits("llama", changed)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        # What it began with need not be there any more, nor what no other field looks at be right.
        assert name in IDLE[kind], "PEFT cannot load it, and we do"
        wanted = peft_logits("llama", folder)
    assert float((logits - wanted).abs().max()) <= BOUND


@pytest.mark.parametrize("name", NO_PREFIX)
def test_a_model_without_keys_and_values_from_outside_refuses_a_prefix(name: str) -> None:
    with pytest.raises(LichenError, match="takes no keys and values from outside"):
        wrap(made(name), Prefix(tokens=3, heads=FAMILIES[name].head))


@pytest.mark.parametrize("value", [1, True, {"a": 1}, "yes", [0]])
def test_a_field_of_a_later_peft_is_refused_unless_it_is_empty(
    value: Any, plain: dict[str, tuple[Path, Spec]], tmp_path: Path
) -> None:
    folder, spec = plain["LORA"]
    begin("llama", spec, with_field(folder, tmp_path / "empty", a_new_field=type(value)()))
    with pytest.raises(LichenError, match="a_new_field"):
        begin("llama", spec, with_field(folder, tmp_path / "set", a_new_field=value))


@pytest.mark.parametrize("begins", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_its_base_is_refused_and_its_fix_helps(begins: str, tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    config = lora_config(family, init_lora_weights=begins)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lone = peft.get_peft_model(copy.deepcopy(made("llama")), config)
    lone.save_pretrained(tmp_path / "before")
    for name, parameter in lone.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    lone.save_pretrained(tmp_path / "changed")
    with pytest.raises(LichenError, match=r"init_lora_weights='(.|\n)*path_initial_model_for_weight_conversion"):
        begin("llama", lora_of(family), tmp_path / "changed")
    wanted = logits_of(lone.eval())
    whole = peft.PeftModel.from_pretrained(copy.deepcopy(made("llama")), str(tmp_path / "changed"), is_trainable=True)
    whole.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    wrapped, begun = begin(
        "llama", lora_of(family, rank=config["r"], alpha=config["lora_alpha"]), tmp_path / "converted"
    )
    torch.testing.assert_close(own_logits(wrapped, begun.tree), wanted, rtol=0, atol=1e-4)


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    for name in FAMILIES:
        found = []
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                found += list(way(name, Path(folder)))
        for direction in ("in", "out"):
            some = [row for row in found if row[1] == direction]
            worst = max(some, key=lambda row: row[3])
            print(f"{name:18s} {direction:4s} {len(some):3d} cases, largest difference {worst[3]:.1e} ({worst[2]})")


if __name__ == "__main__":
    main()

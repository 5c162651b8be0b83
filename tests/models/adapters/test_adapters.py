"""Laws of every kind of adapter: company changes nothing, PEFT agrees, the start is the base, what is saved is read.

Legend: C clients, B rows, T tokens, m virtual tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import equality
import peft
import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree, stack
from lichen.models.adapters.bitfit import BitFit
from lichen.models.adapters.bottleneck import Bottleneck
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.adapters.quantized import quantize
from lichen.models.adapters.wrap import wrap
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.peft.format import save_adapter
from lichen.models.peft.merge import attach, merge
from lichen.models.peft.read import load_adapter
from support.peft_names import with_peft_names

HEADS = {"llama": (), "gpt2": (), "bert": ("classifier",)}
SCALED = {
    "llama": (("k_proj", "v_proj"), ("down_proj",)),
    "gpt2": (("c_attn",), ("mlp.c_proj",)),
    "bert": (("key", "value"), ("output.dense",)),
}
KINDS = ("lora", "rslora", "ia3", "prompt", "prefix", "bottleneck", "bitfit")
IN_PEFT = ("lora", "rslora", "ia3", "prompt", "prefix")
STARTS_AS_BASE = ("lora", "rslora", "ia3", "bottleneck", "bitfit")
PACKED = ("lora", "rslora", "ia3", "bottleneck", "bitfit")
CASES = [(a, k) for a in HEADS for k in KINDS if (a, k) != ("llama", "bitfit")]


def spec_of(architecture: str, kind: str) -> Spec:
    heads, (targets, feedforward) = HEADS[architecture], SCALED[architecture]
    every: dict[str, Spec] = {
        "lora": Lora(targets=targets, rank=4, alpha=12.0, heads=heads),
        "rslora": Lora(targets=targets, rank=4, alpha=12.0, heads=heads, rslora=True),
        "ia3": IA3(targets=targets, feedforward=feedforward, heads=heads),
        "prompt": Prompt(tokens=3, heads=heads),
        "prefix": Prefix(tokens=3, heads=heads),
        "bottleneck": Bottleneck(width=5, heads=heads),
        "bitfit": BitFit(heads=heads),
    }
    return every[kind]


def cohort_of(architecture: str, kind: str, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    make: Any = ClassifierCohort if architecture == "bert" else CausalCohort
    model = equality.tiny(architecture, dtype=dtype)
    return make(model, adapter=spec_of(architecture, kind), name=architecture, **how)


def run(cohort: Any, starts: list[Tree], batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """Losses and gradients, ``(C, ...)``."""
    params_C = {name: x.requires_grad_() for name, x in stack(starts).items()}
    loss_C, _ = cohort.loss(params_C, {}, batch)
    grads = torch.autograd.grad(loss_C.sum(), list(params_C.values()), materialize_grads=True, allow_unused=True)
    return loss_C.detach(), dict(zip(params_C, grads, strict=True))


def near(a: Tensor, b: Tensor, rtol: float = 1e-5) -> None:
    assert float((a - b).abs().max()) <= rtol * max(float(b.abs().max()), 1e-2)


def clients(batch: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: x[first:last] for name, x in batch.items()}


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_eight_three_and_one_are_the_same_bits(architecture: str, kind: str) -> None:
    cohort = cohort_of(architecture, kind, reference=True)
    starts, batch = equality.start_of(cohort, 8), equality.batch_of(architecture)
    loss_8, grads_8 = run(cohort, starts, batch)
    loss_3, grads_3 = run(cohort, starts[:3], clients(batch, 0, 3))
    assert torch.equal(loss_3, loss_8[:3])
    assert all(torch.equal(grads_3[name], grads_8[name][:3]) for name in grads_8)
    for c in (0, 5):
        loss_1, grads_1 = run(cohort, starts[c : c + 1], clients(batch, c, c + 1))
        assert torch.equal(loss_1[0], loss_8[c])
        assert all(torch.equal(grads_1[name][0], grads_8[name][c]) for name in grads_8)
    assert all(float(grad.abs().max()) > 0 for grad in grads_8.values()), "every tensor is trained"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_clients_that_share_a_call_are_the_reference(architecture: str, kind: str, packed: bool) -> None:
    """Building the cohort proves their independence as well."""
    slow = cohort_of(architecture, kind, reference=True, prove=False)
    starts, batch = equality.start_of(slow, 4), equality.batch_of(architecture, clients=4)
    if packed and kind not in PACKED:
        with pytest.raises(LichenError, match="padded rows"):
            cohort_of(architecture, kind, reference=False, packed=True)
        return
    fast = cohort_of(architecture, kind, reference=False, packed=packed)
    assert fast.packed == packed
    for model in (fast, fast.checkpointed()) if packed else (fast,):
        loss_C, grads_C = run(model, starts, batch)
        wanted_C, wanted_grads_C = run(slow, starts, batch)
        near(loss_C, wanted_C)
        for name in grads_C:
            near(grads_C[name], wanted_grads_C[name])


def _oracle(architecture: str, kind: str, model: Any) -> Any:
    spec, (targets, feedforward) = spec_of(architecture, kind), SCALED[architecture]
    common: dict[str, Any] = {
        "task_type": "SEQ_CLS" if architecture == "bert" else "CAUSAL_LM",
        "modules_to_save": list(spec.heads) or None,
    }
    turned = {"fan_in_fan_out": architecture == "gpt2"}
    config = {
        "lora": lambda: peft.LoraConfig(**common, **turned, r=4, lora_alpha=12, target_modules=list(targets)),
        "rslora": lambda: peft.LoraConfig(
            **common, **turned, r=4, lora_alpha=12, target_modules=list(targets), use_rslora=True
        ),
        "ia3": lambda: peft.IA3Config(
            **common, **turned, target_modules=[*targets, *feedforward], feedforward_modules=list(feedforward)
        ),
        "prompt": lambda: peft.PromptTuningConfig(**common, num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(**common, num_virtual_tokens=3),
    }[kind]()
    return peft.get_peft_model(with_peft_names(copy.deepcopy(model)), config, autocast_adapter_dtype=False).eval()


def _put(lone: Any, name: str, value: Tensor) -> tuple[Any, Any]:
    """PEFT's parameter for one of our tensors, filled, and how its gradient becomes ours."""
    inside = dict(lone.named_parameters())
    path, _, leaf = name.rpartition(".")
    if leaf in ("lora_A", "lora_B", "ia3_l"):
        weight = ".weight" if leaf != "ia3_l" else ""
        parameter = inside[f"base_model.model.{path}.{leaf}.default{weight}"]
    elif leaf in ("tokens", "keys", "values"):
        parameter = inside["prompt_encoder.default.embedding.weight"]
        if leaf != "tokens":
            layers, heads_k, tokens, wide = value.shape
            side = int(leaf == "values")
            shape = (tokens, layers, 2, heads_k, wide)
            parameter.data.view(shape)[:, :, side] = value.permute(2, 0, 1, 3)
            return parameter, lambda grad: grad.view(shape)[:, :, side].permute(1, 2, 0, 3)
    else:
        before = "base_model" if any("prompt_encoder" in name for name in inside) else "base_model.model"
        parameter = inside[f"{before}.{path}.modules_to_save.default.{leaf}"]
    parameter.data = value.clone().view(parameter.shape)
    return parameter, lambda grad: grad.view(value.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("architecture", "kind"), [(a, k) for a, k in CASES if k in IN_PEFT])
def test_peft_has_the_same_loss_and_gradients(architecture: str, kind: str) -> None:
    cohort = cohort_of(architecture, kind, reference=True)
    starts, batch = equality.start_of(cohort, 2), equality.batch_of(architecture, clients=2)
    lone = _oracle(architecture, kind, equality.tiny(architecture))
    loss_C, grads_C = run(cohort, starts, batch)
    for c in range(2):
        own = {name: _put(lone, name, x.detach()) for name, x in starts[c].items()}
        assert {id(p) for p in lone.parameters() if p.requires_grad} == {id(p) for p, _ in own.values()}
        lone.zero_grad()
        logits = lone(input_ids=batch["input_ids_CBT"][c], attention_mask=batch["attention_mask_CBT"][c]).logits
        if architecture == "bert":
            loss = torch.nn.functional.cross_entropy(logits, batch["labels_CB"][c], reduction="sum")
        else:
            labels_BT = batch["labels_CBT"][c]
            logits = logits[:, -labels_BT.shape[1] :]
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
        loss.backward()
        near(loss_C[c], loss.detach())
        for name, (parameter, ours) in own.items():
            near(grads_C[name][c], ours(parameter.grad))


def logits_of(model: Any) -> Tensor:
    batch = equality.batch_of("bert", clients=1)
    inputs = {"input_ids": batch["input_ids_CBT"][0], "attention_mask": batch["attention_mask_CBT"][0]}
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def own_logits(model: Any, spec: Spec, tree: Tree, fixed: Tree | None = None) -> Tensor:
    batch = equality.batch_of("bert", clients=1)
    inputs = {"input_ids": batch["input_ids_CBT"][0], "attention_mask": batch["attention_mask_CBT"][0]}
    with torch.no_grad():
        logits: Tensor = wrap(model, spec).call({k: x[None] for k, x in tree.items()}, fixed or {}, **inputs).logits
    return logits


def exact(kind: str) -> dict[str, float]:
    """PEFT holds virtual tokens in single precision."""
    return {"rtol": 1e-6, "atol": 1e-7} if kind in ("prompt", "prefix") else {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize(("architecture", "kind"), [(a, k) for a, k in CASES if k in STARTS_AS_BASE])
def test_the_start_is_the_base(architecture: str, kind: str) -> None:
    model, spec = equality.tiny(architecture, dtype=torch.float64), spec_of(architecture, kind)
    torch.testing.assert_close(own_logits(model, spec, wrap(model, spec).init(3)), logits_of(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_begin_as_words_before_the_row(architecture: str, kind: str) -> None:
    model, spec = equality.tiny(architecture, dtype=torch.float64), spec_of(architecture, kind)
    wrapped = wrap(model, spec)
    start = wrapped.init(4)
    assert all(torch.equal(x, wrapped.init(4)[name]) for name, x in start.items())
    assert not any(torch.equal(x, wrapped.init(5)[name]) for name, x in start.items())
    word = torch_generator(4, kind, wrapped.layers[0])
    ids_1m = torch.randint(equality.VOCABULARY, (1, 3), generator=word)
    batch = equality.batch_of("llama", clients=1)
    ids_BT, mask_BT = batch["input_ids_CBT"][0], batch["attention_mask_CBT"][0]
    rows = len(ids_BT)
    whole = model(
        input_ids=torch.cat([ids_1m.expand(rows, 3), ids_BT], 1),
        attention_mask=torch.cat([torch.ones(rows, 3, dtype=torch.int64), mask_BT], 1),
    ).logits[:, 3:]
    real_BT = mask_BT.bool()
    torch.testing.assert_close(own_logits(model, spec, start)[real_BT], whole[real_BT])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("architecture", "kind"), [(a, k) for a, k in CASES if k in IN_PEFT])
def test_a_folder_is_read_by_peft_and_by_us(architecture: str, kind: str, tmp_path: Path) -> None:
    model, spec = equality.tiny(architecture, dtype=torch.float64), spec_of(architecture, kind)
    tree = equality.start_of(wrap(model, spec), 1)[0]
    save_adapter(tmp_path, tree, spec=spec, base_name="tiny", task="SEQ_CLS" if architecture == "bert" else "CAUSAL_LM")
    base = with_peft_names(copy.deepcopy(model))
    lone = peft.PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False).eval()
    own = own_logits(model, spec, tree)
    torch.testing.assert_close(logits_of(lone)[:, -own.shape[1] :], own, **exact(kind))
    assert float((own - logits_of(model)).abs().max()) > 1e-2
    again, _ = load_adapter(tmp_path, like=wrap(model, spec).init(0), spec=spec)
    assert again.keys() == tree.keys()
    assert all(torch.equal(again[name], tree[name]) for name in tree)
    other = spec_of(architecture, "prompt" if kind != "prompt" else "prefix")
    with pytest.raises(LichenError, match="of kind"):
        load_adapter(tmp_path, spec=other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_a_run_is_merged_or_attached(architecture: str, kind: str, tmp_path: Path) -> None:
    model, spec = equality.tiny(architecture, dtype=torch.float64), spec_of(architecture, kind)
    before = logits_of(model)
    tree = equality.start_of(wrap(model, spec), 1)[0]
    own, whole = own_logits(model, spec, tree), attach(model, tree, spec=spec)
    torch.testing.assert_close(logits_of(whole)[:, -own.shape[1] :], own, **exact(kind))
    assert torch.equal(logits_of(model), before)
    if architecture != "bert":
        ids_1T = torch.tensor([[5, 6, 7]])
        mask_1T = torch.ones_like(ids_1T)
        out = whole.generate(input_ids=ids_1T, attention_mask=mask_1T, max_new_tokens=3, do_sample=False)
        line = ids_1T
        for _ in range(out.shape[1] - 3):
            inputs = {"input_ids": line, "attention_mask": torch.ones_like(line)}
            logits = wrap(model, spec).call({k: x[None] for k, x in tree.items()}, {}, **inputs).logits
            line = torch.cat([line, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(out, line), "it writes what the run would"
    if kind in ("prompt", "prefix", "bottleneck"):
        with pytest.raises(LichenError, match=f"cannot take in a {kind} adapter"):
            merge(model, tree, spec=spec)
    else:
        merged = merge(model, tree, spec=spec)
        assert type(merged) is type(model)
        torch.testing.assert_close(logits_of(merged), own, rtol=1e-10, atol=1e-12)
    if kind in ("bottleneck", "bitfit"):
        with pytest.raises(LichenError, match="not possible in PEFT's format"):
            save_adapter(tmp_path, tree, spec=spec, base_name="tiny", task="CAUSAL_LM")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_without_its_adapter_runs_its_patch_and_ranks_are_the_tensors(packed: bool, tmp_path: Path) -> None:
    model, spec = equality.tiny("llama", dtype=torch.float64), Lora(targets=("q_proj", "v_proj"), rank=4, alpha=12.0)
    cohort = CausalCohort(model, adapter=spec, name="llama", reference=not packed, packed=packed)
    full, batch = equality.start_of(cohort, 3), equality.batch_of("llama", clients=3)
    gone = "model.layers.0.self_attn.v_proj"
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(s, generator=generator).double() * 0.1 for s in ((16, 2), (2, 32)))
    patch = {f"patch.{gone}.left": left, f"patch.{gone}.right": right}
    few = [{name: x for name, x in tree.items() if not name.startswith(gone)} for tree in full]
    # The oracle: an adapter that is there, but zero; and a rank made wider with zeros.
    zero = [
        {**tree, **{name: torch.zeros_like(x) for name, x in tree.items() if name.startswith(gone)}} for tree in full
    ]
    wide = [
        {name: torch.cat([x, torch.zeros_like(x)], dim=0 if name.endswith("lora_A") else 1) for name, x in tree.items()}
        for tree in few
    ]
    wanted_C, _ = cohort.loss(stack(zero), patch, batch)
    for trees in (few, wide):
        params_C = {name: x.requires_grad_() for name, x in stack(trees).items()}
        loss_C, _ = cohort.loss(params_C, patch, batch)
        torch.testing.assert_close(loss_C, wanted_C, rtol=1e-12, atol=0)
        grads = torch.autograd.grad(loss_C.sum(), list(params_C.values()))
        assert all(bool(grad.isfinite().all()) for grad in grads)
    without_C, _ = cohort.loss(stack(few), {}, batch)
    assert not torch.allclose(without_C, wanted_C)
    with pytest.raises(LichenError, match=r"v_proj\.lora_B' is missing"):
        cohort.loss(stack([{**tree, f"{gone}.lora_A": full[0][f"{gone}.lora_A"]} for tree in few]), {}, batch)
    save_adapter(tmp_path, few[0], spec=spec, base_name="tiny", task="CAUSAL_LM", patch=patch)
    lone = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path), autocast_adapter_dtype=False).eval()
    own = own_logits(model, spec, few[0], patch)
    torch.testing.assert_close(logits_of(lone), own, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits_of(merge(model, few[0], patch, spec=spec)), own, rtol=1e-10, atol=1e-12)


def test_layers_computed_again_find_the_tensors_that_nobody_trains() -> None:
    cohort = cohort_of("llama", "lora", reference=False, packed=True)
    starts_C, batch = stack(equality.start_of(cohort, 2)), equality.batch_of("llama", clients=2)
    params_C = {name: x.requires_grad_(name.endswith("lora_B")) for name, x in starts_C.items()}
    trained = [x for x in params_C.values() if x.requires_grad]
    found = []
    for model in (cohort, cohort.checkpointed()):
        loss_C, _ = model.loss(params_C, {}, batch)
        found.append((loss_C.detach(), *torch.autograd.grad(loss_C.sum(), trained)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "prefix", "bottleneck"])
def test_every_kind_stands_beside_a_quantised_base(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model, spec = quantize(equality.tiny("llama"), "int8"), spec_of("llama", kind)
    cohort = CausalCohort(model, adapter=spec, name="llama", reference=False)
    batch, starts = equality.batch_of("llama", clients=2), equality.start_of(cohort, 2)
    loss_C, grads_C = run(cohort, starts, batch)
    plain_C, _ = run(cohort_of("llama", kind, reference=True), starts, batch)
    near(loss_C, plain_C, 0.05)
    assert all(float(grad.abs().max()) > 0 for grad in grads_C.values())
    own = own_logits(model, spec, starts[0])
    near(logits_of(attach(model, starts[0], spec=spec))[:, -own.shape[1] :], own)


def test_adapters_in_the_last_layers_alone() -> None:
    model = equality.tiny("gpt2")
    for spec in (
        IA3(targets=("c_attn",), last=1),
        Bottleneck(width=2, last=1),
        BitFit(last=1),
    ):
        cohort = CausalCohort(model, adapter=spec, name="gpt2", reference=False, packed=True)
        assert cohort.prefix is not None, "what lies below is computed once"
        assert all(".1." in name for name in cohort.init(0))
    assert len(wrap(model, Bottleneck(width=2, last=1)).layers) == 2


def test_what_does_not_fit_is_said() -> None:
    llama, bert = equality.tiny("llama"), equality.tiny("bert")
    with pytest.raises(LichenError, match="has no biases to train"):
        wrap(llama, BitFit())
    with pytest.raises(LichenError, match=r"adapter\.feedforward_modules.*no layer is called 'wo'"):
        wrap(llama, IA3(targets=("v_proj",), feedforward=("wo",)))
    with pytest.raises(LichenError, match="no layer is named"):
        IA3()
    with pytest.raises(LichenError, match=r"adapter\.width"):
        Bottleneck(width=0)
    for kind in (Prompt, Prefix):
        with pytest.raises(LichenError, match=r"adapter\.num_virtual_tokens"):
            kind(tokens=0)
        wrapped = wrap(bert, kind(tokens=60))
        start_C = {name: x[None] for name, x in wrapped.init(0).items()}
        with pytest.raises(LichenError, match="more than the model's 64 positions"):
            wrapped.call(start_C, {}, input_ids=torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(LichenError, match="takes no keys and values"):
        wrap(equality.tiny("t5-encoder"), Prefix(tokens=2))
    scaled = wrap(llama, IA3(targets=("v_proj",)))
    patch = {"patch.model.layers.0.self_attn.v_proj.dense": torch.ones(16, 32)}
    with pytest.raises(LichenError, match="fits no layer with an adapter"):
        scaled.tensors(scaled.init(0), patch)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_causal_classifier_pools_the_last_real_token(kind: str) -> None:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, num_labels=5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForSequenceClassification(config).requires_grad_(False).eval()
    spec: Spec = Prompt(tokens=3, heads=("score",)) if kind == "prompt" else Prefix(tokens=3, heads=("score",))
    cohort = ClassifierCohort(model, adapter=spec, name="llama", reference=False)
    batch = equality.batch_of("bert", clients=2)
    starts_C = stack(equality.start_of(cohort, 2))
    logits_CBK = cohort.logits(starts_C, {}, batch)
    for c in range(2):
        for row, mask_T in enumerate(batch["attention_mask_CBT"][c]):
            width = int(mask_T.sum())
            alone = {name: x[c : c + 1] for name, x in starts_C.items()}
            short = {"input_ids": batch["input_ids_CBT"][c, row : row + 1, :width]}
            near(logits_CBK[c, row], cohort.wrapped.call(alone, {}, **short).logits[0].detach())

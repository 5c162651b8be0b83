"""How equal is a client in company to the same client alone, and to a plain PEFT loop of its own?

Tiny random models of several architectures are trained for a few steps by eight clients together,
by three, by each alone, and by PEFT with ``torch.optim`` on one client after the other. Printed are
the largest differences over losses and trained tensors; 0 means the same bits. What PEFT's loop gives is also held
against the rounding that its own gradients allow (:func:`allowed_by`), on any processor.

Run it: ``python benchmarks/equality.py``

Legend: C clients, B rows, T tokens, N steps.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from lichen.core.tree import Tree, stack
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.wrap import Wrapped, wrap
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort

ARCHITECTURES = ("llama", "qwen2", "gpt2", "bert", "t5-encoder")
VOCABULARY, CLASSES = 97, 5
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "up_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "bert": ("query", "value", "dense"),
    "t5-encoder": ("q", "v", "wo"),
}


def tiny(architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model of a few thousand weights, frozen, in evaluation mode."""
    import transformers as hf

    small: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    llama = {
        **small,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "llama":
            model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**llama))
        elif architecture == "qwen2":
            model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**llama, tie_word_embeddings=True))
        elif architecture == "gpt2":
            model = hf.GPT2LMHeadModel(hf.GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        elif architecture == "bert":
            model = hf.BertForSequenceClassification(
                hf.BertConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=64,
                    num_labels=CLASSES,
                )
            )
        else:
            model = hf.T5EncoderModel(
                hf.T5Config(
                    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
                )
            )
        for parameter in model.parameters():  # far from zero, so that a difference would be seen
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.to(dtype).requires_grad_(False).eval()


def spec_of(architecture: str) -> Lora:
    """Rank 4, alpha 12; BERT's classifier is trained whole."""
    heads = ("classifier",) if architecture == "bert" else ()
    return Lora(targets=TARGETS[architecture], rank=4, alpha=12.0, heads=heads)


class EncoderCohort:
    """T5's encoder with a made-up loss, to carry an adapter through an architecture without a causal head."""

    def __init__(self, model: Any, *, adapter: Lora, reference: bool = True) -> None:
        self.wrapped: Wrapped = wrap(model, adapter)
        self.reference = reference

    def init(self, seed: int) -> Tree:
        return self.wrapped.init(seed)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        from lichen.models.client_axis import map_clients

        def losses(part_C: Tree, part: Any) -> tuple[Tensor, ...]:
            ids_CBT, mask_CBT = part["input_ids_CBT"], part["attention_mask_CBT"]
            inputs = {"input_ids": ids_CBT.flatten(0, 1), "attention_mask": mask_CBT.flatten(0, 1)}
            hidden = self.wrapped.call(part_C, fixed, **inputs).last_hidden_state
            parts = hidden.reshape(*ids_CBT.shape, -1).unbind(0)
            loss_C = torch.stack([encoder_loss(h, m) for h, m in zip(parts, mask_CBT, strict=True)])
            return loss_C, torch.full((len(parts),), ids_CBT.shape[1])

        loss_C, count_C = map_clients(losses, trainable_C, batch, reference=self.reference)
        return loss_C, count_C


def encoder_loss(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Squared mean feature of each row's own tokens, summed: a stand-in for any loss on features."""
    mean_BH = (hidden_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
    return (mean_BH - 0.1).square().sum()


def cohort_of(architecture: str, model: Any, *, reference: bool = True) -> Any:
    """The cohort under test."""
    adapter = spec_of(architecture)
    if architecture == "t5-encoder":
        return EncoderCohort(model, adapter=adapter, reference=reference)
    kind: Any = ClassifierCohort if architecture == "bert" else CausalCohort
    return kind(model, adapter=adapter, name=architecture, reference=reference)


def batch_of(
    architecture: str, *, clients: int = 8, rows: int = 3, width: int = 11, seed: int = 0
) -> dict[str, Tensor]:
    """Random rows, padded on the right to odd sizes on purpose."""
    generator = torch.Generator().manual_seed(seed)
    ids_CBT = torch.randint(2, VOCABULARY, (clients, rows, width), generator=generator)
    length_CB1 = torch.randint(3, width + 1, (clients, rows, 1), generator=generator)
    mask_CBT = (torch.arange(width) < length_CB1).long()
    ids_CBT = torch.where(mask_CBT.bool(), ids_CBT, 0)
    batch = {
        "active_C": torch.ones(clients, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": mask_CBT,
    }
    if architecture == "bert":
        batch["labels_CB"] = torch.randint(CLASSES, (clients, rows), generator=generator)
    else:
        batch["labels_CBT"] = torch.where(mask_CBT.bool(), ids_CBT, -100)
    return batch


def start_of(cohort: Any, clients: int) -> list[Tree]:
    """Different start values for every client, B away from zero so that A has gradients at once."""
    trees = []
    for c in range(clients):
        generator = torch.Generator().manual_seed(1000 + c)
        trees.append({k: x + 0.05 * torch.randn(x.shape, generator=generator).to(x) for k, x in cohort.init(c).items()})
    return trees


def optimizer_of(name: str, tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
    """torch's own, with momentum and weight decay."""
    if name == "sgd":
        return torch.optim.SGD(tensors, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(tensors, lr=0.01, weight_decay=0.1)


def train_cohort(
    cohort: Any, start_C: Tree, batches: Sequence[dict[str, Tensor]], optimizer: str
) -> tuple[Tree, list[Tensor]]:
    """Some steps on every client's mean loss; both optimizers act element by element, so they may run stacked."""
    params_C = {name: x.clone().requires_grad_() for name, x in start_C.items()}
    step = optimizer_of(optimizer, list(params_C.values()))
    losses = []
    for batch in batches:
        loss_C, count_C = cohort.loss(params_C, {}, batch)
        mean_C = loss_C / count_C
        grads = torch.autograd.grad(mean_C.sum(), list(params_C.values()))
        for x, grad in zip(params_C.values(), grads, strict=True):
            x.grad = grad
        step.step()
        losses.append(mean_C.detach())
    return {name: x.detach() for name, x in params_C.items()}, losses


ROUNDINGS = 16
"""How many roundings of the largest entry a gradient is taken to gather on its way through a tiny model."""


def allowed_by(step: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """How far rounding alone may move each entry of ``x`` in the step that has just been taken.

    A gradient is known to within ``d = ROUNDINGS * eps * max |g|``. SGD passes ``d`` on through its momentum. AdamW
    divides by ``s``, the root of the mean squared gradient of that entry, so an entry whose gradient is rounding
    itself may go either way by the whole rate: the change is ``lr * min(2, 2 d / s)``. No bound relative to the
    largest entry can hold for such entries on every processor, for their sign is the kernel's.
    """
    group = step.param_groups[0]
    assert x.grad is not None
    d = ROUNDINGS * torch.finfo(x.dtype).eps * x.grad.abs().max()
    state = step.state[x]
    if isinstance(step, torch.optim.AdamW):
        root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
        return group["lr"] * (2 * d / root).clamp(max=2.0)
    return torch.full_like(x, float(group["lr"] * d / (1 - group["momentum"])))


def peft_name(name: str, heads: Sequence[str]) -> str:
    """What PEFT calls a trainable tensor inside its model."""
    path, _, leaf = name.rpartition(".")
    if leaf in ("lora_A", "lora_B"):
        return f"base_model.model.{path}.{leaf}.default.weight"
    return f"base_model.model.{path}.modules_to_save.default.{leaf}"


def train_peft(
    architecture: str, model: Any, start: Tree, batches: Sequence[dict[str, Tensor]], optimizer: str
) -> tuple[Tree, list[Tensor], Tree]:
    """The oracle: PEFT's own model and torch's own optimizer, one client alone; and what rounding may change."""
    import peft

    spec = spec_of(architecture)
    task = {"bert": "SEQ_CLS", "t5-encoder": "FEATURE_EXTRACTION"}.get(architecture, "CAUSAL_LM")
    config = peft.LoraConfig(
        task_type=task,
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        modules_to_save=list(spec.heads) or None,
        fan_in_fan_out=architecture == "gpt2",
    )
    lone = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).eval()
    inside = dict(lone.named_parameters())
    own = {name: inside[peft_name(name, spec.heads)] for name in start}
    trained = {id(x) for x in inside.values() if x.requires_grad}
    assert trained == {id(x) for x in own.values()}, "PEFT trains other tensors"
    for name, x in own.items():
        x.data = start[name].clone()
    step = optimizer_of(optimizer, list(own.values()))
    losses = []
    slack = {name: torch.zeros_like(x.data) for name, x in own.items()}
    for batch in batches:
        out = lone(input_ids=batch["input_ids_CBT"], attention_mask=batch["attention_mask_CBT"])
        if architecture == "bert":
            loss = torch.nn.functional.cross_entropy(out.logits, batch["labels_CB"])
        elif architecture == "t5-encoder":
            rows = batch["input_ids_CBT"].shape[0]
            loss = encoder_loss(out.last_hidden_state, batch["attention_mask_CBT"]) / rows
        else:
            loss = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), batch["labels_CBT"][:, 1:].flatten(), ignore_index=-100
            )
        step.zero_grad()
        loss.backward()
        step.step()
        slack = {name: x + allowed_by(step, own[name]) for name, x in slack.items()}
        losses.append(loss.detach())
    for name, x in own.items():
        slack[name] += ROUNDINGS * torch.finfo(x.dtype).eps * x.detach().abs().max()
    return {name: x.detach() for name, x in own.items()}, losses, slack


def largest(a: Tree, b: Tree) -> float:
    """Largest difference relative to the tensor's largest entry."""
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-30)) for k in a)


def compare(
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "sgd",
    steps: int = 3,
    reference: bool = True,
) -> dict[str, float]:
    """Largest relative differences of trained tensors and losses: 8 and 3 against alone, alone against PEFT.

    ``of the rounding allowed`` is the largest difference to PEFT as a share of what :func:`allowed_by` allows.
    """
    model = tiny(architecture, dtype=dtype)
    cohort = cohort_of(architecture, model, reference=reference)
    starts = start_of(cohort, 8)
    batches = [batch_of(architecture, seed=n) for n in range(steps)]

    def run(first: int, last: int) -> tuple[Tree, Tensor]:
        own = [{name: x[first:last] for name, x in batch.items()} for batch in batches]
        params_C, losses = train_cohort(cohort, stack(starts[first:last]), own, optimizer)
        return params_C, torch.stack(losses, dim=1)

    def gap(a: tuple[Tree, Tensor], b: tuple[Tree, Tensor]) -> float:
        return largest({**a[0], "": a[1]}, {**b[0], "": b[1]})

    eight, three, alone = run(0, 8), run(0, 3), [run(c, c + 1) for c in range(8)]
    lone_C = {name: torch.cat([a[0][name] for a in alone]) for name in starts[0]}, torch.cat([a[1] for a in alone])
    slice_3 = {name: x[:3] for name, x in lone_C[0].items()}, lone_C[1][:3]
    worst, share = 0.0, 0.0
    for c in (0, 5):
        own = [{name: x[c] for name, x in batch.items()} for batch in batches]
        params, losses, slack = train_peft(architecture, model, starts[c], own, optimizer)
        one = {name: x[0] for name, x in alone[c][0].items()}, alone[c][1][0]
        worst = max(worst, gap(one, (params, torch.stack(losses))))
        share = max(share, *(float(((one[0][k] - x).abs() / slack[k]).max()) for k, x in params.items()))
        loss_gap = (one[1] - torch.stack(losses)).abs() / torch.stack(losses).abs()
        share = max(share, float(loss_gap.max()) / (ROUNDINGS * torch.finfo(dtype).eps))
    return {
        "8 vs alone": gap(eight, lone_C),
        "3 vs alone": gap(three, slice_3),
        "vs peft": worst,
        "of the rounding allowed": share,
    }


def main(say: Callable[[str], None] = print) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    columns = ("8 vs alone", "3 vs alone", "8 stacked", "vs peft fp32", "vs peft fp64", "of rounding")
    say(f"{'arch':<12}{'optimizer':<11}" + "".join(f"{name:>14}" for name in columns))
    for architecture in ARCHITECTURES:
        for optimizer in ("sgd", "adamw"):
            single = compare(architecture, optimizer=optimizer)
            stacked = compare(architecture, optimizer=optimizer, reference=False)
            double = compare(architecture, optimizer=optimizer, dtype=torch.float64)
            numbers = (
                max(single["8 vs alone"], double["8 vs alone"]),
                max(single["3 vs alone"], double["3 vs alone"]),
                stacked["8 vs alone"],
                single["vs peft"],
                double["vs peft"],
                max(single["of the rounding allowed"], double["of the rounding allowed"]),
            )
            say(f"{architecture:<12}{optimizer:<11}" + "".join(f"{x:>14.1e}" for x in numbers))


if __name__ == "__main__":
    main()

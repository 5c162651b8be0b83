"""Losses and gradients of TRL's own trainers on two tiny models, for ``test_preference_losses.py``.

Run in an environment that has trl 1.16.0 beside lichen's requirements, from the repository's root::

    PYTHONPATH=tests python tests/models/preference_vectors.py > tests/models/preference_vectors.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from support.tiny_preferences import NAMES, by_hand, moved, rows_of, weights_of

BETA = {"dpo": 0.3, "kto": 0.2, "orpo": 0.4, "simpo": 2.0}


def main() -> None:
    """Print the vectors."""
    import trl

    found: dict[str, Any] = {"trl": trl.__version__, "beta": BETA, "losses": {}}
    for name in NAMES:
        for kind in BETA:
            found["losses"][f"{name} {kind}"] = _of(name, kind)
    json.dump(found, sys.stdout, indent=1)
    print()


def _of(name: str, kind: str) -> dict[str, Any]:
    model, reference = by_hand(name), by_hand(name)
    model.load_state_dict(moved(weights_of(model)), strict=False)
    model.requires_grad_(True)
    loss = {"dpo": _dpo, "kto": _kto, "orpo": _orpo, "simpo": _simpo}[kind](model, reference)
    loss.backward()
    grads = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    chosen = {key: x.double() for key, x in grads.items() if "lm_head" not in key}
    return {"loss": float(loss.detach()), "norms": {key: float(x.norm()) for key, x in sorted(chosen.items())}}


class Shim(nn.Module):
    """What TRL's trainers ask of a model: the log-probabilities of labelled tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, labels: Tensor, fused_lm_head: bool, use_cache: bool, **inputs: Tensor) -> Any:
        """As their own models give them."""
        logits = self.model(**inputs).logits[:, :-1].float()
        next_BT = labels[:, 1:]
        log_BT = logits.log_softmax(-1).gather(-1, next_BT.clamp(min=0)[..., None])[..., 0]
        nothing = torch.zeros_like(log_BT)
        return SimpleNamespace(
            log_probs=torch.where(next_BT == -100, nothing, log_BT),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def _trainer(kind: str, model: nn.Module, **more: Any) -> Any:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
    )
    model.train()
    fields = {
        "model": model,
        "accelerator": accelerator,
        "beta": BETA[kind],
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "label_smoothing": 0.0,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        **more,
    }
    return SimpleNamespace(**fields)


def _dpo(model: Any, reference: Any) -> Tensor:
    from trl import DPOTrainer

    first, second, _ = rows_of("dpo")
    both = {key: torch.cat([first[key], second[key]]) for key in first}
    with torch.no_grad():
        logs = Shim(reference)(
            labels=both["labels"], fused_lm_head=True, use_cache=False, **_inputs(both)
        ).log_probs.sum(1)
    half = len(first["labels"])
    inputs = {
        **_inputs(both),
        "completion_mask": (both["labels"] != -100).long(),
        "ref_chosen_logps": logs[:half],
        "ref_rejected_logps": logs[half:],
    }
    own = _trainer(
        "dpo",
        Shim(model),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
    )
    return DPOTrainer._compute_loss(own, own.model, inputs, False)


def _inputs(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: rows[key] for key in ("input_ids", "attention_mask")}


def _kto(model: Any, reference: Any) -> Tensor:
    from trl import KTOTrainer

    first, second, good = rows_of("kto")

    def logs(rows: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            out = Shim(reference)(labels=rows["labels"], fused_lm_head=True, use_cache=False, **_inputs(rows))
        return out.log_probs.sum(1)

    inputs = {
        **_inputs(first),
        "completion_mask": (first["labels"] != -100).long(),
        "KL_input_ids": second["input_ids"],
        "KL_attention_mask": second["attention_mask"],
        "KL_completion_mask": (second["labels"] != -100).long(),
        "label": torch.tensor(good),
        "ref_logps": logs(first),
        "ref_KL_logps": logs(second),
    }
    own = _trainer(
        "kto",
        Shim(model),
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.0,
        undesirable_weight=1.5,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    own._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(own, model, batch)
    return KTOTrainer._compute_loss(own, own.model, inputs, False)


def _concatenated(trainer: Any, kind: str, model: Any) -> dict[str, Any]:
    first, second, _ = rows_of(kind)
    prompts = (first["labels"] == -100) & (first["attention_mask"] == 1)
    width = int(prompts.sum(1).max())
    return {
        "chosen_input_ids": first["input_ids"],
        "chosen_attention_mask": first["attention_mask"],
        "chosen_labels": first["labels"],
        "rejected_input_ids": second["input_ids"],
        "rejected_attention_mask": second["attention_mask"],
        "rejected_labels": second["labels"],
        "prompt_input_ids": first["input_ids"][:, :width],
        "prompt_attention_mask": prompts[:, :width].long(),
    }


def _orpo(model: Any, reference: Any) -> Tensor:
    from trl.experimental.orpo import ORPOTrainer

    own = _trainer("orpo", model)
    for method in ("concatenated_forward", "odds_ratio_loss"):
        bound = getattr(ORPOTrainer, method)
        setattr(own, method, lambda *args, bound=bound, **named: bound(own, *args, **named))
    own.concatenated_inputs, own.get_batch_logps = ORPOTrainer.concatenated_inputs, ORPOTrainer.get_batch_logps
    return ORPOTrainer.get_batch_loss_metrics(own, model, _concatenated(own, "orpo", model))[0]


def _simpo(model: Any, reference: Any) -> Tensor:
    from trl.experimental.cpo import CPOTrainer

    own = _trainer("simpo", model, loss_type="simpo", simpo_gamma=0.7, alpha=0.0, cpo_alpha=0.0)
    for method in ("concatenated_forward", "cpo_loss"):
        bound = getattr(CPOTrainer, method)
        setattr(own, method, lambda *args, bound=bound, **named: bound(own, *args, **named))
    own.concatenated_inputs, own.get_batch_logps = CPOTrainer.concatenated_inputs, CPOTrainer.get_batch_logps
    return CPOTrainer.get_batch_loss_metrics(own, model, _concatenated(own, "simpo", model))[0]


if __name__ == "__main__":
    main()

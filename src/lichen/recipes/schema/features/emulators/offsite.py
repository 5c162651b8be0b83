"""A simulation with the whole model beside the emulator: what it does not go with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lichen.declared import Paper
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["OFFSITE"]


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove it, or offsite") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix, where=key)


def _realigns(used: Callable[[Any], object], recipe: Any) -> object:
    return recipe.offsite.realign is not None and used(recipe)


OFFSITE: tuple[Feature, ...] = (
    of_shared_model(
        "offsite.model",
        lambda recipe: recipe.offsite is not None,
        summary="what was trained on an emulator, plugged into the whole model, beside that model tuned by its owner",
        papers=(Paper(short="Xiao et al. 2023", url="https://arxiv.org/abs/2302.04870"),),
        clashes=(
            _clash("model.name", lambda r: r.model.name is None, "there is no emulator", "name one, or remove offsite"),
            _clash(
                "task",
                lambda r: not (r.writes or r.classifies) or r.prefers,
                "the whole model is held against the emulator in chat and in classes",
                "use task: chat or classify, or remove offsite",
            ),
            _clash(
                "optimizer.name",
                lambda r: r.method.asks_only,
                "a prompt that was found by asking lies outside the model",
                "use another method, or remove offsite",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.local_params,
                "leaves a part of each adapter with its client, and gives none that is whole",
                "use fedit or mean, or remove offsite",
            ),
            _clash("compare.forms", lambda r: r.compare.forms, "the whole model is scored in the recipe's form alone"),
            _clash(
                "offsite.realign",
                lambda r: r.offsite.realign is not None and (r.rule != "fedit" or r.model.adapter.kind != "lora"),
                "the emulator's middle takes patches beside plain LoRA alone",
                "use federation.aggregate: fedit and model.adapter.kind: lora, or remove offsite.realign",
            ),
            *(
                _clash(
                    "offsite.realign",
                    partial(_realigns, used),
                    f"does not go with {key}",
                    f"remove it, or {key}",
                )
                for key, used in (
                    ("federation.ranks", lambda r: r.federation.ranks is not None),
                    ("federation.memory", lambda r: r.federation.memory is not None),
                    ("federation.repair", lambda r: r.federation.repair is not None),
                    ("federation.layer_groups", lambda r: r.federation.layer_groups > 1),
                    ("model.quantize", lambda r: r.model.quantize is not None),
                    ("wire.down", lambda r: bool(r.wire.down)),
                    ("personal", lambda r: r.personal is not None),
                    ("value", lambda r: r.value is not None),
                )
            ),
            _clash("stream", lambda r: r.stream is not None, "each period is a run of its own"),
            _clash("privacy.unit", lambda r: r.noised is not None, "its owner would train on the rows without noise"),
            _clash("teacher", lambda r: r.teacher is not None, "the whole model is tuned on rows alone"),
            _clash("synthetic", lambda r: r.synthetic is not None, "the whole model is tuned on rows alone"),
            _clash("semi", lambda r: r.semi is not None, "the whole model is tuned on labelled rows alone"),
        ),
    ),
)

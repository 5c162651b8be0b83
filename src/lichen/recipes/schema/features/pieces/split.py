"""Split learning: what does not go with a model whose middle lies at the server."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import NO_LATE, Clash, Feature, of_shared_model

__all__ = ["SPLIT"]


def _set(key: str) -> Callable[[Any], bool]:
    """Whether a key is there."""
    return lambda recipe: bool(attrgetter(key)(recipe))


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove one of the two") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix, where=key)


UNTRIED = "was not tried with a model whose middle lies at the server"

SPLIT: tuple[Feature, ...] = (
    of_shared_model(
        "split",
        _set("split"),
        Need(Property.LORA_FACTORS, "pieces of a model train LoRA, and {who} is none", "use model.adapter.kind: lora"),
        Need(Property.PLAIN_TRAINING, "both sides step by SGD or AdamW, and {who} does more", "use adamw or sgd"),
        lacks=NO_LATE | {Property.ACCUMULATION, Property.PERSONAL_TENSORS},
        summary="split learning: embeddings, first and last blocks, head and rows at the client, the middle and its "
        "LoRA at the server (SplitFed v1 and v2, SplitLoRA)",
        papers=(
            Paper(short="Vepakomma et al. 2018", url="https://arxiv.org/abs/1812.00564"),
            Paper(short="Thapa et al. AAAI 2022", url="https://arxiv.org/abs/2004.12088"),
            Paper(short="Lin et al. 2024", url="https://arxiv.org/abs/2407.00952"),
        ),
        clashes=(
            *(
                _clash(key, _set(key), UNTRIED)
                for key in (
                    "teacher",
                    "synthetic",
                    "semi",
                    "data.public",
                    "prefer",
                    "attack",
                    "audit",
                    "value",
                    "personal",
                    "fingerprint",
                    "offsite",
                    "stream",
                    "federation.repair",
                    "engine.clock",
                    "model.quantize",
                )
            ),
            _clash(
                "privacy", _set("privacy"), "the server sees what crosses the cuts, which neither noise nor masks hide"
            ),
            _clash(
                "wire",
                lambda r: r.wire.up or r.wire.down or r.wire.clip is not None or r.wire.gate is not None,
                "what clients send is a part of the message that these words are for",
                "remove it",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.patch is not None or r.aggregation.local_params,
                "the frozen layers of both sides would move, or a part of what the server holds stay with its client",
                "use fedit, mean, ffa, rolora, or with federation.ranks a rule for these",
            ),
            _clash("federation.layer_groups", lambda r: r.federation.layer_groups > 1, UNTRIED, "remove it"),
            _clash("federation.fair", lambda r: r.federation.fair != "none", UNTRIED, "remove it"),
            _clash("federation.reward", lambda r: r.federation.reward != "none", UNTRIED, "remove it"),
            _clash(
                "federation.robust",
                lambda r: r.federation.robust is not None and r.federation.robust.asks_server,
                "the server would train the whole model, and it holds the middle",
                "use another rule",
            ),
            _clash(
                "federation.weighting",
                lambda r: r.federation.weighting == "rows",
                UNTRIED,
                "use weighting: examples or uniform",
            ),
            _clash(
                "engine.gradient_checkpointing",
                lambda r: r.engine.gradient_checkpointing,
                "a client runs its few first blocks again in any case",
                "remove it",
            ),
        ),
    ),
    Feature(
        key="split.kind",
        used=lambda recipe: recipe.split is not None and recipe.split.kind == "v2",
        needs=(
            Need(
                Property.ONE_SERVER,
                "clients take turns with one copy of the middle, and the ranks of {who} would each have one",
                "use split.kind: v1, or engine.name: local",
            ),
        ),
        clashes=(
            Clash(
                other="split.client",
                used=lambda r: r.split.client.several,
                what="clients of unequal cuts take no turns with one copy of the middle: who comes later would decide",
                fix="use split.kind: v1, or one number of blocks",
                where="split.client",
            ),
            Clash(
                other="federation.ranks",
                used=lambda r: r.federation.ranks is not None,
                what="clients of unequal ranks take no turns with one copy of the middle's adapter",
                fix="use split.kind: v1, or remove it",
                where="federation.ranks",
            ),
        ),
    ),
)

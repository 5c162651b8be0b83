"""What becomes of changes on their way to the server, and there."""

from __future__ import annotations

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import NO_LATE, Clash, Feature
from lichen.transforms.codec_words import CODED_LACKS

__all__ = ["CHANGES"]

CHANGES: tuple[Feature, ...] = (
    Feature(
        key="wire",
        summary="messages are clipped, quantised, made sparse or of low rank",
        papers=(
            Paper(short="Alistarh et al. NIPS 2017", url="https://arxiv.org/abs/1610.02132"),
            Paper(short="Karimireddy et al. ICML 2019", url="https://arxiv.org/abs/1901.09847"),
            Paper(short="Vogels et al. NeurIPS 2019", url="https://arxiv.org/abs/1905.13727"),
        ),
        used=lambda recipe: recipe.wire.up or recipe.wire.down or recipe.wire.clip is not None or recipe.wire.gate,
        needs=(Need(Property.CODECS, "what {who} sends is sent as it is", "remove it"),),
    ),
    Feature(
        key="wire.gate",
        summary="a change far above the running median of norms is refused",
        papers=(Paper(short="Sun et al. 2019", url="https://arxiv.org/abs/1911.07963"),),
        used=lambda recipe: recipe.wire.gate is not None,
        lacks=frozenset({Property.SUMS}),
    ),
    Feature(key="wire.up", used=lambda recipe: recipe.wire.up, lacks=CODED_LACKS),
    Feature(
        key="semi.kind",
        lacks=NO_LATE,
        summary="semifl: the server trains on public labelled rows, in turns with clients that have none",
        papers=(Paper(short="Diao et al. NeurIPS 2022", url="https://arxiv.org/abs/2106.01432"),),
        used=lambda recipe: recipe.semi is not None and recipe.semi.kind == "semifl",
        needs=(Need(Property.ONE_SERVER, "trains in one process", "use engine.name: local"),),
        clashes=(
            Clash(
                other="federation.fair",
                used=lambda recipe: recipe.federation.fair in ("minmax", "tilted"),
                what="minmax or tilted, and the server's own training, are two algorithms",
                fix="remove one",
                where="federation.fair",
            ),
        ),
    ),
    Feature(
        key="federation.server",
        summary="the change is a step of SGD with momentum, Adam or Yogi",
        papers=(Paper(short="Reddi et al. ICLR 2021", url="https://arxiv.org/abs/2003.00295"),),
        used=lambda recipe: (
            (recipe.federation.server.name, recipe.federation.server.lr, recipe.federation.server.momentum)
            != ("sgd", 1.0, 0.0)
        ),
        needs=(
            Need(
                Property.SERVER_STEP,
                "{who} is exact for plain averaging only",
                "use sgd with lr 1 and no momentum",
            ),
        ),
    ),
)

"""The ``federation``, ``optimizer`` and ``wire`` sections, and the engine's ``clock``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lichen.core.errors import LichenError
from lichen.recipes.schema.model import Positive, Section, Share
from lichen.recipes.schema.names import MethodName, RobustName, RuleName
from lichen.server.robust.table import ROBUST
from lichen.transforms.codec_words import read_codecs

__all__ = ["ClockConfig", "FederationConfig", "OptimizerConfig", "WireConfig"]


ADAPTIVE_LR = 0.01
"""The server's rate for Adam and Yogi where a recipe names none: the middle of the best of Reddi et al., 2021."""


class OptimizerConfig(Section):
    """How a client trains."""

    name: MethodName = Field(
        default="adamw",
        description="client optimizer; `scaffold` is SGD with control variates, `feddyn` SGD on a loss that is bent to "
        "where all clients' optima meet, `fednova` SGD whose changes are evened out by the clients' steps, `moon` SGD "
        "that holds a small model's representations near the shared model's; without gradients: `mezo` measures one "
        "slope a step, `kseed` (FedKSeed) also sends nothing but seeds and slopes, "
        "`cma` (FedBPT) only asks the model for answers",
    )
    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1e-3,),
        min_length=1,
        description="learning rates; several are a grid, chosen on validation data; for cma the spread it begins with",
    )
    grid_rounds: Positive | None = Field(
        default=None, description="rounds every learning rate is tried for before the best goes on; none: all of them"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="for sgd, feddyn and fednova")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled for adamw")
    clip: float | None = Field(
        default=1.0, gt=0, description="each client's gradient norm at most; for mezo, kseed its slope"
    )
    prox: float = Field(default=0.0, ge=0, description="FedProx pull towards the shared model (mu)")
    alpha: float = Field(default=0.01, gt=0, description="feddyn: how strongly a client is held (α)")
    contrast: float = Field(default=1.0, gt=0, description="moon: how much the contrast weighs (μ)")
    temperature: float = Field(default=0.5, gt=0, description="moon: of the contrast (τ)")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="learning rate over rounds"
    )
    warmup: int = Field(default=0, ge=0, description="rounds of linear warm-up")
    eps: float = Field(default=1e-3, gt=0, description="mezo, kseed: how far the slope is measured")
    seeds: Positive = Field(default=2048, description="kseed: directions in all (K)")
    population: Annotated[int, Field(ge=4)] = Field(default=5, description="cma: candidates an iteration")
    dimensions: Positive = Field(default=500, description="cma: numbers searched, projected onto the prompt")

    @model_validator(mode="after")
    def _unequal_rates(self) -> OptimizerConfig:
        again = [lr for at, lr in enumerate(self.lr) if lr in self.lr[:at]]
        if again:
            raise ValueError(f"optimizer.lr: {again[0]:g} stands twice; name every learning rate once")
        return self


class ServerConfig(Section):
    """How the server steps with the clients' mean change (Reddi et al., 2021)."""

    name: Literal["sgd", "adam", "yogi"] = Field(default="sgd", description="server optimizer")
    lr: float = Field(
        default=1.0, gt=0, description="1 with sgd is plain averaging; adam and yogi without it take 0.01"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="for sgd")
    nesterov: bool = Field(default=False, description="for sgd: look ahead along the momentum, as DiLoCo does")

    @model_validator(mode="before")
    @classmethod
    def _adaptive_rate(cls, values: Any) -> Any:
        """A step of Adam or Yogi is as long as its rate in every coordinate: 1 would be far too long."""
        if isinstance(values, dict) and values.get("name") in ("adam", "yogi"):
            return {"lr": ADAPTIVE_LR, **values}
        return values


class ScheduleConfig(Section):
    """When the server steps: with everybody it has invited, or after so many answers (Nguyen et al., 2022)."""

    kind: Literal["synchronous", "buffered"] = Field(
        default="synchronous",
        description="`synchronous`: a round waits for all it has invited; `buffered`: FedBuff, a step after so many "
        "answers, of whatever age, while the others train on",
    )
    arrivals: Positive = Field(default=10, description="buffered: answers of a step (K)")
    concurrency: Positive | None = Field(
        default=None, description="buffered: clients at work after each step (M); none: all"
    )
    exponent: float = Field(
        default=0.5, ge=0, description="buffered: an answer s steps old weighs (1 + s) to the minus this"
    )
    hinge: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="buffered: up to this age an answer weighs in full, and s steps beyond it 1 / (exponent s + 1); "
        "none: the power of its age",
    )
    mixing: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="buffered, with arrivals: 1: FedAsync, the server's model is mixed with so much of the client's, "
        "times what its age leaves; none: changes are added",
    )
    max_age: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="buffered: clients whose job is more steps old are given up; none: any age counts"
    )
    deadline: float | None = Field(
        default=None, gt=0, description="seconds after which a client that has not answered is given up; none: never"
    )
    least: Positive = Field(
        default=1, description="clients that must count for a step; a round with fewer changes nothing"
    )
    scoring_deadline: float | None = Field(
        default=None,
        gt=0,
        description="seconds after which validation and the scores of test rows wait for nobody; none: as `deadline`",
    )

    @property
    def seconds(self) -> float:
        """That a round waits at most."""
        return math.inf if self.deadline is None else self.deadline

    @property
    def scoring_seconds(self) -> float:
        """That validation and scoring wait at most."""
        return self.seconds if self.scoring_deadline is None else self.scoring_deadline


class RobustConfig(Section):
    """Another middle of the clients' changes than their mean, which a few liars cannot lead; every client counts 1."""

    rule: RobustName = Field(description="which; `lichen list methods` says what each does")
    liars: Annotated[int, Field(ge=0)] = Field(
        default=1,
        description="clients of a round that may lie (f); a round with too few clients for that changes nothing",
    )
    mixing: bool = Field(
        default=False, description="each change becomes the mean of its n - f nearest ones first (NNM)"
    )
    of: Literal["factors", "products"] = Field(
        default="factors",
        description="what distances are between: `factors`, all numbers as they are sent; `products`, for each layer "
        "of LoRA the changes of its product B A, and each layer chooses by itself",
    )
    radius: float | None = Field(
        default=None,
        gt=0,
        description="norm that changes count up to; none, in norm_bound: the median norm of the round",
    )
    iterations: Positive = Field(default=10, description="steps of geometric_median and centred_clipping")

    @property
    def asks_server(self) -> bool:
        """The rule holds changes against one that the server makes of rows of its own."""
        return ROBUST[self.rule].looks_at == "reference"

    @model_validator(mode="after")
    def _radius(self) -> RobustConfig:
        if self.radius is None and ROBUST[self.rule].radius:
            raise ValueError(f"federation.robust.radius: {self.rule} needs one; set it, for example to 1.0")
        return self


class ClockConfig(Section):
    """Virtual time for the federated column: answers arrive late, and nobody sleeps."""

    median: float = Field(default=60.0, ge=0, description="seconds that half of the clients take at most; 0: no time")
    sigma: float = Field(
        default=1.0, ge=0, le=10, description="spread: deviation of the logarithm of these seconds, which is normal"
    )
    persistence: float = Field(
        default=0.0, ge=0, le=1, description="share of the spread (of its square) by which a client is always as slow"
    )
    dropout: float = Field(default=0.0, ge=0, le=1, description="chance that a client never answers a job")
    hours: float = Field(
        default=24.0, gt=0, le=24, description="hours of a day in which a client is there, from an hour that is drawn"
    )


class RepairConfig(Section):
    """After the rounds the server tunes what was learned on public pairs of a request and a safe answer."""

    name: str = Field(
        default="advbench",
        description="the pairs, by catalog name, hub id or file (columns prompt and completion); requests alone "
        "(column text) are answered by a refusal; of a set of the catalog one half, and nothing that is held out",
        examples=["safe.jsonl"],
    )
    steps: Positive = Field(default=40, description="the server's steps")
    batch_size: Positive = Field(default=8, description="pairs a step")
    lr: float | None = Field(default=None, gt=0, description="learning rate; none: the clients'")


class FederationConfig(Section):
    """The rounds."""

    rounds: Positive = Field(default=10, description="rounds in all")
    clients_per_round: Positive | None = Field(
        default=None, description="clients invited a round; none invites everyone"
    )
    sampling: Literal["uniform", "poisson", "weighted"] = Field(default="uniform", description="how they are drawn")
    local_steps: Positive | None = Field(
        default=4, description="local steps of a client in a round; none: by local_epochs"
    )
    local_epochs: Positive | None = Field(
        default=None,
        description="in place of local_steps: passes of a client over its own training rows in a round; "
        "the last batch of a pass may be smaller",
    )
    batch_size: Positive = Field(
        default=4, description="rows a local step; with gradient_accumulation_steps, rows a micro-batch"
    )
    gradient_accumulation_steps: Positive = Field(
        default=1,
        description="micro-batches of batch_size rows that make one local step, as one batch of all their rows would: "
        "less memory, the same step",
    )
    aggregate: RuleName | None = Field(
        default=None, description="how changes become one; none: fedit for lora, mean for everything else"
    )
    energy: float = Field(
        default=0.99, gt=0, le=1, description="florist: share of the squared singular values that is kept"
    )
    ranks: tuple[Positive, ...] | None = Field(
        default=None,
        min_length=1,
        description="rank of each client's adapter, dealt out in turns; none: all have the adapter's",
    )
    memory: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="GiB each client has, dealt out in turns: its rank and layers follow, or with split its first "
        "blocks; none: enough",
    )
    layer_groups: Positive = Field(
        default=1, description="layer-wise: parts of the stack that take turns in being trained, a round each"
    )
    weighting: Literal["examples", "rows", "uniform"] = Field(
        default="examples",
        description="weight of a client in the mean: `examples` counts the labelled rows, or tokens with a loss on "
        "them, that it trained on in this round; `rows` its training rows, n_k in FedAvg; `uniform` is 1",
    )
    robust: RobustConfig | None = Field(
        default=None, description="a rule that liars cannot lead in the place of the mean; none: the mean"
    )
    repair: RepairConfig | None = Field(
        default=None,
        description="chat: after the rounds the server tunes the model on public safe pairs; none: it does not",
    )
    fair: Literal["none", "minmax", "qffl", "tilted"] = Field(
        default="none",
        description="whose loss counts more: `minmax` the largest's (agnostic federated learning), `qffl` large ones, "
        "by a power, `tilted` by an exponential (TERM)",
    )
    fair_rate: float = Field(default=0.1, gt=0, description="minmax: how fast weights follow the losses")
    q: float = Field(default=1.0, ge=0, description="qffl: how much more; 0 is plain averaging")
    tilt: float = Field(default=1.0, gt=0, description="tilted: how much more; towards 0 it is plain averaging")
    reward: Literal["none", "cgsv"] = Field(
        default="none",
        description="`cgsv`: each client has a model of its own, and is paid in coordinates of the common change, the "
        "more the more its own changes point the same way; the column `personal`",
    )
    reward_beta: float = Field(default=1.0, gt=0, description="cgsv: β; the larger, the more alike all are paid")
    keep_optimizer: bool = Field(
        default=False, description="DiLoCo: each client's optimizer goes on in its next round; warm-up counts its steps"
    )
    stream_fragments: Positive = Field(
        default=1, description="with keep_optimizer: parts of the model that take turns in being sent, a round each"
    )
    drop_prob: Share = Field(default=0.0, description="with keep_optimizer: chance that a client's answer is lost")
    server: ServerConfig = Field(default=ServerConfig(), description="server optimizer")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="when the server steps")
    history: bool = Field(
        default=False,
        description="the server keeps each message that counted in the run's folder, by round and client, for "
        "`lichen.replay`; single messages tell more of a client's rows than their mean does",
    )
    absent: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="clients, by their names in roster.json, that never took part: each is on the roster and invited "
        "as ever, never answers, and is trained and scored in no column; `lichen forget` sets it",
        examples=[["client-003"]],
    )
    valid_every: Positive = Field(default=1, description="rounds between validations; the best one is kept")
    patience: Positive | None = Field(
        default=None,
        description="early stop: after so many validations in a row without a smaller loss a column's rounds end; "
        "none: all rounds. Alone and pooled by their own validation",
    )
    valid_average: Literal["mean", "median", "trimmed_mean"] | None = Field(
        default=None,
        description="how clients' validation losses become the one that chooses round and learning rate; of a median, "
        "or a mean without a tenth at each end, no client that lies can choose them. None: the mean, or the median "
        "where there is a robust rule",
    )
    valid_clients: Positive | None = Field(
        default=64,
        description="clients that validate in the rounds, at most: a sample drawn once by the seed; none, all: all. "
        "Alone, everyone judges itself, and test rows are scored for all",
    )

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> FederationConfig:
        if self.local_epochs is None:
            if self.local_steps is None:
                raise ValueError(
                    "federation.local_steps: says nothing, nor does federation.local_epochs; set one of them"
                )
            return self
        if self.local_steps is not None and "local_steps" in self.model_fields_set:
            raise ValueError(
                "federation.local_epochs: passes over the rows say how many steps there are; remove local_steps"
            )
        return self.model_copy(update={"local_steps": None})

    @property
    def fixed_steps(self) -> int:
        """Local steps of every client in a round, where they are given and not counted by epochs."""
        assert self.local_steps is not None
        return self.local_steps

    @property
    def judged_by(self) -> Literal["mean", "median", "trimmed_mean"]:
        """How validation losses become one."""
        return self.valid_average or ("mean" if self.robust is None else "median")

    @field_validator("valid_clients", mode="before")
    @classmethod
    def _all_validate(cls, value: object) -> object:
        return None if value == "all" else value


class WireConfig(Section):
    """What is done to tensors before they are sent, word by word from left to right."""

    up: tuple[str, ...] = Field(default=(), description="from clients to the server; nothing: float32 as they are")
    down: tuple[str, ...] = Field(default=(), description="from the server to clients, as changes of what they hold")
    clip: float | None = Field(
        default=None,
        gt=0,
        description="norm that a client's change is cut to before it is coded, and again at the server",
    )
    gate: float | None = Field(
        default=None,
        gt=1,
        description="a change is refused whose norm is above so many times the median of the last 128 that counted, "
        "from the tenth on",
    )

    @model_validator(mode="after")
    def _known_words(self) -> WireConfig:
        if self.gate is not None and self.clip is not None:
            raise ValueError("wire.gate: no change is above wire.clip, which the server cuts to; remove one of the two")
        for way in ("up", "down"):
            try:
                read_codecs(getattr(self, way))
            except LichenError as error:
                raise ValueError(f"wire.{way}: {error.what}; {error.fix}") from None
        return self

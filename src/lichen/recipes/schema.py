"""The recipe: everything a run depends on, typed, read from YAML or written as Python.

Every key is checked when the recipe is built; a key that is unknown, of the wrong type or at odds
with another is one :class:`~lichen.core.errors.LichenError` that names the key and the fix.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Adapter",
    "Compare",
    "Data",
    "Engine",
    "Federation",
    "Model",
    "Optimizer",
    "Recipe",
    "Student",
    "Teacher",
]

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class Adapter(_Section):
    """LoRA on a frozen model: ``W + (alpha / rank) B A`` (Hu et al., 2022)."""

    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        default=("q_proj", "v_proj"), description="linear layers to adapt, by the end of their names"
    )
    rank: Positive = Field(default=8, description="rank of B A")
    alpha: float = Field(default=16.0, gt=0, description="scaling numerator")
    last: Positive | None = Field(
        default=None, description="adapt only so many of the last layers, and compute those below once a row; none: all"
    )
    modules_to_save: tuple[str, ...] = Field(default=(), description="modules trained in full, such as a new head")
    init_from: str | None = Field(default=None, description="folder of an existing PEFT adapter to start from")


class Student(_Section):
    """A small model trained from scratch."""

    kind: Literal["text-cnn", "transformer", "image-mlp", "image-cnn"] = Field(description="its architecture")
    width: Positive = Field(default=64, description="hidden width")


class Model(_Section):
    """The frozen foundation model, or the student trained instead of one."""

    name: str | None = Field(default=None, description="catalog name, local folder or hub id; none for a student")
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        default="float32", description="precision of frozen weights"
    )
    device: str = Field(default="cpu", description="torch device")
    adapter: Adapter = Field(default=Adapter(), description="what is trained on the frozen model")
    student: Student | None = Field(default=None, description="train this small model from scratch instead")


class Partition(_Section):
    """Who owns which rows."""

    by: Literal["client", "dirichlet", "iid"] = Field(default="client", description="the data's own owners, or a draw")
    clients: Positive = Field(default=10, description="how many, for a draw")
    alpha: float = Field(default=1.0, gt=0, description="Dirichlet concentration: small is skewed")


class Data(_Section):
    """The private data of the clients."""

    name: str = Field(description="catalog name, hub id, a file (JSONL, CSV, Parquet) or a folder with a file a client")
    columns: dict[Literal["client", "text", "prompt", "completion", "messages", "label", "group"], str] = Field(
        default_factory=dict, description="which of your columns plays which role"
    )
    form: Literal["plain", "transcript", "chat", "messages"] = Field(
        default="chat", description="how a text is put before a language model"
    )
    max_length: Positive = Field(default=64, description="tokens a row at most")
    partition: Partition = Field(default=Partition(), description="who owns which rows")
    max_clients: Positive | None = Field(default=None, description="how many clients at most, drawn by the seed")
    min_rows: Positive = Field(default=1, description="clients with fewer rows stay out")
    max_rows: Positive | None = Field(default=None, description="rows a client at most")
    test_rows: Positive | None = Field(
        default=None, description="held-out rows a client at most, for each of valid and test"
    )
    valid: Share = Field(default=0.1, description="share of each client's rows that choose learning rate and round")
    test: Share = Field(default=0.2, description="share of each client's rows that are only scored")
    split_by: Literal["group", "row"] = Field(default="group", description="what stays together in a split")
    unsplit: Literal["refuse", "drop"] = Field(
        default="refuse", description="clients with too few rows or conversations to leave some for every part"
    )
    one_class: Literal["refuse", "keep", "drop"] = Field(
        default="refuse", description="clients whose rows all have one label"
    )

    @model_validator(mode="after")
    def _leave_something(self) -> Data:
        if self.valid + self.test >= 1:
            raise ValueError("data: valid and test leave no rows to train on; keep their sum below 1")
        return self


class Optimizer(_Section):
    """How a client trains."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="client optimizer")
    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1e-3,), min_length=1, description="learning rates; several are a grid, chosen on validation data"
    )
    grid_rounds: Positive | None = Field(
        default=None, description="rounds every learning rate is tried for before the best goes on; none: all of them"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="for sgd")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled for adamw")
    clip: float | None = Field(default=1.0, gt=0, description="each client's gradient norm at most")
    prox: float = Field(default=0.0, ge=0, description="FedProx pull towards the shared model (mu)")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="learning rate over rounds"
    )
    warmup: int = Field(default=0, ge=0, description="rounds of linear warm-up")


class Server(_Section):
    """How the server steps with the clients' mean change (Reddi et al., 2021)."""

    name: Literal["sgd", "adam", "yogi"] = Field(default="sgd", description="server optimizer")
    lr: float = Field(default=1.0, gt=0, description="1 with sgd is plain averaging")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="for sgd")


class Federation(_Section):
    """The rounds."""

    rounds: Positive = Field(default=10, description="rounds in all")
    per_round: Positive | None = Field(default=None, description="clients invited a round; none invites everyone")
    sampling: Literal["uniform", "poisson", "weighted"] = Field(default="uniform", description="how they are drawn")
    steps: Positive = Field(default=4, description="local steps of a client in a round")
    batch: Positive = Field(default=4, description="rows a local step")
    aggregate: Literal["mean", "fedit", "fedex"] = Field(default="fedit", description="how changes become one")
    weighting: Literal["examples", "uniform"] = Field(default="examples", description="weight of a client in the mean")
    server: Server = Field(default=Server(), description="server optimizer")
    valid_every: Positive = Field(default=1, description="rounds between validations; the best one is kept")


class Compare(_Section):
    """What the federation is held against."""

    columns: tuple[Literal["base", "alone", "pooled"], ...] = Field(
        default=("base", "alone", "pooled"), description="columns beside federated"
    )
    metric: Literal["perplexity", "macro_f1", "accuracy"] | None = Field(
        default=None, description="what is compared; none: perplexity for chat, else macro_f1"
    )
    forms: tuple[Literal["plain", "transcript", "chat"], ...] = Field(
        default=(), description="forms the bare model is tried in; the best one is its score"
    )
    pooled_batch: Positive | None = Field(
        default=None, description="rows a step of the pooled column; steps keep the budget"
    )
    forgotten: str | None = Field(default=None, description="catalog text whose perplexity is taken before and after")
    forgotten_rows: Positive = Field(default=64, description="rows of it")
    partitions: Positive = Field(default=10, description="oneshot: random partitions to compare with pooled")


class Teacher(_Section):
    """A foundation model reached only through its answers (task ``teach``)."""

    name: str = Field(default="minilm-l6", description="catalog name, local folder or hub id")
    public: Share = Field(default=0.5, description="share of owners outside the federation whose rows are public")
    labelled: Positive = Field(default=2000, description="public labelled rows the teacher's head is trained on")
    unlabelled: Positive = Field(default=2000, description="public texts it answers")
    top_k: Positive = Field(default=5, description="classes in an answer")
    few: Positive = Field(default=10, description="labels a client has")
    public_batch: Positive = Field(default=16, description="answered rows a local step")


class Engine(_Section):
    """Where clients run."""

    name: Literal["local", "spawned", "distributed"] = Field(
        default="local",
        description="`local`: this process; `spawned`: clients behind pipes, in processes such as a real node's; "
        "`distributed`: ranks that share out the clients and add up their sums, on this machine or by torchrun on many",
    )
    block: Positive | None = Field(
        default=None, description="clients side by side; none: as many as memory holds and the processor gains from"
    )
    packing: bool = Field(
        default=True,
        description="rows back to back without padding, several clients in one call; "
        "false: padded, a call a client, so that a client's numbers have the same bits in any company",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="with packing, keep only what goes into each layer and compute the rest again on the way back; "
        "none: when one client alone would not fit",
    )
    nodes: Positive = Field(default=2, description="processes, for spawned and distributed")


class Recipe(_Section):
    """Everything a run depends on."""

    name: str = Field(default="recipe", description="how the run is called")
    question: str = Field(default="", description="what it answers, in a sentence")
    task: Literal["chat", "classify", "oneshot", "teach"] = Field(description="what is learned")
    seed: int = Field(default=0, ge=0, lt=2**31, description="every draw comes from it")
    model: Model
    data: Data
    optimizer: Optimizer = Field(default=Optimizer(), description="how a client trains")
    federation: Federation = Field(default=Federation(), description="the rounds")
    compare: Compare = Field(default=Compare(), description="what it is held against")
    teacher: Teacher | None = Field(default=None, description="for task teach")
    ridge: float = Field(default=1.0, gt=0, description="oneshot: lambda of the closed-form head")
    engine: Engine = Field(default=Engine(), description="where clients run")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        model, student = self.model, self.model.student
        if model.name is None and student is None:
            raise ValueError("model: has neither a name nor a student; name a foundation model, or give model.student")
        if model.name is not None and student is not None and self.task != "teach":
            raise ValueError("model: name and student exclude each other; remove one")
        if self.task == "chat" and student is not None:
            raise ValueError("model.student: task chat adapts a language model; give model.name instead")
        if self.task == "oneshot" and model.name is None:
            raise ValueError("model.name: task oneshot needs an encoder; name one, such as minilm-l6")
        if self.task == "teach" and (self.teacher is None or student is None):
            raise ValueError("teacher: task teach needs both teacher and model.student; add what is missing")
        if self.task != "teach" and self.teacher is not None:
            raise ValueError("teacher: only task teach has one; remove it or set task: teach")
        if (self.task == "chat") != (self.compare.metric in (None, "perplexity")) and self.compare.metric is not None:
            raise ValueError(
                "compare.metric: does not fit the task; use perplexity for chat, else macro_f1 or accuracy"
            )
        server = self.federation.server
        if self.federation.aggregate == "fedex" and (server.name, server.lr, server.momentum) != ("sgd", 1.0, 0.0):
            raise ValueError(
                "federation.server: fedex is exact for plain averaging only; use sgd with lr 1 and no momentum"
            )
        if student is not None and self.federation.aggregate != "mean":
            raise ValueError("federation.aggregate: a student has no LoRA factors; use mean")
        if self.federation.per_round is None and self.federation.sampling != "uniform":
            raise ValueError(
                "federation.sampling: poisson and weighted need a number of clients; set federation.per_round"
            )
        return self

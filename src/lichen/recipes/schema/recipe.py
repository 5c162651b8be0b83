"""The recipe: everything a run depends on, typed.

Every key is checked when the recipe is built; a key that is unknown, of the wrong type or at odds
with another is one :class:`~lichen.core.errors.LichenError` that names the key and the fix.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from lichen.clients import method as client_method
from lichen.clients.method import ClientMethod
from lichen.clients.methods import DILOCO, METHODS
from lichen.declared import Part, Property
from lichen.engines import kinds
from lichen.engines.kinds import ENGINES, EngineKind
from lichen.models.adapters.table import facts_of
from lichen.recipes.schema.attack import AttackConfig
from lichen.recipes.schema.data import DataConfig
from lichen.recipes.schema.exchange import ExchangeConfig, refuse_heterogeneous
from lichen.recipes.schema.federation import FederationConfig, OptimizerConfig, WireConfig
from lichen.recipes.schema.fits import member, refuse
from lichen.recipes.schema.help import SemiConfig, SyntheticConfig, TeacherConfig, refuse_unhelpful
from lichen.recipes.schema.model import AdapterConfig, ModelConfig, Section, StudentConfig
from lichen.recipes.schema.names import TaskName
from lichen.recipes.schema.sections.audit import AuditConfig
from lichen.recipes.schema.sections.compare import CompareConfig
from lichen.recipes.schema.sections.engine import EngineConfig
from lichen.recipes.schema.sections.fingerprint import FingerprintConfig
from lichen.recipes.schema.sections.offsite import OffsiteConfig
from lichen.recipes.schema.sections.personal import PersonalConfig
from lichen.recipes.schema.sections.pipeline import PipelineConfig, misfits_of_hosts
from lichen.recipes.schema.sections.prefer import PreferConfig
from lichen.recipes.schema.sections.privacy import PrivacyConfig
from lichen.recipes.schema.sections.split import SplitConfig
from lichen.recipes.schema.sections.stream import StreamConfig
from lichen.recipes.schema.sections.value import ValueConfig
from lichen.server import rules
from lichen.server.robust.table import too_many_liars
from lichen.server.rules import RULES, AggregationRule
from lichen.tasks.registry import task_of

__all__ = [
    "AdapterConfig",
    "ExchangeConfig",
    "FederationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "StudentConfig",
    "TeacherConfig",
    "WireConfig",
]


class Recipe(Section):
    """Everything a run depends on."""

    name: str = Field(default="recipe", description="how the run is called")
    question: str = Field(default="", description="what it answers, in a sentence")
    task: TaskName = Field(description="what is learned")
    seed: int = Field(default=0, ge=0, lt=2**31, description="every draw comes from it")
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="how a client trains")
    federation: FederationConfig = Field(default=FederationConfig(), description="the rounds")
    wire: WireConfig = Field(default=WireConfig(), description="what is sent")
    compare: CompareConfig = Field(default=CompareConfig(), description="what it is held against")
    teacher: TeacherConfig | None = Field(
        default=None, description="a foundation model that answers; in chat it writes"
    )
    synthetic: SyntheticConfig | None = Field(default=None, description="classify: rows that a foundation model writes")
    semi: SemiConfig | None = Field(default=None, description="classify: learning from rows that have no label")
    exchange: ExchangeConfig | None = Field(
        default=None, description="classify: unequal students talk about public rows"
    )
    prefer: PreferConfig | None = Field(
        default=None, description="task prefer: which answers are better, and by which loss that is learned"
    )
    attack: AttackConfig | None = Field(
        default=None, description="for research: clients that lie, so that defences can be tested; none: nobody does"
    )
    privacy: PrivacyConfig | None = Field(
        default=None,
        description="noise that hides each client in what is learned, masks that hide its messages; none: neither",
    )
    audit: AuditConfig | None = Field(
        default=None, description="canaries in training, for `lichen audit`; none: nobody trains on a row but its own"
    )
    value: ValueConfig | None = Field(
        default=None, description="what each client contributed, round by round; none: nobody asks"
    )
    personal: PersonalConfig | None = Field(
        default=None, description="a model for each client beside the shared one; none: all end with the shared one"
    )
    fingerprint: FingerprintConfig | None = Field(default=None, description="secret pairs to claim the model by")
    offsite: OffsiteConfig | None = Field(
        default=None,
        description="simulations on an emulator: the whole model beside it; none: as where only its owner has it",
    )
    stream: StreamConfig | None = Field(
        default=None, description="rows come period by period; none: all rows are there at once"
    )
    split: SplitConfig | None = Field(
        default=None, description="the server holds the middle of the model; none: each client holds the whole"
    )
    pipeline: PipelineConfig | None = Field(
        default=None, description="task chat: one model over hosts that hold a piece each; none: each holds it whole"
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder where answers of foundation models are kept and found again; none: the cache",
        examples=["answers"],
    )
    ridge: float = Field(default=1.0, gt=0, description="lambda of a closed-form head")
    engine: EngineConfig = Field(default=EngineConfig(), description="where clients run")

    @property
    def rule(self) -> str:
        """How changes become one, by the recipe or by what is trained."""
        small = self.model.student is not None or bool(self.model.students)
        lora = not small and self.model.adapter.kind == "lora"
        return self.federation.aggregate or ("fedit" if lora else "mean")

    @property
    def aggregation(self) -> AggregationRule:
        """The rule of that name."""
        return RULES[self.rule]

    @property
    def method(self) -> ClientMethod:
        """How clients train."""
        return DILOCO if self.federation.keep_optimizer else METHODS[self.optimizer.name]

    @property
    def engine_kind(self) -> EngineKind:
        """Where clients run."""
        return ENGINES[self.engine.name]

    @property
    def streams(self) -> bool:
        """Periods are trained one after the other, each in a run of its own."""
        return self.stream is not None and self.stream.period is None

    @property
    def templated(self) -> bool:
        """Rows go through the chat template, at least when the bare model is scored."""
        return self.writes and bool({"chat", "messages"} & {self.data.form, *self.compare.forms})

    @property
    def unsafe_requests(self) -> str | None:
        """The requests on which refusals are counted; None where they are not."""
        at_stake = self.federation.repair is not None or (self.attack is not None and self.attack.kind == "unsafe")
        return self.compare.requests or ("harmbench" if at_stake else None)

    @property
    def writes(self) -> bool:
        """A language model is trained: rows are texts in a form, and have no label."""
        return task_of(self.task).writes

    @property
    def prefers(self) -> bool:
        """The language model learns which answers are better."""
        return task_of(self.task).prefers

    @property
    def preference(self) -> PreferConfig:
        """The section ``prefer``, where the task has one."""
        assert self.prefer is not None
        return self.prefer

    @property
    def rated(self) -> bool:
        """Rows of task prefer are rated one by one, and no pairs."""
        return self.preference.facts.needs == "rating" or "rating" in self.data.columns

    @property
    def classifies(self) -> bool:
        """A row's label is the name of its class."""
        labels = task_of(self.task).labels
        return labels is not None and labels.classes

    @property
    def noised(self) -> PrivacyConfig | None:
        """The section ``privacy``, where noise hides somebody."""
        return self.privacy if self.privacy is not None and self.privacy.noised else None

    @property
    def masked(self) -> PrivacyConfig | None:
        """The section ``privacy``, where the server learns sums alone."""
        return self.privacy if self.privacy is not None and self.privacy.secure else None

    @property
    def declares_labels(self) -> bool:
        """Clients may tell how many rows of each label they have: their messages tell it anyway."""
        by_class = self.exchange is not None and self.exchange.weighting == "classes"
        return self.classifies and (self.model.head in ("ridge", "lda") or by_class)

    @property
    def has_help(self) -> bool:
        """A foundation model, or the clients' unlabelled rows, help with the labels."""
        return not (self.teacher is None and self.synthetic is None and self.semi is None)

    @property
    def starts_at_server(self) -> bool:
        """What all begin from holds what the server alone has learned or been told: no client can make it."""
        made = self.model.head in ("ridge", "lda") or (self.semi is not None and self.semi.kind == "semifl")
        written = self.synthetic is not None and self.synthetic.at != "clients"
        # Answers ride in the tensors of every job; what a teacher writes in chat are rows.
        answered = self.teacher is not None and not (self.writes and self.teacher.at == "clients")
        return made or written or answered

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        model, student, task = self.model, self.model.student, task_of(self.task)
        if self.pipeline is not None:
            for fault in misfits_of_hosts(self):
                raise ValueError(fault)
        if task.prefers and self.prefer is None:
            raise ValueError(f"prefer: task {task.name} learns by a loss of preferences; set prefer.kind, such as dpo")
        if not task.prefers and self.prefer is not None:
            raise ValueError(f"prefer: task {task.name} learns no preferences; remove it, or use task: prefer")
        for role in ("chosen", "rejected", "rating"):
            if role in self.data.columns and not task.prefers:
                raise ValueError(f"data.columns.{role}: task {task.name} learns no preferences; use task: prefer")
        refuse_heterogeneous(
            self.exchange,
            task=task,
            model=model,
            public=self.data.public,
            optimizer=self.optimizer,
            federation=self.federation,
        )
        refuse(self, members_of(self))
        if model.name is None and student is None and model.scratch is None and not model.students:
            raise ValueError("model: has neither a name nor a student; name a foundation model, or give model.student")
        if model.scratch is not None and (model.name is not None or student is not None or not task.writes):
            raise ValueError("model.scratch: stands for itself, in task chat; remove model.name and model.student")
        if model.scratch is not None and model.adapter.kind != "full":
            raise ValueError("model.scratch: nothing of it is worth freezing; set model.adapter.kind: full")
        if model.name is not None and student is not None:
            raise ValueError("model: name and student exclude each other; remove one")
        if task.writes and student is not None:
            raise ValueError(f"model.student: task {task.name} adapts a language model; give model.name instead")
        if not task.writes and not task.students and model.name is None:
            raise ValueError(f"model.name: task {task.name} needs an encoder; name one, such as minilm-l6")
        refuse_unhelpful(
            task=task,
            student=student is not None,
            public=self.data.public,
            teacher=self.teacher,
            synthetic=self.synthetic,
            semi=self.semi,
        )
        if not self.templated:
            for key in ("system", "template", "thinking"):
                if getattr(self.data, key) not in (None, False):
                    raise ValueError(
                        f"data.{key}: only rows in form chat or messages of task chat go through a chat template; "
                        "remove it"
                    )
        if model.head in ("ridge", "lda") and not task.writes and not self.classifies:
            raise ValueError(f"model.head: {model.head} solves for classes, and task {task.name} has none; use random")
        if self.data.labels is not None and task.writes:
            raise ValueError(f"data.labels: task {task.name} has no labels; remove it")
        if "alone_best" in self.compare.baselines and not task.procedure.rounds:
            raise ValueError(
                f"compare.baselines: task {task.name} solves for each client at once, and has no rounds of which one "
                "is the best; use alone"
            )
        if "no_help" in self.compare.baselines and not self.has_help:
            raise ValueError("compare.baselines: there is no help to go without; remove `no_help`")
        if self.compare.metric not in (None, *task.metric_names):
            raise ValueError(
                f"compare.metric: does not fit task {task.name}; use {' or '.join(task.metric_names)}, or leave it out"
            )
        if self.compare.target_metric == "accuracy" and not self.classifies:
            raise ValueError(f"compare.target_metric: task {task.name} has no classes; use loss")
        refuse_misfits(self)
        fed, buffered = self.federation, self.federation.schedule.kind == "buffered"
        sampled = fed.schedule.concurrency if buffered else fed.clients_per_round
        if sampled is None and fed.sampling != "uniform":
            number = "schedule.concurrency" if buffered else "clients_per_round"
            raise ValueError(
                f"federation.sampling: poisson and weighted need a number of clients; set federation.{number}"
            )
        return self


def refuse_misfits(recipe: Recipe) -> None:
    """Refuse values that say nothing beside each other; what parts need of parts is :mod:`lichen.recipes.schema.fits`.

    Raises:
        ValueError: naming the key and the fix.
    """
    fed = recipe.federation
    if fed.server.nesterov and not (fed.server.name == "sgd" and fed.server.momentum):
        raise ValueError("federation.server.nesterov: looks ahead along no momentum; use sgd and set server.momentum")
    if (fed.stream_fragments > 1 or fed.drop_prob) and not fed.keep_optimizer:
        raise ValueError(
            "federation.keep_optimizer: stream_fragments and drop_prob are a DiLoCo worker's; set it to true"
        )
    warmup = recipe.optimizer.warmup
    steps = fed.local_steps if fed.keep_optimizer else None
    if warmup >= fed.rounds * (steps or 1) and warmup:
        what = f"{warmup} {'rounds' if steps is None else 'steps'} do not fit"
        raise ValueError(
            f"optimizer.warmup: {what}; use fewer than {fed.rounds * (steps or 1)}, or more federation.rounds"
        )
    schedule = fed.schedule
    if schedule.kind == "synchronous":
        for key in ("arrivals", "concurrency", "exponent", "hinge", "mixing", "max_age"):
            if getattr(schedule, key) != type(schedule).model_fields[key].default:
                raise ValueError(f"federation.schedule.{key}: is FedBuff's; set federation.schedule.kind: buffered")
    elif schedule.concurrency is not None and schedule.arrivals > schedule.concurrency:
        raise ValueError("federation.schedule.arrivals: more than are at work; raise schedule.concurrency, or lower it")
    if schedule.mixing is not None and schedule.arrivals != 1:
        raise ValueError("federation.schedule.mixing: models are mixed one by one; set federation.schedule.arrivals: 1")
    refuse_many_liars(recipe)
    if fed.ranks is not None and max(fed.ranks) > recipe.model.adapter.rank:
        raise ValueError("federation.ranks: some are above model.adapter.rank; raise that one")


def refuse_many_liars(recipe: Recipe) -> None:
    """Refuse a robust rule for rounds of fewer clients than it needs, as far as a recipe says how many there are.

    Raises:
        ValueError: naming the key and the fix.
    """
    fed, partition = recipe.federation, recipe.data.partition
    if fed.robust is None:
        return
    public = recipe.data.public
    if fed.robust.asks_server and (not recipe.classifies or public is None or not public.labelled):
        raise ValueError(
            f"federation.robust.rule: the server of {fed.robust.rule} trains on public rows with labels; use task "
            "classify and set data.public.labelled, or another rule"
        )
    everyone = recipe.data.max_clients if partition.by == "client" else partition.clients
    came = fed.schedule.arrivals if fed.schedule.kind == "buffered" else fed.clients_per_round
    most = min((n for n in (came, everyone) if n is not None), default=None)
    if most is not None and (fault := too_many_liars(fed.robust.rule, fed.robust.liars, most)) is not None:
        raise ValueError(f"{fault.where}: {fault.what}; {fault.fix}")


def members_of(recipe: Recipe) -> tuple[Part, ...]:
    """The rule, the client method, the engine and what is trained, with what each needs and lacks."""
    steps = member(METHODS[recipe.optimizer.name], client_method.DECIDES, "optimizer.name")
    keeps = (
        (member(DILOCO, client_method.DECIDES, DILOCO.key, word=DILOCO.key),)
        if recipe.federation.keep_optimizer
        else ()
    )
    task = task_of(recipe.task)
    return (
        Part(key="task", word=f"task {task.name}", needs=task.procedure.needs),
        trained_of(recipe),
        *keeps,
        member(recipe.aggregation, rules.DECIDES, "federation.aggregate"),
        steps,
        member(ENGINES[recipe.engine.name], kinds.DECIDES, "engine.name"),
    )


def trained_of(recipe: Recipe) -> Part:
    """What is trained, and what does not hold with it."""
    adapter = recipe.model.adapter.kind
    small = recipe.model.student is not None or bool(recipe.model.students)
    facts = facts_of(adapter)
    holds = {
        Property.LORA_FACTORS: facts.low_rank and not small,
        Property.EVERY_WEIGHT: facts.whole and not small,
        Property.SOFT_PROMPT: adapter == "prompt" and recipe.writes and not small,
        Property.SMALL_MODEL: small,
    }
    lacks = frozenset(one for one, there in holds.items() if not there)
    return Part(key="model.adapter.kind", word="a student" if small else adapter, lacks=lacks)

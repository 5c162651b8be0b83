"""The ``teacher``, ``synthetic`` and ``semi`` sections: help of a foundation model.

References:
    Distillation: arXiv:1503.02531; of sequences: arXiv:1606.07947; layer-wise: arXiv:1909.10351, arXiv:2012.15828;
    calibrated zero-shot labels: arXiv:2102.09690, arXiv:2309.17249; private evolution: arXiv:2305.15560,
    arXiv:2403.01749; FixMatch: arXiv:2001.07685; FlexMatch: arXiv:2110.08263; SemiFL: arXiv:2106.01432.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from lichen.fm.filtering.kinds import KINDS
from lichen.recipes.schema.model import Positive, Section, Share
from lichen.tasks.task import Task

__all__ = [
    "EndpointConfig",
    "PublicConfig",
    "SemiConfig",
    "SyntheticConfig",
    "TeacherConfig",
    "Use",
    "refuse_unhelpful",
]

Chance = Annotated[float, Field(ge=0.0, le=1.0)]

Use = Literal["clients", "server", "both"]
"""Who learns from what a foundation model gave."""

Origin = Literal["public", "synthetic", "private"]

if TYPE_CHECKING:
    FilterKind = str
else:
    FilterKind = Literal[tuple(KINDS)]

Sieve = Literal["length", "duplicates", "leakage", "agreement", "fluency", "harm"]


class PublicConfig(Section):
    """Rows of nobody's: what a teacher answers, and what a writer may be shown."""

    share: Share = Field(default=0.5, description="share of the owners, or of the rows where owners are drawn")
    labelled: int = Field(default=2000, ge=0, description="classify: public rows whose labels are known")
    unlabelled: int = Field(default=2000, ge=0, description="public rows without labels")


class FilterConfig(Section):
    """What of a text may not go to an endpoint, whatever the text's origin."""

    kinds: tuple[FilterKind, ...] = Field(
        default=tuple(KINDS),
        description="patterns that are looked for; " + "; ".join(f"`{kind}`: {what}" for kind, what in KINDS.items()),
        examples=[["mail", "phone"]],
    )
    names: str | None = Field(
        default=None, description="a file with names that may not go out either, one a line", examples=["names.txt"]
    )
    private_words: int | None = Field(
        default=None,
        ge=2,
        description="so many words in a row that stand in a private row may not go out; none: not looked for",
    )
    action: Literal["mask", "count", "refuse"] = Field(
        default="mask",
        description="`mask`: the kind stands in its place; `count`: it is sent, and counted; `refuse`: the run ends",
    )

    @model_validator(mode="after")
    def _finds_something(self) -> FilterConfig:
        if not self.kinds and self.names is None and self.private_words is None:
            raise ValueError("filter.kinds: looks for nothing; name kinds, names or private_words, or remove filter")
        return self


class EndpointConfig(Section):
    """An endpoint that speaks the OpenAI format, in place of a local model."""

    url: str = Field(description="its address, the version included")
    model: str = Field(description="how the endpoint calls the model")
    ask: Literal["echo", "first", "chat", "text"] = Field(
        default="first",
        description="how log-probabilities are asked for: of the whole text, of the next token, of a chat's next one; "
        "`text`: none are told, and a written answer is read",
    )
    api_key_env: str = Field(default="", description="environment variable that holds the key; empty: none is sent")
    rate_limit: float | None = Field(default=None, gt=0, description="calls a second at most")
    concurrency: Positive = Field(default=1, description="calls under way at once")
    timeout: float = Field(default=60.0, gt=0, description="seconds a call may take")
    max_retries: int = Field(default=5, ge=0, description="how often a call that failed is made again, at most")
    filter: FilterConfig | None = Field(
        default=None, description="what of a text may not go to it; none: texts go as they are"
    )


OF_CLASSES = {
    "kind",
    "template",
    "label_words",
    "calibrate",
    "top_k",
    "temperature",
    "weight",
    "min_confidence",
    "layers",
}
OF_CLASSES |= {"select", "public_batch_size"}
"""Keys of a teacher that say nothing where it writes."""


class TeacherConfig(Section):
    """A foundation model reached only through its answers."""

    name: str = Field(default="minilm-l6", description="catalog name, local folder or hub id")
    endpoint: EndpointConfig | None = Field(
        default=None, description="ask this endpoint instead; kind zero-shot, or answer_format text"
    )
    kind: Literal["head", "zero-shot", "labels"] = Field(
        default="head",
        description="`head`: a linear head on the encoder's features, trained on the public labelled rows; "
        "`zero-shot`: a language model is asked in words; `labels`: no model at all, the public labelled rows with "
        "their own labels stand in place of answered ones, which is what a teacher is to be held against",
    )
    template: str = Field(default="Text: {text} Label:", description="zero-shot: how it is asked")
    label_words: dict[str, str] = Field(
        default_factory=dict, description="zero-shot: the word that stands for each class; none: the class itself"
    )
    calibrate: Literal["none", "context", "batch"] = Field(
        default="batch", description="zero-shot: divide by what it says of nothing, or on average of the public texts"
    )
    answer_format: Literal["top_k", "all", "label", "text"] = Field(
        default="top_k",
        description="what an answer holds: the likeliest classes, all of them, or one name alone, as it is for kind "
        "labels; chat: `text`, which it writes after public prompts",
    )
    max_new_tokens: Positive = Field(default=48, description="text: tokens an answer at most")
    plain: bool = Field(default=False, description="text: it is given the bare prompt, for models that know no chat")
    share: Share = Field(default=0.5, description="text, clients: share of a client's rows that may be the teacher's")
    top_k: Positive = Field(default=5, description="top_k: classes in an answer")
    temperature: float = Field(default=1.0, gt=0, description="answers and students are softened by it")
    weight: float = Field(default=1.0, gt=0, description="weight of an answered row beside a labelled one")
    min_confidence: Chance = Field(default=0.0, description="answers whose likeliest class has less do not teach")
    at: Use = Field(default="clients", description="who learns from the answers")
    server_steps: Positive = Field(default=300, description="server, both: steps before the first round")
    layers: dict[int, int] = Field(
        default_factory=dict,
        description="server, both: the teacher's layer that each layer of a transformer student follows",
    )
    select: bool = Field(
        default=False, description="clients follow it only in classes where it beats them on their own rows"
    )
    public_batch_size: Positive = Field(default=16, description="answered rows a local step")
    may_see: tuple[Origin, ...] = Field(default=("public", "synthetic"), description="what may be sent to it")

    @model_validator(mode="after")
    def _means_something(self) -> TeacherConfig:
        if self.kind == "labels":
            if self.answer_format != "label":
                raise ValueError(
                    "teacher.answer_format: a public label is one name; set it to label beside kind: labels"
                )
            if unread := [key for key in ("endpoint", "layers", "select") if getattr(self, key)]:
                raise ValueError(f"teacher.{unread[0]}: kind labels asks no model; remove it, or use kind: head")
        runs = self.endpoint and self.endpoint.filter and self.endpoint.filter.private_words
        if runs and "private" in self.may_see:
            raise ValueError(
                "teacher.endpoint.filter.private_words: private rows go there whole; remove it, or private from "
                "teacher.may_see"
            )
        if self.endpoint is not None and self.kind != "zero-shot" and self.answer_format != "text":
            raise ValueError("teacher.kind: an endpoint gives no features to train a head on; set it to zero-shot")
        if self.kind == "zero-shot" and "{text}" not in self.template:
            raise ValueError("teacher.template: has no place for the text; write {text} where it belongs")
        if self.answer_format == "text":
            if self.endpoint is None and "name" not in self.model_fields_set:
                raise ValueError("teacher.name: is an encoder's, which cannot write; name a language model")
            if strange := self.model_fields_set & OF_CLASSES:
                raise ValueError(
                    f"teacher.{min(strange)}: is of answers with classes; leave it out beside answer_format: text"
                )
        if self.layers and (self.at == "clients" or self.kind != "head"):
            raise ValueError("teacher.layers: need the teacher's own layers at the server; use kind head, at: both")
        return self


class SyntheticConfig(Section):
    """Rows that a foundation model writes."""

    kind: Literal["prompted", "evolution"] = Field(
        default="prompted",
        description="`prompted`: written by label alone; `evolution`: drawn towards the private rows by private votes",
    )
    name: str = Field(default="smollm2-135m", description="who writes: catalog name, local folder or hub id")
    endpoint: EndpointConfig | None = Field(default=None, description="ask this endpoint instead")
    embedder: str = Field(default="minilm-l6", description="evolution: the encoder of votes")
    about: str = Field(default="", description="what all texts are, such as: customer reviews of clothing")
    item_name: str = Field(default="text", description="what one is called, such as: review")
    labels: dict[str, str] = Field(
        default_factory=dict, description="what each class means, in words; none: the class itself"
    )
    attributes: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="what else may vary: for each name some values, drawn for every text"
    )
    style: str = Field(default="", description="how to write, in words")
    plain: bool = Field(default=True, description="prompt by examples alone, which small models understand better")
    examples: int = Field(default=0, ge=0, description="public labelled rows shown in a prompt")
    per_class: Positive = Field(default=40, description="texts of each class")
    max_new_tokens: Positive = Field(default=48, description="tokens a text at most")
    temperature: float = Field(default=0.7, gt=0, description="how freely it writes")
    top_p: float = Field(default=0.9, gt=0, le=1, description="share of the probability it draws from")
    iterations: Positive = Field(default=4, description="evolution: rounds of votes")
    variations: Positive = Field(default=1, description="evolution: variations of each chosen text")
    epsilon: float | None = Field(default=None, gt=0, description="evolution: privacy of one row; none: no noise")
    delta: float | None = Field(default=None, gt=0, lt=1, description="evolution: none: 1 / (N ln N)")
    filters: tuple[Sieve, ...] | None = Field(
        default=None,
        description="what a text must pass: a fair length, no `duplicates`, no copy of a private row (`leakage`), "
        "the teacher's `agreement`; no less `fluency` and no more `harm`, as the writer's model judges, than 99 of 100 "
        "public rows; none: the first three, without leakage where epsilon is promised",
    )
    at: Use = Field(default="clients", description="who trains on them")
    server_steps: Positive = Field(default=300, description="server, both: steps before the first round")
    missing: bool = Field(default=False, description="clients: each gets only what it has too little of")
    share: Share = Field(default=0.9, description="clients: share of a client's rows that may be synthetic")

    @property
    def sieve(self) -> tuple[Sieve, ...]:
        """The filters, by the recipe or by what is promised."""
        if self.filters is not None:
            return self.filters
        return ("length", "duplicates") if self.epsilon is not None else ("length", "duplicates", "leakage")


class SemiConfig(Section):
    """Unlabelled rows of the clients' own, labelled by the model as it learns."""

    kind: Literal["fixmatch", "flexmatch", "semifl"] = Field(
        description="`fixmatch`: labels of the model as it is in a step; `flexmatch`: with lower thresholds for "
        "classes that are learned later; `semifl`: labels of the model as received, of all of a client's rows, and the "
        "server trains on the public labelled rows in turns",
    )
    threshold: Chance = Field(default=0.95, description="probability a class needs to count")
    weight: float = Field(
        default=1.0, gt=0, description="of an unlabelled row beside a labelled one; semifl: of a mixed row"
    )
    batch_size: Positive = Field(default=16, description="unlabelled rows a local step")
    warmup_rounds: int = Field(
        default=0, ge=0, description="rounds on labelled rows alone, before the model can label others; not semifl"
    )
    teacher_rounds: int = Field(
        default=0,
        ge=0,
        description="rounds in which the teacher labels them; it must be allowed to see private rows; not semifl",
    )
    mixup: float = Field(
        default=0.75, gt=0, description="semifl: a of Beta(a, a), the distribution of a row's share in a mixed one"
    )
    server_steps: Positive = Field(default=8, description="semifl: the server's steps a round")


def refuse_unhelpful(
    *,
    task: Task,
    student: bool,
    public: PublicConfig | None,
    teacher: TeacherConfig | None,
    synthetic: SyntheticConfig | None,
    semi: SemiConfig | None,
) -> None:
    """Refuse help that does not go with the task, the rows or other help.

    Raises:
        ValueError: naming the key and the fix.
    """
    for key, section in {"teacher": teacher, "synthetic": synthetic, "semi": semi}.items():
        if section is not None and key not in task.help:
            raise ValueError(f"{key}: goes with task classify; remove it, or set task: classify")
    labels = teacher is not None and teacher.kind == "labels"
    if labels and task.writes:
        raise ValueError(f"teacher.kind: labels are of classes, which task {task.name} has none of; name a model")
    if teacher is not None and (teacher.answer_format == "text") != task.writes:
        if task.writes:
            raise ValueError(
                f"teacher.answer_format: is of classes, which task {task.name} has none of; set it to text"
            )
        raise ValueError("teacher.answer_format: text is for task chat; use top_k, all or label")
    if teacher is not None and public is None:
        raise ValueError("data.public: a teacher answers public texts, and there are none; add the section")
    if labels and public is not None and not public.labelled:
        raise ValueError("data.public.labelled: its labels are what kind labels teaches; raise it")
    if teacher is not None and not labels and public is not None and not public.unlabelled:
        raise ValueError("data.public.unlabelled: leaves the teacher nothing to answer; raise it")
    headed = teacher is not None and teacher.kind == "head" and teacher.answer_format != "text"
    if headed and public is not None and not public.labelled:
        raise ValueError(
            "data.public.labelled: the teacher's head needs labelled rows; raise it, or use kind: zero-shot"
        )
    if teacher is not None and teacher.layers and not student:
        raise ValueError("teacher.layers: a student follows them; give model.student, kind transformer")
    if synthetic is not None and synthetic.examples and (public is None or not public.labelled):
        raise ValueError("synthetic.examples: are public labelled rows; set data.public.labelled")
    if synthetic is not None and synthetic.epsilon is not None and synthetic.kind != "evolution":
        raise ValueError(
            "synthetic.epsilon: prompted texts have seen no private row; remove it, or use kind: evolution"
        )
    if synthetic is not None and synthetic.epsilon is not None and "leakage" in synthetic.sieve:
        raise ValueError("synthetic.filters: flags of private rows are not in epsilon; leave leakage out")
    if synthetic is not None and "agreement" in synthetic.sieve and (teacher is None or labels):
        raise ValueError("synthetic.filters: agreement is the teacher's; add a teacher, or leave it out")
    if synthetic is not None and {"fluency", "harm"} & set(synthetic.sieve) and public is None:
        raise ValueError("synthetic.filters: fluency and harm are held against public rows; set data.public")
    if semi is not None and teacher is not None and teacher.at != "server":
        raise ValueError("teacher.at: beside semi a step has no room for public rows; set it to server")
    if semi is not None and semi.teacher_rounds and labels:
        raise ValueError("semi.teacher_rounds: kind labels asks no model; remove it, or use teacher.kind: head")
    if semi is not None and semi.teacher_rounds and (teacher is None or "private" not in teacher.may_see):
        raise ValueError(
            "semi.teacher_rounds: need a teacher that may see private rows; add private to teacher.may_see"
        )
    if teacher is not None and teacher.select and "private" not in teacher.may_see:
        raise ValueError("teacher.select: it answers the clients' own rows, too; add private to teacher.may_see")
    if teacher is not None and teacher.select and teacher.at == "server":
        raise ValueError("teacher.select: is the clients' choice; set teacher.at to clients or both")
    if semi is not None and semi.kind == "semifl" and (public is None or not public.labelled):
        raise ValueError("semi.kind: the server of semifl trains on public labelled rows; set data.public.labelled")
    if semi is not None and semi.kind == "semifl" and synthetic is not None and synthetic.at != "server":
        raise ValueError("synthetic.at: the clients of semifl learn from no labelled row; set it to server")

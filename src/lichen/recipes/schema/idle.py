"""Keys that say nothing beside a recipe's other keys.

A key that nobody reads would be believed to have acted. So each part of a recipe declares what it reads: client
methods, rules, engines and adapters beside their code, tasks with how they are run, and words of the recipe alone in
the table here. Whoever sets a key to another value than its default, where nobody reads it, is told so, with what would
read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

from lichen.clients.attack.kinds import ATTACKS
from lichen.clients.methods import METHODS
from lichen.core.errors import LichenError
from lichen.engines.kinds import ENGINES
from lichen.models.preference.kinds import PREFERENCES
from lichen.recipes.schema.features.reads import Read, every, of_adapters, of_family, of_words
from lichen.recipes.schema.sections.pipeline import unread_by_hosts
from lichen.server.robust.table import ROBUST
from lichen.server.rules import RULES
from lichen.tasks.registry import task_of

__all__ = ["changed_keys", "idle_keys"]


def changed_keys(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a recipe whose values are not their defaults."""
    for name, field in type(section).model_fields.items():
        value, default = getattr(section, name), field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            yield from changed_keys(value, f"{prefix}{name}.")
            if default is None:
                yield prefix + name
        elif value != default:
            yield prefix + name


def idle_keys(recipe: Any) -> Iterator[LichenError]:
    """For each key of a recipe that nobody reads there, what its writer is to be told."""
    for key in changed_keys(recipe):
        if recipe.pipeline is not None and (unread := unread_by_hosts(key)) is not None:
            yield unread
            continue
        whole = {key, *(key[:at] for at, letter in enumerate(key) if letter == ".")}
        for read in READS:
            if not whole.isdisjoint(read.keys) and not read.when(recipe):
                yield LichenError(read.what(recipe), where=key, fix=read.fix)
                break
        else:
            procedure = task_of(recipe.task).procedure
            if procedure.reads is not None and not any(f"{key}.".startswith(f"{one}.") for one in procedure.reads):
                what = f"task {recipe.task} does not read it, for its clients answer once"
                yield LichenError(what, where=key, fix="remove it, or use task: classify")


def _small(recipe: Any) -> bool:
    return recipe.model.student is not None or bool(recipe.model.students)


def _at(section: str) -> tuple[Read, Read]:
    """Of a section of help: what its clients alone read, and its server."""

    def at(recipe: Any) -> str | None:
        return getattr(getattr(recipe, section), "at", None)

    clients = {"teacher": ("share", "public_batch_size"), "synthetic": ("share", "missing")}[section]
    return (
        Read(
            keys=tuple(f"{section}.{key}" for key in clients),
            when=lambda r: at(r) != "server",
            what=lambda _: "nothing of it goes to the clients",
            fix=f"remove it, or set {section}.at: both",
        ),
        Read(
            keys=(f"{section}.server_steps",),
            when=lambda r: at(r) != "clients",
            what=lambda _: "the server trains on nothing of it",
            fix=f"remove it, or set {section}.at: both",
        ),
    )


def _by_endpoint(section: str) -> Read:
    return Read(
        keys=(f"{section}.name",),
        when=lambda r: getattr(r, section).endpoint is None,
        what=lambda _: f"{section}.endpoint.model says whom to ask",
    )


def _answer(recipe: Any) -> str | None:
    return None if recipe.teacher is None else str(recipe.teacher.answer_format)


def _optional(section: str, key: str) -> Callable[[Any], str | None]:
    return lambda recipe: getattr(getattr(recipe, section), key, None)


def _rounds(recipe: Any) -> bool:
    return task_of(recipe.task).procedure.rounds


_OF_A_MODEL = ("name", "temperature", "min_confidence", "may_see")
"""Of a teacher that is a model, and not public labels in its place."""

READS: tuple[Read, ...] = (
    # What is trained.
    Read(
        keys=("model.adapter", "model.dtype", "model.quantize", "model.layers", "model.random"),
        when=lambda r: not _small(r),
        what=lambda _: "a student stands for itself",
        fix="remove it, or give model.name instead of a student",
    ),
    Read(
        keys=("model.head",),
        when=lambda r: not r.writes and not (_small(r) and r.model.head == "random"),
        what=lambda r: f"task {r.task} trains no head" if r.writes else "a student's head is drawn by the seed",
    ),
    Read(
        keys=("model.head",),
        when=lambda r: _rounds(r) or r.model.head != "random",
        what=lambda r: f"task {r.task} solves for the head",
        fix="use ridge or lda",
    ),
    Read(
        keys=("model.adapter.start",),
        when=lambda r: r.method.asks_only,
        what=lambda _: "only a prompt that is searched starts from a text",
        fix="remove it, or set optimizer.name: cma",
    ),
    *of_adapters(),
    Read(
        keys=("ridge",),
        when=lambda r: r.model.head != "lda" if not _rounds(r) else r.model.head == "ridge",
        what=lambda _: "no head is solved by ridge regression",
        fix="remove it, or set model.head: ridge",
    ),
    # Rows.
    *of_words(
        "data.partition",
        "data.partition.by",
        {"dirichlet": ("clients", "alpha", "test"), "iid": ("clients", "test"), "client": ()},
        lambda r: r.data.partition.by,
    ),
    Read(
        keys=("data.form", "compare.forms", "compare.retention_text", "compare.requests"),
        when=lambda r: r.writes,
        what=lambda r: f"is of language models, which task {r.task} trains none of",
    ),
    Read(
        keys=("data.public.labelled",),
        when=lambda r: not r.writes,
        what=lambda r: f"task {r.task} has no labels",
    ),
    # How a client trains, and how changes become one.
    *of_family("optimizer", "optimizer.name", METHODS, lambda r: str(r.optimizer.name), every(METHODS)),
    Read(
        keys=("optimizer.grid_rounds",),
        when=lambda r: len(r.optimizer.lr) > 1,
        what=lambda _: "there is one learning rate, and nothing to try",
        fix="remove it, or list several in optimizer.lr",
    ),
    *of_family("federation", "federation.aggregate", RULES, lambda r: str(r.rule), every(RULES)),
    Read(
        keys=("federation.aggregate",),
        when=lambda r: r.exchange is None or r.rule == "mean",
        what=lambda _: "students of an exchange are averaged by the mean, or not at all",
    ),
    *of_words(
        "federation",
        "federation.fair",
        {"minmax": ("fair_rate",), "qffl": ("q",), "tilted": ("tilt",), "none": ()},
        lambda r: r.federation.fair,
    ),
    *of_words(
        "federation",
        "federation.reward",
        {"cgsv": ("reward_beta",), "none": ()},
        lambda r: r.federation.reward,
    ),
    *of_words(
        "federation.robust",
        "federation.robust.rule",
        {name: sorted(rule.reads) for name, rule in ROBUST.items()},
        lambda r: None if r.federation.robust is None else str(r.federation.robust.rule),
    ),
    *of_words(
        "federation.server",
        "federation.server.name",
        {"sgd": ("momentum", "nesterov"), "adam": (), "yogi": ()},
        lambda r: r.federation.server.name,
    ),
    # Help.
    *of_words(
        "teacher",
        "teacher.kind",
        {
            "zero-shot": ("template", "label_words", "calibrate", *_OF_A_MODEL),
            "head": _OF_A_MODEL,
            "labels": (),
        },
        _optional("teacher", "kind"),
    ),
    *of_words(
        "teacher",
        "teacher.answer_format",
        {"text": ("max_new_tokens", "plain", "share"), "top_k": ("top_k",), "all": (), "label": ()},
        _answer,
    ),
    *_at("teacher"),
    _by_endpoint("teacher"),
    *of_words(
        "synthetic",
        "synthetic.kind",
        {"evolution": ("embedder", "iterations", "variations", "epsilon", "delta"), "prompted": ()},
        _optional("synthetic", "kind"),
    ),
    Read(
        keys=("synthetic.delta",),
        when=lambda r: r.synthetic.epsilon is not None,
        what=lambda _: "nothing is promised without epsilon",
        fix="remove it, or set synthetic.epsilon",
    ),
    *_at("synthetic"),
    _by_endpoint("synthetic"),
    *of_words(
        "semi",
        "semi.kind",
        {
            "fixmatch": ("warmup_rounds", "teacher_rounds"),
            "flexmatch": ("warmup_rounds", "teacher_rounds"),
            "semifl": ("mixup", "server_steps"),
        },
        _optional("semi", "kind"),
    ),
    # What clients contributed.
    *of_words(
        "value",
        "value.kind",
        {"exact": ("of",), "gtg": ("of",), "loo": ("of",), "first": ()},
        _optional("value", "kind"),
    ),
    # Clients that lie.
    *of_words(
        "attack",
        "attack.kind",
        {name: sorted(kind.reads) for name, kind in ATTACKS.items()},
        _optional("attack", "kind"),
    ),
    Read(
        keys=("attack.trigger",),
        when=lambda r: r.model.student is None or not r.model.student.kind.startswith("image"),
        what=lambda _: "rows of numbers have a corner for a trigger",
    ),
    # Canaries.
    Read(
        keys=("audit.scale",),
        when=lambda r: r.model.student is not None and r.model.student.kind.startswith("image"),
        what=lambda _: "canaries of texts are words",
    ),
    # Preferences.
    *of_words(
        "prefer",
        "prefer.kind",
        {name: sorted(kind.reads) for name, kind in PREFERENCES.items()},
        _optional("prefer", "kind"),
    ),
    Read(
        keys=("prefer.temperature",),
        when=lambda r: r.prefer is None or r.prefer.writes_answers,
        what=lambda _: "the model writes no answers",
        fix="remove it, or set prefer.own_answers",
    ),
    Read(
        keys=("prefer.good", "prefer.bad", "prefer.min_good", "prefer.min_bad"),
        when=lambda r: r.prefer is None or r.rated,
        what=lambda _: "no column holds ratings",
        fix="remove it, or name the column in data.columns.rating",
    ),
    # Own models.
    *of_words(
        "personal",
        "personal.kind",
        {
            "finetune": ("steps", "lr_scale"),
            "ditto": ("mu",),
            "apfl": ("alpha", "alpha_rate"),
            "fedala": ("layers", "start_steps", "start_rate"),
            "feddpa": ("in_turns", "steps", "lr_scale", "cap", "anchors"),
            "fedalt": (),
            "norms": (),
            "ridge": ("weight",),
        },
        _optional("personal", "kind"),
    ),
    Read(
        keys=("personal.steps", "personal.lr_scale"),
        when=lambda r: r.personal is None or not r.personal.in_turns,
        what=lambda _: "in turns, own adapters are trained in the rounds alone",
        fix="remove it, or personal.in_turns",
    ),
    # Periods.
    Read(
        keys=("stream.detect", "stream.react", "stream.keep", "stream.rebase"),
        when=lambda r: r.stream.period is None,
        what=lambda _: "one period alone has none before it to go on from",
        fix="remove it, or stream.period",
    ),
    Read(
        keys=("stream.rebase.prompts",),
        when=lambda r: r.stream.rebase.how == "distil",
        what=lambda r: f"how: {r.stream.rebase.how} asks nothing",
        fix="remove it, or set stream.rebase.how: distil",
    ),
    Read(
        keys=("stream.replay_share",),
        when=lambda r: r.stream.replay > 0,
        what=lambda _: "no row of the past is trained on again",
        fix="remove it, or set stream.replay",
    ),
    Read(
        keys=("stream.keep",),
        when=lambda r: r.stream.react == "roll-back",
        what=lambda r: f"react: {r.stream.react} accepts every result",
        fix="remove it, or set stream.react: roll-back",
    ),
    Read(
        keys=("stream.keep.general",),
        when=lambda r: r.compare.retention_text is not None,
        what=lambda _: "no general text is scored before and after",
        fix="remove it, or set compare.retention_text",
    ),
    # What it is held against.
    Read(
        keys=("compare.forms",),
        when=lambda r: "base" in r.compare.baselines,
        what=lambda _: "the bare model is no column",
        fix="remove it, or add base to compare.baselines",
    ),
    Read(
        keys=("compare.alone_epochs", "compare.alone_patience"),
        when=lambda r: "alone_best" in r.compare.baselines,
        what=lambda _: "alone_best is no column",
        fix="remove it, or add alone_best to compare.baselines",
    ),
    Read(
        keys=("compare.pooled_batch_size",),
        when=lambda r: "pooled" in r.compare.baselines,
        what=lambda _: "pooled is no column",
        fix="remove it, or add pooled to compare.baselines",
    ),
    Read(
        keys=("compare.retention_rows",),
        when=lambda r: r.compare.retention_text is not None,
        what=lambda _: "no text is scored before and after",
        fix="remove it, or set compare.retention_text",
    ),
    Read(
        keys=("compare.proxy",),
        when=lambda r: r.writes and not r.prefers,
        what=lambda r: f"it moves what a language model writes next, which task {r.task} does not score",
        fix="remove it, or use task: chat",
    ),
    Read(
        keys=("compare.requests_rows",),
        when=lambda r: r.unsafe_requests is not None,
        what=lambda _: "no refusals are counted",
        fix="remove it, or set compare.requests",
    ),
    Read(
        keys=("compare.target_metric",),
        when=lambda r: r.exchange is None,
        what=lambda _: "the rounds of an exchange tell no accuracy",
    ),
    Read(
        keys=("compare.partitions",),
        when=lambda r: not _rounds(r),
        what=lambda r: f"task {r.task} does not deal rows out anew",
        fix="remove it, or set task: oneshot",
    ),
    # Where clients run.
    *of_family("engine", "engine.name", ENGINES, lambda r: str(r.engine.name), every(ENGINES)),
    Read(
        keys=("engine.packing", "engine.gradient_checkpointing"),
        when=lambda r: not _small(r) and not r.model.adapter.facts.whole and not r.method.asks_only,
        what=lambda r: "a student has one call" if _small(r) else "every client has a call of its own",
    ),
)
"""In the order in which a recipe is looked through."""

"""What a recipe would do at a site, held against the site's policy; nothing that a recipe names is opened for it.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, final

from lichen.core.errors import LichenError
from lichen.data.sources.entries import CATALOG
from lichen.federation.policy.keys import Policy, Work, digest_of
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["FILES", "MODELS", "TEXTS", "Refusal", "bases_of", "refusals", "works_in"]

FILES = (
    "model.adapter.init_from",
    "data.template",
    "data.cards",
    "fingerprint.secrets",
    "stream.rebase.prompts",
    "teacher.endpoint.filter.names",
    "synthetic.endpoint.filter.names",
    "cache_dir",
)
"""Keys of a recipe that name a file or folder."""

TEXTS = (
    "model.scratch.text",
    "compare.retention_text",
    "offsite.realign.public",
    "compare.requests",
    "attack.requests",
    "federation.repair.name",
)
"""Keys that name a text of the catalog or a file."""

MODELS = (
    *("model.name", "teacher.name", "synthetic.name", "synthetic.embedder", "stream.rebase.model"),
    *("compare.proxy", "offsite.model"),
)
"""Keys that name a foundation model."""


@final
class Refusal(NamedTuple):
    """Why a site says no.

    Attributes:
        key: The recipe's key at fault.
        line: The line of the policy that says no; empty where no policy could say yes.
        reason: The reason, in a clause.
    """

    key: str
    line: str
    reason: str


def refusals(policy: Policy, recipe: Recipe) -> tuple[Refusal, ...]:
    """All that a policy has against a recipe, the first of each part first; none where the site says yes.

    Bytes are not known before a model is loaded: they are checked with each job and message.
    """
    parts = (_models, _work, _named, _up, _private, _rounds, _clients)
    return tuple(refusal for part in parts for refusal in part(policy, recipe))


def works_in(recipe: Recipe) -> dict[Work, str]:
    """What a recipe asks of a site, each with the key that asks for it."""
    compare, exchange = recipe.compare.baselines, recipe.exchange
    found: dict[Work, str] = {"test": "data.test"}
    if task_of(recipe.task).procedure.rounds:
        found |= {"train": "task", "valid": "data.valid"}
        if recipe.model.head in ("ridge", "lda"):
            found["statistics"] = "model.head"
    else:
        found["statistics"] = "task"
    if {"alone", "alone_best"} & set(compare):
        found["alone"] = "compare.baselines"
    if recipe.personal is not None:
        found["personal"] = "personal.kind"
    if exchange is not None:
        found["exchange"] = "exchange"
    if recipe.value is not None and recipe.value.kind == "first":
        found["value"] = "value.kind"
    return found


def bases_of(policy: Policy, recipe: Recipe) -> frozenset[str] | None:
    """The digests that the frozen weights of ``model.name`` may have; empty: any; None: the model is not allowed."""
    name = recipe.model.name
    if name is None or name in policy.models:
        return frozenset()
    entry = CATALOG.get(name)
    starts = {name, ""} if entry is not None and entry.kind == "model" else {name}
    found = {digest_of(one) for one in policy.models if one.partition("@sha256:")[0] in starts}
    return frozenset(digest for digest in found if digest is not None) or None


def _value_at(recipe: Recipe, key: str) -> object:
    """What stands at a dotted key of a recipe, None where a section above it is left out."""
    value: object = recipe
    for step in key.split("."):
        value = None if value is None else getattr(value, step)
    return value


def _models(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    """Foundation models by name, models without one, kinds of adapters."""
    model, listed = recipe.model, f"models: {_listed(policy.models)}"
    if bases_of(policy, recipe) is None:
        yield Refusal("model.name", listed, f"the model {model.name!r} is not allowed here")
    if model.name is None and not policy.from_scratch:
        key = next(key for key in ("student", "scratch", "students") if getattr(model, key))
        yield Refusal(f"model.{key}", "from_scratch: false", "models without a foundation are not trained here")
    if model.name is not None and model.adapter.kind not in policy.adapters:
        what = f"{model.adapter.kind} is no kind of adapter that is trained here"
        yield Refusal("model.adapter.kind", f"adapters: {_listed(policy.adapters)}", what)
    for key in MODELS[1:]:
        name = _value_at(recipe, key)
        if _loads(recipe, key) and name not in policy.models:
            # Jobs tell the digest of the model that is trained, and of no other one.
            yield Refusal(key, listed, f"the model {name!r} is not allowed here, by its name alone")


def _loads(recipe: Recipe, key: str) -> bool:
    """Whether the model at a key of a teacher, a writer, a stream or a column is loaded."""
    teacher, synthetic = recipe.teacher, recipe.synthetic
    if key == "compare.proxy":
        return recipe.compare.proxy is not None
    if key == "offsite.model":
        return recipe.offsite is not None
    if key == "stream.rebase.model":
        return recipe.stream is not None and recipe.stream.rebase is not None
    if key == "teacher.name":
        return teacher is not None and teacher.endpoint is None and teacher.kind != "labels"
    if key == "synthetic.embedder":
        return synthetic is not None and synthetic.kind == "evolution"
    return synthetic is not None and synthetic.endpoint is None


def _work(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    """The task, and what is done for it."""
    if recipe.task not in policy.tasks:
        yield Refusal("task", f"tasks: {_listed(policy.tasks)}", f"task {recipe.task} is not done here")
    for work, key in works_in(recipe).items():
        if work not in policy.works:
            yield Refusal(key, f"works: {_listed(policy.works)}", f"it asks for {work}, which is not done here")
    if "pooled" in recipe.compare.baselines:
        yield Refusal("compare.baselines", "", "pooled is trained on everybody's rows, and rows never leave")


def _named(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    """Files, texts and addresses: whatever is not listed is neither opened nor looked for."""
    listed = f"files: {_listed(policy.files)}"
    for key in (*FILES, *TEXTS):
        name = _value_at(recipe, key)
        entry = CATALOG.get(str(name)) if key in TEXTS else None
        if name is not None and name not in policy.files and (entry is None or entry.kind != "data"):
            yield Refusal(key, listed, "a recipe of others names no file here")
    for key in ("teacher", "synthetic"):
        section = getattr(recipe, key)
        endpoint = None if section is None else section.endpoint
        if endpoint is None:
            continue
        if endpoint.url not in policy.endpoints:
            line = f"endpoints: {_listed(tuple(policy.endpoints))}"
            yield Refusal(f"{key}.endpoint.url", line, "this address is not asked from here")
        elif endpoint.api_key_env not in ("", policy.endpoints[endpoint.url]):
            line = f"endpoints: the variable of {endpoint.url}"
            yield Refusal(f"{key}.endpoint.api_key_env", line, "this variable's value is not sent to this address")


def _up(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    """What would go up, apart from changes of what is trained."""
    teacher, synthetic, scratch, exchange = recipe.teacher, recipe.synthetic, recipe.model.scratch, recipe.exchange
    rounds = task_of(recipe.task).procedure.rounds
    by_class = exchange is not None and exchange.weighting == "classes"
    evolution = synthetic is not None and synthetic.kind == "evolution"
    private = teacher is not None and "private" in teacher.may_see
    for allowed, line, key, wrong, reason in (
        (policy.metrics, "metrics", "data.test", True, "losses and scores of rows here would go up"),
        (policy.sizes, "sizes", "data.name", True, "clients declare how many rows they have before the first round"),
        (policy.labels, "labels", "model.head", recipe.declares_labels and not by_class, "sums by class would go up"),
        (policy.labels, "labels", "exchange.weighting", by_class, "numbers of rows by class would go up"),
        (policy.labels, "labels", "task", not rounds, "sums of features by class would go up"),
        (
            policy.labels,
            "labels",
            "data.classes",
            recipe.classifies and not recipe.data.classes,
            "is empty, so that names of classes would go up; list them",
        ),
        (policy.texts, "texts", "data.public", recipe.data.public is not None, "rows of clients would become public"),
        (policy.texts, "texts", "teacher.may_see", private, "texts of private rows would be sent to the teacher"),
        (
            policy.texts,
            "texts",
            "model.scratch.text",
            scratch is not None and scratch.text is None,
            "is empty, so that the tokenizer would be learned from texts of clients",
        ),
        (policy.answers, "answers", "exchange", exchange is not None, "answers of models trained here would go up"),
        (policy.answers, "answers", "synthetic.kind", evolution, "votes of private rows would go up"),
        (
            policy.answers,
            "answers",
            "synthetic.filters",
            synthetic is not None and "leakage" in synthetic.sieve,
            "flags of private rows that a text is like would go up",
        ),
    ):
        if wrong and not allowed:
            yield Refusal(key, f"{line}: false", reason)


def _private(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    """What hides a site's rows and messages."""
    most, noised = policy.most_epsilon, recipe.noised
    if policy.secure_aggregation and recipe.masked is None:
        what = "the coordinator would see each message of this site by itself"
        yield Refusal("privacy.secure", "secure_aggregation: true", what)
    if not most:
        return
    line = f"most_epsilon: {most:g}"
    if noised is None:
        yield Refusal("privacy.epsilon", line, "no noise hides anybody here")
    elif noised.epsilon is None or noised.epsilon > most:
        spent = "without a bound" if noised.epsilon is None else f"up to {noised.epsilon:g}"
        yield Refusal("privacy.epsilon", line, f"ε may be spent {spent}, which is more")


def _rounds(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    """Rounds in all: of each learning rate of a grid, and again without help."""
    fed, rates, most = recipe.federation, len(recipe.optimizer.lr), policy.most_rounds
    line = f"most_rounds: {most}"
    tried = min(recipe.optimizer.grid_rounds or fed.rounds, fed.rounds) if rates > 1 else fed.rounds
    total = tried * rates + fed.rounds - tried
    if fed.rounds > most:
        yield Refusal("federation.rounds", line, f"{fed.rounds} rounds are more than are done here")
    elif total > most:
        yield Refusal("optimizer.lr", line, f"{rates} learning rates make {total} rounds, more than are done here")
    elif 2 * total > most and "no_help" in recipe.compare.baselines:
        yield Refusal("compare.baselines", line, f"no_help makes it {2 * total} rounds, more than are done here")


def _clients(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    """How many are averaged at least."""
    fed, least = recipe.federation, policy.least_clients
    schedule, line = fed.schedule, f"least_clients: {least}"
    buffered = schedule.kind == "buffered"
    for key, count in (
        ("data.max_clients", recipe.data.max_clients),
        ("federation.clients_per_round", fed.clients_per_round),
        ("federation.schedule.arrivals", schedule.arrivals if buffered else None),
    ):
        if count is not None and count < least:
            yield Refusal(key, line, f"{count} is too few to be averaged among")
    hides_clients = recipe.noised is not None and recipe.noised.unit == "client"
    if least > 1 and hides_clients and fed.clients_per_round is not None:
        # Nobody is told who comes: a site that left a round to which its client comes alone would tell of it.
        reason = "each client comes by a coin of its own, and one may come alone; leave it out, and let everybody come"
        yield Refusal("federation.clients_per_round", line, reason)
    least_open = 0 if recipe.masked is None else 3  # clients whose sum is opened at least, under masks
    if max(schedule.least, least_open) < least and _can_wait(recipe, least):
        reason = f"a round in which {schedule.least} counted would be a step; set it to {least}"
        yield Refusal("federation.schedule.least", line, reason)


def _can_wait(recipe: Recipe, least: int) -> bool:
    """Whether the recipe could ask for so many: methods that need every answer cannot, and wait for all they invite."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    values.setdefault("federation", {}).setdefault("schedule", {})["least"] = least
    try:
        read_recipe(values, note=lambda line: None)
    except LichenError:
        return False
    return True


def _listed(words: tuple[str, ...]) -> str:
    return f"[{', '.join(words)}]"

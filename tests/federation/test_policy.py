"""A site's policy: what it refuses, with key and reason, what it lets pass, and that it opens nothing for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel

from lichen import cli
from lichen.core.errors import LichenError
from lichen.federation.policy.accepted import accept_recipe
from lichen.federation.policy.keys import Policy, change_policy, policy_text, read_policy
from lichen.federation.policy.refusals import FILES, MODELS, TEXTS, refusals, works_in
from lichen.recipes.schema.explain import choices, items_of, section_of
from lichen.recipes.schema.read import gallery, read_recipe, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.yaml import dump_yaml
from support.submitted import CHAT, CLASSES, EXCHANGE, changed, policy

DIGEST = "ab" * 32
STUDENT = {"student": {"kind": "text-cnn"}}
TEACHER = {"data.public": {}, "teacher": {"kind": "zero-shot"}, "federation.aggregate": "mean"}


def no(lines: dict[str, Any], values: dict[str, Any]) -> LichenError:
    with pytest.raises(LichenError) as caught:
        accept_recipe(policy(**lines), dump_yaml(values))
    return caught.value


class Outside(NamedTuple):
    """A recipe outside a policy: the policy's line, the recipe, the key that is named and a word of the reason."""

    lines: dict[str, Any]
    recipe: dict[str, Any]
    key: str
    reason: str


EVOLUTION = {"synthetic": {"kind": "evolution", "filters": ["length"]}}
SCRATCH = {"model": {"scratch": {}, "adapter": {"kind": "full"}}}
OUTSIDE = {
    "a model": Outside({"models": ["minilm-l6"]}, CHAT, "model.name", "'smollm2-135m' is not allowed"),
    "no model listed": Outside({"models": []}, CHAT, "model.name", "not allowed"),
    "a local folder": Outside({}, changed(CHAT, {"model.name": "/srv/models/x"}), "model.name", "not allowed"),
    "another's digest": Outside({"models": [f"minilm-l6@sha256:{DIGEST}"]}, CHAT, "model.name", "not allowed"),
    "a hub id by digest": Outside(
        {"models": [f"@sha256:{DIGEST}"]}, changed(CHAT, {"model.name": "org/x"}), "model.name", "not allowed"
    ),
    "a student": Outside({"from_scratch": False}, changed(CLASSES, {"model": STUDENT}), "model.student", "foundation"),
    "students": Outside({"from_scratch": False}, EXCHANGE, "model.students", "foundation"),
    "from scratch": Outside({"from_scratch": False}, changed(CHAT, SCRATCH), "model.scratch", "foundation"),
    "a task": Outside({"tasks": ["chat"]}, CLASSES, "task", "classify is not done"),
    "an adapter": Outside({"adapters": ["ia3", "prompt"]}, CHAT, "model.adapter.kind", "lora"),
    "training": Outside({"works": ["valid", "test", "alone"]}, CHAT, "task", "asks for train"),
    "alone": Outside({"works": ["train", "valid", "test"]}, CHAT, "compare.baselines", "asks for alone"),
    "pooled rows": Outside({}, changed(CHAT, {"compare.baselines": ["pooled"]}), "compare.baselines", "never leave"),
    "an adapter's folder": Outside(
        {}, changed(CHAT, {"model.adapter": {"init_from": "a"}}), "model.adapter.init_from", "no file"
    ),
    "a template": Outside({}, changed(CHAT, {"data.template": "/etc/passwd"}), "data.template", "names no file"),
    "a text": Outside(
        {}, changed(CHAT, {"compare.retention_text": "mine.txt"}), "compare.retention_text", "names no file"
    ),
    "a tokenizer's text": Outside(
        {},
        changed(CHAT, {"model": {**SCRATCH["model"], "scratch": {"text": "a.txt"}}}),
        "model.scratch.text",
        "no file",
    ),
    "a large model": Outside({}, changed(CHAT, {"compare.proxy": "x"}), "compare.proxy", "'x'"),
    "an emulator's model": Outside({}, changed(CHAT, {"offsite": {"model": "x"}}), "offsite.model", "'x'"),
    "a text to align by": Outside(
        {},
        changed(CHAT, {"offsite": {"model": "x", "realign": {"public": "a.txt"}}}),
        "offsite.realign.public",
        "names no file",
    ),
    "a folder of answers": Outside(
        {}, changed(CLASSES, {**TEACHER, "cache_dir": "a", "teacher.name": "minilm-l6"}), "cache_dir", "names no file"
    ),
    "a teacher": Outside(
        {"models": ["minilm-l6"]}, changed(CLASSES, {**TEACHER, "teacher.name": "x"}), "teacher.name", "'x'"
    ),
    "an address": Outside(
        {},
        changed(CLASSES, {**TEACHER, "teacher.endpoint": {"url": "http://a/v1", "model": "m"}}),
        "teacher.endpoint.url",
        "not asked",
    ),
    "a secret": Outside(
        {"endpoints": {"http://a/v1": "MINE"}},
        changed(CLASSES, {**TEACHER, "teacher.endpoint": {"url": "http://a/v1", "model": "m", "api_key_env": "HOME"}}),
        "teacher.endpoint.api_key_env",
        "is not sent",
    ),
    "names of classes": Outside({"labels": False}, changed(CLASSES, {"data.classes": []}), "data.classes", "list them"),
    "sums by class": Outside({"labels": False}, changed(CLASSES, {"model.head": "lda"}), "model.head", "by class"),
    "rows by class": Outside(
        {"labels": False}, changed(EXCHANGE, {"exchange": {"weighting": "classes"}}), "exchange.weighting", "by class"
    ),
    "public rows": Outside({"texts": False}, EXCHANGE, "data.public", "become public"),
    "private rows": Outside(
        {"texts": False}, changed(CLASSES, {**TEACHER, "teacher.may_see": ["private"]}), "teacher.may_see", "private"
    ),
    "a tokenizer": Outside({"texts": False}, changed(CHAT, SCRATCH), "model.scratch.text", "texts of clients"),
    "answers": Outside({"answers": False}, EXCHANGE, "exchange", "would go up"),
    "votes": Outside({"answers": False}, changed(CLASSES, EVOLUTION), "synthetic.kind", "votes"),
    "flags": Outside({"answers": False}, changed(CLASSES, {"synthetic": {}}), "synthetic.filters", "flags"),
    "a writer": Outside({"models": ["minilm-l6"]}, changed(CLASSES, EVOLUTION), "synthetic.name", "smollm2-135m"),
    "an encoder": Outside({"models": ["smollm2-135m"]}, changed(CLASSES, EVOLUTION), "synthetic.embedder", "minilm-l6"),
    "own models": Outside(
        {"works": ["train", "valid", "test", "alone"]},
        changed(CHAT, {"personal": {"kind": "ditto"}}),
        "personal.kind",
        "asks for personal",
    ),
    "statistics": Outside({"works": ["train"]}, changed(CLASSES, {"model.head": "lda"}), "model.head", "statistics"),
    "rounds": Outside({"most_rounds": 9}, CHAT, "federation.rounds", "10 rounds"),
    "rates": Outside({"most_rounds": 19}, changed(CHAT, {"optimizer.lr": [1e-3, 1e-2]}), "optimizer.lr", "20 rounds"),
    "few clients": Outside(
        {}, changed(CHAT, {"federation.clients_per_round": 1}), "federation.clients_per_round", "too few"
    ),
    "one who counts": Outside(
        {}, changed(CHAT, {"federation.schedule": {}}), "federation.schedule.least", "set it to 2"
    ),
    "early steps": Outside(
        {"least_clients": 5},
        changed(CHAT, {"federation.schedule": {"kind": "buffered", "arrivals": 4, "least": 4}, "engine.clock": {}}),
        "federation.schedule.arrivals",
        "too few",
    ),
    "metrics": Outside({"metrics": False}, CHAT, "data.test", "scores"),
    "sizes": Outside({"sizes": False}, CHAT, "data.name", "how many rows"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_recipe_outside_a_policy_is_refused_with_its_key_and_the_reason(case: str) -> None:
    lines, values, key, reason = OUTSIDE[case]
    found = refusals(policy(**lines), read_recipe(values))
    at_fault = [refusal for refusal in found if refusal.key == key]
    assert at_fault, found
    assert reason in at_fault[0].reason
    assert not at_fault[0].line or at_fault[0].line.partition(":")[0] in Policy.model_fields
    error = no(lines, values)
    assert error.where == found[0].key
    assert error.what.startswith(found[0].reason)
    assert error.fix


@pytest.mark.parametrize("values", [CHAT, CLASSES, EXCHANGE, changed(CLASSES, {"model": STUDENT})])
def test_a_recipe_within_a_policy_is_accepted_as_it_was_submitted(values: dict[str, Any]) -> None:
    recipe = read_recipe(values)
    accepted = accept_recipe(policy(), write_recipe(recipe))
    assert accepted.recipe == recipe
    assert accept_recipe(policy(), dump_yaml(values)).sha256 == accepted.sha256


def test_a_policy_without_keys_lets_nothing_pass_before_its_owner_has_listed_a_model() -> None:
    for name in gallery():
        assert refusals(Policy(), read_recipe(name)), name
    assert [(one.key, one.line) for one in refusals(Policy(), read_recipe(CHAT))] == [("model.name", "models: []")]
    assert refusals(Policy(models=("smollm2-135m",)), read_recipe(CHAT)) == ()


EFFECTS: dict[str, tuple[object, object, str]] = {
    "models": (["smollm2-135m"], ["smollm2-135m", "minilm-l6"], "names of classes"),
    "from_scratch": (False, True, "a student"),
    "tasks": (["chat"], ["chat", "classify"], "a task"),
    "adapters": (["ia3"], ["lora"], "an adapter"),
    "works": (["train", "valid", "test"], ["train", "valid", "test", "alone"], "alone"),
    "metrics": (False, True, "metrics"),
    "sizes": (False, True, "sizes"),
    "labels": (False, True, "names of classes"),
    "texts": (False, True, "public rows"),
    "answers": (False, True, "answers"),
    "files": ([], ["/etc/passwd"], "a template"),
    "endpoints": ({}, {"http://a/v1": ""}, "an address"),
    "most_rounds": (9, 10, "rounds"),
    "least_clients": (2, 1, "few clients"),
}
"""For each key a value that refuses a recipe, one that lets it pass, and the recipe."""

ELSEWHERE = {"most_bytes_a_round", "most_epsilon", "secure_aggregation"}
"""Bytes are known with jobs and messages alone (test_accepted.py); the others are held against recipes below."""


def test_every_key_refuses_a_recipe_and_lets_it_pass() -> None:
    assert set(EFFECTS) | ELSEWHERE == set(Policy.model_fields), "say what a new key refuses, and what it lets pass"
    for key, (refusing, passing, case) in EFFECTS.items():
        recipe = read_recipe(OUTSIDE[case].recipe)
        lines = [one.line.partition(":")[0] for one in refusals(policy(**{key: refusing}), recipe)]
        assert lines.count(key) == 1, (key, lines)
        assert not refusals(policy(**{key: passing}), recipe), key


def test_rounds_to_which_one_client_may_come_alone_are_refused_where_two_are_the_least() -> None:
    private = {
        **{"federation": {"rounds": 10, "weighting": "uniform"}, "compare.baselines": []},
        "privacy": {"sigma": 1.0, "delta": 1e-3, "clip": 1.0},
    }
    coins = {"federation.clients_per_round": 4, "federation.sampling": "poisson"}
    rows = {"privacy.unit": "row", "federation.schedule": {"least": 2}}

    def keys(least: int, **changes: object) -> list[str]:
        recipe = read_recipe(changed(CHAT, {**private, **changes}))
        return [one.key for one in refusals(policy(least_clients=least), recipe)]

    assert keys(2, **coins) == ["federation.clients_per_round"]
    assert keys(1, **coins) == keys(2) == keys(2, **coins, **rows) == []


PRIVATE = {
    "privacy": {"epsilon": 8.0, "clip": 1.0},
    "federation.weighting": "uniform",
    "compare.baselines": [],
    "federation.schedule": {},
}


def test_a_site_may_ask_for_masks_and_for_a_bound_on_what_is_spent() -> None:
    masked = read_recipe(changed(CHAT, {"privacy": {"secure": True}, "federation.schedule": {}}))
    noised, plain = read_recipe(changed(CHAT, PRIVATE)), read_recipe(CHAT)
    least = {"least_clients": 1}

    def keys(lines: dict[str, object], recipe: Recipe) -> list[str]:
        return [one.key for one in refusals(policy(**least, **lines), recipe)]

    assert keys({"secure_aggregation": True}, plain) == ["privacy.secure"]
    assert keys({"secure_aggregation": True}, masked) == []
    assert keys({"most_epsilon": 8.0}, plain) == ["privacy.epsilon"]
    assert keys({"most_epsilon": 8.0}, masked) == ["privacy.epsilon"]
    assert keys({"most_epsilon": 8.0}, noised) == []
    assert keys({"most_epsilon": 7.5}, noised) == ["privacy.epsilon"]
    assert not refusals(policy(least_clients=3), masked)  # a sum of fewer is never opened


BAD = {
    "empty": "",
    "a comment": "# nothing\n",
    "a list": "- models\n",
    "a word": "yes please\n",
    "an unknown key": "model: [smollm2-135m]\n",
    "a wrong type": "texts: 1\n",
    "a word for a number": 'most_rounds: "ten"\n',
    "no number": "most_rounds: .nan\n",
    "no round": "most_rounds: 0\n",
    "an unknown work": "works: [trian]\n",
    "an unknown task": "tasks: [chess]\n",
    "a bad digest": "models: [a@sha256:AB]\n",
    "a key twice": "texts: true\ntexts: false\n",
    "no YAML": "models: [\n",
    "a tab": "models:\n\t- a\n",
    "an alias": "models: &a [x]\nfiles: *a\n",
    "a bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "a tag": "models: !!python/object/apply:os.system [ls]\n",
    "deep": "models: " + "[" * 2000 + "\n",
    "large": "# " + "x" * (1 << 20) + "\n",
    "no text": "models: [\x00]\n",
    "two documents": "texts: true\n---\ntexts: false\n",
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_policy_is_one_sentence_with_the_file_and_a_fix(tmp_path: Path, case: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(BAD[case], encoding="utf-8")
    with pytest.raises(LichenError) as caught:
        read_policy(file)
    assert caught.value.where.startswith(str(file))
    assert caught.value.fix
    assert "\n" not in caught.value.what


@pytest.mark.parametrize("body", [b"\xff\xfe\x00", None])
def test_a_policy_that_is_no_text_or_not_there_is_refused(tmp_path: Path, body: bytes | None) -> None:
    file = tmp_path / "policy.yaml"
    if body is not None:
        file.write_bytes(body)
    with pytest.raises(LichenError, match=r"is (not a text file|no file)"):
        read_policy(file)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_sentence_too(case: str) -> None:
    with pytest.raises(LichenError) as caught:
        accept_recipe(policy(), BAD[case])
    assert caught.value.where
    assert "\n" not in caught.value.what


def test_the_written_policy_has_every_key_with_its_meaning_and_reads_as_the_default(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(policy_text(), encoding="utf-8")
    assert read_policy(file) == Policy()
    for key, field in Policy.model_fields.items():
        before = policy_text().split(f"\n{key}: ")[0].rpartition("\n\n")[2]
        told = " ".join(line.removeprefix("# ") for line in before.splitlines())
        assert told.startswith(field.description or "-"), key
    file.write_text(policy_text(models=["smollm2-135m"], endpoints={"http://a/v1": "KEY"}), encoding="utf-8")
    assert read_policy(file).endpoints == {"http://a/v1": "KEY"}
    assert (Path(__file__).parents[2] / "docs" / "federation.md").read_text("utf-8").count(policy_text()) == 1


def texts_of(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Keys of a schema that hold free text."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation) or items_of(field.annotation)
        if inner is not None:
            yield from texts_of(inner, f"{path}{name}.")
        elif "str" in str(field.annotation) and not choices(field.annotation):
            yield f"{path}{name}"


HARMLESS = {
    *(
        "name",
        "question",
        "federation.absent",
        "model.device",
        "model.adapter.feedforward_modules",
        "model.adapter.start",
    ),
    *("model.adapter.exclude", "model.adapter.modules_to_save", "data.columns", "data.classes", "data.system"),
    *(
        "wire.up",
        "wire.down",
        "split.code",
        "pipeline.code",
        "teacher.endpoint.model",
        "teacher.template",
        "teacher.label_words",
    ),
    *("synthetic.endpoint.model", "synthetic.about", "synthetic.item_name", "synthetic.labels"),
    *("synthetic.attributes", "synthetic.style", "attack.target", "attack.trigger", "attack.answer"),
    *("data.require.licences", "data.require.purposes", "stream.by", "stream.period", "stream.rebase.period"),
}
"""Keys whose text is no file, model or address."""

SITES_OWN = {"data.name"}
"""Keys for which a site has its own value."""


def test_each_key_of_a_recipe_that_can_name_a_file_or_an_address_is_looked_at() -> None:
    urls = {f"{one}.endpoint.{key}" for one in ("teacher", "synthetic") for key in ("url", "api_key_env")}
    asked = {*FILES, *TEXTS, *MODELS, *urls}
    assert set(texts_of(Recipe)) - HARMLESS - SITES_OWN == asked, "say whether a new key can name a file"


def test_the_answer_does_not_tell_what_lies_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(CHAT), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(Path, "exists", lambda self: opened.append(str(self)) or True)
    monkeypatch.setattr(Path, "is_file", lambda self: opened.append(str(self)) or True)
    monkeypatch.setattr(Path, "is_dir", lambda self: opened.append(str(self)) or True)
    for key in (*FILES[:2], "model.name", "compare.retention_text"):
        there, away = (no({}, changed(CHAT, {key: name})) for name in ("recipe.yaml", "nothing.yaml"))
        assert str(there).replace("recipe.yaml", "nothing.yaml") == str(away)
    assert not opened
    with pytest.raises(LichenError, match="is not a recipe"):
        accept_recipe(policy(), "recipe.yaml")


def test_listed_files_and_texts_of_the_catalog_pass() -> None:
    values = changed(CHAT, {"data.template": "chat.jinja", "compare.retention_text": "sotu"})
    assert not refusals(policy(files=["chat.jinja"]), read_recipe(values))


def test_a_policy_and_an_answer_need_no_torch() -> None:
    program = (
        "import sys\nfrom lichen.federation.policy.accepted import accept_recipe\n"
        "from lichen.federation.policy.keys import Policy\n"
        f"accept_recipe(Policy(models=('smollm2-135m',)), {dump_yaml(CHAT)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_the_works_of_a_recipe_are_those_of_its_key() -> None:
    assert set(works_in(read_recipe(CHAT))) == {"train", "valid", "test", "alone"}
    assert "statistics" in works_in(read_recipe(changed(CLASSES, {"model.head": "ridge"})))
    assert "exchange" in works_in(read_recipe(EXCHANGE))


def test_the_command_writes_a_policy_checks_it_and_tells_its_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, recipe = tmp_path / "policy.yaml", tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(CHAT), encoding="utf-8")
    assert cli.main(["federation", "policy", str(file)]) == 0
    assert file.read_text("utf-8") == policy_text()
    assert cli.main(["federation", "policy", str(file), "--recipe", str(recipe)]) != 0
    assert "models: []" in capsys.readouterr().err
    file.write_text("models: [smollm2-135m]", encoding="utf-8")
    assert cli.main(["federation", "policy", str(file)]) == 0
    assert cli.main(["federation", "policy", str(file), "--recipe", str(recipe)]) == 0
    assert "says yes" in capsys.readouterr().out


def test_a_policy_is_changed_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    change_policy(file, ["models=[smollm2-135m, minilm-l6]", "most_rounds=7"])
    change_policy(file, ["labels=true"])
    policy = read_policy(file)
    assert (policy.models, policy.most_rounds, policy.labels) == (("smollm2-135m", "minilm-l6"), 7, True)
    before = file.read_bytes()
    for change, where in (("most_rounds=-1", "most_rounds"), ("rounds=3", "rounds"), ("labels", "--set")):
        with pytest.raises(LichenError) as caught:
            change_policy(file, [change])
        assert where in f"{caught.value.where} {caught.value.what}"
        assert file.read_bytes() == before

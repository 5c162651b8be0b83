"""Every way in which a foundation model helps is a section of a recipe: a small run of each, and what it promises."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lichen
from lichen.clients.statistics.scale import SCALES
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.data.synthetic.pool import load_pool
from lichen.fm.generation.judge import Judge
from lichen.fm.local import LocalFM
from lichen.models.loading.load import load_causal
from lichen.recipes.rows.prepare import gather
from lichen.recipes.rows.public import split_public
from lichen.recipes.schema.read import read_recipe, recipe_of
from support.openai_server import answering
from support.tiny_llama import WORDS, recipe, save_model, save_rows

PUBLIC = ["data.public={share: 0.4, labelled: 9, unlabelled: 20}"]
DRAWN = [
    "data.columns={text: said, label: mood}",
    "data.partition={by: dirichlet, clients: 3, alpha: 1.0}",
    "data.on_single_class=keep",
]
TEACHER = [*PUBLIC, "teacher.name=MODEL"]
NAMES = "teacher.label_words={calm: ' w1', glad: ' w2', sad: ' w3'}"
WRITER = [
    "synthetic.name=MODEL",
    "synthetic.per_class=4",
    "synthetic.max_new_tokens=12",
    "synthetic.item_name=w1",
    "synthetic.about=w2 w3",
    "synthetic.labels={calm: w4 w5, glad: w6 w7, sad: w8 w9}",
    "synthetic.temperature=1.0",
    "synthetic.top_p=1.0",
    "synthetic.filters=[duplicates, leakage]",  # w12 has too few letters for a text
]
EVOLUTION = [*WRITER, "synthetic.kind=evolution", "synthetic.embedder=MODEL", "synthetic.iterations=2"]
SEMI = ["semi={kind: fixmatch, threshold: 0.3, batch_size: 4}"]
WAYS = {
    "top k": [*TEACHER, "teacher.top_k=2"],
    "all, soft": [*TEACHER, "teacher.answer_format=all", "teacher.temperature=2.0", "teacher.weight=0.5"],
    "label": [*TEACHER, "teacher.answer_format=label", "teacher.min_confidence=0.1"],
    "at the server": [*TEACHER, "teacher.at=server", "teacher.server_steps=4"],
    "at both": [*TEACHER, "teacher.at=both", "teacher.server_steps=4"],
    "select": [*TEACHER, "teacher.select=true", "teacher.may_see=[public, private]"],
    "public labels": [*PUBLIC, "teacher={kind: labels, answer_format: label, at: both, server_steps: 4}"],
    "public labels alone": [
        "data.public={share: 0.4, labelled: 9, unlabelled: 0}",
        "teacher={kind: labels, answer_format: label}",
    ],
    "zero-shot": [*TEACHER, "teacher.kind=zero-shot", "teacher.template=w9 {text} w8", NAMES],
    "prompted": WRITER,
    "prompted, lacking": [*WRITER, "synthetic.missing=true"],
    "prompted, at the server": [*WRITER, "synthetic.at=server", "synthetic.server_steps=4"],
    "agreement": [*WRITER, *TEACHER, "synthetic.filters=[agreement]", "synthetic.per_class=12"],
    "judged": [*WRITER, *PUBLIC, "synthetic.filters=[fluency, harm]", "synthetic.per_class=12"],
    "evolution": EVOLUTION,
    "private evolution": [*EVOLUTION, "synthetic.epsilon=4.0", "synthetic.filters=[duplicates]"],
    "semi": SEMI,
    "semi, server": [*PUBLIC, *SEMI, "semi.kind=semifl", "semi.server_steps=2"],
    "semi, by class": [*SEMI, "semi.kind=flexmatch"],
    "semi, teacher": [
        *TEACHER,
        *SEMI,
        "semi.teacher_rounds=1",
        "teacher.at=server",
        "teacher.server_steps=2",
        "teacher.may_see=[public, private]",
    ],
    "minmax": ["federation.fair=minmax", "federation.weighting=examples"],
    "qffl": ["federation.fair=qffl"],
    "tilted": ["federation.fair=tilted"],
    "ridge head": ["model.head=ridge"],
    "lda head": ["model.name=null", "model.student={kind: text-cnn, width: 8}", "model.head=lda"],
    "random weights": ["model.random=true"],
    "one layer": ["model.layers=1"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("help")
    save_model(folder / "model", more=tuple(f"{word}." for word in WORDS))  # a writer must be able to end a sentence
    save_rows(folder / "rows.jsonl", "label", clients=6, rows=16)
    return folder


def values(home: Path, words: list[str], **more: Any) -> Any:
    """A tiny recipe: a random Llama's LoRA and head, five labels a person."""
    whole = recipe(home / "model", home / "rows.jsonl", "label", **more)
    whole["data"] |= {"labels": 5, "max_length": 16, "split_by": "row"}
    whole["federation"] |= {"rounds": 2, "aggregate": "mean", "weighting": "uniform"}
    whole["cache_dir"] = str(home / "kept")
    return read_recipe(whole, [word.replace("MODEL", str(home / "model")) for word in words])


@pytest.fixture(scope="module")
def runs(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of each way, made when it is first asked for."""
    done: dict[str, lichen.Result] = {}

    def run(way: str) -> lichen.Result:
        if way not in done:
            words = [] if way == "plain" else WAYS[way]
            done[way] = lichen.run(values(home, words), out=tmp_path_factory.mktemp("run") / "run")
        return done[way]

    return run


def final(result: lichen.Result) -> dict[str, torch.Tensor]:
    return load_tree(result.folder / "state" / "final.safetensors")[0]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_something_else_than_no_help(runs: Any, way: str) -> None:
    plain, helped = runs("plain"), runs(way)
    assert helped.summary["columns"]["federated"]["mean"] >= 0
    one, other = final(plain), final(helped)
    another = way in ("one layer", "lda head")  # a smaller model, a student
    assert another or one.keys() == other.keys()
    assert another or any(not torch.equal(one[name], other[name]) for name in one)
    assert all(bool(x.isfinite().all()) for x in other.values())


@pytest.mark.parametrize("way", ["semi", "semi, by class", "semi, server"])
def test_unlabelled_rows_give_the_same_bytes_in_blocks_of_any_size_and_after_a_kill(
    home: Path, runs: Any, way: str, tmp_path: Path
) -> None:
    def kill(event: Any) -> None:
        if event.report.round == 1:
            raise KeyboardInterrupt

    padded = [*WAYS[way], "engine.packing=false"]  # which promises equal bits in any company
    pairs = lichen.run(values(home, [*padded, "engine.clients_per_block=2"]), out=tmp_path / "pairs")
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        lichen.run(values(home, padded), out=folder, observers=[kill])
    resumed = lichen.run(folder / "recipe.yaml", out=folder, resume=True)
    one = final(lichen.run(values(home, padded), out=tmp_path / "whole"))
    for other in (final(pairs), final(resumed)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", ["ridge head", "lda head"])
def test_a_head_in_closed_form_is_asked_for_in_two_messages_each_way_and_both_are_counted(runs: Any, way: str) -> None:
    """The server sees statistics and sums of losses: 97 numbers a client, and the head once down."""
    summary = runs(way).summary
    extra, clients = summary["extra"], summary["clients"]
    assert extra["head.scale"] in SCALES
    assert extra["head.bytes_up"] > 97 * 8 * clients
    assert extra["head.bytes_down"] > extra["head.bytes_up"] / 100  # the head itself goes down


def test_clients_of_semifl_use_no_label_of_their_own(home: Path, runs: Any, tmp_path: Path) -> None:
    """The five rows of each that have a label are unlabelled ones, too."""
    semifl = runs("semi, server").summary
    matched = lichen.run(values(home, [*PUBLIC, *SEMI]), out=tmp_path / "run").summary
    more = semifl["extra"]["unlabelled.rows"] - matched["extra"]["unlabelled.rows"]
    assert more == 5 * semifl["clients"] > 0


def test_a_run_with_the_old_switches_is_read_and_does_not_go_on_as_another_method(
    home: Path, runs: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs("semi").folder, folder)
    written, now = folder / "recipe.yaml", recipe_of(runs("semi").folder)
    before = yaml.safe_load(written.read_text())
    before["semi"] = {"by_class": False, "server": False, "threshold": 0.3, "batch_size": 4}
    written.write_text(yaml.safe_dump(before))
    values_then = now.model_dump(mode="json", exclude_defaults=True)
    values_then["semi"] = {"by_class": False, "threshold": 0.3, "batch_size": 4}
    digest = hashlib.sha256(json.dumps(values_then, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "state" / "recipe.sha256").write_text(digest)
    assert recipe_of(folder) == now
    assert "federated" in str(lichen.report(folder))
    with pytest.raises(LichenError, match="was made by another recipe"):
        lichen.run(folder / "recipe.yaml", out=folder, resume=True)


@pytest.mark.parametrize("way", ["top k", "at both", "zero-shot"])
def test_a_teacher_is_scored_and_its_bytes_are_counted(runs: Any, way: str) -> None:
    summary = runs(way).summary
    extra = summary["extra"]
    assert summary["columns"]["base"] is not None
    assert extra["answers"] == 20
    assert 0 < extra["answers.bytes_from_teacher"] < extra["answers.bytes_to_teacher"]
    assert extra["fm.asked"] >= 20
    assert extra["public_texts.bytes"] > 0
    assert summary["traffic"]["client_down"] > runs("plain").summary["traffic"]["client_down"]


def test_what_the_server_learns_costs_clients_nothing(runs: Any) -> None:
    plain, server = runs("plain").summary, runs("at the server").summary
    assert server["traffic"]["client_down"] == plain["traffic"]["client_down"]


def test_a_pool_says_where_every_text_comes_from(runs: Any) -> None:
    result = runs("prompted")
    pool = load_pool(result.folder / "pool.jsonl")
    extra = result.summary["extra"]
    assert len(pool.rows) == extra["synthetic.kept"] <= extra["synthetic.written"] <= 12
    assert all(row.model and row.prompt and row.label in ("calm", "glad", "sad") for row in pool.rows)
    dropped = json.loads((result.folder / "dropped.json").read_text())
    assert len(dropped) == extra["synthetic.written"] - extra["synthetic.kept"]
    assert extra["fm.asked"] >= 12


def test_private_evolution_keeps_its_promise_in_writing(runs: Any) -> None:
    extra = runs("private evolution").summary["extra"]
    assert 3.9 < extra["synthetic.epsilon"] <= 4.0
    assert extra["synthetic.sigma"] > 0
    assert "adding or removing one row" in str(extra["synthetic.privacy"])
    pool = load_pool(runs("private evolution").folder / "pool.jsonl")
    assert {row.privacy for row in pool.rows} == {extra["synthetic.privacy"]}
    free = runs("evolution").summary["extra"]
    assert free["synthetic.epsilon"] is None
    assert free["synthetic.sigma"] == 0


def test_a_run_that_is_done_again_asks_the_model_nothing(home: Path, runs: Any, tmp_path: Path) -> None:
    first = runs("prompted")
    again = lichen.run(values(home, WAYS["prompted"]), out=tmp_path / "again")
    assert again.summary["extra"]["fm.cached"] >= 12
    assert "fm.tokens_out" not in again.summary["extra"]
    assert again.summary["columns"] == first.summary["columns"]
    assert (again.folder / "pool.jsonl").read_text() != ""
    assert [r.text for r in load_pool(again.folder / "pool.jsonl").rows] == [
        r.text for r in load_pool(first.folder / "pool.jsonl").rows
    ]


def test_without_is_the_same_federation_with_no_help(home: Path, runs: Any, tmp_path: Path) -> None:
    result = lichen.run(values(home, [*WAYS["top k"], "compare.baselines=[no_help]"]), out=tmp_path / "run")
    alike = lichen.run(values(home, PUBLIC), out=tmp_path / "plain")
    assert result.summary["extra_columns"]["without"] == alike.summary["columns"]["federated"]
    assert {"gain.mean", "gain.least", "gain.worse"} <= result.summary["extra"].keys()


def test_public_rows_are_nobodys_and_few_labels_are_few(home: Path) -> None:
    whole = values(home, PUBLIC)
    public_split = split_public(whole, gather(whole))
    assert (len(public_split.labelled), len(public_split.unlabelled)) == (9, 20)
    assert all(row.label is None for row in public_split.unlabelled)
    public = {row.client for row in (*public_split.labelled, *public_split.unlabelled)}
    assert public.isdisjoint(client_data.name for client_data in public_split.clients_data)
    for client_data in public_split.clients_data:
        assert sum(row.label is not None for row in client_data.train) == 5
        assert len(client_data.train) > 5
    drawn = values(home, [*PUBLIC, *DRAWN])
    public_split = split_public(drawn, gather(drawn))
    texts = [row.text for row in (*public_split.labelled, *public_split.unlabelled)]
    private = [
        row.text for client_data in public_split.clients_data for row in (*client_data.train, *client_data.valid)
    ]
    test = [row.text for row in public_split.clients_data[0].test]
    assert len(texts) == 29
    assert len({*texts, *private, *test}) == len(texts) + len(private) + len(test)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["teacher.name=minilm-l6"], "data.public"),
        ([*PUBLIC, "teacher.select=true"], "teacher.select"),
        ([*PUBLIC, "teacher.layers={1: 3}"], "teacher.layers"),
        ([*PUBLIC, "teacher.kind=zero-shot", "teacher.template=nothing"], "teacher.template"),
        (["synthetic.epsilon=1.0"], "synthetic.epsilon"),
        (
            ["synthetic={kind: evolution, epsilon: 1.0, filters: [leakage]}"],
            "synthetic.filters",
        ),
        (["synthetic.filters=[agreement]"], "synthetic.filters"),
        (["synthetic.examples=2"], "synthetic.examples"),
        ([*PUBLIC, *SEMI, "teacher.name=minilm-l6"], "teacher.at"),
        ([*SEMI, "semi.teacher_rounds=2"], "semi.teacher_rounds"),
        ([*SEMI, "semi.kind=semifl"], "semi.kind"),
        ([*PUBLIC, *SEMI, "semi.kind=semifl", "synthetic={}"], "synthetic.at"),
        ([*SEMI, "engine.name=spawned"], "engine.name"),
        (["compare.baselines=[no_help]"], "compare.baselines"),
        (["federation.fair=minmax", "wire.up=[int8]"], "federation.fair"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(home: Path, words: list[str], place: str) -> None:
    with pytest.raises(LichenError) as caught:
        values(home, words)
    assert caught.value.where == place
    assert caught.value.fix


def test_a_teacher_over_http_says_the_same_fails_at_times_and_sees_no_private_row(
    home: Path, runs: Any, tmp_path: Path
) -> None:
    local = runs("zero-shot")
    model, tokenizer = load_causal(home / "model")
    with answering(model, tokenizer, fail=0.2) as (url, told):
        words = [word for word in WAYS["zero-shot"] if not word.startswith("teacher.name")]
        asked = "teacher.endpoint={url: '" + url + "', model: tiny, ask: echo, max_retries: 8, concurrency: 8}"
        whole = values(home, [*words, asked, f"cache_dir={tmp_path / 'kept'}"])
        remote = lichen.run(whole, out=tmp_path / "run")
    assert told.failed > 10
    there, here = (load_tree(r.folder / "state" / "scores" / "answers.safetensors")[0] for r in (remote, local))
    assert torch.equal(there["answers.index"], here["answers.index"])
    torch.testing.assert_close(there["answers.prob"], here["answers.prob"], rtol=0, atol=2e-3)
    assert remote.summary["columns"]["federated"] == local.summary["columns"]["federated"]
    assert remote.summary["extra"]["fm.retries"] == told.failed
    public_split = split_public(whole, gather(whole))
    seen = "\n".join(json.dumps(body) for body in told.bodies)
    private = [row.text for o in public_split.clients_data for row in (*o.train, *o.valid, *o.test)]
    assert all(row.text in seen for row in public_split.unlabelled)
    assert not any(text in seen for text in private)
    assert remote.summary["columns"]["base"] is None, "scoring the teacher would have shown it the clients' test rows"
    assert "fm.bytes.private" not in remote.summary["extra"]


def test_what_is_judged_is_held_against_public_rows(home: Path, runs: Any) -> None:
    result = runs("judged")
    public_split = split_public(whole := values(home, WAYS["judged"]), gather(whole))
    judge = Judge(LocalFM(*load_causal(home / "model")), about="w2 w3", kind="w1")
    real = [record.text for record in (*public_split.labelled, *public_split.unlabelled)]
    kept = [row.text for row in load_pool(result.folder / "pool.jsonl").rows]
    dropped = json.loads((result.folder / "dropped.json").read_text())
    assert {one["rule"] for one in dropped.values()} <= {"fluency", "harm"}
    assert len(kept) + len(dropped) == result.summary["extra"]["synthetic.written"]
    assert float(judge.fluency(kept).min()) >= float(judge.fluency(real).quantile(0.01))
    assert float(judge.harm(kept).max()) <= float(judge.harm(real).quantile(0.99))

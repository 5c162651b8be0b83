"""Task chat with a teacher: it writes after public prompts, and what it wrote are rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.clients.distillation.sequence import prompt_of
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.data.synthetic.pool import load_pool
from lichen.fm.local import LocalFM
from lichen.models.loading.load import load_causal
from lichen.recipes.rows.prepare import gather
from lichen.recipes.rows.public import split_public
from lichen.recipes.schema.read import read_recipe
from support.openai_server import answering
from support.tiny_llama import recipe, save_model, save_rows

PUBLIC = "data.public={share: 0.4, unlabelled: 20}"
TEACHER = [PUBLIC, "teacher={name: TEACHER, answer_format: text, max_new_tokens: 6}"]
AT_SERVER = ["teacher.at=server", "teacher.server_steps=4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a teacher that speaks in longer words than two letters, so that its texts are no junk."""
    folder = tmp_path_factory.mktemp("said")
    words = tuple(f"word{'abcdefghij'[i % 10]}{'klmno'[i // 10]}" for i in range(40))
    save_model(folder / "model", more=words)
    save_model(folder / "teacher", more=words, seed=3)
    save_rows(folder / "pair.jsonl", "pair", clients=6, rows=16)
    save_rows(folder / "messages.jsonl", "messages", clients=6, rows=16)
    return folder


def values(home: Path, words: list[str], shape: Any = "pair") -> Any:
    whole = recipe(home / "model", home / f"{shape}.jsonl", shape)
    whole["data"] |= {"split_by": "row"}
    whole["federation"] |= {"rounds": 2}
    whole["cache_dir"] = str(home / "kept")
    return read_recipe(whole, [word.replace("TEACHER", str(home / "teacher")) for word in words])


def final(result: lichen.Result) -> dict[str, torch.Tensor]:
    return load_tree(result.folder / "state" / "final.safetensors")[0]


@pytest.mark.parametrize("shape", ["pair", "messages"])
def test_clients_learn_what_the_teacher_wrote_after_public_prompts(home: Path, tmp_path: Path, shape: Any) -> None:
    whole = values(home, [*TEACHER, "compare.baselines=[no_help]"], shape)
    result = lichen.run(whole, out=tmp_path / "run")
    pool, extra = load_pool(result.folder / "pool.jsonl"), result.summary["extra"]
    assert extra["answers"] == 20
    assert extra["fm.asked"] == 20
    dropped = json.loads((result.folder / "dropped.json").read_text())
    assert 0 < len(pool.rows) == extra["answers.kept"] == 20 - len(dropped)
    asked = [prompt_of(record) for record in split_public(whole, gather(whole)).unlabelled]
    model, tokenizer = load_causal(home / "teacher")
    wrote = LocalFM(model, tokenizer, chat=True).generate(asked, seeds=[9] * 20, max_new_tokens=6, temperature=0.0)
    assert {row.text for row in pool.rows} <= {text.strip() for text in wrote}
    scores = result.summary["columns"]["federated"], result.summary["extra_columns"]["without"]
    assert scores[0]["mean"] != scores[1]["mean"]
    assert extra["gain.least"] <= extra["gain.mean"]
    plain = lichen.run(values(home, [PUBLIC], shape), out=tmp_path / "plain").summary
    assert plain["columns"]["federated"]["mean"] == scores[1]["mean"]
    less = result.summary["bytes_down"] - plain["bytes_down"]
    assert less == extra["public_texts.bytes"] > 0


def test_what_the_server_learns_costs_clients_nothing(home: Path, tmp_path: Path) -> None:
    plain = lichen.run(values(home, [PUBLIC]), out=tmp_path / "plain")
    server = lichen.run(values(home, [*TEACHER, *AT_SERVER]), out=tmp_path / "server")
    assert server.summary["traffic"]["client_down"] == plain.summary["traffic"]["client_down"]
    one, other = final(plain), final(server)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_over_http_the_same_is_written_and_only_prompts_are_shown(home: Path, tmp_path: Path) -> None:
    words = [PUBLIC, "teacher={answer_format: text, max_new_tokens: 6}"]
    local = lichen.run(values(home, [*words, "teacher.name=TEACHER", "teacher.plain=true"]), out=tmp_path / "local")
    model, tokenizer = load_causal(home / "teacher")
    with answering(model, tokenizer, fail=0.2) as (url, told):
        asked = f"teacher.endpoint={{url: '{url}', model: tiny, ask: echo, max_retries: 7, concurrency: 4}}"
        whole = values(home, [*words, asked, f"cache_dir={tmp_path / 'kept'}"])
        remote = lichen.run(whole, out=tmp_path / "remote")
    assert told.failed > 0
    assert remote.summary["extra"]["fm.retries"] == told.failed
    here, there = (load_pool(result.folder / "pool.jsonl").rows for result in (local, remote))
    assert [row.text for row in here] == [row.text for row in there]
    assert remote.summary["columns"]["federated"] == local.summary["columns"]["federated"]
    seen, public_split = json.dumps(told.bodies), split_public(whole, gather(whole))
    assert all(row.prompt in seen for row in public_split.unlabelled)
    assert not any(row.text in seen for o in public_split.clients_data for row in (*o.train, *o.valid, *o.test))


def test_a_share_bounds_what_a_client_is_given(home: Path, tmp_path: Path) -> None:
    small = lichen.run(values(home, [*TEACHER, "teacher.share=0.1"]), out=tmp_path / "small").summary["extra"]
    large = lichen.run(values(home, [*TEACHER, "teacher.share=0.6"]), out=tmp_path / "large").summary["extra"]
    assert 0 < small["public_texts.bytes"] < large["public_texts.bytes"]


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["teacher={name: TEACHER, answer_format: text}"], "data.public"),
        ([PUBLIC, "teacher={name: TEACHER, answer_format: label}"], "teacher.answer_format"),
        ([*TEACHER, "teacher.temperature=2.0"], "teacher.temperature"),
        ([*TEACHER, "teacher.layers={1: 1}"], "teacher.layers"),
        ([PUBLIC, "teacher={answer_format: text}"], "teacher.name"),
        (["synthetic={}"], "synthetic"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(home: Path, words: list[str], place: str) -> None:
    with pytest.raises(LichenError) as caught:
        values(home, words)
    assert caught.value.where == place
    assert caught.value.fix


def test_a_model_that_cannot_write_is_named_by_its_key(home: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(LichenError) as caught:
        lichen.run(values(home, [*TEACHER, f"teacher.name={tmp_path / 'none'}"]), out=tmp_path / "run")
    assert caught.value.where == "teacher.name"
    assert "language model" in caught.value.fix


def test_rows_without_a_prompt_are_refused_before_anything_is_loaded(home: Path, tmp_path: Path) -> None:
    words = [*TEACHER, "data.columns={client: who, text: reply}", "data.form=plain"]
    with pytest.raises(LichenError, match="no public row has a prompt") as caught:
        lichen.run(values(home, words), out=tmp_path / "run")
    assert caught.value.where == "teacher.answer_format"
    assert not (tmp_path / "run" / "pool.jsonl").exists()

"""Answers by proxy: three models of transformers by hand; caches, endpoints that list some tokens; what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.models.loading.load import load_causal
from lichen.recipes.artifacts.sampling import ask_ids
from lichen.recipes.local.next_logits import LocalLogits
from lichen.recipes.local.proxy_talk import talk_by_proxy
from support.openai_server import answering
from support.tiny_llama import recipe, save_model, save_rows

ASK = "w1 w2 w3"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    save_model(folder / "model")
    save_model(folder / "large", seed=5)
    shutil.copytree(folder / "model", folder / "same")
    save_rows(folder / "rows.jsonl", "messages")
    sections = recipe(folder / "model", folder / "rows.jsonl", "messages", optimizer={"lr": [0.2]})
    lichen.run(sections, out=folder / "run")
    lichen.export(folder / "run", merge=True)
    return folder


def by_hand(home: Path, penalty: float, steps: int, *, listed: int | None = None) -> list[int]:
    """Greedy tokens of the sum of logits, every model anew at every token; among those that the large one lists."""
    big, tuned, bare = (load_causal(home / name)[0] for name in ("large", "run/merged", "model"))
    tokenizer = load_causal(home / "model")[1]
    ids = ask_ids(tokenizer, "messages", ASK)
    begin = len(ids)
    for _ in range(steps):
        big_V, tuned_V, bare_V = (
            model(input_ids=torch.tensor([ids])).logits[0, -1].detach() for model in (big, tuned, bare)
        )
        if listed is not None:
            big_V = big_V.log_softmax(-1)
            big_V = torch.where(big_V >= big_V.topk(listed).values[-1], big_V, -torch.inf)
        z_V = big_V + tuned_V - bare_V
        for token in set(ids):
            z_V[token] = z_V[token] / penalty if z_V[token] > 0 else z_V[token] * penalty
        ids.append(int(z_V.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[begin:]


def text_of(home: Path, ids: Sequence[int]) -> str:
    tokenizer = load_causal(home / "model")[1]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_an_answer_is_the_one_that_three_models_by_hand_give(home: Path, penalty: float) -> None:
    talker = talk_by_proxy(home / "run", str(home / "large"), max_new_tokens=12, repetition_penalty=penalty)
    answers = dict(zip(talker.names, talker.answer(ASK), strict=True))
    assert answers["proxy"] == text_of(home, by_hand(home, penalty, 12))
    assert len(set(answers.values())) == 4
    plain = lichen.talk(home / "run", max_new_tokens=12, repetition_penalty=penalty)
    assert plain.answer(ASK) == (answers["bare model"], answers["this run"])
    assert talker.answer(ASK) == tuple(answers.values())  # nothing of the first answer is left in the second


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.8}])
def test_with_the_small_model_as_the_large_one_it_answers_as_the_run(home: Path, settings: dict[str, Any]) -> None:
    talker = talk_by_proxy(home / "run", str(home / "same"), max_new_tokens=10, **settings)
    bare, tuned, big, steered = talker.answer(ASK)
    assert (big, steered) == (bare, tuned)
    assert bare != tuned


def test_logits_of_a_text_that_goes_on_are_those_of_the_whole_text(home: Path) -> None:
    model = load_causal(home / "large")[0]
    step, g = LocalLogits(model), torch.Generator().manual_seed(0)
    ids = torch.randint(6, 40, (14,), generator=g).tolist()
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for text in (ids[:4], ids[:5], ids[:9], ids[:9], ids[2:6], ids[2:7]):
        whole = model(input_ids=torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(step(text), whole, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert lengths[1::2] == [4, 1, 4, 9, 4, 1]  # what was read before is not read again


def described(folder: Path, **keys: Any) -> str:
    from lichen.recipes.schema.yaml import dump_yaml

    file = folder / "endpoint.yaml"
    file.write_text(dump_yaml(keys), encoding="utf-8")
    return str(file)


def test_an_endpoint_that_lists_all_tokens_is_as_good_as_its_weights(home: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with answering(*load_causal(home / "large")) as (url, told):
        file = described(tmp_path, url=url, model="tiny", top=46)
        talker = talk_by_proxy(home / "run", file, say=lines.append, max_new_tokens=8, repetition_penalty=1.0)
        by_endpoint = talker.answer(ASK)
        assert {body["logprobs"] for body in told.bodies} == {46}
        assert told.bodies[0]["prompt"].startswith("<user> w1 w2 w3")
    assert "over the 46 likeliest tokens" in talker.settings
    assert url in lines[0]
    local = talk_by_proxy(home / "run", str(home / "large"), max_new_tokens=8, repetition_penalty=1.0)
    assert by_endpoint == local.answer(ASK)


def test_of_an_endpoint_that_lists_few_tokens_only_these_are_written(home: Path, tmp_path: Path) -> None:
    with answering(*load_causal(home / "large")) as (url, _):
        file = described(tmp_path, url=url, model="tiny", top=3)
        steered = talk_by_proxy(home / "run", file, max_new_tokens=8).answer(ASK)[3]
    assert steered == text_of(home, by_hand(home, 1.2, 8, listed=3))
    assert steered != text_of(home, by_hand(home, 1.2, 8))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "words alone": ({"ask": "text"}, "ask: text tells no log-probabilities"),
    "a chat": ({"ask": "chat"}, "cannot go on from a half-written one"),
    "an echo": ({"ask": "echo"}, "not which could come next"),
    "another key": ({"topp": 3}, "topp"),
    "no model": ({"model": None}, "model"),
    "no address": ({"url": "ftp://x"}, "no plain http address"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_describes_no_such_endpoint_is_refused(case: str, home: Path, tmp_path: Path) -> None:
    keys, what = BAD[case]
    keys = {"url": "http://127.0.0.1:9/v1", "model": "tiny", **keys}
    file = described(tmp_path, **{key: value for key, value in keys.items() if value is not None})
    with pytest.raises(LichenError, match=what) as error:
        talk_by_proxy(home / "run", file)
    assert error.value.fix


def test_an_endpoint_of_another_vocabulary_or_without_log_probabilities_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import openai_server

    with answering(*load_causal(home / "large")) as (url, _):
        talker = talk_by_proxy(home / "run", described(tmp_path, url=url, model="tiny", max_retries=0))
        for listed, what in (
            ([("zz", -1.0), ("w3", -2.0), ("yy", -3.0)], "such as 'zz'"),
            ([], "no log-probabilities"),
        ):
            answer = {"choices": [{"text": "", "logprobs": {"top_logprobs": [dict(listed)]}}]}
            monkeypatch.setattr(openai_server, "answer", lambda *_, given=answer: given)
            with pytest.raises(LichenError, match=what):
                talker.answer(ASK)


def test_a_run_that_writes_nothing_and_models_that_do_not_fit_are_refused(home: Path, tmp_path: Path) -> None:
    save_rows(tmp_path / "labels.jsonl", "label")
    sections = recipe(home / "model", tmp_path / "labels.jsonl", "label", federation={"rounds": 1})
    lichen.run(sections, out=tmp_path / "run")
    with pytest.raises(LichenError, match="writes nothing"):
        talk_by_proxy(tmp_path / "run", str(home / "large"))
    save_model(tmp_path / "wordy", more=("x1",))
    for name, what in (("wordy", "another vocabulary"), ("none", "no such")):
        with pytest.raises(LichenError, match=what) as error:
            talk_by_proxy(home / "run", str(tmp_path / name))
        assert error.value.where == "--proxy"

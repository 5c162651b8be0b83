"""What the address answers is what the local model answers, streamed or not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.fm.local import LocalFM
from lichen.fm.parsing import cut_at
from lichen.models.loading.load import load_causal
from lichen.serving.server import ModelServer
from lichen.serving.text_pieces import ready_length
from support.served import ask, at_address, events, tiny

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ModelServer]:
    model = tiny(folder)
    with at_address(model) as found:
        yield found
    model.close()


@pytest.fixture(scope="module")
def local(server: ModelServer, folder: Path) -> tuple[LocalFM, LocalFM]:
    """Asked plainly, and by the chat template."""
    model, tokenizer = load_causal(folder)
    return LocalFM(model, tokenizer), LocalFM(model, tokenizer, chat=True)


def client(server: ModelServer, how: Any) -> HttpFM:
    return HttpFM(Endpoint(url=server.url, model="tiny", ask=how, max_retries=0))


@pytest.mark.parametrize(("how", "chat"), [("first", False), ("chat", True)])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_texts_are_the_local_models(
    server: ModelServer, local: tuple[LocalFM, LocalFM], how: str, temperature: float, *, chat: bool
) -> None:
    seeds, lengths = [3, 4, 5], set[int]()
    for stop in ((), ("w7 w", "w3"), ("w1",)):
        settings: dict[str, Any] = {"seeds": seeds, "max_new_tokens": 12, "temperature": temperature, "stop": stop}
        one_by_one = [
            local[chat].generate([prompt], **{**settings, "seeds": [seed]})[0]
            for prompt, seed in zip(PROMPTS, seeds, strict=True)
        ]
        assert client(server, how).generate(PROMPTS, **settings) == one_by_one
        lengths |= {len(text) for text in one_by_one}
    assert len(lengths) > 2


def test_log_probabilities_are_the_local_models(server: ModelServer, local: tuple[LocalFM, LocalFM]) -> None:
    texts = [(" w1 w2", " w3 w4")] * 3
    expected = local[0].score(PROMPTS, texts)
    torch.testing.assert_close(client(server, "echo").score(PROMPTS, texts), expected, rtol=0, atol=1e-4)
    for how, fm in (("first", local[0]), ("chat", local[1])):
        # Of 46 tokens 20 are listed; the likeliest of each prompt is among them.
        words = [[f" w{n}" for n in range(40)]] * 3
        expected, asked = fm.score(PROMPTS, words), client(server, how).score(PROMPTS, words)
        listed = expected >= expected.topk(12, 1).values[:, -1:]
        torch.testing.assert_close(asked[listed], expected[listed], rtol=0, atol=1e-4)


def test_vectors_are_the_local_models(server: ModelServer, local: tuple[LocalFM, LocalFM]) -> None:
    torch.testing.assert_close(client(server, "first").embed(PROMPTS), local[0].embed(PROMPTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_the_whole_answer_in_pieces(server: ModelServer, path: str) -> None:
    chat = "chat" in path
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "seed": 1, "stop": ["w9 w", "zzz"]}
    body |= {"messages": [{"role": "user", "content": "w1"}], "logprobs": True, "top_logprobs": 3} if chat else {}
    body |= {} if chat else {"prompt": "w1", "logprobs": 3}
    status, whole = ask(server, path, body)
    assert status == 200
    found = events(server, path, {**body, "stream_options": {"include_usage": True}})
    assert found.pop() == "[DONE]"
    counted = found.pop()
    assert (counted["choices"], counted["usage"]) == ([], whole["usage"])
    choices = [event["choices"][0] for event in found]
    want = whole["choices"][0]
    text = "".join(one["delta"].get("content", "") if chat else one["text"] for one in choices)
    assert text == (want["message"]["content"] if chat else want["text"])
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + [want["finish_reason"]]
    assert len(choices) > 5
    key = "content" if chat else "tokens"
    listed = [entry for one in choices if one["logprobs"] for entry in one["logprobs"][key]]
    assert listed == want["logprobs"][key]
    assert len(listed) == whole["usage"]["completion_tokens"]
    if not chat:
        offsets = [at for one in choices if one["logprobs"] for at in one["logprobs"]["text_offset"]]
        assert offsets == want["logprobs"]["text_offset"]


def test_why_a_text_ended_and_what_was_counted(server: ModelServer) -> None:
    ended = set()
    for seed in range(30):
        body = {"model": "tiny", "prompt": "w1 w2", "max_tokens": 9, "seed": seed}
        _, whole = ask(server, "/v1/completions", body)
        usage, finish = whole["usage"], whole["choices"][0]["finish_reason"]
        assert usage["prompt_tokens"] == 2
        assert usage["total_tokens"] == 2 + usage["completion_tokens"]
        assert (finish == "length") == (usage["completion_tokens"] == 9)
        assert ask(server, "/v1/completions", body)[1]["choices"] == whole["choices"], "a seed gives one text"
        ended.add(finish)
    assert ended == {"length", "stop"}


def test_fifty_at_once_have_the_answers_that_each_has_alone(server: ModelServer) -> None:
    bodies = [
        {"model": "tiny", "prompt": f"w{n} w{n % 7}", "max_tokens": 4 + n % 5, "temperature": n % 3 / 2, "seed": n}
        for n in range(50)
    ]
    alone = [ask(server, "/v1/completions", body)[1]["choices"] for body in bodies]
    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda body: ask(server, "/v1/completions", body), bodies))
    assert [status for status, _ in replies] == [200] * 50
    assert [reply["choices"] for _, reply in replies] == alone


def test_pieces_are_the_text_that_is_cut_at_once() -> None:
    """The slow oracle: all pieces of a text that grows by a letter, against the whole text cut afterwards."""
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choice("ab ") for _ in range(rng.randrange(12)))
        stop = ["".join(rng.choice("ab ") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        sent, stopped = "", False
        for size in range(len(text) + 1):
            ready, stopped = ready_length(text[:size], stop)
            assert text[:ready].startswith(sent), (text, stop)
            sent = text[:ready]
            if stopped:
                break
        assert (sent if stopped else text) == cut_at(text, stop)
        assert stopped == any(one in text for one in stop)


def test_what_is_listed(server: ModelServer) -> None:
    status, found = ask(server, "/v1/models")
    assert (status, [one["id"] for one in found["data"]]) == (200, ["tiny"])
    assert ask(server, "/v1/models/tiny")[1] == found["data"][0]

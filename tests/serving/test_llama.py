"""A GGUF file that llama.cpp serves: its answers, its refusals, and its process."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.random_gguf import save_gguf
from support.served import ask, at_address, events

pytest.importorskip("xllamacpp")

from lichen.core.errors import LichenError
from lichen.data.sources.convert import gguf_to_folder
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.fm.local import LocalFM
from lichen.models.loading.load import load_causal
from lichen.serving.contract import ApiError, Completion, Message
from lichen.serving.llama_model import LlamaModel

TEXT = "/v1/completions"
_HALF = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf(folder / "tiny.gguf")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[LlamaModel]:
    found = LlamaModel(file, name="tiny", threads=1)
    yield found
    found.close()


def test_texts_and_log_probabilities_are_those_of_transformers(model: LlamaModel, file: Path, tmp_path: Path) -> None:
    gguf_to_folder(file, tmp_path / "folder", dtype="float32")
    local = LocalFM(*load_causal(tmp_path / "folder"))
    prompts = ["hello", "he who", "a well"]
    with at_address(model) as server:
        asked = HttpFM(Endpoint(url=server.url, model="tiny", ask="first", max_retries=0))
        settings = {"seeds": [0] * 3, "max_new_tokens": 12, "temperature": 0.0}
        texts = zip(asked.generate(prompts, **settings), local.generate(prompts, **settings), strict=True)
        for theirs, ours in texts:  # bytes that are no letters are shown by some number of signs
            assert theirs.replace(_HALF, "") == ours.replace(_HALF, "") != ""
    compared = 0
    for prompt in prompts:
        (first, *_) = model.complete(Completion(prompt=prompt, max_tokens=1, temperature=0.0, top=20))
        for text, logprob in first.tokens[0].top:
            if text.isascii() and len(text) == 1 and text.isprintable():
                assert logprob == pytest.approx(float(local.score([prompt], [[text]])), abs=0.02)
                compared += 1
    assert compared > 9


def test_a_seed_gives_one_text_streamed_or_not(model: LlamaModel) -> None:
    with at_address(model) as server:
        texts = set()
        for seed in range(4):
            body = {"model": "tiny", "prompt": "hell", "max_tokens": 10, "temperature": 1.5, "seed": seed}
            _, whole = ask(server, TEXT, body)
            choice = whole["choices"][0]
            assert whole["usage"]["completion_tokens"] <= 10
            found = events(server, TEXT, body)
            assert "".join(event["choices"][0]["text"] for event in found[:-1]) == choice["text"]
            assert found[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
            texts.add(choice["text"])
        assert len(texts) == 4


def test_what_it_does_not_give_is_refused(model: LlamaModel) -> None:
    with at_address(model) as server:
        for path, body, word in (
            (TEXT, {"prompt": "hello", "echo": True, "logprobs": 1}, "log-probabilities of a prompt"),
            ("/v1/embeddings", {"input": "hello"}, "gives no vectors"),
            (TEXT, {"prompt": "hello " * 500, "max_tokens": 4}, "context"),
        ):
            status, found = ask(server, path, {"model": "tiny", **body})
            assert status == 400
            assert word in found["error"]["message"]


def test_a_process_that_was_killed_is_started_again(file: Path) -> None:
    model = LlamaModel(file, name="tiny", threads=1)
    folder = Path(model._socket).parent
    try:
        request = Completion(prompt="hello", max_tokens=5, temperature=0.0)
        before = list(model.complete(request))
        (pid,) = model.processes()
        os.kill(pid, signal.SIGKILL)
        statuses = set[int]()
        for _ in range(100):  # until its end is seen, a request may fail in one sentence
            try:
                after = list(model.complete(request))
                break
            except ApiError as error:
                statuses.add(error.status)
                time.sleep(0.05)
        assert statuses <= {502, 503}
        assert after == before
        assert model.processes() != (pid,)
    finally:
        model.close()
    assert not folder.exists()
    with pytest.raises(ApiError, match="closing"):
        model.complete(request)


def test_spoilt_files_are_told_in_a_sentence_and_end_nothing(file: Path, tmp_path: Path) -> None:
    """Twenty-five: each costs a process. What is cut or overwritten is refused, or read and answered."""
    rng, whole = random.Random(3), file.read_bytes()
    refused, faults = list[str](), list[str]()
    for n in range(25):
        size, at = len(whole), rng.randrange(4, 3000 if n % 2 else len(whole))
        data = whole[:at] if n % 4 == 0 else whole[:at] + rng.randbytes(rng.randrange(1, 40)) + whole[at + 20 :]
        path = tmp_path / "spoilt.gguf"
        path.write_bytes(data[:size])
        try:
            model = LlamaModel(path, name="spoilt", threads=1)
        except LichenError as error:
            refused.append(error.what)
            continue
        try:
            list(model.complete(Completion(prompt="hello", max_tokens=2)))
            list(model.complete(Completion(messages=(Message(role="user", content="hello"),), max_tokens=2)))
        except ApiError as error:
            faults.append(error.message)
        finally:
            model.close()
    assert len(refused) > 9
    assert all(what.startswith("llama.cpp cannot read the GGUF file: ") for what in refused)
    assert all(faults)
    (tmp_path / "none.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(LichenError, match="is no GGUF file"):
        LlamaModel(tmp_path / "none.gguf", name="none")
    with pytest.raises(LichenError, match="cannot be read"):
        LlamaModel(tmp_path / "missing.gguf", name="none")

"""What was told once is told again from disk, whatever happened to the disk in between."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.cache import CachedModel, CacheStore, OfflineModel, from_base64, to_base64
from lichen.fm.disclosure import DisclosurePolicy
from lichen.fm.interface import Usage


class Counting:
    """Answers that follow from what is asked; it knows what it was asked."""

    name, source = "counting", "sha256:00"

    def __init__(self) -> None:
        self.usage = Usage()
        self.asked: list[Any] = []

    def _note(self, rows: Sequence[Any]) -> None:
        self.asked.append(list(rows))
        self.usage += Usage(calls=1, tokens_in=len(rows), tokens_out=2 * len(rows))

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> Tensor:
        self._note(prompts)
        rows = [[-len(p + c) / 3 for c in some] for p, some in zip(prompts, continuations, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        return self.score(prompts, [choices] * len(prompts)).softmax(-1)

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[str]:
        self._note(prompts)
        return [
            f"{p}/{s}/{settings['max_new_tokens']}/{settings['temperature']}"
            for p, s in zip(prompts, seeds, strict=True)
        ]

    def embed(self, texts: Sequence[str]) -> Tensor:
        self._note(texts)
        return torch.tensor([[len(text) / 7, 0.1] for text in texts]).view(-1, 2)


PROMPTS = ["one", "three", "four", "one"]
CHOICES = (" a", " bb")


def everything(cached_model: Any) -> list[Any]:
    return [
        cached_model.score(PROMPTS, [CHOICES] * 4),
        cached_model.answer(PROMPTS, CHOICES),
        cached_model.generate(PROMPTS, seeds=[1, 2, 3, 4], max_new_tokens=9),
        cached_model.generate(PROMPTS, seeds=[1, 2, 3, 4], temperature=0),
        cached_model.embed(PROMPTS),
    ]


def test_a_shelf_answers_as_the_model_did_and_then_without_it(tmp_path: Path) -> None:
    fm = Counting()
    kept = CachedModel(fm, tmp_path, batch=2)
    first = everything(kept)
    assert kept.usage.cached == 0
    # The two equal prompts are one request, except where their seeds tell them apart.
    assert sum(len(rows) for rows in fm.asked) == 3 + 3 + 4 + 3 + 3
    assert max(len(rows) for rows in fm.asked) == 2
    for cached_model in (
        CachedModel(fm, tmp_path),
        CachedModel(OfflineModel("counting", source="sha256:00"), tmp_path),
    ):
        calls = fm.usage.calls
        for a, b in zip(everything(cached_model), first, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        assert fm.usage.calls == calls
        assert cached_model.usage.cached == 20
    plain = Counting()
    for a, b in zip((plain.score(PROMPTS, [CHOICES] * 4), plain.embed(PROMPTS)), (first[0], first[4]), strict=True):
        assert torch.equal(a, b)
    assert first[2] == plain.generate(PROMPTS, seeds=[1, 2, 3, 4], max_new_tokens=9, temperature=1.0)


def test_every_file_says_where_it_comes_from(tmp_path: Path) -> None:
    CachedModel(Counting(), tmp_path).generate(PROMPTS, seeds=[1, 2, 3, 4], max_new_tokens=9, stop=("x",))
    files = [json.loads(file.read_text()) for file in tmp_path.rglob("*.json")]
    assert len(files) == 4
    for file in files:
        asked, from_ = file["asked"], file["from"]
        assert (asked["model"], asked["source"], asked["kind"]) == ("counting", "sha256:00", "generate")
        assert {"prompt", "seed", "most", "temperature", "top_p", "stop"} < asked.keys()
        assert from_["call"] == {"rows": 4, "tokens_in": 4, "tokens_out": 8}
        assert from_["date"].startswith("20")
        assert file["told"]["told"] == f"{asked['prompt']}/{asked['seed']}/9/1.0"


def test_other_weights_settings_and_texts_are_other_requests(tmp_path: Path) -> None:
    fm = Counting()
    cached_model = CachedModel(fm, tmp_path)
    asked: dict[str, Any] = {
        "prompts": ["p"],
        "seeds": [1],
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 0.9,
        "stop": ("a",),
    }
    cached_model.generate(**asked)
    for more in (
        {"prompts": ["q"]},
        {"seeds": [2]},
        {"max_new_tokens": 5},
        {"temperature": 0.9},
        {"top_p": 1.0},
        {"stop": ()},
    ):
        cached_model.generate(**{**asked, **more})
    assert fm.usage.calls == 7
    other = Counting()
    other.source = "sha256:11"  # type: ignore[misc]
    CachedModel(other, tmp_path).generate(**asked)
    assert other.usage.calls == 1


def test_damage_is_as_good_as_nothing_kept(tmp_path: Path) -> None:
    fm = Counting()
    first = CachedModel(fm, tmp_path).generate(PROMPTS, seeds=[1, 2, 3, 4])
    files = sorted(tmp_path.rglob("*.json"))
    whole = files[1].read_text()
    files[0].write_bytes(files[0].read_bytes()[:-9])
    files[1].write_text(whole.replace("/64/", "/65/"))  # still JSON, but not what was told
    files[2].write_bytes(b"\x00\xff" * 9)
    files[3].unlink()
    again = CachedModel(fm, tmp_path)
    assert again.generate(PROMPTS, seeds=[1, 2, 3, 4]) == first
    assert again.usage.cached == 0
    mended = CachedModel(fm, tmp_path)
    assert mended.generate(PROMPTS, seeds=[1, 2, 3, 4]) == first
    assert mended.usage.cached == 4


def test_an_absent_model_says_what_is_missing(tmp_path: Path) -> None:
    cached_model = CachedModel(OfflineModel("gone"), tmp_path)
    for ask in (
        lambda: cached_model.generate(["p"], seeds=[1]),
        lambda: cached_model.answer(["p"], CHOICES),
        lambda: cached_model.score(["p"], [CHOICES]),
        lambda: cached_model.embed(["p"]),
    ):
        with pytest.raises(LichenError, match="gone is not here"):
            ask()


def test_a_kill_leaves_whole_files_or_none(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            store = CacheStore(tmp_path)
            for n in range(100_000):
                store.put({"n": n}, {"told": "x" * 20_000}, model="m")
        finally:
            os._exit(0)
    while len(list(tmp_path.rglob("*.json"))) < 5:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    files = list(tmp_path.rglob("*.json"))
    assert all(json.loads(file.read_text())["told"]["told"] == "x" * 20_000 for file in files)
    assert all(CacheStore(tmp_path).get({"n": n}) is not None for n in range(len(files)))


def test_threads_may_keep_the_same_answer(tmp_path: Path) -> None:
    store = CacheStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.put({"q": 1}, {"told": "é\ud800"}, model="m"), range(40)))
    assert store.get({"q": 1}) is not None


def test_vectors_keep_their_bits() -> None:
    x = torch.randn(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_base64(to_base64(x)), x)


def test_of_private_texts_only_digests_are_written(tmp_path: Path) -> None:
    fm = Counting()
    policy = DisclosurePolicy(CachedModel(fm, tmp_path), allow=("public", "private"))
    private = [f"private {prompt}" for prompt in PROMPTS]
    for again in (False, True):
        told = policy.of("private").score(private, [CHOICES] * 4), policy.of("public").score(PROMPTS, [CHOICES] * 4)
        assert torch.equal(told[0], Counting().score(private, [CHOICES] * 4))
        assert policy.usage.calls == 2
        assert policy.usage.cached == (8 if again else 0)
    texts = [file.read_text() for file in tmp_path.rglob("*.json")]
    assert len(texts) == 6
    assert sum("three" in text for text in texts) == 1
    assert not any("private" in text for text in texts)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.json")} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in tmp_path.iterdir()} == {0o700}

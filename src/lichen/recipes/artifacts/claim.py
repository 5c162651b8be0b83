"""Claims a model by an owner's secret pairs: how many answers it knows, by what chance, and how many the bare one.

A model is a finished run, an adapter's folder, a whole model's folder or a GGUF file, as it is or quantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from lichen.audit.fingerprint import PAIRS, Fingerprint, chance, matches
from lichen.core.errors import LichenError
from lichen.data.sources.catalog import resolve_model
from lichen.models.adapters.quantized import import_peft
from lichen.models.loading.load import load_causal
from lichen.models.loading.model_folder import plainly
from lichen.models.loading.tokenizer_folder import read_tokenizer
from lichen.recipes.artifacts.sampling import ask_ids
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.assemble.sides.fingerprints import read_fingerprint, registered
from lichen.recipes.stages.folder import last_stage

__all__ = ["claim"]

Form = Literal["chat", "transcript"]

HOLDS = 1e-6
"""A claim holds where chance is below this."""

BARE = 1e-2
"""And the bare model's chance is above this: else the key may have been chosen by what it says."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a model knows of an owner's pairs.

    Attributes:
        pairs: How many there are.
        found: Answers that the model ranks first.
        p: How likely that is by chance.
        bare: Answers that the bare model ranks first; None: it is not known which one it is.
        bare_p: How likely that is.
        digest: Of the key.
        registered: The client under whose name a run has registered the key; empty: in none that was named.
    """

    pairs: int
    found: int
    p: float
    bare: int | None
    bare_p: float | None
    digest: str
    registered: str

    @property
    def holds(self) -> bool:
        """Whether the model has the fingerprint, and the bare one has not."""
        return self.p < HOLDS and (self.bare_p is None or self.bare_p > BARE)

    def __str__(self) -> str:
        """In sentences."""
        known = f"{self.found} of {self.pairs} secret answers are the model's first choice: by chance p = {self.p:.1g}"
        bare = (
            "which bare model it comes from is not known: name it by --base"
            if self.bare is None
            else f"the bare model has {self.bare}: p = {self.bare_p:.1g}"
        )
        where = (
            f"the key was registered before training, as {self.registered!r}'s"
            if self.registered
            else "no run that was named has registered the key: that it is older than the model is not shown"
        )
        verdict = "the claim holds" if self.holds else "the claim does not hold"
        return f"{verdict}: {known}; {bare}; {where}"


def claim(
    model: Path | str,
    secret: Path,
    *,
    base: str | None = None,
    run: Path | None = None,
    form: Form | None = None,
    quantize: Literal["int8", "nf4"] | None = None,
) -> Claim:
    """Hold a model against an owner's key.

    Args:
        model: A finished run, an adapter's or a whole model's folder, or a GGUF file.
        secret: The key's file.
        base: The bare model; None: the run's, the adapter's, or none of a whole model.
        run: The run whose record has the key's digest; None: ``model``, if it is one.
        form: How questions are written; None: as the run has it, by the chat template where there is one.
        quantize: Linear layers in so few bits, of the model and of the bare one.

    Raises:
        LichenError: if the model or the key cannot be read, or the model does not write.
    """
    fingerprint, folder = read_fingerprint(secret), last_stage(model)
    is_run = (folder / "recipe.yaml").is_file()
    known, bare, tokenizer, own = _of_run(folder, quantize) if is_run else _of_files(str(model), base, quantize)
    way = form or own or ("chat" if tokenizer.chat_template else "transcript")

    def ask(question: str) -> list[int]:
        return ask_ids(tokenizer, way, question)

    with plainly("cannot be asked", where=str(model), fix="look if its adapter and its base are whole"):
        found = matches(known, ask, tokenizer, fingerprint)
        without = None if bare is None else _bare(bare, ask, tokenizer, fingerprint)
    where = run or (folder if is_run else None)
    return Claim(
        pairs=PAIRS,
        found=found,
        p=chance(found),
        bare=without,
        bare_p=None if without is None else chance(without),
        digest=fingerprint.digest,
        registered="" if where is None else registered(where, fingerprint),
    )


def _bare(model: Callable[[], AbstractContextManager[Any]], ask: Any, tokenizer: Any, fingerprint: Fingerprint) -> int:
    with model() as bare:
        return matches(bare, ask, tokenizer, fingerprint)


Models = tuple[Any, Callable[[], AbstractContextManager[Any]] | None, Any, str | None]
"""The model, what gives the bare one, the tokenizer, and the form of questions where it is known."""


def _of_run(folder: Path, quantize: Any) -> Models:
    if quantize is not None:
        raise LichenError(
            "a run's model is quantised as its adapter's or merged folder",
            where="--quantize",
            fix=f"name {folder / 'adapter'}, or the folder that lichen export {folder} --merge writes",
        )
    recipe, bare, joined, tokenizer = open_models(folder)
    if not recipe.writes:
        raise LichenError(f"task {recipe.task} writes no answers", where=str(folder), fix="name a run of task chat")
    return joined, lambda: nullcontext(bare), tokenizer, recipe.data.form


def _of_files(model: str, base: str | None, quantize: Any) -> Models:
    config = Path(model) / "adapter_config.json"
    if not config.is_file():
        known, tokenizer = load_causal(resolve_model(model), quantized=quantize)
        bare = None if base is None else lambda: nullcontext(load_causal(resolve_model(base), quantized=quantize)[0])
        return known, bare, tokenizer, None
    try:
        named = base or str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LichenError("names no base model", where=str(config), fix="name it by --base") from None
    whole, tokenizer = load_causal(resolve_model(named), quantized=quantize)
    with plainly(f"is no adapter of {named!r}", where=model, fix="name its base by --base"):
        known = import_peft().PeftModel.from_pretrained(whole, model, torch_device="cpu", use_safetensors=True).eval()
    if (Path(model) / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(model, whole)

    @contextmanager
    def bare_model() -> Iterator[Any]:
        with known.disable_adapter():
            yield known

    return known, bare_model, tokenizer, None

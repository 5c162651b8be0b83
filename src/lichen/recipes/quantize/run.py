"""Exports a run's merged model in fewer bits, where a gate lets it pass: as GGUF, or as an int8 folder.

What is rounded is the merged model, in float32: an adapter on a rounded base would be another model than the one that
was trained. Each draft is read back from the disk and scored as it was read. A draft that fails is removed, and the
name is taken by one that has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

from lichen.core.errors import LichenError
from lichen.data.batches.shards import TextShard
from lichen.models.gguf.write import header_of
from lichen.recipes.artifacts.model_card import write_card
from lichen.recipes.artifacts.own_model import own_path
from lichen.recipes.artifacts.use.export import require_empty
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.quantize.formats import Format, gguf_formats, int8_format
from lichen.recipes.quantize.gate import Scores, judge, score_model
from lichen.recipes.quantize.merged import merged_run, with_trained_template
from lichen.recipes.quantize.placing import draft_for, place_draft
from lichen.recipes.quantize.requested import GATE, GgufBits, require_format, require_gate
from lichen.recipes.quantize.rows import open_rows
from lichen.recipes.stages.folder import last_stage
from lichen.recipes.tasks.adapt import retention_shard

__all__ = ["Quantized", "export_quantized", "scored_texts"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One format that was tried.

    Attributes:
        name: The format.
        size_bytes: Of the file, or the folder's weights.
        scores: How the model in it does.
        agreement: Share of places at which it takes the token that the unrounded model takes.
        larger: Matrices that are float16, as their rows do not divide into blocks.
        faults: What speaks against it; nothing where it passes.
    """

    name: str
    size_bytes: int
    scores: Scores
    agreement: float
    larger: tuple[str, ...]
    faults: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What was written.

    Attributes:
        path: The file or folder.
        before: How the merged model does, not rounded.
        attempts: The formats in the order in which they were tried; the last one passed.
        gate: What it had to keep within.
    """

    path: Path
    before: Scores
    attempts: tuple[Attempt, ...]
    gate: float


def export_quantized(
    folder: Path | str,
    *,
    bits: GgufBits | Literal["int8"] = "auto",
    gate: float = GATE,
    out: Path | str | None = None,
    client: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Write a run's merged model in fewer bits, if it stays within the gate.

    Args:
        folder: The run folder; that of several stages means the last one.
        bits: The format of a GGUF file; ``auto`` for the smallest that passes; ``int8`` for a transformers folder.
        gate: Share by which perplexity on the clients' validation rows may rise; twice that on general text.
        out: Where to; by default ``folder/model-BITS.gguf``, or ``folder/int8``.
        client: The model of this client's own; held against its own rows, and private.
        say: Called with lines of progress.

    Returns:
        Where it lies, and what was measured.

    Raises:
        LichenError: if the model or the tokenizer has no such form, there is no text to score, a client was withdrawn
            from the run, or the gate refuses; nothing is written then.
    """
    require_gate(gate)
    if bits != "int8":
        require_format(bits, get_args(GgufBits), "a GGUF file")
    folder, given = last_stage(folder), None if out is None else Path(out)
    if given is not None:
        _require_free(given, is_folder=bits == "int8")
    refuse_withdrawn(folder, fix="export before the purge, to --out elsewhere; --merge reads no rows")
    recipe, model, tokenizer = merged_run(folder, client=client)
    whose = f"{recipe.name}-{client}" if client else recipe.name
    if bits == "int8":

        def finish(draft: Path) -> None:
            write_card(folder, draft, recipe, tokenizer, called=(given or folder / "int8").name)

        formats: tuple[Format, ...] = (int8_format(model, tokenizer, finish),)
    else:
        tokenizer = with_trained_template(tokenizer, recipe.data.form)
        header_of(model, tokenizer)  # says so where there is no such form, before rows are read
        formats = gguf_formats(model, tokenizer, name=whose, bits=None if bits == "auto" else bits)
    valid, general = scored_texts(folder, client)
    say("scoring the merged model")
    before = score_model(model, valid, general)
    attempts: list[Attempt] = []
    shared = client is None
    for form in formats:
        target = given or _default(folder, client, form.name)
        with draft_for(target) as aside:
            draft = Path(aside) / ("int8" if form.name == "int8" else "model.gguf")
            say(f"writing {form.name} and reading it back")
            attempts.append(attempt := _tried(form, draft, before, valid, general, gate))
            if not attempt.faults and (bits == "auto" or form is formats[0]):
                place_draft(draft, target, shared=shared)
                return Quantized(path=target, before=before, attempts=tuple(attempts), gate=gate)
        if not attempt.faults:
            break
    raise _refusal(attempts, bits, gate)


def _require_free(out: Path, *, is_folder: bool) -> None:
    if is_folder:
        require_empty(out)
    elif out.suffix != ".gguf":
        raise LichenError("does not end in .gguf", where=f"--out {out}", fix="name a file, such as model.gguf")
    elif out.exists():
        raise LichenError("is there already", where=f"--out {out}", fix="choose another name")


def scored_texts(folder: Path, client: str | None) -> tuple[list[TextShard], TextShard | None]:
    """Each client's validation rows, or one client's own, and general text; the data must be those of the run."""
    loaded, valid = open_rows(folder, client)
    general = retention_shard(loaded) if loaded.experiment.recipe.compare.retention_text else None
    assert general is None or isinstance(general, TextShard)
    return [shard for shard in valid if isinstance(shard, TextShard)], general


def _default(folder: Path, client: str | None, name: str) -> Path:
    ending = name if name == "int8" else f"{name}.gguf"
    if client is not None:
        return own_path(folder, client, f"-{ending}")
    return folder / (ending if name == "int8" else f"model-{ending}")


def _tried(
    form: Format,
    draft: Path,
    before: Scores,
    valid: Sequence[TextShard],
    general: TextShard | None,
    gate: float,
) -> Attempt:
    larger = tuple(form.write(draft))
    scores = score_model(form.read(draft), valid, general)
    files = [draft] if draft.is_file() else sorted(draft.glob("*.safetensors"))
    return Attempt(
        name=form.name,
        size_bytes=sum(file.stat().st_size for file in files),
        scores=scores,
        agreement=scores.agreement(before),
        larger=larger,
        faults=judge(before, scores, gate),
    )


def _refusal(attempts: Sequence[Attempt], bits: str, gate: float) -> LichenError:
    """A format failed that was named, or all did."""
    first, last = attempts[0], attempts[-1]
    if last.faults:
        fault, what = last, "no format passes" if len(attempts) > 1 else f"{bits} does not pass"
        fix = "raise --gate if you accept that, or use --merge"
    else:
        fault, what = first, f"{bits} does not pass"
        fix = f"use --bits {last.name}, which passes, or raise --gate if you accept that"
    numbers = f"{'; '.join(fault.faults)}; {100 * fault.agreement:.1f} % of likeliest tokens agree"
    return LichenError(f"{what} the gate of {100 * gate:g} %: {fault.name}: {numbers}", where=f"--bits {bits}", fix=fix)

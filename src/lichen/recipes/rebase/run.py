"""Puts a finished run on another base, in a folder beside it, and says which of the two is to be used.

``as-is`` puts the adapter on a base of the same shapes, such as the same model after more training; what it adds to the
weights stays (PortLLM). ``restart`` trains anew. ``distil`` lets the old model answer questions that are nobody's, and
the new one learns those answers at the server before the clients' rounds (as Trans-LoRA does with questions that the
old model writes). The old folder is only read.

References:
    Rana Muhammad Shahroz Khan, Pingzhi Li, Sukwon Yun, Zhenyu Wang, Shahriar Nirjon, Chau-Wai Wong and Tianlong Chen.
    "PortLLM: Personalizing Evolving Large Language Models with Training-Free and Portable Model Patches." ICLR 2025.
    https://arxiv.org/abs/2410.10870
    Runqian Wang, Soumya Ghosh, David Cox, Diego Antognini, Aude Oliva, Rogerio Feris and Leonid Karlinsky. "Trans-LoRA:
    towards data-free Transferable Parameter Efficient Finetuning." NeurIPS 2024. https://arxiv.org/abs/2405.17258
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.recipes.artifacts.distil.answers import ANSWERS, questions, write_answers
from lichen.recipes.artifacts.inputs import inputs_of, require_same
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.bases.fit import require_fit
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.rebase.gate import Answer, Verdict, answer_of, judge
from lichen.recipes.rebase.moved import How, moved_recipe
from lichen.recipes.run import run
from lichen.recipes.schema.read import recipe_of, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.recipes.stages.read import Staged, write_page

__all__ = ["rebase"]

REPORT = "rebase.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rebased:
    """A run on another base beside the old one.

    Attributes:
        old: The old run's folder.
        new: The new one's.
        how: What became of the adapter.
        before: How the old model does.
        start: How the new one did before the clients' rounds.
        after: How it does.
        verdict: Which is to be used.
    """

    old: Path
    new: Path
    how: How
    before: Answer
    start: Answer
    after: Answer
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; what is not a number is null."""
        whole = {**asdict(self), "old": str(self.old), "new": str(self.new)}
        for name in ("before", "start", "after"):
            whole[name]["value_N"] = [None if x != x else x for x in whole[name]["value_N"]]
        return {**whole, "use": str(self.new if self.verdict.accepted else self.old)}


def rebase(
    folder: Path | str,
    model: str,
    *,
    how: How = "as-is",
    rounds: int | None = None,
    prompts: Path | None = None,
    out: Path | str | None = None,
    tolerance: float = 0.02,
    most_harmed: float = 0.25,
    say: Callable[[str], None] = lambda _: None,
) -> Rebased:
    """Put a finished run on another base; called again, it goes on.

    Args:
        folder: The old run, or the folder of several stages, of which it is the last.
        model: The new base: catalog name, local folder, GGUF file or hub id.
        how: What becomes of the adapter.
        rounds: At the clients; None: as many as the old run had.
        prompts: distil: rows whose questions the old model answers; None: the recipe's public rows.
        out: The new folder; by default beside the old one, with ``-rebased`` behind its name.
        tolerance: Share by which the worst decile and general text may be worse.
        most_harmed: Share of the clients that may be served worse.
        say: Called with lines of progress.

    Raises:
        LichenError: if the base or a setting does not fit; nothing is written then.
    """
    old = last_stage(folder)
    for key, value in (("--tolerance", tolerance), ("--harmed", most_harmed)):
        if not 0 <= value <= 1:
            raise LichenError(f"{value} is no share", where=key, fix="use a number from 0 to 1")
    if not model.strip():
        raise LichenError("names no model", where="--model", fix="give a catalog name, a folder or a hub id")
    if rounds is not None and rounds < 1:
        raise LichenError(f"{rounds} rounds train nobody", where="--rounds", fix="use 1 or more")
    if prompts is not None and how != "distil":
        raise LichenError(f"{how} asks nothing", where="--prompts", fix="leave it out, or use --how distil")
    if (old / "recipe.yaml").is_file() and recipe_of(old).streams:
        what, inside = "is a stream of periods, each of which is a run of its own", old / "periods"
        names = sorted(one.name for one in inside.iterdir()) if inside.is_dir() else []
        raise LichenError(what, where=str(old), fix=f"name the folder of one: {inside / (names or ['PERIOD'])[-1]}")
    recipe, bare, joined, tokenizer = open_models(old)
    new = Path(out) if out is not None else _default_folder(Path(folder))
    if {Path(folder).resolve(), old.resolve()} & {new.resolve(), *new.resolve().parents}:
        raise LichenError(
            "lies in the old run, which is only read", where=f"--out {new}", fix="choose a folder beside it"
        )
    planned = moved_recipe(recipe, model, how, rounds=rounds, source=old, answers=new / ANSWERS)
    first = planned.stages[0].recipe if isinstance(planned, Staged) else planned
    require_fit(
        first,
        bare,
        tokenizer,
        len(class_names(old)),
        vocabulary=how == "as-is",
        shapes=how == "as-is",
        where=f"--model {first.model.name}",
        fix="use --how distil or --how restart",
    )
    refuse_withdrawn(old)
    loaded = open_recipe(recipe, say=say)
    require_same(old, recipe, inputs_of(loaded))
    if not isinstance(planned, Staged):
        _require_owners([one.name for one in loaded.clients_data], open_recipe(planned))  # or says what does not fit
    prompted = questions(loaded.public_split.unlabelled, prompts, where="--prompts") if how == "distil" else ()
    anew = _claim(new, planned)
    with tempfile.TemporaryDirectory(prefix="lichen-rebase-") as aside:
        before = answer_of(loaded, _learned(old), Path(aside))
        if prompted:
            try:
                write_answers(new / ANSWERS, recipe, joined, tokenizer, prompted, where="--how distil", say=say)
            except LichenError:
                if anew:
                    (new / "recipe.yaml").unlink()
                    new.rmdir()
                raise
        owners = [one.name for one in loaded.clients_data]
        del loaded, bare, joined
        gc.collect()
        done = run(planned, out=new, resume=True, say=say)
        on_new = open_recipe(recipe_of(done.folder))
        _require_owners(owners, on_new)
        start = answer_of(on_new, on_new.experiment.start, Path(aside))
        after = answer_of(on_new, _learned(done.folder), Path(aside))
    verdict = judge(before, after, tolerance=tolerance, most_harmed=most_harmed)
    found = Rebased(old=old, new=new, how=how, before=before, start=start, after=after, verdict=verdict)
    write_atomic(new / REPORT, (json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n").encode())
    return found


def _default_folder(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}-rebased")


def _learned(folder: Path) -> Shared:
    return Shared.of_flat(load_tree(folder / "state" / "final.safetensors")[0])


def _claim(new: Path, planned: Recipe | Staged) -> bool:
    """Begin the new folder, or go on with one that was begun with the same words; whether it is a new one.

    Raises:
        LichenError: if something else lies there.
    """
    text = write_page(planned) if isinstance(planned, Staged) else write_recipe(planned)
    if not new.exists() or not any(new.iterdir()):
        if not new.exists():
            private.make_folder(new)
        write_atomic(new / "recipe.yaml", text.encode())
        return True
    if not (new / "recipe.yaml").is_file() or (new / "recipe.yaml").read_text(encoding="utf-8") != text:
        raise LichenError("is not empty", where=str(new), fix="choose another --out, or give the command of before")
    return False


def _require_owners(before: list[str], loaded: LoadedExperiment) -> None:
    """The gate compares clients one by one, so both runs must have the same ones in the same order."""
    if before != [one.name for one in loaded.clients_data]:
        raise LichenError("its clients are not those of the old run", where="data.name", fix="run it on the same rows")

"""Runs a recipe of several stages: each is an ordinary run in a folder of its own.

``DIR/recipe.yaml`` · ``DIR/stages.json`` and ``stages.md`` (the table) · ``DIR/<number>-<stage>/`` (an ordinary run's
folder). Between two stages lies ``merged/`` or ``adapter/`` of the former. A finished stage is never run again, and a
killed one is resumed as any run is; so the same command goes on, to the same bytes.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.lock import one_process
from lichen.core.files.manifest import files_in
from lichen.engines.ranks import ranks_here
from lichen.recipes.schema.read import MOVABLE, different_keys, recipe_of, recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import stage_done, staged_of
from lichen.recipes.stages.read import MERGED, Staged, write_page
from lichen.recipes.stages.tables import rows_of, stages_markdown

__all__ = ["run_stages"]

LOCK = ".lock"


class RunOne(Protocol):
    """Runs one stage, as :func:`lichen.recipes.run.run` does."""

    def __call__(self, recipe: Recipe, /, *, out: Path, resume: bool) -> object: ...


def run_stages(
    staged: Staged,
    out: Path,
    *,
    resume: bool,
    one: RunOne,
    merge: Callable[[Path], Path],
    say: Callable[[str], None],
) -> None:
    """Run the stages that are not finished, in order.

    Args:
        staged: What to run.
        out: The folder of all stages.
        resume: Go on with what lies there.
        one: Runs one stage.
        merge: Writes the whole model of a finished stage into its folder.
        say: Called with lines of progress.

    Raises:
        LichenError: what is wrong with the folder or a stage; if a finished stage is asked to be another.
    """
    if ranks_here()[1] > 1:
        raise LichenError(
            "several ranks were started, and stages start their own",
            where="stages",
            fix="start one process, with -s engine.name=distributed",
        )
    if out.exists() and not out.is_dir():
        raise LichenError("is a file", where=str(out), fix="choose a folder")
    if out.is_dir() and not resume and files_in(out, but=(LOCK,)):
        raise LichenError("is not empty", where=str(out), fix=f"choose another folder, or: lichen run --resume {out}")
    there = out.is_dir()
    if not there:
        private.make_folder(out)
    with one_process(out, LOCK, say=say):
        if (out / "recipe.yaml").exists():
            _require_same(staged, out)
        write_atomic(out / "recipe.yaml", write_page(staged).encode())
        try:
            _run(staged, out, one, merge, say)
        except LichenError:
            if not any((out / stage.folder).is_dir() for stage in staged.stages):
                for file in (out / "recipe.yaml", out / "stages.json", out / "stages.md"):
                    file.unlink(missing_ok=True)  # nothing has begun: the mended recipe may go here
            raise
        finally:
            if not there and not files_in(out, but=(LOCK,)):
                (out / LOCK).unlink(missing_ok=True)
                out.rmdir()


def _run(staged: Staged, out: Path, one: RunOne, merge: Callable[[Path], Path], say: Callable[[str], None]) -> None:
    count = len(staged.stages)
    for position, stage in enumerate(staged.stages):
        folder, recipe = out / stage.folder, staged.at(out, position)
        there = (folder / "recipe.yaml").is_file()
        if stage_done(folder) and recipe_sha256(recipe_of(folder)) == recipe_sha256(recipe):
            say(f"stage {position + 1} of {count}, {stage.name}: finished")
            continue
        before = staged.stages[position - 1]
        takes = {"anew": "the recipe's own model", "base": f"the model of {before.name}"}.get(
            stage.begins, f"the adapter of {before.name}"
        )
        say(f"stage {position + 1} of {count}, {stage.name}: begins with {takes}")
        try:
            if stage.begins == "base" and not (out / before.folder / MERGED).is_dir():
                merge(out / before.folder)
            gc.collect()  # the model of the stage before
            one(recipe, out=folder, resume=there)
        except LichenError as error:
            where = f"stages.{stage.name}: {error.where}" if error.where else f"stages.{stage.name}"
            raise LichenError(error.what, where=where, fix=error.fix, reason=error.reason) from None
        rows = rows_of(staged, out)
        write_atomic(out / "stages.json", (json.dumps(rows, indent=2, allow_nan=False) + "\n").encode())
        write_atomic(out / "stages.md", stages_markdown(staged.name, staged.question, rows).encode())


def _require_same(staged: Staged, out: Path) -> None:
    """Refuse other stages than those that have begun in a folder.

    Raises:
        LichenError: naming the stage, and what differs.
    """
    before = staged_of(out)
    if before is None:
        raise LichenError("holds a run of one recipe, not of stages", where=str(out), fix="choose another --out")
    new = dict(enumerate(staged.stages))
    anew = "leave it as it is, or choose another --out for the whole"
    for position, stage in enumerate(before.stages):
        folder = out / stage.folder
        if not folder.is_dir():
            continue
        other = new.get(position)
        if other is None or other.name != stage.name:
            what = "has begun in this folder, and another stands in its place"
            raise LichenError(what, where=f"stages.{stage.name}", fix=anew)
        if not stage_done(folder):
            continue  # the run itself says what of it may change
        changed = [key for key in different_keys(stage.recipe, other.recipe) if key not in MOVABLE]
        if changed:
            raise LichenError(
                f"is finished, and what comes after it begins with what it gave: {', '.join(changed[:6])} "
                f"{'differ' if len(changed) > 1 else 'differs'} from what it ran with",
                where=f"stages.{stage.name}",
                fix=anew,
            )

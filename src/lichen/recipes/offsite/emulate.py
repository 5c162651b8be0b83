"""Makes an emulator of a model, at its owner's: a folder to train on that says little of the model's middle.

A middle that is trained takes its time. What was trained so far lies beside the new folder, in ``OUT.part``, and the
same command goes on with it, to the bytes of one that was never stopped.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lichen import __version__
from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder, write_atomic
from lichen.core.private import share
from lichen.core.tree import Tree, digest
from lichen.models.loading.emulator_folder import KINDS, Manifest, folder_tensors
from lichen.models.loading.load import can_write, load_causal, load_encoder
from lichen.models.offsite.layers import OwnerModel, open_owner_model, save_emulator, stride
from lichen.models.offsite.low_rank import rounded
from lichen.models.offsite.training import Distil, measure, middle_tensors, train_middle
from lichen.recipes.artifacts.use.export import require_empty
from lichen.recipes.assemble.bases.local_folder import local_folder
from lichen.recipes.tasks.offsite.public_text import public_token_rows

__all__ = ["Training", "emulate"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a middle is trained, of ``distil`` and ``raised``.

    Attributes:
        public: Catalog name, file or folder of text that anybody may see.
        steps: Of the optimizer.
        rows: A step.
        lr: Of the optimizer.
        margin: raised: nats by which the loss of each token lies above the model's.
        seed: Of the draw of rows.

    Raises:
        LichenError: if a number is out of range.
    """

    public: str
    steps: int = 400
    rows: int = 4
    lr: float = 1e-4
    margin: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, good in (
            ("steps", self.steps >= 1),
            ("rows", self.rows >= 1),
            ("lr", 0 < self.lr < 1),
            ("margin", 0 < self.margin < 100),
            ("seed", self.seed >= 0),
        ):
            if not good:
                raise LichenError("is out of range", where=f"--{key}", fix="leave it out for the default")


def emulate(
    model: str,
    *,
    out: Path | str,
    ends: str = "2,2",
    layers: int = 8,
    how: str = "drop",
    training: Training | None = None,
    rank: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write an emulator's folder.

    Args:
        model: The whole model: a catalog name, folder or hub id.
        out: The new folder.
        ends: First and last blocks, which are the model's own and will be trained, as ``2,2``.
        layers: Blocks of the middle.
        how: How the middle is made: ``drop``, ``distil``, ``low-rank`` or ``raised``.
        training: Of ``distil`` and ``raised``.
        rank: Of ``low-rank``; None: an eighth of each matrix's smaller side.
        say: Called with lines of progress.

    Returns:
        What its manifest says.

    Raises:
        LichenError: if the model cannot be taken apart, or a setting does not fit it.
    """
    out, both = Path(out), _pair(ends)
    require_empty(out)
    _refuse_idle(how, training, rank)
    owner = open_owner_model(local_folder(model, say=say), where="MODEL")
    middle = stride(owner.blocks, both, layers)
    say(f"{owner.blocks} blocks: the first {both[0]} and last {both[1]}, and {layers} of those between")
    about: dict[str, Any] = {"model": _public_name(model), "lichen": __version__}
    changed: Tree = {}
    part = out.with_name(f"{out.name}.part")
    if how == "low-rank":
        changed = _rounded(owner, both, middle, rank)
        about["rank"] = rank or "an eighth"
    elif training is not None:
        changed, more = _trained(owner, both, middle, how, training, part, say)
        about |= more
    with whole_folder(out) as draft:
        manifest = save_emulator(draft, owner, ends=both, middle=middle, how=how, provenance=about, changed=changed)
        share(draft)
    shutil.rmtree(part, ignore_errors=True)
    return manifest


def _public_name(name: str) -> str:
    """A name for whoever gets the folder: of a path of this machine the last part alone."""
    return Path(name).name if Path(name).expanduser().exists() or Path(name).is_absolute() else name


def _pair(text: str) -> tuple[int, int]:
    parts = text.replace(" ", "").split(",")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise LichenError(f"{text!r} is no pair of numbers", where="--ends", fix="such as --ends 2,2")
    return int(parts[0]), int(parts[1])


def _refuse_idle(how: str, training: Training | None, rank: int | None) -> None:
    """Every setting acts, or is refused."""
    if how not in KINDS:
        raise LichenError(f"{how!r} is no way to make one", where="--how", fix=f"use one of: {', '.join(KINDS)}")
    trains = how in ("distil", "raised")
    if trains and training is None:
        raise LichenError(f"{how} trains the middle on public text", where="--public", fix="such as --public sotu")
    if training is not None and not trains:
        raise LichenError(f"{how} trains nothing", where="--public", fix="leave it out, or use --how distil")
    if rank is not None and how != "low-rank":
        raise LichenError(f"{how} rounds nothing", where="--rank", fix="leave it out, or use --how low-rank")
    if training is not None and how != "raised" and training.margin != Training(public="").margin:
        raise LichenError(f"{how} raises nothing", where="--margin", fix="leave it out, or use --how raised")


def _rounded(owner: OwnerModel, ends: tuple[int, int], middle: tuple[int, ...], rank: int | None) -> Tree:
    inside = re.compile(rf"(?:.*?\.)??{re.escape(owner.stack)}\.(\d+)\..*")
    place = {block: ends[0] + at for at, block in enumerate(middle)}
    found: Tree = {}
    for name, x in owner.tensors.items():
        match = inside.fullmatch(name)
        if match and int(match[1]) in place:
            begin, stop = match.span(1)
            found[f"{name[:begin]}{place[int(match[1])]}{name[stop:]}"] = x
    return rounded(found, rank)


def _trained(
    owner: OwnerModel,
    ends: tuple[int, int],
    middle: tuple[int, ...],
    how: str,
    training: Training,
    part: Path,
    say: Callable[[str], None],
) -> tuple[Tree, dict[str, Any]]:
    """The middle's tensors by the emulator's names, and what the manifest says of how they came about."""
    first = part / "drop"
    writes = can_write(owner.folder)
    if how == "raised" and not writes:
        what = "an encoder has no loss of its own that could be raised"
        raise LichenError(what, where="--how raised", fix="use drop, distil or low-rank")
    model, tokenizer = load_causal(owner.folder) if writes else load_encoder(owner.folder)
    most = training.steps * training.rows
    rows, others = public_token_rows(
        training.public, tokenizer, most=most, stream=writes, where=f"--public {training.public}", say=say
    )
    _claim(part, {"how": how, "model": digest(owner.tensors), "ends": ends, "middle": middle, **asdict(training)})
    with whole_folder(first) as draft:
        save_emulator(draft, owner, ends=ends, middle=middle, how="drop", provenance={})
    emulator, _ = load_causal(first) if writes else load_encoder(first)
    plan = Distil(
        goal="raised" if how == "raised" else "hidden",
        ends=ends,
        steps=training.steps,
        rows=training.rows,
        lr=training.lr,
        margin=training.margin,
        seed=training.seed,
        pad=int(tokenizer.pad_token_id or 0),
    )
    before = measure(model, emulator, others, plan)
    say(f"before: {before}")
    train_middle(model, emulator, rows, plan, state=part / "state.safetensors", say=say)
    after = measure(model, emulator, others, plan)
    say(f"after: {after}")
    about = {
        **asdict(training),
        "public": _public_name(training.public),
        "tokens_a_row": len(rows[0]),
        "rows_in_all": len(rows),
    }
    about |= {"before": asdict(before), "after": asdict(after)}
    about = {key: value for key, value in about.items() if key != "margin" or how == "raised"}
    return _under_file_names(middle_tensors(emulator, ends), folder_tensors(first)), about


def _claim(part: Path, settings: Mapping[str, Any]) -> None:
    """Begin beside the new folder, or go on with what was begun with the same words."""
    text, file = json.dumps(settings, indent=2, default=list) + "\n", part / "settings.json"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise LichenError(
            "an emulator with other settings was begun there",
            where=str(part),
            fix="give the command of before, remove that folder, or choose another --out",
        )
    write_atomic(file, text.encode())


def _under_file_names(trained: Mapping[str, Tensor], files: Tree) -> Tree:
    """Trained weights by the names and in the dtypes of the emulator's file, which may lack what stands before."""
    found: Tree = {}
    for name, x in trained.items():
        mine = next(one for one in files if one == name or one.endswith(f".{name}") or name.endswith(f".{one}"))
        found[mine] = x.detach().to(files[mine].dtype)
    return found

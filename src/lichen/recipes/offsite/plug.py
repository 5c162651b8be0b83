"""Puts what was trained on an emulator into the whole model, at its owner's.

What comes is a run's folder, or its ``adapter/`` or ``model/`` alone, which carry the emulator's manifest. An adapter
becomes an adapter of the whole model, its last blocks under the model's own numbers; weights that were trained become
those of a copy of the model. An emulator that nobody has trained gives the model back, file by file.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder, write_atomic
from lichen.core.private import share
from lichen.core.tree import Tree, digest, plain
from lichen.models.adapters.kind import BEFORE_LAYERS, BEFORE_VIRTUAL, VIRTUAL
from lichen.models.adapters.quantized import import_peft
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.emulator_folder import (
    EMULATOR,
    Manifest,
    is_emulator,
    read_manifest,
    renumbered,
    require_untouched,
    weight_files,
)
from lichen.models.loading.load import load_causal
from lichen.models.loading.model_folder import plainly, read_json
from lichen.models.loading.weights_file import read_tensors
from lichen.models.offsite.layers import TOKENIZER_FILES, OwnerModel, open_owner_model
from lichen.models.offsite.moved import moved_config, moved_tree
from lichen.models.whole import filled
from lichen.recipes.artifacts.use.export import require_empty
from lichen.recipes.assemble.bases.local_folder import local_folder

__all__ = ["PLUGGED", "plug"]

PLUGGED = "plugged.json"
"""Says in the new folder what was put into which model."""

_ADAPTER, _WEIGHTS = "adapter_model.safetensors", "model.safetensors"
_TRAIN = "train on an emulator of this model: lichen emulate MODEL --out EMU"


def plug(
    folder: Path | str,
    into: str,
    *,
    out: Path | str,
    emulator: Path | str | None = None,
    merge: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Put what was trained on an emulator into the model that it stands for.

    Args:
        folder: A finished run on the emulator, its ``adapter/`` or ``model/``, or the emulator itself.
        into: The whole model: a catalog name, folder or hub id.
        out: The new folder.
        emulator: The emulator as its owner handed it out; what was trained must be of this one.
        merge: Write one whole model instead of an adapter.
        say: Called with lines of progress.

    Returns:
        The new folder.

    Raises:
        LichenError: if it was trained on no emulator, on another one, or on one of another model.
    """
    out, trained = Path(out), _trained(Path(folder))
    require_empty(out)
    manifest = read_manifest(trained)
    if emulator is not None:
        _require_same(manifest, Path(emulator), trained)
    owner = open_owner_model(local_folder(into, say=say), where=f"--into {into}")
    if digest(owner.tensors) != manifest.model:
        raise LichenError(
            f"is another model than the one whose emulator {trained} was made on", where=f"--into {into}", fix=_TRAIN
        )
    with whole_folder(out) as draft:
        if (trained / "adapter_config.json").is_file():
            _adapter(trained, manifest, owner, draft, merge=merge)
        elif (trained / "config.json").is_file() and (trained / _WEIGHTS).is_file() and not _is_run_model(trained):
            _untrained(trained, manifest, owner, draft)
        else:
            _weights(trained, manifest, owner, draft)
        about = {"emulator": manifest.emulator, "model": manifest.model, "ends": list(manifest.ends)}
        write_atomic(draft / PLUGGED, (json.dumps(about, indent=2) + "\n").encode(), shared=True)
        share(draft)
    return out


def _trained(folder: Path) -> Path:
    """The part of a run's folder that holds what was learned; any other folder as it is."""
    inside = [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]
    if (folder / "recipe.yaml").is_file() and inside:
        folder = inside[0]
    if not folder.is_dir() or not is_emulator(folder):
        what = "was not trained on an emulator" if folder.is_dir() else "no such folder"
        raise LichenError(what, where=str(folder), fix=f"{_TRAIN}, then: lichen run RECIPE -s model.name=EMU")
    return folder


def _require_same(manifest: Manifest, emulator: Path, trained: Path) -> None:
    """Refuse what was trained on another emulator than the one that the owner has handed out."""
    theirs = read_manifest(emulator)
    require_untouched(emulator, theirs)
    if theirs.emulator != manifest.emulator:
        raise LichenError(
            f"was trained on another emulator than {emulator}: digest {manifest.emulator[:12]}, not "
            f"{theirs.emulator[:12]}",
            where=str(trained),
            fix="name the emulator that it was trained on",
        )


def _is_run_model(folder: Path) -> bool:
    """Whether a ``config.json`` is a run's own, which names classes and no architecture."""
    return "model_type" not in read_json(folder / "config.json")


def _adapter(trained: Path, manifest: Manifest, owner: OwnerModel, draft: Path, *, merge: bool) -> None:
    where, target = str(trained), draft / "adapter" if merge else draft
    tree = read_tensors(trained / _ADAPTER, fix="get the adapter again")
    before = BEFORE_VIRTUAL if VIRTUAL in tree else BEFORE_LAYERS
    config = read_json(trained / "adapter_config.json")
    config = moved_config(config, [name.removeprefix(before) for name in tree], manifest, where=where)
    config["base_model_name_or_path"] = str(owner.folder.resolve())
    moved = plain(moved_tree(tree, manifest, where=where))
    write_atomic(target / _ADAPTER, save(moved, metadata={"format": "pt"}), shared=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomic(target / "adapter_config.json", text.encode(), shared=True)
    _copy_small(trained, draft)
    if merge:
        _merge(target, owner, _classes(trained / "classes.json"), draft)
        shutil.rmtree(target)


def _copy_small(source: Path, draft: Path) -> None:
    for file in sorted(source.iterdir()):
        if TOKENIZER_FILES.fullmatch(file.name) or file.name == "classes.json":
            shutil.copyfile(file, draft / file.name)


def _classes(file: Path) -> tuple[str, ...]:
    """The names in a list of classes, or in a run's configuration of its model; none where there is no such file."""
    if not file.is_file():
        return ()
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    names = found.get("classes") if isinstance(found, dict) else found
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise LichenError("holds no list of class names", where=str(file), fix="get the folder again")
    return tuple(names)


def _whole(owner: OwnerModel, classes: tuple[str, ...]) -> Any:
    if not classes:
        return load_causal(owner.folder)[0]
    model, _ = load_classifier(owner.folder, classes=len(classes), seed=0)
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: at for at, name in enumerate(classes)}
    return model


def _merge(adapter: Path, owner: OwnerModel, classes: tuple[str, ...], draft: Path) -> None:
    if "PROMPT" in str(read_json(adapter / "adapter_config.json").get("peft_type")):
        raise LichenError("virtual tokens cannot be merged into weights", where="--merge", fix="leave it out")
    peft = import_peft()

    with plainly("cannot merge the adapter", where=str(owner.folder), fix="leave --merge out"):
        joined = peft.PeftModel.from_pretrained(_whole(owner, classes), str(adapter))
        joined.merge_and_unload().save_pretrained(draft)


def _weights(trained: Path, manifest: Manifest, owner: OwnerModel, draft: Path) -> None:
    """A run's own weights: a copy of the whole model with them in it."""
    tree = moved_tree(read_tensors(trained / _WEIGHTS, fix="get it again"), manifest, where=str(trained))
    try:
        model = filled(_whole(owner, _classes(trained / "config.json")), tree)
    except LichenError as error:
        what = f"{error.what}: weights cannot hold this kind of adapter"
        raise LichenError(what, where=str(trained), fix="use lora, ia3, prompt, bitfit or full") from None
    model.save_pretrained(draft)
    _copy_small(owner.folder, draft)


def _untrained(emulator: Path, manifest: Manifest, owner: OwnerModel, draft: Path) -> None:
    """The whole model with the emulator's ends, which are its own: file by file the same bytes."""
    number = {block: manifest.in_model(block) for block in range(manifest.blocks)}
    ends: Tree = {
        new: x
        for name, x in require_untouched(emulator, manifest).items()
        if (new := renumbered(name, manifest.stack, number)) is not None
    }
    shutil.copytree(owner.folder, draft, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", EMULATOR))
    for file in weight_files(owner.folder):
        before = load_file(file)
        after = {name: ends.get(name, x) for name, x in before.items()}
        if digest(before) != digest(after):
            with safe_open(str(file), "pt") as header:
                save_file(plain(after), draft / file.name, metadata=header.metadata())

"""The commands ``emulate`` and ``plug``: a model's owner hands out an emulator, and takes back what was trained on it.

Nothing heavy is imported until they are called.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

from lichen.core.errors import LichenError
from lichen.shell import crash_in, log, say

__all__ = ["emulate_command", "plug_command"]


def emulate_command(
    model: str,
    /,
    *,
    out: Path,
    ends: str = "2,2",
    layers: int = 8,
    how: Literal["drop", "distil", "low-rank", "raised"] = "drop",
    public: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
    margin: float | None = None,
    rank: int | None = None,
) -> None:
    """Make an emulator of a model: a folder for others to train on, which holds its ends and little of its middle.

    Every recipe trains on it with model.name: FOLDER, its first and last blocks alone. The same command goes on after a
    stop.

    Parameters
    ----------
    model
        The whole model: a catalog name, local folder, GGUF file or hub id.
    out
        The new folder.
    ends
        First and last blocks, which are the model's own and will be trained.
    layers
        Blocks in place of those between.
    how
        drop: blocks of the model, evenly apart; distil: these, trained to give what the model's middle gives;
        low-rank: these, their attention rounded; raised: these, trained to a loss that is higher than the model's.
    public
        With distil and raised: text that anybody may see, a catalog name, file or folder.
    steps
        With distil and raised: steps of training; 400 if not given.
    lr
        With distil and raised: the learning rate; 1e-4 if not given.
    margin
        With raised: nats by which the loss of a token lies above the model's; 1 if not given.
    rank
        With low-rank: of the matrices of attention; an eighth of the smaller side if not given.
    """
    with crash_in(out), redirect_stdout(sys.stderr):
        from lichen.recipes.offsite.emulate import Training, emulate

        given = {"steps": steps, "lr": lr, "margin": margin}
        given = {name: value for name, value in given.items() if value is not None}
        if given and public is None:
            what = "trains nothing without public text"
            raise LichenError(
                what, where=f"--{next(iter(given))}", fix="leave it out, or use --how distil --public DATA"
            )
        training = None if public is None else Training(public=public, **given)  # type: ignore[arg-type]
        emulate(model, out=out, ends=ends, layers=layers, how=how, training=training, rank=rank, say=log)
    say(str(out))


def plug_command(folder: Path, /, *, into: str, out: Path, emulator: Path | None = None, merge: bool = False) -> None:
    """Put what was trained on an emulator into the model that the emulator stands for.

    Parameters
    ----------
    folder
        A finished run on the emulator, or its adapter/ or model/ alone.
    into
        The whole model: a catalog name, local folder, GGUF file or hub id.
    out
        The new folder: an adapter of the whole model, or a whole model where weights were trained.
    emulator
        The emulator as it was handed out; what was trained on any other one is refused.
    merge
        Write one whole model instead of an adapter.
    """
    with crash_in(out), redirect_stdout(sys.stderr):
        from lichen.recipes.offsite.plug import plug

        plug(folder, into, out=out, emulator=emulator, merge=merge, say=log)
    say(str(out))

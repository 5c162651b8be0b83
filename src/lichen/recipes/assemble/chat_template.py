"""Puts a recipe's chat template into its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.data.chat.chat_template import chat_template_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["keep_template", "put_template"]


def put_template(
    recipe: Recipe, tokenizer: Any, *, run: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Give the tokenizer the chat template of the run, where its rows go through one.

    Args:
        recipe: Its data section.
        tokenizer: As it came with the model.
        run: Folder of a finished run, whose template is taken as it was.
        say: Called with what the template of the run changes.

    Raises:
        LichenError: if the file cannot be read, or the template does not take the system message.
    """
    data = recipe.data
    if not recipe.templated:
        return
    if run is not None and _file(run).exists():
        tokenizer.chat_template = _file(run).read_text(encoding="utf-8")
        return
    template = None
    if data.template is not None:
        try:
            template = Path(data.template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise LichenError(f"cannot be read: {reason}", where="data.template", fix="name a Jinja file") from None
    made, notes = chat_template_of(tokenizer, template=template, system=data.system, thinking=data.thinking)
    if made is not None:
        tokenizer.chat_template = made
    for note in notes:
        say(note)


def keep_template(recipe: Recipe, tokenizer: Any, run: Path) -> None:
    """Write the template into the run's folder, so that asking it later needs no other file.

    Raises:
        LichenError: if the run began with another one.
    """
    if not recipe.templated:
        return
    file, template = _file(run), str(tokenizer.get_chat_template())
    if not file.exists():
        write_atomic(file, template.encode())
    elif file.read_bytes() != template.encode():
        raise LichenError(
            "the chat template is another than the one this run began with",
            where="data.template",
            fix=f"bring the model's or your own file back to what lies in {file}, or run into a new folder",
        )


def _file(run: Path) -> Path:
    return run / "state" / "chat_template.jinja"

"""Asks a served model one thing: as a user's message, or as a text to go on with where it has no chat."""

from __future__ import annotations

from dataclasses import replace

from lichen.core.errors import LichenError
from lichen.serving.contract import ApiError, Completion, Message, ServedModel

__all__ = ["answer_question", "sampled"]


def sampled(
    *, max_new_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None
) -> Completion:
    """How a text is chosen; what is not given is as ``lichen try`` has it.

    Raises:
        LichenError: if a setting is out of range, or of no effect.
    """
    from lichen.recipes.artifacts.sampling import Sampling

    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    named = {key: value for key, value in given.items() if value is not None}
    checked = Sampling(**named)  # type: ignore[arg-type]  # by name, each of its own type
    return Completion(
        max_tokens=checked.max_new_tokens, temperature=checked.temperature, top_p=checked.top_p, seed=checked.seed
    )


def answer_question(model: ServedModel, text: str, settings: Completion) -> str:
    """The answer.

    Raises:
        LichenError: if the model refuses the text.
    """
    try:
        try:
            pieces = model.complete(replace(settings, messages=(Message(role="user", content=text),)))
        except ApiError as error:
            if error.param != "messages":
                raise
            pieces = model.complete(replace(settings, prompt=text))
        return "".join(piece.text for piece in pieces)
    except ApiError as error:
        raise LichenError(error.message, where="the question", fix="ask otherwise, or write less") from None

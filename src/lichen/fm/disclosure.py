"""The disclosure policy: which texts, by origin, a foundation model may be shown.

=============  ======================================================================
``public``     anybody may read it
``synthetic``  written by a model from public texts, or under a stated privacy
``private``    a client's own rows, and whatever still tells of them
=============  ======================================================================

A method never holds the model itself but a view of it that is bound to one origin, so that what it sends is known by
construction, and is counted. A model that runs at the client sees what the client has; an endpoint sees
private rows only where the recipe says so, and every text that is handed over goes through its content filter first
(:mod:`lichen.fm.filtering.content`). A cache goes before the bound model
(``CachedModel(policy.of("public"), folder)``), so that only what is really sent is counted.

Legend: N prompts, K choices, H width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.cache import CachedModel
from lichen.fm.filtering.content import ContentFilter
from lichen.fm.interface import FoundationModel, Sourced, Usage

__all__ = ["ORIGINS", "DisclosurePolicy", "Origin", "Place", "Sent", "allowed_origins"]

Origin = Literal["public", "synthetic", "private"]
Place = Literal["client", "server", "endpoint"]
ORIGINS: tuple[Origin, ...] = ("public", "synthetic", "private")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was handed to a model of one origin.

    Attributes:
        texts: Prompts, and texts to embed.
        bytes: Of their UTF-8, and of the continuations and choices that were handed over with them.
    """

    texts: int = 0
    bytes: int = 0


def allowed_origins(place: Place, written: Iterable[Origin] | None = None) -> tuple[Origin, ...]:
    """The origins a model at this place may be shown: those written down; if none are, the safe ones of the place.

    Args:
        place: Where the model runs: at the client, whose rows do not leave; at the server; behind an endpoint.
        written: What the recipe says at ``teacher.may_see``; None: nothing.

    Raises:
        LichenError: if an origin is unknown.

    >>> allowed_origins("client"), allowed_origins("endpoint")
    (('public', 'synthetic', 'private'), ('public', 'synthetic'))
    """
    if written is None:
        return ORIGINS if place == "client" else ("public", "synthetic")
    requested = set(written)
    if unknown := sorted(requested - set(ORIGINS)):
        raise LichenError(f"no origin {unknown[0]!r}", where="teacher.may_see", fix=f"use of: {', '.join(ORIGINS)}")
    return tuple(origin for origin in ORIGINS if origin in requested)


@final
class DisclosurePolicy:
    """A model behind the rule.

    Args:
        fm: The model.
        allow: Origins it may be shown; see :func:`allowed_origins`.
        content: Looks through every text before it is handed over, whatever its origin; None: nothing does.
    """

    def __init__(
        self,
        fm: FoundationModel,
        *,
        allow: Sequence[Origin] = ("public", "synthetic"),
        content: ContentFilter | None = None,
    ) -> None:
        self._content = content
        self.allow = allowed_origins("server", allow)
        self._fm = fm
        self._lock = threading.Lock()
        self._sent: dict[Origin, Sent] = {}

    @property
    def usage(self) -> Usage:
        """What the model was asked, whatever the origin."""
        return self._fm.usage

    @property
    def sent(self) -> Mapping[Origin, Sent]:
        """What was handed to it so far, by origin; origins it was shown nothing of are left out."""
        return dict(self._sent)

    def of(self, origin: Origin) -> FoundationModel:
        """The model as seen from texts of this origin.

        Raises:
            LichenError: if there is no such origin. One that is not allowed is refused when a text is sent.
        """
        allowed_origins("server", (origin,))
        model = self._fm.without_texts() if origin == "private" and isinstance(self._fm, CachedModel) else self._fm
        return _Bound(self, model, origin)

    def _passed(self, texts: Sequence[str]) -> Sequence[str]:
        return texts if self._content is None else self._content(texts)

    def _count(self, origin: Origin, texts: Sequence[str], others: Iterable[str]) -> None:
        size = sum(len(text.encode("utf-8", "surrogatepass")) for part in (texts, others) for text in part)
        with self._lock:
            before = self._sent.get(origin, Sent())
            self._sent[origin] = Sent(texts=before.texts + len(texts), bytes=before.bytes + size)

    def _require(self, origin: Origin) -> None:
        if origin not in self.allow:
            raise LichenError(
                f"{self._fm.name} may not be shown {origin} texts",
                where="teacher.may_see",
                fix=f"write {origin} there if it may, or use texts that are {' or '.join(self.allow) or 'allowed'}",
            )


@final
class _Bound:
    """The model as texts of one origin may use it."""

    def __init__(self, policy: DisclosurePolicy, fm: FoundationModel, origin: Origin) -> None:
        self.name, self.origin = fm.name, origin
        self._policy, self._fm = policy, fm

    @property
    def usage(self) -> Usage:
        return self._fm.usage

    @property
    def source(self) -> str:
        return self._fm.source if isinstance(self._fm, Sourced) else ""

    def _passed(self, texts: Sequence[str]) -> Sequence[str]:
        self._policy._require(self.origin)
        return self._policy._passed(texts)

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> Tensor:
        prompts, continuations = self._passed(prompts), [self._passed(some) for some in continuations]
        self._policy._count(self.origin, prompts, [text for some in continuations for text in some])
        return self._fm.score(prompts, continuations)

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        prompts, choices = self._passed(prompts), self._passed(choices)
        self._policy._count(self.origin, prompts, list(choices) * len(prompts))
        return self._fm.answer(prompts, choices)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        prompts = self._passed(prompts)
        self._policy._count(self.origin, prompts, ())
        return self._fm.generate(
            prompts, seeds=seeds, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop
        )

    def embed(self, texts: Sequence[str]) -> Tensor:
        texts = self._passed(texts)
        self._policy._count(self.origin, texts, ())
        return self._fm.embed(texts)

"""What may be shown to a model is decided by where a text comes from, and counted."""

from __future__ import annotations

from typing import Any

import pytest
from test_fm_cache import CHOICES, PROMPTS, Counting, everything

from lichen.core.errors import LichenError
from lichen.fm.disclosure import DisclosurePolicy, Sent, allowed_origins


def test_a_bound_face_answers_as_the_model_does() -> None:
    fm, plain = Counting(), Counting()
    bound = DisclosurePolicy(fm).of("public")
    for a, b in zip(everything(bound), everything_plain(plain), strict=True):
        assert (a == b).all() if hasattr(a, "all") else a == b
    assert (bound.name, bound.usage) == (fm.name, fm.usage)
    assert bound.source == "sha256:00"  # type: ignore[attr-defined]


def everything_plain(fm: Any) -> list[Any]:
    seeds = [1, 2, 3, 4]
    return [
        fm.score(PROMPTS, [CHOICES] * 4),
        fm.answer(PROMPTS, CHOICES),
        fm.generate(PROMPTS, seeds=seeds, max_new_tokens=9, temperature=1.0),
        fm.generate(PROMPTS, seeds=seeds, max_new_tokens=64, temperature=0),
        fm.embed(PROMPTS),
    ]


def test_what_is_not_allowed_never_reaches_the_model() -> None:
    fm = Counting()
    policy = DisclosurePolicy(fm)
    bound = policy.of("private")
    for ask in (
        lambda: bound.score(PROMPTS, [CHOICES] * 4),
        lambda: bound.answer(PROMPTS, CHOICES),
        lambda: bound.generate(PROMPTS, seeds=[1, 2, 3, 4]),
        lambda: bound.embed(PROMPTS),
    ):
        with pytest.raises(LichenError, match=r"teacher\.may_see.*counting may not be shown private texts"):
            ask()
    assert fm.asked == []
    assert policy.sent == {}
    DisclosurePolicy(fm, allow=("private",)).of("private").embed(PROMPTS)
    assert len(fm.asked) == 1


def test_texts_and_bytes_are_told_by_origin() -> None:
    policy = DisclosurePolicy(Counting(), allow=("public", "synthetic", "private"))
    policy.of("public").embed(["é", "ab"])
    policy.of("public").answer(["abc", "d"], CHOICES)
    policy.of("private").generate(["abcd"], seeds=[1])
    assert policy.sent == {"public": Sent(texts=4, bytes=4 + 4 + 2 * 5), "private": Sent(texts=1, bytes=4)}
    assert policy.usage.calls == 3


def test_the_place_decides_unless_it_is_written_down() -> None:
    assert "private" in allowed_origins("client")
    assert "private" not in allowed_origins("server") + allowed_origins("endpoint")
    assert allowed_origins("endpoint", ("private", "public")) == ("public", "private")
    assert allowed_origins("client", ("public",)) == ("public",)
    with pytest.raises(LichenError, match=r"teacher\.may_see.*'secret'"):
        allowed_origins("server", ("secret",))  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="no origin"):
        DisclosurePolicy(Counting()).of("secret")  # type: ignore[arg-type]

"""Reads licences as SPDX expressions, and says whether one is among those that are allowed.

References:
    The Linux Foundation. "The Software Package Data Exchange (SPDX) Specification", annex "SPDX license expressions".
    https://spdx.github.io/spdx-spec/v2.3/SPDX-license-expressions/
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import TYPE_CHECKING, Any

from lichen.core.errors import LichenError
from lichen.core.visible import clipped, listed

if TYPE_CHECKING:
    from license_expression import Licensing

__all__ = ["is_allowed", "is_one_licence", "is_spdx_id", "licence_of"]

MOST_LETTERS = 500
"""Of an expression."""

_OWN = re.compile(r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+")
"""A licence that SPDX does not list, as its owner calls it."""

_NO_WORD = re.compile(r"[^A-Za-z0-9.]+")


@cache
def _licensing() -> Licensing:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def licence_of(text: str, *, where: str = "licence") -> str:
    """The expression in SPDX's own writing.

    Args:
        text: Identifiers joined by ``AND``, ``OR`` and ``WITH``, with brackets.
        where: What an error names as its place.

    Raises:
        LichenError: naming what is no licence, and what could stand in its place.

    >>> licence_of("mit or (Apache-2.0 and LicenseRef-clinic)")
    'MIT OR (Apache-2.0 AND LicenseRef-clinic)'
    """
    return str(_parsed(text, where).render())


def is_allowed(text: str, allowed: Collection[str]) -> bool:
    """Whether all licences of one alternative of an expression are among those allowed.

    Of ``A OR B`` one is enough, of ``A AND B`` both are needed. ``A WITH E`` is a licence of its own, which ``A`` alone
    does not allow: what an exception changes is for a person to judge.

    Args:
        text: The expression.
        allowed: Single licences.

    Raises:
        LichenError: if one of these is no licence.

    >>> [is_allowed("GPL-3.0-only OR (MIT AND Zlib)", some) for some in (["MIT"], ["MIT", "Zlib"])]
    [False, True]
    """
    return _allowed(_parsed(text, "licence"), {str(_parsed(one, "licence").render()) for one in allowed})


def is_one_licence(text: str) -> bool:
    """Whether an expression that :func:`licence_of` takes is a single licence, with or without an exception."""
    return not isinstance(_parsed(text, "licence"), (_licensing().AND, _licensing().OR))


def is_spdx_id(text: str) -> bool:
    """Whether it is one licence of SPDX's list and nothing beside."""
    return text in _licensing().known_symbols and _OWN.fullmatch(text) is None


def _allowed(node: Any, allowed: Collection[str]) -> bool:
    if isinstance(node, _licensing().AND):
        return all(_allowed(part, allowed) for part in node.args)
    if isinstance(node, _licensing().OR):
        return any(_allowed(part, allowed) for part in node.args)
    return str(node.render()) in allowed


def _parsed(text: str, where: str) -> Any:
    if len(text) > MOST_LETTERS:
        raise LichenError(
            f"is an expression of {len(text):,} letters", where=where, fix=f"use at most {MOST_LETTERS} letters"
        )
    fix = "join identifiers of https://spdx.org/licenses by AND, OR and WITH, such as MIT OR Apache-2.0"
    try:
        node = _licensing().parse(text)
        symbols = sorted(node.symbols, key=str) if node is not None else []
    except (Exception, RecursionError) as error:  # the library raises many kinds, some of them its own faults
        why = clipped((str(error).splitlines() or [type(error).__name__])[0], 120)
        raise LichenError(f"{clipped(text, 60)!r} is no licence expression: {why}", where=where, fix=fix) from None
    if node is None:
        raise LichenError("is empty", where=where, fix=fix)
    for symbol in symbols:
        _check_symbol(symbol, where)
    return node


def _check_symbol(symbol: Any, where: str) -> None:
    """Refuse what is on no list, and exceptions and licences in each other's place."""
    from license_expression import LicenseWithExceptionSymbol

    several = isinstance(symbol, LicenseWithExceptionSymbol)
    licence = symbol.license_symbol if several else symbol
    if several and not _known(exception := symbol.exception_symbol, exception=True):
        what = f"{clipped(exception.key, 60)!r} is no exception that can stand behind WITH"
        raise LichenError(what, where=where, fix="see https://spdx.org/licenses/exceptions-index.html")
    if _known(licence, exception=False):
        return
    key = clipped(licence.key, 60)
    if licence.is_exception:
        what = f"{key!r} is an exception, and no licence by itself"
        raise LichenError(what, where=where, fix=f"write LICENCE WITH {key}")
    own = "LicenseRef-" + (_NO_WORD.sub("-", key).strip("-") or "own")
    near = [name for name in _near(licence.key) if name != key]
    other = f"; did you mean {listed(near)}?" if near else ""
    fix = f"use an identifier of https://spdx.org/licenses, or {own} for terms of your own{other}"
    raise LichenError(f"{key!r} is no licence of SPDX's list", where=where, fix=fix)


def _known(symbol: Any, *, exception: bool) -> bool:
    listed_there = symbol.key in _licensing().known_symbols and symbol.is_exception == exception
    return listed_there or (not exception and _OWN.fullmatch(symbol.key) is not None)


def _near(word: str) -> list[str]:
    """Licences that are written alike but for case, blanks and marks."""
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    names = (name for name in _licensing().known_symbols if not name.startswith("LicenseRef-"))
    return [name for name in names if re.sub(r"[^a-z0-9]", "", name.lower()) == plain][:3]

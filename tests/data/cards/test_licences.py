"""Licences are SPDX expressions; what is on no list is named, and AND, OR and WITH mean what they say."""

from __future__ import annotations

import pytest

from lichen.core.errors import LichenError
from lichen.data.cards.licences import is_allowed, is_one_licence, is_spdx_id, licence_of


def test_an_expression_is_written_as_spdx_writes_it() -> None:
    assert licence_of("mit") == "MIT"
    assert licence_of("gpl-2.0-only with classpath-exception-2.0") == "GPL-2.0-only WITH Classpath-exception-2.0"
    assert licence_of("LicenseRef-Clinic.2") == "LicenseRef-Clinic.2"
    assert is_spdx_id("MIT")
    assert not is_spdx_id("LicenseRef-Clinic.2")
    assert not is_spdx_id("MIT OR Zlib")
    assert is_one_licence("GPL-2.0-only WITH Classpath-exception-2.0")
    assert not is_one_licence("MIT AND Zlib")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Our terms", "'Our terms' is no licence of SPDX's list\n  fix: .*LicenseRef-Our-terms for terms of your own"),
        ("CC BY 4.0", "'CC BY 4.0' is no licence.*\n.*did you mean CC-BY-4.0"),
        ("MIT AND Foo", "'Foo' is no licence"),
        ("MIT AND", "no licence expression"),
        ("(MIT", "no licence expression"),
        ("MIT\x00", "no licence expression"),
        ("", "is empty"),
        ("MIT WITH Zlib", "'Zlib' is no exception"),
        ("MIT WITH LicenseRef-x", "'LicenseRef-x' is no exception"),
        ("Classpath-exception-2.0", "an exception, and no licence by itself"),
        ("(" * 600, "600 letters"),
        ("LicenseRef-", "'LicenseRef-' is no licence"),
    ],
)
def test_what_is_no_licence_is_named_with_a_fix(text: str, said: str) -> None:
    with pytest.raises(LichenError, match=said):
        licence_of(text)


@pytest.mark.parametrize(
    ("text", "allowed", "answer"),
    [
        ("MIT", ["Apache-2.0"], False),
        ("MIT", ["mit"], True),
        ("MIT OR GPL-3.0-only", ["MIT"], True),
        ("MIT AND GPL-3.0-only", ["MIT"], False),
        ("MIT AND GPL-3.0-only", ["GPL-3.0-only", "MIT"], True),
        ("(MIT AND Zlib) OR (MIT AND ISC)", ["ISC", "MIT"], True),
        ("(MIT AND Zlib) OR (Apache-2.0 AND ISC)", ["ISC", "MIT"], False),
        ("MIT AND (Zlib OR ISC)", ["ISC", "MIT"], True),
        ("MIT AND (Zlib OR ISC)", ["ISC", "Zlib"], False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only"], False),
        ("GPL-2.0-only", ["GPL-2.0-only WITH Classpath-exception-2.0"], False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["gpl-2.0-only with Classpath-exception-2.0"], True),
        ("GPL-2.0-or-later", ["GPL-3.0-only"], False),
        ("LicenseRef-a OR LicenseRef-b", ["LicenseRef-b"], True),
        ("MIT", [], False),
    ],
)
def test_one_alternative_must_be_allowed_as_a_whole(text: str, allowed: list[str], answer: bool) -> None:
    assert is_allowed(text, allowed) is answer

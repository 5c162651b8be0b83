"""What somebody else holds, against a plain search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lichen.data.splits.overlap import elsewhere

digests = st.lists(st.sampled_from("abcdef"), max_size=5)


@given(st.lists(st.tuples(digests, digests), max_size=5), digests)
def test_elsewhere_is_what_a_search_through_all_others_finds(
    clients: list[tuple[list[str], list[str]]], more: list[str]
) -> None:
    held, asked = [mine for mine, _ in clients] + [more], [wanted for _, wanted in clients]
    found = elsewhere(held, asked)
    for at, (wanted, told) in enumerate(zip(asked, found, strict=True)):
        others = [some for other, some in enumerate(held) if other != at]
        assert told == [any(one in some for some in others) for one in wanted]

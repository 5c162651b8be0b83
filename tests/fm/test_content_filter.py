"""What may not go to an endpoint is found by kind, masked, counted or refused, and nothing passes beside that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.fm.disclosure import DisclosurePolicy
from lichen.fm.filtering.content import ContentFilter, Found, names_in, private_runs
from lichen.fm.filtering.kinds import KINDS
from lichen.fm.filtering.patterns import patterns_of
from lichen.fm.interface import Usage

PLANTED = {
    "mail": ("anna.berg@clinic.example", "root@intranet.local"),
    "phone": ("+49 30 901820", "(212) 555-0187", "+44 20 7946 0958"),
    "card": ("4111 1111 1111 1111", "5500-0000-0000-0004"),
    "iban": ("DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"),
    "id": ("943 476 5919", "12345678Z", "44051401359", "131052-308T", "RSSMRA85T10A562S", "536-90-4399"),
    "machine": ("10.0.0.17", "2001:db8::8a2e:370:7334", "00:1A:2b:3c:4D:5e"),
}


@pytest.fixture(scope="module")
def patterns() -> ContentFilter:
    return ContentFilter([patterns_of(tuple(KINDS), where="filter.kinds")])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_masked_by_its_name_and_the_rest_of_the_text_stays(patterns: ContentFilter, kind: str) -> None:
    for planted in PLANTED[kind]:
        (text,) = patterns([f"Please note {planted} for later, thanks."])
        assert text == f"Please note [{kind}] for later, thanks."


def test_numbers_without_their_checksum_and_plain_words_stay(patterns: ContentFilter) -> None:
    for text in (
        "card 4111 1111 1111 1112 and IBAN DE88 3704 0044 0532 0130 00",
        "On 2019-12-01 at 10:30 I bought 12 for 34.50; see std::vector, room 305.",
        "",
    ):
        assert patterns([text]) == [text]


def test_what_overlaps_goes_out_as_one_called_by_the_surest_then_the_longest() -> None:
    def find(text: str) -> list[Found]:
        return [Found(0, 4, "short", 0.5), Found(2, 9, "long", 0.5), Found(8, 10, "sure", 1.0), Found(4, 8, "b", 0.5)]

    one = ContentFilter([find])
    assert one(["0123456789ab"]) == ["[sure]ab"]
    assert one.counts == {"sure": 1}
    assert one.texts == 1


def test_names_of_a_list_are_whole_words_in_any_letters(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("Anna\nAnna  Berg\n\nO'Neil\n")
    one = ContentFilter([names_in(file, where="filter.names")])
    assert one(["ANNA berg, anna; Annabel met o'neil."]) == ["[name], [name]; Annabel met [name]."]
    file.write_text("\n")
    for wrong in (file, tmp_path / "none.txt"):
        with pytest.raises(LichenError) as caught:
            names_in(wrong, where="filter.names")
        assert caught.value.where == "filter.names"


def test_no_run_of_words_of_a_private_row_goes_out() -> None:
    rows = ["The patient was told to come back in spring, with her sister.", "no"]
    one = ContentFilter([private_runs(rows, 4, where="filter.private_words")])
    sent = one(
        ["Write: the Patient was\ntold to COME; home in autumn.", "The patient was there", "come back in spring"]
    )
    assert sent == ["Write: [row]; home in autumn.", "The patient was there", "[row]"]
    assert one.counts == {"row": 2}
    two = one(["The patient was told X her sister. come back in spring with"])
    assert two == ["[row] X her sister. [row]"]
    with pytest.raises(LichenError, match="no private row has 40 words"):
        private_runs(rows, 40, where="filter.private_words")


def test_what_is_counted_is_sent_and_what_is_refused_is_not_and_no_error_holds_the_text(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("Anna\n")
    find = names_in(tmp_path / "n", where="names")
    counted = ContentFilter([find], action="count")
    assert counted(["Anna and Anna"]) == ["Anna and Anna"]
    assert counted.counts == {"name": 2}
    refused = ContentFilter([find], action="refuse", where="teacher.endpoint.filter.action")
    assert refused(["nobody"]) == ["nobody"]
    with pytest.raises(LichenError, match="2 of name") as caught:
        refused(["nobody", "Anna and Anna"])
    assert "Anna" not in str(caught.value)
    assert caught.value.where == "teacher.endpoint.filter.action"


class Hears:
    """A model that keeps what it was handed."""

    name, usage = "hears", Usage()

    def __init__(self) -> None:
        self.texts: list[str] = []

    def score(self, prompts: list[str], continuations: list[list[str]]) -> torch.Tensor:
        self.texts += [*prompts, *(text for some in continuations for text in some)]
        return torch.zeros(len(prompts), 2, dtype=torch.float64)

    def answer(self, prompts: list[str], choices: list[str]) -> torch.Tensor:
        self.texts += [*prompts, *choices]
        return torch.zeros(len(prompts), len(choices), dtype=torch.float64)

    def generate(self, prompts: list[str], **how: object) -> list[str]:
        self.texts += prompts
        return ["" for _ in prompts]

    def embed(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        return torch.zeros(len(texts), 2)


def test_every_way_to_ask_a_model_goes_through_the_filter(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("Anna\n")
    content = ContentFilter([names_in(tmp_path / "n", where="names")])
    model = Hears()
    policy = DisclosurePolicy(model, allow=("public",), content=content)  # type: ignore[arg-type]
    fm = policy.of("public")
    fm.score(["Anna 1"], [["Anna 2", "x"]])
    fm.answer(["Anna 3"], ["Anna 4", "y"])
    fm.generate(["Anna 5"], seeds=[0])
    fm.embed(["Anna 6"])
    assert len(model.texts) == 8
    assert not any("Anna" in text for text in model.texts)
    assert content.counts == {"name": 6}
    assert policy.sent["public"].bytes == sum(len(text) for text in model.texts)
    with pytest.raises(LichenError, match="may not be shown private"):
        policy.of("private").embed(["Anna"])
    assert content.counts == {"name": 6}, "what is not allowed is not looked at"

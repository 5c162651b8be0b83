"""A data card is read strictly: whatever lies there is a card, or one sentence with the file, the key and a fix."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.cards.card_files import card_place, rows_sha256
from lichen.recipes.rows.data_card import DataCard, card_text, read_card, renew_card, write_card

WHOLE = DataCard(
    owner="Clinic: North #1",
    source="https://example.org/rows",
    rows_sha256="0" * 64,
    licence="MIT OR (Apache-2.0 AND LicenseRef-clinic)",
    consent="public_task",
    purposes=("research", "training"),
    until="2027-12-31",
    contact="data@example.org",
)
PIECES = (
    *(
        "owner: ",
        "licence: ",
        "until: ",
        "purposes: [",
        "consent: consent",
        "- a\n",
        "{",
        "}",
        "[",
        "]",
        ": ",
        "\n",
        "#",
    ),
    *(
        "'",
        '"',
        "\t",
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "null",
        "true",
        "1e999",
        "0" * 300,
        "---\n",
        "? ",
        "|\n",
    ),
    *("\x00", "\x1b[31m", "\ud800", "\u202e", "MIT", " AND ", " OR ", " WITH ", "(" * 30, "LicenseRef-", "2026-13-40"),
)


def spoilt(text: str, rng: np.random.Generator) -> bytes:
    """The text with a few pieces put in, taken out, doubled or turned round, at times as bytes."""
    for _ in range(int(rng.integers(1, 5))):
        at, to = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
        piece = PIECES[int(rng.integers(len(PIECES)))]
        text = (
            text[:at] + piece + text[at:],
            text[:at] + text[to:],
            text[:to] + text[at:to] + text[to:],
            text[:at] + text[at:to][::-1] + text[to:],
            text[:at] + piece + text[to:],
        )[int(rng.integers(5))]
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2 and data:
        at = int(rng.integers(len(data)))
        data = data[:at] + rng.bytes(3) + data[at:]
    return data.decode("latin-1").encode("utf-16") if rng.random() < 0.02 else data


def read_or_refused(file: Path) -> DataCard | LichenError:
    try:
        return read_card(file)[0]
    except LichenError as error:
        return error


def test_three_hundred_spoilt_cards_are_cards_or_one_sentence(tmp_path: Path) -> None:
    file, cards = tmp_path / "card.yaml", 0
    for n in range(300):
        rng = numpy_generator(n, "cards")
        file.write_bytes(spoilt(card_text(WHOLE), rng))
        found = read_or_refused(file)
        if isinstance(found, DataCard):
            cards += 1
            file.write_text(card_text(found), encoding="utf-8")
            assert read_card(file)[0] == found
        else:
            assert found.where.startswith(str(file))
            assert found.what
            assert "\n" not in found.what
            assert found.fix
    assert 20 < cards < 280, "the fuzz spoils nothing, or everything"


@pytest.mark.parametrize("card", [DataCard(), WHOLE, DataCard(owner="null", contact="1e-3", source="- a: 'b\" # c")])
def test_a_card_comes_back_as_it_was_written(card: DataCard, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(card_text(card), encoding="utf-8")
    assert read_card(tmp_path / "card.yaml")[0] == card
    assert card.blank == (card == DataCard())


def test_the_card_in_the_guide_is_one(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guide.md").read_text(encoding="utf-8")
    block = guide.partition("#### Data cards")[2].partition("```text\n")[2].partition("```")[0]
    (tmp_path / "card.yaml").write_text(block, encoding="utf-8")
    assert all(value for value in read_card(tmp_path / "card.yaml")[0].model_dump().values())


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("licence: Our terms", "licence", "LicenseRef-Our-terms"),
        ("licence: [MIT]", "licence", "must be a text"),
        ("until: 2026-13-01", "until", "YYYY-MM-DD"),
        ("until: 20261201", "until", "must be a text"),
        ("consent: sure", "consent", "legitimate_interests"),
        ("purposes: [Selling Things]", "purposes", "'Selling Things' is no word"),
        ("purposes: [research, research]", "purposes", "twice"),
        ("owner: ' '", "owner", "blank"),
        ('owner: "a\\nb"', "owner", "one plain line"),
        ("rows_sha256: abc", "rows_sha256", "64"),
        ("licenze: MIT", "licenze", "'licence'"),
        ("[]", "", "must hold keys"),
        ("", "", "is empty"),
        ("owner: " + "a" * 40_000, "", "larger than"),
    ],
)
def test_a_fault_is_named_with_file_key_and_fix(text: str, key: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LichenError) as caught:
        read_card(tmp_path / "card.yaml")
    assert caught.value.where == str(tmp_path / "card.yaml") + (f", {key}" if key else "")
    assert said in f"{caught.value.what} {caught.value.fix}"


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "card.yaml").mkdir(parents=True)
    for path in (tmp_path / "a" / "card.yaml", tmp_path / "card.yaml", tmp_path / "b\x00" / "card.yaml"):
        with pytest.raises(LichenError, match="is no file"):
            read_card(path)


def test_a_day_is_the_last_one_on_which_rows_may_be_used() -> None:
    card = DataCard(until="2026-06-30")
    assert [card.ended(date(2026, 6, day)) for day in (29, 30)] == [False, False]
    assert card.ended(date(2026, 7, 1))
    assert not DataCard().ended(date.max)


def test_a_card_is_written_once_and_renewed_in_its_digest_alone(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a"}) + "\n")
    place = write_card(rows)
    assert place == card_place(rows)
    assert read_card(place)[0] == DataCard(rows_sha256=rows_sha256(rows))
    mine = place.read_text().replace("owner: null", "owner: me  # and nobody else")
    place.write_text(mine)
    assert write_card(rows) is None
    assert place.read_text() == mine
    assert not renew_card(rows)
    old = rows_sha256(rows)
    rows.write_text(json.dumps({"text": "b"}) + "\n")
    assert renew_card(rows)
    assert place.read_text() == mine.replace(old, rows_sha256(rows))
    place.write_text("owner: me")
    assert renew_card(rows)
    assert read_card(place)[0] == DataCard(owner="me", rows_sha256=rows_sha256(rows))
    place.write_text("{owner: me}")
    with pytest.raises(LichenError, match="cannot be renewed"):
        renew_card(rows)
    assert place.read_text() == "{owner: me}"

"""One bit a candidate crosses, and no word; what anybody flagged is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.statistics.leakage import Leakage, flags
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.fold import serve
from lichen.core.message import pack_message
from lichen.core.store import ClientStore
from lichen.data.synthetic.filters import Filter, flagged
from lichen.data.synthetic.near_duplicates import NearDuplicates
from lichen.server.mean import Mean
from support.flat import closed
from support.toy_cohorts import job

ROWS = {
    3: ["My aunt's blue velvet coat lost both of its buttons within a week."],
    5: [],
    8: ["I wore it to the harbour on a very windy day in March.", "Fine."],
}
CANDIDATES = (
    "A lovely coat with buttons that hold.",
    "They say MY AUNT'S BLUE VELVET COAT LOST BOTH OF ITS buttons.",
    "i wore it to the harbour on one very windy day in march",
    "It is fine for a windy day.",
    "fine",
)


def ask(tmp_path: Path, **more: Any) -> list[Any]:
    work = Leakage(lambda client: ROWS[client], **more)
    asked = job({}, tuple(ROWS), work="leakage", texts=CANDIDATES)
    return list(serve(asked, {"leakage": ClientTask(work=work, source=NoBatches())}, ClientStore(tmp_path)))


def sum_of(messages: list[Any]) -> tuple[bool, ...]:
    mean = Mean(weighting="uniform")
    total = mean.zero()
    for message in messages:
        total = mean.add(total, message)
    return flags(closed(mean, total, {})[0])


def test_the_server_learns_bits_and_drops_what_anybody_flagged(tmp_path: Path) -> None:
    messages = ask(tmp_path)
    bits = {int(m.client_C): m.tensors["flagged"][0].tolist() for m in messages}
    assert bits == {3: [0, 1, 0, 0, 0], 5: [0] * 5, 8: [0, 0, 1, 0, 1]}
    assert sum_of(messages) == sum_of(messages[::-1]) == (False, True, True, False, True)
    sifted = Filter({"leakage": flagged(sum_of(messages))})(CANDIDATES)
    assert sifted.passed == (0, 3)
    assert sifted.counts == {"leakage": 3}


def test_no_word_of_anyone_crosses(tmp_path: Path) -> None:
    for message in ask(tmp_path):
        assert message.texts == ()
        assert set(message.tensors) == {"flagged"}
        data = pack_message(message)
        assert len(data) < 500
        assert not any(word in data for word in (b"velvet", b"harbour", b"aunt", b"windy"))


def test_one_client_in_a_million_is_not_rounded_away() -> None:
    mean = Mean(weighting="uniform")
    total = mean.zero()
    work = Leakage(lambda client: ROWS[3] if client == 7 else ())
    state = work.init(job({}, range(50), texts=CANDIDATES), range(50), None)
    message, own = work.final(state)
    assert own is None
    assert message.tensors["flagged"].shape == (50, 5)
    for _ in range(40):
        total = mean.add(total, message)
    few = closed(mean, total, {})[0]
    assert flags(few) == (False, True, False, False, False)
    # The smallest mean that a million clients can have.
    assert flags({"flagged": torch.tensor([1e-6, 0.0], dtype=torch.float64)}) == (True, False)


def test_an_encoder_at_the_client_finds_what_words_do_not(tmp_path: Path) -> None:
    def embed(texts: Any) -> torch.Tensor:
        return torch.tensor([["windy" in text, "coat" in text.lower(), 0.1] for text in texts]).float()

    (_, _, last) = ask(tmp_path, embed=embed)
    assert last.tensors["flagged"].tolist() == [[0, 0, 1, 1, 1]]
    (_, _, last) = ask(tmp_path, copies=lambda rows: NearDuplicates(rows, run=4))
    assert last.tensors["flagged"].tolist() == [[0, 0, 1, 0, 1]]


def test_refuses_nonsense() -> None:
    with pytest.raises(LichenError, match="cosine"):
        Leakage(lambda client: (), cosine=0.0)
    with pytest.raises(LichenError, match="no candidates"):
        Leakage(lambda client: ()).init(job({}, [1]), [1], None)
    with pytest.raises(LichenError, match="not flags"):
        flags({"w": torch.zeros(3)})

"""Both ends of a cut remember the same bits of every row, whatever came before; what does not fit is refused.

Legend: N tokens, H width, B rows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lichen.clients.splitting.asking import HIDDEN, LENGTH, Form
from lichen.clients.splitting.remembered import AGREED, INDEX, MEMORY, WHOLE, Way, decode_rows, encode_rows, stamp
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.transforms.activations import parse_activation_code

WIDTH = 16
WAYS: tuple[Way, ...] = ("up", "down")
LENGTHS = (3, 1, 4, 2, 5)
FORM = Form(
    group="g", rows=2, most=5, width=WIDTH, code=parse_activation_code(["change", "int8~"]), numbered=len(LENGTHS)
)


def batch_of(numbers: list[int], visit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, lengths and numbers of some rows, whose states move a little with every visit."""
    length_B = torch.tensor([LENGTHS[n] if n >= 0 else 0 for n in numbers], dtype=torch.int32)
    parts = [torch.randn(1, LENGTHS[n], WIDTH, generator=torch.Generator().manual_seed(n)) for n in numbers if n >= 0]
    start = torch.cat([torch.zeros(1, 0, WIDTH), *parts], 1)
    moved = 0.05 * torch.randn(start.shape, generator=torch.Generator().manual_seed(100 + visit))
    return start + moved, length_B, torch.tensor(numbers, dtype=torch.int32)


def alone(words: list[str], change_NH: Tensor) -> Tensor:
    """The slow way: one row's change, coded and decoded by itself."""
    code, about = parse_activation_code(words), (torch.tensor([len(change_NH)]), torch.tensor([-1]))
    return code.decode(code.encode(change_NH[None], *about, {}, [0])[0], *about, {}, WIDTH)[0][0]


@pytest.mark.parametrize(("words", "share"), [(["int4~"], 0.3), (["int8~"], 0.02), (["topk:4/8"], 0.71)])
@settings(max_examples=12, deadline=None)
@given(
    visits=st.lists(st.lists(st.integers(-1, 4), min_size=1, max_size=4), min_size=1, max_size=6),
    lost=st.sets(st.integers(0, 5)),
)
def test_memories_agree_to_the_bit_and_rows_are_decoded_as_each_alone_would_be(
    words: list[str], share: float, visits: list[list[int]], lost: set[int]
) -> None:
    code = parse_activation_code(["change", *words])
    client, server, oracle = Tree(), Tree(), dict[int, Tensor]()
    for visit, numbers in enumerate(visits):
        x_CNH, length_B, index_B = batch_of(numbers, visit)
        left, after = encode_rows(code, x_CNH, "up", length_B, index_B, client, visit)
        out_CNH, there = decode_rows(code, left, "up", length_B, index_B, server)
        assert after.keys() == there.keys()
        assert all(torch.equal(after[name], there[name]) for name in after)
        assert torch.equal(stamp(after), stamp(there))
        came, new, seen = torch.split(out_CNH[0], length_B.tolist()), 0, dict(oracle)
        for number, row_NH, out_NH in zip(numbers, torch.split(x_CNH[0], length_B.tolist()), came, strict=True):
            if number in oracle:
                change_NH = row_NH - oracle[number]
                assert torch.equal(out_NH, alone(words, change_NH) + oracle[number])
                assert float((out_NH - row_NH).norm()) <= share * float(change_NH.norm()) + 1e-5
            else:
                assert torch.equal(out_NH, row_NH)
                new += len(row_NH)
            if number >= 0:
                seen[number] = out_NH
        assert (left[0].shape[1], left[1].shape[1]) == (x_CNH.shape[1] - new, new)
        if visit not in lost:  # else the round is repeated from what both had before
            client, server, oracle = after, there, seen


def test_what_draws_agrees_too_and_each_way_has_its_own_memory() -> None:
    code, client, server = parse_activation_code(["change", "int4"]), Tree(), Tree()
    for visit in range(3):
        x_CNH, length_B, index_B = batch_of([0, 2], visit)
        for way in WAYS:
            left, client = encode_rows(code, x_CNH, way, length_B, index_B, client, visit)
            _, server = decode_rows(code, left, way, length_B, index_B, server)
        assert torch.equal(stamp(client), stamp(server))
    assert sorted(client) == ["down/0", "down/2", "up/0", "up/2"]
    # A row of another length is new, and so is one in which a number was none.
    short = (torch.tensor([2, 4]), torch.tensor([0, 2]))
    assert encode_rows(code, x_CNH[:, 1:], "up", *short, client, 0)[0][1].shape[1] == 2
    assert "up/1" not in encode_rows(code, x_CNH[:, :1] * torch.nan, "up", *batch_of([1], 0)[1:], {}, 0)[1]


def test_a_server_that_remembers_something_else_says_so_and_both_begin_anew() -> None:
    memory = {"up/1": torch.ones(1, 1, WIDTH)}
    answer, left = FORM.agreed({MEMORY: stamp(memory)}, memory)
    assert bool(answer[AGREED].all())
    assert left is memory
    for other in ({}, {"up/2": memory["up/1"]}, {"up/1": memory["up/1"] * 2}):
        answer, left = FORM.agreed({MEMORY: stamp(memory)}, other)
        assert not bool(answer[AGREED].any())
        assert left == {}


def test_what_does_not_fit_the_memory_is_refused_with_a_word() -> None:
    def came(numbers: list[int], lengths: list[int], coded: int, whole: int) -> Tree:
        assert FORM.code is not None
        payload = torch.zeros(1, coded, FORM.code.nbytes(WIDTH), dtype=torch.uint8)
        rows = {LENGTH: torch.tensor([lengths]).int(), INDEX: torch.tensor([numbers]).int()}
        return {HIDDEN: payload, WHOLE: torch.zeros(1, whole, WIDTH), **rows}

    memory = {"up/1": torch.ones(1, 3, WIDTH)}
    good = came([1, 2], [3, 2], 3, 2)
    hidden, after = FORM.arrived(good, "up", good, memory)
    assert hidden[HIDDEN].shape == (1, 5, WIDTH)
    assert sorted(after) == ["up/1", "up/2"]
    for bad in (
        came([1, 2], [3, 2], 2, 3),  # new tokens in the place of known ones
        came([1, 5], [3, 2], 3, 2),  # a client has five rows
        came([1, 2], [3, 6], 3, 6),
        came([1, 2], [3, -2], 3, 2),
        came([1, 2, 3], [3, 2], 3, 2),
        {name: x for name, x in good.items() if name != WHOLE},
        {name: x for name, x in good.items() if name != INDEX},
    ):
        with pytest.raises(LichenError) as refused:
            FORM.arrived(bad, "up", bad, memory)
        assert refused.value.reason in ("shape", "names")
    assert FORM.remembers
    assert not replace(FORM, code=None).remembers


def test_a_row_crosses_whole_at_its_first_visit_which_is_what_a_reader_of_it_sees() -> None:
    coded, changes = parse_activation_code(["int4"]), parse_activation_code(["change", "int4"])
    assert coded.first_sent is coded
    x_CNH, length_B, index_B = batch_of([0], 0)
    payload, _ = changes.first_sent.encode(x_CNH, length_B, index_B, {}, [0])
    assert torch.equal(changes.first_sent.decode(payload, length_B, index_B, {}, WIDTH)[0], x_CNH)

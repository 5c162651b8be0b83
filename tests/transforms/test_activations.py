"""Codes at a cut: their bytes, their stated errors, equal memories at both ends, and equal bits in any company.

Legend: C clients, N tokens, H width, B rows.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.transforms.activations import noisy_tokens, parse_activation_code
from lichen.transforms.codec import Chain

WORDS = ("", "bf16", "int8", "int8~", "int4/64", "int4~", "topk:4/16", "topk:8/32 int8", "sign")


def states(clients: int, tokens: int, width: int, seed: int) -> Tensor:
    """Hidden states of many sizes, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    x_CNH = torch.randn(clients, tokens, width, generator=generator)
    return x_CNH * torch.exp(torch.randn(clients, tokens, 1, generator=generator))


def rows(tokens: int) -> tuple[Tensor, Tensor]:
    """One row of all tokens, the client's row 5."""
    return torch.tensor([tokens]), torch.tensor([5])


@pytest.mark.parametrize("words", WORDS)
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 2**40))
def test_tokens_take_their_bytes_and_clients_do_not_touch(words: str, tokens: int, width: int, seed: int) -> None:
    code, x_CNH = parse_activation_code(words.split()), states(3, tokens, width, seed)
    sent, memory = code.encode(x_CNH, *rows(tokens), {}, [7, 8, 9])
    assert sent.shape == (3, tokens, code.nbytes(width))
    assert not memory
    out_CNH, _ = code.decode(sent, *rows(tokens), {}, width)
    for c in range(3):
        alone, _ = code.encode(x_CNH[c : c + 1], *rows(tokens), {}, [7 + c])
        assert torch.equal(alone[0], sent[c])
        assert torch.equal(code.decode(alone, *rows(tokens), {}, width)[0][0], out_CNH[c])
    # A token by itself has the numbers that it has at the head of a row.
    first, _ = code.encode(x_CNH[:1, :1], *rows(1), {}, [7])
    assert torch.equal(first[0, 0], sent[0, 0])


@pytest.mark.parametrize(
    ("words", "bound"),
    [("bf16", 2**-8), ("int8~", 0.504 / 127), ("int8", 1.008 / 127), ("int4~", 0.504 / 7), ("int4", 1.008 / 7)],
)
def test_a_number_is_off_by_no_more_than_is_stated(words: str, bound: float) -> None:
    x_CNH = states(1, 40, 100, 3)
    code = parse_activation_code(words.split())
    sent, _ = code.encode(x_CNH, *rows(40), {}, [1])
    off_CNH = (code.decode(sent, *rows(40), {}, 100)[0] - x_CNH).abs()
    assert bool((off_CNH <= bound * x_CNH.abs().amax(-1, keepdim=True)).all())
    assert float(off_CNH.max()) > 0


@pytest.mark.parametrize(("words", "factor"), [("topk:4/16", math.sqrt(1 - 4 / 16)), ("int4~", 0.2), ("int8~", 0.02)])
def test_a_row_that_stands_still_is_known_ever_better(words: str, factor: float) -> None:
    code, x_CNH = parse_activation_code(["change", *words.split()]), states(1, 6, 64, 4)
    client, server = Tree(), Tree()
    before = float(x_CNH.norm())
    for visit in range(6):
        sent, client = code.encode(x_CNH, *rows(6), client, [visit])
        out_CNH, server = code.decode(sent, *rows(6), server, 64)
        assert client.keys() == server.keys() == {"5"}
        assert torch.equal(client["5"], server["5"])
        assert torch.equal(out_CNH, server["5"])
        off = float((out_CNH - x_CNH).norm())
        assert off <= factor * before + 1e-5 * float(x_CNH.norm())
        before = off


def test_a_row_that_moves_slowly_is_followed() -> None:
    code, memory, other = parse_activation_code(["change", "bf16"]), Tree(), Tree()
    for visit in range(4):
        x_CNH = states(1, 3, 16, 6) + 0.01 * visit
        sent, memory = code.encode(x_CNH, *rows(3), memory, [0])
        out_CNH, other = code.decode(sent, *rows(3), other, 16)
    torch.testing.assert_close(out_CNH, x_CNH, atol=1e-4, rtol=1e-4)


def test_rows_are_known_by_their_index_whatever_stands_beside_them() -> None:
    code = parse_activation_code(["change", "int8~"])
    x_CNH = states(1, 7, 8, 1)
    length_B, index_B = torch.tensor([3, 4, 0]), torch.tensor([2, 9, -1])
    _, memory = code.encode(x_CNH, length_B, index_B, {}, [0])
    assert {name: tuple(x.shape) for name, x in memory.items()} == {"2": (1, 3, 8), "9": (1, 4, 8)}
    again = torch.cat([x_CNH[:, 3:], x_CNH[:, :3]], 1) + 0.1
    turned, _ = code.encode(again, torch.tensor([4, 3]), torch.tensor([9, 2]), memory, [0])
    straight, _ = code.encode(x_CNH + 0.1, length_B, index_B, memory, [0])
    assert torch.equal(turned, torch.cat([straight[:, 3:], straight[:, :3]], 1))
    # A row of another length is a new row, and one that comes without an index leaves nothing.
    short, _ = code.encode(x_CNH[:, :2], torch.tensor([2]), torch.tensor([9]), memory, [0])
    assert torch.equal(short, code.encode(x_CNH[:, :2], torch.tensor([2]), torch.tensor([9]), {}, [0])[0])
    assert memory.keys() == code.encode(x_CNH[:, :2], torch.tensor([2]), torch.tensor([-1]), memory, [0])[1].keys()


def test_what_is_no_number_is_not_remembered_at_either_end() -> None:
    code, x_CNH = parse_activation_code(["change", "int8"]), states(1, 2, 8, 2)
    sent, client = code.encode(x_CNH, *rows(2), {}, [0])
    server = code.decode(sent, *rows(2), {}, 8)[1]
    bad, after = code.encode(x_CNH * math.nan, *rows(2), client, [0])
    out_CNH, there = code.decode(bad, *rows(2), server, 8)
    assert not bool(out_CNH.isfinite().all())
    assert torch.equal(after["5"], client["5"])
    assert torch.equal(there["5"], client["5"])


def test_eight_bits_send_at_least_3_8_times_less() -> None:
    for width in (384, 576, 768, 2048):
        plain, coded = Chain(), parse_activation_code(["int8"])
        assert parse_activation_code([]) == parse_activation_code(["float32"])
        assert coded.chain != plain
        assert parse_activation_code([]).nbytes(width) == 4 * width >= 3.8 * coded.nbytes(width)


def test_noise_is_as_long_as_is_stated_and_each_client_has_its_own() -> None:
    x_CNH = states(2, 50, 64, 8)
    assert noisy_tokens(x_CNH, 0.0, [1, 2]) is x_CNH
    noisy_CNH = noisy_tokens(x_CNH, 0.5, [1, 2])
    ratio_CN = (noisy_CNH - x_CNH).norm(dim=-1) / x_CNH.norm(dim=-1)
    assert abs(float(ratio_CN.mean()) - 0.5) < 0.02
    assert torch.equal(noisy_CNH[1:], noisy_tokens(x_CNH[1:], 0.5, [2]))
    assert not torch.equal(noisy_CNH, noisy_tokens(x_CNH, 0.5, [2, 1]))
    assert noisy_tokens(x_CNH.bfloat16(), 0.5, [1, 2]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["int8", "change"], "stands first"),
        (["change"], "stands first"),
        (["change", "change", "int8"], "stands first"),
        (["sketch:2"], "a token is a vector"),
        (["int9"], "no codec is called"),
        (["int8", "topk:1/2"], "leaves nothing"),
    ],
)
def test_words_that_code_nothing_are_refused(words: list[str], part: str) -> None:
    with pytest.raises(LichenError, match=part) as caught:
        parse_activation_code(words)
    assert caught.value.where == "split.code"
    assert caught.value.fix


def test_what_does_not_fit_is_refused_by_name() -> None:
    code, x_CNH = parse_activation_code(["int8"]), states(1, 4, 16, 0)
    sent, _ = code.encode(x_CNH, *rows(4), {}, [0])
    with pytest.raises(LichenError, match="are not 18 bytes a token"):
        code.decode(sent[..., :-1], *rows(4), {}, 16)
    with pytest.raises(LichenError, match="4 tokens came for 1 rows of 5"):
        code.decode(sent, *rows(5), {}, 16)
    with pytest.raises(LichenError, match="no rows in common"):
        parse_activation_code(["change", "int8"]).encode(states(2, 4, 16, 0), *rows(4), {}, [0, 1])
    with pytest.raises(LichenError, match=r"noise of -1.0 is not possible"):
        noisy_tokens(x_CNH, -1.0, [0])

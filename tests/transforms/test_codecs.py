"""Every codec: inside its bound, of its length, the same in any company; and what is unbiased is that."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.transforms.bits import bytes_for, pack_bits, unpack_bits
from lichen.transforms.codec import Chain
from lichen.transforms.codec_words import read_codecs
from lichen.transforms.layout import Layout
from lichen.transforms.parse import parse_codecs
from lichen.transforms.powersgd import PowerSGD
from lichen.transforms.quantize import Bfloat16, Quantize
from lichen.transforms.sign import Sign
from lichen.transforms.topk import TopK

WORDS = (
    "",
    "bf16",
    "int8",
    "int4/32",
    "int4~",
    "int2/7",
    "sign/16",
    "topk:3/16",
    "topk:8/176 sign",
    "topk:5/5 int8",
    "topk:70/4096 int4",
    "topk:1/1",
    "sketch:1",
    "sketch:2x1 topk:4/9 int4",
)
SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4)


def made(shapes: list[tuple[int, ...]], clients: int, seed: int, size: float = 1.0) -> tuple[Layout, torch.Tensor]:
    """A layout and numbers in it, of many magnitudes."""
    layout = Layout.of({f"t{i}": torch.zeros(shape) for i, shape in enumerate(shapes)})
    generator = torch.Generator().manual_seed(seed)
    x_CN = torch.randn(clients, layout.size, generator=generator)
    return layout, x_CN * size * torch.exp(3 * torch.randn(x_CN.shape, generator=generator))


@pytest.mark.parametrize("words", WORDS)
@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 2**40), size=st.sampled_from([1e-30, 1e-4, 1.0, 1e20]))
def test_a_row_has_its_length_and_is_the_same_in_any_company(
    words: str, shapes: list[tuple[int, ...]], seed: int, size: float
) -> None:
    chain = parse_codecs(words.split())
    layout, x_CN = made(shapes, 3, seed, size)
    seeds = [derive(seed, c) for c in range(3)]
    wire_CB = chain.encode(x_CN, layout, seeds)
    assert wire_CB.shape == (3, chain.nbytes(layout))
    assert wire_CB.dtype == torch.uint8
    back_CN = chain.decode(wire_CB, layout)
    assert back_CN.isfinite().all()
    for c in range(3):
        alone_1B = chain.encode(x_CN[c : c + 1], layout, seeds[c : c + 1])
        assert torch.equal(alone_1B[0], wire_CB[c])
        assert torch.equal(chain.decode(alone_1B, layout)[0], back_CN[c])
    assert not chain.decode(chain.encode(torch.zeros_like(x_CN), layout, seeds), layout).any()


def norm(x: torch.Tensor) -> float:
    return float(x.double().norm())


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    seed=st.integers(0, 2**40),
    bits=st.sampled_from([2, 4, 8]),
    block=st.integers(1, 200),
    stochastic=st.booleans(),
)
def test_quantised_numbers_are_off_by_less_than_a_step(
    count: int, seed: int, bits: int, block: int, stochastic: bool
) -> None:
    layout, x_CN = made([(count,)], 2, seed)
    chain = Chain((Quantize(bits, block=block, stochastic=stochastic),))
    off_CN = (chain.decode(chain.encode(x_CN, layout, [seed, seed + 1]), layout) - x_CN).abs()
    top = 2 ** (bits - 1) - 1
    for start in range(0, count, block):
        part_C = x_CN[:, start : start + block].abs().amax(1) / top * (1 + 2**-7)
        assert (off_CN[:, start : start + block].amax(1) <= part_C * (1 if stochastic else 0.5) * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 400), chunk=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_topk_keeps_the_largest_and_nothing_else(count: int, chunk: int, share: float, seed: int) -> None:
    keep = max(1, round(share * chunk))
    layout, x_CN = made([(count,)], 2, seed)
    chain = Chain((TopK(keep, chunk),))
    back_CN = chain.decode(chain.encode(x_CN, layout, [0, 0]), layout)
    for x_N, back_N in zip(x_CN, back_CN, strict=True):
        for start in range(0, count, chunk):
            part, got = x_N[start : start + chunk], back_N[start : start + chunk]
            wanted = torch.zeros_like(part)
            largest = sorted(range(len(part)), key=lambda i: -abs(float(part[i])))[:keep]
            wanted[largest] = part[largest]
            assert torch.equal(got, wanted)
        # A chunk that is not full keeps a larger share.
        assert norm(x_N - back_N) ** 2 <= (1 - keep / chunk) * norm(x_N) ** 2 * (1 + 1e-6)


def test_choices_take_as_many_bits_as_there_are_choices() -> None:
    layout = Layout.vector(256 * 1000)
    (_, (place,)) = TopK(8, 256).parts(layout)["place"]
    assert place == bytes_for(1000, math.ceil(math.log2(math.comb(256, 8)))) == 6125  # 6.1 bits for each kept number
    assert TopK(80, 4096).parts(Layout.vector(4096))["place"][1] == (120,)  # a choice too large: 12 bits each


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 2**40))
def test_bounds_of_the_others(shapes: list[tuple[int, ...]], seed: int) -> None:
    layout, x_CN = made(shapes, 2, seed)

    def back(codec: object) -> torch.Tensor:
        chain = Chain((codec,))  # type: ignore[arg-type]
        return chain.decode(chain.encode(x_CN, layout, [1, 2]), layout)

    assert ((back(Bfloat16()) - x_CN).abs() <= x_CN.abs() * 2**-8).all()
    for codec in (Sign(), PowerSGD(1), PowerSGD(2, iterations=1)):
        for x_N, got_N in zip(x_CN, back(codec), strict=True):
            assert norm(x_N - got_N) <= norm(x_N) * (1 + 2**-8)


def test_sketches_are_exact_where_the_rank_suffices_and_near_the_best_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(30, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    layout = Layout.of({"m": thin})
    chain = Chain((PowerSGD(2),))
    back = chain.decode(chain.encode(thin.reshape(1, -1), layout, [3]), layout)
    assert norm(back - thin.reshape(1, -1)) <= 1e-5 * norm(thin)
    fading = torch.randn(30, 20, generator=generator) @ torch.diag(0.5 ** torch.arange(20.0))
    best = norm(torch.linalg.svdvals(fading)[2:])
    back = chain.decode(chain.encode(fading.reshape(1, -1), layout, [3]), layout)
    assert best <= norm(back - fading.reshape(1, -1)) <= 1.2 * best


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_right_in_the_mean(bits: int) -> None:
    layout, x_1N = made([(96,)], 1, 5)
    chain, draws = Chain((Quantize(bits, block=32),)), 4000
    mean_N = torch.zeros(96, dtype=torch.float64)
    for start in range(0, draws, 500):
        seeds = list(range(start, start + 500))
        mean_N += chain.decode(chain.encode(x_1N.expand(500, -1), layout, seeds), layout).double().sum(0) / draws
    step_N = x_1N.abs().view(3, 32).amax(1).repeat_interleave(32) / (2 ** (bits - 1) - 1) * (1 + 2**-7)
    # A single draw deviates by half a step at most: five standard errors of the mean.
    assert ((mean_N - x_1N[0]).abs() <= 5 * 0.5 * step_N / draws**0.5).all()
    nearest = Chain((Quantize(bits, block=32, stochastic=False),))
    assert torch.equal(nearest.encode(x_1N, layout, [1]), nearest.encode(x_1N, layout, [2]))


@given(st.integers(1, 63), st.data())
@settings(max_examples=60, deadline=None)
def test_bits_come_back(bits: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 40))
    rows = data.draw(st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count), min_size=1))
    values_CK = torch.tensor(rows, dtype=torch.int64).view(len(rows), count)
    packed = pack_bits(values_CK, bits)
    assert packed.shape == (len(rows), bytes_for(count, bits))
    assert torch.equal(unpack_bits(packed, count, bits).long(), values_CK)


def test_long_rows_of_bits_come_back() -> None:
    values = torch.randint(0, 2**11, (2, 200_003), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_bits(pack_bits(values, 11), 200_003, 11), values)


def test_what_is_not_finite_does_not_come_back_finite() -> None:
    layout = Layout.vector(64)
    x = torch.ones(2, 64)
    x[0, 3], x[1, 3] = float("nan"), float("inf")
    for words in ("bf16", "int4", "int8~", "sign", "topk:2/64 int4", "topk:2/64 sign"):
        chain = parse_codecs(words.split())
        assert not chain.decode(chain.encode(x, layout, [0, 1]), layout).isfinite().all(1).any(), words


@given(st.binary(min_size=11, max_size=11))
def test_any_bytes_of_the_right_length_decode(data: bytes) -> None:
    chain, layout = parse_codecs(["topk:3/16", "int4"]), Layout.vector(40)
    assert chain.nbytes(layout) == 2 + 5 + 4
    row = torch.frombuffer(bytearray(data), dtype=torch.uint8).unsqueeze(0)
    assert chain.decode(row, layout).shape == (1, 40)
    with pytest.raises(LichenError, match="are not 11 bytes a client"):
        chain.decode(row[:, :-1], layout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("int3", "no codec is called 'int3'"),
        ("topk:9/8", "cannot keep 9 of 8"),
        ("int4 topk:1/8", "Quantize leaves nothing for TopK"),
        ("topk:0/8", "no codec"),
    ],
)
def test_nonsense_is_refused(words: str, said: str) -> None:
    with pytest.raises(LichenError, match=said) as told:
        parse_codecs(words.split())
    assert told.value.fix
    assert parse_codecs(["int8/64"]).codecs == (Quantize(8, block=64),)


@pytest.mark.parametrize(
    "words", ["bf16", "int8", "int4~/64", "sign/32", "topk:8/256 int4", "sketch:2x1 bf16", "float32"]
)
def test_words_are_read_without_codecs_as_with_them(words: str) -> None:
    codecs, read = parse_codecs(words.split()).codecs, read_codecs(words.split())
    assert [(type(codec).__name__, codec.last) for codec in codecs] == [(one.family, one.last) for one in read]


def test_layouts_differ_by_what_they_hold() -> None:
    a = Layout.of({"b": torch.zeros(2, 3), "a": torch.zeros(4)})
    assert [name for name, _, _ in a.entries] == ["a", "b"]
    others = (
        Layout.of({"a": torch.zeros(4)}),
        Layout.of({"b": torch.zeros(3, 2), "a": torch.zeros(4)}),
        Layout.of({"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16)}),
    )
    assert len({a.digest, *(other.digest for other in others)}) == 4
    tree_C = {"b": torch.randn(2, 2, 3), "a": torch.randn(2, 4)}
    back = a.unflatten(a.flatten(tree_C))
    assert all(torch.equal(back[name], tree_C[name]) for name in tree_C)
    assert Layout.of(tree_C, stacked=True) == a

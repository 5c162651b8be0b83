"""The primitives of masked sums give what their standards say, through the functions that the masks use."""

from __future__ import annotations

import numpy as np
import pytest

from lichen.core.masks.keys import agree, derive, hkdf, public_of, seal, unseal
from lichen.core.masks.streams import add_stream, key_stream

hexed = bytes.fromhex


def test_x25519_of_rfc_7748() -> None:
    scalar = hexed("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = hexed("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert agree(scalar, point) == hexed("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")
    scalar = hexed("4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d")
    point = hexed("e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493")
    assert agree(scalar, point) == hexed("95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957")


def test_x25519_a_thousand_times_over() -> None:
    scalar = point = hexed("09" + "00" * 31)
    assert public_of(scalar) == hexed("422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079")
    for _ in range(1000):
        found = agree(scalar, point)
        assert found is not None
        scalar, point = found, scalar
    assert scalar == hexed("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51")


def test_a_point_of_small_order_gives_nothing() -> None:
    assert agree(bytes(range(32)), bytes(32)) is None
    assert agree(bytes(range(32)), (1).to_bytes(32, "little")) is None


@pytest.mark.parametrize(
    ("secret", "salt", "info", "out"),
    [
        (
            "0b" * 22,
            bytes(range(13)).hex(),
            bytes(range(0xF0, 0xFA)).hex(),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)).hex(),
            bytes(range(0x60, 0xB0)).hex(),
            bytes(range(0xB0, 0x100)).hex(),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            "0b" * 22,
            "",
            "",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_of_rfc_5869(secret: str, salt: str, info: str, out: str) -> None:
    assert hkdf(hexed(secret), hexed(info), len(out) // 2, salt=hexed(salt) or None) == hexed(out)


def test_keys_differ_by_purpose() -> None:
    purposes = [("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), ("a", b"1"), (1, "a")]
    assert len({derive(bytes(32), *purpose) for purpose in purposes}) == len(purposes)


def test_aes_256_in_counter_mode_of_nist_sp_800_38a() -> None:
    key = hexed("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    text = hexed(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    sealed = hexed(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    stream = key_stream(key, 64, counter=bytes(range(0xF0, 0x100)))
    assert bytes(a ^ b for a, b in zip(text, stream, strict=True)) == sealed


@pytest.mark.parametrize("count", [0, 1, 7, (1 << 15) - 1, 1 << 15, (1 << 16) + 3])
def test_a_mask_is_the_first_words_of_its_stream_and_comes_off(count: int) -> None:
    key = bytes(range(32))
    numbers_N = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, count, dtype=np.int64)
    masked_N = numbers_N.copy()
    add_stream(masked_N, key, 1)
    assert np.array_equal(masked_N, numbers_N + np.frombuffer(key_stream(key, 8 * count), dtype="<i8"))
    add_stream(masked_N, key, -1)
    assert np.array_equal(masked_N, numbers_N)


@pytest.mark.parametrize(
    ("key", "nonce", "body", "associated", "out"),
    [
        ("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
        ("00" * 32, "00" * 12, "00" * 16, "", "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"),
        (
            "feffe9928665731c6d6a8f9467308308" * 2,
            "cafebabefacedbaddecaf888",
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
            "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
            "feedfacedeadbeeffeedfacedeadbeefabaddad2",
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
            "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f66276fc6ece0f4e1768cddf8853bb2d551b",
        ),
    ],
)
def test_aes_256_gcm_of_nist(key: str, nonce: str, body: str, associated: str, out: str) -> None:
    parts = hexed(key), hexed(nonce)
    assert seal(*parts, hexed(body), hexed(associated)) == hexed(out)
    assert unseal(*parts, hexed(out), hexed(associated)) == hexed(body)
    assert unseal(*parts, hexed(out), hexed(associated) + b"x") is None
    assert unseal(*parts, bytes([hexed(out)[0] ^ 1]) + hexed(out)[1:], hexed(associated)) is None

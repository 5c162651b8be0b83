"""A blob is a safetensors file with a digest: a flipped bit is refused, and so is whatever is made to be large."""

from __future__ import annotations

import hashlib
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, pack_job, pack_message, unpack_job, unpack_message
from lichen.core.wire.blob import FORMAT, MOST_HEAD, pack_blob
from lichen.core.wire.fields import MOST_CLIENTS, MOST_NAMES, MOST_TEXT
from lichen.core.wire.job import MOST_DELTAS
from lichen.core.wire.shared import Shared

JOB = Job(
    work="train",
    shared=Shared({"layer.w": torch.randn(3, 4), "b": torch.ones(2)}),
    version=3,
    clients=(4, 9),
    seed=2**60,
)
STEPS = (("aa", {"wire": torch.zeros(30, dtype=torch.uint8)}), ("bb", {"whole.w": torch.ones(2)}))
MESSAGE = Message(
    group="g",
    client_C=torch.tensor([4]),
    version_C=torch.tensor([3]),
    tensors={"layer.w": torch.randn(1, 3, 4)},
    weight_C=torch.ones(1, dtype=torch.float64),
    metrics={"loss_sum": torch.ones(1, dtype=torch.float64), "by_class": torch.ones(1, 5, dtype=torch.float64)},
)
Unpack = Callable[[bytes], Any]
SMALL: dict[str, tuple[bytes, Unpack]] = {
    "job": (pack_job(JOB), unpack_job),
    "job, settings and texts": (pack_job(replace(JOB, settings={"lr_scale": 0.5}, texts=("a", "wörd"))), unpack_job),
    "job, steps": (pack_job(replace(JOB, snapshot="cc", deltas=STEPS, acked={4: "aa", 9: "aa"})), unpack_job),
    "job, same view": (pack_job(replace(JOB, snapshot="cc", acked={4: "cc", 9: "cc"})), unpack_job),
    "message": (pack_message(MESSAGE), unpack_message),
    "message, texts": (pack_message(replace(MESSAGE, texts=(("one", "zwölf"),))), unpack_message),
    "message, no tensors": (pack_message(replace(MESSAGE, tensors={}, metrics={})), unpack_message),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_flipped_bit_is_refused(name: str) -> None:
    data, unpack = SMALL[name]
    unpack(data)
    for place in range(len(data) * 8):
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        with pytest.raises(LichenError):
            unpack(bytes(spoilt))


def test_ten_thousand_flips_of_a_larger_message_are_refused() -> None:
    data = pack_message(replace(MESSAGE, tensors={f"layer.{i}": torch.randn(1, 64) for i in range(8)}))
    draw = random.Random(0)
    for _ in range(10_000):
        spoilt = bytearray(data)
        spoilt[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        with pytest.raises(LichenError):
            unpack_message(bytes(spoilt))


@pytest.mark.parametrize("name", SMALL)
def test_cut_lengthened_or_empty_is_refused(name: str) -> None:
    data, unpack = SMALL[name]
    for other in (b"", data[:7], data[:60], data[:-1], data + b"\0", data * 2, bytes(len(data))):
        with pytest.raises(LichenError, match=r"bytes are not a (job|message)"):
            unpack(other)


DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32)
WIDE = (torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64)
EIGHT = (torch.float8_e5m2, torch.float8_e4m3fn)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
ABOUT = st.tuples(st.sampled_from((*DTYPES, *WIDE, *EIGHT)), st.lists(st.integers(0, 4), max_size=3))


@given(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), ABOUT, max_size=6), NAMES)
def test_its_bytes_are_those_that_the_library_writes(about: Any, text: str) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in about.items()}
    data = pack_blob("kind", {"text": text}, tensors)
    found = load(data)
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype == x.dtype and found[n].shape == x.shape for n, x in tensors.items())
    assert all(found[n].tolist() == x.tolist() for n, x in tensors.items() if x.dtype not in EIGHT)
    length = int.from_bytes(data[:8], "little")
    written = json.loads(data[8 : 8 + length])["__metadata__"]["lichen"]
    assert save(tensors, metadata={"lichen": written}) == data


def test_views_and_shared_storages_are_packed_as_they_look() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    shared = {"turned": x.T, "part": x[1:, ::2], "whole": x, "again": x, "number": torch.tensor(2.0)}
    found = unpack_job(pack_job(replace(JOB, shared=Shared.of_flat(shared)))).shared
    assert {name: x.tolist() for name, x in found.trainable.items()} == {name: x.tolist() for name, x in shared.items()}


def test_what_is_unpacked_may_be_written_to() -> None:
    found = unpack_message(SMALL["message"][0])
    found.tensors["layer.w"].add_(1)
    assert torch.equal(unpack_message(SMALL["message"][0]).tensors["layer.w"], MESSAGE.tensors["layer.w"])


@pytest.mark.parametrize("kind", ["job", "message"])
def test_format_2_is_named_before_anything_is_parsed(kind: str) -> None:
    fields = json.dumps({"kind": f"{kind}/2", "work": "train"}, separators=(",", ":"))
    with pytest.raises(LichenError, match=f"{kind}/2, expected a {kind}/{FORMAT}\n.*same version"):
        {"job": unpack_job, "message": unpack_message}[kind](save({}, metadata={"lichen": fields}))


# --- blobs with a right digest that are wrong otherwise ----------------------------------------------------------


def forged(kind: str, fields: str, tensors: Any = None, *, entries: str = "", tail: bytes = b"") -> bytes:
    """A blob with this text for fields, more entries in its head, and the digest that fits."""
    text = json.dumps(f"{kind}/{FORMAT} {'0' * 32} {fields}")
    body = save(tensors or {})
    length = int.from_bytes(body[:8], "little")
    about = body[8 : 8 + length].strip()[1:-1].decode()
    rest = "".join(f",{part}" for part in (about, entries) if part)
    head = f'{{"__metadata__":{{"lichen":{text}}}{rest}}}'.encode()
    data = len(head).to_bytes(8, "little") + head + body[8 + length :] + tail
    at = data.index(b"0" * 32)
    digest = hashlib.sha256(data[:at] + data[at + 32 :]).hexdigest()[:32].encode()
    return data[:at] + digest + data[at + 32 :]


IDS, NUMBERS = torch.tensor([[4, 3]]), torch.ones(1, 1, dtype=torch.float64)
GOOD_JOB = {"i": torch.tensor([0, 1, 4])}
GOOD = {"i": IDS, "n": NUMBERS}


def job(fields: str, tensors: Any = None, **more: Any) -> tuple[Unpack, bytes]:
    return unpack_job, forged("job", fields, {**GOOD_JOB, **(tensors or {})}, **more)


def message(fields: str, tensors: Any = None, **more: Any) -> tuple[Unpack, bytes]:
    return unpack_message, forged("message", fields, {**GOOD, **(tensors or {})}, **more)


def numbers(value: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(value).to(dtype)


NAMED = json.dumps([f"m{i}" for i in range(MOST_NAMES + 1)])
DEEP = "[" * 100_000
HELD = '"view":"b","held":"a"'
EMPTY = '"e":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}'
MANY = ",".join(f'"t.{i:09}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(80_000))
WRONG: dict[str, Callable[[], tuple[Unpack, bytes]]] = {
    "fields nested 100,000 deep": lambda: message(f'{{"texts":{DEEP}'),
    "a head nested 100,000 deep": lambda: message("{}", entries=f'"e":{DEEP}'),
    "a head nested deep and closed": lambda: message("{}", entries=f'"e":{DEEP}{"]" * 100_000}'),
    "fields that are a list": lambda: message("[]"),
    "fields that are no JSON": lambda: message("group"),
    "an unknown field": lambda: message('{"colour":"red"}'),
    "steps Infinity": lambda: job(f'{{{HELD},"steps":Infinity}}'),
    "steps NaN": lambda: job(f'{{{HELD},"steps":NaN}}'),
    "steps 1e9": lambda: job(f'{{{HELD},"steps":1e9}}'),
    "steps 1e999": lambda: job(f'{{{HELD},"steps":1e999}}'),
    "steps true": lambda: job(f'{{{HELD},"steps":true}}'),
    "steps below 0": lambda: job(f'{{{HELD},"steps":-1}}'),
    "steps of many digits": lambda: job(f'{{{HELD},"steps":1{"0" * 9000}}}'),
    "too many steps": lambda: job(f'{{{HELD},"steps":{MOST_DELTAS + 1}}}'),
    "steps from nowhere": lambda: job('{"view":"b","steps":1}'),
    "a tensor beyond the steps": lambda: job(f'{{{HELD},"steps":1}}', {"d.1.w": torch.ones(1)}),
    "a step of no place": lambda: job(f'{{{HELD},"steps":1}}', {"d.00.w": torch.ones(1)}),
    "a tensor of no part": lambda: job("{}", {"w": torch.ones(1)}),
    "a head of text": lambda: message(json.dumps({"group": "g" * 20_000_000})),
    "a head of tensors": lambda: message("{}", entries=MANY),
    "more metrics than names": lambda: message(f'{{"metrics":{NAMED}}}'),
    "a million metrics": lambda: message(f'{{"metrics":{json.dumps([f"m{i}" for i in range(10**6)])}}}'),
    "a million settings": lambda: job(f'{{"settings":[{",".join(["0"] * 10**6)}]}}'),
    "a million clients": lambda: message(
        "{}", {"i": torch.zeros(10**6, 2, dtype=torch.int64), "n": torch.zeros(10**6, 1, dtype=torch.float64)}
    ),
    "a million clients of a job": lambda: job("{}", {"i": torch.zeros(10**6 + 2, dtype=torch.int64)}),
    "too many clients": lambda: job("{}", {"i": torch.zeros(MOST_CLIENTS + 3, dtype=torch.int64)}),
    "a field twice": lambda: message('{"group":"a","group":"b"}'),
    "a tensor twice": lambda: message("{}", entries=f"{EMPTY.replace('e', 't.e', 1)},{EMPTY.replace('e', 't.e', 1)}"),
    "NaN": lambda: message('{"group":NaN}'),
    "minus infinity": lambda: message('{"group":-Infinity}'),
    "a group that is a number": lambda: message('{"group":7}'),
    "a work that is a list": lambda: job('{"work":["train"]}'),
    "names that are numbers": lambda: message('{"metrics":[1]}', {"n": torch.ones(1, 2, dtype=torch.float64)}),
    "names that are a text": lambda: message('{"metrics":"m"}', {"n": torch.ones(1, 2, dtype=torch.float64)}),
    "a metric twice": lambda: message('{"metrics":["a","a"]}', {"n": torch.ones(1, 3, dtype=torch.float64)}),
    "a metric in two places": lambda: message(
        '{"metrics":["a"]}', {"n": torch.ones(1, 2, dtype=torch.float64), "m.a": torch.ones(1)}
    ),
    "texts that are texts": lambda: job('{"texts":["a"]}', {"x": numbers([97], torch.uint8)}),
    "a text of length -1": lambda: job('{"texts":[-1,2]}', {"x": numbers([97], torch.uint8)}),
    "a text of length true": lambda: job('{"texts":[true]}', {"x": numbers([97], torch.uint8)}),
    "texts longer than their bytes": lambda: job('{"texts":[2]}', {"x": numbers([97], torch.uint8)}),
    "texts without bytes": lambda: job('{"texts":[2]}'),
    "bytes without texts": lambda: job("{}", {"x": numbers([97], torch.uint8)}),
    "texts that are no UTF-8": lambda: job('{"texts":[1]}', {"x": numbers([255], torch.uint8)}),
    "texts of floats": lambda: job('{"texts":[1]}', {"x": torch.ones(1)}),
    "texts of two clients where there is one": lambda: message(
        '{"texts":[[1],[1]]}', {"x": numbers([97, 97], torch.uint8)}
    ),
    "texts of no client": lambda: message('{"texts":[1]}', {"x": numbers([97], torch.uint8)}),
    "texts that are an object": lambda: message('{"texts":{"a":1}}', {"x": numbers([97], torch.uint8)}),
    "no ids": lambda: (unpack_message, forged("message", "{}", {"n": NUMBERS})),
    "no numbers": lambda: (unpack_message, forged("message", "{}", {"i": IDS})),
    "ids without axes": lambda: message("{}", {"i": numbers(1)}),
    "ids of three columns": lambda: message("{}", {"i": numbers([[1, 2, 3]])}),
    "a job without seed": lambda: job("{}", {"i": numbers([1])}),
    "a job's ids of two axes": lambda: job("{}", {"i": numbers([[1], [2], [3]])}),
    "numbers of float32": lambda: message("{}", {"n": torch.ones(1, 1)}),
    "complex numbers": lambda: message("{}", {"n": torch.ones(1, 1, dtype=torch.complex64)}),
    "whole numbers": lambda: message("{}", {"n": torch.ones(1, 1, dtype=torch.int64)}),
    "settings of bool": lambda: job('{"settings":["a"]}', {"n": torch.ones(1, dtype=torch.bool)}),
    "more settings than numbers": lambda: job('{"settings":["a","b"]}', {"n": torch.ones(1, dtype=torch.float64)}),
    "numbers without settings": lambda: job("{}", {"n": torch.ones(1, dtype=torch.float64)}),
    "a version that is not finite": lambda: message("{}", {"i": torch.tensor([[4, float("nan")]])}),
    "a version below 0": lambda: message("{}", {"i": numbers([[4, -1]])}),
    "a client below 0": lambda: message("{}", {"i": numbers([[-4, 1]])}),
    "a job's client below 0": lambda: job("{}", {"i": numbers([0, 1, -4])}),
    "a job's version below 0": lambda: job("{}", {"i": numbers([-1, 1, 4])}),
    "a tensor of other clients": lambda: message("{}", {"t.w": torch.ones(2, 3)}),
    "a tensor of no part of a message": lambda: message("{}", {"w": torch.ones(1, 3)}),
    "a tensor of a thousand axes": lambda: message(
        "{}", entries=f'"t.w":{{"dtype":"F32","shape":[{",".join(["1"] * 1000)}],"data_offsets":[24,28]}}', tail=b"1234"
    ),
    "a shape beyond all numbers": lambda: message(
        "{}", entries=f'"t.w":{{"dtype":"F32","shape":[{2**62},{2**62}],"data_offsets":[24,28]}}', tail=b"1234"
    ),
    "a place beyond the end": lambda: message("{}", entries='"t.w":{"dtype":"F32","shape":[1],"data_offsets":[24,28]}'),
    "an entry that is a list": lambda: message("{}", entries='"t.w":[1]'),
    "an entry that is null": lambda: message("{}", entries='"t.w":null'),
    "an entry without shape": lambda: message("{}", entries='"t.w":{"dtype":"F32"}'),
    "a dtype that is unknown": lambda: message(
        "{}", entries='"t.w":{"dtype":"F4","shape":[1,2],"data_offsets":[24,25]}'
    ),
    "bytes behind the end": lambda: message("{}", tail=b"1234"),
}
for dtype in (torch.complex64, torch.bool, torch.float64, torch.float32, torch.int32):
    WRONG[f"ids of {dtype}"] = lambda dtype=dtype: message("{}", {"i": IDS.to(dtype)})  # type: ignore[misc]
    WRONG[f"a job's ids of {dtype}"] = lambda dtype=dtype: job("{}", {"i": GOOD_JOB["i"].to(dtype)})  # type: ignore[misc]


@contextmanager
def traced(most: int) -> Iterator[None]:
    """At most so many bytes are set aside for Python's objects at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_what_is_forged_rightly_passes() -> None:
    for unpack, data in (job("{}"), message("{}"), job('{"texts":[1,0]}', {"x": numbers([97], torch.uint8)})):
        unpack(data)
    # As long as it may be; the bounds themselves are not refused.
    names = json.dumps([f"m{i}" for i in range(MOST_NAMES)])
    unpack_message(message(f'{{"metrics":{names}}}', {"n": torch.ones(1, MOST_NAMES + 1, dtype=torch.float64)})[1])
    assert (
        len(unpack_job(job("{}", {"i": torch.zeros(MOST_CLIENTS + 2, dtype=torch.int64)})[1]).clients) == MOST_CLIENTS
    )
    assert len(unpack_job(job(f'{{{HELD},"steps":{MOST_DELTAS}}}')[1]).deltas) == MOST_DELTAS


@pytest.mark.parametrize("name", WRONG)
def test_whatever_is_wrong_is_one_error_soon_and_in_little_memory(name: str) -> None:
    unpack, data = WRONG[name]()
    began = time.process_time()
    with traced(100_000_000), pytest.raises(LichenError) as caught:
        unpack(data)
    assert caught.value.where in ("job", "message")
    assert len(str(caught.value)) < 2000
    assert time.process_time() - began < 5


def test_a_head_of_nothing_but_lists_takes_bounded_memory() -> None:
    unpack, data = message(f'{{"texts":[{",".join(["[]"] * (MOST_HEAD // 3 - 200))}]}}')
    with traced(200_000_000), pytest.raises(LichenError, match="texts is no list of 1"):
        unpack(data)


def test_texts_have_the_bound_that_the_reader_gives() -> None:
    job = replace(JOB, texts=("a" * 600, "ä" * 200))
    assert unpack_job(pack_job(job), most_text=1000).texts == job.texts
    with pytest.raises(LichenError, match="texts of 1000 bytes, 999 at most"):
        unpack_job(pack_job(job), most_text=999)
    message = replace(MESSAGE, texts=(("a" * 1000,),))
    with pytest.raises(LichenError, match="texts of 1000 bytes, 999 at most"):
        unpack_message(pack_message(message), most_text=999)
    assert MOST_TEXT >= 1 << 24


def test_a_sender_learns_that_its_head_is_too_long() -> None:
    with pytest.raises(LichenError, match=f"{MOST_HEAD} at most") as caught:
        pack_message(replace(MESSAGE, group="g" * MOST_HEAD))
    assert caught.value.where == "message"


def test_a_sender_learns_that_a_dtype_has_no_bytes() -> None:
    with pytest.raises(LichenError, match=r"torch\.complex128"):
        pack_job(replace(JOB, shared=Shared({"w": torch.ones(1, dtype=torch.complex128)})))

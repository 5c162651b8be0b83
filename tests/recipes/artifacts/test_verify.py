"""A finished run's folder holds against its record, and any byte that is changed is found and named."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_llama import recipe, save_model, save_rows

import lichen
from lichen import cli
from lichen.core.collecting.receipts import digest_C
from lichen.core.errors import LichenError
from lichen.core.files.record import RECORD, SIGNED, Record, Signer, canonical, chain, public_key, signed
from lichen.core.message import Message, take_client
from lichen.recipes.artifacts.verify import KEY, MANIFEST, verify
from lichen.recipes.schema.read import recipe_of

CHANGES = 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of a language model with an adapter."""
    folder = tmp_path_factory.mktemp("verify")
    model = save_model(folder / "llama")
    data = save_rows(folder / "rows.jsonl", "pair", clients=3, rows=24)
    about = recipe(
        model, data, "pair", federation={"rounds": 2, "clients_per_round": 2, "local_steps": 1, "batch_size": 2}
    )
    lichen.run({**about, "compare": {"baselines": ["base"]}}, out=folder / "run")
    return folder / "run"


def test_what_was_never_changed_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(run)
    lines, head = chain(run / RECORD)
    assert [line["kind"] for line in lines] == ["begin", "round", "round", "end"]
    assert (found.lines, found.rounds, found.others) == (4, 2, ())
    assert json.loads((run / SIGNED).read_text())["head"] == head
    assert found.files == len(lines[-1]["files"]) + 1
    assert found.unproven
    assert verify(run, key=found.key) == found
    assert cli.main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == f"{found}\n"
    (run / "put.txt").write_text("later")
    assert verify(run).others == ("put.txt",)
    (run / "put.txt").unlink()
    adapter = verify(run / "adapter", key=found.key)
    assert adapter.key == found.key
    assert adapter.files == len(json.loads((run / "adapter" / MANIFEST).read_text())["files"])
    assert (run / KEY).stat().st_mode & 0o777 == 0o600


def test_an_adapter_that_was_handed_on_holds_by_itself(run: Path, tmp_path: Path) -> None:
    known = verify(run).key
    out = lichen.export(run, out=tmp_path / "elsewhere")
    assert verify(out, key=known).others == ()
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(LichenError, match="adapter_model"):
        verify(out)
    with pytest.raises(LichenError, match="is no public key"):
        verify(run, key="00")


def test_a_round_says_who_was_asked_who_came_and_with_which_message(run: Path) -> None:
    names = [one["name"] for one in json.loads((run / "roster.json").read_text())["members"]]
    for line in chain(run / RECORD)[0][1:-1]:
        trained = [one for one in line["counted"] if one[0] in line["asked"]][: len(line["asked"])]
        assert sorted(one[0] for one in trained) == line["asked"]
        assert len(line["asked"]) == 2
        assert all(
            version == line["round"] - 1 and weight > 0 and len(sha) == 64 for _, version, weight, sha in trained
        )
        assert line["refused"] == {}
        assert line["missing"] == []
        assert max(line["asked"]) < len(names)
        assert len({sha for *_, sha in line["counted"]}) == len(line["counted"])


def test_any_byte_that_is_changed_is_found(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    outside = (copy / "manifest.json", copy / "state" / "lock")  # the former holds against itself
    files = [path for path in sorted(copy.rglob("*")) if path.is_file() and path not in outside]
    parts = ("record", "recipe", "state", "adapter")
    assert all(any(path.relative_to(copy).as_posix().startswith(part) for path in files) for part in parts)
    draw, unseen = random.Random(0), list[Any]()
    for number in range(CHANGES):
        path = files[number % len(files)]
        data = path.read_bytes()
        place = draw.randrange(len(data))
        other = bytes([data[place] ^ draw.randrange(1, 256)])
        path.write_bytes(data[:place] + other + data[place + 1 :])
        try:
            verify(copy)
            unseen.append((path, place, other))
        except LichenError as error:
            name = path.name if path.suffix != ".key" else "record.key"
            if name not in str(error) and path.name not in (SIGNED, RECORD):
                unseen.append((path, place, error))
        path.write_bytes(data)
    assert unseen == []
    verify(copy)


def test_lines_cannot_be_left_out_put_elsewhere_or_added(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    lines = (copy / RECORD).read_bytes().splitlines(keepends=True)
    entry = {**json.loads(lines[-1]), "before": hashlib.sha256(lines[-1]).hexdigest()}
    for wrong in (lines[1:], lines[:-1], [lines[0], lines[2], lines[1], lines[3]], [*lines, canonical(entry)]):
        (copy / RECORD).write_bytes(b"".join(wrong))
        with pytest.raises(LichenError, match=RECORD):
            verify(copy)


def test_who_signs_anew_is_another(run: Path, tmp_path: Path) -> None:
    copy, known = shutil.copytree(run, tmp_path / "copy"), verify(run).key
    (copy / KEY).unlink()
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text() + "\n")
    lines, _ = chain(copy / RECORD)
    record = Record(copy / RECORD, "".join(canonical(line).decode() for line in lines[:-1]))
    signed({}, Signer(copy / KEY))  # a key of the forger's own
    lines[-1]["files"] |= {
        name: hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in ("recipe.yaml", str(KEY))
    }
    forged = {"public_key": public_key(copy / KEY)}
    record.end({name: value for name, value in (lines[-1] | forged).items() if name != "before"})
    head = record.head
    (copy / SIGNED).write_bytes(signed({"format": 1, "head": head, "lines": len(lines)}, Signer(copy / KEY)))
    manifest = json.loads((copy / "adapter" / MANIFEST).read_text())
    body = {name: value for name, value in manifest.items() if name not in ("public_key", "signature")}
    (copy / "adapter" / MANIFEST).write_bytes(signed({**body, "record": head}, Signer(copy / KEY)))
    assert verify(copy).key != known  # which is said to be unproven
    with pytest.raises(LichenError, match="is signed with the key"):
        verify(copy, key=known)


@pytest.mark.parametrize("federation", ["", "trial"])
def test_a_head_signed_with_another_key_than_the_record_names_is_refused(
    run: Path, tmp_path: Path, federation: str
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    head = {name: value for name, value in json.loads((copy / SIGNED).read_text()).items() if name != "signature"}
    (copy / SIGNED).write_bytes(signed(head, Signer(tmp_path / "other.key", federation)))
    with pytest.raises(LichenError, match="and the record names") as refused:
        verify(copy)
    assert verify(run).key[:16] in str(refused.value)
    (copy / SIGNED).write_bytes(signed(head, Signer(copy / KEY, "trial")))  # the same key, and a name it has not
    with pytest.raises(LichenError, match="and the record names"):
        verify(copy)


def test_a_run_that_was_stopped_ends_with_the_same_record(run: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        if event.report.round == 2:
            raise StopError

    again, out = recipe_of(run), tmp_path / "run"
    with pytest.raises(StopError):
        lichen.run(again, out=out, observers=[stop])
    assert verify(out).key == ""
    assert verify(out).rounds == 1
    with open(out / RECORD, "ab") as file:  # what a kill leaves between a line and the state that it belongs to
        file.write(b'{"before":"half a line')
    lichen.run(again, out=out, resume=True)
    assert verify(out).rounds == 2
    rounds = [[line for line in chain(folder / RECORD)[0] if line["kind"] != "end"] for folder in (run, out)]
    assert rounds[0] == rounds[1]


def test_a_record_that_was_cut_or_changed_is_written_again_from_the_journal(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    whole = (copy / RECORD).read_bytes().splitlines(keepends=True)
    for wrong in (whole[:2], [whole[0], whole[1].replace(b"round", b"ronud"), *whole[2:]], []):
        (copy / RECORD).write_bytes(b"".join(wrong))
        said: list[str] = []
        lichen.run(recipe_of(copy), out=copy, resume=True, say=said.append)
        assert [line for line in said if RECORD in line and "written again" in line]
        assert verify(copy).rounds == 2
        assert (copy / RECORD).read_bytes().splitlines(keepends=True)[:-1] == whole[:-1]


def test_a_digest_is_that_of_the_message_in_any_company() -> None:
    g = torch.Generator().manual_seed(0)
    message = Message(
        group="",
        client_C=torch.tensor([4, 1, 7]),
        version_C=torch.tensor([3, 3, 2]),
        weight_C=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
        tensors={
            "b": torch.randn(3, 2, 4, generator=g).bfloat16(),
            "a": torch.randn(3, 5, generator=g),
            "n": torch.zeros(3, 0),
            "one": torch.randn(3, generator=g),
        },
        metrics={"count": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)},
        texts=(("x", "yé"), (), ("z",)),
    )
    whole = digest_C(message)
    assert whole.shape == (3, 8)
    assert bool((whole == whole.round()).all())
    assert float(whole.max()) < 2**32
    assert torch.equal(whole, torch.cat([digest_C(take_client(message, c)) for c in range(3)]))
    for name in message.tensors:
        if message.tensors[name].numel():
            changed = {**message.tensors, name: message.tensors[name] + 1}
            assert bool((digest_C(replace(message, tensors=changed)) != whole).any(1).all())
    assert bool((digest_C(replace(message, weight_C=message.weight_C * 2)) != whole).any(1).all())

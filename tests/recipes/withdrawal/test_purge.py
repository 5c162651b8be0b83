"""After a purge nothing of the client is left in any byte, sums are those of the other run, and the record holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.withdrawing import CANARY, CLIENTS, NAME, copied, everything, save_runs

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.files.record import RECORD, SIGNED, canonical, chain
from lichen.present.clients import read_clients
from lichen.recipes.artifacts.payout import pay
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.artifacts.withdrawn.deletions import DELETIONS, PENDING, salted, whose
from lichen.recipes.withdrawal.traces import purge as purging
from lichen.recipes.withdrawal.traces.listing import traces
from lichen.recipes.withdrawal.traces.purge import end_purge, purge

NUMBER = CLIENTS.index(NAME)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("withdrawing")
    save_runs(folder)
    return folder


@pytest.fixture(scope="module")
def done(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A purged run and its receipt."""
    folder = copied(home, tmp_path_factory.mktemp("purged"))
    pay(folder / "run", "100", by="rows")
    found = purge(folder / "run", NAME, folder / "new", basis="GDPR, article 17", requested="2026-11-01")
    assert found.left == ()
    return folder / "run", found.receipt


def test_the_list_names_what_is_hers_alone_what_has_her_name_and_what_is_a_sum(home: Path) -> None:
    rows = home / "hers.txt"
    rows.write_text(f"{CANARY}\n", encoding="utf-8")
    found = traces(home / "run", NAME, rows=rows)
    by_file = {one.file: one for one in found.files}
    grid = "state/federated/lr=0.02"
    assert {file for file, one in by_file.items() if one.alone} == {
        *(f"{grid}/history/{at}/0/{NUMBER}.safetensors" for at in range(2)),
        *(name for name in everything(home / "run") if f"/clients/0/{NUMBER}/" in name),
    }
    assert {file for file, one in by_file.items() if one.named} == {"roster.json", "clients.csv"}
    for file in ("adapter/adapter_model.safetensors", f"{grid}/server.safetensors", "state/final.safetensors"):
        assert by_file[file].holds == ("sum",)
    assert "recipe.yaml" not in by_file  # where her name would be found
    assert "state/blocks.json" not in by_file
    assert all(one.texts == 0 for one in found.files)
    assert len(by_file) + found.nothing == len(everything(home / "run"))
    assert any(str(home / "rows.jsonl") in line for line in found.outside)
    (home / "run" / "notes.txt").write_text(f"she wrote: {CANARY}", encoding="utf-8")
    found = traces(home / "run", NAME, rows=rows)
    (home / "run" / "notes.txt").unlink()
    assert [(one.file, one.holds, one.texts) for one in found.files if one.texts] == [("notes.txt", (), 1)]


def test_no_byte_of_the_folder_has_her_name_and_no_file_is_hers(done: tuple[Path, str], home: Path) -> None:
    run, _ = done
    files = everything(run)
    others = NAME.encode() + b"-2"
    for name, data in files.items():
        assert NAME.encode() not in data.replace(others, b""), name
        assert CANARY.encode() not in data, name
        assert NAME not in name.replace(others.decode(), "")
        assert f"/0/{NUMBER}/" not in name
        assert not name.endswith(f"/0/{NUMBER}.safetensors")
    assert others in files["roster.json"]
    assert not (run.parent / "new").exists()
    assert not any(name.startswith(".") for name in files)
    message = next((home / "run").glob(f"state/federated/*/history/0/0/{NUMBER}.safetensors")).read_bytes()
    assert message not in files.values()


def test_sums_have_the_bytes_of_the_run_without_her_and_the_others_keep_their_number(
    done: tuple[Path, str], home: Path
) -> None:
    run, _ = done
    for name in (
        "state/final.safetensors",
        "adapter/adapter_model.safetensors",
        "state/federated/lr=0.02/server.safetensors",
    ):
        assert (run / name).read_bytes() == (home / "new" / name).read_bytes() != (home / "run" / name).read_bytes()
    roster = json.loads((run / "roster.json").read_text())["members"]
    names = [one if one != NAME else "withdrawn-1" for one in CLIENTS]
    assert [one["name"] for one in roster] == names
    assert roster[NUMBER]["rows"] == {}
    rows = read_clients(run)
    assert [row["client"] for row in rows] == names
    assert {key for key, x in rows[NUMBER].items() if x} == {"client"}
    before = read_clients(home / "new")
    assert [row for at, row in enumerate(rows) if at != NUMBER] == [
        row for at, row in enumerate(before) if at != NUMBER
    ]
    for line in (run / "trace.jsonl").read_text().splitlines():
        assert NUMBER not in json.loads(line)["clients"]


def test_the_record_holds_and_says_which_lines_are_redacted(done: tuple[Path, str], home: Path) -> None:
    run, _ = done
    found = verify(run)
    assert found.key == verify(home / "run").key
    assert (found.withdrawn, found.payouts, found.others) == (1, 1, ())
    lines, _ = chain(run / RECORD)
    old, head = chain(home / "run" / RECORD)
    kinds = [line["kind"] for line in old]
    assert [line["kind"] for line in lines] == [*kinds, "withdrawal", *kinds, "payout"]
    for now, then in zip(lines, old, strict=False):
        assert now["redacted"] == hashlib.sha256(canonical(then)).hexdigest()
    assert lines[len(old)]["before"] == head
    assert found.redacted == len(old)
    assert all(NUMBER not in line.get("asked", ()) for line in lines)
    assert all(client != NUMBER for line in lines for client, *_ in line.get("counted", ()))
    assert {client for client, _ in lines[-1]["paid"]} == {0, 2, 3}
    assert "unproven  what stood of a withdrawn client" in str(found)


def test_what_scores_rows_to_export_is_refused_and_what_reads_none_goes_on(
    done: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = done
    before = everything(run)
    for flags in (["--gguf"], ["--gguf", "--bits", "q8_0"], ["--quantize", "int8"]):
        assert cli.main(["export", str(run), *flags, "--out", str(tmp_path / "small.gguf")]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"{run}: a client was withdrawn from it" in error
        assert "export before the purge" in error
    assert cli.main(["export", str(run), "--merge", "--out", str(tmp_path / "whole")]) == 0
    assert [one.name for one in tmp_path.iterdir()] == ["whole"]
    assert everything(run) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda line: {**line, "asked": [0]}, "line 2|no line of a withdrawal stands"),
        (lambda line: {**line, "redacted": "0" * 64}, "line 3"),
        (lambda line: {key: x for key, x in line.items() if key != "redacted"}, "line 3"),
    ],
)
def test_a_redacted_line_cannot_be_changed(done: tuple[Path, str], tmp_path: Path, change: object, match: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    lines, _ = chain(run / RECORD)
    lines[1] = change(lines[1])  # type: ignore[operator]
    (run / RECORD).write_bytes(b"".join(map(canonical, lines)))
    with pytest.raises(LichenError, match=match):
        verify(run)


def test_a_line_cannot_be_redacted_where_nobody_was_withdrawn(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    lines, _ = chain(run / RECORD)
    digest = hashlib.sha256(canonical(lines[1])).hexdigest()
    lines[1] = {**lines[1], "counted": [], "redacted": digest}
    (run / RECORD).write_bytes(b"".join(map(canonical, lines)))
    with pytest.raises(LichenError, match="redacted, and no line of a withdrawal"):
        verify(run)


def test_deletions_say_what_was_done_and_only_the_receipt_shows_about_whom(done: tuple[Path, str], home: Path) -> None:
    run, receipt = done
    line = whose(run, receipt, NAME)
    assert (line["as"], line["number"], line["way"]) == ("withdrawn-1", NUMBER, "replay")
    assert (line["basis"], line["asked"]) == ("GDPR, article 17", "2026-11-01")
    assert line["proof"] == {"loss_gap": 0.25, "by client": {}}
    before, after = line["files"]["roster.json"]
    assert before == salted(receipt, (home / "run" / "roster.json").read_bytes())
    assert after == hashlib.sha256((run / "roster.json").read_bytes()).hexdigest()
    gone = {name for name, both in line["files"].items() if both[1] is None}
    assert {name for name in gone if "history" in name} == {
        f"state/federated/lr=0.02/history/{at}/0/{NUMBER}.safetensors" for at in range(2)
    }
    assert receipt.encode() not in b"".join(everything(run).values())
    for wrong in (("0" * 64, NAME), (receipt, "person-3")):
        with pytest.raises(LichenError, match="no line is about"):
            whose(run, *wrong)
    assert cli.main(["verify", str(run), "--receipt", receipt, "--client", NAME]) == 0


@pytest.mark.parametrize("file", [DELETIONS, "roster.json", "trace.jsonl", SIGNED, "state/final.safetensors"])
def test_any_file_that_was_changed_since_is_found(done: tuple[Path, str], tmp_path: Path, file: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    data = (run / file).read_bytes()
    (run / file).write_bytes(data[: len(data) // 2] + b"?" + data[len(data) // 2 + 1 :])
    with pytest.raises(LichenError):
        verify(run)


def test_a_message_that_came_back_is_found(done: tuple[Path, str], home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    file = f"state/federated/lr=0.02/history/0/0/{NUMBER}.safetensors"
    shutil.copy(home / "run" / file, run / file)
    with pytest.raises(LichenError, match="of a client that was withdrawn"):
        verify(run)


def test_it_is_a_run_like_any_other_that_cannot_go_on(
    done: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    assert "federated" in str(lichen.report(run))
    assert lichen.talk(run).answer("w1 w2")
    lichen.export(run, merge=True)
    paid = pay(run, "10", by="equal").clients
    assert [(one.client, one.cents) for one in paid][NUMBER] == ("withdrawn-1", 0)
    assert sum(one.cents for one in paid) == 1000
    assert verify(run).payouts == 2
    capsys.readouterr()
    for command in (["run", "--resume", str(run)], ["influence", str(run)]):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert "a client was withdrawn from it" in err
        assert "Traceback" not in err
    with pytest.raises(LichenError, match="withdrawn"):
        lichen.replay(run)


def test_purging_twice_is_purging_once(done: tuple[Path, str], home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    shutil.copytree(home / "new", tmp_path / "new")
    before = everything(run)
    for client in (NAME, "withdrawn-1"):
        with pytest.raises(LichenError, match=r"no client is called|was withdrawn before"):
            purge(run, client, tmp_path / "new")
    with pytest.raises(LichenError, match="no purge of it was stopped"):
        end_purge(run)
    assert everything(run) == before


def test_killed_at_any_step_it_has_changed_nothing_or_is_ended_by_the_next_call(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step that changes the folder fails once, as a kill would; the bytes at the end are the same."""
    monkeypatch.setattr(purging.os, "urandom", lambda size: b"7" * size)
    start = tmp_path / "start"
    copied(home, start)
    before = everything(start / "run")
    whole: dict[str, bytes] = {}
    step = 0
    while True:
        folder = tmp_path / str(step)
        shutil.copytree(start, folder, symlinks=True)
        steps = Steps(step)
        with pytest.MonkeyPatch.context() as patch:
            steps.count(patch)
            with suppress(Killed):
                purge(folder / "run", NAME, folder / "new")
        if not whole:
            reference = tmp_path / "whole"
            shutil.copytree(start, reference)
            purge(reference / "run", NAME, reference / "new")
            whole = everything(reference / "run")
        decided = (folder / "run" / PENDING).is_dir()
        if not decided and steps.killed and step < steps.decided:
            found = {name: x for name, x in everything(folder / "run").items() if not name.startswith(".purge")}
            assert found == before, step
            purge(folder / "run", NAME, folder / "new")
        elif decided:
            with pytest.raises(LichenError, match="a purge of it was stopped"):
                verify(folder / "run")
            assert cli.main(["run", "--resume", str(folder / "run")]) == 2
            assert cli.main(["forget", str(folder / "run"), "--purge"]) == 0
        found = everything(folder / "run")
        same = {
            name for name in whole if not name.startswith("adapter/") and name not in (RECORD, SIGNED, "manifest.json")
        }
        assert found.keys() == whole.keys(), step
        assert {name for name in same if found[name] != whole[name]} == set(), step
        assert verify(folder / "run").withdrawn == 1
        shutil.rmtree(folder)
        if not steps.killed:
            break
        step += 1 if step < 2 else 7
    assert step > 14


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


class Steps:
    """Counts what changes the folder once the purge is decided, or decides it, and ends at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.seen, self.killed, self.decided = at, 0, False, 1

    def count(self, patch: pytest.MonkeyPatch) -> None:
        rename, replace, unlink = purging.rename_folder, os.replace, Path.unlink

        def step() -> None:
            if self.seen == self.at:
                self.killed = True
                raise Killed
            self.seen += 1

        def renaming(*words: object, **more: object) -> None:
            step()
            rename(*words, **more)  # type: ignore[arg-type]

        def replacing(source: object, target: object) -> None:
            if f"/{PENDING}/" in str(source):
                step()
            replace(source, target)  # type: ignore[arg-type]

        def unlinking(self_: Path, missing_ok: bool = False) -> None:
            if "/run/" in str(self_) and PENDING not in str(self_):
                step()
            unlink(self_, missing_ok=missing_ok)

        patch.setattr(purging, "rename_folder", renaming)
        patch.setattr(os, "replace", replacing)
        patch.setattr(Path, "unlink", unlinking)

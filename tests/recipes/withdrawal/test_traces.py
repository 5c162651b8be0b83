"""From the command line: forget and purge in one go, a name that goes, and folders of which any part is damaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from tests.support.withdrawing import everything

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.withdrawal.traces.listing import traces
from lichen.recipes.withdrawal.traces.naming import Name, contents, texts_in
from lichen.recipes.withdrawal.traces.purge import purge

SHORT = [
    "federation={rounds: 3, local_steps: 2, batch_size: 8, valid_every: 1, history: true}",
    "compare.baselines=[]",
    "data.partition.clients=5",
    "optimizer.lr=0.1",
    "engine.history=1",
]
NAME = "client-002"
SPOILT = 100


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces") / "run"
    lichen.run(lichen.read_recipe("digits", SHORT), out=folder)
    return folder


def copied(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    return target


def test_forgotten_and_purged_in_one_go_it_has_the_model_to_which_the_client_never_came(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = lichen.run(lichen.read_recipe("digits", [*SHORT, f"federation.absent=[{NAME}]"]), out=tmp_path / "absent")
    mine = copied(run, tmp_path / "mine")
    assert cli.main(["forget", str(mine), "--client", NAME, "--how", "replay", "--purge", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["left"] == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("mine")] == ["mine"]
    for name in ("state/final.safetensors", "model/model.safetensors"):
        assert (mine / name).read_bytes() == (absent.folder / name).read_bytes()
    assert all(NAME.encode() not in data for data in everything(mine).values())
    assert lichen.read_recipe(str(mine / "recipe.yaml")).federation.absent == ("withdrawn-1",)
    found = verify(mine)
    assert (found.withdrawn, found.others) == (1, ())
    assert cli.main(["verify", str(mine), "--receipt", done["receipt"], "--client", NAME]) == 0
    assert f"{NAME} is withdrawn-1" in capsys.readouterr().out
    place = str(mine)
    for words in (["forget", place, "--client", "client-001"], ["influence", place], ["run", "--resume", place]):
        assert cli.main(words) == 2
        assert "a client was withdrawn from it" in capsys.readouterr().err
    with pytest.raises(LichenError, match="a client was withdrawn from it"):
        lichen.replay(mine)


def test_a_run_to_which_the_client_never_came_is_rid_of_the_name(run: Path, tmp_path: Path) -> None:
    mine = copied(run, tmp_path / "mine")
    new = lichen.forget(mine, NAME, how="replay").new
    assert any(NAME.encode() in data for data in everything(new).values())
    found = purge(new, NAME, new)
    assert found.left == ()
    assert all(NAME.encode() not in data for data in everything(new).values())
    assert verify(new).withdrawn == 1
    assert traces(mine, NAME).files  # the run itself is as it was


def test_two_clients_go_one_after_the_other(run: Path, tmp_path: Path) -> None:
    mine, names = copied(run, tmp_path / "mine"), (NAME, "client-004")
    first = lichen.forget(mine, names[0], how="replay", out=tmp_path / "first").new
    both = lichen.forget(first, names[1], how="replay", out=tmp_path / "both").new
    model = (both / "state/final.safetensors").read_bytes()
    for name, source in zip(names, (both, mine), strict=True):
        purge(mine, name, source)
    assert (mine / "state/final.safetensors").read_bytes() == model
    assert all(name.encode() not in data for data in everything(mine).values() for name in names)
    found = verify(mine)
    assert found.withdrawn == 2
    assert [one["name"] for one in json.loads((mine / "roster.json").read_text())["members"]][2::2] == [
        "withdrawn-1",
        "withdrawn-2",
    ]


@pytest.mark.parametrize(
    ("name", "keys", "alone"),
    [
        ("digits", ["value.kind=exact", "compare.baselines=[]", "data.partition.clients=4"], {"history": 0}),
        ("digits", ["personal.kind=apfl", "wire.up=['topk:1/4']", "compare.baselines=[]"], {"clients": 1}),
        ("digits-unequal", ["compare.baselines=[]"], {"clients": 1, "model": 1}),
        ("digits", ["privacy.secure=true", "compare.baselines=[]", "data.partition.clients=4"], {}),
    ],
)
def test_runs_of_every_kind_are_purged_whole(tmp_path: Path, name: str, keys: list[str], alone: dict[str, int]) -> None:
    """The run without the client is one of another seed: what is looked at is that nothing is left, and all fits."""
    short = ["federation.rounds=1", "optimizer.lr=0.1", *keys]
    run = lichen.run(lichen.read_recipe(name, short), out=tmp_path / "run").folder
    new = lichen.run(lichen.read_recipe(name, [*short, "seed=1"]), out=tmp_path / "new").folder
    client = json.loads((run / "roster.json").read_text())["members"][2]["name"]
    (new / "withdrawal.json").write_text(json.dumps({"client": client, "how": "replay"}))
    found = [one.file for one in traces(run, client).files if one.alone]
    for part, least in alone.items():
        assert sum(f"{part}/" in file for file in found) >= least
    done = purge(run, client, new)
    assert (done.left, verify(run).withdrawn) == ((), 1)
    assert all(client.encode() not in data for data in everything(run).values())
    assert not any((run / file).exists() for file in found)
    assert "federated" in str(lichen.report(run))
    if recipe_of(run).model.student is not None:
        with pytest.raises(LichenError, match="a client was withdrawn") as refused:
            lichen.export(run, student=True, bits="auto", out=tmp_path / "rounded")
        assert "export before the purge" in refused.value.fix
        assert (lichen.export(run, student=True, out=tmp_path / "whole") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--client", "client-02"], "no client is called"),
        (["--client", NAME], "no finished runs without"),
        (["--client", NAME, "--out", "nowhere"], "is not a run's folder"),
        (["--client", NAME, "--out", "other"], "is no run without"),
        (["--client", NAME, "--out", "other", "--asked", "yesterday"], "is no day"),
        ([], "no purge of it was stopped"),
        (["--list"], "leave out one of them"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence_and_nothing_changes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], match: str
) -> None:
    mine, _ = copied(run, tmp_path / "run"), copied(run, tmp_path / "other")
    before = everything(mine)
    places = [str(tmp_path / word) if word in ("nowhere", "other") else word for word in words]
    assert cli.main(["forget", str(mine), "--purge", *places]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert "Traceback" not in err
    assert everything(mine) == before


def test_a_file_that_nobody_knows_stops_a_purge(run: Path, tmp_path: Path) -> None:
    mine = copied(run, tmp_path / "run")
    new = lichen.forget(mine, NAME, how="replay").new
    (new / "notes.txt").write_text("mine")
    with pytest.raises(LichenError, match="is no file that Lichen writes"):
        purge(mine, NAME, new)


def test_folders_of_which_any_part_is_damaged_give_one_error_each(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is cut, emptied, removed, flipped or made a folder; both runs may be spoilt."""
    start = copied(run, tmp_path / "start")
    new = lichen.forget(start, NAME, how="replay", out=tmp_path / "new").new
    rng, refused = random.Random(0), 0
    for number in range(SPOILT):
        folder = tmp_path / str(number)
        shutil.copytree(start, folder / "run")
        shutil.copytree(new, folder / "new")
        some = folder / rng.choice(["run", "new"])
        files = sorted(path for path in some.rglob("*") if path.is_file() and path.name != "lock")
        tops = [path for path in files if path.parent == some]
        path = rng.choice(tops if number % 2 else files)
        data = path.read_bytes()
        how = rng.choice(["cut", "empty", "gone", "flipped", "folder", "words"])
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how != "gone":
            at = rng.randrange(len(data) + 1)
            made = {"cut": data[:at], "empty": b"", "words": b'{"a": [1, {}]}\n'}
            path.write_bytes(made.get(how, data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]))
        before = {name: x for name, x in everything(folder / "run").items() if name != "state/lock"}
        words = ["forget", str(folder / "run"), "--client", NAME, "--purge", "--out", str(folder / "new")]
        code = cli.main(words)
        err = capsys.readouterr().err
        assert code in (0, 2), (path, how, err)
        assert "Traceback" not in err
        if code == 2:
            refused += 1
            lines = [line for line in err.splitlines() if line.strip()]
            assert len(lines) <= 2, (path, how, err)
            after = {name: x for name, x in everything(folder / "run").items() if name != "state/lock"}
            assert after == before, (path, how)
        else:
            assert verify(folder / "run").withdrawn == 1, (path, how)
        if number % 5 == 0:
            cli.main(["forget", str(folder / "run"), "--client", NAME, "--list"])
            assert "Traceback" not in capsys.readouterr().err
        shutil.rmtree(folder)
    assert refused > SPOILT // 2


def test_names_are_found_whole_in_archives_and_in_texts_of_pictures(tmp_path: Path) -> None:
    import gzip
    import zipfile
    import zlib

    name = Name(name="ada", others=("ada-lovelace", "adam"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.txt", "by ada, " * 40)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"by ada, " * 40))
    body = b"Author\0\0" + zlib.compress(b"by ada")
    picture = b"\x89PNG\r\n\x1a\n" + len(body).to_bytes(4, "big") + b"zTXt" + body + b"\0\0\0\0"
    (tmp_path / "c.png").write_bytes(picture)
    (tmp_path / "d.txt").write_text("ada-lovelace and adam, adage and Canada", encoding="utf-8")
    found = {path.name: any(map(name.found, contents(path))) for path in tmp_path.iterdir()}
    assert found == {"a.zip": True, "b.gz": True, "c.png": True, "d.txt": False}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a whole sentence here", "label": "x"}\n', encoding="utf-8")
    assert texts_in(rows) == ("a whole sentence here",)
    rows.write_text('{"text": "short"}\n', encoding="utf-8")
    with pytest.raises(LichenError, match="holds no text"):
        texts_in(rows)

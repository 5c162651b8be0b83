"""A federation of sites with a file each: no process opens another's, and the rounds have the bytes of a simulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.recipes.schema.read import read_recipe, write_recipe
from support.sites import save_sites, sites_recipe

WATCH = """
import os, sys
log = os.open(os.path.join(os.environ["LICHEN_OPENED"], str(os.getpid())), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
os.write(log, ("\\0".join(sys.orig_argv) + "\\n").encode())
sys.addaudithook(lambda event, args: event == "open" and os.write(log, f"{args[0]}\\n".encode(errors="replace")))
"""
"""Every Python process that finds this at its start writes down how it was started, and each file that it opens."""

RUN = "import json, sys, lichen; lichen.run(sys.argv[1], out=sys.argv[2], sites=json.loads(sys.argv[3]))"

MORE: Mapping[Literal["pair", "label"], dict[str, Any]] = {
    "pair": {
        "federation": {"rounds": 2, "local_steps": 2, "ranks": [1, 2], "aggregate": "hetlora", "weighting": "rows"},
        "compare": {"baselines": []},
    },
    "label": {
        "federation": {"rounds": 2, "local_steps": 2, "clients_per_round": 2, "valid_clients": 2},
        "compare": {"baselines": []},
        "wire": {"down": ["int8"]},
    },
}


def saved_recipe(home: Path, shape: Literal["pair", "label"], engine: str, data: Path) -> Path:
    plain = sites_recipe(home, shape, engine={"name": engine, "packing": False}, **MORE[shape])
    file = home / f"{engine}.yaml"
    file.write_text(write_recipe(read_recipe({**plain, "data": {**plain["data"], "name": str(data)}})))
    return file


def watched_run(home: Path, recipe: Path, out: Path, sites: Mapping[str, Path]) -> tuple[list[str], list[list[str]]]:
    """Run over sites; the lines of the server's process, and those of every node's."""
    logs, start = home / "opened", home / "start"
    logs.mkdir()
    start.mkdir()
    (start / "sitecustomize.py").write_text(WATCH)
    paths = os.pathsep.join([str(start), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            str(recipe),
            str(out),
            json.dumps({name: str(file) for name, file in sites.items()}),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "LICHEN_OPENED": str(logs)},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    processes = [log.read_text(errors="replace").splitlines() for log in logs.iterdir()]
    nodes = [lines for lines in processes if "node" in lines[0].split("\0")]
    (server,) = [lines for lines in processes if RUN in lines[0]]
    return server, nodes


def learned(run: Path) -> dict[str, bytes]:
    """The server's state, and what was learned."""
    files = [*run.glob("state/*/*/server.safetensors"), *run.glob("adapter/*.safetensors")]
    return {str(file.relative_to(run)): file.read_bytes() for file in [*files, run / "state/final.safetensors"]}


@pytest.mark.parametrize("shape", ["pair", "label"])
def test_sites_with_a_file_each_have_the_bytes_of_the_local_engine(
    shape: Literal["pair", "label"], tmp_path: Path
) -> None:
    files = save_sites(tmp_path / "sites", shape)
    if shape == "label":  # three where a site's folder of files is one of them, else two are enough
        one = next(file for file in files if not file.is_dir())
        files = tuple(file for file in files if file != one)
        one.unlink()
    names = ("north", "east", "south")[: len(files)]
    recipe = saved_recipe(tmp_path, shape, "spawned", tmp_path / "nowhere")
    server, nodes = watched_run(tmp_path, recipe, tmp_path / "apart", dict(zip(names, files, strict=True)))

    assert any("roster.json" in line for line in server)  # the hook sees what is opened
    assert not any(str(tmp_path / "sites") in line for line in server[1:])
    assert len(nodes) == len(files)
    for lines in nodes:
        started = lines[0].split("\0")
        own = started[started.index("--data") + 1]
        opened = {line for line in lines[1:] if line.startswith(str(tmp_path / "sites"))}
        assert opened
        assert all(line == own or line.startswith(f"{own}/") for line in opened)

    lichen.run(saved_recipe(tmp_path, shape, "local", tmp_path / "sites"), out=tmp_path / "local")
    apart, local = learned(tmp_path / "apart"), learned(tmp_path / "local")
    assert len(apart) >= 3
    assert apart == local
    assert (tmp_path / "apart/roster.json").read_bytes() == (tmp_path / "local/roster.json").read_bytes()
    both = lichen.report(tmp_path / "apart", tmp_path / "local").runs
    means = [{name: s and s["mean"] for name, s in run.summary["columns"].items()} for run in both]
    assert means[0] == means[1]
    assert both[0].summary["traffic"] == both[1].summary["traffic"]


def test_what_needs_everybodys_rows_is_refused_before_a_site_is_started(tmp_path: Path) -> None:
    files = save_sites(tmp_path / "sites", "pair")
    recipe = read_recipe(saved_recipe(tmp_path, "pair", "spawned", tmp_path / "nowhere"))
    few = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_clients": 2})})
    with pytest.raises(LichenError, match="drawn among those of all sites") as wrong:
        lichen.run(few, out=tmp_path / "run", sites={"one": files[0]})
    assert wrong.value.where == "data.max_clients"
    assert not (tmp_path / "run").exists()

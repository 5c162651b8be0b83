"""Rules, client methods and engines of other packages: one file and an entry point each, no file of ours changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.recipes.schema.read import read_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "extending"
SMALL = ["federation.rounds=2", "federation.local_steps=2", "optimizer.lr=0.1", "compare.baselines=[]"]


def install(folder: Path, group: str, name: str, value: str, source: str | Path, patch: pytest.MonkeyPatch) -> None:
    """What pip would leave of a package with one file and one entry point, seen by child processes too."""
    known = folder / f"{name}_plugin-1.dist-info"
    known.mkdir(parents=True)
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1\n")
    (known / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    module = folder / f"{value.partition(':')[0]}.py"
    if isinstance(source, Path):
        shutil.copy(source, module)
    else:
        module.write_text(source)
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


def learned(folder: Path) -> Any:
    return load_tree(folder / "model" / "model.safetensors")[0]


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_rule_of_another_package_runs_here_and_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LichenError, match="is not a choice here"):
        read_recipe("digits", ["federation.aggregate=median"])
    install(tmp_path / "p", "lichen.aggregators", "median", "median:RULE", EXAMPLES / "median.py", monkeypatch)
    words = [*SMALL, "federation.aggregate=median"]
    here, ranks = read_recipe("digits", words), read_recipe("digits", [*words, "engine.name=distributed"])
    one = lichen.run(here, out=tmp_path / "one")
    two = lichen.run(ranks, out=tmp_path / "two")
    mean = lichen.run(read_recipe("digits", SMALL), out=tmp_path / "mean")
    assert same(learned(one.folder), learned(two.folder))
    assert not same(learned(one.folder), learned(mean.folder))
    # What it does not allow is refused in the words of ours.
    with pytest.raises(LichenError) as caught:
        read_recipe("digits", [*words, "federation.fair=qffl"])
    assert (caught.value.where, "median" in caught.value.what) == ("federation.fair", True)


def test_a_client_method_of_another_package_keeps_its_own_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = EXAMPLES / "client_method.py"
    install(tmp_path / "p", "lichen.client_methods", "adaptive_prox", "client_method:METHOD", source, monkeypatch)
    words = [*SMALL, "federation.rounds=4", "optimizer.momentum=0", "optimizer.lr=0.5"]
    plain = lichen.run(read_recipe("digits", words), out=tmp_path / "plain")
    words.append("optimizer.name=adaptive_prox")
    pulled = lichen.run(read_recipe("digits", words), out=tmp_path / "pulled")
    blocks = lichen.run(read_recipe("digits", [*words, "engine.clients_per_block=3"]), out=tmp_path / "blocks")
    ranks = lichen.run(read_recipe("digits", [*words, "engine.name=distributed"]), out=tmp_path / "ranks")
    assert not same(learned(plain.folder), learned(pulled.folder))
    assert same(learned(pulled.folder), learned(blocks.folder))
    assert same(learned(pulled.folder), learned(ranks.folder))
    with pytest.raises(LichenError, match="goes with adamw or sgd, not with adaptive_prox"):
        read_recipe("digits", [*words, "federation.keep_optimizer=true"])


ENGINE = """
from contextlib import contextmanager
from lichen.declared import Property
from lichen.engines.kinds import EngineKind

used = []

@contextmanager
def make(settings):
    used.append(settings.nodes)
    yield settings.local()

KIND = EngineKind(name="counted", summary="as local", make=make, allows=frozenset({Property.ONE_SERVER}))
"""


def test_an_engine_of_another_package_is_made_and_refuses_by_what_it_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "p", "lichen.engines", "counted", "counted_engine:KIND", ENGINE, monkeypatch)
    done = lichen.run(read_recipe("digits", [*SMALL, "engine={name: counted, nodes: 7}"]), out=tmp_path / "a")
    here = lichen.run(read_recipe("digits", SMALL), out=tmp_path / "b")
    import counted_engine

    assert counted_engine.used == [7]
    assert same(learned(done.folder), learned(here.folder))
    with pytest.raises(LichenError, match="nodes of counted open their own rows alone, without semi"):
        read_recipe("digits", ["engine.name=counted", "semi.kind=fixmatch"])


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("raise RuntimeError('no wings')", "cannot be imported: RuntimeError: no wings"),
        ("RULE = 3", "is a int, not a AggregationRule"),
        ("from lichen.server.rules import RULES\nRULE = RULES['mean']", "calls itself 'mean'"),
    ],
)
def test_an_entry_point_that_breaks_is_named(
    source: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "p", "lichen.aggregators", "odd", f"odd_{len(source)}:RULE", source, monkeypatch)
    with pytest.raises(LichenError) as caught:
        read_recipe("digits", ["federation.aggregate=odd"])
    assert what in caught.value.what
    assert f"entry point odd = odd_{len(source)}:RULE of lichen.aggregators, package odd-plugin" in caught.value.where
    assert caught.value.fix

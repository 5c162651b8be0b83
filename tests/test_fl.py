"""The public API: each name has its line, loading it is cheap, and the example that uses nothing else learns."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lichen import fl
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared

EXAMPLES = Path(__file__).parent.parent / "examples"
ALLOWED = {"lichen", "numpy", "sklearn", "torch"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracies(text: str) -> dict[int, float]:
    return {
        int(number): float(value) for number, value in re.findall(r"^ *round (\d+): accuracy ([\d.]+)$", text, re.M)
    }


def test_every_name_has_one_line() -> None:
    heads = re.findall(r"^- ((?:``\w+``(?:, )?)+): ", str(fl.__doc__), re.M)
    listed = [name for head in heads for name in re.findall(r"``(\w+)``", head)]
    # The optimizer of a work is told in the work's line.
    assert sorted([*listed, "ClientOptimizer"]) == sorted(fl.__all__)
    assert all(getattr(fl, name) is not None for name in fl.__all__)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("lichen", {"torch", "numpy", "pydantic", "rich"}), ("lichen.fl", {"transformers", "peft", "pydantic", "rich"})],
)
def test_an_import_loads_little(module: str, heavy: set[str]) -> None:
    source = f"import {module}, sys; print(*sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == []


def test_the_example_imports_nothing_but_the_public_api() -> None:
    tree = ast.parse((EXAMPLES / "fedavg.py").read_text(encoding="utf-8"))
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [node for node in named if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lichen")]
    assert [(node.module, [alias.name for alias in node.names]) for node in ours] == [("lichen", ["fl"])]
    tops = {
        name.split(".")[0]
        for node in named
        for name in ([str(node.module)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert tops <= ALLOWED | set(sys.stdlib_module_names)
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "fl"}
    assert used <= set(fl.__all__)


def test_the_example_learns_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("fedavg")
    said = accuracies(str(example.__doc__))
    example.main()
    printed = accuracies(capsys.readouterr().out)
    assert list(printed) == list(said) == [10, 20, 30, 40, 50]
    # Kernels of other processors round otherwise, so that a few of 397 rows may change their class.
    assert all(printed[number] == pytest.approx(said[number], abs=0.03) for number in said)
    assert printed[50] > 0.8


def test_the_round_of_the_example_is_that_of_average(tmp_path: Path) -> None:
    example = load("fedavg")
    example.INVITED = example.CLIENTS  # each draws its clients by a seed of its own
    network = example.Network(10, name="network")
    train = fl.ClientTask(
        work=fl.Train(network), source=fl.TrainSource(example.shards(slice(0, 400)), batch_size=8, steps=3)
    )
    test = fl.ClientTask(
        work=fl.Evaluate(network), source=fl.EvalSource(example.shards(slice(400, 600)), batch_size=64)
    )

    def shared(algorithm: fl.Algorithm, name: str) -> str:
        engine = fl.LocalEngine({"train": train, "test": test}, fl.ClientStore(tmp_path / name))
        return digest(fl.run(algorithm, engine, lambda: Shared(network.init(0)), rounds=3, seed=7).shared.flat())

    average = fl.Average(
        aggregator=fl.Mean(),
        optimizer=fl.ServerSGD(),
        sampler=fl.Everyone(),
        weight_N=torch.ones(10),
        rounds=3,
        valid=None,
    )
    assert shared(example.FedAvg(), "example") != digest(network.init(0))
    assert shared(average, "average") == shared(example.FedAvg(), "again")

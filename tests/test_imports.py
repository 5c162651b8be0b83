"""Imports run one way: down the floors, never between rooms of one floor, never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lichen

FLOORS = (
    ("core",),
    ("models", "data", "transforms", "server"),
    ("clients",),
    ("engines", "algorithms"),
    ("trust", "present", "allocator"),
    ("recipes",),
    ("shell",),
    ("cli_cache", "cli_compare", "cli_init", "cli_look", "cli_run"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOT = Path(lichen.__file__).parent


def module_of(path: Path, root: Path) -> str:
    parts = ["lichen", *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, package: bool) -> set[str]:
    """Every lichen name a file imports, at its top, in functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*home, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "lichen" or name.startswith("lichen.")}


def graph(root: Path) -> dict[str, set[str]]:
    """Which file imports which, names of a module counting as the module."""
    files = {module_of(path, root): path for path in root.rglob("*.py")}
    arrows: dict[str, set[str]] = {}
    for module, path in files.items():
        named = imports(path.read_text(encoding="utf-8"), module, package=path.name == "__init__.py")
        targets = {name if name in files else name.rpartition(".")[0] for name in named}
        # `from lichen.x import y` names the package too; only where y is no file is that what is meant.
        deepest = {t for t in targets if not any(other.startswith(t + ".") for other in targets)}
        arrows[module] = {t for t in deepest if t in files and t != module}
    return arrows


def faults(arrows: dict[str, set[str]]) -> list[str]:
    """Arrows up or across."""
    found = []
    for module, targets in arrows.items():
        if module == "lichen":
            continue
        room = module.split(".")[1]
        if room not in FLOOR:
            found.append(f"{module}: the room {room!r} is on no floor")
            continue
        for target in targets - {"lichen"}:
            other = target.split(".")[1]
            if other != room and FLOOR.get(other, 99) >= FLOOR[room]:
                found.append(f"{module} imports {target}")
    return sorted(found)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of files, empty where there is none."""
    state: dict[str, str] = {}

    def visit(module: str, trail: list[str]) -> list[str]:
        if state.get(module) == "done":
            return []
        if module in trail:
            return [*trail[trail.index(module) :], module]
        for target in sorted(arrows.get(module, ())):
            found = visit(target, [*trail, module])
            if found:
                return found
        state[module] = "done"
        return []

    return next((found for module in sorted(arrows) if (found := visit(module, []))), [])


def test_no_arrow_up_or_across() -> None:
    arrows = graph(ROOT)
    assert len(arrows) > 20
    assert faults(arrows) == []


def test_no_circle() -> None:
    arrows = graph(ROOT)
    # The package itself names `run` for its users, and every room may read its version.
    assert circle({module: targets for module, targets in arrows.items() if module != "lichen"}) == []


def test_the_package_imports_nothing_at_its_top() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or "" for node in top} | {a.name for n in top for a in n.names}
    assert not any(name.startswith("lichen") or name == "torch" for name in names)


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("core/a.py", "def f():\n    from lichen.server import mean\n", "lichen.core.a imports lichen.server.mean"),
        ("data/a.py", "import lichen.models.lora\n", "lichen.data.a imports lichen.models.lora"),
        ("present/a.py", "from ..recipes.read import read_recipe\n", "lichen.present.a imports lichen.recipes.read"),
        ("attic/a.py", "", "lichen.attic.a: the room 'attic' is on no floor"),
    ],
)
def test_the_walk_sees_faults(tmp_path: Path, path: str, source: str, fault: str) -> None:
    for file in ("server/mean.py", "models/lora.py", "recipes/read.py", path):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / path).write_text(source)
    assert faults(graph(tmp_path)) == [fault]


def test_the_walk_sees_circles(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core/a.py").write_text("from lichen.core import b\n")
    (tmp_path / "core/b.py").write_text("def f():\n    from lichen.core.a import x\n")
    assert circle(graph(tmp_path)) == ["lichen.core.a", "lichen.core.b", "lichen.core.a"]

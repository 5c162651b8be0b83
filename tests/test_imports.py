"""Imports run one way: down the floors, never between rooms of one floor, never in a circle; no folder is crowded."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import house
import pytest

import lichen

FLOORS = (
    ("core",),
    ("declared",),
    ("models", "data", "transforms", "server"),
    ("fm",),
    ("clients", "audit", "serving"),
    ("engines", "algorithms", "tasks"),
    ("trust", "present", "allocator", "fl"),
    ("recipes", "research"),
    ("federation",),
    ("shell",),
    ("cli_local", "cli_traces", "cli_withdraw"),
    (
        "cli_audit",
        "cli_cache",
        "cli_card",
        "cli_compare",
        "cli_export",
        "cli_federation",
        "cli_forget",
        "cli_init",
        "cli_join",
        "cli_look",
        "cli_offsite",
        "cli_rebase",
        "cli_run",
    ),
    ("cli_owners", "cli_serve", "cli_verify"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOT = Path(lichen.__file__).parent


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


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """Which file imports which: to parse the package takes seconds."""
    return house.graph(ROOT)


def test_no_arrow_up_or_across(arrows: dict[str, set[str]]) -> None:
    assert len(arrows) > 20
    assert faults(arrows) == []


def test_no_circle(arrows: dict[str, set[str]]) -> None:
    # The package itself names `run` for its users, and every room may read its version.
    assert house.circle({module: targets for module, targets in arrows.items() if module != "lichen"}) == []


def test_all_but_research_is_reached_and_nothing_reaches_research(arrows: dict[str, set[str]]) -> None:
    files = {module for module in arrows if not any(other.startswith(f"{module}.") for other in arrows)}
    seen, todo = set[str](), [m for m in arrows if re.fullmatch(r"lichen\.(__main__|cli\w*|fl(\.testing)?)", m)]
    while todo:
        module = todo.pop()
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        source = (path if path.exists() else path.with_suffix("") / "__init__.py").read_text(encoding="utf-8")
        late = set(re.findall(r'"(lichen\.[\w.]+)[":]', source)) & arrows.keys()  # imported when asked for
        todo += [target for target in arrows[module] | late if target not in seen and target != "lichen"]
        seen.add(module)
    research = {module for module in files if module.startswith("lichen.research.")}
    assert len(research) > 10
    assert seen.isdisjoint(research)
    assert files - seen == research


def test_every_folder_is_small_and_has_few_floors(arrows: dict[str, set[str]]) -> None:
    arrows = {module: targets for module, targets in arrows.items() if module != "lichen"}
    packages = {module.rpartition(".")[0] for module in arrows}
    rooms = {folder: inside for folder, inside in house.folders(arrows).items() if folder != "lichen"}
    assert len(rooms) > 20
    files = {folder: sum(room not in packages for room in inside) for folder, inside in rooms.items()}
    assert {folder: count for folder, count in files.items() if count > house.FILES} == {}
    assert {folder: around for folder, inside in rooms.items() if (around := house.circle(inside))} == {}
    assert {folder: high for folder, inside in rooms.items() if (high := house.floors(inside)) > house.FLOORS} == {}


def test_every_public_name_is_used_by_another_file(tmp_path: Path) -> None:
    assert house.unused_names(ROOT) == {}, "leave them out of __all__: python docs/house.py lists them"
    source = tmp_path / "src" / "lichen"
    source.mkdir(parents=True)
    (source / "a.py").write_text('__all__ = ["alone", "asked", "read"]\n')
    (source / "b.py").write_text("from lichen.a import read\n")
    (tmp_path / "page.md").write_text("`asked`\n")
    assert house.unused_names(source) == {"a.py": ["alone"]}


def test_peft_is_imported_in_one_place() -> None:
    # What it imports asks a hub for a kernel, unless it is told not to.
    files = Path(lichen.__file__).parent.rglob("*.py")
    pattern = re.compile(r"^ *(import|from) peft\b", re.MULTILINE)
    asks = [file.name for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    assert asks == ["quantized.py"]


def test_the_package_imports_nothing_at_its_top() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or "" for node in top} | {a.name for n in top for a in n.names}
    assert not any(name.startswith("lichen") or name == "torch" for name in names)


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("core/a.py", "def f():\n    from lichen.server import mean\n", "lichen.core.a imports lichen.server.mean"),
        ("data/a.py", "import lichen.models.adapters.lora\n", "lichen.data.a imports lichen.models.adapters.lora"),
        (
            "present/a.py",
            "from ..recipes.schema.read import read_recipe\n",
            "lichen.present.a imports lichen.recipes.schema.read",
        ),
        ("attic/a.py", "", "lichen.attic.a: the room 'attic' is on no floor"),
    ],
)
def test_the_walk_sees_faults(tmp_path: Path, path: str, source: str, fault: str) -> None:
    for file in ("server/mean.py", "models/adapters/lora.py", "recipes/schema/read.py", path):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / path).write_text(source)
    assert faults(house.graph(tmp_path)) == [fault]


def test_the_walk_sees_circles(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core/a.py").write_text("from lichen.core import b\n")
    (tmp_path / "core/b.py").write_text("def f():\n    from lichen.core.a import x\n")
    assert house.circle(house.graph(tmp_path)) == ["lichen.core.a", "lichen.core.b", "lichen.core.a"]


def test_the_walk_sees_circles_of_folders_and_counts_floors() -> None:
    arrows = {"lichen.a.x.one": {"lichen.a.y.two"}, "lichen.a.y.two": {"lichen.a.z"}, "lichen.a.z": set[str]()}
    inside = house.folders(arrows)["lichen.a"]
    assert (house.circle(inside), house.floors(inside)) == ([], 3)
    arrows["lichen.a.z"] = {"lichen.a.x.other"}
    arrows["lichen.a.x.other"] = set()
    assert house.circle(house.folders(arrows)["lichen.a"]) != []
    assert house.circle(arrows) == []

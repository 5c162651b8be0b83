"""Measure the house: files and floors of each folder, circles, long files, public names of several files.

``python docs/house.py`` prints it; ``tests/test_imports.py`` holds the bounds. A folder's floors are counted among its
own files and folders: each stands above all that it imports there.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lichen"
FILES, FLOORS = 16, 7
"""Bounds: files of a folder, and floors within one."""

Graph = Mapping[str, Iterable[str]]


def module_of(path: Path, root: Path) -> str:
    """The dotted name of a file."""
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


def graph(root: Path = SOURCE) -> dict[str, set[str]]:
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


def circle(arrows: Graph) -> list[str]:
    """One circle, empty where there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in done:
            return []
        if module in trail:
            return [*trail[trail.index(module) :], module]
        for target in sorted(arrows.get(module, ())):
            found = visit(target, [*trail, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := visit(module, []))), [])


def folders(arrows: Graph) -> dict[str, dict[str, set[str]]]:
    """For each folder, the arrows among the files and folders that lie directly in it."""
    packages = {module.rpartition(".")[0] for module in arrows} - {""}
    inside: dict[str, dict[str, set[str]]] = defaultdict(dict)
    for module in arrows:
        parts = module.split(".")
        for depth in range(1, len(parts)):
            inside[".".join(parts[:depth])].setdefault(".".join(parts[: depth + 1]), set())
    for module, targets in arrows.items():
        for target in set(targets) - packages if module not in packages else ():
            ours, theirs = module.split("."), target.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if depth:
                rooms = inside[".".join(ours[:depth])]
                rooms[".".join(ours[: depth + 1])].add(".".join(theirs[: depth + 1]))
    return inside


def floors(arrows: Graph) -> int:
    """The longest way down, counted in rooms; of a graph without circles."""
    height: dict[str, int] = {}

    def of(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((of(below) for below in arrows.get(room, ())), default=0)
        return height[room]

    return max((of(room) for room in arrows), default=0)


def public_names(root: Path = SOURCE) -> dict[str, list[str]]:
    """Names of ``__all__`` that several files define."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in set(ast.literal_eval(node.value)) & defined:
                    found[name].append(str(path.relative_to(root)))
    return {name: files for name, files in sorted(found.items()) if len(files) > 1}


def unused_names(root: Path = SOURCE) -> dict[str, list[str]]:
    """Names of ``__all__`` that no other file of the repository names, by file.

    A name counts as used where it stands as a word: in code, in a test, or in a document.
    """
    folders = [root, *(root.parents[1] / name for name in ("tests", "benchmarks", "docs", "examples"))]
    texts = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".yaml")]
    texts += root.parents[1].glob("*.md")
    files: dict[str, set[Path]] = defaultdict(set)
    for path in texts:
        for word in set(re.findall(r"[A-Za-z_]\w*", path.read_text(encoding="utf-8", errors="replace"))):
            files[word].add(path)
    return {
        str(path.relative_to(root)): unused
        for path in sorted(root.rglob("*.py"))
        if (unused := [name for name in _exported(path) if files[name] == {path}])
    }


def _exported(path: Path) -> list[str]:
    """What a file's ``__all__`` holds."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def main() -> int:
    arrows = {module: targets for module, targets in graph().items() if module != "lichen"}
    packages = {module.rpartition(".")[0] for module in arrows}
    print(f"{'folder':34} {'files':>5} {'folders':>7} {'floors':>6}  circle")
    for folder, rooms in sorted(folders(arrows).items()):
        if folder != "lichen":
            files, around = sum(room not in packages for room in rooms), circle(rooms)
            print(f"{folder:34} {files:5} {len(rooms) - files:7} {floors(rooms):6}  {' -> '.join(around) or '-'}")
    print(f"\ncircles of files: {' -> '.join(circle(arrows)) or 'none'}")
    lines = sorted(((len(p.read_text().splitlines()), p) for p in SOURCE.rglob("*.py")), reverse=True)
    print(f"longest file: {lines[0][0]} lines, {lines[0][1].relative_to(SOURCE)}")
    shared = public_names()
    print(f"public names that several files define: {len(shared)}")
    for name, files in shared.items():
        print(f"  {name}: {', '.join(files)}")
    unused = unused_names()
    public = sum(len(_exported(path)) for path in SOURCE.rglob("*.py"))
    print(f"public names: {public}; used by no other file: {sum(map(len, unused.values()))}")
    for file, names in unused.items():
        print(f"  {file}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

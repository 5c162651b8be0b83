"""docs/extending.md shows what is in its files, packages it in a way that works, and its own code runs."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.store import load_tree
from lichen.core.tree import digest
from lichen.recipes.schema.read import read_recipe

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "extending"
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.S | re.M)
FILES = sorted([*EXAMPLES.glob("*.py"), ROOT / "examples" / "regression.py"])


def excerpts() -> list[tuple[str, str]]:
    """``(file, lines of it)`` of the blocks that begin with a file's name."""
    found = [re.fullmatch(r"# (examples/\S+)\n(.*)", source, re.S) for language, source in BLOCKS]
    return [(one[1], one[2]) for one in found if one]


@pytest.mark.parametrize(("file", "lines"), excerpts())
def test_what_is_shown_stands_in_its_file(file: str, lines: str) -> None:
    assert lines in (ROOT / file).read_text(encoding="utf-8")


def test_every_file_is_shown() -> None:
    assert {ROOT / file for file, _ in excerpts()} == set(FILES)


def test_the_rest_of_the_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names: dict[str, object] = {"__name__": "extending"}
    own = [source for language, source in BLOCKS if language == "python" and not source.startswith("# examples/")]
    assert len(own) >= 2
    for source in own:
        exec(compile(source, "docs/extending.md", "exec", dont_inherit=True), names)


def test_the_entry_points_of_the_page_lead_to_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (page,) = [source for language, source in BLOCKS if language == "toml"]
    groups = tomllib.loads(page)["project"]["entry-points"]
    assert len(groups) == len(FILES)
    for group, points in groups.items():
        assert re.search(rf"^\| .*`{re.escape(group)}`", PAGE, re.M), group
        # The group is one that the source reads.
        assert any(f'"{group}"' in path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")), group
        for name, value in points.items():
            module, _, attribute = value.partition(":")
            member: Any = getattr(importlib.import_module(module), attribute)
            assert name in (getattr(member, "name", ""), getattr(getattr(member, "facts", None), "word", ""))


def test_messages_that_arrive_backwards_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of the page runs from a recipe, and gives the bytes of this process's own."""
    info = tmp_path / "site" / "backwards-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backwards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lichen.engines]\nbackwards = backwards:KIND\n")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    words = ["federation.rounds=2", "optimizer.lr=0.1", "compare.baselines=[]", "engine.clients_per_block=3"]
    learned = []
    for name in ("local", "backwards"):
        done = lichen.run(read_recipe("digits", [*words, f"engine.name={name}"]), out=tmp_path / name)
        learned.append(digest(load_tree(done.folder / "model" / "model.safetensors")[0]))
    assert learned[0] == learned[1]

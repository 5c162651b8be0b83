"""The documents say what is so: commands, keys, links and code in them are those of the package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import pytest

from lichen import cli
from lichen.recipes.schema.read import gallery, read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.yaml import load_yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
every = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def words(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def code(document: Path, *, without: tuple[str, ...] = ()) -> str:
    """What stands in code: fenced blocks, save those in some languages, and the words between backticks."""
    text = words(document)
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    blocks = [block for language, block in fenced if language not in without]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return "\n".join([*blocks, *spans])


def keys_script() -> Any:
    spec = importlib.util.spec_from_file_location("keys", ROOT / "docs" / "keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(document: Path) -> set[str]:
    """The names a heading can be linked by."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", words(document), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_documents_are_there() -> None:
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/guide.md", "docs/methods.md"} <= names
    numbers = sorted(path.name[:4] for path in ROOT.glob("docs/decisions/*.md"))
    assert numbers == [f"{n:04d}" for n in range(1, len(numbers) + 1)]
    assert len(numbers) >= 7


@every
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^(\w+):", words(ROOT / "Makefile"), re.M))
    named = set(re.findall(r"\bmake ([a-z]+)", code(document)))
    assert named <= targets
    if document.name == "README.md":
        assert {"demo", "test"} <= named


def test_the_demo_runs_a_recipe_of_the_gallery() -> None:
    (recipe,) = re.findall(r"lichen run (\S+)", words(ROOT / "Makefile"))
    assert recipe in gallery()


@every
def test_commands_and_their_options_exist(document: Path) -> None:
    commands = {name: app for name, app in ((n, cli.app[n]) for n in cli.app) if not name.startswith("-")}
    for name, rest in re.findall(r"^(?:\s*)lichen ([a-z]+(?:-[a-z]+)*)([^\n#]*)", code(document), re.M):
        assert name in commands, f"lichen {name}"
        inner = [word for word in rest.split()[:1] if word in commands[name]]
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", apply_help(name, *inner)))
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest)) <= known, f"lichen {name}{rest}"


def apply_help(*command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main([*command, "--help"]) == 0
    return out.getvalue()


def test_readme_and_guide_name_every_command() -> None:
    shown = {name for name in cli.app if not name.startswith("-") and cli.app[name].show}
    named = set(re.findall(r"\blichen ([a-z]+(?:-[a-z]+)*)", code(ROOT / "README.md") + code(ROOT / "CHANGELOG.md")))
    listed = set(re.findall(r"`([\w-]+)`", words(ROOT / "CHANGELOG.md").split("Commands:")[1].split("\n-")[0]))
    assert listed == shown
    assert shown - {"fetch"} <= named


def test_the_gallery_is_in_the_readme() -> None:
    table = words(ROOT / "README.md").split("## Recipes that come with it")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `([\w-]+)` \| (\w+) \|", table, re.M))
    assert {name: read_recipe(name).task for name in gallery()} == listed


def test_the_key_tables_are_those_of_the_schema() -> None:
    script, guide = keys_script(), words(ROOT / "docs" / "guide.md")
    assert script.fill(guide) == guide, "run: .venv/bin/python docs/keys.py"
    assert set(re.findall(r"<!-- keys: ([a-z_.]+) -->", guide)) == set(script.sections())


@every
def test_dotted_keys_exist(document: Path) -> None:
    known = {
        f"{path}.{name}"
        for path, section in keys_script().sections().items()
        if path != "recipe"
        for name in section.model_fields
    }
    named = {
        key
        for key in re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)+)", code(document, without=("python", "text")))
        if key.split(".")[0] in Recipe.model_fields and not key.endswith((".yaml", ".py"))
    }
    assert named <= known


def test_a_key_that_is_gone_is_seen(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("Set `optimizer.rate`, then ```x```.\n")
    with pytest.raises(AssertionError):
        test_dotted_keys_exist(tmp_path / "page.md")


def test_recipes_in_the_guide_are_read() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", words(ROOT / "docs" / "guide.md"), re.S | re.M)
    assert len(blocks) >= 4
    for block in blocks:
        value = load_yaml(block, where="guide")
        read_recipe({"task": "chat", "model": {"name": "smollm2-135m"}, "data": {"name": "chitchat"}, **value})


@every
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", words(document)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


@every
def test_no_path_outside_the_repository(document: Path) -> None:
    absolute = re.findall(r"(?<![\w./:<*)`-])/[a-z][\w.-]*(?:/[\w.-]+)+", words(document))
    quoted = re.findall(r"`(?:/|~/|\.\./\.\.)[\w.-][^`]*`", words(document))
    assert absolute + quoted == []


@every
def test_files_named_in_the_text_exist(document: Path) -> None:
    named = re.findall(r"`((?:docs|tests|benchmarks|src)/[\w./-]+)`", words(document))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_rooms_of_the_readme_are_those_of_the_package() -> None:
    listed = set(re.findall(r"^  (\w+)/ ", words(ROOT / "README.md"), re.M))
    rooms = {path.parent.name for path in (ROOT / "src" / "lichen").glob("*/*.py")}
    assert listed == rooms


def test_python_in_the_guide_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "guide"}
    blocks = re.findall(
        r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", words(ROOT / "docs" / "guide.md"), re.S | re.M
    )
    assert sum(bool(said) for _, said in blocks) >= 2
    for source, said in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, "docs/guide.md", "exec", dont_inherit=True), names)
        assert out.getvalue() == said


def test_the_error_in_the_guide_is_the_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "digits", "-s", "optimizer.lrr=1"]) == 2
    assert capsys.readouterr().err.strip() in words(ROOT / "docs" / "guide.md")


def test_every_method_names_its_file_and_paper() -> None:
    entries = words(ROOT / "docs" / "methods.md").split("\n## ")[1:]
    assert len(entries) >= 9
    for entry in entries:
        files = re.findall(r"\]\(\.\./(src/[\w/.]+\.py)\)", entry)
        assert files, entry[:30]
        papers = set(re.findall(r"<https://arxiv\.org/abs/([\d.]+)>", entry))
        cited = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        assert papers, entry[:30]
        assert {paper for paper in papers if paper not in cited} == set(), entry[:30]

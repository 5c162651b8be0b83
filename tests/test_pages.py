"""Every number in a table of a page comes from a result that is kept, or says that it was taken once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def check(*pages: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "pages.py"), "--check", *map(str, pages)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=120)


def test_the_tables_are_what_the_results_say() -> None:
    done = check()
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


TABLE = "| a | b |\n|---|---:|\n| x | 1 |\n"
FROM = "<!-- from: python benchmarks/tables.py drift -->\n"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (TABLE, ":1: no mark says where the table comes from"),
        (f"{FROM}{TABLE}<!-- end -->\n", ":2: | a | b |\n  `python benchmarks/tables.py drift` prints: | method |"),
        (f"{FROM}{TABLE}", "no '<!-- end -->' follows"),
        ("<!-- from: python src/lichen/cli.py list -->\n<!-- end -->\n", "is not `python benchmarks/NAME.py ...`"),
        ("<!-- from: python benchmarks/paired.py nowhere FedIT -->\n<!-- end -->\n", "fails: FileNotFoundError"),
    ],
)
def test_a_table_that_is_not_from_a_result_is_named_with_its_line(tmp_path: Path, page: str, said: str) -> None:
    file = tmp_path / "page.md"
    file.write_text(page, encoding="utf-8")
    done = check(file)
    assert done.returncode == 1
    assert said in done.stdout


def test_a_table_of_words_and_one_that_was_taken_once_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    words = TABLE.replace("---:", "---")
    file.write_text(f"{words}\n*Taken once, 2026-11-22: `python benchmarks/plan.py`.*\n\n{TABLE}", encoding="utf-8")
    assert check(file).returncode == 0

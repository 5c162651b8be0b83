"""Every run that a test of recipes finishes is held against the list of kinds of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _kinds() -> Iterator[None]:
    """A file of a finished run that no kind knows fails the test that ran it: a withdrawal would not know it either."""
    from lichen.core.files.manifest import files_in
    from lichen.recipes import run
    from lichen.recipes.artifacts.withdrawn.kinds import kind_of

    seal = run.seal_run

    def sealed(folder: Path) -> None:
        seal(folder)
        unknown = [name for name in files_in(folder) if kind_of(name) is None]
        assert not unknown, f"src/lichen/recipes/artifacts/withdrawn/kinds.py has no entry for {unknown}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "seal_run", sealed)
        yield

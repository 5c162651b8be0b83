"""What a site checks before it connects: its file and columns, its policy, and the models that the policy names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.visible import clipped
from lichen.data.sources.entries import CATALOG
from lichen.data.sources.fetch import fetch_entry
from lichen.data.sources.files import read_notes
from lichen.federation.kits.settle import Kit, open_site_kit
from lichen.federation.leaving.marker import refuse_left
from lichen.federation.policy.keys import POLICY, digest_of, read_policy
from lichen.recipes.assemble.sides.fingerprints import read_keys
from lichen.recipes.init.init import columns_in
from lichen.recipes.init.names import HOLDS

__all__ = ["check_before"]

_FILES, _COLUMNS = 64, 20
"""Files of a folder, and columns, of which something is told."""


def check_before(folder: Path, data: Path, *, secret: Path | None = None, say: Callable[[str], None]) -> Kit:
    """Read what a site needs, as it will be read when a recipe comes; models that are not here yet are fetched.

    Args:
        folder: The site's kit.
        data: The site's file or folder.
        secret: The key of its owner, or a folder of keys; None: it has none.
        say: Told what was found, a line each.

    Returns:
        The kit.

    Raises:
        LichenError: for the first fault.
    """
    kit = open_site_kit(folder)
    refuse_left(folder)
    policy = read_policy(folder / POLICY)
    _look(data, say)
    for file, one in read_keys(secret).items() if secret is not None else ():
        say(f"{file}: a secret key, of which the digest {one.digest} is announced")
    for model in policy.models:
        name = model.partition("@")[0]
        if name in CATALOG:
            fetch_entry(name, say=say)
        elif name and digest_of(model) is None and not Path(name).exists() and "/" not in name:
            where = f"{folder / POLICY}: models"
            raise LichenError(f"{name!r} is no model of the catalog and no folder", where=where, fix="see: lichen list")
    if not policy.models and not policy.from_scratch:
        say(f"the policy allows no model, so that this site will say no to every recipe; see {folder / POLICY}")
    return kit


def _look(data: Path, say: Callable[[str], None]) -> None:
    """Tell what the file has; which columns are learned, and from whom they are, is for recipes to say."""
    columns = columns_in(data)
    say(f"{data}: {columns[0].rows:,} rows looked at")
    for line in read_notes(data.expanduser(), most=_FILES):
        say(line)
    for column in columns[:_COLUMNS]:
        say(f"  {clipped(column.name, 60)}: {HOLDS[column.kind]}")
    if len(columns) > _COLUMNS:
        say(f"  and {len(columns) - _COLUMNS:,} more columns")

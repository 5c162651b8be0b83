"""What a site checks before it connects: its file and columns, its policy, and the models that the policy names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.data.sources.entries import CATALOG
from lichen.data.sources.fetch import fetch_entry
from lichen.federation.kits.settle import Kit, open_kit
from lichen.federation.policy.keys import POLICY, digest_of, read_policy
from lichen.recipes.init.init import guess

__all__ = ["check_before"]


def check_before(folder: Path, data: Path, *, say: Callable[[str], None]) -> Kit:
    """Read what a site needs, as it will be read when a recipe comes; models that are not here yet are fetched.

    Args:
        folder: The site's kit.
        data: The site's file or folder.
        say: Told what was found, a line each.

    Returns:
        The kit.

    Raises:
        LichenError: for the first fault, as ``lichen init`` and ``lichen federation policy`` have it.
    """
    kit = open_kit(folder)
    if kit.kind != "site":
        raise LichenError("is the server's kit", where=str(folder), fix="start it with: lichen serve FOLDER")
    policy = read_policy(folder / POLICY)
    for line in guess(data).lines:
        say(line)
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

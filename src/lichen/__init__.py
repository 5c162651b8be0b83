"""Lichen: federated learning and foundation models, each making the other better.

The commands, in Python:

- ``run``: run a recipe to its end, and get a ``Result``.
- ``plan``: what a recipe will take on this machine: seconds, bytes, memory, disk, energy.
- ``compare``: run several recipes over several seeds, and get one table of them.
- ``report``: read finished runs, as a ``RunReport``; printed, it is their table.
- ``talk``: ask the bare model and a run's own the same thing.
- ``replay``: compute a run's model again from the messages it retained, whole or without some clients.
- ``forget``: make a run beside a finished one, to which a client never came.
- ``export``: write what a run learned as files that other tools load.
- ``verify``: hold a finished run's folder, or an adapter's, against what was signed.
- ``read_recipe``: read and check a recipe, a ``Recipe``, without running it.
- ``LichenError``: bad input, as what, where and the fix.
- ``fl``: contracts and parts for one's own algorithms (:mod:`lichen.fl`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LichenError",
    "Recipe",
    "Result",
    "RunReport",
    "compare",
    "export",
    "fl",
    "forget",
    "plan",
    "read_recipe",
    "replay",
    "report",
    "run",
    "talk",
    "verify",
]

if TYPE_CHECKING:
    from lichen import fl
    from lichen.core.errors import LichenError
    from lichen.recipes.artifacts.verify import verify
    from lichen.recipes.compare import compare
    from lichen.recipes.plan.plan import plan
    from lichen.recipes.quantize.export import export
    from lichen.recipes.run import Result, RunReport, replay, report, run, talk
    from lichen.recipes.schema.read import read_recipe
    from lichen.recipes.schema.recipe import Recipe
    from lichen.recipes.withdrawal.forget import forget

_HOMES = {
    "LichenError": "lichen.core.errors",
    "Recipe": "lichen.recipes.schema.recipe",
    "Result": "lichen.recipes.run",
    "RunReport": "lichen.recipes.run",
    "compare": "lichen.recipes.compare",
    "export": "lichen.recipes.quantize.export",
    "forget": "lichen.recipes.withdrawal.forget",
    "plan": "lichen.recipes.plan.plan",
    "read_recipe": "lichen.recipes.schema.read",
    "replay": "lichen.recipes.run",
    "report": "lichen.recipes.run",
    "run": "lichen.recipes.run",
    "talk": "lichen.recipes.run",
    "verify": "lichen.recipes.artifacts.verify",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that ``import lichen`` stays quick."""
    from importlib import import_module

    if name == "fl":
        return import_module("lichen.fl")
    if name not in _HOMES:
        raise AttributeError(f"module 'lichen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

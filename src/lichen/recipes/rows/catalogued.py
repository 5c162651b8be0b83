"""Makes the data card of a catalogue's data set from what the catalogue knows of it."""

from __future__ import annotations

from lichen.data.cards.licences import licence_of
from lichen.data.sources.entries import Entry
from lichen.recipes.rows.data_card import DataCard

__all__ = ["catalogued_card"]

_SPDX = {
    "clothing-reviews": "LicenseRef-not-stated",
    "medmcqa": "LicenseRef-MedMCQA",
    "mnist-5k": "BSD-3-Clause AND CC-BY-SA-3.0",
    "digits": "CC-BY-4.0",
}
"""Where the catalogue has words in place of an identifier."""

_NOBODY = ("medmcqa", "advbench", "harmbench", "mnist-5k", "fashion-mnist", "digits")
"""Whose rows are about nobody; of others the catalogue knows no basis."""

_OPEN = ("research", "commercial", "training", "evaluation")
"""What a public licence grants; terms that SPDX does not list are for a person to read."""

_PAGES = {
    "pypi": "https://pypi.org/project/{}/",
    "npm": "https://www.npmjs.com/package/{}",
    "debian": "https://packages.debian.org/{}",
    "bundled": "comes with the package {}",
}


def catalogued_card(entry: Entry) -> DataCard:
    """A card whose owner is the package; without a digest, since what was fetched was held against the catalogue's.

    Raises:
        LichenError: if the catalogue's licence is no expression.
    """
    licence = licence_of(_SPDX.get(entry.name, entry.licence), where=f"catalog, {entry.name}")
    return DataCard(
        owner=f"the package {entry.package}",
        source=_PAGES[entry.registry].format(entry.package),
        licence=licence,
        consent="none_needed" if entry.name in _NOBODY else None,
        purposes=() if "LicenseRef-" in licence else _OPEN,
    )

"""A data set as another package brings it: one function that gives its rows, and one entry point.

It is scikit-learn's copy of the wines of three cultivars: 178 rows of 13 measured substances. A recipe then says
``data: {name: wine, partition: {by: dirichlet, clients: 5}}``, and ``pyproject.toml``::

    [project.entry-points."lichen.datasets"]
    wine = "wine:WINE"

References:
    Stefan Aeberhard, Danny Coomans and Olivier de Vel. "Comparative analysis of statistical pattern recognition methods
    in high dimensional settings." Pattern Recognition 27(8), 1994.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.datasets import load_wine

from lichen.core.errors import LichenError
from lichen.data.sources.datasets import Dataset
from lichen.data.sources.record import Record


def read(columns: Mapping[str, str]) -> list[Record]:
    """One record a wine: its measures between 0 and 1, its cultivar as label; nobody owns a row."""
    if columns:
        raise LichenError("wine has no columns to choose", where="data.columns", fix="leave it out")
    x_NF, y_N = load_wine(return_X_y=True)
    x_NF = (x_NF - x_NF.min(0)) / (x_NF.max(0) - x_NF.min(0))
    pairs = zip(x_NF.astype(np.float32), y_N, strict=True)
    return [Record(client="", features=x_F, label=f"cultivar {y + 1}") for x_F, y in pairs]


WINE = Dataset(name="wine", read=read)

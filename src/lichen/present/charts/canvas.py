"""What pictures of a run have in common: paper, axes, a title, a file of equal bytes for equal data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.core.files.durable import write_atomic
from lichen.present.charts.fonts import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GREY", "figure_of", "plain", "quiet", "run_name", "save_png", "title_of"]

GREY = "#555555"


def figure_of(width: float, height: float) -> Figure:
    """A white sheet of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quiet(axes: Axes) -> None:
    """Axes that leave the eye to the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(colors=GREY, labelsize=9)
    axes.grid(True, color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def save_png(figure: Figure, path: Path) -> Path:
    """Write a picture; its path is given back."""
    write_atomic(path, _painted(figure))
    return path


def _painted(figure: Figure) -> bytes:
    data = io.BytesIO()
    # No software name and no date: equal data give equal bytes.
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def plain(text: str) -> str:
    """Text as it stands: matplotlib would read dollar signs as mathematics."""
    return text.replace("$", r"\$")


def run_name(folder: Path) -> str:
    """How the run is called: by its summary if it is finished, else by its recipe, else by its folder."""
    import yaml

    found: Any = {}
    try:
        if (folder / "summary.json").is_file():
            found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        elif (folder / "recipe.yaml").is_file():
            found = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        found = {}
    found = found if isinstance(found, dict) else {}
    return str(found.get("name") or folder.resolve().name)


def title_of(folder: Path) -> str:
    """The run's name, or what can be drawn in its place."""
    names = (run_name(folder), folder.resolve().name)
    return next((name for name in names if drawable(name)), "run")

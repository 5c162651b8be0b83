"""Formats bytes, durations, counts and scores for people."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "count_text", "joules_text", "score_text", "seconds_text"]


def bytes_text(size: float) -> str:
    """Bytes in decimal units (1 kB = 1000 B).

    >>> bytes_text(0), bytes_text(999), bytes_text(98_362_432)
    ('0 B', '999 B', '98.4 MB')
    """
    return _scaled(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def count_text(number: float) -> str:
    """A count with a decimal prefix.

    >>> count_text(950), count_text(12_345)
    ('950', '12.3k')
    """
    return _scaled(number, ("", "k", "M", "G", "T", "P"), glue="")


def joules_text(joules: float) -> str:
    """Energy in joules, from a kilowatt-hour's tenth on in kilowatt-hours too.

    >>> joules_text(950), joules_text(12_345), joules_text(7.2e6)
    ('950 J', '12.3 kJ', '7.2 MJ (2.0 kWh)')
    """
    text = _scaled(joules, ("J", "kJ", "MJ", "GJ", "TJ"))
    return text if joules < 3.6e5 else f"{text} ({joules / 3.6e6:.1f} kWh)"


def _scaled(number: float, names: tuple[str, ...], glue: str = " ") -> str:
    step = 0
    while abs(number) >= 999.5 and step < len(names) - 1:
        number, step = number / 1000, step + 1
    text = f"{number:.0f}" if step == 0 or abs(number) >= 99.95 else f"{number:.1f}"
    return f"{text}{glue}{names[step]}".rstrip()


def seconds_text(seconds: float) -> str:
    """A duration in seconds as text.

    >>> seconds_text(7.26), seconds_text(75), seconds_text(7322)
    ('7.3s', '1m15s', '2h02m')
    """
    if not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def score_text(value: float | None) -> str:
    """A score with four significant digits, a dash where there is none.

    >>> score_text(0.81234), score_text(None)
    ('0.8123', '-')
    """
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"

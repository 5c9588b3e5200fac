"""Numbers as people read them. Every function takes None, where a figure is missing, and gives a dash."""

from __future__ import annotations

import math
from typing import TypeGuard

MISSING = "–"
MINUS = "−"
ARROW = "→"


def count(number: float | None) -> str:
    """A count: 2425 -> "2,425", 22713216 -> "22.7 M"; three digits from a million on."""
    if not _given(number):
        return MISSING
    if abs(number) < 1e6:
        return f"{number:,.0f}".replace("-", MINUS)
    return _scaled(number, 1e3, ("", " k", " M", " G", " T", " P", " E"))


def size(number: float | None) -> str:
    """Bytes in decimal units: 90897408 -> "90.9 MB"."""
    if not _given(number):
        return MISSING
    return _scaled(number, 1e3, (" B", " kB", " MB", " GB", " TB", " PB"))


def seconds(number: float | None) -> str:
    """A duration: 0.0042 -> "4.2 ms", 75 -> "1 min 15 s"."""
    if not _given(number):
        return MISSING
    if abs(number) < 0.9995e-3:
        return f"{number * 1e6:.0f} µs"
    if abs(number) < 0.9995:
        return f"{_digits(number * 1e3)} ms"
    if abs(number) < 59.5:
        return f"{_digits(number)} s"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes} min {rest:02d} s"


def percent(fraction: float | None) -> str:
    """A share: 0.031 -> "3.1 %", 0.0004 -> "0.04 %", 0.000001 -> "<0.001 %"."""
    if not _given(fraction):
        return MISSING
    value = 100 * fraction
    if 0 < abs(value) < 0.001:
        return "<0.001 %"
    if 0 < abs(value) < 0.095:
        return f"{value:.1g} %".replace("-", MINUS)
    if abs(value) < 9.95 and value != round(value):
        return f"{value:.1f} %".replace("-", MINUS)
    return f"{value:,.0f} %".replace("-", MINUS)


def change(before: float | None, after: float | None) -> str:
    """A relative change: 254, 231 -> "−9.1 %"; "same" where there is none."""
    if not _given(before) or not _given(after):
        return MISSING
    if before == after:
        return "same"
    if before == 0:
        return "new"
    share = percent(abs(after / before - 1))
    sign = "+" if after > before else MINUS
    return share if share.startswith("<") else f"{sign}{share}"


def difference(before: float | None, after: float | None, *, in_bytes: bool = False) -> str:
    """An absolute change: "−23", "+1.2 MB", "0" where there is none."""
    if not _given(before) or not _given(after):
        return MISSING
    delta = after - before
    shown = size(abs(delta)) if in_bytes else count(abs(delta))
    return "0" if delta == 0 else f"{'+' if delta > 0 else MINUS}{shown}"


def ratio(number: float | None) -> str:
    """A ratio of times: 0.928 -> "0.93×"."""
    return MISSING if not _given(number) else f"{number:.2f}×"


def error(number: float | None) -> str:
    """A numerical error: 0 stays "0", else two digits: "3.1e-07"."""
    if not _given(number):
        return MISSING
    return "0" if number == 0 else f"{number:.1e}"


def plural(number: int, noun: str, many: str = "") -> str:
    """ "1 probe", "12 probes"."""
    return f"{count(number)} {noun if number == 1 else many or noun + 's'}"


def _given(number: float | None) -> TypeGuard[float]:
    return isinstance(number, (int, float)) and math.isfinite(number)


def _scaled(number: float, base: float, units: tuple[str, ...]) -> str:
    value, index = abs(float(number)), 0
    while value >= 999.5 and index < len(units) - 1:
        value, index = value / base, index + 1
    sign = MINUS if number < 0 else ""
    return f"{sign}{value:.0f}{units[0]}" if index == 0 else f"{sign}{_digits(value)}{units[index]}"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    magnitude = abs(value)
    places = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{places}f}"

"""Formatting of numbers, the same in the start-up summary, on the progress line and in reports."""

from __future__ import annotations

import math


def number(value: float, digits: int = 4) -> str:
    """Return a number with significant digits, without an exponent if that is short: 3.142, 12,345, 1.20e-05."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    if value == 0:
        return "0"
    magnitude = abs(value)
    if 1e-3 <= magnitude < 1e6:
        decimals = max(digits - 1 - math.floor(math.log10(magnitude)), 0)
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text and magnitude >= 100 else text
    return f"{value:.{max(digits - 2, 0)}e}"


def count(value: float) -> str:
    """Return a count with a decimal prefix: 950, 12.3k, 4.56M, 19.6B."""
    return _scaled(value, 1000.0, ("", "k", "M", "B", "T"))


def size(value: float) -> str:
    """Return bytes with a binary prefix: 512 B, 12.3 MiB."""
    return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def decimal_size(value: float) -> str:
    """Return bytes with a decimal prefix, the unit of bandwidths: 512 B, 2.68 GB."""
    return _scaled(value, 1000.0, (" B", " kB", " MB", " GB", " TB", " PB"))


def short_time(seconds: float) -> str:
    """Return a time with three digits in the unit that suits it: 310 µs, 7.36 ms, 1.29 s, 3:12 above a minute."""
    if not math.isfinite(seconds) or seconds >= 60:
        return duration(seconds)
    unit, factor = ("s", 1.0) if seconds >= 0.9995 else ("ms", 1e3) if seconds >= 0.9995e-3 else ("µs", 1e6)
    return f"{number(seconds * factor, 3)} {unit}"


def flops(value: float) -> str:
    """Return floating-point operations with a decimal prefix: 167 GFLOP."""
    return _scaled(value, 1000.0, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP"))


def percent(fraction: float) -> str:
    """Return a fraction in per cent: 0.4231 as 42.3 %."""
    return f"{100 * fraction:.1f} %" if math.isfinite(fraction) else "–"


def duration(seconds: float) -> str:
    """Return a duration: 0.8 s, 12 s, 3:12, 2:05:07, 3 d 02:10."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minutes}:{second:02}" if minutes else f"{second} s"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return "–"
    power = 0
    # 999.5 would be rounded to 1000, so it gets the next unit.
    while abs(value) >= base - base / 2000 and power < len(units) - 1:
        value /= base
        power += 1
    if power == 0:
        return f"{value:.3g}{units[0]}" if value != int(value) else f"{int(value)}{units[0]}"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}{units[power]}"

"""Numbers as people read them."""

from __future__ import annotations


def compact(number: float, unit: str = "") -> str:
    """Three digits and an SI prefix: 532, 37.0 k, 25.6 M, 4.11 G."""
    scaled, prefix = float(number), ""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(scaled) < 999.5 or prefix == "T":
            break
        scaled /= 1000
    digits = 0 if not prefix or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def arrow(before: int, after: int) -> str:
    """``before → after``, or just the one number where it shows no change."""
    a, b = compact(before), compact(after)
    return a if a == b else f"{a} → {b}"


def difference(before: int, after: int) -> str:
    """Signed change of a count; empty for none."""
    return "" if before == after else f"{'−' if after < before else '+'}{abs(after - before)}"


def percent(before: int, after: int) -> str:
    """Signed change in percent; empty for none."""
    if before == after or not before:
        return ""
    change = 100 * (after - before) / before
    digits = 0 if abs(change) >= 10 else 1
    return f"{'−' if change < 0 else '+'}{abs(change):.{digits}f} %"


def seconds(time: float) -> str:
    """38 µs, 2.4 ms, 340 ms, 6.2 s, 2 min 5 s."""
    if time < 1e-3:
        return f"{time * 1e6:.0f} µs"
    if time < 9.95e-3:
        return f"{time * 1000:.1f} ms"
    if time < 1:
        return f"{time * 1000:.0f} ms"
    if time < 100:
        return f"{time:.1f} s"
    return f"{int(time) // 60} min {int(time) % 60} s"


def speed(before: float, after: float, *, measured: bool) -> str:
    """``1.84× faster, measured`` or ``predicted``; empty where there is no time or hardly a difference."""
    if before <= 0 or after <= 0 or 0.995 < before / after < 1.005:
        return ""
    ratio = max(before / after, after / before)
    times = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
    return f"{times}× {'faster' if before > after else 'slower'}, {'measured' if measured else 'predicted'}"


def error(value: float) -> str:
    """An error figure: two digits, or 0 where there is none."""
    return "0" if value == 0 else f"{value:.1e}"

"""Numbers as people read them: times, sizes, shares."""


def span(seconds: float) -> str:
    """A time to the second or the minute, in two units at most: ``13 min 05 s``."""
    whole = max(round(seconds), 0)
    for unit, length, part, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // smaller:02d} {part}"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits; a dash for an unknown figure."""
    return (
        "–"
        if value is None
        else f"{value:.{digits}g}"
        if abs(value) < 10**digits
        else f"{value:.0f}"
    )


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.2f} %"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def count(number: int) -> str:
    """So many parameters, in the unit that models are named by."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return (
                f"{number / size:.2f} {unit}"
                if unit == "billion"
                else f"{number / size:.1f} {unit}"
            )
    return f"{number:,}"

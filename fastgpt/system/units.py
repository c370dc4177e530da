"""Formats amounts for people."""


def counted(number: int, noun: str) -> str:
    """A number and a noun, in the plural unless the number is 1: "1 thread", "2,000 threads", "3 batches"."""
    ending = "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{ending}"


def format_bytes(count: int | None) -> str:
    if count is None:
        return "memory unknown"
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def format_exactly(count: int) -> str:
    """Bytes with three digits or more: "812 KiB", "34.1 MiB", "1,020 KiB"."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1023.5 or unit == "TiB":
            break
        size /= 1024
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:,.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """A time in its two largest units: "91 ms", "8.4 s", "5 min 20 s", "9 h 12 min", "3 d 4 h"."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, rest = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {rest} min"
    days, rest = divmod(round(seconds / 3600), 24)
    return f"{days:,} d {rest} h"


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

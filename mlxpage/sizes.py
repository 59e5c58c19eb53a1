"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6}
_UNITS |= {"G": 10**9, "T": 10**12}


def in_bytes(written: str | int) -> int | None:
    """Bytes of "4GB", "512MiB" or a number of bytes; None of anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(written))
    if not match or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()])


def gigabytes(size: int) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"

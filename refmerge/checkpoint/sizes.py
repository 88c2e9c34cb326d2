"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from refmerge.errors import UsageError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(size: int | str) -> int:
    """Bytes in "5GB", "500 MB", "1.5GB", "2GiB" or a number of bytes; decimal units unless an i stands in them.

    UsageError for anything else, and for sizes that are not a positive whole number of bytes.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        count, rest = size, 0
    else:
        match = (
            re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z]{0,3})", size) if isinstance(size, str) else None
        )
        if match is None or match[2].upper() not in _UNITS:
            raise UsageError(f"not a size: {size!r}; write it like 5GB, 500MB or 2GiB")
        whole, _, part = match[1].partition(".")
        count, rest = divmod(int(whole + part) * _UNITS[match[2].upper()], 10 ** len(part))
    if count < 1 or rest:
        raise UsageError(f"not a positive whole number of bytes: {size!r}")
    return count

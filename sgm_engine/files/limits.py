"""What a file may ask for: at most RATIO times the bytes that it holds, or SGM_FILE_MEMORY if that is more.

What a file declares (shapes, counts, sizes unpacked) is compared with this before anything is built or allocated.
SGM_FILE_MEMORY is in the environment: bytes, or such as 512M or 4G; 256M by default. Raise it for a file you trust.
"""

from __future__ import annotations

import os
import re

VARIABLE, DEFAULT = "SGM_FILE_MEMORY", "256M"
RATIO = 20  # what photographs and digits, deflated, do not reach
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Refused(ValueError):
    """What a gate refuses in a file: the reason is complete, the file's name may still be missing."""


def allowance() -> int:
    """Bytes that any file may ask for, however small it is."""
    text = os.environ.get(VARIABLE) or DEFAULT
    match = re.fullmatch(r"(\d{1,12})([KMGT]?)", text.strip().upper())
    if not match:
        raise ValueError(f"{VARIABLE} must be bytes, or such as 512M or 4G, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def most_bytes(held: int) -> int:
    """Bytes that a file of ``held`` bytes may take once unpacked."""
    return max(allowance(), RATIO * held)


def most_text() -> int:
    """Bytes of a JSON text: its objects take up to 25 times as much."""
    return allowance() // 16


def check_need(needed: int, held: int, what: str) -> None:
    """ValueError if ``what`` asks for more bytes than a file of ``held`` bytes may."""
    if needed > most_bytes(held):
        raise Refused(f"{what} asks for {size(needed)}, and its file has {size(held)}: {remedy(needed)}")


def remedy(needed: int) -> str:
    return f"if you trust it, raise the limit with {VARIABLE}={max(1, -(-needed // 2**30))}G"


def size(count: int) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"

"""Counts the scans of a JPEG: each costs a pass over all pixels, and a hundred bytes may hold one."""

import re

# Encoders write about ten. Pillow sets no limit; the engines' decoder stops after 500 (TJFLAG_LIMITSCANS).
MAX_SCANS = 100

_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")  # without those that have no length, but with the last one
_END, _SCAN = 0xD9, 0xDA


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG has more than `MAX_SCANS` scans. Reading its markers takes about a millisecond a megabyte."""
    at = num_scans = 0
    while (found := _MARKER.search(data, at)) and data[found.end() - 1] != _END:
        at = found.end()
        num_scans += data[at - 1] == _SCAN
        if num_scans > MAX_SCANS:
            return True
        at += int.from_bytes(data[at : at + 2], "big")
    return False

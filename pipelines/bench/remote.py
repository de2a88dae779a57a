"""Measures how fast blocks of remote shards arrive."""

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from pipelines.shards.pieces import Piece, RemoteFiles
from pipelines.shards.rows import num_bytes_of
from pipelines.shards.sharded_images import ShardedImages

_MOST = 64  # blocks of about 4 MB
_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class RangeSpeed:
    """Speed of some blocks of a data set, rows and images, with their checksums.

    Attributes:
        bytes_per_s: Of several requests at a time.
        img_per_s: Images of the same blocks.
        first_s: Time of the first block alone, with the connection.
        num: Number of blocks.
    """

    bytes_per_s: float
    img_per_s: float
    first_s: float
    num: int


def measure_ranges(images: ShardedImages, *, seconds: float, seed: int = 0) -> RangeSpeed:
    """Fetch blocks from random places, for about `seconds` and at most 64; nothing is kept.

    Raises:
        DataError: they cannot be read.
    """
    files, size = images.files, images.block_samples
    assert isinstance(files, RemoteFiles)
    num_blocks = -(-images.num_samples // size)
    chosen = np.random.default_rng(seed).choice(num_blocks, min(num_blocks, _MOST), replace=False).tolist()
    spans = iter(
        span for block in chosen for span in images.spans(block * size, min((block + 1) * size, images.num_samples))
    )
    start_s = time.perf_counter()
    first = files.read(*next(spans))
    first_s = time.perf_counter() - start_s
    found, pending = [first], deque[Future[Piece]]()
    start_s = time.perf_counter()
    while True:
        while len(pending) < _AT_ONCE and time.perf_counter() - start_s < seconds and (span := next(spans, None)):
            pending.append(files.submit(*span))
        if not pending:
            break
        found.append(pending.popleft().result())
    elapsed_s, measured = time.perf_counter() - start_s, found[1:]
    if not measured:  # all is one block
        elapsed_s, measured = first_s, found
    num_bytes = sum(int(num_bytes_of(piece.rows).sum()) for piece in measured)
    return RangeSpeed(
        bytes_per_s=num_bytes / elapsed_s,
        img_per_s=sum(len(piece.rows) for piece in measured) / elapsed_s,
        first_s=first_s,
        num=len(found),
    )

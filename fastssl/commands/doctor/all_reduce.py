"""One rank of the all-reduce benchmark of the doctor.

    python -m fastssl.commands.doctor.all_reduce BACKEND NUM_RANKS FOLDER RANK

The ranks rendezvous in FOLDER, and rank 0 writes its times to FOLDER/found.json, because NCCL prints on stdout.
"""

import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist

_NUM_TIMES = 20
_NUM_FLOATS = 4 << 20  # 16 MB
_TIMEOUT = timedelta(seconds=120)


def time_all_reduce(backend: str, num_ranks: int, folder: Path, rank: int) -> dict[str, float]:
    """Time the all-reduce; medians of 20 repetitions.

    Args:
        backend: gloo or nccl.
        num_ranks: Number of processes that make this call; with nccl, each on its own GPU.
        folder: Folder for the rendezvous; must be empty.
        rank: Rank of this process.

    Returns:
        latency_ms of one float, bytes_per_s of 16 MB.
    """
    store = torch_dist.FileStore(str(folder / "store"), num_ranks)  # pyright: ignore[reportPrivateImportUsage]
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=_TIMEOUT)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    small_s, large_s = (_median_s(torch.ones(num, device=device)) for num in (1, _NUM_FLOATS))
    torch_dist.destroy_process_group()
    return {"latency_ms": small_s * 1e3, "bytes_per_s": 4 * _NUM_FLOATS / large_s}


def _median_s(x: torch.Tensor) -> float:
    times_s = []
    for _ in range(_NUM_TIMES + 1):
        start_s = time.perf_counter()
        torch_dist.all_reduce(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:])  # the first one includes connection setup


if __name__ == "__main__":
    _, backend, num_ranks, folder, rank = sys.argv
    found = time_all_reduce(backend, int(num_ranks), Path(folder), int(rank))
    if rank == "0":
        Path(folder, "found.json").write_text(json.dumps(found))

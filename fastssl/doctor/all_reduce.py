"""One rank of the all-reduce that the doctor times: python -m fastssl.doctor.all_reduce BACKEND NUM_RANKS STORE RANK"""

import json
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as torch_dist

_NUM_TIMES = 20
_NUM_FLOATS = 4 << 20  # 16 MB
_TIMEOUT = timedelta(seconds=120)


def time_all_reduce(backend: str, num_ranks: int, store_path: str, rank: int) -> dict[str, float]:
    """Medians of 20 times.

    Returns:
        latency_ms of one float, bytes_per_s of 16 MB.
    """
    store = torch_dist.FileStore(store_path, num_ranks)  # pyright: ignore[reportPrivateImportUsage]
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
    return statistics.median(times_s[1:])  # the first one connects


if __name__ == "__main__":
    found = time_all_reduce(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    print(json.dumps(found))

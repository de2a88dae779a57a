"""Data sets of many shards: start-up of a billion images, local shards beside one file, a network of 1 Gbit/s, a cache.

    python benchmarks/bench_shards.py photographs/ --out benchmarks/results/shards.csv

The network is a namespace with `tc`'s token bucket (1 Gbit/s) and Debian's nginx behind it: this needs root, iproute2
and nginx, and is left out without. The photographs are taken several times, in another order in each shard.
"""

import argparse
import csv
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import psutil

from fastssl.tracking.result_rows import append_rows, environment_columns, format_table

PACKAGES = ("numpy", "numba", "torch", "obstore", "isal")
SHOWN = ("measured", "value", "unit", "target")
NUM_SHARDS, SHARD_IMAGES = 4_000, 250_000
LINK_MBIT = 1_000
_NAMESPACE, _HOST, _SERVER = "fastssl-bench", "10.99.7.1", "10.99.7.2"
_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{ access_log off; sendfile on; server {{ listen {host}:8080; root {root}; }} }}
"""
Row = dict[str, Any]


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="X.csv")
    parser.add_argument("--times", type=int, default=8, metavar="N", help="copies of each photograph (default: 8)")
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    args = parser.parse_args()
    rows = _in_process(start_up)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(args.photographs, folder, args.times)
        rows += _in_process(local, folder, args.num_workers, args.repetitions)
        with network(folder) as url:
            if url is None:
                print("bench_shards: needs root, ip, tc and nginx for the network: not measured", file=sys.stderr)
            else:
                rows += _in_process(remote, folder, url, args.num_workers, args.repetitions)
    print(format_table(rows, SHOWN))
    if args.out:
        append_rows(args.out, [row | environment_columns(PACKAGES) for row in rows])
        draw(rows, args.out.with_suffix(".png"))


def start_up() -> list[Row]:
    """A simulated manifest of 10^9 images: from its text to the first batch's ids, and positions in sequence."""
    from pipelines.shards.lane_reader import LanesOrder
    from pipelines.shards.manifest import Manifest, Shard
    from pipelines.shards.pieces import LocalFiles
    from pipelines.shards.sharded_images import ShardedImages

    image_bytes = 110_000 * SHARD_IMAGES
    shards = tuple(
        Shard(f"x-{k:05d}.beton", SHARD_IMAGES, image_bytes + (32 << 20), image_bytes, 0, f"{k:064x}")
        for k in range(NUM_SHARDS)
    )
    text = Manifest(
        shards, [f"class {k}" for k in range(1_000)], [SHARD_IMAGES * NUM_SHARDS // 1_000] * 1_000
    ).to_json()
    del shards
    used, start_s = psutil.Process().memory_info().rss, time.perf_counter()
    manifest = Manifest.from_json(text, "simulated")
    images = ShardedImages("simulated", manifest, LocalFiles(Path("simulated"), manifest))
    order = LanesOrder(images, global_batch_size=4_096, num_lanes=64, window_bytes=1_000_000_000, seed=0)
    stream = order.stream(0, 1, goes_on=False)
    stream.ids(0, range(order.slice_size))
    start_up_s = time.perf_counter() - start_s
    num, begin_s = 2_000, time.perf_counter()
    for step in range(num):
        stream.ids(0, range(step * order.slice_size, (step + 1) * order.slice_size))
    per_position_us = (time.perf_counter() - begin_s) / (num * 4_096) * 1e6
    memory_mb = (psutil.Process().memory_info().rss - used) / 1e6
    return [
        _row("10^9 images: manifest to the ids of the first batch", start_up_s, "s", "<= 5"),
        _row("10^9 images: memory of a process", memory_mb, "MB", "<= 200"),
        _row("10^9 images: a position in sequence", per_position_us, "us", "<= 1"),
    ]


def local(folder: Path, num_workers: int, num_repetitions: int) -> list[Row]:
    """Images per second of a whole epoch, one file in random order and shards in lanes in turn."""
    rates = _alternate({"one": folder / "one.beton", "shards": folder / "set"}, num_workers, num_repetitions)
    ratio = float(np.median(np.divide(rates["shards"], rates["one"])))
    return [
        _row("one local file, BYOL at 224 px", float(np.median(rates["one"])), "img/s"),
        _row("local shards, BYOL at 224 px", float(np.median(rates["shards"])), "img/s"),
        _row("local shards / one file, median of pairs", ratio, "", ">= 0.95"),
    ]


def remote(folder: Path, url: str, num_workers: int, num_repetitions: int) -> list[Row]:
    """Bytes through the network without decoding, the first batch, and epochs out of a cache that holds all."""
    from pipelines.loader import build_order, open_train_images
    from pipelines.shards.sharded_images import ShardedImages

    cfg = _config(url, num_workers, engine="synthetic")
    images = open_train_images(cfg)
    assert isinstance(images, ShardedImages)
    first_batch_bytes = build_order(images, cfg, 0).first_batch_bytes  # pyright: ignore (lanes)
    mb_per_s, first_s, plain_mb_per_s = [], [], []
    for epoch in range(num_repetitions):
        loader = _loader(_config(url, num_workers, engine="synthetic"))
        start_s, num_bytes = time.perf_counter(), 0
        for number, _ in enumerate(loader.epoch(epoch)):
            if not number:
                first_s.append(time.perf_counter() - start_s)
        num_bytes = images.manifest.image_bytes * len(loader) * cfg.global_batch_size / images.num_samples
        mb_per_s.append(num_bytes / (time.perf_counter() - start_s) / 1e6)
        loader.close()
        plain_mb_per_s.append(_plain_mb_per_s(url, images))
    link_mb_per_s = LINK_MBIT / 8
    cache = {"cache_dir": str(folder / "cache"), "cache_gb": 100.0}
    places = {"local": folder / "set", "cached": url}
    list(_loader(_config(url, num_workers, **cache)).epoch(0))  # fills the cache
    rates = _alternate(places, num_workers, num_repetitions, cached=cache)
    ratio = float(np.median(np.divide(rates["cached"], rates["local"])))
    expected_s = first_batch_bytes / 1e6 / link_mb_per_s
    return [
        _row("1 Gbit/s: images' bytes without decoding", float(np.median(mb_per_s)), "MB/s"),
        _row("1 Gbit/s: share of the link", float(np.median(mb_per_s)) / link_mb_per_s, "", ">= 0.9"),
        _row("1 Gbit/s: share of the link, plain requests", float(np.median(plain_mb_per_s)) / link_mb_per_s, ""),
        _row("1 Gbit/s: first batch, measured", float(np.median(first_s)), "s"),
        _row("1 Gbit/s: first batch, as computed beforehand", expected_s, "s"),
        _row("cache that holds all / local shards, median of pairs", ratio, "", ">= 0.95"),
    ]


def _plain_mb_per_s(url: str, images: Any) -> float:
    """MB/s of the whole shards in ranges of 4 MiB, 16 at a time, with nothing else: what the link gives."""
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import closing

    from pipelines.remote.store import RemoteStore

    size = 4 << 20
    with closing(RemoteStore(url)) as store, ThreadPoolExecutor(16) as pool:
        ranges = [
            (shard.name, first, min(first + size, shard.num_bytes))
            for shard in images.manifest.shards
            for first in range(0, shard.num_bytes, size)
        ]
        start_s = time.perf_counter()
        num_bytes = sum(pool.map(lambda wanted: len(store.get(*wanted)), ranges))
        return num_bytes / (time.perf_counter() - start_s) / 1e6


def draw(rows: list[Row], path: Path) -> None:
    """Plot the ratios beside their aims."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = [row for row in rows if not row["unit"]]
    figure, axis = pyplot.subplots(figsize=(8, 0.5 * len(ratios) + 1), layout="constrained")
    bars = axis.barh(range(len(ratios)), [row["value"] for row in ratios])
    axis.bar_label(bars, [f"{row['value']:.2f}" for row in ratios], padding=3, fontsize=8)
    for number, row in enumerate(ratios):
        if row["target"]:
            axis.plot([float(row["target"].removeprefix(">= "))] * 2, [number - 0.4, number + 0.4], "k--", linewidth=1)
    axis.set_yticks(range(len(ratios)), [row["measured"] for row in ratios], fontsize=8)
    axis.set(xlim=(0, 1.2), title="ratios; dashed: the aim")
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_data(photographs: Path, folder: Path, times: int) -> None:
    """`one.beton`, and the same images in shards with a manifest."""
    from pipelines.convert import convert, convert_shards
    from pipelines.shards.build import write_manifest
    from pipelines.shards.store import LocalStore

    paths = sorted(path.resolve() for path in photographs.rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path"])
        for _ in range(times):
            writer.writerows([str(paths[i])] for i in rng.permutation(len(paths)))
    with open(os.devnull, "w") as nowhere, _stdout(nowhere):
        convert("csv", folder / "list.csv", folder / "one.beton")
        convert_shards("csv", folder / "list.csv", folder / "set" / "x.beton", num_shards=max(2, times))
        write_manifest(LocalStore(folder / "set"))


@contextmanager
def network(folder: Path) -> Iterator[str | None]:
    """nginx behind a link of 1 Gbit/s, which serves the shards; None where that is not possible."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if os.geteuid() or nginx is None or not (shutil.which("ip") and shutil.which("tc")):
        yield None
        return
    inside = ["ip", "netns", "exec", _NAMESPACE]
    folder.chmod(0o755)  # nginx's workers are another user
    (folder / "nginx").mkdir()
    config = folder / "nginx" / "nginx.conf"
    config.write_text(_NGINX.format(folder=config.parent, root=folder, host=_SERVER))
    shaped = f"rate {LINK_MBIT}mbit burst 256kb latency 50ms"
    try:
        for line in (
            f"ip netns add {_NAMESPACE}",
            f"ip link add fs-bench0 type veth peer name fs-bench1 netns {_NAMESPACE}",
            f"ip addr add {_HOST}/24 dev fs-bench0",
            "ip link set fs-bench0 up",
            f"ip -n {_NAMESPACE} addr add {_SERVER}/24 dev fs-bench1",
            f"ip -n {_NAMESPACE} link set fs-bench1 up",
            f"ip netns exec {_NAMESPACE} tc qdisc add dev fs-bench1 root tbf {shaped}",
        ):
            subprocess.run(line.split(), check=True, capture_output=True)
        server = subprocess.Popen([*inside, nginx, "-e", str(config.parent / "error.log"), "-c", str(config)])
        time.sleep(1)
        try:
            yield f"http://{_SERVER}:8080/set"
        finally:
            server.terminate()
            server.wait()
    except subprocess.CalledProcessError as error:
        print(f"bench_shards: {' '.join(error.cmd)}: {error.stderr.decode().strip()}", file=sys.stderr)
        yield None
    finally:
        subprocess.run(["ip", "netns", "del", _NAMESPACE], capture_output=True, check=False)


def _alternate(
    places: dict[str, Any], num_workers: int, num_repetitions: int, cached: dict[str, Any] | None = None
) -> dict[str, list[float]]:
    """Images per second of whole epochs, in turn, after one untimed epoch each."""
    loaders = {
        name: _loader(_config(str(place), num_workers, **(cached or {} if name == "cached" else {})))
        for name, place in places.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(num_repetitions + 1):
        for name, loader in loaders.items():
            start_s = time.perf_counter()
            for _ in loader.epoch(epoch):
                pass
            if epoch:
                rates[name].append(len(loader) * 64 / (time.perf_counter() - start_s))
    for loader in loaders.values():
        loader.close()
    return rates


def _config(place: str, num_workers: int, **changes: Any) -> Any:
    from pipelines.loader import DataConfig

    # Of a few thousand photographs, 64 lanes would have blocks of one image, and windows of 1 GB the whole epoch.
    sizes = {"lanes": 4, "window_mb": 100} if place.rpartition(".")[2] != "beton" else {}
    return DataConfig(train=place, global_batch_size=64, num_workers=num_workers, **sizes, **changes)


def _loader(cfg: Any) -> Any:
    import torch

    from pipelines.loader import build_loader, open_train_images
    from pipelines.views import ViewsConfig

    places = {"seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": cfg.num_workers}
    views = ViewsConfig(recipe="byol") if cfg.engine != "synthetic" else ViewsConfig(recipe="weak", size_px=32)
    return build_loader(open_train_images(cfg), cfg, views, **places)


def _in_process(function: Any, *arguments: Any) -> list[Row]:
    """Call in a process of its own, which has used no memory yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _row(measured: str, value: float, unit: str, target: str = "") -> Row:
    digits = 3 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
    return {"measured": measured, "value": round(value, digits), "unit": unit, "target": target}


@contextmanager
def _stdout(file: Any) -> Iterator[None]:
    before, sys.stdout = sys.stdout, file
    try:
        yield
    finally:
        sys.stdout = before


if __name__ == "__main__":
    main()

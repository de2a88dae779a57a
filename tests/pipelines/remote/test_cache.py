"""Blocks on a node's disk, with processes that are killed and stopped, and disks that are full."""

import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from pipelines.errors import DataError
from pipelines.remote import BlockCache
from pipelines.remote import cache as cache_module

MB = 1 << 20
BLOCK = 64 << 10


def content_of(key: str, num_bytes: int = BLOCK) -> bytes:
    """A block's bytes, which can be checked in any process."""
    return hashlib.sha256(key.encode()).digest() * (num_bytes // 32)


def blocks_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("blocks/*/*") if path.is_file()]


def bytes_in(folder: Path) -> int:
    total = 0
    for path in blocks_in(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def fail() -> bytes:
    raise AssertionError("fetched")


@pytest.fixture
def processes() -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.remote.cache"])
    yield context
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGCONT)
        process.kill()
        process.join()


def test_a_block_is_fetched_once_and_found_by_the_next_run(tmp_path):
    cache = BlockCache(tmp_path / "new/folder", MB)
    assert cache.get("a", BLOCK, lambda: content_of("a")) == content_of("a")
    assert cache.get("a", BLOCK, fail) == content_of("a")
    assert (cache.num_fetched, cache.num_uncached) == (1, 0)
    again = BlockCache(tmp_path / "new/folder", MB)
    assert again.get("a", BLOCK, fail) == content_of("a")
    assert again.num_fetched == 0
    assert list((tmp_path / "new/folder").iterdir()) == [tmp_path / "new/folder/fastssl-blocks"]


def test_a_block_that_was_wrong_is_fetched_again(tmp_path):
    cache = BlockCache(tmp_path, MB)
    cache.get("a", BLOCK, lambda: bytes(BLOCK))
    cache.forget("a")
    cache.forget("never seen")
    assert cache.get("a", BLOCK, lambda: content_of("a")) == content_of("a")


@pytest.mark.parametrize("num_bytes", [0, BLOCK - 1, BLOCK + 1])
def test_a_name_without_its_bytes_is_not_used(tmp_path, num_bytes):
    cache = BlockCache(tmp_path, MB)
    cache.get("a", BLOCK, lambda: content_of("a"))
    (path,) = blocks_in(tmp_path)
    path.write_bytes(bytes(num_bytes))
    assert cache.get("a", BLOCK, lambda: content_of("a")) == content_of("a")
    assert path.read_bytes() == content_of("a")


def test_a_fetch_of_another_length_is_an_error(tmp_path):
    cache = BlockCache(tmp_path, MB)
    with pytest.raises(DataError, match="a block of 65,536 bytes came with 3"):
        cache.get("a", BLOCK, lambda: b"abc")
    assert blocks_in(tmp_path) == []


def test_the_least_recently_used_go_first(tmp_path):
    cache = BlockCache(tmp_path, 16 * BLOCK)
    for i in range(16):
        cache.get(str(i), BLOCK, lambda i=i: content_of(str(i)))
        time.sleep(0.002)
    assert bytes_in(tmp_path) == 16 * BLOCK
    cache.get("0", BLOCK, fail)  # used again
    cache.get("16", BLOCK, lambda: content_of("16"))
    assert bytes_in(tmp_path) <= 16 * BLOCK
    for key in ("0", "15", "16"):
        cache.get(key, BLOCK, fail)
    for key in ("1", "2"):
        with pytest.raises(AssertionError):
            cache.get(key, BLOCK, fail)


def test_a_smaller_limit_counts_at_once(tmp_path):
    cache = BlockCache(tmp_path, 64 * BLOCK)
    for i in range(64):
        cache.get(str(i), BLOCK, lambda i=i: content_of(str(i)))
    assert bytes_in(tmp_path) == 64 * BLOCK
    BlockCache(tmp_path, 16 * BLOCK)
    assert 13 * BLOCK <= bytes_in(tmp_path) <= 16 * BLOCK


def test_a_block_larger_than_the_limit_is_passed_on(tmp_path):
    cache = BlockCache(tmp_path, MB)
    cache.get("a", BLOCK, lambda: content_of("a"))
    assert cache.get("b", 2 * MB, lambda: content_of("b", 2 * MB)) == content_of("b", 2 * MB)
    assert cache.num_uncached == 1
    cache.get("a", BLOCK, fail)


def test_a_users_own_files_stay(tmp_path):
    """A folder that holds other things, named like the cache's own."""
    (tmp_path / "ab").mkdir()
    own = tmp_path / "ab" / ("0" * 30)
    own.write_bytes(bytes(4 * MB))
    cache = BlockCache(tmp_path, MB)
    for i in range(40):
        cache.get(str(i), BLOCK, lambda i=i: content_of(str(i)))
    assert own.stat().st_size == 4 * MB


def test_threads_share_a_fetch_and_its_error(tmp_path):
    cache = BlockCache(tmp_path, MB)
    is_waiting = threading.Event()
    num_calls, results = [], []

    def fetch() -> bytes:
        num_calls.append(1)
        is_waiting.wait(5)
        time.sleep(0.1)
        raise DataError("the server is gone")

    def get() -> None:
        try:
            cache.get("a", BLOCK, fetch)
        except DataError as error:
            results.append(str(error))

    threads = [threading.Thread(target=get) for _ in range(6)]
    start_s = time.monotonic()
    for thread in threads:
        thread.start()
    is_waiting.set()
    for thread in threads:
        thread.join()
    assert results == 6 * ["the server is gone"]
    assert len(num_calls) == 1
    assert time.monotonic() - start_s < 2
    assert cache.get("a", BLOCK, lambda: content_of("a")) == content_of("a")  # an error is not kept


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder, limit, message in (
        (tmp_path / "file", MB, r"data\.cache_dir: .*file: Not a directory; name a folder"),
        (Path("/proc/x"), MB, r"data\.cache_dir: /proc/x: .*; name a folder"),
        (tmp_path, MB - 1, r"data\.cache_gb: 1,048,575 bytes are too few"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            BlockCache(folder, limit)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="Permission denied"):
        BlockCache(tmp_path, MB)


# ------------------------------------------------------------------ disks


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small memory disk with options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def do(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a disk")
        return folder

    yield do
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_serves_uncached_with_one_warning(mount, capfd, monkeypatch):
    folder = mount("size=2m")
    cache = BlockCache(folder, 64 * MB)
    monkeypatch.setattr(cache_module, "_PAUSE_S", 0.05)
    for i in range(200):
        assert cache.get(str(i), BLOCK, lambda i=i: content_of(str(i))) == content_of(str(i))
        time.sleep(0.002)
    assert cache.num_fetched == 200
    assert 0 < cache.num_uncached < 200
    names = {path.parent.name + path.name for path in blocks_in(folder)}
    assert len(names) > 10
    assert names & {cache_module._name_of(str(i)) for i in range(150, 200)}  # the oldest made room
    for path in blocks_in(folder):
        assert path.stat().st_size == BLOCK
    assert list(folder.rglob("tmp/*")) == []
    seen = capfd.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    assert seen.err.startswith(f"fastssl: warning: data.cache_dir: {folder}: No space left on device: ")


def test_a_disk_that_others_have_filled(mount, capfd):
    """Not even a lock finds room."""
    folder = mount("size=2m")
    cache = BlockCache(folder, 64 * MB)
    with pytest.raises(OSError, match="No space"):
        (folder / "other").write_bytes(bytes(4 * MB))
    assert (folder / "other").stat().st_size > MB
    for i in range(20):
        assert cache.get(str(i), BLOCK, lambda i=i: content_of(str(i))) == content_of(str(i))
    assert cache.num_uncached == 20
    assert capfd.readouterr().err.count("\n") == 1


def test_a_disk_that_became_read_only(mount, capfd):
    folder = mount("size=4m")
    cache = BlockCache(folder, 64 * MB)
    cache.get("a", BLOCK, lambda: content_of("a"))
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert cache.get("a", BLOCK, fail) == content_of("a")
    for i in range(20):
        assert cache.get(str(i), BLOCK, lambda i=i: content_of(str(i))) == content_of(str(i))
    assert cache.num_uncached == 20
    assert capfd.readouterr().err.count("\n") == 1
    with pytest.raises(DataError, match=r"Read-only file system|not writable"):
        BlockCache(folder, 64 * MB)


# ------------------------------------------------------------------ processes


def use_for_a_while(folder: Path, limit: int, seed: int, num_keys: int, end_s: float, failed: Path) -> None:
    """Read blocks at random, and check each byte."""
    cache = BlockCache(folder, limit)
    chance = random.Random(seed)
    while time.monotonic() < end_s:
        key = str(chance.randrange(num_keys))
        if cache.get(key, BLOCK, lambda key=key: content_of(key)) != content_of(key):
            failed.write_text(key)


def fetch_all(folder: Path, counts: Path, num_keys: int, seed: int) -> None:
    cache = BlockCache(folder, 64 * MB)
    keys = [str(i) for i in range(num_keys)]
    random.Random(seed).shuffle(keys)

    def fetch(key: str) -> bytes:
        with counts.open("a") as file:
            file.write(f"{key}\n")
        time.sleep(0.005)
        return content_of(key)

    for key in keys:
        assert cache.get(key, BLOCK, lambda key=key: fetch(key)) == content_of(key)


def hold_in_fetch(folder: Path, ready: Path) -> None:
    def fetch() -> bytes:
        ready.touch()
        time.sleep(1000)
        return content_of("a")

    BlockCache(folder, MB).get("a", BLOCK, fetch)


def hold_while_renaming(folder: Path, ready: Path) -> None:
    """Stop with the eviction lock."""

    class Stopping(BlockCache):
        def _rename(self, *_: object) -> None:
            ready.touch()
            time.sleep(1000)

    Stopping(folder, MB).get("a", BLOCK, lambda: content_of("a"))


def wait_for(path: Path) -> None:
    end_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_processes_fetch_a_block_once(tmp_path, processes):
    counts = tmp_path / "counts"
    workers = [processes.Process(target=fetch_all, args=(tmp_path, counts, 50, seed % 2)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(counts.read_text().split()) == sorted(map(str, range(50)))


def stress(tmp_path: Path, processes: ForkServerContext, *, seconds: float, with_kills: bool) -> tuple[int, int]:
    """Four processes and a limit of 2 MB; the most bytes seen, and the number of kills."""
    limit, failed, chance = 2 * MB, tmp_path / "failed", random.Random(0)
    end_s = time.monotonic() + seconds
    seed, most, num_kills = 0, 0, 0
    workers = []
    while time.monotonic() < end_s:
        while len(workers) < 4:
            seed += 1
            arguments = (tmp_path, limit, seed, 120, end_s, failed)
            workers.append(processes.Process(target=use_for_a_while, args=arguments))
            workers[-1].start()
        time.sleep(chance.uniform(0.01, 0.1))
        most = max(most, bytes_in(tmp_path))
        if with_kills:
            victim = workers.pop(chance.randrange(4))
            victim.kill()
            victim.join()
            num_kills += 1
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert not failed.exists(), failed.read_text()
    cache = BlockCache(tmp_path, limit)
    for number in range(120):
        assert cache.get(str(number), BLOCK, lambda number=number: content_of(str(number))) == content_of(str(number))
    assert list(tmp_path.rglob("tmp/*")) == []  # what the killed ones left
    assert bytes_in(tmp_path) <= limit
    return most, num_kills


def test_four_processes_keep_the_limit(tmp_path, processes):
    most, _ = stress(tmp_path, processes, seconds=2.5, with_kills=False)
    assert MB < most <= 2 * MB


def test_kills_leave_no_wrong_byte(tmp_path, processes):
    most, num_kills = stress(tmp_path, processes, seconds=4, with_kills=True)
    assert num_kills > 10
    assert MB < most <= 2 * MB


@pytest.mark.slow
def test_many_kills_leave_no_wrong_byte(tmp_path, processes):
    most, num_kills = stress(tmp_path, processes, seconds=90, with_kills=True)
    assert num_kills > 300
    assert MB < most <= 2 * MB


@pytest.mark.parametrize("target", [hold_in_fetch, hold_while_renaming])
def test_a_holder_that_is_stopped_does_not_stop_the_others(tmp_path, processes, target):
    holder = processes.Process(target=target, args=(tmp_path, tmp_path / "ready"))
    holder.start()
    wait_for(tmp_path / "ready")
    assert holder.pid
    os.kill(holder.pid, signal.SIGSTOP)
    start_s = time.monotonic()
    cache = BlockCache(tmp_path, MB, max_wait_s=0.5)
    for i in range(20):
        key = "a" if i % 2 else str(i)
        assert cache.get(key, BLOCK, lambda key=key: content_of(key)) == content_of(key)
    assert 0.5 < time.monotonic() - start_s < 4
    os.kill(holder.pid, signal.SIGCONT)
    holder.kill()
    holder.join()
    assert cache.get("after", BLOCK, lambda: content_of("after")) == content_of("after")
    assert cache.get("after", BLOCK, fail) == content_of("after")


def test_a_child_that_is_forked_does_not_keep_a_lock(tmp_path):
    """A fork while a block is fetched copies the lock's descriptor; the parent's release must be one."""
    cache = BlockCache(tmp_path, MB)
    read, write = os.pipe()
    children = []

    def fetch() -> bytes:
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
        children.append(child)
        return content_of("a")

    cache.get("a", BLOCK, fetch)
    lock = f"block-{int(cache_module._name_of('a')[:8], 16) % 1024}"
    try:
        with (tmp_path / "fastssl-blocks/locks" / lock).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.write(write, b"x")
        os.waitpid(children[0], 0)
        os.close(read)
        os.close(write)

"""Conversion straight into object storage: what is there at each moment, who wins, and what is said."""

import errno
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.beton import BetonReader
from pipelines.convert import convert, convert_shards, upload
from pipelines.errors import DataError, SourceChangedError
from pipelines.remote import RemoteStore
from tests.helpers.fault_server import FaultServer
from tests.helpers.image_folders import write_image_folder
from tests.helpers.processes import ROOT
from tests.helpers.s3 import s3_server, use

QUICK: Any = {"silence_s": 5.0, "connect_s": 1.0, "first_wait_s": 0.02, "max_tries": 2}
NAMES = ("x.beton.json", "x.beton.rows", "x.beton.hashes", "x.beton.errors.txt", "x.beton")  # in the order of the puts
EMPTY_LIST = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
# Kills itself before it puts a file of this name.
CHILD = """
import os, signal, sys
from pipelines.convert import convert
from pipelines.remote import RemoteStore
put = RemoteStore.put
def dying(self, path, data, **options):
    if path == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, path, data, **options)
RemoteStore.put = dying
convert("folder", sys.argv[1], sys.argv[2], resume=True)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("upload") / "images", 24)  # one of them empty


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The system's temporary folder, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def store(endpoint, monkeypatch, request, temporary) -> Iterator[RemoteStore]:
    """An empty prefix; at the end, nothing must be left in the temporary folder."""
    use(monkeypatch, endpoint)
    with RemoteStore(f"s3://bucket/{request.node.name}", **QUICK) as store:
        yield store


def content(store: RemoteStore, name: str) -> bytes:
    return store.get_whole(name, 1 << 30)[0]


def names(store: RemoteStore) -> list[str]:
    return [found.path for found in store.list()]


def assert_same(store: RemoteStore, local: Path) -> None:
    """The object and its neighbours are those of a local conversion, and nothing else is there."""
    found = sorted(path for path in local.parent.iterdir() if path.name.startswith(local.name))
    assert names(store) == [path.name for path in found]
    for path in found:
        assert content(store, path.name) == path.read_bytes(), path.name


def test_the_files_are_those_of_a_local_conversion(images, store, tmp_path, temporary, in_process):
    local = convert("folder", str(images), tmp_path / "x.beton")
    url = f"{store.shown}/x.beton"
    done = in_process("convert", images, url)
    assert done.returncode == 0, done.stderr
    assert f"see {url}.errors.txt" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{url}: 23 images in ")
    assert_same(store, local.out)
    assert list(temporary.iterdir()) == []
    again = in_process("convert", images, url, "--resume")
    assert (again.returncode, again.stdout.splitlines()) == (0, [f"{url}: finished already", f"{url}: 23 images"])
    for arguments, reason in (
        ((), "exists already; choose"),
        (("--resume", "--quality", 9), "exists already, of anot"),
    ):
        refused = in_process("convert", images, url, *arguments)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
        assert f"{url}: {reason}" in refused.stderr
    assert_same(store, local.out)


def test_shards(images, store, tmp_path):
    url = f"{store.shown}/x.beton"
    one = convert_shards("folder", str(images), url, num_shards=2, shard=1, shuffle=3)
    assert [report.url for report in one] == [f"{store.shown}/x-00001-of-00002.beton"]
    before = store.info("x-00001-of-00002.beton")
    both = convert_shards("folder", str(images), url, num_shards=2, shuffle=3, resume=True)
    assert store.info("x-00001-of-00002.beton") == before
    assert sum(report.num_images for report in both) == 23
    local = convert_shards("folder", str(images), tmp_path / "x.beton", num_shards=2, shuffle=3)
    for remote, report in zip(both, local, strict=True):
        assert content(store, str(remote.out)) == report.out.read_bytes()
        found = remote.errors_path and content(store, str(remote.errors_path))
        assert found == (report.errors_path and report.errors_path.read_bytes())


@pytest.mark.parametrize("killed_at", ["x.beton.rows", "x.beton"])
def test_a_killed_task_leaves_nothing_under_the_name_and_is_run_again(images, store, tmp_path, temporary, killed_at):
    url = f"{store.shown}/x.beton"
    command = [sys.executable, "-c", CHILD, str(images), url, killed_at]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(store) == sorted(NAMES[: NAMES.index(killed_at)])
    with pytest.raises(SourceChangedError, match=r"x\.beton\.json: of another conversion to this name.*--overwrite"):
        convert("folder", str(images), url, resume=True, quality=9)
    convert("folder", str(images), url, resume=True, max_bad=0.5)  # which is not part of the content
    local = convert("folder", str(images), tmp_path / "x.beton")
    assert content(store, "x.beton") == local.out.read_bytes()
    assert names(store) == sorted(NAMES)


@pytest.mark.parametrize("num_puts", range(len(NAMES)))
def test_a_second_task_that_overtakes_the_first(images, store, tmp_path, monkeypatch, capsys, num_puts):
    """The second one converts the same shard after some puts of the first: it finishes it."""
    url = f"{store.shown}/x.beton"
    put = RemoteStore.put
    order = []

    def overtaken(self, path, data, **options):
        if len(order) == num_puts:
            with monkeypatch.context() as patch:
                patch.setattr(RemoteStore, "put", put)
                convert("folder", str(images), url, resume=True)
                assert "meanwhile" not in capsys.readouterr().out
        order.append(path)
        return put(self, path, data, **options)

    monkeypatch.setattr(RemoteStore, "put", overtaken)
    report = convert("folder", str(images), url, resume=True)
    assert order == list(NAMES)
    assert f"{url}: another task has finished it meanwhile" in capsys.readouterr().out
    assert report.num_images == 23
    assert_same(store, convert("folder", str(images), tmp_path / "x.beton").out)


def test_two_tasks_at_once(images, store, tmp_path, monkeypatch):
    url = f"{store.shown}/x.beton"
    barrier = threading.Barrier(2)
    put = RemoteStore.put

    def together(self, path, data, **options):
        barrier.wait(30)
        return put(self, path, data, **options)

    monkeypatch.setattr(RemoteStore, "put", together)
    threads = [threading.Thread(target=convert, args=("folder", str(images), url), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not barrier.broken
    assert_same(store, convert("folder", str(images), tmp_path / "x.beton").out)


@pytest.mark.parametrize("num_puts", [1, 4, 5])
def test_a_task_with_other_options_that_comes_second_is_refused(images, store, tmp_path, monkeypatch, num_puts):
    """And adds nothing to the files of the first."""
    url = f"{store.shown}/x.beton"
    local = convert("folder", str(images), tmp_path / "x.beton")
    put_all = upload.Destination.put

    def late(self, *arguments, **options):
        for name in NAMES[:num_puts]:
            store.put(name, tmp_path / name)
        return put_all(self, *arguments, **options)

    monkeypatch.setattr(upload.Destination, "put", late)
    with pytest.raises(SourceChangedError, match=r"json: of another conversion to this name, at the same"):
        convert("folder", str(images), url, quality=9, max_px=8)
    assert names(store) == sorted(NAMES[:num_puts])
    for name in NAMES[:num_puts]:
        assert content(store, name) == (local.out.parent / name).read_bytes()


def test_neighbours_of_other_content_are_not_taken(images, store):
    store.put("x.beton.rows", b"of something else")
    with pytest.raises(SourceChangedError, match=r"x\.beton\.rows: of another conversion.*--overwrite"):
        convert("folder", str(images), f"{store.shown}/x.beton", resume=True)
    assert "x.beton" not in names(store)


def test_overwriting_begins_with_the_removal_of_the_old_file(images, store, tmp_path, monkeypatch):
    url = f"{store.shown}/x.beton"
    convert("folder", str(images), url)
    put = RemoteStore.put
    seen = []

    def looking(self, path, data, **options):
        seen.append("x.beton" in names(store))
        return put(self, path, data, **options)

    monkeypatch.setattr(RemoteStore, "put", looking)
    convert("folder", str(images / "b"), url, overwrite=True)
    assert seen == [False] * len(seen)
    local = convert("folder", str(images / "b"), tmp_path / "x.beton")
    assert_same(store, local.out)
    convert("digits", None, url, overwrite=True, split="test")  # without errors: the old list is removed
    assert_same(store, convert("digits", None, tmp_path / "x.beton", overwrite=True, split="test").out)


def test_a_work_folder_keeps_what_was_converted(images, store, tmp_path, monkeypatch):
    url, work = f"{store.shown}/x.beton", tmp_path / "work"
    monkeypatch.setattr("pipelines.convert.CHECKPOINT_EVERY_S", 0.0)
    write = upload.Destination.put

    def lost(self, *arguments, **options):
        raise DataError("connection lost")

    from pipelines.convert import _write

    num_written = 0

    def interrupted(*arguments):
        nonlocal num_written
        num_written += 1
        if num_written == 11:
            raise KeyboardInterrupt
        _write(*arguments)

    monkeypatch.setattr("pipelines.convert._write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert("folder", str(images), url, work_dir=work)
    monkeypatch.setattr(upload.Destination, "put", lost)
    with pytest.raises(DataError, match="connection lost"):
        convert("folder", str(images), url, work_dir=work, resume=True)
    assert num_written == 11 + 23 - 10  # went on
    monkeypatch.setattr(upload.Destination, "put", write)
    convert("folder", str(images), url, work_dir=work, resume=True)
    assert num_written == 11 + 23 - 10  # only put
    assert_same(store, convert("folder", str(images), tmp_path / "x.beton").out)
    assert list(work.iterdir()) == []


def test_a_work_folder_has_one_user(images, store, tmp_path):
    with upload.Destination(f"{store.shown}/x.beton") as destination, upload.work_folder(tmp_path, destination):
        with pytest.raises(DataError, match="another process is converting s3://bucket/"):
            convert("folder", str(images), destination.url, work_dir=tmp_path)
        with upload.Destination(f"{store.shown}/y.beton") as other, upload.work_folder(tmp_path, other):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be created \(Not a directory\): choose another --work-dir"):
        convert("folder", str(images), destination.url, work_dir=tmp_path / "file")


def test_too_many_bad_images_leave_nothing(images, store, tmp_path, temporary):
    url = f"{store.shown}/x.beton"
    with pytest.raises(DataError, match=r"1 empty file \(.*\); --work-dir DIR keeps their list, and repeat") as caught:
        convert("folder", str(images), url, max_bad=0.01)
    assert str(temporary) not in str(caught.value)
    assert names(store) == []
    assert list(temporary.iterdir()) == []
    with pytest.raises(DataError, match=r"see (.*errors\.txt), and repeat") as caught:
        convert("folder", str(images), url, max_bad=0.01, work_dir=tmp_path / "work")
    kept = Path(str(caught.value).partition("; see ")[2].partition(",")[0])
    assert "empty file" in kept.read_text()
    assert names(store) == []


def test_a_full_disk_is_one_line(images, store, temporary, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{temporary}/x")

    monkeypatch.setattr("pipelines.convert._write", full)
    with pytest.raises(
        DataError, match=r"x: cannot be written \(No space left.*free space or choose another --work-dir"
    ):
        convert("folder", str(images), f"{store.shown}/x.beton")
    assert list(temporary.iterdir()) == []
    assert names(store) == []


def test_a_bucket_that_is_not_there_is_found_before_anything_is_converted(images, store, monkeypatch):
    monkeypatch.setattr("pipelines.convert._convert_range", None)
    with pytest.raises(DataError, match=r"s3://no-such-bucket/p/x\.beton: no such object"):
        convert("folder", str(images), "s3://no-such-bucket/p/x.beton")


@pytest.mark.parametrize(
    ("name", "num_looks", "fault", "reason"),
    [
        ("x.beton.json", 1, "403", "not allowed (403)"),
        ("x.beton.rows", 0, "403", "not allowed (403)"),
        ("x.beton", 1, "403", "not allowed (403)"),
        ("x.beton", 1, "403-expired", "the credentials have ended"),
        ("x.beton", 1, "cut", "connection cut, 2 tries"),
    ],
)
def test_what_cannot_be_written_is_one_line(images, temporary, in_process, monkeypatch, name, num_looks, fault, reason):
    monkeypatch.setattr(upload, "RemoteStore", functools.partial(RemoteStore, **QUICK))
    with FaultServer({"bucket": EMPTY_LIST}) as server:
        use(monkeypatch, server.url, key="AKIASECRET", secret="secret-7f")
        server.plan(f"bucket/p/{name}", *["ok"] * num_looks)  # before it is put
        server.always(f"bucket/p/{name}", fault)
        done = in_process("convert", images, "s3://bucket/p/x.beton")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"s3://bucket/p/{name}: {reason}" in done.stderr
    assert not [part for part in ("AKIA", "secret", "http", "?") if part in done.stderr]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("s3://bucket", "OUT needs a bucket and a name"),
        ("s3://bucket/p/", "OUT needs a bucket and a name"),
        ("s3://bucket/p/..", "OUT needs a bucket and a name"),
        ("s3://bucket/p/a%2Fb.beton", "OUT needs a bucket and a name"),
        ("s3://key:secret-7f@bucket/x.beton", "keys belong into the environment"),
        ("s3://bucket/x.beton?secret-7f", "a query is not used"),
        ("https://me:secret-7f@host/x.beton?secret-7f", "https://host/x.beton: a web server cannot be written to"),
        ("gopher://host/x.beton", "gopher:// is no address of remote objects"),
    ],
)
def test_destinations_that_cannot_be_ones(images, out, reason):
    with pytest.raises(DataError, match=reason) as caught:
        convert("folder", str(images / "does not matter"), out)
    assert "secret" not in str(caught.value)


def test_a_work_folder_needs_a_url(images, tmp_path):
    with pytest.raises(ValueError, match="work_dir is for an OUT in object storage"):
        convert("folder", str(images), tmp_path / "x.beton", work_dir=tmp_path)


def test_file_urls(images, tmp_path, temporary):
    (tmp_path / "there").mkdir()
    url = f"file://{tmp_path}/there/a%20b.beton"
    convert("folder", str(images), url)
    assert BetonReader(tmp_path / "there" / "a b.beton").num_samples == 23
    assert convert("folder", str(images), url, resume=True).num_images == 23

"""Archives and tables read from object storage and web servers: the same files as from a disk, and what may fail."""

import functools
import io
import os
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from pipelines.beton import BetonReader
from pipelines.convert import convert, infer_kind, remote_source
from pipelines.errors import DataError, SourceChangedError
from pipelines.remote import RemoteStore
from pipelines.remote import file as file_module
from tests.helpers.fault_server import FaultServer
from tests.helpers.nginx import nginx
from tests.helpers.s3 import forget, s3_server, use
from tests.pipelines.convert.test_webdataset import jpeg, samples, write_tar

QUICK: Any = {"silence_s": 2.0, "connect_s": 1.0, "first_wait_s": 0.01}


def write_parquet(path: Path, first: int, num: int) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg(k), "path": f"{k}.jpg"} for k in range(first, first + num)]
    labels = [k % 3 for k in range(first, first + num)]
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=8, data_page_size=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    for name in ("wds", "tables"):
        (folder / name / "deeper").mkdir(parents=True)
    for k in range(3):
        write_tar(folder / "wds" / f"x-{k:03d}.tar", samples(20 * k, 20))
        write_parquet(folder / "tables" / f"x-{k}.parquet", 20 * k, 20)
    write_tar(folder / "wds" / "deeper" / "y.tar", samples(0, 1))
    write_tar(folder / "x.tar.gz", samples(0, 60), "w:gz")
    shutil.copy(folder / "wds" / "x-000.tar", folder / "without_extension")
    (folder / "wds" / "notes.txt").write_text("words")
    (folder / "tables" / "deeper" / "notes.txt").write_text("words")
    return folder


@pytest.fixture(scope="module")
def endpoint(folder) -> Iterator[str]:
    """S3 with the files in bucket/data."""
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        use(patch, url)
        with RemoteStore("s3://bucket/data") as store:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    store.put(str(path.relative_to(folder)), path)
        yield url


@pytest.fixture
def quick(monkeypatch) -> None:
    """Small ranges, so that there are many, and short waits."""
    monkeypatch.setattr(remote_source, "RemoteStore", functools.partial(RemoteStore, **QUICK))
    monkeypatch.setattr(file_module, "FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(file_module, "MAX_RANGE_BYTES", 8 << 10)
    monkeypatch.setattr(file_module, "MAX_SKIP_BYTES", 1 << 10)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_remote_file_is_read_as_a_local_one(quick, is_sparse):
    data = random.Random(0).randbytes(100_000)
    chance = random.Random(1)
    with FaultServer({"x": data}) as server:
        (found,), _ = remote_source.find_objects(f"{server.url}/x", (), lambda _: None)
        with remote_source.open_source(found, is_sparse=is_sparse) as file:
            local = io.BytesIO(data)
            for _ in range(60):
                if chance.random() < 0.5:
                    offset = chance.randrange(len(data) + 5000)
                    assert file.seek(offset) == local.seek(offset)
                else:
                    assert file.seek(500, io.SEEK_CUR) == local.seek(500, io.SEEK_CUR)
                num = chance.choice([0, 1, 512, 3000, 30_000])
                assert file.read(num) == local.read(num)
                assert file.tell() == local.tell()
            assert file.seek(-7, io.SEEK_END) == len(data) - 7
            assert file.read() == data[-7:]
            with pytest.raises(ValueError, match="negative"):
                file.raw.seek(-1)


def test_reading_on_fetches_each_byte_once_and_ahead(quick):
    data = random.Random(0).randbytes(100_000)
    with FaultServer({"x": data}) as server:
        (found,), _ = remote_source.find_objects(f"{server.url}/x", (), lambda _: None)
        with remote_source.open_source(found) as file:
            assert file.read(3000) == data[:3000]
            stops = [int(seen.range.rpartition("-")[2]) for seen in server.requests if seen.range]
            assert max(stops) > 6000
            assert file.read() == data[3000:]
        ranges = sorted(tuple(map(int, seen.range[6:].split("-"))) for seen in server.requests if seen.range)
        assert ranges[0][0] == 0
        assert [start for start, _ in ranges[1:]] == [stop + 1 for _, stop in ranges[:-1]]
        assert len({seen.if_match for seen in server.requests if seen.range}) == 1
        num_all = len(server.requests)
        with remote_source.open_source(found, is_sparse=True) as file:
            for start in range(0, 100_000, 20_000):
                file.seek(start)
                assert file.read(10) == data[start : start + 10]
        assert len(server.requests) - num_all <= 5 * 32  # the buffer's 32 kB in ranges of 1 kB, and nothing more


@pytest.mark.parametrize(
    ("url", "local", "options"),
    [
        ("wds/x-{000..002}.tar", "wds", {}),
        ("wds/x-{000..002}.tar", "wds", {"shuffle": 7}),
        ("tables/x-{0..2}.parquet", "tables", {}),
        ("x.tar.gz", "x.tar.gz", {}),
        ("without_extension", "without_extension", {}),
    ],
)
def test_files_of_a_web_server_that_fails_often(folder, tmp_path, quick, url, local, options):
    expected = convert(None, str(folder / local), tmp_path / "local.beton", **options)
    with FaultServer(folder, seed=5, share=0.25, kinds=("cut", "500")) as server:
        report = convert(None, f"{server.url}/{url}", tmp_path / "x.beton", **options)
        assert {request.outcome for request in server.requests} == {"ok", "cut", "500"}
    assert report.out.read_bytes() == expected.out.read_bytes()
    assert report.num_images == expected.num_images > 8


def test_a_cut_connection_costs_one_range(folder, tmp_path, quick):
    name = "wds/x-001.tar"
    with FaultServer(folder) as server:
        convert(None, f"{server.url}/{name}", tmp_path / "x.beton")
        num_whole = len(server.requests)
        server.requests.clear()
        server.plan(name, *["ok"] * 6, "cut", "ok", "cut")
        convert(None, f"{server.url}/{name}", tmp_path / "y.beton")
        assert len(server.requests) == num_whole + 2
    assert (tmp_path / "x.beton").read_bytes() == (tmp_path / "y.beton").read_bytes()


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("s3://bucket/data/wds/", "wds"),
        ("s3://bucket/data/wds", "wds"),
        ("s3://bucket/data/w?s/x-00[0-9].tar", "wds"),
        ("s3://bucket/d*/wds/x-*.tar", "wds"),
        ("s3://bucket/data/wds/x-{000..002}.tar", "wds"),
        ("s3://bucket/data/tables/", "tables"),
        ("s3://bucket/data/without_extension", "without_extension"),
    ],
)
def test_prefixes_and_patterns_of_a_bucket(folder, tmp_path, endpoint, monkeypatch, url, local):
    use(monkeypatch, endpoint)
    expected = convert(None, str(folder / local), tmp_path / "local.beton")
    report = convert(None, url, tmp_path / "x.beton")
    assert report.out.read_bytes() == expected.out.read_bytes()
    if url.endswith(("wds", "/")):
        assert report.left_out == expected.left_out
        assert report.left_out
        assert report.left_out_path is not None
        assert f"s3://bucket/data/{local}/deeper\t" in report.left_out_path.read_text()


def test_from_bucket_to_bucket(folder, tmp_path, endpoint, monkeypatch):
    use(monkeypatch, endpoint)
    convert(None, "s3://bucket/data/wds/", "s3://bucket/out/x.beton")
    expected = convert(None, str(folder / "wds"), tmp_path / "x.beton")
    with RemoteStore("s3://bucket/out") as store:
        assert store.get_whole("x.beton", 1 << 30)[0] == expected.out.read_bytes()


def test_archives_are_counted_in_processes(folder, tmp_path, endpoint, monkeypatch):
    """The fork server was started before there were credentials."""
    forget(monkeypatch)
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        assert pool.submit(os.getenv, "AWS_ACCESS_KEY_ID").result() is None
    use(monkeypatch, endpoint)
    monkeypatch.setattr("pipelines.convert.webdataset.MIN_POOL_BYTES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    report = convert(None, "s3://bucket/data/wds/", tmp_path / "x.beton")
    assert BetonReader(report.out).labels.tolist() == [k % 3 for k in range(60)]


def test_a_changed_source_is_noticed(folder, tmp_path, quick):
    files = {"x.tar": (folder / "wds" / "x-000.tar").read_bytes()}
    with FaultServer(files) as server:
        url = f"{server.url}/x.tar"
        convert(None, url, tmp_path / "x.beton")
        assert convert(None, url, tmp_path / "x.beton", resume=True).num_images == 20
        server.plan("x.tar", "changed")  # the same size
        with pytest.raises(SourceChangedError, match="exists already, of another source"):
            convert(None, url, tmp_path / "x.beton", resume=True)
        server.plan("x.tar", *["ok"] * 9, "changed")
        with pytest.raises(DataError, match=r"x\.tar: changed while it was read; convert again"):
            convert(None, url, tmp_path / "y.beton")
    assert not list(tmp_path.glob("y.beton*"))


def test_damaged_files_are_named(folder, tmp_path, quick):
    tar, table = ((folder / name).read_bytes() for name in ("wds/x-000.tar", "tables/x-0.parquet"))
    files = {"x.tar": tar[:-30_000], "x.parquet": table[: len(table) // 2] + table[len(table) // 2 + 9 :]}
    with FaultServer(files) as server:
        for name, reason in (("x.tar", "not a whole tar archive"), ("x.parquet", "not a readable parquet file")):
            with pytest.raises(DataError, match=rf"http://127.*/{name}: {reason} .*copy it again"):
                convert(None, f"{server.url}/{name}", tmp_path / "x.beton", max_bad=0)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
@pytest.mark.parametrize(
    ("num_ok", "fault", "reason"),
    [(0, "403", r"not allowed \(403\)"), (4, "403", r"not allowed \(403\)"), (4, "cut", "connection cut, 6 tries")],
)
def test_errors_are_one_line_without_secrets(folder, tmp_path, quick, in_process, name, num_ok, fault, reason):
    """Also in the middle of a file, where tarfile and pyarrow are in between."""
    files = {"x.tar": folder / "wds" / "x-000.tar", "x.parquet": folder / "tables" / "x-0.parquet"}
    with FaultServer({name: files[name].read_bytes()}, user="me:secret-7f") as server:
        server.plan(name, *["ok"] * num_ok)
        server.always(name, fault)
        url = server.url.replace("//", "//me:secret-7f@")
        done = in_process("convert", f"{url}/{name}?token=secret-7f", tmp_path / "x.beton")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"{server.url}/{name}: " in done.stderr
    assert re.search(reason, done.stderr)
    assert "secret" not in done.stderr + done.stdout
    assert not list(tmp_path.glob("x.beton*"))


def test_a_signed_url_keeps_its_query(folder, tmp_path):
    check = 'if ($arg_token != "a%2Fb") { return 403; }'
    with nginx(folder, tmp_path / "nginx", check) as url:
        report = convert(None, f"{url}/wds/x-000.tar?token=a%2Fb", tmp_path / "x.beton")
        assert report.num_images == 20
        with pytest.raises(DataError, match=r"x-000\.tar: not allowed \(403\)") as caught:
            convert(None, f"{url}/wds/x-000.tar?token=c", tmp_path / "y.beton")
        assert "token" not in str(caught.value)
    assert b"token" not in (tmp_path / "x.beton.json").read_bytes()


@pytest.mark.parametrize(
    ("url", "options", "reason"),
    [
        ("s3://bucket/data/none/", {}, r"s3://bucket/data/none: no such files \(a prefix is searched for"),
        ("s3://bucket/data/wds/z-*.tar", {}, r"s3://bucket/data/wds/z-\*\.tar: no such files"),
        ("s3://bucket/data/wds/x-{000..003}.tar", {}, r"wds/x-003\.tar: no such file"),
        ("s3://bucket/data/wds/x-{3..1}.tar", {}, "the range must rise"),
        ("s3://no-such-bucket/x/", {}, "s3://no-such-bucket/x: no such object"),
        ("s3://bucket/data/wds/notes.txt", {}, r"notes\.txt: not a source of images"),
        ("s3://bucket/data/../x.tar", {}, "not a name of an object"),
        ("s3://key:secret-7f@bucket/x.tar", {}, "keys belong into the environment"),
        ("s3://bucket/data/wds", {"kind": "folder"}, "s3://bucket/data/wds: by URL only sources of kind webdataset"),
        ("s3://bucket/data/x.csv", {"kind": "csv"}, "by URL only sources of kind webdataset and parquet"),
    ],
)
def test_sources_that_are_none(tmp_path, endpoint, monkeypatch, url, options, reason):
    use(monkeypatch, endpoint)
    with pytest.raises(DataError, match=reason) as caught:
        convert(options.get("kind"), url, tmp_path / "x.beton")
    assert "secret" not in str(caught.value)


def test_a_web_server_without_lists(folder, quick):
    with FaultServer(folder) as server:
        with pytest.raises(DataError, match=r"/wds: the server has no list of its files .*: name each file"):
            infer_kind(f"{server.url}/wds/")
        with pytest.raises(DataError, match=r"/wds: no such file"):
            infer_kind(f"{server.url}/wds")

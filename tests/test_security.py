"""What comes from others stays data: archives, arrays, tables, weights, configurations, names; and who listens."""

import ast
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import EpsImagePlugin, Image

from fastssl.checkpoint.save_load import load_weights
from fastssl.commands.compare.compare_runs import Variant, draw
from fastssl.config import load_config
from fastssl.errors import ConfigError
from fastssl.tracking.plots import draw_curves
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.errors import DataError
from pipelines.transform import read_image
from tests.helpers.processes import ROOT, environment

SOURCES = [path for package in ("fastssl", "pipelines", "kernels") for path in (ROOT / package).rglob("*.py")]
# Calls that run what they read, or hand it to a shell.
FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "marshal.load", "marshal.loads", "yaml.load", "yaml.unsafe_load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "tar.extract", "tar.extractall"),
}


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


@cache
def calls() -> list[tuple[Path, ast.Call]]:
    """Every call in the source, with its file."""
    nodes = ((path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text())))
    return [(path, node) for path, node in nodes if isinstance(node, ast.Call)]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_members_of_an_archive_stay_inside(tmp_path):
    """Names that lead out of the archive are names; links are not followed."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    inside = tmp_path / "inside"
    inside.mkdir()
    members = [
        member("../escaped.png", png()),
        member(f"{tmp_path}/absolute.png", png()),
        member("a/../../up.png", png()),
        member("symbolic.png", kind=tarfile.SYMTYPE, link=str(secret)),
        member("hard.png", kind=tarfile.LNKTYPE, link=str(secret)),
        member("device.png", kind=tarfile.CHRTYPE),
    ]
    with tarfile.open(inside / "x.tar", "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    report = convert("webdataset", str(inside / "x.tar"), inside / "x.beton")
    assert report.num_images == 3  # the regular files
    written = {"inside/x.beton", "inside/x.beton.json", "inside/x.beton.hashes", "inside/x.beton.rows"}
    assert files_below(tmp_path) == {"secret.png", "inside", "inside/x.tar", *written}


def test_an_archive_of_links_alone_has_no_images(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info, _ = member("link.png", kind=tarfile.SYMTYPE, link=str(tmp_path / "secret.png"))
        tar.addfile(info)
    with pytest.raises(DataError, match="no images"):
        convert("webdataset", str(tmp_path / "x.tar"), tmp_path / "x.beton")


def test_arrays_are_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "x.npz", x=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        convert("npz", str(tmp_path / "x.npz"), tmp_path / "x.beton")
    assert not mark.exists()


def test_a_parquet_file_opens_no_other_file(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "secret.png").write_bytes(png())
    rows = [{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"row 1"):
        convert("parquet", str(tmp_path / "x.parquet"), tmp_path / "x.beton")
    report = convert("parquet", str(tmp_path / "x.parquet"), tmp_path / "y.beton", on_error="skip")
    assert (report.num_images, report.num_skipped) == (1, 1)
    assert BetonReader(tmp_path / "y.beton").num_samples == 1


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_weights_are_not_unpickled(tmp_path, protocol):
    mark, file = tmp_path / "mark", tmp_path / "weights.pt"
    if protocol == "zip":
        torch.save({"backbone": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"backbone": Bomb(mark)}, protocol=2))
    with pytest.raises(ConfigError, match=r"weights\.pt is not a file of fastssl"):
        load_weights(file)
    assert not mark.exists()


def test_a_config_builds_no_objects(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "x.yaml"
    file.write_text(f"run: !!python/object/apply:os.mkdir [{mark}]\n")
    with pytest.raises(ConfigError, match=r"line 1: a value of type python/object"):
        load_config(file)
    assert not mark.exists()


def postscript() -> bytes:
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
    return header + b"showpage\n" * 20 + b"%%EOF\n"


def test_no_image_starts_a_process(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the name of the file."""
    programs, mark, images = tmp_path / "bin", tmp_path / "mark", tmp_path / "images"
    programs.mkdir()
    images.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (images / "x.jpg").write_bytes(postscript())
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(images / "x.jpg").load()
    assert mark.exists()  # so this file does start it, where Pillow is free to choose
    mark.unlink()

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info, data = member("x.jpg", postscript())
        tar.addfile(info, io.BytesIO(data))
    for kind, path in (("folder", images), ("webdataset", tmp_path / "x.tar")):
        with pytest.raises(DataError, match="not an image"):
            convert(kind, str(path), tmp_path / "x.beton")
    with pytest.raises(DataError, match="not an image"):
        read_image(images / "x.jpg")
    assert not mark.exists()


def test_every_image_is_opened_with_the_formats_that_are_read():
    found = []
    for path, call in calls():
        if ast.unparse(call.func) == "Image.open":
            found.append((path.name, "formats" in {each.arg for each in call.keywords}))
    assert ("images.py", True) in found
    assert [name for name, named in found if not named] == []


def test_the_source_calls_nothing_that_runs_what_it_reads():
    found = []
    for path, node in calls():
        name, keywords = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        is_bad = (
            name in FORBIDDEN
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name.endswith("np.load") and keywords.get("allow_pickle", "False") != "False")
            or keywords.get("shell", "False") != "False"
        )
        if is_bad:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert len(SOURCES) > 50
    assert found == []


def test_names_are_no_formulas(tmp_path):
    """matplotlib reads what stands between two dollar signs, and fails on what is no formula."""
    folder = RunFolder(tmp_path / "$\\frac{$ <b>&")
    folder.path.mkdir()
    folder.metrics.write_text('{"step": 1, "loss": 1.0, "img_per_s": 2.0}\n')
    draw_curves(folder)
    assert folder.curves.stat().st_size > 1000
    row = {"config": "$\\frac{$", "metric": "kNN", "mean_percent": 50.0, "sd_over_seeds": 1.0}
    draw([row], [Variant(config=Path("$\\frac{$.yaml"))], tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 1000


def listening(pid: int) -> set[str]:
    """Addresses on which a process and its children listen, as hexadecimal words of /proc/net/tcp and tcp6."""
    process = psutil.Process(pid)
    sockets = set()
    for each in [process, *process.children(recursive=True)]:
        for descriptor in Path("/proc", str(each.pid), "fd").glob("*"):
            try:
                target = os.readlink(descriptor)
            except OSError:  # closed since
                continue
            if target.startswith("socket:["):
                sockets.add(target.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:
                found.add(columns[1].partition(":")[0])
    return found


def test_listening_is_seen():
    import socket

    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        assert "00000000" in listening(os.getpid())
    assert "00000000" not in listening(os.getpid())


@pytest.mark.slow
def test_a_training_alone_cannot_be_reached_from_outside(tiny_config):
    """gloo listens, even alone: on the loopback."""
    command = [sys.executable, "fastssl/train.py", "--cfg", str(tiny_config), "--set", "train.num_epochs=100"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 250
        while not read_rows(tiny_config.parent / "run" / "metrics.jsonl"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        addresses = listening(process.pid)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert addresses <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1, ::1

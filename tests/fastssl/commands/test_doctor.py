"""The doctor on this machine as it is, and on one that lacks something."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastssl.commands.doctor.examine import CHECKS, _examined, doctor, examine
from fastssl.commands.doctor.finding import Finding, Node
from fastssl.commands.doctor.gpu import check_gpu, check_triton
from fastssl.commands.doctor.machine import check_memory, cpu_quota
from fastssl.commands.doctor.network import check_gloo, check_interfaces
from fastssl.commands.doctor.software import check_apex, check_jpeg_check, check_jpeg_region, check_packages
from fastssl.commands.doctor.storage import check_data, check_run_dir
from fastssl.config import build_config
from tests.helpers.fault_server import FaultServer
from tests.helpers.processes import ROOT, environment
from tests.helpers.shards import write_pictures

HAS_GPU = torch.cuda.is_available()


def under(limit: str, check: str) -> Finding:
    """A check of machine.py in a process with a resource limit, such as RLIMIT_NOFILE=64."""
    name, _, value = limit.partition("=")
    program = (
        "import resource; from fastssl.commands.doctor.finding import Node\n"
        f"from fastssl.commands.doctor.machine import {check}\n"
        f"hard = resource.getrlimit(resource.{name})[1]\n"
        f"resource.setrlimit(resource.{name}, ({value}, hard))\n"
        f"import json; print(json.dumps({check}(Node())))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Finding(*json.loads(done.stdout))


@pytest.mark.slow
def test_this_machine(digits, tmp_path, command):
    done = command("fastssl", "doctor", "--json", "--data", digits)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert list(found) == list(CHECKS)
    assert done.returncode == 0, done.stdout
    assert "fail" not in {finding["status"] for finding in found.values()}
    assert "ffcv 1.0.2" in found["packages"]["detail"]
    assert "img/s" in found["data"]["detail"]
    assert "ms for one number" in found["gloo"]["detail"]
    for finding in found.values():
        assert finding["advice"] or finding["status"] != "warn"
    if not HAS_GPU:
        assert {found[name]["status"] for name in ("gpu", "triton", "nccl")} == {"skipped"}


def test_exit_code_and_lines(monkeypatch, capsys):
    def broken(_: Node) -> Finding:
        raise ZeroDivisionError("of\nall things")

    monkeypatch.setattr(
        "fastssl.commands.doctor.examine.CHECKS", {"first": lambda _: Finding("warn", "slow", "wait"), "second": broken}
    )
    assert doctor(None, None, as_json=False) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "warn      first       slow -> wait"
    assert second.startswith("fail      second      the check itself failed (ZeroDivisionError: of all things)")
    monkeypatch.setattr("fastssl.commands.doctor.examine.CHECKS", {"first": lambda _: Finding("warn", "slow", "wait")})
    assert doctor(None, None, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"check": "first", "status": "warn", "detail": "slow", "advice": "wait"}
    ]


def test_what_a_library_prints_is_not_in_the_answer(monkeypatch, capsys):
    def chatty(_: Node) -> Finding:
        print("setting the accelerator")
        return Finding("ok", "fine")

    monkeypatch.setattr("fastssl.commands.doctor.examine.CHECKS", {"chatty": chatty})
    assert [found.check for found in examine()] == ["chatty"]
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_config_that_demands_a_gpu():
    node = Node(cfg=build_config({"run": {"device": "cuda"}}))
    for check in (check_gpu, check_triton):
        found = check(node)
        assert found.status == "fail"
        assert "run.device is cuda" in found.advice
        assert check(Node()).status == "skipped"


def test_small_limits():
    files = under("RLIMIT_NOFILE=64", "check_open_files")
    assert files.status == "warn"
    assert "may open 64 files" in files.detail
    assert "ulimit -n" in files.advice
    locked = under("RLIMIT_MEMLOCK=4096", "check_locked_memory")
    assert "4,096 bytes" in locked.detail


def test_quota_of_a_container(tmp_path):
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert cpu_quota(tmp_path) == 0.5


def test_a_file_larger_than_memory(tmp_path):
    file = tmp_path / "large.beton"
    with file.open("wb") as handle:
        handle.truncate(1 << 43)  # a hole: it takes no room
    found = check_memory(Node(cfg=build_config({"data": {"train": str(file)}})))
    assert found.status == "warn"
    assert "data.order=quasi_random" in found.advice
    without = build_config({"data": {"train": str(file), "order": "quasi_random", "cache": "none"}})
    assert check_memory(Node(cfg=without)).status == "ok"


def test_data_folders(tmp_path):
    assert check_data(Node()).status == "skipped"
    missing = check_data(Node(data=tmp_path / "no"))
    assert missing.status == "fail"
    assert str(tmp_path / "no") in missing.detail
    empty = check_data(Node(data=tmp_path))
    assert empty.status in ("ok", "warn")
    assert "MB/s written" in empty.detail
    assert not list(tmp_path.iterdir())  # the probe is gone
    unwritable = check_data(Node(data=Path("/proc/self")))  # for root too
    assert unwritable.status == "fail"
    assert "cannot be written" in unwritable.detail
    (tmp_path / "broken.beton").write_text("no beton")
    assert _examined("data", check_data, Node(data=tmp_path)).status == "fail"


def test_run_dir(tmp_path):
    def of(run_dir) -> Finding:
        return check_run_dir(Node(cfg=build_config({"run": {"dir": str(run_dir)}})))

    assert of(tmp_path / "a" / "b").status == "ok"
    assert not list(tmp_path.iterdir())
    assert of("/proc/self/run").status == "fail"


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nope0")
    found = check_interfaces(Node())
    assert found.status == "fail"
    assert "NCCL_SOCKET_IFNAME=" in found.detail
    for harmless in ("lo", "^docker0"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", harmless)
        assert check_interfaces(Node()).status in ("ok", "warn")


@pytest.mark.slow
def test_what_nccl_prints_is_not_taken_for_the_answer(tmp_path, monkeypatch):
    shout = "os.write(1, b'NCCL version 2.28.9+cuda13.0\\n')"
    (tmp_path / "sitecustomize.py").write_text(f"import atexit, os\n{shout}\natexit.register(lambda: {shout})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = check_gloo(Node())
    assert found.status == "ok", found
    assert "over 2 processes of this host" in found.detail


def test_the_rank_that_failed_is_named_without_waiting_for_the_other(tmp_path, monkeypatch):
    dies = "if sys.orig_argv[-1] == '1':\n    os.write(2, b'no such device\\n')\n    os._exit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\n{dies}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("fastssl.commands.doctor.network._TIMEOUT_S", 20)
    found = check_gloo(Node())
    assert found.status == "fail"
    assert "(rank 1: no such device)" in found.detail


def test_the_other_apex_is_named_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "apex" / "optimizers.py").write_text("")  # NVIDIA's is a folder
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = check_apex(Node())
    assert found.status == "warn"
    assert "is not NVIDIA apex but another project" in found.detail
    assert "pip uninstall apex" in found.advice
    wanted = check_apex(Node(cfg=build_config({"run": {"device": "cuda"}, "optim": {"impl": "apex"}})))
    assert wanted.status == "fail"
    assert "optim.impl=apex: " in wanted.detail
    assert "another project" in wanted.detail


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="there is an apex")
def test_a_missing_apex_fails_a_run_that_asks_for_it():
    for asks in ({"optim": {"impl": "apex"}}, {"model": {"layer_norm": "apex"}}):
        found = check_apex(Node(cfg=build_config({"run": {"device": "cuda"}} | asks)))
        assert found.status == "fail"
        assert "=apex: NVIDIA apex is not installed" in found.detail
        assert "remove the key" in found.advice
    for node in (Node(), Node(cfg=build_config({}))):
        assert check_apex(node).status == "skipped"


def test_packages_are_compared_with_what_was_tried():
    found = check_packages(Node())
    assert found.status == "ok"
    assert "deepspeed" in found.detail


def test_bad_config(in_process):
    done = in_process("doctor", "--cfg", "/no/such.yaml")
    assert done.returncode == 2
    assert "/no/such.yaml" in done.stderr


def test_data_sets_of_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    folder = tmp_path / "set"
    write_pictures(folder)
    for place in (folder, str(folder / "dataset.json"), f"{folder}/*.beton"):
        found = check_data(Node(data=place))
        assert found.status == "ok"
        assert "3 shards, 24 images; its largest shard, " in found.detail
    with FaultServer(folder) as server:
        found = check_data(Node(data=server.url))
        assert found.status == "ok"
        assert f"{server.url}: 3 shards, 24 images; " in found.detail
        assert " MB/s and " in found.detail
        server.always("dataset.json", "403")
        found = check_data(Node(data=server.url))
        assert found.status == "fail"
        assert "not allowed (403)" in found.detail


@pytest.mark.parametrize(
    ("check", "reason", "detail"),
    [
        (check_jpeg_check, "why_no_jpeg_check", "JPEGs take longer to convert, with the same result"),
        (check_jpeg_region, "why_no_region_decoder", "JPEGs are decoded in full, which takes longer"),
    ],
)
def test_it_says_what_was_not_compiled(monkeypatch, check, reason, detail):
    assert check(Node()).status == "ok"
    monkeypatch.setattr(f"fastssl.commands.doctor.software.{reason}", lambda: "it was not compiled")
    found = check(Node())
    assert found.status == "warn"
    assert found.detail == f"{detail}: it was not compiled"
    assert "make install" in found.advice

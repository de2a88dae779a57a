"""GPUs and drivers that cannot serve are one line, before anything is built; torch's view of them is made up here."""

import warnings

import pytest
import torch

from fastssl.cli import main
from fastssl.commands.device_option import choose_device_option
from fastssl.commands.doctor.finding import Node
from fastssl.commands.doctor.gpu import check_gpu
from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.machine import nvidia_gpu
from fastssl.processes.launch import choose_device
from tests.integration.test_bad_input import assert_one_line


@pytest.fixture
def no_gpu(monkeypatch):
    """Torch for CUDA 13.0 that finds no GPU, and complains of it as it does."""

    def is_available():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    set_driver(monkeypatch, None, None)


def set_driver(monkeypatch, version, cuda):
    for module in (nvidia_gpu, "fastssl.processes.launch"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.driver_version", lambda: version)
    monkeypatch.setattr(nvidia_gpu, "cuda_of_driver", lambda: cuda)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of one compute capability."""

    def make(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    return make


TOO_OLD = (
    "NVIDIA driver 535.104.05 supports CUDA 12.2, too old for torch 2.13.0+cu130, which is built for CUDA 13.0: "
    "install a newer driver, or a torch build for CUDA 12.2"
)


def test_a_driver_older_than_torch_names_both_versions(no_gpu, monkeypatch, capfd):
    set_driver(monkeypatch, "535.104.05", (12, 2))
    with pytest.raises(ConfigError) as error:
        choose_device("cuda")
    assert str(error.value) == f"run.device is cuda, but {TOO_OLD}; or use the CPU with --set run.device=cpu"
    assert choose_device("auto") == torch.device("cpu")
    assert capfd.readouterr().err == f"fastssl: warning: running on the CPU: {TOO_OLD}\n"
    assert choose_device("cpu") == torch.device("cpu")
    assert capfd.readouterr().err == ""


def test_one_process_of_a_machine_warns(no_gpu, monkeypatch, capfd):
    set_driver(monkeypatch, "535.104.05", (12, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cpu")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("cuda", [None, (13, 2), (13, 0)])
def test_a_driver_that_is_new_enough_is_not_blamed(cuda, no_gpu, monkeypatch):
    set_driver(monkeypatch, "580.65.06", cuda)
    reason = nvidia_gpu.why_no_gpu()
    assert reason is not None
    assert "finds no GPU under NVIDIA driver 580.65.06: see CUDA_VISIBLE_DEVICES" in reason
    assert "newer driver" not in reason


def test_torch_for_the_cpu_under_a_driver(no_gpu, monkeypatch):
    set_driver(monkeypatch, "580.65.06", (13, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"built for the CPU, under NVIDIA driver 580\.65\.06: install a CUDA build"):
        choose_device("cuda")


@pytest.mark.parametrize(("driver", "visible"), [(None, None), ("580.65.06", ""), ("580.65.06", "-1")])
def test_without_a_driver_or_where_gpus_are_hidden_the_cpu_is_taken_in_silence(
    driver, visible, no_gpu, monkeypatch, capfd
):
    set_driver(monkeypatch, driver, (13, 0))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_device("auto") == torch.device("cpu")
    assert capfd.readouterr().err == ""
    with pytest.raises(ConfigError, match=r"run\.device is cuda, but torch .*finds no GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_an_old_gpu_ends_a_training_before_anything_is_built(wanted, gpus, tiny_config, in_process):
    gpus((7, 5))
    done = in_process("train", "--cfg", tiny_config, "--set", f"run.device={wanted}")
    line = "this GPU (Tesla T4) is compute capability 7.5; fastssl needs 8.0 (A100, RTX 30) or newer: use --set run.dev"
    assert_one_line(done, line)
    assert not (tiny_config.parent / "run").exists()


def test_a_gpu_that_is_new_enough_is_taken_by_local_rank(gpus, monkeypatch):
    for capability in ((8, 0), (8, 6), (12, 0)):
        gpus(capability)
        assert choose_device("auto") == torch.device("cuda", 0)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert choose_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU, because torch finds only 2: start 2"):
        choose_device("cuda")


def test_the_loader_benchmark_names_its_own_option(gpus, no_gpu):
    with pytest.raises(
        ConfigError, match=r"^--device is cuda, but torch finds no GPU.*; or use the CPU with --device cpu$"
    ):
        choose_device_option("cuda")
    gpus((7, 0))
    with pytest.raises(ConfigError, match=r"capability 7\.0; .* or newer: use --device cpu$"):
        choose_device_option("auto")


def test_the_doctor_says_the_same(no_gpu, gpus, monkeypatch):
    node = Node(cfg=build_config({"run": {"device": "cuda"}}))
    set_driver(monkeypatch, "535.104.05", (12, 2))
    monkeypatch.setattr("fastssl.commands.doctor.gpu._nvidia_smi", lambda: "NVIDIA A100, driver 535.104.05, 40960 MiB")
    found = check_gpu(node)
    assert found.status == "fail"
    assert f"{found.detail}: {found.advice}" == f"NVIDIA A100, driver 535.104.05, 40960 MiB, but {TOO_OLD}"
    gpus((6, 1))
    found = check_gpu(node)
    assert (found.status, "compute capability 6.1" in found.detail) == ("fail", True)
    gpus((8, 0))
    assert check_gpu(node).status == "ok"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC 12.2.0", "580.65.06"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  390.157  Wed Oct 12 2022\n", "390.157"),
    ],
)
def test_the_version_of_a_driver(text, version, tmp_path, monkeypatch):
    monkeypatch.setattr(nvidia_gpu, "_DRIVER_FILE", tmp_path / "version")
    (tmp_path / "version").write_text(text)
    assert nvidia_gpu.driver_version() == version


def test_the_version_of_a_driver_that_only_nvidia_smi_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(nvidia_gpu, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_gpu.driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 572.16\necho 572.16\n")
    program.chmod(0o755)
    assert nvidia_gpu.driver_version() == "572.16"
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert nvidia_gpu.driver_version() is None


FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 140 GiB\n"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
)


@pytest.mark.parametrize("error", FULL)
def test_full_memory_ends_a_command_in_one_line(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("fastssl.commands.doctor.examine.examine", fail)
    assert main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastssl: error: the GPU's memory is full: ")
    assert "data.global_batch_size" in err
    assert str(error).splitlines()[0] in err
    assert err.count("\n") == 1


def test_another_error_is_not_full_memory(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("fastssl.commands.doctor.examine.examine", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        main(["doctor"])

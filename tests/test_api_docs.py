"""The Python interface is as docs/api.md says: its examples run, its names exist, and it costs nothing to import.

The file is also the program of a rank: `python test_api_docs.py RANK WORLD_SIZE FOLDER`.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import fastssl
from fastssl import collectives
from tests.helpers.processes import ROOT, environment, join_ranks, start_ranks

DOCUMENT = ROOT / "docs/api.md"
GLOBAL_BATCH_SIZE = 16
DDP = "# ddp.py: torchrun --nproc_per_node 2 ddp.py\n"


def python_blocks() -> list[str]:
    """The document's examples, in order."""
    return re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), flags=re.MULTILINE | re.DOTALL)


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder, with this checkout on its path."""
    settings = environment() | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=240, check=False)


# -- examples


def prepare(folder: Path, tiny_config: Path) -> None:
    """What the examples name: configs/demo.yaml and photographs/."""
    (folder / "configs").mkdir()
    tree = yaml.safe_load(tiny_config.read_text())
    (folder / "configs/demo.yaml").write_text(yaml.safe_dump(tree))
    (folder / "photographs/garden").mkdir(parents=True)
    levels = np.random.default_rng(0).integers(0, 256, (3, 20, 28, 3), dtype=np.uint8)
    for name, image in zip(("cat.jpg", "dog.png", "garden/tree.jpg"), levels, strict=True):
        Image.fromarray(image).save(folder / "photographs" / name)


def test_the_examples_run(tmp_path: Path, tiny_config: Path) -> None:
    """All of them but ddp.py, in order and in one namespace."""
    prepare(tmp_path, tiny_config)
    blocks = [block for block in python_blocks() if not block.startswith(DDP)]
    assert len(blocks) == len(python_blocks()) - 1 == 9
    checks = """
assert features.shape == (3, encoder.num_features) and similarity.shape == (3, 3)
assert torch.isfinite(features).all() and torch.isfinite(loss) and torch.isfinite(nt_xent)
assert cfg.custom == {} and run.metrics.is_file() and not (run.path.parent / "b").exists()
"""
    (tmp_path / "examples.py").write_text("\n".join([*blocks, checks]))
    done = run_python(tmp_path, "examples.py")
    assert done.returncode == 0, done.stderr
    assert "unknown key run.sed: did you mean seed?" in done.stdout
    assert "MyLoss on 64 images, MyEncoder (0.00 M parameters), global batch 16 on 1 x cpu" in done.stdout
    custom = yaml.safe_load((tmp_path / "runs/own/config.yaml").read_text())["custom"]
    assert custom.keys() == {"model", "loss", "loader"}


@pytest.mark.slow
@pytest.mark.dist
def test_the_example_of_ddp_runs_on_two_ranks(tmp_path: Path) -> None:
    (block,) = [block for block in python_blocks() if block.startswith(DDP)]
    report = 'print(f"RANK {torch.distributed.get_rank()} {loss.item():.6f}", flush=True)\n'
    end = "torch.distributed.destroy_process_group()\n"
    assert block.endswith(end)
    (tmp_path / "ddp.py").write_text(block.replace(end, report + end))
    done = run_python(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ddp.py")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"RANK (\d) -?\d+\.\d+", done.stdout)) == ["0", "1"]


# -- names


@pytest.mark.parametrize("name", fastssl.__all__)
def test_every_name_exists_and_is_documented(name: str) -> None:
    value = getattr(fastssl, name)
    assert value.__doc__
    assert value.__doc__.strip()
    assert f"`fastssl.{name}`" in DOCUMENT.read_text()


def test_no_other_name_is_documented() -> None:
    from fastssl import functional, losses

    text = DOCUMENT.read_text()
    assert set(re.findall(r"fastssl\.([A-Za-z]\w*)", text)) <= {*fastssl.__all__, "errors"}
    assert {cls.__name__ for cls in losses.CLASSES} <= set(re.findall(r"`(\w+)`", text))
    assert {name for name in losses.LOSSES if f"`{name}`" not in text} == set()
    assert {name for name in functional.__all__ if f"| `{name}(" not in text} == set()


# -- import


def test_import_takes_no_torch_and_no_time(tmp_path: Path) -> None:
    """Process time, not wall time, and the best of several: other processes share the cores."""

    def seconds(statement: str) -> float:
        program = f"{statement}; import sys, time; print(time.process_time(), {{'torch', 'numpy'}} & set(sys.modules))"
        done = run_python(tmp_path, "-c", program)
        assert done.returncode == 0, done.stderr
        number, found = done.stdout.split(maxsplit=1)
        assert found.strip() == "set()"
        return float(number)

    empty = min(seconds("pass") for _ in range(5))
    imported = min(seconds("import fastssl") for _ in range(5))
    assert imported - empty < 0.1


# -- gradients under DistributedDataParallel


def build_encoder() -> nn.Module:
    """fp64 and no batch norm: nothing but the loss can differ between one rank and two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double()


def local_views() -> Tensor:
    """This rank's samples of two views [2, B, 6]."""
    views = torch.randn(2, GLOBAL_BATCH_SIZE, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return views.chunk(collectives.world_size(), dim=1)[collectives.rank()]


def gradients(encoder: nn.Module) -> list[Tensor]:
    """Of a training loop's step, as docs/api.md has it."""
    criterion = fastssl.losses.Mio(temperature_negative=0.2)
    z_a, z_b = encoder(local_views().flatten(0, 1)).chunk(2)
    criterion(z_a, z_b).backward()
    return [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]


@pytest.mark.dist
def test_mio_under_ddp_has_the_gradients_of_the_global_batch(tmp_path: Path) -> None:
    """To 1e-10 of each gradient's norm: sums in fp64, in another order."""
    expected = gradients(build_encoder())
    assert len(expected) == 4
    for found in start_ranks(__file__, 2, tmp_path):
        for ours, wanted in zip(found, expected, strict=True):
            assert wanted.norm() > 1e-3
            assert (ours - wanted).norm() <= 1e-10 * wanted.norm()


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    join_ranks(rank, world_size, folder)
    torch.save(gradients(nn.parallel.DistributedDataParallel(build_encoder())), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

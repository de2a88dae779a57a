"""docs/adding_a_loss.md works as it is written: its code blocks, in a copy of the sources, in real processes.

| block of the document           | where it goes in the copy                  |
|---------------------------------|--------------------------------------------|
| python 0, the loss              | fastssl/losses/align_uniform.py            |
| diff 0, the import and the line | fastssl/losses/__init__.py                 |
| yaml 0, the selection           | the configuration of a tiny training       |
| python 1, the tests             | tests/fastssl/losses/test_align_uniform.py |
| diff 1, the line for the ranks  | tests/fastssl/losses/test_losses_dist.py   |
| python 2, a module of your own  | a separate program                         |
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastssl.tracking.writers import read_rows
from tests.helpers.documents import blocks, copy_sources, patch, run_in
from tests.helpers.processes import ROOT

DOCUMENT = ROOT / "docs/adding_a_loss.md"
RUFF = Path(sys.executable).with_name("ruff")
RANK_PROGRAM = """
import sys
from pathlib import Path
import torch
from tests.fastssl.losses import test_losses_dist as ranks

ranks.LOSS_CONFIGS = {"align_uniform": ranks.LOSS_CONFIGS["align_uniform"]}
ranks.KERNEL_CASES = {}
if __name__ == "__main__":
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    ranks.join_ranks(rank, world_size, folder)
    torch.save((ranks.run_losses(), ranks.run_ddp()), folder / f"rank{rank}.pt")
"""
START_RANKS = """
import sys
from pathlib import Path
import torch
from tests.helpers.processes import start_ranks
from rank_program import ranks

for found in start_ranks("rank_program.py", 2, Path(sys.argv[1])):
    expected = ranks.run_losses()
    assert list(expected) == ["align_uniform"], expected
    value, grads = expected["align_uniform"]
    assert value.isfinite() and all(grad.norm() > 1e-4 for grad in grads.values()), grads
    for of_ranks in found:
        wrong = ranks.differences(of_ranks, expected)
        assert wrong == [], wrong
print("one loss, one gradient")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, with the document's loss in them."""
    folder = tmp_path_factory.mktemp("copy")
    copy_sources(folder)
    tests = folder / "tests/fastssl/losses"
    tests.mkdir(parents=True)
    shutil.copy(ROOT / "tests/fastssl/losses/test_losses_dist.py", tests)
    loss, test, _ = blocks(DOCUMENT, "python")
    of_package, of_ranks = blocks(DOCUMENT, "diff")
    (folder / "fastssl/losses/align_uniform.py").write_text(loss)
    (tests / "test_align_uniform.py").write_text(test)
    patch(folder / "fastssl/losses/__init__.py", of_package)
    patch(tests / "test_losses_dist.py", of_ranks)
    return folder


def test_it_trains_by_the_name_in_the_configuration(copy: Path, tiny_config: Path, tmp_path: Path) -> None:
    (selected,) = blocks(DOCUMENT, "yaml")
    tree = yaml.safe_load(tiny_config.read_text()) | yaml.safe_load(selected)
    tiny_config.write_text(yaml.safe_dump(tree))
    done = run_in(copy, "fastssl/train.py", "--cfg", tiny_config)
    assert done.returncode == 0, done.stderr
    assert "align_uniform on 1,297 images" in done.stdout
    losses = [row["loss"] for row in read_rows(tmp_path / "run/metrics.jsonl") if "kind" not in row]
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_its_tests_pass(copy: Path) -> None:
    """Reference, gradcheck in fp64 and a bad setting, as the document has them."""
    done = run_in(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fastssl/losses/test_align_uniform.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_an_unknown_setting_is_named(copy: Path, tiny_config: Path) -> None:
    change = "loss={name: align_uniform, uniformity_wieght: 2.0}"
    done = run_in(copy, "fastssl/train.py", "--cfg", tiny_config, "--set", change)
    assert done.returncode == 2
    assert "loss.uniformity_wieght" in done.stderr
    assert "did you mean uniformity_weight?" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_give_loss_and_gradients_of_one_process(copy: Path, tmp_path: Path) -> None:
    """To 1e-12 and 1e-10, by an averaging engine and by DistributedDataParallel; see test_losses_dist.py."""
    (copy / "rank_program.py").write_text(RANK_PROGRAM)
    done = run_in(copy, "-c", START_RANKS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "one loss, one gradient" in done.stdout
    assert len(torch.load(tmp_path / "rank1.pt")) == 2


@pytest.mark.slow
def test_a_module_of_your_own_is_trained(copy: Path) -> None:
    done = run_in(copy, "-c", blocks(DOCUMENT, "python")[2])
    assert done.returncode == 0, done.stderr
    assert "Alignment on 256 images, Sequential" in done.stdout
    losses = [row["loss"] for row in read_rows(copy / "runs/own/metrics.jsonl") if "kind" not in row]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.skipif(not RUFF.exists(), reason="ruff is not installed")
@pytest.mark.parametrize("rule", [("check", "--quiet", "-"), ("format", "--check", "-")])
def test_its_code_follows_the_style_of_the_source(rule: tuple[str, ...]) -> None:
    for block in blocks(DOCUMENT, "python"):
        done = subprocess.run([RUFF, *rule], input=block, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr

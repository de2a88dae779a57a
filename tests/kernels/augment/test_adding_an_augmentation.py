"""docs/adding_an_augmentation.md works as it is written: its code blocks, in a copy of the sources, in real processes.

| block of the document     | where it goes in the copy             |
|---------------------------|---------------------------------------|
| python 0, the op          | kernels/augment/ops/gamma.py          |
| diff 0, the import, line  | kernels/augment/ops/__init__.py       |
| yaml 0, the selection     | the views of a configuration          |
| python 1, the tests       | tests/kernels/augment/test_gamma.py   |
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.documents import blocks, copy_sources, patch, run_in
from tests.helpers.processes import ROOT

DOCUMENT = ROOT / "docs/adding_an_augmentation.md"
RUFF = Path(sys.executable).with_name("ruff")
# With gamma alone changed, a view of the loader is the view without it to the power of the drawn exponent.
LOADER = """
import sys
import torch
import yaml
from pipelines.beton import BetonReader
from pipelines.loader import DataConfig, build_loader
from pipelines.views import ViewsConfig, build_view_specs, draw

override = yaml.safe_load(sys.argv[2])["views"]["override"]
reader, seen = BetonReader(sys.argv[1]), []
for change in ({}, override):
    views = ViewsConfig(recipe="simclr", size_px=16, mean=(0, 0, 0), std=(1, 1, 1), override=change)
    data = DataConfig(train=sys.argv[1], global_batch_size=32)
    loader = build_loader(
        reader, data, views, seed=3, rank=0, world_size=1, device=torch.device("cpu"), num_threads=1
    )
    seen.append(next(iter(loader.epoch(0))))
    loader.close()
plain, batch = seen
ids = batch.sample_ids.numpy()
params = draw(build_view_specs(views), 3, 0, ids, reader.sizes[ids])
assert 10 < params["gamma"].sum() < 54, params["gamma"].sum()
for view in range(2):
    exponent = torch.tensor([float(p["gamma_exponent"]) if p["gamma"] else 1.0 for p in params[:, view]])
    torch.testing.assert_close(
        batch.views[view], plain.views[view] ** exponent[:, None, None, None], rtol=0, atol=2e-6
    )
print("as drawn")
"""
COMPILE = """
from pathlib import Path
import kernels.augment.augment_kernels as kernels
from tests.kernels.augment.test_fused import test_machine_code

assert "gamma_exponent" in kernels.POINTWISE_PARAMS
test_machine_code("augment_rows", False, Path("."))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, with the document's op in them."""
    folder = tmp_path_factory.mktemp("copy")
    copy_sources(folder)
    tests = folder / "tests/kernels/augment"
    tests.mkdir(parents=True)
    shutil.copy(ROOT / "tests/kernels/augment/test_fused.py", tests)
    op, test = blocks(DOCUMENT, "python")
    (diff,) = blocks(DOCUMENT, "diff")
    (folder / "kernels/augment/ops/gamma.py").write_text(op)
    (tests / "test_gamma.py").write_text(test)
    patch(folder / "kernels/augment/ops/__init__.py", diff)
    return folder


@pytest.mark.parametrize(
    "interpret", [pytest.param("0", id="numba", marks=pytest.mark.slow), pytest.param("1", id="triton")]
)
def test_its_tests_pass(copy: Path, interpret: str) -> None:
    if interpret == "1":
        pytest.importorskip("triton", reason="Triton is not installed")
    path = "tests/kernels/augment/test_gamma.py"
    done = run_in(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, TRITON_INTERPRET=interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


@pytest.mark.slow
def test_the_loader_applies_what_is_drawn(copy: Path, digits: Path) -> None:
    (selected,) = blocks(DOCUMENT, "yaml")
    done = run_in(copy, "-c", LOADER, digits / "train.beton", selected)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "as drawn"


def test_its_machine_code(copy: Path) -> None:
    """Compiled for a GPU, with the op in it: nothing spilled."""
    pytest.importorskip("tests.helpers.machine_code", exc_type=ImportError)
    done = run_in(copy, "-c", COMPILE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{gama_p: 0.5}", "gama_p"),
        ("{gamma_exponent: [2, 1]}", "gamma_exponent must be low <= high, not (2, 1)"),
    ],
)
def test_a_bad_field_is_one_line(copy: Path, tiny_config: Path, change: str, message: str) -> None:
    done = run_in(copy, "fastssl/train.py", "--cfg", tiny_config, "--set", f"views.override={change}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_ops_with_one_number_are_an_error(copy: Path) -> None:
    """They would be drawn from the same random numbers."""
    op = copy / "kernels/augment/ops/gamma.py"
    text = op.read_text()
    op.write_text(text.replace("number=7", "number=6"))
    done = run_in(copy, "-c", "import pipelines.view_spec")
    op.write_text(text)
    assert done.returncode == 1
    assert "two ops have one number: crop 0" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not RUFF.exists(), reason="ruff is not installed")
@pytest.mark.parametrize("rule", [("check", "--quiet", "-"), ("format", "--check", "-")])
def test_its_code_follows_the_style_of_the_source(rule: tuple[str, ...]) -> None:
    for block in blocks(DOCUMENT, "python"):
        done = subprocess.run([RUFF, *rule], input=block, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr

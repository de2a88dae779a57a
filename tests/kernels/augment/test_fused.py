"""The fused pixel op where there is no GPU: fused_cases.py in Triton's interpreter, and its machine code."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.augment import augment
from kernels.augment.params import VIEW_PARAMS
from tests.helpers.interpreter import run_cases

CASES = "tests/kernels/augment/fused_cases.py"

pytest.importorskip("triton", reason="Triton is not installed")


def test_cases_in_the_interpreter() -> None:
    run_cases(CASES, "not slow")


@pytest.mark.slow
def test_more_cases_in_the_interpreter() -> None:
    run_cases(CASES, "slow")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can run")
def test_where_it_cannot_run_it_says_so() -> None:
    params = np.zeros((1, 1), VIEW_PARAMS)
    with pytest.raises(ValueError, match=r"impl fused: it needs a CUDA device .* views are on cpu"):
        augment(torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8), params, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("stored", [False, True], ids=["views", "images"])
@pytest.mark.parametrize("kernel", ["sum_grey", "augment_rows"])
def test_machine_code(kernel: str, stored: bool, tmp_path: Path) -> None:
    """For compute capability 9.0, compiled without a GPU: nothing spilled, two programs a multiprocessor."""
    from kernels.augment import augment_kernels, fused
    from tests.helpers.machine_code import compile_kernel, disassemble

    types = dict.fromkeys(("records", "sums", "scales", "shifts", "scratch"), "*fp32")
    types |= {"pixels": "*u8", "image_ids": "*i64", "out": "*bf16"}
    constants: dict[str, Any] = {"NUM_FIELDS": augment_kernels.FIELDS.value, "STORED": stored}
    constants |= {"CHUNKS": fused.CHUNKS, "BLOCK": fused.BLOCK_PX}
    if not stored:
        constants["image_ids"] = None
    compiled = compile_kernel(getattr(augment_kernels, kernel), types, constants, {"num_warps": fused.NUM_WARPS})
    code = disassemble(compiled, tmp_path)
    assert code.count(r"\b(STL|LDL)\b") == 0
    programs = 65536 // (-(-code.num_registers // 8) * 8 * 32 * fused.NUM_WARPS)
    assert programs >= (1 if stored else fused.PROGRAMS_PER_MULTIPROCESSOR)

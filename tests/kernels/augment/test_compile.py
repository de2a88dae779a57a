"""The machine code of the pixel op for compute capability 9.0, compiled without a GPU.

Triton's interpreter runs Python, so it takes what the compiler refuses.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.augment import augment_kernels
from kernels.augment.fused import BLOCK_PX, CHUNKS, NUM_WARPS
from tests.helpers.machine_code import compile_kernel, disassemble

POINTERS = ("records", "sums", "scales", "shifts", "scratch")


@pytest.mark.parametrize("stored", [False, True], ids=["views", "stored images"])
@pytest.mark.parametrize(("name", "out"), [("sum_grey", "fp32"), ("augment_rows", "fp32"), ("augment_rows", "bf16")])
def test_no_spills(name: str, out: str, stored: bool, tmp_path: Path) -> None:
    fields = augment_kernels.FIELDS.value
    constants: dict[str, Any] = {"NUM_FIELDS": fields, "STORED": stored, "CHUNKS": CHUNKS, "BLOCK": BLOCK_PX}
    types = dict.fromkeys(POINTERS, "*fp32") | {"pixels": "*u8", "out": f"*{out}"}
    if stored:
        types["image_ids"] = "*i64"
    else:
        constants["image_ids"] = None
    kernel = getattr(augment_kernels, name)
    code = disassemble(compile_kernel(kernel, types, constants, {"num_warps": NUM_WARPS}), tmp_path)
    assert code.num_registers <= 255  # one program of 256 threads then fits a multiprocessor
    assert code.count(r"\b(STL|LDL)\b") == 0

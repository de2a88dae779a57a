"""Machine code of Triton kernels for compute capability 9.0, compiled and read without a GPU."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
if not all((PROGRAMS / name).exists() for name in ("ptxas", "cuobjdump", "nvdisasm")):
    pytest.skip("this Triton brings no CUDA assembler", allow_module_level=True)


class MachineCode(NamedTuple):
    instructions: list[str]
    main_loop: list[str]
    num_registers: int
    shared_bytes: int

    def count(self, pattern: str, loop: bool = False) -> int:
        return sum(bool(re.search(pattern, x)) for x in (self.main_loop if loop else self.instructions))


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    divisible: tuple[str, ...] = (),
) -> Any:
    """Compile for the given argument types; pointers, strides and `divisible` are multiples of 16, as in real use."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [
        i
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and ("stride" in name or name in divisible))
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)


def disassemble(compiled: Any, folder: Path) -> MachineCode:
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])

    def output(program: str, flag: str) -> str:
        command = [PROGRAMS / program, flag, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    instructions, labels, loops = [], {}, []
    for line in output("nvdisasm", "-c").splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(match[1])
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], len(instructions)) <= end:
            body = instructions[labels[target[1]] : end + 1]
            if any("HGMMA" in x for x in body):
                loops.append(body)
    registers = re.search(r"REG:(\d+)", output("cuobjdump", "--dump-resource-usage"))
    assert registers
    # The first innermost loop with matrix products; the loop without masks comes first.
    return MachineCode(instructions, min(loops, key=len, default=[]), int(registers[1]), compiled.metadata.shared)

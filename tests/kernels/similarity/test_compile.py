"""The machine code of the fused kernels for compute capability 9.0, compiled without a GPU.

It catches a slow epilogue on a machine that cannot run it: registers, spills, the tensor cores' instruction and the
instructions that one pair costs in the main loop. Instructions are what is counted, not time.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kernels.gram_loss import fused as gram
from kernels.similarity import row_kernels, strip_kernels, strips, tile_kernels, tiles
from kernels.similarity.epilogues import KINDS
from tests.helpers.machine_code import MachineCode, compile_kernel, disassemble, triton


class TileCase(NamedTuple):
    """A production configuration of the one-pass kernel, and the instructions that a pair may cost."""

    kind: str
    width: int
    budget: float
    wanted: str = "sums pulls"
    wide: bool = False
    weighted: bool = False
    groups: bool = False
    shares: bool = False
    in_3_6: float | None = None  # the budget with Triton 3.6, where it is another
    asynchronous: bool = True  # the products; False: ptxas serializes them, and it is measured to be faster

    def __str__(self) -> str:
        flags = [name for name in ("wide", "weighted", "groups") if getattr(self, name)]
        return "-".join([self.kind, str(self.width), *flags, *self.wanted.split(), *(["share"] if self.shares else [])])


def choose_config(case: TileCase) -> tiles.TileConfig:
    return tiles.choose_config(
        case.width,
        case.weighted,
        case.groups,
        only_pulls=case.wanted == "pulls",
        narrow_exp=case.kind == "exp" and not case.wide and not case.weighted,
        wide_exp=case.wide,
        only_sums=case.wanted == "sums",
    )


def compile_tiles(case: TileCase, folder: Path) -> tuple[MachineCode, float]:
    """The code, and the instructions of its main loop for each pair."""
    config = choose_config(case)
    wants = {name: name in case.wanted.split() for name in ("sums", "slopes", "pulls")}
    constants: dict[str, Any] = {name.upper(): value for name, value in wants.items()}
    constants |= {
        "KIND": KINDS[case.kind],
        "WIDE": case.wide,
        "WEIGHTED": case.weighted,
        "GROUPS": case.groups,
        "PARTS": case.shares,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "D": case.width,
        "WIDTH": case.width,
        "STAGES": config.stages,
        "INTERP": False,
    }
    types = {
        "rows": f"tensordesc<fp16[1,{config.rows},{case.width}]>",
        "columns": f"tensordesc<fp16[1,{config.columns},{case.width}]>",
        "inv_temperature": "*fp32",
        "bias": "*fp32",
    }
    optional = {name: ("*fp32", wanted) for name, wanted in wants.items()}
    optional |= {f"{name[:-1]}_parts": ("*fp32", wanted and case.shares) for name, wanted in wants.items()}
    for side in ("row", "column"):
        optional |= {f"{side}_groups": ("*i64", case.groups), f"{side}_weights": ("*fp32", case.weighted)}
    types |= {name: kind for name, (kind, given) in optional.items() if given}
    constants |= {name: None for name, (_, given) in optional.items() if not given}
    compiled = compile_kernel(tile_kernels.one_pass_rows, types, constants, {"num_warps": config.num_warps})
    code = disassemble(compiled, folder)
    pairs_of_a_thread = config.rows * config.columns / (32 * config.num_warps)
    return code, len(code.main_loop) / pairs_of_a_thread


def check_tiles(case: TileCase, folder: Path) -> None:
    code, instructions_per_pair = compile_tiles(case, folder)
    assert code.num_registers <= 255
    assert code.count(r"\b(STL|LDL)\b", loop=True) == 0
    assert code.count(r"\b(STL|LDL)\b") <= (12 if case.width == 256 else 0), "spilled"
    assert code.count("HGMMA") > 0
    if case.kind != "softplus":
        assert code.count(r"HGMMA.*!UPT", loop=True) > 0, "the bias is a summand of the product"
    # One wait for each of the two products: more, and ptxas runs every instruction of them by itself.
    if case.asynchronous:
        assert code.count(r"WARPGROUP\.ARRIVE", loop=True) <= 2, "the products are not asynchronous"
    budget = case.in_3_6 if case.in_3_6 and triton.__version__.startswith("3.6.") else case.budget
    assert instructions_per_pair <= budget, f"{instructions_per_pair:.2f} instructions a pair"
    programs = min(65536 // (-(-code.num_registers // 8) * 8 * 128), (227 * 1024) // (code.shared_bytes + 1024))
    assert programs >= choose_config(case).programs


# The larger of what Triton 3.7.1 and 3.6.0 make, plus 3 %. 3.6 makes more of weights and groups: a budget of its own.
# Least possible at 64 columns a tile: 2 to 3 instructions a pair are the loop's.
QUICK = [
    TileCase("softplus", 128, 13.9),
    TileCase("exp", 128, 5.3),
    TileCase("exp", 128, 8.4, wide=True, asynchronous=False),
    TileCase("exp", 128, 6.1, wide=True, wanted="sums"),
    TileCase("exp", 128, 10.7, weighted=True, wanted="pulls"),
    TileCase("softplus", 256, 15.0),
]
SLOW = [
    TileCase("square", 128, 7.2),
    TileCase("exp", 128, 5.3, wanted="sums slopes pulls"),
    TileCase("exp", 128, 5.3, shares=True),
    TileCase("exp", 128, 8.4, wide=True, asynchronous=False, wanted="sums slopes pulls", shares=True),
    TileCase("softplus", 128, 14.9, wanted="sums slopes pulls"),
    TileCase("softplus", 128, 13.9, shares=True),
    TileCase("exp", 128, 4.5, wanted="sums"),
    TileCase("softplus", 128, 7.6, wanted="sums"),
    TileCase("square", 128, 5.0, wanted="sums"),
    TileCase("softplus", 128, 22.6, groups=True, in_3_6=29.3),
    TileCase("exp", 128, 22.3, weighted=True, groups=True, wanted="pulls", in_3_6=25.8),
    TileCase("exp", 128, 15.5, weighted=True, wanted="slopes pulls", in_3_6=18.4),
    *(TileCase("exp", width, 5.1) for width in (16, 32, 64)),
    *(TileCase("softplus", width, 14.6, wanted="sums slopes pulls") for width in (16, 32, 64)),
    TileCase("softplus", 64, 7.5, wanted="sums"),
    *(TileCase("exp", width, 9.5, wide=True) for width in (16, 32, 64)),
    TileCase("exp", 16, 5.8, wide=True, wanted="sums"),
    *(TileCase("exp", width, 13.1, weighted=True, wanted="pulls", in_3_6=15.9) for width in (16, 32, 64)),
    TileCase("exp", 256, 7.7),
    TileCase("softplus", 256, 15.9, wanted="sums slopes pulls"),
    TileCase("exp", 256, 13.9, wide=True),
    TileCase("exp", 256, 17.3, weighted=True, wanted="pulls", in_3_6=20.5),
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_tiles(case: TileCase, tmp_path: Path) -> None:
    check_tiles(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_more_tiles(case: TileCase, tmp_path: Path) -> None:
    check_tiles(case, tmp_path)


@pytest.mark.parametrize(
    ("kind", "weighted", "dtype"), [("softplus", False, "fp16"), ("exp", True, "fp32"), ("square", False, "fp32")]
)
def test_strips(kind: str, weighted: bool, dtype: str, tmp_path: Path) -> None:
    block_r, block_c, step, num_warps, num_stages = strips.CONFIG
    constants: dict[str, Any] = {"KIND": KINDS[kind], "WEIGHTED": weighted, "GROUPS": False, "INTERP": False}
    constants |= {"BLOCK_R": block_r, "BLOCK_C": block_c, "STEP": step, "PART": strips.PART}
    constants |= {"row_groups": None, "column_groups": None}
    if not weighted:
        constants |= {"row_weights": None, "column_weights": None}
    names = (
        "bias",
        "row_weights",
        "column_weights",
        "row_parts",
        "column_parts",
        "row_slope_parts",
        "column_slope_parts",
    )
    types = {name: "*fp32" for name in names if name not in constants}
    types |= {"rows": f"tensordesc<fp16[{block_r},{step}]>", "columns": f"tensordesc<fp16[{block_c},{step}]>"}
    types["slopes"] = f"*{dtype}"
    options = {"num_warps": num_warps, "num_stages": num_stages}
    code = disassemble(compile_kernel(strip_kernels.pair_strip, types, constants, options), tmp_path)
    assert code.num_registers <= 255
    assert code.count(r"\b(STL|LDL)\b") == 0
    assert code.count("HGMMA", loop=True) > 0


@pytest.mark.parametrize("width", [128, 2048])
def test_row_kernels(width: int, tmp_path: Path) -> None:
    shape = {"V": 2, "D": width, "WIDTH": width, "ROWS": max(1, 2048 // width)}
    pointers = ("inv_norm", "positives", "inv_temperature", "pulls", "pull_scale", "positive_grads", "dots")
    types = dict.fromkeys(pointers, "*fp32") | {"z": "*bf16", "dz": "*bf16", "u": "*fp16"}
    for kernel, constants in (
        (row_kernels.normalize_rows, shape | {"PADDED": width}),
        (row_kernels.finish_rows, shape),
    ):
        code = disassemble(compile_kernel(kernel, types, constants, {"num_warps": 4}), tmp_path)
        assert code.num_registers <= 128
        assert code.count(r"\b(STL|LDL)\b") == 0
        assert code.count(r"LDG\.E.*\.128") > 0, "loads are not 16 bytes wide"


@pytest.mark.parametrize(("num_views", "own"), [(2, 0b11), (2, 0b10), (3, 0b111)], ids=["self2", "cross", "self3"])
@pytest.mark.parametrize("width", [32, 128])
def test_gram(width: int, num_views: int, own: int, tmp_path: Path) -> None:
    block, num_warps = gram.choose_config(width)
    constants = {"NUM_VIEWS": num_views, "OWN": own, "PULLS": True, "BM": block, "BD": block}
    types = dict.fromkeys(("x_ptr", "first_ptr", "second_ptr", "sums_ptr", "pulls_ptr"), "*fp32")
    types |= {"linear": "fp32", "square": "fp32"}
    compiled = compile_kernel(gram._add_rows, types, constants, {"num_warps": num_warps}, divisible=("width",))
    code = disassemble(compiled, tmp_path)
    assert code.num_registers <= 255
    assert code.count(r"\b(STL|LDL)\b") == 0
    assert code.count(r"MMA.*TF32") > 0
    assert code.count(r"LDG\.E.*\.128") > 0, "loads are not 16 bytes wide"

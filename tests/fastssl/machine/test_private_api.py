"""Private names of libraries: all in one file, and looked for before a training needs them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from fastssl.errors import UserError
from fastssl.machine import private_api
from fastssl.machine.private_api import ENGINE, TRIED, ZERO, check_libraries
from tests.helpers.processes import ROOT, environment

HOME = "fastssl/machine/private_api.py"
# Names without an underscore that no documentation has, without those that other things are called too.
UNDOCUMENTED = {*ENGINE, *ZERO, "found_inf"} - {"optimizer"}
DOCUMENTED = {"_replace", "_asdict", "_exit"}  # of named tuples and of os
# kernels/ imports nothing of fastssl; tests/kernels/similarity/test_compile.py and test_augment.py need these names.
OF_KERNELS = {
    ("kernels/augment/cpu.py", "_cache"),
    ("kernels/augment/cpu.py", "_cache_file"),
    (
        "kernels/augment/loops/layout.py",
        "_getvalue",
    ),  # of numba's array structures, for which intrinsics have no other way
    ("kernels/augment/cpu.py", "_load_index"),
    ("kernels/augment/cpu.py", "_source_stamp"),
    ("kernels/similarity/__init__.py", "_dynamo_marked_constant"),
}
# argparse shows its sub-commands and options in no other way.
OF_ARGPARSE = {
    ("fastssl/commands/argument_parser.py", "_SubParsersAction"),
    ("fastssl/commands/completion.py", "_SubParsersAction"),
    ("fastssl/commands/completion.py", "_actions"),
}


def is_private(name: str) -> bool:
    hidden = name.startswith("_") and not (name.startswith("__") and name.endswith("__"))
    return (hidden and name not in DOCUMENTED) or name in UNDOCUMENTED or name == "__compatible_ops__"


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of other objects than self that a file reads, writes, imports or asks for by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            if isinstance(node, ast.ImportFrom):
                parts += (node.module or "").split(".")
            yield from (part for part in parts if part.startswith("_") and is_private(part))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            yield from filter(is_private, words)


def test_no_other_file_uses_a_private_name_of_a_library():
    files = [path for top in ("fastssl", "pipelines", "kernels") for path in (ROOT / top).rglob("*.py")]
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}
    found = {(file, name) for file, tree in trees.items() for name in private_names(tree)}
    assert {(file, name) for file, name in found if file != HOME} == OF_KERNELS | OF_ARGPARSE
    assert any(file == HOME for file, _ in found)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("torch._foreach_add_(a, b)", "_foreach_add_"),
        ("from torch.nn.modules.batchnorm import _BatchNorm", "_BatchNorm"),
        ("import torch._dynamo", "_dynamo"),
        ("from torch.utils._python_dispatch import X", "_python_dispatch"),
        ("getattr(engine, '_step')", "_step"),
        ("setattr(engine, 'global_steps', 1)", "global_steps"),
        ("engine.optimizer.overflow = True", "overflow"),
        ("deepspeed.ops.__compatible_ops__", "__compatible_ops__"),
    ],
)
def test_the_scan_finds(code: str, name: str):
    assert list(private_names(ast.parse(code))) == [name]


def test_the_scan_allows_own_and_documented_names():
    assert not list(private_names(ast.parse("self._x; cls._y; a.__class__; os._exit(0); point._replace(x=1)")))


def test_the_pinned_versions_are_tried_ones():
    pins = {line.strip() for path in (ROOT / "requirements").glob("*.txt") for line in path.read_text().splitlines()}
    for library, tried in TRIED.items():
        versions = [pin.partition("==")[2] for pin in pins if pin.startswith(f"{library}==")]
        assert versions
        assert all(version in SpecifierSet(tried) for version in versions)


def test_the_installed_libraries_have_every_name(capfd: pytest.CaptureFixture[str]):
    check_libraries(torch.device("cpu"))
    assert "fastssl" not in capfd.readouterr().err  # DeepSpeed's look for its compilers may print


def test_an_untried_version_is_one_line_of_warning_on_the_first_rank(monkeypatch, capfd: pytest.CaptureFixture[str]):
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.20.1")
    monkeypatch.setattr(torch, "__version__", "2.14.0a0+git12")
    check_libraries(torch.device("cpu"))
    assert capfd.readouterr().err.splitlines() == [
        f"fastssl: warning: fastssl was not tried with {library} {found}, but with {library}{TRIED[library]}; "
        "everything that it needs is there"
        for library, found in (("torch", "2.14.0a0+git12"), ("deepspeed", "0.20.1"))
    ]
    monkeypatch.setenv("RANK", "1")
    check_libraries(torch.device("cpu"))
    assert capfd.readouterr().err == ""


def test_a_missing_name_of_torch_is_one_line(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_lerp_")
    monkeypatch.setattr(torch, "__version__", "3.1.0")
    with pytest.raises(UserError) as error:
        check_libraries(torch.device("cpu"))
    assert str(error.value) == (
        "torch 3.1.0 does not have torch._foreach_lerp_, which fastssl uses: install a version that fastssl was tried "
        f"with, pip install 'torch{TRIED['torch']}'"
    )


def test_a_training_ends_before_its_first_step_where_deepspeed_lacks_a_name(tiny_config: Path):
    code = f"""
import sys
import deepspeed.utils.groups
del deepspeed.utils.groups._WORLD_GROUP
from fastssl.cli import main
sys.exit(main(["train", "--cfg", {str(tiny_config)!r}, "--set", "run.device=cpu"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fastssl: error: deepspeed 0.")
    assert "does not have deepspeed.utils.groups._WORLD_GROUP, which fastssl uses" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tiny_config.parent / "run").exists()


def test_each_foreach_operator_is_torchs():
    for name in private_api.FOREACH:
        assert getattr(private_api.foreach, name) is getattr(torch, f"_foreach_{name}")

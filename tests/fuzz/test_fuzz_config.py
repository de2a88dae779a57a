"""Whatever a configuration holds, it is a Config that reads back equal or one line; never a traceback or a hang."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastssl.config import Config, load_config, to_dict
from fastssl.errors import ConfigError
from fastssl.losses import LOSSES
from fastssl.machine.yaml_text import dump_yaml
from pipelines.view_spec import ViewSpec
from tests.helpers.fuzz import cases, mutate_bytes
from tests.helpers.processes import ROOT

FOLDER = ROOT / "configs"
COMMITTED = [path.read_bytes() for path in sorted(FOLDER.rglob("*.yaml"))]
HOSTILE = [
    "!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!timestamp 2024-01-01", "2024-01-01", "!!set {a, b}",
    "!!int x", "!!bool x", "!!float x", "!!str {a: 1}", "!mine 3", "0b_", "0x_", "9" * 5000, "-" + "9" * 5000,
    "1:59:60", ".inf", "-.inf", ".nan", "1e999", "1e-999", "1e-3", "1_000", "0o17", "=", "~", "", "yes", "{", "[",
    "*a", "&a", "? x", "[" * 10_000 + "]" * 10_000, "{a: " * 10_000 + "}" * 10_000, "- " * 10_000, "[[1], [2, [3]]]",
    "&a [*a]", "&a {b: *a}", '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', '"\\x07"', '"a\\nb"', "\x07", "\ufeffx", "\ud800",
    "'" + "x" * 5000 + "'", "{1: 2}", "{a: 1, a: 2}", "{[a]: 1}", "{<<: {a: 1}}", "{null: 1}",
    "{a: {b: {c: {d: 1}}}}", "a: 1\n---\nb: 2", "%YAML 1.9", "x.yaml", "'a\\0.yaml'", "true", "null", "0", "-1",
    "1.0", "0.1", "10**12", "100000000000000000000", "1.0e-300", "[]", "{}",
]  # fmt: skip


def keys_of(section: type, prefix: str) -> list[str]:
    return [f"{prefix}.{item.name}" for item in dataclasses.fields(section)]


HINTS = typing.get_type_hints(Config)
KEYS = [
    *(key for name, hint in HINTS.items() if dataclasses.is_dataclass(hint) for key in keys_of(hint, name)),  # pyright: ignore
    *(key for config, _ in LOSSES.values() for key in keys_of(config, "loss")),
    *(key for name in ("views.override", "eval.augment") for key in keys_of(ViewSpec, name)),
    *("ds", "custom", "ds.zero_optimization", "model.backbone_kwargs.layers"),
    *("nonsense", "run", "loss", "a.b.c", "run.dir.x"),
]


def check(tmp_path: Path, overrides: Sequence[str] = (), content: bytes = b"{}") -> bool:
    """Load the content; whether it is a configuration."""
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    try:
        cfg = load_config(path, overrides)
    except ConfigError:
        return False
    path.write_text(dump_yaml(to_dict(cfg)))
    assert load_config(path) == cfg
    return True


def random_value(rng: np.random.Generator) -> str:
    kind = rng.integers(7)
    if kind == 0:
        return HOSTILE[rng.integers(len(HOSTILE))]
    if kind == 1:
        return str(int(rng.integers(-3, 40)))
    if kind == 2:
        return repr(float(rng.normal() * 10.0 ** rng.integers(-320, 300)))
    if kind == 3:
        return str(10 ** int(rng.integers(0, 120)))
    if kind == 4:
        return repr(bytes(rng.integers(32, 127, rng.integers(0, 12), dtype=np.uint8)).decode())
    parts = [random_value(rng) for _ in range(rng.integers(0, 4))]
    if kind == 5:
        return f"[{', '.join(parts)}]"
    return "{" + ", ".join(f"{KEYS[rng.integers(len(KEYS))].rpartition('.')[2]}: {part}" for part in parts) + "}"


def test_changed_files(tmp_path):
    found = set()
    for case in cases("config files", fraction=0.3):
        with case.guarded(seconds=10):
            content = COMMITTED[case.rng.integers(len(COMMITTED))]
            found.add(check(tmp_path, content=mutate_bytes(content, case.rng)))
    assert found == {True, False}


def test_random_values_for_random_keys(tmp_path):
    found = set()
    for case in cases("config values", fraction=0.4):
        with case.guarded(seconds=10):
            keys = case.rng.choice(KEYS, case.rng.integers(1, 3))
            found.add(check(tmp_path, [f"{key}={random_value(case.rng)}" for key in keys]))
    assert found == {True, False}


def test_hostile_fragments(tmp_path):
    for case in cases("config fragments", fraction=0.3):
        with case.guarded(seconds=10):
            section, _, key = KEYS[case.rng.integers(len(KEYS))].partition(".")
            value = HOSTILE[case.rng.integers(len(HOSTILE))]
            lines = [f"{section}: {{{key}: {value}}}", f"{section}:\n  {key}: {value}", f"{section}: {value}", value]
            check(tmp_path, content=lines[case.rng.integers(len(lines))].encode(errors="surrogatepass"))

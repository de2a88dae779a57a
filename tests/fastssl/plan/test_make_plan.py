"""Whether a run on a GPU is compiled is decided by measured steps; the costs here stand in for a GPU's."""

from dataclasses import replace

import pytest

from fastssl.config import load_config
from fastssl.errors import UserError
from fastssl.plan import make_plan as module
from fastssl.plan.make_plan import make_plan
from fastssl.plan.measure import OutOfMemoryError, StepCost
from tests.fastssl.plan.test_choices import CPU

GPU = replace(CPU, device="cuda", gpu_memory_bytes=80 << 30, num_images=1_297, num_processes=1)
PLAIN = StepCost(step_s=5.0, start_s=20.0, num_steps=20, memory_bytes=1 << 30)
COMPILED = replace(PLAIN, step_s=4.0, start_s=60.0)


@pytest.fixture
def plan(digits, tmp_path, monkeypatch):
    """Plans a run whose compiled steps cost `compiled`; returns its configuration, expected time, and all lines."""

    def run(compiled, facts=GPU, **options):
        def measure(config, num_processes):
            if not load_config(config).train.compile:
                return PLAIN
            if isinstance(compiled, Exception):
                raise compiled
            return compiled

        said = []
        monkeypatch.setattr(module, "read_facts", lambda *_, **__: facts)
        monkeypatch.setattr(module, "measure", measure)
        paths = {"run.dir": str(tmp_path / "run"), "data.train": str(digits / "train.beton")}
        plan = make_plan(paths, tmp_path / "start.yaml", **({"given": {}} | options), say=said.append)
        return load_config(plan.path), plan.length.seconds, "\n".join([*said, *plan.lines()])

    return run


def test_a_long_run_is_compiled_if_its_steps_are_faster(plan):
    cfg, seconds, said = plan(COMPILED)
    assert cfg.train.compile
    assert seconds == pytest.approx(60 + cfg.train.num_epochs * (1_297 // cfg.data.global_batch_size) * 4.0)
    assert "a step takes 20% less time" in said


@pytest.mark.parametrize(
    ("compiled", "why"),
    [
        (replace(COMPILED, step_s=4.9), "would take 98% of its time"),
        (OutOfMemoryError(), "more memory than there is"),
        (UserError("no C++ compiler"), "not compiled: no C++ compiler"),
    ],
)
def test_a_run_is_not_compiled_where_that_does_not_help(plan, compiled, why):
    cfg, _, said = plan(compiled)
    assert not cfg.train.compile
    assert why in said


@pytest.mark.parametrize(
    ("facts", "options"),
    [(CPU, {}), (GPU, {"hours": 0.1}), (GPU, {"given": {"train.compile": False}})],
    ids=["cpu", "short", "given"],
)
def test_compiled_steps_are_not_measured_without_need(plan, facts, options):
    cfg, _, said = plan(AssertionError("measured"), facts=replace(facts, num_images=1_297), **options)
    assert not cfg.train.compile
    assert "train.compile" not in said or "--set" in said

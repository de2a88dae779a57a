"""A run with LARS or LAMB under ZeRO, killed and resumed, in real processes."""

import pytest

from tests.integration.test_training import assert_same_end, deepspeed, final_state, kill_after_step, run_of


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("optim", "zero_stage", "keys"),
    [
        ("{name: lars, base_lr: 2.0, lars_trust_coefficient: 0.02, warmup_epochs: 0.5}", 1, ["momentum_buffer"]),
        ("{name: lamb, base_lr: 0.02, warmup_epochs: 0.5}", 2, ["exp_avg", "exp_avg_sq", "step"]),
    ],
    ids=["lars", "lamb"],
)
def test_killed_and_resumed_it_ends_bit_for_bit_the_same(optim, zero_stage, keys, tiny_config, command):
    settings = ["--set", f"optim={optim}", f"train.zero_stage={zero_stage}", "run.checkpoint_every_steps=3"]
    whole = tiny_config.parent / "whole"
    done = command(*deepspeed(2), tiny_config, *settings, f"run.dir={whole}")
    assert done.returncode == 0, done.stdout + done.stderr
    kill_after_step([*deepspeed(2), str(tiny_config), *settings], run_of(tiny_config), step=14)
    resumed = command(*deepspeed(2), tiny_config, *settings, "run.resume=auto")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_end(whole, run_of(tiny_config))
    names = {name.rpartition("/")[2] for name in final_state(whole)}
    assert names >= set(keys)

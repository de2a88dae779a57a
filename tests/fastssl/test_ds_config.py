import pytest

from fastssl.config import Config, build_config
from fastssl.ds_config import build_ds_config
from fastssl.errors import ConfigError


def test_deepspeed_reads_the_throughput_timer_as_switched_off() -> None:
    """The timer is on by default, and a key that DeepSpeed does not know would be ignored without a word."""
    from deepspeed.utils.config import get_timers_config

    assert get_timers_config({}).enabled
    assert not get_timers_config(build_ds_config(Config(), world_size=1)).enabled


def config(**sections):
    return build_config({"data": {"global_batch_size": 64}, **sections})


def test_sections_of_ones_own_are_passed_on():
    found = build_ds_config(
        config(ds={"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": True}}), world_size=2
    )
    assert found["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 1000}
    assert found["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("ds", "parts"),
    [
        ({"train_batch_size": 3}, ["ds.train_batch_size", "data.global_batch_size"]),
        ({"fp16": {"enabled": True}}, ["ds.fp16", "train.precision"]),
        ({"zero_optimization": {"stage": 2}}, ["ds.zero_optimization.stage"]),
        ({"zero_optimisation": {}}, ["ds.zero_optimisation", "zero_optimization"]),
        ({"torch_autocast": {"enabled": True}}, ["ds.torch_autocast.enabled"]),
    ],
)
def test_what_fastssl_writes_is_not_written_twice(ds, parts):
    with pytest.raises(ConfigError) as error:
        build_ds_config(config(ds=ds), world_size=1)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ({"zero_stage": 3}, ["train.zero_stage", "0, 1 or 2"]),
        ({"offload_optimizer": True}, ["train.offload_optimizer", "train.zero_stage"]),
        ({"max_skipped_steps": -1}, ["train.max_skipped_steps"]),
        ({"precision": "fp8"}, ["train.precision"]),
    ],
)
def test_what_training_cannot_be(train, parts):
    with pytest.raises(ConfigError) as error:
        config(train=train)
    assert all(part in str(error.value) for part in parts)


def test_clipping_is_deepspeeds_where_it_has_the_gradients():
    train = {"grad_clip_norm": 0.5, "zero_stage": 1, "offload_optimizer": True}
    found = build_ds_config(config(train=train), world_size=1)
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert build_ds_config(config(train={"grad_clip_norm": 0.5}), world_size=1)["gradient_clipping"] == 0

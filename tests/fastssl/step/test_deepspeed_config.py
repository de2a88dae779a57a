import pytest

from fastssl.config import Config, build_config
from fastssl.errors import ConfigError
from fastssl.step.deepspeed_config import build_ds_config


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
        ({"torch_autocast": {"enabled": True}}, ["ds.torch_autocast.enabled"]),
        ({"zero_optimisation": {}}, ["did you mean zero_optimization"]),
        ({"elasticity": {}}, ["ds.elasticity is not supported"]),
        ({"aio": 3}, ["ds.aio must be a section, not 3"]),
        ({"comms_logger": None}, ["ds.comms_logger must be a section, not None"]),
        ({"flops_profiler": {"enabled": "x"}}, ["ds.flops_profiler.enabled must be true or false, not 'x'"]),
        ({"wall_clock_breakdown": "yes"}, ["ds.wall_clock_breakdown must be true or false"]),
        ({"communication_data_type": 3}, ["ds.communication_data_type must be text"]),
        ({"gradient_predivide_factor": True}, ["ds.gradient_predivide_factor must be a number"]),
    ],
)
def test_what_fastssl_writes_is_not_written_twice(ds, parts):
    with pytest.raises(ConfigError) as error:
        build_ds_config(config(ds=ds), world_size=1)
    assert all(part in str(error.value) for part in parts)


ZERO = "ds.zero_optimization"


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("offload_optimizer", {"device": "cpu"}, ["train.offload_optimizer"]),
        ("cpu_offload", True, ["train.offload_optimizer"]),
        ("offload_param", {"device": "cpu"}, ["ZeRO 3"]),
        ("cpu_offload_param", True, ["ZeRO 3"]),
        ("compute_grad_norm", False, ["the norm", "remove it"]),
        ("zenflow", {"topk_ratio": 0.1}, ["changes the training"]),
        ("legacy_stage1", True, ["train.zero_stage=1"]),
        ("allgather_bucket_size", 11, ["even", "11"]),
    ],
)
def test_what_would_be_another_training_or_a_traceback_is_refused(key, value, parts, zero_stage):
    with pytest.raises(ConfigError) as error:
        build_ds_config(config(ds={"zero_optimization": {key: value}}, train={"zero_stage": zero_stage}), world_size=1)
    assert all(part in str(error.value) for part in (f"{ZERO}.{key}", *parts))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ds", "parts"),
    [
        ({"communication_data_type": "int8"}, ["ds.communication_data_type", "bf16", "'int8'"]),
        ({"gradient_predivide_factor": 0}, ["ds.gradient_predivide_factor", "> 0", "0"]),
        ({"gradient_predivide_factor": 2}, ["ds.gradient_predivide_factor", f"{ZERO}.reduce_scatter=false"]),
        ({"prescale_gradients": True}, ["ds.prescale_gradients", f"{ZERO}.reduce_scatter=false"]),
    ],
)
def test_averages_that_deepspeed_cannot_take_at_stage_2(ds, parts):
    with pytest.raises(ConfigError) as error:
        build_ds_config(config(ds=ds, train={"zero_stage": 2}), world_size=1)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("ds", "train"),
    [
        ({"prescale_gradients": True, "gradient_predivide_factor": 2.0}, {"zero_stage": 1}),
        ({"prescale_gradients": True, "zero_optimization": {"reduce_scatter": False}}, {"zero_stage": 2}),
        ({"communication_data_type": "BF16"}, {"zero_stage": 2}),
        ({"zero_optimization": {"overlap_comm": True, "round_robin_gradients": True}}, {"zero_stage": 2}),
        (
            {"zero_optimization": {"offload_optimizer": {"buffer_count": 8}}},
            {"zero_stage": 2, "offload_optimizer": True},
        ),
    ],
)
def test_what_only_tunes_is_passed_on(ds, train):
    found = build_ds_config(config(ds=ds, train=train), world_size=1)
    assert holds(found, ds)


def holds(found, wanted):
    if isinstance(wanted, dict):
        return all(holds(found[key], value) for key, value in wanted.items())
    return found == wanted


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

from fastssl.config import Config
from fastssl.ds_config import build_ds_config


def test_deepspeed_reads_the_throughput_timer_as_switched_off() -> None:
    """The timer is on by default, and a key that DeepSpeed does not know would be ignored without a word."""
    from deepspeed.utils.config import get_timers_config

    assert get_timers_config({}).enabled
    assert not get_timers_config(build_ds_config(Config(), world_size=1)).enabled

"""The option --device of commands without a configuration."""

import torch

from fastssl.errors import ConfigError
from fastssl.processes.launch import choose_device


def choose_device_option(wanted: str) -> torch.device:
    """`fastssl.processes.launch.choose_device`, with errors that name the option.

    Raises:
        ConfigError: no such device.
    """
    try:
        return choose_device(wanted)
    except ConfigError as error:
        message = str(error).replace("--set run.device=", "--device ")
        raise ConfigError(message.replace("run.device", "--device")) from None

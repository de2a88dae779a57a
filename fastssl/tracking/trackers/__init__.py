"""Weights & Biases and MLflow: each is fed from the files of a run's folder, by a process of its own."""

from collections.abc import Sequence

from fastssl.errors import ConfigError
from fastssl.machine.environment import package_version

# What pip installs, and under which names it may be installed already; the ranges are those of setup.py.
_PACKAGES = {
    "wandb": ("wandb>=0.31,<1", ("wandb",)),
    "mlflow": ("mlflow-skinny>=3.17,<4", ("mlflow-skinny", "mlflow")),
}


def check_installed(trackers: Sequence[str]) -> None:
    """Refuse a tracker whose package is missing, before anything is started.

    Raises:
        ConfigError: it is; the message says what to install.
    """
    for name in trackers:
        wanted, distributions = _PACKAGES[name]
        # By its metadata: a folder named wandb in the working directory can be imported as well.
        if not any(package_version(each) for each in distributions):
            raise ConfigError(f"run.trackers: {name} needs the package {distributions[0]}: pip install '{wanted}'")

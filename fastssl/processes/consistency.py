"""Whether all ranks are about to do the same run: one configuration, one data set, one folder."""

import socket
import time
from collections.abc import Mapping
from typing import Any

from fastssl import collectives
from fastssl.config import Config, differing_keys, to_dict
from fastssl.errors import ConfigError
from fastssl.tracking.run_folder import RunFolder
from pipelines.beton.identity import Identity, difference

_OWN_KEYS = ("run.num_threads", "data.num_workers")  # each host may have its own
_VISIBLE_WITHIN_S = 30.0  # a network file system may show what another host wrote only after that


def check_same_config(cfg: Config, data: Mapping[str, Identity]) -> None:
    """Refuse to train where a rank has another configuration or other data than the first (all ranks call it).

    Args:
        cfg: This rank's.
        data: Identities of its data.train and data.test, or, as "loader", of a loader of its own.
    Raises:
        ConfigError: on every rank; names the first that differs.
    """
    of_ranks = collectives.all_gather_object((socket.gethostname(), to_dict(cfg), dict(data)))
    first_host, first_tree, first_data = of_ranks[0]
    for rank, (host, tree, own_data) in enumerate(of_ranks):
        if keys := differing_keys(first_tree, tree, ignore=_OWN_KEYS):
            raise ConfigError(
                f"rank {rank} on {host} has a different configuration from rank 0 on {first_host}: "
                f"{'; '.join(keys)}; start every process with the same configuration"
            )
        for key, identity in own_data.items():
            if identity == first_data[key]:
                continue
            if key == "loader":
                raise ConfigError(
                    f"the loader has [batches, images per batch] {identity} on {host} (rank {rank}), but "
                    f"{first_data[key]} on {first_host} (rank 0): give every rank the same number of both"
                )
            raise ConfigError(
                f"{key}: {_path_of(cfg, key)} on {host} (rank {rank}) is not the file of {first_host} (rank 0): it has "
                f"{difference(identity, first_data[key])}; use the same file on every host"
            )


def check_same_data(cfg: Config, found: Mapping[str, Identity], saved: Mapping[str, Identity]) -> str | None:
    """Refuse to resume on other data than the run was trained on.

    Args:
        cfg: The run's.
        found: As for `check_same_config`.
        saved: The same of the checkpoint; one of an older version has two numbers for data.train alone.
    Returns:
        A warning that not everything could be compared; None: it could.
    Raises:
        ConfigError: the data differ.
    """
    for key, identity in found.items():
        if key == "loader":
            if identity != saved[key]:
                raise ConfigError(
                    f"loader: the run was trained on a loader with the identity {saved[key]}, this one has {identity}: "
                    "resume with the same data, or start another run"
                )
        elif differs := difference(identity, saved.get(key, identity)):
            raise ConfigError(
                f"{key}: {_path_of(cfg, key)} is not the file that the run was trained with: it has {differs}; resume "
                "with the same file, or start another run"
            )
    if "data.train" in found and len(saved["data.train"]) < len(found["data.train"]):
        return (
            f"data.train: the checkpoint is of an older version, so only the size of {cfg.data.train_name} and its "
            "number of images could be compared"
        )
    return None


def compare_blur_dtype(found: str | None, saved: str | None) -> str | None:
    """Compare the arithmetic of the CPU's blur with that of the checkpoint; it depends on the CPU.

    Args:
        found: "int16" or "float32", `kernels.augment.cpu.BLUR_DTYPE`; None: the pixel op does not run on the CPU.
        saved: The same of the checkpoint; None also for one of an older version.
    Returns:
        A warning that they differ; None: they are equal, or one is None.
    """
    if found is None or saved is None or found == saved:
        return None
    return (
        f"this CPU blurs views in {found}, the CPU of the checkpoint in {saved}: blurred views differ by up to .05 "
        "levels of 255"
    )


def _path_of(cfg: Config, key: str) -> str | None:
    return cfg.data.test if key == "data.test" else cfg.data.train_name


def check_shared_folder(folder: RunFolder, mark: str) -> None:
    """Refuse to train where a rank does not see the folder that the first one writes (all ranks call it).

    Args:
        folder: Of the run.
        mark: What the first rank wrote in it, from `RunFolder.lock`.
    Raises:
        ConfigError: on every rank; names the hosts.
    """
    until = time.monotonic() + _VISIBLE_WITHIN_S
    while not (is_seen := folder.read_lock() == mark) and time.monotonic() < until:
        time.sleep(0.2)
    of_ranks: list[tuple[str, Any]] = collectives.all_gather_object((socket.gethostname(), is_seen))
    blind = sorted({host for host, sees in of_ranks if not sees})
    if blind:
        raise ConfigError(
            f"run.dir: {folder.path} is not shared by all hosts: {', '.join(blind)} cannot see the files that "
            f"{of_ranks[0][0]} writes there; choose a folder on a shared file system"
        )

"""Whether all ranks are about to do the same run: one configuration, one data set, one folder."""

import socket
import time
from typing import Any

from fastssl import collectives
from fastssl.config import Config, differing_keys, to_dict
from fastssl.errors import ConfigError
from fastssl.tracking.run_folder import RunFolder

_OWN_KEYS = ("run.num_threads", "data.num_workers")  # each host may have its own
_VISIBLE_WITHIN_S = 30.0  # a network file system may show what another host wrote only after that


def check_same_config(cfg: Config, data_identity: list[int]) -> None:
    """Refuse to train where a rank has another configuration or other data than the first (all ranks call it).

    Args:
        cfg: This rank's.
        data_identity: Number of images and bytes of its data.train, or `identity` of a loader of its own.
    Raises:
        ConfigError: on every rank; names the first that differs.
    """
    of_ranks = collectives.all_gather_object((socket.gethostname(), to_dict(cfg), data_identity))
    first_host, first_tree, first_identity = of_ranks[0]
    for rank, (host, tree, identity) in enumerate(of_ranks):
        if keys := differing_keys(first_tree, tree, ignore=_OWN_KEYS):
            raise ConfigError(
                f"rank {rank} on {host} has another config than rank 0 on {first_host}; it differs in {'; '.join(keys)}"
            )
        if identity != first_identity:
            if "loader" in cfg.custom:
                raise ConfigError(
                    f"the loader gives [batches, images of a batch] {identity} on {host} (rank {rank}), but "
                    f"{first_identity} on {first_host} (rank 0): give every rank as many"
                )
            raise ConfigError(
                f"data.train: {cfg.data.train} holds [images, bytes] {identity} on {host} (rank {rank}), but "
                f"{first_identity} on {first_host} (rank 0): give every host the same file"
            )


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
            f"run.dir: {folder.path} is not one folder for all: {', '.join(blind)} does not see what {of_ranks[0][0]} "
            "writes there; put it on a file system that all hosts share"
        )

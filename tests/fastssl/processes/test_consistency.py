"""Ranks that are about to do different runs are told so, all of them."""

import sys
from pathlib import Path

import pytest

from fastssl.config import Config, build_config
from fastssl.errors import ConfigError
from fastssl.processes import consistency
from fastssl.tracking.run_folder import RunFolder
from tests.helpers.processes import join_ranks, start_ranks


def config(**run) -> Config:
    return build_config({"data": {"train": "x.beton"}, "run": {"num_threads": 1, **run}})


def test_one_process_agrees_with_itself(tmp_path):
    consistency.check_same_config(config(), [10, 1000])
    folder = RunFolder(tmp_path)
    consistency.check_shared_folder(folder, folder.lock())


@pytest.mark.dist
def test_ranks_that_differ_all_hear_of_it(tmp_path):
    of_ranks = start_ranks(__file__, 2, tmp_path)
    for said in of_ranks:
        assert "seed: 0 -> 1" in said["config"]
        assert "rank 1 on " in said["config"]
        assert "holds [images, bytes] [10, 1001] on " in said["data"]
        assert "is not one folder for all" in said["folder"]
        assert said["threads"] is None
        assert said["shared"] is None
    assert f"{tmp_path}/0/run is not one folder" in of_ranks[0]["folder"]


def said_of(check) -> str | None:
    try:
        check()
    except ConfigError as error:
        return str(error)
    return None


def main(rank: int, world_size: int, folder: Path) -> None:
    import torch

    from fastssl import collectives

    join_ranks(rank, world_size, folder)
    consistency._VISIBLE_WITHIN_S = 0.5
    own, shared = RunFolder(folder / f"{rank}/run"), RunFolder(folder / "run")
    said = {
        "config": said_of(lambda: consistency.check_same_config(config(seed=rank), [10, 1000])),
        "data": said_of(lambda: consistency.check_same_config(config(), [10, 1000 + rank])),
        "threads": said_of(lambda: consistency.check_same_config(config(num_threads=1 + rank), [10, 1000])),
        "folder": said_of(lambda: consistency.check_shared_folder(own, collectives.run_on_first_rank(own.lock))),
        "shared": said_of(lambda: consistency.check_shared_folder(shared, collectives.run_on_first_rank(shared.lock))),
    }
    torch.save(said, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

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
    return build_config({"data": {"train": "x.beton", "test": "y.beton"}, "run": {"num_threads": 1, **run}})


def test_one_process_agrees_with_itself(tmp_path):
    consistency.check_same_config(config(), {"data.train": [10, 1000, 1, 2]})
    folder = RunFolder(tmp_path)
    consistency.check_shared_folder(folder, folder.lock())


@pytest.mark.parametrize(
    ("now", "differs"),
    [
        ([11, 1000, 1, 2], "11 images instead of 10"),
        ([10, 1001, 1, 2], "1001 bytes instead of 1000"),
        ([10, 1000, 3, 2], "other labels, sizes or positions of the images"),
        ([10, 1000, 1, 3], "as many images and bytes, but other images"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.test"])
def test_a_run_is_not_resumed_on_other_data(key, now, differs):
    saved = {"data.train": [10, 1000, 1, 2], "data.test": [10, 1000, 1, 2]}
    assert consistency.check_same_data(config(), saved, saved) is None
    with pytest.raises(
        ConfigError, match=f"{key}: [xy]\\.beton is not the file .*: it has .*{differs}; resume with the"
    ):
        consistency.check_same_data(config(), saved | {key: now}, saved)


def test_data_of_an_older_checkpoint_is_compared_by_its_two_numbers():
    now = {"data.train": [10, 1000, 1, 2], "data.test": [10, 1000, 1, 2]}
    warning = consistency.check_same_data(config(), now, {"data.train": [10, 1000]})
    assert warning is not None
    assert "only the size of x.beton and its number of images could be compared" in warning
    with pytest.raises(ConfigError, match="1000 bytes instead of 999"):
        consistency.check_same_data(config(), now, {"data.train": [10, 999]})


def test_a_loader_of_the_user_is_compared_as_a_whole():
    assert consistency.check_same_data(config(), {"loader": [3, 8]}, {"loader": [3, 8]}) is None
    for other in ([3, 9], [3, 8, 1], [3]):
        with pytest.raises(ConfigError, match="loader: the run was trained on a loader with the identity"):
            consistency.check_same_data(config(), {"loader": [3, 8]}, {"loader": other})


@pytest.mark.dist
def test_ranks_that_differ_all_hear_of_it(tmp_path):
    of_ranks = start_ranks(__file__, 2, tmp_path)
    for said in of_ranks:
        assert "seed: 0 -> 1" in said["config"]
        assert "rank 1 on " in said["config"]
        assert "data.train: x.beton on " in said["data"]
        assert "(rank 1) is not the file of " in said["data"]
        assert "it has as many images and bytes, but other images; use the same file on every host" in said["data"]
        assert "data.test: y.beton on " in said["test"]
        assert "it has 11 images instead of 10" in said["test"]
        assert "is not shared by all hosts" in said["folder"]
        assert said["threads"] is None
        assert said["shared"] is None
    assert f"{tmp_path}/0/run is not shared" in of_ranks[0]["folder"]


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
    data = {"data.train": [10, 1000, 1, 2]}
    own, shared = RunFolder(folder / f"{rank}/run"), RunFolder(folder / "run")
    said = {
        "config": said_of(lambda: consistency.check_same_config(config(seed=rank), data)),
        "data": said_of(lambda: consistency.check_same_config(config(), {"data.train": [10, 1000, 1, 2 + rank]})),
        "test": said_of(lambda: consistency.check_same_config(config(), data | {"data.test": [10 + rank, 1000, 1, 2]})),
        "threads": said_of(lambda: consistency.check_same_config(config(num_threads=1 + rank), data)),
        "folder": said_of(lambda: consistency.check_shared_folder(own, collectives.run_on_first_rank(own.lock))),
        "shared": said_of(lambda: consistency.check_shared_folder(shared, collectives.run_on_first_rank(shared.lock))),
    }
    torch.save(said, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))


def test_another_form_of_the_blur_is_a_warning():
    assert consistency.compare_blur_dtype("int16", "int16") is None
    assert consistency.compare_blur_dtype(None, "int16") is None
    assert consistency.compare_blur_dtype("float32", None) is None
    warning = consistency.compare_blur_dtype("float32", "int16")
    assert warning is not None
    assert warning.startswith("this CPU blurs views in float32, the CPU of the checkpoint in int16")

"""The fused pixel op on a GPU: the cases of fused_cases.py, and whole recipes at their own size and block sizes."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.augment import StoredImages, augment
from pipelines.views import RECIPES, draw
from tests.kernels.augment.fused_cases import *  # noqa: F403 - the same cases, with the device below
from tests.kernels.augment.fused_cases import AFFINE_LEVELS, BLUR_LEVELS, IMAGENET, make_views, max_difference_levels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
]


@pytest.fixture
def device() -> str:
    return "cuda"


class TestAsInProduction:
    """With the block sizes that are tuned for, not the small ones of the shared cases."""

    @pytest.fixture(autouse=True)
    def _several_blocks(self) -> None:
        """Takes the place of the shared cases' fixture."""

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_recipes(self, recipe: str, device: str) -> None:
        side_px = RECIPES[recipe][0].size_px
        views = np.concatenate([make_views(24, side_px, side_px), make_views(24, side_px, side_px)[::-1]], 1)
        params = draw(RECIPES[recipe][:2], 3, 0, np.arange(24), np.full((24, 2), side_px))
        limit = AFFINE_LEVELS if recipe == "digits" else BLUR_LEVELS
        assert max_difference_levels(views, params, device) <= limit

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it is a prototype
    def test_nothing_waits_for_the_device(self, device: str) -> None:
        images = torch.randint(0, 256, (100, 32, 32, 3), dtype=torch.uint8, device=device)
        ids = np.arange(64)
        stored = StoredImages(images, torch.from_numpy(ids).to(device), 32)
        params = draw(RECIPES["simclr"], 0, 0, ids, np.full((64, 2), 32))
        augment(stored, params, **IMAGENET)  # compiled
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            views = augment(stored, params, **IMAGENET)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(view.isfinite().all() for view in views)

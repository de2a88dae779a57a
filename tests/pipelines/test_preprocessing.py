"""A pre-processing survives being saved, and what is no pre-processing is refused."""

import json

import pytest

from pipelines.preprocessing import describe_preprocessing, views_from
from pipelines.transform import EvalTransform
from pipelines.views import ViewsConfig

VIEWS = ViewsConfig(recipe="byol", size_px=160, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), eval_crop_fraction=0.875)


@pytest.mark.parametrize("views", [VIEWS, ViewsConfig(), ViewsConfig(recipe="multicrop"), ViewsConfig(size_px=7)])
def test_the_view_is_the_same_after_saving(views) -> None:
    described = json.loads(json.dumps(describe_preprocessing(views)))
    again = views_from(described)
    assert repr(EvalTransform(again)) == repr(EvalTransform(views))
    assert describe_preprocessing(again) == described


@pytest.mark.parametrize(
    "change",
    [
        {"size_px": "160"},
        {"size_px": True},
        {"size_px": 1 << 20},
        {"crop_fraction": 2.0},
        {"crop_fraction": float("nan")},
        {"mean": [0.1, 0.2]},
        {"mean": [0.1, 0.2, "x"]},
        {"std": [0.0, 1.0, 1.0]},
        {"resampling": "nearest"},
        {"exif": None},
        {"more": 1},
    ],
)
def test_another_description_is_refused(change) -> None:
    with pytest.raises(ValueError, match=rf"{'pre-processing must have' if 'more' in change else next(iter(change))}"):
        views_from(describe_preprocessing(VIEWS) | change)


@pytest.mark.parametrize("saved", [None, [], {}, "x"])
def test_no_description_is_refused(saved) -> None:
    with pytest.raises(ValueError, match="pre-processing must have"):
        views_from(saved)

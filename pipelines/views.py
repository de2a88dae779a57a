"""Recipes: the views of a run, as data. `draw` (pipelines/draw.py) turns a recipe into one batch's parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pipelines.config_field import Section, setting
from pipelines.draw import draw, eval_params
from pipelines.errors import did_you_mean
from pipelines.view_spec import EvalViewSpec, ViewSpec

__all__ = [
    "RECIPES",
    "EvalViewSpec",
    "ViewSpec",
    "ViewsConfig",
    "build_eval_spec",
    "build_view_specs",
    "draw",
    "eval_params",
    "size_groups",
]

_MIO_SMALL = ViewSpec(crop_scale=(0.08, 1.0))
_SIMSIAM_SMALL = ViewSpec(crop_scale=(0.2, 1.0))
_MIO_V1 = ViewSpec(crop_scale=(0.8, 1.0))
_SIMCLR_CIFAR = ViewSpec(crop_scale=(0.08, 1.0))
_MOCO_V2 = ViewSpec(size_px=224, blur_p=0.5)
_BYOL_A = ViewSpec(size_px=224, crop_scale=(0.08, 1.0), saturation=0.2, blur_p=1.0)
_WEAK = ViewSpec(crop_scale=(0.08, 1.0), jitter_p=0.0, grayscale_p=0.0)
_SWAV_LARGE = ViewSpec(
    size_px=224, crop_scale=(0.14, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_p=0.5
)
_SWAV_SMALL = replace(_SWAV_LARGE, size_px=96, crop_scale=(0.05, 0.14))
# Our own recipe: augmentations that keep a handwritten digit recognisable. The images are grey, so no hue, saturation
# or grayscale.
_DIGITS = ViewSpec(
    crop=False,
    affine_p=1.0,
    affine_degrees=20.0,
    affine_translate_fraction=0.1,
    affine_scale=(1 / 1.25, 1.25),
    affine_shear_degrees=14.0,
    flip_p=0.0,
    saturation=0.0,
    hue=0.0,
    grayscale_p=0.0,
)

RECIPES: dict[str, tuple[ViewSpec, ...]] = {
    "simclr": (_SIMCLR_CIFAR, _SIMCLR_CIFAR),  # Chen et al. 2020, arXiv:2002.05709, App. B.9: CIFAR-10, strength .5
    "byol": (_BYOL_A, replace(_BYOL_A, blur_p=0.1, solarize_p=0.2)),  # Grill et al. 2020, arXiv:2006.07733, Table 6
    "mocov2": (_MOCO_V2, _MOCO_V2),  # Chen et al. 2020, arXiv:2003.04297, the authors' main_moco.py --aug-plus
    "multicrop": (_SWAV_LARGE,) * 2 + (_SWAV_SMALL,) * 6,  # Caron et al. 2020, arXiv:2006.09882, App. A.1, A.3
    "mio_small": (_MIO_SMALL, _MIO_SMALL),  # small images, MIO's first author [second-hand: his code of DySTreSS]
    "simsiam_small": (_SIMSIAM_SMALL, _SIMSIAM_SMALL),  # SimSiam on CIFAR-10, arXiv:2011.10566 [second-hand]
    "mio_v1": (_MIO_V1, _MIO_V1),  # the code of arXiv:2111.12664v1
    "weak": (_WEAK, _WEAK),  # supervised ImageNet training: RandomResizedCrop's defaults and the flip
    "digits": (_DIGITS, _DIGITS),
}


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Section):
    """The views of a run.

    Attributes:
        recipe: A key of RECIPES; if `specs` are given, a name for them.
        specs: The views themselves, as the ViewSpec fields of each, instead of a recipe's.
        size_px: Side of every view and of the eval view; None: from the recipe.
        mean, std: Per channel (RGB), in [0, 1] units; the defaults are ImageNet's.
        override: ViewSpec fields set in every view, e.g. {"blur_p": 0.5}.
        eval_crop_fraction: See EvalViewSpec.
    """

    recipe: str = "mio_small"
    specs: list[dict[str, Any]] = field(default_factory=list)
    size_px: int | None = setting(None, "[1, 4096]")
    mean: tuple[float, float, float] = setting((0.485, 0.456, 0.406), "[-10, 10]")
    std: tuple[float, float, float] = setting((0.229, 0.224, 0.225), "[1e-4, 10]")
    override: dict[str, Any] = field(default_factory=dict)
    eval_crop_fraction: float = setting(1.0, "[0.01, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, chosen in [("override", self.override), *((f"specs.{i}", spec) for i, spec in enumerate(self.specs))]:
            unknown = sorted(set(chosen) - {item.name for item in fields(ViewSpec)})
            if unknown:
                known = ", ".join(item.name for item in fields(ViewSpec))
                raise ValueError(f"{name} has unknown fields {unknown}; known: {known}")
        if not self.specs and self.recipe not in RECIPES:
            hint = did_you_mean(self.recipe, RECIPES)
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, or a .yaml file, got {self.recipe!r}{hint}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need three numbers; got {self.mean} and {self.std}")
        build_view_specs(self)
        build_eval_spec(self)


def build_view_specs(cfg: ViewsConfig) -> tuple[ViewSpec, ...]:
    """Build the recipe's specs, one per view, with size_px and then override applied; ValueError names a bad field."""
    changes = _with_pairs(cfg.override)
    if cfg.size_px is not None:
        changes = {"size_px": cfg.size_px} | changes
    specs = tuple(ViewSpec(**_with_pairs(spec)) for spec in cfg.specs) or RECIPES[cfg.recipe]
    return tuple(replace(spec, **changes) for spec in specs)


def _with_pairs(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def build_eval_spec(cfg: ViewsConfig) -> EvalViewSpec:
    """The eval view at the size of the first view."""
    return EvalViewSpec(size_px=build_view_specs(cfg)[0].size_px, crop_fraction=cfg.eval_crop_fraction)


def size_groups(specs: Sequence[ViewSpec | EvalViewSpec]) -> list[tuple[int, list[int]]]:
    """Return (size_px, indices of the views of that size) for each size, in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault(spec.size_px, []).append(index)
    return list(groups.items())

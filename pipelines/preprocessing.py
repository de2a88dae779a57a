"""How an image becomes the input of an encoder, as plain values that are saved with the encoder's weights."""

from collections.abc import Mapping
from typing import Any

from pipelines.views import ViewsConfig, build_eval_spec

# The steps without a setting: EXIF orientation applied, transparency on white, see `pipelines.convert.images`; the
# resize of `pipelines.resample`.
_FIXED = {"exif": "upright", "transparency": "white", "resampling": "bilinear, antialiased"}
_SETTINGS = {"size_px": int, "crop_fraction": float, "mean": list, "std": list}


def describe_preprocessing(views: ViewsConfig) -> dict[str, Any]:
    """The pre-processing of the eval view, as JSON values.

    Returns:
        size_px: Side of the input; crop_fraction: side of the central square / shorter side of the image; mean and std
        of each channel (RGB), in [0, 1] units; exif, transparency and resampling, in words.
    """
    spec = build_eval_spec(views)
    settings = {"size_px": spec.size_px, "crop_fraction": float(spec.crop_fraction)}
    return settings | {"mean": list(map(float, views.mean)), "std": list(map(float, views.std))} | _FIXED


def views_from(saved: Any) -> ViewsConfig:
    """A views section whose eval view is the one of `describe_preprocessing`; its augmentations are the defaults.

    Args:
        saved: What was read from a file; anything.

    Raises:
        ValueError: It is no description of a pre-processing, or of one that this version cannot do.
    """
    if not isinstance(saved, Mapping) or saved.keys() != _FIXED.keys() | _SETTINGS.keys():
        raise ValueError(f"its pre-processing must have {', '.join([*_SETTINGS, *_FIXED])}")
    for name, done in _FIXED.items():
        if saved[name] != done:
            raise ValueError(f"its pre-processing has {name} {saved[name]!r:.80}; this version knows {done!r} only")
    for name, kind in _SETTINGS.items():
        values = saved[name] if kind is list else [saved[name]]
        if type(saved[name]) is not kind or not all(type(value) in (int, float) for value in values):
            raise ValueError(f"its pre-processing has {name} {saved[name]!r:.80}")
    return ViewsConfig(
        size_px=saved["size_px"],
        mean=tuple(saved["mean"]),  # pyright: ignore[reportArgumentType] ViewsConfig checks that there are three
        std=tuple(saved["std"]),  # pyright: ignore[reportArgumentType]
        eval_crop_fraction=saved["crop_fraction"],
    )

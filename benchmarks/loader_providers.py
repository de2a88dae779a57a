"""The loaders that `bench_loader` compares."""

# B batch size, S side length of a view in pixels

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter

from pipelines.bench.streams import PREFETCH_BATCHES, Job, Stream, chained, open_decode, open_engine, repeated_ids
from pipelines.bench.windows import end_with_parent
from pipelines.beton import JPG, RAW, BetonReader
from pipelines.sampler import global_batches
from pipelines.views import ViewsConfig, ViewSpec, build_view_specs

FULL_RECIPE, PLAIN_OPERATIONS = "full recipe", "crop, flip, normalise"
# Fields that reduce a recipe to the operations of stock FFCV: random resized crop, flip, normalise.
_PLAIN = {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0}


@dataclass(frozen=True)
class Provider:
    """A way to load images."""

    label: str  # the name in the results
    operations: str  # the operations on each image
    open: Callable[[Job], Stream]  # starts it; ImportError or ValueError if it cannot run the job
    package: str | None = None  # a distribution whose version is recorded, in addition to those of every row


def open_plain(job: Job) -> Stream:
    """This package's loader with the operations of stock FFCV: crop, flip, normalise."""
    return open_engine(replace(job, views=replace(job.views, override=_PLAIN)), engine="ffcv")


def open_whole_jpegs(job: Job) -> Stream:
    """This package's loader as it is where `jpeg_region.c` is not compiled: each JPEG is decoded in full."""
    from pipelines.engines import decode_crop

    decode_crop.why_no_region_decoder = lambda: "not used in this process"
    return open_engine(job, engine="ffcv")


def open_stock_ffcv(job: Job) -> Stream:
    """Unmodified FFCV, compiled: its Loader decodes an image once for each of its two pipelines."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    views = job.views
    mean, std = np.asarray(views.mean) * 255, np.asarray(views.std) * 255

    def pipeline(spec: ViewSpec) -> PipelineSpec:
        crop = RandomResizedCropRGBImageDecoder((spec.size_px, spec.size_px), spec.crop_scale, spec.crop_ratio)
        normalise = NormalizeImage(mean, std, np.float32)  # pyright: ignore[reportArgumentType]
        return PipelineSpec("image", crop, [RandomHorizontalFlip(spec.flip_p), normalise, ToTensor(), ToTorchImage()])

    first, second = map(pipeline, build_view_specs(views))
    loader = Loader(
        job.beton,
        batch_size=job.batch_size,
        num_workers=job.num_threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=job.seed,
        indices=repeated_ids(BetonReader(job.beton)),  # pyright: ignore
        pipelines={"image": first, "image_b": second, "label": None},  # pyright: ignore[reportArgumentType]
        drop_last=True,
        batches_ahead=PREFETCH_BATCHES,
    )
    return Stream(chained(lambda _: iter(loader)), PREFETCH_BATCHES + 1)


TorchvisionForm = Literal["pil", "pil_pillow_blur", "tensor"]


def open_torchvision(job: Job, *, form: TorchvisionForm) -> Stream:
    """torchvision v2 in a DataLoader: one worker per core with one torch thread; one decode for both views.

    `form` is the input of v2: Pillow images, Pillow images with Pillow's approximate blur, or uint8 tensors.
    """
    return _data_loader_stream(job, _TorchvisionViews(job, form), _normalised_batch)


def _data_loader_stream(job: Job, images: Any, collate: Callable[[list[Any]], Any]) -> Stream:
    """torch's DataLoader with one worker per core: batches of the items of `images`, combined by `collate`."""
    import torch
    from torch.utils.data import DataLoader

    torch.manual_seed(job.seed)
    prefetch_factor = 2
    loader = DataLoader(
        images,
        job.batch_size,
        shuffle=True,
        num_workers=job.num_threads,
        drop_last=True,
        collate_fn=collate,
        persistent_workers=True,
        worker_init_fn=end_with_parent,
        multiprocessing_context="fork",  # Linux's default, but not that of a spawned process
        prefetch_factor=prefetch_factor,
    )
    return Stream(chained(lambda _: iter(loader)), prefetch_factor * job.num_threads)


class _TorchvisionViews:
    """Image -> its views, uint8 [3, S, S] each."""

    def __init__(self, job: Job, form: TorchvisionForm) -> None:
        from pipelines.torchvision_operators import declare_torchvision_operators

        declare_torchvision_operators()
        self._form = form
        self._reader = BetonReader(job.beton)
        self._ids = repeated_ids(self._reader)
        self._transforms = [_torchvision_view(spec, form) for spec in build_view_specs(job.views)]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> list[Any]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        image = _pillow_image(self._reader, int(self._ids[i]))
        if self._form == "tensor":
            image = pil_to_tensor(image)
        return [transform(image) for transform in self._transforms]


def _pillow_image(reader: BetonReader, i: int) -> Image.Image:
    if reader.modes[i] == JPG:
        return Image.open(io.BytesIO(reader.image_bytes(i).tobytes()), formats=("JPEG",)).convert("RGB")
    return Image.fromarray(reader.decode(i))


def _torchvision_view(spec: ViewSpec, form: TorchvisionForm) -> Callable[[Any], Any]:
    """The recipe of one view in torchvision's own operations, without operations that the recipe does not use."""
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    steps: list[Any] = [
        v2.RandomResizedCrop(spec.size_px, spec.crop_scale, spec.crop_ratio, antialias=True),
        v2.RandomHorizontalFlip(spec.flip_p),
        v2.RandomApply([jitter], spec.jitter_p),
        v2.RandomGrayscale(spec.grayscale_p),
    ]
    if form == "pil_pillow_blur":
        if not spec.blur_p:
            raise ValueError("the recipe has no blur")
        steps.append(v2.RandomApply([v2.Lambda(lambda image: _pillow_blur(image, spec.blur_sigma))], spec.blur_p))
    elif spec.blur_p:
        steps.append(v2.RandomApply([v2.GaussianBlur(spec.blur_kernel_px, spec.blur_sigma)], spec.blur_p))
    if spec.solarize_p:
        steps.append(v2.RandomSolarize(255 * spec.solarize_threshold, spec.solarize_p))
    return v2.Compose(steps if form == "tensor" else [*steps, v2.PILToTensor()])


def _pillow_blur(image: Image.Image, sigma_px: tuple[float, float]) -> Image.Image:
    """The blur of MoCo v2's authors: box blurs that approximate a Gaussian."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma_px)))


def _normalised_batch(samples: list[list[Any]]) -> list[Any]:
    """Views of B images -> float32 [B, 3, S, S] per view, as a batch; this is much faster than image by image."""
    import torch
    from torchvision.transforms.v2 import functional as v2

    views = ViewsConfig()
    batches = [v2.to_dtype(torch.stack(group), torch.float32, scale=True) for group in zip(*samples, strict=True)]
    return [v2.normalize(batch, list(views.mean), list(views.std), inplace=True) for batch in batches]


def open_kornia(job: Job) -> Stream:
    """kornia: workers decode with Pillow and crop with torchvision; kornia does the rest on float batches here."""
    import torch
    from kornia import augmentation as K

    torch.set_num_threads(job.num_threads)
    mean, std = torch.tensor(job.views.mean), torch.tensor(job.views.std)

    def view(spec: ViewSpec) -> Any:
        steps: list[Any] = [
            K.RandomHorizontalFlip(p=spec.flip_p),
            K.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter_p),
            K.RandomGrayscale(p=spec.grayscale_p),
        ]
        if spec.blur_p:
            kernel_px = (spec.blur_kernel_px, spec.blur_kernel_px)
            steps.append(K.RandomGaussianBlur(kernel_px, spec.blur_sigma, p=spec.blur_p))
        if spec.solarize_p:
            threshold = (spec.solarize_threshold, spec.solarize_threshold)
            steps.append(K.RandomSolarize(threshold, (0.0, 0.0), p=spec.solarize_p))
        return torch.nn.Sequential(*steps, K.Normalize(mean, std))

    views = [view(spec) for spec in build_view_specs(job.views)]
    crops = _data_loader_stream(job, _PillowCrops(job), _float_batch)

    def augmented() -> Iterator[Any]:
        for groups in crops.batches:
            with torch.no_grad():
                yield [view(group) for view, group in zip(views, groups, strict=True)]

    return Stream(augmented(), crops.num_ahead)


class _PillowCrops:
    """Image -> its resized crops, uint8 [3, S, S] each."""

    def __init__(self, job: Job) -> None:
        from pipelines.torchvision_operators import declare_torchvision_operators

        declare_torchvision_operators()
        from torchvision.transforms import v2

        self._reader = BetonReader(job.beton)
        self._ids = repeated_ids(self._reader)
        self._crops = [
            v2.RandomResizedCrop(spec.size_px, spec.crop_scale, spec.crop_ratio, antialias=True)
            for spec in build_view_specs(job.views)
        ]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> list[Any]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        image = _pillow_image(self._reader, int(self._ids[i]))
        return [pil_to_tensor(crop(image)) for crop in self._crops]


def _float_batch(samples: list[list[Any]]) -> list[Any]:
    """Views of B images -> float32 [B, 3, S, S] per view, in [0, 1]."""
    import torch

    return [torch.stack(group).float().div_(255) for group in zip(*samples, strict=True)]


def open_dali(job: Job) -> Stream:
    """DALI on the CPU, with one decode for both views and its own random numbers, crop, colour twist and blur."""
    from nvidia.dali import pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    specs = build_view_specs(job.views)
    pipeline = pipeline_def(enable_conditionals=True)(_dali_graph)(
        job, batch_size=job.batch_size, num_threads=job.num_threads, prefetch_queue_depth=PREFETCH_BATCHES,
        device_id=None, seed=job.seed,
    )  # fmt: skip
    iterator = DALIGenericIterator(pipeline, [f"view_{i}" for i in range(len(specs))])
    return Stream(iter(iterator), PREFETCH_BATCHES + 1)


def _dali_graph(job: Job) -> tuple[Any, ...]:
    from nvidia.dali import fn, types

    reader = BetonReader(job.beton)
    if len(reader.stored_modes) > 1:
        raise ValueError("the images are neither all JPEG nor all raw")
    is_raw = reader.stored_modes == (RAW,)
    ids = repeated_ids(reader)
    order = chained(lambda epoch: iter(global_batches(ids, job.seed, epoch, job.batch_size)))

    def stored() -> list[np.ndarray]:
        batch = next(order).tolist()
        return [reader.image_bytes(i).reshape(*reader.sizes[i], 3) if is_raw else reader.image_bytes(i) for i in batch]

    image: Any = fn.external_source(
        source=stored, batch=True, dtype=types.UINT8, ndim=3 if is_raw else 1, layout="HWC" if is_raw else ""
    )
    if not is_raw:
        image = fn.decoders.image(image, device="cpu", output_type=types.RGB)
    return tuple(_dali_view(image, spec, job.views) for spec in build_view_specs(job.views))


def _dali_view(image: Any, spec: ViewSpec, views: ViewsConfig) -> Any:
    """The recipe of one view; color_twist has one fixed order, and solarize is computed as in DALI's auto_aug."""
    from nvidia.dali import fn, types

    def around_one(strength: float) -> Any:
        return fn.random.uniform(range=[max(0.0, 1 - strength), 1 + strength])

    def chance(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    view = fn.random_resized_crop(
        image,
        size=[spec.size_px, spec.size_px],
        random_area=list(spec.crop_scale),
        random_aspect_ratio=list(spec.crop_ratio),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    if chance(spec.jitter_p):
        view = fn.color_twist(
            view,
            brightness=around_one(spec.brightness),
            contrast=around_one(spec.contrast),
            saturation=around_one(spec.saturation),
            hue=fn.random.uniform(range=[-360 * spec.hue, 360 * spec.hue]),
        )
    if chance(spec.grayscale_p):
        view = fn.hsv(view, saturation=0.0)
    if chance(spec.blur_p):
        view = fn.gaussian_blur(
            view, sigma=fn.random.uniform(range=list(spec.blur_sigma)), window_size=spec.blur_kernel_px
        )
    if chance(spec.solarize_p):
        is_dark = view < round(255 * spec.solarize_threshold)
        view = is_dark * view + (is_dark ^ True) * (types.Constant(255, dtype=types.UINT8) - view)
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=spec.flip_p),
        mean=[255 * mean for mean in views.mean],
        std=[255 * std for std in views.std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


_DALI = "nvidia-dali-cuda130"
PROVIDERS = {
    "ours": Provider("fastssl, ffcv engine", FULL_RECIPE, partial(open_engine, engine="ffcv")),
    "ours_plain": Provider("fastssl, ffcv engine", PLAIN_OPERATIONS, open_plain),
    "stock_ffcv": Provider("stock FFCV, two decodes", PLAIN_OPERATIONS, open_stock_ffcv),
    "torchvision_pil": Provider("torchvision v2, PIL", FULL_RECIPE, partial(open_torchvision, form="pil")),
    "torchvision_tensor": Provider(
        "torchvision v2, uint8 tensors", FULL_RECIPE, partial(open_torchvision, form="tensor")
    ),
    "torchvision_pil_pillow_blur": Provider(
        "torchvision v2, PIL, Pillow's blur", FULL_RECIPE, partial(open_torchvision, form="pil_pillow_blur")
    ),
    "decode": Provider("libjpeg-turbo", "decode only", open_decode),
    "decode_seen": Provider(
        "libjpeg-turbo, what the views show", "draw and decode only", partial(open_decode, seen_only=True)
    ),
    "ours_whole": Provider("fastssl, ffcv engine, whole JPEGs", FULL_RECIPE, open_whole_jpegs),
    "synthetic": Provider(
        "fastssl, synthetic engine", "full recipe without decode and crop", partial(open_engine, engine="synthetic")
    ),
    "ours_resident": Provider(
        "fastssl, resident engine", "full recipe, decoded before", partial(open_engine, engine="resident")
    ),
    "ours_dali": Provider("fastssl, dali engine (CPU)", FULL_RECIPE, partial(open_engine, engine="dali"), _DALI),
    "dali_native": Provider("DALI's own operators (CPU)", f"{FULL_RECIPE}, colours in a fixed order", open_dali, _DALI),
    "kornia": Provider("kornia after a DataLoader", FULL_RECIPE, open_kornia, "kornia"),
}

"""What a run's encoder makes of images: a map, neighbours, mistakes, the eigenspectrum, and its first layer."""

# n images, F features, k neighbours, C classes

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastssl.checkpoint.save_load import find_weights, step_of
from fastssl.config import Config, check_built
from fastssl.encoder import Encoder, encode_views, load_encoder
from fastssl.errors import ConfigError
from fastssl.report.thumbnails import CELL_PX
from pipelines.beton import BetonReader
from pipelines.beton.bus_error import report_bus_errors
from pipelines.errors import DataError
from pipelines.hold_out import holdout_table
from pipelines.loader import cores_per_process, open_train_images
from pipelines.samples import decode_sample
from pipelines.shards.open_images import AnyImages, few_samples, some_labels

NUM_QUERIES, NUM_NEIGHBOURS = 8, 8
NUM_MISTAKES = 16
VOTING_NEIGHBOURS, TEMPERATURE = 20, 0.1  # of the kNN, at most
_BATCH = 64
_LEAST_FOR_UMAP = 15  # images: its default number of neighbours
_MAX_FILTERS = 256


@dataclass(frozen=True, kw_only=True)
class Album:
    """The images that a run's report shows.

    Attributes:
        reader: Their file.
        ids: Their samples, int64 [n], ascending.
        is_held_out: False: the run holds no images out, and these are of its training part.
    """

    reader: AnyImages
    ids: np.ndarray
    is_held_out: bool

    def class_name(self, label: int) -> str:
        """The name of a label; empty for -1, which is none."""
        names = self.reader.class_names or []
        return "" if label < 0 else str(names[label]) if label < len(names) else str(label)


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """A classification of each image by its neighbours among the others.

    Attributes:
        top1: The fraction that is right, in [0, 1].
        predicted: Labels, int64 [n].
        worst: Positions of the wrong ones, those with the surest votes first, int64.
    """

    top1: float
    predicted: np.ndarray
    worst: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What one encoder makes of an album.

    Attributes:
        step: Step of its checkpoint.
        album: The images that could be read.
        thumbnails: One for each image, at most CELL_PX wide and high.
        labels: int64 [n]; -1 = none.
        features: float32 [n, F].
        place: Their map, float32 [n, 2].
        projection: How the map was made: "UMAP" or "PCA".
        neighbours: Positions of the most similar other images, best first, int64 [n, k].
        similarity: Their centred cosine, float32 [n, k].
        mistakes: None: too few labels.
        filters: The first convolution's weights, float32 [num, 3, H, W]; None: there is no such layer.
        broken: Samples that could not be decoded, and why.
    """

    step: int
    album: Album
    thumbnails: list[Image.Image]
    labels: np.ndarray
    features: np.ndarray
    place: np.ndarray
    projection: str
    neighbours: np.ndarray
    similarity: np.ndarray
    mistakes: Mistakes | None
    filters: np.ndarray | None
    broken: dict[int, str]


def draw_pictures(run: Path, cfg: Config, *, num_images: int, device: torch.device) -> Pictures:
    """Load the last checkpoint of a run and encode images of its training file.

    Args:
        run: The run's folder.
        cfg: Its configuration.
        num_images: Most images to encode.
        device: The encoder's.

    Raises:
        ConfigError: no checkpoint, or an encoder or images that only a Python program can build.
        DataError: the images cannot be read.
    """
    check_built(cfg, "loader")
    weights = find_weights(run)
    encoder = load_encoder(weights).to(device)
    album = choose_album(cfg, num_images)
    features, thumbnails, broken = _encode(encoder, album)
    is_read = np.array([int(i) not in broken for i in album.ids])
    album = Album(reader=album.reader, ids=album.ids[is_read], is_held_out=album.is_held_out)
    if len(album.ids) < 3:
        raise DataError(f"{album.reader.path} has only {len(album.ids)} images to show")
    if not np.isfinite(features).all():
        raise ConfigError("the encoder gives features that are not finite")
    labels = some_labels(album.reader, album.ids)
    neighbours, similarity = nearest_others(features, VOTING_NEIGHBOURS)
    place, projection = project(features)
    return Pictures(
        step=step_of(weights.parent),
        album=album,
        thumbnails=thumbnails,
        labels=labels,
        features=features,
        place=place,
        projection=projection,
        neighbours=neighbours,
        similarity=similarity,
        mistakes=find_mistakes(labels, neighbours, similarity),
        filters=first_filters(encoder.backbone),
        broken=broken,
    )


def choose_album(cfg: Config, num_images: int) -> Album:
    """Held-out images of the training file, evenly spaced; of a run that holds none out, training images."""
    reader = open_train_images(cfg.data)
    if isinstance(reader, BetonReader):
        report_bus_errors(reader)
    table = holdout_table(reader, cfg.data.holdout_fraction)
    held_out = np.flatnonzero(table)
    wanted = held_out if len(held_out) else np.arange(len(table))  # within a period of the table
    num_periods, rest = divmod(reader.num_samples, len(table))
    num = num_periods * len(wanted) + int((wanted < rest).sum())
    some = np.linspace(0, num - 1, min(num, num_images)).astype(np.int64)
    ids = some // len(wanted) * len(table) + wanted[some % len(wanted)]
    return Album(reader=reader, ids=ids, is_held_out=len(held_out) > 0)


def nearest_others(features: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The most similar other rows by cosine without the mean, best first.

    Args:
        features: float [n, F].
        most: Largest k; it is at most n - 1.

    Returns:
        Positions int64 [n, k] and similarities float32 [n, k].
    """
    x = torch.from_numpy(features)
    unit = nn.functional.normalize(x - x.mean(0), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    values, positions = similarity.topk(min(most, len(x) - 1))
    return positions.numpy(), values.numpy()


def find_mistakes(labels: np.ndarray, neighbours: np.ndarray, similarity: np.ndarray) -> Mistakes | None:
    """Let the labelled neighbours of each labelled image vote, with weights exp((similarity - 1) / TEMPERATURE).

    Args:
        labels: int64 [n]; -1 = none.
        neighbours, similarity: From `nearest_others`, [n, k].

    Returns:
        None: fewer than two classes.
    """
    if len(np.unique(labels[labels >= 0])) < 2:
        return None
    voters = labels[neighbours]
    weights = np.where(voters >= 0, np.exp((similarity - 1) / TEMPERATURE), 0)
    votes = np.zeros((len(labels), labels.max() + 1))
    np.add.at(votes, (np.arange(len(labels))[:, None], np.maximum(voters, 0)), weights)
    votes /= np.maximum(votes.sum(1, keepdims=True), 1e-30)
    predicted = votes.argmax(1)
    is_wrong = (predicted != labels) & (labels >= 0)
    margin = votes.max(1) - votes[np.arange(len(labels)), np.maximum(labels, 0)]
    worst = np.flatnonzero(is_wrong)
    return Mistakes(
        top1=1 - float(is_wrong.sum() / (labels >= 0).sum()),
        predicted=predicted,
        worst=worst[np.argsort(-margin[worst], kind="stable")],
    )


def project(features: np.ndarray) -> tuple[np.ndarray, str]:
    """Features float32 [n, F] on a plane, float32 [n, 2]: by UMAP where umap-learn is installed, else by PCA."""
    if len(features) > _LEAST_FOR_UMAP:
        with warnings.catch_warnings(), suppress(ImportError):
            warnings.simplefilter("ignore")  # of umap and numba, about threads and a seed
            from umap import UMAP  # pyright: ignore[reportMissingImports] it is optional

            return UMAP(metric="cosine", random_state=0).fit_transform(features), "UMAP"
    centred = features - features.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    place = np.zeros((len(features), 2), np.float32)
    place[:, : min(2, len(s))] = u[:, :2] * s[:2]
    return place, "PCA"


def covariance_eigenvalues(features: np.ndarray) -> np.ndarray:
    """Eigenvalues of the features' covariance, descending, float64 [min(n - 1, F)], in shares of their sum."""
    centred = (features - features.mean(0)).astype(np.float64)
    values = np.linalg.svd(centred, compute_uv=False)[: len(features) - 1] ** 2
    return values / max(values.sum(), 1e-300)


def first_filters(backbone: nn.Module) -> np.ndarray | None:
    """Weights float32 [num, 3, H, W] of the first convolution of RGB images, at most _MAX_FILTERS of them."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().float().cpu().numpy()
            return weight[:_MAX_FILTERS] if weight.shape[1] == 3 and np.isfinite(weight).all() else None
    return None


def _encode(encoder: Encoder, album: Album) -> tuple[np.ndarray, list[Image.Image], dict[int, str]]:
    """Features, thumbnails and, by sample, why an image could not be read; a batch of images is held at a time."""
    features: list[np.ndarray] = []
    thumbnails: list[Image.Image] = []
    broken: dict[int, str] = {}
    for ids, read in _read(encoder, album):
        for i, found in zip(ids, read, strict=True):
            if isinstance(found, str):
                broken[i] = found
        whole = [found for found in read if not isinstance(found, str)]
        if whole:
            features.append(encode_views(encoder, torch.stack([view for view, _ in whole])).numpy())
            thumbnails += [thumbnail for _, thumbnail in whole]
    return np.concatenate(features or [np.empty((0, encoder.num_features), np.float32)]), thumbnails, broken


def _read(encoder: Encoder, album: Album) -> Iterator[tuple[Sequence[int], list[Any]]]:
    """Sample ids of each batch, and for each (view [3, S, S], thumbnail) or the reason why there is none."""

    def one(i: int) -> Any:
        try:
            pixels = decode_sample(album.reader.path, few_samples(album.reader, np.array([i])), 0)
        except DataError as error:
            return str(error)
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((CELL_PX, CELL_PX))
        return encoder.transform(pixels), thumbnail

    with ThreadPoolExecutor(cores_per_process()) as pool:
        for start in range(0, len(album.ids), _BATCH):
            ids = album.ids[start : start + _BATCH].tolist()
            yield ids, list(pool.map(one, ids))
            album.reader.check_unchanged()

"""Nearest neighbours in a table of features: exact, in two or three passes over the table's pieces."""

# N rows with features, F features

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from fastssl.checkpoint.checksums import sha256_of
from fastssl.checkpoint.save_load import find_weights
from fastssl.embedding.table import Table, read_table
from fastssl.encoder import embed, load_encoder
from fastssl.errors import ConfigError, UserError
from pipelines.errors import DataError
from pipelines.path_names import why_no_path
from pipelines.transform import read_image

Similarity = Literal["centred", "whitened", "cosine"]


class Neighbour(NamedTuple):
    """One result.

    Attributes:
        rank: 1 = the most similar.
        similarity: In [-1, 1].
        path: As in the table.
        row: Row of the table.
        label: None: none.
    """

    rank: int
    similarity: float
    path: str
    row: int
    label: int | None


class Query(NamedTuple):
    """The image whose neighbours are wanted.

    Attributes:
        path: As in the table, or its absolute path.
        row: Row of the table; None: it is not in the table.
        features: float32 [F].
    """

    path: str
    row: int | None
    features: np.ndarray


def neighbours(
    table: str | Path,
    image: str | Path | Tensor | np.ndarray | Sequence[float],
    *,
    k: int = 10,
    similarity: Similarity = "centred",
    model: str | Path | None = None,
) -> list[Neighbour]:
    """The images of a table that are most similar to one image.

        for each in fastssl.neighbours("x.parquet", "photographs/cat.jpg"):
            print(each.similarity, each.path)

    Args:
        table: X.parquet of `fastssl embed`.
        image: An image file; its row is used, and left out of the result, if it is in the table. Or its features [F].
        k: Number of neighbours.
        similarity: "centred": cosine after the table's mean is taken off. "whitened": directions are also scaled to
            equal variance, by a covariance that is shrunk towards a multiple of the identity (OAS: Chen et al. 2010,
            doi:10.1109/TSP.2010.2053029). "cosine": of the features as they are, which for most encoders is near 1
            for any two images.
        model: Run, checkpoint or weights.pt of the table's model, for an image that is not in it; None: where the
            table says that it was.

    Returns:
        Fewer than k if the table has fewer images. Equal similarities come in the order of the rows.

    Raises:
        UserError: k below 1, an unknown similarity, or a model that the table was not made with.
        DataError: The table or the image cannot be read.
    """
    opened = read_table(table)
    if isinstance(image, (str, Path)):
        query = find_query(opened, image, model=model)
        return nearest(opened, query.features, k=k, similarity=similarity, without=query.row)
    values = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    return nearest(opened, values, k=k, similarity=similarity)


def find_query(table: Table, image: str | Path, *, model: str | Path | None = None) -> Query:
    """The row of an image file, or its features by the table's model; see `neighbours`.

    Raises:
        UserError: A model that the table was not made with.
        DataError: The image cannot be read now, or could not when the table was written.
    """
    name = str(image)
    if reason := why_no_path(name):
        raise UserError(f"{name!r:.300} is not a path: {reason}")
    row = table.find([name, os.path.abspath(name), os.path.realpath(name)])
    if row is not None:
        (found,) = table.rows([row])
        if found["error"] is not None:
            raise DataError(f"{name} has no features in {table.path}: {found['error']}")
        return Query(found["path"], row, _features_of(table, row))
    if not os.path.exists(name):
        raise DataError(f"{name}: neither a file nor a path in {table.path}")
    levels = read_image(Path(name))
    weights = _weights_of(table, model)
    return Query(os.path.abspath(name), None, embed(load_encoder(weights), [levels])[0].numpy())


def nearest(
    table: Table, features: np.ndarray, *, k: int, similarity: Similarity = "centred", without: int | None = None
) -> list[Neighbour]:
    """The rows of a table with the most similar features.

    Args:
        table: The table.
        features: float [F].
        k: See `neighbours`.
        similarity: See `neighbours`.
        without: A row to leave out.

    Raises:
        UserError: k below 1, an unknown similarity, or features of another shape or not finite.
        DataError: The table cannot be read, or has no other image.
    """
    if k < 1:
        raise UserError(f"-k must be >= 1, got {k}")
    if similarity not in get_args(Similarity):
        raise UserError(f"--similarity must be one of {', '.join(get_args(Similarity))}, not {similarity!r:.100}")
    features = np.asarray(features, np.float32)
    if features.shape != (table.num_features,) or not np.isfinite(features).all():
        raise UserError(f"{table.path} needs {table.num_features} finite features, got {list(features.shape)}")
    mean = np.zeros(table.num_features) if similarity == "cosine" else _mean(table)
    to_space = _whitening(table, mean) if similarity == "whitened" else None
    (query,) = _unit(features[None], mean, to_space)
    best_rows, best = np.empty(0, np.int64), np.empty(0, np.float32)
    for rows, values in table.features():
        found = _unit(values, mean, to_space) @ query
        is_other = rows != (-1 if without is None else without)
        best_rows, best = np.append(best_rows, rows[is_other]), np.append(best, found[is_other])
        order = np.lexsort((best_rows, -best))[:k]
        best_rows, best = best_rows[order], best[order]
    if not len(best):
        raise DataError(f"{table.path} has no other image with features")
    about = table.rows(best_rows.tolist())
    return [
        Neighbour(rank, float(np.clip(value, -1, 1)), row["path"], int(number), row["label"])
        for rank, (value, number, row) in enumerate(zip(best, best_rows, about, strict=True), 1)
    ]


def _unit(values: np.ndarray, mean: np.ndarray, to_space: np.ndarray | None) -> np.ndarray:
    """Rows of length 1 (0 where there is no direction), float32 [n, F]."""
    x = (values - mean).astype(np.float32)
    if to_space is not None:
        x = x @ to_space
    length = np.sqrt(np.einsum("nf,nf->n", x, x, dtype=np.float64))[:, None]
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0, casting="same_kind")


def _mean(table: Table) -> np.ndarray:
    """float64 [F]."""
    total, num = np.zeros(table.num_features), 0
    for rows, values in table.features():
        total += values.sum(0, dtype=np.float64)
        num += len(rows)
    if not num:
        raise DataError(f"{table.path} has no image with features")
    return total / num


def _whitening(table: Table, mean: np.ndarray) -> np.ndarray:
    """float32 [F, F] that takes centred features to uncorrelated ones of equal variance, where N >> F.

    With fewer images than features the sample covariance says that any two images are equally far apart; the shrinkage
    keeps the directions apart that the images do not determine.
    """
    total, num = np.zeros((table.num_features, table.num_features)), 0
    for rows, values in table.features():
        x = values - mean
        total += x.T @ x
        num += len(rows)
    covariance = shrunk(total / num, num)
    variances, directions = np.linalg.eigh(covariance)
    smallest = max(float(variances[-1]), 1e-30) * 1e-10
    return (directions / np.sqrt(np.maximum(variances, smallest))).astype(np.float32)


def shrunk(covariance: np.ndarray, num: int) -> np.ndarray:
    """The oracle-approximating shrinkage (OAS) of a covariance.

    Args:
        covariance: float64 [F, F], of `num` centred rows.
        num: N.
    """
    size = len(covariance)
    mean_variance = np.trace(covariance) / size
    mean_square = np.mean(covariance**2)
    excess = (num + 1) * (mean_square - mean_variance**2 / size)
    share = 1.0 if excess == 0 else min(1.0, (mean_square + mean_variance**2) / excess)
    return (1 - share) * covariance + share * mean_variance * np.eye(size)


def _features_of(table: Table, row: int) -> np.ndarray:
    for rows, values in table.features():
        at = np.searchsorted(rows, row)
        if at < len(rows) and rows[at] == row:
            return values[at].copy()
    raise DataError(f"{table.path}: row {row} has no features")


def _weights_of(table: Table, model: str | Path | None) -> Path:
    """The weights.pt that a table was made with."""
    saved: Any = table.about.get("model"), table.about.get("weights_sha256")
    if not all(isinstance(value, str) for value in saved):
        raise DataError(f"{table.path} does not name its model")
    try:
        weights = find_weights(saved[0] if model is None else model)
    except ConfigError as error:
        if model is not None:
            raise
        raise ConfigError(
            f"the image is not in {table.path}, and its model is gone: {error}; or pass --model"
        ) from None
    if sha256_of(weights) != saved[1]:
        raise ConfigError(
            f"{weights} has other weights than those that {table.path} was made with ({saved[0]}): pass that model "
            "with --model, or embed again"
        )
    return weights

"""An encoder as an ONNX file, checked with onnxruntime."""

# N images, S side of a view, F features; H, W sides of an image

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl.encoder import Encoder
from fastssl.errors import UserError
from fastssl.export.stock_models import TOLERANCE, random_images
from pipelines.errors import one_line

_INSTALL = "pip install onnx onnxscript onnxruntime"
_OPSET = 20
_PREPROCESSED_TOLERANCE = 5e-3  # a level of 255 may be rounded the other way
_CHECKED_SIZES = ((97, 61), (40, 200))


def write_onnx(encoder: Encoder, path: Path, *, preprocess_inside: bool) -> None:
    """Write the encoder, and compare what onnxruntime computes with what the encoder does.

    Args:
        encoder: In eval mode.
        path: The file to write.
        preprocess_inside: False: "images" float32 [N, 3, S, S] -> "features" float32 [N, F]. True: "image" uint8
            [H, W, 3] -> "features" [1, F].

    Raises:
        UserError: a package is missing, or the model cannot be exported.
        OSError: the file cannot be written.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs the package {error.name}: {_INSTALL}") from None
    images = random_images(encoder)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
            torch.onnx.export(
                encoder.backbone.eval(),
                (images,),
                str(path),
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                opset_version=_OPSET,
                external_data=False,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # torch's exporter, which fails in many ways
        raise UserError(f"torch cannot export this model as ONNX ({one_line(error)[:300]}): try safetensors") from None
    _check_views(encoder, path, images)
    if preprocess_inside:
        model = onnx.load(path)
        onnx.save(_with_preprocessing(model, encoder), path)
        _check_images(encoder, path)


def _check_views(encoder: Encoder, path: Path, images: torch.Tensor) -> None:
    for num in (1, len(images)):
        with torch.inference_mode():
            wanted = encoder(images[:num]).numpy()
        _check(wanted, _run(path, {"images": images[:num].numpy()}), TOLERANCE)


def _check_images(encoder: Encoder, path: Path) -> None:
    rng = np.random.default_rng(0)
    for height_px, width_px in _CHECKED_SIZES:
        image = rng.integers(0, 256, (height_px, width_px, 3), np.uint8)
        with torch.inference_mode():
            wanted = encoder(encoder.transform(image)[None]).numpy()
        _check(wanted, _run(path, {"image": image}), _PREPROCESSED_TOLERANCE)


def _check(wanted: np.ndarray, found: np.ndarray, tolerance: float) -> None:
    difference = float(np.abs(wanted - found).max() / max(np.abs(wanted).max(), 1e-12))
    if not difference <= tolerance:
        raise UserError(f"onnxruntime's features differ by {difference:.1g} of the largest: this model is not exported")


def _run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def _with_preprocessing(model: Any, encoder: Encoder) -> Any:
    """The model with `Encoder.transform` before it: centred square, antialiased resize, rounding, normalisation."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    transform, size_px = encoder.transform, encoder.transform.size_px
    shape = (1, 3, 1, 1)
    constants: dict[str, Any] = {
        "fraction": np.array(encoder.views.eval_crop_fraction, np.float64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "first_two": np.array([0, 1], np.int64),
        "output_sizes": np.array([1, 3, size_px, size_px], np.int64),
        "levels": np.array(255, np.float32),
        "mean": np.array(transform.mean, np.float32).reshape(shape),
        "std": np.array(transform.std, np.float32).reshape(shape),
        "axis_0": np.array([0], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Shape", ["image"], ["sides"], start=0, end=2),
        node("ReduceMin", ["sides", "axis_0"], ["shorter"], keepdims=1),
        node("Cast", ["shorter"], ["shorter_f"], to=TensorProto.DOUBLE),
        node("Mul", ["shorter_f", "fraction"], ["side_f"]),
        node("Round", ["side_f"], ["side_r"]),
        node("Cast", ["side_r"], ["side_i"], to=TensorProto.INT64),
        node("Max", ["side_i", "one"], ["side"]),
        node("Sub", ["sides", "side"], ["rest"]),
        node("Div", ["rest", "two"], ["begin"]),
        node("Add", ["begin", "side"], ["end"]),
        node("Slice", ["image", "begin", "end", "first_two"], ["crop"]),
        node("Cast", ["crop"], ["crop_f"], to=TensorProto.FLOAT),
        node("Transpose", ["crop_f"], ["planes"], perm=[2, 0, 1]),
        node("Unsqueeze", ["planes", "axis_0"], ["batch"]),
        node(
            "Resize", ["batch", "", "", "output_sizes"], ["resized"], mode="linear", antialias=1,
            coordinate_transformation_mode="half_pixel", exclude_outside=1,
        ),
        node("Round", ["resized"], ["rounded"]),
        node("Div", ["rounded", "levels"], ["scaled"]),
        node("Sub", ["scaled", "mean"], ["centred"]),
        node("Div", ["centred", "std"], ["view"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "preprocessing",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["H", "W", 3])],
        [helper.make_tensor_value_info("view", TensorProto.FLOAT, [1, 3, size_px, size_px])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    front = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    front = onnx.compose.add_prefix(front, "pre_", rename_inputs=False, rename_outputs=False)
    merged = onnx.compose.merge_models(front, model, io_map=[("view", "images")])
    onnx.checker.check_model(merged)
    return merged


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log lines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

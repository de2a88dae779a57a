"""`fastssl export`: writes a run's encoder as a folder that another library loads, after checking that it does."""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from fastssl.checkpoint.save_load import load_weights
from fastssl.encoder import Encoder, described_by, load_encoder
from fastssl.errors import UserError
from fastssl.export.model_card import model_card
from fastssl.export.onnx_file import write_onnx
from fastssl.export.stock_models import StockModel, find_stock_model
from fastssl.machine.files import sync_file
from pipelines.preprocessing import describe_preprocessing
from pipelines.printable import printable

Format = Literal["torchvision", "timm", "safetensors", "onnx", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)
WEIGHTS = {
    "torchvision": "model.pth",
    "timm": "model.safetensors",
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "hf": "model.safetensors",
}
_PREPROCESSING, _CARD, _HF_CONFIG = "preprocessing.json", "README.md", "config.json"
_OWN_NAMES = frozenset((_PREPROCESSING, _CARD, _HF_CONFIG, *WEIGHTS.values()))  # of files; an export has no folders
_MAX_NAMES = 5  # of other files in one line


def export_encoder(
    path: str | Path, format: Format, out: str | Path, *, preprocess_inside: bool = False, overwrite: bool = False
) -> Path:
    """Write the encoder of a run as a folder: weights, pre-processing, model card.

    | format      | weights           | loads in                                                                  |
    |-------------|-------------------|---------------------------------------------------------------------------|
    | torchvision | model.pth         | the stock torchvision model whose classifier is an identity, strict=True  |
    | timm        | model.safetensors | timm.create_model(NAME, num_classes=0), strict=True                       |
    | hf          | model.safetensors | timm.create_model("local-dir:OUT"), or the Hugging Face Hub               |
    | safetensors | model.safetensors | any program: names and tensors of the backbone                            |
    | onnx        | model.onnx        | onnxruntime                                                               |

    Before the folder gets its name, the stock model, or onnxruntime, has computed the features of random images, and
    they equal the encoder's to 1e-5 of the largest. A folder that is replaced is moved aside, and deleted when the new
    one has its name.

    Args:
        path: A run's folder, a checkpoint's folder, or a file of weights.
        format: A row of the table.
        out: The folder to write.
        preprocess_inside: Of onnx: the model takes one image, uint8 [H, W, 3], upright RGB, of any size.
        overwrite: Replace a folder that an earlier export has written and that holds nothing else; with it goes the
            model card, also an edited one.

    Returns:
        `out`.

    Raises:
        UserError: A format that does not fit the model, a missing package, or a folder that cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not {format!r:.100}")
    if preprocess_inside and format != "onnx":
        raise UserError(f"--preprocess inside is for onnx: {format} holds weights alone")
    out = Path(out)
    if out.name in ("", ".."):
        raise UserError(f"{out} has no name: give the folder to write by its name")
    temporary, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("tmp", "old"))
    _check_out(out, old, overwrite)
    encoder = load_encoder(path)
    model, _, _ = described_by(load_weights(path), Path(path))
    stock = None
    if format in ("torchvision", "timm", "hf"):
        stock = find_stock_model("timm" if format == "hf" else format, model, encoder)
    try:
        _delete_export(temporary)
        temporary.mkdir(parents=True)
        weights = temporary / WEIGHTS[format]
        _WRITERS[format](encoder, weights, preprocess_inside)
        about = describe_preprocessing(encoder.views)
        (temporary / _PREPROCESSING).write_text(json.dumps(about, indent=2) + "\n")
        if format == "hf" and stock:
            (temporary / _HF_CONFIG).write_text(json.dumps(_hf_config(stock, encoder, about), indent=2) + "\n")
        (temporary / _CARD).write_text(
            model_card(path, encoder, model, about, how_to_load=_how_to_load(format, stock, out, preprocess_inside))
        )
        for file in temporary.iterdir():
            with file.open("rb") as written:
                sync_file(written)
        _give_name(temporary, out, old)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            _delete_export(temporary)
    return out


def _check_out(out: Path, old: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be replaced; put back one that a kill has left under the name `old`."""
    try:
        if old.is_dir() and not out.exists():
            old.rename(out)
        if not out.exists() and not out.is_symlink():
            return
        if not overwrite:
            raise UserError(f"{out} exists: choose another name, or pass --overwrite")
        if out.is_symlink() or not (out / _PREPROCESSING).is_file():
            raise UserError(f"{out} is not the folder of an export: choose another name")
        others = sorted(path.name for path in out.iterdir() if path.name not in _OWN_NAMES or not path.is_file())
    except OSError as error:
        raise UserError(f"{out} cannot be replaced ({error.strerror or error})") from None
    if others:
        names = ", ".join(map(printable, others[:_MAX_NAMES])) + ", ..." * (len(others) > _MAX_NAMES)
        raise UserError(f"{out} also holds what no export writes ({names}): move it away, or choose another name")


def _give_name(temporary: Path, out: Path, old: Path) -> None:
    """Rename a written folder to `out`; what was there is deleted last, so that a kill in between loses nothing."""
    if out.exists():
        _delete_export(old)  # whose successor, `out`, was complete
        out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        if old.is_dir():
            old.rename(out)
        raise
    _delete_export(old)


def _delete_export(folder: Path) -> None:
    """Delete the files of an export and its folder.

    Raises:
        OSError: It holds something else, which stays.
    """
    if not folder.is_dir():
        return
    for name in _OWN_NAMES:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _write_torchvision(encoder: Encoder, path: Path, _inside: bool) -> None:
    import torch

    weights = io.BytesIO()  # torch and safetensors have errors of their own for a full disk
    torch.save(encoder.backbone.state_dict(), weights)
    path.write_bytes(weights.getbuffer())


def _write_safetensors(encoder: Encoder, path: Path, _inside: bool) -> None:
    from safetensors.torch import save

    path.write_bytes(save({name: value.contiguous() for name, value in encoder.backbone.state_dict().items()}))


_WRITERS: dict[str, Callable[[Encoder, Path, bool], None]] = {
    "torchvision": _write_torchvision,
    "timm": _write_safetensors,
    "safetensors": _write_safetensors,
    "hf": _write_safetensors,
    "onnx": lambda encoder, path, inside: write_onnx(encoder, path, preprocess_inside=inside),
}


def _hf_config(stock: StockModel, encoder: Encoder, about: dict[str, Any]) -> dict[str, Any]:
    """config.json as timm reads it."""
    size_px = about["size_px"]
    return {
        "architecture": stock.name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": stock.kwargs,
        "pretrained_cfg": {
            "input_size": [3, size_px, size_px],
            "interpolation": "bilinear",
            "crop_pct": about["crop_fraction"],
            "crop_mode": "center",
            "mean": about["mean"],
            "std": about["std"],
            "num_classes": 0,
        },
    }


def _how_to_load(format: Format, stock: StockModel | None, out: Path, preprocess_inside: bool) -> str:
    name = out.name
    kwargs = "".join(f", {key}={value!r}" for key, value in stock.kwargs.items()) if stock else ""
    if format == "torchvision" and stock:
        return (
            f"import torch, torchvision\nmodel = torchvision.models.get_model({stock.name!r}{kwargs})\n"
            f"model.{stock.classifier} = torch.nn.Identity()\n"
            f'model.load_state_dict(torch.load("{name}/model.pth", weights_only=True))'
        )
    if format == "timm" and stock:
        return (
            "import timm, safetensors.torch\n"
            f"model = timm.create_model({stock.name!r}, num_classes=0{kwargs})\n"
            f'model.load_state_dict(safetensors.torch.load_file("{name}/model.safetensors"))'
        )
    if format == "hf":
        return f'import timm\nmodel = timm.create_model("local-dir:{name}", pretrained=True)'
    if format == "onnx":
        given = (
            "image: uint8 [height, width, 3]" if preprocess_inside else "images: float32 [N, 3, size, size], prepared"
        )
        key = "image" if preprocess_inside else "images"
        return (
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{name}/model.onnx")\n'
            f'(features,) = session.run(None, {{"{key}": {key}}})  # {given}'
        )
    return f'import safetensors.torch\nstate = safetensors.torch.load_file("{name}/model.safetensors")'

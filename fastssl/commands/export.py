"""`fastssl export`: an encoder in the form that another library loads."""

import argparse
from pathlib import Path
from typing import Any

from fastssl.commands.options import Commands, add_command
from fastssl.commands.output import add_json, print_json

_FORMATS = ("torchvision", "timm", "safetensors", "onnx", "hf")


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    export = add_command(commands, "export", "write a run's encoder in the form that another library loads")
    export.add_argument("run", type=Path, metavar="RUN|FILE", help="folder of the run, or a file of weights")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write: weights, pre-processing, model card")
    export.add_argument(
        "--format", required=True, choices=_FORMATS, metavar="FORMAT", help=f"one of {', '.join(_FORMATS)}"
    )
    export.add_argument(
        "--preprocess",
        choices=["beside", "inside"],
        default="beside",
        help="onnx: take prepared images, or one image of any size (default: beside, in preprocessing.json)",
    )
    export.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if it is an earlier export and nothing else; its model card is replaced too",
    )
    add_json(export)
    export.set_defaults(call=_export)


def _export(args: argparse.Namespace) -> None:
    from pipelines.printable import printable

    if args.json:
        print_json(lambda: _as_values(args.format, _exported(args)))
        return
    out = _exported(args)
    print(f"{printable(out)}: weights, preprocessing.json and README.md, a model card to complete")


def _exported(args: argparse.Namespace) -> Path:
    from fastssl.export.export_encoder import export_encoder

    return export_encoder(
        args.run, args.format, args.out, preprocess_inside=args.preprocess == "inside", overwrite=args.overwrite
    )


def _as_values(format: str, out: Path) -> dict[str, Any]:
    return {"out": out, "format": format, "files": sorted(path.name for path in out.iterdir())}

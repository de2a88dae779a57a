"""`fastssl views`: draw the augmented views of some images of a .beton file."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_recipe, add_set
from pipelines.printable import printable


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    views = add_command(commands, "views", "draw the augmented views of some images of a .beton file")
    views.add_argument("beton", type=Path, metavar="X.beton", help="the file with the images")
    add_recipe(views, "mio_small")
    views.add_argument(
        "--num", type=int, default=12, metavar="N", help="number of images, one per column (default: 12)"
    )
    views.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the augmentations (default: 0)")
    views.add_argument("--out", type=Path, metavar="X.png", help="picture to write (default: next to the file)")
    add_set(views)
    views.set_defaults(call=_views)


def _views(args: argparse.Namespace) -> None:
    from fastssl.config import ConfigError, build_config, with_overrides
    from fastssl.tracking.plots import preview_views
    from pipelines.beton import BetonReader

    if args.num < 2:
        raise ConfigError(f"--num must be at least 2, not {args.num}")
    num_images = min(args.num, BetonReader(args.beton).num_samples)
    data = {"train": str(args.beton), "global_batch_size": num_images}
    tree = {"data": data, "views": {"recipe": args.recipe}, "run": {"seed": args.seed}}
    cfg = build_config(with_overrides(tree, args.set))
    out = args.out or args.beton.with_name(f"{args.beton.name}.views.png")
    preview_views(cfg, out)
    print(f"views: {printable(out)}: {num_images} images, {printable(args.recipe)}")

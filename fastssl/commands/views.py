"""`fastssl views`: draw the augmented views of some images of a .beton file or a data set of many."""

import argparse
from pathlib import Path

from fastssl.commands.options import ANY_IMAGES, Commands, add_command, add_recipe, add_set
from pipelines.printable import printable


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    views = add_command(commands, "views", "draw the augmented views of some images of a .beton file")
    views.add_argument("beton", metavar="X.beton|FOLDER|URL", help=ANY_IMAGES)
    add_recipe(views, "mio_small")
    views.add_argument(
        "--num", type=int, default=12, metavar="N", help="number of images, one per column (default: 12)"
    )
    views.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the augmentations (default: 0)")
    views.add_argument("--out", type=Path, metavar="X.png", help="picture (default: next to it; of a URL, here)")
    add_set(views)
    views.set_defaults(call=_views)


def _views(args: argparse.Namespace) -> None:
    from fastssl.config import ConfigError, build_config, with_overrides
    from fastssl.tracking.plots import preview_views
    from pipelines.shards.describe import beside
    from pipelines.shards.open_images import open_images
    from pipelines.shards.sharded_images import ShardedImages

    if args.num < 2:
        raise ConfigError(f"--num must be at least 2, not {args.num}")
    images = open_images(args.beton)
    num_images = min(args.num, images.num_samples)
    data = {"train": args.beton, "global_batch_size": num_images}
    if isinstance(images, ShardedImages):
        data["window_mb"] = 1  # no more is read than the picture needs
    tree = {"data": data, "views": {"recipe": args.recipe}, "run": {"seed": args.seed}}
    cfg = build_config(with_overrides(tree, args.set))
    out = args.out or beside(args.beton, ".views.png")
    preview_views(cfg, out)
    print(f"views: {printable(out)}: {num_images} images, {printable(args.recipe)}")

"""The `fastssl` command: its sub-commands, which have a file each in fastssl/commands/, and how they end."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastssl import __version__
from fastssl.commands import embed
from fastssl.commands.argument_parser import ArgumentParser
from fastssl.commands.gradnorm import add_gradnorm
from pipelines.errors import DataError
from pipelines.path_names import why_no_path

# In the order of --help.
COMMANDS = (
    train,
    launch,
    convert,
    verify,
    inspect,
    views,
    eval,
    compare,
    hessian,
    gradflow,
    runs,
    doctor,
    bench,
    completion,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0, also for a training that a signal ended after a checkpoint; 1 if a check of the doctor failed; 2
            for bad input, 3 for a run that diverged, 4 for a run that lost one of its processes. 2 to 4 come with one
            line on stderr.
    """
    args = _parser().parse_args(argv)
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from fastssl.errors import DivergedError, PeerLostError, Preempted, UserError
    from fastssl.machine.open_files import allow_open_files

    try:
        allow_open_files()
        _check_paths(args)
        code = args.call(args)
    except (UserError, DataError) as error:
        return _fail(str(error), 2)
    except DivergedError as error:
        return _fail(str(error), 3)
    except Preempted as notice:
        print(printable(f"fastssl: {notice}"), flush=True)
        return 0
    except PeerLostError as error:
        from fastssl.processes.watchdog import exit_now

        return exit_now(_fail(str(error), PeerLostError.exit_code))
    except KeyboardInterrupt:
        return _fail("interrupted; resume a training from its last checkpoint with --set run.resume=auto", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _fail(f"{error.filename}: {error.strerror}", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error.filename or 'a file'} cannot be written ({error.strerror}): free space, then resume", 2)
    return code or 0


def _check_paths(args: argparse.Namespace) -> None:
    from fastssl.errors import UserError

    for name, value in vars(args).items():
        for each in value if isinstance(value, list) else [value]:
            is_path = isinstance(each, Path) or (isinstance(each, str) and name in ("src", "root", "classes"))
            if is_path and (reason := why_no_path(each)):
                raise UserError(f"{str(each)!r:.300} is not a path: {reason}")


def _fail(message: str, code: int) -> int:
    from fastssl.errors import print_error

    print_error(message)
    return code


def _train(args: argparse.Namespace) -> None:
    from fastssl.processes.preemption import StopRequest

    stop_request = StopRequest()
    from fastssl.config import load_config

    cfg = load_config(args.cfg, args.set)
    from fastssl.trainer import train  # slow import, deferred so that config errors show at once

    train(cfg, stop_request=stop_request)


def _convert(args: argparse.Namespace) -> None:
    from fastssl.errors import UserError
    from pipelines.convert import convert, convert_shards

    names = ("max_px", "quality", "on_error", "max_bad", "overwrite", "resume", "classes", "labels", "split", "root")
    options = {name: getattr(args, name) for name in (*names, "download", "image_column", "label_column")} | {
        "num_workers": args.workers
    }
    src = args.src or None
    try:
        if args.shards is not None:
            reports = convert_shards(args.kind, src, args.out, num_shards=args.shards, shard=args.shard, **options)
        elif args.shard is not None:
            raise ValueError("--shard needs --shards, the total number of files")
        else:
            reports = [convert(args.kind, src, args.out, **options)]
    except ValueError as error:
        raise UserError(str(error)) from None
    for done in reports:
        print(
            f"{printable(done.out)}: {done.num_images:,} images in {done.wall_s:.1f} s "
            f"({done.num_passed:,} JPEGs as they were, {done.num_encoded:,} encoded, {done.num_raw:,} raw), "
            f"{done.num_skipped:,} corrupt, {done.num_ignored:,} others left out"
        )


def _verify(args: argparse.Namespace) -> None:
    from pipelines.verify import verify

    print(verify(args.beton))


def _inspect(args: argparse.Namespace) -> None:
    import yaml

    from pipelines.beton import BetonReader, inspect
    from pipelines.contact_sheet import contact_sheet

    print(printable_lines(yaml.safe_dump(inspect(args.beton), sort_keys=False, allow_unicode=True)), end="")
    out = args.out or args.beton.with_name(f"{args.beton.name}.png")
    try:
        contact_sheet(BetonReader(args.beton), out)
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror})") from None
    print(f"contact_sheet: {printable(out)}")


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


def _eval(args: argparse.Namespace) -> None:
    from fastssl.commands.evaluate import evaluate_run

    table = evaluate_run(args.run, args.set, what=args.what, on=args.on, test=args.test, step=args.step)
    print(printable_lines(table))


def _compare(args: argparse.Namespace) -> None:
    from fastssl.commands.compare import compare

    names = ("base", "sweep", "tune", "tune_on", "on_test", "launcher")
    settings = {name: getattr(args, name) for name in names} | {"overrides": args.set, "num_jobs": args.jobs}
    print(printable_lines(compare(args.configs, args.out, num_seeds=args.seeds, **settings)))


def _hessian(args: argparse.Namespace) -> None:
    from fastssl.analysis.hessian import HessianSettings, hessian_of_runs

    names = ("num_probes", "num_iterations", "top_k", "seed")
    settings = HessianSettings(**{name: getattr(args, name) for name in names}, batches=_batch_settings(args))
    table = hessian_of_runs(args.runs, args.set, steps=_steps(args), settings=settings, out=args.out)
    print(printable_lines(table))


def _gradflow(args: argparse.Namespace) -> None:
    from fastssl.analysis.gradflow import gradflow

    table = gradflow(args.run, args.set, steps=_steps(args), settings=_batch_settings(args), out=args.out)
    print(printable_lines(table))


def _steps(args: argparse.Namespace) -> list[int | None]:
    """The steps of --steps or --step; None: the last."""
    return args.steps or [args.step]


def _batch_settings(args: argparse.Namespace) -> "BatchSettings":
    from fastssl.analysis.source import BatchSettings

    return BatchSettings(num_images=args.num_images, batch_size=args.batch_size)


def _doctor(args: argparse.Namespace) -> int:
    from fastssl.commands.doctor import doctor
    from fastssl.config import load_config

    cfg = load_config(args.cfg, args.set) if args.cfg else None
    return doctor(cfg, args.data, as_json=args.json)


def _bench_loader(args: argparse.Namespace) -> None:
    from fastssl.commands.bench import bench_loader_on

    names = ("recipe", "size_px", "engines", "batch_size", "num_threads", "seconds", "device", "out")
    bench_loader_on(args.beton, **{name: getattr(args, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="fastssl", description="Pre-train image encoders without labels.")
    parser.add_argument("--version", action="version", version=f"fastssl {__version__}")
    parser.set_defaults(root=parser)  # for the completion of all commands
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(_command(commands, "train", "train one run in this process"))
    _add_convert(_command(commands, "convert", "convert images to a .beton file"))

    verify = _command(commands, "verify", "check a .beton file: its checksum, and that every image decodes")
    verify.add_argument("beton", type=Path, metavar="X.beton", help="the file to check")
    verify.set_defaults(call=_verify)

    inspect = _command(commands, "inspect", "print what a .beton file contains and draw a contact sheet")
    inspect.add_argument("beton", type=Path, metavar="X.beton", help="the file to inspect")
    inspect.add_argument("--out", type=Path, metavar="X.png", help="contact sheet to write (default: next to the file)")
    inspect.set_defaults(call=_inspect)

    _add_views(_command(commands, "views", "draw the augmented views of some images of a .beton file"))
    _add_eval(_command(commands, "eval", "evaluate the encoder of a run"))
    embed.add_embed(_command(commands, "embed", "write the features of images to a table, by a run's encoder"))
    embed.add_neighbours(_command(commands, "neighbours", "find the images of a table that are most similar to one"))
    _add_compare(_command(commands, "compare", "train and evaluate several configurations with several seeds"))
    _add_hessian(
        _command(commands, "hessian", "compute eigenvalues of the loss's Hessian at the weights of trained runs")
    )
    _add_gradflow(_command(commands, "gradflow", "compare a loss's closed-form gradient with autograd, pair by pair"))
    add_gradnorm(_command(commands, "gradnorm", "compare the norms and variances of losses' gradients at one network"))
    _add_doctor(_command(commands, "doctor", "check whether this machine is ready for training, with advice"))
    bench = _command(commands, "bench", "measure how fast this machine loads a .beton file")
    parts = bench.add_subparsers(title="what to measure", required=True, metavar="PART")
    _add_bench_loader(_command(parts, "loader", "measure each engine, the disk and decoding, and name the bottleneck"))
    return parser


def _command(commands: "argparse._SubParsersAction[ArgumentParser]", name: str, summary: str) -> ArgumentParser:
    """A sub-command; its own --help begins with the same summary as a sentence."""
    return commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")


def _add_set(command: argparse.ArgumentParser, what: str = "override keys of the configuration") -> None:
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=what)


def _add_train(train: argparse.ArgumentParser) -> None:
    train.epilog = "For several processes or GPUs: deepspeed fastssl/train.py --cfg X.yaml, or torchrun."
    train.add_argument(
        "--cfg",
        required=True,
        nargs="+",
        type=Path,
        metavar="X.yaml",
        help="configuration; keys of later files override those of earlier ones",
    )
    _add_set(train)
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    train.set_defaults(call=_train)


def _add_views(views: argparse.ArgumentParser) -> None:
    views.add_argument("beton", type=Path, metavar="X.beton", help="the file with the images")
    _add_recipe(views, "mio_small")
    views.add_argument(
        "--num", type=int, default=12, metavar="N", help="number of images, one per column (default: 12)"
    )
    views.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the augmentations (default: 0)")
    views.add_argument("--out", type=Path, metavar="X.png", help="picture to write (default: next to the file)")
    _add_set(views)
    views.set_defaults(call=_views)


def _add_recipe(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--recipe", default=default, help=f"name of a recipe, or a .yaml file with one (default: {default})"
    )


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    evaluate.add_argument(
        "--what",
        nargs="+",
        action="extend",
        default=[],
        metavar="PROTOCOL",
        help="knn, linear, logistic, few_label, linear_augmented, finetune (default: the run's eval.what)",
    )
    evaluate.add_argument(
        "--on", type=Path, metavar="X.beton", help="evaluate on another data set (default: the run's own)"
    )
    evaluate.add_argument(
        "--test",
        type=Path,
        metavar="TEST.beton",
        help="test set (default: the run's data.test; with --on, images held out of that file)",
    )
    evaluate.add_argument(
        "--step", type=int, metavar="N", help="step of the checkpoint (default: the last and the best)"
    )
    _add_set(evaluate)
    evaluate.set_defaults(call=_eval)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("configs", nargs="+", type=Path, metavar="X.yaml", help="the configurations to compare")
    compare.add_argument(
        "--base", nargs="+", type=Path, default=[], metavar="X.yaml", help="read these files first, for all of them"
    )
    compare.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="train each configuration with seeds 0 to N - 1 (default: 3)"
    )
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="folder for the runs and the table (default: runs/compare)",
    )
    _add_set(compare, "override keys of all configurations")
    _add_values(compare, "--sweep", "repeat each configuration with each of these values")
    _add_values(compare, "--tune", "first choose one of these values for each configuration, on held-out images")
    compare.add_argument(
        "--tune-on", metavar="PROTOCOL", help="protocol that --tune chooses by (default: the first of eval.what)"
    )
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    compare.add_argument(
        "--on-test", action="store_true", help="evaluate on data.test (default: on held-out training images)"
    )
    compare.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="command that starts a training, such as 'deepspeed --num_gpus 8' (default: one process)",
    )
    compare.set_defaults(call=_compare)


def _add_values(command: argparse.ArgumentParser, option: str, what: str) -> None:
    command.add_argument(option, nargs="+", action="extend", default=[], metavar="KEY=V1,V2", help=what)


def _add_hessian(hessian: argparse.ArgumentParser) -> None:
    hessian.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs; they share one plot")
    hessian.add_argument(
        "--num-probes", type=int, default=4, metavar="N", help="number of random start vectors (default: 4)"
    )
    hessian.add_argument(
        "--num-iterations", type=int, default=64, metavar="N", help="Lanczos steps per start vector (default: 64)"
    )
    hessian.add_argument(
        "--top-k", type=int, default=5, metavar="K", help="number of largest eigenvalues to report (default: 5)"
    )
    hessian.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the start vectors (default: 0)")
    _add_batches(hessian)
    hessian.set_defaults(call=_hessian)


def _add_gradflow(gradflow: argparse.ArgumentParser) -> None:
    gradflow.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    _add_batches(gradflow)
    gradflow.set_defaults(call=_gradflow)


def _series(text: str) -> list[int | None]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "last" or (part.isascii() and part.isdigit()) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be steps with commas between them, such as 100,1000,last")
    return [None if part == "last" else int(part) for part in parts]


def _add_batches(command: argparse.ArgumentParser) -> None:
    step = command.add_mutually_exclusive_group()
    step.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the last one)")
    step.add_argument(
        "--steps", type=_series, metavar="N,N,last", help="steps of several checkpoints, such as 100,1000,last"
    )
    command.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="number of training images, a multiple of the batch size (default: four batches)",
    )
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="images per batch (default: the run's data.global_batch_size)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the results (default: inside the run's folder)"
    )
    _add_set(command)


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "--cfg", nargs="+", type=Path, metavar="X.yaml", help="also check what the run of this configuration needs"
    )
    _add_set(doctor)
    doctor.add_argument(
        "--data", type=Path, metavar="PATH", help="folder or .beton file whose disk to measure (default: data.train)"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(call=_doctor)


def _add_bench_loader(loader: argparse.ArgumentParser) -> None:
    loader.add_argument("beton", type=Path, metavar="X.beton", help="the file to load")
    _add_recipe(loader, "byol")
    loader.add_argument("--size-px", type=int, metavar="N", help="side of every view in pixels (default: the recipe's)")
    loader.add_argument(
        "--engines",
        nargs="+",
        default=["ffcv", "dali", "resident", "torch"],
        metavar="ENGINE",
        help="engines to measure (default: ffcv dali resident torch)",
    )
    loader.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    loader.add_argument(
        "--threads", dest="num_threads", type=int, metavar="N", help="number of CPU cores to use (default: all)"
    )
    loader.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="length of a timing window (default: 2)"
    )
    loader.add_argument(
        "--device", default="auto", help="auto, cpu or cuda (default: auto, which takes a GPU if there is one)"
    )
    loader.add_argument("--out", type=Path, metavar="X.csv", help="append the results to this file")
    loader.set_defaults(call=_bench_loader)


def _add_convert(convert: argparse.ArgumentParser) -> None:
    kinds = ["folder", "csv", "webdataset", "parquet", "torchvision", "npz", "digits"]
    convert.add_argument(
        "--from",
        dest="kind",
        choices=kinds,
        metavar="KIND",
        help=f"kind of source: {', '.join(kinds)} (default: by what SRC is; torchvision and digits must be named)",
    )
    convert.add_argument(
        "src",
        nargs="*",
        metavar="SRC",
        help="folder: a folder of images. csv: a table with the columns path and, if labelled, label. webdataset, "
        "parquet: a folder, a file, or a pattern such as x-{000..012}.tar. torchvision: name of the data set, such "
        "as CIFAR10. npz: the file. digits: leave SRC out. Several are written one after the other, and classes of "
        "one name become one",
    )
    convert.add_argument("out", type=Path, metavar="OUT.beton", help="the file to write")
    convert.add_argument("--classes", metavar="FILE", help="folder: read only the sub-folders named in this file")
    convert.add_argument(
        "--labels",
        choices=["auto", "folders", "none"],
        default="auto",
        help="folder: whether sub-folders are classes (default: auto, unless one holds all images, each holds one, or "
        "they are named train, val and the like)",
    )
    convert.add_argument(
        "--split",
        help="digits: train or test (default: both). npz: read the arrays x_SPLIT and y_SPLIT. torchvision: the data "
        "set's own name of the split",
    )
    convert.add_argument("--root", metavar="FOLDER", help="torchvision: folder of its data sets")
    convert.add_argument("--download", action="store_true", help="torchvision: download files missing in --root")
    convert.add_argument(
        "--image-column", metavar="NAME", help="parquet: column with the images (default: the only one, or image)"
    )
    convert.add_argument(
        "--label-column", metavar="NAME", help="parquet: column with integer labels (default: label, if present)"
    )
    convert.add_argument("--max-px", type=int, metavar="N", help="shrink images whose longer side exceeds N pixels")
    convert.add_argument(
        "--quality", type=int, default=95, metavar="N", help="JPEG quality of re-encoded images, 1 to 100 (default: 95)"
    )
    convert.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        help="fail at the first corrupt image, as --max-bad 0, or leave all out, as --max-bad 1",
    )
    convert.add_argument(
        "--max-bad",
        type=float,
        metavar="FRACTION",
        help="fail if more than this fraction of the images is corrupt; fewer are left out and listed (default: 0.1)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    convert.add_argument(
        "--resume",
        action="store_true",
        help="resume an interrupted conversion: repeat its command with this option added",
    )
    convert.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write N files OUT-00000-of-0000N.beton, each with an equal, contiguous part of the images: to share "
        "the work among machines, or for parts of a data set (a training reads one file)",
    )
    convert.add_argument("--shard", type=int, metavar="I", help="with --shards: write only file I, counted from 0")
    convert.add_argument(
        "--workers", type=int, default=0, metavar="N", help="worker processes (default: 0, one thread per core instead)"
    )
    convert.set_defaults(call=_convert)


if __name__ == "__main__":
    sys.exit(main())

"""The `fastssl` command. Each sub-command calls one function; slow imports are deferred until they are needed."""

import argparse
import errno
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastssl import __version__
from pipelines.errors import DataError
from pipelines.path_names import why_no_path
from pipelines.printable import printable, printable_lines

if TYPE_CHECKING:
    from fastssl.analysis.source import BatchSettings


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
        print(f"fastssl: {notice}", flush=True)
        return 0
    except PeerLostError as error:
        from fastssl.processes.watchdog import exit_now

        return exit_now(_fail(str(error), PeerLostError.exit_code))
    except KeyboardInterrupt:
        return _fail("interrupted; a training goes on from its last checkpoint with --set run.resume=auto", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _fail(f"{error.filename}: {error.strerror}", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error.filename or 'a file'} cannot be written ({error.strerror}): make room, then go on", 2)
    return code or 0


def _check_paths(args: argparse.Namespace) -> None:
    from fastssl.errors import UserError

    for name, value in vars(args).items():
        for each in value if isinstance(value, list) else [value]:
            is_path = isinstance(each, Path) or (isinstance(each, str) and name in ("src", "root"))
            if is_path and (reason := why_no_path(each)):
                raise UserError(f"{str(each)!r:.300} is no path: {reason}")


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

    names = ("max_px", "quality", "on_error", "overwrite", "resume", "split", "root", "download", "image_column")
    options = {name: getattr(args, name) for name in (*names, "label_column")} | {"num_workers": args.workers}
    try:
        if args.shards is not None:
            reports = convert_shards(args.kind, args.src, args.out, num_shards=args.shards, shard=args.shard, **options)
        elif args.shard is not None:
            raise ValueError("shard: needs --shards, the number of all of them")
        else:
            reports = [convert(args.kind, args.src, args.out, **options)]
    except ValueError as error:
        raise UserError(str(error)) from None
    for done in reports:
        print(
            f"{printable(done.out)}: {done.num_images:,} images in {done.wall_s:.1f} s "
            f"({done.num_passed:,} JPEGs as they were, {done.num_encoded:,} encoded, {done.num_raw:,} raw), "
            f"{done.num_skipped:,} corrupt, {done.num_ignored:,} other files"
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
    table = hessian_of_runs(args.runs, args.set, step=args.step, settings=settings, out=args.out)
    print(printable_lines(table))


def _gradflow(args: argparse.Namespace) -> None:
    from fastssl.analysis.gradflow import gradflow

    table = gradflow(args.run, args.set, step=args.step, settings=_batch_settings(args), out=args.out)
    print(printable_lines(table))


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


class _Parser(argparse.ArgumentParser):
    """Ends at a bad argument with one line that names the nearest known one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but an unknown option is reported before a missing one, and by the parser that knows it."""
        for word in () if args is None or self._subparsers else itertools.takewhile(lambda word: word != "--", args):
            option = word.partition("=")[0]
            if re.fullmatch(r"--\S+", option) and not any(known.startswith(option) for known in self._options()):
                self._refuse(option)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        sys.exit(_fail(f"{message} (see {self.prog} --help)", 2))

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _refuse(self, argument: str) -> NoReturn:
        from fastssl.errors import did_you_mean

        self.error(f"unknown argument {argument[:100]}{did_you_mean(argument, self._options())}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            from fastssl.errors import did_you_mean

            name = action.metavar or "/".join(action.option_strings)
            hint = did_you_mean(str(value), action.choices)
            self.error(f"{name} must be one of {', '.join(action.choices)}, not {str(value)[:100]}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastssl", description="Pre-train image encoders without labels.")
    parser.add_argument("--version", action="version", version=f"fastssl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train one run (one process; see `deepspeed fastssl/train.py` for more)")
    train.add_argument(
        "--cfg", required=True, nargs="+", type=Path, help="YAML file of the run, or several: later ones count"
    )
    train.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    train.set_defaults(call=_train)

    _add_convert(commands.add_parser("convert", help="write a .beton file from images"))

    verify = commands.add_parser("verify", help="read a .beton file whole: its checksum, and decode every image")
    verify.add_argument("beton", type=Path, metavar="X.beton")
    verify.set_defaults(call=_verify)

    inspect = commands.add_parser("inspect", help="print what a .beton file holds and draw a contact sheet")
    inspect.add_argument("beton", type=Path, metavar="X.beton")
    inspect.add_argument("--out", type=Path, help="the PNG (default: beside the file)")
    inspect.set_defaults(call=_inspect)

    views = commands.add_parser("views", help="draw what a network will see of a .beton file")
    views.add_argument("beton", type=Path, metavar="X.beton")
    views.add_argument("--recipe", default="mio_small", help="a recipe's name, or a .yaml file of one")
    views.add_argument("--num", type=int, default=12, help="images, one a column (default: 12)")
    views.add_argument("--seed", type=int, default=0)
    views.add_argument("--out", type=Path, help="the PNG (default: beside the file)")
    views.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    views.set_defaults(call=_views)

    evaluate = commands.add_parser("eval", help="evaluate a run's encoder")
    _add_eval(evaluate)

    _add_compare(commands.add_parser("compare", help="train and judge several configurations under several seeds"))
    _add_hessian(commands.add_parser("hessian", help="the eigenvalues of the loss's Hessian where runs stand"))
    _add_gradflow(commands.add_parser("gradflow", help="a loss's closed-form gradient against autograd, pair by pair"))
    _add_doctor(commands.add_parser("doctor", help="check this machine, and say what to do about what is found"))
    bench = commands.add_parser("bench", help="measure how fast a .beton file is loaded here, and what bounds it")
    _add_bench_loader(bench.add_subparsers(title="what to measure", required=True, metavar="PART"))
    return parser


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    evaluate.add_argument(
        "--what",
        nargs="+",
        action="extend",
        default=[],
        metavar="PROTOCOL",
        help="knn, linear, logistic, few_label, linear_augmented, finetune (default: eval.what of the run)",
    )
    evaluate.add_argument(
        "--on", type=Path, metavar="OTHER.beton", help="judge on another data set (default: the run's own)"
    )
    evaluate.add_argument(
        "--test",
        type=Path,
        metavar="TEST.beton",
        help="the test part (default: data.test of the run; with --on a hold-out of OTHER.beton)",
    )
    evaluate.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the last one)")
    evaluate.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    evaluate.set_defaults(call=_eval)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml")
    compare.add_argument("--base", nargs="+", type=Path, default=[], metavar="YAML", help="read first, for all of them")
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="of each configuration (default: 3)")
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs and the table")
    compare.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for all of them")
    compare.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="run each configuration with each of these values",
    )
    compare.add_argument(
        "--tune",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="choose among these values on held-out images first, for each configuration",
    )
    compare.add_argument("--tune-on", metavar="PROTOCOL", help="what to choose by (default: the first of eval.what)")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    compare.add_argument("--on-test", action="store_true", help="judge on data.test (default: on held-out images)")
    compare.add_argument(
        "--launcher", default="", help="what starts a training, such as 'deepspeed --num_gpus 8' (default: one process)"
    )
    compare.set_defaults(call=_compare)


def _add_hessian(hessian: argparse.ArgumentParser) -> None:
    hessian.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, one plot for all")
    hessian.add_argument("--num-probes", type=int, default=4, metavar="N", help="random starts (default: 4)")
    hessian.add_argument(
        "--num-iterations", type=int, default=64, metavar="N", help="Lanczos steps for each start (default: 64)"
    )
    hessian.add_argument("--top-k", type=int, default=5, metavar="K", help="largest eigenvalues (default: 5)")
    hessian.add_argument("--seed", type=int, default=0, help="of the starts (default: 0)")
    _add_batches(hessian)
    hessian.set_defaults(call=_hessian)


def _add_gradflow(gradflow: argparse.ArgumentParser) -> None:
    gradflow.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    _add_batches(gradflow)
    gradflow.set_defaults(call=_gradflow)


def _add_batches(command: argparse.ArgumentParser) -> None:
    command.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the last one)")
    command.add_argument(
        "--num-images", type=int, metavar="N", help="of the training file, whole batches (default: four)"
    )
    command.add_argument("--batch-size", type=int, metavar="N", help="images of a batch (default: the run's, global)")
    command.add_argument("--out", type=Path, help="folder of the results (default: in the run)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--cfg", nargs="+", type=Path, help="YAML file, or files, of the run that is to be made here")
    doctor.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    doctor.add_argument("--data", type=Path, metavar="FOLDER", help="whose disk to measure (default: data.train)")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(call=_doctor)


def _add_bench_loader(parts: "argparse._SubParsersAction[_Parser]") -> None:
    loader = parts.add_parser("loader", help="each engine, the disk, decoding and the other stages, in turns")
    loader.add_argument("beton", type=Path, metavar="X.beton")
    loader.add_argument("--recipe", default="byol", help="a recipe's name, or a .yaml file of one (default: byol)")
    loader.add_argument("--size-px", type=int, metavar="N", help="side of every view (default: the recipe's)")
    loader.add_argument(
        "--engines", nargs="+", default=["ffcv", "dali", "resident", "torch"], metavar="ENGINE", help="default: all"
    )
    loader.add_argument("--batch-size", type=int, default=64, metavar="N", help="images (default: 64)")
    loader.add_argument("--threads", dest="num_threads", type=int, metavar="N", help="cores (default: all)")
    loader.add_argument("--seconds", type=float, default=2.0, help="length of a timing window (default: 2)")
    loader.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto, the GPU if there is one)")
    loader.add_argument("--out", type=Path, metavar="X.csv", help="append the rows to this file")
    loader.set_defaults(call=_bench_loader)


def _add_convert(convert: argparse.ArgumentParser) -> None:
    kinds = ["folder", "csv", "webdataset", "parquet", "torchvision", "npz", "digits"]
    convert.add_argument("--from", dest="kind", required=True, choices=kinds)
    convert.add_argument(
        "src",
        nargs="?",
        metavar="SRC",
        help="folder; csv: table with columns path and, if labelled, label; webdataset, parquet: a folder, file, glob "
        "or pattern like x-{000..012}.tar; torchvision: the data set's name, e.g. CIFAR10; npz: the file; digits: none",
    )
    convert.add_argument("out", type=Path, metavar="OUT.beton")
    convert.add_argument(
        "--split", help="digits: train or test (default: both); npz: reads x_SPLIT and y_SPLIT; torchvision: its own"
    )
    convert.add_argument("--root", help="torchvision: folder of its data sets")
    convert.add_argument("--download", action="store_true", help="torchvision: fetch what is missing in --root")
    convert.add_argument("--image-column", help="parquet: column of the images (default: the only one, or image)")
    convert.add_argument("--label-column", help="parquet: column of integer labels (default: label, if it is there)")
    convert.add_argument("--max-px", type=int, help="shrink images whose longer side is over this")
    convert.add_argument("--quality", type=int, default=95, help="of JPEGs encoded anew, 1 to 100 (default: 95)")
    convert.add_argument("--on-error", choices=["fail", "skip"], default="fail", help="what to do at a corrupt image")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    convert.add_argument(
        "--resume",
        action="store_true",
        help="go on where a killed conversion was (give the same command again with this option)",
    )
    convert.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write N files OUT-00000-of-0000N.beton of equal, contiguous ranges; each is a data set of its own (a "
        "training reads one file): for work shared by machines, or parts of one set",
    )
    convert.add_argument("--shard", type=int, metavar="I", help="with --shards: write only number I, from 0")
    convert.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes (default: 0, a thread a core of one process)"
    )
    convert.set_defaults(call=_convert)


if __name__ == "__main__":
    sys.exit(main())

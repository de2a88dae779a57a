"""The page's tables, and text as HTML: every text from a run's files is escaped here."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

from fastssl.config import build_config, flatten, to_dict
from fastssl.errors import ConfigError
from fastssl.report.figures import is_number
from fastssl.report.gather import Gathered, as_mapping
from fastssl.tracking.result_rows import command_line
from pipelines.printable import printable

_ABSENT = "–"
_MAX_CHARS = 300  # of a value
_PACKAGES = ("torch", "deepspeed")


class Html(str):
    """Text that is HTML already."""


def facts(runs: Sequence[Gathered]) -> list[list[str]]:
    """Rows of the summary: a name, and what it is of each run; what is unknown of all is left out."""
    found = [_facts(run) for run in runs]
    return [[name, *(each[name] for each in found)] for name in found[0] if any(each[name] for each in found)]


def differences(runs: Sequence[Gathered]) -> list[list[str]]:
    """Rows of the keys of the configuration that differ: between runs, or between a single run and the defaults."""
    trees = [_flat(run.tree) for run in runs]
    if len(runs) == 1:
        trees.insert(0, _defaults(runs[0].tree))
    keys = dict.fromkeys(key for tree in reversed(trees) for key in tree)
    values = {key: [_shown(tree[key]) if key in tree else "" for tree in trees] for key in keys}
    return [[key, *found] for key, found in values.items() if len(set(found)) > 1 and key != "run.dir"]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{text(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr><th>{text(row[0])}</th>{''.join(f'<td>{text(cell) or _ABSENT}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(value: Any) -> str:
    """A value of a configuration or of JSON."""
    return printable(value if isinstance(value, str) else json.dumps(value, default=str), _MAX_CHARS)


def text(text: object) -> str:
    """Text as HTML; what is HTML already stays as it is."""
    return text if isinstance(text, Html) else html.escape(printable(text))


def _facts(run: Gathered) -> dict[str, str]:
    """What the summary says of a run; empty texts for what is unknown."""
    about, state = run.environment, run.run
    train, data = run.section("train"), run.section("data")
    waits, memory = (_numbers(run, key) for key in ("data_wait_fraction", "memory_bytes"))
    gpus = [str(name) for name in about["gpus"]] if isinstance(about.get("gpus"), list) else []
    return {
        "state": f"{state.state}, {state.num_epochs_done} of {state.num_epochs} epochs",
        "accuracy": _accuracy(run),
        "loss": state.loss,
        "backbone": state.backbone,
        "data": _known(data, "train"),
        "batch": f"{_known(data, 'global_batch_size')} images, {_known(train, 'precision')}",
        "hardware": ", ".join([*(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)), *_cpu(about)]),
        "processes": _known(about, "world_size"),
        "time": _time(run),
        "images/s": f"{run.speed[1] / run.speed[0]:,.0f} over all epochs" if run.speed else "",
        "data wait": f"{fmean(waits):.1%} of the time, mean of the epochs" if waits else "",
        "memory": f"{max(memory) / 2**30:.2f} GiB, of the {'GPU' if gpus else 'process'}" if memory else "",
        "versions": _versions(about),
        "commit": _known(about, "commit"),
        "command": _command(about),
        "started": _known(about, "time_utc"),
        "last change": state.changed_utc.replace("+00:00", "Z"),
    }


def _known(values: Mapping[str, Any], key: str) -> str:
    return _shown(values[key]) if values.get(key) is not None else ""


def _numbers(run: Gathered, key: str) -> list[float]:
    return [row[key] for row in run.of_kind("epoch") if is_number(row.get(key))]


def _accuracy(run: Gathered) -> str:
    last, best = run.run.last_top1, run.run.best_top1
    if last is None or best is None:
        return ""
    return f"{run.run.measure}, top-1 on held-out images: last {last:.1%}, best {best:.1%}"


def _cpu(about: Mapping[str, Any]) -> list[str]:
    return [f"{about['cpu']} ({about.get('num_cpus')} cores)"] if about.get("cpu") else []


def _versions(about: Mapping[str, Any]) -> str:
    packages = {"python": about.get("python")} | as_mapping(about.get("packages"))
    return ", ".join(f"{name} {packages[name]}" for name in ("python", *_PACKAGES) if packages.get(name))


def _command(about: Mapping[str, Any]) -> str:
    words = about.get("command")
    is_whole = isinstance(words, list) and len(words) > 1 and all(isinstance(word, str) for word in words)
    return command_line(words[1:]) if is_whole and words else ""


def _time(run: Gathered) -> str:
    parts = [f"{_duration(run.speed[0])} in epochs"] if run.speed else []
    if run.run.time_s is not None:
        parts.append(f"{_duration(run.run.time_s)} from the start to the last row")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else _ABSENT


def _defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, of the run's own loss and optimizer where they are known."""
    sections = {name: as_mapping(tree.get(name)) for name in ("loss", "optim")}
    names = {name: {"name": section["name"]} for name, section in sections.items() if "name" in section}
    try:
        return _flat(to_dict(build_config(names)))
    except ConfigError:
        return _flat(to_dict(build_config({})))


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(tree) if value != {}}

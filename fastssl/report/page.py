"""The page: HTML from what was gathered; every text from a run's files is escaped here."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import count
from statistics import fmean
from string import Template
from typing import Any

from fastssl import __version__
from fastssl.config import build_config, flatten, to_dict
from fastssl.errors import ConfigError
from fastssl.evaluation.results import SHOWN, table_row
from fastssl.report import figures as draw
from fastssl.report.figures import Figure, colour, is_number
from fastssl.report.gather import Gathered
from fastssl.report.pictures import NUM_MISTAKES, NUM_NEIGHBOURS, NUM_QUERIES, Pictures
from fastssl.report.thumbnails import Sheet, draw_filters, draw_sheet, smaller
from fastssl.tracking.result_rows import command_line
from pipelines.printable import printable

_ABSENT = "–"
_MAX_SHOWN = 12  # rows of a list
_MAX_CHARS = 300  # of a value


def build_page(
    runs: Sequence[Gathered], pictures: Sequence[Pictures | None], reasons: Sequence[str], plotly: str
) -> str:
    """The whole page.

    Args:
        runs: What their folders hold.
        pictures: Of each run's encoder; None: there are none.
        reasons: Of each run, why there are no pictures; empty where there are.
        plotly: Plotly's JavaScript.

    Returns:
        HTML that asks for nothing from outside: its policy forbids that, and every script but these two.
    """
    page = _Page(runs, pictures, reasons)
    body = page.body()  # first: it numbers the figures and sheets
    title = f"fastssl report: {runs[0].name}" if len(runs) == 1 else f"fastssl report: {len(runs)} runs"
    parts = {name: files("fastssl.report").joinpath(name).read_text() for name in ("page.html", "page.css", "page.js")}
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in (plotly, parts["page.js"]))
    return Template(parts["page.html"]).substitute(
        policy=f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}",
        title=html.escape(title),
        body=body,
        css=parts["page.css"] + page.css(),
        figures=json.dumps(page.figures, allow_nan=False).replace("<", "\\u003c"),
        plotly=plotly,
        script=parts["page.js"],
    )


class _Page:
    """The sections, and the figures and sheets that they refer to by number."""

    def __init__(self, runs: Sequence[Gathered], pictures: Sequence[Pictures | None], reasons: Sequence[str]) -> None:
        self.runs, self.pictures, self.reasons = runs, pictures, reasons
        self.figures: list[dict[str, Any]] = []
        self._sheets: dict[Any, tuple[int, Sheet]] = {}
        self._numbers = count(1)
        self._headings: list[tuple[str, str]] = []

    def body(self) -> str:
        sections = [self._summary(), self._configuration(), self._evaluations()]
        for title, found in draw.draw_curves(self.runs).items():
            sections.append(self._section(title, self._plots(found)))
        sections += [
            self._section("Similarities of pairs", self._plots(draw.draw_similarities(self.runs))),
            self._features(),
            self._neighbours(),
            self._mistakes(),
            self._views(),
            self._filters(),
            self._bad_samples(),
            self._hessian(),
        ]
        links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for title, anchor in self._headings)
        now = datetime.now(UTC)
        about = f"Made by fastssl {__version__} on {now:%Y-%m-%d %H:%M} UTC. Drag over a plot to zoom, double-click to "
        return f'<p class="faint">{about}see it whole.</p><nav>{links}</nav>{"".join(sections)}'

    def css(self) -> str:
        return "".join(
            f".sheet{number}{{background-image:url({sheet.uri});"
            f"background-size:{100 * sheet.num_columns}% {100 * sheet.num_rows}%}}\n"
            for number, sheet in self._sheets.values()
        )

    def _section(self, title: str, content: str) -> str:
        if not content:
            return ""
        anchor = title.lower().replace(" ", "-")
        self._headings.append((title, anchor))
        return f'<h2 id="{anchor}">{html.escape(title)}</h2>{content}'

    def _summary(self) -> str:
        facts = [_facts(run) for run in self.runs]
        rows = [[name, *(fact[name] for fact in facts)] for name in facts[0] if any(fact[name] for fact in facts)]
        return self._section("Summary", _table(["", *self._named()], rows))

    def _configuration(self) -> str:
        trees = [dict(flatten(run.tree)) for run in self.runs]
        if len(self.runs) == 1:
            trees.insert(0, _defaults(self.runs[0].tree))
            heading, note = ["key", "default", "this run"], "What differs from the defaults."
        else:
            heading, note = ["key", *self._named()], "What differs between the runs; the rest is the same in all."
        keys = dict.fromkeys(key for tree in reversed(trees) for key in tree)
        values = {key: [_shown(tree[key]) if key in tree else _ABSENT for tree in trees] for key in keys}
        rows = [[key, *found] for key, found in values.items() if len(set(found)) > 1 and key != "run.dir"]
        content = f'<p class="faint">{note}</p>{_table(heading, rows)}' if rows else "<p>There is no difference.</p>"
        return self._section("Configuration", content)

    def _evaluations(self) -> str:
        rows = []
        for number, run in enumerate(self.runs):
            for line in run.evaluations:
                try:
                    found = table_row(line)  # pyright: ignore[reportArgumentType] a line of another form raises
                except (TypeError, ValueError, KeyError, AttributeError):
                    continue
                rows.append([self._name(number), *(found[name] for name in SHOWN)])
        return self._section("Evaluation", _table([_Html("run"), *SHOWN.values()], rows) if rows else "")

    def _plots(self, found: Sequence[Figure], kind: str = "") -> str:
        return f'<div class="plots {kind}">{"".join(map(self._plot, found))}</div>' if found else ""

    def _plot(self, figure: Figure) -> str:
        name = f"plot{next(self._numbers)}"
        entry: dict[str, Any] = {"id": name, "data": figure.data, "layout": figure.layout}
        if figure.sheet is not None:
            sheet = next(sheet for number, sheet in self._sheets.values() if number == figure.sheet)
            entry["sheet"] = {"number": figure.sheet, "columns": sheet.num_columns, "rows": sheet.num_rows}
        self.figures.append(entry)
        note = f"<span>{_text(figure.note)}</span>" if figure.note else ""
        tall = " tall" if figure.is_tall else ""
        return (
            f"<figure><figcaption>{_text(figure.title)}{note}</figcaption>"
            f'<div class="plot{tall}" id="{name}"></div></figure>'
        )

    def _features(self) -> str:
        lines = "".join(
            f"<p>{self._name(number)}: no pictures of the encoder: {_text(reason)}</p>"
            for number, reason in enumerate(self.reasons)
            if reason
        )
        spectrum = draw.draw_eigenvalues(self.runs, self.pictures)
        plots = [spectrum] if spectrum else []
        for number, found in enumerate(self.pictures):
            if found:
                held_out = (
                    "held out from the probe and the kNN (the training without labels sees them)"
                    if found.album.is_held_out
                    else "of the training part, as the run holds none out"
                )
                lines += (
                    f'<p class="faint">{self._name(number)}: {len(found.labels):,} images of '
                    f"{_text(found.album.reader.path)}, {held_out}; {found.features.shape[1]:,} features, of which the "
                    f"effective rank (RankMe, without the mean) is {draw.feature_rank(found):.1f}.</p>"
                )
                sheet = self._sheet(found)[0]
                plots.append(draw.draw_map(self.runs[number], found, sheet, len(self.runs) > 1))
        return self._section("Features", lines + self._plots(plots, "maps"))

    def _neighbours(self) -> str:
        parts = []
        for number, found in enumerate(self.pictures):
            if not found:
                continue
            n = len(found.labels)
            rows = []
            for query in [round(i * (n - 1) / max(NUM_QUERIES - 1, 1)) for i in range(min(NUM_QUERIES, n))]:
                cells = [self._cell(found, query, found.album.class_name(int(found.labels[query])))]
                near = zip(found.neighbours[query], found.similarity[query], strict=True)
                for other, similarity in list(near)[:NUM_NEIGHBOURS]:
                    label = int(found.labels[other])
                    kind = "" if label < 0 else "same" if label == found.labels[query] else "other"
                    cells.append(self._cell(found, other, found.album.class_name(label), f"{similarity:.2f}", kind))
                rows.append(f'<div class="grid row">{"".join(cells)}</div>')
            parts.append(f'<h3>{self._name(number)}</h3><div class="scroll">{"".join(rows)}</div>')
        note = "An image, then those of the images above that are most similar to it (cosine of the centred features)."
        return self._section("Nearest neighbours", f'<p class="faint">{note}</p>{"".join(parts)}' if parts else "")

    def _mistakes(self) -> str:
        parts = []
        for number, found in enumerate(self.pictures):
            if not found or not (mistakes := found.mistakes):
                continue
            cells = []
            for i in mistakes.worst[:NUM_MISTAKES]:
                true, taken = (found.album.class_name(int(each[i])) for each in (found.labels, mistakes.predicted))
                cells.append(
                    self._cell(found, i, f"{true}, taken for {taken}", f"{mistakes.votes[i]:.0%} of the votes")
                )
            line = (
                f"{self._name(number)}: {mistakes.top1:.1%} of the labelled images above are right by a vote of their "
                f"neighbours among the others. {_confused_classes(found)}"
            )
            parts.append(f'<h3>{line}</h3><div class="grid mistakes">{"".join(cells)}</div>')
        return self._section("Most-confused images", "".join(parts))

    def _views(self) -> str:
        parts = []
        for number, run in enumerate(self.runs):
            uri = smaller(run.views) if run.views else None
            picture = (
                f'<img class="wide" alt="views" src="{uri}">' if uri else "<p>The run folder has no views.png.</p>"
            )
            parts.append(f"<h3>{self._name(number)}</h3>{picture}")
        note = "The views that the network saw of the first images: a column for each image, a row for each view."
        return self._section("Views", f'<p class="faint">{note}</p>{"".join(parts)}')

    def _filters(self) -> str:
        parts = [
            f'<h3>{self._name(number)}</h3><img class="pixels wide" alt="filters" src="{draw_filters(found.filters)}">'
            for number, found in enumerate(self.pictures)
            if found and found.filters is not None
        ]
        return self._section("First-layer filters", "".join(parts))

    def _bad_samples(self) -> str:
        parts = []
        for number, run in enumerate(self.runs):
            seen = [row["bad_samples_seen"] for row in run.of_kind("epoch") if is_number(row.get("bad_samples_seen"))]
            lines = [f"The training replaced {max(seen):,.0f} damaged images."] if seen else []
            found = self.pictures[number]
            if found and found.broken:
                lines += [f"Image {i} cannot be read: {why}" for i, why in list(found.broken.items())[:_MAX_SHOWN]]
            for row in run.skipped_steps[:_MAX_SHOWN]:
                ids = row["sample_ids"] if isinstance(row["sample_ids"], list) else []
                some = ", ".join(map(str, ids[:8])) + (" …" if len(ids) > 8 else "")
                lines.append(f"Step {row['step']} was skipped (loss {row.get('loss')}), with {len(ids)} images: {some}")
            if len(run.skipped_steps) > _MAX_SHOWN:
                lines.append(f"{len(run.skipped_steps):,} steps were skipped; nonfinite.jsonl has all.")
            content = "".join(f"<p>{_text(line)}</p>" for line in lines) or "<p>None.</p>"
            parts.append(f"<h3>{self._name(number)}</h3>{content}")
        return self._section("Bad samples", "".join(parts))

    def _hessian(self) -> str:
        figure = draw.draw_hessian(self.runs)
        return self._section("Hessian spectrum", self._plots([figure], "maps") if figure else "")

    def _cell(self, found: Pictures, position: int, *lines: str) -> str:
        """A thumbnail with lines under it; the last of three lines is the class of CSS of the first."""
        kind = lines[2] if len(lines) > 2 else ""
        number, sheet = self._sheet(found)
        words = f"{lines[0]}, image {found.album.ids[position]}"
        texts = "".join(
            f'<div class="{kind if i == 0 else ""}">{_text(line)}</div>' for i, line in enumerate(lines[:2])
        )
        return (
            f'<div title="{_text(words)}"><span class="thumb pixels sheet{number}" role="img" '
            f'aria-label="{_text(words)}" style="{sheet.style(int(position))}"></span>{texts}</div>'
        )

    def _sheet(self, found: Pictures) -> tuple[int, Sheet]:
        """The sheet of a run's thumbnails, which runs with the same images share, and its number."""
        key = (found.album.reader.path, str(found.album.reader.identity), found.album.ids.tobytes())
        if key not in self._sheets:
            self._sheets[key] = (len(self._sheets), draw_sheet(found.thumbnails))
        return self._sheets[key]

    def _name(self, number: int) -> "_Html":
        name = _text(self.runs[number].name)
        return _Html(f'<span class="key" style="background:{colour(number)}"></span>{name}')

    def _named(self) -> list["_Html"]:
        return [self._name(number) for number in range(len(self.runs))]


class _Html(str):
    """Text that is HTML already."""


def _facts(run: Gathered) -> dict[str, str]:
    """What the summary says of a run; empty texts for what is unknown."""
    about, state, epochs = run.environment, run.run, run.of_kind("epoch")
    train, data = run.tree.get("train") or {}, run.tree.get("data") or {}
    packages = about.get("packages") if isinstance(about.get("packages"), dict) else {}
    versions = [f"python {about.get('python')}"] + [
        f"{name} {packages[name]}" for name in ("torch", "deepspeed") if packages.get(name)
    ]
    gpus = about.get("gpus") if isinstance(about.get("gpus"), list) else []
    kinds = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(map(str, gpus)))
    command = about.get("command")
    is_command = isinstance(command, list) and len(command) > 1 and all(isinstance(word, str) for word in command)
    accuracy = ""
    if state.last_top1 is not None and state.best_top1 is not None:
        accuracy = f"{state.measure}, top-1 on held-out images: last {state.last_top1:.1%}, best {state.best_top1:.1%}"
    waits = [row["data_wait_fraction"] for row in epochs if is_number(row.get("data_wait_fraction"))]
    memory = [row["memory_bytes"] for row in epochs if is_number(row.get("memory_bytes"))]
    return {
        "state": f"{state.state}, {state.num_epochs_done} of {state.num_epochs} epochs",
        "accuracy": accuracy,
        "loss": state.loss,
        "backbone": state.backbone,
        "data": _shown(data.get("train")) if data.get("train") else "",
        "batch": f"{_shown(data.get('global_batch_size'))} images, {_shown(train.get('precision', 'fp32'))}",
        "hardware": ", ".join(
            filter(None, [kinds, f"{about['cpu']} ({about.get('num_cpus')} cores)" if about.get("cpu") else ""])
        ),
        "processes": _shown(about["world_size"]) if "world_size" in about else "",
        "time": _time(run),
        "images/s": f"{run.speed[1] / run.speed[0]:,.0f} over all epochs" if run.speed else "",
        "data wait": f"{fmean(waits):.1%} of the time, mean of the epochs" if waits else "",
        "memory": f"{max(memory) / 2**30:.2f} GiB, {'of the GPU' if kinds else 'of the process'}" if memory else "",
        "versions": ", ".join(versions) if about.get("python") else "",
        "commit": _shown(about.get("commit"))[:50] if about.get("commit") else "",
        "command": command_line(command[1:]) if is_command else "",
        "started": _shown(about.get("time_utc")) if about.get("time_utc") else "",
        "last change": state.changed_utc,
    }


def _time(run: Gathered) -> str:
    parts = [f"{_duration(run.speed[0])} in epochs"] if run.speed else []
    if run.run.time_s is not None:
        parts.append(f"{_duration(run.run.time_s)} from the start to the last row")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else _ABSENT


def _confused_classes(found: Pictures) -> str:
    """The pairs of classes that are most often taken for each other, in words."""
    assert found.mistakes
    pairs: dict[tuple[int, int], int] = {}
    for i in found.mistakes.worst:
        pair = (int(found.labels[i]), int(found.mistakes.predicted[i]))
        pairs[pair] = pairs.get(pair, 0) + 1
    most = sorted(pairs.items(), key=lambda item: -item[1])[:5]
    name = found.album.class_name
    words = ", ".join(f"{_text(name(true))} for {_text(name(taken))} ({num})" for (true, taken), num in most)
    return f"Most often it takes {words}." if words else ""


def _defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, of the run's own loss and optimizer where they are known."""
    names = {
        section: {"name": tree[section]["name"]}
        for section in ("loss", "optim")
        if isinstance(tree.get(section), Mapping) and "name" in tree[section]
    }
    try:
        return dict(flatten(to_dict(build_config(names))))
    except ConfigError:
        return dict(flatten(to_dict(build_config({}))))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>{''.join(f'<td>{_text(cell) or _ABSENT}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(value: Any) -> str:
    """A value of a configuration or of JSON."""
    return printable(value if isinstance(value, str) else json.dumps(value, default=str), _MAX_CHARS)


def _text(text: object) -> str:
    """Text as HTML; what is HTML already stays as it is."""
    return text if isinstance(text, _Html) else html.escape(printable(text))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

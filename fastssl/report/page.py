"""The page: HTML from what was gathered; every text from a run's files is escaped here."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from itertools import count
from string import Template
from typing import Any

from fastssl import __version__
from fastssl.evaluation.results import SHOWN, table_row
from fastssl.report import figures as draw
from fastssl.report.figures import Figure, colour, is_number
from fastssl.report.gather import Gathered
from fastssl.report.pictures import NUM_MISTAKES, NUM_NEIGHBOURS, NUM_QUERIES, Pictures
from fastssl.report.tables import Html, differences, facts, table, text
from fastssl.report.thumbnails import Sheet, draw_filters, draw_sheet, smaller

_MAX_SHOWN = 12  # rows of a list


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
        tables = self._summary(), self._configuration()
        if len(self.runs) == 1:
            tables = ('<div class="columns">', *(f"<section>{table}</section>" for table in tables), "</div>")
        sections = [*tables, self._evaluations()]
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
        legend = f'<p class="legend">{"".join(f"<span>{name}</span>" for name in self._named())}</p>' * (
            len(self.runs) > 1
        )
        now = datetime.now(UTC)
        about = f"Made by fastssl {__version__} on {now:%Y-%m-%d %H:%M} UTC. Drag over a plot to zoom, double-click to "
        return f'<p class="faint">{about}see it whole.</p><nav>{links}</nav>{legend}{"".join(sections)}'

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
        return self._section("Summary", table(["", *self._named()], facts(self.runs)))

    def _configuration(self) -> str:
        headings = ["key", "default", "this run"] if len(self.runs) == 1 else ["key", *self._named()]
        rows = differences(self.runs)
        note = "from the defaults" if len(self.runs) == 1 else "between the runs"
        content = f'<p class="faint">What differs {note}.</p>{table(headings, rows)}'
        return self._section("Configuration", content if rows else f"<p>Nothing differs {note}.</p>")

    def _evaluations(self) -> str:
        rows = []
        for number, run in enumerate(self.runs):
            for line in run.evaluations:
                try:
                    found = table_row(line)  # pyright: ignore[reportArgumentType] a line of another form raises
                except (TypeError, ValueError, KeyError, AttributeError):
                    continue
                rows.append([self._name(number), *(found[name] for name in SHOWN)])
        return self._section("Evaluation", table([Html("run"), *SHOWN.values()], rows) if rows else "")

    def _plots(self, found: Sequence[Figure], kind: str = "") -> str:
        return f'<div class="plots {kind}">{"".join(map(self._plot, found))}</div>' if found else ""

    def _plot(self, figure: Figure) -> str:
        name = f"plot{next(self._numbers)}"
        entry: dict[str, Any] = {"id": name, "data": figure.data, "layout": figure.layout}
        if figure.sheet is not None:
            sheet = next(sheet for number, sheet in self._sheets.values() if number == figure.sheet)
            entry["sheet"] = {"number": figure.sheet, "columns": sheet.num_columns, "rows": sheet.num_rows}
        self.figures.append(entry)
        note = f"<span>{text(figure.note)}</span>" if figure.note else ""
        tall = " tall" if figure.is_tall else ""
        return (
            f"<figure><figcaption>{text(figure.title)}{note}</figcaption>"
            f'<div class="plot{tall}" id="{name}"></div></figure>'
        )

    def _features(self) -> str:
        lines = "".join(
            f"<p>{self._name(number)}: no pictures of the encoder: {text(reason)}</p>"
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
                    f"{text(found.album.reader.path)}, {held_out}; {found.features.shape[1]:,} features, of which the "
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
                cells.append(self._cell(found, i, true, f"taken for {taken}"))
            line = (
                f"Right by a vote of their neighbours among the images above: {mistakes.top1:.1%} of the labelled ones."
            )
            parts.append(
                f'<h3>{self._name(number)}</h3><p class="faint">{line} {_confused_classes(found)}</p>'
                f'<div class="grid mistakes">{"".join(cells)}</div>'
            )
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
            for row in run.nonfinite[:_MAX_SHOWN]:
                ids = row["sample_ids"] if isinstance(row["sample_ids"], list) else []
                some = ", ".join(map(str, ids[:8])) + (" …" if len(ids) > 8 else "")
                lines.append(f"Step {row['step']} was skipped (loss {row.get('loss')}), with {len(ids)} images: {some}")
            if len(run.nonfinite) > _MAX_SHOWN:
                lines.append(f"{len(run.nonfinite):,} steps were skipped; nonfinite.jsonl has all.")
            content = "".join(f"<p>{text(line)}</p>" for line in lines) or "<p>None.</p>"
            parts.append(f"<h3>{self._name(number)}</h3>{content}")
        return self._section("Bad samples", "".join(parts))

    def _hessian(self) -> str:
        figure = draw.draw_hessian(self.runs)
        return self._section("Hessian spectrum", self._plots([figure], "maps") if figure else "")

    def _cell(self, found: Pictures, position: int, first: str, second: str = "", kind: str = "") -> str:
        """A thumbnail with two lines under it, the first of which has a class of CSS."""
        number, sheet = self._sheet(found)
        words = text(f"{first} {second}, image {found.album.ids[position]}")
        return (
            f'<div title="{words}"><span class="thumb pixels sheet{number}" role="img" aria-label="{words}" '
            f'style="{sheet.style(int(position))}"></span><div class="{kind}">{text(first)}</div>'
            f"<div>{text(second)}</div></div>"
        )

    def _sheet(self, found: Pictures) -> tuple[int, Sheet]:
        """The sheet of a run's thumbnails, which runs with the same images share, and its number."""
        key = (found.album.reader.path, str(found.album.reader.identity), found.album.ids.tobytes())
        if key not in self._sheets:
            self._sheets[key] = (len(self._sheets), draw_sheet(found.thumbnails))
        return self._sheets[key]

    def _name(self, number: int) -> Html:
        name = text(self.runs[number].name)
        return Html(f'<span class="key" style="background:{colour(number)}"></span>{name}')

    def _named(self) -> list[Html]:
        return [self._name(number) for number in range(len(self.runs))]


def _confused_classes(found: Pictures) -> str:
    """The pairs of classes that are most often taken for each other, in words."""
    assert found.mistakes
    pairs: dict[tuple[int, int], int] = {}
    for i in found.mistakes.worst:
        pair = (int(found.labels[i]), int(found.mistakes.predicted[i]))
        pairs[pair] = pairs.get(pair, 0) + 1
    most = sorted(pairs.items(), key=lambda item: -item[1])[:5]
    name = found.album.class_name
    words = ", ".join(f"{text(name(true))} for {text(name(taken))} ({num})" for (true, taken), num in most)
    return f"Taken most often: {words}." if words else ""


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

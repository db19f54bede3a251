"""The report: one page that a radiologist or a data curator opens from disk, without a server or a network.

What it tells comes from `dossier` and `appendix`, how it looks from ``assets/report/`` (a Jinja2 template, plain CSS
and JavaScript), what slices look like from `pictures`. Everything is in ``report/index.html``; pictures and rows of the
tensor lie in ``report/assets/`` where they would make the page larger than ``report.inline_megabytes``. A browser that
reads a page from disk can't fetch files, so the rows are scripts that hand over their bytes.
"""

import json
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any, ClassVar

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from ray_tracin.appendix import about_model, about_run
from ray_tracin.claims import driving
from ray_tracin.dossier import (
    Json,
    Query,
    chosen_queries,
    dossier,
    influence_rows,
    packed,
    shown_slices,
    slice_pictures,
)
from ray_tracin.runs import Run, open_run
from ray_tracin.stages import Result, Stage
from ray_tracin.store import IncompleteRunError

FOLDER = "report"
PAGE = f"{FOLDER}/index.html"
ASSETS = "assets"
STYLES = ("base.css", "viewer.css", "pages.css", "narrow.css")
SCRIPTS = ("data.js", "dom.js", "viewer.js", "explain.js", "links.js", "curate.js", "charts.js", "model.js", "run.js")
START = "main.js"
"""Comes last: it runs the others."""
BASE64 = 4 / 3
"""Characters a byte."""


@dataclass(frozen=True)
class RenderReport(Stage[str]):
    """Write ``report/index.html``, and what it loads."""

    name: ClassVar[str] = "report"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """One key, where there is something to explain."""
        return ["index"] if self.run.query_sets else []

    def open(self) -> Callable[[str], Result]:
        """Render, after removing what an earlier report left."""

        def render(_: str) -> Result:
            store = self.run.store
            queries = chosen_queries(self.run, self.run.config.report)  # A wrong name must not cost the old report.
            store.objects.delete(store.objects.sizes(FOLDER))
            size = 0
            for path, data in report_files(self.run, queries):
                store.write_bytes(f"{FOLDER}/{path}", data)
                size += len(data)
            return {"options": _options(self.run), "bytes": size}

        return render


def read_queries(text: str, uri: str) -> str | int | list[str]:
    """What ``report.queries`` is in the words of a command: ``all``, a number, or names with commas between them.

    A patient or case of the run that has this very name comes first, once slices are cut: it may be a number, or hold
    a comma. So does ``patient:index``. What isn't written as numbers are, such as 007, is a name.
    """
    if text == "all":
        return text
    if {text, text.rpartition(":")[0]} & _names(uri):
        return [text]
    is_number = text.isdecimal() and str(int(text)) == text
    return int(text) if is_number else [name.strip() for name in text.split(",")]


def _names(uri: str) -> set[str]:
    """The patients and cases of a run."""
    try:
        table = open_run(uri).slices
    except (IncompleteRunError, OSError, ValueError):
        return set()  # There is no run yet, or none that goes on; or the slices are yet to be cut.
    return {*table["patient"], *table["case"]}


def refuse_wrong_queries(run: Run) -> None:
    """Nothing, if a report with the options that the run has now could be rendered, as far as its slices are cut.

    Raises:
        UsageError: the options name a patient or slice that is no query.
    """
    try:
        known = bool(run.query_sets)
    except (IncompleteRunError, OSError, ValueError):
        return  # The slices are yet to be cut, or their table is damaged, and will be made again.
    if known:
        chosen_queries(run, run.config.report)


def discard_other_report(run: Run) -> None:
    """Make the report undone if it was rendered with other options than the run has now.

    Raises:
        ClaimHeldError: the run is being computed; the report stays.
    """
    receipt = run.store.read_receipt(RenderReport.name, "index")
    if receipt is not None and receipt.result.get("options") != _options(run):
        with driving(run.store.objects):
            run.store.objects.delete([receipt.path, *(file.path for file in receipt.files)])


def _options(run: Run) -> Json:
    return run.config.report.model_dump(mode="json")


def report_files(run: Run, queries: Sequence[Query]) -> Iterator[tuple[str, bytes]]:
    """The files of the report, path in its folder and bytes; the page comes last."""
    settings = run.config.report
    rows = shown_slices(run, queries) if settings.images else []
    inline = _inline_size(run, queries, rows) <= settings.inline_megabytes * 1e6
    pictures: Json = {}
    influence: Json = {}
    beside = {"files": 0, "bytes": 0}
    if inline:
        for row, image, maps in slice_pictures(run, rows):
            pictures[str(row)] = {"image": b64encode(image).decode(), "maps": b64encode(maps).decode()}
        influence = {str(query.slice): packed(influence_rows(run, query), "float32") for query in queries}
    else:
        for path, content in _files_beside(run, queries, rows):
            beside = {"files": beside["files"] + 1, "bytes": beside["bytes"] + len(content)}
            yield f"{ASSETS}/{path}", content
    about = {"inline": inline, "beside": beside, "rendered": _today()}
    data = {**dossier(run, settings, queries), "model": about_model(run), "run": about_run(run), **about}
    yield "index.html", render_page(data, pictures, influence).encode()


def _files_beside(run: Run, queries: Sequence[Query], rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Pictures, and rows of the tensor as scripts."""
    for row, image, maps in slice_pictures(run, rows):
        yield f"slice_{row:06d}.webp", image
        yield f"maps_{row:06d}.webp", maps
    for query in queries:
        values = packed(influence_rows(run, query), "float32")
        yield f"influence_{query.slice:06d}.js", f"receiveInfluence({query.slice}, {json.dumps(values)});\n".encode()


def _today() -> str:
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M UTC")


def _inline_size(run: Run, queries: Sequence[Query], rows: Sequence[int]) -> float:
    """Bytes that pictures and tensor rows would take in the page."""
    tensor = len(queries) * 4 * len(run.classes) ** 2 * len(run.train_slices)
    return BASE64 * (tensor + sum(len(image) + len(maps) for _, image, maps in slice_pictures(run, rows)))


def render_page(data: Json, pictures: Json, influence: Json) -> str:
    """The page as HTML; everything that comes from data is escaped, by Jinja2 or as JSON in a script element."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("index.html.j2"))
    styles, scripts = ([Markup(_asset(name)) for name in names] for names in (STYLES, (*SCRIPTS, START)))
    documents = {"data": _json(data), "pictures": _json(pictures), "influence": _json(influence)}
    return template.render(
        title="Which training data explain this prediction?",
        styles=styles,
        scripts=scripts,
        **documents,
        size=sum(len(part.encode()) for part in (*styles, *scripts, *documents.values())),
        synthetic=data["synthetic"],
        images=data["images"],
    )


def _json(values: Any) -> Markup:
    """JSON that can stand in a script element: no ``<``, ``>`` or ``&`` is left, and NaN is an error."""
    return htmlsafe_json_dumps(values, dumps=json.dumps, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def _asset(name: str) -> str:
    return (resources.files("ray_tracin") / "assets" / "report" / name).read_text(encoding="utf-8")

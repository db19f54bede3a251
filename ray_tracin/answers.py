"""What commands answer with: tables of status, rankings and agreement, a scan's explanation in lines or a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ray_tracin.charts import findings, fixed
from ray_tracin.explanation import RegionExplanation
from ray_tracin.figures import DrawFigures
from ray_tracin.pipeline import StageStatus
from ray_tracin.querying import ScanExplanation
from ray_tracin.report import PAGE, RenderReport
from ray_tracin.runs import Run
from ray_tracin.store import RunStore

SHOWN = 3
"""Proponents and opponents of a region that its lines name."""
SHOWN_FEATURES = 3
"""Predictive features that a line of an explanation names."""
TITLES = {"proponent": "Proponents", "neutral": "Neutral regions", "opponent": "Opponents"}


def status_table(lines: Sequence[StageStatus]) -> Table:
    """Where every stage stands and what it cost, a line each, and all together."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("stage", "done", "of", "per min", "left, s", "again", "worker, s", "GiB", "freed"):
        table.add_column(column, no_wrap=True)
    for line in lines:
        cost, left = line.cost, line.seconds_left
        table.add_row(
            line.stage,
            str(line.done),
            "?" if line.total is None else str(line.total),
            f"{cost.keys_a_minute:.1f}" if cost.keys_a_minute else "",
            f"{left:.0f}" if left else "",
            str(cost.retries or ""),
            f"{cost.worker_seconds:.1f}",
            f"{cost.peak_memory / 2**30:.2f}" if cost.peak_memory else "",
            str(line.released or ""),
        )
    seconds = sum(line.cost.worker_seconds for line in lines)
    retries = sum(line.cost.retries for line in lines)
    table.add_row("in all", "", "", "", "", str(retries or ""), f"{seconds:.1f}", "", "", style="bold")
    return table


def ranking_table(found: RegionExplanation, name: str) -> Table:
    """The proponents, neutral regions or opponents of an explanation."""
    title = f"{TITLES[name]}, by {found.ranked_by} influence"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in ("rank", "influence", "cosine", "patient", "slice", "class", "overlap", "features"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("rank", "influence", "class"))
    for line in found.rankings[name].to_dict("records"):
        features = ", ".join(f"{feature} ({value:.2f})" for feature, value in found.links(line, SHOWN_FEATURES))
        where = (line["patient"], line["index"], line["class_name"], fixed(line["overlap"]))
        rank = f"{line['rank']}{'*' if line['is_global'] else ''}"
        values = (rank, f"{line['influence']:.4g}", fixed(line["cosine"], 3), *where, features)
        table.add_row(*(escape(str(value)) for value in values))
    return table


def agreement_table(agreement: pd.DataFrame, classes: Sequence[str]) -> Table:
    """What an index is worth: a line a query set and class."""
    title = "Agreement of the index with the exact tensor"
    table = Table("queries", "class", "regions", "Spearman", "lowest", "top 10", "top 20", title=title)
    for line in agreement.to_dict("records"):
        shares = (f"{line[name]:.3f}" for name in ("spearman", "spearman_worst", "top_10", "top_20"))
        table.add_row(line["query_set"], escape(classes[line["query_class"] - 1]), str(line["rows"]), *shares)
    return table


def result_lines(run: Run, seconds: float) -> Iterator[str]:
    """Where the result is, and the few numbers that say whether it is worth a look."""
    yield f"done in {seconds:.0f} s: {run.uri}"
    skipped = len(run.table("skipped"))
    if skipped:
        yield f"{skipped} cases were skipped; why is in {run.uri}/skipped.parquet"
    doubtful = run.slices.loc[run.slices["warnings"] != "", "case"].nunique()
    if doubtful:
        yield f"{doubtful} cases were read with warnings; column `warnings` of slices.parquet"
    train = run.slices[run.slices["split"] == "train"]
    for class_id, name in enumerate(run.classes, start=1):
        if not train[f"pixels_{class_id}"].any():
            yield f"{name}: no pixel of any training slice is of this class, so it can't be learned"
    try:
        last = run.table("checkpoints").iloc[-1]
    except (ValueError, IndexError):
        return
    dice = ", ".join(f"{name} {last[f'dice_validation_{c}']:.2f}" for c, name in enumerate(run.classes, start=1))
    yield f"validation Dice after epoch {int(last['epoch'])}: {dice}"
    if run.store.read_receipt(DrawFigures.name, "figure_5") is not None:
        yield from findings(run)
    if run.store.read_receipt(RenderReport.name, "index") is not None:
        yield f"the report, for a browser: {run.uri}/{PAGE}"


def region_lines(found: RegionExplanation, *, keep_global: bool) -> Iterator[str]:
    """What is explained, and what a reader must know before believing the tables."""
    truth = f"overlap {fixed(found.overlap)}, region Dice {fixed(found.dice)}" if found.labelled else "no ground truth"
    where = f"{found.patient}, slice {found.index}, {found.class_name}"
    yield f"{where}: {found.pixels} pixels, {truth} ({found.query_set} set)"
    yield from (f"warning: {warning}" for warning in found.warnings)
    if found.global_explainers and not keep_global:
        yield f"{found.global_explainers} global explainers of this class are left out (--keep-global)"


def scan_lines(found: ScanExplanation) -> Iterator[str]:
    """Notes, and a few lines a region, with its first proponents and opponents."""
    yield from (f"note: {note}" for note in found.notes)
    for line in found.regions.to_dict("records"):
        what = f"{line['case']}, slice {line['index']}, {line['class_name']}"
        truth = f"region Dice {fixed(line['dice'])}" if line["labelled"] else "no ground truth"
        yield f"{what}: {line['pixels']} pixels, {truth}"
        region = ["case", "index", "class_id"]
        mine = (found.ranking[region] == [line[name] for name in region]).all(axis=1)
        for side, ranking in found.ranking[mine].groupby("side", sort=False):
            yield f"  {side}s: {'; '.join(_named(ranking.head(SHOWN)))}"


def _named(ranking: pd.DataFrame) -> Iterator[str]:
    for line in ranking.to_dict("records"):
        score = line["cosine" if line["ranked_by"] == "cosine" else "influence"]
        mark = " (global explainer)" if line["is_global"] else ""
        yield f"{score:+.3g} {line['patient']}, slice {line['train_index']}, {line['train_class']}{mark}"


def write_ranking(ranking: pd.DataFrame, path: Path) -> None:
    """The whole ranking as a file: Parquet, or CSV where the name says so."""
    if path.suffix == ".csv":
        ranking.to_csv(path, index=False)
    else:
        RunStore(path.parent).write_table(path.name, ranking, recorded=False)

"""What the commands `sketches` and `query` say: what an index is worth, a scan's explanation in lines or a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from rich.markup import escape
from rich.table import Table

from ray_tracin.querying import ScanExplanation
from ray_tracin.store import RunStore

SHOWN = 3
"""Proponents and opponents of a region that its lines name."""


def agreement_table(agreement: pd.DataFrame, classes: Sequence[str]) -> Table:
    """What an index is worth: a line a query set and class."""
    title = "Agreement of the index with the exact tensor"
    table = Table("queries", "class", "regions", "Spearman", "lowest", "top 10", "top 20", title=title)
    for line in agreement.to_dict("records"):
        shares = (f"{line[name]:.3f}" for name in ("spearman", "spearman_worst", "top_10", "top_20"))
        table.add_row(line["query_set"], escape(classes[line["query_class"] - 1]), str(line["rows"]), *shares)
    return table


def scan_lines(found: ScanExplanation) -> Iterator[str]:
    """A few lines a region, with its first proponents and opponents."""
    for line in found.regions.to_dict("records"):
        what = f"{line['case']}, slice {line['index']}, {line['class_name']}"
        yield f"{what}: {line['pixels']} pixels, region Dice {line['dice']:.2f}"
        region = ["case", "index", "class_id"]
        mine = (found.ranking[region] == [line[name] for name in region]).all(axis=1)
        shown = found.ranking[mine & (found.ranking["rank"] <= SHOWN)]
        for side, ranking in shown.groupby("side", sort=False):
            yield f"  {side}s: {'; '.join(_named(ranking))}"


def _named(ranking: pd.DataFrame) -> Iterator[str]:
    return (
        f"{line.influence:+.3g} {line.patient}, slice {line.train_index}, {line.train_class}"
        for line in ranking.itertuples()
    )


def write_ranking(ranking: pd.DataFrame, path: Path) -> None:
    """The whole ranking as a file: Parquet, or CSV where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        ranking.to_csv(path, index=False)
    else:
        RunStore(path.parent).write_table(path.name, ranking, recorded=False)

"""What a report tells: everything that is read from a run for it, as plain values that JSON can carry.

The one idea: the page does its own ranking. It gets the rows of the tensor that belong to its queries, norms, global
explainers and feature maxima, as bytes of exact numbers, so that every filter shows what the tables would say, and no
list is cut off by one that was written before. Arrays are base64 of little-endian values, NaN included.

`report` renders it; `pictures` makes the slices that it shows.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ray_tracin import store as paths
from ray_tracin.charts import class_colours
from ray_tracin.config import ReportConfig
from ray_tracin.curation import review_regions
from ray_tracin.explaining import cells_of, global_columns
from ray_tracin.explanation import LOW_OVERLAP
from ray_tracin.featuring import MAXIMA, predictive_features
from ray_tracin.pictures import MAP_SIZE, DrawSlices, mapped_features, part_path
from ray_tracin.runs import Run
from ray_tracin.scores import region_norms
from ray_tracin.store import Array
from ray_tracin.vocabulary import QuerySet, UsageError

Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """A slice that the report explains."""

    slice: int
    query_set: QuerySet
    position: int
    """Among the slices of its query set."""


def chosen_queries(run: Run, settings: ReportConfig) -> list[Query]:
    """The slices that a report explains, ascending.

    Raises:
        UsageError: a name in ``report.queries`` is none of the run's patients, or not one of their slices.
    """
    sets = {name: list(run.query_slices(name)) for name in run.query_sets}
    usual = sets[run.query_sets[-1]]
    if isinstance(settings.queries, tuple):
        wanted = {row for name in settings.queries for row in _named(run, name)}
    elif isinstance(settings.queries, int):
        places = np.linspace(0, len(usual) - 1, min(settings.queries, len(usual)))
        wanted = {usual[place] for place in np.rint(places).astype(int)}
    else:
        wanted = set(usual)
    found = [Query(row, name, place) for name, rows in sets.items() for place, row in enumerate(rows) if row in wanted]
    return sorted(found, key=lambda query: query.slice)


def _named(run: Run, name: str) -> list[int]:
    """The rows of a patient, of a case, or of ``patient:index``."""
    queries = {row for query_set in run.query_sets for row in run.query_slices(query_set)}
    table = run.slices[run.slices["slice"].isin(queries)]
    patient, colon, index = name.rpartition(":")
    patients = sorted(set(table["patient"]))
    there = f"there are {len(patients)} patients, such as {', '.join(patients[:5])}"
    for who, where in ((name, ""), (patient, index) if colon else (name, "")):
        mine = table[(table["patient"] == who) | (table["case"] == who)]
        chosen = mine[mine["index"].astype(str) == where] if where else mine
        if len(chosen):
            return [int(row) for row in chosen["slice"]]
        if len(mine):
            there = f"of {who} there are slices {', '.join(map(str, sorted(set(mine['index']))))}"
    raise UsageError(
        f"report.queries names {name!r}, which is no query of this run: expected `all`, a number, or a list of patient "
        f"or patient:index; {there}"
    )


def shown_slices(run: Run, queries: Sequence[Query]) -> list[int]:
    """The rows of ``slices.zarr`` that a report can show: what is explained, and every train slice."""
    return sorted({query.slice for query in queries} | set(run.train_slices))


def packed(values: Any, dtype: str) -> Json:
    """An array as JSON: its dtype, shape and little-endian bytes in base64."""
    array = np.ascontiguousarray(np.asarray(values).astype(np.dtype(dtype).newbyteorder("<")))
    return {"dtype": dtype, "shape": list(array.shape), "data": b64encode(array.tobytes()).decode()}


def influence_rows(run: Run, query: Query) -> Array:
    """The influence of every train column on the regions of a slice: float32 (query_class, train), NaN where absent."""
    selection = (slice(0, len(run.classes)), slice(query.position, query.position + 1))
    rows: Array = run.store.read(f"{paths.INFLUENCE}/{query.query_set}", selection)[:, 0]
    return rows


def slice_pictures(run: Run, rows: Sequence[int]) -> Iterator[tuple[int, bytes, bytes]]:
    """Of each slice its row, its image and its feature maps, as WebP."""
    wanted = set(rows)
    for key in DrawSlices(run).keys():  # noqa: SIM118
        if wanted & set(range(key.start, key.stop)):
            part = run.store.read_table(part_path(key), ["slice", "image", "maps"])
            for line in part[part["slice"].isin(wanted)].to_dict("records"):
                yield int(line["slice"]), line["image"], line["maps"]


def drawn(run: Run) -> pd.DataFrame:
    """What `DrawSlices` kept of every slice but the pictures, by slice."""
    columns = ["slice", "prediction", "truth", "predicted", "agreed", "annotated"]
    parts = [run.store.read_table(part_path(key), columns) for key in DrawSlices(run).keys()]  # noqa: SIM118
    return pd.concat(parts).set_index("slice")


def dossier(run: Run, settings: ReportConfig, queries: Sequence[Query]) -> Json:
    """Everything that the page shows but the pictures and the rows of the tensor."""
    rows = shown_slices(run, queries)
    parts = drawn(run)
    return {
        "classes": [
            {"name": name, "colour": colour}
            for name, colour in zip(run.classes, class_colours(len(run.classes)), strict=True)
        ],
        "modalities": list(run.modalities),
        "size": run.config.data.size,
        "synthetic": is_synthetic(run),
        "topK": settings.top_k,
        "images": settings.images,
        "score": run.config.explainers.score,
        "wholeSlices": run.config.gradients.score == "image",
        "maxShare": run.config.explainers.max_share,
        "threshold": run.config.regions.threshold,
        "lowOverlap": LOW_OVERLAP,
        "fingerprint": run.fingerprint,
        "slices": _slices(run, rows, parts, settings.images),
        "regions": _regions(run, rows),
        "train": _train(run, rows),
        "queries": _queries(run, queries, rows),
        "features": _features(run, rows),
        "review": _review(run, rows, parts),
    }


def is_synthetic(run: Run) -> bool:
    """Whether all patients are phantoms, which say so in their names."""
    return bool(run.slices["case"].str.contains("PHANTOM").all())


def _slices(run: Run, rows: Sequence[int], parts: pd.DataFrame, images: bool) -> Json:
    table = run.slices.set_index("slice").loc[list(rows)]
    mine = parts.loc[list(rows)]
    truth = table[[f"pixels_{class_id}" for class_id in range(1, len(run.classes) + 1)]].to_numpy()
    outlines = {name: [b64encode(runs).decode() for runs in mine[name]] for name in ("prediction", "truth")}
    return {
        "row": list(rows),
        "patient": table["patient"].tolist(),
        "case": table["case"].tolist(),
        "index": table["index"].tolist(),
        "split": table["split"].tolist(),
        "labelled": table["labelled"].astype(bool).tolist(),
        "warnings": table["warnings"].tolist(),
        "truth": packed(truth, "int32"),
        "predicted": packed(np.stack(mine["predicted"].tolist()), "int32"),
        "agreed": packed(np.stack(mine["agreed"].tolist()), "int32"),
        # An outline is an image of the patient too.
        "outlines": outlines if images else None,
    }


def _regions(run: Run, rows: Sequence[int]) -> Json:
    table = run.table("regions").set_index("slice").loc[list(rows)].sort_values(["slice", "class"])
    shape = (len(rows), len(run.classes))
    kinds = {"pixels": "int32", "overlap": "float64", "dice": "float64"}
    return {name: packed(table[name].to_numpy().reshape(shape), dtype) for name, dtype in kinds.items()}


def _train(run: Run, rows: Sequence[int]) -> Json:
    """What stands behind the columns of the tensor."""
    place = {row: position for position, row in enumerate(rows)}
    norms = region_norms(run, "train").numpy() if "train" in run.query_sets else None
    is_global, table = global_columns(run), run.store.read_table(paths.GLOBAL_EXPLAINERS)
    shares = np.full(is_global.shape, np.nan, dtype=np.float32)
    shares[cells_of(run, table)] = table[["share_proponent", "share_opponent"]].max(axis=1)
    return {
        "slices": [place[row] for row in run.train_slices],
        "norm": None if norms is None else packed(norms.ravel(), "float64"),
        "global": packed(is_global, "uint8"),
        "share": packed(shares, "float32"),
    }


def _queries(run: Run, queries: Sequence[Query], rows: Sequence[int]) -> list[Json]:
    place = {row: position for position, row in enumerate(rows)}
    norms = {name: region_norms(run, name).numpy() for name in run.query_sets}
    found = []
    for query in queries:
        norm = packed(norms[query.query_set][:, query.position], "float64")
        found.append({"slice": place[query.slice], "set": query.query_set, "norm": norm})
    return found


def _features(run: Run, rows: Sequence[int]) -> Json:
    maxima = run.store.read(MAXIMA)[list(rows)]
    return {
        "maxima": packed(maxima, "float32"),
        "mapped": mapped_features(run),
        "mapSize": min(MAP_SIZE, run.config.data.size),
        "predictive": [sorted(predictive_features(run, class_id)) for class_id in range(1, len(run.classes) + 1)],
        "known": "test" in run.query_sets,
        "threshold": run.config.features.importance,
    }


def _review(run: Run, rows: Sequence[int], parts: pd.DataFrame) -> Json:
    place = {row: position for position, row in enumerate(rows)}
    train = list(run.train_slices)
    regions = run.table("regions")
    table = review_regions(
        regions[regions["slice"].isin(train)],
        run.table("self_influence") if "train" in run.query_sets else None,
        _annotated(run, parts.loc[train]),
        run.classes,
    )
    kinds = {"class": "int32", "pixels": "int32", "truth": "int32"}
    kinds |= {"overlap": "float64", "loss": "float64", "self_influence": "float64", "percentile": "float64"}
    columns = {name: packed(table[name].to_numpy(), dtype) for name, dtype in kinds.items()}
    return {"slice": [place[row] for row in table["slice"]], **columns, "signs": table["signs"].tolist()}


def _annotated(run: Run, parts: pd.DataFrame) -> pd.DataFrame:
    """By (slice, class): annotated pixels, and what the region's pixels are annotated as."""
    classes = len(run.classes)
    counts = np.stack(parts["annotated"].tolist()).reshape(-1, classes + 1)
    index = pd.MultiIndex.from_product([parts.index, range(1, classes + 1)], names=["slice", "class"])
    found = pd.DataFrame(counts, index=index, columns=[f"as_{label}" for label in range(classes + 1)])
    pixels = run.slices.set_index("slice").loc[parts.index, [f"pixels_{c}" for c in range(1, classes + 1)]]
    return found.assign(truth=pixels.to_numpy().ravel())

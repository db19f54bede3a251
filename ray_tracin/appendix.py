"""The report's pages about the network and the run: how it was trained, what it cost, and the method in words.

As `dossier`, plain values that JSON can carry.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from ray_tracin import store as paths
from ray_tracin.charts import findings
from ray_tracin.costs import EVENTS_KEY
from ray_tracin.dossier import Json, packed
from ray_tracin.featuring import pooled
from ray_tracin.runs import RECORD, Run
from ray_tracin.scores import train_cells
from ray_tracin.stages import LAYOUT
from ray_tracin.store import Receipt
from ray_tracin.vocabulary import ranges

MATRIX_CELLS = 180
"""Side of the train-influence matrix in the page at the most; a cell stands for a block of pairs."""
CURVE_POINTS = 60
"""Points of an importance curve; each is the mean over a range of ranks."""


def about_model(run: Run) -> Json:
    """Training, the tensor in small, classes of proponents, and features."""
    known = "test" in run.query_sets
    return {
        "epochs": _epochs(run),
        "matrix": _matrix(run) if "train" in run.query_sets else None,
        "proponentClasses": _records(run.table("proponent_classes")),
        "classList": run.config.explainers.class_list,
        "trends": _records(pooled(run, "feature_trends")) if known else [],
        "curves": _curves(pooled(run, "feature_importance")) if known else [],
        "impact": _impact(run, "feature_impact"),
        "sets": _impact(run, "feature_set_impact"),
        "findings": findings(run),
    }


def _epochs(run: Run) -> list[Json]:
    table = run.table("checkpoints")
    classes = range(1, len(run.classes) + 1)
    return [
        {
            "epoch": int(line["epoch"]),
            "optimizer": line["optimizer"],
            "rate": float(line["learning_rate"]),
            "influence": bool(line["influence"]),
            "loss": _number(line["loss"]),
            "train": [_number(line[f"dice_train_{c}"]) for c in classes],
            "validation": [_number(line[f"dice_validation_{c}"]) for c in classes],
        }
        for line in table.to_dict("records")
    ]


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _records(table: pd.DataFrame) -> list[Json]:
    """The rows as plain values, NaN as None."""
    plain = table.astype(object).where(table.notna(), None)
    return [
        {str(name): value.item() if isinstance(value, np.generic) else value for name, value in line.items()}
        for line in plain.to_dict("records")
    ]


def _curves(importance: pd.DataFrame) -> list[Json]:
    """Importance against rank, as means over ranges of ranks."""
    found = []
    for _, curve in importance.groupby(["query_class", "feature"], sort=True):
        width = max(1, -(-int(curve["rank"].max()) // CURVE_POINTS))
        means = curve.groupby((curve["rank"] - 1) // width)[["rank", "importance"]].mean()
        line = {"class": int(curve["query_class"].iloc[0]), "feature": int(curve["feature"].iloc[0])}
        found.append({**line, "rank": means["rank"].tolist(), "importance": means["importance"].tolist()})
    return found


def _impact(run: Run, name: str) -> list[Json]:
    """A table of masking; none where no slice that is masked has ground truth."""
    try:
        return _records(run.table(name))
    except paths.IncompleteRunError:
        return []


def _matrix(run: Run) -> Json:
    cells = train_cells(run, MATRIX_CELLS)
    kinds = {"mean": "float32", "low": "float32", "high": "float32", "pairs": "int32"}
    return {
        "block": cells.block,
        "perClass": len(ranges(len(run.train_slices), cells.block)),
        **{name: packed(getattr(cells, name), dtype) for name, dtype in kinds.items()},
    }


def about_run(run: Run) -> Json:
    """Configuration, versions, choices, what was skipped, and what it cost."""
    table = run.slices
    doubtful = table[table["warnings"] != ""].drop_duplicates("case")
    return {
        "uri": run.uri,
        "config": run.config.to_yaml(),
        "versions": run.store.objects.get(paths.VERSIONS).decode(),
        "choices": choices(run),
        "splits": _splits(table),
        "skipped": _records(run.table("skipped")),
        "warnings": _records(doubtful[["case", "warnings"]]),
        "cost": [_cost(name, receipts) for name, receipts in _stages(run)],
    }


def _splits(slices: pd.DataFrame) -> list[Json]:
    groups = slices.groupby("split", sort=True)
    return [
        {"split": name, "patients": int(group["patient"].nunique()), "slices": len(group)} for name, group in groups
    ]


def _stages(run: Run) -> list[tuple[str, list[Receipt]]]:
    """The stages that have receipts, in the order in which they began; no pseudo-stages, and not the report itself."""
    names = {path.split("/")[1] for path in run.store.objects.sizes(paths.RECEIPTS) if path.count("/") > 1}
    names -= {LAYOUT, RECORD[0], EVENTS_KEY, "report"}
    found = [(name, list(run.store.receipts(name).values())) for name in names]
    return sorted(found, key=lambda stage: min((receipt.started for receipt in stage[1]), default=0.0))


def _cost(name: str, receipts: list[Receipt]) -> Json:
    return {
        "stage": name,
        "keys": len(receipts),
        "seconds": sum(receipt.seconds for receipt in receipts),
        "memory": max((receipt.peak_memory for receipt in receipts), default=0),
        "bytes": sum(file.size for receipt in receipts for file in receipt.files),
        "workers": len({receipt.worker for receipt in receipts}),
    }


def choices(run: Run) -> list[list[str]]:
    """What the method leaves open, and what this run does: pairs of a question and a sentence."""
    return [[question, answer(run)] for question, answer in _CHOICES.items()]


def _regions(run: Run) -> str:
    regions = run.config.regions
    whose = "the final network, for all checkpoints" if regions.source == "final" else "each checkpoint's own network"
    return f"pixels to which {whose} gives the class with a softmax above {regions.threshold}"


def _gradients(run: Run) -> str:
    gradients = run.config.gradients
    of = {"all": "all trainable parameters", "head": "the weight of the last layer alone"}
    named = gradients.parameters if isinstance(gradients.parameters, str) else ", ".join(gradients.parameters)
    score = "the Dice of the region (eq. 6)" if gradients.score == "region" else "the Dice of the whole slice (eq. 5)"
    return f"{score}, with respect to {of.get(named, named)}, stored as {gradients.dtype}"


def _checkpoints(run: Run) -> str:
    attributes = run.store.attributes(paths.INFLUENCE)
    pairs = zip(attributes["epochs"], attributes["learning_rates"], strict=True)
    return ", ".join(f"epoch {epoch} (learning rate {rate:g})" for epoch, rate in pairs)


def _ranking(run: Run) -> str:
    explainers = run.config.explainers
    score = "influence (eq. 6)" if explainers.score == "raw" else "cosine influence"
    return (
        f"by {score}; train regions among the first {explainers.list_length} of more than {explainers.max_share:.0%} "
        "of a class's lists are global explainers, and left out unless asked for"
    )


def _truth(run: Run) -> str:
    missing = int((~run.slices["labelled"].astype(bool)).sum())
    if not missing:
        return "every slice has it"
    return f"{missing} slices have none: the network's own prediction stands in for it there"


def _queries(run: Run) -> str:
    if "test" not in run.query_sets:
        return "the train slices explain themselves; there is no test query in this run"
    if run.config.split.test > 0:
        return "the test patients"
    who = {"validation": "the validation patients", "test": "the patients without ground truth"}
    there = [text for split, text in who.items() if split in set(run.slices["split"])]
    return f"{' and '.join(there)}, which the network was not trained on"


def _intensities(run: Run) -> str:
    data = run.config.data
    top = f"percentile {data.percentile:g} of the volume" if data.intensity == "percentile" else "maximum of the slab"
    return f"each modality from 0 to its {top}; pictures here are compressed (WebP) and not for measuring"


_CHOICES: dict[str, Callable[[Run], str]] = {
    "What is explained": _queries,
    "A region is": _regions,
    "What is differentiated": _gradients,
    "Checkpoints": _checkpoints,
    "How train regions are ranked": _ranking,
    "Ground truth": _truth,
    "Intensities": _intensities,
}

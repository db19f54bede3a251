"""Which train regions look as if their annotation were wrong, and why: signs for a person to check, not a verdict.

The one idea: a wrong annotation shows in one of two ways. Where the network follows it, nothing else supports the
region, and its self-influence is large; where the network doesn't, region and annotation disagree, in overlap or in
Dice. Two classes that were swapped show only in the second way (the gradient of eq. 6 vanishes there).

It doesn't know runs or files.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ray_tracin.explanation import LOW_OVERLAP

OUTLYING = 0.05
"""Share of a class's regions, the largest in self-influence or in loss, that are a sign."""
FEWEST_PIXELS = 10
"""An annotation of fewer pixels that the network doesn't find is no sign."""
MOSTLY = 0.5
"""A region that is annotated as another class to this share looks swapped."""


def review_regions(
    regions: pd.DataFrame, self_influence: pd.DataFrame | None, annotated: pd.DataFrame, classes: Sequence[str]
) -> pd.DataFrame:
    """The train regions that exist or are annotated, the most suspicious first.

    Args:
        regions: ``slice``, ``class``, ``pixels``, ``overlap``, ``dice``, ``labelled`` of train slices, one row a pair.
        self_influence: ``train_slice``, ``train_class``, ``self_influence``; None where it isn't computed.
        annotated: index (slice, class): ``truth`` pixels of the class on the slice, and ``as_0`` … ``as_C``, the
            region's pixels by what they are annotated as.
        classes: names of the classes.

    Returns:
        ``slice``, ``class``, ``pixels``, ``truth``, ``overlap``, ``loss`` (1 − region Dice; 1 where an annotated class
        has no region), ``self_influence``, ``percentile`` (of the self-influence in its class), ``signs`` (their
        sentences); those on which network and annotation disagree first, then by the number of signs and percentile.
    """
    table = regions[regions["labelled"].astype(bool)].merge(
        annotated, left_on=["slice", "class"], right_index=True, how="left", validate="one_to_one"
    )
    table = table[(table["pixels"] > 0) | (table["truth"] > 0)].reset_index(drop=True)
    table["loss"] = np.where(table["pixels"] > 0, 1 - table["dice"], 1.0)
    table = _with_self_influence(table, self_influence)
    table["percentile"] = table.groupby("class")["self_influence"].rank(pct=True)
    # Among those that can have the sign: others, whose loss is near 1, have signs of their own and would crowd it out.
    agreeing = table["loss"].where((table["pixels"] > 0) & (table["overlap"] >= LOW_OVERLAP))
    table["loss_percentile"] = agreeing.groupby(table["class"]).rank(pct=True)
    signs = [_signs(line, classes) for line in table.to_dict("records")]
    # Without a line pandas would make numbers of them.
    table["signs"] = pd.Series(signs, dtype=object)
    table["count"] = [len(found) for found in signs]
    # The other signs are of the largest few in any data set, however good.
    missed = (table["pixels"] == 0) & (table["truth"] >= FEWEST_PIXELS)
    table["disagrees"] = missed | ((table["pixels"] > 0) & (table["overlap"] < LOW_OVERLAP))
    order = ["disagrees", "count", "percentile", "loss"]
    return table.sort_values(order, ascending=False, kind="stable", na_position="last", ignore_index=True)


def _with_self_influence(table: pd.DataFrame, self_influence: pd.DataFrame | None) -> pd.DataFrame:
    if self_influence is None:
        return table.assign(self_influence=np.nan)
    renamed = self_influence.rename(columns={"train_slice": "slice", "train_class": "class"})
    return table.merge(renamed[["slice", "class", "self_influence"]], on=["slice", "class"], how="left")


def _signs(line: Mapping[Hashable, Any], classes: Sequence[str]) -> list[str]:
    name, pixels = classes[int(line["class"]) - 1], int(line["pixels"])
    found = []
    if pixels and line["overlap"] < LOW_OVERLAP:
        found.append(_disagreement(line, name, classes))
    if not pixels and line["truth"] >= FEWEST_PIXELS:
        found.append(f"{int(line['truth'])} pixels are annotated {name}; the network is confident of none")
    if line["percentile"] > 1 - OUTLYING:
        found.append(f"self-influence among the largest {OUTLYING:.0%} of {name}: little else supports it")
    if line["loss_percentile"] > 1 - OUTLYING:
        found.append(f"region Dice {line['dice']:.2f}, among the lowest {OUTLYING:.0%} of {name}")
    return found


def _disagreement(line: Mapping[Hashable, Any], name: str, classes: Sequence[str]) -> str:
    shares = np.asarray([line[f"as_{label}"] for label in range(len(classes) + 1)]) / line["pixels"]
    other = int(shares[1:].argmax()) + 1
    if shares[other] >= MOSTLY:
        return f"{shares[other]:.0%} of the region is annotated {classes[other - 1]}: are the two classes swapped?"
    return f"the network sees {name}; {line['overlap']:.0%} of what it sees is annotated so, {shares[0]:.0%} as nothing"

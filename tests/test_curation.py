"""Signs of wrong annotations: each kind of fault is found and named, and what is sound has none."""

import numpy as np
import pandas as pd
import pytest

from ray_tracin.curation import review_regions

CLASSES = ("NCR/NET", "ED", "ET")
SOUND = 40


def tables(**faults: dict[str, float]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Forty sound slices of one class (2), and one a fault after them."""
    generator = np.random.default_rng(0)
    count = SOUND + len(faults)
    regions = pd.DataFrame({"slice": range(count), "class": 2, "pixels": 100, "labelled": True})
    regions["dice"], regions["overlap"] = 0.9 + 0.05 * generator.random(count), 0.95
    annotated = pd.DataFrame({"truth": 100, "as_0": 5, "as_1": 0, "as_2": 95, "as_3": 0}, index=range(count))
    score = pd.DataFrame({"train_slice": range(count), "train_class": 2, "self_influence": generator.random(count)})
    for place, fault in enumerate(faults.values(), start=SOUND):
        for name, value in fault.items():
            table = next(table for table in (regions, annotated, score) if name in table)
            table.loc[place, name] = value
    annotated.index = pd.MultiIndex.from_product([range(count), [2]], names=["slice", "class"])
    return regions, score, annotated


SWAPPED = {"overlap": 0.02, "dice": 0.03, "as_0": 10, "as_1": 88, "as_2": 2}
INVENTED = {"overlap": 0.0, "dice": 0.0, "as_0": 100, "as_2": 0, "truth": 0}
MISSED = {"pixels": 0, "overlap": np.nan, "dice": np.nan, "truth": 134, "as_0": 0, "as_2": 0}
ALONE = {"self_influence": 50.0}


def signs(table: pd.DataFrame, row: int) -> list[str]:
    found = table[table.slice == row]
    assert len(found) == 1
    return list(found.iloc[0].signs)


def test_two_swapped_classes_are_named() -> None:
    regions, score, annotated = tables(swapped=SWAPPED)
    found = review_regions(regions, score, annotated, CLASSES)
    assert "88% of the region is annotated NCR/NET: are the two classes swapped?" in signs(found, SOUND)


def test_a_region_that_is_annotated_as_nothing() -> None:
    regions, score, annotated = tables(invented=INVENTED)
    text = "the network sees ED; 0% of what it sees is annotated so, 100% as nothing"
    assert text in signs(review_regions(regions, score, annotated, CLASSES), SOUND)


def test_an_annotation_that_the_network_does_not_find() -> None:
    regions, score, annotated = tables(missed=MISSED)
    score = score[score.train_slice != SOUND]
    found = review_regions(regions, score, annotated, CLASSES)
    assert "134 pixels are annotated ED; the network is confident of none" in signs(found, SOUND)
    assert found[found.slice == SOUND].iloc[0].loss == 1


def test_the_largest_self_influence_comes_first() -> None:
    regions, score, annotated = tables(alone=ALONE)
    found = review_regions(regions, score, annotated, CLASSES)
    assert signs(found, SOUND) == ["self-influence among the largest 5% of ED: little else supports it"]
    assert found.percentile[found.slice == SOUND].item() == 1
    counts = found.signs.str.len()
    assert counts.is_monotonic_decreasing
    quiet = found[counts == 0]
    assert len(quiet) >= 0.85 * SOUND
    assert quiet.percentile.is_monotonic_decreasing


def test_nothing_is_said_of_slices_without_ground_truth() -> None:
    regions, score, annotated = tables(swapped=SWAPPED)
    regions.loc[SOUND, "labelled"] = False
    assert SOUND not in set(review_regions(regions, score, annotated, CLASSES).slice)


@pytest.mark.parametrize(("labelled", "pixels"), [(False, 100), (True, 0)])
def test_where_nothing_is_labelled_or_there_nothing_is_to_review(labelled: bool, pixels: int) -> None:
    regions, score, annotated = tables()
    regions, annotated = regions.assign(labelled=labelled, pixels=pixels), annotated.assign(truth=pixels)
    found = review_regions(regions, score, annotated, CLASSES)
    assert found.signs.tolist() == []
    assert {"slice", "class", "loss", "percentile"} <= set(found)


def test_without_self_influence_the_other_signs_stay() -> None:
    regions, _, annotated = tables(swapped=SWAPPED)
    found = review_regions(regions, None, annotated, CLASSES)
    assert found.self_influence.isna().all()
    assert found.slice.iloc[0] == SOUND


TINY = {"pixels": 0, "overlap": np.nan, "dice": np.nan, "truth": 5, "as_0": 0, "as_1": 0}
APART = {"pixels": 50, "overlap": 0.0, "dice": 0.0, "truth": 50, "as_0": 50, "as_1": 0}


@pytest.mark.parametrize(
    ("others", "sign"), [([TINY] * 8, ""), ([APART] * 8, "0% of what it sees"), ([TINY, APART] * 4, "")]
)
def test_regions_without_a_sound_dice_do_not_crowd_out_the_largest_losses(
    others: list[dict[str, float]], sign: str
) -> None:
    eligible = 92
    sound = {"pixels": 50, "overlap": 0.9, "truth": 50, "as_0": 0, "as_1": 50}
    lines = [*(sound | {"dice": dice} for dice in np.linspace(0.9, 0.5, eligible)), *others]
    table = pd.DataFrame(lines).assign(**{"class": 1, "labelled": True, "slice": range(100)})
    annotated = table.set_index(["slice", "class"])[["truth", "as_0", "as_1"]]
    regions = table[["slice", "class", "pixels", "overlap", "dice", "labelled"]]
    found = review_regions(regions, None, annotated, ["ET"])
    low = found.signs.map(lambda texts: any("among the lowest 5% of ET" in text for text in texts))
    assert sorted(found.slice[low]) == list(range(eligible - 5, eligible)), "5 % of those that have a Dice"
    for texts in found.signs[found.slice >= eligible]:
        assert not sign or (len(texts) == 1 and sign in texts[0])

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from ray_tracin.figures import (
    MATRIX_PIXELS,
    PRINT_DPI,
    draw_influence_matrix,
    draw_modalities,
    render,
)
from ray_tracin.runs import Run
from ray_tracin.scores import train_cells


def whole_matrix(run: Run) -> np.ndarray:
    tensor = run.store.read("influence.zarr/train")
    return tensor.reshape(-1, tensor.shape[2])


def test_a_small_matrix_is_drawn_value_by_value(tiny_run: Run) -> None:
    np.testing.assert_array_equal(train_cells(tiny_run, 1800).mean, whole_matrix(tiny_run))


@pytest.mark.parametrize(("pixels", "block"), [(30, 2), (20, 3), (10, 6), (3, 20)])
def test_a_large_matrix_is_averaged_in_blocks_that_keep_to_their_class(tiny_run: Run, pixels: int, block: int) -> None:
    matrix, n = whole_matrix(tiny_run).astype(np.float64), len(tiny_run.train_slices)
    starts = [c * n + start for c in range(3) for start in range(0, n, block)]
    stops = [min(start + block, (start // n + 1) * n) for start in starts]
    expected = np.empty((len(starts), len(starts)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of blocks without a region
        for i, (top, bottom) in enumerate(zip(starts, stops, strict=True)):
            for j, (left, right) in enumerate(zip(starts, stops, strict=True)):
                expected[i, j] = np.nanmean(matrix[top:bottom, left:right])
    np.testing.assert_allclose(train_cells(tiny_run, pixels).mean, expected)


def test_names_may_hold_dollars_and_scales_keep_their_powers() -> None:
    figure = Figure()
    axis = figure.subplots()
    axis.set_title(r"$core{$, p$\frac{0}$")
    axis.set_xticks([0, 1], [r"$\frac{$", "b"])
    axis.set_yscale("log")
    assert render(figure).startswith(b"\x89PNG")
    assert any("mathdefault" in label.get_text() and label.get_parse_math() for label in axis.get_yticklabels())


def test_the_matrix_is_symmetric_on_paper_too(tiny_run: Run) -> None:
    figure = draw_influence_matrix(tiny_run)
    shown = figure.axes[0].images[0]
    values = np.ma.filled(shown.get_array(), np.nan)
    np.testing.assert_array_equal(values, values.T)
    assert shown.norm.vmin == -shown.norm.vmax
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list(tiny_run.classes)
    assert tuple(shown.get_cmap()(np.ma.masked)) == (1, 1, 1, 1), "white where no region is"


def test_modalities_and_labels_are_one_slice(tiny_run: Run) -> None:
    figure = draw_modalities(tiny_run)
    images = [axis.images[0].get_array() for axis in figure.axes]
    table = tiny_run.slices
    train = table[table.split == "train"].reset_index(drop=True)
    row = int(train.slice[train[["pixels_1", "pixels_2", "pixels_3"]].min(axis=1).idxmax()])
    for channel in range(4):
        np.testing.assert_array_equal(images[channel], tiny_run.images([row])[0, channel])
    labels = tiny_run.labels([row])[0]
    for class_id in (1, 2, 3):
        overlay = figure.axes[-1].images[class_id].get_array()
        np.testing.assert_array_equal(overlay[..., 3] > 0, labels == class_id)


def test_no_influence_is_told_from_no_region_and_no_block_is_lost_in_print(tiny_run: Run) -> None:
    figure = draw_influence_matrix(tiny_run)
    axis = figure.axes[0]
    shown = axis.images[0]
    nothing = np.asarray(shown.get_cmap()(shown.norm(0.0))[:3])
    assert nothing.max() < 0.85, "white is where no region is"
    assert np.ptp(nothing) < 0.02, "a grey"
    figure.draw_without_rendering()
    assert axis.get_window_extent().width / figure.dpi * PRINT_DPI >= MATRIX_PIXELS


def test_colours_darken_on_both_sides_of_grey(tiny_run: Run) -> None:
    shown = draw_influence_matrix(tiny_run).axes[0].images[0]
    light = [np.asarray(shown.get_cmap()(place)[:3]) @ [0.2126, 0.7152, 0.0722] for place in np.linspace(0, 1, 11)]
    assert (np.diff(light[:6]) > 0).all()
    assert (np.diff(light[5:]) < 0).all()

"""Volumes: what a slice shows and where, what its numbers and labels mean, and who trains on it."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracin.config import DataConfig, SliceSelection, SplitConfig
from ray_tracin.folders import Case
from ray_tracin.nifti import VolumeError
from ray_tracin.volumes import (
    Inspection,
    LabelScheme,
    Volume,
    choose_slices,
    cut_slices,
    decide_label_scheme,
    inspect_case,
    load_volume,
    split_patients,
)

BRATS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
ONE = LabelScheme("brats", {1: "NCR/NET", 2: "ED", 4: "ET"})


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = BRATS) -> Path:
    path.write_bytes(gzip.compress(nib.Nifti1Image(voxels, affine).to_bytes(), 1))
    return path


def case_of(folder: Path, images: Mapping[str, np.ndarray], label: np.ndarray | None = None) -> Case:
    paths = {name: save(folder / f"{name}.nii.gz", voxels) for name, voxels in images.items()}
    mask = None if label is None else save(folder / "seg.nii.gz", label)
    return Case("case", "patient", None, paths, mask, str(folder))


def config(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"modalities": ["t1"], "size": 4, **settings})


def volume(images: np.ndarray, labels: np.ndarray | None = None) -> Volume:
    """A volume in memory; images of three axes get a modality."""
    four = images if images.ndim == 4 else images[None]
    ids = None if labels is None else labels.astype(np.int32)
    return Volume(four.astype(np.float32), ids, BRATS, (), "case")


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def message(act: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ValueError) as caught:
        act(*arguments, **named)
    return str(caught.value)


# Loading


def test_a_volume_holds_modalities_in_order_and_labels(tmp_path: Path) -> None:
    images = {name: noise((4, 5, 6), seed) for seed, name in enumerate(("flair", "t1"))}
    label = np.arange(120).reshape(4, 5, 6) % 5
    loaded = load_volume(case_of(tmp_path, images, label.astype(np.uint8)))
    np.testing.assert_array_equal(loaded.images, np.stack(list(images.values())))
    assert loaded.labels is not None
    np.testing.assert_array_equal(loaded.labels, label)
    np.testing.assert_array_equal(loaded.affine, BRATS)
    assert loaded.warnings == ()


def test_slices_are_drawn_in_the_radiological_convention(tmp_path: Path) -> None:
    """The same anatomy stored as LPS and as RAS: row 0 is anterior, column 0 is the patient's right."""
    lps = np.full((6, 6, 3), 1, np.int16)
    lps[0, 0, 1] = 100  # right, anterior
    lps[5, 0, 1] = 50  # left, anterior
    mask = (lps > 1).astype(np.uint8)
    # RAS: the first two axes run the other way, and so does the affine.
    ras = np.array([[1.0, 0, 0, -5], [0, 1, 0, 234], [0, 0, 1, 0], [0, 0, 0, 1]])
    cut = {}
    for name, turn, affine in (("lps", np.asarray, BRATS), ("ras", lambda a: a[::-1, ::-1], ras)):
        image = save(tmp_path / f"{name}_t1.nii.gz", turn(lps), affine)
        label = save(tmp_path / f"{name}_seg.nii.gz", turn(mask), affine)
        loaded = load_volume(Case(name, name, None, {"t1": image}, label, str(tmp_path)))
        np.testing.assert_array_equal(loaded.affine, BRATS)
        cut[name] = cut_slices(loaded, [1], ONE, config(size=6, percentile=100))
    plane = cut["lps"].images[0, 0]
    assert plane[0, 0] == 1
    assert plane[0, 5] == 0
    assert plane[5, 0] == pytest.approx(-0.98)
    assert cut["lps"].labels is not None
    assert cut["lps"].labels[0].nonzero()[0].tolist() == [0, 0]
    assert cut["lps"].labels[0].nonzero()[1].tolist() == [0, 5]
    np.testing.assert_array_equal(cut["lps"].images, cut["ras"].images)
    np.testing.assert_array_equal(cut["lps"].labels, cut["ras"].labels)


def test_oddities_are_warnings(tmp_path: Path) -> None:
    case = case_of(tmp_path, {"t1": noise((4, 5, 6))}, np.zeros((4, 5, 6), np.uint8))
    assert case.label is not None
    save(case.label, np.zeros((4, 5, 6), np.uint8), np.eye(4))
    noted = Case(**{**vars(case), "notes": ("a note of discovery",)})
    assert load_volume(noted).warnings == (
        "a note of discovery",
        "seg.nii.gz: its affine differs from that of t1.nii.gz by up to 235; t1.nii.gz is trusted",
        "the segmentation is empty: no voxel is labelled",
    )
    blank = nib.Nifti1Image(noise((4, 5, 6)), BRATS)
    blank.set_sform(None, code=0)
    blank.set_qform(None, code=0)
    case.modalities["t1"].write_bytes(blank.to_bytes())
    assert load_volume(Case(**{**vars(case), "label": None})).warnings == (
        "t1.nii.gz: its header states no orientation; left and right are a guess (LAS)",
    )


@pytest.mark.parametrize("value", [2.99999, 3.0009])
def test_labels_that_went_through_float_are_integers_again(tmp_path: Path, value: float) -> None:
    loaded = load_volume(case_of(tmp_path, {"t1": noise((2, 2, 2))}, np.full((2, 2, 2), value, np.float32)))
    assert loaded.labels is not None
    np.testing.assert_array_equal(loaded.labels, 3)


@pytest.mark.parametrize(("value", "shown"), [(2.5, "2.5"), (1.002, "1.002"), (-1.0, "-1")])
def test_labels_that_are_no_labels_are_refused(tmp_path: Path, value: float, shown: str) -> None:
    label = np.zeros((2, 2, 2), np.float32)
    label[1, 0, 1] = value
    case = case_of(tmp_path, {"t1": noise((2, 2, 2))}, label)
    assert message(load_volume, case) == (
        f"{case.label}: expected labels 0, 1, 2, …, found {shown}: export it as a label map, without interpolation"
    )


def test_an_image_without_a_positive_voxel_is_refused(tmp_path: Path) -> None:
    case = case_of(tmp_path, {"t1": noise((2, 2, 2)), "t2": np.zeros((2, 2, 2), np.int16)})
    assert message(load_volume, case) == (
        f"{case.modalities['t2']}: expected an image, found no positive voxel: download the case again"
    )


@pytest.mark.parametrize(("negative", "shown"), [(0, ""), (10, ""), (11, "1%"), (500, "50%")])
def test_an_image_with_many_negative_voxels_gets_a_warning(tmp_path: Path, negative: int, shown: str) -> None:
    image = np.zeros((10, 10, 20), np.int16)
    image[..., :10] = noise((10, 10, 10))  # Half of it is background, which does not count.
    image[..., 0].flat[: min(negative, 100)] *= -1
    image[..., 1:5].flat[: max(negative - 100, 0)] *= -1
    assert (image < 0).sum() == negative
    expected = (
        f"t1.nii.gz: {shown} of its voxels that aren't 0 are negative and become background; intensities are expected "
        "as they were acquired, not normalised"
    )
    assert load_volume(case_of(tmp_path, {"t1": image})).warnings == ((expected,) if shown else ())


def test_shapes_that_differ_within_a_case_are_refused(tmp_path: Path) -> None:
    case = case_of(tmp_path, {"t1": noise((2, 2, 2)), "t2": noise((2, 2, 3))})
    with pytest.raises(VolumeError, match=r"t2.nii.gz: expected shape \(2, 2, 2\) as t1.nii.gz has, found \(2, 2, 3\)"):
        load_volume(case)


def test_an_inspection_reads_everything_and_survives_json(tmp_path: Path) -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    label[1, 1, 4] = 4
    case = case_of(tmp_path, {"t1": noise((4, 5, 6))}, label)
    found = inspect_case(case, config(slices={"count": 4}))
    assert found == Inspection(case, (0, 4), (1, 2, 3, 4), (4, 5, 6), ())
    assert Inspection.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert inspect_case(Case(**{**vars(case), "label": None}), config(slices={"count": 1})).label_values == ()


@pytest.mark.parametrize("settings", [{"slices": {"count": 2}}, {"slices": {"count": 4}, "size": 2}])
def test_a_lesion_that_is_not_cut_is_a_warning(tmp_path: Path, settings: dict[str, Any]) -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    label[0, 0, 4:] = 1
    found = inspect_case(case_of(tmp_path, {"t1": noise((4, 5, 6))}, label), config(**settings))
    assert found.warnings == (
        "none of its 2 labelled voxels is in what is cut (they are in slices 4 to 5): "
        "it counts as one without a lesion; "
        "data.slices.selection=tumour or a larger data.size would have it",
    )


def test_another_plane_than_the_axial_is_a_warning(tmp_path: Path) -> None:
    affine = BRATS @ np.diag([1.0, 4.0, 1.0, 1.0])
    path = save(tmp_path / "t1.nii.gz", noise((4, 5, 6)), affine)
    found = inspect_case(Case("case", "patient", None, {"t1": path}, None, ""), config(slices={"count": 1}))
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("its voxels are 1 × 4 mm in the axial plane, in which slices are cut")


def test_an_inspection_finds_a_truncated_file(tmp_path: Path) -> None:
    case = case_of(tmp_path, {"t1": noise((4, 5, 6))}, noise((4, 5, 6)))
    assert case.label is not None
    case.label.write_bytes(case.label.read_bytes()[:-20])
    with pytest.raises(VolumeError, match=r"seg.nii.gz: expected a whole gzip file, found \d+ bytes that are cut off"):
        inspect_case(case, config(slices={"count": 1}))


def test_an_inspection_finds_what_cutting_would(tmp_path: Path) -> None:
    image = np.zeros((4, 5, 6), np.int16)
    image[..., 0] = 7
    case = case_of(tmp_path, {"t1": image})
    settings = {"slices": {"count": 1}, "intensity": "maximum"}
    assert message(inspect_case, case, config(**settings)) == (
        "case, t1: expected a positive upper end of the scale (maximum), found 0: "
        "check the image, data.slices and data.intensity"
    )


# Choosing slices


def chosen(length: int, labels: Mapping[int, int] | None = None, **selection: Any) -> tuple[int, ...]:
    """The choice in a volume of so many slices, with so many labelled pixels on each that is named."""
    mask = None if labels is None else np.zeros((10, 10, length), int)
    for index, pixels in (labels or {}).items():
        assert mask is not None
        mask[..., index].flat[:pixels] = 4
    return choose_slices(volume(np.ones((10, 10, length)), mask), SliceSelection.model_validate(selection))


def test_central_slices_of_brats_are_72_to_81() -> None:
    assert chosen(155, count=10) == tuple(range(72, 82))
    assert chosen(5, count=5) == (0, 1, 2, 3, 4)
    assert chosen(5, count=1) == (2,)


def test_tumour_slices_surround_the_centre_of_area() -> None:
    assert chosen(50, {20: 30, 26: 10}, selection="tumour", count=3) == (21, 22, 23)  # (20·30 + 26·10) / 40 = 21.5 → 22
    assert chosen(50, {0: 9}, selection="tumour", count=4) == (0, 1, 2, 3)
    assert chosen(50, {49: 9}, selection="tumour", count=4) == (46, 47, 48, 49)


def test_largest_slices_are_those_with_most_labelled_pixels() -> None:
    labels = {3: 10, 10: 50, 20: 40, 21: 5}
    assert chosen(30, labels, selection="largest", count=3) == (3, 10, 20)
    # Among slices without labels the nearest to the tumour.
    assert chosen(30, {12: 8}, selection="largest", count=3) == (11, 12, 13)


def test_listed_slices_are_ascending() -> None:
    assert chosen(155, selection="list", indices=[99, 90]) == (90, 99)


@pytest.mark.parametrize(
    ("length", "labels", "selection", "expected"),
    [
        (9, None, {"count": 10}, "case: expected at least 10 slices, found 9: lower data.slices.count"),
        (
            95,
            None,
            {"selection": "list", "indices": list(range(90, 100))},
            "case: expected slice 99, found slices 0 to 94: choose from these",
        ),
        (
            20,
            None,
            {"selection": "tumour"},
            "case: expected labels for data.slices.selection tumour, found no segmentation: use central or list",
        ),
        (
            20,
            {},
            {"selection": "largest"},
            "case: expected labels for data.slices.selection largest, found an empty segmentation: use central or list",
        ),
    ],
)
def test_slices_that_are_not_there_are_refused(
    length: int, labels: dict[int, int] | None, selection: dict[str, Any], expected: str
) -> None:
    with pytest.raises(VolumeError) as caught:
        chosen(length, labels, **selection)
    assert str(caught.value) == expected


# Intensity


def test_the_percentile_of_the_non_zero_voxels_becomes_one() -> None:
    values = np.zeros((4, 4, 4))
    values.flat[:5] = [10, 20, 30, 40, 50]
    # Linear percentile of the five: 75 % lies on the fourth.
    planes = cut_slices(volume(values), range(4), ONE, config(percentile=75)).images[:, 0]
    expected = {0: -1.0, 10: -0.5, 20: 0.0, 30: 0.5, 40: 1.0, 50: 1.0}
    np.testing.assert_allclose(planes, np.vectorize(expected.get)(values).transpose(2, 1, 0), atol=1e-7)


def test_the_maximum_is_that_of_the_cropped_slab() -> None:
    values = np.ones((6, 6, 3))
    values[0, 0, 1] = 1000  # on the slice, outside the crop
    values[2, 2, 0] = 500  # in the crop, on another slice
    values[3, 3, 1] = 4
    plane = cut_slices(volume(values), [1], ONE, config(size=4, intensity="maximum")).images[0, 0]
    assert plane.max() == plane[2, 2] == 1
    assert np.unique(plane).tolist() == [-0.5, 1]  # 2·1/4 − 1


def test_each_modality_has_its_own_scale() -> None:
    images = np.stack([np.full((4, 4, 1), 3.0), np.full((4, 4, 1), 4000.0)])
    cut = cut_slices(volume(images), [0], ONE, config(modalities=["t1", "t2"]))
    np.testing.assert_array_equal(cut.images, 1)


@pytest.mark.parametrize("intensity", ["percentile", "maximum"])
@given(
    seed=st.integers(0, 2**32 - 1),
    gain=st.sampled_from([0.25, 2.0, 1024.0]),
    percentile=st.floats(1, 100),
)
def test_slices_lie_between_minus_one_and_one_whatever_the_gain(
    intensity: str, seed: int, gain: float, percentile: float
) -> None:
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((4, 4, 3)) < 0.4, 0, rng.integers(-3, 100, (4, 4, 3)))
    values[1, 1] = 100
    settings = config(intensity=intensity, percentile=max(percentile, 60))
    images = cut_slices(volume(values), range(3), ONE, settings).images
    planes = values.transpose(2, 1, 0)
    assert images.min() >= -1
    assert images.max() <= 1
    assert (images[:, 0][planes <= 0] == -1).all()
    assert (images[:, 0][planes > 0] > -1).all()
    np.testing.assert_array_equal(cut_slices(volume(values * gain), range(3), ONE, settings).images, images)


def test_a_scale_without_a_positive_end_is_refused() -> None:
    values = np.full((4, 4, 1), -5.0)
    values[0, 0] = 1
    assert message(cut_slices, volume(values), [0], ONE, config(percentile=50)) == (
        "case, t1: expected a positive upper end of the scale (percentile), found -5: "
        "check the image, data.slices and data.intensity"
    )


# Cropping


def cut_plane(rows: int, columns: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of one slice whose every pixel is labelled, brightness telling the column."""
    values = np.broadcast_to(np.arange(1.0, columns + 1)[:, None, None], (columns, rows, 1))
    labels = np.full((columns, rows, 1), 4)
    cut = cut_slices(volume(values, labels), [0], ONE, config(percentile=100, **settings))
    assert cut.labels is not None
    return cut.images[0, 0], cut.labels[0]


def test_crops_of_240_are_those_of_the_paper() -> None:
    first = {None: 24, 27: 27}
    for start, column in first.items():
        image, _ = cut_plane(240, 240, size=192, crop_start=start)
        assert image.shape == (192, 192)
        np.testing.assert_allclose(image[0], 2 * np.arange(column + 1, column + 193) / 240 - 1, atol=1e-6)


def test_small_slices_are_padded_with_background() -> None:
    image, labels = cut_plane(rows=5, columns=2, size=4)
    np.testing.assert_array_equal(image, [[-1, 0, 1, -1]] * 4)
    np.testing.assert_array_equal(labels, [[0, 3, 3, 0]] * 4)


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), size=st.integers(1, 20))
def test_a_centred_crop_keeps_the_centre(rows: int, columns: int, size: int) -> None:
    image, labels = cut_plane(rows, columns, size=size)
    assert image.shape == labels.shape == (size, size)
    inside = labels > 0
    assert inside.sum() == min(rows, size) * min(columns, size)
    for axis in (0, 1):
        margins = np.flatnonzero(inside.any(axis=1 - axis))
        assert abs(margins[0] - (size - 1 - margins[-1])) <= 1


@pytest.mark.parametrize("start", [-1, 27])
def test_a_crop_that_passes_the_edge_is_refused(start: int) -> None:
    assert message(cut_plane, 218, 182, size=192, crop_start=start) == (
        f"case: expected rows and columns {start} to {start + 191}, found slices of 218 × 182: "
        "set data.crop_start null or another data.size"
    )


# Labels


@pytest.mark.parametrize(
    ("values", "dialect", "expected"),
    [
        ({0, 1, 2, 4}, "brats", "brats"),
        ({0, 1, 2}, "brats", "brats"),
        ({0, 1, 2, 3}, "brats", "brats2023"),
        ({0, 1, 2, 3}, "brats2023", "brats2023"),
        ({0, 1, 2}, "brats2023", "brats2023"),
    ],
)
def test_label_values_tell_the_scheme(values: set[int], dialect: Any, expected: str) -> None:
    scheme = decide_label_scheme(values, config(), dialect)
    assert scheme.name == expected
    assert list(scheme.classes.values()) == ["NCR/NET", "ED", "ET"]
    assert values <= {0, *scheme.classes, 3, 4}


@pytest.mark.parametrize(
    ("values", "dialect", "expected"),
    [
        (
            {0, 1, 2, 3, 4},
            "brats",
            "label values [1, 2, 3, 4] allow two meanings of 4: ET until 2022, where there is no 3, and the resection "
            "cavity in 2024, where 3 is ET; or two editions lie in one folder. They are never merged: set",
        ),
        ({0, 4}, "brats2023", "label values [4] hold 4 in files named as since 2023 (t1n, t1c, t2w, t2f), where 3 is"),
        ({1, 5}, "brats", "label values [1, 5] fit no BraTS edition (1 to 4): set data.label_scheme to brats (4 is ET"),
        ({0}, "brats", "no voxel of the data set is labelled: training and influence need ground truth"),
        (set(), "csv", "no voxel of the data set is labelled: training and influence need ground truth"),
    ],
)
def test_label_values_that_tell_nothing_are_refused(values: set[int], dialect: Any, expected: str) -> None:
    text = message(decide_label_scheme, values, config(), dialect)
    assert text.startswith(expected)
    assert "no voxel" in text or "data.labels to a map of value → name" in text


@pytest.mark.parametrize("dialect", ["brats", "brats2023"])
def test_a_mask_of_the_whole_tumour_is_refused_until_it_is_named(dialect: Any) -> None:
    assert message(decide_label_scheme, {0, 1}, config(), dialect) == (
        "the only label value is 1, as in a mask of the whole tumour, where BraTS has 1, 2 and 4 or 3: set "
        "data.labels={1: tumour}, or data.label_scheme if it is the necrotic core of BraTS"
    )
    assert decide_label_scheme({0, 1}, config(label_scheme="brats"), dialect).name == "brats"
    named = decide_label_scheme({0, 1}, config(labels={1: "tumour"}), dialect)
    assert dict(named.classes) == {1: "tumour"}


def test_a_csv_file_is_not_assumed_to_be_brats() -> None:
    scheme = decide_label_scheme([0, 4, 2, 1, 3], config(), "csv")
    assert list(scheme.classes.items()) == [(1, "class 1"), (2, "class 2"), (3, "class 3"), (4, "class 4")]


def test_the_configuration_decides_before_the_values() -> None:
    named = config(labels={7: "vessel", 3: "tumour"}, label_scheme="brats")
    assert list(decide_label_scheme([0, 3], named, "brats").classes.items()) == [(7, "vessel"), (3, "tumour")]
    swapped = decide_label_scheme([1], config(label_scheme="nnunet"), "csv")
    assert list(swapped.classes.items()) == [(2, "NCR/NET"), (1, "ED"), (3, "ET")]
    late = decide_label_scheme([1, 2, 3, 4], config(label_scheme="brats2024"), "brats2023")
    assert list(late.classes.values()) == ["NETC", "SNFH", "ET", "RC"]
    assert message(decide_label_scheme, [0, 2, 3, 4], named, "brats").startswith(
        "label values [2, 4] are not in the scheme labels {7: 'vessel', 3: 'tumour'}: add them to data.labels"
    )


def test_a_csv_files_labels_must_be_labels() -> None:
    assert message(decide_label_scheme, range(300), config(), "csv") == (
        "expected at most 255 label values, found 299: is it a label map?"
    )


def test_labels_become_class_ids_in_the_order_of_the_scheme() -> None:
    labels = np.array([0, 1, 2, 3] * 4).reshape(4, 4, 1)
    scheme = LabelScheme("nnunet", {2: "NCR/NET", 1: "ED", 3: "ET"})
    cut = cut_slices(volume(np.ones((4, 4, 1)), labels), [0], scheme, config())
    assert cut.labels is not None
    np.testing.assert_array_equal(cut.labels[0], np.array([[0, 2, 1, 3]] * 4).T)
    assert cut_slices(volume(np.ones((4, 4, 1))), [0], scheme, config()).labels is None


def test_a_label_that_the_scheme_does_not_know_is_refused_even_off_the_slices() -> None:
    labels = np.zeros((4, 4, 2))
    labels[0, 0, 1] = 3
    assert message(cut_slices, volume(np.ones((4, 4, 2)), labels), [0], ONE, config()) == (
        "case: label values [3] are not in the scheme brats {1: 'NCR/NET', 2: 'ED', 4: 'ET'}: add them to "
        "data.labels, choose another data.label_scheme, or mend the segmentation"
    )


# Splits

PATIENTS = st.lists(st.text("abc0123", min_size=1, max_size=4), min_size=1, max_size=40, unique=True)
SHARES = st.tuples(st.floats(0, 0.45), st.floats(0, 0.45))


@given(patients=PATIENTS, shares=SHARES, seed=st.integers(-(2**40), 2**70))
def test_a_split_is_a_function_of_the_set_of_patients_and_the_seed(
    patients: list[str], shares: tuple[float, float], seed: int
) -> None:
    settings = SplitConfig(validation=shares[0], test=shares[1])
    if len(patients) < 1 + (shares[0] > 0) + (shares[1] > 0):
        assert "add patients or lower the shares" in message(split_patients, patients, settings, seed)
        return
    parts = split_patients(patients, settings, seed)
    assert list(parts) == sorted(patients)
    counts = {part: list(parts.values()).count(part) for part in ("train", "validation", "test")}
    assert counts["train"] >= 1
    for part, share in (("validation", shares[0]), ("test", shares[1])):
        assert (counts[part] > 0) == (share > 0)
        assert abs(counts[part] - share * len(patients)) <= 1
    again = [*reversed(patients), *patients]
    assert split_patients(again, settings, seed) == parts


def test_the_paper_trains_on_207_of_259_patients() -> None:
    parts = split_patients([f"p{n:03d}" for n in range(259)], SplitConfig(), seed=1234)
    assert list(parts.values()).count("train") == 207
    assert list(parts.values()).count("validation") == 52


def test_someone_is_left_to_train_on_when_both_shares_are_rounded_up() -> None:
    parts = split_patients(list("abcd"), SplitConfig(validation=0.375, test=0.375), seed=0)
    assert sorted(parts.values()) == ["test", "train", "validation", "validation"]


def test_another_seed_is_another_split() -> None:
    patients = [f"p{n}" for n in range(30)]
    assert len({tuple(split_patients(patients, SplitConfig(), seed).values()) for seed in range(10)}) == 10


@pytest.mark.parametrize(("patients", "needed", "test"), [([], 2, 0.0), (["a"], 2, 0.0), (["a", "b"], 3, 0.2)])
def test_too_few_patients_to_split_are_refused(patients: list[str], needed: int, test: float) -> None:
    assert message(split_patients, patients, SplitConfig(test=test), 0) == (
        f"expected at least {needed} patients to split by split.validation 0.2 and split.test {test} and still "
        f"train, found {len(patients)}: add patients or lower the shares"
    )

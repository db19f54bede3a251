"""Phantom: in every edition the same patients, readable by the loader, oriented as they say, plausible, synthetic."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracin.anatomy import Tissue, analytic_tissue, build_grid, place_head, smooth_noise, template_tissue
from ray_tracin.config import DataConfig
from ray_tracin.folders import decide_dialect, find_cases
from ray_tracin.glioma import CONTRAST, ED, ET, NCR, RC, Patient, render_patient
from ray_tracin.phantom import LAYOUTS, Edition, patient_grades, reserve, write_patient, write_patients, write_tables
from ray_tracin.vocabulary import UsageError
from ray_tracin.volumes import cut_slices, decide_label_scheme, inspect_case, load_volume

TINY: dict[str, Any] = {"spacing": 8.0, "anatomy": "analytic", "seed": 3}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def settings(root: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"root": str(root), "size": 32, "slices": {"count": 6}, **changes})


@pytest.fixture(scope="module")
def patient() -> Patient:
    """One patient at 3 mm on the template, as the demo has them at 2 mm."""
    return render_patient(2, spacing=3.0)


# Layouts


@pytest.mark.parametrize("edition", LAYOUTS)
def test_every_edition_comes_back_with_the_same_class_maps(tmp_path: Path, edition: Edition) -> None:
    write_patients(tmp_path, 2, edition=edition, **TINY)
    config = settings(tmp_path, label_scheme="brats2024" if edition == "2024" else "auto")
    cases, skipped = find_cases(config)
    assert skipped == []
    assert len(cases) == len({case.patient for case in cases}) == 2
    inspections = [inspect_case(case, config) for case in cases]
    values = {value for found in inspections for value in found.label_values}
    scheme = decide_label_scheme(values, config, decide_dialect(cases))
    assert len(scheme.classes) == (4 if edition == "2024" else 3)
    size = (182, 218, 182) if edition == "2024" else (240, 240, 155)
    for number, (case, found) in enumerate(zip(cases, inspections, strict=True)):
        rendered = render_patient(number, size=size, cavity=edition == "2024", **TINY)
        cut = cut_slices(load_volume(case), found.indices, scheme, config)
        assert found.warnings == ()
        assert found.shape == rendered.classes.shape
        assert cut.labels is not None
        expected = np.zeros((6, 32, 32), np.uint8)
        for row, k in enumerate(found.indices):
            plane = rendered.classes[:, :, k].T
            top, left = (32 - plane.shape[0]) // 2, (32 - plane.shape[1]) // 2
            expected[row, top : top + plane.shape[0], left : left + plane.shape[1]] = plane
        assert set(np.unique(expected)) > {0, ED}
        np.testing.assert_array_equal(cut.labels, expected)


def test_the_anatomy_is_the_same_in_every_edition_with_that_field_of_view(tmp_path: Path) -> None:
    images = set()
    for edition in ("2017", "2020", "2023", "csv"):
        write_patients(tmp_path / edition, 1, edition=edition, **TINY)
        (case,), _ = find_cases(settings(tmp_path / edition))
        images.add(load_volume(case).images.tobytes())
    assert len(images) == 1


def test_names_and_tables_are_those_of_the_editions(tmp_path: Path) -> None:
    for edition in ("2019", "2020", "2023", "csv"):
        write_patients(tmp_path / edition, 4, edition=edition, low_grade=1, **TINY)
    names = {edition: set(files(tmp_path / edition)) for edition in ("2019", "2020", "2023", "csv")}
    assert {
        "HGG/BraTS19_PHANTOM_000_1/BraTS19_PHANTOM_000_1_t1ce.nii.gz",
        "LGG/BraTS19_PHANTOM_003_1/BraTS19_PHANTOM_003_1_seg.nii.gz",
        "name_mapping.csv",
    } < names["2019"]
    assert {"BraTS20_PHANTOM_000/BraTS20_PHANTOM_000_flair.nii.gz", "name_mapping.csv"} < names["2020"]
    assert "BraTS-GLI-PHANTOM00000-000/BraTS-GLI-PHANTOM00000-000-t2f.nii.gz" in names["2023"]
    assert {"PHANTOM_000/label.nii.gz", "dataset.csv"} < names["csv"]
    for edition in ("2019", "2020", "csv"):
        low = find_cases(settings(tmp_path / edition, grade="LGG"))[0]
        assert [case.case[-5:] for case in low] == [{"2019": "003_1", "2020": "M_003", "csv": "M_003"}[edition]]
    # One patient in four of 2020 was not in 2019.
    kept = find_cases(settings(tmp_path / "2020", cohort="brats2019"))[0]
    assert [case.case for case in kept] == [f"BraTS20_PHANTOM_00{n}" for n in range(3)]
    assert len(find_cases(settings(tmp_path / "2019", cohort="brats2019"))[0]) == 4


# Reproducibility


def test_a_patient_is_the_same_bytes_alone_and_in_a_crowd(tmp_path: Path) -> None:
    together = tmp_path / "together"
    write_patients(together, 3, low_grade=1, **TINY)
    alone = tmp_path / "alone"
    grades = patient_grades(3, low_grade=1)
    reserve(alone, grades)
    for number in (2, 0, 1):
        write_patient(alone, number, grade=grades[number], **TINY)
    write_tables(alone, grades)
    assert files(alone) == files(together)
    write_patients(together, 3, low_grade=1, **TINY)
    assert files(alone) == files(together), "writing again changes nothing and leaves nothing behind"


def test_synthetic_patients_are_not_put_among_others(tmp_path: Path) -> None:
    (tmp_path / "name_mapping.csv").write_text("real")
    with pytest.raises(UsageError, match=rf"found other files in {tmp_path}: give a folder of their own"):
        write_patients(tmp_path, 1, **TINY)
    assert files(tmp_path) == {"name_mapping.csv": b"real"}


@pytest.mark.parametrize(("number", "edition", "others"), [(1, "2019", 1), (2, "2023", 2)])
def test_synthetic_patients_are_not_put_among_others_that_no_table_would_list(
    tmp_path: Path, number: int, edition: Edition, others: int
) -> None:
    write_patients(tmp_path, 2, **TINY)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=rf"holds {others} other synthetic patients, such as HGG/BraTS19_PHANTOM_00"):
        write_patients(tmp_path, number, edition=edition, **TINY)
    assert files(tmp_path) == before
    write_patients(tmp_path, 3, **TINY)
    assert before.keys() < files(tmp_path).keys()


def test_patients_differ_from_each_other_and_between_seeds() -> None:
    masks = {
        render_patient(number, seed=seed, spacing=8.0, anatomy="analytic").classes.tobytes()
        for number in range(3)
        for seed in (0, 1, -1)
    }
    assert len(masks) == 9


def test_every_file_says_that_it_is_synthetic(tmp_path: Path) -> None:
    write_patients(tmp_path, 1, **TINY)
    assert "not for diagnosis" in (tmp_path / "README_PHANTOM.txt").read_text()
    scans = sorted(tmp_path.rglob("*.nii.gz"))
    assert len(scans) == 5
    for path in scans:
        header = nib.load(path).header
        assert header["descrip"].item() == b"synthetic phantom"
        assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
        assert "PHANTOM" in path.name


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda root: write_patients(root, 0), "expected at least 1 patient and low_grade from 0 to it, got 0 and 0"),
        (
            lambda root: write_patients(root, 2, low_grade=3),
            "expected at least 1 patient and low_grade from 0 to it, got 2 and 3",
        ),
        (lambda root: write_patient(root, 0, spacing=0.0), "expected a spacing above 0 and up to 12 mm, got 0.0"),
        (lambda root: write_patient(root, 0, spacing=40.0), "expected a spacing above 0 and up to 12 mm, got 40.0"),
    ],
)
def test_patients_that_cannot_be_rendered_are_refused(tmp_path: Path, act: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        act(tmp_path)
    assert str(caught.value) == expected
    assert files(tmp_path) == {}


# Orientation


def test_a_tumour_on_the_left_is_on_the_right_of_the_screen(tmp_path: Path) -> None:
    """By the world coordinates of the file, which nibabel reads: negative x is left, negative y posterior (RAS)."""
    sides = set()
    for number in range(6):
        folder = write_patient(tmp_path, number, **TINY)
        image = nib.load(folder / f"{folder.name}_seg.nii.gz")
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        tumour = np.argwhere(np.asarray(image.dataobj) > 0)
        brain = np.argwhere(np.asarray(nib.load(folder / f"{folder.name}_t1.nii.gz").dataobj) > 0)
        offset = image.affine[:3, :3] @ (tumour.mean(0) - brain.mean(0))
        (case,) = [case for case in find_cases(settings(tmp_path))[0] if case.case == folder.name]
        labels = load_volume(case).labels
        assert labels is not None
        pixels = np.argwhere(labels.max(axis=2).T > 0).mean(0) - brain.mean(0)[[1, 0]]
        assert np.sign(pixels[1]) == -np.sign(offset[0])
        assert abs(pixels[0]) < 1 or np.sign(pixels[0]) == -np.sign(offset[1])
        sides.add(np.sign(offset[0]))
    assert sides == {-1.0, 1.0}


def test_the_front_of_the_template_is_the_first_row_and_its_top_the_last_slice(patient: Patient) -> None:
    """The hemispheres are broadest behind their middle, and the lowest part, the cerebellum, lies at the back."""
    brain = patient.images[0] > 0
    k = brain.sum(axis=(0, 1)).argmax()
    widths = brain[:, :, k].T.sum(axis=1)
    rows = np.flatnonzero(widths)
    assert widths.argmax() > rows.mean()
    middle, lowest, highest = (np.argwhere(part)[:, 1].mean() for part in (brain, brain[..., :4], brain[..., -12:]))
    assert lowest > middle + 5
    assert abs(highest - middle) < 5


# Plausibility


def medians(patient: Patient, modality: int) -> dict[int, float]:
    image = patient.images[modality]
    return {c: float(np.median(image[(patient.classes == c) & (image > 0)])) for c in (0, NCR, ED, ET)}


def test_contrasts_are_those_of_a_glioma() -> None:
    patient = render_patient(0, spacing=3.0, difficulty=1.0)
    t1, t1ce, t2, flair = (medians(patient, m) for m in range(4))
    assert t1ce[ET] > 1.2 * t1ce[0]
    assert t1ce[NCR] < t1ce[0]
    assert flair[ED] > 1.2 * flair[0]
    assert t2[ED] > 1.2 * t2[0]
    assert t1[NCR] < t1[ED]
    assert set(CONTRAST) == {"t1", "t1ce", "t2", "flair"}


def test_background_is_exactly_zero_and_the_brain_is_not(patient: Patient) -> None:
    masks = {(image > 0).tobytes() for image in patient.images}
    assert len(masks) == 1
    brain = patient.images[0] > 0
    assert patient.images.min() == 0
    assert 0.1 < brain.mean() < 0.3
    assert (patient.classes[~brain] == 0).all()
    assert patient.images.max() < np.iinfo(np.int16).max


def test_a_low_grade_tumour_does_not_enhance() -> None:
    high, low = (render_patient(1, grade=grade, **TINY) for grade in ("HGG", "LGG"))
    assert (high.classes == ET).any()
    assert set(np.unique(low.classes)) == {0, NCR, ED}
    np.testing.assert_array_equal(high.classes == ED, low.classes == ED)


def test_a_cavity_replaces_core_only() -> None:
    before, after = (render_patient(2, cavity=cavity, spacing=4.0, anatomy="analytic") for cavity in (False, True))
    cavity = after.classes == RC
    assert cavity.any()
    assert set(np.unique(before.classes[cavity])) <= {NCR, ET}
    np.testing.assert_array_equal(before.classes[~cavity], after.classes[~cavity])
    # Fluid: bright on T2, dark on FLAIR.
    assert np.median(after.images[2][cavity]) > np.median(
        after.images[2][after.classes == 0][after.images[2][after.classes == 0] > 0]
    )


def test_difficulty_is_noise() -> None:
    def roughness(difficulty: float) -> float:
        image = render_patient(0, spacing=4.0, difficulty=difficulty).images[0].astype(float)
        inside = image[20:40, 20:40, 12:24]
        return float(np.abs(np.diff(inside, axis=0)).mean() / inside.mean())

    assert roughness(0.5) < roughness(3.0)


def test_the_rater_is_not_the_truth() -> None:
    """Labels cut through the enhancing rim: some of what is bright on T1ce is not labelled so."""
    patient = render_patient(0, spacing=2.0, difficulty=0.5)
    near = patient.classes > 0
    bright = patient.images[1] > 1.3 * np.median(patient.images[1][patient.images[1] > 0])
    agreed = (bright & (patient.classes == ET)).sum()
    dice = 2 * agreed / ((bright & near).sum() + (patient.classes == ET).sum())
    assert 0.5 < dice < 0.97


# Anatomy


@pytest.mark.parametrize("anatomy", ["template", "analytic"])
def test_tissue_fractions_sum_to_one_in_the_brain_and_vanish_outside(anatomy: str) -> None:
    rng = np.random.default_rng(0)
    grid = build_grid((240, 240, 155), 6.0)
    head = place_head(rng, grid)
    tissue: Tissue = template_tissue(head) if anatomy == "template" else analytic_tissue(rng, head, 6.0)
    total = tissue.csf + tissue.gm + tissue.wm
    np.testing.assert_allclose(total[tissue.brain], 1, atol=1e-5)
    assert (total[~tissue.brain] == 0).all()
    shares = {name: getattr(tissue, name)[tissue.brain].mean() for name in ("csf", "gm", "wm")}
    assert min(shares.values()) > 0.05
    litres = tissue.brain.sum() * 6.0**3 / 1e6
    assert 1.2 < litres < 2.1


def test_a_grid_has_the_shape_and_affine_of_brats() -> None:
    grid = build_grid((240, 240, 155), 1.0)
    assert grid.shape == (240, 240, 155)
    np.testing.assert_array_equal(grid.affine(), [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert build_grid((240, 240, 155), 2.0).shape == (120, 120, 78)
    coarse = build_grid((240, 240, 155), 8.0).points()
    np.testing.assert_allclose(np.diff(coarse[2], axis=2), 8)


@given(seed=st.integers(0, 1000), length=st.floats(0.2, 12))
def test_smooth_noise_has_about_unit_deviation(seed: int, length: float) -> None:
    field = smooth_noise(np.random.default_rng(seed), (24, 25, 26), length)
    assert field.shape == (24, 25, 26)
    assert field.dtype == np.float32
    assert np.isfinite(field).all()
    assert 0.4 < field.std() < 2.2


def test_smooth_noise_is_smoother_over_greater_lengths() -> None:
    def step(length: float) -> float:
        return float(np.abs(np.diff(smooth_noise(np.random.default_rng(0), (40, 40, 40), length), axis=0)).mean())

    assert step(20.0) < step(8.0) < step(3.0)

"""Label maps for other tools lie on the original volume, voxel by voxel, however it is stored."""

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ray_tracin.cli import app
from ray_tracin.labelmaps import export_label_maps, label_map
from ray_tracin.nifti import encode_labels, load_grid
from ray_tracin.pipeline import Executors, run_to
from ray_tracin.runs import Run, start_run
from ray_tracin.stages import execute_serially

CASE = "BraTS19_X_001_1"
MODALITIES = ("t1", "t1ce", "t2", "flair")
TILT = np.array([[0.98, -0.17, 0.1], [0.17, 0.98, 0.05], [-0.1, -0.03, 0.99]]) @ np.diag([1.1, 0.9, 2.0])
"""Oblique: none of its axes is one of the patient's, and their lengths differ."""


def affine_of(directions: str, tilted: bool) -> np.ndarray:
    """Voxel → RAS mm for axes that run toward the named sides."""
    turn = nib.orientations.axcodes2ornt(tuple(directions))
    world = TILT if tilted else np.eye(3)
    affine = np.eye(4)
    for axis, (place, sign) in enumerate(turn):
        affine[:3, axis] = world[:, int(place)] * sign
    affine[:3, 3] = (11.5, -7.25, 3.0)
    assert "".join(nib.aff2axcodes(affine)) == directions
    return affine


def stored_shape(lps: tuple[int, int, int], directions: str) -> tuple[int, ...]:
    """The shape on disk of a volume with this shape in LPS."""
    return tuple(lps["RAS".index({"L": "R", "P": "A", "I": "S"}.get(side, side))] for side in directions)


def write_case(folder: Path, lps: tuple[int, int, int], directions: str, tilted: bool, form: str) -> np.ndarray:
    """A labelled case of noise in this storage order; its segmentation as stored."""
    random, shape = np.random.default_rng(5), stored_shape(lps, directions)
    segmentation = random.choice(np.array([0, 1, 2, 4], np.uint8), shape)
    affine = affine_of(directions, tilted)
    (folder / CASE).mkdir(parents=True)
    for name in (*MODALITIES, "seg"):
        voxels = segmentation if name == "seg" else random.integers(1, 900, shape).astype(np.int16)
        image = (nib.Nifti2Image if form == "nifti2" else nib.Nifti1Image)(voxels, affine)
        if form == "qform":
            image.set_qform(affine, code=1)
            image.set_sform(None, code=0)
        image.header["descrip"] = b"Jane Doe"
        (folder / CASE / f"{CASE}_{name}.nii.gz").write_bytes(gzip.compress(image.to_bytes(), 1))
    return segmentation


def prepared(tmp_path: Path, *overrides: str) -> Run:
    """A run of one case (and a second, to split), cut and no more."""
    second = tmp_path / "patients" / "BraTS19_Y_001_1"
    second.mkdir()
    for path in (tmp_path / "patients" / CASE).iterdir():
        shutil.copy(path, second / path.name.replace("_X_", "_Y_"))
    settings = ["data.size=32", "data.slices.count=3", "model={width: 4, depth: 3}", *overrides]
    root = f"data.root={tmp_path / 'patients'}"
    run = start_run(tmp_path / "run", preset="demo", overrides=[*settings, root, "split.validation=0.5"])
    run_to(run, "prepare", Executors(execute_serially, execute_serially), lambda event: None)
    return run


def decoded(content: bytes) -> nib.Nifti1Image:
    raw = gzip.decompress(content)
    return (nib.Nifti2Image if int.from_bytes(raw[:4], "little") == 540 else nib.Nifti1Image).from_bytes(raw)


def rows_of(run: Run, case: str) -> list[int]:
    return run.slices.loc[run.slices["case"] == case, "slice"].tolist()


@pytest.mark.parametrize("directions", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("tilted", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize(
    ("lps", "start"),
    [((37, 41, 9), None), ((21, 25, 8), None), ((40, 19, 7), None), ((33, 32, 6), None), ((37, 41, 9), 3)],
    ids=["crop", "pad", "both", "one row", "given start"],
)
def test_every_voxel_is_where_it_was(
    tmp_path: Path, directions: str, tilted: bool, lps: tuple[int, int, int], start: int | None
) -> None:
    segmentation = write_case(tmp_path / "patients", lps, directions, tilted, "sform")
    run = prepared(tmp_path, *([] if start is None else [f"data.crop_start={start}"]))
    rows = rows_of(run, CASE)
    found = decoded(label_map(run, CASE, run.labels(rows)))
    original = nib.load(tmp_path / "patients" / CASE / f"{CASE}_t1.nii.gz")
    assert found.shape == original.shape
    np.testing.assert_array_equal(found.affine, original.affine)
    # RAS, by nibabel; toward left, posterior and superior the first two axes run the other way.
    whole, mine = (
        nib.as_closest_canonical(nib.Nifti1Image(np.asarray(voxels), original.affine)).get_fdata()[::-1, ::-1]
        for voxels in (segmentation, found.dataobj)
    )
    expected = np.zeros_like(whole)
    starts = [int((extent - 32) / 2) if start is None else start for extent in lps[:2]]
    inside = tuple(slice(max(first, 0), max(first + 32, 0)) for first in starts)
    for index in run.slices.set_index("slice").loc[rows, "index"]:
        expected[(*inside, index)] = whole[(*inside, index)]
    assert len(np.unique(expected)) == 4
    np.testing.assert_array_equal(mine, expected)
    assert (expected != whole).any(), "other slices are 0"


@pytest.mark.parametrize("form", ["sform", "qform", "nifti2"])
def test_orientation_stays_as_it_was_said_and_nothing_that_names_a_patient(tmp_path: Path, form: str) -> None:
    write_case(tmp_path / "patients", (21, 25, 8), "PIR", True, form)
    grid = load_grid(tmp_path / "patients" / CASE / f"{CASE}_t1.nii.gz")
    assert grid.lps_shape == (21, 25, 8)
    labels = np.zeros(grid.lps_shape, np.uint8)
    content = encode_labels(labels, grid)
    found = decoded(content)
    assert type(found.header) is type(grid.header)
    for code in ("qform_code", "sform_code"):
        assert found.header[code] == grid.header[code]
    np.testing.assert_array_equal(found.affine, grid.affine)
    assert found.get_data_dtype() == np.uint8
    assert found.header.get_slope_inter() in {(1.0, 0.0), (None, None)}
    assert b"Jane" not in gzip.decompress(content)
    assert encode_labels(labels, grid) == content


def test_prediction_and_regions_have_the_values_of_the_data_set(tiny_run: Run, tmp_path: Path) -> None:
    case = str(tiny_run.slices["case"].iloc[0])
    files = {path.name: path for path in export_label_maps(tiny_run, tmp_path, case)}
    assert sorted(files) == [f"{case}_prediction.nii.gz", f"{case}_regions.nii.gz", "labels.ctbl", "labels_itksnap.txt"]
    rows = rows_of(tiny_run, case)
    with torch.no_grad():
        odds = tiny_run.model("final")(torch.from_numpy(tiny_run.images(rows))).softmax(1).numpy()
    values = np.array([0, 1, 2, 4], np.uint8)
    confident = np.where(odds.max(1) > tiny_run.config.regions.threshold, odds.argmax(1), 0)
    for kind, planes in (("prediction", odds.argmax(1)), ("regions", confident)):
        image = nib.load(files[f"{case}_{kind}.nii.gz"])
        assert set(np.unique(image.dataobj)) <= {0, 1, 2, 4}
        turned = nib.as_closest_canonical(image).get_fdata()[::-1, ::-1]
        extent = turned.shape[0] - 32
        assert extent > 0
        assert turned.shape[1] > 32
        i, j = ((n - 32) // 2 for n in turned.shape[:2])
        for plane, index in zip(planes, tiny_run.slices.set_index("slice").loc[rows, "index"], strict=True):
            np.testing.assert_array_equal(turned[i : i + 32, j : j + 32, index], values[plane].T)
        assert (turned != 0).sum() == (planes != 0).sum() > 0


def test_colours_are_those_of_the_figures_in_both_tables(tiny_run: Run, tmp_path: Path) -> None:
    list(export_label_maps(tiny_run, tmp_path, str(tiny_run.slices["case"].iloc[0])))
    slicer = (tmp_path / "labels.ctbl").read_text().splitlines()
    assert slicer[1:] == [
        "0 Background 0 0 0 0", "1 NCR/NET 230 159 0 255", "2 ED 86 180 233 255", "4 ET 0 158 115 255"
    ]  # fmt: skip
    lines = [line.split(maxsplit=7) for line in (tmp_path / "labels_itksnap.txt").read_text().splitlines()]
    described = [line for line in lines if not line[0].startswith("#")]
    assert [line[0] for line in described] == ["0", "1", "2", "4"]
    assert described[3] == ["4", "0", "158", "115", "1", "1", "1", '"ET"']


def test_without_the_original_it_says_where_it_was(tmp_path: Path) -> None:
    write_case(tmp_path / "patients", (21, 25, 8), "RAS", False, "sform")
    run = prepared(tmp_path)
    labels = run.labels(rows_of(run, CASE))
    source = tmp_path / "patients" / CASE / f"{CASE}_t1.nii.gz"
    source.write_bytes(nib.Nifti1Image(np.ones((4, 5, 6), np.uint8), np.eye(4)).to_bytes())
    with pytest.raises(ValueError, match=r"expected the image that was cut, of shape \(21, 25, 8\) in LPS, found \(4,"):
        label_map(run, CASE, labels)
    source.unlink()
    with pytest.raises(ValueError, match=rf"{CASE}: expected the original image at {source}, .* put the patients back"):
        label_map(run, CASE, labels)


def test_the_command_writes_all_patients_or_one(tiny_run: Run, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["nifti", "--run", tiny_run.uri, "--out", str(tmp_path / "all")])
    assert done.exit_code == 0, done.stderr
    cases = set(tiny_run.slices["case"])
    assert len(list((tmp_path / "all").glob("*.nii.gz"))) == 2 * len(cases)
    unknown = CliRunner().invoke(app, ["nifti", "--run", tiny_run.uri, "--out", str(tmp_path), "--patient", "nobody"])
    assert unknown.exit_code == 2
    assert "no patient 'nobody' in this run; there are 6" in unknown.stderr

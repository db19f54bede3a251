"""Discovery: every layout by its names alone, and one clear line for every case that can't be used."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ray_tracin.config import DataConfig
from ray_tracin.folders import Case, Skipped, decide_dialect, find_cases

OLD = ("t1", "t1ce", "t2", "flair", "seg")
NEW = ("t1n", "t1c", "t2w", "t2f", "seg")
MODALITIES = ("t1", "t1ce", "t2", "flair")


def add_case(folder: Path, endings: Sequence[str] = OLD, separator: str = "_", extension: str = ".nii.gz") -> Path:
    folder.mkdir(parents=True)
    for ending in endings:
        (folder / f"{folder.name}{separator}{ending}{extension}").write_bytes(b"never opened here")
    return folder


def found(root: Path, **settings: object) -> tuple[list[Case], list[Skipped]]:
    return find_cases(DataConfig.model_validate({"root": str(root), **settings}))


def message(root: Path, **settings: object) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        found(root, **settings)
    return str(caught.value)


def only_reason(root: Path, **settings: object) -> str:
    """The reason of the one case that is skipped beside a sound one."""
    add_case(root / "BraTS2021_99999")
    cases, skipped = found(root, **settings)
    assert [case.case for case in cases] == ["BraTS2021_99999"]
    assert len(skipped) == 1
    assert "\n" not in skipped[0].reason
    return skipped[0].reason


@pytest.mark.parametrize(
    ("path", "endings", "separator", "patient", "grade"),
    [
        ("HGG/Brats17_TCIA_654_1", OLD, "_", "Brats17_TCIA_654_1", "HGG"),
        ("LGG/Brats18_CBICA_ALU_1", OLD, "_", "Brats18_CBICA_ALU_1", "LGG"),
        ("MICCAI_BraTS_2019_Data_Training/HGG/BraTS19_CBICA_AAB_1", OLD, "_", "BraTS19_CBICA_AAB_1", "HGG"),
        ("Mirror/Mirror/HGG/BraTS19_CBICA_AAB_1", OLD, "_", "BraTS19_CBICA_AAB_1", "HGG"),
        ("MICCAI_BraTS2020_TrainingData/BraTS20_Training_001", OLD, "_", "BraTS20_Training_001", None),
        ("BraTS2021_00000", OLD, "_", "BraTS2021_00000", None),
        ("ASNR-MICCAI-BraTS2023/BraTS-GLI-00008-001", NEW, "-", "BraTS-GLI-00008", None),
        ("BraTS-GLI-00005-100", NEW, "-", "BraTS-GLI-00005", None),
    ],
)
def test_editions_are_told_by_their_names(
    tmp_path: Path, path: str, endings: Sequence[str], separator: str, patient: str, grade: str | None
) -> None:
    folder = add_case(tmp_path / path, endings, separator)
    cases, skipped = found(tmp_path)
    name = folder.name
    assert skipped == []
    assert cases == [
        Case(
            case=name,
            patient=patient,
            grade=grade,
            modalities={
                modality: folder / f"{name}{separator}{ending}.nii.gz"
                for modality, ending in zip(MODALITIES, endings, strict=False)
            },
            label=folder / f"{name}{separator}seg.nii.gz",
            source=str(folder),
        )
    ]


def test_cases_are_sorted_and_noise_is_ignored(tmp_path: Path) -> None:
    for name in ("BraTS2021_00003", "BraTS2021_00001", "BraTS2021_00002"):
        (add_case(tmp_path / name) / ".DS_Store").write_bytes(b"")
    for noise in (".DS_Store", "survival_data.csv", "Readme.md"):
        (tmp_path / noise).write_text("x")
    (tmp_path / "empty").mkdir()
    cases, skipped = found(tmp_path)
    assert [case.case for case in cases] == ["BraTS2021_00001", "BraTS2021_00002", "BraTS2021_00003"]
    assert skipped == []


def test_the_root_may_be_one_grade_or_one_case(tmp_path: Path) -> None:
    folder = add_case(tmp_path / "HGG" / "BraTS19_X_1")
    for root in (tmp_path / "HGG", folder):
        assert [case.case for case in found(root)[0]] == ["BraTS19_X_1"]
    assert found(tmp_path / "HGG")[0][0].grade == "HGG"


def test_time_points_are_cases_of_one_patient(tmp_path: Path) -> None:
    for name in ("BraTS-GLI-00008-000", "BraTS-GLI-00008-001", "BraTS-GLI-00009-000"):
        add_case(tmp_path / name, NEW, "-")
    assert [case.patient for case in found(tmp_path)[0]] == ["BraTS-GLI-00008", "BraTS-GLI-00008", "BraTS-GLI-00009"]


def test_what_macos_adds_to_an_archive_is_no_case(tmp_path: Path) -> None:
    folder = add_case(tmp_path / "data" / "BraTS2021_00000")
    for path in folder.iterdir():
        beside = tmp_path / "__MACOSX" / "BraTS2021_00000" / f"._{path.name}"
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(b"resource fork")
    cases, skipped = found(tmp_path)
    assert [case.source for case in cases] == [str(folder)]
    assert skipped == []


def test_a_folder_that_wraps_a_file_is_that_file(tmp_path: Path) -> None:
    folder = add_case(tmp_path / "BraTS2021_00000", ("t1", "t2", "flair"), extension=".nii")
    for ending, inside in (("t1ce", "00000057_brain_t1ce.nii"), ("seg", "00000057_final_seg.nii")):
        wrapped = folder / f"BraTS2021_00000_{ending}.nii"
        wrapped.mkdir()
        (wrapped / inside).write_bytes(b"x")
    cases, skipped = found(tmp_path)
    assert skipped == []
    assert [case.case for case in cases] == ["BraTS2021_00000"]
    assert cases[0].modalities["t1ce"].name == "00000057_brain_t1ce.nii"
    assert cases[0].label is not None
    assert cases[0].label.name == "00000057_final_seg.nii"


def test_a_wrapping_folder_with_two_files_is_refused(tmp_path: Path) -> None:
    folder = add_case(tmp_path / "BraTS2021_00000", ("t1", "t2", "flair", "seg"))
    add_case(folder / "BraTS2021_00000_t1ce.nii", ("a", "b"), extension=".nii")
    assert only_reason(tmp_path).startswith(
        "BraTS2021_00000_t1ce.nii is a folder: expected one NIfTI file in it, found"
    )


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("W39_1998.09.19_Segm.nii", "labels are read from W39_1998.09.19_Segm.nii, the nearest to *_seg.nii(.gz)"),
        ("tumour.nii.gz", "labels are read from tumour.nii.gz, the nearest to *_seg.nii(.gz)"),
    ],
)
def test_oddly_named_labels_are_found_and_noted(tmp_path: Path, name: str, note: str) -> None:
    folder = add_case(tmp_path / "BraTS20_Training_355", MODALITIES, extension=".nii")
    (folder / name).write_bytes(b"x")
    (case,), _ = found(tmp_path)
    assert case.label == folder / name
    assert case.notes == (note,)


def test_two_candidates_for_labels_are_refused(tmp_path: Path) -> None:
    folder = add_case(tmp_path / "case", MODALITIES)
    for name in ("a_segm.nii.gz", "b_segm.nii.gz"):
        (folder / name).write_bytes(b"x")
    reason = only_reason(tmp_path)
    assert reason == ("expected one file of labels such as *_seg.nii.gz, found a_segm.nii.gz, b_segm.nii.gz: keep one")


def test_a_modality_that_is_not_used_is_never_taken_for_labels(tmp_path: Path) -> None:
    add_case(tmp_path / "BraTS2021_00000", (*MODALITIES, "adc"))
    (case,), _ = found(tmp_path, modalities=["t1", "adc"])
    assert list(case.modalities) == ["t1", "adc"]
    assert case.label is None


def test_modalities_keep_the_order_of_the_configuration(tmp_path: Path) -> None:
    add_case(tmp_path / "BraTS2021_00000")
    (case,), _ = found(tmp_path, modalities=["flair", "t1"])
    assert [(name, path.name) for name, path in case.modalities.items()] == [
        ("flair", "BraTS2021_00000_flair.nii.gz"),
        ("t1", "BraTS2021_00000_t1.nii.gz"),
    ]


def test_a_missing_modality_is_one_line(tmp_path: Path) -> None:
    add_case(tmp_path / "BraTS-PED-00255-000", ("t1n", "t2w", "t2f"), "-")
    assert only_reason(tmp_path) == (
        "expected *_t1ce.nii(.gz) or *_t1c.nii(.gz) for t1ce, found BraTS-PED-00255-000-t1n.nii.gz, "
        "BraTS-PED-00255-000-t2f.nii.gz, BraTS-PED-00255-000-t2w.nii.gz: complete the case, "
        "or leave t1ce out of data.modalities"
    )


def test_two_files_of_one_modality_are_one_line(tmp_path: Path) -> None:
    folder = add_case(tmp_path / "BraTS2021_00000")
    (folder / "BraTS2021_00000_t1.nii").write_bytes(b"x")
    assert only_reason(tmp_path) == (
        "expected one file for t1, found BraTS2021_00000_t1.nii, BraTS2021_00000_t1.nii.gz: "
        "keep one, one examination a folder"
    )


def test_a_case_folder_without_images_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "BraTS2021_00007").mkdir()
    assert only_reason(tmp_path) == "expected NIfTI files, found none: extract the case again"


def test_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    add_case(tmp_path / os.fsdecode(b"M\xfcller"))
    assert only_reason(tmp_path) == (
        f"expected names in UTF-8, found {tmp_path}/M?ller/M?ller_flair.nii.gz: rename what holds a question mark"
    )
    (skipped,) = found(tmp_path)[1]
    assert (skipped.case, skipped.path) == ("M?ller", f"{tmp_path}/M?ller")


def test_images_of_no_known_name_are_one_line(tmp_path: Path) -> None:
    add_case(tmp_path / "imagesTr", [f"{n:04d}" for n in range(8)])
    reason = only_reason(tmp_path)
    assert "found imagesTr_0000.nii.gz" in reason
    assert "imagesTr_0005.nii.gz and 2 more; known layouts: " in reason


def test_strict_fails_on_the_first_that_is_skipped(tmp_path: Path) -> None:
    add_case(tmp_path / "BraTS2021_00000")
    (tmp_path / "BraTS2021_00007").mkdir()
    assert message(tmp_path, strict=True) == (
        "BraTS2021_00007 can't be used, and none may be left out: "
        "expected NIfTI files, found none: extract the case again"
    )


@contextmanager
def open_to_everyone() -> Iterator[Path]:
    """A folder with two cases, which anyone may read, and whose parents everyone may enter."""
    with TemporaryDirectory() as name:
        root = Path(name)
        for folder in (root, *(add_case(root / f"BraTS2021_0000{n}") for n in range(2))):
            folder.chmod(0o755)
        yield root


@pytest.mark.parametrize("mode", [0, 0o111, 0o444], ids=["closed", "unlisted", "unentered"])
def test_a_case_that_may_not_be_looked_into_is_an_error_that_names_it(mode: int) -> None:
    with open_to_everyone() as root:
        closed = root / "BraTS2021_00001"
        closed.chmod(mode)
        with without_privileges(), pytest.raises(PermissionError) as caught:
            found(root)
    assert str(caught.value) == (
        f"{closed}: can't be looked into (Permission denied): let the user that runs this read it, or keep it out of "
        "data.root"
    )


def test_a_folder_around_a_file_that_may_not_be_looked_into_is_an_error_too() -> None:
    with open_to_everyone() as root:
        folder = root / "BraTS2021_00001"
        (folder / "BraTS2021_00001_seg.nii.gz").unlink()
        wrapped = folder / "BraTS2021_00001_seg.nii"
        wrapped.mkdir(mode=0)
        with without_privileges(), pytest.raises(PermissionError, match=r"_seg\.nii: can't be looked into"):
            found(root)


@pytest.mark.parametrize("name", ["lost+found", "System Volume Information", "$RECYCLE.BIN", ".Trash-0"])
def test_what_disks_keep_for_themselves_is_no_case(name: str) -> None:
    with open_to_everyone() as root:
        (root / name).mkdir(mode=0)
        with without_privileges():
            cases, skipped = found(root, strict=True)
    assert (len(cases), skipped) == (2, [])


@contextmanager
def without_privileges() -> Iterator[None]:
    """As an ordinary user, whom permissions bind."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if mine == 0:
            os.seteuid(mine)


def test_a_link_loop_ends(tmp_path: Path) -> None:
    add_case(tmp_path / "BraTS2021_00000")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(found(tmp_path)[0]) == 1


# Roots that hold nothing


def test_a_root_that_is_not_set_or_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.root is not set: give the folder or CSV file of the patients; known"):
        find_cases(DataConfig())
    with pytest.raises(FileNotFoundError, match="does not exist on this machine: give a folder or CSV file that every"):
        found(tmp_path / "nowhere")


def test_an_empty_root_says_what_is_read(tmp_path: Path) -> None:
    text = message(tmp_path)
    assert text.startswith(
        f"{tmp_path} holds no case: the folder is empty; give the folder of the extracted data; known"
    )
    assert "folders of BraTS 2017 to 2024" in text


def test_a_root_of_other_things_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"x")
    assert "holds no case: found archive.zip; give the folder of the extracted data" in message(tmp_path)


def test_a_root_of_broken_cases_says_why(tmp_path: Path) -> None:
    add_case(tmp_path / "imagesTr", ("0000",))
    text = message(tmp_path)
    assert "holds no usable case; the first of 1 that can't be used, imagesTr: expected" in text
    assert "Medical Segmentation Decathlon trees are read through a CSV file" in text


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    first, second = (add_case(tmp_path / part / "BraTS2021_00000") for part in ("a", "b"))
    assert message(tmp_path).startswith(
        f"case BraTS2021_00000 is there twice, in {first} and {second}: point data.root at one copy"
    )


# Grade and cohort


def mapped_tree(root: Path) -> Path:
    for n in (1, 2, 3):
        add_case(root / f"BraTS20_Training_00{n}")
    (root / "name_mapping.csv").write_text(
        "Grade,BraTS_2017_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
        "HGG,Brats17_A_1,BraTS19_A_1,BraTS20_Training_001\n"
        "LGG,NA,BraTS19_B_1,BraTS20_Training_002\n"
        "HGG,NA,NA,BraTS20_Training_003\n"
    )
    return root


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 2, 3]),
        ({"grade": "HGG"}, [1, 3]),
        ({"grade": "LGG"}, [2]),
        ({"cohort": "brats2019"}, [1, 2]),
        ({"cohort": "brats2019", "grade": "HGG"}, [1]),
    ],
)
def test_grade_and_cohort_of_2020_come_from_the_name_mapping(
    tmp_path: Path, settings: dict[str, object], expected: list[int]
) -> None:
    cases, skipped = found(mapped_tree(tmp_path), **settings)
    assert [case.case for case in cases] == [f"BraTS20_Training_00{n}" for n in expected]
    assert skipped == []


def test_2019_itself_is_the_cohort(tmp_path: Path) -> None:
    add_case(tmp_path / "HGG" / "BraTS19_A_1")
    assert len(found(tmp_path, cohort="brats2019")[0]) == 1


def test_another_edition_cannot_tell_the_cohort(tmp_path: Path) -> None:
    add_case(tmp_path / "BraTS2021_00000")
    assert message(tmp_path, cohort="brats2019") == (
        "data.cohort brats2019 can't be told: 1 of 1 cases are not named BraTS19_… and no name_mapping.csv has the "
        "column BraTS_2019_subject_ID; use BraTS 2019 or 2020, or set data.cohort all"
    )


def test_grades_that_nobody_published_cannot_be_asked_for(tmp_path: Path) -> None:
    add_case(tmp_path / "BraTS2021_00000")
    assert message(tmp_path, grade="HGG").startswith(
        "data.grade HGG can't be told: expected folders HGG and LGG, a name"
    )


def test_a_case_without_grade_among_graded_ones_is_one_line(tmp_path: Path) -> None:
    add_case(tmp_path / "HGG" / "BraTS19_A_1")
    add_case(tmp_path / "BraTS19_B_1")
    cases, skipped = found(tmp_path, grade="HGG")
    assert [case.case for case in cases] == ["BraTS19_A_1"]
    assert skipped == [
        Skipped(
            "BraTS19_B_1",
            str(tmp_path / "BraTS19_B_1"),
            "data.grade HGG is asked for and its grade is unknown: add it, or set data.grade all",
        )
    ]


def test_a_filter_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    add_case(tmp_path / "HGG" / "BraTS19_A_1")
    assert message(tmp_path, grade="LGG").endswith("no case is left with data.grade LGG and data.cohort all")


# CSV


def test_quotes_that_are_never_closed_and_twin_columns_are_refused(tmp_path: Path) -> None:
    header = "patient,t1,t1ce,t2,flair,label\n"
    path = listing(tmp_path, header + 'a,"x,x,x,x,\nb,x,x,x,x,\n')
    with pytest.raises(ValueError, match=r"dataset\.csv, line 1: unexpected end of data: close or double its quotes"):
        find_cases(DataConfig(root=str(path)))
    path = listing(tmp_path, "patient,t1,t1ce,t2,flair,label, t1\na,x,x,x,x,,y\n")
    with pytest.raises(ValueError, match=r"expected different columns, found t1 twice"):
        find_cases(DataConfig(root=str(path)))


def listing(root: Path, text: str, name: str = "dataset.csv", encoding: str = "utf-8") -> Path:
    for file in ("a.nii.gz", "b.nii.gz", "l.nii.gz"):
        (root / file).write_bytes(b"x")
    (root / name).write_text(text, encoding=encoding)
    return root / name


def test_a_csv_file_lists_cases_with_paths_relative_to_it(tmp_path: Path) -> None:
    text = (
        "patient,adc,dwi,label,grade,case\nP1,a.nii.gz,b.nii.gz,l.nii.gz,HGG,P1-first\n\nP1,a.nii.gz,b.nii.gz,,,P1-x\n"
    )
    path = listing(tmp_path, text, "mine.csv", "utf-8-sig")
    cases, skipped = found(path, modalities=["adc", "dwi"])
    files = {"adc": tmp_path / "a.nii.gz", "dwi": tmp_path / "b.nii.gz"}
    assert skipped == []
    assert cases == [
        Case("P1-first", "P1", "HGG", files, tmp_path / "l.nii.gz", "mine.csv:2"),
        Case("P1-x", "P1", None, files, None, "mine.csv:4"),
    ]
    assert decide_dialect(cases) == "csv"


def test_a_folder_with_a_dataset_csv_is_read_through_it(tmp_path: Path) -> None:
    listing(tmp_path, "patient,t1,label\nP1,a.nii.gz,\n")
    add_case(tmp_path / "BraTS2021_00000")
    assert [case.case for case in found(tmp_path, modalities=["t1"])[0]] == ["P1"]
    assert [case.case for case in found(tmp_path / "BraTS2021_00000", modalities=["t1"])[0]] == ["BraTS2021_00000"]


def test_layout_brats_ignores_a_dataset_csv(tmp_path: Path) -> None:
    path = listing(tmp_path, "patient,t1,label\nP1,a.nii.gz,\n")
    for file in ("a.nii.gz", "b.nii.gz", "l.nii.gz"):
        (tmp_path / file).unlink()
    add_case(tmp_path / "BraTS2021_00000")
    assert [case.case for case in found(tmp_path, layout="brats")[0]] == ["BraTS2021_00000"]
    assert message(path, layout="brats").endswith("is a file, data.layout brats expects a folder: set data.layout csv")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("P1,,l.nii.gz", "expected a path for t1, found an empty cell: complete the row"),
        (",a.nii.gz,l.nii.gz", "expected a patient, found an empty cell: name the patient"),
        ("P1,gone.nii.gz,", "{root}/gone.nii.gz does not exist: paths are relative to {root}"),
        ("P1,a.nii.gz,gone.nii.gz", "{root}/gone.nii.gz does not exist: paths are relative to {root}"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_line(tmp_path: Path, row: str, reason: str) -> None:
    listing(tmp_path, f"patient,t1,label\nP0,a.nii.gz,\n{row}\n")
    cases, skipped = found(tmp_path, modalities=["t1"])
    assert [case.case for case in cases] == ["P0"]
    assert [(skip.path, skip.reason) for skip in skipped] == [("dataset.csv:3", reason.format(root=tmp_path))]


def test_csv_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = listing(tmp_path, "patient;t1;label\nP1;a.nii.gz;\n")
    assert message(path, modalities=["t1"]) == (
        f"{path} has no column patient, t1; found patient;t1;label: separate by commas, and "
        "name the columns of the images in data.modalities"
    )
    listing(tmp_path, "patient,t1,label\n")
    assert message(path, modalities=["t1"]) == (
        f"{path} lists no patient: expected a header and one row an examination"
    )
    listing(tmp_path, "patient,t1,label\nP1,a.nii.gz,\nP1,b.nii.gz,\n")
    assert "in a CSV file tell examinations of one patient apart by a column case" in message(path, modalities=["t1"])
    listing(tmp_path, "patient,t1,label\nMüller,a.nii.gz,\n", encoding="latin-1")
    assert message(path, modalities=["t1"]).startswith(
        f"{path}: expected text in UTF-8, found other bytes: save it as UTF-8 ("
    )
    assert "is a file that is no CSV file; known layouts" in message(tmp_path / "a.nii.gz")
    path.unlink()
    assert message(tmp_path, layout="csv").endswith("data.layout csv reads a CSV file or dataset.csv in the folder")


def test_scans_without_any_labels_need_no_column_for_them(tmp_path: Path) -> None:
    listing(tmp_path, "patient,t1\nP1,a.nii.gz\nP2,a.nii.gz\n")
    (tmp_path / "a.nii.gz").touch()
    cases, _ = found(tmp_path, modalities=["t1"])
    assert [(case.case, case.label) for case in cases] == [("P1", None), ("P2", None)]


def test_cases_whose_files_would_have_one_name_are_refused(tmp_path: Path) -> None:
    listing(tmp_path, "patient,t1,label\nP 1,a.nii.gz,\nP_1,b.nii.gz,\n")
    assert message(tmp_path, modalities=["t1"]) == (
        "cases 'P 1' of dataset.csv:2 and 'P_1' of dataset.csv:3 would both be called P_1 in the names of files: "
        "rename one"
    )


def test_time_points_in_a_csv_file_are_cases_of_one_patient(tmp_path: Path) -> None:
    names = ("BraTS-GLI-00010-000", "BraTS-GLI-00010-001", "BraTS-Bern-001", "BraTS-Bern-002")
    listing(tmp_path, "patient,t1,label\n" + "".join(f"{name},a.nii.gz,\n" for name in names))
    cases, _ = found(tmp_path, modalities=["t1"])
    assert {case.case: case.patient for case in cases} == {
        "BraTS-GLI-00010-000": "BraTS-GLI-00010",
        "BraTS-GLI-00010-001": "BraTS-GLI-00010",
        # Numbers of patients, not of their examinations.
        "BraTS-Bern-001": "BraTS-Bern-001",
        "BraTS-Bern-002": "BraTS-Bern-002",
    }


# What travels on


def test_cases_survive_json(tmp_path: Path) -> None:
    labelled = add_case(tmp_path / "HGG" / "Brats17_A_1", MODALITIES)
    (labelled / "W39_Segm.nii").write_bytes(b"x")
    add_case(tmp_path / "BraTS2021_00000", MODALITIES)
    cases, _ = found(tmp_path)
    assert {case.label is None for case in cases} == {True, False}
    assert [Case.from_json(json.loads(json.dumps(case.to_json()))) for case in cases] == cases


def test_names_since_2023_are_a_dialect_of_their_own(tmp_path: Path) -> None:
    add_case(tmp_path / "old" / "BraTS2021_00000")
    add_case(tmp_path / "new" / "BraTS-GLI-00008-000", NEW, "-")
    assert decide_dialect(found(tmp_path / "old")[0]) == "brats"
    assert decide_dialect(found(tmp_path / "new")[0]) == "brats2023"
    assert decide_dialect(found(tmp_path)[0]) == "brats2023"

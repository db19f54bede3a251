"""Phantom: synthetic patients written as BraTS writes them. Nobody's data, and not for diagnosis.

The one idea: an edition is a row of a table (`LAYOUTS`), names and label values; the patients are the same in all of
them (`glioma`), whether written alone or in a crowd, by one process or many. Every file says that it is synthetic: in
the name of the case, in the NIfTI header, and in a README.
"""

import csv
import gzip
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Int16, UInt8

from ray_tracin.glioma import MODALITIES, RC, Anatomy, Grade, render_patient
from ray_tracin.vocabulary import UsageError

Edition = Literal["2017", "2018", "2019", "2020", "2021", "2022", "2023", "2024", "csv"]
DESCRIPTION = b"synthetic phantom"
README = "README_PHANTOM.txt"
README_TEXT = """These patients are synthetic: rendered by ray_tracin's phantom, not acquired from anyone.
They exercise software. They say nothing about tumours, raters or scanners, and are not for diagnosis.
"""


@dataclass(frozen=True)
class Layout:
    """How an edition names and stores a case; ``{n}`` is the patient's number."""

    name: str
    grade_folders: bool = False
    suffixes: tuple[str, ...] = MODALITIES
    label: str = "seg"
    file: str = "{case}_{suffix}.nii.gz"
    values: tuple[int, ...] = (0, 1, 2, 4)
    """Label value of class id 0, 1, 2, …"""
    size: tuple[int, int, int] = (240, 240, 155)
    """Field of view, mm."""


_NEW, _NEW_FILE = ("t1n", "t1c", "t2w", "t2f"), "{case}-{suffix}.nii.gz"
LAYOUTS: dict[Edition, Layout] = {
    "2017": Layout("Brats17_PHANTOM_{n:03d}_1", grade_folders=True),
    "2018": Layout("Brats18_PHANTOM_{n:03d}_1", grade_folders=True),
    "2019": Layout("BraTS19_PHANTOM_{n:03d}_1", grade_folders=True),
    "2020": Layout("BraTS20_PHANTOM_{n:03d}"),
    "2021": Layout("BraTS2021_PHANTOM_{n:05d}"),
    # The challenge of 2022 used the files of 2021.
    "2022": Layout("BraTS2021_PHANTOM_{n:05d}"),
    "2023": Layout("BraTS-GLI-PHANTOM{n:05d}-000", suffixes=_NEW, file=_NEW_FILE, values=(0, 1, 2, 3)),
    "2024": Layout(
        "BraTS-GLI-PHANTOM{n:05d}-100", suffixes=_NEW, file=_NEW_FILE, values=(0, 1, 2, 3, 4), size=(182, 218, 182)
    ),
    "csv": Layout("PHANTOM_{n:03d}", label="label", file="{suffix}.nii.gz", values=(0, 1, 2, 3)),
}


def write_patients(
    folder: Path,
    patients: int,
    *,
    edition: Edition = "2019",
    seed: int = 0,
    spacing: float = 2.0,
    anatomy: Anatomy = "template",
    difficulty: float = 1.5,
    low_grade: int = 0,
) -> list[Path]:
    """The folders of so many synthetic patients, the last ``low_grade`` of them LGG, with the edition's tables.

    Takes about a second a patient at 2 mm. To spread the work call `reserve` once, `write_patient` for each and
    `write_tables` once: the files are the same bytes.

    Raises:
        ValueError: there is no patient to write, more low-grade patients than patients, an unknown edition, or a
            spacing out of range; or the folder holds something else.
    """
    grades = patient_grades(patients, low_grade)
    reserve(folder, grades, edition=edition)
    cases = [
        write_patient(
            folder,
            number,
            edition=edition,
            seed=seed,
            spacing=spacing,
            anatomy=anatomy,
            difficulty=difficulty,
            grade=grade,
        )
        for number, grade in enumerate(grades)
    ]
    write_tables(folder, grades, edition=edition)
    return cases


def patient_grades(patients: int, low_grade: int = 0) -> list[Grade]:
    """The grade of every patient by number: HGG, then ``low_grade`` times LGG.

    Raises:
        ValueError: there is no patient, or more low-grade patients than patients.
    """
    if patients < 1 or not 0 <= low_grade <= patients:
        raise ValueError(f"expected at least 1 patient and low_grade from 0 to it, got {patients} and {low_grade}")
    return ["HGG" if number < patients - low_grade else "LGG" for number in range(patients)]


def write_patient(
    folder: Path,
    number: int,
    *,
    edition: Edition = "2019",
    seed: int = 0,
    spacing: float = 2.0,
    anatomy: Anatomy = "template",
    difficulty: float = 1.5,
    grade: Grade = "HGG",
) -> Path:
    """The folder of one synthetic patient: four modalities and labels as gzipped NIfTI, each whole or not at all.

    Raises:
        ValueError: an unknown edition, or a spacing out of range.
    """
    layout = _layout(edition)
    patient = render_patient(
        number,
        size=layout.size,
        seed=seed,
        spacing=spacing,
        anatomy=anatomy,
        difficulty=difficulty,
        grade=grade,
        cavity=len(layout.values) > RC,
    )
    case = folder / _case(layout, number, grade)
    case.mkdir(parents=True, exist_ok=True)
    values = np.array(layout.values, dtype=np.uint8)[patient.classes]
    for suffix, voxels in zip((*layout.suffixes, layout.label), (*patient.images, values), strict=True):
        _write(case / layout.file.format(case=case.name, suffix=suffix), _nifti(voxels, patient.affine))
    return case


def reserve(folder: Path, grades: Sequence[Grade], *, edition: Edition = "2019") -> None:
    """Make a folder for synthetic patients, with the README that says what they are.

    Raises:
        UsageError: the folder holds something else: real patients must not be mixed with synthetic ones, nor these
            with others, which its tables would not list.
        ValueError: an unknown edition.
    """
    layout = _layout(edition)
    if folder.exists() and any(folder.iterdir()) and not (folder / README).exists():
        raise UsageError(
            f"expected a new or empty folder for synthetic patients, or one that has their {README}, found other files "
            f"in {folder}: give a folder of their own"
        )
    mine = {_case(layout, number, grade) for number, grade in enumerate(grades)}
    others = sorted({path.parent.relative_to(folder) for path in folder.rglob("*.nii.gz")} - mine)
    if others:
        raise UsageError(
            f"{folder} holds {len(others)} other synthetic patients, such as {others[0]}: give a folder of their own, "
            "or no fewer patients than it has, of its edition"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / README, README_TEXT.encode())


def write_tables(folder: Path, grades: Sequence[Grade], *, edition: Edition = "2019") -> None:
    """What lies beside the patients: ``name_mapping.csv`` or ``dataset.csv`` where the edition has one.

    Raises:
        ValueError: an unknown edition.
    """
    layout = _layout(edition)
    if edition == "csv":
        _write(folder / "dataset.csv", _table([_listing_row(layout, n, grade) for n, grade in enumerate(grades)]))
    elif edition in ("2019", "2020"):
        years = ("2019",) if edition == "2019" else ("2019", "2020")
        rows = [_mapping_row(years, n, grade) for n, grade in enumerate(grades)]
        _write(folder / "name_mapping.csv", _table(rows))


# Files


def _layout(edition: str) -> Layout:
    if edition not in LAYOUTS:
        raise ValueError(f"unknown edition {edition!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[edition]


def _case(layout: Layout, number: int, grade: Grade) -> Path:
    name = layout.name.format(n=number)
    return Path(grade, name) if layout.grade_folders else Path(name)


def _nifti(
    voxels: Int16[np.ndarray, "i j k"] | UInt8[np.ndarray, "i j k"], affine: Float64[np.ndarray, "4 4"]
) -> bytes:
    """A gzipped NIfTI-1 file; the same bytes for the same voxels."""
    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header["descrip"] = DESCRIPTION
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _write(path: Path, content: bytes) -> None:
    """The file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _mapping_row(years: Sequence[str], number: int, grade: Grade) -> dict[str, str]:
    """A row of ``name_mapping.csv``; every fourth patient of 2020 has no name of 2019."""
    names = {year: LAYOUTS[year].name.format(n=number) for year in years}  # type: ignore[index]
    if "2020" in names and number % 4 == 3:
        names["2019"] = "NA"
    return {"Grade": grade} | {f"BraTS_{year}_subject_ID": name for year, name in names.items()}


def _listing_row(layout: Layout, number: int, grade: Grade) -> dict[str, str]:
    case = layout.name.format(n=number)
    files = {name: f"{case}/{layout.file.format(case=case, suffix=name)}" for name in (*MODALITIES, layout.label)}
    return {"patient": case, **files, "grade": grade}


def _table(rows: Sequence[dict[str, str]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()

"""Discovery: which examinations a folder in a BraTS layout, or a CSV file, holds, and which can't be used.

The one idea: names decide. A folder that holds files named ``*_t1``, ``*-t1n`` and the like is an examination, however
deep it lies, so that every edition since 2017 and its mirrors are read by one rule. Every examination found ends up
as a `Case`, as a `Skipped` with its reason, or outside the grade and cohort that the configuration asks for.
No image is opened here: what the files hold is the business of `volumes`.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ray_tracin.config import DataConfig
from ray_tracin.vocabulary import CaseKey, UsageError

Dialect = Literal["brats", "brats2023", "csv"]
"""How a data set names its files: as BraTS did until 2022, as it does since 2023, or as a CSV file says."""

SUFFIXES: dict[str, tuple[str, ...]] = {
    "t1": ("t1", "t1n"),
    "t1ce": ("t1ce", "t1c"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2f"),
}
"""Modality → endings of its file names, until 2022 and since 2023; any other modality ends in its own name."""

FOREIGN = (".", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
"""How names begin of what systems leave in archives and on disks; it looks like damaged cases, or is closed."""
LISTING = "dataset.csv"
GRADES = ("HGG", "LGG")
KNOWN_LAYOUTS = (
    "known layouts: folders of BraTS 2017 to 2024, one an examination, with files such as "
    "CASE_t1.nii.gz or CASE-t1n.nii.gz; or a CSV file with the columns patient, one per modality, and label "
    "(nnU-Net and Medical Segmentation Decathlon trees are read through a CSV file)"
)

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_BRATS_NAME = re.compile(r"brats", re.IGNORECASE)
_TIME_POINT = re.compile(r"^(BraTS-.+\d{4,})-\d{3}$", re.IGNORECASE)
_NEW_NAME = re.compile(r"[-_](t1n|t1c|t2w|t2f)\.nii", re.IGNORECASE)
_ROW = re.compile(r"\.csv:\d+$", re.IGNORECASE)
_SUBJECT_COLUMN = re.compile(r"^BraTS_\d{4}_subject_ID$", re.IGNORECASE)
_COHORT_COLUMN = "BraTS_2019_subject_ID"


@dataclass(frozen=True)
class Case:
    """One examination: a file a modality and, where there is one, the file of its labels.

    ``source`` is the folder, or the line of the CSV file such as ``dataset.csv:3``; ``notes`` are oddities of the
    names that a reader of the results should know.
    """

    case: str
    patient: str
    grade: str | None
    modalities: Mapping[str, Path]
    label: Path | None
    source: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as receipts store them."""
        return {
            **asdict(self),
            "modalities": {name: str(path) for name, path in self.modalities.items()},
            "label": None if self.label is None else str(self.label),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Case":
        """The case that `to_json` wrote."""
        return cls(
            case=values["case"],
            patient=values["patient"],
            grade=values["grade"],
            modalities={name: Path(path) for name, path in values["modalities"].items()},
            label=None if values["label"] is None else Path(values["label"]),
            source=values["source"],
            notes=tuple(values["notes"]),
        )


@dataclass(frozen=True)
class Skipped:
    """An examination that can't be used; ``reason`` is one line: expected, found, what to do."""

    case: str
    path: str
    reason: str


def find_cases(config: DataConfig) -> tuple[list[Case], list[Skipped]]:
    """The examinations under ``data.root``, sorted by case, and those that were skipped.

    Grade comes from a folder named HGG or LGG, else from ``name_mapping.csv``, in a CSV file from the column
    ``grade``. Two time points of one patient (``BraTS-GLI-00008-000`` and ``-001``) are two cases of one patient.
    Nothing is opened: a truncated file is found by `volumes.inspect_case`.

    Raises:
        FileNotFoundError: ``data.root`` does not exist.
        PermissionError: a folder below it can't be listed or entered.
        UsageError: it is not set or holds no case; two cases have one name; or the grade or cohort asked for can't be
            told.
        ValueError: none of its cases can be used, or, under ``data.strict``, any is skipped.
    """
    root = existing_root(config)
    listing = _listing(root, config)
    if listing is not None:
        found = list(_listed_cases(listing, config))
        mapping: dict[str, dict[str, str]] = {}
    else:
        entries = list(_folders(root))
        found = [result for folder, files in entries if (result := _case(folder, files, root, config)) is not None]
        mapping = _name_mapping(path for _, files in entries for path in files if path.name == "name_mapping.csv")
    cases = [_graded(result, mapping) for result in found if isinstance(result, Case)]
    skipped = [result for result in found if isinstance(result, Skipped)]
    _refuse_nothing(cases, skipped, root)
    _refuse_twins(cases)
    cases = _of_cohort(_of_grade(cases, skipped, config), mapping, config)
    if not cases:
        raise UsageError(f"{root}: no case is left with data.grade {config.grade} and data.cohort {config.cohort}")
    if config.strict and skipped:
        raise ValueError(f"{skipped[0].case} can't be used, and none may be left out: {skipped[0].reason}")
    return sorted(cases, key=lambda case: case.case), sorted(skipped, key=lambda skip: (skip.case, skip.path))


def decide_dialect(cases: Iterable[Case]) -> Dialect:
    """How the files of these cases are named, which is evidence of what label 4 means."""
    cases = list(cases)
    if any(_ROW.search(case.source) for case in cases):
        return "csv"
    names = (path for case in cases for path in case.modalities.values())
    return "brats2023" if any(_NEW_NAME.search(str(path)) for path in names) else "brats"


def existing_root(config: DataConfig) -> Path:
    """``data.root``.

    Raises:
        UsageError: it is not set.
        FileNotFoundError: it does not exist.
    """
    if not config.root:
        raise UsageError(f"data.root is not set: give the folder or CSV file of the patients; {KNOWN_LAYOUTS}")
    root = Path(config.root).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"data.root {config.root} does not exist on this machine: give a folder or CSV file that every worker can "
            "read by this path (a shared or mounted file system)"
        )
    return root


def _listing(root: Path, config: DataConfig) -> Path | None:
    """The CSV file to read, or None where the tree itself is read."""
    listing = root / LISTING if root.is_dir() else root
    if config.layout == "brats":
        if not root.is_dir():
            raise UsageError(f"data.root {root} is a file, data.layout brats expects a folder: set data.layout csv")
        return None
    if config.layout == "auto" and root.is_dir() and not listing.exists():
        return None
    if not listing.is_file():
        raise FileNotFoundError(
            f"{listing} does not exist: data.layout csv reads a CSV file or {LISTING} in the folder"
        )
    if listing.suffix.lower() != ".csv":
        raise UsageError(f"data.root {root} is a file that is no CSV file; {KNOWN_LAYOUTS}")
    return listing


# The BraTS tree


def _folders(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder with its entries; a folder named like a NIfTI file counts as an entry and is not entered."""
    pending, seen = [root], set()
    while pending:
        folder = pending.pop()
        resolved = folder.resolve()
        if resolved in seen:  # links may form a loop
            continue
        seen.add(resolved)
        with _looking_into(folder):
            entries = sorted(path for path in folder.iterdir() if not path.name.startswith(FOREIGN))
            below = {path for path in entries if path.is_dir() and not _NIFTI.search(path.name)}
        pending.extend(path for path in reversed(entries) if path in below)
        yield folder, [path for path in entries if path not in below]


@contextmanager
def _looking_into(folder: Path) -> Iterator[None]:
    """Names the folder that this user may not list or enter: what it holds may be patients, whom nobody would miss."""
    try:
        yield
    except PermissionError as error:
        raise PermissionError(
            f"{folder}: can't be looked into ({error.strerror}): let the user that runs this read it, or keep it out "
            "of data.root"
        ) from None


def _case(folder: Path, entries: Sequence[Path], root: Path, config: DataConfig) -> Case | Skipped | None:
    """The examination of one folder, or None where the folder is none."""
    images = [path for path in entries if _NIFTI.search(path.name)]
    if not images:
        is_leaf = not any(path.is_dir() for path in folder.iterdir())
        named = folder != root and is_leaf and _BRATS_NAME.match(folder.name)
        return _skip(folder, "expected NIfTI files, found none: extract the case again") if named else None
    strange = next((path for path in images if _as_text(path) != str(path)), None)
    if strange is not None:
        return _skip(folder, f"expected names in UTF-8, found {_as_text(strange)}: rename what holds a question mark")
    files = {name: [path for path in images if _is_modality(path, name)] for name in config.modalities}
    if not any(files.values()):
        expected = ", ".join(_expected(name) for name in config.modalities)
        return _skip(folder, f"expected {expected}, found {_names(images)}; {KNOWN_LAYOUTS}")
    problem = next((line for name, paths in files.items() if (line := _modality_problem(name, paths, images))), None)
    if problem is not None:
        return _skip(folder, problem)
    try:
        used = {path for paths in files.values() for path in paths}
        label, notes = _label([path for path in images if path not in used])
        modalities = {name: _file(paths[0]) for name, paths in files.items()}
    except ValueError as error:
        return _skip(folder, str(error))
    return Case(folder.name, _patient(folder.name), _grade(folder, root), modalities, label, str(folder), notes)


def _skip(folder: Path, reason: str) -> Skipped:
    return Skipped(_as_text(folder.name), _as_text(folder), reason)


def _as_text(path: Path | str) -> str:
    """With question marks for what is no UTF-8, which no table can hold."""
    return str(path).encode(errors="replace").decode()


def _is_modality(path: Path, name: str) -> bool:
    stem = _NIFTI.sub("", path.name).lower()
    return any(stem == suffix or stem.endswith((f"_{suffix}", f"-{suffix}")) for suffix in _suffixes(name))


def _suffixes(name: str) -> tuple[str, ...]:
    return SUFFIXES.get(name.lower(), (name.lower(),))


def _expected(name: str) -> str:
    return " or ".join(f"*_{suffix}.nii(.gz)" for suffix in _suffixes(name))


def _names(paths: Sequence[Path], most: int = 6) -> str:
    shown = ", ".join(path.name for path in paths[:most])
    return f"{shown} and {len(paths) - most} more" if len(paths) > most else shown or "nothing"


def _modality_problem(name: str, paths: Sequence[Path], images: Sequence[Path]) -> str | None:
    if len(paths) == 1:
        return None
    if paths:
        return f"expected one file for {name}, found {_names(paths)}: keep one, one examination a folder"
    return (
        f"expected {_expected(name)} for {name}, found {_names(images)}: complete the case, "
        f"or leave {name} out of data.modalities"
    )


def _label(others: Sequence[Path]) -> tuple[Path | None, tuple[str, ...]]:
    """The label file, if any, and a note on it: named ``*seg``, or containing ``seg``, or the only one that is left."""
    known = [suffix for suffixes in SUFFIXES.values() for suffix in suffixes]
    others = [path for path in others if not any(_is_modality(path, suffix) for suffix in known)]
    exact = [path for path in others if _is_modality(path, "seg")]
    close = [path for path in others if "seg" in path.name.lower()]
    candidates = exact or close or others
    if not candidates:
        return None, ()
    if len(candidates) > 1:
        raise ValueError(f"expected one file of labels such as *_seg.nii.gz, found {_names(candidates)}: keep one")
    notes = () if exact else (f"labels are read from {candidates[0].name}, the nearest to *_seg.nii(.gz)",)
    return _file(candidates[0]), notes


def _file(path: Path) -> Path:
    """The file itself, where a mirror has wrapped it in a folder of its name."""
    if not path.is_dir():
        return path
    with _looking_into(path):
        inside = sorted(entry for entry in path.iterdir() if _NIFTI.search(entry.name) and not entry.is_dir())
    if len(inside) != 1:
        raise ValueError(f"{path.name} is a folder: expected one NIfTI file in it, found {_names(inside)}")
    return inside[0]


def _patient(case: str) -> str:
    match = _TIME_POINT.match(case)
    return match[1] if match else case


def _grade(folder: Path, root: Path) -> str | None:
    # The root's own name counts too: data.root may point at HGG itself.
    parts = (root.name, *folder.relative_to(root).parts)
    return next((part.upper() for part in reversed(parts) if part.upper() in GRADES), None)


def _name_mapping(paths: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Case → its row of ``name_mapping.csv``, under each name that an edition gave it."""
    rows: dict[str, dict[str, str]] = {}
    for path in paths:
        for _, row in _rows(path):
            names = [value for column, value in row.items() if _SUBJECT_COLUMN.match(column) and _is_given(value)]
            rows.update(dict.fromkeys(names, row))
    return rows


def _is_given(value: str) -> bool:
    return value.upper() not in ("", "NA", "N/A", "NAN")


# The CSV file


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and stripped values of every row that isn't blank."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            _refuse_twin_columns(path, [name.strip() for name in reader.fieldnames or ()])
            for row in reader:
                values = {str(column).strip(): str(value or "").strip() for column, value in row.items() if column}
                if any(values.values()):
                    yield reader.line_num, values
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: expected text in UTF-8, found other bytes: save it as UTF-8 ({error})") from None
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.line_num}: {error}: close or double its quotes") from None


def _refuse_twin_columns(path: Path, names: Sequence[str]) -> None:
    twins = sorted({name for name in names if name and names.count(name) > 1})
    if twins:
        raise UsageError(f"{path}: expected different columns, found {', '.join(twins)} twice: rename or remove one")


def _listed_cases(listing: Path, config: DataConfig) -> Iterator[Case | Skipped]:
    rows = list(_rows(listing))
    if not rows:
        raise UsageError(f"{listing} lists no patient: expected a header and one row an examination")
    missing = [name for name in ("patient", *config.modalities) if name not in rows[0][1]]
    if missing:
        raise UsageError(
            f"{listing} has no column {', '.join(missing)}; found {', '.join(rows[0][1])}: separate by commas, and "
            "name the columns of the images in data.modalities"
        )
    for line, row in rows:
        yield _listed_case(listing, line, row, config)


def _listed_case(listing: Path, line: int, row: Mapping[str, str], config: DataConfig) -> Case | Skipped:
    source = f"{listing.name}:{line}"
    patient = row["patient"]
    case = row.get("case") or patient
    if not patient:
        return Skipped(case or source, source, "expected a patient, found an empty cell: name the patient")
    empty = [name for name in config.modalities if not row[name]]
    if empty:
        return Skipped(case, source, f"expected a path for {', '.join(empty)}, found an empty cell: complete the row")
    modalities = {name: listing.parent / row[name] for name in config.modalities}
    label = listing.parent / row["label"] if row.get("label") else None
    absent = [path for path in (*modalities.values(), label) if path is not None and not path.exists()]
    if absent:
        return Skipped(case, source, f"{absent[0]} does not exist: paths are relative to {listing.parent}")
    return Case(case, _patient(patient), row.get("grade") or None, modalities, label, source)


# What the configuration asks for


def _graded(case: Case, mapping: Mapping[str, Mapping[str, str]]) -> Case:
    grade = mapping.get(case.case, {}).get("Grade", "")
    if case.grade is not None or not _is_given(grade):
        return case
    return Case(**{**vars(case), "grade": grade.upper()})


def _refuse_nothing(cases: Sequence[Case], skipped: Sequence[Skipped], root: Path) -> None:
    if cases:
        return
    if skipped:
        first = f"the first of {len(skipped)} that can't be used, {skipped[0].case}: {skipped[0].reason}"
        raise ValueError(f"{root} holds no usable case; {first}")
    entries = sorted(root.iterdir()) if root.is_dir() else []
    found = f"found {_names(entries)}" if entries else "the folder is empty"
    raise UsageError(f"{root} holds no case: {found}; give the folder of the extracted data; {KNOWN_LAYOUTS}")


def _refuse_twins(cases: Sequence[Case]) -> None:
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(str(CaseKey(case.case)), case)
        if other is case:
            continue
        if other.case != case.case:
            raise UsageError(
                f"cases {other.case!r} of {other.source} and {case.case!r} of {case.source} would both be called "
                f"{CaseKey(case.case)} in the names of files: rename one"
            )
        raise UsageError(
            f"case {case.case} is there twice, in {other.source} and {case.source}: point data.root at one copy, "
            "or in a CSV file tell examinations of one patient apart by a column case"
        )


def _of_grade(cases: list[Case], skipped: list[Skipped], config: DataConfig) -> list[Case]:
    """The cases of the grade asked for; those whose grade is unknown are skipped with a line."""
    if config.grade == "all":
        return cases
    unknown = [case for case in cases if case.grade is None]
    if len(unknown) == len(cases):
        raise UsageError(
            f"data.grade {config.grade} can't be told: expected folders HGG and LGG, a name_mapping.csv with a column "
            "Grade, or a column grade in the CSV file (BraTS publishes none since 2021); set data.grade all"
        )
    reason = f"data.grade {config.grade} is asked for and its grade is unknown: add it, or set data.grade all"
    skipped.extend(Skipped(case.case, case.source, reason) for case in unknown)
    return [case for case in cases if case.grade is not None and case.grade.upper() == config.grade]


def _of_cohort(cases: list[Case], mapping: Mapping[str, Mapping[str, str]], config: DataConfig) -> list[Case]:
    """The cases of the cohort asked for: named as BraTS 2019, or mapped to a 2019 name."""
    if config.cohort == "all":
        return cases
    of_2019 = {case.case for case in cases if case.case.lower().startswith("brats19_")}
    if len(of_2019) < len(cases) and not any(_COHORT_COLUMN in row for row in mapping.values()):
        raise UsageError(
            f"data.cohort brats2019 can't be told: {len(cases) - len(of_2019)} of {len(cases)} cases are not named "
            f"BraTS19_… and no name_mapping.csv has the column {_COHORT_COLUMN}; use BraTS 2019 or 2020, or set "
            "data.cohort all"
        )
    mapped = {name for name, row in mapping.items() if _is_given(row.get(_COHORT_COLUMN, ""))}
    return [case for case in cases if case.case in of_2019 | mapped]

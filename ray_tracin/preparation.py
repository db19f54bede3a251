"""The stages that turn patients into ``slices.zarr``: inspect every case, index the slices, cut them.

Every volume is read twice, once to be sure that it can be read and to collect its label values, once to be cut: only
the union of label values over the whole data set says what a label means, and rows can only be numbered once it is
known which cases there are. A case whose files hold no usable volumes is a row of ``skipped.parquet``; one whose bytes
can't be had is an error, as it may be sound.
"""

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from ray_tracin import store as paths
from ray_tracin.folders import Case, Skipped, decide_dialect, find_cases
from ray_tracin.nifti import VolumeError, reading
from ray_tracin.runs import Run
from ray_tracin.stages import Result, Stage
from ray_tracin.store import IncompleteRunError, Receipt
from ray_tracin.vocabulary import CaseKey, Split, UsageError
from ray_tracin.volumes import (
    Inspection,
    LabelScheme,
    cut_slices,
    decide_label_scheme,
    inspect_case,
    load_volume,
    split_patients,
)

SHOWN_CASES = 10
"""Cases that an error lists."""


@dataclass(frozen=True)
class Inspect(Stage[CaseKey]):
    """Read every case once: can it be used, which labels has it, which slices will be cut."""

    name: ClassVar[str] = "inspect"

    @cached_property
    def _cases(self) -> dict[CaseKey, Case]:
        """Once slices are numbered those that they are of: what becomes of the patients' folder doesn't matter then."""
        if self._numbered:
            cases = [Case.from_json(entry["case"]) for entry in _index(self.run)["cases"].values()]
        else:
            cases, _ = find_cases(self.run.config.data)
        return {CaseKey(case.case): case for case in cases}

    def keys(self) -> Sequence[CaseKey]:
        """The cases of the data set; once slices are numbered, the data set is what was inspected."""
        keys = list(self._cases)
        if not self._numbered:
            return keys
        used, receipts = {str(key) for key in keys}, self.run.store.receipts(self.name)
        # Of a case that was gone by then there may be one of a configuration that the run began with.
        mine = [name for name, receipt in receipts.items() if receipt.fingerprint == self.run.fingerprint]
        return [*keys, *(CaseKey(name) for name in mine if name not in used)]

    def stale(self, key: CaseKey, receipt: Receipt) -> bool:
        """Whether a file of the case has been replaced, as long as slices aren't numbered: later it is too late."""
        return not self._numbered and receipt.result.get("files") != _states(self._cases[key])

    @cached_property
    def _numbered(self) -> bool:
        return self.run.store.read_receipt(Index.name, "slices") is not None

    def open(self) -> Callable[[CaseKey], Result]:
        """The inspection of a case, or why it is skipped; and the states of its files before they were read."""
        cases, data = self._cases, self.run.config.data

        def inspect(key: CaseKey) -> Result:
            files = _states(cases[key])
            _require_all(cases[key], files)
            try:
                return {"files": files, "inspection": inspect_case(cases[key], data).to_json()}
            except VolumeError as error:
                if data.strict:
                    raise
                return {"files": files, "skipped": asdict(Skipped(key.case, cases[key].source, str(error)))}

        return inspect


@dataclass(frozen=True)
class Index(Stage[str]):
    """Number the slices, settle what the labels mean and who is in which split, and create the arrays."""

    name: ClassVar[str] = "index"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """One key: rows are numbered all at once."""
        return ["slices"]

    def open(self) -> Callable[[str], Result]:
        """Write ``skipped.parquet`` and the metadata of the arrays; the result holds the index."""
        return lambda _: self._index()

    def _index(self) -> Result:
        config, store = self.run.config, self.run.store
        inspections, skipped = usable_cases(self.run)
        if config.data.strict and skipped:
            first = skipped[0]
            raise ValueError(f"{first['case']} can't be used, and none may be left out: {first['reason']}")
        reasons = _reasons(skipped)
        if not inspections:
            raise ValueError(f"none of the {len(skipped)} cases in {config.data.root} can be used:{reasons}")
        # Whatever is missing may be in what was left out.
        left_out = f"; {len(skipped)} cases were left out:{reasons}" if skipped else ""
        labelled = sorted({found.case.patient for found in inspections if found.case.label is not None})
        if not labelled:
            raise ValueError(
                f"no case in {config.data.root} has a segmentation: training and influence need ground truth "
                f"(BraTS: a file ending in seg.nii.gz in each folder; CSV: a `label` column){left_out}"
            )
        values = {value for found in inspections for value in found.label_values}
        try:
            scheme = decide_label_scheme(values, config.data, decide_dialect(found.case for found in inspections))
        except ValueError as error:
            raise UsageError(f"{error}\n  {_holders(inspections)}") from None
        try:
            splits = split_patients(labelled, config.split, config.seed)
        except ValueError as error:
            raise ValueError(f"{error}{left_out}") from None
        result = {"cases": _numbered(inspections, splits), "scheme": [scheme.name, list(scheme.classes.items())]}
        self._refuse_no_queries(result)
        self._refuse_other_numbers(result)
        store.write_table(paths.SKIPPED, pd.DataFrame(skipped, columns=["case", "path", "reason"]).astype(str))
        self._create_arrays(sum(len(found.indices) for found in inspections), scheme)
        return result

    def _refuse_no_queries(self, result: Result) -> None:
        """Nothing, unless only test queries are to be explained and there is none, which shows after training else."""
        config = self.run.config
        others = any(entry["split"] != "train" for entry in result["cases"].values())
        if not others and "train" not in config.influence.query_sets:
            raise UsageError(
                "influence.query_sets=[test] expects test queries, and there is none: split.validation and split.test "
                f"are 0, and every case of {config.data.root} that can be used has a segmentation. Give one of the two "
                "a share, or explain the train slices with influence.query_sets=[train]"
            )

    def _refuse_other_numbers(self, result: Result) -> None:
        """Nothing, unless slices were numbered before, and otherwise: whatever the run holds goes by those numbers."""
        former = self.run.store.read_receipt(self.name, "slices")
        if former is None or former.fingerprint != self.run.fingerprint:
            return
        if former.result != json.loads(json.dumps(result)):
            raise ValueError(
                f"a file of {self.run.uri} that is made with the index of slices was lost or damaged, and "
                f"{self.run.config.data.root} holds other patients by now, which would number the slices otherwise: "
                "put the patients back as they were, or begin a new run"
            )

    def _create_arrays(self, slices: int, scheme: LabelScheme) -> None:
        data, store = self.run.config.data, self.run.store
        size, channels = data.size, len(data.modalities)
        names = {"modalities": list(data.modalities), "classes": list(scheme.classes.values())}
        store.create_group("slices.zarr", names)
        store.create_array(
            paths.IMAGES,
            shape=(slices, channels, size, size),
            chunks=(1, channels, size, size),
            dtype="float32",
            dimensions=("slice", "modality", "h", "w"),
            attributes=names,
        )
        store.create_array(
            paths.LABELS,
            shape=(slices, size, size),
            chunks=(1, size, size),
            dtype="uint8",
            dimensions=("slice", "h", "w"),
            attributes=names,
        )


@dataclass(frozen=True)
class Cut(Stage[CaseKey]):
    """Cut every case into its rows of ``slices.zarr`` and count the pixels of every class."""

    name: ClassVar[str] = "cut"

    def keys(self) -> Sequence[CaseKey]:
        """The cases that are used."""
        return [CaseKey(case) for case in _index(self.run)["cases"]]

    def open(self) -> Callable[[CaseKey], Result]:
        """Load a volume, cut its slices, write them."""
        store, data, scheme = self.run.store, self.run.config.data, label_scheme(self.run)
        entries = _index(self.run)["cases"]

        def cut(key: CaseKey) -> Result:
            entry = entries[key.case]
            slices = cut_slices(load_volume(Case.from_json(entry["case"])), entry["indices"], scheme, data)
            rows = slice(entry["first_row"], entry["first_row"] + len(entry["indices"]))
            labels = np.zeros_like(slices.images[:, 0], np.uint8) if slices.labels is None else slices.labels
            store.write(paths.IMAGES, (rows,), slices.images)
            store.write(paths.LABELS, (rows,), labels)
            return {"pixels": [[int((plane == c + 1).sum()) for c in range(len(scheme.classes))] for plane in labels]}

        return cut


@dataclass(frozen=True)
class TabulateSlices(Stage[str]):
    """Write ``slices.parquet``, one row a slice."""

    name: ClassVar[str] = "slices"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """One key: the table is written whole."""
        return ["slices"]

    def open(self) -> Callable[[str], Result]:
        """Join the index with the pixel counts."""

        def tabulate(_: str) -> Result:
            counted = {key: receipt.result for key, receipt in self.run.store.receipts(Cut.name).items()}
            rows = [row for entry in _index(self.run)["cases"].values() for row in _slice_rows(entry, counted)]
            self.run.store.write_table(paths.SLICES, pd.DataFrame(rows).astype({"grade": "string"}))
            return {"slices": len(rows)}

        return tabulate


def usable_cases(run: Run) -> tuple[list[Inspection], list[dict[str, str]]]:
    """The cases that can be used, and a row for each that is skipped, both by case."""
    cases, unreadable = find_cases(run.config.data)
    receipts = run.store.receipts(Inspect.name)
    # Of a case that is gone by now there may be a receipt, of one that came meanwhile none.
    held = [(case, receipt.result) for case in cases if (receipt := receipts.get(str(CaseKey(case.case)))) is not None]
    # Whose examination it is a CSV file may tell otherwise by now.
    usable = [
        replace(Inspection.from_json(result["inspection"]), case=case)
        for case, result in held
        if "inspection" in result
    ]
    skipped = [dict(result["skipped"]) for _, result in held if "skipped" in result]
    skipped += [asdict(case) for case in unreadable]
    labelled = {one.case.patient for one in usable if one.case.label is not None}
    # An examination without ground truth is only a query: were its patient trained on, it would explain itself.
    leaking = [one.case for one in usable if one.case.label is None and one.case.patient in labelled]
    reason = "has no segmentation, and its patient has another examination that has one: add a segmentation"
    skipped += [asdict(Skipped(case.case, case.source, reason)) for case in leaking]
    dropped = {case.case for case in leaking}
    kept = [one for one in usable if one.case.case not in dropped]
    return sorted(kept, key=lambda one: one.case.case), sorted(skipped, key=lambda row: row["case"])


def label_scheme(run: Run) -> LabelScheme:
    """What the label values of this run mean.

    Raises:
        IncompleteRunError: the slices are not indexed yet.
    """
    name, classes = _index(run)["scheme"]
    return LabelScheme(name, {int(value): str(label) for value, label in classes})


def case_slices(run: Run, case: str) -> tuple[Case, range, tuple[int, ...]]:
    """The files of a case, its rows in ``slices.zarr``, and their positions on the slicing axis.

    Raises:
        IncompleteRunError: the slices are not indexed yet.
    """
    entry = _index(run)["cases"][case]
    indices = tuple(int(index) for index in entry["indices"])
    return Case.from_json(entry["case"]), range(entry["first_row"], entry["first_row"] + len(indices)), indices


def _index(run: Run) -> Mapping[str, Any]:
    receipt = run.store.read_receipt(Index.name, "slices")
    if receipt is None:
        raise IncompleteRunError(f"the slices of {run.uri} are not indexed: run `ray-tracin prepare --run {run.uri}`")
    return receipt.result


def _numbered(inspections: Sequence[Inspection], splits: Mapping[str, Split]) -> dict[str, Any]:
    entries, row = {}, 0
    for found in inspections:
        case = found.case
        entries[case.case] = {
            "case": case.to_json(),
            "indices": list(found.indices),
            "first_row": row,
            # Without ground truth a slice can be explained, never trained on or evaluated.
            "split": splits[case.patient] if case.label is not None else "test",
            "warnings": list(found.warnings),
        }
        row += len(found.indices)
    return entries


def _slice_rows(entry: Mapping[str, Any], counted: Mapping[str, Result]) -> list[dict[str, Any]]:
    case = Case.from_json(entry["case"])
    pixels = counted[str(CaseKey(case.case))]["pixels"]
    return [
        {
            "slice": entry["first_row"] + position,
            "patient": case.patient,
            "case": case.case,
            "grade": case.grade,
            "split": entry["split"],
            "index": index,
            "labelled": case.label is not None,
            "warnings": "; ".join(entry["warnings"]),
            **{f"pixels_{c}": count for c, count in enumerate(pixels[position], start=1)},
            "source": case.source,
        }
        for position, index in enumerate(entry["indices"])
    ]


def _states(case: Case) -> dict[str, list[int]]:
    """Size and time of the last change of every file of a case; without those that aren't there."""
    states: dict[str, list[int]] = {}
    for path in _files(case):
        with suppress(FileNotFoundError, NotADirectoryError), reading(path):
            state = path.stat()
            states[str(path)] = [state.st_size, state.st_mtime_ns]
    return states


def _files(case: Case) -> list[Path]:
    return [*case.modalities.values(), *([] if case.label is None else [case.label])]


def _reasons(skipped: Sequence[Mapping[str, str]]) -> str:
    """Why the first of the cases were left out, a line each."""
    told = [row["reason"].removeprefix(f"{row['case']}: ") for row in skipped[:SHOWN_CASES]]
    lines = [f"\n  {row['case']}: {reason}" for row, reason in zip(skipped, told, strict=False)]
    return "".join(lines) + (f"\n  … and {len(skipped) - SHOWN_CASES} more" if len(skipped) > SHOWN_CASES else "")


def _require_all(case: Case, there: Mapping[str, list[int]]) -> None:
    """Nothing, if the files of a case are where its driver has seen them: else the node is at fault, not the case."""
    gone = next((path for path in _files(case) if str(path) not in there), None)
    if gone is None:
        return
    here = socket.gethostname()
    if gone.is_symlink():
        raise FileNotFoundError(
            f"{gone} is a link to {gone.readlink()}, which is not on {here}: fetch the file or mount its disk, or take "
            "the case out of data.root"
        )
    raise FileNotFoundError(
        f"{gone} was there when the cases were listed, and is not on {here}: every node must see data.root (a volume, "
        "a mount, or the image)"
    )


def _holders(inspections: Sequence[Inspection]) -> str:
    """Which cases hold which label values: a stray one shows by the few that have it."""
    values = sorted({value for found in inspections for value in found.label_values if value})
    holders = {value: [found.case.case for found in inspections if value in found.label_values] for value in values}
    return "; ".join(
        f"{value} is in {len(cases)} of {len(inspections)} cases, such as {cases[0]}"
        for value, cases in holders.items()
    )

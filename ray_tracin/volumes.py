"""Volumes: NIfTI files of one examination → one LPS volume → normalised slices with classes 1 to C.

The one idea: after `load_volume` every examination has the same axes, ``i`` toward the left, ``j`` toward the back and
``k`` toward the top of the patient (LPS), so that ``volume[:, :, k].T`` is an axial slice in the radiological
convention: row 0 is anterior, column 0 is the patient's right. Whatever can't be used is a `VolumeError` of one line.
Which files form an examination is the business of `folders`, their bytes that of `nifti`; this module knows no run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Integer, Shaped, UInt8

from ray_tracin.config import DataConfig, SliceSelection, SplitConfig
from ray_tracin.folders import Case, Dialect
from ray_tracin.nifti import Affine, Scan, VolumeError, Voxels, align, load_scan, lps_grid
from ray_tracin.vocabulary import MOST_CLASSES, Split

LABEL_TOLERANCE = 1e-3
"""Largest distance of a label from an integer; segmentations that went through float hold 2.99999."""
MOST_NEGATIVE = 0.01
"""Share of an image's voxels that aren't 0 above which negative ones get a warning; interpolation leaves a few."""
MOST_OBLONG = 1.5
"""How much longer than the other one side of a pixel of an axial slice may be without a warning."""
BACKGROUND = -1.0
"""Value of images outside the brain and outside the volume."""

AnyArray = Shaped[np.ndarray, "..."]
Labels = Int32[np.ndarray, "i j k"]

NCR, ED, ET = "NCR/NET", "ED", "ET"
SCHEMES: dict[str, dict[int, str]] = {
    "brats": {1: NCR, 2: ED, 4: ET},
    "brats2023": {1: NCR, 2: ED, 3: ET},
    "brats2024": {1: "NETC", 2: "SNFH", 3: "ET", 4: "RC"},
    # Necrosis and oedema are swapped there; the classes keep their order.
    "msd": {2: NCR, 1: ED, 3: ET},
    "nnunet": {2: NCR, 1: ED, 3: ET},
}
"""Scheme → label value → class name, in class order. ET is 4 until 2022, 3 since; 4 is a resection cavity in 2024."""


@dataclass(frozen=True)
class Volume:
    """One examination in LPS: intensities as stored, label values as stored, voxel → world (RAS, mm) affine."""

    images: Float32[np.ndarray, "modality i j k"]
    labels: Labels | None
    affine: Affine
    warnings: tuple[str, ...]
    case: str


@dataclass(frozen=True)
class Inspection:
    """What a full read of one examination found: label values, the slices to cut, the LPS shape, warnings."""

    case: Case
    label_values: tuple[int, ...]
    indices: tuple[int, ...]
    shape: tuple[int, int, int]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as receipts store them."""
        return {
            "case": self.case.to_json(),
            "label_values": list(self.label_values),
            "indices": list(self.indices),
            "shape": list(self.shape),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Inspection":
        """The inspection that `to_json` wrote."""
        i, j, k = values["shape"]
        return cls(
            case=Case.from_json(values["case"]),
            label_values=tuple(values["label_values"]),
            indices=tuple(values["indices"]),
            shape=(i, j, k),
            warnings=tuple(values["warnings"]),
        )


@dataclass(frozen=True)
class LabelScheme:
    """What label values mean: value → class name in class order; ``class_id`` is the position + 1."""

    name: str
    classes: Mapping[int, str]


@dataclass(frozen=True)
class CutSlices:
    """Axial slices, row 0 anterior and column 0 right: images in [−1, 1], labels 0..C (None: no ground truth)."""

    images: Float32[np.ndarray, "slice modality h w"]
    labels: UInt8[np.ndarray, "slice h w"] | None


def load_volume(case: Case) -> Volume:
    """The examination reoriented to LPS, modalities in the order of the case.

    Files of one examination share a grid. Where a file's affine disagrees with the first modality's by more than
    1e-3 the first one is trusted and a warning says so. Nothing is resampled, normalised or cropped.

    Raises:
        VolumeError: a file is empty, truncated or no 3D NIfTI; shapes differ; a voxel is not finite; a modality has no
            positive voxel; a label is negative or no integer.
        OSError: a file can't be read.
    """
    warnings = list(case.notes)
    scans = {name: load_scan(path) for name, path in case.modalities.items()}
    reference = next(iter(scans.values()))
    images = np.stack([_aligned(scan, reference, warnings) for scan in scans.values()])
    for scan, image in zip(scans.values(), images, strict=True):
        if not (image > 0).any():
            raise VolumeError(f"{scan.path}: expected an image, found no positive voxel: download the case again")
        negative = np.count_nonzero(image < 0) / np.count_nonzero(image)
        if negative > MOST_NEGATIVE:
            warnings.append(
                f"{scan.path.name}: {negative:.0%} of its voxels that aren't 0 are negative and become background; "
                "intensities are expected as they were acquired, not normalised"
            )
    if not reference.stated:
        warnings.append(f"{reference.path.name}: its header states no orientation; left and right are a guess (LAS)")
    labels = None if case.label is None else _integers(load_scan(case.label), reference, warnings)
    if labels is not None and not labels.any():
        warnings.append("the segmentation is empty: no voxel is labelled")
    return Volume(images, labels, lps_grid(reference.voxels.shape, reference.affine)[1], tuple(warnings), case.case)


def inspect_case(case: Case, config: DataConfig) -> Inspection:
    """What a full read of the case finds, after everything that cutting will do except for naming its classes.

    Raises:
        VolumeError: as `load_volume`, and where the slices asked for can't be chosen, cropped or scaled.
        OSError: as `load_volume`.
    """
    volume = load_volume(case)
    indices = choose_slices(volume, config.slices)
    _cut_images(volume, indices, config)
    values = () if volume.labels is None else tuple(int(value) for value in np.unique(volume.labels))
    i, j, k = volume.images.shape[1:]
    return Inspection(case, values, indices, (i, j, k), (*volume.warnings, *cutting_warnings(volume, indices, config)))


def cutting_warnings(volume: Volume, indices: Sequence[int], config: DataConfig) -> Iterator[str]:
    """What cutting these slices makes of the case that nobody would expect."""
    right, back, _ = np.linalg.norm(volume.affine[:3, :3], axis=0)
    if max(right, back) > MOST_OBLONG * min(right, back):
        yield (
            f"its voxels are {right:.3g} × {back:.3g} mm in the axial plane, in which slices are cut and never "
            "resampled: it looks as if acquired in another plane"
        )
    if volume.labels is None or not volume.labels.any():
        return
    if not _crop(_planes(volume.labels, indices), config, volume.case).any():
        there = np.flatnonzero(volume.labels.any(axis=(0, 1)))
        yield (
            f"none of its {np.count_nonzero(volume.labels)} labelled voxels is in what is cut (they are in slices "
            f"{there[0]} to {there[-1]}): it counts as one without a lesion; data.slices.selection=tumour or a larger "
            "data.size would have it"
        )


def choose_slices(volume: Volume, selection: SliceSelection) -> tuple[int, ...]:
    """Ascending positions on the slicing axis: ``central``, ``tumour``, ``largest`` or ``list``.

    ``central`` starts at ``n//2 − count//2``. ``tumour`` centres the same window on the area-weighted mean position of
    the labels, within the volume. ``largest`` takes the slices with most labelled pixels, of equals the nearest to that
    mean. A label of any value counts.

    Raises:
        VolumeError: the volume has fewer slices than asked for, or no labels where they are needed.
    """
    length = volume.images.shape[3]
    if selection.selection == "list":
        return _listed(selection.indices, length, volume.case)
    if selection.count > length:
        raise VolumeError(
            f"{volume.case}: expected at least {selection.count} slices, found {length}: lower data.slices.count"
        )
    if selection.selection == "central":
        return _window(length // 2, selection.count, length)
    areas = _areas(volume, selection.selection)
    centre = float(np.average(np.arange(length), weights=areas))
    if selection.selection == "tumour":
        return _window(round(centre), selection.count, length)
    distance = np.abs(np.arange(length) - centre)
    return tuple(sorted(int(k) for k in np.lexsort((distance, -areas))[: selection.count]))


def decide_label_scheme(values: Iterable[int], config: DataConfig, dialect: Dialect) -> LabelScheme:
    """What label values mean, decided once, on the union of the values of the whole data set.

    ``data.labels`` decides if given, then ``data.label_scheme``. ``auto`` reads {1, 2, 4} as BraTS until 2022 and
    {1, 2, 3} as BraTS 2023; a CSV file is not assumed to be BraTS: its values are classes in ascending order.

    Raises:
        ValueError: nothing is labelled, or the values don't tell the scheme (3 and 4 together, above all), or the one
            asked for lacks some; or a CSV file's data set has more than 255.
    """
    found = sorted(set(values) - {0})
    if config.labels is not None:
        return _knowing(LabelScheme("labels", dict(config.labels)), found)
    if config.label_scheme != "auto":
        return _knowing(LabelScheme(config.label_scheme, SCHEMES[config.label_scheme]), found)
    if not found:
        raise ValueError("no voxel of the data set is labelled: training and influence need ground truth")
    if dialect == "csv":
        if len(found) > MOST_CLASSES:
            raise ValueError(f"expected at most {MOST_CLASSES} label values, found {len(found)}: is it a label map?")
        return LabelScheme("auto", {value: f"class {value}" for value in found})
    name = _brats_scheme(found, dialect)
    return LabelScheme(name, SCHEMES[name])


def cut_slices(volume: Volume, indices: Sequence[int], scheme: LabelScheme, config: DataConfig) -> CutSlices:
    """The slices at ``indices``, cropped or padded to ``data.size``, scaled to [−1, 1], labels mapped to 0..C.

    ``percentile``: ``2·clip(x, 0, p)/p − 1`` with ``p`` the percentile of the non-zero voxels of the modality's whole
    volume. ``maximum``: the same with ``p`` the maximum of the cropped slab of these slices, as the authors' code
    does. Background, padding and negative voxels are −1.

    Raises:
        VolumeError: a label value that the scheme doesn't know (anywhere in the volume), or a crop or scale that the
            volume doesn't allow.
    """
    images = _cut_images(volume, indices, config)
    if volume.labels is None:
        return CutSlices(images, None)
    classes = _class_ids(volume.labels, scheme, volume.case)
    return CutSlices(images, np.ascontiguousarray(_crop(_planes(classes, indices), config, volume.case)))


def paste_slices(
    planes: Integer[np.ndarray, "slice h w"], indices: Sequence[int], shape: tuple[int, int, int], config: DataConfig
) -> Integer[np.ndarray, "i j k"]:
    """The LPS volume of a shape from which slices were cut, with labels back in their places; 0 everywhere else.

    The inverse of `cut_slices`: what was cropped away is 0, what was padded is dropped.
    """
    volume = np.zeros(shape, planes.dtype)
    columns, rows, _ = shape
    (to_rows, from_rows), (to_columns, from_columns) = (_uncropped(extent, config) for extent in (rows, columns))
    for plane, k in zip(planes, indices, strict=True):
        volume[to_columns, to_rows, k] = plane[from_rows, from_columns].T
    return volume


def _uncropped(extent: int, config: DataConfig) -> tuple[slice, slice]:
    """Where the crop of an axis lies in the volume, and that part in the crop."""
    start = _crop_start(extent, config)
    first, last = max(start, 0), min(start + config.size, extent)
    return slice(first, last), slice(first - start, last - start)


def _crop_start(extent: int, config: DataConfig) -> int:
    """The first position of the crop on an axis; below 0 where it is padded."""
    return int((extent - config.size) / 2) if config.crop_start is None else config.crop_start


def split_patients(patients: Sequence[str], split: SplitConfig, seed: int) -> dict[str, Split]:
    """Patient → train, validation or test; depends on the set of patients and the seed, not on their order.

    Shares are rounded to whole patients; a share above 0 gets at least one, and so does training.

    Raises:
        ValueError: there are too few patients for that.
    """
    names = sorted(set(patients))
    shares = (split.validation, split.test)
    validation, test = (max(1, round(len(names) * share)) if share > 0 else 0 for share in shares)
    needed = 1 + (validation > 0) + (test > 0)
    if len(names) < needed:
        raise ValueError(
            f"expected at least {needed} patients to split by split.validation {split.validation} and split.test "
            f"{split.test} and still train, found {len(names)}: add patients or lower the shares"
        )
    while validation + test >= len(names):  # both were rounded up
        validation, test = (validation - 1, test) if validation > test else (validation, test - 1)
    places = np.random.default_rng(seed % 2**63).permutation(len(names))
    return {
        name: "validation" if place < validation else "test" if place < validation + test else "train"
        for name, place in zip(names, places, strict=True)
    }


# Grids and labels as stored


def _aligned(scan: Scan, reference: Scan, warnings: list[str]) -> Voxels:
    voxels, warning = align(scan, reference)
    if warning is not None:
        warnings.append(warning)
    return voxels


def _integers(scan: Scan, reference: Scan, warnings: list[str]) -> Labels:
    """The labels as integers in LPS, on the grid of the reference."""
    values = _aligned(scan, reference, warnings)
    rounded: Voxels = np.rint(values)
    off = np.abs(values - rounded) >= LABEL_TOLERANCE
    if off.any() or rounded.min() < 0:
        wrong = values[off | (rounded < 0)].flat[0]
        raise VolumeError(
            f"{scan.path}: expected labels 0, 1, 2, …, found {wrong:g}: export it as a label map, without interpolation"
        )
    return rounded.astype(np.int32)


# Slices


def _listed(indices: Sequence[int], length: int, case: str) -> tuple[int, ...]:
    if max(indices) >= length:
        raise VolumeError(f"{case}: expected slice {max(indices)}, found slices 0 to {length - 1}: choose from these")
    return tuple(sorted(indices))


def _window(centre: int, count: int, length: int) -> tuple[int, ...]:
    start = min(max(centre - count // 2, 0), length - count)
    return tuple(range(start, start + count))


def _areas(volume: Volume, selection: str) -> Integer[np.ndarray, "k"]:
    """Labelled pixels of every slice."""
    if volume.labels is None or not volume.labels.any():
        raise VolumeError(
            f"{volume.case}: expected labels for data.slices.selection {selection}, found "
            f"{'no segmentation' if volume.labels is None else 'an empty segmentation'}: use central or list"
        )
    return np.asarray(np.count_nonzero(volume.labels, axis=(0, 1)))


def _planes(voxels: Shaped[np.ndarray, "*leading i j k"], indices: Sequence[int]) -> AnyArray:
    """``… i j k`` → ``slice … h w``: h from anterior to posterior, w from right to left."""
    return np.stack([voxels[..., k].swapaxes(-1, -2) for k in indices])


def _cut_images(
    volume: Volume, indices: Sequence[int], config: DataConfig
) -> Float32[np.ndarray, "slice modality h w"]:
    slab = _crop(_planes(volume.images, indices), config, volume.case)
    tops = [
        _top(volume.images[m], slab[:, m], config, f"{volume.case}, {name}") for m, name in enumerate(config.modalities)
    ]
    upper = np.asarray(tops, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray(2 * (np.clip(slab, 0, upper) / upper) + np.float32(BACKGROUND))


def _top(volume: Voxels, slab: Float32[np.ndarray, "slice h w"], config: DataConfig, where: str) -> float:
    """The intensity that becomes 1."""
    if config.intensity == "maximum":
        top = float(slab.max())
    else:
        top = float(np.percentile(volume[volume != 0], config.percentile))
    if top <= 0:
        raise VolumeError(
            f"{where}: expected a positive upper end of the scale ({config.intensity}), found {top:g}: "
            "check the image, data.slices and data.intensity"
        )
    return top


def _crop(
    planes: Shaped[np.ndarray, "*leading rows columns"], config: DataConfig, case: str
) -> Shaped[np.ndarray, "*leading h w"]:
    """A square of ``data.size`` from ``data.crop_start``, or around the centre; what lies outside is 0."""
    size, first = config.size, config.crop_start
    rows, columns = planes.shape[-2:]
    if first is not None and not 0 <= first <= min(rows, columns) - size:
        raise VolumeError(
            f"{case}: expected rows and columns {first} to {first + size - 1}, found slices of {rows} × {columns}: "
            "set data.crop_start null or another data.size"
        )
    for axis, extent in ((-2, rows), (-1, columns)):
        planes = _crop_axis(planes, axis, _crop_start(extent, config), size)
    return planes


def _crop_axis(planes: AnyArray, axis: int, start: int, size: int) -> AnyArray:
    extent = planes.shape[axis]
    kept = planes.take(range(max(start, 0), min(start + size, extent)), axis)
    before = max(-start, 0)
    widths = [(0, 0)] * planes.ndim
    widths[axis] = (before, size - before - kept.shape[axis])
    return np.pad(kept, widths)


# Labels


def _brats_scheme(found: Sequence[int], dialect: Dialect) -> str:
    """The BraTS edition that these label values can only come from."""
    advice = (
        "set data.label_scheme to brats (4 is ET, until 2022), brats2023 (3 is ET) or brats2024 (3 is ET, 4 the "
        "resection cavity), or data.labels to a map of value → name"
    )
    if not set(found) <= {1, 2, 3, 4}:
        raise ValueError(f"label values {found} fit no BraTS edition (1 to 4): {advice}")
    if {3, 4} <= set(found):
        raise ValueError(
            f"label values {found} allow two meanings of 4: ET until 2022, where there is no 3, and the resection "
            f"cavity in 2024, where 3 is ET; or two editions lie in one folder. They are never merged: {advice}"
        )
    if 4 in found and dialect == "brats2023":
        raise ValueError(
            f"label values {found} hold 4 in files named as since 2023 (t1n, t1c, t2w, t2f), where 3 is ET and 4 the "
            f"resection cavity: {advice}"
        )
    if found == [1]:
        raise ValueError(
            "the only label value is 1, as in a mask of the whole tumour, where BraTS has 1, 2 and 4 or 3: set "
            "data.labels={1: tumour}, or data.label_scheme if it is the necrotic core of BraTS"
        )
    return "brats2023" if 3 in found or dialect == "brats2023" else "brats"


def _knowing(scheme: LabelScheme, found: Iterable[int]) -> LabelScheme:
    """The scheme, if it has all of some label values."""
    unknown = sorted(set(found) - {*scheme.classes})
    if unknown:
        raise ValueError(
            f"label values {unknown} are not in the scheme {scheme.name} {dict(scheme.classes)}: add them to "
            "data.labels, choose another data.label_scheme, or mend the segmentations"
        )
    return scheme


def _class_ids(labels: Labels, scheme: LabelScheme, case: str) -> UInt8[np.ndarray, "i j k"]:
    """Label values → class ids; every value of the volume must be known, not only those on the slices."""
    unknown = sorted({int(value) for value in np.unique(labels)} - {0, *scheme.classes})
    if unknown:
        raise VolumeError(
            f"{case}: label values {unknown} are not in the scheme {scheme.name} {dict(scheme.classes)}: add them to "
            "data.labels, choose another data.label_scheme, or mend the segmentation"
        )
    ids = np.zeros(labels.shape, np.uint8)
    for class_id, value in enumerate(scheme.classes, start=1):
        ids[labels == value] = class_id
    return ids

"""NIfTI files: one file → a 3D array with its affine, and that array turned to LPS; label maps back on a file's grid.

The one idea: the bytes decide, never the name. What claims to be gzip and isn't, was cut off in a download, or holds no
volume is a `VolumeError` of one line. Bytes that can't be had decide nothing: that is an `OSError`. This module knows
neither modalities nor labels nor examinations.
"""

import gzip
import math
import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Float64, Integer
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ray_tracin.vocabulary import ReadError

Voxels = Float32[np.ndarray, "i j k"]
Stored = Float32[np.ndarray, "a b c"]
"""Voxels with their axes as in the file."""
Affine = Float64[np.ndarray, "4 4"]

AFFINE_TOLERANCE = 1e-3
"""Difference of two affines (mm) below which they are one."""
GZIP_MAGIC = b"\x1f\x8b"
NIFTI2_HEADER_SIZE = 540


class VolumeError(ValueError):
    """An examination can't be used; one line with the file, what was expected, what was found, what to do."""


@dataclass(frozen=True)
class Scan:
    """One file as stored: voxels after the header's scaling, affine voxel → world (RAS, mm).

    ``stated``: the header gives an orientation; without one NIfTI readers assume LAS.
    """

    path: Path
    voxels: Stored
    affine: Affine
    stated: bool


def load_scan(path: Path) -> Scan:
    """The 3D volume of a NIfTI-1 or NIfTI-2 file, gzipped or not by its first bytes; trailing axes of 1 are dropped.

    Raises:
        VolumeError: the file is empty, truncated, no NIfTI file or not 3D; a voxel is not finite; or the affine doesn't
            orient three axes.
        OSError: as `reading`.
    """
    image, voxels = _decoded(path)
    stated = bool(image.header["sform_code"] or image.header["qform_code"])
    return Scan(path, _three_axes(voxels, path), _oriented(image.affine, path), stated)


def _decoded(path: Path) -> tuple[Any, Float32[np.ndarray, "..."]]:
    """The image as nibabel reads it, and its voxels."""
    content = _content(path)
    try:
        image = (nib.Nifti2Image if _is_nifti2(content) else nib.Nifti1Image).from_bytes(content)
        _require_voxels(image, len(content))
        return image, image.get_fdata(dtype=np.float32)
    except (ImageFileError, HeaderDataError, WrapStructError, OSError, OverflowError, ValueError, TypeError) as error:
        raise VolumeError(
            f"{path}: expected a whole NIfTI file, found {len(content)} bytes that are none: download it again "
            f"({_one_line(error)})"
        ) from None


def _require_voxels(image: Any, there: int) -> None:
    """Nothing, if there are as many bytes as the header tells: a damaged one can ask for more memory than there is."""
    voxels = math.prod(int(length) for length in image.shape) * int(image.get_data_dtype().itemsize)
    if int(image.dataobj.offset) + voxels > there:
        raise ValueError(f"its header tells of {voxels} bytes of voxels from byte {image.dataobj.offset} on")


@dataclass(frozen=True)
class Grid:
    """The voxel grid of a file: shape as stored, affine voxel → world (RAS, mm), and the header that says so."""

    path: Path
    shape: tuple[int, int, int]
    affine: Affine
    header: Any

    @property
    def lps_shape(self) -> tuple[int, int, int]:
        """The shape of the volume that `reorient` makes of the file."""
        return lps_grid(self.shape, self.affine)[0]


def load_grid(path: Path) -> Grid:
    """The grid of a 3D NIfTI file.

    Raises:
        VolumeError, OSError: as `load_scan`.
    """
    image, voxels = _decoded(path)
    a, b, c = _three_axes(voxels, path).shape
    return Grid(path, (a, b, c), _oriented(image.affine, path), image.header)


def encode_labels(labels: Integer[np.ndarray, "i j k"], grid: Grid) -> bytes:
    """A gzipped NIfTI file of an LPS label map, with the axes, affine and orientation codes of the grid's own file.

    The inverse of `reorient`: every voxel is where it was. Nothing else of the header is kept (descriptions and
    extensions can name a patient). The same labels give the same bytes.
    """
    assert labels.shape == grid.lps_shape, f"labels of shape {labels.shape} on a grid of {grid.lps_shape}"
    own = nib.orientations.io_orientation(grid.affine)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(("L", "P", "S")), own)
    stored = np.ascontiguousarray(nib.orientations.apply_orientation(labels, back))
    header = grid.header.copy()
    header.set_data_dtype(stored.dtype)
    header.set_intent("none")
    header["descrip"], header["aux_file"] = b"label map", b""
    header["cal_min"] = header["cal_max"] = 0
    if "db_name" in header:
        header["db_name"] = b""
    del header.extensions[:]
    kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    content: bytes = kind(stored, grid.affine, header).to_bytes()
    return gzip.compress(content, mtime=0)


def reorient(voxels: Stored, affine: Affine) -> tuple[Voxels, Affine]:
    """The voxels with their axes toward left, posterior and superior, and the affine of the turned array.

    Axes are permuted and flipped to the nearest of these directions; nothing is resampled.
    """
    turned = nib.orientations.apply_orientation(voxels, _to_lps(affine))
    return np.ascontiguousarray(turned), lps_grid(voxels.shape, affine)[1]


def lps_grid(shape: Sequence[int], affine: Affine) -> tuple[tuple[int, int, int], Affine]:
    """The shape and the affine that `reorient` gives to voxels of this shape, without any."""
    turn = _to_lps(affine)
    i, j, k = (int(shape[axis]) for axis in np.argsort(turn[:, 0]))
    return (i, j, k), affine @ nib.orientations.inv_ornt_aff(turn, shape)


def _to_lps(affine: Affine) -> Any:
    """For each axis its place among the axes toward left, posterior and superior, and whether it is flipped."""
    target = nib.orientations.axcodes2ornt(("L", "P", "S"))
    return nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), target)


def align(scan: Scan, reference: Scan) -> tuple[Voxels, str | None]:
    """The scan's voxels in LPS on the grid of the reference, and a warning where the two headers disagree.

    Two files may store one grid with different axes; then each is turned by its own affine, also where they are less
    than a voxel apart. Where they are farther apart and the files store equal shapes, an affine was lost: the scan is
    turned as the reference is. Nothing is resampled.

    Raises:
        VolumeError: the shapes differ.
    """
    own, own_affine = reorient(scan.voxels, scan.affine)
    expected_shape, expected_affine = lps_grid(reference.voxels.shape, reference.affine)
    shift = float(np.abs(own_affine - expected_affine).max())
    if own.shape == expected_shape and shift < AFFINE_TOLERANCE:
        return own, None
    near = own.shape == expected_shape and shift < nib.affines.voxel_sizes(reference.affine).min()
    if not near and scan.voxels.shape != reference.voxels.shape:
        raise VolumeError(
            f"{scan.path}: expected shape {reference.voxels.shape} as {reference.path.name} has, found "
            f"{scan.voxels.shape}: register and resample the files of a case to one grid"
        )
    trusted = reference.path.name
    warning = f"{scan.path.name}: its affine differs from that of {trusted} by up to {shift:.3g}; {trusted} is trusted"
    return own if near else reorient(scan.voxels, reference.affine)[0], warning


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tells errors of the system in one line: which file, where, why, what to do.

    Raises:
        VolumeError: there is a folder in place of the file.
        FileNotFoundError, NotADirectoryError, PermissionError: for the user to mend.
        ReadError: whatever else the system says, which may pass.
    """
    try:
        yield
    except IsADirectoryError:
        raise VolumeError(f"{path}: expected a file, found a folder: put the file in its place") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise type(error)(
            f"{path}: can't be read ({error.strerror}): check that the file is there, and that the user that runs this "
            "may read it"
        ) from None
    except OSError as error:
        raise ReadError(
            f"{path}: can't be read on {socket.gethostname()} ({error.strerror}): check its disk or mount, or put "
            "another copy there, and run the same command again"
        ) from None


def _content(path: Path) -> bytes:
    """The bytes of the file, unzipped if they are gzip."""
    with reading(path):
        data = path.read_bytes()
    if not data:
        raise VolumeError(f"{path}: expected a NIfTI file, found 0 bytes: download it again")
    if not data.startswith(GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError(
            f"{path}: expected a whole gzip file, found {len(data)} bytes that are cut off or damaged: "
            f"download it again ({_one_line(error)})"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_nifti2(content: bytes) -> bool:
    sizes = (int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big"))
    return NIFTI2_HEADER_SIZE in sizes


def _three_axes(voxels: Float32[np.ndarray, "..."], path: Path) -> Stored:
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or not voxels.size:
        raise VolumeError(f"{path}: expected a 3D volume, found shape {voxels.shape}: write one 3D file a modality")
    unusable = int((~np.isfinite(voxels)).sum())
    if unusable:
        raise VolumeError(f"{path}: expected finite voxels, found {unusable} NaN or infinite: export it again")
    return voxels


def _oriented(affine: Any, path: Path) -> Affine:
    matrix = np.asarray(affine, dtype=np.float64)
    # A zero column makes nibabel leave an axis without a direction.
    if not np.isfinite(matrix).all() or np.isnan(nib.orientations.io_orientation(matrix)).any():
        raise VolumeError(
            f"{path}: expected an affine that orients three axes, found {matrix.tolist()}: repair its header"
        )
    return matrix

"""NIfTI files: the bytes decide, anatomy survives any storage order, and every broken file is one clear line."""

import errno
import gzip
import os
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ray_tracin.nifti import VolumeError, align, load_grid, load_scan, reorient
from ray_tracin.vocabulary import ReadError

SHAPE = (4, 5, 6)
LPS = np.array([[-1.0, 0, 0, 3], [0, -1, 0, 4], [0, 0, 1, 0], [0, 0, 0, 1]])


def encoded(voxels: np.ndarray, affine: np.ndarray = LPS) -> bytes:
    return nib.Nifti1Image(voxels, affine).to_bytes()


def flattened(content: bytes) -> bytes:
    """The file with an affine that gives its third axis no direction: srow_z, bytes 312 to 328 of the header, is 0."""
    return content[:312] + bytes(16) + content[328:]


def damaged(byte: int, values: np.ndarray) -> bytes:
    """A whole file with other values from a byte of its header on."""
    content = encoded(ramp())
    return content[:byte] + values.tobytes() + content[byte + values.nbytes :]


def ramp(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype=np.int16).reshape(shape)


def reason(path: Path) -> str:
    with pytest.raises(VolumeError) as caught:
        load_scan(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.img"])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_bytes_decide_not_the_name(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(encoded(ramp())) if zipped else encoded(ramp()))
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.voxels, ramp())
    np.testing.assert_array_equal(scan.affine, LPS)
    assert scan.stated


def test_nifti_2_scaling_and_trailing_axes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    path.write_bytes(nib.Nifti2Image(ramp((2, 3, 4, 1, 1)), LPS).to_bytes())
    np.testing.assert_array_equal(load_scan(path).voxels, ramp((2, 3, 4)))
    image = nib.Nifti1Image(ramp(), LPS)
    image.header.set_slope_inter(0.5, 2)
    content = bytearray(image.to_bytes())
    # nibabel resets the slope when it writes: bytes 112 to 120 of the header hold slope and intercept.
    content[112:120] = np.array([0.5, 2], dtype="<f4").tobytes()
    path.write_bytes(bytes(content))
    np.testing.assert_array_equal(load_scan(path).voxels, ramp() * 0.5 + 2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a NIfTI file, found 0 bytes: download it again"),
        (b"<html>No access</html>", "expected a whole NIfTI file, found 22 bytes that are none: download it again ("),
        (b"\x00" * 400, "expected a whole NIfTI file, found 400 bytes that are none: download it again ("),
        (encoded(ramp())[:400], "expected a whole NIfTI file, found 400 bytes that are none: download it again ("),
        (
            gzip.compress(encoded(ramp()), mtime=0)[:-12],
            f"expected a whole gzip file, found {len(gzip.compress(encoded(ramp()), mtime=0)) - 12} bytes that are cut "
            "off or damaged: download it again (",
        ),
        (b"\x1f\x8bno", "expected a whole gzip file, found 4 bytes that are cut off or damaged: download it again ("),
        (gzip.compress(b"text"), "expected a whole NIfTI file, found 4 bytes that are none: download it again ("),
        (
            damaged(40, np.array([3, 32000, 32000, 32000], "<i2")),
            "expected a whole NIfTI file, found 592 bytes that are none: download it again (its header tells of "
            "65536000000000 bytes of voxels from byte 352 on)",
        ),
        (damaged(108, np.array([1e20], "<f4")), "expected a whole NIfTI file, found 592 bytes that are none: "),
        (encoded(ramp((2, 3, 4, 5))), "expected a 3D volume, found shape (2, 3, 4, 5): write one 3D file a modality"),
        (encoded(ramp((3, 4))), "expected a 3D volume, found shape (3, 4): write one 3D file a modality"),
        (
            encoded(np.where(ramp() < 3, np.nan, 1).astype(np.float32)),
            "expected finite voxels, found 2 NaN or infinite: export it again",
        ),
        (
            flattened(encoded(ramp())),
            "expected an affine that orients three axes, found [[-1.0, 0.0, 0.0, 3.0], [0.0, -1.0, 0.0, 4.0], "
            "[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]: repair its header",
        ),
    ],
    ids=[
        "empty", "html", "zeros", "cut nifti", "cut gzip", "false gzip", "zipped text", "huge", "far", "4d", "2d",
        "nan", "flat",
    ],
)  # fmt: skip
def test_broken_files_are_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "x_t1.nii.gz"
    path.write_bytes(content)
    text = reason(path)
    # In brackets stands what the decoder said.
    assert text.startswith(expected) if expected.endswith(("(", ": ")) else text == expected


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    assert reason(tmp_path) == "expected a file, found a folder: put the file in its place"


MEND = "check that the file is there, and that the user that runs this may read it"
WAIT = "check its disk or mount, or put another copy there, and run the same command again"


@pytest.mark.parametrize(
    ("number", "kind", "expected"),
    [
        (errno.ENOENT, FileNotFoundError, f"can't be read (No such file or directory): {MEND}"),
        (errno.EACCES, PermissionError, f"can't be read (Permission denied): {MEND}"),
        (errno.EIO, ReadError, f"can't be read on {socket.gethostname()} (Input/output error): {WAIT}"),
        (errno.ESTALE, ReadError, f"can't be read on {socket.gethostname()} (Stale file handle): {WAIT}"),
        (errno.EMFILE, ReadError, f"can't be read on {socket.gethostname()} (Too many open files): {WAIT}"),
    ],
)
def test_bytes_that_cannot_be_had_say_nothing_of_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[OSError], expected: str
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    for load in (load_scan, load_grid):
        with pytest.raises(OSError) as caught:
            load(tmp_path / "x.nii")
        assert type(caught.value) is kind
        assert str(caught.value) == f"{tmp_path / 'x.nii'}: {expected}"


def test_a_header_without_orientation_is_told(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(), LPS)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    path = tmp_path / "x.nii"
    path.write_bytes(image.to_bytes())
    assert not load_scan(path).stated


# Axes


def landmarks(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A volume whose value tells the place in the world: 100 x + 10 y + z in RAS mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return ((index @ affine[:3, :3].T + affine[:3, 3]) @ np.array([100.0, 10.0, 1.0])).astype(np.float32)


ORIENTATIONS = {
    "LPS": LPS,
    "RAS": np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "LAS": np.array([[-1.0, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    # First axis inferior, second left, third anterior.
    "ILA": np.array([[0.0, -1, 0, 3], [0, 0, 1, 0], [-1, 0, 0, 5], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_any_storage_order_is_turned_to_lps(name: str) -> None:
    affine = ORIENTATIONS[name]
    shape = tuple(int(n) for n in np.abs(affine[:3, :3].T) @ np.array(SHAPE))
    turned, new_affine = reorient(landmarks(affine, (shape[0], shape[1], shape[2])), affine)
    assert turned.shape == SHAPE
    np.testing.assert_array_equal(new_affine, LPS)
    # Along the axes x falls, y falls, z rises: toward left, posterior, superior.
    np.testing.assert_array_equal(np.diff(turned, axis=0), -100)
    np.testing.assert_array_equal(np.diff(turned, axis=1), -10)
    np.testing.assert_array_equal(np.diff(turned, axis=2), 1)
    np.testing.assert_array_equal(turned, landmarks(LPS, SHAPE))


def test_files_of_one_grid_may_store_it_in_two_orders(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.nii" for name in ("LPS", "RAS")}
    for name, path in paths.items():
        path.write_bytes(encoded(landmarks(ORIENTATIONS[name], SHAPE), ORIENTATIONS[name]))
    voxels, warning = align(load_scan(paths["RAS"]), load_scan(paths["LPS"]))
    assert warning is None
    np.testing.assert_array_equal(voxels, landmarks(LPS, SHAPE))


@pytest.mark.parametrize(("shift", "warns"), [(0.0009, False), (0.0011, True)])
def test_affines_are_one_up_to_a_thousandth(tmp_path: Path, shift: float, warns: bool) -> None:
    moved = LPS.copy()
    moved[0, 3] += shift
    for name, affine in (("a.nii", LPS), ("b.nii", moved)):
        (tmp_path / name).write_bytes(encoded(ramp(), affine))
    voxels, warning = align(load_scan(tmp_path / "b.nii"), load_scan(tmp_path / "a.nii"))
    np.testing.assert_array_equal(voxels, ramp())
    expected = "b.nii: its affine differs from that of a.nii by up to 0.0011; a.nii is trusted"
    assert warning == (expected if warns else None)


@pytest.mark.parametrize("name", ["RAS", "ILA"])
def test_a_scan_half_a_voxel_off_is_turned_by_its_own_affine(tmp_path: Path, name: str) -> None:
    affine = ORIENTATIONS[name]
    first, second, third = (int(n) for n in np.abs(affine[:3, :3].T) @ np.array(SHAPE))
    moved = affine.copy()
    moved[:3, 3] += [0.5, -0.25, 0]
    (tmp_path / "a.nii").write_bytes(encoded(landmarks(LPS, SHAPE)))
    (tmp_path / "b.nii").write_bytes(encoded(landmarks(affine, (first, second, third)), moved))
    voxels, warning = align(load_scan(tmp_path / "b.nii"), load_scan(tmp_path / "a.nii"))
    np.testing.assert_array_equal(voxels, landmarks(LPS, SHAPE))
    assert warning == "b.nii: its affine differs from that of a.nii by up to 0.5; a.nii is trusted"


@pytest.mark.parametrize(("voxel", "shift", "own"), [(1.0, 0.99, True), (1.0, 1.01, False), (3.0, 2.9, True)])
def test_a_voxel_is_how_far_an_affine_may_be_off(tmp_path: Path, voxel: float, shift: float, own: bool) -> None:
    scale = np.diag([voxel, voxel, voxel, 1.0])
    reference, moved = scale @ LPS, scale @ ORIENTATIONS["RAS"]
    moved[0, 3] += shift
    for name, affine in (("a.nii", reference), ("b.nii", moved)):
        (tmp_path / name).write_bytes(encoded(ramp(), affine))
    voxels, warning = align(load_scan(tmp_path / "b.nii"), load_scan(tmp_path / "a.nii"))
    # Stored RAS, it is turned by its own affine, and left as it is by the reference's.
    np.testing.assert_array_equal(voxels, ramp()[::-1, ::-1] if own else ramp())
    assert warning is not None


def test_a_lost_affine_is_replaced_by_that_of_the_reference(tmp_path: Path) -> None:
    brats = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    for name, affine in (("a.nii", brats), ("b.nii", np.eye(4))):
        (tmp_path / name).write_bytes(encoded(ramp(), affine))
    voxels, warning = align(load_scan(tmp_path / "b.nii"), load_scan(tmp_path / "a.nii"))
    # By its own affine it would be flipped twice.
    np.testing.assert_array_equal(voxels, ramp())
    assert warning == "b.nii: its affine differs from that of a.nii by up to 235; a.nii is trusted"


def test_shapes_that_differ_are_one_line(tmp_path: Path) -> None:
    for name, shape in (("a.nii", SHAPE), ("b.nii", (4, 5, 7))):
        (tmp_path / name).write_bytes(encoded(ramp(shape)))
    with pytest.raises(VolumeError) as caught:
        align(load_scan(tmp_path / "b.nii"), load_scan(tmp_path / "a.nii"))
    assert str(caught.value) == (
        f"{tmp_path / 'b.nii'}: expected shape (4, 5, 6) as a.nii has, found (4, 5, 7): "
        "register and resample the files of a case to one grid"
    )

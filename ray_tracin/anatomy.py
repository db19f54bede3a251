"""Anatomy: points in a synthetic head → fractions of cerebrospinal fluid, grey and white matter.

The one idea: a head is a map from the voxels of a scan to points of one standard brain. Turning, stretching and bending
that map makes individuals; asking the standard brain what lies at each point makes their tissue. The standard brain is
either the ICBM 2009a template (`template_tissue`) or a drawing of ellipsoids and tubes that needs no data and looks
like one (`analytic_tissue`). This module knows no tumour, no MRI contrast and no file layout.

Points are in mm from the centre of the brain, axes toward left, posterior and superior (LPS).
"""

import gzip
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy import ndimage

Field = Float32[np.ndarray, "i j k"]
Mask = Bool[np.ndarray, "i j k"]
Points = Float32[np.ndarray, "3 i j k"]

TEMPLATE = "mni152_tissue_2mm.nii.gz"
TEMPLATE_LEVELS = 31
"""Grey and white matter of the template are stored as 0 … 31."""
MNI_OFFSET = (0.0, -18.0, 12.0)
"""Centre of the brain in the template's coordinates (RAS, mm from the anterior commissure)."""
SPLINE_SD = 0.32
"""Standard deviation of unit white noise after cubic B-spline interpolation in 3D."""

TILT_SD = 3.0
"""Rotation of a head about each axis, degrees."""
SHIFT_SD = 2.0
"""Position of a head, mm."""
STRETCH_SD = 0.04
BEND_SD = 2.5
"""Elastic deformation, mm, correlated over `BEND_LENGTH` mm."""
BEND_LENGTH = 55.0


@dataclass(frozen=True)
class Grid:
    """Voxels of a scan: their number, their side (mm), and the centre of the brain (mm from the first voxel)."""

    shape: tuple[int, int, int]
    spacing: float
    centre: tuple[float, float, float]

    def affine(self) -> Float64[np.ndarray, "4 4"]:
        """Voxel → world (RAS, mm) with LPS axes and the origin that BraTS has."""
        affine = np.diag([-self.spacing, -self.spacing, self.spacing, 1.0])
        affine[1, 3] = (self.shape[1] - 1) * self.spacing
        return affine

    def points(self) -> Points:
        """The position of every voxel, mm from the centre of the brain."""
        axes = [
            np.arange(count, dtype=np.float32) * np.float32(self.spacing) - np.float32(middle)
            for count, middle in zip(self.shape, self.centre, strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing="ij"))

    def noise(self, rng: np.random.Generator, length: float) -> Field:
        """A smooth random field of mean 0 and deviation 1, correlated over ``length`` mm."""
        return smooth_noise(rng, self.shape, length / self.spacing)


@dataclass(frozen=True)
class Tissue:
    """What a head is made of: inside the brain the three fractions sum to 1, outside all are 0."""

    brain: Mask
    csf: Field
    gm: Field
    wm: Field


def build_grid(size: tuple[int, int, int], spacing: float) -> Grid:
    """The grid that covers ``size`` mm (BraTS: 240, 240, 155) with voxels of ``spacing`` mm."""
    shape = (math.ceil(size[0] / spacing), math.ceil(size[1] / spacing), math.ceil(size[2] / spacing))
    # More neck than crown: the centre of the brain lies below the middle of the field of view.
    return Grid(shape, spacing, ((size[0] - 1) / 2, (size[1] - 1) / 2, 0.468 * (size[2] - 1)))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], length: float) -> Field:
    """White noise on a coarse lattice, ``length`` voxels apart, interpolated by cubic B-splines to unit deviation."""
    nodes = [max(4, math.ceil(count / max(length, 1.0)) + 3) for count in shape]
    field = rng.standard_normal(nodes, dtype=np.float32)
    for axis, count in enumerate(shape):
        weights = _spline_weights(count, nodes[axis])
        field = np.moveaxis(np.tensordot(weights, field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field / np.float32(SPLINE_SD))


def ramp(x: Field, low: float, high: float) -> Field:
    """0 below ``low``, 1 above ``high``, ``3t² − 2t³`` between."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def place_head(rng: np.random.Generator, grid: Grid) -> Points:
    """For every voxel the point of the standard brain that lies there in this individual."""
    linear = _rotation(np.deg2rad(rng.normal(0, TILT_SD, 3))) * (1 + rng.normal(0, STRETCH_SD, 3))
    shift = rng.normal(0, SHIFT_SD, 3)
    points: Points = np.einsum("ab,bijk->aijk", linear.astype(np.float32), grid.points())
    for axis in range(3):
        points[axis] += np.float32(shift[axis]) + np.float32(BEND_SD) * grid.noise(rng, BEND_LENGTH)
    return points


def template_tissue(points: Points) -> Tissue:
    """Tissue of the ICBM 2009a nonlinear symmetric template (2 mm) at the points, by linear interpolation."""
    maps, to_voxels = _template()
    world = np.stack([-points[0] + MNI_OFFSET[0], -points[1] + MNI_OFFSET[1], points[2] + MNI_OFFSET[2]])
    voxels = np.einsum("ab,bijk->aijk", to_voxels[:3, :3], world) + to_voxels[:3, 3, None, None, None]
    gm, wm, inside = (ndimage.map_coordinates(part, voxels, order=1, output=np.float32) for part in maps)
    brain = ndimage.binary_fill_holes(ndimage.binary_opening(inside > 0.15))
    return _tissue(brain, np.clip(1 - gm - wm, 0, 1), wm)


def analytic_tissue(rng: np.random.Generator, points: Points, spacing: float) -> Tissue:
    """Tissue of a drawn brain: a folded cortex on a superellipsoid, ventricles, deep grey nuclei."""
    x, y, z = points
    shape = (x.shape[0], x.shape[1], x.shape[2])
    narrowing = 1 - 0.16 * np.clip(-y / 88, 0, 1.2) ** 2  # the frontal lobes
    unit = np.stack([x / (69 * narrowing), y / 88, (z - 6) / 66])
    depth = np.float32(72) * (1 - (np.abs(unit) ** 2.25).sum(0) ** np.float32(1 / 2.25))
    jagged = smooth_noise(rng, shape, 7 / spacing)
    to_surface = np.minimum(np.minimum(depth, _sulci(rng, unit, depth, spacing)), _fissure(points))
    ventricles = ramp(-_ventricles(points, jagged), -0.8, 0.8)
    nuclei = _nuclei(points)
    wm = ramp(to_surface - np.float32(0.35) * jagged, 2.3, 3.9) * (1 - np.float32(0.75) * nuclei) * (1 - ventricles)
    csf = np.maximum((1 - ramp(to_surface, 0.5, 1.8)) * (1 - nuclei), ventricles)
    return _tissue(depth > -0.8, csf, wm * (1 - csf))


def _tissue(brain: Mask, csf: Field, wm: Field) -> Tissue:
    """Grey matter is what is neither fluid nor white matter."""
    csf, wm = csf * brain, np.clip(wm, 0, 1 - csf) * brain
    return Tissue(brain, csf, np.clip(brain - csf - wm, 0, 1), wm)


def _rotation(angles: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "3 3"]:
    (a, b, c), (i, j, k) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, a, -i], [0, i, a]])
    about_y = np.array([[b, 0, j], [0, 1, 0], [-j, 0, b]])
    about_z = np.array([[c, -k, 0], [k, c, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


@cache
def _spline_weights(count: int, nodes: int) -> Float32[np.ndarray, "count nodes"]:
    """Cubic B-spline interpolation of ``nodes`` lattice values at ``count`` even places, as a matrix."""
    place = np.linspace(1, nodes - 2 - 1e-3, count)
    first = np.floor(place).astype(int)
    t = place - first
    basis = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = np.zeros((count, nodes), np.float32)
    for offset, values in enumerate(basis):
        weights[np.arange(count), first - 1 + offset] += values / 6
    return weights


@cache
def _template() -> tuple[Float32[np.ndarray, "3 i j k"], Float32[np.ndarray, "4 4"]]:
    """Grey matter, white matter and brain mask as fractions, and world → voxel."""
    content = (resources.files("ray_tracin") / "assets" / TEMPLATE).read_bytes()
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    levels = np.array([TEMPLATE_LEVELS, TEMPLATE_LEVELS, 1], dtype=np.float32)
    maps = np.moveaxis(image.get_fdata(dtype=np.float32) / levels, -1, 0)
    return np.ascontiguousarray(maps), np.linalg.inv(image.affine).astype(np.float32)


def _sulci(rng: np.random.Generator, unit: Points, depth: Field, spacing: float) -> Field:
    """Distance (mm) from the nearest sulcus.

    Sulci are where a smooth random field that is constant along rays from the centre is 0: meandering sheets that
    stand on the surface and end some 15 mm below it.
    """
    on_sphere = ndimage.gaussian_filter(rng.standard_normal((96, 96, 96), dtype=np.float32), 2.6)
    direction = unit / (np.sqrt((unit**2).sum(0)) + np.float32(1e-4))
    fold = ndimage.map_coordinates(on_sphere / on_sphere.std(), 47.5 + 38 * direction, order=1, output=np.float32)
    slope = np.sqrt(sum(np.gradient(fold, axis=axis) ** 2 for axis in range(3))) / np.float32(spacing)
    below = np.clip(depth - 15, 0, None)
    return np.asarray(np.sqrt((fold / (slope + np.float32(0.02))) ** 2 + np.float32(1.5) * below**2))


def _fissure(points: Points) -> Field:
    """Distance (mm) from the cleft between the hemispheres, which ends above the ventricles."""
    x, _, z = points
    return np.asarray(np.sqrt(x**2 + np.clip(28 - z, 0, None) ** 2))


def _ventricles(points: Points, jagged: Field) -> Field:
    """Signed distance (mm) to the lateral ventricles, two bent tubes, and the third one between them."""
    x, y, z = points
    along = np.clip((y + 34) / 76, 0, 1)
    beyond = np.clip(-34 - y, 0, None) ** 2 + np.clip(y - 42, 0, None) ** 2
    height = 18 - 10 * along + 6 * np.sin(np.pi * along)
    width = np.float32(3.6) + np.float32(3.2) * np.sin(np.pi * np.clip(along * np.float32(1.15), 0, 1)) ** 2
    lateral = np.sqrt((np.abs(x) - (7 + 15 * along**2)) ** 2 + (np.float32(0.75) * (z - height)) ** 2 + beyond) - width
    third = _ellipsoid(points, (0.0, 4.0, 4.0), (1.8, 13.0, 9.0))
    return np.asarray(np.minimum(lateral, third) + np.float32(0.5) * jagged)


def _nuclei(points: Points) -> Field:
    """Thalamus, putamen and caudate of both sides."""
    right = np.stack([np.abs(points[0]), points[1], points[2]])
    parts = (
        ((12.0, 8.0, 8.0), (8.0, 14.0, 9.0)),
        ((25.0, -10.0, 4.0), (5.5, 16.0, 10.0)),
        ((14.0, -24.0, 12.0), (5.0, 10.0, 10.0)),
    )
    return ramp(-np.minimum.reduce([_ellipsoid(right, centre, radii) for centre, radii in parts]), -1.0, 1.0)


def _ellipsoid(points: Points, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Field:
    """About the signed distance (mm) from an ellipsoid."""
    scaled = [(points[axis] - np.float32(centre[axis])) / np.float32(radii[axis]) for axis in range(3)]
    return np.asarray((np.sqrt(sum(part**2 for part in scaled)) - 1) * np.float32(np.prod(radii) ** (1 / 3)))

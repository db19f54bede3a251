"""Glioma: a synthetic patient in memory, four MRI modalities and the labels of an unsteady rater.

The one idea: a patient is a function of (seed, number) alone. A head is drawn (`anatomy`), a tumour grown in it, its
parts delineated twice, once as they are and once as a rater with an unsteady hand would, and four MRI contrasts are
acquired of the truth. Labels are the rater's. Difficulty scales what makes it hard: contrast that varies from patient
to patient, noise, texture. This module writes no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int16, UInt8
from scipy import ndimage

from ray_tracin.anatomy import (
    Field,
    Grid,
    Mask,
    Points,
    Tissue,
    analytic_tissue,
    build_grid,
    place_head,
    template_tissue,
)

Anatomy = Literal["template", "analytic"]
Grade = Literal["HGG", "LGG"]

MODALITIES = ("t1", "t1ce", "t2", "flair")
NCR, ED, ET, RC = 1, 2, 3, 4
"""Class ids of necrotic and non-enhancing core, oedema, enhancing tumour, resection cavity."""

# Mean intensities (white matter on T1 = 1), tuned by eye against one examination; arbitrary units, as MRI's are.
CONTRAST = {
    "t1": {"csf": 0.30, "gm": 0.70, "wm": 1.00, "oedema": 0.74, "rim": 0.70, "necrosis": 0.46, "lobe": 0.66},
    "t1ce": {"csf": 0.32, "gm": 0.74, "wm": 1.00, "oedema": 0.72, "rim": 1.65, "necrosis": 0.44, "lobe": 0.80},
    "t2": {"csf": 1.75, "gm": 0.85, "wm": 0.60, "oedema": 1.30, "rim": 1.00, "necrosis": 1.45, "lobe": 1.20},
    "flair": {"csf": 0.28, "gm": 0.98, "wm": 0.80, "oedema": 1.65, "rim": 1.35, "necrosis": 0.85, "lobe": 1.25},
}
GAIN = {"t1": 450.0, "t1ce": 480.0, "t2": 420.0, "flair": 400.0}
GAIN_SD = 0.45
"""Of the logarithm: each scan has its own scale."""
TISSUE_SD, ENHANCEMENT_SD, OEDEMA_SD = 0.05, 0.22, 0.15
"""Relative spread of contrast between patients at difficulty 1."""
NOISE = (0.025, 0.055)
BIAS_SD, BIAS_LENGTH = 0.10, 90.0
PARTIAL_VOLUME = 0.7
"""Blur of every boundary, mm."""
SLICE_BLUR = 1.1
"""Blur of T2 and FLAIR along the slicing axis, mm: they are acquired in thick slices."""

CORE_ERROR, RIM_ERROR, OEDEMA_ERROR = 1.0, 1.1, 2.5
"""How far the rater's boundaries are off, mm."""

COARSEST = 12.0
"""Largest side of a voxel, mm: beyond it tumours have no voxel."""


@dataclass(frozen=True)
class Patient:
    """A synthetic examination in LPS: four modalities as a scanner stores them, and class ids as a rater drew them."""

    images: Int16[np.ndarray, "modality i j k"]
    classes: UInt8[np.ndarray, "i j k"]
    affine: Float64[np.ndarray, "4 4"]


@dataclass(frozen=True)
class _Tumour:
    """One glioma: distances (mm) that its parts are cut from."""

    centre: Float64[np.ndarray, "3"]
    radius: float
    """Of the core."""
    margin: float
    """Width of the oedema around the core."""
    wall: Field
    """Thickness of the enhancing rim."""
    to_core: Field
    """Distance from the centre, roughened as the surface of the core is."""
    to_oedema: Field
    """The same, roughened as the surface of the oedema is."""
    lobe: Mask
    """Where the core does not enhance although it is no necrosis."""
    cavity: Mask
    """Where the core was resected."""


@dataclass(frozen=True)
class _Parts:
    """The tumour's parts; they don't overlap."""

    oedema: Mask
    rim: Mask
    necrosis: Mask
    lobe: Mask
    cavity: Mask


@dataclass(frozen=True)
class _Scene:
    """What all four acquisitions of a patient see: shares of each voxel from 0 to 1, and strengths."""

    tissue: Tissue
    whole: Field
    """Tumour and oedema; the latter fades outward, which makes its edge ambiguous."""
    core: Field
    necrosis: Field
    lobe: Field
    cavity: Field
    vessels: Field
    """Contrast-filled, bright on T1ce as tumour is."""
    lesions: Field
    """Unlabelled, bright on T2 and FLAIR as oedema is."""
    texture: Field
    enhancement: float
    swelling: float


def render_patient(
    number: int,
    *,
    size: tuple[int, int, int] = (240, 240, 155),
    seed: int = 0,
    spacing: float = 2.0,
    anatomy: Anatomy = "template",
    difficulty: float = 1.5,
    grade: Grade = "HGG",
    cavity: bool = False,
) -> Patient:
    """One synthetic patient in memory; a function of its arguments alone.

    ``size`` is the field of view and ``spacing`` the side of a voxel, mm. ``cavity`` resects part of the core. An LGG
    does not enhance. Not simulated: motion, distortion, registration errors, anything outside the brain.

    Raises:
        ValueError: a spacing that is not positive, or too coarse for a brain.
    """
    if not 0 < spacing <= COARSEST:
        raise ValueError(f"expected a spacing above 0 and up to {COARSEST:g} mm, got {spacing}")
    rng = np.random.default_rng([seed % 2**63, number])
    grid = build_grid(size, spacing)
    head = place_head(rng, grid)
    tumour = _grow(rng, grid, head, grade, cavity)
    head = _push(head, grid, tumour, strength=rng.uniform(0.15, 0.45))
    tissue = template_tissue(head) if anatomy == "template" else analytic_tissue(rng, head, spacing)
    truth = _delineate(tumour, tissue)
    errors = [
        sd * grid.noise(rng, length) for sd, length in ((CORE_ERROR, 9.0), (RIM_ERROR, 9.0), (OEDEMA_ERROR, 14.0))
    ]
    rated = _delineate(tumour, tissue, errors)
    scene = _compose(rng, grid, head, tumour, tissue, truth, difficulty)
    images = np.stack([_acquire(rng, grid, scene, name, difficulty) for name in MODALITIES])
    return Patient(images, _class_ids(rated), grid.affine())


# The tumour


def _grow(rng: np.random.Generator, grid: Grid, head: Points, grade: Grade, cavity: bool) -> _Tumour:
    """A glioma in the white matter above the tentorium, away from the midline."""
    centre = _seat(rng, grid, head)
    radius = float(np.clip(rng.lognormal(np.log(17), 0.28), 9, 32))
    rim = float(np.clip(rng.normal(0.30, 0.08), 0.15, 0.5)) * radius + 1.2
    margin = float(np.clip(rng.lognormal(np.log(13), 0.45), 4, 34))
    axes = 1 + rng.normal(0, 0.16, 3)
    offset = (grid.points() - centre[:, None, None, None]) / axes[:, None, None, None]
    distance = np.sqrt((offset**2).sum(0)).astype(np.float32)
    coarse, fine, fingers, blobs = (grid.noise(rng, length) for length in (16.0, 8.0, 20.0, 14.0))
    to_core = distance + np.float32(0.16 * radius) * coarse + np.float32(0.06 * radius) * fine
    share = float(rng.choice([0.0, 0.0, 0.25, 0.45]))
    return _Tumour(
        centre=centre,
        radius=radius,
        margin=margin,
        wall=np.float32(rim) * (1 + np.float32(0.35) * fine),
        to_core=to_core,
        to_oedema=distance + np.float32(margin) * (np.float32(0.26) * fingers + np.float32(0.12) * fine),
        lobe=_lobe(blobs, to_core < radius, 1.0 if grade == "LGG" else share),
        cavity=(distance < rng.uniform(0.35, 0.65) * radius) & cavity,
    )


def _seat(rng: np.random.Generator, grid: Grid, head: Points) -> Float64[np.ndarray, "3"]:
    """Where the tumour starts: mm from the centre of the grid, in the middle of a hemisphere."""
    x, y, z = head
    deep = ((np.abs(x) - 30) / 22) ** 2 + (y / 55) ** 2 + ((z - 12) / 34) ** 2 < 1
    points = grid.points()
    seats = np.flatnonzero(deep & (np.abs(points[0]) > 14) & (np.abs(points[2] - 6) < 16))
    assert seats.size, "the field of view holds no brain"
    return points.reshape(3, -1)[:, rng.choice(seats)].astype(np.float64)


def _lobe(noise: Field, core: Mask, share: float) -> Mask:
    """Where the noise is as high as in the highest ``share`` of the core; it goes on outside, for the rater's core."""
    if share in (0, 1) or not core.any():
        return np.full(core.shape, share == 1)
    return np.asarray(noise >= np.quantile(noise[core], 1 - share))


def _push(head: Points, grid: Grid, tumour: _Tumour, strength: float) -> Points:
    """Mass effect: tissue near the tumour is displaced outward, as the inverse map from voxels to the head."""
    offset = grid.points() - tumour.centre.astype(np.float32)[:, None, None, None]
    distance = np.sqrt((offset**2).sum(0)) + np.float32(1e-3)
    reach = np.exp(-((distance / np.float32(2.2 * tumour.radius)) ** 2))
    shift = np.float32(strength * tumour.radius) * reach * np.clip(distance / np.float32(tumour.radius), 0, 1)
    return np.asarray(head - offset / distance * shift)


def _delineate(tumour: _Tumour, tissue: Tissue, errors: Sequence[Field | float] = (0.0, 0.0, 0.0)) -> _Parts:
    """The parts of the tumour, the boundaries of core, rim and oedema off by the errors (mm)."""
    core_error, rim_error, oedema_error = errors
    core = (tumour.to_core + core_error < tumour.radius) & tissue.brain
    inner = core & (tumour.to_core + rim_error < tumour.radius - tumour.wall)
    # Oedema spreads in white matter: fluid and cortex stop it.
    spread = (tumour.to_oedema + oedema_error < tumour.radius + tumour.margin) & (tissue.csf < 0.5) & (tissue.gm < 0.85)
    oedema = ndimage.binary_opening(spread) & tissue.brain & ~core
    cavity = core & tumour.cavity
    necrosis = inner & ~cavity
    lobe = core & tumour.lobe & ~inner & ~cavity
    return _Parts(oedema, core & ~inner & ~lobe & ~cavity, necrosis, lobe, cavity)


def _class_ids(parts: _Parts) -> UInt8[np.ndarray, "i j k"]:
    ids = np.zeros(parts.rim.shape, np.uint8)
    for part, class_id in ((parts.oedema, ED), (parts.rim, ET), (parts.necrosis | parts.lobe, NCR), (parts.cavity, RC)):
        ids[part] = class_id
    return ids


# The scan


def _soft(mask: Mask, grid: Grid) -> Field:
    return np.asarray(ndimage.gaussian_filter(mask.astype(np.float32), PARTIAL_VOLUME / grid.spacing))


def _compose(
    rng: np.random.Generator,
    grid: Grid,
    head: Points,
    tumour: _Tumour,
    tissue: Tissue,
    parts: _Parts,
    difficulty: float,
) -> _Scene:
    """What there is to see, with what is easily taken for tumour: vessels and white-matter lesions."""
    core = parts.rim | parts.necrosis | parts.lobe | parts.cavity
    healthy = ~(core | parts.oedema)
    outward = np.clip((tumour.to_oedema - np.float32(tumour.radius)) / np.float32(tumour.margin), 0, 1)
    tubes = (np.abs(grid.noise(rng, 9.0)) < 0.07) & (np.abs(grid.noise(rng, 9.0)) < 0.12) & (tissue.csf > 0.25)
    sinus = (np.abs(head[0]) < 2.2) & (head[1] > 70) & tissue.brain
    spots = (grid.noise(rng, 6.0) > 2.1) & (tissue.wm > 0.7)
    return _Scene(
        tissue=tissue,
        whole=np.clip(np.float32(1.15) - np.float32(0.55) * outward, 0, 1) * _soft(~healthy, grid),
        core=_soft(core, grid),
        necrosis=_soft(parts.necrosis, grid),
        lobe=_soft(parts.lobe, grid),
        cavity=_soft(parts.cavity, grid),
        vessels=_soft(tubes & healthy, grid) + np.float32(0.8) * _soft(sinus & healthy, grid),
        lesions=np.float32(rng.uniform(0, 1)) * _soft(spots & healthy, grid),
        texture=np.float32(difficulty) * grid.noise(rng, 5.0),
        enhancement=float(np.clip(rng.normal(1, ENHANCEMENT_SD * difficulty), 0.45, 1.5)),
        swelling=float(np.clip(rng.normal(1, OEDEMA_SD * difficulty), 0.5, 1.4)),
    )


def _acquire(
    rng: np.random.Generator, grid: Grid, scene: _Scene, modality: str, difficulty: float
) -> Int16[np.ndarray, "i j k"]:
    """One scan: contrast, coil bias, Rician noise, thick slices, skull stripping, an arbitrary gain."""
    fluid_sensitive = modality in ("t2", "flair")
    signal = _signal(rng, scene, modality, difficulty)
    signal *= np.exp(np.float32(BIAS_SD) * grid.noise(rng, BIAS_LENGTH))
    sd = np.float32(rng.uniform(*NOISE) * difficulty)
    real, imaginary = (sd * rng.standard_normal(grid.shape, dtype=np.float32) for _ in range(2))
    signal = np.sqrt((signal + real) ** 2 + imaginary**2)
    if fluid_sensitive:
        signal = ndimage.gaussian_filter1d(signal, SLICE_BLUR / grid.spacing, axis=2)
    gain = np.float32(GAIN[modality] * np.exp(rng.normal(0, GAIN_SD)))
    # At least 1 inside the brain: exactly 0 means background, as in BraTS.
    return np.where(scene.tissue.brain, np.clip(signal * gain, 1, np.iinfo(np.int16).max), 0).astype(np.int16)


def _signal(rng: np.random.Generator, scene: _Scene, modality: str, difficulty: float) -> Field:
    """Intensity without bias and noise: tissue, over which oedema, core and its parts are laid one after the other."""
    contrast, tissue = CONTRAST[modality], scene.tissue
    csf, gm, wm = (contrast[name] * (1 + rng.normal(0, TISSUE_SD * difficulty)) for name in ("csf", "gm", "wm"))
    base = np.float32(csf) * tissue.csf + np.float32(gm) * tissue.gm + np.float32(wm) * tissue.wm
    fluid_sensitive = modality in ("t2", "flair")
    swelling = np.float32(scene.swelling * (1.0 if fluid_sensitive else 0.8))
    signal = base + swelling * scene.whole * (np.float32(contrast["oedema"]) - np.clip(base, 0.55, 1.0))
    rim = 1 + (contrast["rim"] - 1) * scene.enhancement if modality == "t1ce" else contrast["rim"]
    layers = (
        (scene.core, rim, 0.10),
        (scene.necrosis, contrast["necrosis"], 0.07),
        (scene.lobe, contrast["lobe"], 0.10),
        (scene.cavity, csf, 0.0),
    )
    for share, level, roughness in layers:
        signal = signal * (1 - share) + share * (np.float32(level) + np.float32(roughness) * scene.texture)
    if modality == "t1ce":
        return np.asarray(signal + scene.vessels)
    return np.asarray(signal + np.float32(0.45) * scene.lesions if fluid_sensitive else signal)

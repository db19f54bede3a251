"""What the network predicts, for other tools: NIfTI label maps on the patient's own grid, and their colour tables.

A map has the shape, affine and storage order of the case's first image, and the data set's own label values, so that
viewers lay it over the original. Slices that were not cut are 0: absent from the run, not predicted to be healthy.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.colors import to_rgb
from torch import nn

from ray_tracin import store as paths
from ray_tracin.arithmetic import arithmetic
from ray_tracin.charts import class_colours
from ray_tracin.devices import device_here
from ray_tracin.mapping import PREDICTED_SLICES
from ray_tracin.nifti import Grid, encode_labels, load_grid
from ray_tracin.preparation import Inspect, case_slices, label_scheme
from ray_tracin.regions import predicted_labels
from ray_tracin.runs import FINAL, Run
from ray_tracin.store import Array
from ray_tracin.vocabulary import CaseKey, UsageError
from ray_tracin.volumes import Inspection, paste_slices

SLICER_TABLE, SNAP_TABLE = "labels.ctbl", "labels_itksnap.txt"
_SNAP_HEADER = """################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
"""


def export_label_maps(run: Run, out: Path, patient: str | None = None) -> Iterator[Path]:
    """Write the maps of a patient (or case), or of all, and the colour tables; the files, as they are written.

    ``CASE_prediction.nii.gz``: the argmax of the final network. ``CASE_regions.nii.gz``: its regions, where it is
    confident (the explained ones). ``labels.ctbl`` colours them in 3D Slicer, ``labels_itksnap.txt`` in ITK-SNAP.

    Raises:
        UsageError: there is no such patient, or the folder is a file.
        ValueError: the original file, which has the orientation, is gone or another one.
        OSError: it can't be read.
        FileNotFoundError: the network is not trained yet.
        IncompleteRunError: its regions are not mapped yet.
    """
    cases = _cases(run, patient)
    if out.is_file():
        raise UsageError(f"--out: expected a folder, found the file {out}")
    network = run.model(FINAL).to(device_here(run))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in ((SLICER_TABLE, slicer_table(run)), (SNAP_TABLE, snap_table(run))):
        (out / name).write_text(text)
        yield out / name
    for case in cases:
        rows = case_slices(run, case)[1]
        for kind, planes in (("prediction", _predictions(run, network, rows)), ("regions", _regions(run, rows))):
            path = out / f"{CaseKey(case)}_{kind}.nii.gz"
            path.write_bytes(label_map(run, case, planes))
            yield path


def label_map(run: Run, case: str, planes: UInt8[np.ndarray, "slice h w"]) -> bytes:
    """A gzipped NIfTI file of class ids on the slices of a case, with the data set's label values, on its own grid.

    Raises:
        ValueError: the original file is gone, or is not the one that was cut.
        OSError: it can't be read.
    """
    _, _, indices = case_slices(run, case)
    grid = _original_grid(run, case)
    values = label_values(run)
    kind = np.uint8 if values.max() <= np.iinfo(np.uint8).max else np.int32
    volume = paste_slices(values.astype(kind)[planes], indices, grid.lps_shape, run.config.data)
    return encode_labels(volume, grid)


def label_values(run: Run) -> np.ndarray:
    """The data set's label value of every class id; 0 of the background."""
    return np.asarray([0, *label_scheme(run).classes])


def slicer_table(run: Run) -> str:
    """The colour table of the label values for 3D Slicer (``.ctbl``): value, name without spaces, RGBA."""
    lines = [
        f"{value} {name.replace(' ', '_')} {red} {green} {blue} 255" for value, name, red, green, blue in _rows(run)
    ]
    return "\n".join(["# 3D Slicer color table", "0 Background 0 0 0 0", *lines, ""])


def snap_table(run: Run) -> str:
    """The label descriptions of the label values for ITK-SNAP: value, RGB, opacity, visible, in 3D, name."""
    lines = [
        f'{value:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{name}"'
        for value, name, red, green, blue in _rows(run)
    ]
    return _SNAP_HEADER + "\n".join(['    0     0    0    0        0  0  0    "Clear Label"', *lines, ""])


def _rows(run: Run) -> list[tuple[int, str, int, int, int]]:
    colours = [[round(255 * part) for part in to_rgb(colour)] for colour in class_colours(len(run.classes))]
    values = label_values(run)[1:]
    return [(int(value), name, *rgb) for value, name, rgb in zip(values, run.classes, colours, strict=True)]  # type: ignore[misc]


def _cases(run: Run, patient: str | None) -> list[str]:
    table = run.slices if patient is None else run.slices_of(patient)
    return sorted(set(table["case"]))


def _original_grid(run: Run, case: str) -> Grid:
    path = next(iter(case_slices(run, case)[0].modalities.values())).absolute()
    if not path.exists():
        raise ValueError(
            f"{case}: expected the original image at {path}, where it was when the run was prepared: its header has "
            "the orientation. It is gone: put the patients back there, or a link to them"
        )
    grid = load_grid(path)
    receipt = run.store.read_receipt(Inspect.name, str(CaseKey(case)))
    cut = grid.lps_shape if receipt is None else Inspection.from_json(receipt.result["inspection"]).shape
    if grid.lps_shape != cut:
        raise ValueError(
            f"{path}: expected the image that was cut, of shape {cut} in LPS, found {grid.lps_shape}: put the original "
            "image back"
        )
    return grid


def _predictions(run: Run, network: nn.Module, rows: Sequence[int]) -> UInt8[np.ndarray, "slice h w"]:
    device = device_here(run)
    with torch.inference_mode(), arithmetic():
        batches = torch.from_numpy(run.images(rows)).split(PREDICTED_SLICES)
        parts = [predicted_labels(network(batch.to(device))).cpu() for batch in batches]
    labels: Array = torch.cat(parts).numpy()
    return labels


def _regions(run: Run, rows: Sequence[int]) -> UInt8[np.ndarray, "slice h w"]:
    masks = run.store.read(paths.MASKS, (slice(rows[0], rows[-1] + 1),))
    # At thresholds from 0.5 on no pixel is in two regions.
    labels: Array = (masks * np.arange(1, masks.shape[1] + 1, dtype=np.uint8)[:, None, None]).sum(1, dtype=np.uint8)
    return labels

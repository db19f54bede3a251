"""The explanation of a new scan: cut as the run's own, predicted, differentiated, and multiplied with the training set.

The one idea: nothing of the new scan enters the run. Its regions are gradients for as long as the question lasts; the
training set is there as an index of sketches (an estimate, in seconds), or as the gradient shards of the run (exact).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ray_tracin.arithmetic import arithmetic
from ray_tracin.assembly import train_regions
from ray_tracin.attribution import Differentiate, differentiator, region_exists
from ray_tracin.config import SliceSelection
from ray_tracin.devices import device_here
from ray_tracin.explainers import above_zero, first_places, gradient_norms
from ray_tracin.explaining import known_globals
from ray_tracin.folders import Case, find_cases
from ray_tracin.indexing import agreement_path, indexed_kernel, indexed_sizes, sketcher
from ray_tracin.influence import EXPANDED_VALUES, sum_checkpoints, train_columns, without_absent
from ray_tracin.layers import Layout, Segment
from ray_tracin.mapping import PREDICTED_SLICES
from ray_tracin.nifti import VolumeError
from ray_tracin.preparation import label_scheme
from ray_tracin.regions import (
    predicted_labels,
    region_masks,
    region_overlap,
    region_pixels,
    region_scores,
    whole_slices,
)
from ray_tracin.runs import FINAL, Run
from ray_tracin.scores import ClassScores, class_scores, overlap_of, train_norm
from ray_tracin.tiling import ShardReader, fitting_kernel
from ray_tracin.vocabulary import UsageError, checkpoint_name, ranges
from ray_tracin.volumes import Volume, choose_slices, cut_slices, cutting_warnings, load_volume

EXACT = 0
"""In place of a sketch size: the gradient shards of the run."""


@dataclass(frozen=True)
class NewScan:
    """The slices of new examinations, with the labels that scores refer to: the truth, or the network's prediction."""

    table: pd.DataFrame
    """A row a slice: case, index, labelled, and the warnings that its case was read and cut with."""
    images: Tensor
    labels: Tensor
    masks: Tensor
    """Regions of the final network, (slice, class, h, w)."""
    scores: Tensor
    """Their Dice by the final network, (slice, class)."""

    @property
    def warnings(self) -> dict[str, str]:
        """What each case that has any was read and cut with, whether or not a region is on its slices."""
        told = self.table[self.table["warnings"] != ""]
        return dict(zip(told["case"], told["warnings"], strict=True))


@dataclass(frozen=True)
class ScanExplanation:
    """What the training set has to do with the regions of a new scan."""

    regions: pd.DataFrame
    """A row a region: case, index, class_id, class_name, pixels, overlap, dice, labelled, warnings, in_tensor (not
    where the regions of a checkpoint are its own, and one doesn't predict it); pixels, overlap and dice are those of
    the final network's region, 0 and NaN where it predicts none."""
    ranking: pd.DataFrame
    """A row a region, side (proponent or opponent) and rank: case, index and class_id of the region; influence and
    cosine; and of the train region train_slice, patient, train_index, train_class_id, train_class, overlap, is_global.
    As in `explanation`, the rank is that among all train regions, global explainers included. ``query_labelled``:
    whether the slice has ground truth, else the network's prediction stood in for it; ``ranked_by``: raw or cosine, as
    ``explainers.score``; ``sketch_size``: of the index, 0 where the influence is exact."""
    size: int
    """Of the sketches, 0 where the influence is exact."""
    agreement: pd.DataFrame
    """What an index of this size is worth on the run's own tensor; empty where the influence is exact."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many global explainers are not in the rankings, by class."""
    without: tuple[str, ...] = ()
    """Cases on whose slices the network predicts no region."""
    ranked_by: str = "raw"
    """``raw`` influence or ``cosine``, as the run's own rankings."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """What cases were read and cut with."""
    whole_slices: bool = False
    """Whether scores are of whole slices, so that influence needs no region."""
    missing: tuple[str, ...] = ()
    """What this run has not computed yet, and the ranking lacks."""

    @property
    def notes(self) -> list[str]:
        """What a reader must know before believing the ranking."""
        found = [*self.missing]
        found += [f"{case}: the network predicts no region on its slices" for case in self.without]
        cases = self.regions.loc[~self.regions["labelled"].astype(bool), "case"].unique()
        if len(cases):
            found.append(f"{', '.join(cases)}: no ground truth, the network's own prediction stands in for it")
        found += _warned(self.warnings)
        absent = self.regions[~self.regions["in_tensor"]]
        if len(absent):
            found.append(
                f"{'; '.join(_named(absent))}: not every checkpoint predicts it, so it has no influence "
                "(regions.source=checkpoint): nothing to rank"
            )
        unpredicted = self.regions[self.regions["in_tensor"] & (self.regions["pixels"] == 0)]
        if len(unpredicted) and not self.whole_slices:
            found.append(
                f"{'; '.join(_named(unpredicted))}: the checkpoints predict it, the final network doesn't "
                "(regions.source=checkpoint): the influence is theirs"
            )
        unranked = self._unranked()
        if unranked:
            why = (
                "every influence is 0 or left out" if self.left_out else "the gradient is 0, and so is every influence"
            )
            found.append(f"{'; '.join(unranked)}: {why}: nothing to rank")
        if self.left_out:
            counts = ", ".join(f"{count} of {name}" for name, count in self.left_out.items())
            found.append(f"global explainers are left out ({counts}); --keep-global keeps them")
        if self.ranked_by == "cosine":
            found.append("ranked by cosine, the influence without the lengths of the gradients (explainers.score)")
        if self.size:
            found.append(f"influence is estimated by sketches of size {self.size}; {_worth(self.agreement)}")
        return found

    def _unranked(self) -> list[str]:
        ranked = set(_named(self.ranking))
        return [name for name in _named(self.regions[self.regions["in_tensor"]]) if name not in ranked]


def _warned(warnings: Mapping[str, str]) -> list[str]:
    return [f"{case}: read with a warning: {text}" for case, text in warnings.items()]


def _named(regions: pd.DataFrame) -> list[str]:
    lines = regions[["case", "index", "class_name"]].itertuples(index=False, name=None)
    return [f"{case}, slice {index}, {name}" for case, index, name in lines]


def explain_scan(
    run: Run,
    source: str | Path,
    *,
    size: int | None = None,
    indices: Sequence[int] = (),
    k: int = 20,
    keep_global: bool = False,
) -> ScanExplanation:
    """The k strongest proponents and opponents of every region that the network predicts on a new scan.

    ``source`` is a folder of one examination or several, or a CSV file, as ``data.root``. ``size`` picks an index
    (the largest without it), `EXACT` the gradient shards of the run; ``indices`` picks slices instead of the run's own
    selection. Proponents are above 0 and opponents below. Global explainers of the run, which explain everything alike,
    are left out unless ``keep_global``. ``explainers.score`` decides which number ranks, as in the run.

    Raises:
        ValueError: no region, or a scan that can't be used.
        UsageError: no such index, or no gradient shards, or slices that only ``indices`` can choose.
        IncompleteRunError: the tensor of the run is not computed yet.
        FileNotFoundError: nothing is at ``source``.
        OSError: a file of the scan can't be read.
    """
    size, of_train = pick_index(run, size), train_norm(run)
    scan = read_scan(run, source, indices)
    exists = _regions(run, scan)
    if not bool(exists.any()):
        raise ValueError("; ".join([_nothing(run, scan, source), *_warned(scan.warnings)]))
    influence, norms = scan_influence(run, scan, size)
    scores = [class_scores(run, one + 1, influence[one], norms[one], of_train) for one in range(len(run.classes))]
    agreement = run.store.read_table(agreement_path(size)) if size else pd.DataFrame()
    regions, (is_global, missing) = _region_table(run, scan, exists, influence), known_globals(run)
    left_out = is_global & (not keep_global)
    counts = {name: int(left_out[place].sum()) for place, name in enumerate(run.classes)}
    told = {name: count for name, count in counts.items() if count and name in set(regions["class_name"])}
    ranking = _rankings(run, scan, scores, is_global, left_out, k).assign(sketch_size=np.int32(size))
    return ScanExplanation(
        regions=regions,
        ranking=ranking,
        size=size,
        agreement=agreement,
        left_out=told,
        without=tuple(sorted(set(scan.table["case"]) - set(regions["case"]))),
        ranked_by=run.config.explainers.score,
        warnings=scan.warnings,
        whole_slices=run.config.gradients.score == "image",
        missing=missing,
    )


def _nothing(run: Run, scan: NewScan, source: str | Path) -> str:
    return (
        f"the network predicts no class with more than {run.config.regions.threshold:.0%} confidence on the "
        f"{len(scan.images)} slices of {source}, so there is nothing to explain: look at the images and their "
        "modalities, or name --index"
    )


def pick_index(run: Run, size: int | None) -> int:
    """The size of the index to use: the one asked for, else the largest that is finished; `EXACT` stays as it is.

    Raises:
        UsageError: there is none, or not this one; or shards are asked for that the run doesn't hold.
    """
    if size == EXACT:
        _refuse_missing_shards(run)
        return EXACT
    there = [found for found in indexed_sizes(run) if run.store.objects.size(agreement_path(found)) is not None]
    if not there or (size is not None and size not in there):
        wanted = "" if size is None else f" of size {size}"
        raise UsageError(
            f"{run.uri} has no index{wanted}{f' (there are {there})' if there else ''}: "
            f"`ray-tracin sketches --run {run.uri} --size {size or 32}` makes one, or --exact reads gradient shards"
        )
    return size or there[-1]


def _refuse_missing_shards(run: Run) -> None:
    receipts = run.store.receipts(Differentiate.name)
    keys = [key for key in Differentiate(run, run.config.influence_epochs()).keys() if key.query_set == "train"]  # noqa: SIM118
    if any(str(key) not in receipts or receipts[str(key)].released for key in keys):
        raise UsageError(
            f"{run.uri} doesn't hold the gradient shards of all its checkpoints, which an exact answer reads: make "
            f"them with `ray-tracin gradients --run {run.uri}` and gradients.keep=true, or make an index with "
            f"`ray-tracin sketches --run {run.uri}`"
        )


def read_scan(run: Run, source: str | Path, indices: Sequence[int] = ()) -> NewScan:
    """The slices of new examinations, cut as the run's own, and what the final network predicts on them.

    Raises:
        UsageError: an examination lacks the slices that the run would choose, or the labels that it chooses them by.
    """
    update = {"root": str(source), "layout": "auto", "grade": "all", "cohort": "all", "strict": True}
    cases = find_cases(run.config.data.model_copy(update=update))[0]
    frames, parts, truths = zip(*(_cut(run, case, indices) for case in cases), strict=True)
    table, images, labels = pd.concat(frames, ignore_index=True), torch.cat(parts), torch.cat(truths)
    logits = _logits(run, FINAL, images)
    unlabelled = torch.from_numpy(~table["labelled"].to_numpy(dtype=bool))
    labels[unlabelled] = predicted_labels(logits)[unlabelled]
    masks = region_masks(logits, run.config.regions.threshold)
    return NewScan(table, images, labels, masks, region_scores(logits, labels, masks))


def _cut(run: Run, case: Case, indices: Sequence[int]) -> tuple[pd.DataFrame, Tensor, Tensor]:
    data, volume = run.config.data, load_volume(case)
    asked = SliceSelection(selection="list", indices=tuple(set(indices))) if indices else None
    chosen = slab = _asked_slices(volume, asked) if asked else _own_slices(run, volume)
    if asked and data.intensity == "maximum":
        # Of a whole slab: a slice is scaled as among the run's own, not by itself.
        with suppress(UsageError):
            slab = tuple(sorted({*chosen, *_own_slices(run, volume)}))
    cut, kept = cut_slices(volume, slab, label_scheme(run), data), np.searchsorted(slab, chosen)
    images = torch.from_numpy(cut.images[kept])
    labels = torch.zeros((len(images), *images.shape[2:]), dtype=torch.uint8)
    if cut.labels is not None:
        labels = torch.from_numpy(cut.labels[kept])
    warnings = "; ".join([*volume.warnings, *cutting_warnings(volume, chosen, data)])
    about = {"case": case.case, "labelled": cut.labels is not None, "warnings": warnings}
    return pd.DataFrame({"index": chosen, **about}), images, labels


def _asked_slices(volume: Volume, asked: SliceSelection) -> tuple[int, ...]:
    """Those that are asked for.

    Raises:
        UsageError: the scan lacks one, which another ``--index`` would mend.
    """
    try:
        return choose_slices(volume, asked)
    except VolumeError as error:
        raise UsageError(f"--index: {error}") from None


def _own_slices(run: Run, volume: Volume) -> tuple[int, ...]:
    """Those that the run would cut of a scan.

    Raises:
        UsageError: it can't tell, or the scan lacks them.
    """
    slices = run.config.data.slices
    unlabelled = volume.labels is None or not volume.labels.any()
    if unlabelled and slices.selection in ("tumour", "largest"):
        found = "no segmentation" if volume.labels is None else "an empty segmentation"
        raise UsageError(
            f"{volume.case}: expected labels, by which this run chooses slices (data.slices.selection is "
            f"{slices.selection}), found {found}: name slices with --index"
        )
    try:
        return choose_slices(volume, slices)
    except VolumeError:
        needed = max(slices.indices) + 1 if slices.selection == "list" else slices.count
        raise UsageError(
            f"{volume.case}: expected at least {needed} slices, as this run cuts them, found "
            f"{volume.images.shape[3]}: name slices with --index"
        ) from None


def _logits(run: Run, network: str, images: Tensor) -> Tensor:
    device = device_here(run)
    model = run.model(network).to(device)
    with torch.inference_mode(), arithmetic():
        parts = [model(batch.to(device)).float().cpu() for batch in images.split(PREDICTED_SLICES)]
    return torch.cat(parts).clone()


def scan_influence(run: Run, scan: NewScan, size: int) -> tuple[Tensor, Tensor]:
    """The influence (class, slice, column) of every train region on every region of a scan (eq. 6).

    And the gradient norms (class, slice) of these, estimated as the influence is.
    """
    kernels, norm2 = [], []
    for epoch in run.config.influence_epochs():
        masks = _masks(run, scan, epoch)
        engine = differentiator(run, epoch, device_here(run))
        inputs = (scan.images, scan.labels, masks)
        batches = zip(*(part.split(run.config.resources.batch_slices) for part in inputs), strict=True)
        rows = (engine.differentiate(*batch).values for batch in batches)
        exists = region_pixels(masks) > 0
        if size == EXACT:
            kernel, squares = _exact_kernel(run, engine.layout, epoch, torch.cat([*rows]), exists)
        else:
            project = sketcher(run, engine.layout, epoch, size).sketch
            # A batch at a time: the rows of many patients would not fit.
            sketches = torch.cat([project(part).cpu() for part in rows])
            kernel, squares = indexed_kernel(run, size, epoch, sketches, exists), sketches.square().sum(2).mT
        kernels.append(kernel)
        norm2.append(squares)
    rates = run.learning_rates
    return sum_checkpoints(torch.stack(kernels), rates), gradient_norms(torch.stack(norm2), rates)


def _masks(run: Run, scan: NewScan, epoch: int) -> Tensor:
    if run.config.gradients.score == "image":
        return whole_slices(scan.masks)
    if run.config.regions.source == FINAL:
        return scan.masks
    return region_masks(_logits(run, checkpoint_name(epoch), scan.images), run.config.regions.threshold)


def _exact_kernel(run: Run, layout: Layout, epoch: int, rows: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel (class, slice, column) of a checkpoint, and the squared norms (class, slice) of the rows."""
    size, precision, blocks = EXPANDED_VALUES[rows.device.type], run.config.gradients.precision, []
    for start, stop in ranges(len(run.train_slices), run.config.influence.tile_slices):
        train = ShardReader(run, epoch, "train", (start, stop), layout, rows.device)
        (kernel, norm2), size = fitting_kernel(layout, partial(_part, rows), train, precision, size)
        blocks.append(kernel)
    train_exists = torch.from_numpy(region_exists(run, run.train_slices, epoch))
    return train_columns(without_absent(torch.cat(blocks, dim=3).cpu(), exists, train_exists)), norm2.cpu()


def _part(rows: Tensor, segment: Segment) -> Tensor:
    return rows[:, segment.offset : segment.stop]


def _regions(run: Run, scan: NewScan) -> Tensor:
    """Which regions there are to explain, (slice, class): the final network's, and those of all checkpoints."""
    pixels = [region_pixels(_masks(run, scan, epoch)) for epoch in run.config.influence_epochs()]
    return (region_pixels(scan.masks) > 0) | (torch.stack(pixels) > 0).all(0)


def _region_table(run: Run, scan: NewScan, exists: Tensor, influence: Tensor) -> pd.DataFrame:
    pixels, overlap = region_pixels(scan.masks), region_overlap(scan.masks, scan.labels)
    slices, classes = (part.numpy() for part in exists.nonzero(as_tuple=True))
    in_tensor = (~influence.isnan()).any(2).mT
    own = scan.table.iloc[slices].reset_index(drop=True)
    return own.assign(
        class_id=(classes + 1).astype(np.int32),
        class_name=[run.classes[position] for position in classes],
        pixels=pixels.numpy()[slices, classes],
        overlap=overlap.numpy()[slices, classes],
        dice=scan.scores.numpy()[slices, classes],
        in_tensor=in_tensor.numpy()[slices, classes],
    )


def _rankings(
    run: Run, scan: NewScan, scores: Sequence[ClassScores], is_global: Tensor, left_out: Tensor, k: int
) -> pd.DataFrame:
    train = _train_table(run)
    frames = []
    for class_id, position in _existing(scores):
        mine = scores[class_id - 1]
        ranked = mine.ranked[position : position + 1]
        for side, key in (("proponent", ranked), ("opponent", -ranked)):
            columns, ranks = first_places(above_zero(key), left_out[class_id - 1], k)
            frame = train.iloc[columns.tolist()].assign(
                case=scan.table["case"].iloc[position],
                index=scan.table["index"].iloc[position],
                class_id=np.int32(class_id),
                class_name=run.classes[class_id - 1],
                side=side,
                rank=ranks.numpy(),
                influence=mine.influence[position, columns].numpy(),
                cosine=mine.cosine[position, columns].numpy(),
                is_global=is_global[class_id - 1, columns].numpy(),
                ranked_by=run.config.explainers.score,
                query_labelled=bool(scan.table["labelled"].iloc[position]),
            )
            frames.append(frame)
    first = ["case", "index", "class_id", "class_name", "side", "rank", "influence", "cosine"]
    names = [*first, *train.columns, "is_global", "query_labelled", "ranked_by"]
    return pd.concat(frames, ignore_index=True)[names] if frames else pd.DataFrame(columns=names)


def _existing(scores: Sequence[ClassScores]) -> Iterator[tuple[int, int]]:
    """Class and position of every query region, slice by slice."""
    exists = torch.stack([(~one.influence.isnan()).any(1) for one in scores], dim=1)
    return ((class_id + 1, position) for position, class_id in exists.nonzero().tolist())


def _train_table(run: Run) -> pd.DataFrame:
    """A row a train column of the tensor, in its order."""
    slices, classes = train_regions(run)
    own = run.slices.set_index("slice").reindex(slices)
    return pd.DataFrame(
        {
            "patient": own["patient"].to_numpy(),
            "train_index": own["index"].to_numpy(),
            "train_class": [run.classes[int(one) - 1] for one in classes],
            "train_class_id": classes,
            "train_slice": slices,
            "overlap": overlap_of(run, slices, classes),
        }
    )


def _worth(agreement: pd.DataFrame) -> str:
    chosen = agreement[agreement["query_set"] == agreement["query_set"].iloc[-1]]
    means = np.average(chosen[["spearman", "top_20"]], weights=chosen["rows"], axis=0)
    return (
        f"on the run's own {chosen['query_set'].iloc[0]} queries they order train regions by influence with a rank "
        f"correlation of {means[0]:.3f} and find {means[1]:.0%} of the 20 strongest of each side"
    )

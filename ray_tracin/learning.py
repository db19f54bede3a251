"""The stages in which the network learns and predicts: training, its table, region masks, their table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ray_tracin import store as paths
from ray_tracin.regions import predicted_labels, region_masks, region_overlap, region_pixels, region_scores
from ray_tracin.runs import Run
from ray_tracin.stages import Result, Stage
from ray_tracin.store import Receipt
from ray_tracin.training import Trainer
from ray_tracin.unet import build_unet
from ray_tracin.vocabulary import EpochKey, SliceRange, checkpoint_name, ranges

PREDICTED_SLICES = 8
"""Slices that are predicted at once. Fixed: another batch could move a pixel across the threshold in its last bit."""
REGION_SLICES = 32
"""Slices of one chunk of ``regions.zarr``."""
FINAL = "final"


def pick_device(run: Run) -> torch.device:
    """The device that ``resources.device`` names; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    wanted = run.config.resources.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("resources.device is cuda, and this process sees no GPU: use auto or cpu, or a GPU node")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Train(Stage[EpochKey]):
    """Train the network, an epoch a key, strictly in order. A stopped training goes on where it stopped."""

    name: ClassVar[str] = "train"
    uses_gpu: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    def keys(self) -> Sequence[EpochKey]:
        """The epochs, from 1."""
        return [EpochKey(epoch) for epoch in range(1, self.run.config.training.epochs + 1)]

    def open(self) -> Callable[[EpochKey], Result]:
        """Train up to the end of an epoch and write its checkpoint."""
        torch.set_num_threads(self.run.config.resources.training_threads)
        trainer = build_trainer(self.run)

        def train(key: EpochKey) -> Result:
            return train_to(self.run, trainer, key)

        return train


def build_trainer(
    run: Run, rank: int = 0, world_size: int = 1, wrap: Callable[[nn.Module], nn.Module] = lambda network: network
) -> Trainer:
    """A trainer on the slices of this run, before its first epoch."""
    table = run.slices[run.slices["labelled"]]
    rows = [int(row) for row in table["slice"]]
    position = {row: place for place, row in enumerate(rows)}
    chosen = {
        split: [position[int(row)] for row in table.loc[table["split"] == split, "slice"]]
        for split in ("train", "validation")
    }
    return Trainer(
        build_unet(run.config.model, len(run.modalities), len(run.classes), run.config.seed),
        run.images(rows),
        run.labels(rows),
        train=chosen["train"],
        validation=chosen["validation"],
        patients=list(table["patient"]),
        config=run.config.training,
        seed=run.config.seed,
        device=pick_device(run),
        rank=rank,
        world_size=world_size,
        wrap=wrap,
    )


def train_to(run: Run, trainer: Trainer, key: EpochKey, writes: bool = True) -> dict[str, Any]:
    """Train until the epoch is finished, from the newest state before it; write its checkpoint.

    ``writes=False`` trains along without touching the run: the other processes of a distributed training.
    """
    _rewind(run, trainer, key)
    record = None
    while trainer.epoch < key.epoch:
        record = trainer.train_epoch()
    assert record is not None
    if not writes:
        return {}
    weights = trainer.weights()
    run.save_torch(paths.checkpoint_path(str(key)), weights)
    run.save_torch(_state_path(key), trainer.state())
    if key.epoch == run.config.training.epochs:
        run.save_torch(paths.checkpoint_path(FINAL), weights)
    row = record.row()
    publish_checkpoints(run, {**_finished_rows(run), str(key): row}, recorded=False)
    _drop_states(run, before=key.epoch - 1)
    return row


def _rewind(run: Run, trainer: Trainer, key: EpochKey) -> None:
    """Bring a trainer that isn't just before the epoch to the newest stored state before it."""
    if trainer.epoch == key.epoch - 1:
        return
    states = {epoch: path for epoch, path in _states(run).items() if trainer.epoch < epoch < key.epoch}
    if states:
        trainer.restore(run.load_torch(states[max(states)]))
    assert trainer.epoch < key.epoch, f"epochs are trained in order, asked for {key} after epoch {trainer.epoch}"


def _states(run: Run) -> dict[int, str]:
    receipts = run.store.receipts(Train.name)
    damaged = run.store.problems(receipts.values(), check_bytes=True)
    sound = [receipt for name, receipt in receipts.items() if f"{Train.name}/{name}" not in damaged]
    held = {int(receipt.key.removeprefix("epoch_")): receipt for receipt in sound}
    return {epoch: path for epoch, receipt in held.items() if (path := _state_of(receipt))}


def _state_path(key: EpochKey) -> str:
    return f"checkpoints/state_{key.epoch:02d}.pt"


def _state_of(receipt: Receipt) -> str | None:
    return next((file.path for file in receipt.files if "/state_" in file.path), None)


def _drop_states(run: Run, before: int) -> None:
    """Delete the optimiser states of earlier epochs; the newest two are enough to go on after any kill."""
    for receipt in run.store.receipts(Train.name).values():
        path = _state_of(receipt)
        if path and int(receipt.key.removeprefix("epoch_")) < before:
            kept = tuple(file for file in receipt.files if file.path != path)
            run.store.write_receipt(replace(receipt, files=kept))
            run.store.objects.delete([path])


def _finished_rows(run: Run) -> dict[str, Result]:
    return {key: receipt.result for key, receipt in run.store.receipts(Train.name).items()}


def publish_checkpoints(run: Run, rows: Mapping[str, Mapping[str, Any]], *, recorded: bool) -> None:
    """Write ``checkpoints.parquet``: one row a finished epoch."""
    chosen = set(run.config.influence_epochs())
    table = pd.DataFrame([rows[key] for key in sorted(rows, key=lambda key: int(rows[key]["epoch"]))])
    table["file"] = [paths.checkpoint_path(checkpoint_name(epoch)) for epoch in table["epoch"]]
    table["influence"] = [epoch in chosen for epoch in table["epoch"]]
    first = ["epoch", "optimizer", "learning_rate", "file", "influence", "loss"]
    ordered = table[first + [column for column in table.columns if column not in first]]
    run.store.write_table(paths.CHECKPOINTS, ordered, recorded=recorded)


@dataclass(frozen=True)
class TabulateCheckpoints(Stage[str]):
    """Write the finished ``checkpoints.parquet``."""

    name: ClassVar[str] = "checkpoints"

    def keys(self) -> Sequence[str]:
        """One key: the table is written whole."""
        return ["checkpoints"]

    def open(self) -> Callable[[str], Result]:
        """Collect the records of the epochs; the last optimiser state is of no more use."""

        def tabulate(_: str) -> Result:
            publish_checkpoints(self.run, _finished_rows(self.run), recorded=True)
            _drop_states(self.run, before=self.run.config.training.epochs + 1)
            return {}

        return tabulate


@dataclass(frozen=True)
class MapRegions(Stage[SliceRange]):
    """Predict every slice and keep its regions: ``regions.zarr``.

    ``mask`` holds the final network's regions; where they come from each checkpoint, ``mask_epoch_NN`` holds those
    that are differentiated. ``labels`` are the labels that scores refer to: the ground truth, or where there is none
    the final network's own prediction.
    """

    name: ClassVar[str] = "regions"
    uses_gpu: ClassVar[bool] = True

    def keys(self) -> Sequence[SliceRange]:
        """Ranges of all slices."""
        return [SliceRange(start, stop) for start, stop in ranges(len(self.run.slices), REGION_SLICES)]

    def write_layout(self) -> None:
        """Create the arrays."""
        run, size = self.run, self.run.config.data.size
        slices, classes = len(run.slices), len(run.classes)
        about = {"threshold": run.config.regions.threshold, "source": run.config.regions.source}
        run.store.create_group("regions.zarr", about)
        for network in region_networks(run):
            run.store.create_array(
                mask_path(network),
                shape=(slices, classes, size, size),
                chunks=(REGION_SLICES, classes, size, size),
                dtype="bool",
                dimensions=("slice", "class", "h", "w"),
                attributes={**about, "network": network},
            )
        run.store.create_array(
            paths.REGION_LABELS,
            shape=(slices, size, size),
            chunks=(REGION_SLICES, size, size),
            dtype="uint8",
            dimensions=("slice", "h", "w"),
        )

    def open(self) -> Callable[[SliceRange], Result]:
        """The masks of a range of slices, and what the table needs of each region."""
        torch.set_num_threads(self.run.config.resources.threads)
        device = pick_device(self.run)
        networks = {name: self.run.model(name).to(device) for name in region_networks(self.run)}

        def mark(key: SliceRange) -> Result:
            return _map_regions(self.run, key, networks, device)

        return mark


def region_networks(run: Run) -> list[str]:
    """Whose regions are kept: ``final`` always, and each influence checkpoint if they come from there."""
    own = run.config.regions.source == "checkpoint"
    return [FINAL, *(checkpoint_name(epoch) for epoch in run.config.influence_epochs() if own)]


def mask_path(network: str) -> str:
    """Where the masks of a network are."""
    return paths.MASKS if network == FINAL else f"{paths.MASKS}_{network}"


def _map_regions(run: Run, key: SliceRange, networks: Mapping[str, nn.Module], device: torch.device) -> dict[str, Any]:
    rows = range(key.start, key.stop)
    images = torch.from_numpy(run.images(rows))
    labelled = run.slices["labelled"].to_numpy(dtype=bool)[key.start : key.stop]
    labels = torch.from_numpy(run.labels(rows))
    result: dict[str, Any] = {"slices": list(rows), "labelled": [bool(value) for value in labelled]}
    for name, network in networks.items():
        logits = _predict(network, images, device)
        masks = region_masks(logits, run.config.regions.threshold)
        if name == FINAL:
            labels[~labelled] = predicted_labels(logits)[~labelled]
            result["overlap"] = region_overlap(masks, labels).tolist()
            result["dice"] = region_scores(logits, labels, masks).tolist()
        result[f"pixels_{name}"] = region_pixels(masks).tolist()
        run.store.write(mask_path(name), _whole(key, masks.shape), masks.numpy())
    run.store.write(paths.REGION_LABELS, _whole(key, labels.shape), labels.numpy())
    return result


def _predict(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode():
        parts = [network(batch.to(device)).float().cpu() for batch in images.split(PREDICTED_SLICES)]
    return torch.cat(parts)


def _whole(key: SliceRange, shape: Sequence[int]) -> tuple[slice, ...]:
    return (slice(key.start, key.stop), *(slice(0, length) for length in shape[1:]))


@dataclass(frozen=True)
class TabulateRegions(Stage[str]):
    """Write ``regions.parquet``, one row a slice and class."""

    name: ClassVar[str] = "region-table"

    def keys(self) -> Sequence[str]:
        """One key: the table is written whole."""
        return ["regions"]

    def open(self) -> Callable[[str], Result]:
        """Collect what was counted when the regions were mapped."""

        def tabulate(_: str) -> Result:
            results = [receipt.result for receipt in self.run.store.receipts(MapRegions.name).values()]
            frames = [_region_rows(result, region_networks(self.run)) for result in results]
            table = pd.concat(frames).sort_values(["slice", "class"], ignore_index=True)
            self.run.store.write_table(paths.REGIONS, table)
            return {"regions": int((table["pixels"] > 0).sum())}

        return tabulate


def _region_rows(result: Result, networks: Sequence[str]) -> pd.DataFrame:
    pixels = np.asarray(result[f"pixels_{FINAL}"])
    slices, classes = pixels.shape
    columns = {
        "slice": np.repeat(np.asarray(result["slices"]), classes),
        "class": np.tile(np.arange(1, classes + 1), slices),
        "pixels": pixels.ravel(),
        "overlap": np.asarray(result["overlap"], dtype=float).ravel(),
        "dice": np.asarray(result["dice"], dtype=float).ravel(),
        "labelled": np.repeat(np.asarray(result["labelled"]), classes),
    }
    own = {f"pixels_{name}": np.asarray(result[f"pixels_{name}"]).ravel() for name in networks if name != FINAL}
    return pd.DataFrame({**columns, **own})

"""The stages in which the network learns: its training, an epoch a key, and the table of its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pandas as pd
import torch

from ray_tracin import store as paths
from ray_tracin.devices import pick_device
from ray_tracin.objects import StoredFile, checksum
from ray_tracin.runs import FINAL, Run, torch_bytes
from ray_tracin.soundness import file_problems
from ray_tracin.stages import Result, Stage
from ray_tracin.store import Receipt
from ray_tracin.training import Trainer
from ray_tracin.unet import build_unet
from ray_tracin.vocabulary import EpochKey, checkpoint_name

Agree = Callable[[StoredFile | None], StoredFile | None]
"""The state that all processes go on from, by the newest one that each of them finds; None: from the beginning."""


def _alone(state: StoredFile | None) -> StoredFile | None:
    return state


@dataclass(frozen=True)
class Train(Stage[EpochKey]):
    """Train the network, an epoch a key, strictly in order. A stopped training goes on where it stopped."""

    name: ClassVar[str] = "train"
    uses_gpu: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    def keys(self) -> Sequence[EpochKey]:
        """The epochs, from 1."""
        return [EpochKey(epoch) for epoch in range(1, self.run.config.training.epochs + 1)]

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.run.config.training.workers

    def open(self) -> Callable[[EpochKey], Result]:
        """Train up to the end of an epoch and write its checkpoint."""
        return self.open_share()

    def open_share(self, rank: int = 0, agree: Agree = _alone, **together: Any) -> Callable[[EpochKey], Result]:
        """The same, as one of several processes (``together`` as `Trainer` takes them), of which rank 0 writes.

        They all go on from the state that ``agree`` makes of what each of them finds.
        """
        torch.set_num_threads(self.run.config.resources.training_threads)
        trainer = build_trainer(self.run, rank=rank, **together)
        return partial(train_to, self.run, trainer, writes=rank == 0, agree=agree)


def build_trainer(run: Run, **together: Any) -> Trainer:
    """A trainer on the slices of this run, before its first epoch; ``together`` makes it one of several processes."""
    table = run.slices[run.slices["labelled"]]
    rows = [int(row) for row in table["slice"]]
    position = {row: place for place, row in enumerate(rows)}
    device = pick_device(run)
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
        device=device,
        # A GPU leaves the threads without work, and would wait for one of them; on a CPU they train.
        loaders=run.config.resources.training_threads if device.type != "cpu" else 0,
        **together,
    )


def train_to(run: Run, trainer: Trainer, key: EpochKey, *, writes: bool, agree: Agree) -> dict[str, Any]:
    """Train until the epoch is finished, from the newest state before it; write its checkpoint if this process does."""
    _rewind(run, trainer, key, agree)
    record = None
    while trainer.epoch < key.epoch:
        record = trainer.train_epoch()
    assert record is not None
    if not writes:
        return {}
    weights = trainer.weights()
    _refuse_another_network(run, key, weights)
    run.save_torch(paths.checkpoint_path(str(key)), weights)
    run.save_torch(_state_path(key), trainer.state())
    if key.epoch == run.config.training.epochs:
        run.save_torch(paths.checkpoint_path(FINAL), weights)
    row = record.row()
    publish_checkpoints(run, {**_finished_rows(run), str(key): row}, recorded=False)
    drop_states(run, before=key.epoch - 1)
    return row


def _refuse_another_network(run: Run, key: EpochKey, weights: Mapping[str, Any]) -> None:
    """Nothing, unless the epoch was finished before with other weights: what the run holds was built on those."""
    path = paths.checkpoint_path(str(key))
    before = _former_checksum(run, key, path)
    if before is None or before == checksum(torch_bytes(weights)):
        return
    raise ValueError(
        f"a file or the receipt of {key} was lost or damaged, and training again gave another network than before: "
        "another number of threads, CPU or GPU rounds otherwise. Regions and gradients were made with the former one: "
        f"restore {path} from a copy, go on where it was made, or begin a new run"
    )


def _former_checksum(run: Run, key: EpochKey, path: str) -> int | None:
    """Of the checkpoint that an epoch had left, by its receipt; without one by the file, if regions were made of it."""
    earlier = run.store.read_receipt(Train.name, str(key))
    if earlier is not None:
        files = earlier.files if earlier.fingerprint == run.fingerprint else ()
        return next((file.crc32c for file in files if file.path == path), None)
    built = run.store.objects.size(paths.REGIONS) is not None and run.store.objects.size(path) is not None
    return checksum(run.store.objects.get(path)) if built else None


def _rewind(run: Run, trainer: Trainer, key: EpochKey, agree: Agree) -> None:
    """Bring a trainer that isn't just before the epoch to the newest stored state before it."""
    if trainer.epoch == key.epoch - 1:
        return
    states = {epoch: file for epoch, file in _states(run).items() if trainer.epoch < epoch < key.epoch}
    newest = agree(states[max(states)] if states else None)
    if newest:
        trainer.restore(run.load_torch(newest.path))
    assert trainer.epoch < key.epoch, f"epochs are trained in order, asked for {key} after epoch {trainer.epoch}"


def _states(run: Run) -> dict[int, StoredFile]:
    """The states that training may go on from, by epoch; of the other epochs no byte is read."""
    held = [receipt for receipt in run.store.receipts(Train.name).values() if _state_of(receipt)]
    damaged = file_problems(run.store, held, check_bytes=True)
    sound = {receipt.key: receipt for receipt in held if f"{Train.name}/{receipt.key}" not in damaged}
    return {int(key.removeprefix("epoch_")): file for key, receipt in sound.items() if (file := _state_of(receipt))}


def _state_path(key: EpochKey) -> str:
    return f"checkpoints/state_{key.epoch:02d}.pt"


def _state_of(receipt: Receipt) -> StoredFile | None:
    return next((file for file in receipt.files if "/state_" in file.path), None)


def drop_states(run: Run, before: int) -> None:
    """Delete the optimiser states of earlier epochs: the newest two are enough to go on after any kill."""
    for receipt in run.store.receipts(Train.name).values():
        state = _state_of(receipt)
        if state and int(receipt.key.removeprefix("epoch_")) < before:
            kept = tuple(file for file in receipt.files if file != state)
            run.store.write_receipt(replace(receipt, files=kept))
            run.store.objects.delete([state.path])


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
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """One key: the table is written whole."""
        return ["checkpoints"]

    def open(self) -> Callable[[str], Result]:
        """Collect the records of the epochs."""

        def tabulate(_: str) -> Result:
            publish_checkpoints(self.run, _finished_rows(self.run), recorded=True)
            return {}

        return tabulate

"""Training of a segmentation network, an epoch at a time: the loss, and the Dice that is reported.

The one idea: an epoch is a function of the state before it. Every random draw is derived from (seed, epoch, slice) and
none from how far a process has run, so a training that was stopped between any two epochs and restored ends in the
same bits, on a CPU with the same number of threads, as one that was never stopped.

It doesn't know where slices come from, where states and weights are stored, or who runs the processes that train
together: they hand in their rank and the wrapper that averages their gradients.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Integer, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ray_tracin.arithmetic import arithmetic
from ray_tracin.config import TrainingConfig

OptimizerName = Literal["adam", "sgd"]


def dice_scores(
    probabilities: Float[Tensor, "slice class *space"],
    truth: Bool[Tensor, "slice class *space"],
    smoothing: float,
    over: Literal["slice", "batch"] = "slice",
) -> Float[Tensor, "group class"]:
    """The soft Dice of every slice and class; with ``over="batch"`` of all pixels together, as a single group.

    ``D_i = (2 Σ P_i GT_i + s) / (Σ (P_i + GT_i) + s)`` (eq. 1, its union read as the sum; smoothing ``s``). A class
    that is in neither prediction nor ground truth scores 1.
    """
    predicted, true = _pixels(probabilities, over), _pixels(truth.to(probabilities.dtype), over)
    scores: Tensor = (2 * (predicted * true).sum(2) + smoothing) / ((predicted + true).sum(2) + smoothing)
    return scores


def _pixels(
    maps: Float[Tensor, "slice class *space"], over: Literal["slice", "batch"]
) -> Float[Tensor, "group class pixel"]:
    pixels = maps.flatten(2)
    return pixels if over == "slice" else pixels.transpose(0, 1).flatten(1)[None]


def dice_loss(
    logits: Float[Tensor, "slice channel *space"], labels: UInt8[Tensor, "slice *space"], config: TrainingConfig
) -> Float[Tensor, ""]:
    """The loss ``L = 1 − (1/C) Σ_i D_i`` (section 3.2): soft Dice of the softmax, background excluded.

    ``config.dice`` says whether ``D_i`` is a slice's, averaged over slices, or the whole batch's.
    """
    probabilities = logits.softmax(dim=1)[:, 1:]
    scores = dice_scores(probabilities, _is_class(labels, probabilities.shape[1]), config.smoothing, config.dice)
    return 1 - scores.mean()


def _is_class(labels: Integer[Tensor, "slice *space"], classes: int) -> Bool[Tensor, "slice class *space"]:
    return torch.stack([labels == class_id for class_id in range(1, classes + 1)], dim=1)


@dataclass(frozen=True)
class DiceTable:
    """The hard Dice of every class in three averages, class 1 first; NaN where nothing defines it."""

    pooled: tuple[float, ...]
    """Of the pixels of all slices together."""
    slice: tuple[float, ...]
    """Mean over the slices where the class stands in ground truth or prediction."""
    patient: tuple[float, ...]
    """Pooled within each patient, then the mean over patients where the class stands in ground truth or prediction."""


def hard_dice_averages(
    prediction: Integer[Tensor, "slice *space"],
    labels: Integer[Tensor, "slice *space"],
    patients: Sequence[str],
    classes: int,
) -> DiceTable:
    """The Dice of predicted label maps against ground truth, ``2 |P ∩ GT| / (|P| + |GT|)``, without smoothing."""
    return _averaged(*_counted(prediction, labels, classes), patients)


def _counted(
    prediction: Integer[Tensor, "slice *space"], labels: Integer[Tensor, "slice *space"], classes: int
) -> tuple[Int64[Tensor, "slice class"], Int64[Tensor, "slice class"]]:
    predicted, true = _is_class(prediction, classes).flatten(2), _is_class(labels, classes).flatten(2)
    return (predicted & true).sum(2), predicted.sum(2) + true.sum(2)


def _averaged(
    shared: Int64[Tensor, "slice class"], total: Int64[Tensor, "slice class"], patients: Sequence[str]
) -> DiceTable:
    assert len(patients) == len(shared), "one patient a slice"
    # 0/0 is NaN, and nanmean of nothing is NaN: exactly where the Dice is not defined.
    pooled = 2 * shared.sum(0).double() / total.sum(0)
    slices = (2 * shared.double() / total).nanmean(0)
    names = {name: number for number, name in enumerate(dict.fromkeys(patients))}
    owner = torch.tensor([names[name] for name in patients], dtype=torch.int64)
    of_patient = torch.zeros(2, len(names), shared.shape[1], dtype=torch.int64)
    of_patient.index_add_(1, owner, torch.stack([shared, total]))
    means = (2 * of_patient[0].double() / of_patient[1]).nanmean(0)
    return DiceTable(tuple(pooled.tolist()), tuple(slices.tolist()), tuple(means.tolist()))


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did and where it left the network."""

    epoch: int
    """From 1."""
    optimizer: OptimizerName
    learning_rate: float
    loss: float
    """Mean over the augmented slices as they were trained on, of all processes."""
    dice: Mapping[Literal["train", "validation"], DiceTable]
    """In eval mode after the epoch, on clean slices."""

    def row(self) -> dict[str, Any]:
        """The columns of ``checkpoints.parquet``.

        ``dice_train_1`` is the pooled Dice of class 1 on the training slices; ``dice_train_slice_1`` and
        ``dice_train_patient_1`` are the two means.
        """
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "loss": self.loss,
        }
        for average, middle in (("pooled", ""), ("slice", "slice_"), ("patient", "patient_")):
            for split, table in self.dice.items():
                values = getattr(table, average)
                row |= {f"dice_{split}_{middle}{class_id}": value for class_id, value in enumerate(values, start=1)}
        return row

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "EpochRecord":
        """The record whose ``asdict`` this is."""
        return cls(**{**values, "dice": {split: DiceTable(**table) for split, table in values["dice"].items()}})


def schedule(config: TrainingConfig, epoch: int) -> tuple[OptimizerName, float]:
    """The optimiser and the learning rate of an epoch (from 1): Adam first, then SGD (section 3.2)."""
    if epoch <= config.adam_epochs:
        return "adam", config.adam_learning_rate
    return "sgd", config.sgd_learning_rate


def epoch_batches(rows: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: every row once, shuffled; the last batch has what is left."""
    order = np.random.default_rng(_derived_seed(seed, epoch)).permutation(np.asarray(rows, dtype=np.int64)).tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def rank_part(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The samples of a batch that one of several processes takes: ``rank``, ``rank + world_size``, ….

    All processes take equally many, so that their averaged gradient weighs samples equally and none waits for another:
    a batch that doesn't divide is filled up with its own first samples.
    """
    steps = -(-len(batch) // world_size)
    return [batch[(rank + world_size * step) % len(batch)] for step in range(steps)]


def _derived_seed(seed: int, *key: int) -> int:
    """32 bits from the run's seed, this stage and a key: unrelated for neighbouring keys, equal on every machine."""
    name = "/".join(str(part) for part in (seed, "train", *key))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _unwrapped(network: nn.Module) -> nn.Module:
    return network


class _Slices(Dataset[tuple[Tensor, Tensor]]):
    """Slices and labels by their rows, each made when it is asked for."""

    def __init__(self, make: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self._make = make

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self._make(row)


class Trainer:
    """One process that trains a network epoch by epoch: Adam, then SGD made afresh (section 3.2).

    ``train`` and ``validation`` are rows of the arrays, of slices with ground truth; ``patients`` names the patient of
    every row. No validation rows give a validation Dice of NaN.

    Several processes train together when each has its ``rank`` of ``world_size``, ``wrap`` returns a module that
    averages gradients over them, such as DistributedDataParallel, and ``average`` averages a number over them. They
    take parts of the same batches (`rank_part`); BatchNorm sees a process's own part, and so does the Dice where it
    is the batch's. Every process evaluates the whole of both splits; the weights that count are those of rank 0.

    ``loaders`` processes augment what comes next while the network learns; with 0 it waits for that.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        images: Float32[np.ndarray, "slice modality h w"],
        labels: UInt8[np.ndarray, "slice h w"],
        *,
        train: Sequence[int],
        validation: Sequence[int],
        patients: Sequence[str],
        config: TrainingConfig,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = _unwrapped,
        average: Callable[[float], float] = float,
        loaders: int = 0,
    ) -> None:
        assert len(train), "there are slices to train on"
        assert len(patients) == len(images), "one patient a slice"
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.model = model.to(device)
        self.images, self.labels, self.patients = images, labels, patients
        self.rows: dict[Literal["train", "validation"], Sequence[int]] = {"train": train, "validation": validation}
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        """Finished epochs."""
        self.records: list[EpochRecord] = []
        self.classes = self._count_classes()
        highest = max(int(labels[row].max()) for row in (*train, *validation))
        assert highest <= self.classes, f"labels are 0 to {self.classes}, got {highest}: are these slices labelled?"
        self._network = wrap(self.model)
        self._average = average
        self._loaders = loaders
        # Imported here, because MONAI takes a second of every command, and only training augments.
        self._augmenting = import_module("ray_tracin.augmentation")
        self._augmentation = self._augmenting.build_augmentation(config.augmentation, *images.shape[2:])
        self._optimizer: torch.optim.Optimizer | None = None

    def train_epoch(self) -> EpochRecord:
        """Train the next epoch and evaluate the network on clean slices.

        Raises:
            ValueError: training diverged; the network is then of no use.
        """
        assert self.epoch < self.config.epochs, f"training ends after epoch {self.config.epochs}"
        epoch = self.epoch + 1
        name, rate = schedule(self.config, epoch)
        if self._optimizer is None or name != schedule(self.config, self.epoch)[0]:
            self._optimizer = self._build_optimizer(epoch)
        loss = self._descend(self._optimizer, epoch)
        dice = {split: self._evaluate(rows, epoch) for split, rows in self.rows.items()}
        record = EpochRecord(epoch, name, rate, loss, dice)
        self.epoch = epoch
        self.records.append(record)
        return record

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on from here: tensors on the CPU and plain values, sharing no memory."""
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        return {
            "epoch": self.epoch,
            "model": self.weights(),
            "optimizer": _on_cpu(optimizer),
            "records": [asdict(record) for record in self.records],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back, or forward, to where another trainer of the same configuration, slices and seed was."""
        self.model.load_state_dict(state["model"])
        self.epoch = int(state["epoch"])
        self.records = [EpochRecord.from_plain(values) for values in state["records"]]
        self._optimizer = None
        if state["optimizer"] is not None:
            self._optimizer = self._build_optimizer(self.epoch)
            self._optimizer.load_state_dict(_on_cpu(state["optimizer"]))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the network's state dict on the CPU, as the network itself names it, without the wrapper."""
        weights: dict[str, Tensor] = _on_cpu(self.model.state_dict())
        return weights

    def _count_classes(self) -> int:
        row = self.rows["train"][0]
        with torch.no_grad():
            logits = self.model.eval()(torch.tensor(self.images[row][None]).to(self.device))
        return int(logits.shape[1]) - 1

    def _build_optimizer(self, epoch: int) -> torch.optim.Optimizer:
        name, rate = schedule(self.config, epoch)
        if name == "adam":
            return torch.optim.Adam(self.model.parameters(), lr=rate, weight_decay=self.config.weight_decay)
        return torch.optim.SGD(self.model.parameters(), lr=rate, momentum=self.config.momentum)

    def _descend(self, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """One pass over the training slices; the mean loss of a slice."""
        self._network.train()
        batches = epoch_batches(self.rows["train"], self.config.batch_size, self.seed, epoch)
        parts = [rank_part(batch, self.rank, self.world_size) for batch in batches]
        total, slices = 0.0, 0
        for number, (images, labels) in enumerate(self._augmented(parts, epoch), start=1):
            # The precision in which GPUs convolve by default, but by deterministic algorithms.
            with arithmetic("tf32"):
                loss = dice_loss(self._network(images.to(self.device)), labels.to(self.device), self.config)
                self._require_finite(loss, epoch, f"the loss in batch {number} of {len(batches)}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total, slices = total + loss.item() * len(images), slices + len(images)
        return self._average(total / slices)

    def _augmented(self, parts: list[list[int]], epoch: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """The batches of an epoch, augmented: images and labels."""
        several: dict[str, Any] = {}
        if self._loaders:
            # Forked, so that none has slices of its own; and no more batches ahead than a container's small shared
            # memory holds.
            several = {"num_workers": self._loaders, "multiprocessing_context": "fork", "prefetch_factor": 1}
        # With a generator of its own it leaves alone the one that a program has seeded.
        slices = _Slices(partial(self._augment, epoch))
        return DataLoader(slices, batch_sampler=parts, generator=torch.Generator(), **several)

    def _augment(self, epoch: int, row: int) -> tuple[Tensor, Tensor]:
        augmented: tuple[Tensor, Tensor] = self._augmenting.augment(
            self._augmentation, self.images[row], self.labels[row], _derived_seed(self.seed, epoch, row)
        )
        return augmented

    def _require_finite(self, values: Tensor, epoch: int, what: str) -> None:
        if bool(values.isfinite().all()):
            return
        name, rate = schedule(self.config, epoch)
        raise ValueError(
            f"training diverged: expected finite numbers, {what} of epoch {epoch} is not ({name}, learning rate "
            f"{rate:g}); lower training.{name}_learning_rate, and check that the images hold no NaN or infinity"
        )

    def _evaluate(self, rows: Sequence[int], epoch: int) -> DiceTable:
        """The hard Dice of the argmax on clean slices, in eval mode."""
        self.model.eval()
        counts = [torch.zeros(2, 0, self.classes, dtype=torch.int64)]
        for start in range(0, len(rows), self.config.batch_size):
            batch = list(rows[start : start + self.config.batch_size])
            with torch.no_grad(), arithmetic():
                logits = self.model(torch.from_numpy(self.images[batch]).to(self.device))
            # The last step of an epoch is followed by no loss that would show what it did.
            self._require_finite(logits, epoch, "a prediction after the last batch")
            labels = torch.from_numpy(self.labels[batch]).to(self.device)
            counted = _counted(logits.argmax(dim=1), labels, self.classes)
            counts.append(torch.stack(counted).cpu())
        shared, total = torch.cat(counts, dim=1)
        return _averaged(shared, total, [self.patients[row] for row in rows])


def _on_cpu(values: Any) -> Any:
    """A copy of nested plain values with every tensor on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", copy=True)
    if isinstance(values, Mapping):
        return {key: _on_cpu(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_on_cpu(value) for value in values)
    return values

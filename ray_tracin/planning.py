"""What a run will need, before anything runs: rows, bytes, arithmetic, memory of a worker, and the limit it breaks.

Everything is counted from the configuration, the network and the number of patients. The network is laid out on the
``meta`` device, so a plan of the paper's run takes seconds and no memory. Only `Plan.estimate` needs rates, which
`calibration` measures.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_tracin.attribution import stored_words
from ray_tracin.calibration import NOMINAL, Rates, calibrate
from ray_tracin.config import RunConfig
from ray_tracin.folders import find_cases
from ray_tracin.footprint import Footprint, Need
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.layers import Layout
from ray_tracin.presets import build_config, read_document
from ray_tracin.rounding import RowFormat
from ray_tracin.runs import Run, is_run, open_run_with
from ray_tracin.store import IncompleteRunError, RunStore
from ray_tracin.unet import HEAD, build_unet
from ray_tracin.vocabulary import QuerySet, UsageError, ranges
from ray_tracin.volumes import SCHEMES

PAIR_BYTES = 6
"""A pair of regions in the exported table. Measured, as what follows, on the demo: 5.3, 5 KiB, 0.9, 5 MB."""
REGION_BYTES = 6 << 10
"""A region in all other tables and what they are made of."""
PIXEL_BYTES = 1
"""A pixel of a modality as pictures and in the report."""
PAGE_BYTES = 8 << 20
"""The figures, and the report without its pictures."""
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """The needs of a run, counted."""

    config: RunConfig
    train: int
    """Train slices."""
    test: int
    """Slices of the test queries."""
    cut: int
    """All slices: with a test split, those of the validation split too."""
    classes: int
    layout: Layout
    forward_flops: int
    """Of one slice."""
    parameters: int
    """Trainable parameters of the network."""
    free_bytes: int | None
    """On the disk that the run is on, what the run has written counted as free; None in the cloud."""

    @cached_property
    def slices(self) -> int:
        """Slices whose gradients are needed."""
        return self.train + (self.test if "test" in self.config.influence.query_sets else 0)

    @property
    def shard_bytes(self) -> int:
        """Gradient shards of one checkpoint on disk, where each is whole."""
        side = self.config.gradients.shard_slices
        shards = sum(len(ranges(count, side)) for count in (self.train, self.slices - self.train))
        return shards * side * stored_words(self._rows) * self._rows.item_bytes

    @property
    def dense_bytes(self) -> int:
        """What the gradients of one checkpoint would take as rows of float32."""
        return self.slices * self.classes * self.layout.columns * 4

    @property
    def queries(self) -> int:
        """Query slices of all sets."""
        return sum(self.train if name == "train" else self.test for name in self.config.influence.query_sets)

    @property
    def pairs(self) -> int:
        """Values of the tensors."""
        return self.classes * self.queries * self.classes * self.train

    @property
    def tensor_bytes(self) -> int:
        """``influence.zarr`` and ``tiles.zarr``: the tensors, and twice their kernels."""
        return 4 * self.pairs * (1 + 2 * len(self.config.influence_epochs()))

    @property
    def output_bytes(self) -> int:
        """Tables, figures, pictures and the report."""
        pixels = self.cut * self.config.data.size**2 * len(self.config.data.modalities)
        tables = PAIR_BYTES * self.pairs + REGION_BYTES * self.classes * self.queries
        return tables + PIXEL_BYTES * pixels + PAGE_BYTES

    @property
    def kept_bytes(self) -> int:
        """On disk at the most while the run goes on: shards, tensors, slices, checkpoints, outputs."""
        checkpoints = len(self.config.influence_epochs()) if self.config.gradients.keep else 1
        size = self.config.data.size
        slices = self.cut * size * size * (4 * len(self.config.data.modalities) + self.classes + 2)
        weights = 4 * self.parameters * (self.config.training.epochs + 7)
        shards = 0 if self.fused else checkpoints * self.shard_bytes
        return shards + self.tensor_bytes + slices + weights + self.output_bytes

    @property
    def training_flops(self) -> int:
        """All epochs: a forward and a backward of twice that a train slice, and a forward of all with ground truth."""
        return self.config.training.epochs * self.forward_flops * (3 * self.train + self.cut)

    @property
    def gradient_flops(self) -> int:
        """One checkpoint: a forward a slice, and a backward of activations and the weights' products a region."""
        return self.slices * self.forward_flops * (1 + 2 * self.classes)

    @property
    def gram_flops(self) -> int:
        """One checkpoint: the symmetric train kernel, once, and the test kernel."""
        train, test = self.classes * self.train, self.classes * self.test
        symmetric = train * train if "train" in self.config.influence.query_sets else 0
        cross = 2 * train * test if "test" in self.config.influence.query_sets else 0
        return self.layout.columns * (symmetric + cross)

    @property
    def tiles(self) -> int:
        """Tiles of one checkpoint."""
        side = self.config.influence.tile_slices
        train, test = len(ranges(self.train, side)), len(ranges(self.test, side))
        queries = self.config.influence.query_sets
        return (train * (train + 1) // 2 if "train" in queries else 0) + (train * test if "test" in queries else 0)

    @property
    def passes(self) -> float:
        """How often every shard of a checkpoint is read to make its tiles."""
        blocks = len(ranges(self.train, self.config.influence.tile_slices))
        sides = 2 * self.tiles - (blocks if "train" in self.config.influence.query_sets else 0)
        return sides * self.config.influence.tile_slices / max(1, self.slices)

    @property
    def in_cloud(self) -> bool:
        """Whether the run is in cloud storage."""
        return self.free_bytes is None

    @cached_property
    def memory(self) -> Footprint:
        """What workers take, by stage."""
        return Footprint(self.config, self.layout, self.parameters, self.train, self.test, self.in_cloud)

    @property
    def tile_need(self) -> Need:
        """What a worker that makes tiles takes, by the source of their rows."""
        return self.memory.fused_tiles if self.fused else self.memory.stored_tiles

    @cached_property
    def fused_slices(self) -> int:
        """Slices that a single worker differentiates for the tiles of a checkpoint: it holds the rows of two blocks."""
        side = self.config.influence.tile_slices
        counts: dict[QuerySet, int] = {"train": self.train, "test": self.test}
        lengths = {name: [stop - start for start, stop in ranges(count, side)] for name, count in counts.items()}
        made, held = 0, set[tuple[QuerySet, int]]()
        for name in self.config.influence.query_sets:
            for query in range(len(lengths[name])):
                for other in range(query if name == "train" else 0, len(lengths["train"])):
                    needed: set[tuple[QuerySet, int]] = {(name, query), ("train", other)}
                    made += sum(lengths[owner][number] for owner, number in needed - held)
                    held = needed
        return made

    @cached_property
    def fused(self) -> bool:
        """Whether tiles are to make the rows of gradients themselves instead of reading shards."""
        return self.source[0] == "fused"

    @cached_property
    def source(self) -> tuple[str, str]:
        """Where tiles get the rows of gradients from, and why."""
        asked = self.config.gradients.source
        if asked != "auto":
            return asked, f"gradients.source={asked}"
        if self.config.gradients.keep:
            return "stored", "gradients.keep=true"
        need, limit = self.fused_bytes, self.fused_limit
        if need > limit:
            return "stored", f"two blocks of rows take {_gib(need)}, a worker has {_gib(limit)}"
        stored, fused = (sum(self.seconds(NOMINAL[self.memory.device], fused)[:2]) for fused in (False, True))
        names = ("fused", "stored") if fused < stored else ("stored", "fused")
        return names[0], f"about {min(fused, stored) / max(fused, stored):.0%} of the time of {names[1]}"

    def seconds(self, rates: Rates, fused: bool) -> tuple[float, float, float]:
        """Seconds of one worker at a checkpoint: differentiating, storage, multiplying."""
        made = self.fused_slices if fused else self.slices
        moved = 0.0 if fused else self.shard_bytes * (1 / rates.written + self.passes / rates.read)
        return made * self.gradient_flops / self.slices / rates.passes, moved, self.gram_flops / rates.products

    @property
    def fused_bytes(self) -> int:
        """What tiles from rows in memory take of the memory that is the limit: the GPU's where there is one."""
        need = self.memory.fused_tiles
        return need.gpu if self.memory.on_gpu else need.host

    @property
    def fused_limit(self) -> float:
        """Bytes of it that a worker may take."""
        resources = self.config.resources
        return GIB * (resources.gpu_memory if self.memory.on_gpu else resources.memory_per_worker)

    @property
    def problems(self) -> list[str]:
        """The limits that the run would break, each with the setting that would help."""
        stages = [
            ("gradients", self.memory.gradients, "gradients.shard_slices or resources.batch_slices"),
            ("tiles", self.tile_need, "influence.tile_slices"),
            ("stripes", self.memory.stripes, "influence.tile_slices"),
        ]
        if self.fused:
            stages[:2] = [("tiles", self.tile_need, "influence.tile_slices or set gradients.source=stored")]
        resources = self.config.resources
        limits = {"memory_per_worker": resources.memory_per_worker * GIB, "gpu_memory": resources.gpu_memory * GIB}
        found = [
            f"a worker of {what} needs {_gib(size)}, resources.{setting} is {_gib(limit)}: lower {help}, or allow more"
            for what, need, help in stages
            for (setting, limit), size in zip(limits.items(), (need.host, need.gpu), strict=True)
            if size > limit
        ]
        if self.free_bytes is not None and self.kept_bytes > self.free_bytes:
            found.append(
                f"the run needs {_gib(self.kept_bytes)} on disk, {_gib(self.free_bytes)} are free: {self._disk_advice}"
            )
        return found

    @property
    def _disk_advice(self) -> str:
        if self.fused:
            return "put the run on a larger disk"  # No shards are on it.
        advice = []
        if self.config.gradients.keep:
            advice.append("gradients.keep=false holds the shards of one checkpoint at a time")
        if self.config.gradients.dtype == "float32":
            advice.append("gradients.dtype=float16 halves them")
        return ", ".join(advice) or "put the run on a larger disk, or differentiate fewer gradients.parameters"

    def lines(self) -> list[tuple[str, str]]:
        """The plan as it is printed: what, and how much."""
        epochs = len(self.config.influence_epochs())
        rows = self.classes * self.train
        total = epochs * (self.gradient_flops + self.gram_flops)
        return [
            ("slices", f"{self.train} train, {self.test} test queries"),
            ("train-influence tensor", f"{self.classes} × {self.train} × {rows}, {epochs} checkpoints"),
            ("parameters", f"{self.layout.columns:,} of {self.parameters:,} differentiated"),
            ("training", f"{self.training_flops / 1e12:.2f} TFLOP in {self.config.training.epochs} epochs"),
            ("gradients, a checkpoint", f"{self.gradient_flops / 1e12:.2f} TFLOP"),
            ("tiles, a checkpoint", f"{self.gram_flops / 1e12:.2f} TFLOP in {self.tiles} tiles"),
            ("arithmetic of gradients and tiles", f"{total / 1e15:.3f} PFLOP"),
            ("gradient shards, a checkpoint", f"{_gib(self.shard_bytes)} (dense float32: {_gib(self.dense_bytes)})"),
            ("source of rows", f"{self.source[0]} ({self.source[1]})"),
            (
                ("slices differentiated, a checkpoint", f"{self.fused_slices} for {self.slices}")
                if self.fused
                else ("reads of every shard", f"{self.passes:.1f}")
            ),
            (
                "disk at the most",
                f"{_gib(self.kept_bytes)}" + ("" if self.free_bytes is None else f" of {_gib(self.free_bytes)}"),
            ),
            ("memory of a gradient worker", _memory(self.memory.gradients)),
            ("memory of a tile worker", _memory(self.tile_need)),
            ("memory of a stripe worker", _memory(self.memory.stripes)),
        ]

    def estimate(self, rates: Rates) -> list[tuple[str, str]]:
        """What the counts take at some rates, for one worker and for the workers that the configuration names."""
        parts = dict(zip(("passes", "storage", "products"), self.seconds(rates, self.fused), strict=True))
        epochs, workers = len(self.config.influence_epochs()), self.config.resources.workers or 1
        total = epochs * sum(parts.values())
        shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
        return [
            ("passes", f"{rates.passes / 1e9:,.0f} GFLOP/s"),
            ("products", f"{rates.products / 1e9:,.0f} GFLOP/s"),
            ("storage", f"{rates.written / 1e6:,.0f} MB/s written, {rates.read / 1e6:,.0f} MB/s read"),
            ("training, about", _duration(self.training_flops / rates.passes)),
            ("gradients and tiles, one worker", f"{_duration(total)} ({shares})"),
            ("limited by", max(parts, key=lambda name: parts[name])),
            *([(f"the same, {workers} workers", _duration(total / workers))] if workers > 1 else []),
        ]

    @cached_property
    def _rows(self) -> RowFormat:
        return RowFormat(self.layout, self.config.gradients.dtype)


def plan_run(
    uri: str | None,
    *,
    config: Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    patients: int | None = None,
) -> Plan:
    """The plan of a run that exists, as it would go on with these settings, or of one that they would start.

    Raises:
        ValueError: a bad configuration, one with another answer than the run's, or no way to know how many patients
            there are.
        FileNotFoundError: no such run, configuration or data folder.
    """
    document = read_document(config)
    given = document is not None or preset is not None or overrides
    if uri is not None and (not given or is_run(uri)):
        if patients is not None:
            raise UsageError(f"{uri} is there and has its own patients: leave --patients out, or give another --run")
        return plan_of(open_run_with(uri, preset=preset, config=config, overrides=overrides))
    if not given:
        raise ValueError("give --run of a run that exists, --config FILE, or --preset demo|paper")
    return _plan_by_patients(build_config(preset, document, overrides), uri, patients)


def measure(plan: Plan, uri: str | None) -> Rates:
    """The rates of this machine and of the storage of a run, or of temporary files where there is no run yet."""
    with tempfile.TemporaryDirectory() as folder:
        return calibrate(plan.config, plan.classes, uri if uri is not None and is_run(uri) else folder)


def plan_of(run: Run) -> Plan:
    """The plan of a run: by its slices, or by its patients while they are not cut."""
    try:
        test = len(run.query_slices("test"))
    except IncompleteRunError:
        return _plan_by_patients(run.config, run.uri, None)
    return _plan(run.config, (len(run.train_slices), test, len(run.slices)), len(run.classes), run.uri)


def _plan_by_patients(config: RunConfig, uri: str | None, patients: int | None) -> Plan:
    examinations = 1.0
    if patients is None:
        if config.data.root is None:
            raise ValueError("how many patients? Give data.root (--set data.root=…) or --patients N")
        cases = find_cases(config.data)[0]
        patients = len({case.patient for case in cases})
        examinations = len(cases) / patients
    per_patient = examinations * (len(config.data.slices.indices) or config.data.slices.count)
    validation, test = round(patients * config.split.validation), round(patients * config.split.test)
    train = patients - validation - test
    classes = len(config.data.labels or SCHEMES.get(config.data.label_scheme, SCHEMES["brats"]))
    train, test, cut = (round(count * per_patient) for count in (train, test or validation, patients))
    return _plan(config, (train, test, cut), classes, uri)


def _plan(config: RunConfig, slices: tuple[int, int, int], classes: int, uri: str | None) -> Plan:
    train, test, cut = slices
    size, channels = config.data.size, len(config.data.modalities)
    network = build_unet(config.model, channels, classes, config.seed).to("meta").eval()
    example = torch.zeros((channels, size, size), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(example[None])
    layout = RegionDifferentiator(
        network, head=HEAD, parameters=config.gradients.parameters, example=example, classes=classes
    ).layout
    return Plan(
        config=config,
        train=train,
        test=test,
        cut=cut,
        classes=classes,
        layout=layout,
        forward_flops=counter.get_total_flops(),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        free_bytes=_free_bytes(uri),
    )


def _free_bytes(uri: str | None) -> int | None:
    store = RunStore(uri or ".")
    if not store.objects.is_local:
        return None
    folder = next(parent for parent in (Path(store.uri), *Path(store.uri).parents) if parent.exists())
    return shutil.disk_usage(folder).free + sum(
        store.objects.sizes().values() if uri and Path(store.uri).is_dir() else ()
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(need: Need) -> str:
    return _gib(need.host) + (f", of a GPU {_gib(need.gpu)}" if need.gpu else "")


def _gib(size: int | float) -> str:
    return f"{size / GIB:.2f} GiB"

"""Seconds and peak memory of explaining a tensor: the steps `explainers` and `features`, and the figures.

    python benchmarks/explanations.py --train 2070 --test 520 --features 64

A run is made with random values (an influence tensor of random vectors with heavy tails, a fifth of the regions absent;
random feature maxima, images and regions), so that nothing has to be trained. What is not measured: the forward passes
that give the feature maxima. Each step runs on a Ray cluster of its own with two workers; memory is the proportional
set size of all its processes together, Ray's included, sampled four times a second.

``--times 10`` does the same again with ten times as many slices, without figures, and prints the ratios.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from ray_tracin import store as paths
from ray_tracin.assembly import AssembleStripes
from ray_tracin.datasets import execute_on_ray_data
from ray_tracin.explaining import CountLists, RankPatients, RankQueries, TabulateGlobalExplainers, TabulateRankings
from ray_tracin.featuring import MAXIMA, MapFeatures, RankFeatures, TabulateFeatures
from ray_tracin.figures import FIGURES, DrawFigures
from ray_tracin.mapping import REGION_SLICES, MapRegions
from ray_tracin.runs import FINAL, Run, open_run, start_run
from ray_tracin.runtime import cluster
from ray_tracin.stages import complete, execute_serially
from ray_tracin.unet import build_unet
from ray_tracin.vocabulary import ranges

MODALITIES = ("t1", "t1ce", "t2", "flair")
CLASSES = ("NCR/NET", "ED", "ET")
SLICES_A_PATIENT = 10
ABSENT = 0.2
LATENT = 8
SECONDS_BETWEEN_SAMPLES = 0.25
EXPLAINERS = (CountLists, TabulateGlobalExplainers, RankQueries, RankPatients, TabulateRankings)
FEATURES = (RankFeatures, TabulateFeatures)


def make_run(folder: Path, options: argparse.Namespace) -> Run:
    """A run as it is after the influence tensors and the feature maxima are there, of random values."""
    settings = [f"model={{width: {options.features}, depth: {options.depth}}}", f"data.size={options.size}"]
    run = start_run(folder, preset="paper", overrides=settings)
    random = np.random.default_rng(0)
    _write_slices(run, options.train, options.test, random)
    _write_network(run)
    exists = random.random((len(run.slices), len(CLASSES))) > ABSENT
    _write_regions(run, exists, random)
    vectors = _random_vectors(exists, random)
    _write_influence(run, vectors)
    _write_features(run, vectors, options.features, random)
    return run


def _write_slices(run: Run, train: int, test: int, random: np.random.Generator) -> None:
    rows, size = train + test, run.config.data.size
    names = {"modalities": list(MODALITIES), "classes": list(CLASSES)}
    patients = [f"RANDOM_{row // SLICES_A_PATIENT:05d}" for row in range(rows)]
    run.store.create_group("slices.zarr", names)
    for path, shape, dtype in (
        (paths.IMAGES, (len(MODALITIES), size, size), "float32"),
        (paths.LABELS, (size, size), "uint8"),
    ):
        dimensions = ("slice", *("modality", "h", "w")[-len(shape) :])
        chunks = (1, *shape)
        run.store.create_array(
            path, shape=(rows, *shape), chunks=chunks, dtype=dtype, dimensions=dimensions, attributes=names
        )
    labels = random.integers(0, 4, (rows, 6, 6), dtype=np.uint8)
    for row in range(rows):
        image = np.kron(random.uniform(-1, 1, (len(MODALITIES), 4, 4)), np.ones((size // 4, size // 4)))
        block = np.kron(labels[row], np.ones((size // 6 + 1, size // 6 + 1), np.uint8))[:size, :size]
        run.store.write(paths.IMAGES, (slice(row, row + 1),), image[None].astype("f4"))
        run.store.write(paths.LABELS, (slice(row, row + 1),), block[None])
    table = pd.DataFrame(
        {
            "slice": np.arange(rows),
            "patient": patients,
            "case": patients,
            "grade": pd.Series(["HGG"] * rows, dtype="string"),
            "split": ["train"] * train + ["validation"] * test,
            "index": np.arange(rows) % SLICES_A_PATIENT,
            "labelled": True,
            "warnings": "",
            **{f"pixels_{c}": (labels == c).sum((1, 2)) for c in (1, 2, 3)},
            "source": "random",
        }
    )
    run.store.write_table(paths.SLICES, table)


def _write_network(run: Run) -> None:
    model = build_unet(run.config.model, len(MODALITIES), len(CLASSES), seed=0)
    run.save_torch(paths.checkpoint_path(FINAL), model.state_dict())
    epochs = run.config.influence_epochs()
    run.store.write_table(paths.CHECKPOINTS, pd.DataFrame({"epoch": epochs, "learning_rate": 1e-2}))


def _write_regions(run: Run, exists: np.ndarray, random: np.random.Generator) -> None:
    MapRegions(run).write_layout()
    labels = run.store.array(paths.LABELS)
    for start, stop in ranges(len(exists), REGION_SLICES):
        truth = np.asarray(labels[start:stop])[:, None] == np.arange(1, 4)[:, None, None]
        masks = truth & exists[start:stop, :, None, None]
        run.store.write(paths.MASKS, (slice(start, stop),), masks)
    table = pd.DataFrame(
        {
            "slice": np.repeat(np.arange(len(exists)), 3),
            "class": np.tile((1, 2, 3), len(exists)),
            "pixels": np.where(exists, random.integers(1, 500, exists.shape), 0).ravel(),
            "overlap": random.random(exists.size),
            "dice": random.random(exists.size),
            "labelled": True,
        }
    )
    run.store.write_table(paths.REGIONS, table)


def _random_vectors(exists: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A vector a region (class, slice, latent), a direction a class, of lengths with heavy tails; NaN where absent."""
    vectors = random.standard_normal((len(exists), 3, LATENT)) + 2 * np.eye(3, LATENT)
    vectors *= np.exp(random.standard_normal((len(exists), 3, 1)))
    return np.where(exists[..., None], vectors, np.nan).transpose(1, 0, 2).astype(np.float32)


def _write_influence(run: Run, vectors: np.ndarray) -> None:
    """Inner products of the vectors: symmetric, as eq. 6 is."""
    stage = AssembleStripes(run)
    stage.write_layout()
    train = vectors[:, list(run.train_slices)].reshape(-1, LATENT)
    epochs = len(run.config.influence_epochs())
    for key in stage.keys():  # noqa: SIM118
        rows = list(run.query_slices(key.query_set)[key.start : key.stop])
        where = (slice(0, 3), slice(key.start, key.stop))
        values = vectors[:, rows] @ train.T
        run.store.write(f"{paths.INFLUENCE}/{key.query_set}", where, values)
        norm2 = np.repeat((vectors[:, rows] ** 2).sum(-1)[None], epochs, 0) * 100 / epochs  # Rates are 0.01.
        run.store.write(f"{paths.INFLUENCE}/norm2_{key.query_set}", (slice(0, epochs), *where), norm2)


def _write_features(run: Run, vectors: np.ndarray, features: int, random: np.random.Generator) -> None:
    """Half of the features are noise, the others see a direction of the vectors, whichever way it points."""
    stage = MapFeatures(run)
    stage.write_layout()
    directions = random.standard_normal((LATENT, features))
    for key in stage.keys():  # noqa: SIM118
        part = vectors[:, key.start : key.stop].transpose(1, 0, 2)
        seen = np.abs(part / np.linalg.norm(part, axis=-1, keepdims=True) @ directions) + 1
        noise = np.where(np.isnan(seen), np.nan, random.gamma(2, size=seen.shape))
        maxima = np.where(np.arange(features) % 2 == 0, seen, noise)
        run.store.write(MAXIMA, (slice(key.start, key.stop),), maxima.astype(np.float32))
    impact = pd.DataFrame({"feature": np.repeat(np.arange(features), 3), "class": np.tile((1, 2, 3), features)})
    run.store.write_table(
        paths.FEATURE_IMPACT, impact.assign(impact=random.normal(0.01, 0.02, len(impact)), slices=100)
    )


def do_step(run: Run, step: str, workers: int) -> None:
    """What the process of a step does."""
    resources = run.config.resources.model_copy(update={"workers": workers, "threads": 1})
    run = Run(run.store, run.config.model_copy(update={"resources": resources}))
    if step in FIGURES:
        execute_serially(DrawFigures(run), [step], lambda key, attempt=None: None)
        return
    with cluster("local", cpus=workers):
        for stage in EXPLAINERS if step == "explainers" else FEATURES:
            complete(stage(run), execute_on_ray_data, lambda event: None)


def measure(folder: Path, step: str, workers: int) -> tuple[float, float]:
    """Seconds, and peak memory of all its processes in GiB, of a step in a process of its own."""
    command = [sys.executable, __file__, f"--run={folder}", f"--step={step}", f"--workers={workers}"]
    started, peak = time.perf_counter(), 0
    child = subprocess.Popen(command)
    while child.poll() is None:
        peak = max(peak, _held(child.pid))
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.perf_counter() - started, peak / 2**30


def _held(pid: int) -> int:
    """Bytes that a process and those below it hold; shared pages are counted once."""
    held = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            held += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return held


def measure_run(folder: Path, options: argparse.Namespace, steps: list[str]) -> dict[str, tuple[float, float]]:
    """Make a run and measure its steps; their rows are printed as they are known."""
    run = make_run(folder, options)
    columns = len(CLASSES) * options.train
    print(
        f"\n{len(CLASSES)} × {options.train} × {columns} and {len(CLASSES)} × {options.test} × {columns}, "
        f"{options.features} features\n\n| step | seconds | peak memory, GiB |\n|---|---|---|"
    )
    del run
    found = {}
    for step in steps:
        found[step] = measure(folder, step, options.workers)
        print(f"| {step} | {found[step][0]:.1f} | {found[step][1]:.2f} |", flush=True)
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2070, help="train slices")
    parser.add_argument("--test", type=int, default=520, help="test slices")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--depth", type=int, default=5, help="levels of the network of figure 6")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=0, help="then the same with so many times as many slices")
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay; a temporary one without it")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        do_step(open_run(options.run), options.step, options.workers)
        return
    versions = f"torch {torch.__version__}, {platform.machine()}, Python {platform.python_version()}"
    print(f"{versions}, {options.workers} workers")
    folder = options.folder or Path(tempfile.mkdtemp())
    steps = ["explainers", "features"]
    small = measure_run(folder / "once", options, steps if options.times else [*steps, *FIGURES])
    if options.times:
        options.train, options.test = options.train * options.times, options.test * options.times
        large = measure_run(folder / "times", options, steps)
        for step in steps:
            seconds, memory = (large[step][which] / small[step][which] for which in (0, 1))
            print(f"{step}: {seconds:.1f} times the seconds, {memory:.1f} times the memory")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

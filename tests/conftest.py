"""Shared by all tests: one local Ray cluster, and a tiny finished run made once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from ray_tracin.branching import take_over
from ray_tracin.phantom import write_patients
from ray_tracin.pipeline import STEPS, Executors, run_to
from ray_tracin.runs import Run, start_run
from ray_tracin.stages import execute_serially

torch.set_num_threads(1)
# A law's first example may wait for another process of the tests.
settings.register_profile("steady", deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[str]:
    from ray_tracin.runtime import cluster

    # Workers import the stages that tests define.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with cluster("local", cpus=2) as kind:
        yield kind


TINY = [
    "data.size=32",
    "data.slices.count=4",
    "model={width: 4, depth: 3}",
    "training={epochs: 8, adam_epochs: 6, batch_size: 4, adam_learning_rate: 0.02}",
    "regions.threshold=0.5",
    "gradients.shard_slices=4",
    "influence={checkpoints: 2, tile_slices: 8}",
    "resources={workers: 2, training_threads: 1}",
]
"""Settings of a run that takes seconds, in which nothing divides evenly, and in which one class is never predicted."""


@pytest.fixture(scope="session")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic patients on a coarse grid, in the layout of BraTS 2019."""
    folder = tmp_path_factory.mktemp("patients")
    write_patients(folder, 6, edition="2019", seed=1, spacing=6.0, anatomy="analytic")
    return folder


@pytest.fixture(scope="session")
def tiny_run(patients: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, made by one process without a cluster."""
    run = start_run(tmp_path_factory.mktemp("tiny") / "run", preset="demo", overrides=[*TINY, f"data.root={patients}"])
    run_to(run, STEPS[-1], Executors(execute_serially, execute_serially), lambda event: None)
    return run


@pytest.fixture
def attempts(tmp_path: Path) -> Path:
    """Where stages of `faulty` count their attempts."""
    folder = tmp_path / "attempts"
    folder.mkdir()
    return folder


def branch(base: Run, folder: Path, *overrides: str) -> Run:
    """A run that begins with what the settings given leave as it is of another one, such as its network."""
    run = start_run(folder, overrides=overrides, base=base)
    take_over(base, run, lambda event: None)
    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests are dealt to processes: those that share the Ray cluster go to one, others stay with their file.

    Groups with slow tests come first, so that none of them is the last to start.
    """
    groups = {item: "cluster" if item.get_closest_marker("ray") else item.path.stem for item in items}
    slow = {group for item, group in groups.items() if item.get_closest_marker("slow")}
    items.sort(key=lambda item: groups[item] not in slow)
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))

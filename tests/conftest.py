"""Shared by all tests: one local Ray cluster, and a tiny finished run made once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[str]:
    from ray_tracin.runtime import cluster

    # Workers import the stages that tests define.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with cluster("local", cpus=2) as kind:
        yield kind


@pytest.fixture(scope="session")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic patients on a coarse grid, in the layout of BraTS 2019."""
    from ray_tracin.phantom import write_patients

    folder = tmp_path_factory.mktemp("patients")
    write_patients(folder, 6, edition="2019", seed=1, spacing=6.0, anatomy="analytic")
    return folder

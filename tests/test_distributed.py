"""Training in several processes through Ray Train."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from ray_tracin.claims import ClaimLostError
from ray_tracin.learning import Train
from ray_tracin.pipeline import Executors, run_to
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.runtime import RayExecutor
from ray_tracin.stages import Attempt, Event, execute_serially


class Endless:
    """A trainer that trains for hours."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def fit(self) -> None:
        time.sleep(3600)


def test_a_driver_that_has_to_stop_does_not_wait_for_the_training(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_tracin import distributed

    def report(key: object, attempt: Attempt | None = None) -> None:
        raise ClaimLostError("the run is another's by now")

    monkeypatch.setattr(distributed, "TorchTrainer", Endless)
    stage, began = Train(tiny_run), time.monotonic()
    with pytest.raises(ClaimLostError):
        distributed.execute_with_ray_train(stage, stage.keys(), report, {"CPU": 1.0})
    assert time.monotonic() - began < 60


@pytest.mark.ray
@pytest.mark.slow
def test_two_processes_train_one_network(local_cluster: str, patients: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    # Without batch statistics, and with SGD, which does not magnify rounding as Adam does, nothing but the order of
    # sums sets two processes apart from one.
    exact = ["model.norm=instance", "training={epochs: 3, adam_epochs: 1, adam_learning_rate: 1e-4}"]
    overrides = [*TINY, *exact, f"data.root={patients}"]
    run = start_run(tmp_path / "run", preset="demo", overrides=[*overrides, "training.workers=2"])
    with RayExecutor() as pool:
        run_to(run, "train", Executors(pool, execute_serially), events.append)
    assert [event.key for event in events if (event.stage, event.kind) == ("train", "done")] == [
        f"epoch_{epoch:02d}" for epoch in range(1, 4)
    ]
    table = open_run(run.uri).table("checkpoints")
    assert list(table["epoch"]) == [1, 2, 3]
    alone = start_run(tmp_path / "alone", preset="demo", overrides=overrides)
    run_to(alone, "train", Executors(execute_serially, execute_serially), lambda event: None)
    np.testing.assert_allclose(table["loss"], alone.table("checkpoints")["loss"], rtol=1e-3)
    together, single = (one.model("final").state_dict() for one in (run, alone))
    for name, value in together.items():
        torch.testing.assert_close(value, single[name], rtol=1e-3, atol=1e-3)
    assert not list((tmp_path / "run/checkpoints").glob("state_*"))

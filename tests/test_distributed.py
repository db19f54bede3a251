"""Training in several processes through Ray Train."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from ray.exceptions import ActorDiedError

from ray_tracin.claims import ClaimLostError
from ray_tracin.learning import Train, drop_states
from ray_tracin.objects import Objects, StorageError, StoredFile
from ray_tracin.pipeline import Executors, run_to
from ray_tracin.preparation import Cut, Index, Inspect, TabulateSlices
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.runtime import RayExecutor
from ray_tracin.stages import Attempt, Event, StageError, complete, execute_serially
from ray_tracin.training import Trainer
from ray_tracin.vocabulary import EpochKey


class Endless:
    """A trainer that trains for hours."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def fit(self) -> None:
        time.sleep(3600)


def test_a_driver_that_has_to_stop_does_not_wait_for_the_training(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_tracin import distributed

    def report(key: object, attempt: Attempt | None = None) -> None:
        raise ClaimLostError("the run is another's by now")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(distributed, "TorchTrainer", Endless)
    stage, began = Train(tiny_run), time.monotonic()
    with pytest.raises(ClaimLostError):
        distributed.execute_with_ray_train(stage, stage.keys(), report, {"CPU": 1.0})
    assert time.monotonic() - began < 60
    assert not list(tmp_path.iterdir()), "nor leaves anything behind"


def raised_in(process: Callable[[], None]) -> Exception:
    """What Ray Train makes of an error in one of the processes."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2._internal.util import construct_user_exception_with_traceback

    try:
        process()
    except ActorDiedError as error:
        return WorkerHealthCheckFailedError("A worker health check failed.", failure=error)
    except Exception as error:
        return construct_user_exception_with_traceback(error)
    raise AssertionError("it raised nothing")


def test_what_one_process_raised_is_told_and_not_what_the_others_made_of_it(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import WorkerGroupError

    from ray_tracin import distributed, runtime

    def full() -> None:
        error = StorageError("no space is left on the bucket")
        error.add_note("in stage train, key epoch_01")
        raise error

    def left_alone() -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:2345")

    def died() -> None:
        raise ActorDiedError

    processes: dict[int, Callable[[], None]] = {}

    class Failing(Endless):
        def fit(self) -> None:
            failures = {rank: raised_in(process) for rank, process in processes.items()}
            text = "\n".join(f"[Rank {rank} Error Snippet]:\n{failure}" for rank, failure in failures.items())
            raise WorkerGroupError(text, failures)

    monkeypatch.setattr(distributed, "TorchTrainer", Failing)
    stage, message = Train(tiny_run), "no space is left on the bucket$"
    for raising, told in (
        ({0: full}, message),
        ({0: full, 1: left_alone}, message),
        ({0: left_alone, 1: full}, message),
        ({0: left_alone, 1: died}, r"its worker went away \(ActorDiedError\)$"),
        ({0: left_alone}, "RuntimeError: Connection closed by peer"),
    ):
        processes.clear()
        processes.update(raising)
        with pytest.raises(StageError, match=f"training together: {told}"):
            runtime._execute_together(stage, stage.keys(), lambda key, attempt=None: None, {"num_cpus": 1.0})


class Answered:
    """What rank 0 tells, to whoever asks."""

    def __init__(self, told: Any) -> None:
        self._told = told

    def __call__(self, values: list[Any], src: int, device: torch.device) -> None:
        assert src == 0
        values[0] = self._told


@pytest.fixture
def half_trained(patients: Path, tmp_path: Path) -> Run:
    """A run of three epochs of which two are trained."""
    overrides = [*TINY, f"data.root={patients}", "training={epochs: 3, adam_epochs: 1}", "influence.checkpoints=1"]
    run = start_run(tmp_path / "run", preset="demo", overrides=overrides)
    for stage in (Inspect(run), Index(run), Cut(run), TabulateSlices(run)):
        complete(stage, execute_serially, lambda event: None)
    execute_serially(Train(run), Train(run).keys()[:2], lambda key, attempt=None: None)
    return run


def state_of(run: Run, key: str) -> StoredFile:
    receipt = run.store.read_receipt("train", key)
    assert receipt is not None
    return next(file for file in receipt.files if "state" in file.path)


def as_second_of_two(run: Run) -> Callable[[EpochKey], Any]:
    """The work of rank 1, which averages with nobody."""
    from ray_tracin import distributed

    agree = partial(distributed.state_of_first, run=run, device=torch.device("cpu"))
    return Train(run).open_share(1, agree=agree, world_size=2, average=lambda value: value)


def test_processes_that_train_together_go_on_from_the_epoch_of_the_first(
    half_trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, chosen = [], state_of(half_trained, "epoch_01")
    sound = Trainer.train_epoch
    monkeypatch.setattr(Trainer, "train_epoch", lambda trainer: trained.append(trainer.epoch + 1) or sound(trainer))
    for told, epochs in ((chosen, [2, 3]), (state_of(half_trained, "epoch_02"), [3]), (None, [1, 2, 3])):
        trained.clear()
        # This process sees the second epoch as finished, whatever rank 0 does.
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", Answered(told))
        as_second_of_two(half_trained)(EpochKey(3))
        assert trained == epochs


def test_a_state_that_a_shared_folder_shows_late_is_waited_for(
    half_trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_tracin import distributed

    chosen, folder = state_of(half_trained, "epoch_02"), Path(half_trained.uri)
    whole, waited = (folder / chosen.path).read_bytes(), []
    (folder / chosen.path).unlink()
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", Answered(chosen))

    def appear(seconds: float) -> None:
        waited.append(seconds)
        (folder / chosen.path).write_bytes(whole[: -1 if len(waited) == 1 else None])

    monkeypatch.setattr(distributed.time, "sleep", appear)
    as_second_of_two(half_trained)(EpochKey(3))
    assert len(waited) == 2
    (folder / chosen.path).unlink()
    monkeypatch.setattr(distributed, "SHARED_SECONDS", 0.0)
    with pytest.raises(
        ValueError, match=r"goes on from checkpoints/state_02\.pt, of \d+ bytes .* that all nodes share"
    ):
        as_second_of_two(half_trained)(EpochKey(3))


def test_of_what_training_has_left_only_what_it_may_go_on_from_is_read(
    half_trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_states(half_trained, before=2)
    read, sound = [], Objects.checksum
    monkeypatch.setattr(Objects, "checksum", lambda objects, path: read.append(path) or sound(objects, path))
    execute_serially(Train(half_trained), [EpochKey(3)], lambda key, attempt=None: None)
    assert sorted(read) == ["checkpoints/epoch_02.pt", "checkpoints/state_02.pt"]


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

"""The pool of actors: every key is done or listed with its reason, whatever happens to workers."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import TINY
from faulty import ARRAY, GpuSquare, Square
from ray._private.internal_api import memory_summary
from test_cli import is_the_tensor_of

from ray_tracin import attribution, stages, tiling
from ray_tracin.attribution import Differentiate
from ray_tracin.capacity import on_one_device, refuse_nodes_without_memory, room_for
from ray_tracin.costs import collect_events
from ray_tracin.faults import device_failed
from ray_tracin.pipeline import Executors, run_to
from ray_tracin.planning import plan_of
from ray_tracin.pool import Pool
from ray_tracin.presets import build_config
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.runtime import RayExecutor
from ray_tracin.stages import (
    Event,
    Report,
    Stage,
    StageError,
    StageWorker,
    complete,
    done_receipts,
    execute_serially,
    halving,
    out_of_memory,
)
from ray_tracin.tiling import ComputeTiles
from ray_tracin.vocabulary import UsageError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_cluster")]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start_run(tmp_path / "run", preset="demo")


def object_store() -> str:
    """What this cluster's object store holds, in Ray's words; there may be other clusters on this machine."""
    return memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)


def on_ray(stage: Any, *, elastic: bool = False) -> list[Event]:
    events: list[Event] = []
    with RayExecutor(elastic=elastic) as execute:
        complete(stage, execute, events.append)
    return events


def test_every_attempt_is_counted_with_its_reason(run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {2: "error", 6: "killed", 8: "memory"})
    events = on_ray(stage)
    assert np.array_equal(run.store.read(ARRAY), stage.expected())
    again = {event.key: event.detail for event in events if event.kind == "again"}
    assert again["000002-000004"] == "error: RuntimeError: the device is lost"
    assert again["000006-000008"] == "lost: its worker's process died: killed, crashed, or out of memory"
    assert "MemoryError" in again["000008-000010"]
    table = collect_events(run, [stage.name]).set_index(["key", "attempt"])
    assert list(table.loc["000002-000004", "outcome"]) == ["error", "done"]
    assert list(table.loc["000006-000008", "outcome"]) == ["lost", "done"]
    assert len(table) == stage.tries()
    done = table[table.outcome == "done"]
    assert (done.peak_memory > 50 << 20).all()
    assert set(done.device) == {"cpu"}
    assert set(done.process) <= stage.workers_seen()


def test_a_key_that_always_ends_its_worker_is_given_up_and_the_others_are_done(run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {4: "killed always"})
    with pytest.raises(StageError) as caught:
        on_ray(stage)
    assert "1 of 6 keys failed, the others are done and kept" in str(caught.value)
    assert "000004-000006: its worker's process died: killed, crashed, or out of memory" in str(caught.value)
    assert len(done_receipts(stage)) == 5
    assert stage.tries(4) == 3


def test_a_process_whose_gpu_failed_is_replaced_at_once(run: Run, attempts: Path) -> None:
    alone = Run(run.store, build_config("demo", None, ["resources.workers=1"]))
    stage = Square(alone, attempts, {0: "device"})
    events = on_ray(stage)
    assert np.array_equal(run.store.read(ARRAY), stage.expected())
    assert [event.detail for event in events if event.kind == "again"] == [
        "error: RuntimeError: CUDA error: an illegal memory access was encountered"
    ]
    assert len(stage.workers_seen()) == 2


def test_gpus_that_always_fail_are_not_tried_for_ever(run: Run, attempts: Path) -> None:
    alone = Run(run.store, build_config("demo", None, ["resources.workers=1"]))
    stage = Square(alone, attempts, dict.fromkeys(range(0, 12, 2), "device always"))
    with pytest.raises(StageError, match="6 of 6 keys failed"):
        on_ray(stage)
    assert len(stage.workers_seen()) == 4


def test_a_key_that_hangs_with_the_only_worker_is_tried_with_a_new_one(run: Run, attempts: Path) -> None:
    alone = Run(run.store, build_config("demo", None, ["resources={lease_seconds: 2, workers: 1}"]))
    stage = Square(alone, attempts, {4: "hangs"})
    events = on_ray(stage)
    assert np.array_equal(run.store.read(ARRAY), stage.expected())
    assert [event.detail for event in events if event.kind == "again"] == [
        "hung: did not finish within twice the lease of 2 s (resources.lease_seconds)"
    ]
    assert stage.tries() == 7


@pytest.mark.slow
def test_a_key_that_takes_far_longer_than_others_is_given_to_an_idle_worker_too(run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {0: "hangs"}, seconds=0.1)  # The lease is ten minutes.
    started = time.monotonic()
    events = on_ray(stage)
    assert np.array_equal(run.store.read(ARRAY), stage.expected())
    assert time.monotonic() - started < 60
    assert (stage.tries(0), stage.tries()) == (2, 7)
    assert [event.detail for event in events if event.kind == "again"] == ["copy: another worker was first"]


def test_the_object_store_stays_empty(run: Run, attempts: Path) -> None:
    stage, used = Square(run, attempts, length=80), []
    with RayExecutor() as execute:
        complete(stage, execute, lambda event: used.append(object_store()))
    assert len(used) == 42
    assert all("Plasma memory usage 0 MiB" in text for text in used), used


def test_keys_of_a_table_that_fail_leave_the_others_done(run: Run, attempts: Path) -> None:
    from ray_tracin.datasets import execute_on_ray_data

    stage = Square(run, attempts, {0: "value always", 4: "error", 8: "error always", 10: "special always"})
    with pytest.raises(StageError) as caught:
        complete(stage, execute_on_ray_data, lambda event: None)
    assert "3 of 6 keys failed" in str(caught.value)
    assert "000010-000012: RuntimeError: NonFiniteGradientError: expected finite gradients" in str(caught.value)
    assert "000000-000002: expected a number that can be squared" in str(caught.value)
    assert [stage.tries(start) for start in (0, 2, 4, 6, 8)] == [1, 1, 2, 1, 3]
    assert len(done_receipts(stage)) == 3


@pytest.mark.slow
def test_keys_of_a_table_whose_processes_die_or_hang_are_tried_again(run: Run, attempts: Path) -> None:
    from ray_tracin.datasets import execute_on_ray_data

    hasty = Run(run.store, build_config("demo", None, ["resources.lease_seconds=2"]))
    stage = Square(hasty, attempts, {2: "killed", 4: "killed always", 8: "hangs"})
    events: list[Event] = []
    with pytest.raises(StageError) as caught:
        complete(stage, execute_on_ray_data, events.append)
    died = "its worker's process died: killed, crashed, out of memory, or hung for twice the lease"
    assert str(caught.value) == (
        f"stage square: 1 of 6 keys failed, the others are done and kept:\n  000004-000006: {died}"
    )
    assert [stage.tries(start) for start in range(0, 12, 2)] == [1, 2, 3, 1, 2, 1]
    assert len(done_receipts(stage)) == 5
    assert [event.detail for event in events if event.kind == "again"] == [f"lost: {died}"] * 5


def test_nodes_without_the_memory_of_the_plan_are_refused(run: Run, attempts: Path) -> None:
    stage = Square(run, attempts)
    with pytest.raises(ValueError, match=r"a worker may need 1048576.00 GiB, and the node with the most memory has"):
        refuse_nodes_without_memory(stage, {"num_cpus": 1}, 1 << 50)
    refuse_nodes_without_memory(stage, {"num_cpus": 1}, 1 << 20)
    refuse_nodes_without_memory(stage, {"num_gpus": 1, "num_cpus": 0}, 1 << 50)  # None is there yet.


def test_receipts_that_this_process_does_not_see_are_another_disk(
    run: Run, attempts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SHARED_SECONDS", 0.0)

    def on_two_disks(stage: Stage[Any], keys: Sequence[Any], report: Report) -> None:
        execute_serially(stage, keys, report)
        # As where the worker of this key is on another node.
        Path(run.uri, "receipts", "square", f"{keys[3]}.json").unlink()

    with pytest.raises(ValueError, match=r"the receipts of 1, such as 000006-000008, are not in .*all nodes share"):
        complete(Square(run, attempts), on_two_disks, lambda event: None)


def test_what_this_cluster_will_never_have_is_refused(tmp_path: Path, attempts: Path) -> None:
    for overrides, wanted, setting in (
        (["resources.device=cuda"], "1 × 1 GPUs", "resources.device=cuda or resources.gpus_per_worker"),
        (["resources.threads=4096"], "1 × 4096 CPUs", "resources.threads or resources.training_threads"),
    ):
        run = start_run(tmp_path / setting.split("=")[0], preset="demo", overrides=overrides)
        with pytest.raises(ValueError, match=rf"gpu-square wants {wanted}, and Ray has .* here, .* change {setting}"):
            on_ray(GpuSquare(run, attempts))
    assert not list(attempts.iterdir())


def test_training_on_a_gpu_that_is_nowhere_is_refused(tiny_run: Run, patients: Path, tmp_path: Path) -> None:
    overrides = [*TINY, f"data.root={patients}", "resources.device=cuda"]
    run = start_run(tmp_path / "run", preset="demo", overrides=overrides)
    with RayExecutor() as pool, pytest.raises(ValueError, match="stage train wants 1 × 1 GPUs, and Ray has"):
        run_to(run, "train", Executors(pool, pool), lambda event: None)


@pytest.mark.parametrize(
    ("gpus", "torch_has_one", "embedded", "cluster"),
    [(2, True, "cuda", "cuda"), (2, False, "cpu", "cuda"), (0, True, "cpu", "cpu")],
)
def test_an_open_choice_of_device_is_settled_by_what_ray_has(
    run: Run, monkeypatch: pytest.MonkeyPatch, gpus: int, torch_has_one: bool, embedded: str, cluster: str
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {})})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_one)
    for kind, device in (("embedded", embedded), ("joined", embedded), ("cluster", cluster)):
        settled = on_one_device(run, kind)
        assert settled.config.resources.device == device
        assert settled.fingerprint == run.fingerprint
    asked = Run(run.store, build_config("demo", None, ["resources.device=cpu"]))
    assert on_one_device(asked, "cluster") is asked


def test_a_gpu_that_is_nowhere_is_refused_before_anything_is_done(run: Run, tiny_run: Run) -> None:
    wanted = Run(run.store, build_config("demo", None, ["resources.device=cuda"]))
    with pytest.raises(UsageError, match="device is cuda, and Ray finds no GPU on this machine"):
        on_one_device(wanted, "embedded")
    assert on_one_device(wanted, "cluster") is wanted, "which may grow"
    resources = tiny_run.config.resources.model_copy(update={"device": "cuda"})
    made = Run(tiny_run.store, tiny_run.config.model_copy(update={"resources": resources}))
    assert on_one_device(made, "embedded") is made, "what was made on GPUs can be looked at"


def test_a_share_of_a_gpu_is_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeID": "one", "Resources": {"GPU": 4.0, "CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    shares = {1.0: 4, 0.6: 4, 0.5: 8, 1 / 3: 12, 0.1: 40}
    assert {share: room_for({"num_gpus": share, "num_cpus": 0}) for share in shares} == shares
    assert room_for({"num_cpus": 3.0}) == 2


# Memory


def test_a_worker_that_shares_a_gpu_keeps_to_its_share(
    run: Run, attempts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def name(stage: type[Square], here: bool, *overrides: str) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
        settings = [f"resources.{one}" for one in overrides]
        return StageWorker(stage(Run(run.store, build_config("demo", None, settings)), attempts)).name.split(":")[2]

    assert name(GpuSquare, True, "gpus_per_worker=0.5") == "a GPU"
    assert shares == [0.475]
    assert name(GpuSquare, True) == "a GPU"
    assert name(GpuSquare, True, "gpus_per_worker=0.5", "device=cpu") == "cpu"
    assert name(GpuSquare, False, "gpus_per_worker=0.5") == "cpu"
    assert name(Square, True, "gpus_per_worker=0.5") == "cpu"
    assert shares == [0.475]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_memory_that_is_short_on_a_gpu_is_known_in_all_its_words(words: str) -> None:
    assert out_of_memory(RuntimeError(words))
    assert not device_failed(RuntimeError(words))


def test_a_worker_after_one_that_ran_out_of_memory_gets_as_much_more_as_a_node_has() -> None:
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    pool = Pool({"num_cpus": 0, "memory": int(most / 5)})
    asked = []
    for times in range(5):
        pool._lightened = times
        asked.append(round(pool._options()["memory"] / (most / 5)))
    assert asked == [1, 2, 4, 4, 4]


def test_a_batch_is_halved_until_it_fits_for_real() -> None:
    """The process may not have more than a batch of two takes."""
    sizes = []

    def work(size: int) -> int:
        sizes.append(size)
        if size > 2:
            torch.empty(1 << 50, dtype=torch.uint8)  # More than any address space has: the allocator refuses.
        return 10 * size

    assert halving(work, 8) == (20, 2)
    assert sizes == [8, 4, 2]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        halving(lambda size: torch.empty(1 << 50, dtype=torch.uint8), 4)
    with pytest.raises(RuntimeError, match="another"):
        halving(lambda size: (_ for _ in ()).throw(RuntimeError("another")), 4)


def test_tiles_begin_with_what_fitted_before(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    asked, multiply = [], tiling.tile_kernel

    def short_of_memory(*sides: Any, chunk_values: int, **options: Any) -> Any:
        asked.append(chunk_values)
        if chunk_values > 1 << 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return multiply(*sides, chunk_values=chunk_values, **options)

    monkeypatch.setattr(tiling, "tile_kernel", short_of_memory)
    stage = ComputeTiles(run, run.config.influence_epochs())
    work = stage.open()
    for key in stage.keys()[:3]:
        work(key)
    assert asked == [1 << 23, 1 << 22, 1 << 21, 1 << 20, 1 << 20, 1 << 20]


def test_gradients_in_halved_batches_are_the_same(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Differentiate(tiny_run, tiny_run.config.influence_epochs())
    work, key = stage.open(), stage.keys()[0]
    path, rows = attribution.gradients_path(key.epoch, key.query_set), (slice(key.start, key.stop), slice(0, 1000))
    before = tiny_run.store.read(path, rows)
    original = attribution.ShardDifferentiator._batch

    def short_of_memory(self: Any, *arguments: Any) -> Any:
        if arguments[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(self, *arguments)

    monkeypatch.setattr(attribution.ShardDifferentiator, "_batch", short_of_memory)
    work(key)
    assert work.args[1]._step == 2  # type: ignore[attr-defined]
    np.testing.assert_allclose(tiny_run.store.read(path, rows), before, rtol=1e-4, atol=1e-7)
    monkeypatch.undo()
    stage.open()(key)  # The fixture's bytes as they were.
    assert np.array_equal(tiny_run.store.read(path, rows), before)


def test_one_worker_gives_the_same_bits_and_takes_no_more_memory_than_planned(
    tiny_run: Run, patients: Path, tmp_path: Path
) -> None:
    run = start_run(tmp_path / "run", preset="demo", overrides=[*tiny_settings(patients), "resources.workers=1"])
    used = []
    with RayExecutor() as pool:
        run_to(run, "influence", Executors(pool, execute_serially), lambda event: used.append(object_store()))
    assert is_the_tensor_of(tiny_run, Path(run.uri))
    assert all("Plasma memory usage 0 MiB" in text for text in used), "gradients and tiles travel through storage"
    plan = plan_of(run)
    planned = {
        "gradients": plan.memory.gradients.host,
        "tiles": plan.tile_need.host,
        "influence": plan.memory.stripes.host,
    }
    events = run.table("events")
    for stage, most in planned.items():
        peak = events.loc[events.stage == stage, "peak_memory"].max()
        assert 0.2 * most < peak <= max(planned.values()), (stage, peak, most)


def tiny_settings(patients: Path) -> list[str]:
    from conftest import TINY

    return [*TINY, f"data.root={patients}"]

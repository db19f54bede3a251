"""The plan's choice between stored and fused rows, what it refuses, and what it tells of the time."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_folders import NEW, add_case

from ray_tracin.calibration import NOMINAL, Rates, calibrate
from ray_tracin.footprint import Need
from ray_tracin.planning import GIB, Plan, plan_run
from ray_tracin.presets import build_config
from ray_tracin.runs import Run

SMALL = [
    "resources.device=cpu",
    "data.size=32",
    "model={width: 4, depth: 3}",
    "regions.threshold=0.5",
    "resources.workers=2",
]


def plan(*overrides: str, patients: int = 28) -> Plan:
    return plan_run(None, preset="demo", overrides=[*SMALL, *overrides], patients=patients)


def test_shards_that_are_to_be_kept_are_stored() -> None:
    assert plan("influence.tile_slices=1000").source == ("stored", "gradients.keep=true")


def test_the_scheme_says_how_many_classes_there_will_be() -> None:
    assert plan("data.label_scheme=brats2024").classes == 4
    assert plan("data.labels={1: lesion}").classes == 1
    assert plan().classes == plan("data.label_scheme=msd").classes == 3


def test_rows_that_fit_are_not_stored() -> None:
    one = plan("gradients.keep=false", "influence.tile_slices=1000")
    assert one.fused
    assert one.fused_slices == one.slices, "every gradient once"
    assert one.kept_bytes < plan("influence.tile_slices=1000").kept_bytes
    assert one.problems == []


def test_rows_that_do_not_fit_are_stored() -> None:
    settings = ("gradients.keep=false", "influence.tile_slices=1000")
    memory = 0.999 * plan(*settings).fused_bytes / GIB
    one = plan(*settings, f"resources.memory_per_worker={memory}")
    assert not one.fused
    assert "two blocks of rows take" in one.source[1]


def test_many_blocks_are_cheaper_stored_where_arithmetic_is_slow() -> None:
    one = plan("gradients.keep=false", "influence.tile_slices=8")
    assert one.source[0] == "stored"
    assert one.fused_slices > 5 * one.slices


def test_workers_of_a_run_in_the_cloud_need_more() -> None:
    here = plan()
    there = replace(here, free_bytes=None)
    client = there.memory.gradients.host - here.memory.gradients.host
    assert client == there.memory.stripes.host - here.memory.stripes.host > 0
    assert there.tile_need.host - here.tile_need.host > client, "what was read is there once more"


def test_the_choice_can_be_overruled_and_what_does_not_fit_is_refused() -> None:
    asked = "gradients.source=fused"
    assert plan(asked).source == ("fused", asked)
    (problem,) = plan(asked, "influence.tile_slices=1000", "resources.memory_per_worker=0.95").problems[:1]
    assert "a worker of tiles needs" in problem
    assert "gradients.source=stored" in problem
    on_gpu = plan(asked, "resources.device=cuda", "resources.gpu_memory=0.5")
    assert "resources.gpu_memory is 0.50 GiB" in on_gpu.problems[0]


def test_where_no_shard_is_stored_nothing_about_shards_is_advised() -> None:
    for source, advice in (("stored", "gradients.keep=false holds"), ("fused", "put the run on a larger disk")):
        (problem,) = replace(plan(f"gradients.source={source}"), free_bytes=1).problems
        assert problem.split(" are free: ")[1].startswith(advice)


@pytest.mark.parametrize("preset", ["demo", "paper"])
@pytest.mark.parametrize("source", ["stored", "fused"])
def test_what_is_on_a_gpu_is_not_counted_as_memory_of_the_node(preset: str, source: str) -> None:
    def needs(device: str) -> list[Need]:
        settings = [f"resources.device={device}", f"gradients.source={source}"]
        found = plan_run(None, preset=preset, overrides=settings, patients=28)
        if (device, source) == ("cuda", "stored"):
            assert found.problems == []
            assert ", of a GPU " in dict(found.lines())["memory of a tile worker"]
        return [found.memory.gradients, found.tile_need]

    for cpu, gpu in zip(needs("cpu"), needs("cuda"), strict=True):
        assert cpu.gpu == 0
        assert gpu.host < cpu.host
        assert gpu.gpu > 0


def test_an_open_choice_of_device_is_planned_for_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(device: str) -> list[Need]:
        found = plan(f"resources.device={device}")
        return [found.memory.gradients, found.tile_need]

    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert needs("auto") == needs(device)


def test_a_gpu_that_is_too_small_is_refused_where_halving_would_not_help() -> None:
    small = ["resources.device=cuda", "resources.gpu_memory"]
    big = [*small[:1], "influence.tile_slices=100", "resources.batch_slices=64"]
    assert plan(*big, f"{small[1]}=1.5").problems == [], "batches and expanded gradients are halved"
    assert plan(*big).memory.fused_tiles.gpu > 1.5 * GIB, "blocks of rows want what is fastest"
    problems = plan(*big, f"{small[1]}=0.5").problems
    assert [problem.split()[3] for problem in problems] == ["gradients", "tiles"]
    assert all("resources.gpu_memory is 0.50 GiB" in problem for problem in problems)


@pytest.mark.parametrize(("side", "made"), [(1000, 10 + 4), (10, 10 + 4), (5, 5 + 5 + 0 + (4 + 5) + 5)])
def test_fused_slices_are_those_of_a_worker_that_holds_two_blocks(side: int, made: int) -> None:
    # Of two train blocks: tile (0, 0) makes block 0, (0, 1) block 1, (1, 1) nothing; test queries make theirs and 0,
    # which has gone, and then 1 again.
    assert replace(plan(f"influence.tile_slices={side}"), train=10, test=4).fused_slices == made


def test_the_estimate_adds_what_a_checkpoint_takes() -> None:
    one, rates = plan(), Rates(passes=1e9, products=1e9, written=1e6, read=2e6)
    passes, storage, products = one.seconds(rates, fused=False)
    assert passes == pytest.approx(one.gradient_flops / 1e9)
    assert storage == pytest.approx(one.shard_bytes * (1 / 1e6 + one.passes / 2e6))
    assert products == pytest.approx(one.gram_flops / 1e9)
    assert one.seconds(rates, fused=True)[1] == 0
    lines = dict(one.estimate(rates))
    assert (
        lines["limited by"]
        == max({"passes": passes, "storage": storage, "products": products}.items(), key=lambda x: x[1])[0]
    )
    assert "the same, 2 workers" in lines


def test_rates_are_measured_and_nothing_is_left(tmp_path) -> None:
    config = build_config("demo", None, SMALL)
    rates = calibrate(config, 3, str(tmp_path))
    for name in ("passes", "products", "written", "read"):
        measured, nominal = getattr(rates, name), getattr(NOMINAL["cpu"], name)
        assert math.isfinite(measured)
        assert nominal / 1000 < measured < 1000 * nominal, name
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_is_planned_with_the_settings_that_are_given(tiny_run: Run) -> None:
    before = tiny_run.store.objects.get("config.yaml")
    assert plan_run(tiny_run.uri).problems == []
    with_less = plan_run(tiny_run.uri, overrides=["resources.memory_per_worker=0.2"])
    assert "resources.memory_per_worker is 0.20 GiB" in with_less.problems[0]
    with pytest.raises(ValueError, match="another configuration"):
        plan_run(tiny_run.uri, overrides=["regions.threshold=0.6"])
    assert tiny_run.store.objects.get("config.yaml") == before


def test_two_examinations_a_patient_are_twice_the_slices(tmp_path: Path) -> None:
    for number in range(10):
        for time_point in range(2):
            add_case(tmp_path / f"set_{time_point}" / f"BraTS-GLI-{number:05d}-{time_point:03d}", NEW, "-")
    one, two = (
        plan_run(None, preset="demo", overrides=[*SMALL, f"data.root={root}"])
        for root in (tmp_path / "set_0", tmp_path)
    )
    assert (one.train, one.test) == (8 * 8, 2 * 8)
    assert (two.train, two.test) == (2 * one.train, 2 * one.test)

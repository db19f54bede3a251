"""What is computed on a GPU, on a device that pretends to be one: with numbers, and nothing of the host mixed in."""

import shutil
from pathlib import Path

import networks
import oracle
import pretended
import pytest
import torch
from conftest import branch
from test_gradients import CASES, by_parameter, differentiator
from test_querying import EVERYTHING, known_case

from ray_tracin.curves import feature_maps
from ray_tracin.devices import pick_device
from ray_tracin.figures import DrawFigures
from ray_tracin.influence import tile_kernel
from ray_tracin.labelmaps import export_label_maps
from ray_tracin.pipeline import Executors, index_sketches, run_to
from ray_tracin.querying import EXACT, read_scan, scan_influence
from ray_tracin.rounding import RowFormat
from ray_tracin.runs import Run, start_run
from ray_tracin.stages import complete, execute_serially

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
"""Relative error of a kernel whose rows, or operands, have so many digits."""
SERIAL = Executors(execute_serially, execute_serially)


@pytest.mark.parametrize("name", CASES)
def test_every_network_has_the_oracles_gradients_and_kernel_at_every_precision(name):
    build, size = CASES[name]
    model, batch = networks.seeded(build), networks.batch(size=size)
    expected = oracle.gradients(model, [key for key, _ in model.named_parameters()], *batch)
    with pretended.gpu() as device:
        images, labels, masks = (part.to(device) for part in batch)
        engine = differentiator(model.to(device), images)
        rows = engine.differentiate(images, labels, masks).values
        engine.check(images[:1], labels[:1], masks[:1])
        got = by_parameter(engine, rows)
        assert {value.device for value in (rows, *got.values())} == {device}
        got = {key: value.cpu() for key, value in got.items()}
        kernels = {
            (dtype, precision): _kernel(engine.layout, rows, dtype, precision)
            for dtype in ("float32", "float16", "bfloat16")
            for precision in ("float32", "bfloat16")
        }
    assert oracle.difference(*(torch.cat([side[key].flatten(2) for key in got], 2) for side in (got, expected))) < 1e-5
    exact = oracle.kernel(expected, expected)
    for formats, kernel in kernels.items():
        assert oracle.difference(kernel, exact) < max(ROUNDING[each] for each in formats), formats


def _kernel(layout, rows, dtype, precision):
    """From rows as they are kept, of the slices with themselves; that of two sides must be the same."""
    form = RowFormat(layout, dtype)
    kept = form.room(len(rows), rows.device)
    form.write(kept, 0, rows)
    read = lambda segment: form.read(kept, segment)  # noqa: E731
    one, two = (tile_kernel(layout, read, other, chunk_values=5_000, precision=precision)[0] for other in (None, read))
    assert one.device == rows.device
    torch.testing.assert_close(one.cpu(), two.cpu(), rtol=1e-3, atol=1e-5 * float(one.abs().max()))
    return one.cpu()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "precision"), [("stored", "bfloat16"), ("fused", "float32")])
def test_a_run_gives_the_tensor_of_one_on_the_host(tiny_run: Run, tmp_path: Path, source, precision):
    choices = f"gradients={{precision: {precision}, dtype: {precision}, source: {source}, shard_slices: 4}}"
    with pretended.gpu(values=1 << 18):
        run = branch(tiny_run, tmp_path / "run", choices, "influence.tile_slices=14")
        run_to(run, "ablation" if source == "stored" else "influence", SERIAL, lambda event: None)
        index_sketches(run, EVERYTHING, SERIAL, lambda event: None)
        folder, rows = known_case(run)
        scan = read_scan(run, folder)
        sizes = [EVERYTHING, EXACT] if source == "stored" else [EVERYTHING]
        explained = [scan_influence(run, scan, size)[0] for size in sizes]
    for query_set in run.config.influence.query_sets:
        expected = torch.from_numpy(tiny_run.influence(query_set)[:])
        got = torch.from_numpy(run.influence(query_set)[:])
        assert relative(got, expected) < ROUNDING[precision]
    positions = [run.query_slices("test").index(row) for row in rows]
    for influence in explained:
        assert relative(influence, expected[:, positions]) < ROUNDING[precision]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference where both have a value; where one has none the other must have none."""
    assert torch.equal(got.isnan(), expected.isnan())
    return oracle.difference(got.nan_to_num(), expected.nan_to_num().double())


def test_what_was_made_on_gpus_is_looked_at_without_one(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    copied = shutil.copytree(tiny_run.uri, tmp_path / "run")
    run = start_run(copied, overrides=["resources.device=cuda"])
    with pytest.raises(ValueError, match=r"expected a GPU on .* \(resources.device is cuda.* sees none there: set res"):
        pick_device(run)
    for receipt in Path(copied, "receipts/figures").iterdir():
        receipt.unlink()
    complete(DrawFigures(run), execute_serially, lambda event: None)
    assert next(feature_maps(run, [0], 1)).shape == (32, 32)
    folder, rows = known_case(run)
    assert len(list(export_label_maps(run, tmp_path / "maps", folder.name))) == 4
    influence, _ = scan_influence(run, read_scan(run, folder), EXACT)
    positions = [run.query_slices("test").index(row) for row in rows]
    assert relative(influence, torch.from_numpy(run.influence("test")[:])[:, positions]) < 1e-5

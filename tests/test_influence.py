import math

import networks
import oracle
import pytest
import test_arithmetic
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradients import monai_unet

from ray_tracin import arithmetic, correlation, influence, pairing
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.influence import (
    sum_checkpoints,
    tile_bytes,
    tile_kernel,
    train_columns,
    without_absent,
)
from ray_tracin.layers import expand

BUILD, SIZE = networks.NETWORKS["deep"]


@pytest.fixture(autouse=True, params=[*test_arithmetic.LIBRARIES, "pairs"])
def library(request, monkeypatch):
    """Which library multiplies expanded gradients, or that those which can be paired aren't expanded."""
    monkeypatch.setattr(arithmetic, "prefers_onednn", lambda: request.param == "oneDNN")
    monkeypatch.setattr(correlation, "LEAST_PRODUCT", 1)
    monkeypatch.setattr(pairing, "LEAST_GAIN", 0 if request.param == "pairs" else math.inf)
    monkeypatch.setattr(pairing, "TRAINS", 2)
    return request.param


@pytest.fixture(scope="module")
def deep():
    """A network, five slices, their packed gradients and the oracle's."""
    model = networks.seeded(BUILD)
    batch = networks.batch(slices=5, size=SIZE)
    engine = RegionDifferentiator(model, head="head", example=batch[0][0], classes=2)
    names = [name for name, _ in model.named_parameters()]
    return engine.layout, engine.differentiate(*batch).values, oracle.gradients(model, names, *batch)


def reader(values):
    return lambda segment: values[:, segment.offset : segment.stop]


def test_only_large_products_of_factors_are_a_call_for_every_slice(deep, library, monkeypatch):
    layout, values, _ = deep
    calls, multiply = [], arithmetic.inner_products
    monkeypatch.setattr(arithmetic, "inner_products", lambda *sides: calls.append(sides) or multiply(*sides))
    factors = [one for one in layout.segments if one.form == "factors" and one.geometry.groups == 1]
    expanded = lambda one: torch.cat(list(expand(one, reader(values)(one), 2, columns=one.columns)), 2)  # noqa: E731
    each = [expanded(segment) for segment in factors]
    assert len(calls) == (len(values) * len(factors) if library == "oneDNN" else 0)
    calls.clear()
    monkeypatch.setattr(correlation, "LEAST_PRODUCT", 1 << 23)
    torch.testing.assert_close([expanded(segment) for segment in factors], each)
    assert not calls


def part(gradients, start, stop):
    return {name: value[start:stop] for name, value in gradients.items()}


def test_kernel_equals_the_oracle(deep):
    layout, values, gradients = deep
    kernel, norm2 = tile_kernel(layout, reader(values[:2]), reader(values[2:]), chunk_values=500)
    expected = oracle.kernel(part(gradients, 0, 2), part(gradients, 2, 5))
    assert kernel.shape == (2, 2, 2, 3)
    assert kernel.dtype == torch.float32
    assert oracle.difference(kernel, expected) < 1e-5
    own = oracle.kernel(part(gradients, 0, 2), part(gradients, 0, 2))
    assert oracle.difference(norm2, torch.einsum("iziz->iz", own)) < 1e-5


OTHERS = {
    "windows": (*networks.NETWORKS["windows"], "head"),
    "monai": (monai_unet, (32, 32), "final_conv"),
    "three dimensions": (*networks.NETWORKS["three dimensions"], "head"),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", OTHERS)
def test_the_tensor_of_other_networks_equals_the_oracle(name, dtype, tolerance):
    build, size, head = OTHERS[name]
    batch, rates = networks.batch(slices=3, size=size), torch.tensor([0.01, 0.03])
    kernels, expected = [], torch.zeros((), dtype=torch.float64)
    for seed, rate in enumerate(rates.tolist()):
        model = networks.seeded(build, seed)
        engine = RegionDifferentiator(model, head=head, example=batch[0][0], classes=2)
        values = engine.differentiate(*batch).values.to(dtype)
        kernels.append(train_columns(tile_kernel(engine.layout, reader(values), None, chunk_values=5000)[0]))
        gradients = oracle.gradients(model, [key for key, _ in model.named_parameters()], *batch)
        expected = expected + rate * oracle.kernel(gradients, gradients)
    assert oracle.difference(sum_checkpoints(torch.stack(kernels), rates), expected.flatten(2)) < tolerance


@pytest.mark.parametrize("train", [None, "the same slices"])
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 1e-5), ("bfloat16", 1e-2)])
def test_coarser_operands_are_close_and_the_kernel_stays_symmetric(deep, precision, tolerance, train):
    layout, values, gradients = deep
    other = None if train is None else reader(values)
    kernel, norm2 = tile_kernel(layout, reader(values), other, chunk_values=500, precision=precision)
    assert oracle.difference(kernel, oracle.kernel(gradients, gradients)) < tolerance
    assert oracle.difference(norm2, torch.einsum("iziz->iz", kernel.double())) < tolerance
    if train is None:
        assert torch.equal(kernel, kernel.permute(2, 3, 0, 1))


def test_panels_of_the_symmetric_kernel_hold_it_whole(deep, monkeypatch):
    layout, values, gradients = deep
    monkeypatch.setitem(influence.SMALLEST_PANEL, "cpu", 3)
    kernel, _ = tile_kernel(layout, reader(values), None, chunk_values=500)
    assert oracle.difference(kernel, oracle.kernel(gradients, gradients)) < 1e-5
    assert torch.equal(kernel, kernel.permute(2, 3, 0, 1))


@pytest.mark.parametrize("other", [False, True])
def test_a_tile_is_the_same_bits_on_one_thread_and_on_one_a_lane(deep, other):
    layout, values, gradients = deep
    train = reader(values[:3]) if other else None
    before = torch.get_num_threads()
    tiles = []
    for threads in range(1, influence.LANES + 1):
        torch.set_num_threads(threads)
        tiles.append(tile_kernel(layout, reader(values), train, chunk_values=500))
    torch.set_num_threads(before)
    shown = {key: value[:3] for key, value in gradients.items()} if other else gradients
    expected = oracle.kernel(gradients, shown)
    assert oracle.difference(tiles[0][0], expected) < 1e-5
    for kernel, norm2 in tiles[1:]:
        assert torch.equal(kernel, tiles[0][0])
        assert torch.equal(norm2, tiles[0][1])


def test_a_hand_worked_influence():
    # One pixel, one class, truth 1, logits (0, w·x + b). At w = 2, b = -2, x = 1.5 the logit is 1, P = σ(1) = 0.731059,
    # dD/dlogit = 2 / (P + 1)² · P (1 − P) = 0.131225; at x = 0.5 it is −1, P = 0.268941 and 0.244206. The gradient in
    # (w, b) of the class's logit is (x, 1) times that, in the background's its negative: the product counts twice.
    # ⟨g, g'⟩ = 2 · 0.131225 · 0.244206 · (1.5 · 0.5 + 1) = 0.112161, and with η = 0.5 the influence is 0.056080.
    model = torch.nn.Sequential()
    model.add_module("head", torch.nn.Conv2d(1, 2, 1))
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([0.0, 2.0]).view(2, 1, 1, 1))
        model.head.bias.copy_(torch.tensor([0.0, -2.0]))
    images = torch.tensor([1.5, 0.5]).view(2, 1, 1, 1)
    engine = RegionDifferentiator(model, head="head", example=images[0], classes=1)
    ones = torch.ones(2, 1, 1, dtype=torch.uint8)
    values = engine.differentiate(images, ones, ones.bool()[:, None]).values
    kernel, norm2 = tile_kernel(engine.layout, reader(values), None, chunk_values=100)
    influence = sum_checkpoints(train_columns(kernel)[None], torch.tensor([0.5]))
    assert influence[0, 0, 1].item() == pytest.approx(0.056080, abs=1e-6)
    assert influence[0, 1, 0].item() == influence[0, 0, 1].item()
    assert norm2[0, 0].item() == pytest.approx(2 * 0.131225**2 * (1.5**2 + 1), abs=1e-5)


def test_bfloat16_rows_are_close(deep):
    layout, values, gradients = deep
    kernel, _ = tile_kernel(layout, reader(values.bfloat16()), None, chunk_values=10**6)
    assert 0 < oracle.difference(kernel, oracle.kernel(gradients, gradients)) < 1e-2


def test_the_same_slices_on_both_sides_are_exactly_symmetric(deep):
    layout, values, gradients = deep
    kernel, norm2 = tile_kernel(layout, reader(values), None, chunk_values=700)
    assert torch.equal(kernel, kernel.permute(2, 3, 0, 1))
    assert torch.equal(norm2, torch.einsum("iziz->iz", kernel))
    assert oracle.difference(kernel, oracle.kernel(gradients, gradients)) < 1e-5
    other, _ = tile_kernel(layout, reader(values), reader(values.clone()), chunk_values=700)
    torch.testing.assert_close(other, kernel, rtol=1e-5, atol=1e-7)


@given(st.integers(2, 5), st.integers(2, 5), st.integers(500, 20_000))
@settings(max_examples=4)
def test_tiles_of_any_size_hold_the_same_kernel(deep, side, other, chunk_values):
    layout, values, gradients = deep
    whole = oracle.kernel(gradients, gradients)
    for top in range(0, 5, side):
        for left in range(0, 5, other):
            query, train = values[top : top + side], values[left : left + other]
            kernel, _ = tile_kernel(layout, reader(query), reader(train), chunk_values=chunk_values)
            expected = whole[:, top : top + side, :, left : left + other]
            torch.testing.assert_close(kernel.double(), expected, rtol=1e-4, atol=float(whole.abs().max()) * 1e-6)


def test_a_reader_is_asked_for_each_segment_once(deep):
    layout, values, _ = deep
    asked = []

    def read(segment):
        asked.append(segment)
        return reader(values)(segment)

    tile_kernel(layout, read, None, chunk_values=100)
    assert tuple(asked) == layout.segments


@pytest.mark.parametrize("train", [3, 0, None])
def test_a_side_without_slices_has_no_entries(deep, train):
    layout, values, _ = deep
    others = None if train is None else reader(values[:train])
    kernel, norm2 = tile_kernel(layout, reader(values[:0]), others, chunk_values=500)
    assert (kernel.shape, norm2.shape) == ((2, 0, 2, train or 0), (2, 0))


def test_the_estimate_of_memory_counts_both_sides(deep, monkeypatch):
    layout = deep[0]
    # What pairs take is a floor.
    monkeypatch.setattr(pairing, "LEAST_GAIN", math.inf)
    widest = max(segment.length for segment in layout.segments)
    one, two = (tile_bytes(layout, 100, other, chunk_values=10**6) for other in (None, 100))
    assert two - one > 100 * widest * 8
    assert tile_bytes(layout, 100, None, chunk_values=10**7) > one > 2 * 4 * 10**6
    monkeypatch.setattr(pairing, "LEAST_GAIN", 0)
    assert tile_bytes(layout, 100, None, chunk_values=1) > influence.LANES * 4 * 4 * pairing.OVERLAP_VALUES


# Two classes, one query, two train slices; class 2 of train slice 1 doesn't exist.
KERNEL = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]])


def test_absent_regions_are_nan_and_nothing_else_is():
    kernel = without_absent(KERNEL, torch.tensor([[True, False]]), torch.tensor([[True, True], [True, False]]))
    assert kernel[0, 0].isnan().tolist() == [[False, False], [False, True]]
    assert kernel[1].isnan().all()
    assert kernel[0, 0, 0].tolist() == [1.0, 2.0]


def test_columns_are_class_by_class():
    # Column of region (j, z) = (j − 1) · n + position of z.
    columns = train_columns(KERNEL)
    assert columns[0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert columns[1, 0, (2 - 1) * 2 + 0] == KERNEL[1, 0, 1, 0]


def test_checkpoints_are_weighted_by_their_learning_rates():
    # 0.5 · 1 + 0.25 · 3 = 1.25.
    kernels = torch.stack([torch.full((1, 1, 2), 1.0), torch.full((1, 1, 2), 3.0)])
    kernels[1, 0, 0, 1] = math.nan
    total = sum_checkpoints(kernels, torch.tensor([0.5, 0.25]))
    assert total[0, 0, 0] == 1.25
    assert math.isnan(total[0, 0, 1])
    assert total.dtype == torch.float32


def test_checkpoints_are_summed_in_float64():
    # In float32, 1 + 2⁻²⁵ is 1, and subtracting 1 leaves 0.
    kernels = torch.tensor([1.0, 2.0**-25, -1.0]).view(3, 1, 1, 1)
    assert sum_checkpoints(kernels, torch.ones(3)).item() == 2.0**-25

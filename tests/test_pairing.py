import math
from dataclasses import replace

import oracle
import pytest
import torch
from test_layers import GRADIENT, LINEAR, TRANSPOSED, segment

from ray_tracin import pairing
from ray_tracin.correlation import Geometry
from ray_tracin.influence import tile_kernel
from ray_tracin.layers import Layout, Segment, expand
from ray_tracin.pairing import Pairs, pair_bytes, pays

CLASSES = 2


def convolution(ins, outs, space, geometry, *, bias=True):
    positions = [
        (extent + sum(padding) - step * (size - 1) - 1) // stride + 1
        for extent, padding, step, size, stride in zip(
            space, geometry.padding, geometry.dilation, geometry.kernel, geometry.stride, strict=True
        )
    ]
    input_shape, output_shape = (ins, *space), (outs, *positions)
    return Segment(
        unit="conv",
        kind="convolution",
        form="factors",
        parameters=("conv.weight", "conv.bias") if bias else ("conv.weight",),
        shapes=((outs, ins, *geometry.kernel), (outs,))[: 2 if bias else 1],
        input_shape=input_shape,
        output_shape=output_shape,
        geometry=geometry,
        offset=0,
        length=math.prod(input_shape) + CLASSES * math.prod(output_shape),
    )


PLAIN = Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
SEGMENTS = {
    "plain": convolution(5, 7, (6, 6), PLAIN),
    "without a bias": convolution(5, 7, (4, 6), PLAIN, bias=False),
    "strided, dilated, padded on one side": convolution(
        5, 7, (6, 7), Geometry((3, 2), (2, 1), (1, 2), ((1, 1), (0, 1)))
    ),
    "stride beyond the kernel": convolution(3, 4, (9, 9), Geometry((2, 2), (4, 4), (1, 1), ((0, 0), (0, 0)))),
    "padding beyond the kernel": convolution(3, 4, (3, 2), Geometry((2, 2), (1, 1), (1, 1), ((3, 3), (2, 2)))),
    "one dimension": convolution(5, 7, (8,), Geometry((3,), (3,), (2,), ((2, 2),))),
    "three dimensions": convolution(
        3, 4, (4, 3, 5), Geometry((3, 3, 1), (1, 2, 1), (1, 1, 1), ((1, 1), (1, 1), (0, 0)))
    ),
    "linear": replace(LINEAR, offset=0),
}


def rows(one, slices, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slices, one.length, dtype=torch.float64, generator=generator)


def gradients(one, packed):
    return torch.cat(list(expand(one, packed, CLASSES, columns=10**9)), 2).flatten(0, 1)


@pytest.fixture(params=["at once", "few at a time"])
def budget(request, monkeypatch):
    if request.param == "few at a time":
        monkeypatch.setattr(pairing, "OVERLAP_VALUES", 1)
        monkeypatch.setitem(pairing.WINDOW_VALUES, "cpu", 1)


@pytest.mark.parametrize("name", SEGMENTS)
def test_pairs_are_the_products_of_the_gradients(name, budget):
    one = SEGMENTS[name]
    left, right = rows(one, 7), rows(one, 5, seed=1)
    pairs = Pairs(one, left, right, CLASSES)
    expected = gradients(one, left) @ gradients(one, right).mT
    torch.testing.assert_close(torch.cat([pairs.columns(0, 4), pairs.columns(4, 5)], 1), expected)
    squares = torch.cat([pairs.squares(0, 3), pairs.squares(3, 7)])
    torch.testing.assert_close(squares, gradients(one, left).square().sum(1))


@pytest.mark.parametrize("name", SEGMENTS)
def test_of_a_side_with_itself_what_is_on_and_above_the_diagonal_is_enough(name, budget):
    one = SEGMENTS[name]
    packed = rows(one, 5)
    pairs = Pairs(one, packed, packed, CLASSES)
    expected = gradients(one, packed) @ gradients(one, packed).mT
    for start, stop in ((0, 2), (2, 5)):
        columns = pairs.columns(start, stop)
        torch.testing.assert_close(columns, expected[: CLASSES * stop, CLASSES * start : CLASSES * stop])


def test_they_pay_where_positions_are_few_and_channels_many():
    deepest = convolution(256, 256, (6, 6), PLAIN)
    assert pays(deepest, classes=3)
    assert not pays(convolution(256, 256, (12, 12), PLAIN), classes=3)
    assert not pays(convolution(16, 16, (6, 6), PLAIN), classes=3)
    # 2.36 million entries for nine pairs of classes, against 0.3 (pixels), 1 (overlaps) and 0.1 million (points).
    assert 3**2 * deepest.columns / (256 * 36**2 + 3 * 256 * 36**2 + 9 * 256 * 36) == pytest.approx(3.75, abs=0.05)


@pytest.mark.parametrize(
    "one",
    [GRADIENT, TRANSPOSED, segment(), replace(SEGMENTS["plain"], parameters=("conv.bias",), shapes=((7,),))],
    ids=["kept as a gradient", "transposed", "grouped", "of a bias alone"],
)
def test_what_has_no_shared_windows_or_no_weight_is_expanded(one, monkeypatch):
    monkeypatch.setattr(pairing, "LEAST_GAIN", 0)
    assert not pays(one, CLASSES)


@pytest.mark.parametrize("other", [False, True])
def test_a_kernel_expands_no_gradient_where_pairs_pay(other, monkeypatch):
    one = convolution(64, 64, (3, 3), PLAIN)
    layout = Layout(CLASSES, (one,))
    assert pays(one, CLASSES)
    packed = rows(one, 6).float()
    train = (lambda _: packed[:5].clone()) if other else None

    def kernel():
        return tile_kernel(layout, lambda _: packed, train, chunk_values=10**6)

    expected = torch.einsum(
        "zic,wjc->izjw",
        *[gradients(one, part.double()).unflatten(0, (-1, CLASSES)) for part in (packed, packed[: 5 if other else 6])],
    )
    paired, norms = kernel()
    monkeypatch.setattr("ray_tracin.influence.expansion", None)
    assert torch.equal(kernel()[0], paired)
    torch.testing.assert_close(paired.double(), expected, rtol=1e-4, atol=1e-2)
    own = gradients(one, packed.double()).square().sum(1).unflatten(0, (-1, CLASSES)).mT
    torch.testing.assert_close(norms.double(), own, rtol=1e-5, atol=1e-3)


def test_rounded_operands_are_those_of_gradients():
    one = convolution(64, 64, (3, 3), PLAIN)
    packed = rows(one, 4).float()
    kernel, _ = tile_kernel(Layout(CLASSES, (one,)), lambda _: packed, None, chunk_values=10**6, precision="bfloat16")
    exact = gradients(one, packed)
    expected, unrounded = (
        (part.double() @ part.double().mT).unflatten(1, (-1, CLASSES)).unflatten(0, (-1, CLASSES)).permute(1, 0, 3, 2)
        for part in (exact.bfloat16(), exact)
    )
    assert oracle.difference(kernel, expected) < oracle.difference(kernel, unrounded) / 20


def test_memory_is_that_of_the_inputs_and_of_a_few_pairs():
    one = convolution(256, 256, (6, 6), PLAIN)
    more = pair_bytes(one, 200, lanes=2) - pair_bytes(one, 100, lanes=2)
    assert more == 100 * 256 * 36 * 4
    assert pair_bytes(one, 0, lanes=2) == 2 * 4 * (4 * pairing.OVERLAP_VALUES + pairing.WINDOW_VALUES["cpu"])

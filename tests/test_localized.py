"""The backward pass in boxes: what it leaves out is zero, whatever moves how."""

import math

import networks
import oracle
import pytest
import test_gradients
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracin import localized
from ray_tracin.correlation import Geometry, clipped, cut, nonzero_boxes, points_of, windows_of
from ray_tracin.localized import LocalBackward

pytestmark = test_gradients.pytestmark
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@pytest.fixture(autouse=True)
def always_local(monkeypatch):
    """Whatever the size, and also where the box is everything."""
    monkeypatch.setattr(localized, "LOCAL_POSITIONS", 1)
    monkeypatch.setattr(localized, "LOCAL_SHARE", 2.0)


@st.composite
def moves(draw):
    """A convolution of any kind, and the size of what it reads."""
    axes = draw(st.integers(1, 3))
    each = lambda values: tuple(draw(values) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation = each(st.integers(1, 3)), each(st.integers(1, 3)), each(st.integers(1, 2))
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 2]))
    padding = tuple(draw(st.integers(0, step * (size - 1))) for size, step in zip(kernel, dilation, strict=True))
    extra = tuple(draw(st.integers(0, step - 1)) for step in stride)
    smallest = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    space = tuple(draw(st.integers(low, low + 6)) for low in smallest)
    return transposed, kernel, stride, padding, extra, dilation, groups, space


def call(move, values, weight, bias):
    transposed, kernel, stride, padding, extra, dilation, groups, _ = move
    if transposed:
        return TRANSPOSED[len(kernel) - 1](values, weight, bias, stride, padding, extra, groups, dilation)
    return CONVOLUTIONS[len(kernel) - 1](values, weight, bias, stride, padding, dilation, groups)


@given(moves(), st.integers(0, 2**16))
@settings(max_examples=150)
def test_input_gradients_are_those_of_the_whole(move, seed):
    _, kernel, *_, groups, space = move
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, values = random(4, 4 // groups, *kernel), random(3, 4, *space).requires_grad_()
    bias = random(4)
    plain = call(move, values, weight, bias)
    with LocalBackward():
        local = call(move, values, weight, bias)
    torch.testing.assert_close(local, plain)
    asked = random(*plain.shape)
    # The first slice asks nothing, the second somewhere, the third everywhere.
    asked[0] = 0
    corner = tuple(slice(length // 3, length // 3 + max(1, length // 2)) for length in plain.shape[2:])
    asked[1] = 0
    asked[(1, slice(None), *corner)] = 1.0
    (expected,) = torch.autograd.grad(plain, values, asked)
    (got,) = torch.autograd.grad(local, values, asked)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert not got[0].any()


@given(moves())
@settings(max_examples=100)
def test_a_box_of_windows_is_seen_by_its_points_and_no_others(move):
    _, kernel, stride, padding, _, dilation, groups, space = move
    geometry = Geometry(kernel, stride, dilation, tuple((width, width) for width in padding), groups)
    reach = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    counts = tuple(
        (length + 2 * width - far - 1) // step + 1
        for length, width, far, step in zip(space, padding, reach, stride, strict=True)
    )
    box = tuple((length // 3, length // 3 + max(1, length // 2)) for length in space)
    hits = [
        [
            point
            for point in range(counts[axis])
            if any(
                box[axis][0] <= stride[axis] * point + dilation[axis] * offset - padding[axis] < box[axis][1]
                for offset in range(kernel[axis])
            )
        ]
        for axis in range(len(space))
    ]
    reached = points_of(geometry, box, counts)
    if reached is None:
        assert not all(hits)
    elif all(hits):  # With dilation, the first or last point of a range may look past the box.
        assert all(first <= min(seen) and max(seen) < last for (first, last), seen in zip(reached, hits, strict=True))
    whole = tuple((0, count) for count in counts)
    starts = [start for start, _ in windows_of(geometry, whole)]
    assert starts == [-width for width in padding]


def test_boxes_hold_all_but_zeros():
    values = torch.zeros(4, 2, 5, 6)
    values[1, 0, 2, 3] = 1e-30
    values[2, 1, 0, 5] = -1.0
    values[2, 0, 3, 1] = 1.0
    values[3, 0, 4, 0] = torch.nan
    assert nonzero_boxes(values) == [None, ((2, 3), (3, 4)), ((0, 4), (1, 6)), ((4, 5), (0, 1))]
    assert nonzero_boxes(values[:, :, 0]) == [None, None, ((5, 6),), None]


def test_what_a_box_reaches_outside_is_zero():
    values = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    assert cut(values, ((-1, 2), (2, 5)))[0, 0].tolist() == [[0, 0, 0], [3, 4, 0], [7, 8, 0]]
    assert cut(values, ((0, 3), (0, 4))).data_ptr() == values.data_ptr()


@pytest.mark.parametrize("name", test_gradients.CASES)
def test_gradients_of_small_regions_equal_the_oracle(name):
    build, size = test_gradients.CASES[name]
    model = networks.seeded(build)
    images, labels, masks = networks.batch(size=size)
    small = torch.zeros_like(masks)
    small[(..., *(slice(length // 2, length // 2 + 2) for length in size))] = True
    small[0, 1] = False
    engine = test_gradients.differentiator(model, images)
    result = engine.differentiate(images, labels, small)
    expected = oracle.gradients(model, [key for key, _ in model.named_parameters()], images, labels, small)
    got = test_gradients.by_parameter(engine, result.values)
    everything = torch.cat([expected[key].flatten(2) for key in expected], 2)
    assert math.isfinite(everything.norm())
    assert oracle.difference(torch.cat([got[key] for key in expected], 2), everything) < 1e-5


@pytest.mark.parametrize("each", [1, [1], (1,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_number_for_all_axes_is_one_for_each(transposed, each):
    weight, values = torch.randn(3, 3, 3, 3), torch.randn(2, 3, 9, 9, requires_grad=True)
    function = F.conv_transpose2d if transposed else F.conv2d
    told = (each, each, 0, 1, each) if transposed else (each, each, each, 1)
    asked = torch.zeros(2, 3, 9, 9)
    asked[:, :, 2:4, 5:6] = 1.0
    (expected,) = torch.autograd.grad(function(values, weight, None, *told), values, asked)
    with LocalBackward():
        (got,) = torch.autograd.grad(function(values, weight, None, *told), values, asked)
    torch.testing.assert_close(got, expected)


def test_weights_that_are_trained_are_left_to_autograd():
    values, weight = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3, requires_grad=True)
    with LocalBackward():
        result = F.conv2d(values, weight, None, (1, 1), (1, 1), (1, 1), 1)
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    # The centre of the kernel sees every pixel, its corners all but an edge.
    torch.testing.assert_close(gradient[0, :, 1, 1], values[0].sum((1, 2)))
    torch.testing.assert_close(gradient[0, :, 0, 0], values[0, :, :-1, :-1].sum((1, 2)))


def test_a_frozen_batch_normalisation_is_a_scale_and_a_shift():
    norm = torch.nn.BatchNorm2d(3).double().eval().requires_grad_(False)
    for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        part.copy_(torch.rand(3) + 0.5)
    values = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    plain, asked = norm(values), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with LocalBackward():
        local = norm(values)
    torch.testing.assert_close(local, plain)
    got, expected = (torch.autograd.grad(one, values, asked)[0] for one in (local, plain))
    torch.testing.assert_close(got, expected)
    assert type(local.grad_fn).__name__ == "AddcmulBackward0"


@pytest.mark.parametrize("transposed", [False, True])
def test_a_small_slice_is_convolved_as_if_it_were_alone(transposed):
    torch.manual_seed(0)
    values, weight = torch.randn(5, 96, 8, 8), torch.randn(96, 96, 3, 3)
    move = (transposed, (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1, None)
    with LocalBackward():
        together = call(move, values, weight, None)
    # Bit for bit: what is all but tied in the next ReLU must not depend on the other slices.
    assert torch.equal(together, torch.cat([call(move, one, weight, None) for one in values.split(1)]))


def test_a_bias_that_depends_on_the_activations_is_left_to_autograd():
    values = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)

    def score():
        bias = values.mean() * torch.arange(3.0, dtype=torch.float64)
        return F.conv2d(values, weight, bias, (1, 1), (1, 1), (1, 1), 1).square().sum()

    (expected,) = torch.autograd.grad(score(), values)
    with LocalBackward():
        (got,) = torch.autograd.grad(score(), values)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("start", [-6, 8, 11])
def test_a_box_outside_the_image_holds_zeros(start):
    box = ((start, start + 3), (2, 5))
    assert all(0 <= first <= last <= 8 for first, last in clipped(box, (8, 8)))
    found = cut(torch.ones(1, 2, 8, 8), box)
    assert found.shape == (1, 2, 3, 3)
    assert not found.any()

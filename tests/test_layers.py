import math

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracin import correlation
from ray_tracin.correlation import Geometry
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.layers import Layout, Segment, expand, parameter_gradients


def segment(**changed):
    """A 3×3 convolution, 6 → 4 channels in 2 groups, on 5×5 pixels, its factors at value 10 of the row."""
    values = {
        "unit": "conv",
        "kind": "convolution",
        "form": "factors",
        "parameters": ("conv.weight", "conv.bias"),
        "shapes": ((4, 3, 3, 3), (4,)),
        "input_shape": (6, 5, 5),
        "output_shape": (4, 5, 5),
        "geometry": Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 2),
        "offset": 10,
        "length": 6 * 25 + 2 * 4 * 25,
    }
    return Segment(**(values | changed))


def rows(one, slices=3, seed=0):
    return torch.randn(slices, one.length, generator=torch.Generator().manual_seed(seed))


TRANSPOSED = segment(
    kind="transposed convolution",
    shapes=((6, 2, 3, 3), (4,)),
    geometry=Geometry((3, 3), (1, 1), (1, 1), ((1, 1),) * 2, 2),
)
LINEAR = segment(
    kind="linear",
    shapes=((7, 5), (7,)),
    input_shape=(2, 3, 5),
    output_shape=(2, 3, 7),
    geometry=Geometry((1,), (1,), (1,), ((0, 0),)),
    length=30 + 2 * 42,
)
GRADIENT = segment(form="gradient", length=2 * (4 * 27 + 4))
SEGMENTS = [segment(), TRANSPOSED, LINEAR, GRADIENT]


@given(st.sampled_from(SEGMENTS), st.integers(1, 300))
@settings(max_examples=60)
def test_chunks_partition_the_columns(one, columns):
    packed = rows(one)
    (whole,) = (torch.cat(list(expand(one, packed, 2, columns=10**9)), 2),)
    chunks = list(expand(one, packed, 2, columns=columns))
    # Every value of a region's gradient once, in whichever order: sorted, they are the same.
    torch.testing.assert_close(torch.cat(chunks, 2).sort(2).values, whole.sort(2).values, rtol=1e-4, atol=1e-5)
    assert whole.shape == (3, 2, one.columns)
    smallest = 0 if one.form == "gradient" else one.geometry.groups * math.prod(one.geometry.kernel)
    assert all(chunk.shape[2] <= max(columns, smallest) for chunk in chunks)


def test_a_convolution_expands_to_the_gradient_of_its_weight():
    one = segment()
    packed = rows(one).double()
    got = parameter_gradients(one, packed, 2)
    layer = torch.nn.Conv2d(6, 4, 3, padding=1, groups=2).double()
    for position, row in enumerate(packed):
        for column in range(2):
            start = 150 + column * 100
            output = layer(row[:150].view(1, 6, 5, 5))
            expected = torch.autograd.grad(output, list(layer.parameters()), row[start : start + 100].view_as(output))
            torch.testing.assert_close(got["conv.weight"][position, column], expected[0].flatten())
            torch.testing.assert_close(got["conv.bias"][position, column], expected[1])


def test_a_transposed_convolution_expands_to_the_gradient_of_its_weight():
    packed = rows(TRANSPOSED).double()
    got = parameter_gradients(TRANSPOSED, packed, 2)
    layer = torch.nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2).double()
    output = layer(packed[1, :150].view(1, 6, 5, 5))
    expected = torch.autograd.grad(output, list(layer.parameters()), packed[1, 250:350].view_as(output))
    torch.testing.assert_close(got["conv.weight"][1, 1], expected[0].flatten())
    torch.testing.assert_close(got["conv.bias"][1, 1], expected[1])


@pytest.mark.parametrize("one", [segment(), TRANSPOSED])
def test_how_many_slices_are_unfolded_at_once_does_not_matter(one, monkeypatch):
    packed = rows(one, slices=5)
    together = torch.cat(list(expand(one, packed, 2, columns=100)), 2)
    monkeypatch.setitem(correlation.WINDOW_VALUES, "cpu", 1)
    torch.testing.assert_close(torch.cat(list(expand(one, packed, 2, columns=100)), 2), together)


def test_a_hand_worked_linear_layer():
    # One slice, two positions with inputs 1 and 2, output gradients 10 and 100 of the only class:
    # ∂/∂w = 1 · 10 + 2 · 100 = 210, ∂/∂b = 10 + 100 = 110.
    one = segment(
        kind="linear",
        shapes=((1, 1), (1,)),
        input_shape=(2, 1),
        output_shape=(2, 1),
        geometry=Geometry((1,), (1,), (1,), ((0, 0),)),
        length=4,
    )
    got = parameter_gradients(one, torch.tensor([[1.0, 2.0, 10.0, 100.0]]), 1)
    assert {name: values.item() for name, values in got.items()} == {"conv.weight": 210.0, "conv.bias": 110.0}


def test_stored_precision_is_widened():
    packed = rows(segment()).bfloat16()
    assert {chunk.dtype for chunk in expand(segment(), packed, 2, columns=50)} == {torch.float32}
    assert {chunk.dtype for chunk in expand(GRADIENT, rows(GRADIENT).double(), 2, columns=50)} == {torch.float64}


def test_rows_of_another_layout_are_refused():
    message = "expected 350 values a slice for unit 'conv', got 349: read values 10 to 360 of the rows"
    with pytest.raises(ValueError, match=message):
        expand(segment(), torch.zeros(2, 349), 2, columns=5)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", ["deep", "unfamiliar"])
def test_a_layout_survives_json(name):
    build, size = networks.NETWORKS[name]
    images, labels, masks = networks.batch(size=size)
    engine = RegionDifferentiator(networks.seeded(build), head="head", example=images[0], classes=2)
    again = Layout.from_json(engine.layout.to_json())
    assert again == engine.layout
    # It expands rows as the original does.
    values = engine.differentiate(images, labels, masks).values
    for one, two in zip(engine.layout.segments, again.segments, strict=True):
        packed = values[:, one.offset : one.stop]
        for left, right in zip(expand(one, packed, 2, columns=64), expand(two, packed, 2, columns=64), strict=True):
            assert torch.equal(left, right)


def test_another_json_is_no_layout():
    with pytest.raises(ValueError, match="expected the layout of packed gradients as JSON"):
        Layout.from_json('{"classes": 3}')


def test_segments_partition_the_row():
    build, size = networks.NETWORKS["deep"]
    engine = RegionDifferentiator(networks.seeded(build), head="head", example=torch.zeros(2, *size), classes=2)
    segments = engine.layout.segments
    assert [one.offset for one in segments] == [0, *(one.stop for one in segments[:-1])]
    assert engine.layout.values == segments[-1].stop
    assert engine.layout.columns == sum(value.numel() for value in build().parameters())
    # Factors where, and only where, they are smaller.
    for one in segments:
        if one.geometry is not None:
            factors = torch.Size(one.input_shape).numel() + 2 * torch.Size(one.output_shape).numel()
            assert one.length == min(factors, 2 * one.columns)
    assert {one.form for one in segments} == {"factors", "gradient"}

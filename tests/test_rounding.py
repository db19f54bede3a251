"""Rows in the forms in which they are kept: what is lost, what isn't, and that every row is for itself."""

import networks
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracin.config import ModelConfig
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.influence import tile_kernel
from ray_tracin.rounding import RowFormat
from ray_tracin.unet import build_unet

NETWORKS = {
    "deep": networks.NETWORKS["deep"],
    "unet": (lambda: build_unet(ModelConfig(width=4, depth=3), 2, 2, seed=0), (32, 32)),
}
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=NETWORKS)
def packed(request):
    """The layout of a network with segments of all sizes, and rows of four slices."""
    build, size = NETWORKS[request.param]
    batch = networks.batch(slices=4, size=size)
    engine = RegionDifferentiator(networks.seeded(build), head="head", example=batch[0][0], classes=2)
    return engine.layout, engine.differentiate(*batch).values


def rounded_segments(form):
    return [segment for segment in form.layout.segments if segment.length > form.layout.values / 50]


def test_float16_leaves_small_segments_as_they_are_and_rounds_large_ones(packed):
    layout, rows = packed
    form = RowFormat(layout, "float16")
    large = {segment.unit for segment in rounded_segments(form)}
    assert 0 < len(large) < len(layout.segments)
    got = form.rows(form.keep(rows))
    for segment in layout.segments:
        mine, original = (values[:, segment.offset : segment.stop] for values in (got, rows))
        assert torch.equal(mine, original) == (segment.unit not in large)
        assert oracle.difference(mine, original) < 2**-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_kept_as_if_it_were_alone(packed, dtype):
    layout, rows = packed
    form = RowFormat(layout, dtype)
    kept = form.keep(rows)
    assert torch.equal(kept, torch.cat([form.keep(row[None]) for row in rows]))
    assert kept.shape == (4, form.words)
    assert kept.element_size() == form.item_bytes
    assert form.row_bytes == kept.element_size() * form.words


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_parts_of_them_give_back_what_was_kept(packed, dtype):
    layout, rows = packed
    form = RowFormat(layout, dtype)
    array = RowFormat.to_array(form.keep(rows))
    assert array.dtype == np.dtype(form.array_dtype)
    whole = form.rows(RowFormat.from_array(array))
    for segment in layout.segments:
        part = form.segment(RowFormat.from_array(array[1:3, form.place(segment)]), segment)
        assert torch.equal(part.float(), whole[1:3, segment.offset : segment.stop].float())
    places = [form.place(segment) for segment in layout.segments]
    assert [place.stop for place in places[:-1]] == [place.start for place in places[1:]]
    assert (places[0].start, places[-1].stop) == (0, array.shape[1])


@given(scale=st.integers(-100, 100), spread=st.integers(0, 14), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_float16_rounds_to_eleven_bits_at_any_scale(packed, scale, spread, seed):
    layout, _ = packed
    form = RowFormat(layout, "float16")
    generator = torch.Generator().manual_seed(seed)
    # Within a part float16 holds 2¹⁴ : 1 · 2⁻¹⁴ at full precision; what is smaller loses bits to what is larger.
    exponents = scale - torch.randint(0, spread + 1, (2, layout.values), generator=generator)
    rows = torch.ldexp(1 + torch.rand(2, layout.values, generator=generator), exponents)
    got = form.rows(form.keep(rows))
    assert ((got - rows).abs() <= rows.abs() * 2**-11).all()


def test_float16_keeps_parts_of_zeros_and_the_smallest_and_largest_numbers(packed):
    layout, _ = packed
    form = RowFormat(layout, "float16")
    limits = torch.finfo(torch.float32)
    for value in (0.0, limits.smallest_normal, 2.0**-100, 2.0**127):
        got = form.rows(form.keep(torch.full((1, layout.values), value)))
        assert got.isfinite().all()
        assert got.sub(value).abs().max() <= max(2**-11 * value, limits.smallest_normal)


def test_a_value_is_not_lost_to_another_class(packed):
    layout, rows = packed
    form = RowFormat(layout, "float16")
    segment = max(rounded_segments(form), key=lambda one: one.length)
    start, count = segment.offset + segment.input_values, (segment.length - segment.input_values) // 2
    mixed = rows.clone()
    mixed[:, start : start + count] = 1e20
    mixed[:, start + count : segment.stop] = 1e-20
    got = form.rows(form.keep(mixed))
    torch.testing.assert_close(got[:, start : segment.stop], mixed[:, start : segment.stop], rtol=2**-11, atol=0)


@pytest.mark.parametrize(
    ("dtype", "share", "tolerance"), [("float32", 1, 1e-6), ("float16", 0.6, 1e-4), ("bfloat16", 0.5, 1e-2)]
)
def test_what_the_kernel_loses_for_the_room_that_is_saved(packed, dtype, share, tolerance):
    layout, rows = packed
    form = RowFormat(layout, dtype)
    kept = form.keep(rows)
    exact, _ = tile_kernel(layout, lambda one: rows[:, one.offset : one.stop].double(), None, chunk_values=5000)
    kernel, _ = tile_kernel(layout, lambda one: form.read(kept, one), None, chunk_values=5000)
    assert oracle.difference(kernel, exact) < tolerance
    assert form.row_bytes <= share * 4 * layout.values


def test_both_forms_of_segments_are_rounded(packed):
    layout, _ = packed
    forms = {segment.form for segment in rounded_segments(RowFormat(layout, "float16"))}
    assert forms == ({"factors", "gradient"} if len(layout.segments) > 10 else {"factors"})

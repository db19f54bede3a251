"""Laws of sketches: equal to projecting the dense gradients, exact where nothing is projected, unbiased where it is."""

import dataclasses

import networks
import pytest
import torch

from ray_tracin import sketches
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.influence import tile_kernel
from ray_tracin.sketches import Sketcher, estimate_kernel

NAMES = ["deep", "strided", "three dimensions", "one dimension", "unfamiliar", "normalised and parametrised", "tokens"]


def packed(name, slices=3):
    build, size = networks.NETWORKS[name]
    images, labels, masks = networks.batch(slices=slices, size=size)
    engine = RegionDifferentiator(networks.seeded(build), head="head", example=images[0], classes=2)
    return engine.layout, engine.differentiate(images, labels, masks).values


def kernel(layout, values):
    return tile_kernel(layout, lambda one: values[:, one.offset : one.stop], None, chunk_values=1 << 20)[0]


def dense(layout, values):
    """The same rows with every segment expanded to gradients: the form that needs no correlation."""
    sketcher = Sketcher(layout, size=3, seed="a")
    parts = []
    for one in layout.segments:
        parts += sketcher._of_gradients(one, values[:, one.offset : one.stop])
    return torch.cat([part.flatten(2) for part in parts], 2)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_the_sketch_of_factors_is_that_of_the_gradients(name):
    layout, values = packed(name)
    got = Sketcher(layout, size=3, seed="a").sketch(values)
    assert got.shape[2] == Sketcher(layout, size=3, seed="a").values < layout.columns
    torch.testing.assert_close(got, dense(layout, values), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_sketch_that_holds_everything_gives_the_kernel(name):
    layout, values = packed(name)
    sketcher = Sketcher(layout, size=10_000, seed="a")
    assert sketcher.values == layout.columns
    whole = sketcher.sketch(values)
    torch.testing.assert_close(estimate_kernel(whole, whole), kernel(layout, values), rtol=1e-4, atol=1e-5)


def test_the_estimate_is_unbiased_and_its_spread_falls_with_the_size():
    layout, values = packed("deep")
    expected = kernel(layout, values)
    spreads = []
    for size in (2, 8):
        draws = [Sketcher(layout, size, seed=str(seed)).sketch(values) for seed in range(300)]
        estimates = torch.stack([estimate_kernel(draw, draw) for draw in draws])
        error = (estimates.mean(0) - expected).abs()
        assert bool((error <= 5 * estimates.std(0) / 300**0.5 + 1e-6).all())
        spreads.append(float(estimates.std(0).norm()))
    assert spreads[1] < 0.6 * spreads[0]


def test_any_process_makes_the_same_projections_and_seeds_make_others():
    layout, values = packed("deep")
    one, same, other = (Sketcher(layout, 2, seed).sketch(values) for seed in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_the_sketch_of_a_slice_does_not_depend_on_its_batch():
    layout, values = packed("deep")
    sketcher = Sketcher(layout, 3, "a")
    torch.testing.assert_close(sketcher.sketch(values)[1:2], sketcher.sketch(values[1:2]))


def test_sketches_are_made_in_the_arithmetic_of_gradients(monkeypatch):
    seen, correlated = [], sketches._correlated

    def watched(*given):
        seen.append(torch.backends.cudnn.deterministic)
        return correlated(*given)

    monkeypatch.setattr(sketches, "_correlated", watched)
    layout, values = packed("deep")
    assert not torch.backends.cudnn.deterministic
    Sketcher(layout, size=3, seed="a").sketch(values)
    assert set(seen) == {True}


def test_what_can_not_be_sketched_is_refused():
    layout, values = packed("deep")
    with pytest.raises(ValueError, match="expected a sketch size of at least 1, got 0"):
        Sketcher(layout, 0, "a")
    shorter = dataclasses.replace(layout, segments=layout.segments[:-1])
    with pytest.raises(ValueError, match=f"expected packed rows of {shorter.values} values"):
        Sketcher(shorter, 2, "a").sketch(values)

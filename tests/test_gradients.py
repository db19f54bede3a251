import copy
import warnings
import weakref
from itertools import product

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_tracin import arithmetic, correlation, gradients, influence, regions
from ray_tracin.gradients import NonFiniteGradientError, RegionDifferentiator, differentiate_bytes
from ray_tracin.influence import tile_kernel
from ray_tracin.layers import parameter_gradients
from ray_tracin.recording import recorded
from ray_tracin.regions import whole_slices
from ray_tracin.unet import UNet
from ray_tracin.units import selected_parameters

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def differentiator(model, images, parameters="all", head="head", classes=2):
    return RegionDifferentiator(model, head=head, parameters=parameters, example=images[0], classes=classes)


def by_parameter(engine, values):
    """Packed rows → (slice, class, column) by the name of the parameter."""
    result = {}
    for segment in engine.layout.segments:
        result |= parameter_gradients(segment, values[:, segment.offset : segment.stop], engine.layout.classes)
    return result


def unet(norm="batch", width=4, depth=3):
    return UNet(modalities=2, classes=2, width=width, depth=depth, norm=norm)


def monai_unet():
    return BasicUNet(spatial_dims=2, in_channels=2, out_channels=3, features=(4, 4, 8, 8, 16, 4))


CASES = {
    **networks.NETWORKS,
    "unet": (unet, (12, 8)),
    "unet, instance norm": (lambda: unet("instance"), (8, 8)),
    "unet, group norm": (lambda: unet("group"), (8, 8)),
    "unet without norm": (lambda: unet("none"), (8, 8)),
    "monai": (monai_unet, (32, 32)),
}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    """How many threads PyTorch may use; with two, shares of a batch go through the network at the same time."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_oracle(name, threads):
    build, size = CASES[name]
    model = networks.seeded(build)
    images, labels, masks = networks.batch(size=size)
    masks[0, 1] = False
    engine = differentiator(model, images)
    result = engine.differentiate(images, labels, masks)
    expected = oracle.gradients(model, [key for key, _ in model.named_parameters()], images, labels, masks)
    got = by_parameter(engine, result.values)
    assert got.keys() == expected.keys()
    everything = torch.cat([value.flatten(2) for value in expected.values()], 2)
    assert oracle.difference(torch.cat([got[key] for key in expected], 2), everything) < 1e-5
    for key, value in expected.items():
        # Each parameter for itself too; where the true gradient is 0 there is nothing but rounding.
        error = (got[key].double() - value.flatten(2)).norm()
        assert error < 1e-4 * value.norm() + 1e-7 * everything.norm(), key
    assert result.values.dtype == torch.float32
    assert (result.exists == masks.flatten(2).any(2)).all()
    assert (result.scores.isnan() == ~result.exists).all()
    engine.check(images[:1], labels[:1], masks[:1])


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_whole_slices_as_on_a_gpu_equal_the_oracle(name, monkeypatch):
    monkeypatch.setattr(correlation, "BOXED_DEVICES", ())
    build, size = CASES[name]
    model = networks.seeded(build).double()
    images, labels, masks = networks.batch(size=size)
    engine = differentiator(model, images.double())
    got = by_parameter(engine, engine.differentiate(images.double(), labels, masks).values)
    expected = oracle.gradients(model, list(got), images, labels, masks)
    rows = [torch.cat([values[name].flatten(2) for name in got], 2) for values in (got, expected)]
    assert oracle.difference(*rows) < 1e-12


def test_a_device_of_its_own_is_asked_for_nothing_during_a_pass(monkeypatch):
    """The meta device, which has no values to read back: who asks for some fails."""
    monkeypatch.setitem(correlation.WINDOW_VALUES, "meta", 1 << 20)
    monkeypatch.setitem(influence.SMALLEST_PANEL, "meta", 20)
    # These do ask, once a batch.
    monkeypatch.setattr(regions, "foreground_truth", lambda labels, _: labels.unsqueeze(1) == 1)
    monkeypatch.setattr(RegionDifferentiator, "_check_finite", lambda *_: None)
    batch = [tensor.to("meta") for tensor in networks.batch(size=(24, 24))]
    engine = differentiator(unet(width=8).to("meta"), batch[0])
    rows = engine.differentiate(*batch).values
    assert {segment.form for segment in engine.layout.segments} == {"factors", "gradient"}
    read = lambda segment: rows[:, segment.offset : segment.stop]  # noqa: E731
    rounded = lambda segment: read(segment).bfloat16()  # noqa: E731
    monkeypatch.setattr(arithmetic, "MIXED_DEVICES", ("meta",))
    for reader, precision in product((read, rounded), ("float32", "bfloat16")):
        kernel, norm2 = tile_kernel(engine.layout, reader, None, chunk_values=10_000, precision=precision)
        assert (kernel.dtype, norm2.dtype) == (torch.float32, torch.float32)
        assert (rows.device.type, kernel.device.type, norm2.device.type) == ("meta", "meta", "meta")


@pytest.mark.parametrize("name", ["deep", "unet", "in place", "three dimensions"])
def test_in_float64_nothing_but_rounding_remains(name):
    build, size = CASES[name]
    model = networks.seeded(build).double()
    images, labels, masks = networks.batch(size=size)
    images = images.double()
    engine = differentiator(model, images)
    values = engine.differentiate(images, labels, masks).values
    gradients = oracle.gradients(model, list(dict(model.named_parameters())), images, labels, masks)
    kernel, _ = tile_kernel(engine.layout, lambda s: values[:, s.offset : s.stop], None, chunk_values=10**5)
    assert oracle.difference(kernel, oracle.kernel(gradients, gradients)) < 1e-12


def test_a_hand_worked_network():
    # One pixel, one class, logits (0, w·x + b) with w = 2, b = -2, x = 1.5: the logit is 1, P = σ(1) = 0.731059.
    # GT = 1: D = 2P / (P + 1), dD/dP = 2 / (P + 1)² = 0.667431, dP/dlogit = P (1 − P) = 0.196612,
    # so dD/db = 0.131225 for the class's logit and its negative for the background's, dD/dw = 1.5 times that.
    model = nn.Sequential()
    model.add_module("head", nn.Conv2d(1, 2, 1))
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([0.0, 2.0]).view(2, 1, 1, 1))
        model.head.bias.copy_(torch.tensor([0.0, -2.0]))
    image = torch.full((1, 1, 1, 1), 1.5)
    engine = differentiator(model, image, classes=1)
    ones = torch.ones(1, 1, 1, dtype=torch.uint8)
    result = engine.differentiate(image, ones, ones.bool()[None])
    assert result.scores.item() == pytest.approx(0.844637, abs=1e-6)
    got = by_parameter(engine, result.values)
    assert got["head.bias"][0, 0].tolist() == pytest.approx([-0.131225, 0.131225], abs=1e-6)
    assert got["head.weight"][0, 0].tolist() == pytest.approx([-0.196837, 0.196837], abs=1e-6)


def test_the_batch_a_slice_is_in_does_not_matter():
    images, labels, masks = networks.batch(slices=4, size=(8, 8))
    engine = differentiator(networks.seeded(unet), images)
    together = engine.differentiate(images, labels, masks).values
    for order in ([2], [3, 2, 0], [2, 2]):
        apart = engine.differentiate(images[order], labels[order], masks[order]).values
        torch.testing.assert_close(apart, together[order], rtol=1e-4, atol=1e-6 * float(together.abs().max()))


def test_shares_of_a_batch_at_the_same_time_are_the_same_bits_every_time():
    images, labels, masks = networks.batch(slices=7, size=(8, 8))
    engine = differentiator(networks.seeded(unet), images)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    first, *others = (engine.differentiate(images, labels, masks) for _ in range(5))
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)
    alone = engine.differentiate(images, labels, masks)
    for other in others:
        assert torch.equal(other.values, first.values)
        assert torch.equal(other.scores, first.scores)
    torch.testing.assert_close(first.values, alone.values, rtol=1e-4, atol=1e-6 * float(alone.values.abs().max()))
    torch.testing.assert_close(first.scores, alone.scores)


def test_rows_are_handed_over_as_they_are_made(monkeypatch, threads):
    images, labels, masks = networks.batch(slices=7)
    engine = differentiator(networks.seeded(unet), images)
    monkeypatch.setattr(gradients, "PASS_BYTES", 2 * engine.layout.activation_bytes)
    whole = engine.differentiate(images, labels, masks)
    got = {}
    scores = engine.stream(images, labels, masks, lambda start, rows: got.update({start: rows.clone()}))
    assert sorted(got) == [0, 2, 4, 6]
    assert torch.equal(torch.cat([got[start] for start in sorted(got)]), whole.values)
    assert torch.equal(scores, whole.scores)


def test_the_model_and_the_slices_are_left_as_they_were(threads):
    model = networks.seeded(networks.InPlace)
    before = copy.deepcopy(model.state_dict())
    images, labels, masks = networks.batch()
    original = images.clone()
    with torch.inference_mode():
        differentiator(model, images).differentiate(images, labels, masks)
    assert model.training
    assert model.activation.inplace
    assert all(value.requires_grad for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(images, original)


def test_absent_regions_have_a_gradient_of_zero():
    images, labels, masks = networks.batch()
    masks[1] = False
    masks[2, 0] = False
    engine = differentiator(networks.seeded(unet), images)
    result = engine.differentiate(images, labels, masks)
    assert result.exists.tolist() == [[True, True], [False, False], [False, True]]
    for value in by_parameter(engine, result.values).values():
        assert (value[~result.exists] == 0).all()
    assert result.values.isfinite().all()


def test_whole_slices_summed_over_classes_are_plain_tracin():
    # Eq. 4 with the loss L = 1 − (1/C) Σ D_i: ⟨∇L(z), ∇L(z')⟩ = Σ_ij ⟨∇D_i, ∇D_j⟩ / C².
    model = networks.seeded(unet)
    images, labels, masks = networks.batch()
    engine = differentiator(model, images)
    values = engine.differentiate(images, labels, whole_slices(masks)).values
    kernel, _ = tile_kernel(engine.layout, lambda s: values[:, s.offset : s.stop], None, chunk_values=10**6)
    exact, rows = oracle.double(model), []
    for image, label in zip(images.double(), labels, strict=True):
        logits = exact(image[None])[0]
        everywhere = torch.ones_like(label, dtype=torch.bool)
        loss = 1 - sum(oracle.dice(logits, label, everywhere, c) for c in (1, 2)) / 2
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))]))
    plain = torch.stack(rows) @ torch.stack(rows).mT
    assert oracle.difference(kernel.sum((0, 2)) / 4, plain) < 1e-5


# Which parameters


def test_the_head_of_the_paper_is_256_numbers():
    images = torch.zeros(1, 4, 16, 16)
    model = UNet(modalities=4, classes=3, width=64, depth=2)
    engine = differentiator(model, images, "head", classes=3)
    assert engine.layout.columns == 256
    assert [segment.parameters for segment in engine.layout.segments] == [("head.weight",)]


@pytest.mark.parametrize("selection", ["head", ("*.bias",), ("decoder.*", "head.bias")])
def test_selected_parameters_have_the_gradients_that_they_have_among_all(selection):
    model = networks.seeded(unet)
    images, labels, masks = networks.batch()
    engine = differentiator(model, images, selection)
    names = selected_parameters(model, "head", selection)
    assert 0 < len(names) < len(list(model.parameters()))
    got = by_parameter(engine, engine.differentiate(images, labels, masks).values)
    expected = oracle.gradients(model, names, images, labels, masks)
    assert got.keys() == set(names)
    for key, value in expected.items():
        torch.testing.assert_close(got[key].double(), value.flatten(2), rtol=1e-3, atol=1e-6)
    engine.check(images[:1], labels[:1], masks[:1])


def test_frozen_parameters_are_not_covered():
    model = networks.seeded(unet)
    model.encoder.requires_grad_(False)
    names = selected_parameters(model, "head", "all")
    assert names
    assert not any(name.startswith("encoder") for name in names)
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no trainable parameter; there are: decoder\.0"):
        selected_parameters(model, "head", ("decoder.*", "encoder.*"))
    with pytest.raises(ValueError, match="UNet has no trainable parameter"):
        selected_parameters(model.requires_grad_(False), "head", "all")


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"'tail\.weight' matches no trainable parameter; there are: encoder"):
        selected_parameters(unet(), "tail", "head")


# What is refused


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.second = nn.Conv2d(2, 2, 3, padding=1)
        self.second.weight = self.first.weight
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def test_tied_parameters_are_refused_by_name():
    images = networks.batch()[0]
    with pytest.raises(ValueError, match=r"tied between modules: first\.weight = second\.weight\. Let both"):
        differentiator(Tied(), images)
    assert differentiator(Tied(), images, "head").layout.columns == 6


class Functional(nn.Module):
    """Reads the weight of a module: once more beside calling it, or instead of calling it."""

    def __init__(self, called):
        super().__init__()
        self.called = called
        self.layer = nn.Conv2d(2, 2, 3, padding=1)
        self.idle = nn.Conv2d(2, 2, 1)
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        y = torch.tanh(self.layer(x) if self.called else x)
        return self.head(F.conv2d(y, self.layer.weight, padding=1))


def test_a_parameter_used_instead_of_its_module_is_refused():
    images = networks.batch()[0]
    message = r"the logits depend on layer\.weight, but the modules that own these parameters are never called"
    with pytest.raises(ValueError, match=message):
        differentiator(Functional(called=False), images)


def test_a_parameter_used_beside_its_module_is_found_by_the_check():
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(lambda: Functional(called=True)), images)
    with pytest.raises(ValueError, match=r"differ from autograd's: layer\.weight \(by [\d.]+%\)\. A parameter is"):
        engine.check(images[:1], labels[:1], masks[:1])
    differentiator(Functional(called=True), images, "head").check(images[:1], labels[:1], masks[:1])


def test_idle_parameters_are_named_and_take_no_room():
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(lambda: Functional(called=True)), images, ("idle.*", "head.*"))
    assert engine.layout.unreached == ("idle.weight", "idle.bias")
    assert [segment.unit for segment in engine.layout.segments] == ["head"]
    engine.check(images, labels, masks)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        return self.head(y - y.mean(0, keepdim=True) / 2)


class BatchStatistics(Mixing):
    """What a batch normalisation without running statistics does in eval mode too."""

    def forward(self, x):
        return self.head(F.relu(F.batch_norm(self.layer(x), None, None, training=True)))


@pytest.mark.parametrize("build", [Mixing, BatchStatistics])
def test_a_network_that_mixes_slices_is_found_by_the_check(build, threads):
    """On several threads too, where shares of a batch go through the network apart."""
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(build), images)
    with pytest.raises(ValueError, match=r"differ from autograd's: layer\.weight .* or their slices are mixed"):
        engine.check(images[:1], labels[:1], masks[:1])


class Insisting(nn.Module):
    """Computes in float32 whatever it is converted to."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        # A normalisation, because the gradients of convolutions may have all the bits of autograd's.
        return self.head(torch.tanh(self.norm(self.layer(x.float()))))


def test_what_differs_by_rounding_alone_passes_the_check(monkeypatch):
    monkeypatch.setattr(gradients, "TOLERANCE", 1e-12)
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(unet), images)
    before = [parameter.clone() for parameter in engine._parameters.values()]
    engine.check(images, labels, masks)
    assert [*map(torch.equal, before, engine._parameters.values())] == [True] * len(before)
    with pytest.raises(ValueError, match="differ from autograd's: "):
        differentiator(networks.seeded(Insisting), images).check(images, labels, masks)


def test_memory_that_is_short_in_the_check_is_not_blamed_on_the_network(monkeypatch):
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(unet), images)
    monkeypatch.setattr(gradients, "TOLERANCE", 1e-12)
    monkeypatch.setattr(RegionDifferentiator, "_in_float64", lambda _: raised(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        engine.check(images, labels, masks)


def raised(error):
    raise error


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_check_is_made_in_float32_whatever_the_precision(precision, monkeypatch):
    used = []
    monkeypatch.setattr(gradients, "recorded", lambda name="float32": used.append(name) or recorded(name))
    images, labels, masks = networks.batch()
    engine = RegionDifferentiator(unet(), head="head", example=images[0], classes=2, precision=precision)
    engine.check(images, labels, masks)
    assert set(used) == {"float32"}
    engine.differentiate(images, labels, masks)
    assert set(used) == {"float32", precision}


def test_batch_statistics_in_eval_mode_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"track_running_stats=False in 1: use running statistics"):
        differentiator(model, networks.batch()[0])


def test_the_check_proves_coverage_where_no_region_exists():
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(lambda: Functional(called=True)), images)
    with pytest.raises(ValueError, match=r"layer\.weight"):
        engine.check(images[:1], labels[:1], torch.zeros_like(masks[:1]))


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.head(x), x


def test_a_network_that_gives_something_else_than_logits_is_refused():
    images = networks.batch()[0]
    with pytest.raises(ValueError, match=r"expected logits of shape \(1, 3, 8, 8\).*got a tuple: wrap it"):
        differentiator(Tuple(), images)
    with pytest.raises(ValueError, match=r"expected logits of shape \(1, 4, 8, 8\).*got a tensor of shape \(1, 3"):
        differentiator(nn.Sequential(nn.Conv2d(2, 3, 1)), images, classes=3)


def test_slices_of_another_size_are_refused():
    images, labels, masks = networks.batch()
    engine = differentiator(unet(), images)
    with pytest.raises(ValueError, match=r"expected slices of shape \(2, 8, 8\).*got images of shape \(3, 2, 8, 4\)"):
        engine.differentiate(images[..., :4], labels[..., :4], masks[..., :4])
    with pytest.raises(ValueError, match=r"at least one, got images of shape \(0, 2, 8, 8\)"):
        engine.differentiate(images[:0], labels[:0], masks[:0])


class Halting(nn.Module):
    """Repeats a layer as often as the slices say."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        for _ in range(1 + int(x.abs().max() > 1)):
            x = self.layer(x)
        return self.head(x)


class Choosing(nn.Module):
    """Sends bright slices through a layer that others don't see."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.head(self.layer(x) if x.abs().max() > 1 else x)


@pytest.mark.parametrize(("build", "times"), [(Halting, 1), (Choosing, 0)])
def test_a_number_of_calls_that_depends_on_the_slices_is_refused(build, times, threads):
    images, labels, masks = networks.batch()
    engine = differentiator(build(), images * 0)
    with pytest.raises(ValueError, match=f"'layer' was called {times} times on the example and more often on this"):
        engine.differentiate(images, labels, masks)


class Checkpointing(nn.Module):
    """Computes a block again instead of keeping what it made."""

    def __init__(self, reentrant, norm=True):
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Tanh())
        self.head = nn.Conv2d(4, 3, 1)
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint(self.block, torch.tanh(self.layer(x)), use_reentrant=self.reentrant).tanh())


@pytest.mark.parametrize(("reentrant", "norm"), [(False, True), (False, False), (True, True), (True, False)])
def test_checkpointed_activations_are_refused(reentrant, norm):
    images, labels, masks = networks.batch()
    engine = differentiator(Checkpointing(reentrant, norm), images)
    with pytest.raises(ValueError, match=r"torch\.utils\.checkpoint.*switch (it|that) off"):
        engine.check(images, labels, masks)


class Gated(nn.Module):
    """Leaves a unit that keeps factors out where slices are dark."""

    def __init__(self):
        super().__init__()
        self.deep, self.head = nn.Conv2d(2, 64, 8, stride=8), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        logits = self.head(x)
        return logits + self.deep(x).mean(1, keepdim=True).tanh() * logits if x.mean() >= 0 else logits


@pytest.fixture
def full_of_nan():
    """New memory that isn't cleared holds no numbers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_unit_that_is_left_out_has_a_gradient_of_zero(full_of_nan):
    images, labels, masks = networks.batch()
    assert images.new_empty(3).isnan().all()
    model = networks.seeded(Gated)
    engine = differentiator(model, images.abs())
    assert [segment.unit for segment in engine.layout.segments if segment.form == "factors"] == ["deep"]
    for lit in (images.abs(), -images.abs()):
        got = by_parameter(engine, engine.differentiate(lit, labels, masks).values)
        expected = oracle.gradients(model, [key for key, _ in model.named_parameters()], lit, labels, masks)
        for key, value in expected.items():
            assert oracle.difference(got[key], value.flatten(2)) < 1e-5 if value.any() else not got[key].any()


def test_a_weight_that_is_not_a_number_is_named():
    model = networks.seeded(unet)
    model.decoder[0].upsample.weight.data[0, 0, 0, 0] = torch.nan
    images, labels, masks = networks.batch()
    masks[0] = masks[1, 0] = False
    with pytest.raises(NonFiniteGradientError, match="infinite or missing value for slice") as caught:
        differentiator(model, images).differentiate(images, labels, masks)
    assert caught.value.unit == "decoder.0.upsample"


@pytest.mark.parametrize("pass_bytes", [1, 1 << 30])
def test_a_slice_that_is_not_finite_is_found(monkeypatch, threads, pass_bytes):
    monkeypatch.setattr(gradients, "PASS_BYTES", pass_bytes)
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(unet), images)
    images[1, 0, 3, 3] = torch.inf
    with pytest.raises(NonFiniteGradientError) as caught:
        engine.differentiate(images, labels, masks)
    assert (caught.value.position, caught.value.class_id) == (1, 1)


class Absorbing(nn.Module):
    """A layer reads an infinite value that no logit and no gradient shows."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(2, 40, 4, stride=4)
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        wide = torch.sigmoid(self.wide(x)).mean(1, keepdim=True)
        return self.head(x.clamp(-1, 1)) + F.interpolate(wide, scale_factor=4)


def test_an_infinite_input_can_not_hide_in_the_factors():
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(Absorbing), images)
    images[2, 0] = torch.inf
    with torch.no_grad():
        engine._model.wide.weight.abs_()
    assert engine._model(images).isfinite().all()
    with pytest.raises(NonFiniteGradientError) as caught:
        engine.differentiate(images, labels, masks)
    assert (caught.value.position, caught.value.unit) == (2, "wide")


# How much


def test_factors_are_smaller_than_gradients():
    images = networks.batch(size=(16, 16))[0]
    engine = differentiator(unet(width=16, depth=4), images)
    assert engine.layout.values < 0.25 * engine.layout.classes * engine.layout.columns


def test_a_layout_can_be_planned_without_memory():
    layout = differentiator(unet(), networks.batch()[0]).layout
    with torch.device("meta"):
        planned = differentiator(unet(), torch.zeros(1, 2, 8, 8)).layout
    assert planned.segments == layout.segments
    assert 0 < planned.activation_bytes <= 2 * layout.activation_bytes


def test_no_more_slices_go_through_a_network_together_than_its_activations_allow(monkeypatch, threads):
    images, labels, masks = networks.batch(slices=10)
    together = []
    model = networks.seeded(unet)
    model.forward = lambda images: together.append(len(images)) or UNet.forward(model, images)
    engine = differentiator(model, images)
    together.clear()
    whole = engine.differentiate(images, labels, masks).values
    assert together == [10 // threads] * threads
    for slices in (2, 1, 0):
        monkeypatch.setattr(gradients, "PASS_BYTES", slices * engine.layout.activation_bytes)
        together.clear()
        parts = engine.differentiate(images, labels, masks).values
        assert sum(together) == 10
        assert max(together) == max(1, slices)
        torch.testing.assert_close(parts, whole)


def test_the_estimate_holds_what_is_in_the_network_together(monkeypatch):
    layout = differentiator(unet(), networks.batch()[0]).layout
    one, two, ten = (differentiate_bytes(layout, slices) for slices in (1, 2, 10))
    assert one > 4 * layout.values + layout.activation_bytes > 4 * layout.values
    assert (two, ten) == (2 * one, 10 * one)
    monkeypatch.setattr(gradients, "PASS_BYTES", 2 * layout.activation_bytes)
    assert differentiate_bytes(layout, 10) == two
    assert differentiate_bytes(layout, 10, threads=2) == 4 * one
    unfolded = 4 * correlation.WINDOW_VALUES["cuda"]
    assert differentiate_bytes(layout, 10, threads=2, device="cuda") == ten + unfolded


class Watched(nn.Module):
    """Remembers its activations as long as anybody else does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        # What a sigmoid has returned is what it keeps for its way back.
        hidden = torch.sigmoid(self.body(x))
        ACTIVATIONS.append(weakref.ref(hidden))
        return self.head(hidden)


ACTIVATIONS: list[weakref.ref] = []


def test_no_activation_outlives_what_it_is_needed_for():
    images, labels, masks = networks.batch()
    ACTIVATIONS.clear()
    engine = differentiator(networks.seeded(Watched), images)
    assert len(ACTIVATIONS) >= 2
    assert [reference() for reference in ACTIVATIONS] == [None] * len(ACTIVATIONS)
    engine.differentiate(images, labels, masks)
    engine.check(images[:1], labels[:1], masks[:1])
    assert [reference() for reference in ACTIVATIONS] == [None] * len(ACTIVATIONS)


class Doubled(nn.Module):
    """A block that returns what it made twice, and what it made of that."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3) / 2)

    def forward(self, x):
        once = torch.einsum("oc,schw->sohw", self.weight, x).tanh()
        return {"out": torch.einsum("oc,schw->sohw", self.weight, once), "features": [once, once]}


class InPlaceUnused(nn.Module):
    """An activation in place whose result is not what goes on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.layer(x)
        self.activation(y)
        return self.head(y)


class Cached(nn.Module):
    """Keeps what it makes of a parameter once it is in eval mode, as LeViT's attention does with its biases."""

    def __init__(self):
        super().__init__()
        self.layer = Scaled()
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7, 1.3]))
        self.kept = {}

    def forward(self, x):
        if "scale" not in self.kept:
            self.kept["scale"] = self.scale.exp()[:, None, None]
        return x * self.kept["scale"]


@pytest.mark.parametrize(("build", "name"), [(InPlaceUnused, "layer.weight"), (Cached, "layer.scale")])
def test_gradients_of_another_network_than_the_given_are_found_by_the_check(build, name, threads):
    images, labels, masks = networks.batch()
    engine = differentiator(networks.seeded(build), images)
    with pytest.raises(ValueError, match=rf"differ from autograd's: .*{name} \(by"):
        engine.check(images[:1], labels[:1], masks[:1])


class Tokens(nn.Module):
    """Writes into what a linear layer returns for tokens, which is a view."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 4)
        self.again = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = torch.tanh(self.layer(x.flatten(2).mT))
        after = self.again(tokens)
        after += tokens
        return self.head(after).mT.unflatten(2, x.shape[2:])


class Keeping(nn.Module):
    """Keeps its last activation, which can't be copied."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        self.last = torch.tanh(self.layer(x))
        return self.head(self.last)


@pytest.mark.parametrize("build", [Tokens, Keeping])
def test_networks_that_write_into_views_or_keep_activations_equal_the_oracle(build, threads):
    model = networks.seeded(build).double().eval()
    images, labels, masks = networks.batch()
    engine = differentiator(model, images.double())
    for _ in range(2):
        engine.check(images[:1].double(), labels[:1], masks[:1])
    found = engine.differentiate(images.double().requires_grad_(), labels, masks)
    got = by_parameter(engine, found.values)
    names = [name for name, _ in model.named_parameters()]
    expected = oracle.gradients(model, names, images, labels, masks)
    for name in names:
        assert oracle.difference(got[name], expected[name].flatten(2)) < 1e-12, name


class SeveralOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.block = Doubled()
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        made = self.block(self.first(x))
        return self.head(made["out"] + 2 * made["features"][0] * made["features"][1])


class Recurrent(nn.Module):
    """A cell that is called once a column, and whose hidden state is made from the cell state beside it."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(2, 4)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        slices, _, height, width = x.shape
        hidden = state = x.new_zeros(slices * height, 4)
        seen = []
        for column in range(width):
            hidden, state = self.cell(x[..., column].mT.flatten(0, 1), (hidden, state))
            seen.append((hidden + state / 2).unflatten(0, (slices, height)).mT)
        return self.head(torch.stack(seen, 3))


@pytest.mark.parametrize("build", [SeveralOutputs, Recurrent])
def test_outputs_of_a_unit_that_are_made_from_one_another_are_counted_once(build):
    model = networks.seeded(build).double().eval()
    images, labels, masks = networks.batch()
    engine = differentiator(model, images.double())
    engine.check(images.double(), labels, masks)
    got = by_parameter(engine, engine.differentiate(images.double(), labels, masks).values)
    names = [name for name, _ in model.named_parameters()]
    expected = oracle.gradients(model, names, images, labels, masks)
    for name in names:
        assert oracle.difference(got[name], expected[name].flatten(2)) < 1e-12, name


class Logarithm(nn.Module):
    """Reads what is positive alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.log())))


class Intensities(nn.Module):
    """Has a vector for each intensity, the gradients of which are sparse."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(200, 4, sparse=True)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x[:, 0].long()).movedim(3, 1)))


class Telling(nn.Module):
    """Tells a layer how many slices there are."""

    def __init__(self):
        super().__init__()
        self.layer = Told()
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x, len(x))))


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.7, 1.3]))

    def forward(self, x, slices):
        return x.view(slices, 2, -1).mul(self.gain[:, None]).view(x.shape)


class Normalising(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.layer(x))))


class KeepingAll(Keeping):
    """Keeps its activations in a list."""

    def forward(self, x):
        self.all = [torch.tanh(self.layer(x))]
        return self.head(self.all[0])


def old_weight_norm():
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(nn.utils.weight_norm(nn.Conv2d(2, 4, 3, padding=1)), nn.Tanh(), nn.Conv2d(4, 3, 1))


def assert_oracle(build, images, prepare=lambda model, images: model, *, dtype=torch.float64, tolerance=1e-12):
    """The gradients of a network, made ready somehow, pass the check, and are the oracle's of one that isn't."""
    _, labels, masks = networks.batch()
    # Without history, which the oracle couldn't copy.
    with torch.no_grad():
        fresh = networks.seeded(build).to(dtype)
    names = [name for name, _ in fresh.named_parameters()]
    expected = oracle.gradients(fresh, names, images.to(dtype).contiguous(), labels, masks)
    images = images.to(dtype)
    engine = differentiator(prepare(networks.seeded(build).to(dtype), images), images)
    engine.check(images[:1], labels[:1], masks[:1])
    rows = engine.differentiate(images, labels, masks).values
    got = by_parameter(engine, rows)
    whole = [torch.cat([values[name].flatten(2).double() for name in names], 2) for values in (got, expected)]
    assert oracle.difference(*whole) < tolerance


POSITIVE = networks.batch()[0].abs() * 40 + 1.5


@pytest.mark.parametrize(("build", "images"), [(Logarithm, POSITIVE), (Intensities, POSITIVE.floor())])
def test_the_check_shows_a_network_what_it_may_be_shown(build, images):
    assert POSITIVE.max() < 200
    assert_oracle(build, images)


def test_a_unit_that_is_told_how_many_slices_there_are_equals_the_oracle(threads):
    assert_oracle(Telling, networks.batch()[0])


def called(model, images):
    """The network after a training step, of which it may keep activations with their history."""
    model.train()(images)
    return model


@pytest.mark.parametrize("build", [Keeping, KeepingAll, old_weight_norm])
def test_what_a_network_keeps_of_earlier_calls_does_not_matter(build, threads):
    assert_oracle(build, networks.batch()[0], called)


def test_channels_may_be_last(threads):
    images = networks.batch()[0].contiguous(memory_format=torch.channels_last)
    assert_oracle(Normalising, images, lambda model, _: model.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("build", [Normalising, unet])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
def test_networks_of_half_precision_are_as_near_as_it_allows(build, dtype, tolerance):
    assert_oracle(build, networks.batch()[0].to(dtype), dtype=dtype, tolerance=tolerance)

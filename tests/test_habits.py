"""Habits of researchers' networks: what PyTorch allows is differentiated as it does, or refused by name."""

import time

import networks
import oracle
import pytest
import torch
import torch.nn.functional as F
from test_gradients import by_parameter, differentiator
from torch import nn

from ray_tracin import gradients
from ray_tracin.units import selected_parameters


class Body(nn.Module):
    """A convolution, a block, a head."""

    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.block = block
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.block(torch.tanh(self.stem(x)))))


class Skipping(nn.Module):
    """A hook keeps what the first layer returns."""

    def __init__(self, closure):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)
        self.kept = {}
        hook = (lambda _, __, output: self.kept.update(first=output)) if closure else self.keep
        self.first.register_forward_hook(hook)

    def keep(self, _, __, output):
        self.kept["first"] = output

    def forward(self, x):
        deep = self.second(torch.tanh(self.first(x)))
        return self.head(torch.tanh(deep + self.kept["first"]))


class Lambdas(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.steps = [lambda x: self.layer(x) * 2, torch.tanh]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.head(x)


def replaced_forward():
    model = Body(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()))
    block, unset = model.block, None
    block.forward = lambda x: 2 * block[1](block[0](x)) if block.gain is None else unset
    block.forward.gain = block.gain = None
    del unset
    return model


def decorated_forward():
    model = Body(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()))
    model.block.forward = torch.enable_grad()(model.block.forward)
    return model


class Unregistered(nn.Module):
    """Layers in a list, which PyTorch doesn't know of."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Conv2d(2, 2, 1).double()]
        self.layer, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(self.hidden[0](x))))


class Asking(Unregistered):
    """Asks for gradients of its own in what it reads."""

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.requires_grad_() * 2)))


class Spectrum(nn.Module):
    """Weighs frequencies, and returns them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 8, 5, 2) / 4)

    def forward(self, x):
        return torch.einsum("schw,cohw->sohw", torch.fft.rfft2(x), torch.view_as_complex(self.weight))


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.spectrum = Spectrum()

    def forward(self, x):
        return torch.fft.irfft2(self.spectrum(x), s=x.shape[2:])


def changed_layers():
    """One number for all axes, and weights of other sizes than the layers were made with."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 1))
    first, second = model[0], model[2]
    first.weight = nn.Parameter(torch.randn(4, 2, 2, 5) / 5)
    first.padding, first.dilation, first.stride = (1, 2), [2, 1], 1
    second.weight = nn.Parameter(torch.randn(4, 4, 5, 5) / 5)
    second.padding, second.stride, second.output_padding = (2, 2), 2, (1, 1)
    model.append(nn.AvgPool2d(2))
    return model


RIGHT = {
    "a hook that is a closure": lambda: Skipping(closure=True),
    "a hook that is a method": lambda: Skipping(closure=False),
    "lambdas": Lambdas,
    "a replaced forward": replaced_forward,
    "a decorated forward": decorated_forward,
    "unregistered layers": Unregistered,
    "an input with gradients": Asking,
    "complex outputs": lambda: Body(Spectral()),
    "changed layers": changed_layers,
}


@pytest.mark.parametrize("name", RIGHT)
def test_gradients_equal_the_oracle(name, monkeypatch):
    with torch.no_grad():
        model = networks.seeded(RIGHT[name]).double().eval()
    # Copies are what some of these go wrong in.
    monkeypatch.setattr(oracle, "double", lambda model: model)
    images, labels, masks = networks.batch()
    images = images.double()
    names = [key for key, _ in model.named_parameters()]
    engine = differentiator(model, images)
    engine.check(images[:1], labels[:1], masks[:1])
    before = torch.get_num_threads()
    expected = oracle.gradients(model, names, images, labels, masks)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = by_parameter(engine, engine.differentiate(images, labels, masks).values)
        torch.set_num_threads(before)
        for key in names:
            assert oracle.difference(got[key], expected[key].flatten(2)) < 1e-12, key


def test_what_differs_by_rounding_alone_passes_the_check(monkeypatch):
    """Decided by a copy in float64, whose hooks have to be its own too."""
    monkeypatch.setattr(gradients, "TOLERANCE", 1e-12)
    images, labels, masks = networks.batch()
    differentiator(networks.seeded(lambda: Skipping(closure=True)), images).check(images, labels, masks)


KEPT: dict[str, torch.Tensor] = {}


class Remembering(nn.Module):
    """A hook of a layer without parameters leaves what it sees in a place that copies share, for a while."""

    def __init__(self):
        super().__init__()
        self.layer, self.activation, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)
        self.activation.register_forward_hook(self.keep)

    def keep(self, _, __, output):
        KEPT["hidden"] = output
        time.sleep(0.01)

    def forward(self, x):
        self.activation(self.layer(x))
        return self.head(KEPT["hidden"])


def test_shares_of_a_batch_do_not_see_what_hooks_keep_of_others():
    images, labels, masks = networks.batch(slices=4)
    engine = differentiator(networks.seeded(Remembering), images)
    before = torch.get_num_threads()
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows.append(engine.differentiate(images, labels, masks).values)
    torch.set_num_threads(before)
    torch.testing.assert_close(*rows)


class Inferring(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    @torch.no_grad()
    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)))


def test_logits_without_gradients_are_refused():
    images, labels, masks = networks.batch()
    with pytest.raises(ValueError, match=r"depend on none of layer\.weight, .*: look for torch\.no_grad and detach"):
        differentiator(Inferring(), images).check(images, labels, masks)


class Differentiating(Inferring):
    def forward(self, x):
        x = x.requires_grad_() * 1
        (own,) = torch.autograd.grad(torch.tanh(self.layer(x)).square().sum(), x, create_graph=True)
        return self.head(F.pad(own, (0, 0, 0, 0, 0, 2)))


class Frequencies(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8, 5, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.weight, s=x.shape[2:])


def scripted():
    return Body(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))))


REFUSED = {
    "complex parameters": (lambda: Body(Frequencies()), r"got complex ones: block\.weight\. Hold them as real ones"),
    "TorchScript": (scripted, r"got TorchScript \(block\), which can't be followed"),
    "gradients inside": (Differentiating, r"got one that differentiates while it runs"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_followed_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        differentiator(build(), networks.batch()[0])


class Conditioned(nn.Module):
    """Knows something of every slice that it isn't called with."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return x * self.gain + self.condition


class Conditioning(Body):
    def forward(self, x):
        self.block.condition = x.mean((1, 2, 3), keepdim=True)
        return super().forward(x)


def test_a_unit_that_can_not_run_on_one_slice_is_named():
    images, labels, masks = networks.batch()
    engine = differentiator(Conditioning(Conditioned()), images)
    with pytest.raises(RuntimeError) as caught:
        engine.check(images, labels, masks)
    assert "Unit 'block' was run again on one slice's part" in caught.value.__notes__[0]


def test_a_parameter_without_values_makes_no_unit_of_its_owner():
    model = Body(nn.Conv2d(4, 4, 1))
    model.device_of_mine = nn.Parameter(torch.empty(0))
    assert "device_of_mine" not in selected_parameters(model, "head", "all")
    engine = differentiator(model, networks.batch()[0])
    assert [segment.unit for segment in engine.layout.segments] == ["stem", "block", "head"]

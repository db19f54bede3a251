"""Small segmentation networks that between them hold every kind of layer and every habit the engine must cope with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CLASSES = 2


def seeded(build, seed=0):
    """The network that ``build`` makes, its weights, biases and statistics random, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and value.dim() == 1:
                noise = torch.rand_like(value)
                value.data.copy_(noise + 0.5 if name.endswith(("weight", "var")) else noise - 0.5)
        # In training mode, in which networks come and no gradient must be taken.
        return model.train()


def batch(slices=3, modalities=2, size=(8, 8), classes=CLASSES, seed=1):
    """Images, labels, and masks with at least two pixels of each class where their region exists."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(slices, modalities, *size, generator=generator)
    labels = torch.randint(0, classes + 1, (slices, *size), generator=generator)
    masks = torch.rand(slices, classes, *size, generator=generator) < 0.5
    return images, labels, masks


class InPlace(nn.Module):
    """Activations in place, sums into what a convolution wrote, a block that overwrites what it reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.block = Overwriting()
        self.activation = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(6, CLASSES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1
        y = self.first(x)
        skip = y.clone()
        z = self.second(self.activation(y))
        z += skip
        return self.head(self.block(F.relu_(z * 1) * 2))


class Overwriting(nn.Module):
    def __init__(self, channels=6):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(0.3) * self.gain


class Scaled(nn.Module):
    """A block with a bare parameter and a child: one unit of no known kind, with two outputs and a keyword."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))
        self.inner = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.inner(x)
        return torch.tanh(y) * self.gamma, {"other": (y * self.gamma + shift).relu()}


class Unfamiliar(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Scaled()
        self.register_buffer("shift", torch.linspace(-1, 1, 8))
        self.listed = Listed()
        self.head = nn.Conv2d(8, CLASSES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.block(x, shift=self.shift)
        return self.head(self.listed(torch.cat([first, rest["other"]], 1)))


class Listed(nn.Module):
    """Parameters in a list that is never called."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(1))])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights[0] + self.weights[1]


class Shared(nn.Module):
    """One module, called twice in a pass, and once more under another name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.twice
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Conv2d(4, CLASSES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x))
        y = self.norm(self.twice(y))
        return self.head(self.norm(self.alias(F.avg_pool2d(y, 2).repeat_interleave(2, -1).repeat_interleave(2, -2))))


class Tokens(nn.Module):
    """Attention over raw pixels: linear layers on (slice, token, channel), and on (token, slice, channel)."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(2, 2, 16, dropout=0.1, batch_first=batch_first)
        self.embed = nn.Linear(2, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES + 1)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        if self.batch_first:
            tokens = self.block(tokens)
        else:
            tokens = self.block(tokens.transpose(0, 1).contiguous()).transpose(0, 1)
        return self.head(self.norm(self.embed(tokens))).mT.unflatten(2, x.shape[2:])


class Windows(nn.Module):
    """Tiles of a slice as rows of the first axis, as in Swin: several rows a slice, also for a convolution."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * 16, 12)
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.out = nn.Linear(12, (CLASSES + 1) * 16)

    def forward(self, x: Tensor) -> Tensor:
        tiles = F.unfold(x, 4, stride=4).mT.flatten(0, 1)
        tiles = self.conv(self.norm(self.linear(tiles)).unsqueeze(1)).squeeze(1)
        return F.fold(self.out(tiles).unflatten(0, (len(x), -1)).mT, x.shape[2:], 4, stride=4)


class OneSided(nn.Module):
    """An operation that gives one of its inputs, made by three kinds of layers, no gradient: it is 0."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.gate = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), Overwriting(4))
        self.head = nn.Conv2d(4, CLASSES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Gated.apply(torch.tanh(self.stem(x)), self.gate(x)))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(context, values, gate):
        context.save_for_backward(gate)
        return values * gate

    @staticmethod
    def backward(context, upstream):
        return upstream * context.saved_tensors[0], None


def one_dimension():
    return nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.ConvTranspose1d(8, 6, 3, 1, 1), nn.Conv1d(6, 3, 1)
    )


def three_dimensions():
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.InstanceNorm3d(6, affine=True),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv3d(6, 32, (1, 3, 2), stride=(1, 2, 2), padding=(0, 1, 0)),
        nn.BatchNorm3d(32),
        nn.PReLU(32),
        nn.ConvTranspose3d(32, 4, (1, 2, 2), stride=(1, 2, 2)),
        nn.PReLU(),
        nn.Conv3d(4, CLASSES + 1, 1),
    )


def strided():
    """Strides that leave a remainder, dilation, groups, string padding, output padding, few positions and many."""
    return nn.Sequential(
        nn.ConvTranspose2d(2, 3, (2, 3), dilation=2, padding=(1, 2), output_padding=(1, 1)),
        nn.Conv2d(3, 8, 4, padding="same", dilation=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(8, 12, (3, 2), stride=(2, 3), padding=(1, 2), groups=4),
        nn.BatchNorm2d(12),
        nn.ConvTranspose2d(12, 16, 3, stride=(2, 1), padding=1, output_padding=(1, 0), groups=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(16, 8, 3, padding="valid", bias=False),
        nn.ConvTranspose2d(8, 8, (2, 3), dilation=2, stride=1, padding=(0, 2), output_padding=(1, 1)),
        nn.Tanh(),
        nn.Upsample(size=(8, 8)),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.GroupNorm(4, 8),
        nn.Conv2d(8, CLASSES + 1, 1),
    )


def deep():
    """Few positions: convolutions whose factors are smaller than their gradients, grouped, strided and transposed."""
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, stride=4, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 24, 3, padding="same", dilation=2, groups=2),
        nn.InstanceNorm2d(24, affine=True, track_running_stats=True),
        nn.ConvTranspose2d(24, 32, 3, stride=2, padding=1, output_padding=1, groups=4),
        nn.Tanh(),
        nn.Conv2d(32, 24, 2, padding="same"),
        nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1, bias=False),
        nn.Conv2d(16, CLASSES + 1, 1),
    )


def hooked():
    """Hooks of the network's own change what its layers read and write."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES + 1, 1))
    model[0].register_forward_pre_hook(_double_the_input)
    model[2].register_forward_hook(_double_the_output)
    return model


def _double_the_input(_, arguments):
    return (arguments[0] * 2,)


def _double_the_output(_, arguments, output):
    return output * 2


def normalised():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 6, 3, padding=1)),
        nn.InstanceNorm2d(6, affine=True),
        nn.ReLU6(inplace=True),
        parametrizations.orthogonal(nn.Conv2d(6, 6, 1, bias=False)),
        nn.LayerNorm([6, 8, 8]),
        nn.Conv2d(6, CLASSES + 1, 1),
    )


NETWORKS = {
    "one dimension": (one_dimension, (16,)),
    "three dimensions": (three_dimensions, (3, 6, 6)),
    "strided": (strided, (8, 8)),
    "deep": (deep, (8, 8)),
    "normalised and parametrised": (normalised, (8, 8)),
    "hooked": (hooked, (8, 8)),
    "in place": (InPlace, (8, 8)),
    "unfamiliar": (Unfamiliar, (8, 8)),
    "shared": (Shared, (8, 8)),
    "one-sided": (OneSided, (8, 8)),
    "tokens": (Tokens, (4, 4)),
    "tokens first": (lambda: Tokens(batch_first=False), (4, 4)),
    "windows": (Windows, (8, 8)),
}

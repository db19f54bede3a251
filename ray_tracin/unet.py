"""The UNet, the feature maps that its head reads, and the masking of one of them.

The one idea: a segmentation network is a stack of levels and one 1×1 convolution, the head, that reads the last hidden
feature maps. Everything the explanation asks about features goes through those maps, so they can be taken from any
network whose head has a name, and masking a filter is a rank-one update of the logits instead of another forward pass.

It doesn't know how a network is trained, what a region is, or where weights are stored.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ray_tracin.config import ModelConfig, Norm

HEAD = "head"
"""Name of the UNet's last layer, the 1×1 convolution from feature maps to logits."""

GROUPS = 8
"""Groups of GroupNorm; a level whose channels 8 doesn't divide takes the greatest common divisor."""

BACKGROUND_BIAS = 3.0
"""Initial bias of the head for the background; the biases of the classes are 0."""


class UNet(nn.Module):
    """Logits of every pixel for the background and ``classes`` classes (Ronneberger et al. 2015, arXiv 1505.04597).

    Level ``l`` of ``depth`` has ``width · 2^l`` channels and two 3×3 convolutions, each followed by the normalisation
    and a ReLU, padded so that the logits are as large as the image. Max-pooling by 2 goes down, 2×2 transposed
    convolutions go up, and the level's own maps are concatenated on the way. The paper's network (4 modalities,
    3 classes, width 64, depth 5, batch norm) has 31,044,292 trainable values in 82 tensors.

    Weights are PyTorch's default ones; ``build_unet`` initialises them from a seed. ``encoder``, ``decoder`` and
    ``head`` are the prefixes of its parameter names.
    """

    def __init__(self, *, modalities: int, classes: int, width: int = 64, depth: int = 5, norm: Norm = "batch") -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth)]
        inputs = [modalities, *channels[:-1]]
        self.encoder = nn.ModuleList(_convolutions(i, o, norm) for i, o in zip(inputs, channels, strict=True))
        self.decoder = nn.ModuleList(_UpLevel(channel, norm) for channel in reversed(channels[:-1]))
        self.head = nn.Conv2d(width, classes + 1, kernel_size=1)

    def forward(self, images: Float[Tensor, "slice modality h w"]) -> Float[Tensor, "slice channel h w"]:
        """The logits, channel 0 being the background.

        Raises:
            ValueError: height or width can't be halved once a level.
        """
        self._check_size(images)
        skips: list[Tensor] = []
        maps = images
        for level, convolutions in enumerate(self.encoder):
            maps = convolutions(F.max_pool2d(maps, 2) if level else maps)
            skips.append(maps)
        for up, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            maps = up(maps, skip)
        logits: Tensor = self.head(maps)
        return logits

    def _check_size(self, images: Tensor) -> None:
        factor = 2 ** (len(self.encoder) - 1)
        height, width = images.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"a UNet of {len(self.encoder)} levels expects slices with height and width multiples of {factor}, "
                f"got {height}×{width}: crop or pad them, or take fewer levels"
            )


class _UpLevel(nn.Module):
    """One level of the decoder: twice as large, half as many channels, joined with the encoder's maps."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(2 * channels, channels, kernel_size=2, stride=2)
        self.convolutions = _convolutions(2 * channels, channels, norm)

    def forward(
        self, maps: Float[Tensor, "slice deep half_h half_w"], skip: Float[Tensor, "slice channel h w"]
    ) -> Float[Tensor, "slice channel h w"]:
        joined: Tensor = self.convolutions(torch.cat([skip, self.upsample(maps)], dim=1))
        return joined


def _convolutions(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, channels in ((1, inputs), (2, outputs)):
        # The bias before BatchNorm is idle; it is there because the paper's 31,044,292 parameters count it.
        layers[f"conv{number}"] = nn.Conv2d(channels, outputs, kernel_size=3, padding=1)
        if norm != "none":
            layers[f"norm{number}"] = _normalisation(norm, outputs)
        # Not in place: gradients per layer are taken from what its neighbours read and wrote.
        layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


def _normalisation(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def build_unet(config: ModelConfig, modalities: int, classes: int, seed: int) -> UNet:
    """A UNet on the CPU with He-normal convolutions and zero biases (He et al. 2015, arXiv 1502.01852).

    One bias is not 0: every pixel starts as probable background (a softmax of 0.87 where the other logits are 0). A
    loss that leaves the background out can't tell its channel from a class's, and where a class starts as the more
    probable one it takes the background's place: it is predicted everywhere, and its Dice stays near 0 for good.

    The weights are a function of the arguments alone: the global random state is neither read nor changed.
    """
    # On the meta device the default initialisation draws no random number.
    with torch.device("meta"):
        model = UNet(modalities=modalities, classes=classes, width=config.width, depth=config.depth, norm=config.norm)
    model.to_empty(device="cpu")
    _initialise(model, torch.Generator().manual_seed(seed))
    return model


def _initialise(model: UNet, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # PyTorch counts 4 inputs a value of a 2×2 transposed convolution of stride 2 where there is 1, over half
            # as many channels: its variance comes out as 1/inputs, right for a layer that no ReLU follows.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
            module.reset_parameters()
    assert model.head.bias is not None
    with torch.no_grad():
        model.head.bias[0] = BACKGROUND_BIAS


def last_hidden_maps(
    model: nn.Module, head: str, images: Float[Tensor, "slice modality *space"]
) -> tuple[Float[Tensor, "slice channel *space"], Float[Tensor, "slice feature *space"]]:
    """The logits of a network, and the feature maps that its head read to make them.

    Whether the network is in eval mode and whether gradients are recorded is the caller's choice.

    Raises:
        ValueError: the network has no layer of that name, or doesn't run it exactly once a forward pass.
    """
    maps: list[Tensor] = []
    handle = _layer(model, head).register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    try:
        logits = model(images)
    finally:
        handle.remove()
    if len(maps) != 1:
        raise ValueError(
            f"expected the head {head!r} to run once a forward pass, it ran {len(maps)} times: "
            "name the layer that makes the logits"
        )
    return logits, maps[0]


def _layer(model: nn.Module, name: str) -> nn.Module:
    layers: dict[str, nn.Module] = dict(model.named_modules())
    if name == "" or name not in layers:
        leaves = [key for key, layer in layers.items() if key and not any(layer.children())]
        raise ValueError(
            f"expected the name of a layer of {type(model).__name__} as the head, got {name!r}; "
            f"its last layers are: {', '.join(leaves[-5:])}"
        )
    return layers[name]


def masked_logits(
    logits: Float[Tensor, "slice channel *space"],
    maps: Float[Tensor, "slice feature *space"],
    head_weight: Float[Tensor, "channel feature *kernel"],
    feature: int,
) -> Float[Tensor, "slice channel *space"]:
    """The logits as they would be with one filter of the last hidden layer set to 0 (eq. 9).

    ``logits − W[:, k] · h_k`` with the head's kernel ``W`` and feature map ``h_k``: exact for a 1×1 head, and the bias
    stays. ``feature`` counts from 0.

    Raises:
        ValueError: the head's kernel is larger than one pixel, or there is no such filter.
    """
    channels, features = head_weight.shape[:2]
    if head_weight.numel() != channels * features:
        raise ValueError(
            f"masking a filter expects a head with a kernel of one pixel, got a weight of shape "
            f"{tuple(head_weight.shape)}: name a 1×1 convolution as the head"
        )
    if not 0 <= feature < features:
        raise ValueError(f"expected a filter from 0 to {features - 1}, got {feature}")
    column = head_weight.reshape(channels, features)[:, feature]
    return logits - torch.einsum("c,s...->sc...", column, maps[:, feature])

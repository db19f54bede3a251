"""The UNet: its size, its initialisation, the maps that its head reads, and the masking of a filter."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from ray_tracin.config import ModelConfig
from ray_tracin.unet import HEAD, UNet, build_unet, last_hidden_maps, masked_logits

SMALL = ModelConfig(width=4, depth=3)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestArchitecture:
    def test_the_papers_network_has_31_044_292_trainable_values_in_82_tensors(self):
        with torch.device("meta"):
            model = UNet(modalities=4, classes=3)
        parameters = list(model.parameters())
        assert len(parameters) == 82
        assert sum(parameter.numel() for parameter in parameters) == 31_044_292
        assert model.head.weight.shape == (4, 64, 1, 1)

    @pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
    def test_logits_are_as_large_as_the_image_and_every_parameter_has_a_gradient(self, norm):
        model = build_unet(ModelConfig(width=6, depth=3, norm=norm), 2, 3, seed=0)
        logits = model(noise(2, 2, 8, 12))
        assert logits.shape == (2, 4, 8, 12)
        logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    @pytest.mark.parametrize(("width", "groups"), [(4, 4), (6, 2), (8, 8), (64, 8)])
    def test_group_norm_has_eight_groups_or_the_largest_common_divisor(self, width, groups):
        with torch.device("meta"):
            model = UNet(modalities=1, classes=1, width=width, depth=2, norm="group")
        assert next(m for m in model.modules() if isinstance(m, nn.GroupNorm)).num_groups == groups

    def test_without_norm_there_is_none(self):
        model = build_unet(ModelConfig(width=4, depth=2, norm="none"), 1, 1, seed=0)
        kinds = {type(layer) for layer in model.modules() if not any(layer.children())}
        assert kinds == {nn.Conv2d, nn.ConvTranspose2d, nn.ReLU}

    def test_the_deepest_level_is_seen_and_so_are_the_skips(self):
        model = build_unet(SMALL, 1, 1, seed=0).eval()
        images = noise(1, 1, 16, 16).requires_grad_()
        model(images)[0, 1, 8, 8].backward()
        # The skip alone reaches 4 pixels (four 3×3 convolutions); the bottom level reaches further.
        assert images.grad[0, 0, 8, 8 + 7] != 0
        bottom = model.encoder[-1].conv1.weight
        assert bottom.grad.abs().sum() > 0
        first_skip = model.decoder[-1].convolutions.conv1.weight.grad[:, :4]
        assert first_skip.abs().sum() > 0

    def test_a_size_that_cannot_be_halved_is_refused(self):
        model = build_unet(SMALL, 1, 1, seed=0)
        with pytest.raises(ValueError, match="3 levels expects slices with height and width multiples of 4, got 8×10"):
            model(noise(1, 1, 8, 10))

    def test_one_slice_is_a_batch(self):
        model = build_unet(SMALL, 1, 1, seed=0).train()
        assert model(noise(1, 1, 8, 8)).isfinite().all()


class TestInitialisation:
    def test_weights_depend_on_the_seed_alone(self):
        torch.manual_seed(1)
        first = build_unet(SMALL, 4, 3, seed=5).state_dict()
        torch.manual_seed(2)
        second = build_unet(SMALL, 4, 3, seed=5).state_dict()
        other = build_unet(SMALL, 4, 3, seed=6).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["head.weight"], other["head.weight"])

    def test_the_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        build_unet(SMALL, 4, 3, seed=5)
        assert torch.equal(torch.get_rng_state(), before)

    def test_convolutions_are_he_normal_with_zero_biases(self):
        model = build_unet(ModelConfig(width=16, depth=3), 4, 3, seed=0)
        weight = model.encoder[2].conv2.weight
        assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
        assert float(weight.detach().mean()) == pytest.approx(0, abs=2e-3)
        up = model.decoder[0].upsample.weight
        assert float(up.detach().std()) == pytest.approx((1 / 64) ** 0.5, rel=0.03)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        assert all(bool((layer.bias == 0).all()) for layer in convolutions if layer is not model.head)

    def test_every_pixel_starts_as_background_rather_than_as_a_class(self):
        head = build_unet(SMALL, 4, 3, seed=0).head
        assert head.bias.tolist() == [3, 0, 0, 0]
        assert float(head.bias.detach().softmax(0)[0]) == pytest.approx(0.87, abs=0.005)

    def test_batch_norm_starts_as_pytorch_starts_it(self):
        built = build_unet(SMALL, 1, 1, seed=0).encoder[1].norm1.state_dict()
        fresh = nn.BatchNorm2d(8).state_dict()
        assert all(torch.equal(built[name], fresh[name]) for name in fresh)

    def test_the_weights_are_on_the_cpu_and_trainable(self):
        parameters = list(build_unet(SMALL, 1, 1, seed=0).parameters())
        assert {parameter.device.type for parameter in parameters} == {"cpu"}
        assert all(parameter.requires_grad for parameter in parameters)


class Twice(nn.Module):
    """A network that runs its head twice, and never another layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(2, 2, 1)
        self.unused = nn.Conv2d(2, 2, 1)

    def forward(self, images):
        return self.head(self.head(images))


class TestLastHiddenMaps:
    def test_the_head_turns_the_maps_into_the_logits(self):
        model = build_unet(SMALL, 2, 3, seed=0).eval()
        images = noise(2, 2, 8, 8)
        logits, maps = last_hidden_maps(model, HEAD, images)
        assert maps.shape == (2, 4, 8, 8)
        assert torch.equal(model.head(maps), logits)
        assert torch.equal(model(images), logits)
        assert (maps >= 0).all()

    def test_any_network_with_a_named_head_will_do(self):
        body, head = nn.Conv3d(1, 5, 3, padding=1), nn.Conv3d(5, 2, 1)
        images = noise(1, 1, 4, 4, 4)
        logits, maps = last_hidden_maps(nn.Sequential(body, head), "1", images)
        assert torch.equal(maps, body(images))
        assert torch.equal(logits, head(body(images)))

    def test_no_hook_stays_behind_even_after_a_failure(self):
        model = build_unet(SMALL, 2, 3, seed=0)
        with pytest.raises(ValueError, match="multiples of 4"):
            last_hidden_maps(model, HEAD, noise(1, 2, 6, 6))
        last_hidden_maps(model, HEAD, noise(1, 2, 8, 8))
        assert not model.head._forward_pre_hooks

    @pytest.mark.parametrize("name", ["haed", ""])
    def test_an_unknown_head_is_named_with_the_last_layers(self, name):
        model = build_unet(SMALL, 2, 3, seed=0)
        with pytest.raises(ValueError, match=rf"a layer of UNet as the head, got '{name}'; .*relu2, head$"):
            last_hidden_maps(model, name, noise(1, 2, 8, 8))

    @pytest.mark.parametrize(("name", "times"), [("head", 2), ("unused", 0)])
    def test_a_head_must_run_exactly_once(self, name, times):
        with pytest.raises(ValueError, match=f"the head '{name}' to run once a forward pass, it ran {times} times"):
            last_hidden_maps(Twice(), name, noise(1, 2, 4, 4))


class TestMaskedLogits:
    def test_it_equals_running_again_with_the_filter_set_to_zero(self):
        model = build_unet(ModelConfig(width=6, depth=3), 2, 3, seed=3).eval()
        images = noise(2, 2, 16, 16)
        logits, maps = last_hidden_maps(model, HEAD, images)
        for feature in range(6):

            def silence(_, inputs, feature=feature):
                kept = inputs[0].clone()
                kept[:, feature] = 0
                return (kept,)

            handle = model.head.register_forward_pre_hook(silence)
            again = model(images)
            handle.remove()
            masked = masked_logits(logits, maps, model.head.weight, feature)
            assert torch.allclose(masked, again, atol=1e-5)
            assert not torch.allclose(masked, logits, atol=1e-3), "masking this filter changes something"

    def test_it_works_in_three_dimensions(self):
        head = nn.Conv3d(3, 2, 1)
        maps = noise(1, 3, 2, 2, 2)
        without = maps.clone()
        without[:, 1] = 0
        assert torch.allclose(masked_logits(head(maps), maps, head.weight, 1), head(without), atol=1e-6)

    def test_a_kernel_larger_than_a_pixel_is_refused(self):
        head = nn.Conv2d(3, 2, 3, padding=1)
        maps = noise(1, 3, 4, 4)
        with pytest.raises(ValueError, match=r"kernel of one pixel, got a weight of shape \(2, 3, 3, 3\)"):
            masked_logits(head(maps), maps, head.weight, 0)

    @pytest.mark.parametrize("feature", [-1, 3])
    def test_a_filter_that_is_not_there_is_refused(self, feature):
        head = nn.Conv2d(3, 2, 1)
        maps = noise(1, 3, 4, 4)
        with pytest.raises(ValueError, match=f"a filter from 0 to 2, got {feature}"):
            masked_logits(head(maps), maps, head.weight, feature)


def test_importing_the_network_imports_neither_monai_nor_ray():
    code = "import sys, ray_tracin.unet; print([name for name in ('monai', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

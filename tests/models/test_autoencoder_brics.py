"""The autoencoder: its contract as a diffusers model and what the paper says of its key codes."""

import json
import math
import os

import pytest
import torch
from accelerate.utils import convert_to_fp32
from small_autoencoders import SAME, SMALL, fix_logits, generator, make_model, public
from torch import nn

from brics_diffusers import BricsAutoencoder
from brics_diffusers.models import autoencoder_brics
from brics_diffusers.models.presets import PRESETS


class TestInterface:
    def test_shapes_and_types(self, any_model, images):
        encoded = any_model.encode(images)
        assert encoded.key_codes.shape == (3, *any_model.key_code_shape) == (3, 4, 4, 4)
        assert encoded.key_codes.min() >= 0 and encoded.key_codes.max() <= 1
        decoded = any_model.decode(encoded.key_codes)
        assert decoded.sample.shape == images.shape and decoded.sample.dtype == torch.float32
        output = any_model(images)
        assert torch.equal(output.sample, decoded.sample) and torch.equal(output.key_codes, encoded.key_codes)
        assert decoded.sample.isfinite().all()

    def test_tuples(self, any_model, images):
        has_kl = any_model.config.regularization == "kl"
        encoded = any_model.encode(images, return_dict=False)
        decoded = any_model.decode(encoded[0], return_dict=False)
        output = any_model(images, return_dict=False)
        assert (len(encoded), len(decoded), len(output)) == (1 + has_kl, 1, 2 + has_kl)
        for actual, expected in zip(output, (*decoded, *encoded), strict=True):
            assert torch.equal(actual, expected)
        named = any_model(images)
        assert (named.kl_loss is not None) == has_kl
        assert all(torch.equal(a, b) for a, b in zip(named.to_tuple(), output, strict=True))

    @pytest.mark.parametrize("size", [(4, 4), (8, 24), (24, 8), (20, 12)])
    def test_other_image_sizes(self, any_model, size):
        sample = torch.zeros(2, 3, *size)
        output = any_model(sample)
        assert output.key_codes.shape == (2, 4, size[0] // 4, size[1] // 4)
        assert output.sample.shape == sample.shape

    def test_other_channels(self):
        model = make_model(in_channels=1, out_channels=4).eval()
        assert model(torch.zeros(1, 1, 16, 16)).sample.shape == (1, 4, 16, 16)

    @pytest.mark.parametrize("encoder_levels, feature_size", [(2, 8), (2, 16), (3, 4), (3, 8), (3, 16), (4, 4)])
    def test_any_sizes_of_code_and_feature_block_that_fit(self, encoder_levels, feature_size):
        model = make_model(
            down_block_types=("DownEncoderBlock2D",) * encoder_levels,
            encoder_block_out_channels=(8,) * encoder_levels,
            feature_size=feature_size,
            decoder_block_out_channels=(16, 8, 8)[: int(math.log2(16 // feature_size)) + 1],
        ).eval()
        side = 16 // 2 ** (encoder_levels - 1)
        assert (model.encoder_factor, model.decoder_factor) == (16 // side, 16 // feature_size)
        output = model(torch.zeros(1, 3, 16, 16))
        assert output.key_codes.shape == (1, *model.key_code_shape) == (1, 4, side, side)
        assert output.sample.shape == (1, 3, 16, 16)

    def test_tiling_is_nearest_neighbour(self, model, codes):
        seen = []
        handle = model.grids.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model.decode(codes)
        handle.remove()
        assert torch.equal(seen[0], nn.functional.interpolate(codes, scale_factor=2, mode="nearest"))

    def test_batch_split_does_not_matter(self, any_model, images):
        whole = any_model(images)
        parts = [any_model(part) for part in images.split([1, 2])]
        for name in whole.keys():
            torch.testing.assert_close(whole[name], torch.cat([part[name] for part in parts]), **SAME)

    def test_slicing(self, any_model, images):
        whole, batches = any_model(images), []
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
            for module in (any_model.encoder, any_model.decoder)
        ]
        any_model.enable_slicing()
        sliced = any_model(images)
        any_model.disable_slicing()
        assert batches == [1] * 6
        any_model(images)
        assert batches == [1] * 6 + [3] * 2
        for hook in hooks:
            hook.remove()
        for name in whole.keys():
            torch.testing.assert_close(sliced[name], whole[name], **SAME)

    @pytest.mark.parametrize("images_at_once, sizes", [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (0.5, [1, 1, 1])])
    def test_a_cpu_decodes_slices_of_bounded_size(self, any_model, images, monkeypatch, images_at_once, sizes):
        if any_model.config.decoder_type != "style":
            sizes = [3]
        codes = any_model.encode(images).key_codes
        whole = any_model.decode(codes).sample  # with gradients, at once
        channels = any_model.config.decoder_block_out_channels[-1]
        limit = int(4 * channels * images[0, 0].numel() * images_at_once)
        monkeypatch.setattr(autoencoder_brics, "SLICE_BYTES", limit)
        seen = []
        handle = any_model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        with torch.no_grad():
            sliced = any_model.decode(codes).sample
        any_model.decode(codes)
        handle.remove()
        assert seen == [*sizes, 3]
        torch.testing.assert_close(sliced, whole, **SAME)


class TestNoise:
    """Relaxed precision (Sec. 3.4, App. D)."""

    def test_eval_is_exact_and_leaves_the_random_state_alone(self, any_model, images):
        state = torch.get_rng_state()
        first = any_model.encode(images, generator=generator(1)).key_codes
        assert torch.equal(first, any_model.encode(images, generator=generator(2)).key_codes)
        assert torch.equal(state, torch.get_rng_state())
        logits = any_model.encoder(images)[:, :4]
        assert torch.equal(first, torch.sigmoid(logits))

    def test_default_scale_is_a_quarter_of_a_cell(self, model):
        assert model.config.key_noise_scale is None and model.key_noise_scale == 1 / (4 * 16)
        assert make_model(key_noise_scale=0.0).key_noise_scale == 0

    @pytest.mark.parametrize("scale", [None, 0.05])
    def test_perturbation_has_the_scale(self, scale, monkeypatch):
        model = make_model(key_noise_scale=scale).train()
        fix_logits(model, monkeypatch, torch.zeros(1, 4, 64, 64))
        noise = model.encode(torch.zeros(4, 3, 256, 256), generator=generator()).key_codes - 0.5
        expected = scale or 1 / (4 * 16)
        # 65,536 draws put the standard deviation within 0.3% and the mean within 0.4% of it (one sigma).
        assert noise.std().item() == pytest.approx(expected, rel=0.015)
        assert abs(noise.mean().item()) < 0.02 * expected
        within = noise.abs().lt(expected).double().mean().item()
        assert within == pytest.approx(0.6827, abs=0.01)  # normal; its estimate has sigma 0.002
        assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[:, 0], noise[:, 1])

    def test_codes_stay_in_range(self, images):
        model = make_model(key_noise_scale=1e3).train()
        codes = model.encode(images).key_codes
        assert codes.min() == 0 and codes.max() == 1
        assert model(images).sample.isfinite().all()

    def test_gradients_pass_unless_clipped(self):
        model = make_model(key_noise_scale=0.3)
        codes = torch.full((1, 4, 4, 4), 0.5, requires_grad=True)
        relaxed = model.relax_precision(codes, generator())
        gradient = torch.autograd.grad(relaxed.sum(), codes)[0]
        clipped = (relaxed == 0) | (relaxed == 1)
        assert clipped.any() and not clipped.all()
        assert torch.equal(gradient, (~clipped).float())

    @pytest.mark.parametrize("variant", ["style-noise", "style-kl", "style-interpolate"])
    def test_generator_decides_in_training(self, models, variant, images):
        model = models[variant].train()
        first, again, other = (model.encode(images, generator=generator(seed)).key_codes for seed in (1, 1, 2))
        model.eval()
        assert torch.equal(first, again) and not torch.equal(first, other)
        exact = model.encode(images).key_codes
        assert not torch.equal(first, exact)
        if variant == "style-noise":
            assert (first - exact).abs().max() < 6 / 64  # 6 sigma

    @pytest.mark.parametrize(
        "variant",
        [
            "style-noise",
            "style-kl",
        ],
    )
    def test_a_generator_an_image(self, models, variant, images):
        model = models[variant].train()
        whole = model.encode(images, generator=[generator(seed) for seed in range(3)]).key_codes
        parts = [model.encode(image[None], generator=[generator(seed)]).key_codes for seed, image in enumerate(images)]
        torch.testing.assert_close(whole, torch.cat(parts), **SAME)

    def test_none_is_exact_in_training(self, models, images):
        model = models["style-none"]
        assert torch.equal(model.train().encode(images).key_codes, model.eval().encode(images).key_codes)


class TestKL:
    """Gaussian logits (App. A.4)."""

    @pytest.mark.parametrize("training", [False, True])
    def test_loss(self, models, monkeypatch, training):
        model = models["style-kl"].train(training)
        mean, log_variance = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
        fix_logits(model, monkeypatch, mean, log_variance)
        kl_loss = model.encode(torch.zeros(2, 3, 16, 16)).kl_loss
        posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
        expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
        assert kl_loss.shape == (2,)
        torch.testing.assert_close(kl_loss, expected, rtol=1e-4, atol=1e-4)  # float32 sums of 64 terms

    @pytest.mark.parametrize("raw, clamped", [(-1000.0, -30.0), (-30.0, -30.0), (20.0, 20.0), (1000.0, 20.0)])
    def test_log_variance_is_clamped(self, models, monkeypatch, raw, clamped):
        model = models["style-kl"].train()
        fix_logits(model, monkeypatch, torch.full((1, 4, 4, 4), 0.3), torch.full((1, 4, 4, 4), raw))
        output = model.encode(torch.zeros(1, 3, 16, 16), generator=generator())
        expected = 64 * 0.5 * (0.3**2 + math.exp(clamped) - 1 - clamped)
        assert output.kl_loss.item() == pytest.approx(expected, rel=1e-4)
        if clamped < 0:  # a standard deviation of 3e-7
            torch.testing.assert_close(output.key_codes, torch.full_like(output.key_codes, 0.3).sigmoid())
        else:
            assert output.key_codes.isfinite().all() and output.key_codes.std() > 0.4  # all near 0 or 1

    def test_eval_takes_the_mean(self, models, monkeypatch):
        model = models["style-kl"].eval()
        mean = torch.randn(2, 4, 4, 4)
        fix_logits(model, monkeypatch, mean, torch.randn(2, 4, 4, 4))
        assert torch.equal(model.encode(torch.zeros(2, 3, 16, 16)).key_codes, mean.sigmoid())

    def test_training_draws_logits(self, models, monkeypatch):
        model = models["style-kl"].train()
        shape = (1, 4, 64, 64)
        fix_logits(model, monkeypatch, torch.full(shape, 0.3), torch.full(shape, math.log(0.25)))
        logits = model.encode(torch.zeros(4, 3, 256, 256), generator=generator()).key_codes.logit()
        # 65,536 draws: sigmas of 0.002 and 0.0014.
        assert logits.mean().item() == pytest.approx(0.3, abs=0.01)
        assert logits.std().item() == pytest.approx(0.5, abs=0.007)

    def test_only_kl_has_a_loss(self, models, images):
        for name in ("style-noise", "style-none"):
            assert models[name].train().encode(images).kl_loss is None


class TestSaving:
    def test_round_trip(self, any_model, images, tmp_path):
        any_model.save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
        loaded = BricsAutoencoder.from_pretrained(tmp_path)
        assert not loaded.training
        assert public(loaded.config).keys() == public(any_model.config).keys()
        # JSON knows lists only.
        assert json.dumps(public(loaded.config)) == json.dumps(public(any_model.config))
        for name, tensor in any_model(images).items():
            assert torch.equal(loaded(images)[name], tensor), name

    def test_half_precision(self, model, images, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = BricsAutoencoder.from_pretrained(tmp_path, torch_dtype=torch.float16)
        assert loaded(images.half()).sample.dtype == torch.float16
        assert all(parameter.dtype == torch.float16 for parameter in loaded.parameters())

    def test_config(self, any_model):
        again = BricsAutoencoder.from_config(any_model.config)
        assert public(again.config) == public(any_model.config)
        shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (again, any_model)]
        assert shapes[0] == shapes[1]

    def test_state_is_parameters_only(self, any_model):
        # EMAModel keeps parameters only.
        assert not list(any_model.buffers())


class TestDefaults:
    def test_they_are_a_preset_but_for_what_is_ours(self):
        with torch.device("meta"):
            ours, paper = BricsAutoencoder(), BricsAutoencoder(**PRESETS["church-64x64x4"])
        changes = {"min_resolution": (1, 16), "encoder_shortcut": (True, False)}
        pairs = {name: (value, paper.config[name]) for name, value in public(ours.config).items()}
        assert {name: pair for name, pair in pairs.items() if pair[0] != pair[1]} == changes
        assert hasattr(ours.encoder, "shortcut") and not hasattr(paper.encoder, "shortcut")

    def test_untrained_decode_is_finite(self):
        torch.manual_seed(0)
        model = BricsAutoencoder().eval()
        with torch.no_grad():
            sample = model.decode(torch.rand(1, 4, 64, 64)).sample
        assert sample.shape == (1, 3, 256, 256) and sample.isfinite().all()

    def test_meta_device(self):
        with torch.device("meta"):
            model = BricsAutoencoder(**SMALL).eval()
            assert model(torch.zeros(1, 3, 16, 16)).sample.shape == (1, 3, 16, 16)


def test_output_survives_accelerate(autoencoder):
    """accelerate widens outputs to float32 by rebuilding them from dictionaries."""
    image = torch.zeros(1, 3, 32, 32)
    output = convert_to_fp32(autoencoder.to(torch.bfloat16)(image.to(torch.bfloat16)))
    assert output.sample.dtype == output.key_codes.dtype == torch.float32 and output.kl_loss is None


def test_layerwise_casting_leaves_grids_and_decoder_as_they_are(autoencoder):
    """It casts torch's own layers, which are the encoder's; the others hold their weights themselves."""
    codes = torch.rand(2, *autoencoder.key_code_shape)
    expected = autoencoder.decode(codes).sample
    autoencoder.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.equal(autoencoder.decode(codes).sample, expected)
    cast = {name.partition(".")[0] for name, p in autoencoder.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert cast == {"encoder"}
    assert autoencoder(torch.zeros(2, *autoencoder.sample_shape)).sample.isfinite().all()

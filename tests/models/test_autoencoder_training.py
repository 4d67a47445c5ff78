"""The autoencoder in training, in reduced precision and compiled."""

import pytest
import torch
from small_autoencoders import SAME, generator, make_model, relative_error
from torch import nn


class TestTraining:
    def test_every_parameter_gets_a_gradient(self, any_model, images):
        any_model.train().zero_grad()
        output = any_model(images, generator=generator())
        loss = (output.sample - images).square().mean()
        if output.kl_loss is not None:
            loss = loss + 1e-4 * output.kl_loss.mean()
        loss.backward()
        for name, parameter in any_model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # Biases in front of a normalisation, or of attention's keys, have a gradient of 0 but for rounding.
            if name.startswith(("grids", "mlp")) or name.endswith("weight") or name == "encoder.conv_out.bias":
                assert parameter.grad.abs().max() > 0, name
        any_model.zero_grad()

    def test_gradient_checkpointing(self, any_model, images):
        assert any_model._supports_gradient_checkpointing
        any_model.train()
        results = []
        for enabled in (False, True):
            (any_model.enable_gradient_checkpointing if enabled else any_model.disable_gradient_checkpointing)()
            assert any_model.is_gradient_checkpointing == enabled
            assert any_model.decoder.gradient_checkpointing == any_model.encoder.gradient_checkpointing == enabled
            any_model.zero_grad()
            sample = any_model(images, generator=generator()).sample
            sample.square().mean().backward()
            results.append((sample, [parameter.grad.clone() for parameter in any_model.parameters()]))
        any_model.disable_gradient_checkpointing()
        any_model.zero_grad()
        torch.testing.assert_close(results[1], results[0], **SAME)

    def test_a_few_steps_learn(self, images):
        images = nn.functional.interpolate(images[:, :, :4, :4], scale_factor=4)  # one colour an element of the code
        model = make_model().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-15)
        losses = []
        for step in range(40):
            loss = (model(images, generator=generator(step)).sample - images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # 0.35 to 0.55 over eight seeds of weights and noise, on kernels of AVX-512, AVX2 and without either.
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


class TestPrecision:
    @pytest.mark.parametrize("dtype, limit", [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
    def test_half_precision_is_near_float32(self, dtype, limit, images, codes):
        single, half = make_model().eval(), make_model().to(dtype).eval()
        output = half(images.to(dtype))
        assert output.sample.dtype == output.key_codes.dtype == dtype
        assert output.sample.isfinite().all()
        # A dozen convolutions deep, eps being 2^-10 and 2^-7: codes within a few eps.
        expected = single(images)
        error = (output.key_codes.float() - expected.key_codes).abs().max()
        assert error < 4 * torch.finfo(dtype).eps
        # The same codes: only the decoder rounds.
        codes = codes.to(dtype)
        assert relative_error(half.decode(codes).sample, single.decode(codes.float()).sample) < limit / 2
        assert relative_error(output.sample, expected.sample) < limit

    @pytest.mark.parametrize("variant", ["style-noise", "style-kl", "vqgan", "4d-keys"])
    def test_bfloat16_autocast(self, models, variant, images):
        model = models[variant].eval()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        expected = model(images)
        assert relative_error(output.sample, expected.sample) < 0.15  # as for bfloat16 weights
        if expected.kl_loss is not None:
            assert output.kl_loss.dtype == torch.float32
            torch.testing.assert_close(output.kl_loss, expected.kl_loss, rtol=0.05, atol=0.5)

    @pytest.mark.parametrize("variant", ["style-noise", "style-kl", "style-none", "style-interpolate"])
    def test_autocast_keeps_codes_in_float32(self, models, variant, images):
        # bfloat16 steps by 1/256 between 0.5 and 1: as much as sigma, for 64 cells.
        with torch.autocast("cpu", torch.bfloat16):
            codes = models[variant].train().encode(images, generator=generator()).key_codes
        assert codes.dtype == torch.float32

    def test_gradients_under_autocast(self, images):
        model = make_model().train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).sample.square().mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name

    def test_float64(self, images):
        model = make_model().eval()
        expected = model(images).sample
        sample = model.double()(images.double()).sample
        assert sample.dtype == torch.float64
        torch.testing.assert_close(
            sample.float(), expected, rtol=1e-3, atol=1e-3
        )  # float32, through a few dozen layers


class TestCompile:
    @pytest.mark.parametrize(
        "variant, training",
        [("style-noise", True), ("style-interpolate", True), ("style-kl", False), ("4d-keys", False)],
    )
    def test_one_graph(self, models, variant, training, images):
        model = models[variant].train(training)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")  # tracing only: a break is an error
        torch.manual_seed(0)
        actual = compiled(images)
        torch.manual_seed(0)
        expected = model(images)
        torch.testing.assert_close(actual.sample, expected.sample, **SAME)
        torch.testing.assert_close(actual.key_codes, expected.key_codes, **SAME)

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", ["style-noise", "4d-keys"])
    def test_inductor(self, models, variant, images):
        model = models[variant].eval()
        torch.compiler.reset()
        expected = model(images)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images).sample, expected.sample, **SAME)

    @pytest.mark.slow
    def test_inductor_gradients(self, models, images):
        model = models["style-none"].train()
        torch.compiler.reset()
        results = []
        for forward in (model, torch.compile(model, fullgraph=True)):
            model.zero_grad()
            forward(images).sample.square().mean().backward()
            results.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)  # fused float32 sums

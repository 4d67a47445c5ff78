"""Signal-to-noise ratios and loss weights against formulas, and decoding of key codes with noise."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from brics_diffusers import CosineVariantScheduler
from brics_diffusers.analysis.noise_levels import decode_noised, log_snr, schedule_curves


def gamma(name: str, t: float) -> float:
    """The three formulas, written out."""
    if name == "linear":
        return 1 - t
    if name == "cosine":
        return (math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    start, power = math.cos(0.2 * math.pi / 2) ** 3, math.cos((0.8 * t + 0.2) * math.pi / 2) ** 3
    return power / start  # (v_e - x) / (v_e - v_s) with v_e = cos(pi / 2)**3 = 0


@pytest.mark.parametrize("name", ["cosine_variant", "cosine", "linear"])
class TestCurves:
    def test_log_snr_equals_the_formula(self, name):
        curve = schedule_curves()[name]
        for t in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9):
            step = round(t * 1000) - 1
            alpha_bar = gamma(name, t)
            assert curve["t"][step] == pytest.approx(t)
            # alpha-bar is kept in float32
            assert curve["log_snr"][step] == pytest.approx(math.log(alpha_bar / (1 - alpha_bar)), abs=1e-4)
        assert curve["log_snr"][-1] == pytest.approx(math.log(1e-6), abs=1e-3)  # the clip of App. A.6

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_weights(self, name, prediction_type):
        curve = schedule_curves(100, prediction_type, 4.0)[name]
        for level, capped, weight in zip(
            curve["log_snr"], curve["log_snr_capped"], curve["min_snr_weight"], strict=True
        ):
            snr = math.exp(level)
            share = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
            assert weight == pytest.approx(min(snr, 4) / share, rel=1e-4)
            assert capped == pytest.approx(min(level, math.log(4)), abs=1e-6)


def test_log_snr_of_any_scheduler():
    alpha_bar = DDIMScheduler().alphas_cumprod.double()
    torch.testing.assert_close(log_snr(DDIMScheduler()).exp(), alpha_bar / (1 - alpha_bar))


class TestDecodeNoised:
    def test_time_zero_is_the_reconstruction(self, autoencoder):
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        decoded = decode_noised(autoencoder, images, CosineVariantScheduler(), [0.0, 0.5, 1.0])
        assert decoded.shape == (2, 3, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(decoded[:, 0], autoencoder(images).sample, rtol=1e-4, atol=1e-4)

    def test_noise_is_that_of_the_schedule(self, autoencoder):
        images = torch.rand(1, 3, 32, 32) * 2 - 1
        seen = []
        autoencoder.decode = lambda key_codes, decode=autoencoder.decode: seen.append(key_codes) or decode(key_codes)
        for name in ("cosine_variant", "linear"):
            decode_noised(autoencoder, images, CosineVariantScheduler(gamma_schedule=name), [0.0, 0.3, 1.0], seed=3)
        clean, *noised = (2 * codes - 1 for codes in seen)
        end = noised[1]
        torch.testing.assert_close(noised[4], end)  # pure noise, the same for both up to 0.1%, clipped
        inside = end.abs() < 1
        for latents, alpha_bar in ((noised[0], gamma("cosine_variant", 0.3)), (noised[3], 0.7)):
            expected = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * end
            torch.testing.assert_close(latents[inside], expected[inside].clamp(-1, 1), rtol=0, atol=2e-3)

    def test_times_outside(self, autoencoder):
        with pytest.raises(ValueError, match="times are .*; each must lie in"):
            decode_noised(autoencoder, torch.zeros(1, 3, 32, 32), CosineVariantScheduler(), [1.5])

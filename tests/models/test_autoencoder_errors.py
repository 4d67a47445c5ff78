"""What the autoencoder refuses, and how it says so."""

import pytest
import torch
from small_autoencoders import SAME, SMALL

from brics_diffusers import BricsAutoencoder


class TestErrors:
    @pytest.mark.parametrize(
        "shape, message",
        [
            ((1, 4, 16, 16), r"sample has shape \(1, 4, 16, 16\); expected \(batch, 3, height, width\)"),
            ((3, 16, 16), r"sample has shape \(3, 16, 16\); expected \(batch, 3"),
            ((1, 3, 18, 16), "sample is 18x16; height and width must divide by 4"),
            ((1, 3, 16, 17), "sample is 16x17; height and width must divide by 4"),
            ((1, 3, 0, 16), "sample is 0x16"),
        ],
    )
    @pytest.mark.parametrize("training", [False, True])
    def test_image_shape(self, model, shape, message, training):
        model.train(training)
        for call in (model.encode, model):
            with pytest.raises(ValueError, match=message):
                call(torch.zeros(shape))

    @pytest.mark.parametrize(
        "sample, message",
        [
            (
                torch.linspace(0, 255, 768).view(1, 3, 16, 16),
                r"sample spans \[0, 255\]; expected \[-1, 1\].*scale pixels",
            ),
            (torch.full((1, 3, 16, 16), -1.1), r"sample spans \[-1.1, -1.1\]"),
            (torch.full((1, 3, 16, 16), float("nan")), r"sample spans \[nan, nan\]"),
            (torch.zeros(1, 3, 16, 16).index_fill(3, torch.tensor(5), float("nan")), "nan"),
            (torch.full((1, 3, 16, 16), float("inf")), "inf"),
            (
                torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
                "sample is torch.uint8; expected floating point.*scale pixels",
            ),
        ],
        ids=["bytes-as-floats", "below", "nan", "some-nan", "inf", "uint8"],
    )
    def test_image_values(self, model, sample, message):
        with pytest.raises(ValueError, match=message):
            model.encode(sample)

    def test_uint8_is_refused_in_training_too(self, model):
        with pytest.raises(ValueError, match="torch.uint8"):
            model.train().encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))

    @pytest.mark.parametrize(
        "key_codes, message",
        [
            (torch.zeros(1, 3, 4, 4), r"key_codes has shape \(1, 3, 4, 4\); expected \(batch, 4, height, width\)"),
            (torch.zeros(4, 4, 4), r"key_codes has shape \(4, 4, 4\)"),
            (torch.full((1, 4, 4, 4), -1.0), r"key_codes spans \[-1, -1\]; expected \[0, 1\].*z / 2 \+ 0.5"),
            (torch.full((1, 4, 4, 4), 1.02), "key_codes spans"),
            (torch.full((1, 4, 4, 4), float("nan")), r"key_codes spans \[nan, nan\]"),
            (torch.zeros(1, 4, 4, 4, dtype=torch.int64), "key_codes is torch.int64; expected floating point"),
        ],
        ids=["channels", "no-batch", "latents", "above", "nan", "integers"],
    )
    def test_key_codes(self, model, key_codes, message):
        with pytest.raises(ValueError, match=message):
            model.decode(key_codes)

    @pytest.mark.parametrize("variant", ["style-noise", "4d-keys"])
    def test_codes_that_rounding_put_outside_are_clipped(self, models, variant):
        model = models[variant].eval()
        codes = torch.tensor([-0.009, 1.009]).repeat(32).view(1, 4, 4, 4)
        torch.testing.assert_close(model.decode(codes).sample, model.decode(codes.clamp(0, 1)).sample, **SAME)

    def test_values_at_the_limits_pass(self, model):
        assert model.encode(torch.tensor([-1.0, 1.0]).repeat(384).view(1, 3, 16, 16)).key_codes.isfinite().all()
        assert model.decode(torch.tensor([0.0, 1.0]).repeat(32).view(1, 4, 4, 4)).sample.isfinite().all()

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"grid_type": "sparse"}, "grid_type is 'sparse'"),
            (
                {"decoder_layers_per_block": 0},
                "decoder_layers_per_block is 0; give one positive number, or one for each of the 2 widths",
            ),
            ({"decoder_layers_per_block": (2, 1, 1)}, r"decoder_layers_per_block is \(2, 1, 1\); give one positive"),
            ({"decoder_layers_per_block": ()}, r"decoder_layers_per_block is \(\); give one positive number"),
            ({"decoder_layers_per_block": (2, 1.0)}, r"decoder_layers_per_block is \(2, 1.0\); give one positive"),
            ({"decoder_layers_per_block": "2"}, "decoder_layers_per_block is '2'; give one positive number"),
            ({"decoder_layers_per_block": True}, "decoder_layers_per_block is True; give one positive number"),
            ({"decoder_type": "unet"}, "decoder_type is 'unet'; it must be one of 'style', 'vqgan', 'movq'"),
            ({"regularization": "vq"}, "regularization is 'vq'; it must be one of 'noise', 'kl', 'none', 'interp"),
            ({"interpolation_gamma": 0.0}, "interpolation_gamma is 0.0; it must be above 0"),
            ({"interpolation_gamma": float("nan")}, "interpolation_gamma is nan; it must be above 0"),
            ({"key_channels": 5, "key_length": 2}, "key_channels is 5 and key_length 2.*multiple"),
            ({"key_channels": 0}, "key_channels is 0"),
            ({"key_length": 0}, "key_length 0"),
            ({"key_channels": 6, "key_length": 3}, "key_length is 3; set it to 1 or 2"),
            ({"sample_size": 32}, "sample_size is 32; feature_size=8 and 2 decoder blocks make images of 16"),
            ({"feature_size": 4}, "sample_size is 16; feature_size=4"),
            ({"decoder_block_out_channels": (16, 8, 8)}, "3 decoder blocks make images of 32"),
            ({"down_block_types": ("DownEncoderBlock2D",)}, "names 1 blocks and encoder_block_out_channels 3"),
            (
                {"feature_size": 2, "decoder_block_out_channels": (16, 8, 8, 8)},
                "the encoder divides by 4 and the decoder multiplies by 8",
            ),
            ({"sample_size": 18, "feature_size": 9}, "divide sample_size=18"),
            ({"feature_channels": 18}, "feature_channels=18.*4 groups"),
            ({"style_dim": 18}, "style_dim=18.*4 groups"),
            ({"mlp_layers": 0}, "mlp_layers=0"),
            ({"min_resolution": 32}, "min_resolution=32, max_resolution=16"),
        ],
    )
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            BricsAutoencoder(**{**SMALL, **config})

"""Encoding and decoding in tiles against the whole image."""

import pytest
import torch
from small_autoencoders import make_model

from brics_diffusers.models import tiling
from brics_diffusers.models.configuration import decoder_layers


# One to three blocks of the decoder, one of more layers, and key codes whose feature block is 40 x 36.
DECODERS = [
    ({"feature_size": 16, "decoder_block_out_channels": (16,)}, (10, 9)),
    ({}, (20, 18)),
    ({"decoder_layers_per_block": (2, 3)}, (20, 18)),
    ({"feature_size": 4, "decoder_block_out_channels": (16, 8, 8)}, (40, 36)),
]


@pytest.mark.parametrize(("config", "size"), DECODERS)
def test_tiles_do_not_show(monkeypatch, config, size):
    monkeypatch.setattr(tiling, "TILE", 9)
    model, sizes = make_model(**config).eval(), []
    codes = torch.rand(2, 4, *size, generator=torch.Generator().manual_seed(0))
    model.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    with torch.no_grad():
        whole = model.decode(codes).sample
        model.enable_tiling()
        tiled = model.decode(codes).sample
        model.disable_tiling()
        assert torch.equal(model.decode(codes).sample, whole)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-5)
    assert sizes[0] == sizes[-1] == (40, 36) and len(sizes) == 2 + 5 * 4
    margin = tiling.tile_margin(decoder_layers(model.config))
    spans = [min(top + 9 + margin, 40) - max(top - margin, 0) for top in range(0, 40, 9)]
    assert max(height for height, _ in sizes[1:-1]) == max(spans) < 40


def test_training_is_not_tiled(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 4)
    model, sizes = make_model().train(), []
    model.enable_tiling()
    model.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    model.decode(torch.rand(1, 4, 4, 4))
    assert sizes == [(8, 8)]


@pytest.mark.parametrize("decoder_type", ["vqgan", "movq"])
def test_decoders_that_see_the_whole_image(decoder_type):
    model = make_model(decoder_type=decoder_type, decoder_block_out_channels=(32, 32))
    with pytest.raises(NotImplementedError, match=f"decoder_type is '{decoder_type}', whose .*; use enable_slicing"):
        model.enable_tiling()


def test_tiles_of_the_encoder(monkeypatch):
    """Of the size of training images, overlapping, and averaged with weights that sum to one."""
    model, sizes = make_model(encoder_shortcut=False).eval(), []
    with torch.no_grad():
        image = torch.rand(2, 3, 40, 24) * 2 - 1
        small = image[:, :, :16, :16]
        whole = model.encode(small).key_codes
        model.enable_tiling()
        assert torch.equal(model.encode(small).key_codes, whole)
        monkeypatch.setattr(
            model.encoder, "forward", lambda part: sizes.append(part.shape[2:]) or part[:, [0] * 4, ::4, ::4]
        )
        codes = model.encode(image).key_codes
    # As if each element of the key code were one pixel of the image.
    torch.testing.assert_close(codes, torch.sigmoid(image[:, [0] * 4, ::4, ::4]))
    assert set(sizes) == {(16, 16)} and len(sizes) == 3 * 2


def test_where_tiles_begin():
    assert tiling.tile_starts(40, 16, 4) == [0, 12, 24]
    assert tiling.tile_starts(16, 16, 4) == [0]
    assert tiling.tile_starts(20, 16, 4) == [0, 4]

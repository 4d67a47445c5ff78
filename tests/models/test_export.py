"""`torch.export` of the decoder, for other runtimes."""

import torch
from small_autoencoders import SAME, make_model
from torch import nn


class Decode(nn.Module):
    """Key codes to images, as one function of tensors."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, key_codes):
        return self.autoencoder.decode(key_codes, return_dict=False)[0]


@torch.no_grad()
def test_decode_can_be_exported():
    model = make_model().eval()
    example, others = torch.rand(2, 4, 4, 4), torch.rand(3, 4, 4, 4)
    batch = {"key_codes": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(Decode(model), (example,), dynamic_shapes=batch)
    torch.testing.assert_close(program.module()(others), model.decode(others).sample, **SAME)
    ours = {str(node.target) for node in program.graph.nodes if "brics" in str(node.target)}
    assert ours == {"brics_diffusers.lookup.default"}  # the only operator that is not torch's own

"""The decoder's modulated convolutions computed in several ways, and how long each takes.

A style scales the input channels of a convolution. `one image at a time` scales the weights for every image;
`activations` scales the activations of the whole batch instead; `grouped` makes weights for each image and convolves
them in one call, a group an image. Where the resolution doubles, a transposed convolution is followed by a low-pass
filter; `folded filter` convolves the filter into the kernel, which then has 6 x 6 taps in place of 3 x 3. All give the
same numbers.
"""

import functools

import torch
import torch.nn.functional as F
from timing import interleaved, medians

from brics_diffusers.models.decoders.style_decoder import ModulatedConv2d, filter_2d
from brics_diffusers.utils.reports import markdown_table


# The up-convolution and a convolution of the paper's second resolution: channels in and out, and pixels a side.
LAYERS = {"up-convolution": (512, 256, 64), "convolution": (256, 256, 128)}
STYLE_DIM = 512


class ActivationsConv2d(ModulatedConv2d):
    """Activations scaled for one image too."""

    scale_weights = ModulatedConv2d.scale_activations


class GroupedConv2d(ModulatedConv2d):
    """One convolution whose groups are the images of the batch."""

    def scale_activations(self, x, scale, norm, bias) -> torch.Tensor:
        factors = norm[:, :, None] * scale[:, None]
        weights = self.weight * factors[..., None, None]  # (B, out, in, k, k)
        num_images, out_channels = weights.shape[:2]
        x = x.flatten(0, 1)[None]
        if self.upsample:
            x = F.conv_transpose2d(x, weights.transpose(1, 2).flatten(0, 1), stride=2, groups=num_images)
        else:
            x = F.conv2d(x, weights.flatten(0, 1), bias.repeat(num_images), padding=1, groups=num_images)
        x = x.unflatten(1, (num_images, out_channels))[0]
        return filter_2d(x, gain=4.0, bias=bias) if self.upsample else x


class FoldedConv2d(ModulatedConv2d):
    """The filter [1, 3, 3, 1] in the kernel of the transposed convolution."""

    def convolve(self, x, weight, bias=None) -> torch.Tensor:
        kernel = filter_2d(weight.flatten(0, 1)[:, None], gain=4.0, padding=3).view(*weight.shape[:2], 6, 6)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, stride=2, padding=2)


def one_at_a_time(layer: ModulatedConv2d, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """The layer on one image after the other."""
    return torch.cat([layer(*one) for one in zip(x.split(1), style.split(1), strict=True)])


def make_ways(layer: str, batch_size: int, device: torch.device, dtype: torch.dtype, layers: dict) -> dict:
    """A call for every way, by name."""
    fan_in, fan_out, side = layers[layer]
    arguments = {"upsample": layer == "up-convolution", "activate": True}
    x = torch.randn(batch_size, fan_in, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    style = torch.randn(batch_size, STYLE_DIM, device=device, dtype=dtype)
    ways = {"one image at a time": (ModulatedConv2d, one_at_a_time), "activations": (ActivationsConv2d, None)}
    if batch_size > 1:
        ways["grouped"] = (GroupedConv2d, None)
    if layer == "up-convolution":
        ways["folded filter"] = (FoldedConv2d, one_at_a_time)
    calls = {}
    for name, (layer_class, call) in ways.items():
        torch.manual_seed(0)
        way = layer_class(fan_in, fan_out, 3, STYLE_DIM, **arguments).to(device, dtype)
        calls[name] = functools.partial(call, way, x, style) if call else functools.partial(way, x, style)
    return calls


@torch.no_grad()
def measure(
    device: str = "cpu", batch_sizes: tuple[int, ...] = (1, 4), rounds: int = 2, layers: dict | None = None
) -> dict:
    """
    Runs everything and returns the numbers: `"dtype"`, float32 on a CPU and bfloat16 on a GPU, and `"rows"`, one of
    every layer and batch size with the seconds of every way; after one turn of each to warm up. `layers` are as
    `LAYERS`.
    """
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    rows = []
    for layer in layers or LAYERS:
        for batch_size in batch_sizes:
            ways = make_ways(layer, batch_size, device, dtype, layers or LAYERS)
            interleaved(ways, device, rounds=1)  # warms up
            rows.append({"layer": layer, "batch": batch_size, **medians(interleaved(ways, device, rounds))})
    return {"dtype": str(dtype).removeprefix("torch."), "rows": rows}


def describe(result: dict) -> str:
    """The part of the report."""
    ways = list(dict.fromkeys(key for row in result["rows"] for key in row if key not in ("layer", "batch")))
    table = []
    for row in result["rows"]:
        line = {"layer": row["layer"], "batch": row["batch"], "one image at a time, ms": 1e3 * row[ways[0]]}
        table.append(line | {f"{way} / it": row[way] / row[ways[0]] if way in row else "" for way in ways[1:]})
    return f"""The decoder scales weights for one image and activations for several; a CPU decodes one image at a time.
Layers of church-64x64x4, in {result["dtype"]}.

{markdown_table(table)}
"""

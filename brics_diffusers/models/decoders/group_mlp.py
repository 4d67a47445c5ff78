"""Per-group modulated MLPs from grid features to the feature block and the style code (Sec. 3.2, App. A.1)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


LEAKY_SLOPE = 0.2
ACTIVATION_GAIN = math.sqrt(2)  # keeps the variance through a leaky ReLU (StyleGAN2)


def scaled_leaky_relu(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU with slope 0.2, times the square root of two."""
    return F.leaky_relu(x, LEAKY_SLOPE) * ACTIVATION_GAIN


class GroupLinear(nn.Module):
    """
    One linear layer a group, in one batched product. Weights are N(0, 1) and scaled by `1 / sqrt(in_features)` when
    used (equalized learning rate, as everywhere on StyleGAN2's side of the model).
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int, bias_init: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_groups, out_features, in_features))
        self.bias = nn.Parameter(torch.full((num_groups, out_features, 1), float(bias_init)))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(g, in_features, n) -> (g, out_features, n)."""
        return torch.baddbmm(self.bias, self.weight * self.scale, x)


class GroupMapping(nn.Sequential):
    """Two linear layers a group with a leaky ReLU between them: (g, in_features, n) -> (g, out_features, n)."""

    def __init__(self, num_groups: int, in_features: int, out_features: int):
        super().__init__(
            GroupLinear(num_groups, in_features, out_features),
            nn.LeakyReLU(LEAKY_SLOPE),
            GroupLinear(num_groups, out_features, out_features),
        )


class ModulatedGroupLinear(nn.Module):
    """
    A linear layer a group whose inputs are scaled by a style and whose outputs are brought back to unit variance:
    StyleGAN2's weight modulation and demodulation for a linear layer. New ones don't modulate yet, see
    [`~style_decoder.ModulatedConv2d`]. With `activate`, `scaled_leaky_relu` follows.
    """

    def __init__(
        self, num_groups: int, in_features: int, out_features: int, style_features: int, activate: bool = False
    ):
        super().__init__()
        self.affine = GroupLinear(num_groups, style_features, in_features, bias_init=1.0)
        nn.init.zeros_(self.affine.weight)
        self.weight = nn.Parameter(torch.randn(num_groups, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_groups, out_features, 1, 1))
        self.scale = 1 / math.sqrt(in_features)
        self.activate = activate

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """x (g, B, in_features, P), style (g, style_features, B) -> (g, B, out_features, P)."""
        scale = self.affine(style) * self.scale  # (g, in, B)
        # The activation's gain k goes into norm and bias: relu(k * x) = k * relu(x) saves a pass over the data.
        gain = ACTIVATION_GAIN if self.activate else 1.0
        norm = torch.rsqrt(torch.bmm(self.weight.square(), scale.square()) + 1e-8) * gain  # (g, out, B)
        # Weights are fewer than activations: they are modulated, for every group and image, and one product is left.
        scale, norm = scale.transpose(1, 2).unsqueeze(2), norm.transpose(1, 2).unsqueeze(3)
        weight = (self.weight.unsqueeze(1) * scale * norm.to(self.weight.dtype)).flatten(0, 1)  # (g * B, out, in)
        bias = (self.bias.transpose(1, 2) * gain).expand(-1, x.shape[1], -1, -1).flatten(0, 1)  # (g * B, out, 1)
        x = torch.baddbmm(bias, weight, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return F.leaky_relu_(x, LEAKY_SLOPE) if self.activate else x


class GroupMLP(nn.Module):
    r"""
    Grid features to feature block and style code, all groups at once (Sec. 3.2, App. A.1).

    The mean of a group's features over the pixels, divided by its root mean square, goes through two small MLPs: one
    gives the vector that modulates the group's layers, the other its share of the style code.

    Args:
        num_groups (`int`): Number of groups g.
        in_features (`int`): Grid features of a group N_r * C_r; also the width of the hidden layers.
        out_channels (`int`): Channels of the whole feature block C_d, divisible by `num_groups`.
        style_dim (`int`): Width of the whole style code, divisible by `num_groups`; 0 for a decoder that takes none.
        num_layers (`int`, defaults to 3): Linear layers.

    Raises:
        `ValueError`: If there is no layer or a width does not divide by the groups.
    """

    def __init__(self, num_groups: int, in_features: int, out_channels: int, style_dim: int, num_layers: int = 3):
        super().__init__()
        if num_layers < 1 or out_channels % num_groups or style_dim % num_groups:
            raise ValueError(
                f"mlp_layers={num_layers}, feature_channels={out_channels}, style_dim={style_dim}; use at least one "
                f"layer and widths that divide by the {num_groups} groups."
            )
        widths = [in_features] * num_layers + [out_channels // num_groups]
        self.layers = nn.ModuleList(
            ModulatedGroupLinear(num_groups, fan_in, fan_out, in_features, activate=index < num_layers - 1)
            for index, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        self.modulation = GroupMapping(num_groups, in_features, in_features)
        self.style = GroupMapping(num_groups, in_features, style_dim // num_groups) if style_dim else None

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Features (g, N_r * C_r, B, P) -> feature block (B, C_d, P), and style code (B, style_dim) or `None` with
        `style_dim=0`.
        """
        mean = features.to(torch.promote_types(features.dtype, torch.float32)).mean(dim=-1)  # (g, N_r * C_r, B)
        # New grids have means near 1e-6. The usual epsilon of 1e-8 would dwarf their squares and leave style and
        # modulation almost constant for the first hundred steps.
        mean = mean * torch.rsqrt(mean.square().mean(dim=1, keepdim=True) + 1e-20)
        mean = mean.to(features.dtype)
        modulation = self.modulation(mean)
        features = features.transpose(1, 2)  # (g, B, N_r * C_r, P)
        for layer in self.layers:
            features = layer(features, modulation)
        style = None if self.style is None else self.style(mean).flatten(0, 1).t()
        return features.transpose(0, 1).flatten(1, 2), style

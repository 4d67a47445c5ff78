"""Muon, which torch has for matrices, for the layers of a convolutional model: one of the trials of
compare_autoencoders.py."""

import torch

from brics_diffusers.training_utils.optimization import build_optimizer


class MuonAndAdam(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024) for the weights of layers, Adam for all else: grids, biases, norms. A convolution's
    weight is a matrix of shape (out, in * k * k), and that of one layer a group is one matrix a group. Arguments as
    of `build_optimizer`; Muon takes the same learning rates, and steps about as large as Adam's (`match_rms_adamw`).
    """

    def __init__(self, model: torch.nn.Module, *arguments):
        named = model.named_parameters()
        weights = {id(weight) for name, weight in named if name.endswith("weight") and weight.ndim > 1}
        whole = build_optimizer(model, *arguments)
        self.matrices, others, layers = [], [], []
        for group in whole.param_groups:
            rate = {"lr": group["lr"]}
            of_group = [(weight, as_matrices(weight.detach())) for weight in group["params"] if id(weight) in weights]
            self.matrices += of_group
            layers.append({"params": [matrix for _, matrices in of_group for matrix in matrices]} | rate)
            others.append({"params": [rest for rest in group["params"] if id(rest) not in weights]} | rate)
        options = {name: whole.defaults[name] for name in ("betas", "eps")}
        self.parts = {
            "adam": torch.optim.Adam(others, **options, fused=True),
            "muon": torch.optim.Muon(layers, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        }
        super().__init__([{"params": group["params"], "lr": group["lr"]} for group in whole.param_groups], {})

    def step(self) -> None:
        """A step of both, with the learning rates that a schedule has set here."""
        for weight, matrices in self.matrices:
            for matrix, gradient in zip(matrices, as_matrices(weight.grad), strict=True):
                matrix.grad = gradient
        for part in self.parts.values():
            for group, own in zip(self.param_groups, part.param_groups, strict=True):
                own["lr"] = group["lr"]
            part.step()

    def state_dict(self) -> dict:
        """That of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores both, and the learning rates."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
            for group, own in zip(self.param_groups, part.param_groups, strict=True):
                group["lr"] = own["lr"]


def as_matrices(weight: torch.Tensor) -> list[torch.Tensor]:
    """Views of a layer's weight, or its gradient, as one matrix or one a group."""
    return list(weight.unbind()) if weight.ndim == 3 else [weight.flatten(1)]

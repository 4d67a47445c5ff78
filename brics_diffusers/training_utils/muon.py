"""Muon, which PyTorch has for matrices, for the layers of convolutional models."""

import torch


OPTIONS = ("lr", "betas", "eps")  # of a group: what Adam takes


class MuonAndAdam(torch.optim.Optimizer):
    r"""
    Muon (Jordan et al. 2024) for the weights of layers, Adam for all else: grids, biases, norms. A convolution's
    weight is a matrix of shape (out, in * k * k), and that of one layer a group is one matrix a group. Muon has its
    own momentum, 0.95, and steps about as large as Adam's with the same learning rate (`match_rms_adamw`).

    Args:
        param_groups (`list[dict]`): Parameters and learning rate `lr` of each group.
        layers (`list[nn.Parameter]`): Which of them Muon takes, of two to four dimensions.
        betas (`tuple[float, float]`): Adam's.
        eps (`float`): Adam's.
    """

    def __init__(self, param_groups: list[dict], layers: list[torch.nn.Parameter], betas: tuple, eps: float):
        super().__init__(param_groups, {"betas": betas, "eps": eps})
        chosen, self.matrices, of_adam, of_muon = set(map(id, layers)), [], [], []
        for group in self.param_groups:
            pairs = [(weight, as_matrices(weight.detach())) for weight in group["params"] if id(weight) in chosen]
            self.matrices += pairs
            of_muon.append({"params": [matrix for _, matrices in pairs for matrix in matrices], "lr": group["lr"]})
            rest = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            of_adam.append({"params": rest, "lr": group["lr"]})
        self.adam = torch.optim.Adam(of_adam, betas=betas, eps=eps, fused=True)
        self.muon = torch.optim.Muon(of_muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def _view_weights(self) -> None:
        """The matrices are views, also of weights that have moved to another device since."""
        for weight, matrices in self.matrices:
            for matrix, view in zip(matrices, as_matrices(weight.detach()), strict=True):
                matrix.data = view

    def step(self) -> None:
        """A step of both, with the learning rates, and Adam's betas and epsilon, of `param_groups`."""
        self._view_weights()
        for weight, matrices in self.matrices:
            if weight.grad is not None:
                for matrix, gradient in zip(matrices, as_matrices(weight.grad), strict=True):
                    matrix.grad = gradient
        for group, of_adam, of_muon in zip(
            self.param_groups, self.adam.param_groups, self.muon.param_groups, strict=True
        ):
            of_adam.update({name: group[name] for name in OPTIONS})
            of_muon["lr"] = group["lr"]
        self.adam.step()
        self.muon.step()
        self.muon.zero_grad()  # gradients are the weights' own

    def state_dict(self) -> dict:
        """That of both: groups of Adam, then of Muon."""
        adam, muon = self.adam.state_dict(), self.muon.state_dict()
        state = {"adam": adam["state"], "muon": muon["state"]}
        return {"state": state, "param_groups": adam["param_groups"] + muon["param_groups"]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores both and the groups' options. A `ValueError` if the state is of other groups or of Adam alone."""
        groups, count = state_dict["param_groups"], len(self.param_groups)
        if len(groups) != 2 * count:
            raise ValueError(
                f"The state has {len(groups)} parameter groups, not {2 * count}; give that of a Muon alike."
            )
        self._view_weights()
        for part, own in (("adam", groups[:count]), ("muon", groups[count:])):
            getattr(self, part).load_state_dict({"state": state_dict["state"][part], "param_groups": own})
        for group, of_adam in zip(self.param_groups, self.adam.param_groups, strict=True):
            group.update({name: of_adam[name] for name in OPTIONS})


def as_matrices(weight: torch.Tensor) -> list[torch.Tensor]:
    """Views of a layer's weight, or its gradient, as one matrix or one a group; never copies."""
    return list(weight.unbind()) if weight.ndim == 3 else [weight.view(weight.shape[0], -1)]

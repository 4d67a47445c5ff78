"""Muon for the layers of convolutional models, in float32 and all matrices of a shape at once."""

import torch


MOMENTUM = 0.95
# Jordan et al. 2024: of the polynomial that is applied five times, and of the step's size beside Adam's.
COEFFICIENTS, ITERATIONS = (3.4445, -4.775, 2.0315), 5
SIZE = 0.2


class MuonAndAdam(torch.optim.Adam):
    r"""
    Muon (Jordan et al. 2024) for the weights of layers, Adam for all else: grids, biases, norms. A convolution's
    weight is a matrix of shape (out, in * k * k), and that of one layer a group is one matrix a group. Muon steps as
    far as Adam does with the same learning rate: by 0.2 in the root mean square. This is what `torch.optim.Muon` does
    with `adjust_lr_fn="match_rms_adamw"` and no weight decay, which however works in bfloat16, slow on CPUs without
    instructions for it, and on one matrix at a time.

    Args:
        param_groups (`list[dict]`):
            Parameters and learning rate `lr` of each group. As many groups follow them, in the same order, with the
            layers of each.

        layers (`list[nn.Parameter]`): Which of them Muon takes, of two to four dimensions.
        betas (`tuple[float, float]`): Adam's.
        eps (`float`): Adam's.
    """

    def __init__(self, param_groups: list[dict], layers: list[torch.nn.Parameter], betas: tuple, eps: float):
        chosen = set(map(id, layers))
        groups = [
            group | {"params": [each for each in group["params"] if (id(each) in chosen) == muon], "muon": muon}
            for muon in (False, True)
            for group in param_groups
        ]
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False  # Muon's part is not fused

    @torch.no_grad()
    def step(self, closure=None):
        """A step of both, after `closure()` if one is given, whose result it returns."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        layers = []
        for group in self.param_groups:
            if group["muon"]:
                of_group = [weight for weight in group["params"] if weight.grad is not None]
                self._step_of_muon(of_group, group["lr"])
                layers += of_group
        gradients = [weight.grad for weight in layers]
        for weight in layers:
            weight.grad = None  # Adam leaves those without a gradient alone
        super().step()
        for weight, gradient in zip(layers, gradients, strict=True):
            weight.grad = gradient
        return loss

    def _step_of_muon(self, weights: list[torch.nn.Parameter], learning_rate: float) -> None:
        by_shape = {}
        for weight in weights:
            state = self.state[weight]
            if not state:  # Adam expects a step, too
                state |= {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(weight)}
            state["step"] += 1
            state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM)
            update = weight.grad.lerp(state["momentum_buffer"], MOMENTUM)
            for pair in zip(as_matrices(weight), as_matrices(update), strict=True):
                by_shape.setdefault(pair[0].shape, []).append(pair)
        for shape, pairs in by_shape.items():
            orthogonal = orthogonalize(torch.stack([update for _, update in pairs]))
            for (matrix, _), direction in zip(pairs, orthogonal, strict=True):
                matrix.add_(direction, alpha=-learning_rate * SIZE * max(shape) ** 0.5)


def as_matrices(weight: torch.Tensor) -> list[torch.Tensor]:
    """Views of a layer's weight, or its gradient, as one matrix or one a group; never copies."""
    return list(weight.unbind()) if weight.ndim == 3 else [weight.view(weight.shape[0], -1)]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, a, b) of about the same singular vectors, whose singular values are about 1."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    first, second, third = COEFFICIENTS
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x

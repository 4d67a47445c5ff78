"""Optimizers of both training scripts: Adam, its schedule, and steps that are only taken where all is finite."""

import argparse
import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from .checkpoints import RunState, checkpoint_step, list_checkpoints
from .muon import MuonAndAdam


OPTIMIZERS = ("adam", "muon")

logger = logging.getLogger(__name__)


def build_optimizer(
    model: torch.nn.Module,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    part_learning_rates: dict[str, float] | None = None,
    use_8bit_adam: bool = False,
    optimizer: str = "adam",
) -> torch.optim.Optimizer:
    r"""
    Adam, one fused kernel a step, for the parameters of a model that are not frozen; or Muon with it.

    Args:
        model (`nn.Module`): What is trained.
        learning_rate (`float`): Learning rate of all that has none of its own.
        beta1, beta2, epsilon (`float`): Adam's.
        part_learning_rates (`dict[str, float]`, *optional*):
            Learning rates of direct submodules by name. Layers with an equalized learning rate (StyleGAN2's: the MLPs
            and the style decoder) hold weights of about 1 and take larger steps than an encoder with PyTorch's
            initialisation bears.

        use_8bit_adam (`bool`, defaults to `False`): Whether bitsandbytes' `Adam8bit` keeps its moments in 8 bits.
        optimizer (`str`, defaults to `"adam"`): One of `OPTIMIZERS`; with `"muon"` layers' weights are left to Muon.

    Returns:
        `torch.optim.Adam`, `Adam8bit` or `MuonAndAdam`: Its first group is what has no learning rate of its own, the
        others are in the order of `part_learning_rates`.

    Raises:
        `ImportError`: If bitsandbytes is to be used and is not installed.
        `ValueError`: If the model has no part of a name.
    """
    rates, known = part_learning_rates or {}, [name for name, _ in model.named_children()]
    if not rates.keys() <= set(known):
        raise ValueError(f"part_learning_rates names {', '.join(rates)}; the model's parts are {', '.join(known)}.")
    parts = {name: [] for name in ("", *rates)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0]
            parts[part if part in rates else ""].append(parameter)
    groups = [{"params": params, "lr": rates.get(name, learning_rate)} for name, params in parts.items()]
    options = {"betas": (beta1, beta2), "eps": epsilon}
    if optimizer == "muon":
        # Neither grids, whose weights are `entries`, nor embeddings of classes are layers.
        tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        named = [(name, weight) for name, weight in model.named_parameters() if name.endswith("weight")]
        layers = [weight for _, weight in named if weight.ndim > 1 and all(weight is not table for table in tables)]
        return MuonAndAdam(groups, layers, **options)
    if use_8bit_adam:
        import bitsandbytes  # noqa: PLC0415 - it is optional

        return bitsandbytes.optim.Adam8bit(groups, lr=learning_rate, **options)
    return torch.optim.Adam(groups, lr=learning_rate, **options, fused=True)


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """The schedule of the flags `lr_scheduler`, `lr_warmup_steps`, `max_train_steps` and `lr_step_rules`."""
    name, warmup = args.lr_scheduler, args.lr_warmup_steps
    if name == "piecewise_constant":
        rule = get_scheduler(name, optimizer, step_rules=args.lr_step_rules).lr_lambdas[0]
        return LambdaLR(optimizer, lambda step: rule(step) * (min(step / warmup, 1.0) if warmup > 0 else 1.0))
    return get_scheduler(
        "constant_with_warmup" if name == "constant" and warmup > 0 else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=args.max_train_steps,
    )


def scale_learning_rates(args: argparse.Namespace, num_processes: int) -> None:
    """With `--scale_lr`, multiplies all learning rates by the images of one step, as diffusers' scripts do."""
    if not args.scale_lr:
        return
    factor = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    for name in ("learning_rate", "encoder_learning_rate", "decoder_learning_rate", "discriminator_learning_rate"):
        if getattr(args, name, None) is not None:
            setattr(args, name, getattr(args, name) * factor)
    logger.info("--scale_lr: learning rates are times %d; --learning_rate is %g now.", factor, args.learning_rate)


def schedule_factor(lr_scheduler: torch.optim.lr_scheduler.LambdaLR) -> float:
    """Share of the full learning rate that a schedule gives at its step."""
    return lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch)


def set_adam(optimizer, learning_rate: float | None = None, beta1: float | None = None) -> None:
    """Changes Adam's learning rate or momentum from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if learning_rate is None else learning_rate
        group["betas"] = group["betas"] if beta1 is None else (beta1, group["betas"][1])


def step_if_finite(
    accelerator: Accelerator, optimizers: list, max_grad_norm: float | None, loss: torch.Tensor
) -> torch.Tensor:
    r"""
    Takes a step of each optimizer whose gradients are all finite, if the loss is, and drops the gradients. They are
    summed over the processes by then, and so is the loss, so all come to the same decision. With fused optimizers
    nothing here waits for a GPU.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        optimizers (`list`): All that share the accelerator's loss scale; prepared by it.
        max_grad_norm (`float`, *optional*): Clip each optimizer's gradients to this norm.
        loss (`torch.Tensor`): Scalar, the sum of this process's losses since the last step; detached.

    Returns:
        `torch.Tensor`: scalar, bool: whether all steps were taken; for [`SkippedSteps`].
    """
    # accelerate's own clipping unscales the gradients of all optimizers at every call, and its optimizers change the
    # loss scale at every step: with two of them, gradients would be divided twice, or by another scale than theirs.
    scaler = accelerator.scaler
    finite_loss = accelerator.reduce(loss, reduction="sum").isfinite()
    all_finite = finite_loss
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = finite_loss & norm.isfinite()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        _step_where(getattr(optimizer, "optimizer", optimizer), finite)  # accelerate may have wrapped it
        optimizer.zero_grad()
        all_finite = all_finite & finite
    if scaler is not None:
        scaler.update()
    return all_finite


def _step_where(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """A step of an optimizer, or none: fused ones read the flag where it lies, as `GradScaler` has them do, but on
    MPS not before torch of mid-2026."""
    if getattr(optimizer, "_step_supports_amp_scaling", False) and finite.device.type != "mps":
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        del optimizer.found_inf
    elif finite:  # others, such as bitsandbytes' Adam8bit, wait for it
        optimizer.step()


class SkippedSteps:
    r"""
    Counts steps that were skipped for gradients that are not finite. Whether they were is read for several steps at
    once, since reading waits for the device: a run of too many is noticed where it is logged, or that many steps
    after the last time.

    Args:
        state (`RunState`): Holds the counts.
        limit (`int`): Skipped steps in a row that end the run.
        interval (`int`): Steps between entries in the log.
        output_dir (`str`): Folder of the run.
    """

    def __init__(self, state: RunState, limit: int, interval: int, output_dir: str | Path):
        self.state, self.limit, self.interval, self.output_dir = state, limit, interval, output_dir
        self.unread, self.last_was_finite = [], True

    def add(self, finite: torch.Tensor) -> None:
        """Call after every step, when the state has counted it, with the result of [`step_if_finite`]."""
        self.unread.append(finite)
        if len(self.unread) >= self.limit or self.state.global_step % self.interval == 0:
            self.read()

    def read(self) -> bool:
        r"""
        Brings the state's counts up to date, which belongs before a checkpoint.

        Returns:
            `bool`: Whether the last step was taken.

        Raises:
            `FloatingPointError`: If the limit is reached; names the last checkpoint.
        """
        state, flags = self.state, torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        for step, finite in enumerate(flags, start=state.global_step - len(flags) + 1):
            self.last_was_finite = finite
            state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
            state.skipped_steps += not finite
            if state.skipped_in_a_row >= self.limit:
                fault = f"the loss or its gradient was not finite in {self.limit} steps in a row, up to step {step}"
                # Weights are known to be good if the step after them was: leave out a checkpoint right before the
                # first fault.
                raise _not_finite(fault, self.output_dir, step - self.limit)
        return self.last_was_finite


def check_weights(networks: list[torch.nn.Module], state: RunState, output_dir: str | Path) -> None:
    r"""
    Keeps weights that are not finite out of checkpoints and validation.

    Args:
        networks (`list[nn.Module]`): What is trained.
        state (`RunState`): Knows the step.
        output_dir (`str`): Folder of the run.

    Raises:
        `FloatingPointError`: If a weight is not finite; names the last checkpoint.
    """
    weights = [parameter.detach() for network in networks for parameter in network.parameters()]
    if not torch.nn.utils.get_total_norm(weights, norm_type=float("inf")).isfinite():
        raise _not_finite(f"a weight is not finite at step {state.global_step}", output_dir, state.global_step)


def _not_finite(fault: str, output_dir: str | Path, before: int) -> FloatingPointError:
    good = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) < before]
    return FloatingPointError(
        f"{fault}; lower --learning_rate or use --mixed_precision no or bf16, and resume from "
        f"{good[-1] if good else 'the start, as no checkpoint is known to be good'}."
    )

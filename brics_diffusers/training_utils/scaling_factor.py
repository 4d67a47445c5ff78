"""The scaling factor that makes key codes the latents of stage two, and the scheduler that clamps where they end."""

import argparse

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data.key_codes import KeyCodeDataset
from ..pipelines import BricsKeyCodePipeline
from ..schedulers import CosineVariantScheduler
from .checkpoints import RunState
from .run import write_config


def build_scheduler(args: argparse.Namespace, scaling_factor: float) -> CosineVariantScheduler:
    """The scheduler of the config, which clamps where latents end unless the config has it otherwise."""
    return CosineVariantScheduler(**{"clip_sample_range": scaling_factor / 2} | args.scheduler)


def _choose(args: argparse.Namespace, pipeline: BricsKeyCodePipeline, key_codes: KeyCodeDataset) -> float:
    """That of a new run, as the help of `--scaling_factor` says, the same on all processes."""
    factor = args.scaling_factor or pipeline.autoencoder.config.scaling_factor
    if factor is None and pipeline.scheduler.config.prediction_type == "epsilon":
        factor = 2.0  # solvers can clamp such a prediction's errors at the noisiest steps in [-1, 1] only
    if factor is None:
        factor = float(f"{1 / max(key_codes.standard_deviation(), 0.01):.4g}")
    return broadcast_object_list([factor])[0]


def settle_scaling_factor(
    args: argparse.Namespace,
    accelerator: Accelerator,
    state: RunState,
    pipeline: BricsKeyCodePipeline,
    key_codes: KeyCodeDataset,
) -> None:
    """
    Gives the pipeline and the run's record the scaling factor: a new one, or what a resumed run began with, which
    `state.scaling_factor` holds. Call on every process, when the run is resumed. A `ValueError` for a flag that says
    otherwise than the run began.
    """
    if state.global_step == 0:
        state.scaling_factor = _choose(args, pipeline, key_codes)
    factor = state.scaling_factor
    if args.scaling_factor not in (None, factor):
        raise ValueError(
            f"--scaling_factor is {args.scaling_factor:g}, but the run has begun with {factor:g}; leave it out."
        )
    args.scaling_factor = factor
    pipeline.autoencoder.register_to_config(scaling_factor=factor)
    if args.pretrained_model_name_or_path is None:
        pipeline.register_modules(scheduler=build_scheduler(args, factor))
    if accelerator.is_main_process:
        write_config(args)

"""Validation of stage two: loss on held-out key codes, samples, their distance from training images, best weights."""

import argparse
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel

from ..models import BricsAutoencoder
from ..pipelines import BricsKeyCodePipeline
from ..pipelines.sampling import with_scheduler
from ..utils.files import default_cache_dir
from ..utils.image_grids import image_grid
from .checkpoints import RunState, appearing_folder, improves
from .classes import frequent_labels, spread_labels
from .ema import averaged_weights
from .held_out_loss import HeldOutLoss
from .sample_distance import SampleDistance
from .tracking import log_image


logger = logging.getLogger(__name__)

BEST = "pipeline-best"


class KeyCodeValidation:
    """
    What stage two measures with its averaged weights, the processes sharing the work. Nothing of it draws random
    numbers that training uses. Samples that are measured have the classes' shares of the training images,
    `class_images` by class; others show all in turn.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        autoencoder: BricsAutoencoder,
        train_set: datasets.Dataset,
        held_out: datasets.Dataset | None,
        class_images: dict[str, int] | None = None,
    ):
        self.class_images = class_images
        self.args, self.accelerator = args, accelerator
        self.loss = self.distance = None
        if held_out is not None:
            options = args.encode_batch_size, args.dataloader_num_workers
            self.loss = HeldOutLoss(accelerator, autoencoder, held_out, *options)
        if args.validation_metrics != "none":
            self.distance = SampleDistance(
                args.validation_metrics,
                args.feature_extractor,
                accelerator,
                train_set,
                autoencoder.config.sample_size,
                args.num_metric_samples,
                default_cache_dir(),
                args.dataloader_num_workers,
            )

    def __bool__(self) -> bool:
        return bool(self.loss or self.distance or self.args.num_validation_images)

    def __call__(
        self, pipeline: BricsKeyCodePipeline, ema: EMAModel, state: RunState, loss: Callable[..., torch.Tensor]
    ) -> None:
        """
        Measures, logs, writes a grid of samples, and keeps the pipeline in `pipeline-best` if its samples are nearer
        to the training images than any before. The pipeline has the UNet in training, whose averaged weights are
        `ema`, and the scheduler of training; the state has `validation` and the attributes of `NO_BEST`; `loss` is as
        [`HeldOutLoss`] takes it. Call on every process.
        """
        accelerator, step, better = self.accelerator, state.global_step, False
        output_dir = Path(self.args.output_dir)
        with averaged_weights(pipeline.unet, ema):
            settings = pipeline.scheduler.config.num_train_timesteps, pipeline.autoencoder.scaling_factor
            metrics = self.loss(loss, *settings) if self.loss else {}
            images, distances = self.sample(pipeline)
            metrics |= distances
            if metrics:
                state.validation = {"step": step} | metrics
                accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=step)
                logger.info("step %d: %s", step, {name: round(value, 4) for name, value in metrics.items()})
            if self.distance is not None:
                better = improves(state, metrics, self.distance.name)
            if better and accelerator.is_main_process:
                with appearing_folder(output_dir / BEST) as folder:
                    pipeline.save_pretrained(folder)
        if accelerator.is_main_process and images is not None:
            grid = image_grid(images)
            grid.save(output_dir / "samples.png")
            log_image(accelerator, "samples", grid, step)
        accelerator.wait_for_everyone()

    def sample(self, pipeline: BricsKeyCodePipeline) -> tuple[torch.Tensor | None, dict[str, float]]:
        """The first `num_validation_images` samples (N, 3, H, W) in [-1, 1], and the distance of all by its name."""
        count, distance = self.args.num_validation_images, self.distance
        total = count if distance is None else max(count, self.args.num_metric_samples)
        solver = with_scheduler(pipeline, DPMSolverMultistepScheduler, {"use_karras_sigmas": True})
        solver.set_progress_bar_config(disable=True)
        shown, features = [], [torch.empty(0, 0)]
        for numbers, images in self.sample_batches(solver, total):
            shown += [pair for pair in zip(numbers, images, strict=True) if pair[0] < count]
            measured = sum(number < self.args.num_metric_samples for number in numbers)
            if distance is not None and measured:
                features.append(distance.features(images[:measured]))
        shown = sorted(gather_object(shown), key=lambda pair: pair[0])
        images = torch.stack([image for _, image in shown]) if shown else None
        features = torch.cat([part for part in features if len(part)] or features[:1])
        return images, {} if distance is None else {distance.name: distance(features)}

    def sample_batches(self, solver: BricsKeyCodePipeline, total: int) -> Iterator[tuple[range, torch.Tensor]]:
        """This process's share of `total` samples, the same ones at each call: numbers, images (B, 3, H, W)."""
        labels = None
        if self.class_images is not None and self.distance is None:
            labels = spread_labels(total, len(self.class_images))
        elif self.class_images is not None:
            labels = frequent_labels(total, self.class_images)
        share = range(self.accelerator.process_index, total, self.accelerator.num_processes)
        for start in range(0, len(share), self.args.encode_batch_size):
            numbers = share[start : start + self.args.encode_batch_size]
            images = solver(
                batch_size=len(numbers),
                num_inference_steps=self.args.num_inference_steps,
                generator=[torch.Generator().manual_seed(number) for number in numbers],
                output_type="pt",
                class_labels=labels and [labels[number] for number in numbers],
                guidance_scale=1.0,
            ).images.cpu()
            yield numbers, 2 * images - 1

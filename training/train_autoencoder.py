"""Stage one: trains a BricsAutoencoder on a collection of images (Sec. 3, App. A.3).

accelerate launch training/train_autoencoder.py --config training/configs/photos-demo.yaml --dataset_name FOLDER
"""

import argparse
import logging
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel

from brics_diffusers import BricsAutoencoder
from brics_diffusers.analysis.grid_usage import GridUsage
from brics_diffusers.data import UnreadableLog, evaluation_loader
from brics_diffusers.data.streaming import StreamPosition
from brics_diffusers.metrics.perceptual import PERCEPTUAL_NETWORKS, load_perceptual_network, perceptual_is_cached
from brics_diffusers.metrics.reconstruction import reconstruction_metrics
from brics_diffusers.training_utils.adversary import DISCRIMINATOR_TYPES, Adversary
from brics_diffusers.training_utils.arguments import (
    add_common_arguments,
    parse_arguments,
    policy,
    positive,
    run_settings,
)
from brics_diffusers.training_utils.checkpoints import (
    NO_BEST,
    RunState,
    TerminationSignal,
    appearing_folder,
    improves,
    naming_the_last_checkpoint,
    save_checkpoint,
)
from brics_diffusers.training_utils.ema import averaged_weights, ema_half_life_decay
from brics_diffusers.training_utils.losses import reconstruction_loss
from brics_diffusers.training_utils.optimization import (
    SkippedSteps,
    build_lr_scheduler,
    build_optimizer,
    check_weights,
    set_adam,
    step_if_finite,
)
from brics_diffusers.training_utils.pretrained import build_autoencoder
from brics_diffusers.training_utils.record import finish_run, summarize_run
from brics_diffusers.training_utils.run import StepLog, count_steps, resume_run, start_run
from brics_diffusers.training_utils.streams import image_loader, load_training_images
from brics_diffusers.training_utils.tracking import log_histogram, log_image
from brics_diffusers.utils.image_grids import side_by_side


logger = logging.getLogger("train_autoencoder")

PARTS_WITH_RATES = ("encoder", "decoder")  # grids and MLPs learn at --learning_rate


def parse_args(argv=None) -> argparse.Namespace:
    """Flags of this script, and the models of its config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add, flag = parser.add_argument, partial(parser.add_argument, action=argparse.BooleanOptionalAction)
    add("--pretrained_autoencoder_name_or_path", help="Start from these weights and their config.")
    flag(
        "--train_decoder_only",
        default=False,
        help="Freeze the encoder and train grids, MLPs and decoder on noisier key codes: --key_noise_scale, or --set.",
    )
    add("--key_noise_scale", type=float, help="Standard deviation of the noise on key codes; default: the config's.")
    flag("--cache_resized", default=False, help="Keep resized images in --cache_dir; worth it for large photographs.")
    add("--validation_split", help="Held-out split; default: `validation`, or images held out from training.")
    add("--num_validation_images", type=int, default=256, help="Held-out images to use at most; 0 for no validation.")
    add("--learning_rate", type=float, default=2e-3, help="The optimizer's learning rate, both networks.")
    add("--encoder_learning_rate", type=float, help="That of the encoder; default: that of --learning_rate.")
    add("--decoder_learning_rate", type=float, help="That of the decoder; default: that of --learning_rate.")
    add("--adam_beta1", type=float, default=0.9, help="Adam's momentum.")
    add(
        "--adam_beta1_gan",
        type=float,
        help="Adam's momentum once the adversarial loss counts. Default: that of --adam_beta1; lowering it in the "
        "middle of a run suddenly enlarges every step.",
    )
    add("--discriminator_adam_beta1", type=float, default=0.0, help="Momentum of the discriminator's Adam.")
    add("--adam_beta2", type=float, default=0.99, help="Adam's second decay rate.")
    add("--adam_epsilon", type=float, default=1e-15, help="Tiny, so that rarely hit grid entries move.")
    add("--discriminator_adam_epsilon", type=float, default=1e-8, help="Epsilon of the discriminator's Adam.")
    add("--mse_weight", type=float, default=20.0, help="Weight of the mean squared error.")
    add(
        "--perceptual_weight",
        "--lpips_weight",
        type=float,
        default=5.0,
        help="Weight of the perceptual distance; 0 trains without its network.",
    )
    add(
        "--perceptual_network",
        "--lpips_network",
        default="vgg",
        choices=PERCEPTUAL_NETWORKS,
        help="Backbone of LPIPS (vgg, alex, squeeze), or another network that sees images as people do.",
    )
    add("--kl_weight", type=float, default=1e-4, help="Weight of the KL divergence, with regularization: kl.")
    add("--adversarial_weight", type=float, default=1.0, help="Weight of the adversarial loss; 0 for none.")
    add("--gan_start_step", type=int, default=0, help="Step from which the adversarial loss counts.")
    add("--gan_warmup_steps", type=int, default=0, help="Steps in which its weight rises to the full one.")
    flag(
        "--adaptive_gan_weight",
        default=False,
        help="Multiply its weight by the ratio of the reconstruction loss' gradient to its own, VQGAN's rule.",
    )
    add(
        "--discriminator_type",
        default="stylegan2",
        choices=DISCRIMINATOR_TYPES,
        help="StyleGAN2's, the paper's; or one that judges patches, to try where that stays at chance.",
    )
    add(
        "--discriminator_start_step",
        type=int,
        help="Step from which the discriminator learns, at most that of --gan_start_step, the default.",
    )
    add("--discriminator_learning_rate", type=float, help="Default: that of --learning_rate; has the same schedule.")
    add(
        "--augmentation",
        type=policy,
        default="",
        help="Random changes of all images that the discriminator sees: some of color,translation,cutout.",
    )
    add("--gradient_penalty_weight", type=float, default=4.0, help="Gamma of R1; smaller for smaller images.")
    add("--gradient_penalty_interval", type=positive, default=16, help="Steps from one penalty to the next.")
    flag("--lazy_r1_correction", default=True, help="Adam's rate and betas scaled for penalties that are rare.")
    add("--ema_half_life_images", type=float, default=10_000, help="Half-life of the averaged weights, in images.")
    flag("--save_validation_weights", default=False, help="Keep the weights of every validation: autoencoder-STEP.")
    add(
        "--best_metric",
        default="auto",
        choices=("auto", "psnr", "perceptual"),
        help="What decides on autoencoder-best; auto: PSNR, and the perceptual distance once a discriminator counts.",
    )
    parser.set_defaults(output_dir="runs/autoencoder")
    args = parse_arguments(parser, "train_autoencoder", ("autoencoder", "discriminator"), argv)
    if args.adam_beta1_gan is None:
        args.adam_beta1_gan = args.adam_beta1
    return args


def build_perceptual_metric(args):
    """The network of the perceptual loss, or for validation alone where its weights are at hand, or none."""
    name = args.perceptual_network
    if args.perceptual_weight > 0 or args.best_metric == "perceptual":
        return load_perceptual_network(name)
    try:
        return load_perceptual_network(name) if perceptual_is_cached(name) else None
    except FileNotFoundError as error:
        logger.warning("No perceptual distance in validation: %s", error)
        return None


class Trainer:
    """The autoencoder and its adversary with their optimizers, and one step of both."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        self.unwrapped = build_autoencoder(args)
        self.perceptual_metric = build_perceptual_metric(args)
        if self.perceptual_metric is not None:
            self.perceptual_metric.to(accelerator.device)
        self.part_rates = {part: getattr(args, f"{part}_learning_rate") for part in PARTS_WITH_RATES}
        self.part_rates = {part: rate for part, rate in self.part_rates.items() if rate is not None}
        adam = args.adam_beta1, args.adam_beta2, args.adam_epsilon
        optimizer = build_optimizer(
            self.unwrapped, args.learning_rate, *adam, self.part_rates, optimizer=args.optimizer
        )
        # Not prepared: accelerate would advance it once a process.
        self.lr_scheduler = build_lr_scheduler(args, optimizer)
        self.loss = torch.zeros((), device=accelerator.device)  # summed since the last step
        self.autoencoder, self.optimizer = accelerator.prepare(self.unwrapped, optimizer)
        self.networks, self.optimizers = [self.autoencoder], [self.optimizer]
        self.adversary = None
        if args.adversarial_weight > 0:
            self.adversary = Adversary(args, accelerator, self.unwrapped, self.lr_scheduler)
            self.networks.append(self.adversary.network)
            self.optimizers.append(self.adversary.optimizer)

    def step(self, images: torch.Tensor, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """One batch through both networks: loss parts, and at an optimizer step whether it was finite and taken."""
        args, accelerator, finite = self.args, self.accelerator, None
        learns = self.adversary is not None and self.adversary.learns(step)
        gan_on = learns and self.adversary.counts(step)
        set_adam(self.optimizer, beta1=args.adam_beta1_gan if gan_on else args.adam_beta1)
        with accelerator.accumulate(*self.networks):
            loss, parts, sample = self.generator_loss(images, step, gan_on)
            self.backward(loss)
            if learns:
                loss, adversary_parts = self.adversary.discriminator_loss(images, sample, step)
                self.backward(loss)
                parts |= adversary_parts
            if accelerator.sync_gradients:
                finite = step_if_finite(accelerator, self.optimizers[: 1 + learns], args.max_grad_norm, self.loss)
                self.loss.zero_()
                self.lr_scheduler.step()
        return parts, finite

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients, and to the sum of losses that decides whether they are used."""
        self.loss += loss.detach()
        self.accelerator.backward(loss)

    def generator_loss(self, images: torch.Tensor, step: int, gan_on: bool):
        """Forward pass of the generating side: loss, its parts, reconstructions."""
        args = self.args
        sample, _, *kl_loss = self.autoencoder(images, return_dict=False)
        sample = sample.float()
        weights = args.mse_weight, args.perceptual_weight
        loss, parts = reconstruction_loss(sample, images, *weights, self.perceptual_metric)
        if gan_on:
            adversarial, adversary_parts = self.adversary.generator_loss(sample, loss, step)
            loss, parts = loss + adversarial, parts | adversary_parts
        if kl_loss:
            parts["kl"] = kl_loss[0].detach().mean()
            loss = loss + args.kl_weight * kl_loss[0].mean()
        return loss, parts, sample

    def best_metric(self, step: int) -> str:
        """Name of the validation metric that decides, after a number of steps, which weights are the best."""
        args, metric = self.args, self.perceptual_metric
        gan_on = self.adversary is not None and step > args.gan_start_step
        perceptual = metric is not None and (args.best_metric == "perceptual" or args.best_metric == "auto" and gan_on)
        return metric.metric_name if perceptual else "psnr"


def validate(args, accelerator, autoencoder, dataset, perceptual_metric) -> dict[str, float]:
    """Mean metrics over the held-out images, shared among the processes."""
    unreadable = UnreadableLog()
    rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    channels, *size = autoencoder.sample_shape
    options = {"rows": rows, "channels": channels}
    loader = evaluation_loader(dataset, size, args.train_batch_size, args.dataloader_num_workers, **options)
    metrics = reconstruction_metrics(autoencoder, loader, perceptual_metric, unreadable, accelerator.is_main_process)
    shares = gather_object([{name: value.tolist() for name, value in metrics.items()}])
    names = {name for share in shares for name in share if name != "index"}
    values = {name: [value for share in shares for value in share.get(name, [])] for name in sorted(names)}
    return {name: sum(value) / len(value) for name, value in values.items()}


@torch.no_grad()
def show(accelerator, autoencoder, dataset, output_dir: Path, step: int, count: int = 16) -> None:
    """Writes held-out images above their reconstructions, and a histogram of their key codes."""
    images, (channels, *size) = [], autoencoder.sample_shape
    for batch in evaluation_loader(dataset, size, count, channels=channels):
        images.extend(batch["pixel_values"])
        if len(images) >= count:
            break
    if not images:
        return
    images = torch.stack(images[:count]).to(accelerator.device)
    output = autoencoder(images)
    grid = side_by_side(images, output.sample)
    grid.save(output_dir / "reconstructions.png")
    log_image(accelerator, "validation", grid, step)
    log_histogram(accelerator, "key_codes", output.key_codes.float(), step)


def validate_and_keep_best(args, accelerator, trainer: Trainer, ema, dataset, state: RunState) -> None:
    """Metrics and pictures from the averaged weights, which are kept if no earlier ones were better."""
    output_dir, step = Path(args.output_dir), state.global_step
    with averaged_weights(trainer.unwrapped, ema) as autoencoder:
        metrics = validate(args, accelerator, autoencoder, dataset, trainer.perceptual_metric)
        state.validation = {"step": step} | metrics
        accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=step)
        better = improves(state, metrics, trainer.best_metric(step))
        if accelerator.is_main_process:
            logger.info("step %d: %s", step, {name: round(value, 4) for name, value in metrics.items()})
            show(accelerator, autoencoder, dataset, output_dir, step)
            kept = ["best"] * better + [step] * args.save_validation_weights
            for name in kept:
                save_autoencoder(autoencoder, output_dir / f"autoencoder-{name}")
    accelerator.wait_for_everyone()


def save_autoencoder(autoencoder: BricsAutoencoder, path: Path) -> None:
    """Writes the model's folder, complete or not at all."""
    with appearing_folder(path) as folder:
        autoencoder.save_pretrained(folder)


def train(args, accelerator) -> None:
    """Trains, validates, saves."""
    terminated = TerminationSignal(accelerator)
    output_dir = Path(args.output_dir)
    with accelerator.main_process_first():
        train_set, validation_set = load_training_images(args)
    num_images = None if args.streaming else len(train_set)
    count_steps(args, accelerator, num_images)
    trainer = Trainer(args, accelerator)
    unwrapped = trainer.unwrapped
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    decay = ema_half_life_decay(global_batch, args.ema_half_life_images)
    ema = EMAModel(unwrapped.parameters(), decay=decay, foreach=True)
    usage = GridUsage(unwrapped.grids)
    state = RunState(run_settings(args, accelerator, num_images), **NO_BEST, validation=None)
    position = StreamPosition(accelerator.process_index, accelerator.num_processes, args.dataloader_num_workers)
    streamed = [position] if args.streaming else []
    accelerator.register_for_checkpointing(ema, trainer.lr_scheduler, usage, state, *streamed)
    set_seed(args.seed, device_specific=True)  # noise differs between processes
    resume_run(args, accelerator, state, ema, trainer.lr_scheduler, trainer.optimizers)

    loader = image_loader(args, accelerator, train_set, unwrapped, state, position)
    counts = num_images or "streamed", len(validation_set or ()), global_batch, unwrapped.num_parameters() / 1e6
    logger.info("%s training images, %d held out; %d images a step; %.1f M parameters", *counts)

    unreadable = UnreadableLog()
    log = StepLog(accelerator, state, args.max_train_steps, global_batch, args.logging_steps)
    skipped = SkippedSteps(state, args.max_nonfinite_steps, args.logging_steps, output_dir)
    batches, due = iter(loader), False
    unwrapped.train()
    while state.global_step < args.max_train_steps:
        with log.waiting():
            batch = next(batches)
        if args.streaming:
            position.add(batch)
        unreadable.add(batch["unreadable"], batch["reasons"])
        images = batch["pixel_values"].to(accelerator.device, non_blocking=True)
        parts, finite = trainer.step(images, state.global_step)
        log.add(parts)
        if not accelerator.sync_gradients:
            continue

        ema.step(unwrapped.parameters())
        state.global_step += 1
        state.images_seen += global_batch
        skipped.add(finite)
        rates = trainer.lr_scheduler.get_last_lr()
        names = ["learning_rate", *(f"{part}_learning_rate" for part in trainer.part_rates)]
        values = dict(zip(names, rates, strict=False))  # Muon's groups follow, at the same rates
        if state.global_step % args.logging_steps == 0:
            values["grid_usage"] = usage.update(trainer.optimizer)
        log.step(values)
        step, stop = state.global_step, terminated.received()
        last = step == args.max_train_steps
        due = due or step % args.checkpointing_steps == 0  # and waits for a step that is finite
        saves = (due and skipped.read()) or last or stop
        validates = validation_set is not None and (last or (step % args.validation_steps == 0 and not stop))
        if saves or validates:
            skipped.read()
            check_weights(trainer.networks, state, output_dir)
        if validates:
            with naming_the_last_checkpoint(output_dir, "the validation"):
                validate_and_keep_best(args, accelerator, trainer, ema, validation_set, state)
            log.restart_clock()
        if saves:
            due = False
            save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
            log.restart_clock()
        if stop and not last:
            logger.info("Stopped by SIGTERM; go on with --resume_from_checkpoint latest.")
            return

    for reasons in gather_object([unreadable.reasons]):
        unreadable.add(reasons, reasons)
    if accelerator.is_main_process:
        if unreadable.count:
            logger.warning("%s", unreadable.summary())
        with averaged_weights(unwrapped, ema), naming_the_last_checkpoint(output_dir, "the autoencoder"):
            save_autoencoder(unwrapped, output_dir / "autoencoder")
        logger.info("The autoencoder is in %s", output_dir / "autoencoder")
        finish_run(args, summarize_run(args, accelerator, state, num_images, unwrapped))


def main(argv=None):
    """A whole run."""
    args = parse_args(argv)
    with start_run(args) as accelerator:
        train(args, accelerator)


if __name__ == "__main__":
    main()

"""Stage one: trains a BricsAutoencoder on a collection of images (Sec. 3, App. A.3).

accelerate launch training/train_autoencoder.py --config training/configs/photos-demo.yaml --dataset_name FOLDER
"""

import argparse
import logging
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torchvision.transforms.functional import to_tensor
from tqdm.auto import tqdm

from brics_diffusers import BricsAutoencoder, BricsDiscriminator
from brics_diffusers.data import ImageCollection, UnreadableLog, collate_images, evaluation_loader, training_loader
from brics_diffusers.evaluation import reconstruction_metrics
from brics_diffusers.losses import (
    DiscriminatorLoss,
    adversarial_loss,
    adversarial_ramp,
    load_lpips,
    reconstruction_loss,
)
from brics_diffusers.training_utils import (
    RunState,
    add_common_arguments,
    averaged_weights,
    build_optimizer,
    ema_half_life_decay,
    load_splits,
    parse_arguments,
    resume,
    save_checkpoint,
    set_beta1,
    side_by_side,
    start_run,
    step_if_finite,
    tensorboard,
)


logger = logging.getLogger("train_autoencoder")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add = parser.add_argument
    add("--validation_split", help="Held-out split; default: `validation`, or images held out from training.")
    add("--num_validation_images", type=int, default=256, help="Held-out images to use at most; 0 for no validation.")
    add("--learning_rate", type=float, default=2e-3, help="Adam's learning rate, both networks.")
    add("--adam_beta1", type=float, default=0.9, help="Adam's momentum before the adversarial loss starts.")
    add("--adam_beta1_gan", type=float, default=0.0, help="Adam's momentum from then on, and the discriminator's.")
    add("--adam_beta2", type=float, default=0.99, help="Adam's second decay rate.")
    add("--adam_epsilon", type=float, default=1e-15, help="Tiny, so that rarely hit grid entries move.")
    add("--discriminator_adam_epsilon", type=float, default=1e-8)
    add("--mse_weight", type=float, default=20.0, help="Weight of the mean squared error.")
    add("--lpips_weight", type=float, default=5.0, help="Weight of LPIPS; 0 trains without its network.")
    add("--lpips_network", default="vgg", choices=("vgg", "alex", "squeeze"), help="Backbone of LPIPS.")
    add("--kl_weight", type=float, default=1e-4, help="Weight of the KL divergence, with regularization: kl.")
    add("--adversarial_weight", type=float, default=1.0, help="Weight of the adversarial loss; 0 for none.")
    add("--gan_start_step", type=int, default=0, help="Optimizer step at which the adversarial loss starts.")
    add("--gan_warmup_steps", type=int, default=0, help="Steps in which its weight rises to the full one.")
    add("--gradient_penalty_weight", type=float, default=4.0, help="Gamma of R1.")
    add("--gradient_penalty_interval", type=int, default=16, help="Steps from one penalty to the next.")
    add("--ema_half_life_images", type=float, default=10_000, help="Half-life of the averaged weights, in images.")
    return parse_arguments(parser, "train_autoencoder", ("autoencoder", "discriminator"), argv)


def build_discriminator(args, autoencoder: BricsAutoencoder) -> DiscriminatorLoss | None:
    if args.adversarial_weight == 0:
        return None
    config = {"in_channels": autoencoder.config.out_channels, "sample_size": autoencoder.config.sample_size}
    discriminator = BricsDiscriminator(**config | args.discriminator)
    return DiscriminatorLoss(discriminator, args.gradient_penalty_weight, args.gradient_penalty_interval)


def generator_loss(args, accelerator, autoencoder, critic, lpips_metric, images, step):
    """Forward pass of the generating side: loss, its parts, reconstructions."""
    sample, _, *kl_loss = autoencoder(images, return_dict=False)
    sample = sample.float()
    loss, parts = reconstruction_loss(sample, images, args.mse_weight, args.lpips_weight, lpips_metric)
    if kl_loss:
        parts["kl"] = kl_loss[0].detach().mean()
        loss = loss + args.kl_weight * kl_loss[0].mean()
    ramp = adversarial_ramp(step, args.gan_start_step, args.gan_warmup_steps) if critic is not None else 0
    if ramp > 0:
        # The bare network: its parameters take no gradient here, so there is nothing to synchronise.
        critic.requires_grad_(False)
        with accelerator.autocast():
            logits = accelerator.unwrap_model(critic).discriminator(sample)
        adversarial = adversarial_loss(logits.float())
        parts["adversarial"] = adversarial.detach()
        loss = loss + ramp * args.adversarial_weight * adversarial
    return loss, parts, sample


def validate(args, accelerator, autoencoder, dataset, lpips_metric) -> dict[str, float]:
    """Mean metrics over the held-out images, shared among the processes."""
    rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    size = autoencoder.config.sample_size
    loader = evaluation_loader(dataset, size, args.train_batch_size, args.dataloader_num_workers, rows=rows)
    metrics = reconstruction_metrics(autoencoder, loader, lpips_metric, progress=accelerator.is_main_process)
    shares = gather_object([{name: value.tolist() for name, value in metrics.items()}])
    names = {name for share in shares for name in share if name != "index"}
    values = {name: [value for share in shares for value in share.get(name, [])] for name in sorted(names)}
    return {name: sum(value) / len(value) for name, value in values.items()}


@torch.no_grad()
def reconstruction_grid(accelerator, autoencoder, dataset, count: int = 16):
    """Held-out images above their reconstructions."""
    size = autoencoder.config.sample_size
    batch = next(iter(evaluation_loader(dataset, size, count, rows=range(min(count, len(dataset))))))
    images = batch["pixel_values"].to(accelerator.device)
    return side_by_side(images, autoencoder(images).sample)


def main(argv=None):
    args = parse_args(argv)
    accelerator = start_run(args)
    output_dir = Path(args.output_dir)
    with accelerator.main_process_first():
        train_set, validation_set = load_splits(args)
    lpips_metric = load_lpips(args.lpips_network).to(accelerator.device) if args.lpips_weight > 0 else None

    autoencoder = BricsAutoencoder(**args.autoencoder)
    if args.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    critic = build_discriminator(args, autoencoder)
    optimizer = build_optimizer(
        autoencoder.parameters(), args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    decay = ema_half_life_decay(global_batch, args.ema_half_life_images)
    ema = EMAModel(autoencoder.parameters(), decay=decay, foreach=True)
    ema.to(accelerator.device)
    state = RunState()

    # The schedule is not prepared: accelerate would advance it once a process.
    autoencoder, optimizer = accelerator.prepare(autoencoder, optimizer)
    trained = [autoencoder]
    if critic is not None:
        critic_optimizer = build_optimizer(
            critic.parameters(),
            args.learning_rate,
            args.adam_beta1_gan,
            args.adam_beta2,
            args.discriminator_adam_epsilon,
        )
        critic, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
        trained.append(critic)
    accelerator.register_for_checkpointing(ema, lr_scheduler, state)
    set_seed(args.seed, device_specific=True)  # noise differs between processes
    resume(accelerator, output_dir, args.resume_from_checkpoint)

    bare = accelerator.unwrap_model(autoencoder)
    loader = training_loader(
        ImageCollection(train_set, bare.config.sample_size, args.random_flip, replace_unreadable=True),
        args.train_batch_size,
        args.seed,
        start=state.global_step * args.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate_images,
    )
    logger.info(
        "%d training images, %d held out; %d images a step; %.1f M parameters",
        len(train_set),
        len(validation_set or ()),
        global_batch,
        sum(parameter.numel() for parameter in bare.parameters()) / 1e6,
    )

    unreadable = UnreadableLog()
    progress = tqdm(
        total=args.max_train_steps,
        initial=state.global_step,
        desc="Training",
        disable=not accelerator.is_local_main_process,
    )
    batches = iter(loader)
    autoencoder.train()
    started, images_seen = time.monotonic(), 0
    while state.global_step < args.max_train_steps:
        batch = next(batches)
        unreadable.add(batch["unreadable"])
        images = batch["pixel_values"].to(accelerator.device, non_blocking=True)
        step = state.global_step
        gan_on = critic is not None and step >= args.gan_start_step
        set_beta1(optimizer, args.adam_beta1_gan if gan_on else args.adam_beta1)
        with accelerator.accumulate(*trained):
            loss, parts, sample = generator_loss(args, accelerator, autoencoder, critic, lpips_metric, images, step)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                step_if_finite(accelerator, optimizer, bare.parameters(), args.max_grad_norm)
            if gan_on:
                critic.requires_grad_(True)
                penalize = step % args.gradient_penalty_interval == 0
                critic_loss, critic_parts = critic(images, sample.detach(), penalize)
                accelerator.backward(critic_loss)
                parts |= critic_parts
                if accelerator.sync_gradients:
                    step_if_finite(accelerator, critic_optimizer, critic.parameters(), args.max_grad_norm)
        images_seen += len(images) * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        ema.step(bare.parameters())
        state.global_step += 1
        progress.update()
        if state.global_step % args.logging_steps == 0:
            averages = accelerator.reduce(parts, reduction="mean")
            values = {f"train/{name}": value.item() for name, value in averages.items()}
            values["train/learning_rate"] = lr_scheduler.get_last_lr()[0]
            values["train/images_per_second"] = images_seen / (time.monotonic() - started)
            accelerator.log(values, step=state.global_step)
            progress.set_postfix(mse=f"{values['train/mse']:.4f}")
            started, images_seen = time.monotonic(), 0
        last = state.global_step == args.max_train_steps
        if state.global_step % args.checkpointing_steps == 0 or last:
            save_checkpoint(accelerator, output_dir, state.global_step, args.checkpoints_total_limit)
        if validation_set is not None and (state.global_step % args.validation_steps == 0 or last):
            with averaged_weights(bare, ema):
                metrics = validate(args, accelerator, bare, validation_set, lpips_metric)
                accelerator.log({f"validation/{k}": v for k, v in metrics.items()}, step=state.global_step)
                if accelerator.is_main_process:
                    logger.info("step %d: %s", state.global_step, {k: round(v, 4) for k, v in metrics.items()})
                    grid = reconstruction_grid(accelerator, bare, validation_set)
                    grid.save(output_dir / "reconstructions.png")
                    tensorboard(accelerator).add_image("validation", to_tensor(grid), state.global_step)
            started, images_seen = time.monotonic(), 0

    progress.close()
    if accelerator.is_main_process:
        with averaged_weights(bare, ema):
            bare.save_pretrained(output_dir / "autoencoder")
        if unreadable.count:
            logger.warning(unreadable.summary())
        logger.info("The autoencoder is in %s", output_dir / "autoencoder")
    accelerator.end_training()


if __name__ == "__main__":
    main()

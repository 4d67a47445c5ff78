"""Stage two: trains a diffusion model on the key codes of a collection and saves a whole pipeline (Sec. 4, App. A.5).

    accelerate launch training/train_key_codes.py --config training/configs/photos-demo.yaml --dataset_name FOLDER \
        --autoencoder_name_or_path runs/autoencoder
"""

import argparse
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline
from brics_diffusers.data import collection_fingerprint, training_loader
from brics_diffusers.data.key_codes import (
    MANIFEST,
    KeyCodeDataset,
    count_shards,
    finish_key_codes,
    open_key_codes,
    write_key_codes,
)
from brics_diffusers.metrics.generation import KID_FEATURES
from brics_diffusers.models.loading import load_autoencoder
from brics_diffusers.pipelines.pipeline_brics_key_code import key_codes_to_latents
from brics_diffusers.schedulers.min_snr import min_snr_weights
from brics_diffusers.training_utils.arguments import (
    add_common_arguments,
    not_negative,
    parse_arguments,
    positive,
    positive_number,
    run_settings,
)
from brics_diffusers.training_utils.autoguidance import check_guide_step, keep_guide, load_guide
from brics_diffusers.training_utils.checkpoints import (
    NO_BEST,
    RunState,
    TerminationSignal,
    appearing_folder,
    check_shared_folder,
    launcher_is_gone,
    naming_the_last_checkpoint,
    save_checkpoint,
)
from brics_diffusers.training_utils.class_arguments import add_class_arguments, check_class_arguments
from brics_diffusers.training_utils.classes import count_classes, drop_labels, known_classes
from brics_diffusers.training_utils.ema import averaged_weights
from brics_diffusers.training_utils.key_code_validation import KeyCodeValidation
from brics_diffusers.training_utils.losses import denoising_loss
from brics_diffusers.training_utils.optimization import (
    SkippedSteps,
    build_lr_scheduler,
    build_optimizer,
    check_weights,
    step_if_finite,
)
from brics_diffusers.training_utils.post_hoc_ema import PowerEMA
from brics_diffusers.training_utils.pretrained import check_key_codes, check_resolution, load_key_code_pipeline
from brics_diffusers.training_utils.record import finish_run, summarize_run
from brics_diffusers.training_utils.run import StepLog, count_steps, resume_run, start_run
from brics_diffusers.training_utils.sample_distance import DISTANCES
from brics_diffusers.training_utils.scaling_factor import build_scheduler, settle_scaling_factor
from brics_diffusers.training_utils.streams import load_images_to_encode, stream_fingerprint
from brics_diffusers.utils.files import weights_digest
from brics_diffusers.utils.locks import locked_folder


logger = logging.getLogger("train_key_codes")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv=None) -> argparse.Namespace:
    """Flags of this script, and the models of its config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add = parser.add_argument
    add("--autoencoder_name_or_path", help="Stage one's --output_dir, a saved autoencoder, or its name on the Hub.")
    add(
        "--pretrained_model_name_or_path",
        help="Go on from this pipeline: its UNet and scheduler, and its autoencoder unless another is named.",
    )
    add("--key_codes_dir", help="Folder for the collection's key codes; default: key_codes in --output_dir.")
    add("--encode_batch_size", type=positive, default=16, help="Images encoded at once.")
    add("--shard_size", type=positive, default=1024, help="Key codes in one file; processes take turns.")
    add("--learning_rate", type=float, default=8e-5, help="The optimizer's learning rate.")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_epsilon", type=float, default=1e-8)
    add(
        "--scaling_factor",
        type=positive_number,
        help="Latents are key codes, less 0.5, times this, 2 in the paper. Default: that of the autoencoder's config, "
        "else one over the standard deviation of the key codes, but 2 for a UNet that predicts epsilon.",
    )
    add("--snr_gamma", type=float, help="Min-SNR weighting with this limit, 5 in the paper; none by default.")
    add("--ema_max_decay", type=float, default=0.9999, help="Decay of the averaged weights after its warm-up.")
    add("--guide_step", type=positive, help="Keep the averaged weights of this step as the pipeline's guide.")
    add("--ema_snapshot_steps", type=positive, help="Save averages every so many steps, to choose their length later.")
    add("--num_validation_images", type=int, default=16, help="Images sampled at each validation, of all processes.")
    add("--num_inference_steps", type=positive, default=20, help="DPM-Solver++ steps of these samples.")
    add("--validation_split", help="Split for the loss on held-out key codes; default: `validation`, if there is one.")
    add(
        "--num_held_out_images",
        type=not_negative,
        help="Images of that split to use at most, 256 by default; 0 for none. Without such a split none are held out "
        "unless this is given: then so many, at most a tenth, are taken from the training images, as in stage one.",
    )
    add(
        "--validation_metrics",
        choices=("none", *DISTANCES),
        default="none",
        help="Distance of samples from training images at each validation; the nearest are kept in pipeline-best.",
    )
    add("--feature_extractor", default=KID_FEATURES, help="Features of that distance, as of generation-metrics.")
    add("--num_metric_samples", type=positive, default=256, help="Samples for that distance, of all processes.")
    add("--save_dtype", choices=DTYPES, default="fp32", help="Numbers of the saved pipeline; checkpoints stay fp32.")
    add_class_arguments(parser)
    parser.set_defaults(lr_scheduler="cosine", output_dir="runs/pipeline")
    args = parse_arguments(parser, "train_key_codes", ("unet", "scheduler"), argv)
    check_class_arguments(parser, args)
    if args.validation_metrics != "none" and args.streaming:
        parser.error("--validation_metrics reads the whole collection, and --streaming does not; leave one out")
    if args.pretrained_model_name_or_path is not None:
        if args.changes:
            parser.error("--set changes new models; a pretrained pipeline keeps its own, so leave it out")
    elif args.autoencoder_name_or_path is None:
        parser.error("no autoencoder: give --autoencoder_name_or_path, for instance stage one's --output_dir")
    return args


def fingerprint(autoencoder: BricsAutoencoder, dataset, args) -> str:
    """Changes with the autoencoder's weights, the collection, its labels if it has any, and how images are read."""
    images = stream_fingerprint(args, dataset) if args.streaming else collection_fingerprint(dataset)
    parts = weights_digest({"autoencoder": autoencoder}), images, args.random_flip, args.shard_size
    if args.class_conditional:
        parts = *parts, dataset.features["label"].names, list(dataset["label"])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def encode_collection(args, accelerator, autoencoder, dataset) -> KeyCodeDataset:
    """The collection's key codes, made once and kept on disk; the processes share the work."""
    folder = Path(args.key_codes_dir or Path(args.output_dir) / "key_codes")
    # One process reads all images for it.
    mark = broadcast_object_list([fingerprint(autoencoder, dataset, args) if accelerator.is_main_process else None])[0]
    with accelerator.main_process_first():
        complete = (folder / MANIFEST).is_file() and open_key_codes(folder, mark)
    if broadcast_object_list([complete])[0]:  # and any number of runs may read them
        check_shared_folder(accelerator, folder, "--key_codes_dir")
    else:
        with locked_folder(folder, "--key_codes_dir", accelerator.is_main_process):
            write_all_key_codes(args, accelerator, autoencoder, dataset, folder, mark)
    return KeyCodeDataset(folder, args.class_conditional)


def write_all_key_codes(args, accelerator, autoencoder, dataset, folder: Path, mark: str) -> None:
    """Encodes what is not encoded yet; `mark` is the collection's [`fingerprint`]."""
    with accelerator.main_process_first():
        open_key_codes(folder, mark)
    check_shared_folder(accelerator, folder, "--key_codes_dir")
    write_key_codes(
        autoencoder,
        dataset,
        folder,
        batch_size=args.encode_batch_size,
        shard_size=args.shard_size,
        random_flip=args.random_flip,
        num_workers=args.dataloader_num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        stopped=launcher_is_gone,
    )
    if launcher_is_gone():
        raise SystemExit("Stopped; what is encoded stays, and the same command goes on.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unreadable = finish_key_codes(folder, count_shards(dataset, args.shard_size, args.random_flip))
        if unreadable.count:
            logger.warning("%s", unreadable.summary())
    accelerator.wait_for_everyone()


def build_unet(args, autoencoder: BricsAutoencoder, num_classes: int | None = None) -> UNet2DModel:
    """A UNet for the autoencoder's key codes; the config's `unet` section has the rest."""
    channels, *size = autoencoder.key_code_shape
    size = size[0] if size[0] == size[1] else size
    config = {"sample_size": size, "in_channels": channels, "out_channels": channels} | args.unet
    if num_classes is not None:
        config["num_class_embeds"] = num_classes + 1  # the last one is "no class"
    return UNet2DModel(**config)


def load_models(args) -> tuple[BricsAutoencoder, BricsKeyCodePipeline | None]:
    """The autoencoder, and the pretrained pipeline if one is named."""
    autoencoder = args.autoencoder_name_or_path and load_autoencoder(args.autoencoder_name_or_path)
    pipeline = None
    if args.pretrained_model_name_or_path is not None:
        pipeline = load_key_code_pipeline(args.pretrained_model_name_or_path)
        autoencoder = autoencoder or pipeline.autoencoder
        factor = pipeline.autoencoder.scaling_factor
        if args.scaling_factor not in (None, factor):
            logger.warning("--scaling_factor is for new models; the pretrained one keeps its own, %g.", factor)
        args.scaling_factor = factor
        autoencoder.register_to_config(scaling_factor=factor)
        check_key_codes(autoencoder, pipeline.unet)
    check_resolution(args.resolution, autoencoder)
    return autoencoder.requires_grad_(False).eval(), pipeline


def build_pipeline(args, autoencoder, pretrained: BricsKeyCodePipeline | None, class_images) -> BricsKeyCodePipeline:
    """The pipeline to train: the pretrained one with this autoencoder, or a new one."""
    if pretrained is not None:
        config = {
            name: value for name, value in pretrained.config.items() if name.startswith(("id2label", "default_"))
        }
        pipeline = BricsKeyCodePipeline(**pretrained.components | {"autoencoder": autoencoder}, **config)
    else:
        unet = build_unet(args, autoencoder, class_images and len(class_images))
        classes = {}
        if class_images:
            classes["id2label"] = dict(enumerate(class_images))
            shares = [1] * len(class_images) if args.balance_classes else list(class_images.values())
            classes["default_class_weights"] = shares
        scheduler = build_scheduler(args, autoencoder.scaling_factor)
        pipeline = BricsKeyCodePipeline(autoencoder, unet, scheduler, **classes)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return pipeline


def draw_noise(shape: torch.Size, seed: int, batch: int, accelerator, num_train_timesteps: int):
    """Noise and timesteps of a process's share of a batch.

    They follow from the seed and the number of the batch: several processes draw what one process with their batches
    together draws, and a resumed run what an uninterrupted one does.
    """
    device, count = accelerator.device, shape[0] * accelerator.num_processes
    state = int(np.random.SeedSequence((seed, batch)).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator(device).manual_seed(state)
    noise = torch.randn(count, *shape[1:], generator=generator, device=device)
    timesteps = torch.randint(num_train_timesteps, (count,), generator=generator, device=device)
    share = slice(accelerator.process_index * shape[0], (accelerator.process_index + 1) * shape[0])
    return noise[share], timesteps[share]


def training_loss(unet, scheduler, latents, noise, timesteps, snr_gamma: float | None, labels=None) -> torch.Tensor:
    """Denoising loss at given noise, timesteps and labels, none without classes (App. A.5)."""
    prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, labels, return_dict=False)[0]
    if scheduler.config.prediction_type == "epsilon":
        target = noise
    elif scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = latents
    weights = None if snr_gamma is None else min_snr_weights(scheduler, timesteps, snr_gamma)
    return denoising_loss(prediction, target, weights)


def save_pipeline(pipeline: BricsKeyCodePipeline, output_dir: Path) -> None:
    """Writes the pipeline into the run's folder, each component complete or not at all, and the index last."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".partial-") as folder:
        pipeline.save_pretrained(folder)
        for name in (path.name for path in Path(folder).iterdir() if path.is_dir()):
            with appearing_folder(output_dir / name) as component:
                shutil.copytree(Path(folder) / name, component, dirs_exist_ok=True)
        os.replace(Path(folder) / "model_index.json", output_dir / "model_index.json")


def training_batches(
    args, accelerator, key_codes: KeyCodeDataset, state: RunState, class_names: list[str] | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """A process's batches from where the run is: their numbers, latents and, with classes, labels, some dropped."""
    start = state.images_seen // (args.train_batch_size * accelerator.num_processes)
    loader = training_loader(
        key_codes,
        args.train_batch_size,
        args.seed,
        start=start,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
        balance=key_codes.labels if args.balance_classes else None,
    )
    ranks = accelerator.process_index, accelerator.num_processes
    for number, batch in enumerate(loader, start=start):
        labels = None
        if class_names is not None:
            batch, labels = batch
            labels = drop_labels(labels, len(class_names), args.class_dropout_prob, args.seed, number, *ranks)
            labels = labels.to(accelerator.device, non_blocking=True)
        batch = batch.to(accelerator.device, non_blocking=True)
        yield number, key_codes_to_latents(batch, args.scaling_factor), labels


def save_result(args, pipeline: BricsKeyCodePipeline, unet: UNet2DModel, ema: EMAModel) -> None:
    """The pipeline, with the UNet's averaged weights and its guide, in the numbers that the run asks for."""
    output_dir = Path(args.output_dir)
    with averaged_weights(unet, ema), naming_the_last_checkpoint(output_dir, "the pipeline"):
        if args.guide_step is not None:
            pipeline.register_modules(guide=load_guide(output_dir))
        for model in filter(None, (pipeline.autoencoder, unet, pipeline.guide)):  # which have done their work
            torch.nn.Module.to(model, DTYPES[args.save_dtype])  # diffusers' own `to` warns of any type
        save_pipeline(pipeline, output_dir)
    logger.info("The pipeline is in %s", output_dir)


def train(args, accelerator) -> None:
    """Encodes the collection, trains, validates, saves."""
    output_dir = Path(args.output_dir)
    autoencoder, pretrained = load_models(args)
    autoencoder.to(accelerator.device)
    with accelerator.main_process_first():
        dataset, held_out = load_images_to_encode(args, known_classes(args, pretrained))
    class_images = count_classes(dataset) if args.class_conditional else None
    class_names = class_images and list(class_images)
    pipeline = build_pipeline(args, autoencoder, pretrained, class_images)  # before what else draws random numbers
    validation = KeyCodeValidation(args, accelerator, autoencoder, dataset, held_out, class_images)
    key_codes = encode_collection(args, accelerator, autoencoder, dataset)
    terminated = TerminationSignal(accelerator)  # until here, what is encoded stays and needs no saving

    count_steps(args, accelerator, len(key_codes))
    unet, adam = pipeline.unet, (args.adam_beta1, args.adam_beta2, args.adam_epsilon)
    chosen = {"use_8bit_adam": args.use_8bit_adam, "optimizer": args.optimizer}
    optimizer = build_optimizer(unet, args.learning_rate, *adam, **chosen)
    lr_scheduler = build_lr_scheduler(args, optimizer)
    ema = EMAModel(unet.parameters(), decay=args.ema_max_decay, foreach=True)
    state = RunState(run_settings(args, accelerator, len(key_codes)), **NO_BEST, validation=None)
    state.scaling_factor = 2.0  # that of checkpoints which don't say
    unet, optimizer = accelerator.prepare(unet, optimizer)  # the schedule would advance once a process
    accelerator.register_for_checkpointing(ema, lr_scheduler, state)
    unwrapped = accelerator.unwrap_model(unet, keep_torch_compile=False)
    power_ema = args.ema_snapshot_steps and PowerEMA(accelerator, unwrapped, output_dir, args.ema_snapshot_steps)
    set_seed(args.seed, device_specific=True)  # dropout, where the UNet has it, differs between processes
    resume_run(args, accelerator, state, ema, lr_scheduler, [optimizer])
    settle_scaling_factor(args, accelerator, state, pipeline, key_codes)
    scheduler = pipeline.scheduler
    check_guide_step(args, state)
    if power_ema:
        power_ema.check_resumed(state.global_step)
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    millions = sum(parameter.numel() for parameter in unwrapped.parameters()) / 1e6
    logger.info("%d key codes, scaled by %g; %d a step", len(key_codes), args.scaling_factor, global_batch)
    logger.info("%.1f M parameters", millions)

    def held_out_loss(latents, noise, timesteps) -> torch.Tensor:
        """That of training, without classes: those of held-out images may be unknown."""
        no_class = None if class_names is None else timesteps.new_full(timesteps.shape, len(class_names))
        return training_loss(unwrapped, scheduler, latents, noise, timesteps, args.snr_gamma, no_class)

    log = StepLog(accelerator, state, args.max_train_steps, global_batch, args.logging_steps)
    skipped = SkippedSteps(state, args.max_nonfinite_steps, args.logging_steps, output_dir)
    due, step_loss = False, torch.zeros((), device=accelerator.device)
    batches = training_batches(args, accelerator, key_codes, state, class_names)
    unet.train()
    while state.global_step < args.max_train_steps:
        with log.waiting():
            number, latents, labels = next(batches)
        noise, timesteps = draw_noise(
            latents.shape, args.seed, number, accelerator, scheduler.config.num_train_timesteps
        )
        with accelerator.accumulate(unet):
            loss = training_loss(unet, scheduler, latents, noise, timesteps, args.snr_gamma, labels)
            accelerator.backward(loss)
            log.add({"loss": loss.detach()})
            step_loss += loss.detach()
            if accelerator.sync_gradients:
                finite = step_if_finite(accelerator, [optimizer], args.max_grad_norm, step_loss)
                step_loss.zero_()
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        ema.step(unwrapped.parameters())
        state.global_step += 1
        state.images_seen += global_batch
        skipped.add(finite)
        log.step({"learning_rate": lr_scheduler.get_last_lr()[0]})
        step, stop = state.global_step, terminated.received()
        last = step == args.max_train_steps
        due = due or step % args.checkpointing_steps == 0  # and waits for a step that is finite
        saves = (due and skipped.read()) or last or stop
        if step == args.guide_step and accelerator.is_main_process:
            keep_guide(unwrapped, ema, output_dir)
        validates = validation and (last or (step % args.validation_steps == 0 and not stop))
        if saves or validates:
            skipped.read()
            check_weights([unwrapped], state, output_dir)
        if power_ema:
            power_ema.step(state, last)
        if validates:
            with naming_the_last_checkpoint(output_dir, "the validation"):
                validation(pipeline, ema, state, held_out_loss)
            log.restart_clock()
        if saves:
            due = False
            save_checkpoint(accelerator, output_dir, step, args.checkpoints_total_limit)
            log.restart_clock()
        if stop and not last:
            logger.info("Stopped by SIGTERM; go on with --resume_from_checkpoint latest.")
            return

    if accelerator.is_main_process:
        save_result(args, pipeline, unwrapped, ema)
        summary = summarize_run(args, accelerator, state, None if args.streaming else len(dataset), unwrapped)
        if class_images is not None:
            summary["class_images"] = class_images
        finish_run(args, summary)


def main(argv=None):
    """A whole run."""
    args = parse_args(argv)
    with start_run(args) as accelerator:
        train(args, accelerator)


if __name__ == "__main__":
    main()

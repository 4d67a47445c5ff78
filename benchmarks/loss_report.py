"""What compare_losses.py measures of a run, and its report: table, curves, reconstructions."""

import collections
import functools
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from comparison import BATCH_SIZE, line_colors, origin, reconstructions, spread, training_rows
from timing import interleaved, medians

from brics_diffusers.data import evaluation_loader
from brics_diffusers.metrics.feature_distances import (
    KID_SCALE,
    collection_features,
    frechet_distance,
    kernel_distance,
    name_with_features,
)
from brics_diffusers.metrics.feature_extractors import load_feature_extractor
from brics_diffusers.metrics.image_features import cached_features
from brics_diffusers.metrics.perceptual import load_perceptual_network, perceptual_is_cached
from brics_diffusers.metrics.reconstruction import reconstruction_metrics
from brics_diffusers.models.loading import load_autoencoder
from brics_diffusers.training_utils.run import load_splits
from brics_diffusers.utils.image_grids import image_grid
from brics_diffusers.utils.plots import new_figure
from brics_diffusers.utils.reports import machine, markdown_table, write_report


TIMING_ROUNDS = 5
ENLARGED_SIDE = 128  # pixels; smaller images are enlarged twice in the picture


def saved_steps(folder: Path) -> list[int]:
    """Steps at which a run has kept its averaged weights."""
    return sorted(int(path.name.removeprefix("autoencoder-")) for path in folder.glob("autoencoder-[0-9]*"))


def measure(args, run, train_set, validation_set) -> dict:
    """
    Metrics of all weights that a run has kept, from its folder if they are there: of the last, and a curve that has
    rFID of fewer images.
    """
    if validation_set is None or len(validation_set) < 2:
        raise ValueError(f"{args.dataset_name} has fewer than 2 images to hold out; give a larger collection.")
    names = ("extractor", "num_reference_images", "num_curve_images", "num_kid_images")
    settings, path = {name: getattr(args, name) for name in names}, run.folder / "measures.json"
    if path.exists():
        measures = json.loads(path.read_text())
        if measures["settings"] == settings:
            return measures
    measures = {"settings": settings} | _measure(args, run, train_set, validation_set)
    path.write_text(json.dumps(measures, indent=2) + "\n")
    return measures


@torch.no_grad()
def _measure(args, run, train_set, validation_set) -> dict:
    size, network = run.flags.autoencoder["sample_size"], run.flags.perceptual_network
    metric = load_perceptual_network(network).to(args.device) if perceptual_is_cached(network) else None
    extractor = load_feature_extractor(args.extractor, args.device)
    rfid, kid = (name_with_features(name, extractor) for name in ("rfid", "kid"))
    rows, cache = training_rows(len(train_set)), Path(args.output_dir) / "features"
    rows = {name: rows[: getattr(args, f"num_{name}_images")] for name in ("reference", "curve", "kid")}
    most = max(rows["reference"], rows["kid"], key=len)

    def originals(dataset):
        return cached_features(dataset, size, extractor, cache, device=args.device, progress=False)[0].features

    # Whichever number of rows is taken, they are the first of `most`, and so are their features: unreadable images
    # have none, neither here nor among the reconstructions.
    of_training, of_held_out = originals(train_set.select(most)), originals(validation_set)
    references = of_training[: args.num_kid_images]

    def features(model, dataset, rows=None):
        loader = evaluation_loader(dataset, size, BATCH_SIZE, rows=rows)
        return collection_features(reconstructions(model, loader), extractor, args.device, progress=False)

    def training_distance(model, rows):
        made = features(model, train_set, rows)
        return frechet_distance(made, of_training[: len(made)]), len(made)

    curve = []
    for step in saved_steps(run.folder):
        model = load_autoencoder(str(run.folder / f"autoencoder-{step}")).to(args.device).eval()
        loader = evaluation_loader(validation_set, size, BATCH_SIZE)
        metrics = reconstruction_metrics(model, loader, metric, progress=False)
        held_out = len(metrics.pop("index"))
        point = {"step": step} | {name: values.mean().item() for name, values in metrics.items()}
        point[rfid], num_curve_images = training_distance(model, rows["curve"])
        curve.append(point)
    last = dict(curve[-1])
    last[rfid], num_reference_images = training_distance(model, rows["reference"])
    reconstructed = features(model, validation_set)
    last[kid] = KID_SCALE * kernel_distance(reconstructed, references)
    last[f"{kid}_originals"] = KID_SCALE * kernel_distance(of_held_out, references)
    last[f"{kid}_above_originals"] = last[kid] - last[f"{kid}_originals"]
    last[f"{kid}_from_originals"] = KID_SCALE * kernel_distance(reconstructed, of_held_out, paired=True)
    counts = {"held_out": held_out, "rfid": num_reference_images, "curve": num_curve_images, "kid": len(references)}
    return {"images": counts, "last": last, "curve": curve}


def training_seconds(args, runs: dict) -> dict[str, float]:
    """
    Seconds of all steps of every variant, without reading images: each kind of step (the discriminator learns or
    counts, or R1 is due) times how often it comes. The variants take turns.
    """
    steps, counts = {}, {}
    accelerator = None
    for name, (first, *_) in runs.items():
        flags = first.flags
        if accelerator is None:
            accelerator = Accelerator(cpu=args.device.type == "cpu", mixed_precision=flags.mixed_precision)
            train_set, _ = load_splits(flags)
            loader = evaluation_loader(train_set, flags.autoencoder["sample_size"], flags.train_batch_size)
            images = next(iter(loader))["pixel_values"].to(accelerator.device)
        trainer = first.trainer(accelerator)
        kinds = [step_kind(trainer, step) for step in range(flags.max_train_steps)]
        for kind, count in collections.Counter(kinds).items():
            counts[name, kind] = count
            steps[name, kind] = functools.partial(trainer.step, images, kinds.index(kind))
    interleaved(steps, accelerator.device, rounds=1)  # warms up
    times = medians(interleaved(steps, accelerator.device, TIMING_ROUNDS))
    return {name: sum(counts[key] * times[key] for key in steps if key[0] == name) for name in runs}


def step_kind(trainer, step: int) -> tuple[bool, ...]:
    """What a step costs depends on: whether a discriminator learns, counts, and is penalised."""
    if trainer.adversary is None or not trainer.adversary.learns(step):
        return ()
    return trainer.adversary.counts(step), step % trainer.args.gradient_penalty_interval == 0


HEADINGS = {"psnr": "PSNR", "ssim": "SSIM"}


def table_rows(runs: dict, measures: dict, seconds: dict) -> list[dict]:
    """A line a variant: mean and standard deviation over the seeds."""
    first, rows = next(iter(runs)), []
    for name, of_seeds in measures.items():
        row = {"loss": name}
        for key in of_seeds[0]["last"]:
            if key != "step":
                digits = {"psnr": 2, "ssim": 3}.get(key, 4 if "perceptual" in key or "lpips" in key else 2)
                row[HEADINGS.get(key, key)] = spread([found["last"][key] for found in of_seeds], digits)
        rows.append(row | {"training time": round(seconds[name] / seconds[first], 2)})
    return rows


def plot_curves(runs: dict, measures: dict):
    """PSNR, perceptual distance and rFID over the steps, a line a seed, and when the discriminator comes in."""
    first = next(iter(measures.values()))[0]
    names = [name for name in first["curve"][-1] if name not in ("step", "ssim")]
    figure, (row,) = new_figure(len(names), width=5.5, height=4.2)
    colors = line_colors(runs)
    for axes, name in zip(row, names, strict=True):
        for variant, of_seeds in measures.items():
            for found in of_seeds:
                points = [(point["step"], point[name]) for point in found["curve"]]
                label = variant if found is of_seeds[0] and axes is row[0] else None
                axes.plot(*zip(*points, strict=True), color=colors[variant], linewidth=1, label=label)
        for (step, what), style in zip(discriminator_starts(runs).items(), (":", "--"), strict=False):
            label = f"the discriminator {what}" if axes is row[0] else None
            axes.axvline(step, color="black", linestyle=style, linewidth=1, label=label)
        images = first["images"]["curve"] if name.startswith("rfid") else first["images"]["held_out"]
        kind = "training" if name.startswith("rfid") else "held-out"
        axes.set(xlabel="step", ylabel=f"{HEADINGS.get(name, name)}\n{images} {kind} images")
        axes.grid(alpha=0.3)
        if name.startswith("rfid"):
            axes.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def discriminator_starts(runs: dict) -> dict[int, str]:
    """What the discriminator does from which step on, in the first variant that has one."""
    flags = [of_seeds[0].flags for of_seeds in runs.values() if of_seeds[0].flags.adversarial_weight > 0]
    if not flags:
        return {}
    counts, learns = flags[0].gan_start_step, flags[0].discriminator_start_step
    return {counts: "learns and counts"} if learns in (None, counts) else {learns: "learns", counts: "counts"}


@torch.no_grad()
def picture(args, runs: dict, columns: int = 8):
    """Held-out images, and below them the reconstructions of each variant's first seed."""
    first = next(iter(runs.values()))[0]
    _, dataset = load_splits(first.flags)
    rows = range(0, len(dataset), max(len(dataset) // columns, 1))[:columns]
    loader = evaluation_loader(dataset, first.flags.autoencoder["sample_size"], columns, rows=rows)
    images = next(iter(loader))["pixel_values"].to(args.device)
    shown = [images]
    for run, *_ in runs.values():
        model = load_autoencoder(str(run.folder / "autoencoder")).to(args.device).eval()
        shown.append(model(images).sample.float())
    shown = torch.cat(shown)
    if shown.shape[-1] <= ENLARGED_SIDE:
        shown = F.interpolate(shown, scale_factor=2, mode="nearest")
    return image_grid(shown, columns=len(images))


def loss_in_words(flags) -> str:
    """The loss of a run, with its weights and what goes with the discriminator."""
    words = f"{flags.mse_weight:g} MSE"
    if flags.perceptual_weight > 0:
        words += f" + {flags.perceptual_weight:g} {flags.perceptual_network}"
    if flags.adversarial_weight == 0:
        return words
    ratio = " x ratio of gradients" if flags.adaptive_gan_weight else ""
    start = flags.gan_start_step if flags.discriminator_start_step is None else flags.discriminator_start_step
    words += f" + {flags.adversarial_weight:g}{ratio} adversarial from step {flags.gan_start_step} (full weight after "
    words += f"{flags.gan_warmup_steps} more; the discriminator learns from {start}); R1 with gamma "
    words += f"{flags.gradient_penalty_weight:g} every {flags.gradient_penalty_interval} steps"
    words += "" if flags.lazy_r1_correction else ", Adam not corrected for it"
    return words + f"; augmentation {flags.augmentation or 'none'}"


def report_text(args, runs: dict, measures: dict, table: list[dict], on: dict) -> str:
    """The Markdown file."""
    first, flags = next(iter(measures.values()))[0], next(iter(runs.values()))[0].flags
    images, size, seeds = first["images"], flags.autoencoder["sample_size"], ", ".join(map(str, args.seeds))
    losses = [{"loss": name, "in full": loss_in_words(of_seeds[0].flags)} for name, of_seeds in runs.items()]
    rows = f"\nRows of the picture, seed {args.seeds[0]}: images, {', '.join(runs)}.\n" if args.show_images else ""
    return f"""# What perceptual and adversarial losses are worth: {Path(args.dataset_name).name}

{origin(on)}

Config `{Path(args.config).stem}`, {flags.max_train_steps} steps of {flags.train_batch_size} images of {size} x {size};
seeds {seeds}; averaged weights, protocol `standard`. Mean ± standard deviation over the seeds.

{markdown_table(table)}
PSNR, SSIM and the perceptual distance: means over {images["held_out"]} held-out images. The perceptual distance is of
the kind that is trained with; features of {args.extractor} are in no loss. rFID: between
{images["rfid"]} images of the training split and their own reconstructions. KID (times 1,000): of the held-out
images' reconstructions from {images["kid"]} training images; `originals`: of the held-out images themselves,
`above_originals`: the difference, 0 for a perfect autoencoder, which says little where the held-out images themselves
are far from the training images; `from_originals`: of the reconstructions from those images, no image compared with
its own reconstruction, 0 for a perfect autoencoder too. Training time: seconds of all steps in units of the first
row's, the variants taking turns, without reading images.

{markdown_table(losses)}{rows}"""


def write_loss_report(args, runs: dict) -> None:
    """Writes JSON, Markdown and pictures of finished runs, a list a variant, into `args.output_dir`."""
    measures = {
        name: [measure(args, run, *load_splits(run.flags)) for run in of_seeds] for name, of_seeds in runs.items()
    }
    seconds, on = training_seconds(args, runs), machine(args.device)
    table = table_rows(runs, measures, seconds)
    details = {
        run.folder.name: {"flags": [f"--config={Path(args.config).stem}", *run.words[1:]], **found}  # no path of ours
        for name, of_seeds in runs.items()
        for run, found in zip(of_seeds, measures[name], strict=True)
    }
    means = {
        name: {key: statistics.mean(found["last"][key] for found in of_seeds) for key in of_seeds[0]["last"]}
        for name, of_seeds in measures.items()
    }
    result = {"machine": on, "config": Path(args.config).stem, "table": table, "means": means}
    result |= {"training_seconds": seconds, "runs": details}
    figures = {"curves": plot_curves(runs, measures)}
    if args.show_images:
        figures["reconstructions"] = picture(args, runs)
    write_report(args.output_dir, "losses", result, report_text(args, runs, measures, table, on), figures)

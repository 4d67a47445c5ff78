"""What compare_generation.py measures of finished runs, and its report: table, curves, samples, nearest images."""

import statistics
from functools import partial
from pathlib import Path

import torch
from autoencoder_models import encode, latent_deviation, psnr_with_noise
from comparison import BATCH_SIZE, line_colors, origin, spread

from brics_diffusers.data import evaluation_loader
from brics_diffusers.metrics.feature_distances import (
    FEW_IMAGES,
    KID_SCALE,
    frechet_distance,
    kernel_distance,
    name_with_features,
)
from brics_diffusers.metrics.feature_extractors import extractor_description
from brics_diffusers.metrics.generation import precision_recall
from brics_diffusers.metrics.image_features import cached_features, to_uint8
from brics_diffusers.metrics.nearest_neighbours import (
    FeatureEmbedding,
    embed_images,
    nearest_in_collection,
    neighbour_grid,
    squared_distances,
)
from brics_diffusers.metrics.reconstruction import image_batches
from brics_diffusers.utils.image_grids import image_grid
from brics_diffusers.utils.plots import new_figure
from brics_diffusers.utils.reports import machine, markdown_table, write_report


COLUMNS = 8  # samples of a run in the picture
NUM_NEIGHBOURS = 4


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def code_errors(space, latents: torch.Tensor) -> dict[str, float]:
    """
    How far latents (N, C, H, W) are from encoded ones, as root mean squares over their elements in units of the
    training latents' standard deviation, means over the latents: `nearest_code`, to the nearest one of a training
    image, and `encoded_again`, to what the encoder makes of their own image.
    """
    latents = latents if space.bound is None else latents.clamp(-space.bound, space.bound)
    unit = latent_deviation(space.latents).item() * latents[0].numel() ** 0.5
    nearest = squared_distances(latents.flatten(1), space.latents.flatten(1)).min(dim=1).values.sqrt()
    again = [space.encode(space.decode(part).clamp(-1, 1)) for part in latents.to(space.device).split(BATCH_SIZE)]
    moved = (torch.cat(again).cpu() - latents).flatten(1).norm(dim=1)
    return {"nearest_code": nearest.mean().item() / unit, "encoded_again": moved.mean().item() / unit}


def variance_shares(latents: torch.Tensor) -> list[float]:
    """How much of the variance of latents (N, C, H, W) is along each principal direction of the C channels."""
    covariance = torch.atleast_2d(torch.cov(latents.transpose(0, 1).flatten(1).double()))
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    return (variances / variances.sum()).tolist()


@torch.no_grad()
def psnr_with_errors(space, validation_set, size: int, errors: list[float]) -> list[float]:
    """PSNR of held-out images from codes with noise, each of a size in the units of [`code_errors`]."""
    loader = evaluation_loader(validation_set, size, BATCH_SIZE)
    batches = image_batches(loader, space.device, progress=False)
    batches = [(encode(space.autoencoder, images), images, rows) for images, rows in batches]
    unit = latent_deviation(space.latents).item() * space.deviation
    return [psnr_with_noise(space.autoencoder, batches, error * unit) for error in errors]


def features_of(args, images, extractor) -> torch.Tensor:
    """Features (N, D) of a collection's images at the size of the comparison, kept in a cache."""
    cache = Path(args.output_dir) / "features"
    return cached_features(images, args.size, extractor, cache, device=args.device, progress=False)[0].features


def distances(features: torch.Tensor, references: torch.Tensor, extractor) -> dict[str, float]:
    """KID, Fréchet distance, precision and recall of samples by an extractor's features."""
    found = {"kid": KID_SCALE * kernel_distance(features, references), "fid": frechet_distance(features, references)}
    found |= precision_recall(features, references)
    return {name_with_features(name, extractor): value for name, value in found.items()}


def measure(run, references: torch.Tensor, validation_set, extractor, others: dict) -> dict:
    """Metrics of a run's last samples; `others` are references by other extractors."""
    samples, last = run.samples(), {name: value for name, value in run.curve[-1].items() if name != "step"}
    last |= distances(samples["features"], references, extractor)
    for other, of_other in others.items():
        features = embed_images(samples["images"].to(run.space.device), FeatureEmbedding(other), BATCH_SIZE)
        last |= distances(features.cpu(), of_other, other)
    last |= code_errors(run.space, samples["latents"])
    errors = [last["encoded_again"], 0.0]
    last["psnr_with_errors"], last["psnr"] = psnr_with_errors(run.space, validation_set, run.args.size, errors)
    return last


def measure_space(space, references: torch.Tensor, extractor) -> dict:
    """
    What the autoencoder alone does to held-out images, and to the training images that are compared with, no image
    compared with its own reconstruction.
    """
    kid = name_with_features("kid", extractor)
    held_out = kernel_distance(space.held_out_reconstruction_features, references)
    of_training = kernel_distance(space.reconstruction_features, references, paired=True)
    found = {f"{kid}_of_reconstructions": held_out, f"{kid}_of_training_reconstructions": of_training}
    found = {name: KID_SCALE * value for name, value in found.items()}
    of_codes = {"deviation": space.deviation, "variance_shares": variance_shares(space.latents)}
    return found | of_codes | code_errors(space, space.held_out)


def heading_with_features(heading: str, extractor) -> str:
    """The heading of a metric of the extractor's features, for instance `KID (efficientnet-lite2)`."""
    return f"{heading} ({extractor_description(extractor)['name']})"


def table_row(name: str, schedule: str, found: list[dict], of_spaces: list[dict], extractor, others: dict) -> dict:
    """A line of the table: mean and standard deviation over the seeds, of UNets and of autoencoders."""
    kid, heading_of = name_with_features("kid", extractor), partial(heading_with_features, extractor=extractor)
    headings = {
        "kid": ("KID", 0),
        "fid": ("Fréchet distance", 1),
        "precision": ("precision", 2),
        "recall": ("recall", 2),
    }

    def cell(key: str, digits: int) -> str:
        return spread([values[key] for values in found], digits)

    row = {"latents of": name, "schedule": schedule, heading_of("KID"): cell(kid, 0)}
    row[heading_of("KID from own reconstructions")] = cell(f"{kid}_from_reconstructions", 0)
    of_reconstructions = [values[f"{kid}_of_reconstructions"] for values in of_spaces]
    row[heading_of("KID of reconstructions")] = spread(of_reconstructions, 0)
    for judge in (extractor, *others):
        for key, (heading, digits) in headings.items():
            row[heading_with_features(heading, judge)] = cell(name_with_features(key, judge), digits)
    for heading, key in (("to the nearest code", "nearest_code"), ("encoded again", "encoded_again")):
        row[heading] = f"{cell(key, 2)} ({statistics.mean(values[key] for values in of_spaces):.2f})"
    row["PSNR, codes as wrong"] = f"{cell('psnr_with_errors', 2)} ({cell('psnr', 2)})"
    row["denoising, s"], row["decoding, s"] = cell("denoising_seconds", 3), cell("decoding_seconds", 3)
    return row


def plot_curves(args, by_variant: dict, extractor):
    """KID over the steps, a line a seed: from training images and from the autoencoders' own reconstructions."""
    kid = name_with_features("kid", extractor)
    kinds = {kid: "training images", f"{kid}_from_reconstructions": "own reconstructions"}
    figure, axes = new_figure(len(args.schedules), len(kinds), width=5.5, height=4.0)
    colors = line_colors(args.models)
    for (key, of_what), row in zip(kinds.items(), axes, strict=True):
        for plot in row[1:]:
            plot.sharey(row[0])
        for schedule, plot in zip(args.schedules, row, strict=True):
            for name in args.models:
                for index, run in enumerate(by_variant[name, schedule]):
                    points = [(point["step"], point[key]) for point in run.curve]
                    label = name if index == 0 and plot is axes[0][0] else None
                    plot.plot(*zip(*points, strict=True), color=colors[name], linewidth=1, marker=".", label=label)
            plot.set(xlabel="step", ylabel=f"KID x 1,000 from {of_what}", title=f"schedule {schedule}")
            plot.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def nearest_picture(args, firsts: list, train_set, extractor):
    """The first sample of some runs, and the training images nearest to it by the extractor's features."""
    queries = torch.cat([run.samples()["images"][:1] for run in firsts])
    count = min(NUM_NEIGHBOURS, len(train_set))
    distances, rows, _ = nearest_in_collection(
        queries, train_set, FeatureEmbedding(extractor), count, BATCH_SIZE, device=args.device, progress=False
    )
    loader = evaluation_loader(train_set, args.size, BATCH_SIZE, rows=rows.flatten().tolist())
    neighbours = torch.cat([to_uint8(batch["pixel_values"]) for batch in loader])
    return neighbour_grid(queries, neighbours.unflatten(0, rows.shape), distances)


def report_text(args, table: list[dict], result: dict, extractor) -> str:
    """The Markdown file."""
    flags, on, counts, seeds = args.flags, result["machine"], result["images"], ", ".join(map(str, args.seeds))
    kid = name_with_features("kid", extractor)
    headings = {
        f"{kid}_of_reconstructions": heading_with_features("KID of reconstructions", extractor),
        f"{kid}_of_training_reconstructions": heading_with_features("KID of training reconstructions", extractor),
        "deviation": "latents divided by",
        "nearest_code": "to the nearest code",
        "encoded_again": "encoded again",
    }
    alone = []
    for name, found in result["autoencoders"].items():
        row = {heading: spread([values[key] for values in found.values()], 2) for key, heading in headings.items()}
        shares = zip(*(values["variance_shares"] for values in found.values()), strict=True)
        row["variance by direction, %"] = ", ".join(f"{100 * statistics.mean(share):.0f}" for share in shares)
        alone.append({"latents of": name} | row)
    of_seed = f"of seed {args.autoencoder_seed}" if args.autoencoder_seed is not None else "of the same seeds"
    one = "One seed: exploratory, differences may be chance. " if len(args.seeds) == 1 else ""
    few = (
        f"The Fréchet distance is biased with fewer than {FEW_IMAGES:,} samples and compares within this table only. "
        if args.num_samples < FEW_IMAGES
        else ""
    )
    judges = " and ".join([args.extractor, *args.more_extractors])
    pictures = ", ".join(f"{row['latents of']} ({row['schedule']})" for row in table)
    nearest = ", ".join(f"{name} ({args.schedules[0]})" for name in args.models)
    shown = f"Rows of nearest training images, first sample each: {nearest}.\n" if args.show_images else ""
    return f"""# What latents are worth to a diffusion model: {Path(args.dataset_name).name}, {args.size} x {args.size}

{origin(on)}

Images of {args.size} x {args.size}. One UNet of {result["parameters"] / 1e6:.1f} M parameters,
{flags.max_train_steps} steps of {flags.train_batch_size}
latents out of {counts["latents"]}, {args.flags.scheduler.get("prediction_type", "v_prediction")}, the same timesteps
and order of images for all, and for latents of one shape the same noise; averaged weights.
{args.num_samples} samples of the same noise too,
DPM-Solver++ (2M) with {args.num_inference_steps} steps. Seeds of the UNets {seeds}; autoencoders {of_seed}. Mean ±
standard deviation over the seeds. {one}Schedule a: cosine of Nichol and Dhariwal with min-SNR-5; b: cosine variant;
b-min-snr: that with min-SNR-5.

{markdown_table(table)}
KID (times 1,000) and the rest by features of {judges}, from {counts["references"]} training images; `from own
reconstructions`: from the autoencoder's reconstructions of these; `of reconstructions`: of {counts["held_out"]}
held-out images' reconstructions from the training images; the held-out
images themselves are at {result[f"{kid}_held_out"]:.0f}. {few}Distances of codes are root mean squares over a code's
elements, in units of the standard deviation of the training images' codes, means over the samples, and in brackets
over the held-out images: to the nearest code of a training image (or of its mirror image, if these are trained on),
and from a code to that of the image which it is decoded to. `PSNR, codes as wrong`: of held-out images whose codes
have noise of the size of the latter, and in brackets none. Seconds are for one image (on a CPU: of all its cores,
other work left out).

The autoencoders alone, of held-out images; `of training reconstructions`: of those of the training images, from these,
no image compared with its own, where a perfect diffusion model would end. Latents, and key codes less 0.5, are divided
by their standard deviation over the training images, or key codes by one over --scaling_factor if that is given. The
variance is that along the principal directions of the channels, means over the seeds: a share of nearly none is a
direction in which the latents hardly vary.

{markdown_table(alone)}
Rows of samples, seed {args.seeds[0]}: {pictures}.
{shown}"""


def write_generation_report(args, runs: list, references, train_set, validation_set, extractor, others: dict) -> None:
    """
    Writes JSON, Markdown and pictures of finished runs into `args.output_dir`; `references` are features of training
    images, and `others` those of other extractors.
    """
    by_variant = {(name, schedule): [] for name in args.models for schedule in args.schedules}
    for run in runs:
        by_variant[run.name, run.schedule].append(run)
    held_out = features_of(args, validation_set, extractor)
    found = {run.folder.name: measure(run, references, validation_set, extractor, others) for run in runs}
    spaces = {run.space.name: run.space for run in runs}
    measured = {name: measure_space(space, references, extractor) for name, space in spaces.items()}
    autoencoders = {
        name: {run.space.name: measured[run.space.name] for run in by_variant[name, args.schedules[0]]}
        for name in args.models
    }
    table = [
        table_row(
            *variant,
            [found[run.folder.name] for run in group],
            [*autoencoders[variant[0]].values()],
            extractor,
            others,
        )
        for variant, group in by_variant.items()
    ]
    counts = {"references": len(references), "held_out": len(held_out), "latents": len(runs[0].space.latents)}
    details = {run.folder.name: run.settings | {"curve": run.curve, "last": found[run.folder.name]} for run in runs}
    means = {
        f"{name}, {schedule}": {
            key: statistics.mean(found[run.folder.name][key] for run in group) for key in found[group[0].folder.name]
        }
        for (name, schedule), group in by_variant.items()
    }
    result = {"machine": machine(args.device), "config": Path(args.config).stem, "images": counts}
    result |= {"parameters": runs[0].num_parameters(), "autoencoders": autoencoders, "table": table, "means": means}
    kid_held_out = f"{name_with_features('kid', extractor)}_held_out"
    result |= {kid_held_out: KID_SCALE * kernel_distance(held_out, references), "runs": details}
    firsts = [group[0] for group in by_variant.values()]
    samples = torch.cat([pixels(run.samples()["images"][:COLUMNS]) for run in firsts])
    figures = {"curves": plot_curves(args, by_variant, extractor)}
    figures["samples"] = image_grid(samples, min(COLUMNS, args.num_samples))
    if args.show_images:
        of_first_schedule = [by_variant[name, args.schedules[0]][0] for name in args.models]
        figures["nearest"] = nearest_picture(args, of_first_schedule, train_set, extractor)
    text = report_text(args, table, result, extractor)
    write_report(args.output_dir, "generation", result, text, figures)

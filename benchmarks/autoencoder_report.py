"""The report of compare_autoencoders.py: costs of the models, table, curves, noise on the codes, reconstructions."""

import statistics

import torch
from autoencoder_models import decode, encode, latent_deviation, psnr_with_noise
from comparison import origin, spread
from diffusers import VQModel
from timing import interleaved, medians

from brics_diffusers import BricsAutoencoder
from brics_diffusers.analysis.cost import count_multiply_adds
from brics_diffusers.data import evaluation_loader
from brics_diffusers.metrics.reconstruction import image_batches, reconstruction_metrics
from brics_diffusers.training_utils.ema import averaged_weights
from brics_diffusers.utils.image_grids import image_grid
from brics_diffusers.utils.reports import machine, markdown_table, write_report


NOISES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)  # of the latents' standard deviation
DECODING_ROUNDS = 15


def model_costs(model) -> dict:
    """Parameters by part in millions, and multiply-adds in 10**9 of decoding one image."""

    def millions(*names):
        parts = [getattr(model, name) for name in names if getattr(model, name, None) is not None]
        return sum(parameter.numel() for part in parts for parameter in part.parameters()) / 1e6

    codes = torch.zeros(1, *latent_shape(model), device=model.device)
    lookup = {}
    if isinstance(model, BricsAutoencoder):  # not of a kind that is counted for a codebook either
        lookup = count_multiply_adds(lambda: model.eval().retrieve(codes))
    total = count_multiply_adds(lambda: model.eval().decode(codes))["Global"]
    return {
        "encoder M": millions("encoder", "quant_conv"),
        "grids or codebook M": millions("grids", "quantize"),
        "MLPs and decoder M": millions("mlp", "decoder", "post_quant_conv"),
        "decoder G": total - lookup.get("FeatureGrids", 0.0),
    }


def latent_shape(model) -> tuple[int, int, int]:
    """Channels, height and width of the latents of an image of `sample_size`."""
    config = model.config
    side = config.sample_size // 2 ** (len(config.down_block_types) - 1)
    return config.get("key_channels") or config.latent_channels, side, side


def latent_text(model) -> str:
    """What the decoder is given, in words."""
    channels, height, width = latent_shape(model)
    if isinstance(model, VQModel):
        return f"{height} x {width} of {model.config.num_vq_embeddings} codes"
    return f"{height} x {width} x {channels}"


@torch.no_grad()
def decoding_seconds(runs: dict, batch_size: int) -> dict[str, float]:
    """Seconds of decoding a batch by every model of the first seed, the models taking turns: medians of rounds."""
    steps, device = {}, next(iter(runs.values()))[0].model.device
    for name, (first, *_) in runs.items():
        model = first.model.eval()
        latents = torch.rand(batch_size, *latent_shape(model), device=device)
        steps[name] = lambda model=model, latents=latents: decode(model, latents)
    interleaved(steps, device, rounds=2)  # warms up
    return medians(interleaved(steps, device, DECODING_ROUNDS))


def training_psnr(run, train_set) -> float:
    """PSNR of as many training images as there are held-out ones, evenly spaced: how far a model learned by heart."""
    rows = range(0, len(train_set), max(len(train_set) // run.curve[-1]["images"], 1))[: run.curve[-1]["images"]]
    loader = evaluation_loader(train_set, run.model.config.sample_size, run.args.train_batch_size, rows=rows)
    with averaged_weights(run.model, run.ema) as model:
        return reconstruction_metrics(model, loader, progress=False)["psnr"].mean().item()


@torch.no_grad()
def noise_curve(run, dataset) -> dict:
    """
    PSNR of held-out images from latents with noise of `NOISES` times their standard deviation; that deviation; and for
    BRICS the noise of its training in units of it.
    """
    loader = list(evaluation_loader(dataset, run.model.config.sample_size, run.args.train_batch_size))
    with averaged_weights(run.model, run.ema) as model:
        batches = [(encode(model, images), images, rows) for images, rows in image_batches(loader, model.device)]
        deviation = latent_deviation(torch.cat([latents for latents, *_ in batches])).item()
        psnr = [psnr_with_noise(model, batches, noise * deviation) for noise in NOISES]
        noisy = isinstance(model, BricsAutoencoder) and model.config.regularization == "noise"
        trained = model.key_noise_scale / deviation if noisy else None
    return {"deviation": deviation, "training_noise": trained, "psnr": psnr}


def seconds_until(run, psnr: float) -> float | None:
    """Seconds of training until a validation PSNR, between validations by a straight line; `None` if never."""
    last = {"seconds": 0.0, "psnr": float("-inf")}
    for point in run.curve:
        if point["psnr"] >= psnr:
            if last["psnr"] == float("-inf"):
                return point["seconds"]
            share = (psnr - last["psnr"]) / (point["psnr"] - last["psnr"])
            return last["seconds"] + share * (point["seconds"] - last["seconds"])
        last = point
    return None


def table_row(name: str, runs: list, reference: list, decoding: dict, noise: list[dict], train_set) -> dict:
    """A model's line in the report; times in units of the reference's, of the same seeds."""
    row = {"model": name, **model_costs(runs[0].model), "latent": latent_text(runs[0].model)}
    digits = {"psnr": 2} | dict.fromkeys(("ssim", "lpips", "perceptual_efficientnet_lite0"), 3)
    for key in [key for key in digits if key in runs[0].curve[-1]]:
        row[key.upper()] = spread([run.curve[-1][key] for run in runs], digits[key])
    row["PSNR, training images"] = spread([training_psnr(run, train_set) for run in runs], 2)
    row["PSNR, latents with 5% noise"] = spread([curve["psnr"][NOISES.index(0.05)] for curve in noise], 2)
    seconds = [run.seconds / other.seconds for run, other in zip(runs, reference, strict=True)]
    goal = [other.curve[-1]["psnr"] for other in reference]
    until = [seconds_until(run, psnr) for run, psnr in zip(runs, goal, strict=True)]
    shares = [value / other.seconds for value, other in zip(until, reference, strict=True) if value is not None]
    row |= {"steps": runs[0].last_step, "training time": spread(seconds, 2)}
    some = f"with {len(shares)} of {len(runs)} seeds" if shares else "never"
    row["time until the first's PSNR"] = spread(shares, 2) if len(shares) == len(runs) else some
    return row | {"decoding time": decoding[name] / decoding[reference[0].name]}


def plot_curves(runs: dict, noise: dict):
    """Validation PSNR over steps and over seconds of training, a line a seed, and over noise on the latents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    over_steps, over_time, over_noise = figure.subplots(1, 3)
    reference = next(iter(runs.values()))[0]
    over_steps.set(xlabel="step", ylabel="validation PSNR (dB)")
    over_time.set(xlabel=f"seconds of training / those of {reference.name}")
    over_noise.set(xlabel="noise on the latents / their standard deviation")
    for index, (name, of_seeds) in enumerate(runs.items()):
        for run in of_seeds:
            style = {"color": f"C{index}", "label": name if run is of_seeds[0] else None, "linewidth": 1}
            psnr = [point["psnr"] for point in run.curve]
            over_steps.plot([point["step"] for point in run.curve], psnr, **style)
            style["label"] = None
            over_time.plot([point["seconds"] / reference.seconds for point in run.curve], psnr, **style)
        means = [statistics.mean(values) for values in zip(*(curve["psnr"] for curve in noise[name]), strict=True)]
        over_noise.plot(NOISES, means, color=f"C{index}", marker=".")
    figure.legend(loc="outside lower center", ncols=4)
    for axes in (over_steps, over_time, over_noise):
        axes.grid(alpha=0.3)
    last = [run.curve[-1]["psnr"] for of_seeds in runs.values() for run in of_seeds]
    for axes in (over_steps, over_time):
        axes.set_ylim(min(last) - 6, max(last) + 0.5)
    return figure


@torch.no_grad()
def picture(runs: dict, dataset, show_images: bool, columns: int = 8):
    """Held-out images, unless they are not to be shown, and below them the reconstructions of each first seed."""
    model = next(iter(runs.values()))[0].model
    rows = range(0, len(dataset), max(len(dataset) // columns, 1))[:columns]
    batch = next(iter(evaluation_loader(dataset, model.config.sample_size, columns, rows=rows)))
    images = batch["pixel_values"].to(model.device)
    shown = [images] if show_images else []
    for first, *_ in runs.values():
        with averaged_weights(first.model, first.ema) as model:
            shown.append(model(images).sample)
    return image_grid(torch.cat(shown), columns=len(images))


def report_text(args, runs: dict, table: list[dict], noise: dict, on: dict, num_images: int) -> str:
    """The Markdown file."""
    first = next(iter(runs.values()))[0]
    last, size, seeds = first.curve[-1], first.model.config.sample_size, ", ".join(map(str, args.seeds))
    settings = [
        {"model": name}
        | {
            key: of_seeds[0].settings[key] or ""
            for key in ("optimizer", "learning_rate", "part_learning_rates", "adam_beta2", "warmup")
        }
        for name, of_seeds in runs.items()
    ]
    noises = []
    for name, curves in noise.items():
        means = [statistics.mean(values) for values in zip(*(curve["psnr"] for curve in curves), strict=True)]
        row = {"model": name} | {f"{share:.0%}": f"{mean:.2f}" for share, mean in zip(NOISES, means, strict=True)}
        row["standard deviation"] = spread([curve["deviation"] for curve in curves], 3)
        trained = [curve["training_noise"] for curve in curves]
        noises.append(row | {"BRICS' noise in training": "" if trained[0] is None else spread(trained, 3)})
    loss, weight, network = f"{args.mse_weight:g} MSE", args.perceptual_weight, args.perceptual_network
    loss += f" + {weight:g} perceptual ({network})" if weight > 0 else ""
    unreadable = f" ({args.unreadable.summary()})" if args.unreadable.count else ""
    perceptual = f"The perceptual distance is that of {network}.\n"
    if args.measured_network is None:
        perceptual = f"The perceptual distance of {network} was not measured: its weights are not there.\n"
    each = "each seed" if len(args.seeds) > 1 else "the seed"
    return f"""# BRICS beside diffusers' autoencoders: {args.config}

{origin(on)}

Steps of {args.train_batch_size} images, mirrored at random, out of {num_images}{unreadable}; loss {loss} and each
model's own regularizer; seeds {seeds}, the same weights' seed, order of images and shape of the schedule for all of
{each}. Validation: {last["images"]} held-out images of {size} x {size}, averaged weights, protocol `standard`. Mean ±
standard deviation over the seeds of the mean over the images.
{perceptual}
{markdown_table(table)}
M: million parameters. G: 10⁹ multiply-adds of decoding one image; lookups in grids and codebook are not counted. Times
are in units of the first row's: of the training steps (on a CPU: of all its cores, other work left out), without
reading images; until the held-out PSNR that the first row ends with; and of decoding a batch of
{args.train_batch_size}, the models taking turns. PSNR of training images: of as many as are held out, not mirrored.

PSNR in dB from latents with noise, in shares of their standard deviation (the root mean square over the channels of
each one's own), and that deviation; BRICS' codes are clipped to [0, 1]:

{markdown_table(noises)}
How each was trained:

{markdown_table(settings)}
Rows of the picture, first seed: {"; ".join([*(["images"] if args.show_images else []), *runs])}.
"""


def write_comparison(args, runs: dict, train_set, validation_set) -> None:
    """Writes JSON, Markdown and pictures of finished runs, a list a model, into `args.output_dir`."""
    reference, on = next(iter(runs.values())), machine(args.device)
    noise = {name: [noise_curve(run, validation_set) for run in of_seeds] for name, of_seeds in runs.items()}
    decoding = decoding_seconds(runs, args.train_batch_size)
    table = [table_row(name, of_seeds, reference, decoding, noise[name], train_set) for name, of_seeds in runs.items()]
    details = {
        run.folder.name: {**run.settings, "seconds": run.seconds, "curve": run.curve, "noise": curve}
        for name, of_seeds in runs.items()
        for run, curve in zip(of_seeds, noise[name], strict=True)
    }
    result = {"machine": on, "config": args.config, "num_training_images": len(train_set)}
    result |= {"unreadable": args.unreadable.names, "noises": NOISES, "decoding_seconds": decoding}
    result |= {"table": table, "runs": details}
    text = report_text(args, runs, table, noise, on, len(train_set))
    figures = {"curves": plot_curves(runs, noise), "reconstructions": picture(runs, validation_set, args.show_images)}
    write_report(args.output_dir, "search" if args.search else "comparison", result, text, figures)

"""The report of compare_autoencoders.py: costs of the models, table, curves and reconstructions."""

import torch
from diffusers import VQModel
from torch.utils.flop_counter import FlopCounterMode

from brics_diffusers.data import evaluation_loader
from brics_diffusers.evaluation import reconstruction_metrics
from brics_diffusers.perceptual import LPIPS_WEIGHTS
from brics_diffusers.reports import machine, markdown_table, write_report
from brics_diffusers.training_utils import averaged_weights
from brics_diffusers.visualization import image_grid


def model_costs(model) -> dict:
    """Parameters by part in millions, and multiply-adds in 10**9 of decoding one image."""

    def millions(*names):
        parts = [getattr(model, name) for name in names if getattr(model, name, None) is not None]
        return sum(parameter.numel() for part in parts for parameter in part.parameters()) / 1e6

    codes = torch.zeros(1, *latent_shape(model), device=model.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval().decode(codes)
    return {
        "encoder M": millions("encoder", "quant_conv"),
        "grids or codebook M": millions("grids", "quantize"),
        "MLPs and decoder M": millions("mlp", "decoder", "post_quant_conv"),
        "decoder G": counter.get_total_flops() / 2e9,
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


def training_psnr(run, train_set) -> float:
    """PSNR of as many training images as there are held-out ones, evenly spaced: how far a model learned by heart."""
    rows = range(0, len(train_set), max(len(train_set) // run.curve[-1]["images"], 1))[: run.curve[-1]["images"]]
    loader = evaluation_loader(train_set, run.model.config.sample_size, run.args.train_batch_size, rows=rows)
    with averaged_weights(run.model, run.ema) as model:
        return reconstruction_metrics(model, loader, progress=False)["psnr"].mean().item()


def table_row(name: str, run, reference, train_set) -> dict:
    """A run's line in the report; training time in units of the reference's."""
    point = run.curve[-1]
    row = {"model": name, **model_costs(run.model), "latent": latent_text(run.model)}
    for key, digits in (("psnr", 2), ("ssim", 3), ("lpips", 3)):
        if key in point:
            row[key.upper()] = f"{point[key]:.{digits}f} ± {point[key + '_2sd']:.{digits}f}"
    row["PSNR, training images"] = training_psnr(run, train_set)
    return row | {"learning rate": f"{run.settings['learning_rate']:g}", "time": run.seconds / reference.seconds}


def plot_curves(runs: dict):
    """Validation PSNR over steps, and over training time in units of what the first run took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    name, reference = next(iter(runs.items()))
    over_steps.set(xlabel="step", ylabel="validation PSNR (dB)")
    over_time.set(xlabel=f"training time / that of {name}")
    for name, run in runs.items():
        psnr = [point["psnr"] for point in run.curve]
        over_steps.plot([point["step"] for point in run.curve], psnr, marker=".", label=name)
        over_time.plot([point["seconds"] / reference.seconds for point in run.curve], psnr, marker=".")
    figure.legend(loc="outside lower center", ncols=4)
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.3)
    return figure


@torch.no_grad()
def picture(runs: dict, dataset, show_images: bool, columns: int = 8):
    """A row of held-out images, unless they are not to be shown, and below it one of reconstructions for every run."""
    model = next(iter(runs.values())).model
    rows = range(0, len(dataset), max(len(dataset) // columns, 1))[:columns]
    batch = next(iter(evaluation_loader(dataset, model.config.sample_size, columns, rows=rows)))
    images = batch["pixel_values"].to(model.device)
    shown = [images] if show_images else []
    for run in runs.values():
        with averaged_weights(run.model, run.ema) as model:
            shown.append(model(images).sample)
    return image_grid(torch.cat(shown), columns=len(images))


def report_text(args, runs: dict, table: list[dict], on: dict, num_images: int) -> str:
    """The Markdown file."""
    reference = next(iter(runs.values()))
    last, size = reference.curve[-1], reference.model.config.sample_size
    curves = [
        {"step": point["step"]} | {name: f"{run.curve[index]['psnr']:.2f}" for name, run in runs.items()}
        for index, point in enumerate(reference.curve)
    ]
    loss = f"{args.mse_weight:g} MSE" + (f" + {args.lpips_weight:g} LPIPS (VGG)" if args.lpips_weight > 0 else "")
    unreadable = f" ({args.unreadable.summary()})" if args.unreadable.count else ""
    unmeasured = f"LPIPS was not measured: torch's cache has no `{LPIPS_WEIGHTS['vgg']}`, its backbone's weights.\n"
    return f"""# BRICS beside diffusers' autoencoders: {args.config}

`{on["command"]}`

{on["device"]}; torch {on["torch"]}, diffusers {on["diffusers"]}.

{last["step"]} steps of {args.train_batch_size} images, mirrored at random, out of {num_images}{unreadable};
loss {loss} and each model's own regularizer; seed {args.seed}. Validation: {last["images"]} held-out images of
{size} x {size}, averaged weights, protocol `standard`, mean ± two standard deviations over the images.
{"" if "lpips" in last else unmeasured}
{markdown_table(table)}
M: million parameters. G: 10⁹ multiply-adds of decoding one image; lookups in grids and codebook are not counted. Time
of the training steps (on a CPU: of all its cores), without reading images, in units of the first row's. PSNR of
training images: as many of them as are held out, not mirrored.

Validation PSNR in dB:

{markdown_table(curves)}
Rows of the picture: {", ".join([*(["images"] if args.show_images else []), *runs])}.
"""


def write_comparison(args, runs: dict, train_set, validation_set) -> None:
    """Writes JSON, Markdown and pictures of finished runs into `args.output_dir`."""
    reference, on = next(iter(runs.values())), machine(args.device)
    table = [table_row(name, run, reference, train_set) for name, run in runs.items()]
    details = {name: {**run.settings, "seconds": run.seconds, "curve": run.curve} for name, run in runs.items()}
    result = {"machine": on, "config": args.config, "num_training_images": len(train_set)}
    result["unreadable"] = args.unreadable.names
    result |= {"table": table, "runs": details}
    text = report_text(args, runs, table, on, len(train_set))
    figures = {"curves": plot_curves(runs), "reconstructions": picture(runs, validation_set, args.show_images)}
    name = "learning-rates" if args.sweep else "comparison" if args.ablate is None else "ablation"
    write_report(args.output_dir, name, result, text, figures)

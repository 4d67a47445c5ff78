"""20 steps of DPM-Solver++ and 50 of DDIM beside 1000 ancestral steps: time, and quality where the images are given.

Samples of all samplers begin with the same noise. Quality is the Fréchet distance of features of a small network with
random weights (`random-conv`), which needs no download and whose numbers compare only with each other. A CPU works in
float32 and bfloat16, and quality is that of bfloat16, which is faster where a processor has AMX. A GPU works in
float16 too, and its denoising loop also runs with PyTorch's check for host synchronisation, with a generator of the
GPU's (noise from one of the CPU's would be copied).
"""

import functools
import tempfile
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DModel
from timing import interleaved, medians, seconds

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.data import load_collection
from brics_diffusers.metrics.feature_distances import name_with_features
from brics_diffusers.metrics.generation import generation_metrics, load_extractors
from brics_diffusers.pipelines.sampling import SAMPLERS as SCHEDULERS
from brics_diffusers.pipelines.sampling import load_pipeline, sample_images_to_folder, with_scheduler
from brics_diffusers.utils.reports import markdown_table


# Name, class (the pipeline's own for `None`), options and steps; the last is the one to beat.
SAMPLERS = (
    ("DPM-Solver++", *SCHEDULERS["DPM-Solver++"], 20),
    ("DDIM", *SCHEDULERS["DDIM"], 50),
    ("ancestral", *SCHEDULERS["own"], 1000),
)
FEATURES = "random-conv"
FRECHET = f"Fréchet distance ({FEATURES})"
# Half precision is worth trying where hardware has it; CPUs have no float16 that is faster than float32.
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
CONFIG = yaml.safe_load((Path(__file__).parents[1] / "training/configs/noto-emoji-64.yaml").read_text())
SMALL_AUTOENCODER, SMALL_UNET = CONFIG["autoencoder"], CONFIG["unet"]


def untrained_pipeline(autoencoder: dict, unet: dict) -> BricsKeyCodePipeline:
    """A pipeline with random weights: as fast as a trained one."""
    torch.manual_seed(0)
    model = BricsAutoencoder(**autoencoder).eval()
    channels, size, _ = model.key_code_shape
    denoiser = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **unet).eval()
    return BricsKeyCodePipeline(model, denoiser, CosineVariantScheduler())


def sample(pipe, num_steps: int, batch_size: int) -> None:
    """One batch, up to the pixels; noise is drawn where the pipeline works."""
    pipe(batch_size, num_steps, generator=torch.Generator(pipe.device).manual_seed(0), output_type="pt")


def host_synchronisation(pipe, num_steps: int) -> str:
    """What makes the host wait for a GPU in the denoising loop, or that nothing does; it cannot be told on a CPU."""
    device = pipe.device
    if device.type != "cuda":
        return "not applicable"
    pipe.scheduler.set_timesteps(num_steps)
    latents = torch.randn(1, *pipe.autoencoder.key_code_shape, device=device)
    generator = [torch.Generator(device).manual_seed(0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            pipe._denoise(latents, pipe.scheduler.timesteps, generator, 0.0, None, [])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def quality(pipe, dataset, num_images: int, num_steps: int, cache_dir: str, batch_size: int = 64) -> float:
    """Fréchet distance of `num_images` samples from the collection, whose features are kept in `cache_dir`."""
    extractors = load_extractors(["fid"], FEATURES, device=pipe.device)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        sample_images_to_folder(pipe, folder, num_images, batch_size, num_steps, progress=False)
        samples = load_collection(folder)
        found = generation_metrics(samples, dataset, extractors, batch_size, device=pipe.device, cache_dir=cache_dir)
    return found["metrics"][name_with_features("fid", FEATURES)]


def time_compiled(pipe, batch_size: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Time of the compiled UNet and decode by that of the plain ones."""
    latents = torch.randn(batch_size, *pipe.autoencoder.key_code_shape, device=device, dtype=pipe.unet.dtype)
    arguments = {"UNet": (latents, torch.zeros((), device=device)), "decode": (latents.sigmoid(),)}
    ratios = {}
    for name, function in (("UNet", pipe.unet), ("decode", pipe.autoencoder.decode)):
        steps = {
            how: functools.partial(kind, *arguments[name])
            for how, kind in (("plain", function), ("compiled", torch.compile(function)))
        }
        interleaved(steps, device, rounds=1)  # compiles
        times = medians(interleaved(steps, device, rounds))
        ratios[name] = times["compiled"] / times["plain"]
    return ratios


@torch.no_grad()
def measure(
    device: str = "cpu",
    rounds: int = 1,
    batch_size: int = 2,
    samplers: tuple = SAMPLERS,
    pipeline: str | None = None,
    dataset_name: str | None = None,
    num_images: int = 64,
    compiled: bool = False,
    autoencoder: dict | None = None,
    unet: dict | None = None,
) -> dict:
    """
    Runs everything and returns the numbers: `"samplers"` (rows), `"pipeline"` (its name), `"batch"`, and `"compiled"`
    (ratios) where asked for, which takes minutes on a CPU. Times are given in units of the last sampler's. Without a
    trained pipeline a small one of random weights is measured, with models of `autoencoder` and `unet`; quality needs
    its images, `dataset_name`.
    """
    device = torch.device(device)
    dataset = load_collection(dataset_name) if pipeline and dataset_name else None
    rows = []
    with tempfile.TemporaryDirectory() as cache_dir:
        judge = functools.partial(quality, dataset=dataset, num_images=num_images, cache_dir=cache_dir)
        for dtype in DTYPES[device.type]:
            if pipeline:
                pipe = load_pipeline(pipeline, device=device)
            else:
                pipe = untrained_pipeline(autoencoder or SMALL_AUTOENCODER, unet or SMALL_UNET).to(device)
            pipe.set_progress_bar_config(disable=True)
            if dtype != torch.float32:  # diffusers warns of any conversion
                pipe.to(dtype)
            pipes = {name: with_scheduler(pipe, kind, options) for name, kind, options, _ in samplers}
            steps = {
                name: functools.partial(sample, pipes[name], num_steps, batch_size) for name, *_, num_steps in samplers
            }
            seconds(next(iter(steps.values())), device)  # warms up
            times = medians(interleaved(steps, device, rounds))
            judged = dataset is not None and (device.type == "cuda" or dtype == DTYPES[device.type][-1])
            for name, *_, num_steps in samplers:
                rows.append(
                    {
                        "sampler": name,
                        "steps": num_steps,
                        "dtype": str(dtype).removeprefix("torch."),
                        "seconds an image": times[name] / batch_size,
                        "its time / the last one's": times[name] / times[samplers[-1][0]],
                        FRECHET: judge(pipes[name], num_steps=num_steps) if judged else None,
                        "host synchronisation": host_synchronisation(pipes[name], num_steps),
                    }
                )
    result = {"samplers": rows, "pipeline": Path(pipeline).name if pipeline else None, "batch": batch_size}
    if dataset is not None:
        result["num_images"] = num_images
    if compiled:
        result["compiled"] = time_compiled(pipe, batch_size, device, rounds + 2)
    return result


def describe(result: dict) -> str:
    """The part of the report."""
    weights = f"`{result['pipeline']}`" if result["pipeline"] else "A small pipeline of random weights"
    if "num_images" in result:
        measured = f"Fréchet distance of {result['num_images']} samples from the images, features `{FEATURES}`"
    else:
        measured = "quality was not measured: that takes a trained pipeline and its images (`--dataset_name`)"
    text = f"{weights}, batch {result['batch']}, up to the pixels; {measured}.\n\n{markdown_table(result['samplers'])}"
    if "compiled" in result:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["compiled"].items())
        text += f"\nTime with `torch.compile` / time without, in {result['samplers'][-1]['dtype']}: {ratios}.\n"
    return text

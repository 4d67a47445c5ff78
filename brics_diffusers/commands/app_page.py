"""A page in the browser to try a pipeline: samples, reconstructions, interpolations. Gradio is needed for it alone."""

from collections.abc import Callable
from numbers import Real
from types import ModuleType

import torch
from diffusers import DDPMScheduler
from PIL import Image

from ..data import center_crop_resize, read_image
from ..pipelines import BricsKeyCodePipeline
from ..pipelines.sampling import SAMPLERS, with_scheduler
from ..utils.sizes import size_text


MAX_SEED = 2**53 - 1  # a browser rounds larger whole numbers
MAX_IMAGES = 16
USUAL_STEPS = {"DPM-Solver++": 20, "SDE-DPM-Solver++": 50, "DDIM": 50}  # the model's own says its config
ANY_CLASS = "any"  # what no class of a pipeline is called, or it can't be chosen
# Small pictures are enlarged, pixel by pixel; labels of single ones stand above them, not on them.
STYLE = """
.picture img, .pictures img { image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%; }
.picture img { padding: 32px 4px 4px; }
"""
# What a computer has: bold letters of Gradio's own font are incomplete.
FONTS = {"font": ("ui-sans-serif", "system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}


def import_gradio() -> ModuleType:
    """Imports Gradio, or says how to install it."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio; install it with `pip install brics-diffusers[app]`.") from error
    return gradio


def sample(
    pipe: BricsKeyCodePipeline,
    seed: int,
    num_inference_steps: int,
    sampler: str,
    num_images: int = 4,
    class_label: str = ANY_CLASS,
    callback_on_step_end: Callable | None = None,
) -> list[Image.Image]:
    """
    What the tab "Sample" shows: what `pipe(num_images, generator=torch.Generator().manual_seed(seed))` makes, with
    `class_labels` if a class is chosen. `sampler` is one of `SAMPLERS`; numbers out of range are a `ValueError`.
    """
    pipe, options = _prepare(pipe, seed, num_inference_steps, sampler, callback_on_step_end)
    if class_label != ANY_CLASS:
        options["class_labels"] = class_label
    return pipe(_whole_number(num_images, "number of images", 1, MAX_IMAGES), **options).images


def reconstruct(
    pipe: BricsKeyCodePipeline,
    seed: int,
    num_inference_steps: int,
    sampler: str,
    image: str | None,
    strength: float = 0.0,
    callback_on_step_end: Callable | None = None,
) -> tuple[Image.Image, Image.Image]:
    """
    What the tab "Reconstruct" shows: the central square of an image's file as the pipeline gets it, and what it makes
    of it: with strength 0 the reconstruction, in which seed, steps and sampler take no part; with more, up to 1, a
    variation, as the pipeline's `vary` makes it.
    """
    pipe, options = _prepare(pipe, seed, num_inference_steps, sampler, callback_on_step_end)
    strength = _number(strength, "strength", 0, 1)
    square = _open_square(pipe, image, "image")
    result = pipe.reconstruct(square) if strength == 0 else pipe.vary(square, strength, **options)
    return square, result.images[0]


def interpolate(
    pipe: BricsKeyCodePipeline,
    seed: int,
    num_inference_steps: int,
    sampler: str,
    image_a: str | None,
    image_b: str | None,
    num_between: int = 6,
    strength: float = 0.3,
    callback_on_step_end: Callable | None = None,
) -> list[Image.Image]:
    """
    What the tab "Interpolate" shows: what the pipeline's `interpolate` makes, `num_between + 2` images, of files that
    are read as in [`reconstruct`].
    """
    pipe, options = _prepare(pipe, seed, num_inference_steps, sampler, callback_on_step_end)
    num_between = _whole_number(num_between, "number of images between", 1, MAX_IMAGES - 2)
    strength = _number(strength, "strength", 0, 1)
    start, end = _open_square(pipe, image_a, "first image"), _open_square(pipe, image_b, "second image")
    return pipe.interpolate(start, end, num_between + 2, strength, **options).images


def _prepare(
    pipe: BricsKeyCodePipeline, seed: int, num_inference_steps: int, sampler: str, callback: Callable | None
) -> tuple[BricsKeyCodePipeline, dict]:
    """The pipeline with a scheduler of this request's own, and the arguments that all its methods take."""
    seed = _whole_number(seed, "seed", 0, MAX_SEED)
    steps = _whole_number(num_inference_steps, "number of steps", 1, pipe.scheduler.config.num_train_timesteps)
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler is {sampler!r}; it must be one of {', '.join(map(repr, SAMPLERS))}.")
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "generator": generator, "callback_on_step_end": callback}
    return with_scheduler(pipe, *SAMPLERS[sampler]), options


def _number(value, name: str, low: float, high: float, whole: bool = False) -> float:
    """A number from the page, where a field can be empty, and whose API can be sent anything."""
    if not isinstance(value, Real) or not low <= value <= high or (whole and value % 1):
        kind = "whole number" if whole else "number"
        raise ValueError(f"the {name} is {value}; it must be a {kind} from {low} to {high}.")
    return value


def _whole_number(value, name: str, low: int, high: int) -> int:
    return int(_number(value, name, low, high, whole=True))


def _open_square(pipe: BricsKeyCodePipeline, path: str | None, name: str) -> Image.Image:
    if path is None:
        raise ValueError(f"the {name} is missing; choose a file for it.")
    channels, *size = pipe.autoencoder.sample_shape
    return center_crop_resize(read_image(path, channels), size)


def _handler(pipe: BricsKeyCodePipeline, function: Callable) -> Callable:
    """One of the functions above for Gradio: with a bar of the steps, and errors that the page shows."""
    gr = import_gradio()
    bar = gr.Progress()

    def handle(progress=bar, *values):  # Gradio knows the bar by its default value
        def show(pipe, index, timestep, tensors):
            timesteps = pipe.scheduler.timesteps
            left = len(timesteps) - 1 - (timesteps == timestep).nonzero()[0].item()  # the first step may be any
            progress((index + 1, index + 1 + left), desc="Denoising", unit="steps")
            return {}

        try:
            return function(pipe, *values, callback_on_step_end=show)
        except ValueError as error:
            message = str(error)
            raise gr.Error(message[:1].upper() + message[1:], print_exception=False) from error

    return handle


def build_app(pipe: BricsKeyCodePipeline):
    """
    The page. Requests are served one at a time, each with a scheduler of its own: what one asks for has no influence
    on the next. An `ImportError` without Gradio, a `ValueError` for a pipeline of another class.
    """
    gr = import_gradio()
    if not isinstance(pipe, BricsKeyCodePipeline):
        raise ValueError(f"the model is a {type(pipe).__name__}; the page needs a BricsKeyCodePipeline.")
    size, (channels, height, width) = size_text(pipe.autoencoder.config.sample_size), pipe.autoencoder.key_code_shape
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "pipeline"}  # one queue for all three buttons
    # Telemetry is off. Files that come and go with requests are deleted after a day, and when the page is closed.
    with gr.Blocks(title="BRICS", analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        gr.Markdown(f"# BRICS\nImages of {size} pixels, from key codes of {channels} x {height} x {width}.")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                settings = _settings(gr, pipe)
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Sample", id="sample"):
                    tab = _sample_tab(gr, pipe.class_names)
                    _connect(pipe, sample, settings, *tab, one_at_a_time)
                with gr.Tab("Reconstruct", id="reconstruct"):
                    tab = _reconstruct_tab(gr)
                    _connect(pipe, reconstruct, settings, *tab, one_at_a_time)
                with gr.Tab("Interpolate", id="interpolate"):
                    tab = _interpolate_tab(gr)
                    _connect(pipe, interpolate, settings, *tab, one_at_a_time)
    return app.queue(default_concurrency_limit=1, api_open=False)  # nor past the queue, by plain requests


def _connect(pipe, function: Callable, settings: list, button, inputs: list, outputs: list, limits: dict) -> None:
    button.click(_handler(pipe, function), settings + inputs, outputs, api_name=function.__name__, **limits)


def _settings(gr: ModuleType, pipe: BricsKeyCodePipeline) -> list:
    """Seed, steps and sampler, which all tabs share."""
    ancestral, usual = isinstance(pipe.scheduler, DDPMScheduler), dict(USUAL_STEPS)
    usual["own"] = pipe.config.default_num_inference_steps
    own = "ancestral" if ancestral else type(pipe.scheduler).__name__
    labels = [(f"The model's own ({own})" if name == "own" else name, name) for name in SAMPLERS]
    first = next(iter(SAMPLERS)) if ancestral else "own"  # the many steps of ancestral sampling are for who asks
    seed = gr.Number(0, label="Seed", info="The same seed gives the same pictures.", elem_id="seed")
    sampler = gr.Dropdown(labels, value=first, label="Sampler", elem_id="sampler")
    steps = gr.Slider(
        1,
        pipe.scheduler.config.num_train_timesteps,
        usual[first],
        step=1,
        precision=0,
        label="Steps",
        info="A choice of sampler sets what is usual for it.",
        elem_id="steps",
    )
    # `change`: `input` fires as well when the field is left as it was, and would undo a choice of steps.
    sampler.change(usual.get, sampler, steps, queue=False, show_progress="hidden", api_visibility="private")
    return [seed, steps, sampler]


def _gallery(gr: ModuleType, label: str, name: str):
    # PNG: what is shown and downloaded is exactly what the pipeline made.
    return gr.Gallery(
        label=label,
        show_label=False,
        format="png",
        columns=4,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],
        elem_id=f"{name}-result",
        elem_classes="pictures",
    )


def _sample_tab(gr: ModuleType, class_names: list[str] | None) -> tuple:
    inputs = [gr.Slider(1, MAX_IMAGES, 4, step=1, precision=0, label="Images")]
    if class_names:
        inputs.append(gr.Dropdown([ANY_CLASS, *class_names], value=ANY_CLASS, label="Class", elem_id="class"))
    button = gr.Button("Make images", variant="primary", elem_id="sample-button")
    return button, inputs, [_gallery(gr, "Samples", "sample")]


def _picture(gr: ModuleType, label: str, name: str, **options):
    return gr.Image(label=label, format="png", elem_id=name, elem_classes="picture", **options)


def _result(gr: ModuleType, label: str, name: str):
    return _picture(gr, label, name, height=300, interactive=False, buttons=["download", "fullscreen"])


def _upload(gr: ModuleType, label: str, name: str, height: int):
    # The file itself: the package reads images in its own way, whatever their mode and orientation.
    options = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "buttons": []}
    return _picture(gr, label, name, height=height, **options)


def _reconstruct_tab(gr: ModuleType) -> tuple:
    strength = gr.Slider(
        0,
        1,
        0,
        label="Strength",
        info="0 reconstructs, without seed, steps and sampler; more varies the image, 1 makes a new one.",
    )
    button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct-button")
    with gr.Row():
        image = _upload(gr, "Image", "reconstruct-image", height=300)
        square = _result(gr, "Its central square", "reconstruct-square")
        result = _result(gr, "Result", "reconstruct-result")
    return button, [image, strength], [square, result]


def _interpolate_tab(gr: ModuleType) -> tuple:
    with gr.Row():
        first = _upload(gr, "First image", "interpolate-first", height=230)
        second = _upload(gr, "Second image", "interpolate-second", height=230)
    with gr.Row():
        between = gr.Slider(
            1, MAX_IMAGES - 2, 6, step=1, precision=0, label="Images between", info="The ends come on top."
        )
        strength = gr.Slider(0, 1, 0.3, label="Strength", info="0 mixes key codes without the diffusion model.")
    button = gr.Button("Interpolate", variant="primary", elem_id="interpolate-button")
    return button, [first, second, between, strength], [_gallery(gr, "From the first to the second", "interpolate")]


def launch(app, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> str:
    """
    Opens the page of [`build_app`], and returns its address at once, the public one if it is shared; otherwise nothing
    is fetched from the network. An `OSError` if the port is taken; by default it is the first from 7860 that is free.
    """
    gr = import_gradio()
    _, local, public = app.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Default(**FONTS),
        css=STYLE,
    )
    return public or local

"""Opens a page in the browser to try a pipeline: samples, reconstructions and interpolations.

Seed, steps and sampler are chosen on the page, and the same choice gives the same pictures. Needs Gradio: `pip install
brics-diffusers[app]`. The page is for this machine alone, unless --host or --share says otherwise. Ctrl-C ends it.
"""

import argparse
from pathlib import Path

from ..pipelines.sampling import load_pipeline
from .app_page import build_app, import_gradio, launch
from .shared import add_device_argument, choose_device


SHOWCASE = Path(__file__).parents[2] / "model_cards/brics-fluent-emoji-128"  # where the package is a clone's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument(
        "model", nargs="?", help="Pipeline: its folder, or its name on the Hub. Default: the showcase of a clone."
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="Address to listen on; 0.0.0.0 serves all who can reach this machine. Default: %(default)s.",
    )
    parser.add_argument("--port", type=int, help="Port; by default the first from 7860 that is free.")
    parser.add_argument(
        "--share",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Open a public link through Gradio's servers as well.",
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    import_gradio()  # what is missing shows before a model is loaded
    model = args.model or str(SHOWCASE)
    if args.model is None and not SHOWCASE.is_dir():
        raise ValueError(f"No model is named, and {SHOWCASE} is not there; give a pipeline's folder or Hub name.")
    app = build_app(load_pipeline(model, device=choose_device(args.device)))
    print(f"Serving {model} at {launch(app, args.host, args.port, args.share)}", flush=True)
    app.block_thread()

"""Opens a page in the browser to try a pipeline: samples, reconstructions and interpolations.

Seed, steps and sampler are chosen on the page, and the same choice gives the same pictures. Needs Gradio: `pip install
brics-diffusers[app]`. The page is for this machine alone, unless --host or --share says otherwise. Ctrl-C ends it.
"""

import argparse

from ..pipelines.sampling import load_pipeline
from .app_page import build_app, import_gradio, launch
from .shared import add_device_argument, choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", help="Pipeline: its folder, or its name on the Hub.")
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
    app = build_app(load_pipeline(args.model, device=choose_device(args.device)))
    print(f"Serving {args.model} at {launch(app, args.host, args.port, args.share)}", flush=True)
    app.block_thread()

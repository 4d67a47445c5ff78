"""Writes a pipeline with the code of its classes, for people who don't have this package, and pushes it if asked to.

They load it by `DiffusionPipeline.from_pretrained(NAME, revision="remote-code", trust_remote_code=True)`. The code is
made from the installed package: one file beside each component's config, and pipeline.py.
"""

import argparse
from pathlib import Path

from ..hub.push import open_repository, push
from ..hub.remote_code import write_remote_code
from ..training_utils.arguments import add_hub_arguments


BRANCH = "remote-code"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("pipeline", help="A saved pipeline, or the output folder of train_key_codes.py.")
    parser.add_argument("--output_dir", default="runs/remote-code", help="Where to write. Default: %(default)s.")
    add_hub_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and pushes it."""
    write_remote_code(args.pipeline, args.output_dir)
    if not args.push_to_hub:
        print(args.output_dir)
        return
    repo_id = open_repository(args.hub_model_id or Path(args.pipeline).resolve().name, args.hub_private_repo)
    message = "Push by brics-diffusers remote-code"
    print(push(args.output_dir, repo_id, message=message, branch=BRANCH))

"""The command `brics-diffusers`: one module a subcommand, each with `add_arguments(parser)` and `run(args)`.

Nothing in the package imports from here.
"""

import argparse
import importlib
import logging
import sys

from ..training_utils.run import quiet_libraries
from ..utils.reports import make_output_folder


# Subcommands are the modules of this folder; the first line of a module's docstring is its help text.
COMMANDS = (
    "sample",
    "reconstruct",
    "reconstruct_metrics",
    "grid_usage",
    "code_statistics",
    "schedules",
    "cost",
    "generation_metrics",
    "guidance_search",
    "class_accuracy",
    "nearest_neighbours",
    "card",
    "remote_code",
    "app",
)


def main(argv: list[str] | None = None) -> None:
    """
    Entry point of `brics-diffusers`; exits with status 2 for a wrong command line, with a sentence for input that a
    command can't use.
    """
    parser = argparse.ArgumentParser(
        prog="brics-diffusers", description="Uses, measures, analyses, publishes and tries BRICS models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        text = module.__doc__.strip()
        subparser = subparsers.add_parser(
            name.replace("_", "-"),
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    try:
        if hasattr(args, "output_dir"):
            make_output_folder(args.output_dir)  # one that can't be written to shows before the work
        args.run(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"brics-diffusers {args.command}: {error}")

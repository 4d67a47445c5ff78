"""Makes or renews the model card of a run or a saved pipeline; pushes or copies it with the model if asked to.

Generated parts stand between comments, `<!-- begin NAME -->` and `<!-- end NAME -->`. Only they are replaced; all
other text stays, and so do metadata that are there. Metrics are taken from reports in the folder and in `reports`
within it: give `reconstruct-metrics` and `generation-metrics` that --output_dir.
"""

import argparse
from pathlib import Path

from ..hub.card import read_facts, write_card
from ..hub.published_files import export
from ..hub.push import open_repository, push
from ..training_utils.arguments import add_hub_arguments, add_license_argument
from ..utils.reports import make_output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("folder", help="Output folder of either training script, or a saved pipeline.")
    parser.add_argument("--export_dir", help="Copy what a push would hold to this folder, named as the model.")
    add_hub_arguments(parser)
    add_license_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes `README.md`, and copies or pushes."""
    if args.push_to_hub and args.export_dir is not None:
        raise ValueError("--export_dir and --push_to_hub exclude each other; push the run itself.")
    if args.export_dir is not None:
        read_facts(args.folder)  # a folder that holds no model makes no other
        make_output_folder(args.export_dir, "--export_dir")
        print(export(args.folder, args.export_dir, args.hub_license))
        return
    if not args.push_to_hub:
        print(write_card(args.folder, args.hub_license))
        return
    read_facts(args.folder)  # a folder that holds no model makes no repository
    repo_id = open_repository(args.hub_model_id or Path(args.folder).resolve().name, args.hub_private_repo)
    print(push(args.folder, repo_id, args.hub_license))

"""FID, inception score, precision, recall, F1, CLIP-FID and KID of generated images.

Samples are made on all processes of `accelerate launch --multi_gpu --num_processes N -m brics_diffusers.commands
generation-metrics ...` (on a CPU with `ACCELERATE_USE_CPU=true` in front of it, not with `--cpu`, which starts one
process) and kept as PNG files, so that an interrupted command continues where it stopped. All metrics but KID are
torch-fidelity's. `input1` is the generated images (--num_samples), taken as they are: all of one size. `input2` is the
real ones (all of the split, or --max_images), cut to the central part of the same proportions and resized (Lanczos) to
that size. Unreadable files are left out and counted. With other features than these, a metric's name says which:

FID: squared Fréchet distance between 2048 features of inception-v3-compat (images resized to 299 x 299, bilinear as in
TensorFlow 1), covariances unbiased.
IS: inception-v3-compat's logits without bias, of the generated images, shuffled, in 10 splits.
Precision, recall, F1: 4096 features of vgg16 after the ReLU of fc2 (images resized to 224 x 224, as for FID), all
images of both sets.
CLIP-FID: FID's distance between 512 image embeddings of CLIP ViT-B/32 (float32, not normalised), images resized to 224
x 224 as clean-fid does (Pillow's bicubic filter, rounded to uint8).
KID: unbiased squared MMD with the kernel (x.y / d + 1)^3, times 1,000, of all images of both sets (no subsets);
x and y are d = 1280 means over the pixels of efficientnet-lite2's last features (images resized to 128 x 128, bicubic,
antialiased). Its name always has the features.

--by_class compares the images of each class of a class-conditional pipeline by themselves too, where there are at
least 10 generated and 10 real ones: all but IS, and Fréchet distances only of more images than features.
"""

import argparse
from importlib import metadata

from accelerate import PartialState

from ..data import evaluation_loader, load_collection
from ..metrics.generation import (
    INCEPTION,
    KID_FEATURES,
    LEAST_OF_CLASS,
    METRICS,
    NEIGHBOURS,
    SPLITS,
    check_image_counts,
    generation_metrics,
    load_extractors,
)
from ..utils.files import default_cache_dir
from ..utils.image_grids import image_grid
from ..utils.reports import machine, make_output_folder, markdown_table
from ..utils.sizes import size_text
from .generated import (
    add_generated_arguments,
    class_names,
    is_image_folder,
    load_generated,
    make_samples,
    sample_classes,
)
from .shared import add_collection_arguments, add_run_arguments, choose_device, publish, read_collection


PRECISION_RECALL = (
    "Precision: share of input1 within input2's neighbourhoods; recall: share of input2 within input1's; "
    f"{NEIGHBOURS} neighbours."
)
__doc__ += f"\n{PRECISION_RECALL}\n"

SHOWN = 32  # images of each kind in the pictures
TITLES = {
    "fid": "FID",
    "inception_score": "IS",
    "inception_score_std": "IS, standard deviation of splits",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "clip_fid": "CLIP-FID",
    "kid": "KID x 1,000",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = parser.add_argument
    add_generated_arguments(parser, num_samples=50_000)
    add_collection_arguments(parser, split="train")
    add_run_arguments(parser, seed="the samples")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="What to compute; all by default.")
    add(
        "--feature_extractor",
        default=INCEPTION,
        metavar="NAME",
        help="For FID and IS: a name of torch-fidelity's registry, or random-conv, a small network of random weights "
        f"whose numbers compare only with each other. Default: {INCEPTION}.",
    )
    add(
        "--precision_recall_extractor",
        metavar="NAME",
        help=f"For precision and recall. Default: vgg16 beside {INCEPTION}, else that of --feature_extractor.",
    )
    add(
        "--kid_extractor",
        default=KID_FEATURES,
        metavar="NAME",
        help=f"For KID. Default: {KID_FEATURES}, of the extra learned-features.",
    )
    add("--by_class", action="store_true", help="Compare the images of each class by themselves too.")
    add("--class_column", help="Column that holds the classes of real images, as in stage two.")
    add("--features_cache_dir", help="Folder for features of real images; ~/.cache/brics_diffusers by default.")


def run(args: argparse.Namespace) -> None:
    """Makes the samples, computes the metrics on the main process and writes the report."""
    device, state = choose_device(args.device), PartialState()
    if state.is_main_process:  # what can fail does so before the samples are made
        cache_dir = make_output_folder(args.features_cache_dir or default_cache_dir(), "--features_cache_dir")
        names = class_names(args) if args.by_class else None
        real, real_classes = read_collection(args), None
        if names is not None:
            real_classes = read_classes_of(args)
        if not is_image_folder(args):
            check_image_counts(args.metrics, args.num_samples, len(real))
        extractors = load_extractors(
            args.metrics,
            args.feature_extractor,
            args.precision_recall_extractor,
            kid_extractor=args.kid_extractor,
            device=device,
        )
    folder = make_samples(args, state, device)
    if not state.is_main_process:
        return
    generated, origin = load_generated(args, folder)
    classes = None
    if names is not None:
        classes = sample_classes(origin["sampling"], len(generated), names), real_classes
    result = generation_metrics(
        generated,
        real,
        extractors,
        args.batch_size,
        args.dataloader_num_workers,
        device,
        cache_dir,
        classes,
    )
    result["input1"] |= origin
    result["input2"] |= {"source": args.dataset_name, "split": args.dataset_split}
    result["settings"] = {"neighbours": NEIGHBOURS, "splits": SPLITS}
    result["machine"] = machine(device) | {"torch-fidelity": metadata.version("torch-fidelity")}
    resolution = result["input1"]["resolution"]

    def draw() -> dict:
        pictures = {"generated": _picture(generated, resolution), "real": _picture(real, resolution)}
        return {name: picture for name, picture in pictures.items() if picture is not None}

    publish(args, "generation-metrics", result, _describe(result), draw)


def read_classes_of(args: argparse.Namespace) -> list[str]:
    """The class of each image of the collection, in its order."""
    options = {"config_name": args.dataset_config_name, "with_labels": True, "class_column": args.class_column}
    options |= {"max_images": args.max_images}
    dataset = load_collection(args.dataset_name, args.dataset_split, args.image_column, args.cache_dir, **options)
    return [dataset.features["label"].names[label] for label in dataset["label"]]


def _picture(dataset, resolution: int | tuple[int, int]):
    """The first images in a grid; nothing if none of them is readable."""
    rows = range(min(SHOWN, len(dataset)))
    (batch,) = evaluation_loader(dataset, resolution, batch_size=SHOWN, rows=rows)
    return image_grid(batch["pixel_values"]) if len(batch["pixel_values"]) else None


def _title(name: str) -> str:
    """For people, with the features in brackets if the name has them."""
    metric = max((metric for metric in TITLES if f"{name}_".startswith(f"{metric}_")), key=len)
    features = name.removeprefix(metric).strip("_").replace("_", "-")
    return f"{TITLES[metric]} ({features})" if features else TITLES[metric]


def _describe(result: dict) -> str:
    values = [{"metric": _title(name), "value": value} for name, value in result["metrics"].items()]
    columns = ("what", "source", "num_images", "num_unreadable", "resolution", "resizing")
    inputs = [{"input": name} | {column: result[name][column] for column in columns} for name in ("input1", "input2")]
    inputs = [row | {"resolution": size_text(row["resolution"])} for row in inputs]
    extractors = [{"metric": metric} | facts for metric, facts in _extractor_rows(result).items()]
    parts = ["# Generation metrics", markdown_table(values)]
    if "by_class" in result:
        parts += [markdown_table(_class_rows(result["by_class"]))]
        parts += [f"Too few: fewer than {LEAST_OF_CLASS} images of a kind. Figures of small classes vary most."]
    parts += [markdown_table(inputs), markdown_table(extractors)]
    parts += [f"Not computed: {metric} ({reason})." for metric, reason in result["not_computed"].items()]
    parts += result["remarks"]
    sampling = result["input1"]["sampling"]
    if sampling is not None:
        parts.append(
            f"Samples: {sampling['pipeline']} with {sampling['scheduler']}, {sampling['num_inference_steps']} steps, "
            f"seed {sampling['seed']}, {sampling['dtype']}."
        )
        if "guidance_scale" in sampling:
            low, high = sampling["guidance_interval"]
            classes = sampling["class_labels"] or "none in particular"
            parts.append(f"Classes: {classes}; guidance {sampling['guidance_scale']} at times {low} to {high}.")
    pictures = "The pictures show the first images of each."
    parts.append(f"{PRECISION_RECALL} {pictures}" if "precision-recall" in result["extractors"] else pictures)
    parts.append(f"{result['machine']['device']}, torch-fidelity {result['machine']['torch-fidelity']}.")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _class_rows(by_class: dict) -> list[dict]:
    metrics = dict.fromkeys(metric for found in by_class.values() for metric in found["metrics"])
    return [
        {"class": name, "generated": found["generated"], "real": found["real"]}
        | {_title(metric): found["metrics"].get(metric) for metric in metrics}
        | {"remark": "too few" if found["too_few"] else None}
        for name, found in by_class.items()
    ]


def _extractor_rows(result: dict) -> dict:
    columns = ("name", "weights", "resizing")
    return {metric: {column: facts[column] for column in columns} for metric, facts in result["extractors"].items()}

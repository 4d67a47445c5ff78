"""How close generated images are to real ones: FID, inception score, precision and recall, CLIP-FID, KID."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence

import datasets
import torch
from torch import nn

from ..data import collection_fingerprint, image_name
from ..utils.files import default_cache_dir
from .feature_distances import KID_SCALE, check_count, frechet_distance, kernel_distance, name_with_features
from .feature_extractors import CLIP_FID, extractor_description, load_feature_extractor
from .image_features import ImageFeatures, cached_features, common_image_size, extract_features


METRICS = ("fid", "inception-score", "precision-recall", "clip-fid", "kid")
INCEPTION = "inception-v3-compat"
KID_FEATURES = "efficientnet-lite2"
# With these features a metric is what everyone calls by its name; with others its name says which.
USUAL = {
    "fid": INCEPTION,
    "inception-score": INCEPTION,
    "precision-recall": "vgg16",
    "clip-fid": "clip-fid: clip-vit-b-32",
}
NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, torch-fidelity's default
SPLITS = 10  # Salimans et al. 2016, torch-fidelity's default
LEAST_OF_CLASS = 10  # images of a class, generated and real: figures of fewer are mostly chance
ROWS_AT_ONCE = 10_000  # torch-fidelity's default: distances of so many images to all are in memory


def check_image_counts(metrics: Iterable[str], generated: int, real: int) -> None:
    r"""
    Whether there are as many images as the metrics are defined for. Far more are needed for numbers that mean much.

    Args:
        metrics (`Iterable[str]`): Some of `METRICS`.
        generated (`int`): Number of generated images.
        real (`int`): Number of real images.

    Raises:
        `ValueError`: If there are too few: FID, CLIP-FID and KID need 2 of each, precision and recall 4 of each, the
        inception score 10 generated ones.
    """
    for metric in metrics:
        if metric in ("fid", "clip-fid", "kid"):
            check_count(metric, 2, generated=generated, real=real)
        elif metric == "precision-recall":
            check_count(metric, NEIGHBOURS + 1, generated=generated, real=real)
        elif metric == "inception-score":
            check_count(metric, SPLITS, generated=generated)
        else:
            raise ValueError(f"{metric!r} is no metric; give some of {', '.join(METRICS)}.")


def inception_score(logits: torch.Tensor) -> tuple[float, float]:
    r"""
    exp of the mean KL divergence of the images' class probabilities from their average, in 10 splits, by
    torch-fidelity (images are shuffled with its fixed seed).

    Args:
        logits (`torch.Tensor` of shape (N, C)): Class logits of generated images, without bias as usual.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the splits.

    Raises:
        `ValueError`: If there are fewer than 10.
    """
    from torch_fidelity import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD
    from torch_fidelity.metric_isc import isc_features_to_metric

    check_count("inception-score", SPLITS, generated=len(logits))
    score = isc_features_to_metric(logits, SPLITS)
    return score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD]


def precision_recall(
    generated: torch.Tensor, real: torch.Tensor, device: str | torch.device = "cpu"
) -> dict[str, float]:
    r"""
    Improved precision and recall of Kynkäänniemi et al. 2019 by torch-fidelity: precision is the share of generated
    images within the distance of any real image to its third nearest real one, recall the share of real images within
    that of any generated image to its third nearest generated one.

    Args:
        generated (`torch.Tensor` of shape (N, D)): Features, float32.
        real (`torch.Tensor` of shape (M, D)): Features.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where distances are computed, 10,000 rows at once.

    Returns:
        `dict`: `"precision"`, `"recall"` and `"f1"`, their harmonic mean, all in [0, 1].

    Raises:
        `ValueError`: If there are fewer than 4 of each.
    """
    from torch_fidelity import KEY_METRIC_F_SCORE, KEY_METRIC_PRECISION, KEY_METRIC_RECALL
    from torch_fidelity.metric_prc import prc_features_to_metric

    check_count("precision-recall", NEIGHBOURS + 1, generated=len(generated), real=len(real))
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": ROWS_AT_ONCE, "save_cpu_ram": True, "verbose": False}
    values = prc_features_to_metric(generated.to(device), real.to(device), **options)
    names = {"precision": KEY_METRIC_PRECISION, "recall": KEY_METRIC_RECALL, "f1": KEY_METRIC_F_SCORE}
    return {name: values[key] for name, key in names.items()}


def load_extractors(
    metrics: Iterable[str] = METRICS,
    feature_extractor: str | nn.Module = INCEPTION,
    precision_recall_extractor: str | nn.Module | None = None,
    clip_extractor: str | nn.Module = CLIP_FID,
    kid_extractor: str | nn.Module = KID_FEATURES,
    device: str | torch.device = "cpu",
) -> dict[str, nn.Module]:
    r"""
    The feature extractor of each metric.

    Args:
        metrics (`Iterable[str]`, defaults to `METRICS`): Some of `METRICS`.
        feature_extractor (`str` or `nn.Module`, defaults to `"inception-v3-compat"`):
            For FID and inception score, as in `load_feature_extractor`.
        precision_recall_extractor (`str` or `nn.Module`, *optional*):
            By default `"vgg16"` beside `"inception-v3-compat"`, as in torch-fidelity and the definition of precision
            and recall; else `feature_extractor`.
        clip_extractor (`str` or `nn.Module`, defaults to `"clip-fid"`): For CLIP-FID.
        kid_extractor (`str` or `nn.Module`, defaults to `"efficientnet-lite2"`): For KID.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where they work.

    Returns:
        `dict[str, nn.Module]`: by metric; metrics that share an extractor have the same module.
    """
    if precision_recall_extractor is None:
        precision_recall_extractor = "vgg16" if feature_extractor == INCEPTION else feature_extractor
    wanted = dict.fromkeys(("fid", "inception-score"), feature_extractor)
    wanted |= {"precision-recall": precision_recall_extractor, "clip-fid": clip_extractor, "kid": kid_extractor}
    wanted = {metric: wanted[metric] for metric in metrics}
    loaded = {extractor: load_feature_extractor(extractor, device) for extractor in dict.fromkeys(wanted.values())}
    return {metric: loaded[extractor] for metric, extractor in wanted.items()}


def generation_metrics(
    generated: datasets.Dataset,
    real: datasets.Dataset,
    extractors: dict[str, nn.Module],
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike | None = None,
    classes: tuple[Sequence[str | None], Sequence[str | None]] | None = None,
) -> dict:
    r"""
    Compares generated images (torch-fidelity's `input1`) with real ones (`input2`). Generated images are taken as they
    are and must be of one size; real ones are cut and resized to that size by `center_crop_resize`.

    Args:
        generated (`datasets.Dataset`): Result of `load_collection`.
        real (`datasets.Dataset`): Result of `load_collection`.
        extractors (`dict[str, nn.Module]`): Result of [`load_extractors`]; its keys are the metrics to compute.
        batch_size (`int`, defaults to 64): Images in a batch.
        num_workers (`int`, defaults to 0): Processes that read images.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where the extractors are.
        cache_dir (`str`, *optional*): Folder for the real images' features; `default_cache_dir()` by default.
        classes (`tuple[Sequence[str], Sequence[str]]`, *optional*):
            The class of each generated and of each real image, `None` for none: compares each class by itself too.

    Returns:
        `dict`: `"metrics"` (`"fid"`, `"inception_score"`, `"inception_score_std"`, `"precision"`, `"recall"`, `"f1"`,
        `"clip_fid"`, and `"kid_efficientnet_lite2"`, times 1,000), `"not_computed"` (metric to reason), `"remarks"`,
        `"extractors"`, `"input1"` and `"input2"`.
        With other features than are usual, a metric's name says which, for instance `"fid_random_conv"`. With classes
        also `"by_class"`: `"generated"` and `"real"` (numbers of images), `"too_few"` (fewer than 10 of either) and
        `"metrics"` of each, without the inception score, which is about all classes, and without Fréchet distances
        where images are no more than features.

    Raises:
        `ValueError`: If generated images differ in size, or there are fewer images than a metric needs.
    """
    check_image_counts(extractors, len(generated), len(real))
    resolution = common_image_size(generated)
    options = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
    result = {"metrics": {}, "not_computed": {}, "remarks": [], "extractors": {}}
    result |= {} if classes is None else {"by_class": {}}
    for extractor in dict.fromkeys(extractors.values()):
        metrics = [metric for metric, module in extractors.items() if module is extractor]
        name = extractor_description(extractor)["name"]
        first = extract_features(generated, resolution, extractor, desc=f"Generated, {name}", **options)
        second, hit = cached_features(
            real, resolution, extractor, cache_dir or default_cache_dir(), desc=f"Real, {name}", **options
        )
        check_image_counts(metrics, len(first.features), len(second.features))  # of those that are readable
        for metric in metrics:
            result["extractors"][metric] = extractor_description(extractor) | {"real_features_cached": hit}
            _add_metric(result, metric, name, first, second, device)
        if classes is not None:
            labels = _readable(generated, first, classes[0]), _readable(real, second, classes[1])
            _add_classes(result["by_class"], metrics, name, (first, second), labels, device)
        result["input1"] = _input_facts("generated", generated, first, resolution, "none: used as they are")
        result["input2"] = _input_facts("real", real, second, resolution, "central part, then Pillow's Lanczos")
    return result


def _readable(dataset: datasets.Dataset, found: ImageFeatures, labels: Sequence[str | None]) -> list[str | None]:
    """The labels of the images that have features."""
    if len(found.features) == len(labels):
        return list(labels)
    rows = (row for row in range(len(dataset)) if image_name(dataset[row]["image"], row) not in found.unreadable)
    kept = [labels[row] for row in rows]
    if len(kept) != len(found.features):
        raise ValueError(
            f"{len(found.unreadable)} images can't be read and have other names in the cache of features, so that the "
            "rest can't be told by class; remove them, or name another --features_cache_dir."
        )
    return kept


def _add_classes(by_class: dict, metrics: list[str], name: str, sets: tuple, labels: tuple, device) -> None:
    """The metrics of one extractor for each class; `sets` are the [`ImageFeatures`] of both kinds of images."""
    counts = [Counter(some) for some in labels]
    for label in sorted({*labels[0], *labels[1]} - {None}):
        generated, real = (count[label] for count in counts)
        facts = {"generated": generated, "real": real, "too_few": min(generated, real) < LEAST_OF_CLASS, "metrics": {}}
        entry = by_class.setdefault(label, facts)
        if entry["too_few"]:
            continue
        chosen = [torch.tensor([other == label for other in some]) for some in labels]
        parts = [ImageFeatures(found.features[rows], None, []) for found, rows in zip(sets, chosen, strict=True)]
        for metric in metrics:
            is_frechet = metric in ("fid", "clip-fid")
            if metric == "inception-score" or (is_frechet and min(generated, real) <= parts[0].features.shape[1]):
                continue
            _add_metric(entry, metric, name, *parts, device)


def _add_metric(result: dict, metric: str, name: str, generated, real, device) -> None:
    if metric == "inception-score":
        if generated.logits is None:
            result["not_computed"][metric] = f"{name} has no class logits, which the inception score needs"
            return
        mean, deviation = inception_score(generated.logits)
        found = {"inception_score": mean, "inception_score_std": deviation}
    elif metric == "precision-recall":
        found = precision_recall(generated.features, real.features, device)
    elif metric == "kid":
        found = {"kid": KID_SCALE * kernel_distance(generated.features.to(device), real.features.to(device))}
    else:
        found = {metric.replace("-", "_"): frechet_distance(generated.features, real.features)}
        fewest, width = min(len(generated.features), len(real.features)), generated.features.shape[1]
        if fewest <= width:
            result["remarks"].append(
                f"{metric}: {fewest} images for {width} features, so that a covariance is singular; the number is "
                "biased and compares only at equal numbers of images."
            )
    if USUAL.get(metric) != name:
        found = {name_with_features(key, name): value for key, value in found.items()}
    result["metrics"] |= found


def _input_facts(what: str, dataset, features, resolution: int | tuple[int, int], resizing: str) -> dict:
    return {
        "what": what,
        "num_images": len(features.features),
        "num_unreadable": len(features.unreadable),
        "unreadable": features.unreadable[:10],
        "resolution": resolution,
        "resizing": resizing,
        "fingerprint": collection_fingerprint(dataset),
    }

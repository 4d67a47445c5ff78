"""Metrics of generated images against definitions, brute force and torch-fidelity."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from brics_diffusers.data import load_collection
from brics_diffusers.metrics.efficientnet import efficientnet_is_installed
from brics_diffusers.metrics.feature_extractors import ClipFidFeatures, RandomConvFeatures, load_feature_extractor
from brics_diffusers.metrics.generation import (
    METRICS,
    _readable,
    check_image_counts,
    generation_metrics,
    inception_score,
    load_extractors,
    precision_recall,
)
from brics_diffusers.metrics.image_features import ImageFeatures


def random_features(count, width, seed, spread=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)  # so that features are correlated
    return torch.randn(count, width, generator=generator) @ mixing * spread + shift


def test_inception_score_equals_its_definition():
    logits = random_features(95, 12, 0)
    order = np.random.RandomState(2020).permutation(95)  # torch-fidelity's shuffle
    p = torch.softmax(logits.double()[order], dim=1).numpy()
    parts = [p[i * 95 // 10 : (i + 1) * 95 // 10] for i in range(10)]
    scores = [np.exp((q * np.log(q / q.mean(axis=0))).sum(axis=1).mean()) for q in parts]
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert inception_score(torch.zeros(20, 7)) == pytest.approx((1, 0))


class TestPrecisionRecall:
    @staticmethod
    def by_brute_force(generated, real, neighbours=3):
        def share_within(points, centres):
            inside = 0
            radii = [sorted(np.linalg.norm(centre - centres, axis=1))[neighbours] for centre in centres]
            for point in points:
                distances = np.linalg.norm(point - centres, axis=1)
                inside += any(distance <= radius for distance, radius in zip(distances, radii, strict=True))
            return inside / len(points)

        generated, real = generated.double().numpy(), real.double().numpy()
        return share_within(generated, real), share_within(real, generated)

    @pytest.mark.parametrize("seed", range(3))
    def test_equals_brute_force(self, seed):
        real = torch.randn(90, 5, generator=torch.Generator().manual_seed(seed))
        generated = torch.randn(60, 5, generator=torch.Generator().manual_seed(seed + 100)) + 0.8
        precision, recall = self.by_brute_force(generated, real)
        assert 0.1 < precision < 1 and 0.1 < recall < 1 and precision != recall
        found = precision_recall(generated, real)
        # Exact: counts, of float32 distances without ties.
        assert found["precision"] == pytest.approx(precision, abs=1e-6)
        assert found["recall"] == pytest.approx(recall, abs=1e-6)
        assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)

    def test_known_answers(self):
        real = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        assert precision_recall(real, real) == {"precision": 1, "recall": 1, "f1": 1}
        assert precision_recall(real + 100, real) == {"precision": 0, "recall": 0, "f1": 0}
        # Generated images of one kind of two: all are real-like, and half of the real ones are covered.
        other = torch.cat([real, real + 100])
        assert precision_recall(real, other) == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3})


@pytest.mark.parametrize(
    ("metric", "generated", "real"),
    [("fid", 1, 9), ("clip-fid", 9, 1), ("kid", 9, 1), ("precision-recall", 3, 99), ("precision-recall", 99, 3)],
)
def test_too_few_images(metric, generated, real):
    message = rf"{metric} needs at least \d images of each kind, got {generated} generated and {real} real; add images"
    with pytest.raises(ValueError, match=message):
        check_image_counts([metric], generated, real)
    check_image_counts([metric], 4, 4)


def test_too_few_images_for_the_functions_themselves():
    with pytest.raises(ValueError, match="precision-recall needs at least 4 images"):
        precision_recall(torch.zeros(3, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="inception-score needs at least 10 images of each kind, got 9 generated;"):
        inception_score(torch.zeros(9, 3))
    with pytest.raises(ValueError, match="'mmd' is no metric; give some of fid, inception-score"):
        check_image_counts(["mmd"], 99, 99)


def test_extractor_of_each_metric(monkeypatch):
    names = []

    def load(extractor, device):
        names.append(extractor)
        return load_feature_extractor("random-conv")

    monkeypatch.setattr("brics_diffusers.metrics.generation.load_feature_extractor", load)
    default = load_extractors()
    assert names == ["inception-v3-compat", "vgg16", "clip-fid", "efficientnet-lite2"] and list(default) == list(
        METRICS
    )
    assert default["fid"] is default["inception-score"] is not default["precision-recall"]
    names.clear()
    other = load_extractors(("fid", "precision-recall"), "random-conv")
    assert names == ["random-conv"] and other["fid"] is other["precision-recall"]


class Fidelity(torch_fidelity.FeatureExtractorBase):
    """The random network as one of torch-fidelity's extractors."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = RandomConvFeatures()

    def forward(self, images):
        return (self.network(images),)

    @staticmethod
    def get_provided_features_list():
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "features"


class NamedLikeInception(RandomConvFeatures):
    def __init__(self):
        super().__init__()
        self.description = self.description | {"name": "inception-v3-compat"}


class WithLogits(RandomConvFeatures):
    def forward(self, images):
        features = super().forward(images)
        return features, 10 * features[:, :6]


@pytest.fixture
def folders(tmp_path, image_folder):
    """24 real images of 40 x 32 pixels with an unreadable one, and 12 generated ones of 32 x 32."""
    random = np.random.default_rng(1)
    (tmp_path / "generated").mkdir()
    for index in range(12):
        coarse = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "generated" / f"{index:02d}.png")
    return tmp_path / "generated", image_folder


class TestCollections:
    def metrics(self, folders, tmp_path, extractors, **options):
        generated, real = (load_collection(folder) for folder in folders)
        return generation_metrics(generated, real, extractors, cache_dir=tmp_path / "cache", **options)

    def test_equals_torch_fidelity_on_folders(self, folders, tmp_path, monkeypatch):
        prepared = tmp_path / "prepared"  # the real images as torch-fidelity has to be given them
        prepared.mkdir()
        for path in sorted(folders[1].glob("[0-9]*.png")):
            Image.open(path).crop((4, 0, 36, 32)).save(prepared / path.name)
        monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "test", Fidelity)
        options = {"feature_extractor": "test", "cuda": False, "verbose": False, "save_cpu_ram": True}
        inputs = {"input1": str(folders[0]), "input2": str(prepared)}
        expected = torch_fidelity.calculate_metrics(fid=True, prc=True, cache=False, **inputs, **options)
        found = self.metrics(folders, tmp_path, load_extractors(("fid", "precision-recall"), "random-conv"))["metrics"]
        assert found["fid_random_conv"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
        assert found["precision_random_conv"] == pytest.approx(expected["precision"])
        assert found["precision_random_conv"] != found["recall_random_conv"]
        assert found["recall_random_conv"] == pytest.approx(expected["recall"])
        assert found["f1_random_conv"] == pytest.approx(expected["f_score"])

    def test_what_is_recorded(self, folders, tmp_path):
        clip = ClipFidFeatures(RandomConvFeatures())
        extractors = load_extractors(METRICS, "random-conv", clip_extractor=clip, kid_extractor="random-conv")
        result = self.metrics(folders, tmp_path, extractors)
        assert set(result["metrics"]) == {
            f"{metric}_random_conv" for metric in ("fid", "precision", "recall", "f1", "clip_fid", "kid")
        }
        assert "no class logits" in result["not_computed"]["inception-score"]
        assert result["metrics"]["fid_random_conv"] != result["metrics"]["clip_fid_random_conv"]
        facts = {name: result[name] for name in ("input1", "input2")}
        assert [facts[name]["what"] for name in facts] == ["generated", "real"]
        assert [facts[name]["num_images"] for name in facts] == [12, 24]
        assert [facts[name]["num_unreadable"] for name in facts] == [0, 1]
        assert facts["input2"]["unreadable"] == [str(folders[1] / "broken.png")]
        assert facts["input2"]["resolution"] == 32 and "Lanczos" in facts["input2"]["resizing"]
        assert "12 images for 128 features" in result["remarks"][0]
        assert "bicubic" in result["extractors"]["clip-fid"]["resizing"]
        assert not result["extractors"]["fid"]["real_features_cached"]
        assert self.metrics(folders, tmp_path, extractors)["extractors"]["fid"]["real_features_cached"]

    def test_names_say_of_which_features_they_are(self, folders, tmp_path):
        if not efficientnet_is_installed("efficientnet-lite2"):
            pytest.skip("the extra learned-features is not installed")
        extractors = load_extractors(("fid", "precision-recall", "kid"), NamedLikeInception(), "random-conv")
        names = ["fid", "precision_random_conv", "recall_random_conv", "f1_random_conv", "kid_efficientnet_lite2"]
        found = self.metrics(folders, tmp_path, extractors)["metrics"]
        assert list(found) == names and found["kid_efficientnet_lite2"] > 10  # they look different

    def test_inception_score_needs_logits(self, folders, tmp_path):
        result = self.metrics(folders, tmp_path, load_extractors(("fid", "inception-score"), WithLogits()))
        assert result["metrics"]["inception_score_random_conv"] > 1 and result["not_computed"] == {}

    def test_batch_size_does_not_matter(self, folders, tmp_path):
        clip = ClipFidFeatures(RandomConvFeatures())
        extractors = load_extractors(METRICS, WithLogits(), clip_extractor=clip, kid_extractor="random-conv")
        one, two = (
            self.metrics(folders, tmp_path / str(size), extractors, batch_size=size)["metrics"] for size in (1, 7)
        )
        assert one == pytest.approx(two, rel=1e-5)  # order of sums in convolutions
        assert one["inception_score_random_conv"] > 1

    def test_unreadable_images_do_not_count(self, folders, tmp_path):
        for path in sorted(folders[0].iterdir())[3:]:
            path.write_text("no image")
        with pytest.raises(ValueError, match="precision-recall needs at least 4 images of each kind, got 3 generated"):
            self.metrics(folders, tmp_path, load_extractors(["precision-recall"], "random-conv"))

    def test_mixed_sizes(self, folders, tmp_path):
        Image.new("RGB", (31, 31)).save(folders[0] / "03.png")
        with pytest.raises(ValueError, match="03.png is 31x31, but .*00.png is 32x32"):
            self.metrics(folders, tmp_path, load_extractors(["fid"], "random-conv"))


DATA = Path(__file__).parents[3] / "shared/data"


@pytest.mark.skipif(
    not DATA.is_dir(), reason="the collections noto-emoji-64 and photos-256 are not beside this checkout"
)
def test_emoji_are_nearer_to_emoji_than_to_photographs(tmp_path):
    emoji = load_collection(DATA / "noto-emoji-64", "validation", max_images=80)
    extractors = load_extractors(("fid", "precision-recall"), "random-conv")
    found = []
    for name in ("noto-emoji-64", "photos-256"):
        real = load_collection(DATA / name).shuffle(seed=0).select(range(80))  # the first ones are much alike
        found.append(generation_metrics(emoji, real, extractors, cache_dir=tmp_path)["metrics"])
    assert found[0]["fid_random_conv"] < found[1]["fid_random_conv"]
    assert found[0]["precision_random_conv"] > found[1]["precision_random_conv"]


def test_by_class(image_folder, tmp_path):
    """Each class has the figures of its images alone; a file that can't be read does not shift the classes."""
    names = ["even", "odd"] * 12
    for index in range(22):
        shutil.copy(image_folder / f"{index:02d}.png", tmp_path / f"{index:02d}.png")
        Image.open(tmp_path / f"{index:02d}.png").crop((8, 0, 40, 32)).rotate(90).save(tmp_path / f"{index:02d}.png")
    real, generated = load_collection(image_folder), load_collection(tmp_path)
    assert len(real) == 25  # one of them is broken, and is the last
    real = real.select([24, *range(24)])
    extractors = load_extractors(["fid", "precision-recall", "kid"], "random-conv", kid_extractor="random-conv")
    classes = ["rare", "rare", *names[2:21], None], ["even", *names]
    options = {"cache_dir": tmp_path / "cache"}
    result = generation_metrics(generated, real, extractors, classes=classes, **options)
    by_class = result.pop("by_class")
    assert result["metrics"] == generation_metrics(generated, real, extractors, **options)["metrics"]
    counts = {name: (found["generated"], found["real"], found["too_few"]) for name, found in by_class.items()}
    assert counts == {"even": (10, 12, False), "odd": (9, 12, True), "rare": (2, 0, True)}
    assert by_class["odd"]["metrics"] == by_class["rare"]["metrics"] == {}
    alone = generation_metrics(generated.select(range(2, 22, 2)), real.select(range(1, 25, 2)), extractors, **options)
    assert by_class["even"]["metrics"].keys() == alone["metrics"].keys() - {"fid_random_conv"}  # 32 features
    for name, value in by_class["even"]["metrics"].items():
        assert value == pytest.approx(alone["metrics"][name], rel=1e-4)
    with pytest.raises(ValueError, match="1 images can't be read and have other names in the cache of features, so"):
        _readable(real, ImageFeatures(torch.zeros(24, 3), None, ["elsewhere/broken.png"]), classes[1])

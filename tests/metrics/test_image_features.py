"""Features of whole collections, and their cache."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from brics_diffusers.data import load_collection
from brics_diffusers.data.images import to_tensor
from brics_diffusers.metrics.feature_extractors import RandomConvFeatures, load_feature_extractor
from brics_diffusers.metrics.image_features import cached_features, common_image_size, extract_features, to_uint8


class Counting(nn.Module):
    """Means of the colours; counts the images it has seen."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.float().mean(dim=(2, 3)) * self.scale, images.float().mean(dim=1).flatten(1)


def save(folder, names, size=(16, 16), seed=0):
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for name in names:
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_features_are_those_of_the_files(tmp_path):
    save(tmp_path, ["a.png", "b.png", "d.png"])
    (tmp_path / "c.png").write_text("no image")
    found = extract_features(load_collection(tmp_path), 16, load_feature_extractor(Counting()), batch_size=2)
    expected = [np.array(Image.open(tmp_path / name)).mean(axis=(0, 1)) for name in ("a.png", "b.png", "d.png")]
    np.testing.assert_allclose(found.features.numpy(), expected, rtol=1e-5)
    assert found.logits.shape == (3, 256) and found.unreadable == [str(tmp_path / "c.png")]


def test_pixels_survive_the_way_through_floats():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    pixels = levels[0].permute(1, 2, 0).numpy()
    assert (to_uint8(to_tensor(pixels, False)) == levels[0]).all()


def test_batch_size_does_not_matter(image_folder):
    dataset, extractor = load_collection(image_folder), load_feature_extractor("random-conv")
    one, two = (extract_features(dataset, 32, extractor, size, progress=False) for size in (5, 25))
    assert one.features.shape == (24, 128)
    torch.testing.assert_close(one.features, two.features, rtol=1e-5, atol=1e-5)  # order of sums in convolutions


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    dataset = load_collection(tmp_path)
    with pytest.raises(ValueError, match="none of the 1 images is readable"):
        extract_features(dataset, 16, RandomConvFeatures(), progress=False)
    with pytest.raises(ValueError, match="none of the 1 images is readable"):
        common_image_size(dataset)


def test_one_size(tmp_path):
    save(tmp_path, ["b.png", "c.png"])
    (tmp_path / "a.png").write_text("no image")
    assert common_image_size(load_collection(tmp_path)) == 16
    save(tmp_path, ["d.png"], (20, 20))
    with pytest.raises(ValueError, match="d.png is 20x20, but .*b.png is 16x16; .* must have one size"):
        common_image_size(load_collection(tmp_path))
    save(tmp_path / "wide", ["a.png"], (20, 10))
    assert common_image_size(load_collection(tmp_path / "wide")) == (10, 20)


class TestCache:
    @pytest.fixture
    def folder(self, tmp_path):
        return save(tmp_path / "images", ["a.png", "b.png"])

    @pytest.fixture
    def extractor(self):
        return load_feature_extractor(Counting())

    def features(self, folder, extractor, resolution=16):
        found, hit = cached_features(
            load_collection(folder), resolution, extractor, folder.parent / "cache", progress=False
        )
        return found, hit

    def test_second_time_nothing_is_extracted(self, folder, extractor):
        (folder / "c.png").write_text("no image")
        first, hit = self.features(folder, extractor)
        assert not hit and extractor.seen == 2 and first.logits is None
        second, hit = self.features(folder, extractor)
        assert hit and extractor.seen == 2
        assert torch.equal(first.features, second.features) and second.unreadable == [str(folder / "c.png")]

    def test_changes_are_seen(self, folder, extractor):
        before, _ = self.features(folder, extractor)
        save(folder, ["b.png"], seed=1)
        after, hit = self.features(folder, extractor)
        assert not hit and torch.equal(before.features[0], after.features[0])
        assert not torch.equal(before.features[1], after.features[1])
        save(folder, ["c.png"])
        assert not self.features(folder, extractor)[1]
        assert not self.features(folder, extractor, resolution=8)[1]
        extractor.scale.data += 1
        assert not self.features(folder, extractor)[1]
        assert not self.features(folder, load_feature_extractor("random-conv"))[1]
        assert self.features(folder, extractor)[1]

    def test_damaged_files_are_made_again(self, folder, extractor, caplog):
        first, _ = self.features(folder, extractor)
        (path,) = (folder.parent / "cache").iterdir()
        path.write_bytes(path.read_bytes()[:-4])
        again, hit = self.features(folder, extractor)
        assert not hit and torch.equal(first.features, again.features) and "is damaged" in caplog.text
        assert self.features(folder, extractor)[1]

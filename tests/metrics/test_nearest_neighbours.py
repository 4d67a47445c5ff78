"""Nearest images of a collection against brute force, and LPIPS against its own package."""

import weakref

import pytest
import torch

from brics_diffusers.data import ImageCollection, load_collection
from brics_diffusers.metrics import nearest_neighbours as module
from brics_diffusers.metrics.image_features import to_uint8
from brics_diffusers.metrics.nearest_neighbours import (
    LpipsEmbedding,
    PixelEmbedding,
    embed_images,
    load_embedding,
    near_copies,
    nearest_in_collection,
    nearest_neighbours,
    neighbour_grid,
    squared_distances,
)
from brics_diffusers.metrics.perceptual import load_lpips


def random_images(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def batches(images, sizes):
    start = 0
    for size in sizes:
        index = torch.arange(start, start + size)
        yield {"pixel_values": images[index].float() / 127.5 - 1, "index": index}
        start += size


@pytest.fixture(scope="module")
def metric():
    torch.manual_seed(0)
    return load_lpips("squeeze", pretrained=False)


class TestLpips:
    @pytest.mark.parametrize("size", [32, 48])
    def test_equals_the_lpips_package(self, metric, size):
        a, b = random_images(3, size), random_images(4, size, seed=1)
        b[0] = a[0]
        b[1] = (a[1].int() + 1).clamp(max=255).to(torch.uint8)  # a near duplicate
        embedding = LpipsEmbedding(metric)
        found = squared_distances(embedding(a), embedding(b))
        for row in range(3):
            expected = metric(a[row : row + 1].float() / 127.5 - 1, b.float() / 127.5 - 1).flatten().double()
            # float32 sums of up to a million squares; relative, so that near duplicates are held to it too
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-9)
        assert found[0, 0] == 0 and 0 < found[1, 1] < 0.1 * found[1, 2]

    def test_neighbours_equal_brute_force(self, metric):
        queries, training = random_images(3), random_images(20, seed=1)
        embedding = LpipsEmbedding(metric)
        distances, indices = nearest_neighbours(
            embedding(queries), batches(training, [7, 1, 0, 12]), embedding, num_neighbours=4
        )
        scaled = training.float() / 127.5 - 1
        brute = torch.stack([metric(query[None].float() / 127.5 - 1, scaled).flatten() for query in queries])
        expected = brute.sort(dim=1)
        assert torch.equal(indices, expected.indices[:, :4])
        torch.testing.assert_close(distances, expected.values[:, :4].double(), rtol=1e-4, atol=1e-9)

    def test_negative_weights_are_refused(self, metric):
        weight = metric.lins[0].model[-1].weight
        original = weight[0, 0].clone()
        weight[0, 0] = -1
        with pytest.raises(ValueError, match="LPIPS has negative weights"):
            LpipsEmbedding(metric)
        weight[0, 0] = original
        assert "backbone weights: random" in LpipsEmbedding(metric).description["definition"]


class TestNearestNeighbours:
    def test_pixels_are_compared_by_mean_squared_error(self):
        queries, training = random_images(2), random_images(9, seed=1)
        embedding = PixelEmbedding()
        distances, indices = nearest_neighbours(embedding(queries), batches(training, [4, 5]), embedding, 9)
        brute = ((queries[:, None].double() - training.double()) / 255).square().mean(dim=(2, 3, 4))
        assert torch.equal(indices, brute.argsort(dim=1))
        torch.testing.assert_close(distances, brute.sort(dim=1).values, rtol=1e-5, atol=0)

    def test_of_equals_the_first_comes_first(self):
        training = random_images(1).repeat(6, 1, 1, 1)
        for sizes in ([6], [1, 2, 3]):
            distances, indices = nearest_neighbours(
                PixelEmbedding()(training[:1]), batches(training, sizes), PixelEmbedding(), 4
            )
            assert indices.tolist() == [[0, 1, 2, 3]] and distances.tolist() == [[0] * 4]

    def test_only_one_batch_is_in_memory(self):
        alive, most = weakref.WeakSet(), []

        class Watched(PixelEmbedding):
            def forward(self, images):
                most.append(len(alive))
                vectors = super().forward(images)
                alive.add(vectors)
                return vectors

        training = random_images(40)
        nearest_neighbours(PixelEmbedding()(training[:2]), batches(training, [4] * 10), Watched(), 3)
        assert len(most) == 10 and max(most) <= 1  # the batch before

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [(4, "4 neighbours are wanted of 3 training images; lower"), (0, "num_neighbours is 0; give at least 1")],
    )
    def test_too_few_images(self, wanted, message):
        with pytest.raises(ValueError, match=message):
            nearest_neighbours(torch.zeros(1, 3072), batches(random_images(3), [3]), PixelEmbedding(), wanted)

    def test_collection(self, image_folder):
        dataset = load_collection(image_folder)  # row 24 is unreadable
        items = ImageCollection(dataset, 32)
        queries = torch.stack([to_uint8(items[row]["pixel_values"]) for row in (3, 17)])
        found = [
            nearest_in_collection(queries, dataset, PixelEmbedding(), 3, batch_size=size, progress=False)
            for size in (5, 100)
        ]
        assert found[0][1][:, 0].tolist() == [3, 17] and found[0][0][:, 0].tolist() == [0, 0]
        assert torch.equal(found[0][1], found[1][1]) and found[0][2].count == 1


def test_near_copies_equal_brute_force():
    training, embedding = random_images(12), PixelEmbedding()
    training[7] = training[3]  # equal images, of which none has a near copy
    queries = random_images(9, seed=1)
    for query, row in enumerate((0, 3, 5, 7)):
        noise = torch.randint(0, (2, 40)[query % 2], queries[query].shape)
        queries[query] = (training[row].long() + noise).clamp(max=255).to(torch.uint8)
    vectors = embedding(training)
    distances, indices = nearest_neighbours(embedding(queries), batches(training, [5, 7]), embedding, 2)
    rows = sorted(set(indices[:, 0].tolist()))
    of_neighbours = nearest_neighbours(vectors[rows], batches(training, [12]), embedding, 2)
    among = ((training[:, None].double() - training.double()) / 255).square().mean(dim=(2, 3, 4))
    among.fill_diagonal_(torch.inf)
    to_others = among.min(dim=1).values
    expected = [distance < to_others[row] for distance, row in zip(distances[:, 0], indices[:, 0], strict=True)]
    found = near_copies(distances, indices, of_neighbours, rows)
    assert found == expected and found[:4] == [True, False, True, False] and not all(found)


def test_batches_of_queries_do_not_matter():
    images = random_images(5)
    assert torch.equal(embed_images(images, PixelEmbedding(), 2), PixelEmbedding()(images))


class TestLoading:
    def test_names(self):
        assert isinstance(load_embedding("pixels"), PixelEmbedding)
        embedding = load_embedding("random-conv")
        assert embedding(random_images(2)).shape == (2, 128)
        assert embedding.description["definition"] == "squared distance between features of random-conv"
        with pytest.raises(ValueError, match="'lpips' is no distance; give one of lpips-vgg, lpips-alex"):
            load_embedding("lpips")

    def test_missing_weights(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        message = f"LPIPS needs alexnet-owt-7be5be79.pth, .*{tmp_path}/hub/checkpoints/, or choose another distance"
        with pytest.raises(FileNotFoundError, match=message):
            load_embedding("lpips-alex")

    def test_lpips(self, monkeypatch, metric):
        monkeypatch.setattr(module, "load_lpips", lambda network, remedy: metric)
        assert isinstance(load_embedding("lpips-squeeze"), LpipsEmbedding)


def test_grid():
    queries, neighbours = random_images(2, 40), random_images(6, 40, seed=1).unflatten(0, (2, 3))
    picture = neighbour_grid(queries, neighbours, torch.rand(2, 3))
    assert picture.size == (4 + 4 * 124 + 16, 4 + 16 + 2 * 140)  # enlarged three times
    for image, left, top in ((queries[0], 4, 20), (neighbours[1, 2], 2 * 4 + 120 + 16 + 2 * 124, 20 + 140)):
        for x, y in ((0, 0), (39, 17)):
            color = picture.getpixel((left + 3 * x + 1, top + 3 * y + 1))
            assert color == tuple(image[:, y, x].tolist())
    large = neighbour_grid(random_images(1, 128), random_images(1, 128)[None], torch.rand(1, 1))
    assert large.size == (4 + 2 * 132 + 16, 4 + 16 + 148)

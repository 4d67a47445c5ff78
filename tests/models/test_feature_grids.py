"""Feature grids against a plain loop over groups, pixels, levels and corners."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from grid_reference import (
    DYADIC,
    EXACT,
    ODD,
    TABLES,
    check_against_reference,
    exact_resolutions,
    make_grids,
    make_keys,
    reference_entry,
)

from brics_diffusers.models.grids import feature_grids
from brics_diffusers.models.grids.feature_grids import FeatureGrids, grid_resolutions
from brics_diffusers.models.grids.lookup_operator import retrieve
from brics_diffusers.models.grids.lookup_reference import pixel_centers


@pytest.fixture(params=["reference", "torch"])
def implementation(request, monkeypatch):
    """Makes every module take one of the lookups."""
    monkeypatch.setattr(feature_grids, "retrieve", functools.partial(retrieve, implementation=request.param))


@pytest.fixture
def definition(monkeypatch):
    """Makes every module take the lookup as the paper defines it."""
    monkeypatch.setattr(feature_grids, "retrieve", functools.partial(retrieve, implementation="reference"))


class TestAgainstReference:
    """The definition against plain loops; test_lookup_operator.py holds the fast lookups against the definition."""

    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("kind", ["zero", "one", "nodes", "between"])
    def test_3d(self, definition, table, kind):
        config = {"num_groups": 2, "level_channels": 3, **DYADIC, **TABLES[table]}
        check_against_reference(config, make_keys(kind, (2, 2, 1, 3)))

    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("kind", ["zero", "one", "nodes", "between"])
    def test_4d(self, definition, table, kind):
        config = {"num_groups": 2, "key_length": 2, "level_channels": 2, **DYADIC, **TABLES[table]}
        check_against_reference(config, make_keys(kind, (2, 4, 2, 1)))

    @pytest.mark.parametrize("kind", ["zero", "one", "between"])
    def test_resolutions_that_are_no_powers_of_two(self, definition, kind):
        config = {"num_groups": 3, "level_channels": 1, **ODD, **TABLES["tiled-wrapped"]}
        check_against_reference(config, make_keys(kind, (1, 3, 3, 2)))

    @pytest.mark.parametrize("kind", ["zero", "one", "between"])
    def test_4d_resolutions_that_are_no_powers_of_two(self, definition, kind):
        config = {"num_groups": 2, "key_length": 2, "level_channels": 1, **ODD, **TABLES["hash-wrapped"]}
        check_against_reference(config, make_keys(kind, (1, 4, 1, 3)))

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 1, 5), (1, 1, 5, 1)])
    def test_odd_batches_and_thin_lattices(self, definition, shape):
        config = {"num_groups": 1, "level_channels": 2, **DYADIC, **TABLES["hash-wrapped"]}
        check_against_reference(config, make_keys("between", shape))

    def test_one_cell(self, definition):
        config = {"num_groups": 1, "level_channels": 1, "num_levels": 1, "min_resolution": 1, "max_resolution": 1}
        check_against_reference({**config, **TABLES["dense"]}, make_keys("between", (1, 1, 2, 2)))


class TestWithoutCoordinates:
    def test_one_key_is_linear_interpolation(self):
        grids = make_grids(num_groups=2, level_channels=2, use_coordinates=False, **DYADIC, **TABLES["dense"])
        keys = torch.cat([make_keys(kind, (1, 2, 2, 3)) for kind in ("zero", "one", "nodes", "between")])
        entries = grids.entries.detach().split([3, 5, 9], dim=1)
        curves = [[np.interp(keys[:, group], np.linspace(0, 1, table.shape[1]), table[group, :, channel])
                   for table in entries for channel in range(2)] for group in range(2)]  # fmt: skip
        expected = torch.from_numpy(np.array(curves)).flatten(3)  # (g, levels * channels, B, H * W)
        torch.testing.assert_close(grids(keys), expected, **EXACT)

    def test_two_keys_are_bilinear_interpolation(self):
        config = {"num_levels": 1, "min_resolution": 4, "max_resolution": 4, "level_channels": 3}
        grids = make_grids(num_groups=1, key_length=2, use_coordinates=False, **config)
        keys = make_keys("between", (1, 2, 4, 5))
        image = grids.entries.detach().view(1, 5, 5, 3).permute(0, 3, 1, 2)  # rows: the second key
        expected = torch.nn.functional.grid_sample(image, keys.permute(0, 2, 3, 1) * 2 - 1, align_corners=True)
        torch.testing.assert_close(grids(keys)[0, :, 0], expected[0].flatten(1), **EXACT)

    @pytest.mark.parametrize("key_length", [1, 2])
    def test_gradcheck(self, key_length):
        config = {"num_groups": 2, "key_length": key_length, "level_channels": 1, **DYADIC, **TABLES["hash-tiny"]}
        grids = make_grids(use_coordinates=False, **config)
        keys = make_keys("between", (1, 2 * key_length, 1, 2))
        assert (keys * 8 - (keys * 8).round()).abs().min() > 1e-3  # gradcheck steps by 1e-6: no node in between

        def features(keys, entries):
            return torch.func.functional_call(grids, {"entries": entries}, (keys,))

        assert torch.autograd.gradcheck(features, (keys.requires_grad_(), grids.entries))


class TestNodes:
    """A single level whose entries depend on the key's node k only, as k squared: slopes can be told by eye."""

    @staticmethod
    def features_and_slopes(resolution, keys, dtype):
        grids = FeatureGrids(1, 1, 1, resolution, resolution, 1, grid_type="dense").to(dtype)
        node = torch.arange(grids.level_nodes[0]) // (resolution + 1) ** 2  # the key varies slowest
        grids.entries.data = node.to(dtype).square().view(1, -1, 1)
        keys = torch.tensor(keys, dtype=dtype).view(-1, 1, 1, 1).requires_grad_()
        features = grids(keys)
        return features.flatten(), torch.autograd.grad(features.sum(), keys)[0].flatten()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_slope_is_right_handed_and_the_last_cells_at_one(self, implementation, dtype):
        keys = [0.0, 0.25, 0.375, 0.5, 0.75, 1.0]
        features, slopes = self.features_and_slopes(4, keys, dtype)
        # Only at 1 does one lookup move the point, by half an ulp.
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}
        torch.testing.assert_close(features, torch.tensor([0, 1, 2.5, 4, 9, 16], dtype=dtype), **tolerance)
        torch.testing.assert_close(slopes, torch.tensor([4, 12, 12, 20, 28, 28], dtype=dtype), **tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_one_stays_in_the_last_cell_at_every_resolution(self, implementation, dtype):
        for resolution in range(1, 65):
            features, slopes = self.features_and_slopes(resolution, [1.0], dtype)
            last_slope = resolution * (resolution**2 - (resolution - 1) ** 2)
            # The position is within a few ulp of N, and N^2 has slope 2 N there. Weights of x and y sum to 1 within
            # an ulp of N each.
            tolerance = 16 * resolution * torch.finfo(dtype).eps
            assert features.item() == pytest.approx(resolution**2, rel=tolerance), resolution
            assert slopes.item() == pytest.approx(last_slope, rel=tolerance), resolution

    @pytest.mark.parametrize("kind", ["tiled-wrapped", "hash-wrapped"])
    def test_keys_a_little_outside_read_like_clipped_ones(self, implementation, kind):
        # `decode` lets codes pass that leave [0, 1] by the rounding of half precision.
        for key_length in (1, 2):
            config = {"num_groups": 1, "key_length": key_length, "level_channels": 2, **DYADIC, **TABLES[kind]}
            grids = make_grids(**config)
            keys = torch.tensor([-0.01, -1e-3, 1.001, 1.01], dtype=torch.float64).view(-1, 1, 1, 1)
            keys = keys.expand(-1, key_length, 1, 2)
            # One lookup moves 1 by half an ulp.
            torch.testing.assert_close(grids(keys), grids(keys.clamp(0, 1)), **EXACT)


class TestPrecision:
    def test_float32_is_near_float64(self, implementation):
        config = {"num_groups": 2, "num_levels": 5, "min_resolution": 16, "max_resolution": 64, "max_entries": 2**14}
        double, single = make_grids(**config), make_grids(**config).float()
        single.entries.data = double.entries.detach().float()
        keys = make_keys("between", (2, 2, 8, 6), torch.float32)
        results = []
        for grids, sample in ((double, keys.double()), (single, keys.clone())):
            features = grids(sample.requires_grad_())
            results.append((features, *torch.autograd.grad(features.square().sum(), [sample, grids.entries])))
        # Positions up to 64 are within 64 * 2^-23 = 7.6e-6 cells an axis; entries differ by up to about 8 a cell.
        # Gradients to keys are 64 times as large and sum 20 channels.
        for exact, rounded, tolerance in zip(*results, (2e-4, 5e-2, 1e-3), strict=True):
            assert rounded.dtype == torch.float32
            torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("key_length", [1, 2])
    def test_gradcheck(self, implementation, key_length):
        config = {"num_groups": 2, "key_length": key_length, "level_channels": 1, **DYADIC, **TABLES["hash-tiny"]}
        grids = make_grids(**config)
        keys = make_keys("between", (1, 2 * key_length, 1, 2))
        assert (keys * 8 - (keys * 8).round()).abs().min() > 1e-3  # gradcheck steps by 1e-6: no node in between

        def features(keys, entries):
            return torch.func.functional_call(grids, {"entries": entries}, (keys,))

        assert torch.autograd.gradcheck(features, (keys.requires_grad_(), grids.entries))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("key_length", [1, 2])
    def test_half_precision_keeps_positions_in_float32(self, implementation, dtype, key_length):
        config = {"num_levels": 3, "min_resolution": 16, "max_resolution": 64, "max_entries": 2**14}
        half = make_grids(dtype, num_groups=1, key_length=key_length, **config)
        single = make_grids(torch.float32, num_groups=1, key_length=key_length, **config)
        single.entries.data = half.entries.detach().float()
        # Both keys are exact in both types; x = 127/128 is not in bfloat16.
        keys = torch.tensor([1 - 1 / 256, 1.0], dtype=dtype).view(2, 1, 1, 1).expand(-1, key_length, 1, 64)
        features = half(keys)
        assert features.dtype == dtype
        # Same entries, same positions: all that is lost is the last cast.
        assert torch.equal(features, single(keys.float()).to(dtype))
        apart = (features[:, :, 0] - features[:, :, 1]).float()
        exact = single(keys.float())
        exact = exact[:, :, 0] - exact[:, :, 1]
        assert exact.abs().mean() > 0.05
        # Two roundings of features up to about 4.
        torch.testing.assert_close(apart, exact, rtol=0, atol=8 * torch.finfo(dtype).eps)

    def test_autocast_leaves_the_lookup_alone(self, implementation):
        grids = make_grids(torch.float32, num_groups=2, level_channels=2, **DYADIC)
        keys = make_keys("between", (2, 2, 3, 3), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            features = grids(keys)
        assert torch.equal(features, grids(keys))


class TestBatches:
    @pytest.mark.parametrize("key_length", [1, 2])
    def test_independent_of_batch_split(self, implementation, key_length):
        grids = make_grids(torch.float32, num_groups=2, key_length=key_length, level_channels=4, **DYADIC)
        keys = make_keys("between", (3, 2 * key_length, 4, 5), torch.float32)
        parts = [grids(part) for part in keys.split([1, 2])]
        assert torch.equal(grids(keys), torch.cat(parts, dim=2))

    @pytest.mark.parametrize("key_length", [1, 2])
    def test_empty_batch(self, implementation, key_length):
        grids = make_grids(num_groups=2, key_length=key_length, level_channels=2, **DYADIC)
        assert grids(torch.zeros(0, 2 * key_length, 3, 4)).shape == (2, 6, 0, 12)

    def test_channels_last_keys(self, implementation):
        grids = make_grids(num_groups=2, level_channels=2, **DYADIC)
        keys = make_keys("between", (2, 2, 4, 3))
        assert torch.equal(grids(keys.to(memory_format=torch.channels_last)), grids(keys))

    def test_transposed_keys(self, implementation):
        grids = make_grids(num_groups=2, level_channels=2, **DYADIC)
        keys = make_keys("between", (2, 2, 4, 3)).transpose(2, 3)
        assert torch.equal(grids(keys), grids(keys.contiguous()))

    def test_groups_read_their_own_grids_and_keys(self, implementation):
        grids = make_grids(num_groups=3, level_channels=2, **DYADIC)
        keys = make_keys("between", (1, 3, 2, 2)).requires_grad_()
        grad_keys, grad_entries = torch.autograd.grad(grids(keys)[1].sum(), [keys, grids.entries])
        for gradient in (grad_keys.flatten(2)[0], grad_entries.flatten(1)):
            assert gradient.abs().amax(dim=1).gt(0).tolist() == [False, True, False]


class TestResolutions:
    @pytest.mark.parametrize(
        "arguments, expected",
        [
            ((16, 4, 64), [4, 5, 6, 7, 9, 11, 13, 15, 18, 22, 26, 31, 37, 45, 54, 64]),
            ((16, 16, 64), [16, 18, 20, 22, 24, 26, 28, 31, 34, 37, 41, 45, 49, 54, 59, 64]),
            ((1, 16, 64), [16]),
            ((2, 3, 3), [3, 3]),
        ],
    )
    def test_tables(self, arguments, expected):
        assert grid_resolutions(*arguments) == expected

    def test_equals_integer_arithmetic(self):
        for arguments in itertools.product((1, 2, 3, 5, 16), (1, 4, 7, 16), (16, 50, 64, 128, 243, 512)):
            assert grid_resolutions(*arguments) == exact_resolutions(*arguments), arguments

    def test_pixel_centers(self):
        centers = pixel_centers(2, 4, "cpu", torch.float32)
        assert centers[..., 0].tolist() == [[0.125, 0.375, 0.625, 0.875]] * 2
        assert centers[..., 1].tolist() == [[0.25] * 4, [0.75] * 4]


class TestEntries:
    @staticmethod
    def all_nodes(grids, level):
        axes = [torch.arange(grids.resolutions[level] + 1)] * grids.num_dims
        return torch.cartesian_prod(*axes)

    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("key_length", [1, 2])
    def test_index(self, table, key_length):
        grids = FeatureGrids(1, key_length, level_channels=1, **DYADIC, **TABLES[table])
        for level, resolution in enumerate(grids.resolutions):
            nodes = self.all_nodes(grids, level)
            size = grids.level_entries[level]
            index = grids.entry_index(nodes, level)
            assert index.dtype == torch.int64 and index.min() >= 0 and index.max() < size
            assert index.tolist() == [
                reference_entry(node, resolution, size, grids.grid_type) for node in nodes.tolist()
            ]
            counts = index.bincount(minlength=size)
            if len(nodes) == size:
                assert counts.eq(1).all()  # a bijection
            elif grids.grid_type == "tiled":
                assert counts.max() - counts.min() <= 1  # shared evenly

    def test_level_entries(self):
        limits = {"tiled": [27, 100, 100], "hash": [27, 100, 100], "dense": [27, 125, 729]}
        for grid_type, expected in limits.items():
            grids = FeatureGrids(2, level_channels=3, max_entries=100, grid_type=grid_type, **DYADIC)
            assert grids.level_entries == expected
            assert grids.entries.shape == (2, sum(expected), 3)

    @pytest.mark.parametrize("max_entries, expected", [(1000, 989), (2**10, 9781445989 & 1023)])
    def test_hash_by_hand(self, max_entries, expected):
        # 3 * 1 ^ 5 * 2654435761 ^ 7 * 805459861 = 3 ^ 13272178805 ^ 5638219027 = 9781445989
        grids = FeatureGrids(1, 1, 1, 15, 15, max_entries=max_entries, grid_type="hash")
        assert grids.entry_index(torch.tensor([3, 5, 7]), 0).item() == expected

    def test_hash_by_hand_4d(self):
        # 9781445989 ^ 11 * 3674653429 = 9781445989 ^ 40421187719 = 48021595618
        grids = FeatureGrids(1, 2, 1, 15, 15, max_entries=1000, grid_type="hash")
        assert grids.entry_index(torch.tensor([3, 5, 7, 11]), 0).item() == 618

    def test_initial_values(self):
        torch.manual_seed(0)
        entries = FeatureGrids(1, num_levels=2, min_resolution=8, max_resolution=16).entries
        assert entries.abs().max() <= 1e-4
        # Of a uniform distribution; 22,568 draws put its estimate within 0.5%.
        assert entries.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.02)
        assert len(list(FeatureGrids(1, num_levels=1).parameters())) == 1


class TestErrors:
    @pytest.mark.parametrize(
        "config, message",
        [
            ({"grid_type": "sparse"}, "grid_type is 'sparse'.*'tiled', 'dense', 'hash'"),
            ({"key_length": 0}, "key_length is 0.*1 or 2"),
            ({"key_length": 3}, "key_length is 3.*1 or 2"),
            ({"num_levels": 0}, "num_levels=0.*at least one level"),
            ({"min_resolution": 0}, "min_resolution=0"),
            ({"min_resolution": 65}, "min_resolution=65, max_resolution=64"),
            ({"max_entries": 0}, "max_entries=0.*at least 1"),
            ({"level_channels": 0}, "level_channels=0.*at least 1"),
        ],
    )
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            FeatureGrids(1, **config)

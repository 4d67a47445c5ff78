"""The fast lookups against the reference, and how the lookup behaves under compile, autocast and odd inputs."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from brics_diffusers.models.grids import lookup_lattice, lookup_torch, lookup_triton
from brics_diffusers.models.grids import lookup_operator as retrieval
from brics_diffusers.models.grids.feature_grids import FeatureGrids
from brics_diffusers.models.grids.lookup_operator import retrieval_implementation, retrieve


# Features, gradient to keys, gradient to entries; entries and upstream gradients are of order 1. Positions up to 20
# carry errors of 20 ulp, slopes are 20 times as large as features, an entry sums up to a few hundred products.
# Entries of 16 bits: features and gradients to entries are rounded once more at the end, to at most one ulp.
TOLERANCES = {
    torch.float64: (1e-13, 1e-12, 1e-12),
    torch.float32: (1e-5, 1e-3, 1e-4),
    torch.float16: (2**-9, 1e-3, 2**-9),
    torch.bfloat16: (2**-6, 1e-3, 2**-6),
}


def make_case(seed: int, key_dtype=torch.float32, entry_dtype=torch.float32):
    """Grids of a random shape with keys, some of them on nodes, at 0 and at 1."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    low = choose.randint(1, 5)
    grids = FeatureGrids(
        num_groups=choose.randint(1, 3),
        key_length=1 + seed % 2,
        num_levels=choose.randint(1, 4),
        min_resolution=low,
        max_resolution=low + choose.randint(0, 15),
        level_channels=choose.choice((1, 2, 3, 4, 8)),
        max_entries=choose.choice((1, 60, 500, 2**18)),
        grid_type=("tiled", "hash", "dense")[seed % 3] if seed % 2 == 0 else choose.choice(("tiled", "hash")),
    )
    grids = grids.to(entry_dtype)
    torch.nn.init.normal_(grids.entries)
    shape = (choose.randint(1, 4), grids.num_groups * (grids.num_dims - 2), choose.randint(1, 6), choose.randint(1, 6))
    keys = torch.rand(shape, dtype=key_dtype)
    on_node = torch.rand(shape) < 0.2
    keys[on_node] = torch.randint(0, 9, shape).to(key_dtype)[on_node] / 8
    return grids, keys.requires_grad_()


def run(implementation, grids, keys, upstream):
    """Features, gradient to keys and gradient to entries of one implementation."""
    layout = (grids.resolutions, grids.level_entries, grids.grid_type)
    features = retrieve(keys, grids.entries, *layout, implementation)
    return features, *torch.autograd.grad(features, [keys, grids.entries], upstream)


def compare(implementation, grids, keys, tolerances):
    size = (grids.num_groups, grids.num_features, len(keys), keys.shape[2] * keys.shape[3])
    upstream = torch.randn(size).to(grids.entries.dtype)
    expected = run("reference", grids, keys, upstream)
    results = run(implementation, grids, keys, upstream)
    for result, exact, tolerance in zip(results, expected, tolerances, strict=True):
        assert result.shape == exact.shape and result.dtype == exact.dtype
        torch.testing.assert_close(result, exact, rtol=tolerance, atol=tolerance)


class TestAgainstReference:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("seed", range(24))
    def test_random_shapes(self, seed, dtype):
        key_dtype = torch.promote_types(dtype, torch.float32)
        compare("torch", *make_case(seed, key_dtype, dtype), TOLERANCES[dtype])

    def test_entries_coarser_than_keys(self):
        compare("torch", *make_case(3, torch.float64, torch.float32), TOLERANCES[torch.float32])

    def test_more_images_than_a_turn(self, monkeypatch):
        monkeypatch.setattr(lookup_torch, "CPU_POINTS", 40)
        torch.manual_seed(0)
        grids = FeatureGrids(2, num_levels=3, min_resolution=3, max_resolution=9).double()
        compare("torch", grids, torch.rand(5, 2, 3, 4).double().requires_grad_(), TOLERANCES[torch.float64])

    @pytest.mark.parametrize("nodes_per_image", [0, 1000])
    @pytest.mark.parametrize("level_channels", [3, 4])
    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_with_and_without_the_lattice(self, monkeypatch, nodes_per_image, level_channels, dtype):
        monkeypatch.setattr(lookup_lattice, "NODES_PER_IMAGE", nodes_per_image)
        torch.manual_seed(0)
        config = {"num_levels": 3, "min_resolution": 1, "max_resolution": 9, "max_entries": 500}  # the last one shares
        grids = FeatureGrids(2, level_channels=level_channels, **config).to(dtype)
        torch.nn.init.normal_(grids.entries)
        keys = torch.rand(3, 2, 4, 7, dtype=torch.promote_types(dtype, torch.float32))
        keys[0, :, 0] = 1
        keys[1, :, 0] = 0
        compare("torch", grids, keys.requires_grad_(), TOLERANCES[dtype])

    @pytest.mark.parametrize("frozen", ["keys", "entries"])
    def test_one_gradient_alone(self, frozen):
        grids, keys = make_case(2)
        features = grids(keys)
        upstream = torch.randn_like(features)
        both = torch.autograd.grad(features, [keys, grids.entries], upstream)
        tensors = {"keys": keys, "entries": grids.entries}
        tensors[frozen].requires_grad_(False)
        other = next(tensor for name, tensor in tensors.items() if name != frozen)
        (alone,) = torch.autograd.grad(grids(keys), other, upstream)
        assert torch.equal(alone, both[0] if frozen == "entries" else both[1])


class TestOperators:
    def test_registrations(self):
        # Schema, fake tensors and autograd, by torch's own checks. Its check of compiled autograd is left out: it asks
        # for a gradient through the slopes too, which is refused.
        grids, keys = make_case(4)
        arguments = (keys, grids.entries, grids.resolutions, grids.level_entries, grids.grid_type, True, None)
        names = ("test_schema", "test_autograd_registration", "test_faketensor")
        checks = torch.library.opcheck(retrieval.lookup, arguments, test_utils=names)
        assert set(checks.values()) == {"SUCCESS"}

    @pytest.mark.parametrize("seed", [4, 5])  # a key and two keys
    def test_compiles_without_graph_breaks(self, seed):
        grids, keys = make_case(seed)
        counter = CompileCounter()
        torch._dynamo.reset()
        assert torch.equal(torch.compile(grids, backend=counter, fullgraph=True)(keys), grids(keys))
        assert counter.frame_count == 1

    def test_other_batch_sizes_do_not_compile_again(self):
        grids, keys = make_case(4)
        counter = CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(grids, backend=counter, fullgraph=True)
        for batch_size in (2, 3, 4, 5, 7):
            compiled(keys[:1].detach().repeat(batch_size, 1, 1, 1))
        assert counter.frame_count == 2  # for 2, and for any

    def test_second_derivatives_are_refused(self):
        grids, keys = make_case(4)
        (gradient,) = torch.autograd.grad(grids(keys).square().sum(), keys, create_graph=True)
        with pytest.raises(RuntimeError, match="implementation='reference'"):
            gradient.square().sum().backward()

    def test_compiled_gradients(self):
        grids, keys = make_case(4)
        torch._dynamo.reset()
        compiled = torch.compile(grids, backend="aot_eager", fullgraph=True)
        upstream = torch.randn_like(grids(keys))
        expected = torch.autograd.grad(grids(keys), [keys, grids.entries], upstream)
        for result, exact in zip(
            torch.autograd.grad(compiled(keys), [keys, grids.entries], upstream), expected, strict=True
        ):
            assert torch.equal(result, exact)

    def test_autocast_keeps_keys_and_gradients_in_float32(self):
        grids, keys = make_case(6)
        plain = grids(keys)
        with torch.autocast("cpu", torch.bfloat16):
            features = grids(keys)
        assert features.dtype == torch.float32 and torch.equal(features, plain)
        gradients = torch.autograd.grad(features.sum(), [keys, grids.entries])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)

    @pytest.mark.parametrize("implementation", ["reference", "torch"])
    @pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
    def test_nothing_to_look_up(self, implementation, shape):
        grids = FeatureGrids(2, num_levels=2, min_resolution=2, max_resolution=3)
        keys = torch.zeros(shape, requires_grad=True)
        upstream = torch.zeros(2, 8, shape[0], shape[2] * shape[3])
        features, grad_keys, grad_entries = run(implementation, grids, keys, upstream)
        assert features.shape == upstream.shape and grad_keys.shape == shape
        assert grad_entries.shape == grids.entries.shape and not grad_entries.any()

    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("implementation", ["reference", "torch"])
    def test_a_key_that_is_no_number_spoils_its_pixel_only(self, implementation, seed):
        grids, keys = make_case(seed)
        keys = keys.detach()
        keys[0, 0, 0, 0] = float("nan")
        layout = (grids.resolutions, grids.level_entries, grids.grid_type)
        spoiled = retrieve(keys, grids.entries, *layout, implementation).isnan()
        assert spoiled[0, :, 0, 0].all() and spoiled.sum() == grids.num_features

    def test_same_bits_every_time_where_that_is_asked_for(self):
        # What CUDA takes then is this path too: `scatter_add_` in one dimension, which torch sorts.
        grids, keys = make_case(8)
        upstream = torch.randn_like(grids(keys))
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (run(None, grids, keys, upstream) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


class TestMemory:
    @pytest.mark.parametrize("key_length", [1, 2])
    def test_keeps_keys_and_slopes(self, key_length):
        grids = FeatureGrids(2, key_length, num_levels=5, max_resolution=20, max_entries=3000)
        keys = torch.rand(3, 2 * key_length, 8, 8, requires_grad=True)
        kept = {}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() != grids.entries.untyped_storage().data_ptr():
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = grids(keys)
        limit = key_length * features.numel() * 4 + keys.numel() * 4
        assert sum(kept.values()) == limit
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            grids(keys.detach())  # frozen encoder: no slopes
        assert sum(kept.values()) == keys.numel() * 4


class TestChoice:
    def test_torch_on_the_cpu(self):
        grids, keys = make_case(0)
        assert not lookup_triton.runs_on(keys.device)
        assert retrieval_implementation(keys, grids.entries) == "torch"

    def test_falls_back_where_kernels_do_not_run(self, monkeypatch, caplog):
        # As on a device that is too old or without a C compiler: the first launch raises.
        grids, keys = make_case(0)
        device = torch.device("cuda", 0)
        monkeypatch.setattr(lookup_triton, "supports", lambda keys, entries: True)
        monkeypatch.setattr(torch, "zeros", lambda *size, **options: (_ for _ in ()).throw(RuntimeError("no kernel")))
        monkeypatch.setattr(lookup_triton, "_failed", set())
        for _ in range(2):
            assert not lookup_triton.runs_on(device, 2, torch.float16)
        text = "Triton does not work on cuda:0 with keys of length 2 and torch.float16, so grids are read by torch: no"
        assert caplog.text.count(text) == 1
        assert lookup_triton._failed == {(device, 2, torch.float16)}  # and other kinds of lookups are tried
        assert retrieval_implementation(keys, grids.entries) == "torch"

    @pytest.mark.parametrize("error", [RuntimeError("out of resource: shared memory"), torch.OutOfMemoryError()])
    @pytest.mark.parametrize("function", ["lookup", "scatter"])
    def test_kernels_that_fail_at_real_shapes(self, function, error, monkeypatch, caplog):
        """Those that the device can't run are left to torch with one warning; full memory is no reason for that."""
        grids, keys = make_case(0)
        upstream = torch.randn(grids.num_groups, grids.num_features, len(keys), keys.shape[2] * keys.shape[3])
        expected = run("torch", grids, keys, upstream)

        def fail(*args):
            raise error

        monkeypatch.setattr(lookup_triton, "_failed", set())
        monkeypatch.setattr(lookup_triton, "supports", lambda keys, entries: True)
        monkeypatch.setattr(lookup_triton, "runs_on", lambda *kind: kind not in lookup_triton._failed)
        for name in ("lookup", "scatter"):
            replaced = fail if name == function else getattr(lookup_torch, name)
            monkeypatch.setattr(lookup_triton, name, replaced)
        for _ in range(2):
            if isinstance(error, torch.OutOfMemoryError):
                with pytest.raises(torch.OutOfMemoryError):
                    run(None, grids, keys, upstream)
                continue
            for found, wanted in zip(run(None, grids, keys, upstream), expected, strict=True):
                torch.testing.assert_close(found, wanted)
        warnings = 0 if isinstance(error, torch.OutOfMemoryError) else 1
        assert caplog.text.count("Triton does not work on cpu") == warnings

    def test_without_triton(self, monkeypatch):
        grids, keys = make_case(0)
        monkeypatch.setattr(lookup_triton, "triton", None)
        assert not lookup_triton.supports(keys, grids.entries)

    @pytest.mark.parametrize("implementation, message", [("cuda", "'cuda'.*'reference'"), ("triton", "on cpu.*CUDA")])
    def test_errors(self, implementation, message):
        grids, keys = make_case(0)
        with pytest.raises(ValueError, match=message):
            run(implementation, grids, keys, None)

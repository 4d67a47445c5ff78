"""The Triton kernels: their results in Triton's interpreter, and that they compile for devices that are not here.

The interpreter has to be chosen before Triton is imported, so kernels are interpreted in a process of their own.
"""

import pytest


pytest.importorskip("triton")

INTERPRET = """
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append("tests/models")

import torch
from test_retrieval import TOLERANCES, compare, make_case

{body}
"""

COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget

from brics_diffusers.models import triton_retrieval as kernels

key_length, channels, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
constants = {"key_length": key_length, "channels": channels, "block": kernels.BLOCK}
constants["padded_channels"] = triton.next_power_of_2(channels)
sizes = dict.fromkeys(("num_points", "height", "width", "total_entries"), "i32")
lookup = {"keys": "*fp32", "levels": "*i64", "entries": dtype, "features": dtype, "slopes": "*fp32"}
scatter = {"keys": "*fp32", "levels": "*i64", "grad_features": dtype, "grad_entries": "*fp32"}
for kernel, tensors, extra in (
    (kernels._lookup_kernel, lookup, {"with_slopes": True}),
    (kernels._scatter_kernel, scatter, {}),
):
    values = {**constants, **extra}
    signature = {**tensors, **sizes, **dict.fromkeys(values, "constexpr")}
    names = list(signature)
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(number,): [["tt.divisibility", 16]] for number in range(len(tensors))},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.NUM_WARPS})
    print(len(compiled.asm["cubin"]), compiled.asm["ptx"].count("ld.global.v4"))
"""


class TestInterpreted:
    def test_random_shapes(self, run_python):
        # Even seeds have one key, odd ones two; the three grid types take turns. Interpreted casts to 16 bits cut
        # off: an ulp more.
        body = """
cases = [(seed, torch.float32) for seed in (0, 1, 2, 3, 4, 5, 7, 10)] + [(6, torch.float16), (9, torch.bfloat16)]
for seed, dtype in cases:
    compare("triton", *make_case(seed, torch.float32, dtype), [2 * limit for limit in TOLERANCES[dtype]])
print("agree")
"""
        assert run_python(INTERPRET.format(body=body)).endswith("agree\n")

    def test_more_points_than_a_block_and_none(self, run_python):
        body = """
from brics_diffusers.models import triton_retrieval
from brics_diffusers.models.feature_grids import FeatureGrids

torch.manual_seed(0)
grids = FeatureGrids(2, num_levels=2, min_resolution=3, max_resolution=6, level_channels=3, max_entries=100)
torch.nn.init.normal_(grids.entries)
keys = torch.rand(3, 2, 7, 13, requires_grad=True)  # 273 points: two blocks and a part
assert 2 * triton_retrieval.BLOCK < 273 < 3 * triton_retrieval.BLOCK
compare("triton", grids, keys, TOLERANCES[torch.float32])
compare("triton", grids, torch.zeros(0, 2, 7, 13, requires_grad=True), TOLERANCES[torch.float32])
print("agree")
"""
        assert run_python(INTERPRET.format(body=body)).endswith("agree\n")

    def test_deterministic_gradients_are_torchs(self, run_python):
        body = """
from test_retrieval import run

grids, keys = make_case(2)
upstream = torch.randn(grids.num_groups, grids.num_features, len(keys), keys.shape[2] * keys.shape[3])
torch.use_deterministic_algorithms(True)
by_kernel, by_torch = (run(name, grids, keys, upstream) for name in ("triton", "torch"))
print(torch.equal(by_kernel[2], by_torch[2]))
"""
        assert run_python(INTERPRET.format(body=body)) == "True\n"


class TestCompiled:
    @pytest.mark.parametrize("arguments", [("1", "4", "*fp32"), ("2", "3", "*bf16")])
    def test_for_a_hopper_gpu(self, run_python, arguments):
        lines = run_python(COMPILE, *arguments).splitlines()
        sizes, node_reads = zip(*(map(int, line.split()) for line in lines), strict=True)
        assert len(sizes) == 2 and min(sizes) > 0
        if arguments[1:] == ("4", "*fp32"):
            assert node_reads[0] >= 8  # each of the 8 corners is one read of 16 bytes

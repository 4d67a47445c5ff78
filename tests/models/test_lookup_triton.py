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
from test_lookup import TOLERANCES, compare, make_case, run

from brics_diffusers.models.grids import lookup_triton
from brics_diffusers.models.grids.feature_grids import FeatureGrids

# Small ones of the cases for torch: dense, tiled and hashed levels that share entries, the last two with two keys as
# well, and levels that share none in 16 bits. Interpreted casts to 16 bits cut off: an ulp more.
cases = [(seed, torch.float32) for seed in (2, 6, 10, 15, 25)] + [(0, torch.float16), (22, torch.bfloat16)]
for seed, dtype in cases:
    compare("triton", *make_case(seed, torch.float32, dtype), [2 * limit for limit in TOLERANCES[dtype]])
print("random shapes agree")

torch.manual_seed(0)
grids = FeatureGrids(2, num_levels=2, min_resolution=3, max_resolution=6, level_channels=3, max_entries=100)
torch.nn.init.normal_(grids.entries)
keys = torch.rand(3, 2, 7, 13, requires_grad=True)  # 273 points: two blocks and a part
assert 2 * lookup_triton.BLOCK < 273 < 3 * lookup_triton.BLOCK
compare("triton", grids, keys, TOLERANCES[torch.float32])
print("three blocks agree")
compare("triton", grids, torch.zeros(0, 2, 7, 13, requires_grad=True), TOLERANCES[torch.float32])
print("empty batches agree")

torch.use_deterministic_algorithms(True)
upstream = torch.randn(2, 6, 3, 91)
by_kernel, by_torch = (run(name, grids, keys, upstream)[2] for name in ("triton", "torch"))
assert torch.equal(by_kernel, by_torch)
print("deterministic gradients are torch's")
"""

COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget

from brics_diffusers.models.grids import lookup_triton as kernels

constants = {"key_length": 1, "channels": 4, "padded_channels": 4, "block": kernels.BLOCK}
sizes = dict.fromkeys(("num_points", "height", "width", "total_entries"), "i32")
lookup = {"keys": "*fp32", "levels": "*i64", "entries": "*fp32", "features": "*fp32", "slopes": "*fp32"}
scatter = {"keys": "*fp32", "levels": "*i64", "grad_features": "*fp32", "grad_entries": "*fp32"}
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
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernels.NUM_WARPS})
    additions = [line for line in compiled.asm["ptx"].splitlines() if "atom.global" in line]
    spread = "threadsPerWarp = [8, 4]" in compiled.asm["ttgir"].partition("atomic_rmw")[0]
    print(len(compiled.asm["cubin"]), compiled.asm["ptx"].count("ld.global.v4"))
    print(len(additions), sum("v4.f32" in line for line in additions), int(spread))
"""


def test_interpreted_kernels(run_python):
    assert run_python(INTERPRET).splitlines() == [
        "random shapes agree",
        "three blocks agree",
        "empty batches agree",
        "deterministic gradients are torch's",
    ]


# Compute capabilities: Turing, Ampere, Ada Lovelace, Hopper, Blackwell.
@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (75, 80, 89, 120))]
)
def test_kernels_compile(run_python, capability):
    lines = run_python(COMPILE, str(capability)).splitlines()
    (lookup_size, node_reads), _, (scatter_size, _), additions = (map(int, line.split()) for line in lines)
    assert lookup_size > 0 and scatter_size > 0
    assert node_reads >= 8  # each of the 8 corners is one read of 16 bytes
    # A node's 4 channels are one addition from 9.0 on; before, 4 threads side by side add them.
    assert list(additions)[: 2 if capability >= 90 else 3] == ([8, 8] if capability >= 90 else [32, 0, 1])

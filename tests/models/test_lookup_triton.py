"""The Triton kernels: their results in Triton's interpreter, and that they compile for devices that are not here.

The interpreter has to be chosen before Triton is imported, so kernels are interpreted in a process of their own.
"""

import pytest

from brics_diffusers.models.grids import lookup_triton as kernels


triton = pytest.importorskip("triton")

INTERPRET = """
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append("tests/models")

import torch
from test_lookup_operator import TOLERANCES, compare, make_case, run

from brics_diffusers.models.grids import lookup_triton
from brics_diffusers.models.grids.feature_grids import FeatureGrids

# Interpreted casts to 16 bits cut off: an ulp more.
for case in sys.argv[1:]:
    seed, _, dtype = case.partition(":")
    dtype = getattr(torch, dtype)
    compare("triton", *make_case(int(seed), torch.float32, dtype), [2 * limit for limit in TOLERANCES[dtype]])
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


# Small ones of the cases for torch: levels that share entries, hashed for one key and tiled for two, and levels that
# share none in 16 bits; then dense, tiled and hashed ones the other way round.
FEW = ["10:float32", "15:float32", "0:float16"]
MORE = ["2:float32", "6:float32", "25:float32", "22:bfloat16"]


@pytest.mark.parametrize("cases", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_interpreted_kernels(run_python, cases):
    assert run_python(INTERPRET, *cases).splitlines() == [
        "random shapes agree",
        "three blocks agree",
        "empty batches agree",
        "deterministic gradients are torch's",
    ]


# Compute capabilities: Turing, Ampere, Ada Lovelace, Hopper, Blackwell.
@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (75, 80, 89, 120))]
)
def test_kernels_compile(capability):
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
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": kernels.NUM_WARPS})
        assert len(compiled.asm["cubin"]) > 0
        if kernel is kernels._lookup_kernel:
            assert compiled.asm["ptx"].count("ld.global.v4") >= 8  # each of the 8 corners is one read of 16 bytes
            continue
        additions = [line for line in compiled.asm["ptx"].splitlines() if "atom.global" in line]
        together = sum("v4.f32" in line for line in additions)
        # A node's 4 channels are one addition from 9.0 on; before, 4 threads side by side add them.
        assert (len(additions), together) == ((8, 8) if capability >= 90 else (32, 0))
        if capability < 90:
            assert "threadsPerWarp = [8, 4]" in compiled.asm["ttgir"].partition("atomic_rmw")[0]

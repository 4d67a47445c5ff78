"""One lookup in the feature grids, three implementations (Sec. 3.2, Eq. 2-4 and 6).

lookup_reference.py is the definition, lookup_torch.py what the CPU and most devices run, lookup_triton.py
the kernels for CUDA. The fast two share a pair of operators with one gradient, opaque to `torch.compile`: no graph
breaks, and the same numbers compiled or not but for rounding. Transforms of `torch.func` do not know them. For the
backward pass they keep the keys and, in place of the corners that were read, the slopes of the features along the
keys: for each key of a group as much as the features themselves.
"""

from collections.abc import Sequence

import torch

from . import lookup_torch, lookup_triton
from .lookup_reference import lookup_reference


IMPLEMENTATIONS = ("reference", "torch", "triton")
# A model that brings its own code has operators to itself, and leaves the installed package's as they are.
NAMESPACE = __name__.split(".")[0]
# The first lookup on a GPU makes tables that are kept, which must not lie in the memory of a CUDA graph.
OPERATOR_TAGS = (torch.Tag.cudagraph_unsafe,)


def retrieval_implementation(keys: torch.Tensor, entries: torch.Tensor) -> str:
    """
    The implementation that [`retrieve`] takes by itself: Triton on CUDA where it runs and knows the types, else torch.
    """
    runs = lookup_triton.supports(keys, entries) and lookup_triton.runs_on(*_kind(keys, entries))
    return "triton" if runs else "torch"


def _kind(keys: torch.Tensor, entries: torch.Tensor) -> tuple[torch.device, int, torch.dtype]:
    """Device, key length and type of the entries: what decides whether kernels run."""
    return keys.device, keys.shape[1] // entries.shape[0], entries.dtype


def _by_triton(function: str, keys: torch.Tensor, entries: torch.Tensor, implementation: str | None, arguments: tuple):
    """A function of lookup_triton.py; by torch, with a warning, if it fails and nobody has asked for Triton."""
    try:
        return getattr(lookup_triton, function)(*arguments)
    except Exception as error:  # more registers or shared memory than the device has, for instance
        if implementation == "triton" or lookup_triton.is_out_of_memory(error):
            raise
        lookup_triton.give_up(*_kind(keys, entries), error)
        return getattr(lookup_torch, function)(*arguments)


def retrieve(
    keys: torch.Tensor,
    entries: torch.Tensor,
    resolutions: Sequence[int],
    level_entries: Sequence[int],
    grid_type: str,
    implementation: str | None = None,
) -> torch.Tensor:
    r"""
    Features of every pixel: d-linear interpolation at (x, y, key) in each level of each group, levels concatenated.

    Args:
        keys (`torch.Tensor` of shape (B, g * C_key, H_d, W_d), float32 or float64):
            Keys in [0, 1] at the pixels of the feature block. Positions and weights are computed in their type.
        entries (`torch.Tensor` of shape (g, sum of `level_entries`, C_r), floating point): What the nodes hold.
        resolutions (`Sequence[int]`): Cells per axis of every level, N_l.
        level_entries (`Sequence[int]`): Entries that every level stores.
        grid_type (`str`): `"tiled"`, `"dense"` or `"hash"`; see [`FeatureGrids`].
        implementation (`str`, *optional*):
            `"reference"`, `"torch"` or `"triton"`; the choice of [`retrieval_implementation`] by default.

    Returns:
        `torch.Tensor` of shape (g, N_r * C_r, B, H_d * W_d) in the dtype of the entries, with gradients to keys and
        entries. Under `torch.use_deterministic_algorithms(True)` the gradients are deterministic, whichever
        implementation is at work.

    Raises:
        `ValueError`: If the implementation is unknown or cannot read these tensors.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}; it must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}."
        )
    if implementation == "triton" and not lookup_triton.supports(keys, entries):
        raise ValueError(
            f"keys are {keys.dtype} on {keys.device} and entries {entries.dtype}; the kernels need Triton, a CUDA "
            "device, float32 keys and float32, float16 or bfloat16 entries, so leave implementation at None."
        )
    grids = (list(resolutions), list(level_entries), grid_type)
    if implementation == "reference":
        return lookup_reference(keys, entries, *grids)
    with_slopes = torch.is_grad_enabled() and keys.requires_grad
    return lookup(keys, entries, *grids, with_slopes, implementation)[0]


@torch.library.custom_op(f"{NAMESPACE}::lookup", mutates_args=(), tags=OPERATOR_TAGS)
def lookup(
    keys: torch.Tensor,
    entries: torch.Tensor,
    resolutions: list[int],
    level_entries: list[int],
    grid_type: str,
    with_slopes: bool,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (g, N_r * C_r, B, P), and their slopes along the keys (C_key, *features) or nothing (0, *features)."""
    chosen = implementation or retrieval_implementation(keys, entries)
    arguments = keys.contiguous(), entries.contiguous(), resolutions, level_entries, grid_type, with_slopes
    if chosen == "triton":
        return _by_triton("lookup", keys, entries, implementation, arguments)
    return lookup_torch.lookup(*arguments)


@torch.library.custom_op(f"{NAMESPACE}::scatter", mutates_args=(), tags=OPERATOR_TAGS)
def scatter(
    grad_features: torch.Tensor,
    keys: torch.Tensor,
    entries: torch.Tensor,
    resolutions: list[int],
    level_entries: list[int],
    grid_type: str,
    implementation: str | None,
) -> torch.Tensor:
    """Gradient to the entries, summed in the dtype of the keys; their values are not read."""
    chosen = implementation or retrieval_implementation(keys, entries)
    # Atomic additions come in any order. What torch does instead is sorted, or serial on the CPU.
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = grad_features.contiguous(), keys.contiguous(), resolutions, level_entries, grid_type
    if chosen == "triton" and not deterministic:
        return _by_triton("scatter", keys, entries, implementation, arguments).to(entries.dtype)
    return lookup_torch.scatter(*arguments).to(entries.dtype)


@lookup.register_fake
def _(keys, entries, resolutions, level_entries, grid_type, with_slopes, implementation):
    # `len` of a tensor would be a constant of the compiled code, which then serves one batch size only.
    shape = (entries.shape[0], entries.shape[2] * len(resolutions), keys.shape[0], keys.shape[2] * keys.shape[3])
    key_length = keys.shape[1] // entries.shape[0] if with_slopes else 0
    return entries.new_empty(shape), keys.new_empty(key_length, *shape)


@scatter.register_fake
def _(grad_features, keys, entries, resolutions, level_entries, grid_type, implementation):
    return torch.empty_like(entries, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    keys, entries, *grids, _, implementation = inputs
    ctx.grids = (*grids, implementation)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(keys, entries, output[1])


def _backward(ctx, grad_features, grad_slopes):
    if grad_slopes is not None:
        raise RuntimeError(
            "A second derivative through the lookup was asked for, which only its plain form has; call retrieve with "
            "implementation='reference'."
        )
    if grad_features is None:
        return (None,) * 7
    keys, entries, slopes = ctx.saved_tensors
    grad_keys = grad_entries = None
    if ctx.needs_input_grad[0]:
        grad_keys = (slopes * grad_features).sum(dim=2)  # (C_key, g, B, P)
        grad_keys = grad_keys.permute(2, 1, 0, 3).reshape(keys.shape)
    if ctx.needs_input_grad[1]:
        grad_entries = scatter(grad_features, keys, entries, *ctx.grids)
    return grad_keys, grad_entries, None, None, None, None, None


lookup.register_autograd(_backward, setup_context=_keep)

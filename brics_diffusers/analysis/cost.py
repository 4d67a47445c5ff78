"""Parameters, multiply-adds and memory of an autoencoder's parts, counted without running them (App. B and C)."""

import weakref
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, VQModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..models import BricsAutoencoder


PEER_SIZE = 256  # pixels: side of the images that the latents below belong to
# Decoders of other autoencoders: class, shape of the latents, widths, lowest up block. VQGAN and LDM VQ-f8 have
# attention at the lowest resolution, KL-f8 in the middle block only.
PEERS = {
    "VQGAN f16": (VQModel, (256, 16, 16), (128, 128, 256, 256, 512), "AttnUpDecoderBlock2D"),
    "LDM VQ-f8": (VQModel, (4, 32, 32), (128, 256, 256, 512), "AttnUpDecoderBlock2D"),
    "LDM KL-f8": (AutoencoderKL, (4, 32, 32), (128, 256, 512, 512), "UpDecoderBlock2D"),
}


def _lookup_operations(keys_shape, entries_shape, *args, out_shape=None, **kwargs) -> int:
    # For every feature and each corner of its cell a multiplication and an addition.
    num_dims = 2 + keys_shape[1] // entries_shape[0]
    return 2 * 2**num_dims * out_shape[0].numel()


# torch's counter knows matrix products, convolutions and attention only.
LOOKUP_OPERATIONS = {torch.ops.brics_diffusers.lookup: _lookup_operations}


def _million_parameters(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@torch.no_grad()
def count_multiply_adds(function: Callable) -> dict[str, float]:
    """
    Multiply-adds in 10**9 of a call, by the name of the module, `"Global"` for all. Attention is counted as its matrix
    products: which fused kernel would run, and whether the counter knows it, depends on the processor.
    """
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False, custom_mapping=LOOKUP_OPERATIONS) as counter:
        function()
    return {name: sum(values.values()) / 2e9 for name, values in counter.get_flop_counts().items()}


def autoencoder_cost(config: dict) -> dict[str, dict[str, float]]:
    """
    Size and work of every part for one image of `sample_size` (Tables 3, 7, 8 and 9), from the arguments of
    [`BricsAutoencoder`]: for `"encoder"`, `"lookup"`, `"mlp"` and `"decoder"` the `"parameters"` in millions and the
    `"multiply_adds"` in 10**9.

    Multiply-adds are counted by `torch.utils.flop_counter` from the shapes of matrix products, convolutions, attention
    and lookups (one for each corner and feature). Normalisations, activations and the computation of interpolation
    weights are not in it. Nothing is computed: tensors have no storage.
    """
    with torch.device("meta"):
        autoencoder = BricsAutoencoder(**config).eval()
        sample = torch.empty(1, *autoencoder.sample_shape)
    # Without coordinates the lookup is a loop over torch's operators, which the counter does not see.
    uncounted = {"BricsAutoencoder.grids": retrieval_formula(config)["lookup"]}
    counts = uncounted | count_multiply_adds(lambda: autoencoder(sample))
    modules = {"encoder": "encoder", "lookup": "grids", "mlp": "mlp", "decoder": "decoder"}
    return {
        part: {
            "parameters": _million_parameters(getattr(autoencoder, name)),
            "multiply_adds": counts[f"BricsAutoencoder.{name}"],
        }
        for part, name in modules.items()
    }


def retrieval_cost(config: dict) -> dict[str, dict[str, float]]:
    """The parts `"lookup"` and `"mlp"` of [`autoencoder_cost`], in a tenth of the time."""
    with torch.device("meta"):
        autoencoder = BricsAutoencoder(**config).eval()
        key_codes = torch.empty(1, *autoencoder.key_code_shape)
    uncounted = {"FeatureGrids": retrieval_formula(config)["lookup"]}  # as in autoencoder_cost
    counts = uncounted | count_multiply_adds(lambda: autoencoder.retrieve(key_codes))
    modules = {"lookup": autoencoder.grids, "mlp": autoencoder.mlp}
    return {
        part: {"parameters": _million_parameters(module), "multiply_adds": counts[type(module).__name__]}
        for part, module in modules.items()
    }


def retrieval_formula(config: dict) -> dict[str, float]:
    r"""
    Multiply-adds of retrieval for one image, from the sizes alone (App. B). With P = H_d W_d pixels, g groups, F = N_r
    C_r features and d dimensions:

    - lookup: g P F 2**d;
    - MLPs: g P (F + ... + F + C_d / g) F, one term a layer, and for each group once an image: the modulation 2 F**2,
      the style code's S F + S**2 with S = style_dim / g, and each layer's affine map F**2 and norm F * its width.

    T does not appear: it changes the number of parameters only.

    Args:
        config (`dict`): Keyword arguments of [`BricsAutoencoder`].

    Returns:
        `dict`: `"lookup"` and `"mlp"`, in 10**9.
    """
    with torch.device("meta"):
        config = BricsAutoencoder(**config).config
    num_groups = config.key_channels // config.key_length
    points = num_groups * config.feature_size**2
    features = config.num_levels * config.level_channels
    widths = [features] * (config.mlp_layers - 1) + [config.feature_channels // num_groups]
    style = config.style_dim // num_groups if config.decoder_type == "style" else 0
    once = 2 * features**2 + style * features + style**2
    once += sum(features**2 + features * width for width in widths)
    return {
        "lookup": points * features * 2 ** (config.key_length + 2 * config.use_coordinates) / 1e9,
        "mlp": (points * features * sum(widths) + num_groups * once) / 1e9,
    }


def retrieval_memory(config: dict, batch_size: int) -> dict[str, float]:
    """
    Memory of retrieval in one training step with `batch_size` images, in 10**6 bytes of float32 (App. C).

    Counted from shapes: storages that autograd saves for the backward pass, each once and without parameters; then
    each part's output and its gradient. The caching allocator and temporary tensors are not in it.

    The result has `"grids"`, the entries, and `"grids_gradient"`; `"lookup_saved"`, `"features"` (the lookup's output)
    and `"features_gradient"`; `"mlp_saved"` (besides the features), `"feature_block"` (with the style code) and
    `"feature_block_gradient"`; and the sums `"activations"`, without the first two, and `"total"`.
    """
    with torch.device("meta"):
        autoencoder = BricsAutoencoder(**config)
        _, height, width = autoencoder.key_code_shape
        repeat = autoencoder.encoder_factor // autoencoder.decoder_factor
        shape = (batch_size, autoencoder.config.key_channels, height * repeat, width * repeat)
        keys = torch.empty(shape, requires_grad=True)
    parameters = [parameter.untyped_storage() for parameter in autoencoder.parameters()]
    features, lookup_saved = _saved_bytes(lambda: autoencoder.grids(keys), parameters)
    block, mlp_saved = _saved_bytes(
        lambda: [part for part in autoencoder.mlp(features) if part is not None],
        [*parameters, features.untyped_storage()],
    )
    grids = autoencoder.grids.entries.nbytes
    block_size = sum(part.nbytes for part in block)
    sizes = {"grids": grids, "grids_gradient": grids, "lookup_saved": lookup_saved}
    sizes |= {"features": features.nbytes, "features_gradient": features.nbytes}
    sizes |= {"mlp_saved": mlp_saved, "feature_block": block_size, "feature_block_gradient": block_size}
    total = sum(sizes.values())
    sizes |= {"activations": total - 2 * grids, "total": total}
    return {name: size / 1e6 for name, size in sizes.items()}


class _Saved:
    """Holds a tensor for as long as the autograd graph does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def _saved_bytes(function, known: list) -> tuple:
    # What a detached branch saves is gone when the branch is, so holders are counted that are alive at the end.
    holders = weakref.WeakSet()

    def pack(tensor):
        holder = _Saved(tensor)
        holders.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        output = function()
    outputs = output if isinstance(output, list) else [output]  # counted on their own, whether saved or not
    known = {storage._cdata for storage in known} | {tensor.untyped_storage()._cdata for tensor in outputs}
    storages = [holder.tensor.untyped_storage() for holder in holders]
    saved = {storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in known}
    return output, sum(saved.values())


def peer_autoencoder(model_class: type, latent_shape: tuple, widths: tuple, lowest_block: str) -> torch.nn.Module:
    """
    Another autoencoder of diffusers, with two residual blocks at each resolution of the encoder and weights at random,
    in eval mode: latents (C, H, W), `widths` from the image's resolution to the latents', and at the latter the up
    block `lowest_block`, which plain ones follow.
    """
    return model_class(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=(lowest_block,) + ("UpDecoderBlock2D",) * (len(widths) - 1),
        layers_per_block=2,
        latent_channels=latent_shape[0],
    ).eval()


def sample_size(config: dict) -> tuple[int, int]:
    """Height and width in pixels of the images of a [`BricsAutoencoder`] with these keyword arguments."""
    with torch.device("meta"):
        return BricsAutoencoder(**config).sample_shape[1:]


def peers_of_size(size: int) -> list[str]:
    """Names of those `PEERS` whose encoder divides images of `size` x `size` pixels evenly."""
    return [name for name, (_, (_, height, _), *_) in PEERS.items() if size * height % PEER_SIZE == 0]


def peer_decoder_cost(name: str, size: int = PEER_SIZE) -> dict[str, float]:
    """
    Parameters in millions and multiply-adds in 10**9 of the decoder of one of `PEERS`, counted as in
    [`autoencoder_cost`], for an image of `size` pixels a side; a `ValueError` if the encoder does not divide it
    evenly.
    """
    channels, height, width = PEERS[name][1]
    if name not in peers_of_size(size):
        raise ValueError(f"size is {size}; {name} needs a multiple of {PEER_SIZE // height}.")
    with torch.device("meta"):
        model = peer_autoencoder(*PEERS[name])
        latents = torch.empty(1, channels, height * size // PEER_SIZE, width * size // PEER_SIZE)
    work = count_multiply_adds(lambda: model.decoder(latents))["Global"]
    return {"parameters": _million_parameters(model.decoder), "multiply_adds": work}


def variations(config: dict) -> list[tuple[str, int, dict]]:
    """
    One autoencoder with other T, levels, groups or key length (App. B): what is changed, its value, and the changed
    arguments.
    """
    with torch.device("meta"):
        full = BricsAutoencoder(**config).config
    num_groups = full.key_channels // full.key_length
    group_counts = [g for g in (1, 2, 4, 8, 16) if full.feature_channels % g == full.style_dim % g == 0]
    changes = [("max_entries", 2**power, {"max_entries": 2**power}) for power in (12, 14, 16, 18, 20)]
    changes += [("num_levels", levels, {"num_levels": levels}) for levels in (4, 8, 16, 32)]
    changes += [("groups", groups, {"key_channels": groups * full.key_length}) for groups in group_counts]
    changes += [
        ("key_length", length, {"key_length": length, "key_channels": num_groups * length}) for length in (1, 2)
    ]
    return [(name, value, config | change) for name, value, change in changes]

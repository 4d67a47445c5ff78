"""Decoding of one preset beside other decoders for 256 x 256 images: time, images per second and peak memory.

The candidates take turns in one process. Ours starts from key codes: lookup, MLPs and style decoder. Of the others
only the decoder is run, without what comes before it (nearest codes, 1x1 convolution). LDM's KL-f16 is not listed: its
decoder is VQGAN f16's but for the first convolution. All run as they come. Ours then computes channels-last and, on
a CPU, one image at a time; the first of the others is also run in this way, which a user would have to program.
"""

import copy
import functools
import statistics

import torch
from timing import time_and_memory

from brics_diffusers import BricsAutoencoder
from brics_diffusers.analysis.cost import PEERS, peer_autoencoder
from brics_diffusers.models.presets import PRESETS
from brics_diffusers.utils.reports import markdown_table


PRESET = "church-64x64x4"
BAR = 0.55  # largest share of another decoder's time
TUNED = ", run as ours is"
# On a CPU several images take so long that one turn must do.
BATCH_ROUNDS = {"cpu": ((1, 3), (8, 0)), "cuda": ((1, 20), (8, 20))}


def make_steps(models: dict, latent_shapes: dict, batch_size: int, device: torch.device, dtype) -> dict:
    """
    A decode of every model, from random codes, as it comes. Of several images ours is also decoded in the way that is
    not its own on this device: the whole batch at once on a CPU, one image after the other on a GPU.
    """
    steps = {}
    for name, model in models.items():
        latents = torch.rand(batch_size, *latent_shapes[name], device=device, dtype=dtype)
        decode = model.decode if isinstance(model, BricsAutoencoder) else model.decoder
        steps[name] = functools.partial(decode, latents)
    (name, ours), (peer_name, peer) = list(models.items())[:2]
    if batch_size > 1 and device.type == "cpu":
        steps[f"{name}, whole batch"] = functools.partial(ours._decode, steps[name].args[0])
    elif batch_size > 1:
        steps[f"{name}, one at a time"] = functools.partial(one_at_a_time, ours.decode, steps[name].args[0])
    tuned = copy.deepcopy(peer.decoder).to(memory_format=torch.channels_last)
    if batch_size > 1 and device.type == "cpu":
        tuned = functools.partial(one_at_a_time, tuned)
    steps[f"{peer_name}{TUNED}"] = functools.partial(tuned, steps[peer_name].args[0])
    return steps


def one_at_a_time(decode, latents: torch.Tensor) -> None:
    """A decode of one image after the other."""
    for one in latents.split(1):
        decode(one)


@torch.no_grad()
def measure(
    device: str = "cpu",
    batch_rounds: tuple[tuple[int, int], ...] | None = None,
    config: dict | None = None,
    peers: dict | None = None,
) -> dict:
    """
    Runs everything and returns the numbers: `"dtype"`, float32 on a CPU and bfloat16 on a GPU, and one dictionary a
    batch size: of every decoder `"seconds"`, `"peak_mb"`, `"images_per_second"` and `"ours / it"`. Rounds are as in
    `time_and_memory`, `peers` as `PEERS`, `config` holds arguments of [`BricsAutoencoder`].
    """
    device, peers = torch.device(device), peers or PEERS
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    ours = BricsAutoencoder(**(config or PRESETS[PRESET])).eval()
    models = {"BRICS": ours} | {name: peer_autoencoder(*peer) for name, peer in peers.items()}
    for model in models.values():
        model.to(device)
        if dtype != torch.float32:  # diffusers warns of any conversion
            model.to(dtype)
    latent_shapes = {"BRICS": ours.key_code_shape} | {name: peer[1] for name, peer in peers.items()}
    result = {"dtype": str(dtype).removeprefix("torch.")}
    for batch_size, rounds in batch_rounds or BATCH_ROUNDS[device.type]:
        rows = time_and_memory(make_steps(models, latent_shapes, batch_size, device, dtype), device, rounds)
        for row in rows.values():
            row["images_per_second"] = batch_size / row["seconds"]
            row["ours / it"] = rows["BRICS"]["seconds"] / row["seconds"]
        result[f"batch {batch_size}"] = rows
    return result


def describe(result: dict) -> str:
    """The part of the report."""
    text = f"{PRESET} in {result['dtype']}, random weights. `peak MB` is without the weights.\n"
    batches = {name: rows for name, rows in result.items() if name.startswith("batch")}
    for name, rows in batches.items():
        table = [
            {
                name: decoder,
                "images/s": row["images_per_second"],
                "peak MB": row["peak_mb"],
                "time of BRICS / its time": row["ours / it"],
            }
            for decoder, row in rows.items()
        ]
        text += f"\n{markdown_table(table)}"
    as_they_come, tuned = [], []
    for rows in batches.values():
        for decoder, row in rows.items():
            if "BRICS" not in decoder:
                (tuned if decoder.endswith(TUNED) else as_they_come).append(row["ours / it"])
    met = "met" if max(as_they_come) <= BAR else "missed"
    return f"""{text}
Of the others' time at most {BAR} is wanted: {met}, largest {max(as_they_come):.2f} and median
{statistics.median(as_they_come):.2f} of decoders as they come. Of the first one's, run as ours is (channels-last, and
one image at a time where ours is), {" and ".join(f"{ratio:.2f}" for ratio in tuned)}.
"""

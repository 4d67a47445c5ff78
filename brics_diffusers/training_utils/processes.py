"""The processes of a training: launchers that are refused, the number of those that read data, and their memory."""

import os
import shutil
import sys
from pathlib import Path

import torch


try:
    import resource
except ImportError:  # on Windows
    resource = None


# Switches of `accelerate launch` under which parameters and gradients are spread over processes or kept elsewhere.
# Steps that are not finite would be taken, and gradients not clipped, without a word.
REFUSED_BACKENDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config",
}
# What torchrun and MPI's launchers set, the variables that accelerate reads.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_backends() -> None:
    """
    Refuses, with a `ValueError`, backends that training does not work with. Call before accelerate starts any of them.
    """
    for variable, name in REFUSED_BACKENDS.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"training does not work with {name}, which accelerate is configured for; plain data parallelism is "
                "what it works with, so run `accelerate config` anew, or launch with `accelerate launch --multi_gpu`."
            )


def check_world_size(num_processes: int) -> None:
    """
    Refuses, with a `ValueError`, processes that a launcher has started together and that don't know of each other:
    more than accelerate has found.
    """
    for name in WORLD_SIZES:
        size = os.environ.get(name, "")
        if size.isdigit() and int(size) > num_processes:
            raise ValueError(
                f"{name} is {size}, but accelerate works with {num_processes} of these processes, so that each would "
                "do all the work by itself; on a CPU set ACCELERATE_USE_CPU=true, else start one process, or as many "
                "as there are GPUs."
            )


def default_num_workers(device: torch.device, num_processes: int) -> int:
    """
    Processes that read data where `--dataloader_num_workers` does not say: a share of the cores beside a GPU; none
    beside a CPU, whose cores are at work, or where they would have to be started anew or hand images over in a small
    `/dev/shm`, as Docker's is. They change nothing in what is read, nor in its order.
    """
    shared = Path("/dev/shm")
    if device.type != "cuda" or not sys.platform.startswith("linux") or not shared.is_dir():
        return 0
    if shutil.disk_usage(shared).free < 2**30:
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    return max(min(cores - 1, 8), 0)


def peak_memory(device: torch.device) -> float | None:
    """Largest memory in use so far, in MiB: allocated on a GPU, resident of the process on a CPU if that is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

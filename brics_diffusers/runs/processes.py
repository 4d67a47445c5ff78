"""What a run is made of: processes that know of each other, and a backend that keeps the promises of the scripts."""

import os


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
    r"""
    Call before accelerate starts any of them.

    Raises:
        `ValueError`: If accelerate is configured for a backend that training does not work with.
    """
    for variable, name in REFUSED_BACKENDS.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"training does not work with {name}, which accelerate is configured for; plain data parallelism is "
                "what it works with, so run `accelerate config` anew, or launch with `accelerate launch --multi_gpu`."
            )


def check_world_size(num_processes: int) -> None:
    r"""
    Refuses processes that a launcher has started together and that don't know of each other.

    Args:
        num_processes (`int`): Processes that accelerate has found.

    Raises:
        `ValueError`: If the launcher has started more.
    """
    for name in WORLD_SIZES:
        size = os.environ.get(name, "")
        if size.isdigit() and int(size) > num_processes:
            raise ValueError(
                f"{name} is {size}, but accelerate works with {num_processes} of these processes, so that each would "
                "do all the work by itself; on a CPU set ACCELERATE_USE_CPU=true, else start one process, or as many "
                "as there are GPUs."
            )

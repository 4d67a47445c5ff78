"""Key codes to latents of the diffusion model and back; one random generator for each image of a batch."""

import torch


def key_codes_to_latents(key_codes: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Key codes in [0, 1] to the diffusion model's latents; with a factor of 2 they are in [-1, 1] (App. A.5)."""
    return scaling_factor * (key_codes - 0.5)


def latents_to_key_codes(latents: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Latents to key codes, clipped to [0, 1] (App. A.5)."""
    return (latents / scaling_factor + 0.5).clamp(0, 1)


def generators_per_image(
    generator: torch.Generator | list[torch.Generator] | None, batch_size: int
) -> list[torch.Generator] | None:
    """
    One generator an image, seeded from the one given, so that image `i` of a sequence of calls is the same however the
    sequence is split into batches. A list, which must hold one an image, is returned as it is.
    """
    if isinstance(generator, list):
        if len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were given for batch_size={batch_size}; give one an image.")
        return generator
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is {generator!r}; give a torch.Generator, of a seed by torch.Generator().manual_seed(seed)."
        )
    device = generator.device
    # One draw a seed: a longer draw advances some generators by other amounts.
    seeds = [torch.randint(2**62, (1,), generator=generator, device=device).item() for _ in range(batch_size)]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def equal_generators(generator: torch.Generator | None, batch_size: int) -> list[torch.Generator]:
    """
    One generator an image, all in the same state, so that all images get the same noise at every step. The one given,
    torch's own by default, seeds them and is advanced as by one image.
    """
    seed = generators_per_image(generator or torch.default_generator, 1)[0].initial_seed()
    device = generator.device if generator is not None else "cpu"
    return [torch.Generator(device).manual_seed(seed) for _ in range(batch_size)]

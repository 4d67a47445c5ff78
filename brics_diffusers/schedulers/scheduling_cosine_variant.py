"""The noise schedules of key-code diffusion (App. A.6, D.2), as one diffusers scheduler."""

from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import logging


logger = logging.get_logger(__name__)

GAMMA_SCHEDULES = ("cosine_variant", "cosine", "linear")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# alpha-bar lives in [1e-6, 0.9999]. Both bounds are moved inwards to the next float32, so that rounding stays inside.
MIN_ALPHA_BAR = float(np.nextafter(np.float32(1e-6), np.float32(1)))
MAX_ALPHA_BAR = float(np.float32(0.9999))
# Clipped neighbours still differ by this factor: 100 times float32's resolution, and at 1000 steps at most 1% in all.
CLIP_SLOPE = 1e-5
# CLIP_SLOPE * MAX_TRAIN_TIMESTEPS = 1: beyond it, the bounds themselves would shape the schedule.
MAX_TRAIN_TIMESTEPS = 100_000


def schedule_gamma(
    t: float | np.ndarray, gamma_schedule: str, start: float = 0.2, end: float = 1.0, tau: float = 1.5
) -> float | np.ndarray:
    """
    The share of signal power left at time `t`, in float64 and before any clipping.

    Every schedule falls from 1 at `t = 0` to 0 at `t = 1` (up to 1e-32 for `"cosine"`).

    Args:
        t (`float` or `np.ndarray`):
            Time in [0, 1].
        gamma_schedule (`str`):
            `"cosine_variant"` (Chen 2023, Alg. 1), `"cosine"` (Nichol & Dhariwal 2021, offset 0.008) or `"linear"`
            (`1 - t`; Chen 2023, App. D.2 of the BRICS paper).
        start (`float`, defaults to `0.2`):
            Where on the cosine `"cosine_variant"` begins, in quarter turns. The other schedules do not use it.
        end (`float`, defaults to `1.0`):
            Where on the cosine `"cosine_variant"` ends, in quarter turns. The other schedules do not use it.
        tau (`float`, defaults to `1.5`):
            `"cosine_variant"` raises the cosine to `2 * tau`. The other schedules do not use it.

    Returns:
        `float` or `np.ndarray`: gamma at `t`, of the kind and shape of `t`.

    Raises:
        ValueError: for an unknown `gamma_schedule`, `t` outside [0, 1], or not `0 <= start < end <= 1` or `tau > 0`.
    """
    if gamma_schedule not in GAMMA_SCHEDULES:
        raise ValueError(f"gamma_schedule is {gamma_schedule!r}; choose one of {', '.join(GAMMA_SCHEDULES)}.")
    if not 0 <= start < end <= 1:
        raise ValueError(f"start is {start} and end is {end}; they must satisfy 0 <= start < end <= 1.")
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau is {tau}; it must be a positive number.")
    times = np.asarray(t, dtype=np.float64)
    if not np.all((times >= 0) & (times <= 1)):
        raise ValueError("t has values outside [0, 1]; divide train steps by their number first.")

    def quarter_cosine(x):
        # Rounding may carry x past 1, where the cosine is negative and a fractional power of it is NaN.
        return np.maximum(np.cos(x * np.pi / 2), 0.0)

    if gamma_schedule == "cosine_variant":
        v_start = quarter_cosine(start) ** (2 * tau)
        v_end = quarter_cosine(end) ** (2 * tau)
        gamma = (v_end - quarter_cosine(times * (end - start) + start) ** (2 * tau)) / (v_end - v_start)
    elif gamma_schedule == "cosine":
        offset = 0.008  # keeps the first steps' noise from being too small to learn from
        gamma = (quarter_cosine((times + offset) / (1 + offset)) / quarter_cosine(offset / (1 + offset))) ** 2
    else:
        gamma = 1.0 - times
    return gamma if isinstance(t, np.ndarray) else float(gamma)


def schedule_alpha_bar(
    num_train_timesteps: int, gamma_schedule: str, start: float = 0.2, end: float = 1.0, tau: float = 1.5
) -> np.ndarray:
    """
    alpha-bar of each train step: gamma clipped to [1e-6, 0.9999] and strictly decreasing.

    Clipped neighbours differ by a factor of 1 - 1e-5 rather than being equal: a beta of exactly 0 makes
    multistep solvers divide by a log-SNR step of 0.

    Args:
        num_train_timesteps (`int`):
            Number of train steps T. Step `i` stands at time `(i + 1) / T`.
        gamma_schedule, start, end, tau:
            As in [`schedule_gamma`].

    Returns:
        `np.ndarray` of shape `(num_train_timesteps,)`: alpha-bar in float64; the last value is 1e-6.

    Raises:
        ValueError: for `num_train_timesteps` outside 1 to 100000, and as [`schedule_gamma`] does.
    """
    if not 1 <= num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; it must be from 1 to {MAX_TRAIN_TIMESTEPS}.")
    steps = np.arange(num_train_timesteps)
    gamma = schedule_gamma((steps + 1) / num_train_timesteps, gamma_schedule, start, end, tau)
    highest = MAX_ALPHA_BAR * (1 - CLIP_SLOPE) ** steps
    lowest = MIN_ALPHA_BAR * (1 + CLIP_SLOPE) ** steps[::-1]
    return np.clip(gamma, lowest, highest)


class CosineVariantScheduler(DDPMScheduler):
    """
    Ancestral (DDPM) sampling with the noise schedules of key-code diffusion.

    alpha-bar of train step `i` is `gamma((i + 1) / num_train_timesteps)` clipped to [1e-6, 0.9999] (App. A.6): it ends
    at 1e-6, which is pure noise to within 0.1% of a standard deviation.

    The config carries the betas themselves (`trained_betas`) and every argument, defaults included. So
    `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)` samples with the noise levels, prediction type
    and thresholding that the model was trained with, and [`~ConfigMixin.from_config`] of this class brings them back.
    `PNDMScheduler`, `LMSDiscreteScheduler`, `DPMSolverSDEScheduler` and the KDPM2 and Euler schedulers accept the
    config but have no clamp on the clean sample; the first two enlarge a model's errors most. With another
    `clip_sample_range` than 1 none of diffusers' multistep solvers has one either, which v-prediction bears. With 20
    to 50 steps, pass `use_karras_sigmas=True` to a solver that has it: evenly spread steps end at train step 49 or 19,
    whose noise is 27% or 16% of the signal, and leave out detail finer than that.

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            The number of diffusion steps used in training.
        gamma_schedule (`"cosine_variant"`, `"cosine"` or `"linear"`, defaults to `"cosine_variant"`):
            The noise schedule (Chen 2023, Alg. 1; Nichol & Dhariwal 2021; `1 - t`), see [`schedule_gamma`].
        start (`float`, defaults to `0.2`):
            Where on the cosine `"cosine_variant"` begins, in quarter turns.
        end (`float`, defaults to `1.0`):
            Where on the cosine `"cosine_variant"` ends, in quarter turns.
        tau (`float`, defaults to `1.5`):
            `"cosine_variant"` raises the cosine to `2 * tau`.
        trained_betas (`list[float]`, *optional*):
            Betas to use in place of those of `gamma_schedule`. After construction the config always holds the betas in
            use, before any zero-SNR rescaling.
        variance_type (`str`, defaults to `"fixed_small"`):
            The variance of the noise that [`~DDPMScheduler.step`] adds.
        clip_sample (`bool`, defaults to `True`):
            Whether the predicted clean sample is clamped, here and after a swap for another scheduler. `False` is for
            latents without bounds, and switches `thresholding` off as well unless that is given.
        clip_sample_range (`float`, defaults to `1.0`):
            The bound of the clamp: half the autoencoder's `scaling_factor` for key codes. Another one than 1 switches
            `thresholding` off unless that is given, and is heeded by schedulers with this argument only
            ([`DDPMScheduler`], [`DDIMScheduler`], [`HeunDiscreteScheduler`]).
        prediction_type (`"epsilon"`, `"sample"` or `"v_prediction"`, defaults to `"epsilon"`):
            What the model predicts.
        thresholding (`bool`, *optional*, defaults to `clip_sample` where `clip_sample_range` is 1):
            Dynamic thresholding of the predicted clean sample. Key codes, where mapped to `2 * (z - 0.5)`, lie in
            [-1, 1], and at alpha-bar 1e-6 an error in epsilon comes out 1000 times as large in the clean sample.
            Multistep solvers have no `clip_sample` but do have `thresholding`, which with `sample_max_value=1.0` is a
            clamp to [-1, 1]: this keeps the clamp across a scheduler swap.
        dynamic_thresholding_ratio (`float`, defaults to `0.995`):
            The quantile for dynamic thresholding. Without effect at `sample_max_value=1.0`.
        sample_max_value (`float`, defaults to `1.0`):
            The largest threshold for dynamic thresholding. Another one than 1 is not for key codes: samples are
            divided by the threshold.
        timestep_spacing (`"linspace"`, `"leading"` or `"trailing"`, defaults to `"trailing"`):
            How inference steps are spread over train steps. `"trailing"` begins at the last train step, whose noise
            level is that of the pure noise sampling begins with; `"leading"` with 20 steps would begin at train step
            950, where the model expects some signal.
        steps_offset (`int`, defaults to `0`):
            An offset to the inference steps of `"leading"` spacing.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale the betas so that the last alpha-bar is 0 rather than 1e-6.

    Raises:
        ValueError: for an unknown `gamma_schedule` or `prediction_type`; `num_train_timesteps` outside 1 to 100000;
            not `0 <= start < end <= 1` or `tau > 0`; `trained_betas` of another number than `num_train_timesteps` or
            outside [0, 1]; `rescale_betas_zero_snr` with epsilon prediction.
    """

    # EDMEulerScheduler takes no betas: it has noise levels and a preconditioning of its own.
    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        gamma_schedule: Literal["cosine_variant", "cosine", "linear"] = "cosine_variant",
        start: float = 0.2,
        end: float = 1.0,
        tau: float = 1.5,
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool | None = None,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}.")
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr=True needs prediction_type 'v_prediction' or 'sample': where no signal is "
                "left, the noise says nothing of the clean sample."
            )
        alpha_bar = schedule_alpha_bar(num_train_timesteps, gamma_schedule, start, end, tau)
        if trained_betas is None:
            betas = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
        else:
            betas = np.asarray(trained_betas, dtype=np.float64)
            if betas.shape != (num_train_timesteps,):
                raise ValueError(
                    f"trained_betas has shape {betas.shape}; num_train_timesteps={num_train_timesteps} needs "
                    f"({num_train_timesteps},)."
                )
            if not np.all((betas >= 0) & (betas <= 1)):
                raise ValueError("trained_betas has values outside [0, 1]; each must be a share of noise power.")
        # `from_config` of another class sees only the config, and drops from it what `_use_default_values` names. The
        # class name tells it which keys are this class's own, so that it need not warn of them.
        self.register_to_config(
            trained_betas=betas.tolist(),
            thresholding=clip_sample and clip_sample_range == 1 if thresholding is None else thresholding,
            _use_default_values=[],
            _class_name=self.__class__.__name__,
        )

        betas = torch.from_numpy(betas)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.betas = betas.float()
        # The product is taken in float64, from the very numbers that the config holds: float32 would drift from the
        # schedule, and a reloaded scheduler has only these numbers.
        self.alphas = (1.0 - betas).float()
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).float()
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0

        self.range_is_checked = False
        self.custom_timesteps = False
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.variance_type = variance_type

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs
    ) -> "CosineVariantScheduler":
        """
        Build the scheduler from the config of this or another scheduler.

        Betas in the config are kept, unless `kwargs` asks for another schedule. A config with neither betas nor
        `gamma_schedule` gives the default schedule, with a warning: it is not the one that its model was trained with.

        Args:
            config (`dict`):
                The config of a scheduler.
            return_unused_kwargs (`bool`, defaults to `False`):
                Whether to return what was not used as well.
            kwargs:
                Arguments that replace those in the config.

        Returns:
            [`CosineVariantScheduler`]: the scheduler; a tuple with the unused arguments if `return_unused_kwargs`.
        """
        if isinstance(config, dict):
            clamp = {"clip_sample", "clip_sample_range"} & set(kwargs)
            if "thresholding" not in kwargs and any(kwargs[key] != config.get(key) for key in clamp):
                config = {key: value for key, value in config.items() if key != "thresholding"}
            schedule_keys = {"num_train_timesteps", "gamma_schedule", "start", "end", "tau"}
            if "trained_betas" not in kwargs and any(
                key in kwargs and kwargs[key] != config.get(key) for key in schedule_keys
            ):
                config = {key: value for key, value in config.items() if key != "trained_betas"}
            elif config.get("trained_betas") is None and "beta_schedule" in config and "gamma_schedule" not in config:
                logger.warning(
                    f"The config has no `trained_betas`: its {config['beta_schedule']!r} beta schedule is replaced by "
                    f"gamma_schedule={kwargs.get('gamma_schedule', 'cosine_variant')!r}."
                )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ):
        """
        Set the train steps to visit in sampling.

        Args:
            num_inference_steps (`int`, *optional*):
                Their number; spread as `timestep_spacing` says.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` is to lie.
            timesteps (`list[int]`, *optional*):
                The train steps themselves, descending, in place of `num_inference_steps`.
        """
        if timesteps is None and (num_inference_steps is None or num_inference_steps < 1):
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1.")
        super().set_timesteps(num_inference_steps, device=device, timesteps=timesteps)
        # "trailing" counts down in floating point and for some numbers (61, 103, 121, ...) ends on a surplus step -1.
        if timesteps is None:
            self.timesteps = self.timesteps[:num_inference_steps]

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.IntTensor
    ) -> torch.Tensor:
        """As in diffusers; warns at the first call where samples lie outside what sampling will clamp to."""
        if not self.range_is_checked:
            self.range_is_checked = True  # once: reading a value waits for the device
            clamps = self.config.thresholding or self.config.clip_sample
            bound = self.config.sample_max_value if self.config.thresholding else self.config.clip_sample_range
            largest = original_samples.abs().max().item() if clamps and original_samples.numel() else 0.0
            if largest > 1.01 * bound:
                logger.warning(
                    f"Samples reach {largest:.3g} in size, but sampling will clamp them to [-{bound:g}, {bound:g}]; "
                    "scale them, or build the scheduler with clip_sample=False or a larger clip_sample_range."
                )
        return super().add_noise(original_samples, noise, timesteps)

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        # A threshold between 1 and sample_max_value = 1 needs no quantile, whose input torch limits to 2**24 elements.
        if self.config.sample_max_value == 1:
            return sample.clamp(-1.0, 1.0)
        return super()._threshold_sample(sample)

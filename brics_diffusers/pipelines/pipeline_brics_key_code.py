"""Generation of images through key codes (Sec. 4)."""

import inspect
from collections.abc import Callable
from numbers import Integral

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import PipelineImageInput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..data.image_modes import MODES
from ..models import BricsAutoencoder
from ..utils.safe_loading import SafeLoadingMixin
from .arguments import check_bounds, check_denoiser, check_images, check_scheduler, named_arguments, set_timesteps
from .guidance import ClassLabels, Guidance, GuidanceMixin, check_class_weights, check_guide, check_id2label
from .image_processor import BricsImageProcessor
from .key_code_editing import KeyCodeEditingMixin
from .latents import generators_per_image, key_codes_to_latents, latents_to_key_codes


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class BricsKeyCodePipeline(SafeLoadingMixin, KeyCodeEditingMixin, GuidanceMixin, DiffusionPipeline):
    r"""
    Pipeline for image generation, unconditional or by class: a diffusion model makes key codes, an autoencoder decodes
    them (Sec. 4, arXiv 2305.18601). `reconstruct`, `vary`, `interpolate` and `inpaint` begin with images; PIL images
    are read as in training, transparency on white and 16-bit values scaled.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the methods of all pipelines
    (downloading, saving, running on a particular device, etc.).

    Args:
        autoencoder ([`BricsAutoencoder`]): Autoencoder whose key codes are generated.
        unet ([`UNet2DModel`]): Denoises latents: key codes, less 0.5, times the autoencoder's `scaling_factor`.
        scheduler ([`SchedulerMixin`]):
            [`CosineVariantScheduler`] or any scheduler compatible with it.
        guide ([`UNet2DModel`], *optional*):
            A weaker diffusion model, such as an earlier or a smaller one, for guidance (Karras et al. 2024); with the
            classes of `unet` or without any.
        id2label (`dict[int, str]`, *optional*):
            Names of the classes by number, where `unet` has `num_class_embeds`, one more than classes: the last one
            stands for "no class".
        default_guidance_scale (`float`, defaults to 1.0): What a call takes for `guidance_scale`.
        default_guidance_interval (`tuple[float, float]`, *optional*): What a call takes for `guidance_interval`.
        default_num_inference_steps (`int`, defaults to 250): What a call takes for `num_inference_steps`.
        default_class_weights (`list[float]`, *optional*):
            How often each class is drawn where a call names none: as often as in training, say.

    Raises:
        `ValueError`: If the denoiser is another model of diffusers than a [`UNet2DModel`], its channels or size are
            not those of the autoencoder's key codes, the scheduler is of another kind (flow matching, EDM, IPNDM),
            which also shows at a call after a swap, or classes or guide are not the UNet's.
    """

    model_cpu_offload_seq = "unet->guide->autoencoder"
    _optional_components = ["guide"]
    _callback_tensor_inputs = ["latents"]
    _num_timesteps = 0

    def __init__(
        self,
        autoencoder: BricsAutoencoder,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        guide: UNet2DModel | None = None,
        id2label: dict | None = None,
        default_guidance_scale: float = 1.0,
        default_guidance_interval: tuple[float, float] | list[float] | None = None,
        default_num_inference_steps: int = 250,
        default_class_weights: list[float] | None = None,
    ):
        super().__init__()
        check_denoiser(unet)
        channels, height, width = autoencoder.key_code_shape
        if not unet.config.in_channels == unet.config.out_channels == channels:
            raise ValueError(
                f"unet has in_channels={unet.config.in_channels} and out_channels={unet.config.out_channels}, but the "
                f"autoencoder's key codes have {channels} channels; use a UNet with {channels} for both."
            )
        unet_size = unet.config.sample_size
        unet_size = (unet_size, unet_size) if isinstance(unet_size, int) else unet_size
        if unet_size is None or tuple(unet_size) != (height, width):
            raise ValueError(
                f"unet has sample_size={unet.config.sample_size}, but key codes are {height}x{width}; "
                f"use a UNet with sample_size={height if height == width else (height, width)}."
            )
        check_scheduler(scheduler)
        check_bounds(scheduler, autoencoder.scaling_factor)
        check_guide(guide, unet)
        self.register_modules(autoencoder=autoencoder, unet=unet, scheduler=scheduler, guide=guide)
        self.register_to_config(
            id2label=check_id2label(id2label, unet),
            default_guidance_scale=default_guidance_scale,
            default_guidance_interval=default_guidance_interval,
            default_num_inference_steps=default_num_inference_steps,
            default_class_weights=check_class_weights(default_class_weights, unet),
        )
        channels = autoencoder.config.in_channels
        self.image_processor = BricsImageProcessor(channels, do_resize=False, do_convert_rgb=channels in MODES)

    @property
    def vae(self) -> BricsAutoencoder:
        """The autoencoder, by the name that it has in other pipelines."""
        return self.autoencoder

    @property
    def num_timesteps(self) -> int:
        """Calls of the diffusion model in the current or the last denoising, 0 before the first."""
        return self._num_timesteps

    def latents_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        r"""
        Shape of the latents of an image.

        Args:
            height (`int`, *optional*): Height of the image in pixels; by default that of the training images.
            width (`int`, *optional*): Width of the image in pixels; by default that of the training images.

        Returns:
            `tuple[int, int, int]`: (C_z, H_z, W_z).

        Raises:
            `ValueError`: If the UNet and the autoencoder can't make images of this size.
        """
        channels, *sides = self.autoencoder.key_code_shape
        factor = self.autoencoder.encoder_factor
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)  # the UNet halves between its blocks
        for axis, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is not None:
                if not isinstance(pixels, Integral) or pixels < 1 or pixels % multiple:
                    raise ValueError(
                        f"{name} is {pixels!r}; give a multiple of {multiple}, by which the autoencoder and the UNet "
                        f"divide images, or leave it out for {sides[axis] * factor}."
                    )
                sides[axis] = pixels // factor
        return channels, *sides

    def check_inputs(
        self,
        batch_size: int,
        latents: torch.Tensor | None,
        output_type: str,
        tensor_inputs: list[str],
        height: int | None = None,
        width: int | None = None,
    ):
        """Raises a `ValueError` for arguments of `__call__` that can't be served."""
        check_denoiser(self.unet)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type is {output_type!r}; it must be one of {', '.join(map(repr, OUTPUT_TYPES))}."
            )
        if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be at least 1: the number of images.")
        shape = (batch_size, *self.latents_shape(height, width))
        if latents is not None and not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents is a {type(latents).__name__}; give a tensor of shape {shape}.")
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; expected {shape}.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs holds {unknown}; it may hold {self._callback_tensor_inputs} only."
            )

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict:
        """`generator` and `eta`, as far as the scheduler's `step` takes them."""
        parameters = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in parameters}

    def _preprocess(self, images: PipelineImageInput, name: str = "images") -> torch.Tensor:
        check_images(images, name)
        # Key codes get the images' type.
        return self.image_processor.preprocess(images).to(self._execution_device, self._key_codes_dtype)

    @property
    def _key_codes_dtype(self) -> torch.dtype:
        """At least float32: half precision can't tell places within a cell of the grids apart."""
        return torch.promote_types(self.autoencoder.dtype, torch.float32)

    @property
    def _latents_dtype(self) -> torch.dtype:
        """At least float32: a step of a thousand changes less than what half precision rounds away."""
        return torch.promote_types(self.unet.dtype, torch.float32)

    def _encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] to clean latents."""
        key_codes = self.autoencoder.encode(sample).key_codes.to(self._latents_dtype)
        return key_codes_to_latents(key_codes, self.autoencoder.scaling_factor)

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        generator: list[torch.Generator] | None,
        eta: float,
        callback: Callable | None,
        tensor_inputs: list[str],
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """Latents at the noise level of the first of `timesteps` to clean ones; `after_step` may change them.

        The scheduler looks coefficients up with `timesteps`: on the CPU, where they come from, it need not wait for a
        GPU in every step.
        """
        self._num_timesteps = len(timesteps)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        unet_timesteps = timesteps.to(latents.device, non_blocking=True)
        guidance, num_train_timesteps = guidance or Guidance(), self.scheduler.config.num_train_timesteps
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for index, timestep in enumerate(timesteps):
                model_input = self.scheduler.scale_model_input(latents, timestep)
                guided = guidance.applies(timestep, num_train_timesteps)
                prediction = self._predict(model_input, unet_timesteps[index], guidance, guided)
                latents = self.scheduler.step(prediction, timestep, latents, **extra_step_kwargs).prev_sample
                if after_step is not None:
                    latents = after_step(index, latents)
                if callback is not None:
                    tensors = {name: {"latents": latents}[name] for name in tensor_inputs}
                    latents = (callback(self, index, timestep, tensors) or {}).pop("latents", latents)
                progress_bar.update()
        return latents

    def _output(self, latents: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        images = latents
        if output_type != "latent":
            key_codes = latents_to_key_codes(latents, self.autoencoder.scaling_factor)
            key_codes = key_codes.to(self._key_codes_dtype)
            images = self.image_processor.postprocess(self.autoencoder.decode(key_codes).sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @named_arguments
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["BricsKeyCodePipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images.

        Args:
            batch_size (`int`, defaults to 1): Number of images; of a list of classes, one image each by default.
            num_inference_steps (`int`, *optional*):
                Denoising steps; by default `default_num_inference_steps` of the config, 250 if it has none.
                Ancestral sampling wants hundreds; 20 do with [`DPMSolverMultistepScheduler`].
            eta (`float`, defaults to 0.0): Share of fresh noise a step; only [`DDIMScheduler`] reads it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise. One generator seeds one a image, so that the same generator gives the same images
                however they are split into batches; a list holds one an image.
            latents (`torch.Tensor` of shape (B, C_z, H_z, W_z), *optional*): Gaussian noise to start from.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, of mode L, RGB or RGBA as the autoencoder's channels are; `"np"` (B, H, W, C) in [0, 1];
                `"pt"` (B, C, H, W) in [0, 1]; or `"latent"`: denoised latents in float32, whose key codes are
                `latents / autoencoder.scaling_factor + 0.5`, clipped.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, tensors)` after every step; may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Names of the tensors passed to the callback.
            height (`int`, *optional*):
                Height of the images in pixels, a multiple of what autoencoder and UNet divide by; by default that of
                the training images, which are the only ones that the models know.
            width (`int`, *optional*): Width of the images in pixels, as `height`.
            timesteps (`list[int]`, *optional*):
                Train steps to visit, descending, in place of `num_inference_steps`, where the scheduler takes them.
            sigmas (`list[float]`, *optional*):
                Noise levels to visit, descending to 0, in place of `num_inference_steps`, where the scheduler takes
                them ([`EulerDiscreteScheduler`]).
            class_labels (`int`, `str` or a list of them, *optional*):
                The class of all images, or a list with one an image: numbers, names, or `None` for images of no class
                in particular. By default drawn, if the config has `default_class_weights`, from the images' generators
                before all noise; otherwise no class.
            guidance_scale (`float`, *optional*):
                1 is no guidance, 2 goes twice as far from the prediction of `guide`, given the same class if it knows
                classes, or without a guide from that of no class, as the model does. By default that of the
                pipeline's config.
            guidance_interval (`tuple[float, float]`, *optional*):
                Times (low, high) in [0, 1] between which to guide; 1 is noise. By default that of the pipeline's
                config, all if it says none (Kynkäänniemi et al., arXiv 2404.07724).

        Returns:
            [`ImagePipelineOutput`] or `tuple`: The images.

        Raises:
            `ValueError`: If an argument is out of range or shaped wrongly, or the scheduler can't serve it.
            `TypeError`: If there is no such argument; the nearest that there is gets named.

        Example:

        ```py
        >>> import torch
        >>> from brics_diffusers import BricsKeyCodePipeline

        >>> pipe = BricsKeyCodePipeline.from_pretrained("runs/pipeline")
        >>> images = pipe(batch_size=4, num_inference_steps=250, generator=torch.Generator().manual_seed(0)).images
        ```
        """
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        batch_size = self.count_images(batch_size, class_labels)
        self.check_inputs(batch_size, latents, output_type, tensor_inputs, height, width)
        generator = generators_per_image(generator, batch_size)
        if class_labels is None:
            class_labels = self.draw_classes(batch_size, generator)
        guidance = self.prepare_guidance(batch_size, class_labels, guidance_scale, guidance_interval)
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        set_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        device = self._execution_device
        if latents is None:
            shape = (batch_size, *self.latents_shape(height, width))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self._latents_dtype)
        latents = latents.to(device, self._latents_dtype) * self.scheduler.init_noise_sigma
        callback, steps = callback_on_step_end, self.scheduler.timesteps
        latents = self._denoise(latents, steps, generator, eta, callback, tensor_inputs, None, guidance)
        return self._output(latents, output_type, return_dict)

    @named_arguments
    @torch.no_grad()
    def reconstruct(
        self, images: PipelineImageInput, output_type: str = "pil", return_dict: bool = True
    ) -> ImagePipelineOutput | tuple:
        r"""
        Encodes images and decodes their key codes. The diffusion model takes no part.

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
                Images whose height and width divide by the encoder's factor: PIL, arrays (B, H, W, C) in [0, 1] or
                tensors (B, C, H, W) in [0, 1].
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`, as in `__call__`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: The reconstructions.

        Raises:
            `ValueError`: If the images' kind, size or range is wrong.

        Example:

        ```py
        >>> from PIL import Image
        >>> from brics_diffusers import BricsKeyCodePipeline

        >>> pipe = BricsKeyCodePipeline.from_pretrained("runs/pipeline")
        >>> image = Image.open("image.png")  # height and width divide by the encoder's factor
        >>> reconstruction = pipe.reconstruct(image).images[0]
        ```
        """
        self.check_inputs(1, None, output_type, [])
        if output_type == "latent":
            raise ValueError(
                "output_type is 'latent'; for key codes call pipe.autoencoder.encode(...).key_codes instead."
            )
        key_codes = self.autoencoder.encode(self._preprocess(images)).key_codes
        images = self.image_processor.postprocess(self.autoencoder.decode(key_codes).sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

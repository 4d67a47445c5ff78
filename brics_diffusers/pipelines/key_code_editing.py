"""Playing with key codes: images changed by noising their key codes and denoising them."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput, LMSDiscreteScheduler, PNDMScheduler
from diffusers.image_processor import PipelineImageInput
from diffusers.utils.torch_utils import randn_tensor

from .arguments import check_images, named_arguments, set_timesteps
from .guidance import ClassLabels, Guidance
from .image_processor import BricsImageProcessor
from .latents import equal_generators, generators_per_image


class KeyCodeEditingMixin:
    r"""
    The methods `vary`, `interpolate` and `inpaint` of a pipeline with `autoencoder`, `unet` and `scheduler`, which
    brings `_preprocess`, `_encode`, `_denoise` and `_output`.
    """

    def check_strength(self, strength: float, num_inference_steps: int, inpaint: bool = False):
        """Raises a `ValueError` for a strength that can't be served; `inpaint` adds noise with strength 1 too."""
        if not 0 <= strength <= 1:
            raise ValueError(
                f"strength is {strength}; it must be from 0 (the image's own key code) to 1 (pure noise)."
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1.")
        scheduler = type(self.scheduler).__name__
        if 0 < strength < 1 and isinstance(self.scheduler, (PNDMScheduler, LMSDiscreteScheduler)):
            raise ValueError(
                f"strength is {strength}, but {scheduler} can't begin in the middle of its steps; "
                "use strength=1 or another scheduler, such as DPMSolverMultistepScheduler."
            )
        if (0 < strength < 1 or (inpaint and strength > 0)) and not hasattr(self.scheduler, "add_noise"):
            raise ValueError(
                f"{scheduler} has no add_noise, which brings images to the noise level of a step; use another "
                "scheduler, such as DPMSolverMultistepScheduler."
            )

    def check_sample_size(self, sample: torch.Tensor, name: str):
        """Raises a `ValueError` for images of another size than the diffusion model makes."""
        size, made = ("{}x{}".format(*shape[-2:]) for shape in (sample.shape, self.autoencoder.sample_shape))
        if size != made:
            raise ValueError(f"{name}: {size} pixels, but the diffusion model makes {made}; crop or resize it.")

    def get_timesteps(self, num_inference_steps: int, strength: float) -> torch.Tensor:
        r"""
        Sets the scheduler's timesteps, and where among them to begin.

        Args:
            num_inference_steps (`int`): Denoising steps from pure noise to a clean sample.
            strength (`float`): Share of these steps to take, in [0, 1]; the number is rounded down.

        Returns:
            `torch.Tensor`: The last of the scheduler's timesteps, on the CPU; empty if no step is to be taken.
        """
        set_timesteps(self.scheduler, num_inference_steps)
        timesteps = self.scheduler.timesteps
        order = self.scheduler.order  # calls of the model a step; the last step can have fewer
        num_steps = math.ceil(len(timesteps) / order)
        begin = (num_steps - math.floor(strength * num_steps + 1e-6)) * order  # 0.29 * 100 is a little less than 29
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return timesteps[begin:]

    def _add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        # The two factors come of numbers on the CPU: schedulers copy their tables to where the samples are, which
        # makes the host wait for a GPU.
        one, zero = torch.ones(1), torch.zeros(1)
        factors = (self.scheduler.add_noise(*pair, timestep.reshape(1)) for pair in ((one, zero), (zero, one)))
        of_clean, of_noise = (factor.item() for factor in factors)
        return of_clean * clean + of_noise * noise

    def _renew(
        self,
        clean: torch.Tensor,
        strength: float,
        num_inference_steps: int,
        eta: float,
        generator: list[torch.Generator] | None,
        callback: Callable | None,
        tensor_inputs: list[str],
        guidance: Guidance,
        renewed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noises clean latents and denoises them; where `renewed` (B, 1, H_z, W_z) is false they stay as they are."""
        timesteps = self.get_timesteps(num_inference_steps, strength)
        if len(timesteps) == 0:
            self._num_timesteps = 0
            return clean
        noise = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)

        def keep_known(index: int, latents: torch.Tensor) -> torch.Tensor:
            if index + 1 == len(timesteps):
                return torch.where(renewed, latents, clean)
            if (index + 1) % self.scheduler.order:  # inside a step, where solvers have noise levels of their own
                return latents
            # The same noise every time: multistep solvers follow one trajectory.
            return torch.where(renewed, latents, self._add_noise(clean, noise, timesteps[index + 1]))

        if strength == 1:
            latents = noise * self.scheduler.init_noise_sigma  # what generation begins with
        else:
            latents = self._add_noise(clean, noise, timesteps[0])
        after_step = None if renewed is None else keep_known
        return self._denoise(latents, timesteps, generator, eta, callback, tensor_inputs, after_step, guidance)

    def _prepare_masks(self, masks: PipelineImageInput, sample: torch.Tensor) -> torch.Tensor:
        """Masks to the key codes' resolution, (B or 1, 1, H_z, W_z) of `bool`: true if any pixel is to be new."""
        check_images(masks, "masks")
        processor = BricsImageProcessor(
            do_resize=False, do_normalize=False, do_binarize=True, do_convert_rgb=False, do_convert_grayscale=True
        )
        masks = processor.preprocess(masks).to(sample.device, torch.float32)
        if masks.shape[1] != 1 or len(masks) not in (1, len(sample)) or masks.shape[2:] != sample.shape[2:]:
            count, (height, width) = len(sample), sample.shape[2:]
            raise ValueError(
                f"masks have shape {tuple(masks.shape)}; give one mask or {count}, of one channel and of the images' "
                f"{height}x{width} pixels."
            )
        return F.max_pool2d(masks, self.autoencoder.encoder_factor) > 0

    @named_arguments
    @torch.no_grad()
    def vary(
        self,
        images: PipelineImageInput,
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Makes variations of images: noises their key codes and denoises them (SDEdit, arXiv 2108.01073).

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
                Images of the size that the pipeline makes: PIL, arrays (B, H, W, C) in [0, 1] or tensors (B, C, H, W)
                in [0, 1]. For several variations of one image, repeat it.
            strength (`float`, defaults to 0.5):
                Share of the denoising steps that are taken, in [0, 1]. 0 gives the reconstruction and 1 a new image
                that owes nothing to the one given. What lies between depends on the noise levels that the scheduler
                visits: with the `cosine_variant` schedule and evenly spaced steps, 0.25, 0.5 and 0.75 leave 62%, 24%
                and 3% of the signal's power. A single one of 20 steps already begins with noise of 27% of the signal:
                small strengths want many steps.
            num_inference_steps (`int`, *optional*):
                Denoising steps from pure noise, as in `__call__`; of them `strength * num_inference_steps`, rounded
                down, are taken.
            eta (`float`, defaults to 0.0): Share of fresh noise a step; only [`DDIMScheduler`] reads it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise, as in `__call__`: one generator gives the same images however they are split into
                batches; a list holds one an image.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`, as in `__call__`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): As in `__call__`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): As in `__call__`.
            class_labels, guidance_scale, guidance_interval (*optional*): As in `__call__`, of the images to make.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: One variation an image.

        Raises:
            `ValueError`: If an argument is out of range, images have a wrong size, or the scheduler can't begin in the
                middle of its steps ([`PNDMScheduler`], [`LMSDiscreteScheduler`] and those without `add_noise` for
                strengths between 0 and 1).

        Example:

        ```py
        >>> import torch
        >>> from PIL import Image
        >>> from brics_diffusers import BricsKeyCodePipeline

        >>> pipe = BricsKeyCodePipeline.from_pretrained("runs/pipeline")
        >>> image = Image.open("image.png")  # of the size that the pipeline makes
        >>> images = pipe.vary([image] * 4, strength=0.3, generator=torch.Generator().manual_seed(0)).images
        ```
        """
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        self.check_inputs(1, None, output_type, tensor_inputs)
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        self.check_strength(strength, num_inference_steps)
        sample = self._preprocess(images)
        self.check_sample_size(sample, "images")
        guidance = self.prepare_guidance(len(sample), class_labels, guidance_scale, guidance_interval)
        generator = generators_per_image(generator, len(sample))
        clean, callback = self._encode(sample), callback_on_step_end
        latents = self._renew(clean, strength, num_inference_steps, eta, generator, callback, tensor_inputs, guidance)
        return self._output(latents, output_type, return_dict)

    @named_arguments
    @torch.no_grad()
    def interpolate(
        self,
        image_a: PipelineImageInput,
        image_b: PipelineImageInput,
        num_images: int = 5,
        strength: float = 0.3,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Interpolates between two images: their key codes are brought to one noise level with the same noise, mixed
        linearly, and denoised, which draws mixtures back to key codes that images have (Ho et al. 2020, Sec. 4.4, but
        with the noise shared by both ends, so that every mixture has the noise level that the model expects).

        All images get the same noise, that of every step included: what differs along the sequence is the key codes.

        Args:
            image_a (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                Where to begin: one image of the size that the pipeline makes; PIL, an array (H, W, C) in [0, 1] or a
                tensor (C, H, W) in [0, 1].
            image_b (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): Where to end, as `image_a`.
            num_images (`int`, defaults to 5): Number of images, both ends included; at least 2.
            strength (`float`, defaults to 0.3):
                Share of the denoising steps that are taken, in [0, 1], as in `vary`. 0 mixes the key codes and decodes
                them; with small values the ends are nearly the reconstructions. With large values all images grow
                alike, and at 1 they are the same.
            num_inference_steps (`int`, *optional*):
                Denoising steps from pure noise, as in `__call__`; of them `strength * num_inference_steps`, rounded
                down, are taken.
            eta (`float`, defaults to 0.0): Share of fresh noise a step; only [`DDIMScheduler`] reads it.
            generator (`torch.Generator`, *optional*): Source of all noise.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`, as in `__call__`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): As in `__call__`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): As in `__call__`.
            class_labels, guidance_scale, guidance_interval (*optional*): As in `__call__`, of the images to make.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `num_images` images from `image_a` to `image_b`.

        Raises:
            `ValueError`: As `vary`, and for less than 2 images to make, several images as one end, or a list of
                generators.

        Example:

        ```py
        >>> import torch
        >>> from PIL import Image
        >>> from brics_diffusers import BricsKeyCodePipeline

        >>> pipe = BricsKeyCodePipeline.from_pretrained("runs/pipeline")
        >>> cat, dog = Image.open("cat.png"), Image.open("dog.png")  # of the size that the pipeline makes
        >>> images = pipe.interpolate(cat, dog, num_images=8, generator=torch.Generator().manual_seed(0)).images
        ```
        """
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        self.check_inputs(1, None, output_type, tensor_inputs)
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        self.check_strength(strength, num_inference_steps)
        if num_images < 2:
            raise ValueError(f"num_images is {num_images}; it must be at least 2, because both ends count.")
        if isinstance(generator, list):
            raise ValueError("generator is a list, but all images of an interpolation share their noise; give one.")
        samples = {name: self._preprocess(end, name) for name, end in (("image_a", image_a), ("image_b", image_b))}
        for name, sample in samples.items():
            if len(sample) != 1:
                raise ValueError(f"{name} holds {len(sample)} images; give one.")
            self.check_sample_size(sample, name)
        start, end = self._encode(torch.cat(list(samples.values()))).split(1)
        weights = torch.linspace(0, 1, num_images, device=start.device, dtype=start.dtype).view(-1, 1, 1, 1)
        # Both ends have the same noise, so noising their mixtures is mixing them noised.
        clean = torch.lerp(start, end, weights)  # (num_images, C_z, H_z, W_z)
        guidance = self.prepare_guidance(num_images, class_labels, guidance_scale, guidance_interval)
        generators, callback = equal_generators(generator, num_images), callback_on_step_end
        latents = self._renew(clean, strength, num_inference_steps, eta, generators, callback, tensor_inputs, guidance)
        return self._output(latents, output_type, return_dict)

    @named_arguments
    @torch.no_grad()
    def inpaint(
        self,
        images: PipelineImageInput,
        masks: PipelineImageInput,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Makes images anew under a mask, in key-code space: after every step the key codes outside the mask are replaced
        by the image's, noised to that step's level (RePaint, arXiv 2201.09865, without its resampling).

        A key code outside the mask ends as exactly what the encoder made of it. Pixels outside the mask are only
        nearly those of the reconstruction: the decoder's style is a mean over all key codes, and its convolutions
        reach across the mask's border. And the encoder sees the whole image, so that known key codes can hold a trace
        of what the mask covers.

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
                Images of the size that the pipeline makes: PIL, arrays (B, H, W, C) in [0, 1] or tensors (B, C, H, W)
                in [0, 1].
            masks (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of one of them):
                One mask for all images or one an image, of the images' size: PIL, arrays (B, H, W) or tensors (B, 1,
                H, W) in [0, 1]. White, 0.5 and above, is made anew; transparency has no influence. A key code covers a
                square of pixels and is made anew if any of them is white.
            strength (`float`, defaults to 1.0):
                Share of the denoising steps that are taken, in [0, 1], as in `vary`. 1 forgets what the mask covers;
                less keeps some of it.
            num_inference_steps (`int`, *optional*):
                Denoising steps from pure noise, as in `__call__`; of them `strength * num_inference_steps`, rounded
                down, are taken.
            eta (`float`, defaults to 0.0): Share of fresh noise a step; only [`DDIMScheduler`] reads it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise, as in `__call__`: one generator gives the same images however they are split into
                batches; a list holds one an image.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`, as in `__call__`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): As in `__call__`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): As in `__call__`.
            class_labels, guidance_scale, guidance_interval (*optional*): As in `__call__`, of the images to make.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: The images, made anew under the mask.

        Raises:
            `ValueError`: As `vary`, and for masks of another size or number than the images, or a scheduler without
                `add_noise`.

        Example:

        ```py
        >>> import torch
        >>> from PIL import Image
        >>> from brics_diffusers import BricsKeyCodePipeline

        >>> pipe = BricsKeyCodePipeline.from_pretrained("runs/pipeline")
        >>> image = Image.open("image.png")  # of the size that the pipeline makes
        >>> mask = Image.new("L", image.size)
        >>> mask.paste(255, (0, 0, image.width, image.height // 2))  # the upper half
        >>> images = pipe.inpaint([image] * 4, mask, generator=torch.Generator().manual_seed(0)).images
        ```
        """
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        self.check_inputs(1, None, output_type, tensor_inputs)
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        self.check_strength(strength, num_inference_steps, inpaint=True)
        sample = self._preprocess(images)
        self.check_sample_size(sample, "images")
        renewed = self._prepare_masks(masks, sample)
        guidance = self.prepare_guidance(len(sample), class_labels, guidance_scale, guidance_interval)
        generator = generators_per_image(generator, len(sample))
        clean, callback = self._encode(sample), callback_on_step_end
        latents = self._renew(
            clean, strength, num_inference_steps, eta, generator, callback, tensor_inputs, guidance, renewed
        )
        return self._output(latents, output_type, return_dict)

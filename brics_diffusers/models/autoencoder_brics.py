"""The BRICS autoencoder: image -> key code -> feature block -> image (arXiv 2305.18601)."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..utils.safe_loading import SafeLoadingMixin
from ..utils.sizes import height_and_width
from .configuration import check_config, decoder_factor, decoder_layers, encoder_factor
from .decoders.group_mlp import GroupMLP
from .decoders.style_decoder import StyleDecoder
from .encoder import ShortcutEncoder
from .grids.feature_grids import FeatureGrids
from .outputs import BricsAutoencoderOutput, BricsDecoderOutput, BricsEncoderOutput
from .regularization import interpolate_with_noise, relax_precision
from .tiling import TilingMixin


# Inference on a CPU decodes as many images at once as have activations of this size after the style decoder's last
# block, at least one. Measured with 64 x 64 to 256 x 256 images: above, one image at a time is faster (modulation
# scales its weights instead of activations), below a whole batch is.
SLICE_BYTES = 2**23


class BricsAutoencoder(SafeLoadingMixin, ModelMixin, TilingMixin, ConfigMixin):
    r"""
    Autoencoder with bounded continuous key codes, grouped multi-resolution feature grids and a small style decoder
    (arXiv 2305.18601).

    This model inherits from [`ModelMixin`]. Images of another size than `sample_size` work when height and width
    divide by the encoder's factor; the feature block scales with them.

    Args:
        in_channels (`int`, defaults to 3): Channels of the input image; training knows 1, 3 and 4 (RGBA).
        out_channels (`int`, defaults to 3): Channels of the output image.
        sample_size (`int` or a pair, defaults to 256): Side of the training images, or height and width, in pixels.
        down_block_types (`tuple[str]`): Encoder blocks, one a resolution; attention at the lowest only (Sec. 3.1).
        encoder_block_out_channels (`tuple[int]`, defaults to `(64, 128, 256)`): Width of each encoder block.
        encoder_layers_per_block (`int`, defaults to 4): Residual blocks in each encoder block.
        norm_num_groups (`int`, defaults to 32): Groups of the group normalisation in the encoder and in the `"vqgan"`
            and `"movq"` decoders.
        key_channels (`int`, defaults to 4): Channels of the key code C_z.
        key_length (`int`, defaults to 1): Channels of one group's key C_key (1: 3-D grids, 2: 4-D grids).
        feature_size (`int` or a pair, defaults to 64):
            Side H_d of the feature block at `sample_size`, or height and width: as many numbers as of that.
        feature_channels (`int`, defaults to 512): Channels of the feature block C_d.
        num_levels (`int`, defaults to 16): Levels of each group's grids N_r.
        min_resolution (`int`, defaults to 1):
            Cells per axis of the coarsest level N_min; the paper's models begin with 4 or 16.
        max_resolution (`int`, defaults to 64): Cells per axis of the finest level N_max.
        level_channels (`int`, defaults to 4): Features at a node C_r.
        max_entries (`int`, defaults to 2**18): Entries stored for a level at most, T.
        grid_type (`str`, defaults to `"tiled"`): `"tiled"`, `"dense"` or `"hash"`; see [`FeatureGrids`].
        mlp_layers (`int`, defaults to 3): Linear layers of each group's MLP.
        style_dim (`int`, defaults to 512): Width of the style code.
        decoder_type (`str`, defaults to `"style"`): `"style"`, `"vqgan"` or `"movq"` (Sec. 3.3, App. J).
        decoder_block_out_channels (`tuple[int]`, defaults to `(512, 256, 128)`):
            Width of each decoder resolution, from the feature block's up to the image's.
        decoder_layers_per_block (`int` or `tuple[int]`, defaults to 1):
            Pairs of convolutions at each resolution of the `"style"` decoder, one number or one each. Of more than
            one, which is ours, those that keep the width are residual: more and narrower layers for the same work.
        regularization (`str`, defaults to `"noise"`):
            What keeps the codes smooth in training: `"noise"` relaxes their precision by `key_noise_scale` (Sec. 3.4),
            `"kl"` draws logits from a Gaussian (App. A.4), `"none"` does nothing, `"interpolate"` moves codes far
            towards noise (l-DeTok, arXiv 2507.15856), see [`interpolate_with_noise`]. Without effect in eval mode.
        key_noise_scale (`float`, *optional*):
            Standard deviation of the training noise on key codes; `1 / (4 * max_resolution)` by default, so that two
            standard deviations are half a cell of the finest grid.
        use_coordinates (`bool`, defaults to `True`):
            Whether pixel coordinates are part of the points that are looked up (Eq. 1). Without them, for ablation, a
            pixel's features follow from its key alone, on grids of `key_length` dimensions.
        encoder_shortcut (`bool`, defaults to `True`):
            Whether a strided convolution from the image to the key code's logits (kernel = stride = `encoder_factor`)
            is added to the encoder's output before the sigmoid; with `"kl"`, to the means. It is ours, not the
            paper's: without it colour reaches the codes late, through the whole normalised encoder. On emoji, after
            500 steps, PSNR is 24.9 dB with it and 22.6 without (three seeds, docs/measuring.md). A saved config
            without this key means `False`.
        interpolation_gamma (`float`, defaults to 1.0):
            Standard deviation of the noise towards which `"interpolate"` moves latents `2 * (z - 0.5)`, above 0.
        scaling_factor (`float`, *optional*):
            What key codes, less 0.5, are multiplied by for a diffusion model, above 0; encoder and decoder take no
            notice of it. `train_key_codes.py` sets it where it is `None`, so that their standard deviation over the
            collection is 1 (arXiv 2112.10752). Else `None` means 2, to [-1, 1] (App. A.5), as does a saved config
            without this key.

    Raises:
        `ValueError`: If the arguments contradict each other.

    Example:

    ```py
    >>> import torch
    >>> from brics_diffusers import BricsAutoencoder

    >>> autoencoder = BricsAutoencoder().eval()
    >>> key_codes = autoencoder.encode(torch.zeros(1, 3, 256, 256)).key_codes
    >>> key_codes.shape
    torch.Size([1, 4, 64, 64])
    >>> autoencoder.decode(key_codes).sample.shape
    torch.Size([1, 3, 256, 256])
    ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FeatureGrids", "SynthesisBlock", "ResnetBlock2D"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int | tuple[int, int] = 256,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        encoder_block_out_channels: tuple[int, ...] = (64, 128, 256),
        encoder_layers_per_block: int = 4,
        norm_num_groups: int = 32,
        key_channels: int = 4,
        key_length: int = 1,
        feature_size: int | tuple[int, int] = 64,
        feature_channels: int = 512,
        num_levels: int = 16,
        min_resolution: int = 1,
        max_resolution: int = 64,
        level_channels: int = 4,
        max_entries: int = 2**18,
        grid_type: str = "tiled",
        mlp_layers: int = 3,
        style_dim: int = 512,
        decoder_type: str = "style",
        decoder_block_out_channels: tuple[int, ...] = (512, 256, 128),
        decoder_layers_per_block: int | tuple[int, ...] = 1,
        regularization: str = "noise",
        key_noise_scale: float | None = None,
        use_coordinates: bool = True,
        encoder_shortcut: bool = True,
        interpolation_gamma: float = 1.0,
        scaling_factor: float | None = None,
    ):
        super().__init__()
        check_config(self.config)
        self.use_slicing = False
        self.encoder = (ShortcutEncoder if encoder_shortcut else Encoder)(
            in_channels=in_channels,
            out_channels=key_channels,
            down_block_types=tuple(down_block_types),
            block_out_channels=tuple(encoder_block_out_channels),
            layers_per_block=encoder_layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=regularization == "kl",
        )
        num_groups = key_channels // key_length
        self.grids = FeatureGrids(
            num_groups=num_groups,
            key_length=key_length,
            num_levels=num_levels,
            min_resolution=min_resolution,
            max_resolution=max_resolution,
            level_channels=level_channels,
            max_entries=max_entries,
            grid_type=grid_type,
            use_coordinates=use_coordinates,
        )
        self.mlp = GroupMLP(
            num_groups,
            self.grids.num_features,
            feature_channels,
            style_dim=style_dim if decoder_type == "style" else 0,
            num_layers=mlp_layers,
        )
        if decoder_type == "style":
            self.decoder = StyleDecoder(
                feature_channels,
                out_channels,
                tuple(decoder_block_out_channels),
                style_dim,
                decoder_layers(self.config),
            )
        else:
            self.decoder = Decoder(
                in_channels=feature_channels,
                out_channels=out_channels,
                up_block_types=("UpDecoderBlock2D",) * len(decoder_block_out_channels),
                block_out_channels=tuple(reversed(decoder_block_out_channels)),
                norm_num_groups=norm_num_groups,
                norm_type="spatial" if decoder_type == "movq" else "group",
            )

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """As in diffusers; a saved config without shortcut or scaling factor is of a model from before."""
        if "_class_name" in config_dict:
            config_dict = {"encoder_shortcut": False, "scaling_factor": 2.0} | config_dict
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def encoder_factor(self) -> int:
        """Pixels of the image per element of the key code, along one axis."""
        return encoder_factor(self.config)

    @property
    def decoder_factor(self) -> int:
        """Pixels of the image per element of the feature block, along one axis."""
        return decoder_factor(self.config)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a training image."""
        return self.config.in_channels, *height_and_width(self.config.sample_size)

    @property
    def key_code_shape(self) -> tuple[int, int, int]:
        """Shape (C_z, H_z, W_z) of the key code of an image of `sample_size`."""
        return self.config.key_channels, *(side // self.encoder_factor for side in self.sample_shape[1:])

    @property
    def key_noise_scale(self) -> float:
        """Standard deviation of the noise that relaxes the codes' precision in training (Sec. 3.4, App. D)."""
        scale = self.config.key_noise_scale
        return 1 / (4 * self.config.max_resolution) if scale is None else scale

    @property
    def scaling_factor(self) -> float:
        """What key codes, less 0.5, are multiplied by for a diffusion model: 2 (App. A.5) unless the config says."""
        return 2.0 if self.config.scaling_factor is None else self.config.scaling_factor

    @apply_forward_hook
    def encode(
        self, sample: torch.Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> BricsEncoderOutput | tuple:
        r"""
        Encodes images as key codes (Sec. 3.1). In eval mode the codes are exact and deterministic; in training mode
        they are regularised: perturbed and clipped (Sec. 3.4), or drawn from the posterior (App. A.4).

        Args:
            sample (`torch.Tensor` of shape (B, in_channels, H, W)):
                Images in [-1, 1]; of float32 a model in half precision makes key codes in float32.
            generator (`torch.Generator`, *optional*): Source of the noise in training mode.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`BricsEncoderOutput`] or `tuple`: Key codes of shape (B, C_z, H / f, W / f), f = `encoder_factor`.

        Raises:
            `ValueError`: If the images' shape is wrong or, in eval mode, their values leave [-1, 1].
        """
        self._check_sample(sample)
        image = sample.to(self.grids.entries.dtype)  # the model's own precision
        encode = self.encode_in_tiles if self.use_tiling and not self.training else self.encoder
        if self.use_slicing and sample.shape[0] > 1 and not self.training:
            logits = torch.cat([encode(part) for part in image.split(1)])
        else:
            logits = encode(image)
        # bfloat16 steps by 1/256 near 1, as far as the training noise reaches: codes keep the input's type.
        logits = logits.to(sample.dtype)
        kl_loss = None
        if self.config.regularization == "kl":
            posterior = DiagonalGaussianDistribution(logits.float())
            kl_loss = posterior.kl()
            logits = (posterior.sample(generator) if self.training else posterior.mode()).to(logits.dtype)
        key_codes = torch.sigmoid(logits)
        if self.config.regularization in ("noise", "interpolate") and self.training:
            key_codes = self.relax_precision(key_codes, generator)
        if not return_dict:
            return (key_codes,) if kl_loss is None else (key_codes, kl_loss)
        return BricsEncoderOutput(key_codes=key_codes, kl_loss=kl_loss)

    def relax_precision(self, key_codes: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        r"""
        Perturbs key codes as in training: by [`interpolate_with_noise`] with `regularization="interpolate"`, else by
        Gaussian noise of `key_noise_scale` (Sec. 3.4, App. D).

        Args:
            key_codes (`torch.Tensor` of shape (B, ...)): Key codes in [0, 1].
            generator (`torch.Generator`, *optional*): Source of the noise.

        Returns:
            `torch.Tensor`: Perturbed key codes in [0, 1], same shape.
        """
        if self.config.regularization == "interpolate":
            return interpolate_with_noise(key_codes, self.config.interpolation_gamma, generator)
        return relax_precision(key_codes, self.key_noise_scale, generator)

    def retrieve(self, key_codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Key codes to feature block and style code: tile, add coordinates, look up, per-group MLPs (Sec. 3.2, Eq. 1-6).

        Args:
            key_codes (`torch.Tensor` of shape (B, C_z, H_z, W_z)): Key codes in [0, 1].

        Returns:
            `tuple`: feature block (B, C_d, H_d, W_d) and style code (B, style_dim), or `None` where the decoder takes
            none.
        """
        repeat = self.encoder_factor // self.decoder_factor
        tiled = key_codes.repeat_interleave(repeat, dim=2).repeat_interleave(repeat, dim=3)  # (B, C_z, H_d, W_d)
        feature_block, style = self.mlp(self.grids(tiled))
        return feature_block.unflatten(2, tiled.shape[2:]), style

    def _slice_size(self, key_codes: torch.Tensor) -> int | None:
        """How many images to decode at once; `None` for all, without asking how many there are."""
        if self.use_slicing and not self.training:
            return 1
        whole = self.config.decoder_type != "style" or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole or key_codes.device.type != "cpu":
            return None
        height, width = key_codes.shape[2:]
        pixels = height * width * self.encoder_factor**2  # of an image, which the last block has features for
        image_bytes = pixels * self.config.decoder_block_out_channels[-1] * self.grids.entries.element_size()
        return max(SLICE_BYTES // image_bytes, 1)

    def _decode(self, key_codes: torch.Tensor) -> torch.Tensor:
        feature_block, style = self.retrieve(key_codes)
        if self.config.decoder_type == "vqgan":
            return self.decoder(feature_block)
        decode = self.decode_in_tiles if self.use_tiling and not self.training else self.decoder
        return decode(feature_block, feature_block if self.config.decoder_type == "movq" else style)

    @apply_forward_hook
    def decode(self, key_codes: torch.Tensor, return_dict: bool = True) -> BricsDecoderOutput | tuple:
        r"""
        Decodes key codes to images (Sec. 3.2-3.3). On a CPU without gradients, the style decoder works on large
        images a few at a time, which is faster and takes less memory; elsewhere, and where `torch.compile` is at work,
        [`~AutoencoderMixin.enable_slicing`] decodes one at a time. [`~TilingMixin.enable_tiling`] is for large images.

        Args:
            key_codes (`torch.Tensor` of shape (B, C_z, H_z, W_z)): Key codes in [0, 1].
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`BricsDecoderOutput`] or `tuple`: Images of shape (B, out_channels, f * H_z, f * W_z), f =
            `encoder_factor`.

        Raises:
            `ValueError`: If the codes' shape is wrong or, in eval mode, their values leave [0, 1].
        """
        self._check_key_codes(key_codes)
        size = self._slice_size(key_codes)
        if size is not None and size < key_codes.shape[0]:
            sample = torch.cat([self._decode(part) for part in key_codes.split(size)])
        else:
            sample = self._decode(key_codes)
        return BricsDecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self, sample: torch.Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> BricsAutoencoderOutput | tuple:
        r"""
        Encodes and decodes images.

        Args:
            sample (`torch.Tensor` of shape (B, in_channels, H, W)): Images in [-1, 1].
            generator (`torch.Generator`, *optional*): Source of the noise in training mode.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`BricsAutoencoderOutput`] or `tuple`: Reconstructions and the key codes they come from.
        """
        encoded = self.encode(sample, generator=generator)
        decoded = self.decode(encoded.key_codes).sample
        if not return_dict:
            return (decoded, *encoded.to_tuple())
        return BricsAutoencoderOutput(sample=decoded, key_codes=encoded.key_codes, kl_loss=encoded.kl_loss)

    def _check_sample(self, sample: torch.Tensor):
        channels, factor = self.config.in_channels, self.encoder_factor
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample has shape {tuple(sample.shape)}; expected (batch, {channels}, height, width).")
        if min(sample.shape[2:]) < factor or sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"sample is {sample.shape[2]}x{sample.shape[3]}; height and width must divide by {factor}."
            )
        self._check_range("sample", sample, -1, 1, "scale pixels to [-1, 1], as diffusers' VaeImageProcessor does")

    def _check_key_codes(self, key_codes: torch.Tensor):
        channels = self.config.key_channels
        if key_codes.ndim != 4 or key_codes.shape[1] != channels:
            raise ValueError(
                f"key_codes has shape {tuple(key_codes.shape)}; expected (batch, {channels}, height, width)."
            )
        self._check_range("key_codes", key_codes, 0, 1, "map latents back with z / 2 + 0.5 and clip them")

    def _check_range(self, name: str, tensor: torch.Tensor, low: float, high: float, advice: str):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; expected floating point in [{low}, {high}], so {advice}.")
        # Reading values waits for the device and breaks compiled graphs: training and compiled code skip it.
        if self.training or torch.compiler.is_compiling() or tensor.numel() == 0 or tensor.device.type == "meta":
            return
        smallest, largest = torch.aminmax(tensor.detach())
        tolerance = 1e-2  # rounding in half precision
        if not (smallest >= low - tolerance and largest <= high + tolerance):
            raise ValueError(
                f"{name} spans [{smallest.item():.3g}, {largest.item():.3g}]; expected [{low}, {high}], so {advice}."
            )

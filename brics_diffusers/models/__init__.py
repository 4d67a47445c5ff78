"""The networks, without anything of their training."""

from .autoencoder_brics import BricsAutoencoder
from .discriminator import BricsDiscriminator, PatchDiscriminator
from .outputs import BricsAutoencoderOutput, BricsDecoderOutput, BricsEncoderOutput

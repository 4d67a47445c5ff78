from .autoencoder_brics import BricsAutoencoder, BricsAutoencoderOutput, BricsDecoderOutput, BricsEncoderOutput
from .discriminator import BricsDiscriminator

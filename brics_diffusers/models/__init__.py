from .autoencoder_brics import BricsAutoencoder
from .discriminator import BricsDiscriminator

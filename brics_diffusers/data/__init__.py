"""Collections of images, reading of single images, and key codes of a collection on disk, without any model."""

from .collection import collection_fingerprint, load_collection
from .decoding import UnreadableImageError, image_name, image_size, read_image
from .images import (
    ImageCollection,
    InfiniteBatchSampler,
    UnreadableLog,
    center_crop_resize,
    collate_images,
    evaluation_loader,
    training_loader,
)
from .resized import ResizedImages

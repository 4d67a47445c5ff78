"""Pictures for a model card and the README. All that they show comes out of the model, "originals" included: what is
called an image here is its reconstruction, so that the pictures hold none of the collection's own.

    python model_cards/pictures.py PIPELINE --dataset_name IMAGES --neighbours REPORT.json --output_dir FOLDER
"""

import argparse
import json
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data import evaluation_loader, load_collection
from brics_diffusers.utils.image_grids import image_grid


PICTURES = (
    "samples",
    "classes",
    "held_out_reconstructions",
    "nearest_neighbours",
    "vary",
    "interpolate",
    "morph",
    "inpaint",
)
# Karras' noise levels rise steeply: at a quarter of the steps little of an image is left.
STRENGTHS = (0.0, 0.05, 0.1, 0.13, 0.17, 0.2, 0.25, 1.0)
INTERPOLATION_STRENGTH = 0.1


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pipeline", help="A trained pipeline.")
    add("--dataset_name", required=True, help="Its collection, with the splits `train` and `validation`.")
    add("--neighbours", required=True, help="Report of `brics-diffusers nearest-neighbours` of its samples.")
    add("--output_dir", required=True, help="Folder for the pictures.")
    add("--images", type=int, nargs="+", default=[3, 27, 51, 75, 99, 123], help="Held-out images to play with.")
    add("--seed", type=int, default=0, help="Seed of all noise.")
    add("--pictures", nargs="+", choices=PICTURES, default=PICTURES, help="What to draw.")
    return parser.parse_args(argv)


class Pictures:
    """One method a picture, each an image grid on the scale [-1, 1]."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.pipe = BricsKeyCodePipeline.from_pretrained(args.pipeline)
        self.pipe.set_progress_bar_config(disable=True)
        self.held_out = self.read(load_collection(args.dataset_name, "validation"))
        self.chosen = self.held_out[args.images]

    @property
    def noise(self) -> dict:
        """Arguments that every call shares."""
        generator = torch.Generator().manual_seed(self.args.seed)
        return {"generator": generator, "output_type": "pt"}

    def read(self, dataset) -> torch.Tensor:
        """Images of a collection, (N, 3, H, W) in [0, 1]."""
        loader = evaluation_loader(dataset, self.pipe.autoencoder.config.sample_size, batch_size=16)
        return torch.cat([batch["pixel_values"] for batch in loader]) / 2 + 0.5

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        return self.pipe.reconstruct(images, output_type="pt").images

    def held_out_reconstructions(self):
        """Every fourth held-out image, reconstructed."""
        return image_grid(2 * self.reconstruct(self.held_out[::4]) - 1)

    def samples(self):
        """The first that there are, with the pipeline's own sampler, steps, classes and guidance."""
        return image_grid(2 * self.pipe(batch_size=32, **self.noise).images - 1)

    def classes(self, count: int = 8):
        """A row for each class, the first samples that there are."""
        names = self.pipe.class_names
        labels = [name for name in names for _ in range(count)]
        return image_grid(2 * self.pipe(class_labels=labels, **self.noise).images - 1, columns=count)

    def nearest_neighbours(self, count: int = 8):
        """Samples, each followed by its nearest training images, two samples a row."""
        queries = json.loads(Path(self.args.neighbours).read_text())["queries"][:count]
        folder = Path(queries[0]["image"]).parent
        samples = self.read(load_collection(str(folder), max_images=count))
        training = load_collection(self.args.dataset_name, "train")
        indices = [[found["index"] for found in query["neighbours"]] for query in queries]
        rows = [
            torch.cat([sample[None], self.reconstruct(self.read(training.select(nearest)))])
            for sample, nearest in zip(samples, indices, strict=True)
        ]
        return image_grid(2 * torch.cat(rows) - 1, columns=2 * len(rows[0]))

    def vary(self):
        """A row for each image, from strength 0 to 1."""
        columns = [self.pipe.vary(self.chosen[:4], strength=strength, **self.noise).images for strength in STRENGTHS]
        return image_grid(2 * torch.stack(columns, dim=1).flatten(0, 1) - 1, columns=len(STRENGTHS))

    def interpolate(self):
        """A row for each pair of images."""
        pairs = zip(self.chosen[:-1:2], self.chosen[1::2], strict=True)
        options = {"num_images": 8, "strength": INTERPOLATION_STRENGTH}
        rows = [self.pipe.interpolate(*pair, **options, **self.noise).images for pair in pairs]
        return image_grid(2 * torch.cat(rows) - 1)

    def morph(self, frames: int = 12):
        """From one image to the next and back to the first, as frames of an animation."""
        ring = [*self.chosen[:4], self.chosen[0]]
        pairs = zip(ring, ring[1:], strict=False)
        options = {"num_images": frames + 1, "strength": INTERPOLATION_STRENGTH}
        parts = [self.pipe.interpolate(*pair, **options, **self.noise).images for pair in pairs]
        return [to_pil_image(frame) for part in parts for frame in part[:-1]]

    def inpaint(self):
        """For each image: its reconstruction, that with the mask in grey, and the upper half made anew six times."""
        mask = torch.zeros(1, 1, *self.chosen.shape[2:])
        mask[..., : mask.shape[2] // 2, :] = 1
        rows = []
        for image in self.chosen[:4]:
            (known,) = self.reconstruct(image[None])
            anew = self.pipe.inpaint(image.repeat(6, 1, 1, 1), mask, **self.noise).images
            rows += [known[None], torch.where(mask > 0.5, 0.5, known), anew]
        return image_grid(2 * torch.cat(rows) - 1)


def main():
    args = parse_args()
    pictures, folder = Pictures(args), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.pictures:
        drawn = getattr(pictures, name)()
        if isinstance(drawn, list):
            options = {"save_all": True, "append_images": drawn[1:], "duration": 120, "loop": 0, "quality": 85}
            drawn[0].save(folder / f"{name}.webp", **options)
        else:
            if (
                pictures.pipe.autoencoder.sample_shape[-1] <= 64
            ):  # a palette shows no bands here, and is a third as large
                drawn = drawn.quantize(256)
            drawn.save(folder / f"{name.replace('_', '-')}.png", optimize=True)


if __name__ == "__main__":
    main()

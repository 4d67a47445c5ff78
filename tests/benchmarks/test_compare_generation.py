"""The comparison of latents with tiny models: what is trained on, its report, and going on."""

import compare_generation
import pytest
import torch
import yaml
from comparison_models import CLASSES, SMALL_PEER
from small_models import AUTOENCODER, UNET


PEER = SMALL_PEER | {"block_out_channels": (8, 8, 16), "sample_size": 32}
MODELS = {
    "BRICS": ("BricsAutoencoder", AUTOENCODER),
    "BRICS, KL regularization": ("BricsAutoencoder", AUTOENCODER | {"regularization": "kl"}),
    "AutoencoderKL": ("AutoencoderKL", PEER),
    "VQModel": ("VQModel", PEER | {"num_vq_embeddings": 16, "vq_embed_dim": 4}),
}
KID = "kid_random_conv"


@pytest.fixture(scope="module")
def flags(tmp_path_factory, image_folder):
    """Command line for models of milliseconds, with features of random weights."""
    folder = tmp_path_factory.mktemp("generation")
    for name, (class_name, arguments) in MODELS.items():
        torch.manual_seed(0)
        CLASSES[class_name](**arguments).save_pretrained(folder / compare_generation.folder_name(name, 0))
    flags = {"train_batch_size": 2, "learning_rate": 1e-3, "lr_warmup_steps": 1, "random_flip": True}
    unet = {name: list(value) if isinstance(value, tuple) else value for name, value in UNET.items()}
    config = {"unet": unet, "train_key_codes": flags, "scheduler": {"prediction_type": "v_prediction"}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    words = ["--autoencoders", folder, "--config", folder / "tiny.yaml", "--dataset_name", image_folder]
    words += ["--seeds", 0, "--max_train_steps", 6, "--validation_steps", 4, "--checkpointing_steps", 3]
    words += ["--num_samples", 6, "--num_inference_steps", 3, "--extractor", "random-conv"]
    return [*map(str, words)]


def run(flags, folder, *more, models=tuple(MODELS)):
    try:
        compare_generation.main([*flags, "--output_dir", str(folder), "--models", *models, *map(str, more)])
    finally:
        torch.set_flush_denormal(False)


def test_tmp(flags, tmp_path):
    run(flags, tmp_path, "--schedules", "b", "a")
    for p in sorted(tmp_path.rglob("*")):
        print(p, p.stat().st_size)
    for p in sorted(tmp_path.rglob("progress.json"))[:2]:
        print(p.read_text())
    run(flags, tmp_path, "--schedules", "b", "a")

"""Both stages on a GPU, in every precision."""

import pytest
import torch
import train_autoencoder
import train_key_codes
from launching import train_here
from safetensors.torch import load_file
from test_train_autoencoder import read_log

from brics_diffusers import BricsKeyCodePipeline


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_train_resume_and_sample(tmp_path, image_folder, write_config, precision, optimizer):
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--mixed_precision", precision]
    flags += ["--checkpointing_steps", 100, "--validation_steps", 100]
    one, two = tmp_path / "one", tmp_path / "two"
    for main, *more in (
        (train_autoencoder.main, "--output_dir", one, "--gan_start_step", 20, "--optimizer", optimizer),
        (train_key_codes.main, "--output_dir", two, "--autoencoder_name_or_path", one),
    ):
        for steps in (100, 200):  # the second goes on from the first one's checkpoint
            resume = ["--max_train_steps", steps, "--resume_from_checkpoint", "latest"]
            printed = train_here(main, *flags, *more, *resume, ACCELERATE_USE_CPU="false")
        assert "Resumed from" in printed
    for folder in (one, two):
        weights = load_file(folder / "checkpoint-200" / "model.safetensors")
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
        assert read_log(folder).Scalars("train/skipped_steps")[-1].value < 20
    errors = [event.value for event in read_log(one).Scalars("train/mse")]
    assert errors[-1] < errors[0] / 2
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    pipe = BricsKeyCodePipeline.from_pretrained(two, torch_dtype=dtype).to("cuda")
    images = pipe(2, 5, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()

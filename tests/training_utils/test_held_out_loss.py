"""The diffusion model's loss on held-out key codes, by parts of the schedule."""

from types import SimpleNamespace

import pytest
import torch

from brics_diffusers.data import ImageCollection, load_collection
from brics_diffusers.training_utils import held_out_loss
from brics_diffusers.training_utils.held_out_loss import HeldOutLoss


TRAIN_STEPS = 1000


def make(autoencoder, folder, batch_size=5, process_index=0, num_processes=1):
    accelerator = SimpleNamespace(process_index=process_index, num_processes=num_processes, device="cpu")
    return HeldOutLoss(accelerator, autoencoder, load_collection(folder), batch_size)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr(held_out_loss, "gather_object", lambda shares: shares)


def some_loss(latents, noise, timesteps):
    """Differs with each of its arguments."""
    return (latents * noise + timesteps.view(-1, 1, 1, 1) / 100).square().mean()


def test_loss_of_every_quarter(autoencoder, image_folder):
    seen = {}

    def loss(latents, noise, timesteps):
        for row in zip(latents, noise, timesteps.tolist(), strict=True):
            seen.setdefault(row[0].mean().item(), []).append(row)
        return some_loss(latents, noise, timesteps)

    metrics = make(autoencoder, image_folder)(loss, TRAIN_STEPS, 2.0)
    names = ["loss_t_0.00_0.25", "loss_t_0.25_0.50", "loss_t_0.50_0.75", "loss_t_0.75_1.00"]
    assert list(metrics) == ["loss", *names]
    assert len(seen) == 24 and all(len(draws) == 4 for draws in seen.values())  # and the one that is no image
    for quarter, name in enumerate(names):
        draws = [rows[quarter] for rows in seen.values()]
        assert all(quarter * 250 <= time < (quarter + 1) * 250 for _, _, time in draws)
        assert len({time for _, _, time in draws}) > 15  # not one for all
        expected = [some_loss(code[None], noise[None], torch.tensor([time])).item() for code, noise, time in draws]
        assert metrics[name] == pytest.approx(sum(expected) / 24, rel=1e-5)
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in names) / 4)
    noise = torch.stack([noise for rows in seen.values() for _, noise, _ in rows]).flatten(1)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 0.4  # of 256 numbers: sigma 0.06


def test_latents_are_those_of_the_images(autoencoder, image_folder):
    collection = ImageCollection(load_collection(image_folder), 32)
    items = [collection[index]["pixel_values"] for index in range(len(collection))]
    images = torch.stack([image for image in items if image is not None])
    with torch.no_grad():
        expected = 3 * (autoencoder.encode(images).key_codes - 0.5)
    loss, seen = make(autoencoder, image_folder, batch_size=len(images)), []
    loss(lambda latents, noise, timesteps: seen.append(latents) or latents.mean(), TRAIN_STEPS, 3.0)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


def test_batches_and_processes_do_not_matter(autoencoder, image_folder, monkeypatch):
    expected = make(autoencoder, image_folder)(some_loss, TRAIN_STEPS, 2.0)
    assert make(autoencoder, image_folder)(some_loss, TRAIN_STEPS, 2.0) == expected
    assert make(autoencoder, image_folder, batch_size=7)(some_loss, TRAIN_STEPS, 2.0) == pytest.approx(
        expected, rel=1e-5
    )
    shares = []
    monkeypatch.setattr(held_out_loss, "gather_object", lambda share: shares.extend(share) or shares)
    for index in range(3):
        metrics = make(autoencoder, image_folder, 2, index, 3)(some_loss, TRAIN_STEPS, 2.0)
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_random_state_is_left_alone(autoencoder, image_folder):
    loss, state = make(autoencoder, image_folder), torch.get_rng_state()
    loss(some_loss, TRAIN_STEPS, 2.0)
    assert torch.equal(state, torch.get_rng_state())


def test_times_stay_below_the_last_step(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2**-24))
    _, timesteps = held_out_loss._draw(0, (1,), TRAIN_STEPS)
    assert timesteps.tolist()[-1] == 999


def test_nothing_readable(autoencoder, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    assert make(autoencoder, tmp_path)(some_loss, TRAIN_STEPS, 2.0) == {}

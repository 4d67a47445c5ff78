"""Key codes on disk: encoding that goes on after an interruption, and what is refused."""

import numpy as np
import pytest
import torch

from brics_diffusers.data import load_collection
from brics_diffusers.data.key_codes import KeyCodeDataset, finish_key_codes, open_key_codes, write_key_codes


@pytest.fixture
def dataset(image_folder, tmp_path):
    return load_collection(image_folder, cache_dir=tmp_path / "cache")


def test_interrupted_encoding_goes_on(autoencoder, dataset, tmp_path):
    folder = tmp_path / "codes"
    assert not open_key_codes(folder, "a")
    write_key_codes(autoencoder, dataset, folder, shard_size=10, process_index=0, num_processes=2)
    with pytest.raises(FileNotFoundError, match="has no complete manifest.json"):
        KeyCodeDataset(folder)
    with pytest.raises(FileNotFoundError, match="codes-00001.npy"):
        finish_key_codes(folder, 3)
    first = (folder / "codes-00000.npy").stat().st_mtime_ns
    assert not open_key_codes(folder, "a")
    write_key_codes(autoencoder, dataset, folder, shard_size=10, stopped=lambda: True)
    assert not (folder / "codes-00001.npy").exists()
    write_key_codes(autoencoder, dataset, folder, shard_size=10)
    assert (folder / "codes-00000.npy").stat().st_mtime_ns == first
    # "broken.png" sorts last, into a shard of the first process.
    assert finish_key_codes(folder, 3).summary().endswith("broken.png")
    assert open_key_codes(folder, "a") and len(KeyCodeDataset(folder)) == 24


def test_items_and_memory_maps(autoencoder, dataset, tmp_path):
    open_key_codes(tmp_path, "a")
    write_key_codes(autoencoder, dataset, tmp_path, shard_size=7)
    assert finish_key_codes(tmp_path, 4).count == 1
    codes = KeyCodeDataset(tmp_path)
    assert codes[0].shape == autoencoder.key_code_shape and codes[0].dtype == torch.float32
    stored = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("*.npy"))])
    assert stored.dtype == np.float16
    for index in (0, 6, 7, 23):
        np.testing.assert_array_equal(codes[index].numpy(), stored[index].astype(np.float32))
    assert all(isinstance(part, np.memmap) for part in codes._maps.values())
    with pytest.raises(IndexError):
        codes[24]
    assert codes.standard_deviation() == pytest.approx(stored.astype(np.float64).std(), rel=1e-9)
    some = np.concatenate([np.load(path)[::2] for path in sorted(tmp_path.glob("*.npy"))])
    assert codes.standard_deviation(12) == pytest.approx(some.astype(np.float64).std(), rel=1e-9)
    loader = torch.utils.data.DataLoader(codes, batch_size=24, num_workers=2)
    np.testing.assert_array_equal(next(iter(loader)).numpy(), stored.astype(np.float32))


def test_codes_of_something_else_are_refused(tmp_path):
    open_key_codes(tmp_path, "a")
    with pytest.raises(ValueError, match="another autoencoder, collection, resolution"):
        open_key_codes(tmp_path, "b")


def test_training_mode_does_not_perturb(autoencoder, dataset, tmp_path):
    for name, mode in (("a", True), ("b", False)):
        open_key_codes(tmp_path / name, "x")
        write_key_codes(autoencoder.train(mode), dataset, tmp_path / name)
    np.testing.assert_array_equal(*(np.load(tmp_path / name / "codes-00000.npy") for name in "ab"))


def test_nothing_readable(autoencoder, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_text("no image")
    open_key_codes(tmp_path / "codes", "a")
    write_key_codes(autoencoder, load_collection(tmp_path / "images"), tmp_path / "codes")
    with pytest.raises(ValueError, match="holds no key codes; give a collection with at least one readable image"):
        finish_key_codes(tmp_path / "codes", 1)

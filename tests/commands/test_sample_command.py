import numpy as np
import pytest
from PIL import Image

from brics_diffusers.commands import main
from brics_diffusers.pipelines.sampling import sample_path


@pytest.fixture
def flags(saved_pipe, tmp_path):
    words = ["sample", saved_pipe, "--num_samples", 3, "--batch_size", 2, "--num_inference_steps", 2]
    return [*map(str, words), "--output_dir", str(tmp_path / "out")]


def test_files_and_grid(flags, tmp_path, capsys):
    main(flags)
    printed = capsys.readouterr()
    assert printed.out.startswith("3 images in ") and "Sampling" in printed.err and "Denoising" in printed.err
    folder, grid = tmp_path / "out" / "samples", Image.open(tmp_path / "out" / "grid.png")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0000000.png", "0000001.png", "0000002.png", "samples.json"]
    assert grid.size == (3 * 34 + 2, 36)
    for index in range(3):
        x = 2 + 34 * index
        sample = np.array(Image.open(sample_path(folder, index)))
        # Rounded down once more.
        assert np.abs(np.array(grid.crop((x, 2, x + 32, 34))).astype(int) - sample).max() <= 1
    kept = sample_path(folder, 0).stat().st_mtime_ns
    main([*flags, "--num_samples", "4"])  # goes on
    assert sample_path(folder, 3).is_file() and sample_path(folder, 0).stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--scheduler", "EDMEulerScheduler"], "EDMEulerScheduler does not denoise predictions of noise"),
        (["--scheduler", "NoScheduler"], "NoScheduler is no scheduler of diffusers"),
    ],
)
def test_errors(flags, changes, message):
    with pytest.raises(SystemExit, match=f"brics-diffusers sample: {message}"):
        main(flags + changes)


def test_missing_pipeline(tmp_path):
    with pytest.raises(SystemExit, match="brics-diffusers sample: .* holds no model_index.json"):
        main(["sample", str(tmp_path / "missing"), "--output_dir", str(tmp_path)])

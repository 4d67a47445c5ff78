"""Loading of saved models: no pickles, weights that do not fit, foreign code, little memory."""

import functools
import json
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    return tmp_path


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def replace_by_pickle(component, name, content):
    (component / WEIGHTS).unlink()
    torch.save(content, component / name)


class TestPickles:
    @pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "last.ckpt"])
    @pytest.mark.parametrize("component", ["autoencoder", "unet"])
    def test_none_is_read(self, folder, tmp_path, component, name):
        replace_by_pickle(folder / component, name, Bomb(tmp_path / "exploded"))
        fault = (
            rf"no file named {WEIGHTS} found in directory \S*/{component}\); only safetensors are read, as a pickle"
        )
        with pytest.raises(OSError, match=fault) as raised:
            BricsKeyCodePipeline.from_pretrained(folder)
        assert str(raised.value).count("as a pickle can run any code") == 1
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("options", [{}, {"use_safetensors": None}, {"subfolder": "autoencoder"}])
    def test_autoencoder_alone(self, folder, options):
        weights = load_file(folder / "autoencoder" / WEIGHTS)
        replace_by_pickle(folder / "autoencoder", "diffusion_pytorch_model.bin", weights)  # one that diffusers reads
        path = folder if "subfolder" in options else folder / "autoencoder"
        with pytest.raises(
            OSError, match="autoencoder can't be loaded .*; only safetensors are read, as a pickle can"
        ):
            BricsAutoencoder.from_pretrained(path, **options)

    def test_through_diffusion_pipeline(self, folder):
        replace_by_pickle(folder / "autoencoder", "diffusion_pytorch_model.bin", {})
        with pytest.raises(
            OSError, match="autoencoder can't be loaded .*; only safetensors are read, as a pickle can"
        ):
            DiffusionPipeline.from_pretrained(folder)

    def test_beside_safetensors_they_are_ignored(self, folder, tmp_path):
        torch.save(Bomb(tmp_path / "exploded"), folder / "unet" / "diffusion_pytorch_model.bin")
        BricsKeyCodePipeline.from_pretrained(folder)
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("load", [BricsAutoencoder.from_pretrained, BricsKeyCodePipeline.from_pretrained])
    def test_they_cannot_be_asked_for(self, load, folder):
        with pytest.raises(ValueError, match="use_safetensors is False, but pickled weights are never read"):
            load(folder, use_safetensors=False)

    def test_no_weights_at_all(self, folder):
        (folder / "autoencoder" / WEIGHTS).unlink()
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
            BricsAutoencoder.from_pretrained(folder, subfolder="autoencoder")


class TestWeightsThatDoNotFit:
    def change(self, path, **changes):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    def test_a_shape_of_the_autoencoder(self, folder):
        self.change(folder / "autoencoder", level_channels=8)
        expected = (
            r"autoencoder are not those of its config.json: grids.entries expected shape .*8\]\), but got .*4\]\)"
        )
        for load in (BricsAutoencoder.from_pretrained, DiffusionPipeline.from_pretrained):
            with pytest.raises(ValueError, match=expected):
                load(folder / "autoencoder" if load == BricsAutoencoder.from_pretrained else folder)

    def test_a_shape_of_the_unet(self, folder):
        self.change(folder / "unet", block_out_channels=[16, 48])
        with pytest.raises(ValueError, match=r"down_blocks\.\S+ expected shape"):
            BricsKeyCodePipeline.from_pretrained(folder)

    def test_missing_weights(self, folder):
        path = folder / "autoencoder"
        self.change(path, encoder_layers_per_block=2)
        with pytest.raises(ValueError, match=r"encoder\.down_blocks\.\S+ and 33 more are not there"):
            BricsAutoencoder.from_pretrained(path)

    def test_a_missing_weight_of_the_unet(self, folder):
        weights = load_file(folder / "unet" / WEIGHTS)
        del weights["conv_out.bias"]
        save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"weights of .*/unet are not .*: conv_out.bias is not there"):
            BricsKeyCodePipeline.from_pretrained(folder)

    @pytest.mark.parametrize("component", ["autoencoder", "unet"])
    def test_a_missing_weight_without_low_cpu_mem_usage(self, folder, component):
        path = folder / component / WEIGHTS
        weights = load_file(path)
        name = min(weights)
        del weights[name]
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"weights of .*{component}.*: {name} is not there"):
            BricsKeyCodePipeline.from_pretrained(folder, low_cpu_mem_usage=False)

    @pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}])
    @pytest.mark.parametrize("component", ["autoencoder", "unet"])
    def test_a_weight_that_only_the_index_of_shards_has(self, pipe, folder, component, options):
        path = folder / component
        getattr(pipe, component).save_pretrained(path, max_shard_size="20KB")
        index = json.loads((path / f"{WEIGHTS}.index.json").read_text())
        name, shard = min(index["weight_map"].items())
        weights = load_file(path / shard)
        del weights[name]
        save_file(weights, path / shard, metadata={"format": "pt"})
        (path / WEIGHTS).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"weights of .*{component}.*: {name} is not there"):
            BricsKeyCodePipeline.from_pretrained(folder, **options)

    def test_loading_info(self, folder):
        model, info = BricsAutoencoder.from_pretrained(folder / "autoencoder", output_loading_info=True)
        assert isinstance(model, BricsAutoencoder) and info["missing_keys"] == []


class TestCodeInAModelFolder:
    @pytest.fixture(autouse=True)
    def modules_elsewhere(self, monkeypatch, tmp_path_factory):
        """diffusers copies code that it may execute into the user's cache."""
        folder = str(tmp_path_factory.mktemp("modules"))
        monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
        monkeypatch.setattr("sys.path", list(sys.path))

    def plant(self, folder, where):
        """A Python file that leaves a mark when it is executed, named by model_index.json."""
        mark = folder / "executed"
        index = json.loads((folder / "model_index.json").read_text())
        if where == "pipeline":
            index["_class_name"] = ["pipeline", "BricsKeyCodePipeline"]
            path = folder / "pipeline.py"
        else:
            index[where] = ["custom", index[where][1]]
            path = folder / where / "custom.py"
        path.write_text(
            f"open({str(mark)!r}, 'w')\nfrom brics_diffusers import *\nfrom diffusers import UNet2DModel\n"
        )
        (folder / "model_index.json").write_text(json.dumps(index))
        return mark

    @pytest.mark.parametrize("where", ["pipeline", "autoencoder", "unet", "scheduler"])
    def test_it_needs_trust(self, folder, where):
        mark = self.plant(folder, where)
        # An explicit pipeline class is taken as it is, whatever pipeline.py says.
        loads = [DiffusionPipeline.from_pretrained] + [BricsKeyCodePipeline.from_pretrained] * (where != "pipeline")
        for load in loads:
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                load(folder)
        assert not mark.exists()
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert mark.exists()  # the file would have been found

    def test_files_that_nothing_names(self, folder):
        for name in ("pipeline.py", "__init__.py", "autoencoder/autoencoder_brics.py", "autoencoder/__init__.py"):
            (folder / name).write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
        BricsKeyCodePipeline.from_pretrained(folder)
        BricsAutoencoder.from_pretrained(folder, subfolder="autoencoder")
        assert not (folder / "executed").exists()


class TestLowCpuMemUsage:
    @pytest.mark.parametrize(("options", "devices"), [({}, {"meta"}), ({"low_cpu_mem_usage": False}, {"cpu"})])
    def test_models_are_built_where_it_says(self, folder, monkeypatch, options, devices):
        built = []
        for model_class in (BricsAutoencoder, UNet2DModel):

            @functools.wraps(model_class.__init__)
            def build(self, *args, _init=model_class.__init__, **kwargs):
                _init(self, *args, **kwargs)
                built.append((type(self), self.device.type))

            monkeypatch.setattr(model_class, "__init__", build)
        pipeline = BricsKeyCodePipeline.from_pretrained(folder, **options)
        assert pipeline.device.type == "cpu"
        # The last of each; before it, all weights were looked for.
        assert {dict(built)[model_class] for model_class in (BricsAutoencoder, UNet2DModel)} == devices
        built.clear()
        BricsAutoencoder.from_pretrained(folder / "autoencoder", **options)
        assert built[-1][1] in devices

    def test_values_are_the_same(self, pipe, folder):
        loaded = BricsKeyCodePipeline.from_pretrained(folder, low_cpu_mem_usage=False)
        for name in ("autoencoder", "unet"):
            weights = getattr(pipe, name).state_dict()
            for key, value in getattr(loaded, name).state_dict().items():
                assert torch.equal(value, weights[key]), key

import ast
import inspect
import json
import types

import pytest
from diffusers import DDIMScheduler

import brics_diffusers
from brics_diffusers.hub import remote_code
from brics_diffusers.hub.published_files import LIST, public_files
from brics_diffusers.hub.remote_code import STAND_INS, bundle, write_remote_code


def execute(text: str) -> types.ModuleType:
    module = types.ModuleType("bundled")
    exec(compile(text, "bundled.py", "exec"), vars(module))
    return module


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package that takes the place of this one."""
    root = tmp_path / "brics_diffusers"
    monkeypatch.setattr(remote_code, "PACKAGE", root)

    def write(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            path = root / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    return write


class TestBundle:
    def test_names_of_modules_do_not_mix(self, package):
        lines = ["from .one import value as first", "from . import two", "value = 3"]
        package(
            {
                "entry": "\n".join([*lines, "result = first(), two.value(), value"]),
                "one": '"""One."""\nnumber = 1\ndef value():\n    return number\n',
                "two": "from .one import value as one\nnumber = 2\ndef value():\n    return number + one()\n",
            }
        )
        assert execute(bundle("brics_diffusers.entry")).result == (1, 3, 3)

    def test_a_module_is_executed_once_and_only_if_it_is_imported(self, package):
        package(
            {
                "entry": "from .a import log\nfrom .b import same\ndef late():\n    from .c import log as other\n",
                "a": "log = ['a']\n",
                "b": "from .a import log\nsame = log\n",
                "c": "from .a import log\nimport missing_package\n",
            }
        )
        module = execute(bundle("brics_diffusers.entry"))
        assert module.log is module.same
        with pytest.raises(ModuleNotFoundError, match="missing_package"):
            module.late()

    def test_names_through_packages(self, package):
        package(
            {
                "models/__init__": "from .deep import Model\nfrom .unused import Other\n",
                "models/deep": "from ..base import Base\n\n\nclass Model(Base):\n    pass\n",
                "models/unused": "1 / 0\n",
                "base": "class Base:\n    pass\n",
                "entry": "from .models import (\n    Model,\n)\n",
            }
        )
        text = bundle("brics_diffusers.entry")
        assert execute(text).Model.__mro__[1].__name__ == "Base" and "1 / 0" not in text

    def test_text_stays_the_same(self, package):
        text = 'x = """a\n  b\nc"""\ny = f"""d\n{x}\n"""\n\n\ndef f():\n    """Doc.\n\n    More.\n    """\n'
        package({"entry": "from . import texts\n", "texts": text})
        bundled, plain = execute(bundle("brics_diffusers.entry")).texts, execute(text)
        assert (bundled.x, bundled.y) == (plain.x, plain.y)
        assert inspect.getsource(bundled.f) == text[text.index("def f") :]  # which compilers of kernels read

    def test_text_that_cannot_be_quoted(self, package):
        package({"entry": "from . import texts\n", "texts": "x = '''a'''\n"})
        with pytest.raises(ValueError, match="texts.py has three apostrophes in a row"):
            bundle("brics_diffusers.entry")

    def test_a_name_that_a_package_defines_itself(self, package):
        package({"models/__init__": "size = 3\n", "entry": "from .models import size\n"})
        with pytest.raises(ValueError, match="imports size from .*; import it from the module that defines it"):
            bundle("brics_diffusers.entry")

    @pytest.mark.parametrize(
        ("name", "class_name"),
        [
            ("models.autoencoder_brics", "BricsAutoencoder"),
            ("pipelines.pipeline_brics_key_code", "BricsKeyCodePipeline"),
            ("schedulers.scheduling_cosine_variant", "CosineVariantScheduler"),
        ],
    )
    def test_this_package(self, name, class_name):
        text = bundle(f"brics_diffusers.{name}", STAND_INS)
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in imports if node.level or node.module.startswith("brics_diffusers")]
        assert "Licensed under the Apache License, Version 2.0" in text.split("\n\n")[0]
        # diffusers looks for the class at the top level.
        assert class_name in [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]


def files_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class TestWrite:
    def test_only_a_pipeline_of_this_package(self, tmp_path):
        with pytest.raises(ValueError, match="is not the folder of a BricsKeyCodePipeline"):
            write_remote_code(tmp_path, tmp_path / "out")

    def test_not_into_the_pipeline(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds the pipeline itself"):
            write_remote_code(tmp_path, tmp_path)

    def test_only_what_is_ours_is_bundled(self, pipe, tmp_path):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(tmp_path / "pipe")
        code = write_remote_code(tmp_path / "pipe", tmp_path / "code")
        assert code == ["pipeline.py", "autoencoder/autoencoder_brics.py"]
        assert files_in(tmp_path / "code") == {*public_files(tmp_path / "pipe"), *code, "README.md", LIST}
        assert brics_diffusers.__version__ in (tmp_path / "code/pipeline.py").read_text()

    def test_a_used_folder(self, pipe, tmp_path):
        source, target = tmp_path / "pipe", tmp_path / "code"
        pipe.save_pretrained(source, max_shard_size="100KB")
        write_remote_code(source, target)
        (target / "unet/notes.txt").write_text("mine")
        (target / "README.md").write_text((target / "README.md").read_text() + "Mine.\n")
        assert "unet/diffusion_pytorch_model.safetensors.index.json" in files_in(target)
        other = tmp_path / "other"
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(other)
        code = write_remote_code(other, target)
        assert files_in(target) == {*public_files(other), *code, "README.md", LIST, "unet/notes.txt"}
        assert (target / "README.md").read_text().endswith("Mine.\n")

    def test_nothing_says_where_files_lie(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "pipe")
        index = json.loads((tmp_path / "pipe/model_index.json").read_text())
        (tmp_path / "pipe/model_index.json").write_text(json.dumps(index | {"_name_or_path": "/home/me/a"}))
        (tmp_path / "pipe/training_config.json").write_text('{"dataset_name": "/home/me/b"}')
        write_remote_code(tmp_path / "pipe", tmp_path / "code")
        assert not [path for path in (tmp_path / "code").rglob("*.json") if "/home/me" in path.read_text()]

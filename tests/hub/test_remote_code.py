"""The package's code in single files, for pipelines that are loaded without it."""

import inspect
import re
import sys
import types

import pytest
from diffusers import DDIMScheduler

import brics_diffusers
from brics_diffusers.hub import remote_code
from brics_diffusers.hub.published_files import public_files
from brics_diffusers.hub.remote_code import bundle, write_remote_code


def execute(text: str) -> types.ModuleType:
    module = types.ModuleType("bundled")
    exec(compile(text, "bundled.py", "exec"), vars(module))
    return module


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package that takes the place of this one."""
    root = tmp_path / "brics_diffusers"
    monkeypatch.setattr(remote_code, "PACKAGE", root)
    monkeypatch.setattr("sys.meta_path", list(sys.meta_path))

    def write(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            path = root / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    return write


class TestBundle:
    def test_a_module_is_executed_once_and_only_if_it_is_imported(self, package):
        entry = "from .models.a import log\nfrom .b import same\ndef late():\n    from .c import log as other\n"
        package(
            {
                "entry": entry + "class Entry:\n    parts = log, same, late\n",
                "models/__init__": "1 / 0\n",
                "models/a": "log = ['a']\n",
                "b": "from .models.a import log\nfrom .models import a\nsame = a.log\n",
                "c": "from .b import same\nimport missing_package\n",
                "other": "from .entry import log\nclass Other:\n    log = log\n",
                "unrelated": "log = 'unrelated'\n",
            }
        )
        texts = bundle({"Entry": "entry", "Other": "other"})
        log, same, late = execute(texts["Entry"]).Entry.parts
        assert log is same and execute(texts["Other"]).Other.log is log and "unrelated" not in texts["Entry"]
        with pytest.raises(ModuleNotFoundError, match="missing_package"):
            late()

    def test_names_through_packages(self, package):
        package(
            {
                "models/__init__": '"""Models."""\nfrom .deep import Model\n',
                "models/deep": "from ..base import Base\n\n\nclass Model(Base):\n    pass\n",
                "base": "class Base:\n    pass\n",
                "entry": "from .models import (\n    Model,\n)\n\n\nclass Entry(Model):\n    pass\n",
            }
        )
        entry = execute(bundle({"Entry": "entry"})["Entry"]).Entry
        assert [cls.__name__ for cls in entry.__mro__[1:3]] == ["Model", "Base"]

    def test_text_stays_the_same(self, package):
        text = 'x = """a\n  b\nc"""\ny = f"""d\n{x}\n"""\n\n\nclass Entry:\n    """Doc.\n\n    More.\n    """\n'
        text += "\n    def method(self):\n        return 1  # one\n"
        package({"entry": text})
        entry, plain = execute(bundle({"Entry": "entry"})["Entry"]).Entry, execute(text)
        module = sys.modules[entry.__module__]
        assert (module.x, module.y, entry.__doc__) == (plain.x, plain.y, plain.Entry.__doc__)
        assert inspect.getsource(entry.method) == text[text.index("    def") :]  # which compilers of kernels read

    def test_text_that_cannot_be_quoted(self, package):
        package({"entry": "x = '''a'''\n"})
        with pytest.raises(ValueError, match="entry.py has three apostrophes in a row"):
            bundle({"Entry": "entry"})

    def test_diffusers_finds_nothing_to_copy_in_it(self):
        text = bundle({"BricsAutoencoder": "models.autoencoder_brics"})["BricsAutoencoder"]
        # diffusers reads imports by regular expressions like this one, in texts as well.
        imports = re.findall(r"^\s*(?:from|import)\s+(\S+)", text, flags=re.MULTILINE)
        assert set(imports) == {"importlib", "importlib.abc", "importlib.util", "sys"}
        assert "Licensed under the Apache License, Version 2.0" in text.split("\n\n")[0]


def files_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class TestWrite:
    def test_only_a_pipeline_of_this_package(self, tmp_path):
        with pytest.raises(ValueError, match="is not the folder of a BricsKeyCodePipeline"):
            write_remote_code(tmp_path, tmp_path / "out")

    def test_not_into_the_pipeline(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="onto itself"):
            write_remote_code(tmp_path, tmp_path)

    def test_only_what_is_ours_is_bundled(self, pipe, tmp_path):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(tmp_path / "pipe")
        code = write_remote_code(tmp_path / "pipe", tmp_path / "code")
        assert code == ["pipeline.py", "autoencoder/autoencoder_brics.py"]
        assert files_in(tmp_path / "code") == {*public_files(tmp_path / "pipe"), *code, "README.md"}
        assert brics_diffusers.__version__ in (tmp_path / "code/pipeline.py").read_text()

    def test_a_used_folder(self, pipe, tmp_path):
        source, target = tmp_path / "pipe", tmp_path / "code"
        pipe.save_pretrained(source, max_shard_size="100KB")
        write_remote_code(source, target)
        (target / "unet/notes.txt").write_text("mine")
        (target / "README.md").write_text((target / "README.md").read_text() + "Mine.\n")
        assert "unet/diffusion_pytorch_model.safetensors.index.json" in files_in(target)
        other = tmp_path / "other"
        pipe.save_pretrained(other)
        code = write_remote_code(other, target)
        assert files_in(target) == {*public_files(other), *code, "README.md", "unet/notes.txt"}
        assert (target / "README.md").read_text().endswith("Mine.\n")

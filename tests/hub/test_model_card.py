"""Model cards: what they say of a run, that users' edits stay, and the folder for publishing."""

import json

import pytest
from huggingface_hub import ModelCard

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.commands import main
from brics_diffusers.hub.absolute_paths import cut_absolute_paths
from brics_diffusers.hub.card import make_card, read_facts, write_card
from brics_diffusers.hub.published_files import export, public_files


SUMMARY = {
    "steps": 560,
    "images_seen": 4480,
    "training_images": 800,
    "dataset_on_hub": False,
    "validation": {"step": 560, "psnr": 25.5, "ssim": 0.75},
    "num_processes": 2,
    "mixed_precision": "bf16",
    "machine": {
        "device": "A Processor, 2 cores, 2 threads",
        "python": "3.11.7",
        "torch": "2.11.0",
        "diffusers": "0.42.1",
        "command": "train_autoencoder.py --config /home/me/configs/small.yaml --dataset_name=/home/me/emoji",
    },
}
CONFIG = {"dataset_name": "/home/me/emoji", "dataset_split": "train", "learning_rate": 0.002, "train_batch_size": 8}
RECONSTRUCTION = {
    "protocol": "standard",
    "dataset_name": "/home/me/emoji",
    "split": "validation",
    "images": 60,
    "metrics": {"psnr": {"mean": 25.25, "two_std": 3.5, "left_out": 0}, "lpips": {"mean": None, "two_std": None}},
}
GENERATION = {
    "input1": {"num_images": 50},
    "input2": {"num_images": 800, "source": "/home/me/emoji", "split": "train"},
    "extractors": {"fid": {"name": "random-conv", "weights": "not trained"}},
    "metrics": {"fid": 12.5, "inception_score": None},
}


@pytest.fixture
def pipeline(pipe, tmp_path):
    """A saved pipeline that nobody has trained."""
    folder = tmp_path / "emoji-model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(pipeline):
    """The same with what a run leaves."""
    write = {"training_summary": SUMMARY, "training_config": CONFIG, "reconstruct-metrics-standard": RECONSTRUCTION}
    write |= {"reports/generation-metrics": GENERATION}
    (pipeline / "reports").mkdir()
    for name, content in write.items():
        (pipeline / f"{name}.json").write_text(json.dumps(content))
    return pipeline


class TestContent:
    def test_a_run(self, trained):
        text = make_card(trained)
        for row in (
            "| steps | 560 |",
            "| images seen | 4480 |",
            "| images | emoji |",
            "| train batch size | 8 |",
            "| device | A Processor, 2 cores, 2 threads |",
            "| PSNR | 25.2500 ± 3.5000 | reconstruction, protocol standard, 60 images of emoji (validation); ± is two",
            "| fid | 12.5 | 50 generated and 800 real images of emoji (train); random-conv (not trained) |",
            "| PSNR | 25.5 | validation of the run, step 560 |",
        ):
            assert row in text
        assert (
            "launch --mixed_precision bf16 training/train_autoencoder.py --config small.yaml --dataset_name=emoji"
            in text
            and "/home/me" not in text
        )
        assert "generates 32 x 32 images" in text and "key code of 8 x 8 x 4 numbers" in text
        assert "LPIPS" not in text and "inception" not in text  # which were not measured

    def test_nothing_is_made_up(self, pipeline):
        text = make_card(pipeline)
        assert "None were measured." in text and "This folder has no record of the training." in text

    def test_counts(self, pipeline, pipe):
        counts = read_facts(pipeline)["parameters"]
        assert counts == {"autoencoder": pipe.autoencoder.num_parameters(), "unet": pipe.unet.num_parameters()}

    def test_both_stages(self, trained):
        stage_one = SUMMARY | {"config": {"learning_rate": 0.125}}
        stage_one["machine"] = SUMMARY["machine"] | {"command": "OMP_NUM_THREADS=2 train_autoencoder.py --seed 3"}
        summary = SUMMARY | {"validation": None, "autoencoder_training": stage_one}
        (trained / "training_summary.json").write_text(json.dumps(summary))
        text = make_card(trained)
        assert "| learning rate | 0.125 |" in text and "validation of the autoencoder's run, step 560" in text
        # Where a shell sees it: before the launcher, which hands it on.
        launch = "OMP_NUM_THREADS=2 accelerate launch --mixed_precision bf16 training/train_autoencoder.py --seed 3"
        assert f"\n{launch}\n" in text

    def test_autoencoder_alone(self, trained):
        (trained / "model_index.json").unlink()
        text = make_card(trained, name="me/ae")
        assert 'BricsAutoencoder.from_pretrained("me/ae", subfolder="autoencoder")' in text
        assert "diffusion" not in text.split("begin training")[0].replace("diffusers", "")


def test_metadata(trained):
    assert ModelCard(make_card(trained)).data.datasets is None
    (trained / "training_config.json").write_text(json.dumps({"dataset_name": "me/emoji"}))
    (trained / "training_summary.json").write_text(json.dumps({"dataset_on_hub": True}))
    card = ModelCard(make_card(trained, license_name="cc0-1.0"))
    assert card.data.to_dict() == {
        "license": "cc0-1.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["brics", "arxiv:2305.18601", "diffusers:BricsKeyCodePipeline"],
        "datasets": ["me/emoji"],
    }
    assert card.text.strip().startswith("# emoji-model")


class TestEdits:
    def test_generating_again_changes_nothing(self, trained):
        text = write_card(trained).read_text()
        assert write_card(trained).read_text() == text

    def test_text_outside_generated_parts_stays(self, trained):
        text = write_card(trained).read_text().replace("# emoji-model\n", "# Faces\n\nBy me.\n")
        text = text.replace("<!-- begin metrics -->", "A word on metrics.\n\n<!-- begin metrics -->")
        (trained / "README.md").write_text(text.replace("## Limits", "## Limitations") + "\nThe end.\n")
        (trained / "training_summary.json").write_text(json.dumps(SUMMARY | {"steps": 561}))
        assert write_card(trained).read_text() == text.replace("| steps | 560 |", "| steps | 561 |") + "\nThe end.\n"

    def test_a_part_without_its_comments_is_the_users(self, trained):
        text = write_card(trained).read_text()
        before, rest = text.split("<!-- begin limits -->")
        text = before + "My own limits." + rest.split("<!-- end limits -->")[1]
        assert make_card(trained, text) == text

    def test_a_card_of_the_user_gets_the_parts_at_its_end(self, trained):
        text = make_card(trained, "---\nlicense: mit\n---\n\nMine.\n")
        assert text.split("---\n")[2].startswith("\nMine.\n\n<!-- begin about -->")

    def test_metadata_of_the_user_stay(self, trained):
        mine = "license: mit\ntags:\n- faces\nmine:\n  a: 1\n"
        front = make_card(trained, f"---\n{mine}---\nHello.\n", license_name="apache-2.0").split("---\n")[1]
        added = front.removeprefix(mine).splitlines()  # in any order, which is huggingface_hub's matter
        assert sorted(added) == ["library_name: diffusers", "pipeline_tag: unconditional-image-generation"]

    def test_a_card_of_metadata_alone_gets_a_title(self, trained):
        text = make_card(trained, "---\nlicense: mit\n---\n")
        assert text.split("---\n")[2].startswith("\n# emoji-model\n\n<!-- begin about -->")

    @pytest.mark.parametrize(
        "existing", [None, "---\nlicense: unknown\n---\n", "---\nlicense: 'unknown' # todo\n---\n"]
    )
    def test_license(self, trained, existing):
        assert ModelCard(make_card(trained, existing)).data.license == "unknown"
        for name in ("no", "1.0", "apache-2.0"):
            assert ModelCard(make_card(trained, existing, license_name=name)).data.license == name

    @pytest.mark.parametrize("name", ["Apache-2.0", "cc by", "", r"\1"])
    def test_license_that_is_none(self, trained, name, capsys):
        with pytest.raises(SystemExit):
            main(["card", str(trained), "--hub_license", name])
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"argument --hub_license: {name!r} is no identifier of a license" in error
        assert error.endswith("for instance apache-2.0.") and not (trained / "README.md").exists()

    @pytest.mark.parametrize("front", ["a: [", "- a list"])
    def test_metadata_that_are_none(self, trained, front):
        with pytest.raises(ValueError, match="the metadata of README.md can't be read .*; correct them"):
            make_card(trained, f"---\n{front}\n---\nHello.\n")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/runs/a", "a"),
        ("/home/me/my runs/a b", "a b"),
        ("x.py --a=/home/me/b.yaml --c ../d '/home/me/e'", "x.py --a=b.yaml --c ../d 'e'"),
        ("~/secret/data", "data"),
        ("~/my secret/data", "data"),
        ("in ~me/secret/data and /x", "in data and /x"),
        (
            "x.py '/home/me/my runs/a b' --c '--d=/home/me/my runs/a' \"/home/me/e f\"",
            "x.py 'a b' --c '--d=a' \"e f\"",
        ),
        ("x.py --d=/home/me/ --e /home/me//f/ --g=/data", "x.py --d=me --e f --g=/data"),
        ("file:///home/me/x", "x"),
        ("from file:///home/me/x, (/home/me/y)", "from x, (y)"),
        ("a person's 1/2 / 3/4 of it's s3://a/b and '--c=d/e'", "a person's 1/2 / 3/4 of it's s3://a/b and '--c=d/e'"),
        ("https://arxiv.org/abs/1 and/or user/name", "https://arxiv.org/abs/1 and/or user/name"),
        ({"a": ["/b/c", 1, None]}, {"a": ["c", 1, None]}),
    ],
)
def test_cut_absolute_paths(value, expected):
    assert cut_absolute_paths(value) == expected


class TestExport:
    def test_only_what_is_published_is_copied(self, trained, tmp_path):
        (trained / "checkpoint-4").mkdir()
        (trained / "checkpoint-4/optimizer.bin").write_bytes(b"state")
        target = tmp_path / "named"
        (target / "reports").mkdir(parents=True)
        (target / "pictures.png").write_bytes(b"mine")
        main(["card", str(trained), "--export_dir", str(target), "--hub_license", "apache-2.0"])
        files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        assert files == {*public_files(trained), "README.md", "pictures.png"}
        assert "reports/generation-metrics.json" in files and "checkpoint-4/optimizer.bin" not in files
        card = (target / "README.md").read_text()
        assert "license: apache-2.0" in card and 'from_pretrained("named")' in card
        assert "/home/me" not in (target / "training_config.json").read_text()
        assert BricsKeyCodePipeline.from_pretrained(target).unet.config.sample_size

    def test_the_runs_card_is_the_first(self, trained, tmp_path):
        path = write_card(trained)
        path.write_text(path.read_text().replace("<!-- begin limits -->", "Of mine.\n\n<!-- begin limits -->"))
        card = export(trained, tmp_path / "named", "apache-2.0").read_text()
        assert "license: apache-2.0" in card and "# named\n" in card and "# emoji-model\n" not in card
        assert "Of mine." in card and 'from_pretrained("named")' in card

    def test_nothing_is_left_of_an_earlier_export(self, trained, tmp_path):
        target = tmp_path / "named"
        export(trained, target)
        stale = {"unet/diffusion_pytorch_model.safetensors.index.json", "curves.png"}
        mine = {"unet/notes.json", "unet/diffusion_pytorch_model.fp16.safetensors", "notes/curves.png"}
        (target / "notes").mkdir()
        for name in stale | mine:
            (target / name).write_text("{}")
        (trained / "reports/generation-metrics.json").unlink()
        assert "random-conv" not in export(trained, target).read_text()
        files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        assert files == {*public_files(trained), "README.md", *mine}
        assert BricsKeyCodePipeline.from_pretrained(target).unet.config.sample_size

    @pytest.mark.parametrize("flags, message", [((), "onto itself"), (("--push_to_hub",), "exclude each other")])
    def test_refusals(self, trained, flags, message):
        with pytest.raises(SystemExit, match=message):
            main(["card", str(trained), "--export_dir", str(trained), *flags])

    def test_folder_that_can_not_be_written(self, trained, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit, match="--export_dir .*file is no folder that can be made"):
            main(["card", str(trained), "--export_dir", str(tmp_path / "file")])

    def test_no_model(self, tmp_path):
        with pytest.raises(SystemExit, match="has no autoencoder/config.json"):
            main(["card", str(tmp_path), "--export_dir", str(tmp_path / "named")])
        assert not (tmp_path / "named").exists()

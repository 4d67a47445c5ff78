"""The model card of a run or a saved pipeline: README.md with metadata for the Hub, made from the run's own files.

Whatever is generated stands between two comments, `<!-- begin NAME -->` and `<!-- end NAME -->`. When a card is made
again, these parts are replaced where they stand and all other text stays; a part whose comments were taken away is not
added again, unless none is left. Of the metadata, keys that are there stay as they are, and missing ones are added.
"""

import json
import os
import re
from pathlib import Path

import yaml
from safetensors import safe_open

from ..utils.reports import markdown_table


CARD = "README.md"
PAPER = "https://arxiv.org/abs/2305.18601"
METRIC_REPORTS = ("reconstruct-metrics-*.json", "generation-metrics.json")
CITATION = """\
```bibtex
@article{brics2023,
  title   = {BRICS: Bi-level feature Representation of Image CollectionS},
  journal = {arXiv preprint arXiv:2305.18601},
  year    = {2023}
}
```"""
# Pictures in a run's folder, with what their captions say.
PICTURES = {
    "samples.png": "Samples, not selected",
    "reconstructions.png": "Held-out images above their reconstructions",
}
CURVES = "curves.png"
# How a path begins that says where files lie; with a user's name too, as in ~me/.
ABSOLUTE = r"(?:file:/|~[\w.-]*)?/"
# Settings of a run that its card lists; all others are in training_config.json.
SETTINGS = ("train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler", "seed", "random_flip")


def metric_files(folder: str | os.PathLike) -> list[Path]:
    """Reports of `brics-diffusers reconstruct-metrics` and `generation-metrics` in a run's folder or its `reports`."""
    folders = (Path(folder), Path(folder) / "reports")
    return sorted(path for parent in folders for name in METRIC_REPORTS for path in parent.glob(name))


def without_folders(value):
    r"""
    Cuts absolute paths to their last part: where files lie at home is nobody's business.

    Args:
        value: What JSON can hold: strings, numbers, lists, dictionaries.

    Returns:
        The same with strings such as `--config=/home/me/a.yaml` shortened to `--config=a.yaml`.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(rf"{ABSOLUTE}.*", value):
        return _last_part(value)
    value = re.sub(rf"""(?<!\w)(['"])((?:--?[\w-]+=)?)({ABSOLUTE}.+?)\1""", _quoted_last_part, value)
    return re.sub(rf"""(?<![\w./:~-]){ABSOLUTE}[^\s'",]+""", lambda match: _last_part(match[0]), value)


def _quoted_last_part(match: re.Match) -> str:
    quote, flag, path = match.groups()
    return f"{quote}{flag}{_last_part(path)}{quote}"


def _last_part(path: str) -> str:
    """`c` of `/a/b/c/` or `file:///a/b/c`; folders of the root, which everybody has, stay as they are."""
    parts = [part for part in re.sub("^file:", "", path).split("/") if part]
    return path if len(parts) < 2 else parts[-1]


def read_facts(folder: str | os.PathLike) -> dict:
    r"""
    What a folder says of a model and its training. Nothing is assumed: what no file says is missing.

    Args:
        folder (`str`): A run of either stage, or a saved pipeline.

    Returns:
        `dict`: `"models"` (configurations by name), `"parameters"` (counts by name), `"is_pipeline"`, `"config"`
        (flags of the training script), `"summary"` (how it ended), `"metrics"` (reports), `"pictures"` (names).

    Raises:
        `FileNotFoundError`: If the folder holds no model.
    """
    folder = Path(folder)
    is_pipeline = (folder / "model_index.json").is_file()
    configs = {name: _read_json(folder / name / "config.json") for name in ("autoencoder", "unet")}
    configs = {name: config for name, config in configs.items() if config}
    if "autoencoder" not in configs:
        raise FileNotFoundError(f"{folder} has no autoencoder/config.json; name a finished run or a saved pipeline.")
    pictures = [name for name in (*PICTURES, CURVES) if (folder / name).is_file()]
    return without_folders(
        {
            "models": configs,
            "parameters": {name: _count_parameters(folder / name) for name in configs},
            "is_pipeline": is_pipeline,
            "config": _read_json(folder / "training_config.json"),
            "summary": _read_json(folder / "training_summary.json"),
            "metrics": [_read_json(path) for path in metric_files(folder)],
            "pictures": pictures,
        }
    )


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _count_parameters(folder: Path) -> int:
    """Numbers in the weights, as their headers say."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                count += size
    return count


def metadata(facts: dict, license_name: str | None = None) -> dict:
    r"""
    Metadata for the Hub.

    Args:
        facts (`dict`): Result of [`read_facts`].
        license_name (`str`, *optional*): Identifier of the weights' license; `"unknown"` by default.

    Returns:
        `dict`: `license`, `library_name`, `pipeline_tag`, `tags`, and `datasets` if they come from the Hub.
    """
    task = "unconditional-image-generation" if facts["is_pipeline"] else "image-to-image"
    tags = ["brics", "arxiv:2305.18601", "diffusers:BricsKeyCodePipeline" if facts["is_pipeline"] else "autoencoder"]
    result = {"license": license_name or "unknown", "library_name": "diffusers", "pipeline_tag": task, "tags": tags}
    dataset = facts["config"].get("dataset_name")
    if dataset and facts["summary"].get("dataset_on_hub"):
        result["datasets"] = [dataset]
    return result


def make_card(
    folder: str | os.PathLike, existing: str | None = None, repo_id: str | None = None, license_name: str | None = None
) -> str:
    r"""
    The card of a run or pipeline.

    Args:
        folder (`str`): Its folder.
        existing (`str`, *optional*): A card to renew; see above for what stays.
        repo_id (`str`, *optional*): Its name on the Hub, for the code in the card.
        license_name (`str`, *optional*): License of the weights, for metadata that name none.

    Returns:
        `str`: Markdown with YAML in front.

    Raises:
        `FileNotFoundError`: If the folder holds no model.
        `ValueError`: If the metadata of the existing card are not valid YAML.
    """
    facts = read_facts(folder)
    name = repo_id or _own_names(folder, facts["config"])[0]
    front, text = _split(existing or "")
    text = text if text.strip() else f"\n# {_title(name)}\n"
    parts = {part: f"<!-- begin {part} -->\n{write(facts, name)}\n<!-- end {part} -->" for part, write in PARTS}
    pattern = re.compile(rf"<!-- begin ({'|'.join(parts)}) -->.*?<!-- end \1 -->", re.DOTALL)
    text, found = pattern.subn(lambda match: parts[match[1]], text)
    if not found:
        text = "\n\n".join([text.rstrip(), *parts.values()]) + "\n"
    return f"---\n{_complete(front, metadata(facts, license_name))}---\n{text}"


def write_card(folder: str | os.PathLike, license_name: str | None = None) -> Path:
    """Makes the card of a folder or renews the one there, see [`make_card`]; returns its path."""
    path = Path(folder) / CARD
    text = make_card(folder, read_card(path), license_name=license_name)
    path.write_text(text, encoding="utf-8")
    return path


def read_card(path: Path) -> str | None:
    """A card, or `None` if there is none; some editors put a byte order mark before it."""
    return path.read_text(encoding="utf-8-sig") if path.is_file() else None


def retitled(card: str, folder: str | os.PathLike, name: str) -> str:
    """A folder's card for publication under another name: its title follows, unless it is one that a user wrote."""
    text = _split(card)[1]
    titles = map(_title, _own_names(folder, _read_json(Path(folder) / "training_config.json")))
    match = re.match(rf"\s*# ({'|'.join(map(re.escape, titles))})[ \t]*(?=\n|$)", text)
    if match is None:
        return card
    head = len(card) - len(text)
    return card[: head + match.start(1)] + _title(name) + card[head + match.end(1) :]


def _own_names(folder: str | os.PathLike, config: dict) -> list[str]:
    """Names of the model that a folder itself gives, the first of which its card has."""
    return [*filter(None, [config.get("hub_model_id")]), Path(folder).resolve().name]


def _title(name: str) -> str:
    return name.rpartition("/")[2]


def _split(card: str) -> tuple[str, str]:
    """YAML in front of a card, and the text after it."""
    match = re.match(r"\s*---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|$)", card, re.DOTALL)
    return (match[1] or "", card[match.end() :]) if match else ("", card)


def _complete(front: str, generated: dict) -> str:
    """A card's YAML as it is, with the generated keys that it lacks; a license that was unknown may be known now."""
    known = yaml.safe_dump({"license": generated["license"]}).strip()
    unknown = r"""^license:[ \t]+(["']?)unknown\1(?=[ \t]*$|[ \t]+#)"""
    front = re.sub(unknown, lambda _: known, front, flags=re.MULTILINE)
    try:
        there = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the metadata of {CARD} are not valid YAML ({reason}); correct them.") from error
    if not isinstance(there, dict):
        raise ValueError(f"the metadata of {CARD} are a {type(there).__name__}; write them as `key: value`.")
    missing = {key: value for key, value in generated.items() if key not in there}
    return front + (yaml.safe_dump(missing, sort_keys=False) if missing else "")


def _about(facts: dict, name: str) -> str:
    config, size = facts["models"]["autoencoder"], facts["models"]["autoencoder"]["sample_size"]
    factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    what = f"A pipeline that generates {size} x {size} images" if facts["is_pipeline"] else "An autoencoder of images"
    rows = [
        {"part": part, "parameters": f"{count / 1e6:.2f} M"} for part, count in facts["parameters"].items() if count
    ]
    text = (
        f"{what}, made with `brics-diffusers`, an implementation of BRICS ([arXiv 2305.18601]({PAPER})). The "
        f"autoencoder turns a {size} x {size} image into a key code of {size // factor} x {size // factor} x "
        f"{config['key_channels']} numbers in [0, 1], looks features up with it in grids and decodes them"
        + ("; a diffusion model generates key codes." if facts["is_pipeline"] else ".")
    )
    shown = [f"![{text}]({name})\n\n{text}." for name, text in PICTURES.items() if name in facts["pictures"]]
    return "\n\n".join([text, *([markdown_table(rows).strip()] if rows else []), *shown])


def _usage(facts: dict, name: str) -> str:
    if not facts["is_pipeline"]:
        return f"""\
## Usage

```python
from brics_diffusers import BricsAutoencoder

autoencoder = BricsAutoencoder.from_pretrained("{name}", subfolder="autoencoder").eval()
key_codes = autoencoder.encode(images).key_codes  # images (B, 3, H, W) in [-1, 1]
images = autoencoder.decode(key_codes).sample
```"""
    return f"""\
## Usage

```python
from brics_diffusers import BricsKeyCodePipeline

pipe = BricsKeyCodePipeline.from_pretrained("{name}")
images = pipe(batch_size=4, num_inference_steps=250).images
reconstruction = pipe.reconstruct(images[0]).images[0]
```

Without `brics-diffusers`, where the repository has a revision `remote-code`, with the code of the model from there:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", revision="remote-code", trust_remote_code=True)
```"""


def _metrics(facts: dict, name: str) -> str:
    rows = []
    for report in facts["metrics"]:
        rows += _report_rows(report)
    runs = {"run": facts["summary"], "autoencoder's run": facts["summary"].get("autoencoder_training", {})}
    for which, summary in runs.items():
        validation = dict(summary.get("validation") or {})
        measured = f"validation of the {which}, step {validation.pop('step', '?')}"
        rows += [{"metric": key.upper(), "value": value, "measured": measured} for key, value in validation.items()]
    if not rows:
        return "## Metrics\n\nNone were measured."
    note = "\n± is two standard deviations over images." if any("±" in str(row["value"]) for row in rows) else ""
    return f"## Metrics\n\n{markdown_table(rows)}{note}".strip()


def _report_rows(report: dict) -> list[dict]:
    """Rows of one report, of either kind."""
    if "protocol" in report:
        images = f"{report['images']} images of {report['dataset_name']} ({report['split']})"
        measured = f"reconstruction, protocol {report['protocol']}, {images}"
        values = {key.upper(): f"{value['mean']:.4f} ± {value['two_std']:.4f}" for key, value in _finite(report)}
    else:
        generated, real = report["input1"], report["input2"]
        extractors = {f"{facts['name']} ({facts['weights']})" for facts in report["extractors"].values()}
        counts = f"{generated['num_images']} generated and {real['num_images']} real images"
        measured = f"{counts} of {real['source']} ({real['split']}); {' and '.join(sorted(extractors))}"
        sampling = generated.get("sampling")
        if sampling:
            measured += f"; {sampling['num_inference_steps']} steps of {sampling['scheduler']}"
        values = {key: value for key, value in report["metrics"].items() if value is not None}
    return [{"metric": key, "value": value, "measured": measured} for key, value in values.items()]


def _finite(report: dict) -> list[tuple[str, dict]]:
    return [(key, value) for key, value in report["metrics"].items() if value["mean"] is not None]


def _training(facts: dict, name: str) -> str:
    if not facts["summary"] and not facts["config"]:
        return "## Training\n\nThis folder has no record of the training."
    parts = ["## Training", _training_table(facts["config"], facts["summary"])]
    parts += _command(facts["summary"])
    earlier = facts["summary"].get("autoencoder_training")
    if earlier:
        parts += ["The autoencoder:", _training_table(earlier.get("config", {}), earlier), *_command(earlier)]
    if CURVES in facts["pictures"]:
        parts.append(f"![Curves of the training]({CURVES})")
    parts.append("All settings are in `training_config.json`.")
    return "\n\n".join(part.strip() for part in parts)


def _command(summary: dict) -> list[str]:
    """The line that launches such a run."""
    command = summary.get("machine", {}).get("command")
    if command is None:
        return []
    variables, script = re.fullmatch(r"((?:OMP_NUM_THREADS=\S+ )?)(.*)", command, re.DOTALL).groups()
    precision = summary.get("mixed_precision", "no")
    return [f"```bash\n{variables}accelerate launch --mixed_precision {precision} training/{script}\n```"]


def _training_table(config: dict, summary: dict) -> str:
    machine = summary.get("machine", {})
    rows = {
        "images": config.get("dataset_name"),
        "split": config.get("dataset_split"),
        "training images": summary.get("training_images"),
        "steps": summary.get("steps"),
        "images seen": summary.get("images_seen"),
        "hours": summary.get("hours"),
        **{setting.replace("_", " "): config.get(setting) for setting in SETTINGS},
        "processes": summary.get("num_processes"),
        "mixed precision": summary.get("mixed_precision"),
        "device": machine.get("device"),
        "versions": ", ".join(f"{key} {machine[key]}" for key in ("python", "torch", "diffusers") if key in machine),
    }
    return markdown_table([{"": key, "value": str(value)} for key, value in rows.items() if value not in (None, "")])


def _limits(facts: dict, name: str) -> str:
    lines = [
        "## Limits",
        "- It knows the images that it was trained on; others are reconstructed worse"
        + (", and none of another kind are generated." if facts["is_pipeline"] else "."),
        "- Reconstructions are not exact: fine detail is lost or invented.",
    ]
    if facts["is_pipeline"]:
        lines.append("- Samples may resemble training images; `brics-diffusers nearest-neighbours` finds the nearest.")
        lines.append("- Nothing filters what is generated, and biases of the training images show in it.")
    lines.append("- The rights in the training images, and what they allow, are those of their owners.")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _citation(facts: dict, name: str) -> str:
    return f"## Citation\n\n{CITATION}"


# Parts of a card, in the order of a new one: each is written from the facts and the model's name.
PARTS = (
    ("about", _about),
    ("usage", _usage),
    ("metrics", _metrics),
    ("training", _training),
    ("limits", _limits),
    ("citation", _citation),
)

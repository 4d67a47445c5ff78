"""The model card, README.md, of a run or a saved pipeline: made from what its folder records, renewed in place.

Whatever is generated stands between two comments, `<!-- begin NAME -->` and `<!-- end NAME -->`. When a card is made
again, these parts are replaced where they stand and all other text stays; a part whose comments were taken away is not
added again, unless none is left. Of the metadata, keys that are there stay as they are, and missing ones are added.
"""

import json
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_local_safetensors_file_metadata

from .absolute_paths import cut_absolute_paths


CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
GENERATED = re.compile(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", re.DOTALL)
METRIC_REPORTS = ("reconstruct-metrics-*.json", "generation-metrics.json")
# Pictures in a run's folder, with what their captions say.
PICTURES = {
    "samples.png": "Samples, not selected",
    "reconstructions.png": "Held-out images above their reconstructions",
}
CURVES = "curves.png"


def metric_files(folder: str | os.PathLike) -> list[Path]:
    """Reports of `brics-diffusers reconstruct-metrics` and `generation-metrics` in a run's folder or its `reports`."""
    folders = (Path(folder), Path(folder) / "reports")
    return sorted(path for parent in folders for name in METRIC_REPORTS for path in parent.glob(name))


def read_json(path: Path) -> dict:
    """A JSON file's content, or nothing where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def read_facts(folder: str | os.PathLike) -> dict:
    """
    What the folder of a run or a saved pipeline says of a model and its training, to fill `card_template.md` with.
    Nothing is assumed: what no file says is missing. No path in it is absolute. A `FileNotFoundError` if it holds no
    model.
    """
    folder = Path(folder)
    autoencoder = read_json(folder / "autoencoder" / "config.json")
    if not autoencoder:
        raise FileNotFoundError(f"{folder} has no autoencoder/config.json; name a finished run or a saved pipeline.")
    index = read_json(folder / "model_index.json")
    parts = ("autoencoder", "unet", *(["guide"] if any(index.get("guide") or []) else []))
    classes = _class_names(index.get("id2label"))
    facts = {
        "autoencoder": autoencoder,
        "parameters": {name: _count_parameters(folder / name) for name in parts},
        "classes": classes,
        "example_classes": json.dumps(classes[:4], ensure_ascii=False),
        "is_pipeline": (folder / "model_index.json").is_file(),
        "config": read_json(folder / "training_config.json"),
        "summary": read_json(folder / "training_summary.json"),
        "reports": [read_json(path) for path in metric_files(folder)],
        "pictures": {name: caption for name, caption in PICTURES.items() if (folder / name).is_file()},
        "curves": CURVES if (folder / CURVES).is_file() else None,
    }
    return cut_absolute_paths(facts)


def _class_names(id2label: dict | None) -> list[str]:
    return [id2label[number] for number in sorted(id2label or {}, key=int)]


def _count_parameters(folder: Path) -> int:
    """Numbers in the weights, as their headers say."""
    headers = map(parse_local_safetensors_file_metadata, folder.glob("*.safetensors"))
    return sum(sum(header.parameter_count.values()) for header in headers)


def make_card(
    folder: str | os.PathLike, existing: str | None = None, name: str | None = None, license_name: str | None = None
) -> str:
    """
    The card of the folder of a run or pipeline: Markdown with YAML in front. An existing one is renewed, see above for
    what stays; `name`, by default [`own_name`], is the model's on the Hub, for the code in the card; `license_name` is
    for metadata that name none. A `FileNotFoundError` if the folder holds no model, a `ValueError` if the metadata of
    the existing card are not valid YAML.
    """
    facts, name = read_facts(folder), name or own_name(folder)
    pipeline, data_on_hub = facts["is_pipeline"], facts["summary"].get("dataset_on_hub")
    data = ModelCardData(
        license=license_name or "unknown",
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation" if pipeline else "image-to-image",
        tags=["brics", "arxiv:2305.18601", "diffusers:BricsKeyCodePipeline" if pipeline else "autoencoder"],
        datasets=[facts["config"]["dataset_name"]] if data_on_hub else None,
    )
    fresh = ModelCard.from_template(data, template_path=TEMPLATE, name=name, title=title(name), **facts)
    fresh.text += "\n"
    return str(_renewed(existing, fresh) if existing else fresh)


def _renewed(existing: str, fresh: ModelCard) -> ModelCard:
    """A card with the generated parts of a fresh one, and the metadata that it lacks."""
    try:
        card = ModelCard(existing)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the metadata of {CARD} can't be read ({reason}); correct them.") from error
    parts = {match[1]: match[0] for match in GENERATED.finditer(fresh.text)}
    card.text, found = GENERATED.subn(lambda match: parts.get(match[1], match[0]), card.text)
    if not card.text.strip():
        card.text = fresh.text
    elif not found:
        card.text = "\n\n".join([card.text.rstrip(), *parts.values()]) + "\n"
    if card.data.license == "unknown":
        card.data.license = None  # it may be known now
    for key, value in fresh.data.to_dict().items():
        if card.data.get(key) is None:
            card.data[key] = value
    return card


def write_card(folder: str | os.PathLike, license_name: str | None = None) -> Path:
    """Makes the card of a folder or renews the one there, see [`make_card`]; returns its path."""
    path = Path(folder) / CARD
    text = make_card(folder, read_card(folder), license_name=license_name)
    path.write_text(text, encoding="utf-8")
    return path


def read_card(folder: str | os.PathLike) -> str | None:
    """The card in a folder, or `None` if there is none; some editors put a byte order mark before it."""
    path = Path(folder) / CARD
    return path.read_text(encoding="utf-8-sig") if path.is_file() else None


def own_name(folder: str | os.PathLike) -> str:
    """The name that a model has by itself: on the Hub, if its run was to push it there, or that of its folder."""
    return read_json(Path(folder) / "training_config.json").get("hub_model_id") or Path(folder).resolve().name


def title(name: str) -> str:
    """A model's name without that of the user."""
    return name.rpartition("/")[2]

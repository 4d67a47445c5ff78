#!/usr/bin/env bash
# Makes model_cards/brics-noto-emoji-64 from the images, on one thread; run it again after an interruption. Text of the
# card outside its generated parts, the pictures among it, stays.
#   bash model_cards/make_noto_emoji_64.sh PATH/TO/noto-emoji-64
set -eu
images=$(realpath "$1")
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH # the environment of `make`, if it was made
runs=runs/noto-emoji-64
card=model_cards/brics-noto-emoji-64
train() {
    local precision=$1 script=$2
    shift 2
    accelerate launch --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision "$precision" \
        "training/$script" --config training/configs/noto-emoji-64.yaml --dataset_name "$images" --seed 0 \
        --resume_from_checkpoint latest "$@"
}

# The autoencoder of the card is older than the shortcut and the rates that the config has now.
train no train_autoencoder.py --output_dir $runs/autoencoder --learning_rate 2e-3 --encoder_learning_rate 2e-3 \
    --lr_warmup_steps 0 --set autoencoder.encoder_shortcut=false autoencoder.min_resolution=4 \
    "autoencoder.down_block_types=[DownEncoderBlock2D, DownEncoderBlock2D, AttnDownEncoderBlock2D]"
train bf16 train_key_codes.py --autoencoder_name_or_path $runs/autoencoder --output_dir $runs/pipeline

rm -rf $runs/generated $runs/neighbours # they may be of fewer steps
brics-diffusers reconstruct-metrics $runs/pipeline --dataset_name "$images" --protocol standard --no_perceptual \
    --output_dir $runs/pipeline/reports
brics-diffusers generation-metrics --generated $runs/pipeline --dataset_name "$images" --num_samples 500 \
    --scheduler DPMSolverMultistepScheduler \
    --scheduler_options '{"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++"}' \
    --num_inference_steps 50 --feature_extractor random-conv --metrics fid precision-recall \
    --output_dir $runs/generated
cp $runs/generated/generation-metrics.json $runs/pipeline/reports
brics-diffusers nearest-neighbours --generated $runs/pipeline --dataset_name "$images" --num_samples 16 \
    --distance pixels --num_neighbours 4 --output_dir $runs/neighbours

brics-diffusers card $runs/pipeline --hub_license apache-2.0 --export_dir $card
python model_cards/pictures.py $runs/pipeline --dataset_name "$images" \
    --neighbours $runs/neighbours/nearest-neighbours.json --output_dir $card

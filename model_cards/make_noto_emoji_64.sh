#!/usr/bin/env bash
# Makes model_cards/brics-noto-emoji-64 from the images; run it again after an interruption.
#   bash model_cards/make_noto_emoji_64.sh PATH/TO/noto-emoji-64
set -eu
images=$1
runs=runs/noto-emoji-64
card=model_cards/brics-noto-emoji-64
launch="accelerate launch --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision"
few_steps="--scheduler DPMSolverMultistepScheduler --scheduler_options {\"use_karras_sigmas\":true} --num_inference_steps 25"
common="--config training/configs/noto-emoji-64.yaml --dataset_name $images --seed 0 --resume_from_checkpoint latest"

$launch no training/train_autoencoder.py $common --output_dir $runs/autoencoder
$launch bf16 training/train_key_codes.py $common --autoencoder_name_or_path $runs/autoencoder \
    --output_dir $runs/pipeline

brics-diffusers reconstruct-metrics $runs/pipeline --dataset_name "$images" --protocol standard --no_lpips \
    --output_dir $runs/pipeline/reports
brics-diffusers generation-metrics --generated $runs/pipeline --dataset_name "$images" --num_samples 500 $few_steps \
    --feature_extractor random-conv --metrics fid precision-recall --output_dir $runs/generated
mkdir -p $runs/pipeline/reports
cp $runs/generated/generation-metrics.json $runs/pipeline/reports
brics-diffusers nearest-neighbours --generated $runs/pipeline --dataset_name "$images" --num_samples 32 \
    --samples_dir $runs/neighbours/samples --distance pixels --num_neighbours 4 --output_dir $runs/neighbours

brics-diffusers card $runs/pipeline --hub_license apache-2.0 --export_dir $card
python model_cards/pictures.py $runs/pipeline --dataset_name "$images" \
    --neighbours $runs/neighbours/nearest-neighbours.json --output_dir $card

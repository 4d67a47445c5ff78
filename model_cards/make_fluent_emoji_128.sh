#!/usr/bin/env bash
# Makes model_cards/brics-fluent-emoji-128 from the collection of fluent_emoji.py, on one GPU; run it again after an
# interruption. Text of the card outside its generated parts stays.
#   bash model_cards/make_fluent_emoji_128.sh PATH/TO/fluent-emoji-128
set -eu
images=$(realpath "$1")
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH # the environment of `make`, if it was made
runs=runs/fluent-emoji-128
train() {
    local script=$1
    shift
    python "training/$script" --config training/configs/fluent-emoji-128.yaml --dataset_name "$images" --seed 0 \
        --allow_tf32 --resume_from_checkpoint latest "$@"
}

# Squared error and perceptual distance; then on with more noise on the key codes; then the decoder alone, with an
# adversarial loss and more noise still, as generated codes are never exact.
train train_autoencoder.py --output_dir $runs/first --max_train_steps 1374 --lr_warmup_steps 27
train train_autoencoder.py --output_dir $runs/second --pretrained_autoencoder_name_or_path $runs/first/autoencoder \
    --max_train_steps 1900 --lr_warmup_steps 95 --key_noise_scale 0.015 --ema_half_life_images 2000
train train_autoencoder.py --output_dir $runs/autoencoder --pretrained_autoencoder_name_or_path $runs/second/autoencoder \
    --max_train_steps 1200 --lr_warmup_steps 60 --key_noise_scale 0.02 --ema_half_life_images 2000 \
    --train_decoder_only --learning_rate 3e-3 --adversarial_weight 0.1 --discriminator_type patch \
    --discriminator_learning_rate 2e-3 --discriminator_adam_beta1 0.9 --discriminator_start_step 1 \
    --gan_start_step 240 --gan_warmup_steps 120 --gradient_penalty_weight 0.2
train train_key_codes.py --mixed_precision bf16 --autoencoder_name_or_path $runs/autoencoder \
    --output_dir $runs/pipeline --scaling_factor 2 --class_conditional --class_column category
# The guide: half as wide, without classes, and a thirtieth of the images seen.
train train_key_codes.py --mixed_precision bf16 --autoencoder_name_or_path $runs/pipeline \
    --output_dir $runs/guide --train_batch_size 64 --max_train_steps 600 --learning_rate 1e-3 --lr_warmup_steps 50 \
    --num_validation_images 0 --num_held_out_images 0 --set "unet.block_out_channels=[64,128,128]" unet.dropout=0

bash model_cards/finish.sh $runs "$images" model_cards/brics-fluent-emoji-128 mit 30 \
    --guide $runs/guide --num_samples 192 --guidance_scales 1.5 2 2.5 --guidance_intervals 0:1

#!/usr/bin/env bash
# Makes model_cards/brics-noto-emoji-64 from the images, on one GPU; run it again after an
# interruption. Text of the card outside its generated parts stays.
#   bash model_cards/make_noto_emoji_64.sh PATH/TO/noto-emoji-64
set -eu
images=$(realpath "$1")
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH # the environment of `make`, if it was made
runs=runs/noto-emoji-64
train() {
    local script=$1
    shift
    python "training/$script" --config training/configs/noto-emoji-64.yaml --dataset_name "$images" --seed 0 \
        --allow_tf32 --resume_from_checkpoint latest "$@"
}

# A larger batch and wider models than the config's, which is made for CPU cores, and Adam, which it had then. The
# decoder is trained on by itself, with an adversarial loss and more noise on the key codes, as generated codes are
# never exact.
autoencoder=(--optimizer adam --train_batch_size 16 --perceptual_network efficientnet-lite0 --perceptual_weight 2)
train train_autoencoder.py "${autoencoder[@]}" --output_dir $runs/first --max_train_steps 1803 --lr_warmup_steps 36 \
    --learning_rate 12e-3 --encoder_learning_rate 2e-3 \
    --set "autoencoder.encoder_block_out_channels=[32,64,128]" "autoencoder.decoder_block_out_channels=[96,64]"
train train_autoencoder.py "${autoencoder[@]}" --output_dir $runs/autoencoder --max_train_steps 1200 \
    --pretrained_autoencoder_name_or_path $runs/first/autoencoder --train_decoder_only --key_noise_scale 0.02 \
    --learning_rate 3e-3 --lr_warmup_steps 60 --ema_half_life_images 2000 --adversarial_weight 0.1 \
    --discriminator_type patch --discriminator_learning_rate 2e-3 --discriminator_adam_beta1 0.9 \
    --discriminator_start_step 1 --gan_start_step 240 --gan_warmup_steps 120 --gradient_penalty_weight 0.05 \
    --set discriminator.base_channels=32
# The decoder once more, with half as much noise again and five times the weight of the perceptual distance.
train train_autoencoder.py "${autoencoder[@]}" --output_dir $runs/finetuned --max_train_steps 600 \
    --pretrained_autoencoder_name_or_path $runs/autoencoder --train_decoder_only --key_noise_scale 0.03125 \
    --learning_rate 3e-3 --lr_warmup_steps 36 --ema_half_life_images 2000 --perceptual_weight 10 \
    --adversarial_weight 0.1 --discriminator_type patch --discriminator_learning_rate 2e-3 \
    --discriminator_adam_beta1 0.9 --discriminator_start_step 1 --gan_start_step 144 --gan_warmup_steps 72 \
    --gradient_penalty_weight 0.05 --set discriminator.base_channels=32
train train_key_codes.py --mixed_precision bf16 --autoencoder_name_or_path $runs/finetuned \
    --output_dir $runs/pipeline --class_conditional --class_column category --min_class_images 10 \
    --train_batch_size 128 --max_train_steps 5000 --learning_rate 6e-4 --lr_warmup_steps 150 \
    --scaling_factor 2 --set "unet.block_out_channels=[96,160,224]" unet.dropout=0.1
# The guide: a tenth of its size, and a seventeenth of the images seen; ten minutes on one thread of a CPU.
OMP_NUM_THREADS=1 train train_key_codes.py --mixed_precision no --autoencoder_name_or_path $runs/pipeline \
    --output_dir $runs/guide --class_conditional --class_column category --min_class_images 10 --train_batch_size 64 \
    --max_train_steps 600 --learning_rate 1e-3 --lr_warmup_steps 50 --num_validation_images 0 --num_held_out_images 0 \
    --set "unet.block_out_channels=[32,64,64]" unet.dropout=0

bash model_cards/finish.sh $runs "$images" model_cards/brics-noto-emoji-64 apache-2.0 30 \
    --guide $runs/guide --num_samples 192 --guidance_scales 2 2.5 3 --guidance_intervals 0:1

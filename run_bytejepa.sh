#!/usr/bin/env bash
# System B, ByteJEPA: byte-level transformer that moves from latent prediction to bytes in three stages.
#
#   bash run_bytejepa.sh [KEY=VALUE ...]       set-up included; one GPU, more, or CPU: whatever is there
#   PROFILE=auto|gpu|cpu       auto: gpu where a CUDA device is found; cpu: small model on the demo corpus
#   PRESET=published|best      the same here: our runs looked for better values for system A alone
#   NPROC_PER_NODE=N           ranks (default: the GPUs found)
# Every value below is a default: what is exported (or given as KEY=VALUE) wins, an empty value too.
# Of two defaults for one knob, the first holds. Relative paths count from this folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_jepa.sh
take_arguments "$@"
choose_profile
choose_data demo_bytes fineweb10B_bytes fineweb10B_sp1024_bytes

if [[ $PROFILE == cpu ]]; then      # about two minutes of training on two cores
    export MODEL_DIM="${MODEL_DIM-192}"
    export NUM_LAYERS="${NUM_LAYERS-5}"
    export EMBED_DIM="${EMBED_DIM-192}"
    export NUM_HEADS="${NUM_HEADS-4}"
    export NUM_KV_HEADS="${NUM_KV_HEADS-2}"
    export TRAIN_SEQ_LEN="${TRAIN_SEQ_LEN-256}"
    export TRAIN_BATCH_TOKENS="${TRAIN_BATCH_TOKENS-4096}"
    export MICRO_BATCHES="${MICRO_BATCHES-2}"
    export MAX_WALLCLOCK_SECONDS="${MAX_WALLCLOCK_SECONDS-120}"
    export WARMDOWN_ITERS="${WARMDOWN_ITERS-60}"
    export VAL_LOSS_EVERY="${VAL_LOSS_EVERY-50}"
    export TRAIN_LOG_EVERY="${TRAIN_LOG_EVERY-20}"
    export VAL_BATCH_SIZE="${VAL_BATCH_SIZE-8192}"
    export WARMUP_STEPS="${WARMUP_STEPS-3}"
    export PROBE_STEPS="${PROBE_STEPS-20}"
    export SWA_DECAY="${SWA_DECAY-0.9}"
    export COMPILE_MODE="${COMPILE_MODE-off}"
fi

# Published configuration, 1 hour on one RTX 5090
export TOKENIZER="${TOKENIZER-byte}"
export VOCAB_SIZE="${VOCAB_SIZE-256}"
export MIXER="${MIXER-attention}"
export MODEL_DIM="${MODEL_DIM-512}"
export NUM_LAYERS="${NUM_LAYERS-9}"
export NUM_HEADS="${NUM_HEADS-8}"
export NUM_KV_HEADS="${NUM_KV_HEADS-4}"
export ROPE_BASE="${ROPE_BASE-10000}"
export QK_GAIN_INIT="${QK_GAIN_INIT-1.5}"
export MLP_MULT="${MLP_MULT-2}"
export MLP_EVERY="${MLP_EVERY-1}"
export MLP_NORM="${MLP_NORM-0}"
export NORM_EPS="${NORM_EPS-1.1920928955078125e-07}"
export EMBED_DIM="${EMBED_DIM-512}"
export TIE_EMBEDDINGS="${TIE_EMBEDDINGS-1}"
export EMBED_STYLE="${EMBED_STYLE-tied}"
export TIED_EMBED_INIT_STD="${TIED_EMBED_INIT_STD-0.005}"
export VOCAB_BIAS="${VOCAB_BIAS-0}"
export SOFTCAP_TYPE="${SOFTCAP_TYPE-tanh}"
export LOGIT_SOFTCAP="${LOGIT_SOFTCAP-30}"
export PROJECTOR_TYPE="${PROJECTOR_TYPE-none}"
export PREDICTOR_NORM="${PREDICTOR_NORM-1}"
export PREDICTOR_HIDDEN_MULT="${PREDICTOR_HIDDEN_MULT-1}"
export JEPA_STEPS="${JEPA_STEPS-1}"
export DETACH_TARGETS="${DETACH_TARGETS-1}"
export LOSS_SCHEDULE="${LOSS_SCHEDULE-staged}"
export JEPA_PURE_FRAC="${JEPA_PURE_FRAC-0.10}"
export CE_PURE_FRAC="${CE_PURE_FRAC-0.80}"
export JEPA_WEIGHT="${JEPA_WEIGHT-1}"
export CE_WEIGHT="${CE_WEIGHT-1}"
export ANTICOLLAPSE="${ANTICOLLAPSE-covariance}"
export SIGREG_WEIGHT="${SIGREG_WEIGHT-0.05}"
export Z_LOSS="${Z_LOSS-0}"
export SWA_DECAY="${SWA_DECAY-0.995}"
export SWA_START="${SWA_START-0.80}"
export TRAIN_SEQ_LEN="${TRAIN_SEQ_LEN-4096}"
export TRAIN_BATCH_TOKENS="${TRAIN_BATCH_TOKENS-524288}"
export MICRO_BATCHES="${MICRO_BATCHES-8}"
export ITERATIONS="${ITERATIONS-50000}"
export MAX_WALLCLOCK_SECONDS="${MAX_WALLCLOCK_SECONDS-3600}"
export WARMUP_STEPS="${WARMUP_STEPS-20}"
export WARMUP_ROLLBACK="${WARMUP_ROLLBACK-all}"
export WARMDOWN="${WARMDOWN-iters}"
export WARMDOWN_ITERS="${WARMDOWN_ITERS-2000}"
export MATRIX_LR="${MATRIX_LR-0.04}"
export TIED_EMBED_LR="${TIED_EMBED_LR-0.05}"
export SCALAR_LR="${SCALAR_LR-0.04}"
export ROW_NORM="${ROW_NORM-0}"
export MUON_BACKEND_STEPS="${MUON_BACKEND_STEPS-5}"
export MUON_MOMENTUM="${MUON_MOMENTUM-0.95}"
export MUON_MOMENTUM_WARMUP_START="${MUON_MOMENTUM_WARMUP_START-0.85}"
export MUON_MOMENTUM_WARMUP_STEPS="${MUON_MOMENTUM_WARMUP_STEPS-500}"
export MUON_WD="${MUON_WD-0}"
export ADAM_WD="${ADAM_WD-0}"
export GRAD_CLIP_NORM="${GRAD_CLIP_NORM-0}"
export SEED="${SEED-1337}"
export STORAGE="${STORAGE-int8}"
export QUANT_BITS="${QUANT_BITS-8}"
export QAT_FRACTION="${QAT_FRACTION-0}"
export TEMP_SCALING="${TEMP_SCALING-0}"
export SLIDING_EVAL="${SLIDING_EVAL-0}"
export VAL_MAX_TOKENS="${VAL_MAX_TOKENS-0}"
export VAL_LOSS_EVERY="${VAL_LOSS_EVERY-500}"
export TRAIN_LOG_EVERY="${TRAIN_LOG_EVERY-100}"

launch

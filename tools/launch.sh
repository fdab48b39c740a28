#!/usr/bin/env bash
# What the run scripts share. A run script sources this file and calls
#   start_run "DEMO FINEWEB ..." "$@"    arguments, profile, preset, data (folders of data/datasets)
#   default_to KNOB=VALUE ...            defaults, and as a table:
#   defaults <<'TABLE'                   rows KNOB VALUE [VALUE OF THE CPU PROFILE]
#   launch                               the training, in place of this shell
# KEY=VALUE arguments win over exported variables, these over defaults. An empty value wins, too: it
# means the default of train_jepa.py. Of two defaults for one knob the first holds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_jepa.sh
: "${TRAIN_SCRIPT:=train_jepa.py}"    # a submission folder has its own name here

# ---- system A: what run_jepa_bpe.sh and run_jepa_byte.sh have in common

# PRESET=best in the CPU profile, which tools/experiments.sh measures: no latent, for none lowers
# BPB in this recipe (RESULTS.md); states that are carried from step to step and through the
# evaluation, one pass in place of sliding windows; the activation; the storage grid for the last
# part only; an evaluation that learns from what it has scored.
BEST_A="JEPA_WEIGHT=0 SIGREG_LAMBDA=0 CARRY_STATE=1 EVAL_STATE=carry SLIDING_EVAL=0
ACTIVATION=leaky_relu2 QAT_FRACTION=0.3 EVAL_ADAPT=1 ADAPT_CHUNK_TOKENS=8192 ADAPT_LR=0.01"

# PRESET=best in the GPU profile, from what others measured at full size (RESULTS.md, "PRESET=best
# at full size"): Mamba-2 blocks with one attention block, an MLP in each; storage with a step in
# units of σ and error compensation, no training on that grid; a long warmdown; no latent. By the
# model of its step ten minutes hold 13,700 steps: the clock, not ITERATIONS, must end the run.
BEST_A_FULL="JEPA_WEIGHT=0 SIGREG_LAMBDA=0 NUM_LAYERS=10 MIXER=mmmmmmammm EXPAND=2 MLP_EVERY=1
ACTIVATION=leaky_relu2 QUANT_STEP=sigma DT_GRID=int8a EMBED_GRID=int7 QAT_FRACTION=0
ROUNDING=compensated QUANT_FIT=1 WARMDOWN_FRACTION=0.72 MIN_LR=0.1 MUON_BACKEND_STEPS=5
MUON_MOMENTUM=0.97 GRAD_CLIP_NORM=0.3 ITERATIONS=20000 EVAL_STATE=carry SLIDING_EVAL=0
EVAL_ADAPT=1"

# system_a_best KNOB=VALUE ...: the preset; in the GPU profile with these knobs, its size.
system_a_best() {
    local knobs=$BEST_A
    [[ $PROFILE == gpu ]] && knobs="$BEST_A_FULL $*"
    # shellcheck disable=SC2086  # words are KNOB=VALUE
    default_to $knobs
}

# Published configuration: 10 minutes on 8 H100. CPU profile: 2 minutes on two cores.
system_a() {
    defaults <<'TABLE'
# knob                        published  cpu
NUM_LAYERS                    10         4
EXPAND                        1
MLP_EVERY                     2
TIE_EMBEDDINGS                1
SOFTCAP_TYPE                  poly
LOGIT_SOFTCAP                 15

JEPA_STEPS                    3          1
JEPA_WEIGHT                   1
CE_WEIGHT                     1
SIGREG_LAMBDA                 1
PREDICTOR_HIDDEN_MULT         4          1

TRAIN_BATCH_TOKENS            524288     2048
MICRO_BATCHES                 8          2
ITERATIONS                    10000
MAX_WALLCLOCK_SECONDS         600        120
WARMUP_STEPS                  -          3
WARMDOWN_FRACTION             0.15       1
SEED                          42
COMPILE_MODE                  -          off

BETA2                         -          0.99
MUON_BACKEND_STEPS            3
MUON_MOMENTUM                 0.95
MUON_MOMENTUM_WARMUP_START    0.85
MUON_MOMENTUM_WARMUP_STEPS    500        100
MUON_WD                       0.04
ADAM_WD                       0.05
GRAD_CLIP_NORM                1

QUANT_BITS                    4
FP_STORAGE                    FP8
QAT_FRACTION                  1

TEMP_SCALING                  1
SLIDING_EVAL                  1
VAL_MAX_TOKENS                0
VAL_BATCH_SIZE                -          16384
PROBE_STEPS                   -          20
TABLE
}

# ---- arguments and defaults

declare -A GIVEN=()    # knobs named by arguments
ARGS=()                # arguments for train_jepa.py

# Arguments are passed on to train_jepa.py. KEY=VALUE ones that the scripts read are exported; names
# that only the scripts know are not passed on.
take_arguments() {
    local argument
    for argument in "$@"; do
        case "${argument%%=*}" in
        PROFILE | PRESET | NPROC_PER_NODE | TORCHRUN_ARGS | SKIP_VENV | PYTHON | TRAIN_SHARDS | \
            TORCH_BUILD | RUN_NICE)
            export "${argument?}"
            continue ;;
        MODE | DATA_PATH | TOKENIZER_PATH | MICRO_BATCHES | MAX_WALLCLOCK_SECONDS | ITERATIONS | \
            CE_PURE_FRAC)
            [[ $argument == *=* ]] && export "${argument?}" ;;
        esac
        ARGS+=("$argument")
        if [[ $argument =~ ^([A-Z][A-Z0-9_]*)= ]]; then GIVEN[${BASH_REMATCH[1]}]=1; fi
    done
    set_python
}

# Exports the knobs that neither the environment nor an argument sets, and lists their names in
# RUN_SCRIPT_DEFAULTS, from which train_jepa.py knows where a value came from.
default_to() {
    local assignment name
    for assignment in "$@"; do
        name=${assignment%%=*}
        [[ -v $name || -n ${GIVEN[$name]-} ]] && continue
        export "${assignment?}"
        RUN_SCRIPT_DEFAULTS+=" $name"
    done
}

# Reads rows KNOB VALUE [CPU_VALUE]: VALUE holds in both profiles if it stands alone. The value "-"
# leaves the knob to train_jepa.py. A row that begins with "# " is a comment. Published values that
# the CPU profile replaces are listed in RUN_SCRIPT_PUBLISHED, for MODE=describe.
defaults() {
    local knob value cpu_value
    while read -r knob value cpu_value; do
        if [[ $PROFILE == cpu && -n $cpu_value ]]; then
            RUN_SCRIPT_PUBLISHED+=" $knob=$value"
            value=$cpu_value
        fi
        [[ -z $knob || $knob == "#" || $value == - ]] || default_to "$knob=$value"
    done
}

asks_for_help() { [[ " ${ARGS[*]-} " =~ " "(--help|-h)" " ]]; }

# in_mode MODES: true if MODE, train by default, is one of these words.
in_mode() {
    local mode=${MODE:-train}
    [[ " $* " == *" ${mode,,} "* ]]
}

# True if only the configuration or the help text is asked for: no data, one process.
only_describes() { asks_for_help || in_mode describe; }

reads_no_shards() { only_describes || in_mode bench sample; }

# Prints the head of the run script, then every knob with the value that it has here. Needs no
# Python: the texts are those of KNOBS.md.
show_help() {
    local argument
    for argument in "${ARGS[@]}"; do
        [[ $argument =~ ^[A-Z][A-Z0-9_]*= ]] && export "${argument?}"
    done
    sed '1d; /^#/!Q; s/^# \{0,1\}//' "$SELF"
    printf '\nThe values below are those of PROFILE=%s PRESET=%s.\n' "$PROFILE" "$PRESET"
    awk -F ' *[|] *' '
        /^## / { print "\n" substr($0, 4) ":" }
        /^[|] `/ {
            gsub(/`/, "", $2); gsub(/`/, "", $3)
            value = ($2 in ENVIRON) && ENVIRON[$2] != "" ? ENVIRON[$2] : $3
            printf "  %-35s %s\n", $2 "=" value, $4
        }' KNOBS.md
}

# ---- profile and data

# Exports PROFILE and PRESET and sets GPUS; says in one line which and why. Empty values mean auto
# and published.
choose_profile() {
    local why="by request" count=""
    [[ ${PROFILE:=auto} =~ ^(auto|gpu|cpu)$ ]] || die "PROFILE=$PROFILE: it is auto, gpu or cpu" 2
    [[ ${PRESET:=published} =~ ^(published|best)$ ]] ||
        die "PRESET=$PRESET: it is published or best" 2
    [[ ${NPROC_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] ||
        die "NPROC_PER_NODE=$NPROC_PER_NODE: it is a number of ranks, 1 or more" 2
    GPUS=0
    if asks_for_help && [[ -f KNOBS.md ]]; then    # no installation: the driver is asked, not torch
        if [[ $PROFILE == auto ]]; then
            if gpu_driver >/dev/null; then PROFILE=gpu; else PROFILE=cpu; fi
        fi
        return
    fi
    env_ready || bash setup_jepa.sh env || exit
    if [[ $PROFILE == auto ]] || { [[ $PROFILE == gpu ]] && ! only_describes; }; then
        GPUS=$(cuda_devices)
        count="$GPUS CUDA device(s)"
        [[ $GPUS == 0 ]] && count="no CUDA device found"
    fi
    if [[ $PROFILE == auto ]]; then
        why="auto: $count"
        if [[ $GPUS == 0 ]]; then PROFILE=cpu; else PROFILE=gpu; fi
    elif [[ $PROFILE == gpu && -n $count ]]; then
        why="by request; $count"
    fi
    if [[ $PROFILE == cpu ]]; then
        why="$why; small model"
        ! reads_no_shards && [[ ! -v DATA_PATH ]] && why="$why, demo corpus"
        in_mode train && [[ ! -v MAX_WALLCLOCK_SECONDS && ! -v ITERATIONS ]] &&
            why="$why, about two minutes of training"
    fi
    note "PROFILE=$PROFILE ($why), PRESET=$PRESET"
    export PROFILE PRESET
}

is_complete() {
    compgen -G "$1/fineweb_train_*.bin" >/dev/null &&
        compgen -G "$1/fineweb_val_*.bin" >/dev/null && [[ ! -e $1/.partial ]]
}

first_complete() {
    local folder
    for folder in "$@"; do is_complete "$folder" && echo "$folder" && return; done
    return 1
}

# choose_data DEMO FINEWEB...: defaults of DATA_PATH and TOKENIZER_PATH. In the gpu profile the
# first FineWeb folder that is complete, downloaded if need be; the demo if that is not possible.
choose_data() {
    local demo=data/datasets/$1 fineweb=("${@:2}") folder
    fineweb=("${fineweb[@]/#/data/datasets/}")
    if [[ ! -v DATA_PATH ]]; then
        reads_no_shards || fetch_data "$demo" "${fineweb[@]}"
        folder=$demo
        if [[ $PROFILE == gpu ]] && ! folder=$(first_complete "${fineweb[@]}"); then
            folder=$demo
            only_describes || note "no FineWeb in ${fineweb[0]}: training on the demo corpus" \
                "(bash setup_jepa.sh fineweb gets it)"
        fi
        default_to "DATA_PATH=./$folder"
    fi
    # The demo shards are made with the embedded model, whatever tokenizer was downloaded since.
    local tokenizer=data/tokenizers/fineweb_8192_bpe.model
    [[ $DATA_PATH == "./$demo" || ! -f $tokenizer ]] && tokenizer=data/demo/fineweb_8192_bpe.model
    default_to "TOKENIZER_PATH=./$tokenizer"
}

fetch_data() {    # demo folder, FineWeb folders
    local shards=${TRAIN_SHARDS-}
    if [[ $PROFILE == cpu ]]; then
        is_complete "$1" || bash setup_jepa.sh demo || exit
    elif ! first_complete "${@:2}" >/dev/null; then
        # 13,700 steps of 524,288 tokens read 72 shards of 100 million
        [[ $PRESET == best ]] && shards=${shards:-75}
        FINEWEB_KINDS="${FINEWEB_KINDS-${2##*fineweb10B_}}" TRAIN_SHARDS=$shards \
            bash setup_jepa.sh || exit
    fi
}

# ---- start and launch

start_run() {
    RUN_SCRIPT_DEFAULTS=$SELF
    RUN_SCRIPT_PUBLISHED=
    take_arguments "${@:2}"
    choose_profile
    # shellcheck disable=SC2086  # words are folders
    choose_data $1
}

# How often a waiting thread of libgomp looks before it sleeps. Its default of 300,000 is 18 ms on a
# Xeon and stops a run beside other processes; without any, an idle machine waits for wake-ups.
SPIN_COUNT=5000

# Sets `ranks`: the number of GPUs, rounded down to one that divides MICRO_BATCHES.
count_ranks() {
    local micro=${MICRO_BATCHES:-8} fits
    ranks=${NPROC_PER_NODE:-$GPUS}
    [[ $PROFILE == cpu && -z "${NPROC_PER_NODE-}" ]] && ranks=1
    if only_describes || in_mode sample || [[ $ranks == 0 ]]; then ranks=1; fi
    [[ $ranks -gt 1 && $micro =~ ^[1-9][0-9]*$ ]] || return 0
    fits=$ranks
    while ((micro % fits)); do ((fits--)); done
    [[ $ranks == "$fits" ]] && return
    [[ -z "${NPROC_PER_NODE-}" ]] ||
        die "NPROC_PER_NODE=$ranks: it must divide MICRO_BATCHES=$micro; $fits would do" 2
    note "$fits of $GPUS GPUs used: the ranks must divide MICRO_BATCHES=$micro"
    ranks=$fits
}

# A CPU run beside other work gets a fair share of a core, a fifth of one beside eight busy loops on
# two. Where the system allows it (root, most containers), it takes a niceness of RUN_NICE instead,
# by default -10 on a busy machine; RUN_NICE=0 leaves it alone.
take_priority() {
    local load running cores
    [[ $PROFILE == cpu ]] && in_mode train || return 0
    # the average of a minute, or what runs just now, this shell left out, if that is more
    read -r load _ _ running _ </proc/loadavg 2>/dev/null || return 0
    load=${load%.*} running=$((${running%/*} - 1)) cores=$(nproc)
    ((running <= load)) || load=$running
    if [[ -z ${RUN_NICE-} ]]; then
        ((load >= cores)) || return 0
        RUN_NICE=-10
    fi
    [[ $RUN_NICE =~ ^-?[0-9]+$ ]] || die "RUN_NICE=$RUN_NICE: it is a niceness, -20 to 19" 2
    [[ $RUN_NICE == 0 ]] && return
    if renice -n "$RUN_NICE" -p $$ >/dev/null 2>&1; then
        note "a load of $load on $cores cores: niceness $RUN_NICE (RUN_NICE=0 avoids it)"
    else
        note "a load of $load on $cores cores: the run gets its fair share of them"
    fi
}

# Replaces this shell by the training: one process, or torchrun with one rank per GPU. TORCHRUN_ARGS
# (several machines, restarts) replaces --standalone.
launch() {
    local ranks
    export RUN_SCRIPT_DEFAULTS RUN_SCRIPT_PUBLISHED
    [[ -v OMP_WAIT_POLICY ]] || export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-$SPIN_COUNT}
    asks_for_help && [[ -f KNOBS.md ]] && show_help && exit
    count_ranks
    take_priority
    if [[ $ranks == 1 && -z "${TORCHRUN_ARGS-}" ]] || only_describes || in_mode sample; then
        exec "$PY" "$TRAIN_SCRIPT" ${ARGS[@]+"${ARGS[@]}"}
    fi
    # shellcheck disable=SC2086  # words are arguments
    exec "$PY" -m torch.distributed.run ${TORCHRUN_ARGS:---standalone} --nproc_per_node="$ranks" \
        "$TRAIN_SCRIPT" ${ARGS[@]+"${ARGS[@]}"}
}

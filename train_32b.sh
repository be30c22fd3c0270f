#!/usr/bin/env bash
# FIPO on Qwen2.5-32B, the paper's recipe: the same fipo.py as on a laptop, with vLLM as sampler and DeepSpeed ZeRO-3.
#
#   DRY_RUN=1 NNODES=8 bash train_32b.sh               check every argument and print the plan; no GPU, no weights
#   OFFLOAD=1 bash train_32b.sh                        one node of 8 x 80 GB, with 549 GiB of host memory
#   HOSTFILE=hosts bash train_32b.sh                   several nodes over ssh; a line each: "node1 slots=8"
#   sbatch --nodes 8 --gpus-per-node 8 --ntasks-per-node 1 --exclusive train_32b.sh       several nodes under Slurm
#   OFFLOAD=1 bash train_32b.sh --steps 100 --lr 2e-6  what follows goes to `fipo.py train`, and wins over what is here
#
# A run that does not fit by the plan is refused. For cards other than 80 GB, set GPU_GIB (for an H200: GPU_GIB=139).
# Started again, it goes on from the newest whole checkpoint in OUT; that takes as many GPUs as wrote it.
# The Python environment, this folder, MODEL, DATA and OUT must have the same path on every node.
#
# Several nodes find one another through the network interface that the host name resolves to. If that is the wrong one
# (ranks wait for one another at the start, or the network is slow), name the right one, as `ip address` calls it:
#   GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
#
# Why ds_config.json says what it says (clipping, learning rate and offload come from the command line, to stand once):
#   zero_optimization.stage 3               shards weights, gradients and optimiser: 18 bytes a parameter, divided by N
#   bf16                                    computes in bfloat16; the optimiser keeps float32 weights, or steps of 1e-6
#                                           would round to nothing. --dtype float32 turns it off
#   data_types.grad_accum_dtype fp32,       gradients are summed in float32 over passes and over ranks
#   communication_data_type fp32
#   overlap_comm, contiguous_gradients      sending hides behind computing; no fragmentation in backward
#   reduce_bucket_size,                     800 MB of gradients, 400 MB of weights at a time: large enough for the
#   stage3_prefetch_bucket_size 2e8         network, small beside activations
#   stage3_max_live_parameters,             at most 4 GB of gathered weights: the head, which stays for the whole pass,
#   stage3_max_reuse_distance 2e9           and two layers; without a bound, backward keeps what forward gathered
#   stage3_param_persistence_threshold 1e5  norms and biases stay whole on every GPU: nothing to gather for them
#   train_micro_batch_size_per_gpu 1        DeepSpeed asks for it; micro-batches are cut by tokens here
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-32B}                       # folder or hub name
DATA=${DATA:-BytedTsinghua-SIA/DAPO-Math-17k}          # file or hub name
EVAL_DATA=${EVAL_DATA-BytedTsinghua-SIA/AIME-2024}     # the same; EVAL_DATA= for none
OUT=${OUT:-runs/fipo-32b}
HOSTFILE=${HOSTFILE:-}                                 # DeepSpeed hostfile: nodes over ssh
NNODES=${NNODES:-${SLURM_NNODES:-1}}                   # nodes under Slurm, or of the plan
GPUS_PER_NODE=${GPUS_PER_NODE:-8}                      # without HOSTFILE, which says so itself
TP=${TP:-4}                                            # GPUs that share one vLLM engine
OFFLOAD=${OFFLOAD:-0}                                  # 1: optimiser and parameters in host memory

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -f $here/fipo.py ]] || here=${SLURM_SUBMIT_DIR:-$here}  # sbatch runs a copy of this script from elsewhere
fail() { echo "train_32b.sh: $1" >&2; exit 1; }
[[ -f $here/fipo.py ]] || fail "no fipo.py in $here: start it from the folder of fipo.py."
for name in NNODES GPUS_PER_NODE TP; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name is ${!name}: it must be a whole number above 0."
done
for name in DRY_RUN OFFLOAD; do
  [[ ${!name:-0} =~ ^[01]$ ]] || fail "$name is ${!name}: it must be 0 or 1."
done
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  exec python "$here/scripts/plan.py" --help
fi

# DeepSpeed's launcher passes only PYTHON*, NCCL*, UCX*, MV2* and MLFLOW* on to the nodes. What else a run reads is
# passed in the file DS_ENV_FILE, with a NAME=VALUE on each line. It may hold tokens, so it is deleted while it is open,
# and DeepSpeed reads it through its descriptor. (Users of the nodes can still see the values in the list of processes.)
passed_on='PATH|LD_LIBRARY_PATH|CUDA_HOME|XDG_CACHE_HOME|.*_(proxy|PROXY)'
passed_on+='|(HF|TRANSFORMERS|WANDB|VLLM|GLOO|NCCL|OMP|TORCH|TORCHINDUCTOR|TRITON|DS)_.*'
write_environment() {
  local file name value
  file=$(mktemp)                                       # with mode 600
  for name in $(compgen -e | grep -Ex "$passed_on"); do
    value=${!name//$'\n'/ }
    # DeepSpeed puts the value between double quotes, where the shell reads \ " $ and `. Before that, pdsh reads %.
    sed 's/[\"$`]/\\&/g; s/%/%%/g' <<<"$name=$value"
  done >"$file"
  exec 3<"$file"
  rm "$file"
  export DS_ENV_FILE=/dev/fd/3
}

recipe=(                                               # in the paper
  --algorithm fipo                                     # sets what DAPO and GRPO have otherwise: range of f [1.0, 1.2],
                                                       # clip high 0.28, dual-clip ratio c 10, soft overlong buffer 4096
  --safety 10                                          # safety threshold
  --tau 32                                             # half-life τ of the Future-KL
  --clip_low 0.2                                       # clip low
  --group_size 16                                      # group size G
  --prompts_per_batch 512                              # prompts per rollout batch …
  --prompts_per_round 2048 --max_gen_rounds 10         # … generated 2048 at a time, at most 10 times, until 512 inform
  --prompts_per_mini_batch 64                          # prompts per mini-batch: 8 updates per rollout
  --max_prompt 2048 --max_response 20480               # longest prompt, longest response
  --lr 1e-6 --weight_decay 0.1 --warmup_steps 10       # AdamW, linear warm-up, then constant
  --grad_clip 1.0
  --temperature 1.0                                    # of sampling; no top-p, no top-k
  --eval_every 5 --eval_samples 32 --eval_temperature 1.0 --eval_top_p 0.7
  --verifier dapo
)
machine=(                                              # not in the paper: how this project runs it
  --model "$MODEL" --data "$DATA" --out "$OUT" --resume true
  --deepspeed "$here/ds_config.json" --sampler vllm --tensor_parallel "$TP" --vllm_memory 0.7
  --tokens_per_micro_batch 22528                       # one longest prompt and response, or several short ones
  --gradient_checkpointing true
  --save_every 1                                       # a step takes an hour or more
)
[[ -n $EVAL_DATA ]] && machine+=(--eval_data "$EVAL_DATA")
[[ $OFFLOAD == 1 ]] && machine+=(--offload true)
train=("$here/fipo.py" train "${recipe[@]}" "${machine[@]}" "$@")
if [[ -n $HOSTFILE ]]; then
  read -r gpus GPUS_PER_NODE < <(awk -F 'slots=' '
    /^[^#]*slots=/ { sum += $2; if ($2 + 0 > most) most = $2 + 0 }
    END { print sum + 0, most + 0 }' "$HOSTFILE")
else
  gpus=$((NNODES * GPUS_PER_NODE))
fi
(( gpus > 0 )) || fail "$HOSTFILE names no GPUs: it needs a line for each node, such as: node1 slots=8"
(( gpus % TP == 0 )) || fail "TP=$TP does not divide the $gpus GPUs."
[[ -n $HOSTFILE ]] || (( GPUS_PER_NODE % TP == 0 )) || fail "TP=$TP does not divide GPUS_PER_NODE=$GPUS_PER_NODE."

# The plan comes first. It refuses what cannot run or does not fit, in one sentence, before any process is started.
GPUS=$gpus GPUS_PER_NODE=$GPUS_PER_NODE python "$here/scripts/plan.py" "${train[@]:2}"

[[ ${DRY_RUN:-0} == 1 ]] && exit
if ! command -v nvidia-smi >/dev/null; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  rm -f /dev/shm/*-cpushm_*                            # a killed run leaves these, and vLLM does not start over them
fi
# torchrun sets OMP_NUM_THREADS to 1 where it is unset, and OFFLOAD=1 would step AdamW on one core per GPU.
threads=$(( $(nproc) / GPUS_PER_NODE ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}
# Models and data from the hub are downloaded once per node. After that, no rank asks the hub.
fetch=("$here/scripts/fetch.py" "${train[@]:2}")

if [[ -n $HOSTFILE ]]; then
  write_environment
  deepspeed --hostfile "$HOSTFILE" --log_level warning --num_gpus 1 --no_local_rank "${fetch[@]}"
  export HF_HUB_OFFLINE=1
  write_environment
  exec deepspeed --hostfile "$HOSTFILE" --log_level warning "${train[@]}"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  srun --nodes "$NNODES" --ntasks-per-node 1 python "${fetch[@]}"
  export HF_HUB_OFFLINE=1
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  exec srun --nodes "$NNODES" --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=1 \
    torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --rdzv-backend c10d \
    --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))" "${train[@]}"
fi
(( NNODES == 1 )) || fail "NNODES=$NNODES needs Slurm (sbatch), or a HOSTFILE instead."
python "${fetch[@]}"
export HF_HUB_OFFLINE=1
exec torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" "${train[@]}"

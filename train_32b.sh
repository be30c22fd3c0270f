#!/usr/bin/env bash
# FIPO on Qwen2.5-32B, the paper's recipe: the same fipo.py as on a laptop, with vLLM as sampler and DeepSpeed ZeRO-3.
#
#   DRY_RUN=1 bash train_32b.sh                        check every argument and print the plan; no GPU, no weights
#   bash train_32b.sh                                  one node
#   HOSTFILE=hosts bash train_32b.sh                   several nodes over ssh; a line each: "node1 slots=8"
#   sbatch --nodes 8 --gpus-per-node 8 --ntasks-per-node 1 --exclusive train_32b.sh       several nodes under Slurm
#   bash train_32b.sh --steps 100 --lr 2e-6            what follows goes to `fipo.py train`, and wins over what is here
#
# Started again, it goes on from the newest whole checkpoint in OUT. The Python environment, this folder, MODEL, DATA and
# OUT must have the same path on every node.
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
gpus=$((NNODES * GPUS_PER_NODE))
[[ -n $HOSTFILE ]] && gpus=$(awk -F 'slots=' '/slots=/ { n += $2 } END { print n + 0 }' "$HOSTFILE")
(( gpus % TP == 0 )) || fail "TP=$TP does not divide the $gpus GPUs."
[[ -n $HOSTFILE ]] || (( GPUS_PER_NODE % TP == 0 )) || fail "TP=$TP does not divide GPUS_PER_NODE=$GPUS_PER_NODE."

# First the plan, always: what cannot run is refused here, in one sentence, and not by every process on every node.
PYTHONPATH=$here GPUS=$gpus python - "${train[@]:2}" <<'PLAN'
"""The plan: is every argument valid, what fits where, how long a step takes. Formulas are printed with their numbers."""
import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, Qwen2Config

import fipo

GPU_GIB, CUDA_GIB = 79.0, 4.0  # an 80 GB card; its context, NCCL and what a sleeping vLLM keeps (assumed)
VLLM_GIB = 3.0  # vLLM's own activations and CUDA graphs (assumed)
PEAK, LINK = 989e12, 50e9  # bf16 FLOP/s of an H100; bytes/s of its 400 Gbit/s network port
# What a step will be like is not known before it is run. These are assumptions, not measurements; set your own.
MFU = float(os.environ.get("MFU", 0.35))  # share of PEAK that scoring and updates reach
DECODE = float(os.environ.get("DECODE", 600))  # tokens/s that vLLM decodes, per GPU
LENGTH = float(os.environ.get("LENGTH", 8192))  # mean response
KEPT = float(os.environ.get("KEPT", 0.5))  # share of groups that are neither all right nor all wrong
QWEN_32B = dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064, max_position_embeddings=131072, tie_word_embeddings=False)


def shape_of(model):
    """The model's config and its number of parameters, counted on the meta device: no memory, no weights."""
    if model == "Qwen/Qwen2.5-32B":  # known here, so that the plan needs no hub
        config = Qwen2Config(**QWEN_32B)
    else:
        with fipo.explain(f"reading the config of the model {model!r}"):
            config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return config, sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def check_deepspeed(path):
    """The section zero_optimization of DeepSpeed's JSON file, if DeepSpeed accepts the file and it can hold 32B."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed import DeepSpeedConfig

    json = fipo.read_json(path)
    with fipo.explain(f"checking {path}"):
        DeepSpeedConfig(dict(json))
    zero = json.get("zero_optimization", {})
    fipo.require(zero.get("stage") == 3, f"{path}: zero_optimization.stage is {zero.get('stage')}, it must be 3.")
    for key in ("stage3_max_live_parameters", "stage3_prefetch_bucket_size", "reduce_bucket_size"):
        fipo.require(key in zero, f"{path}: zero_optimization.{key} is missing: without it, memory has no bound.")
    fipo.require(json.get("data_types", {}).get("grad_accum_dtype") == "fp32",
                 f"{path}: data_types.grad_accum_dtype must be fp32: in bfloat16, small gradients are lost in the sum.")
    return zero


def check_data(cfg):
    """Local files are read; names on the hub are not asked for."""
    for source in filter(None, (cfg.data, cfg.eval_data)):
        if Path(source).suffix in (".jsonl", ".json", ".parquet") or Path(source).exists():
            fipo.load_problems(source)


def states(parameters, gpus):
    """Bytes per GPU that training holds from step to step under ZeRO-3: weights, gradients, optimiser."""
    return 2 * parameters / gpus, 4 * parameters / gpus, 12 * parameters / gpus


def activations(config, tokens):
    """Bytes of one pass: a bf16 input per layer, and all that the layer being recomputed needs for its gradient."""
    H, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return 2 * L * tokens * H, tokens * (24 * H + 12 * I)


def logits(config, chunk=1024):
    """Bytes of one chunk of logits: bf16, float32, log-softmax, and their gradients."""
    return 15 * chunk * config.vocab_size


def gathered(config, zero):
    """Bytes of what ZeRO-3 gathers (the head is among it) and sends (float32), and of the head's gradient, twice."""
    numbers = zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"]
    return 2 * (numbers + 2 * config.vocab_size * config.hidden_size) + 4 * 2 * zero["reduce_bucket_size"]


def kv_per_token(config):
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head


def forward_flops(config, parameters, length):
    """FLOPs of a forward pass, per token, at a mean over a response of `length` tokens: weights, causal attention."""
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # not multiplied with
    return 2 * (parameters - looked_up) + 2 * config.num_hidden_layers * config.hidden_size * length


def fits(cfg, config, parameters, gpus, zero, offload):
    """Does training fit while vLLM sleeps, and vLLM beside what training holds? Returns bytes of both, and the answer."""
    held = 0.0 if offload else sum(states(parameters, gpus))
    saved, layer = activations(config, cfg.tokens_per_micro_batch)
    training = held + gathered(config, zero) + saved + max(layer, logits(config))
    sampling = held + cfg.vllm_memory * GPU_GIB * 2**30
    cache = (cfg.vllm_memory * GPU_GIB - VLLM_GIB) * 2**30 - 2 * parameters / cfg.tensor_parallel
    room = (GPU_GIB - CUDA_GIB) * 2**30
    enough = cache * cfg.tensor_parallel > (cfg.max_prompt + cfg.max_response) * kv_per_token(config)
    return training, sampling, cache, max(training, sampling) < room and enough


def plan(argv):
    given = HfArgumentParser(fipo.Config, prog="train_32b.sh", allow_abbrev=False, usage="bash train_32b.sh [--SETTING VALUE …]")
    cfg = fipo.resolve(fipo.Config(**vars(given.parse_args(argv))))
    zero = check_deepspeed(cfg.deepspeed)
    check_data(cfg)
    config, P = shape_of(cfg.model)
    gpus, GiB, B = int(os.environ["GPUS"]), 2**30, 1e9
    heads, tp = config.num_attention_heads, cfg.tensor_parallel
    fipo.require(heads % tp == 0, f"TP={tp} does not divide the {heads} attention heads.")
    fipo.require(cfg.gradient_checkpointing, "without --gradient_checkpointing nothing of this size fits: set it to true.")
    context, limit = cfg.max_prompt + cfg.max_response, config.max_position_embeddings
    fipo.require(context <= limit, f"--max_prompt and --max_response make {context} tokens, the model reads {limit}.")
    T, G = cfg.tokens_per_micro_batch, cfg.group_size
    saved, layer = activations(config, T)
    print(f"""every argument is valid
model        {cfg.model}: {P / B:.2f} billion parameters, P; {config.num_hidden_layers} layers of {config.hidden_size}

Memory in GiB per GPU of {GPU_GIB:.0f} GiB, {CUDA_GIB:.0f} of them left to CUDA, NCCL and a sleeping vLLM
  weights 2P/N, gradients 4P/N, optimiser 12P/N            bf16; float32; float32 master and two moments
  activations 2·L·T·H                        = {saved / GiB:5.1f}       one input a layer, T = {T} tokens
            + T·(24H + 12I)                  = {layer / GiB:5.1f}       the layer that is recomputed
  logits 15·chunk·V                          = {logits(config) / GiB:5.1f}       not at the same time as that layer
  gathered                                   = {gathered(config, zero) / GiB:5.1f}       live weights, the head's gradient, buckets
  vLLM's share                               = {cfg.vllm_memory * GPU_GIB:5.1f}       --vllm_memory {cfg.vllm_memory}: weights 2P/TP = {2 * P / cfg.tensor_parallel / GiB:.1f}, {VLLM_GIB:.0f} of its own, the rest KV cache

training = weights + gradients + optimiser + gathered + 2·L·T·H + the larger of layer and logits, while vLLM sleeps
sampling = weights + gradients + optimiser + vLLM's share
GPUs N  weights  gradients  optimiser | training  sampling | KV cache of an engine | fits   with OFFLOAD=1""")
    for n in sorted({8, 16, 32, 64, 128, gpus}):
        weights, gradients, optimiser = (x / GiB for x in states(P, n))
        training, sampling, cache, fit = fits(cfg, config, P, n, zero, cfg.offload)
        answers = "yes" if fit else "no", "yes" if fits(cfg, config, P, n, zero, True)[-1] else "no"
        tokens = max(cache, 0) * cfg.tensor_parallel / kv_per_token(config)
        print(f"{n:6}{weights:9.1f}{gradients:11.1f}{optimiser:11.1f} |{training / GiB:9.1f}{sampling / GiB:10.1f} |"
              f"{tokens:15,.0f} tokens |{answers[0]:>5}{answers[1]:>15}")
    kept = cfg.prompts_per_batch * G * LENGTH
    drawn = min(kept / KEPT, cfg.max_gen_rounds * cfg.prompts_per_round * G * LENGTH) if cfg.dynamic_sampling else kept
    forward = forward_flops(config, P, LENGTH)
    hours = [drawn / DECODE / gpus / 3600, kept * forward / MFU / PEAK / gpus / 3600]
    hours.append(4 * hours[1])
    head = 2 * config.vocab_size * config.hidden_size / LINK
    print(f"""
With OFFLOAD=1 a node's hosts hold 18P/N per GPU: {18 * P / gpus * min(gpus, 8) / GiB:.0f} GiB per node of {min(gpus, 8)}.
A checkpoint is 14P = {14 * P / B:.0f} GB on disk: the optimiser's 12P and the weights as a Hugging Face folder; two are kept.

A step on {gpus} GPUs, if responses have {LENGTH:.0f} tokens (LENGTH) and {KEPT:.0%} of the groups inform (KEPT)
  sampled       {drawn / 1e6:8.1f} million tokens, of which {kept / 1e6:.1f} are trained on: {cfg.prompts_per_batch} prompts × {G} responses
  updates       {cfg.prompts_per_batch // cfg.prompts_per_mini_batch:8}
  FLOPs         {kept * forward * 5:8.2g}   scoring 1, update 4 forward passes of 2(P − V·H) + 2·L·H·length a token
  rollout       {hours[0]:8.2f} h  at {DECODE:.0f} tokens/s a GPU (DECODE)
  scoring       {hours[1]:8.2f} h  at {MFU:.0%} of {PEAK / 1e12:.0f} TFLOP/s (MFU)
  update        {hours[2]:8.2f} h
  together      {sum(hours):8.2f} h
The head is gathered once a pass, {head * 1e3:.0f} ms at {LINK / 1e9:.0f} GB/s; anew for each of {-(-T // 1024)} chunks it would be {head * -(-T // 1024):.2f} s.
MFU, DECODE, LENGTH and KEPT are assumptions: set them in the environment.""")


if __name__ == "__main__":
    with fipo.one_clear_sentence():
        plan(sys.argv[1:])
PLAN

[[ ${DRY_RUN:-0} == 1 ]] && exit
if ! command -v nvidia-smi >/dev/null; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  rm -f /dev/shm/*-cpushm_*                            # a killed run leaves these, and vLLM does not start over them
fi
if [[ -n $HOSTFILE ]]; then
  exec deepspeed --hostfile "$HOSTFILE" "${train[@]}"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  exec srun --nodes "$NNODES" --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=1 \
    torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --rdzv-backend c10d \
    --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))" "${train[@]}"
fi
(( NNODES == 1 )) || fail "NNODES=$NNODES needs Slurm (sbatch), or a HOSTFILE instead."
exec torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" "${train[@]}"

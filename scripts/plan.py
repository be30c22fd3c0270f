"""Checks the settings of a run and prints how much memory and time it takes. It needs no GPU and no weights.

train_32b.sh runs it before every start, so that a run that cannot work is refused in one sentence, and not by every
process on every node. It also refuses a run that does not fit, after printing the plan. By hand it takes the settings
of `fipo.py train`. Without --deepspeed and GPUS, it prints the memory of one device with plain torch.

  GPUS=64 python scripts/plan.py --model Qwen/Qwen2.5-32B --data BytedTsinghua-SIA/DAPO-Math-17k --out runs/fipo-32b \\
      --deepspeed ds_config.json --sampler vllm --tensor_parallel 4 --vllm_memory 0.7 \\
      --tokens_per_micro_batch 22528 --gradient_checkpointing true

The hardware is read from the environment:

  GPUS           number of GPUs (8)
  GPUS_PER_NODE  GPUs that share the host memory of one node (8)
  GPU_GIB        memory of one GPU in GiB (79, an 80 GB card)

The time of a step cannot be known before it is run. These are assumptions, not measurements. Set your own in the
environment:

  MFU      share of the H100's bfloat16 FLOP/s that scoring and updates reach (0.35)
  DECODE   tokens/s that vLLM decodes, per GPU (600)
  LENGTH   tokens of a mean response (8192)
  KEPT     share of groups that are neither all right nor all wrong (0.5)

Formulas are printed with their numbers. Tests measure some on small models: activations, logits and FLOPs in
tests/test_plan.py, and what is held from step to step in tests/test_ranks.py. The others are reckoned, not measured.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, PreTrainedConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))

import fipo  # noqa: E402

GPU_GIB = 79.0  # an 80 GB card; the environment can name another size
CUDA_GIB = 4.0  # the CUDA context, NCCL and what a sleeping vLLM keeps (assumed)
VLLM_GIB = 3.0  # vLLM's own activations and CUDA graphs (assumed)
PEAK, LINK = 989e12, 50e9  # bf16 FLOP/s of an H100; bytes/s of its 400 Gbit/s network port
GIB, BILLION = 2**30, 1e9
QWEN_32B = dict(
    hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8,
    vocab_size=152064, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
# `gathered` reckons with these, so the file has to say them.
BOUNDS = ("stage3_max_live_parameters", "stage3_prefetch_bucket_size", "reduce_bucket_size")

# ------------------------------------------------------------------------------------------------- what is planned


def number(name: str, default: float) -> float:
    """A positive number from the environment."""
    text = os.environ.get(name) or str(default)
    with fipo.user_error(f"reading {name} from the environment"):
        value = float(text)
    fipo.require(value > 0, f"{name} is {text}: it must be more than 0.")
    return value


def whole_number(name: str, default: int) -> int:
    """A positive whole number from the environment."""
    value = number(name, default)
    fipo.require(value.is_integer(), f"{name} is {value}: it must be a whole number.")
    return int(value)


def gpu_gib() -> float:
    """Memory of one GPU in GiB."""
    return number("GPU_GIB", GPU_GIB)


def is_local(source: str) -> bool:
    """Is this a path on this machine, and not the name of a data set on the hub?"""
    return Path(source).suffix.lower() in (".jsonl", ".json", ".parquet") or Path(source).exists()


def shape_of(model: str) -> tuple[PreTrainedConfig, int]:
    """The config of the model's text part, and how many parameters the model has.

    They are counted on the meta device: no memory, no weights.
    """
    if model == "Qwen/Qwen2.5-32B":  # known here, so that the plan needs no hub
        config = Qwen2Config(**QWEN_32B)
    else:
        with fipo.user_error(f"reading the config of the model {model!r}"):
            config = AutoConfig.from_pretrained(model)
    with fipo.user_error(f"counting the parameters of {model!r}"), torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    text = config.get_text_config()  # a model that sees, too, keeps its sizes in there
    for name in QWEN_32B:
        fipo.require(hasattr(text, name), f"the config of {model!r} has no {name}, which the plan's formulas need.")
    return text, parameters


def check_deepspeed(path: str) -> dict[str, Any]:
    """The section zero_optimization of DeepSpeed's JSON file, if DeepSpeed accepts the file and it can hold 32B."""
    fipo.require(path, "--deepspeed is missing: give ds_config.json.")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    settings = fipo.read_deepspeed(path)
    zero = settings["zero_optimization"]
    fipo.require(zero["stage"] == 3, f"{path}: zero_optimization.stage is {zero['stage']}, it must be 3.")
    for key in BOUNDS:
        fipo.require(key in zero, f"{path}: zero_optimization.{key} is missing: without it, memory has no bound.")
    summed_in = settings.get("data_types", {}).get("grad_accum_dtype")
    fipo.require(summed_in == "fp32", f"{path}: data_types.grad_accum_dtype must be fp32: in bfloat16, small gradients "
                 "are lost in the sum.")  # fmt: skip
    return zero


def check_data(cfg: fipo.Config) -> None:
    """Read the local files. Names on the hub are not looked up."""
    for source in filter(None, (cfg.data, cfg.eval_data)):
        if is_local(source):
            fipo.load_problems(source)


def check_model(cfg: fipo.Config, config: PreTrainedConfig, gpus: int) -> None:
    """Refuse a model that cannot be cut as asked, or that reads fewer tokens than it would have to."""
    heads, tp = config.num_attention_heads, cfg.tensor_parallel
    fipo.require(gpus % tp == 0, f"--tensor_parallel {tp} does not divide the {gpus} GPUs.")
    fipo.require(heads % tp == 0, f"TP={tp} does not divide the {heads} attention heads.")
    recomputed = cfg.gradient_checkpointing or not cfg.deepspeed
    fipo.require(recomputed, "without --gradient_checkpointing nothing of this size fits: set it to true.")
    context, limit = cfg.max_prompt + cfg.max_response, config.max_position_embeddings
    fipo.require(context <= limit, f"--max_prompt and --max_response make {context} tokens, the model reads {limit}.")


# -------------------------------------------------------------------------------------------------- the formulas


def states(parameters: int, gpus: int) -> tuple[float, float, float]:
    """Bytes per GPU that training holds from step to step under ZeRO-3: weights, gradients, optimiser."""
    return 2 * parameters / gpus, 4 * parameters / gpus, 12 * parameters / gpus


def activations(config: PreTrainedConfig, tokens: int) -> tuple[int, int]:
    """Bytes of one pass: a bf16 input per layer, and all that the layer being recomputed needs for its gradient."""
    H, inner = config.hidden_size, config.intermediate_size
    return 2 * config.num_hidden_layers * tokens * H, tokens * (24 * H + 12 * inner)


def logits(config: PreTrainedConfig, chunk: int = 1024) -> int:
    """Bytes of a chunk of logits in float32, their log-softmax and gradients; of the float32 head and its gradient."""
    return 16 * chunk * config.vocab_size + 8 * config.vocab_size * config.hidden_size


def gathered(config: PreTrainedConfig, zero: dict[str, Any]) -> int:
    """Bytes of what ZeRO-3 gathers (the head is among it) and sends (float32), and of the head's gradient."""
    numbers = zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"]
    return 2 * (numbers + config.vocab_size * config.hidden_size) + 4 * 2 * zero["reduce_bucket_size"]


def kv_per_token(config: PreTrainedConfig, number_bytes: int = 2) -> int:
    """Bytes of a token in a cache: a key and a value per layer and key-value head, in vLLM in bfloat16."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return number_bytes * 2 * config.num_hidden_layers * config.num_key_value_heads * head


def forward_flops(config: PreTrainedConfig, parameters: int, length: float) -> float:
    """FLOPs of a forward pass, per token, at a mean over a response of `length` tokens: weights, causal attention."""
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # not multiplied with
    return 2 * (parameters - looked_up) + 2 * config.num_hidden_layers * config.hidden_size * length


def fits(
    cfg: fipo.Config, config: PreTrainedConfig, parameters: int, gpus: int, zero: dict[str, Any], offload: bool
) -> tuple[float, float, float, bool]:
    """Whether training fits while vLLM sleeps, and vLLM fits beside what training holds.

    Returns the bytes of training, of sampling and of an engine's KV cache on one GPU, and whether everything fits.
    """
    held = 0.0 if offload else sum(states(parameters, gpus))
    saved, layer = activations(config, cfg.tokens_per_micro_batch)
    training = held + gathered(config, zero) + saved + max(layer, logits(config))
    sampling = held + cfg.vllm_memory * gpu_gib() * GIB
    cache = (cfg.vllm_memory * gpu_gib() - VLLM_GIB) * GIB - 2 * parameters / cfg.tensor_parallel
    room = (gpu_gib() - CUDA_GIB) * GIB
    enough = cached_tokens(cfg, config, cache) > cfg.max_prompt + cfg.max_response
    return training, sampling, cache, max(training, sampling) < room and enough


def cached_tokens(cfg: fipo.Config, config: PreTrainedConfig, cache: float) -> float:
    """Tokens that the KV cache of an engine holds, if each of its GPUs has `cache` bytes for it."""
    return max(cache, 0) * cfg.tensor_parallel / kv_per_token(config)


def host_gib(parameters: int, gpus: int) -> float:
    """GiB of host memory per node that OFFLOAD=1 takes: weights, gradients and optimiser of the node's GPUs."""
    node = min(gpus, whole_number("GPUS_PER_NODE", 8))
    return node * sum(states(parameters, gpus)) / GIB


def check_fit(cfg: fipo.Config, config: PreTrainedConfig, parameters: int, gpus: int, zero: dict[str, Any]) -> None:
    """Refuse a run that does not fit, and name every single change that would make it fit."""
    training, sampling, cache, fit = fits(cfg, config, parameters, gpus, zero, cfg.offload)
    if fit:
        return
    room = gpu_gib() - CUDA_GIB
    tokens, longest = cached_tokens(cfg, config, cache), cfg.max_prompt + cfg.max_response
    reasons = []
    if training / GIB >= room:
        reasons.append(f"training needs {training / GIB:.1f} GiB per GPU")
    if sampling / GIB >= room:
        reasons.append(f"sampling needs {sampling / GIB:.1f} GiB per GPU")
    if tokens <= longest:
        reasons.append(f"the KV cache of an engine holds {tokens:.0f} tokens but a response may need {longest}")

    def would_fit(changed: fipo.Config, gpus: int = gpus) -> bool:
        return fits(changed, config, parameters, gpus, zero, changed.offload)[-1]

    changes = []
    if would_fit(replace(cfg, offload=True)):
        changes.append(f"OFFLOAD=1 with {host_gib(parameters, gpus):.0f} GiB of host memory per node")
    node = whole_number("GPUS_PER_NODE", 8)
    nodes = next((n for n in range(gpus // node + 1, 129) if would_fit(cfg, n * node)), None)
    if nodes:
        changes.append(f"{nodes} nodes of {node} GPUs")
    shares = (percent / 100 for percent in range(95, 0, -5))
    share = next((share for share in shares if would_fit(replace(cfg, vllm_memory=share))), None)
    if share:
        changes.append(f"--vllm_memory {share}")
    advice = "use " + ", or ".join(changes)
    if not changes:
        advice = ("it would not fit with OFFLOAD=1, with more nodes or with another --vllm_memory either, so lower "
                  "--tokens_per_micro_batch or --max_response, or raise --tensor_parallel (TP)")  # fmt: skip
    raise fipo.FipoError(f"{cfg.model} does not fit on {gpus} GPUs of {gpu_gib():.0f} GiB, of which {room:.0f} can be "
                         f"used: {', and '.join(reasons)}; {advice}.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- one device


def passes(config: PreTrainedConfig, parameters: int, tokens: int, chunk: int, bf16: bool, recomputed: bool) -> float:
    """Bytes that a forward and backward pass takes beside float32 weights and their gradients.

    Of all tokens the activations, of a chunk of response tokens the logits. In bfloat16 (autocast) what runs between
    the layers and the norms stay float32, and the weights are copied.
    """
    L, H, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    layer = tokens * (36 * H + 8 * inner if bf16 else 48 * H + 16 * inner)  # what its backward needs
    logits, copied = (16 if bf16 else 20) * chunk * config.vocab_size, 2 * parameters if bf16 else 0
    return copied + (4 * L * tokens * H + max(layer, logits) if recomputed else L * layer + logits)


def one_device(cfg: fipo.Config, config: PreTrainedConfig, parameters: int) -> None:
    """Memory of plain torch: float32 weights and AdamW's moments, one micro-batch, one batch of rollouts."""
    bf16, whole = cfg.dtype != "float32", cfg.max_prompt + cfg.max_response
    tokens = min(max(cfg.tokens_per_micro_batch, whole), cfg.prompts_per_mini_batch * cfg.group_size * whole)
    chunk = min(tokens * cfg.max_response // whole, 1024)
    held, beside = 12 * parameters, passes(config, parameters, tokens, chunk, bf16, cfg.gradient_checkpointing)
    rows = min(cfg.rollout_rows, cfg.prompts_per_round * cfg.group_size)
    cache = rows * whole * kv_per_token(config, 2 if bf16 else 4)
    drawn = 28 * rows * config.vocab_size  # logits, log-probs, and their cumulated sum in float64
    drawn += 2 * parameters if bf16 else 0  # the bfloat16 copy of the weights that HFSampler samples from
    kept = "an input a layer, the layer being recomputed" if cfg.gradient_checkpointing else "of all layers"
    print(f"""Memory in GiB on one device with plain torch, in {"bfloat16" if bf16 else "float32"}
  weights 4P, AdamW's moments 8P         = {held / GIB:5.1f}       float32
  gradients 4P                           = {4 * parameters / GIB:5.1f}       float32; freed after each update
  activations, a chunk of logits         = {beside / GIB:5.1f}       {kept}, for {tokens} tokens
  cache of rollouts, logits of a token   = {(cache + drawn) / GIB:5.1f}       {rows} rows of at most {whole} tokens

an update {(held + 4 * parameters + beside) / GIB:5.1f}
rollouts  {(held + cache + drawn) / GIB:5.1f}       if no response ends before --max_response
CUDA's own, and what torch keeps in reserve, comes on top: leave a tenth.""")


# ------------------------------------------------------------------------------------------------------ the plan


def print_memory(cfg: fipo.Config, config: PreTrainedConfig, parameters: int, zero: dict[str, Any]) -> None:
    """What a GPU holds, whatever their number."""
    saved, layer = activations(config, cfg.tokens_per_micro_batch)
    share, weights = cfg.vllm_memory * gpu_gib(), 2 * parameters / cfg.tensor_parallel / GIB
    terms = [
        ("activations 2·L·T·H", saved, f"one input a layer, T = {cfg.tokens_per_micro_batch} tokens"),
        ("          + T·(24H + 12I)", layer, "the layer that is recomputed"),
        ("logits 16·chunk·V + 8·V·H", logits(config), "of the float32 head; not at the same time as that layer"),
        ("gathered", gathered(config, zero), "live weights, the head's gradient, buckets"),
        ("vLLM's share", share * GIB, f"--vllm_memory {cfg.vllm_memory}: weights 2P/TP = {weights:.1f}, "
         f"{VLLM_GIB:.0f} of its own, the rest KV cache"),
    ]  # fmt: skip
    print(f"Memory in GiB per GPU of {gpu_gib():.0f} GiB; {CUDA_GIB:.0f} are left to CUDA, NCCL and a sleeping vLLM")
    print("  weights 2P/N, gradients 4P/N, optimiser 12P/N            bf16; float32; float32 master and two moments")
    for name, size, what in terms:
        print(f"  {name:<42} = {size / GIB:5.1f}       {what}")
    print("""
training = weights + gradients + optimiser + gathered + 2·L·T·H + the larger of layer and logits, while vLLM sleeps
sampling = weights + gradients + optimiser + vLLM's share""")


def print_fit(cfg: fipo.Config, config: PreTrainedConfig, parameters: int, gpus: int, zero: dict[str, Any]) -> None:
    """Print a row for each number of GPUs that says whether the run fits there."""
    print("GPUs N  weights  gradients  optimiser | training  sampling | KV cache of an engine | fits   with OFFLOAD=1")
    for n in sorted({8, 16, 32, 64, 128, gpus}):
        weights, gradients, optimiser = (size / GIB for size in states(parameters, n))
        training, sampling, cache, fit = fits(cfg, config, parameters, n, zero, cfg.offload)
        *_, fit_offloaded = fits(cfg, config, parameters, n, zero, True)
        tokens = cached_tokens(cfg, config, cache)
        print(f"{n:6}{weights:9.1f}{gradients:11.1f}{optimiser:11.1f} |{training / GIB:9.1f}{sampling / GIB:10.1f} |"
              f"{tokens:15,.0f} tokens |{'yes' if fit else 'no':>5}{'yes' if fit_offloaded else 'no':>15}")  # fmt: skip
    node, on_disk = min(gpus, whole_number("GPUS_PER_NODE", 8)), 14 * parameters / BILLION
    print(f"""
OFFLOAD=1 moves 18P/N per GPU into host memory: {host_gib(parameters, gpus):.0f} GiB per node of {node} GPUs.
A checkpoint is 14P = {on_disk:.0f} GB on disk: the optimiser's 12P and the weights as a Hugging Face folder; \
two are kept.
""")


def print_step(cfg: fipo.Config, config: PreTrainedConfig, parameters: int, gpus: int) -> None:
    """How long a step takes, if the assumptions hold."""
    mfu, decode = number("MFU", 0.35), number("DECODE", 600)
    length, informative = number("LENGTH", 8192), number("KEPT", 0.5)
    kept = cfg.prompts_per_batch * cfg.group_size * length
    drawn = kept
    if cfg.dynamic_sampling:
        drawn = min(kept / informative, cfg.max_gen_rounds * cfg.prompts_per_round * cfg.group_size * length)
    forward = forward_flops(config, parameters, length)
    rollout = drawn / decode / gpus / 3600
    scoring = kept * forward / mfu / PEAK / gpus / 3600
    update = 4 * scoring  # forward, forward again for activations that were not kept, and backward, which is two
    head = 2 * config.vocab_size * config.hidden_size / LINK
    chunks = -(-cfg.tokens_per_micro_batch // 1024)
    print(f"""\
A step on {gpus} GPUs, if responses have {length:.0f} tokens (LENGTH) and {informative:.0%} of the groups inform (KEPT)
  sampled       {drawn / 1e6:8.1f} million tokens, of which {kept / 1e6:.1f} are trained on: \
{cfg.prompts_per_batch} prompts × {cfg.group_size} responses
  updates       {cfg.prompts_per_batch // cfg.prompts_per_mini_batch:8}
  FLOPs         {kept * forward * 5:8.2g}   scoring 1, update 4 forward passes of 2(P − V·H) + 2·L·H·length a token
  rollout       {rollout:8.2f} h  at {decode:.0f} tokens/s a GPU (DECODE)
  scoring       {scoring:8.2f} h  at {mfu:.0%} of {PEAK / 1e12:.0f} TFLOP/s (MFU)
  update        {update:8.2f} h
  together      {rollout + scoring + update:8.2f} h
The head is gathered once a pass, {head * 1e3:.0f} ms at {LINK / 1e9:.0f} GB/s; anew for each of {chunks} chunks it \
would be {head * chunks:.2f} s.
MFU, DECODE, LENGTH and KEPT are assumptions: set them in the environment.""")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the docstring line by line."""


def settings_of(argv: list[str]) -> fipo.Config:
    """The settings of `fipo.py train`, checked as it checks them."""
    usage = "bash train_32b.sh [--SETTING VALUE …], or GPUS=N python scripts/plan.py [--SETTING VALUE …]"
    parser = HfArgumentParser(fipo.Config, usage=usage, description=__doc__, formatter_class=Help, allow_abbrev=False)
    return fipo.resolve(fipo.Config(**vars(parser.parse_args(argv))))


def plan(argv: list[str]) -> None:
    cfg = settings_of(argv)
    alone = not cfg.deepspeed and "GPUS" not in os.environ
    gpus = 1 if alone else whole_number("GPUS", 8)
    zero = {} if alone else check_deepspeed(cfg.deepspeed)
    check_data(cfg)
    config, parameters = shape_of(cfg.model)
    check_model(cfg, config, gpus)
    print(f"""every argument is valid
model        {cfg.model}: {parameters / BILLION:.2f} billion parameters, P; {config.num_hidden_layers} layers of \
{config.hidden_size}
""")
    if alone:
        return one_device(cfg, config, parameters)
    print_memory(cfg, config, parameters, zero)
    print_fit(cfg, config, parameters, gpus, zero)
    print_step(cfg, config, parameters, gpus)
    check_fit(cfg, config, parameters, gpus, zero)


if __name__ == "__main__":
    with fipo.report_errors():
        plan(sys.argv[1:])

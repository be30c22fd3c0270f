"""Checks the settings of a run and prints how much memory and time it needs.

It needs no GPU and no weights. train_32b.sh calls it before every start. A run that cannot work, or
does not fit, is then refused once and in one sentence, instead of by every process on every node.
You can also call it yourself, with the settings of `fipo.py train`. Without --deepspeed and GPUS,
it prints the memory of one device with plain torch.

  GPUS=64 python scripts/plan.py --model Qwen/Qwen2.5-32B --data BytedTsinghua-SIA/DAPO-Math-17k \\
      --out runs/fipo-32b --deepspeed ds_config.json --sampler vllm --tensor_parallel 4 \\
      --vllm_memory 0.7 --tokens_per_micro_batch 22528 --gradient_checkpointing true

The environment describes the hardware:

  GPUS           number of GPUs (8)
  GPUS_PER_NODE  GPUs that share the host memory of one node (8)
  GPU_GIB        memory of one GPU in GiB (79, an 80 GB card)

The time of a step depends on four numbers that are assumed, not measured. Set your own in the
environment:

  MFU      share of the H100's bfloat16 FLOP/s that scoring and updates reach (0.35)
  DECODE   tokens/s that vLLM decodes on each GPU (600)
  LENGTH   tokens in a mean response (8192)
  KEPT     share of groups with both right and wrong answers (0.5)

The plan prints its formulas next to their numbers. tests/test_plan.py compares the formulas for
activations, logits and FLOPs with measurements on small models, and tests/test_ranks.py those for
weights, gradients and optimiser. The other formulas have not been measured.
"""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

import fipo  # noqa: E402

GIB = 2**30
GPU_GIB = 79.0  # an 80 GB card; GPU_GIB in the environment replaces it
# Assumed: the CUDA context, NCCL and what a sleeping vLLM keeps.
CUDA_GIB = 4.0
# Assumed: activations and CUDA graphs of vLLM.
VLLM_GIB = 3.0
PEAK_FLOPS = 989e12  # bfloat16 FLOP/s of an H100

# The shape of Qwen2.5-32B is known here, so that its plan needs no download.
QWEN_32B = dict(
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    vocab_size=152064,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
# `gathered_bytes` needs these values, so DeepSpeed's file must state them.
BUFFER_SIZES = ("stage3_max_live_parameters", "stage3_prefetch_bucket_size", "reduce_bucket_size")

# ----------------------------------------------------------------------------- Reading and checking


def number(name: str, default: float) -> float:
    """Read a positive number from the environment."""
    text = os.environ.get(name) or str(default)
    with fipo.user_error(f"reading {name} from the environment"):
        value = float(text)
    fipo.require(value > 0, f"{name} is {text}: it must be more than 0.")
    return value


def whole_number(name: str, default: int) -> int:
    """Read a positive whole number from the environment."""
    value = number(name, default)
    fipo.require(value.is_integer(), f"{name} is {value}: it must be a whole number.")
    return int(value)


def is_local(source: str) -> bool:
    """Tell whether `source` is a local path, as opposed to the name of a data set on the hub."""
    path = Path(source)
    return path.suffix.lower() in (".jsonl", ".json", ".parquet") or path.exists()


def shape_of(model: str) -> tuple[PreTrainedConfig, int]:
    """Return the config of the model's text part and the model's number of parameters.

    The parameters are counted on the meta device, which needs neither memory nor weights.
    """
    with fipo.user_error(f"reading the config of the model {model!r}"), torch.device("meta"):
        if model == "Qwen/Qwen2.5-32B":
            config = Qwen2Config(**QWEN_32B)
        else:
            config = AutoConfig.from_pretrained(model)
        empty_model = AutoModelForCausalLM.from_config(config)
    parameters = sum(weight.numel() for weight in empty_model.parameters())
    # A model that also reads images keeps its sizes in the text part.
    text_config = config.get_text_config()
    for name in QWEN_32B:
        missing = f"the config of {model!r} has no {name}, which the plan's formulas need."
        fipo.require(hasattr(text_config, name), missing)
    return text_config, parameters


def check_deepspeed(path: str) -> dict[str, Any]:
    """Return the section zero_optimization of DeepSpeed's JSON file.

    Refuse a file that DeepSpeed does not accept, or that is not suited to a model of 32B.
    """
    fipo.require(path, "--deepspeed is missing: give ds_config.json.")
    settings = fipo.read_deepspeed(path)
    zero = settings["zero_optimization"]
    stage = zero["stage"]
    fipo.require(stage == 3, f"{path}: zero_optimization.stage is {stage}, it must be 3.")
    for key in BUFFER_SIZES:
        fipo.require(key in zero, f"{path}: zero_optimization.{key} is missing.")
    sum_dtype = settings.get("data_types", {}).get("grad_accum_dtype")
    fipo.require(
        sum_dtype == "fp32",
        f"{path}: data_types.grad_accum_dtype must be fp32: a bfloat16 sum loses small gradients.",
    )
    return zero


def check_data(cfg: fipo.Config) -> None:
    """Read the local data files. Names on the hub are not looked up."""
    for source in (cfg.data, cfg.eval_data):
        if source and is_local(source):
            fipo.load_problems(source)


def check_model(cfg: fipo.Config, config: PreTrainedConfig, gpus: int) -> None:
    """Refuse settings that the shape of the model or the number of GPUs does not allow."""
    tp = cfg.tensor_parallel
    heads = config.num_attention_heads
    fipo.require(gpus % tp == 0, f"--tensor_parallel {tp} does not divide the {gpus} GPUs.")
    fipo.require(heads % tp == 0, f"TP={tp} does not divide the {heads} attention heads.")
    fipo.require(
        cfg.gradient_checkpointing or not cfg.deepspeed,
        "without --gradient_checkpointing nothing of this size fits: set it to true.",
    )
    longest = cfg.max_prompt + cfg.max_response
    limit = config.max_position_embeddings
    fipo.require(
        longest <= limit,
        f"--max_prompt and --max_response make {longest} tokens, the model reads {limit}.",
    )


# ----------------------------------------------------------------------------------------- Formulas


def states(parameters: int, gpus: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimiser that ZeRO-3 keeps on each GPU between steps."""
    share = parameters / gpus
    return 2 * share, 4 * share, 12 * share


def layer_input_bytes(config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of the bfloat16 inputs of all layers, which are kept for the backward pass."""
    return 2 * config.num_hidden_layers * tokens * config.hidden_size


def recomputed_layer_bytes(config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of the activations of one layer, which its backward pass recomputes."""
    per_token = 24 * config.hidden_size + 12 * config.intermediate_size
    return tokens * per_token


def logits_bytes(config: PreTrainedConfig, chunk: int = 1024) -> int:
    """Bytes that a chunk of logits and the head need in float32.

    A chunk holds logits, their log-softmax and the gradients of both. The head has a gradient.
    """
    of_chunk = 16 * chunk * config.vocab_size
    of_head = 8 * config.vocab_size * config.hidden_size
    return of_chunk + of_head


def pass_bytes(config: PreTrainedConfig, tokens: int, chunk: int = 1024) -> int:
    """Peak bytes of the activations and logits of one forward and backward pass in bfloat16.

    The recomputed layer and the logits exist at different times, so the larger one counts.
    """
    largest = max(recomputed_layer_bytes(config, tokens), logits_bytes(config, chunk))
    return layer_input_bytes(config, tokens) + largest


def gathered_bytes(config: PreTrainedConfig, zero: dict[str, Any]) -> int:
    """Bytes of the weights that ZeRO-3 gathers, of the head's gradient and of the send buffers.

    The gathered weights include the head. The send buffers are in float32.
    """
    weights = zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"]
    head_gradient = config.vocab_size * config.hidden_size
    send_buffers = 2 * zero["reduce_bucket_size"]
    return 2 * (weights + head_gradient) + 4 * send_buffers


def kv_bytes_per_token(config: PreTrainedConfig, number_bytes: int = 2) -> int:
    """Bytes of one token in a KV cache: a key and a value for every layer and key-value head."""
    head_dim = getattr(config, "head_dim", None)
    if not head_dim:
        head_dim = config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return number_bytes * numbers


def forward_flops(config: PreTrainedConfig, parameters: int, length: float) -> float:
    """FLOPs of a forward pass per token, as the mean over a response of `length` tokens.

    The embedding table is looked up, not multiplied, unless it is also the head. Causal attention
    reads half of the response on average.
    """
    multiplied = parameters
    if not config.tie_word_embeddings:
        multiplied -= config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.hidden_size * length
    return 2 * multiplied + attention


def plain_pass_bytes(
    config: PreTrainedConfig,
    parameters: int,
    tokens: int,
    chunk: int,
    bf16: bool,
    recomputed: bool,
) -> float:
    """Peak bytes of a forward and backward pass with plain torch and float32 weights.

    The weights and their gradients are not counted. Under bfloat16 autocast, the values between
    layers and the norms stay in float32, and the weights are copied to bfloat16.
    """
    width = config.hidden_size
    inner = config.intermediate_size
    layers = config.num_hidden_layers
    logits = 16 * chunk * config.vocab_size
    if bf16:
        layer = tokens * (36 * width + 8 * inner)
        weight_copies = 2 * parameters
    else:
        layer = tokens * (48 * width + 16 * inner)
        weight_copies = 0
    if recomputed:
        layer_inputs = 4 * layers * tokens * width
        return weight_copies + layer_inputs + max(layer, logits)
    return weight_copies + layers * layer + logits


# -------------------------------------------------------------------------------- Does the run fit?


@dataclass
class RunPlan:
    """A run under ZeRO-3 with vLLM, and the memory in GiB that it takes on one GPU."""

    cfg: fipo.Config
    config: PreTrainedConfig
    parameters: int
    zero: dict[str, Any]
    gpus: int
    gpu_gib: float

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.room = self.gpu_gib - CUDA_GIB

        # 1) what training holds, unless the host holds it
        on_gpu = sum(states(self.parameters, self.gpus)) / GIB
        held = 0 if cfg.offload else on_gpu
        self.gpus_per_node = whole_number("GPUS_PER_NODE", 8)
        self.gpus_of_node = min(self.gpus, self.gpus_per_node)
        self.host_gib = on_gpu * self.gpus_of_node  # of each node, with --offload

        # 2) training, while vLLM sleeps
        gathered = gathered_bytes(self.config, self.zero)
        one_pass = pass_bytes(self.config, cfg.tokens_per_micro_batch)
        self.training = held + (gathered + one_pass) / GIB

        # 3) vLLM, next to what training holds
        self.vllm_share = cfg.vllm_memory * self.gpu_gib
        self.vllm_weights = 2 * self.parameters / cfg.tensor_parallel / GIB
        self.sampling = held + self.vllm_share

        # 4) the KV cache of one engine, on all its GPUs
        cache = max(self.vllm_share - VLLM_GIB - self.vllm_weights, 0) * GIB
        self.cached_tokens = cache * cfg.tensor_parallel / kv_bytes_per_token(self.config)
        self.longest = cfg.max_prompt + cfg.max_response  # tokens

        memory_fits = max(self.training, self.sampling) < self.room
        self.fits = memory_fits and self.cached_tokens > self.longest

    def changed(self, **settings: Any) -> "RunPlan":
        """The same run with other settings."""
        return replace(self, cfg=replace(self.cfg, **settings))


def reasons_against(run: RunPlan) -> str:
    """Say what does not fit."""
    reasons = []
    if run.training >= run.room:
        reasons.append(f"training needs {run.training:.1f} GiB per GPU")
    if run.sampling >= run.room:
        reasons.append(f"sampling needs {run.sampling:.1f} GiB per GPU")
    if run.cached_tokens <= run.longest:
        reasons.append(
            f"the KV cache of an engine holds {run.cached_tokens:.0f} tokens "
            f"but a response may need {run.longest}"
        )
    return ", and ".join(reasons)


def advice_for(run: RunPlan) -> str:
    """Name every single change that would make the run fit."""
    changes = []
    if run.changed(offload=True).fits:
        changes.append(f"OFFLOAD=1 with {run.host_gib:.0f} GiB of host memory per node")
    for nodes in range(run.gpus // run.gpus_per_node + 1, 129):
        if replace(run, gpus=nodes * run.gpus_per_node).fits:
            changes.append(f"{nodes} nodes of {run.gpus_per_node} GPUs")
            break
    for percent in range(95, 0, -5):
        if run.changed(vllm_memory=percent / 100).fits:
            changes.append(f"--vllm_memory {percent / 100}")
            break
    if changes:
        return "use " + ", or ".join(changes)
    return (
        "it would not fit with OFFLOAD=1, with more nodes or with another --vllm_memory either, "
        "so lower --tokens_per_micro_batch or --max_response, or raise --tensor_parallel (TP)"
    )


def check_fit(run: RunPlan) -> None:
    """Refuse a run that does not fit."""
    if not run.fits:
        raise fipo.FipoError(
            f"{run.cfg.model} does not fit on {run.gpus} GPUs of {run.gpu_gib:.0f} GiB, "
            f"of which {run.room:.0f} can be used: {reasons_against(run)}; {advice_for(run)}."
        )


# ---------------------------------------------------------------------------------- What is printed


def print_size(name: str, size: float, note: str) -> None:
    print(f"  {name:<42} = {size / GIB:5.1f}       {note}")


def print_one_device(cfg: fipo.Config, config: PreTrainedConfig, parameters: int) -> None:
    """Print the memory of plain torch for one micro-batch and for one batch of rollouts."""
    bf16 = cfg.dtype != "float32"
    longest = cfg.max_prompt + cfg.max_response

    # 1) training: float32 weights and moments, and one micro-batch
    mini_batch = cfg.prompts_per_mini_batch * cfg.group_size * longest
    tokens = min(max(cfg.tokens_per_micro_batch, longest), mini_batch)
    chunk = min(tokens * cfg.max_response // longest, 1024)
    held = 12 * parameters
    gradients = 4 * parameters
    one_pass = plain_pass_bytes(
        config, parameters, tokens, chunk, bf16, recomputed=cfg.gradient_checkpointing
    )

    # 2) rollouts: the cache, and the logits, log-probs and float64 sums of the next token
    rows = min(cfg.rollout_rows, cfg.prompts_per_round * cfg.group_size)
    cache = rows * longest * kv_bytes_per_token(config, 2 if bf16 else 4)
    rollouts = cache + 28 * rows * config.vocab_size
    if bf16:
        rollouts += 2 * parameters  # HFSampler's bfloat16 copy of the weights

    # 3) the table
    dtype = "bfloat16" if bf16 else "float32"
    kept = "activations of all layers"
    if cfg.gradient_checkpointing:
        kept = "the input of each layer, one recomputed layer"
    print(f"Memory in GiB on one device with plain torch, in {dtype}")
    print_size("weights 4P, AdamW's moments 8P", held, "float32")
    print_size("gradients 4P", gradients, "float32; freed after each update")
    print_size("activations, a chunk of logits", one_pass, f"{kept}, for {tokens} tokens")
    print_size(
        "rollouts", rollouts, f"KV cache and logits, {rows} rows of at most {longest} tokens"
    )
    print()
    print_size("an update", held + gradients + one_pass, "all but the rollouts")
    print_size("rollouts and weights", held + rollouts, "if every response reaches --max_response")
    print("CUDA's own memory and torch's reserve come on top: leave a tenth free.")


def print_memory(run: RunPlan) -> None:
    """Print the memory of a GPU that does not depend on the number of GPUs."""
    cfg = run.cfg
    config = run.config
    tokens = cfg.tokens_per_micro_batch
    print(f"Memory in GiB per GPU of {run.gpu_gib:.0f} GiB")
    print_size("reserve", CUDA_GIB * GIB, "CUDA, NCCL and a sleeping vLLM")
    print("  weights 2P/N, gradients 4P/N, optimiser 12P/N", end="            ")
    print("bf16; float32; float32 weights and two moments")
    inputs = layer_input_bytes(config, tokens)
    layer = recomputed_layer_bytes(config, tokens)
    logits = logits_bytes(config)
    print_size("activations 2·L·T·H", inputs, f"one input per layer, T = {tokens} tokens")
    print_size("          + T·(24H + 12I)", layer, "the layer that is recomputed")
    print_size(
        "logits 16·chunk·V + 8·V·H", logits, "and the head; not at the same time as that layer"
    )
    gathered = gathered_bytes(config, run.zero)
    print_size("gathered", gathered, "live weights, the head's gradient, buckets")
    weights = f"weights 2P/TP = {run.vllm_weights:.1f}"
    note = f"--vllm_memory {cfg.vllm_memory}: {weights}, {VLLM_GIB:.0f} of its own, KV cache"
    print_size("vLLM's share", run.vllm_share * GIB, note)
    print("""
training = weights + gradients + optimiser + gathered + 2·L·T·H + the larger of layer and logits,
           while vLLM sleeps
sampling = weights + gradients + optimiser + vLLM's share
""")


def print_fit(run: RunPlan) -> None:
    """Print for each number of GPUs whether the run fits, and the host memory and disk it takes."""
    yes_or_no = {True: "yes", False: "no"}
    print("GPUs N  weights  gradients  optimiser | training  sampling | ", end="")
    print("KV cache of an engine | fits   with OFFLOAD=1")
    for gpus in sorted({8, 16, 32, 64, 128, run.gpus}):
        weights, gradients, optimiser = states(run.parameters, gpus)
        print(
            f"{gpus:6}{weights / GIB:9.1f}{gradients / GIB:11.1f}{optimiser / GIB:11.1f} |", end=""
        )
        other = replace(run, gpus=gpus)
        print(f"{other.training:9.1f}{other.sampling:10.1f} |", end="")
        print(f"{other.cached_tokens:15,.0f} tokens |", end="")
        offloaded = other.changed(offload=True)
        print(f"{yes_or_no[other.fits]:>5}{yes_or_no[offloaded.fits]:>15}")
    checkpoint_gb = 14 * run.parameters / 1e9
    host = f"{run.host_gib:.0f} GiB per node of {run.gpus_of_node} GPUs"
    print(f"""
OFFLOAD=1 moves 18P/N of each GPU to the memory of its host: {host}.
A checkpoint is 14P = {checkpoint_gb:.0f} GB on disk: the optimiser's 12P and the weights as a
Hugging Face folder. Two are kept.
""")


def print_step(run: RunPlan) -> None:
    """Print how long a step takes under the assumptions."""
    cfg = run.cfg
    mfu = number("MFU", 0.35)
    decode = number("DECODE", 600)
    length = number("LENGTH", 8192)
    kept_share = number("KEPT", 0.5)

    # 1) tokens: dynamic sampling drops the groups without a signal
    prompts = cfg.prompts_per_batch
    trained = prompts * cfg.group_size * length
    sampled = trained
    if cfg.dynamic_sampling:
        most = cfg.max_gen_rounds * cfg.prompts_per_round * cfg.group_size * length
        sampled = min(trained / kept_share, most)
    updates = prompts // cfg.prompts_per_mini_batch

    # 2) hours: an update is a forward pass, a recomputed one, and a backward pass that costs two
    flops = trained * forward_flops(run.config, run.parameters, length)
    rollout = sampled / decode / run.gpus / 3600
    scoring = flops / mfu / PEAK_FLOPS / run.gpus / 3600
    update = 4 * scoring
    together = rollout + scoring + update

    print(f"""\
A step on {run.gpus} GPUs, if responses have {length:.0f} tokens (LENGTH)
and {kept_share:.0%} of the groups carry a signal (KEPT)
  sampled       {sampled / 1e6:8.1f} million tokens
  trained on    {trained / 1e6:8.1f} million tokens: {prompts} prompts × {cfg.group_size} responses
  updates       {updates:8}
  FLOPs         {5 * flops:8.2g}    2(P − V·H) + 2·L·H·length per token and forward pass;
                            scoring is 1 forward pass, updates cost as much as 4
  rollout       {rollout:8.2f} h  at {decode:.0f} tokens/s per GPU (DECODE)
  scoring       {scoring:8.2f} h  at {mfu:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s (MFU)
  update        {update:8.2f} h
  together      {together:8.2f} h
MFU, DECODE, LENGTH and KEPT are assumptions: set them in the environment.""")


# ------------------------------------------------------------------------------------- Command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the line breaks of the description."""


def settings_of(argv: list[str]) -> fipo.Config:
    """Parse and check the settings of `fipo.py train`."""
    parser = fipo.Parser(
        fipo.Config,
        usage="GPUS=N python scripts/plan.py [--SETTING VALUE …]   (or bash train_32b.sh …)",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    given = parser.parse_args(argv)
    return fipo.resolve(fipo.Config(**vars(given)))


def plan(argv: list[str]) -> None:
    """Check the settings and print the plan."""
    cfg = settings_of(argv)
    one_device = not cfg.deepspeed and "GPUS" not in os.environ
    gpus = 1
    zero = {}
    if not one_device:
        gpus = whole_number("GPUS", 8)
        zero = check_deepspeed(cfg.deepspeed)
    check_data(cfg)
    config, parameters = shape_of(cfg.model)
    check_model(cfg, config, gpus)

    print(f"""\
every argument is valid
model        {cfg.model}: {parameters / 1e9:.2f} billion parameters, P
             {config.num_hidden_layers} layers of {config.hidden_size}
""")
    if one_device:
        print_one_device(cfg, config, parameters)
        return
    run = RunPlan(cfg, config, parameters, zero, gpus, gpu_gib=number("GPU_GIB", GPU_GIB))
    print_memory(run)
    print_fit(run)
    print_step(run)
    check_fit(run)


def main(argv: list[str]) -> None:
    with fipo.report_errors():
        plan(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

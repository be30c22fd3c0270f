"""Grades student.py: points, and one sentence for every problem that is not solved.

  python assignment/grade.py student.py        # problems 1 to 6, within a minute
  python assignment/grade.py student.py 3      # one problem
  python assignment/grade.py student.py 7      # trains with your functions, one to three minutes

Exit status: 0 if everything that was graded has full points, else 1.

A wrong result is compared with what known mistakes would give on the same cases. If one of them
gives exactly this result, the grader names it. Otherwise it shows the smallest failing case. A
problem is graded with fipo.py's functions in place of the other five. The code to be graded runs in
a process of its own with a time limit. It receives the inputs of the cases and returns its results
in a file, which is read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import timeit
import warnings
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from make import POINTS  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import fipo  # noqa: E402

TIME_LIMIT = 30  # seconds for all cases of a problem
MEMORY_LIMIT = 8 * 2**30  # bytes, where the system can limit them
SPEED_POINTS = 5  # of the points for future_kl
TRAINING_MINUTES = 10
TRAINED_ACCURACY = 0.6

Case = dict[str, Any]
Outputs = dict[str, Tensor]
Answer = dict[str, Any]  # "outputs" and "seconds" of a case, or the sentence of an "error"


class WrongResult(Exception):
    """What a function returned or changed cannot be compared. The message is a sentence."""


# ------------------------------------------------------------------------------- Running a function
@functools.cache
def original_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    return Qwen2ForCausalLM(config).eval()


def tiny_model() -> Qwen2ForCausalLM:
    """A copy, which is quicker than another model."""
    return copy.deepcopy(original_model())


class TinyPolicy:
    """What add_gradients needs of a fipo.Policy."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = tiny_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.calls: list[bool] = []  # is_last of each call of backward

    def logprobs(self, *batch: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return fipo.token_logprobs(self.model, *batch, **options)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.calls.append(bool(is_last))
        loss.backward()


def backward(value: Tensor) -> None:
    """Compute gradients where there are any. Without one, the gradient stays None."""
    if value.requires_grad:
        value.sum().backward()


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def returned(result: Any, **types: type) -> Any:
    """What a function returned, if it has these types."""
    values = result if isinstance(result, tuple) else (result,)
    if len(values) == len(types) and all(map(isinstance, values, types.values())):
        return result
    wanted = " and ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
    got = ", ".join(type(value).__name__ for value in values)
    raise WrongResult(f"The function must return {wanted}, but it returns {got}.")


def run_group_advantages(module: Any, case: Case) -> Outputs:
    if case["rewards"].shape[1] > 1:
        return {"advantages": returned(module.group_advantages(**case), advantages=Tensor)}
    try:
        module.group_advantages(**case)
    except ValueError:
        return {"advantages": torch.tensor(True)}  # refused
    return {"advantages": torch.tensor(False)}


def run_token_logprobs(module: Any, case: Case) -> Outputs:
    model = tiny_model()
    result = module.token_logprobs(model, **case)
    logp, entropy = returned(result, logp=Tensor, entropy=Tensor)
    backward(logp)
    return {"logp": logp, "entropy": entropy, "gradient": gradient_of(model.lm_head.weight)}


def run_future_kl(module: Any, case: Case) -> Outputs:
    return {"F": returned(module.future_kl(**case), F=Tensor)}


def run_influence_weight(module: Any, case: Case) -> Outputs:
    delta = case["delta_logp"].clone().requires_grad_()
    F, f = returned(module.influence_weight(**case | {"delta_logp": delta}), F=Tensor, f=Tensor)
    return {"F": F, "f": f, "f.requires_grad": torch.tensor(f.requires_grad)}


def run_fipo_loss(module: Any, case: Case) -> Outputs:
    logp = case["logp"].clone().requires_grad_()
    loss, _ = returned(module.fipo_loss(**case | {"logp": logp}), loss=Tensor, metrics=dict)
    backward(loss)
    return {"loss": loss, "gradient": gradient_of(logp)}


def run_add_gradients(module: Any, case: Case) -> Outputs:
    rollouts = []
    for prompt, response, advantage, old_logp in case["rollouts"]:
        rollout = fipo.Rollout(fipo.Problem("", "", prompt), array("i", response))
        rollout.advantage = advantage
        rollout.old_logp = torch.tensor(old_logp)
        rollouts.append(rollout)
    presets = fipo.PRESETS[case["algorithm"]]
    cfg = fipo.Config(tokens_per_micro_batch=case["tokens_per_micro_batch"], **presets)
    policy = TinyPolicy()
    returned(module.add_gradients(policy, rollouts, cfg), metrics=dict)
    weight = policy.model.lm_head.weight
    return {
        "gradient": gradient_of(weight),
        "weights after it": weight,
        "is_last of policy.backward": torch.tensor(policy.calls),
    }


# ---------------------------------------------------------------------------------------- The cases
def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor([[float(x) for x in row] for row in rows])


def advantage_cases() -> list[Case]:
    rewards = [
        tensor([1, 1, -1]),
        tensor([-1.3] * 6, [0.6] * 6, [-1.7] * 6),  # whose means in float32 are other numbers
        tensor([1, 1, -1, -1], [0.5, -1, -1, -1]),
        tensor([0.5, 0.5, 0.5 - 1e-3]),  # a std in the range of the epsilon
        tensor([1], [-1]),  # groups of one, which are refused
    ]
    return [{"rewards": row} for row in rewards]


def logprob_cases() -> list[Case]:
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    one_row = {"input_ids": ids[:1], "response_mask": mask[:1]}
    batch = {"input_ids": ids, "response_mask": mask}
    return [one_row, batch | {"temperature": 0.5}, batch | {"chunk": 2, "with_entropy": False}]


def random_rows(seed: int, rows: int, length: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, length, generator=generator)


def random_mask(seed: int, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return (torch.rand(rows, length, generator=generator) < 0.8).float()


def future_kl_cases() -> list[Case]:
    return [
        {"delta_logp": tensor([1, 2, 4]), "mask": tensor([1, 1, 1]), "tau": 1.0},
        {"delta_logp": tensor([0, 8, 4, 1]), "mask": tensor([1, 0, 1, 1]), "tau": 2.0},
        {"delta_logp": random_rows(0, 4, 50, 0.1), "mask": random_mask(0, 4, 50), "tau": 8.0},
        {"delta_logp": random_rows(1, 2, 300, 0.1), "mask": random_mask(1, 2, 300)},
        # The last case shows overflow: 2^1200 is not even a float64.
        {"delta_logp": random_rows(2, 1, 1200, 0.1), "mask": torch.ones(1, 1200), "tau": 1.0},
    ]


def speed_case() -> Case:
    return {"delta_logp": random_rows(3, 32, 20480, 0.01), "mask": torch.ones(32, 20480)}


def weight_cases() -> list[Case]:
    """Ratios below 1/10, above 3 and above 10, with both signs of the advantage."""
    delta = tensor(
        [0.05, -2.5, 2.4, 0.1],
        [0.1, 1.2, 0.05, -0.3],
        [1.2, -1.3, 0.01, -0.1],
        [2.4, 0.3, 0.2, 1.2],
    )
    advantages = tensor([1] * 4, [1] * 4, [-1] * 4, [-1] * 4)
    mask = tensor([1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1])
    cases = []
    recipe_of_7b = {"weight_range": (0.8, 1.2), "safety": 3.0}
    wide = {"weight_range": (0.5, 1.5), "safety": 3.0}
    for options in ({"tau": 1.0}, recipe_of_7b, {"safety": 3.0}, wide, {}):
        rows = {"delta_logp": delta, "advantages": advantages, "mask": mask}
        cases += [{key: x[i : i + 1] for key, x in rows.items()} | options for i in range(4)]
        cases.append(rows | options)
    return cases


def loss_cases() -> list[Case]:
    """Rows of three tokens, random batches, masked positions with −inf, and advantages [B, T]."""
    cases = []
    for advantage in (1.0, -1.0):
        for step in (0.1, 0.6, 2.6):  # the ratio is clipped at the second, and twice at the third
            responses = {"num_responses": 2}
            for options in ({}, {"num_tokens": 4.0}, responses, responses | {"num_tokens": 8.0}):
                case = {"logp": tensor([-3 + step, -3.2, -2.5]), "old_logp": tensor([-3, -3, -3])}
                case |= {"advantages": torch.tensor([advantage]), "mask": tensor([1, 1, 0])}
                cases.append(case | options)
    cases += [random_loss_case(seed) for seed in range(12)]
    cases.append(random_loss_case(1) | {"num_responses": 8})  # some of them are dropped
    masked = random_loss_case(12)
    is_masked = masked["mask"] == 0
    masked["logp"][is_masked] = -math.inf
    masked["old_logp"][is_masked] = math.nan
    per_token = random_loss_case(13)
    per_token["advantages"] = per_token["advantages"][:, None].repeat(1, per_token["mask"].shape[1])
    far = {"logp": tensor([-1, -2, -2, -2]), "old_logp": tensor([-31, -2, -2, -2])}
    far["mask"] = torch.ones(1, 4)
    far |= {"advantages": torch.tensor([-1.0]), "dual_clip": math.inf}
    return [*cases, masked, per_token, far]


def random_loss_case(seed: int) -> Case:
    """Every third seed gives one of two micro-batches, every fifth is GRPO's."""
    length = 4 + seed
    mask = random_mask(seed, 4, length)
    mask[1:, :2] = 1
    old_logp = random_rows(seed, 4, length, 1.0) - 2
    step = random_rows(50 + seed, 4, length, 0.6)
    # Some ratios exceed the dual clip: one in the second row, two in the third and fourth.
    step[1, :1] = 2.6
    step[2:, :2] = 2.6
    case = {"logp": old_logp + step, "old_logp": old_logp, "mask": mask}
    case["advantages"] = random_rows(90 + seed, 1, 4, 1.0)[0]
    case["advantages"][1:] = torch.tensor([-1.0, -1.0, 1.0])
    case["tau"] = float(1 + seed)
    if seed % 3 == 0:
        case["num_tokens"] = 2.0 * mask.sum().item()
    if seed % 5 == 0:
        case |= {"num_responses": 8, "weight_range": (1.0, 1.0), "dual_clip": math.inf}
    return case


def gradient_cases() -> list[Case]:
    rng = random.Random(0)
    model = tiny_model()
    rollouts = []
    # Ratios between 1.2 and 1.28, and above 10, show whether all settings are used.
    # The third response is dropped where there is a dual clip.
    for advantage, steps in (
        (0.7, [0.22, 0.1, -0.3, 0.05, -0.1]),
        (-1.0, [0.3, -0.1]),
        (-1.0, [2.6, 0.1, 0.2, 2.6]),
        (0.7, [0.1, 0.2, -0.4]),
    ):
        prompt = [rng.randrange(13) for _ in range(2)]
        response = [rng.randrange(13) for _ in steps]
        ids = torch.tensor([prompt + response])
        logp, _ = fipo.token_logprobs(model, ids, torch.ones_like(ids))
        old_logp = (logp[0, 2:] - torch.tensor(steps)).tolist()
        rollouts.append((prompt, response, advantage, old_logp))
    cases = []
    for algorithm in ("fipo", "grpo"):
        case = {"algorithm": algorithm, "tokens_per_micro_batch": 14}
        cases.append(case | {"rollouts": rollouts[:1]})  # one part
        cases.append(case | {"rollouts": rollouts})  # two parts
    return cases


# ------------------------------------------------------------------------------- The known mistakes
# A mistake is a sentence and the ways to make it. Each is either edits of the source in fipo.py
# (old text: new text), or an expression of the arguments, in which `right` is fipo.py's function.
Mistakes = dict[str, list[dict[str, str] | str]]


def discounted(delta: Tensor, mask: Tensor, decay: float) -> Tensor:
    """F with any decay γ, by its definition from right to left."""
    F = torch.zeros_like(delta)
    total = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        total = delta[:, t] * mask[:, t] + decay * total
        F[:, t] = total
    return F


ADVANTAGE_MISTAKES: Mistakes = {
    "The std is the biased one. Divide the squared deviations by G − 1, as torch.std does.": [
        {"shifted.std(1, keepdim=True)": "shifted.std(1, keepdim=True, unbiased=False)"}
    ],
    "The epsilon is inside the square root. Add it to the std: (R − mean) / (std + 1e-6).": [
        {"(std + 1e-6)": "(std.square() + 1e-6).sqrt()"},
        {
            "shifted.std(1, keepdim=True)": "shifted.std(1, keepdim=True, unbiased=False)",
            "(std + 1e-6)": "(std.square() + 1e-6).sqrt()",
        },
    ],
    "The epsilon of 1e-6 is missing, or it is smaller: divide by (std + 1e-6).": [
        {"(std + 1e-6)": "std"}
    ],
    "The std is that of the whole batch. Each group is compared with itself only.": [
        {"shifted.std(1, keepdim=True)": "rewards.std()"},
        {"shifted.std(1, keepdim=True)": "rewards.std(unbiased=False)"},
    ],
    "Mean and std are those of the whole batch. Each group is compared with itself only.": [
        "(rewards - rewards.mean()) / (rewards.std() + 1e-6)",
        "(rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-6)",
    ],
    "Mean and std are those of the columns. A group is a row of rewards, so use dim 1.": [
        "(rewards - rewards.mean(0)) / (rewards.std(0) + 1e-6)",
        "(rewards - rewards.mean(0)) / (rewards.std(0, unbiased=False) + 1e-6)",
    ],
    "You do not divide by the std of the group.": [
        {"(shifted - mean) / (std + 1e-6)": "shifted - mean"}
    ],
    "You divide by the variance. Divide by the std, its square root.": [
        {"(std + 1e-6)": "(std.square() + 1e-6)"}
    ],
}
ONE_RESPONSE = "Groups of one response must be refused with a ValueError (see the docstring)."
EQUAL_REWARDS = (
    "A group of equal rewards does not get zeros: its mean is rounded, and the tiny difference is "
    "divided by a tiny number. Subtract the first reward of the group before anything else."
)

ENDS_AT_L_MINUS_1 = "(lambda logp, entropy: (logp[:, 1:], entropy[:, 1:]))"
RIGHT_LOGPROBS = "right(model, input_ids, {}, temperature, chunk, with_entropy)"
LOGPROB_MISTAKES: Mistakes = {
    "You are off by one: the logits at position t predict the token at t + 1.": [
        {"hidden = hidden[row, t]": "hidden = hidden[row, t + 1]"}
    ],
    "The mask is off by one: the log-prob of the token at t counts if response_mask is 1 at t.": [
        {"response_mask[:, 1:].bool()": "response_mask[:, :-1].bool()"}
    ],
    "Log-probs of the prompt are not 0. Only tokens with a response_mask of 1 count.": [
        {"response_mask[:, 1:].bool()": "torch.ones_like(response_mask[:, 1:]).bool()"}
    ],
    "The temperature is missing: divide the logits by it.": [{"logits / temperature": "logits"}],
    "You multiply the logits by the temperature instead of dividing them.": [
        {"logits / temperature": "logits * temperature"}
    ],
    "You divide the log-probs by the temperature. Divide the logits, before log_softmax.": [
        {"(logits / temperature).log_softmax(-1)": "logits.log_softmax(-1) / temperature"}
    ],
    "The values are at the wrong positions: the log-prob of the token at position t belongs at "
    "position t of the result, not at t − 1.": [
        {"(row, t + 1), torch.cat": "(row, t), torch.cat"},
        {
            "response_mask[:, 1:].bool()": "response_mask[:, :-1].bool()",
            "(row, t + 1), torch.cat": "(row, t), torch.cat",
        },
    ],
    "The positions are lost: the result has the shape [B, L] of input_ids. Nothing predicts the "
    "first token, so its value is 0.": [
        f"{ENDS_AT_L_MINUS_1}(*{RIGHT_LOGPROBS.format('response_mask')})",
        f"{ENDS_AT_L_MINUS_1}(*{RIGHT_LOGPROBS.format('torch.ones_like(response_mask)')})",
    ],
    "logp has no gradient: the loss needs it, so do not detach it.": [
        {"target[:, None])[:, 0]": "target[:, None])[:, 0].detach()"}
    ],
    "You return probabilities instead of log-probs.": [
        {"log_pi.gather(1": "log_pi.exp().gather(1"}
    ],
    "The entropy has the wrong sign: it is −Σ p log p.": [{"entropy = -(": "entropy = ("}],
    "Without with_entropy, the entropy must be 0 everywhere.": [{"if with_entropy:": "if True:"}],
    "The model does not see the prompt: response_mask is no attention_mask.": [
        {"use_cache=False": "use_cache=False, attention_mask=response_mask"}
    ],
}

FUTURE_KL_MISTAKES: Mistakes = {
    "Your F_t sums over the past. It must sum over the tokens from t on: k ≥ t.": [
        "right(delta_logp.flip(1), mask.flip(1), tau).flip(1)",
        "right(delta_logp.flip(1), mask.flip(1), tau).flip(1) - delta_logp * mask",
    ],
    "Your F is reversed: flip it back.": [
        "right(delta_logp, mask, tau).flip(1)",
        "right(delta_logp.flip(1), mask.flip(1), tau)",
    ],
    "Your F_t leaves out Δ_t itself: the sum starts at k = t.": [
        "right(delta_logp, mask, tau) - delta_logp * mask",
        "2 ** (1 / tau) * (right(delta_logp, mask, tau) - delta_logp * mask)",
    ],
    "Your powers of γ are off by one: Δ_t itself has the factor γ^0 = 1.": [
        "2 ** (-1 / tau) * right(delta_logp, mask, tau)",
        "2 ** (1 / tau) * right(delta_logp, mask, tau)",
    ],
    "Your decay is γ = 1/τ. τ is a half-life, so γ = 2^(−1/τ).": [
        "discounted(delta_logp, mask, 1 / tau)"
    ],
    "Your decay is γ = 1 − 1/τ. τ is a half-life, so γ = 2^(−1/τ).": [
        "discounted(delta_logp, mask, 1 - 1 / tau)"
    ],
    "Your decay is γ = e^(−1/τ). τ is a half-life, so γ = 2^(−1/τ).": [
        "discounted(delta_logp, mask, math.exp(-1 / tau))"
    ],
    "Your decay is γ = 2^(−τ). τ is a half-life, so γ = 2^(−1/τ).": [
        "discounted(delta_logp, mask, 2**-tau)"
    ],
    "Your decay ignores the argument tau.": ["right(delta_logp, mask)"],
    "Your sum has no decay: multiply the term k by γ^(k−t).": ["discounted(delta_logp, mask, 1.0)"],
    "Masked tokens are counted: multiply each Δ_k by M_k.": [
        "right(delta_logp, torch.ones_like(mask), tau)"
    ],
    "You mask F_t instead of Δ_k. A masked token leaves the sum, but has an F_t of its own.": [
        "right(delta_logp, torch.ones_like(mask), tau) * mask"
    ],
    "F is right but masked at the end. A masked token also has a future, and so an F_t.": [
        "right(delta_logp, mask, tau) * mask"
    ],
    "The sum stops at a masked token. Its term is 0, but those after it count.": [
        {
            "distance = 1": "for t in reversed(range(F.shape[1] - 1)):\n"
            "        F[:, t] = mask[:, t] * (F[:, t] + 2 ** (-1 / tau) * F[:, t + 1])\n"
            "    distance = F.shape[1]"
        }
    ],
}
OVERFLOW = (
    "F is right for short responses, but not for 1,200 tokens with τ = 1, where γ^(−t) overflows. "
    "Sum from right to left, or in blocks, so that only powers of γ with positive exponents occur."
)

WEIGHT_MISTAKES: Mistakes = {
    "You clip F before exp. The range bounds exp F: f = clip(exp F).": [
        {"F.exp().clamp(*weight_range)": "F.clamp(*weight_range).exp()"},
        {"F.exp().clamp(*weight_range)": "F.clamp(*weight_range).exp().clamp(*weight_range)"},
    ],
    "You do not clip exp F to weight_range.": [{"F.exp().clamp(*weight_range)": "F.exp()"}],
    "You ignore the argument weight_range.": [{"clamp(*weight_range)": "clamp(1.0, 1.2)"}],
    "You ignore the argument safety.": [{"ratio > safety": "ratio > 10.0"}],
    "You ignore the argument tau: pass it on to future_kl.": [{"M, tau)": "M)"}],
    "You clamp f to [0.8, 1] for every token with a large ratio. Do so only where A < 0.": [
        {"(advantages < 0) & (ratio > safety)": "ratio > safety"}
    ],
    "You clamp f to [0.8, 1] where A > 0. Do so only where A < 0.": [
        {"(advantages < 0)": "(advantages > 0)"}
    ],
    "You clamp f to [0.8, 1] wherever A < 0. Do so only where the ratio exceeds safety.": [
        {"(advantages < 0) & (ratio > safety)": "advantages < 0"}
    ],
    "M also drops tokens that have become less likely. M_k = 0 only where the ratio exceeds "
    "dual_clip.": [
        {"(ratio <= dual_clip)": "(ratio <= dual_clip) & (ratio >= 1 / dual_clip)"},
    ],
    "M is the wrong way round: it is 1 where the ratio is at most dual_clip.": [
        {"(ratio <= dual_clip)": "(ratio > dual_clip)"}
    ],
    "Tokens whose ratio, exp Δ, exceeds dual_clip must not count in F: there, M is 0.": [
        {"mask.bool() & (ratio <= dual_clip)": "mask.bool()"}
    ],
    "Masked tokens count in F: M is 0 where the mask is 0.": [
        {"mask.bool() & (ratio <= dual_clip)": "ratio <= dual_clip"}
    ],
    "f has a gradient. It is a weight, so detach it, or compute it under torch.no_grad().": [
        {"@torch.no_grad()\n": ""}
    ],
    "The safety rule is missing: where A < 0 and the ratio exceeds safety, f is clamped to "
    "[0.8, 1].": [{"torch.where(is_unsafe, f.clamp(0.8, 1.0), f)": "f"}],
    "In the safety rule you set f to 1. Clamp it to [0.8, 1], as the authors' release does.": [
        {"f.clamp(0.8, 1.0), f)": "torch.ones_like(f), f)"}
    ],
    "In the safety rule you set f to 0.8. Clamp it to [0.8, 1], as the authors' release does.": [
        {"f.clamp(0.8, 1.0), f)": "torch.full_like(f, 0.8), f)"}
    ],
}

# The same function, with the dual clip decided by the ratio: a mistake may differ then.
BY_RATIO = {"(pessimistic > ceiling)": "(ratio > dual_clip)"}
MINIMUM = {"torch.maximum(unclipped": "torch.minimum(unclipped"}
MEAN_OF_RESPONSES = "token_loss = token_loss / mask.sum(1, keepdim=True).clamp(min=1)\n        "
DEFAULT_MEAN = "denominator = is_kept.sum().clamp(min=1)"
LOSS_MISTAKES: Mistakes = {
    "You take the smaller of the two losses. PPO takes the larger: torch.maximum.": [
        MINIMUM,
        MINIMUM | BY_RATIO,
    ],
    "The dual clip also acts where A > 0. It caps the loss only where A < 0.": [
        {"mask & (A_tilde < 0) & (pess": "mask & (pess"},
        {"(A_tilde < 0) & (pessimistic > ceiling)": "(ratio > dual_clip)"},
        {
            "torch.where(is_dual_clipped, ceiling, pessimistic)": "torch.minimum("
            "pessimistic, ceiling)"
        },
    ],
    "You drop responses with large ratios where A > 0, too. Only dual-clipped tokens count, and "
    "these have A < 0.": [{"is_dual_clipped.sum(1": "(mask & (ratio > dual_clip)).sum(1"}],
    "You average each response first. Without num_responses, the mean is over all tokens.": [
        {"    if num_responses is not None:": "    num_responses = mask.shape[0]\n    if True:"},
        {DEFAULT_MEAN: MEAN_OF_RESPONSES + "denominator = mask.shape[0]"},
        {DEFAULT_MEAN: MEAN_OF_RESPONSES + "denominator = (~is_dropped).sum()"},
    ],
    "You divide by the number of responses. Without num_responses, the mean is over all tokens.": [
        {DEFAULT_MEAN: "denominator = mask.shape[0]"}
    ],
    "You drop responses with one dual-clipped token. Only more than one drops a response.": [
        {"keepdim=True) > 1": "keepdim=True) > 0"}
    ],
    "You do not drop the responses with more than one dual-clipped token.": [
        {"keepdim=True) > 1": "keepdim=True) > 10**9"}
    ],
    "You drop dual-clipped tokens. Drop whole responses, and only those with more than one.": [
        {"is_kept = mask & ~is_dropped": "is_kept = mask & ~is_dual_clipped"}
    ],
    "Without num_tokens, the tokens of dropped responses must not count in the mean.": [
        {"is_kept.sum().clamp": "mask.sum().clamp"}
    ],
    "Your mean counts the masked positions, too.": [{DEFAULT_MEAN: "denominator = mask.numel()"}],
    "You ignore num_tokens and divide by the tokens of this call, so that the micro-batches of a "
    "mini-batch do not add up to its mean.": [
        {"elif num_tokens is not None:": "elif False:"},
        {"elif num_tokens is not None:": "elif False:", "is_kept.sum().clamp": "mask.sum().clamp"},
    ],
    "You ignore num_responses: if it is given, each response is averaged first.": [
        {"if num_responses is not None:": "if False:"}
    ],
    "You divide by the responses of this call instead of by num_responses.": [
        {"denominator = num_responses": "denominator = mask.shape[0]"}
    ],
    "The dual clip is missing: where A < 0, a token costs at most −A · f · dual_clip.": [
        {"mask & (A_tilde < 0) & (pess": "mask & (mask < 0) & (pess"},
        {"torch.where(is_dual_clipped, ceiling, pessimistic)": "pessimistic"},
    ],
    "The ratio is upside down: it is exp(logp − old_logp).": [
        {"ratio = delta.exp()": "delta = -delta\n    ratio = delta.exp()"},
        {"ratio = delta.exp()": "ratio = (-delta).exp()"},
    ],
    "exp is missing: the ratio is exp(logp − old_logp).": [
        {"ratio = delta.exp()": "ratio = delta"},
    ],
    "The ratio is not clipped.": [
        {"clipped = -A_tilde * ratio.clamp(1 - clip_low, 1 + clip_high)": "clipped = unclipped"}
    ],
    "The loss of the clipped ratio alone is not PPO's: it is the larger of both losses.": [
        {"torch.maximum(unclipped, clipped)": "clipped"},
        {"torch.maximum(unclipped, clipped)": "clipped"} | BY_RATIO,
    ],
    "The clip of the ratio is symmetric. Its bounds are 1 − clip_low and 1 + clip_high.": [
        {"1 + clip_high": "1 + clip_low"},
        {"1 - clip_low": "1 - clip_high"},
    ],
    "f is not used: multiply the advantages by it.": [{"A_tilde = A * f": "A_tilde = A"}],
    "If both are given, num_responses counts, whatever num_tokens is.": [
        {"if num_responses is not None:": "if num_responses is not None and num_tokens is None:"}
    ],
    "You do not pass all settings on to influence_weight.": [
        {"tau=tau, ": ""},
        {"weight_range=weight_range, safety": "safety"},
        {"tau=tau, weight_range=weight_range, safety": "safety"},
        {"tau=tau, weight_range=weight_range, safety=safety, dual_clip=dual_clip": ""},
    ],
    "The sign is wrong: the loss is minimized, so it is −A · f · ratio.": [
        {"0.0).sum() /": "0.0).sum() / -"},
        {"= -A_tilde * ratio": "= A_tilde * ratio"},
        {"= -A_tilde * ratio": "= A_tilde * ratio"} | BY_RATIO,
        {"= -A_tilde * ratio": "= A_tilde * ratio"} | MINIMUM,
        {"= -A_tilde * ratio": "= A_tilde * ratio"} | MINIMUM | BY_RATIO,
        {"= -A_tilde": "= A_tilde"},
        {"= -A_tilde": "= A_tilde"} | BY_RATIO,
    ],
    "The loss has no gradient: do not detach logp or the ratio.": [
        {"ratio = delta.exp()": "ratio = delta.exp().detach()"}
    ],
}

MASKED = (
    "The loss is right, except where logp is −inf or NaN at masked positions: −inf · 0 is NaN. "
    "Replace masked values before you compute with them: torch.where(mask.bool(), x, 0.0)."
)
PER_TOKEN = "The loss is right for advantages [B], but wrong for advantages [B, T]."
UNCLAMPED = "The loss is right, except for a very large Δ: clamp Δ to [−20, 20] before exp."
LOSS_SPECIAL = {37: MASKED, 38: PER_TOKEN, 39: UNCLAMPED}

BACKWARD = "policy.backward(loss, is_last=i == len(parts))"
TOKENS_OF_PART = {"num_tokens=num_tokens": "num_tokens=None"}
RESPONSES_OF_PART = {
    "len(mini_batch) if": "mini_batch if",
    "=num_responses,": "=num_responses and len(part),",
}
NEITHER = {"num_tokens=num_tokens": "num_tokens=None", "num_responses=num_responses,": ""}
DIVIDED = {BACKWARD: "policy.backward(loss / len(parts), is_last=True)"}
GRADIENT_MISTAKES: Mistakes = {
    "is_last is wrong: it must be True for the last part, and False for the others.": [
        {"is_last=i == len(parts)": "is_last=True"},
        {"is_last=i == len(parts)": "is_last=False"},
        {"is_last=i == len(parts)": "is_last=i == len(parts) - 1"},
    ],
    "You take the whole mini-batch as one part. micro_batches gives the parts.": [
        {"parts = micro_batches(mini_batch, cfg.tokens_per_micro_batch)": "parts = [mini_batch]"}
    ],
    "You call loss.backward. Call policy.backward, which DeepSpeed replaces.": [
        {BACKWARD: "loss.backward()"}
    ],
    "Only the gradient of the last part is left: call backward for each part, and do not set "
    "gradients to zero between them.": [
        {"        logp, _ =": "        policy.model.zero_grad()\n        logp, _ ="},
        {BACKWARD: "", "    return average": "    policy.backward(loss, True)\n    return average"},
    ],
    "Only the gradient of the first part is there: call backward for each part.": [
        {BACKWARD: f"if i == 1: {BACKWARD}"}
    ],
    "There is no gradient at the end: call backward for each part, and do not set gradients to "
    "zero.": [{BACKWARD: BACKWARD + "\n        policy.model.zero_grad()"}],
    "You add the means of the parts up. All parts need one denominator: the tokens (or the "
    "responses) of the whole mini-batch.": [
        NEITHER,
        TOKENS_OF_PART,
        RESPONSES_OF_PART,
        TOKENS_OF_PART | RESPONSES_OF_PART,
        {"num_tokens=num_tokens": "num_tokens=mask.sum()"},
        {"num_tokens=num_tokens": "num_tokens=mask.sum()"} | RESPONSES_OF_PART,
    ],
    "You take the mean of the parts' means. All parts need one denominator: the tokens (or the "
    "responses) of the whole mini-batch.": [
        NEITHER | DIVIDED,
        TOKENS_OF_PART | DIVIDED,
        TOKENS_OF_PART | RESPONSES_OF_PART | DIVIDED,
        {"num_tokens=num_tokens": "num_tokens=mask.sum()"} | DIVIDED,
        {"num_tokens=num_tokens": "num_tokens=mask.sum()"} | RESPONSES_OF_PART | DIVIDED,
    ],
    "You divide by the number of parts, although the denominators already count the whole "
    "mini-batch.": [DIVIDED],
    "num_tokens counts the prompts, too. It is the number of response tokens.": [
        {"len(r.response_ids)": "r.total_tokens"}
    ],
    "You use the present log-probs as old_logp, so every ratio is 1. collate returns old_logp.": [
        {"            old_logp,\n": "            logp.detach(),\n"}
    ],
    "num_responses is missing: where cfg.loss_mean is response, it is the number of responses of "
    "the mini-batch.": [{"num_responses=num_responses": "num_responses=None"}],
    "num_responses is given although cfg.loss_mean is token.": [
        {'len(mini_batch) if cfg.loss_mean == "response" else None': "len(mini_batch)"}
    ],
    "You do not pass all settings of cfg on to fipo_loss.": [
        {"weight_range=tuple(cfg.weight_range),": ""},
        {"clip_high=cfg.clip_high,": ""},
        {"dual_clip=cfg.dual_clip,": ""},
        {"clip_high=cfg.clip_high,": "", "dual_clip=cfg.dual_clip,": ""},
        {"weight_range=tuple(cfg.weight_range),": "", "clip_high=cfg.clip_high,": ""},
        {"weight_range=tuple(cfg.weight_range),": "", "dual_clip=cfg.dual_clip,": ""},
        {
            "weight_range=tuple(cfg.weight_range),": "",
            "clip_high=cfg.clip_high,": "",
            "dual_clip=cfg.dual_clip,": "",
        },
    ],
    "You step the optimizer. That is left to the caller: add_gradients only adds gradients.": [
        {BACKWARD: BACKWARD + "\n        policy.optimizer.step()"},
        {"    return average": "    policy.optimizer.step()\n    return average"},
    ],
}


@dataclass
class Problem:
    cases: Callable[[], list[Case]]
    run: Callable[[Any, Case], Outputs]
    mistakes: Mistakes
    special: dict[int, str]  # what is wrong if only this case is


PROBLEMS = {
    "group_advantages": Problem(
        advantage_cases,
        run_group_advantages,
        ADVANTAGE_MISTAKES,
        {1: EQUAL_REWARDS, 4: ONE_RESPONSE},
    ),
    "token_logprobs": Problem(logprob_cases, run_token_logprobs, LOGPROB_MISTAKES, {}),
    "future_kl": Problem(future_kl_cases, run_future_kl, FUTURE_KL_MISTAKES, {4: OVERFLOW}),
    "influence_weight": Problem(weight_cases, run_influence_weight, WEIGHT_MISTAKES, {}),
    "fipo_loss": Problem(loss_cases, run_fipo_loss, LOSS_MISTAKES, LOSS_SPECIAL),
    "add_gradients": Problem(gradient_cases, run_add_gradients, GRADIENT_MISTAKES, {}),
}


# ---------------------------------------------------------------------------- The student's process
def load_student(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["student"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def explain(error: BaseException, path: Path) -> str:
    """What was raised, and at which line of the student's file."""
    if isinstance(error, WrongResult):
        return str(error)
    if isinstance(error, NotImplementedError):
        return "Not solved yet."
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" in line {line} of {path.name}" if line else ""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{where}" + (f": {message}" if message else "")


def limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


def keeps_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, made to refuse changes of the tensors that it is given."""

    def checked(*args: Any, **options: Any) -> Any:
        given = [value for value in options.values() if isinstance(value, Tensor)]
        before = [value.detach().clone() for value in given]
        result = function(*args, **options)
        is_kept = [torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(given, before)]
        if not all(is_kept):
            raise WrongResult("The function changes its arguments in place: work on a copy.")
        return result

    return checked


def answers_of(path: Path, name: str, cases: list[Case]) -> list[Answer]:
    """What the student's function returns or raises, case by case."""
    sentence = ""
    try:
        module = load_student(path)
        if not hasattr(module, name):
            sentence = f"{path.name} has no function {name}."
    except BaseException as error:
        sentence = explain(error, path)
    if sentence:
        return [{"error": sentence}] * len(cases)
    # The other functions are fipo.py's, so that a mistake costs the points of one problem.
    for other in POINTS:
        if other != name:
            setattr(module, other, getattr(fipo, other))
    setattr(module, name, keeps_arguments(getattr(module, name)))
    return [answer_to(module, name, case, path) for case in cases]


def answer_to(module: ModuleType, name: str, case: Case, path: Path) -> Answer:
    try:
        started = time.perf_counter()
        outputs = PROBLEMS[name].run(module, case)
        seconds = time.perf_counter() - started
        outputs = {key: value.detach().clone() for key, value in outputs.items()}
        return {"outputs": outputs, "seconds": seconds}
    except BaseException as error:
        return {"error": explain(error, path)}


def child(path: Path, name: str, inputs: Path, results: Path) -> None:
    torch.save(answers_of(path, name, torch.load(inputs, weights_only=True)), results)


def call_student(path: Path, name: str, cases: list[Case]) -> list[Answer]:
    """Return the answers to all cases, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        results = Path(folder) / "results.pt"
        torch.save(cases, inputs)
        words = [sys.executable, __file__, "--child", str(path), name, str(inputs), str(results)]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(words, start_new_session=True, **quiet)
        sentence = "The process ended without a result: does your code end it?"
        try:
            process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            sentence = f"It was ended after {TIME_LIMIT} seconds: is there an endless loop?"
        finally:
            process.kill()
            # End also what it has started. Windows has no process groups.
            with contextlib.suppress(OSError, AttributeError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        answers = read_answers(results)
    return answers if len(answers) == len(cases) else [{"error": sentence}] * len(cases)


def read_answers(results: Path) -> list[Answer]:
    """The answers in the file. What the student's code itself wrote there is no answer."""
    try:
        answers = torch.load(results, weights_only=True)
    except Exception:
        return []
    is_written_by_child = isinstance(answers, list) and all(isinstance(a, dict) for a in answers)
    return answers if is_written_by_child else []


# ------------------------------------------------------------------------------------------ Grading
def with_mistake(name: str, mistake: dict[str, str] | str) -> Any:
    """fipo.py's functions, with this mistake in one of them."""
    right = getattr(fipo, name)
    if isinstance(mistake, str):
        source = f"def {name}{inspect.signature(right)}:\n    return {mistake}"
    else:
        source = inspect.getsource(right)
        for old, new in mistake.items():
            if old not in source:
                raise ValueError(f"fipo.{name} does not contain {old!r}")
            source = source.replace(old, new)
    names = vars(fipo) | {"right": right, "discounted": discounted}
    exec(compile(source, f"{name} with a mistake", "exec"), names)
    return SimpleNamespace(**names)


def run_all(problem: Problem, module: Any, cases: list[Case]) -> list[Outputs]:
    results = []
    for case in cases:
        outputs = problem.run(module, copy.deepcopy(case))
        results.append({key: value.detach().clone() for key, value in outputs.items()})
    return results


@functools.cache
def known_results(name: str) -> list[tuple[str, list[Outputs]]]:
    """What the known mistakes give, with their sentences."""
    problem = PROBLEMS[name]
    known = []
    for sentence, variants in problem.mistakes.items():
        for variant in variants:
            module = with_mistake(name, variant)
            with warnings.catch_warnings(action="ignore"):
                known.append((sentence, run_all(problem, module, problem.cases())))
    return known


def is_close(left: Tensor, right: Tensor) -> Tensor:
    return torch.isclose(left.float(), right.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


def same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(is_close(left, right).all())


def all_same(left: list[Outputs], right: list[Outputs], key: str) -> bool:
    return all(same(a[key], b[key]) for a, b in zip(left, right))


def find_fault(name: str, cases: list[Case], got: list[Outputs]) -> str:
    """A sentence about the first fault of these results, or an empty one."""
    problem = PROBLEMS[name]
    expected = run_all(problem, fipo, cases)
    keys = list(expected[0])
    wrong = []
    for i in range(len(cases)):
        if not all(same(expected[i][key], got[i][key]) for key in keys):
            wrong.append(i)
    if not wrong:
        return wrong_dtype(expected[0], got[0])
    if all(i in problem.special for i in wrong):
        return problem.special[wrong[0]]

    # A known mistake gives these results, apart from outputs that are right. Special cases are left
    # out, because a natural solution with a mistake may also be wrong there.
    def general(results: list[Outputs]) -> list[Outputs]:
        return [outputs for i, outputs in enumerate(results) if i not in problem.special]

    faulty = [key for key in keys if not all_same(general(expected), general(got), key)]
    for sentence, results in known_results(name):
        if all(all_same(general(results), general(got), key) for key in faulty):
            return sentence
    smallest = min(wrong, key=lambda i: size(cases[i]))
    return difference(cases[smallest], expected[smallest], got[smallest])


def wrong_dtype(expected: Outputs, got: Outputs) -> str:
    for key, value in expected.items():
        if got[key].dtype != value.dtype:
            return f"{key} has the right values, but must be {value.dtype}, not {got[key].dtype}."
    return ""


def size(case: Case) -> int:
    """The number of tokens in a case, or of rollouts."""
    return sum(x.numel() if isinstance(x, Tensor) else len(x) for x in case.values() if is_long(x))


def is_long(value: Any) -> bool:
    return isinstance(value, (Tensor, list))


def short(value: Any) -> str:
    """At most five items of a list or tensor, rounded."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(short(item) for item in value[:5]) + "]"
    return str(value)


def difference(case: Case, expected: Outputs, got: Outputs) -> str:
    """The first output that differs, with its inputs: one row and at most five positions."""
    faulty = [key for key, value in expected.items() if not same(value, got[key])]
    key = faulty[0]
    right = expected[key]
    value = got[key]
    if value.shape != right.shape:
        shapes = f"expected {list(right.shape)}, got {list(value.shape)}"
        return f"The shape of {key} is wrong: {shapes}. Inputs: {inputs_of(case, 0, 0)}"
    if right.dim() < 2:
        where = ""
        given = inputs_of(case, 0, 0)
    else:
        row, first = (~is_close(value, right)).nonzero()[0].tolist()
        start = max(0, min(first, right.shape[1] - 5))
        where = f" in row {row} at position {first}"
        shown = slice(start, start + 5)
        right = right[row, shown]
        value = value[row, shown]
        # Gradients of weights have other rows than the inputs.
        is_of_tokens = any(x.shape == expected[key].shape for x in case.values() if is_tensor(x))
        given = inputs_of(case, row, start) if is_of_tokens else inputs_of(case, 0, 0)
    rows = max((len(x) for x in case.values() if is_tensor(x)), default=1)
    inputs = "Inputs" if rows == 1 else f"Inputs (one of {rows} rows)"
    return f"{key} is wrong{where}: expected {short(right)}, got {short(value)}. {inputs}: {given}"


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def inputs_of(case: Case, row: int, start: int) -> str:
    words = []
    for key, value in case.items():
        if is_tensor(value):
            value = value[row, start : start + 5] if value.dim() > 1 else value[row : row + 1]
        words.append(f"{key}={short(value)}")
    return ", ".join(words)


def grade_function(path: Path, name: str) -> tuple[int, str]:
    """Grade one of the problems 1 to 6. Returns the points, and a sentence if some are missing."""
    cases = PROBLEMS[name].cases()
    answers = call_student(path, name, cases)
    for answer in answers:
        if "error" in answer:
            return 0, answer["error"]
    fault = find_fault(name, cases, [answer["outputs"] for answer in answers])
    if fault:
        return 0, fault
    return grade_speed(path) if name == "future_kl" else (POINTS[name], "")


def grade_speed(path: Path) -> tuple[int, str]:
    """Compare the time for 32 × 20480 tokens with that of a loop over the tokens."""
    points = POINTS["future_kl"]
    case = speed_case()
    answers = call_student(path, "future_kl", [case] * 3)
    decay = 2 ** (-1 / 32)
    loop = functools.partial(discounted, case["delta_logp"], case["mask"], decay)
    limit = 0.3 * min(timeit.repeat(loop, number=1, repeat=3))
    spent = "too much time or memory"
    if all("outputs" in answer for answer in answers):
        if not same(fipo.future_kl(**case), answers[0]["outputs"]["F"]):
            return 0, "F is wrong for 20,480 tokens, although it is right for 1,200."
        fastest = min(answer["seconds"] for answer in answers)
        if fastest <= limit:
            return points, ""
        spent = f"{fastest:.2f} s"
    return points - SPEED_POINTS, (
        f"F is right, but 32 responses of 20,480 tokens take {spent} (limit {limit:.2f} s): "
        "avoid a loop over tokens and a matrix of T × T."
    )


def grade_training(path: Path) -> tuple[bool, str]:
    """Put the student's functions into fipo and train for five steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--train", str(path), folder]
        try:
            done = subprocess.run(words, timeout=60 * TRAINING_MINUTES)
        except subprocess.TimeoutExpired:
            return False, f"The run was ended after {TRAINING_MINUTES} minutes."
        metrics = Path(folder) / "metrics.jsonl"
        if done.returncode or not metrics.exists():
            return False, "The run stopped with the error above."
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    accuracy = lines[-1]["eval/accuracy"]
    sentence = f"Held-out accuracy is {accuracy:.1%} after {lines[-1]['step']} steps"
    if accuracy < TRAINED_ACCURACY:
        return False, f"{sentence}. It should be above {TRAINED_ACCURACY:.0%}."
    return True, f"{sentence}: the run learns. Your teacher reads the written answers."


def train_with(path: Path, out: str) -> None:
    import train_small

    module = load_student(path)
    for name in POINTS:
        setattr(fipo, name, getattr(module, name))
    settings = "--steps 5 --eval_every 5 --study_seeds 0 --seed 0"
    train_small.main([*settings.split(), "--out", out])


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 1
    path = Path(argv[0]).resolve()
    chosen = argv[1] if len(argv) > 1 else ""
    names = list(POINTS)
    if not path.is_file():
        sys.exit(f"grade.py: there is no file {argv[0]}: make it with assignment/make.py.")
    if chosen not in ("", *"1234567") or len(argv) > 2:
        sys.exit("grade.py: after the file comes nothing or the number of a problem, 1 to 7.")
    if chosen == "7":
        learns, sentence = grade_training(path)
        print(f"problem 7  training: {sentence}")
        return 0 if learns else 1
    graded = [names[int(chosen) - 1]] if chosen else names
    total = 0
    for name in graded:
        points, sentence = grade_function(path, name)
        total += points
        print(f"problem {names.index(name) + 1}  {name:17}{points:3} of {POINTS[name]}", flush=True)
        if sentence:
            print(textwrap.fill(sentence, 100, initial_indent="    ", subsequent_indent="    "))
    most = sum(POINTS[name] for name in graded)
    print(f"total {total} of {most} points")
    return 0 if total == most else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        limit_memory()
        child(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
    elif sys.argv[1:2] == ["--train"]:
        train_with(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(sys.argv[1:]))

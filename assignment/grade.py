"""Grades student.py: points, and one sentence for every problem that is not solved.

  python assignment/grade.py student.py        # problems 1 to 6, within a minute
  python assignment/grade.py student.py 3      # one problem
  python assignment/grade.py student.py 7      # the training run with your functions, two minutes

Exit status: 0 if everything that was graded has full points, else 1.

A wrong result is compared with what known mistakes would give on the same cases. If one of them
gives exactly this result, the grader names it. Otherwise it shows the smallest failing case. The
code to be graded runs in a process of its own with a time limit. It receives the inputs of the
cases and returns its results in a file, which is read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import copy
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
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
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


# ------------------------------------------------------------------------------- Running a function
def tiny_model() -> Qwen2ForCausalLM:
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


class TinyPolicy:
    """What add_gradients needs of a fipo.Policy."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = tiny_model()

    def logprobs(self, *batch: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return fipo.token_logprobs(self.model, *batch, **options)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()


def backward(value: Tensor) -> None:
    """Compute gradients where there are any. Without one, the gradient stays None."""
    if value.requires_grad:
        value.backward()


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def run_group_advantages(module: Any, case: Case) -> Outputs:
    return {"advantages": module.group_advantages(**case)}


def run_token_logprobs(module: Any, case: Case) -> Outputs:
    model = tiny_model()
    logp, entropy = module.token_logprobs(model, **case)
    backward(logp.sum())
    return {"logp": logp, "entropy": entropy, "gradient": gradient_of(model.lm_head.weight)}


def run_future_kl(module: Any, case: Case) -> Outputs:
    return {"F": module.future_kl(**case)}


def run_influence_weight(module: Any, case: Case) -> Outputs:
    delta = case["delta_logp"].clone().requires_grad_()
    F, f = module.influence_weight(**case | {"delta_logp": delta})
    return {"F": F, "f": f, "f has a gradient": torch.tensor(f.requires_grad)}


def run_fipo_loss(module: Any, case: Case) -> Outputs:
    logp = case["logp"].clone().requires_grad_()
    loss, _ = module.fipo_loss(**case | {"logp": logp})
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
    module.add_gradients(policy, rollouts, cfg)
    return {"gradient": gradient_of(policy.model.lm_head.weight)}


# ---------------------------------------------------------------------------------------- The cases
def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor([[float(x) for x in row] for row in rows])


def advantage_cases() -> list[Case]:
    rewards = [
        tensor([1, 1, -1]),
        tensor([-1.3, -1.3, -1.3]),  # whose mean in float32 is not −1.3
        tensor([1, 1, -1, -1], [0.5, -1, -1, -1]),
        tensor([0.5, 0.5, 0.5 - 1e-3]),  # a std in the range of the epsilon
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
        # The last case shows overflow: 2^(5000 / 4) is not a float32.
        {"delta_logp": random_rows(2, 1, 5000, 0.1), "mask": torch.ones(1, 5000), "tau": 4.0},
    ]


def speed_case() -> Case:
    return {"delta_logp": random_rows(3, 32, 20480, 0.01), "mask": torch.ones(32, 20480)}


def weight_cases() -> list[Case]:
    """Ratios below 1/10, above 3 and above 10, with both signs of the advantage."""
    delta = tensor([0.05, -2.5, 2.4, 0.1], [0.1, 1.2, 0.05, -0.3], [0.02, 1.2, 0.01, -0.1])
    advantages = tensor([1] * 4, [1] * 4, [-1] * 4)
    mask = tensor([1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1])
    first_row = {"delta_logp": delta[:1], "advantages": advantages[:1], "mask": mask[:1]}
    batch = {"delta_logp": delta, "advantages": advantages, "mask": mask}
    recipe_of_7b = {"weight_range": (0.8, 1.2), "safety": 3.0}
    return [first_row | {"tau": 1.0}, batch | {"tau": 1.0}, batch | recipe_of_7b, batch]


def loss_cases() -> list[Case]:
    """Thirty random batches. Every third is one of two micro-batches, every fifth is GRPO's."""
    small = {"old_logp": tensor([-1, -1, -1]), "advantages": torch.tensor([1.0])}
    cases = [small | {"logp": tensor([-1, -0.9, -1.2]), "mask": tensor([1, 1, 0])}]
    for seed in range(30):
        length = 4 + seed
        mask = random_mask(seed, 4, length)
        old_logp = random_rows(seed, 4, length, 1.0) - 2
        step = random_rows(50 + seed, 4, length, 0.6)
        # Some ratios exceed the dual clip: one in the second row, two in the third.
        step[1, :1] = 2.6
        step[2, :2] = 2.6
        mask[1:3, :2] = 1
        logp = old_logp + step
        logp[mask == 0] = -math.inf  # values at masked positions may be anything
        case = {"logp": logp, "old_logp": old_logp, "mask": mask}
        case["advantages"] = random_rows(90 + seed, 1, 4, 1.0)[0]
        case["advantages"][1:3] = -1.0
        case["tau"] = float(1 + seed)
        if seed % 3 == 0:
            case["num_tokens"] = 2.0 * mask.sum().item()
        if seed % 5 == 0:
            case |= {"num_responses": 8, "weight_range": (1.0, 1.0), "dual_clip": math.inf}
        cases.append(case)
    return cases


def gradient_cases() -> list[Case]:
    rng = random.Random(0)
    rollouts = []
    for length in (5, 2, 4, 3):
        prompt = [rng.randrange(13) for _ in range(2)]
        response = [rng.randrange(13) for _ in range(length)]
        old_logp = [-2 + rng.random() for _ in response]
        rollouts.append((prompt, response, rng.choice([-1.0, 0.7]), old_logp))
    cases = []
    for algorithm in ("fipo", "grpo"):
        for max_tokens in (1000, 14):  # one part, and two
            case = {"rollouts": rollouts, "algorithm": algorithm}
            cases.append(case | {"tokens_per_micro_batch": max_tokens})
    return cases


# ------------------------------------------------------------------------------- The known mistakes
@dataclass
class Mistake:
    """A mistake, and the sentence for it: edits of the function's source in fipo.py, or new code.

    In new code, `right` is the function of fipo.py.
    """

    sentence: str
    edits: list[tuple[str, str]] = field(default_factory=list)
    code: str = ""


def discounted(delta: Tensor, mask: Tensor, decay: float) -> Tensor:
    """F with any decay γ, by its definition from right to left."""
    F = torch.zeros_like(delta)
    total = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        total = delta[:, t] * mask[:, t] + decay * total
        F[:, t] = total
    return F


ADVANTAGE_MISTAKES = [
    Mistake(
        "The std is the biased one. Divide the squared deviations by G − 1, as torch.std does.",
        [("shifted.std(1, keepdim=True)", "shifted.std(1, keepdim=True, unbiased=False)")],
    ),
    Mistake(
        "The epsilon is inside the square root. Add it to the std: (R − mean) / (std + 1e-6).",
        [("(std + 1e-6)", "(std.square() + 1e-6).sqrt()")],
    ),
    Mistake(
        "The std is that of the whole batch. Each group is compared with itself only.",
        [("shifted.std(1, keepdim=True)", "rewards.float().std()")],
    ),
    Mistake(
        "Mean and std are those of the whole batch. Each group is compared with itself only.",
        code="def group_advantages(rewards):\n"
        "    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)",
    ),
    Mistake(
        "You do not divide by the std of the group.",
        [("(shifted - mean) / (std + 1e-6)", "shifted - mean")],
    ),
    Mistake(
        "A group of equal rewards does not get zeros: its mean is rounded, and the tiny difference "
        "is divided by a tiny number. Subtract the first reward of the group before anything else.",
        [("rewards.float() - rewards[:, :1].float()", "rewards.float()")],
    ),
]

LOGPROB_MISTAKES = [
    Mistake(
        "You are off by one: the logits at position t predict the token at t + 1.",
        [("hidden = hidden[row, t]", "hidden = hidden[row, t + 1]")],
    ),
    Mistake(
        "Log-probs of the prompt are not 0. Only tokens with a response_mask of 1 count.",
        [("response_mask[:, 1:].bool()", "torch.ones_like(response_mask[:, 1:]).bool()")],
    ),
    Mistake(
        "The temperature is missing: divide the logits by it.",
        [("logits / temperature", "logits")],
    ),
    Mistake(
        "You multiply the logits by the temperature instead of dividing them.",
        [("logits / temperature", "logits * temperature")],
    ),
    Mistake(
        "The values are right but at the wrong positions: the log-prob of the token at position t "
        "belongs at position t of the result, not at t − 1.",
        [("(row, t + 1), torch.cat", "(row, t), torch.cat")],
    ),
    Mistake(
        "logp has no gradient: the loss needs it, so do not detach it.",
        [("target[:, None])[:, 0]", "target[:, None])[:, 0].detach()")],
    ),
    Mistake("The entropy has the wrong sign: it is −Σ p log p.", [("entropy = -(", "entropy = (")]),
]

FUTURE_KL_MISTAKES = [
    Mistake(
        "Your F_t sums over the past. It must sum over the tokens from t on: k ≥ t.",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return right(delta_logp.flip(1), mask.flip(1), tau).flip(1)",
    ),
    Mistake(
        "Your F_t leaves out Δ_t itself: the sum starts at k = t.",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return right(delta_logp, mask, tau) - delta_logp * mask",
    ),
    Mistake(
        "Your decay is γ = 1/τ. τ is a half-life, so γ = 2^(−1/τ).",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return discounted(delta_logp, mask, 1 / tau)",
    ),
    Mistake(
        "Your decay is γ = e^(−1/τ). τ is a half-life, so γ = 2^(−1/τ).",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return discounted(delta_logp, mask, math.exp(-1 / tau))",
    ),
    Mistake(
        "Your sum has no decay: multiply the term k by γ^(k−t).",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return discounted(delta_logp, mask, 1.0)",
    ),
    Mistake(
        "Masked tokens are counted: multiply each Δ_k by M_k.",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return right(delta_logp, torch.ones_like(mask), tau)",
    ),
    Mistake(
        "You mask F_t instead of Δ_k. A masked token leaves the sum, but has an F_t of its own.",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return right(delta_logp, torch.ones_like(mask), tau) * mask",
    ),
    Mistake(
        "F is right but masked at the end. A masked token also has a future, and so an F_t.",
        code="def future_kl(delta_logp, mask, tau=32.0):\n"
        "    return right(delta_logp, mask, tau) * mask",
    ),
]
OVERFLOW = (
    "F is not finite for a long response: γ^(−t) overflows. Sum from right to left, or in blocks, "
    "so that only powers of γ with positive exponents occur."
)

WEIGHT_MISTAKES = [
    Mistake(
        "You clip F before exp. The range bounds exp F: f = clip(exp F).",
        [("F.exp().clamp(*weight_range)", "F.clamp(*weight_range).exp()")],
    ),
    Mistake(
        "You clamp f to [0.8, 1] for every token with a large ratio. Do so only where A < 0.",
        [("(advantages < 0) & (ratio > safety)", "ratio > safety")],
    ),
    Mistake(
        "M also drops tokens that have become less likely. M_k = 0 only where the ratio exceeds "
        "dual_clip.",
        [("(ratio <= dual_clip)", "(ratio <= dual_clip) & (ratio >= 1 / dual_clip)")],
    ),
    Mistake(
        "M is missing: tokens whose ratio exceeds dual_clip must not count in F.",
        [("mask.bool() & (ratio <= dual_clip)", "mask.bool()")],
    ),
    Mistake(
        "f has a gradient. It is a weight, so compute it under torch.no_grad(), or detach it.",
        [("@torch.no_grad()\n", "")],
    ),
    Mistake(
        "The safety rule is missing: where A < 0 and the ratio exceeds safety, f is clamped to "
        "[0.8, 1].",
        [("torch.where(is_unsafe, f.clamp(0.8, 1.0), f)", "f")],
    ),
    Mistake(
        "In the safety rule you set f to 1. Clamp it to [0.8, 1], as the authors' release does.",
        [("f.clamp(0.8, 1.0), f)", "torch.ones_like(f), f)")],
    ),
]

LOSS_MISTAKES = [
    Mistake(
        "You take the smaller of the two losses. PPO takes the larger: torch.maximum.",
        [("torch.maximum(unclipped", "torch.minimum(unclipped")],
    ),
    Mistake(
        "The dual clip also acts where A > 0. It caps the loss only where A < 0.",
        [("mask & (A_tilde < 0) & (pess", "mask & (pess")],
    ),
    Mistake(
        "You average each response first. Without num_responses, the mean is over all tokens.",
        [("    if num_responses is not None:", "    num_responses = mask.shape[0]\n    if True:")],
    ),
    Mistake(
        "You drop responses with one dual-clipped token. Only more than one drops a response.",
        [("keepdim=True) > 1", "keepdim=True) > 0")],
    ),
    Mistake(
        "You do not drop the responses with more than one dual-clipped token.",
        [("keepdim=True) > 1", "keepdim=True) > 10**9")],
    ),
    Mistake(
        "You ignore num_tokens and divide by the tokens of this call, so that the micro-batches "
        "of a mini-batch do not add up to its mean.",
        [("elif num_tokens is not None:", "elif False:")],
    ),
    Mistake(
        "The dual clip is missing: where A < 0, a token costs at most −A · f · dual_clip.",
        [("mask & (A_tilde < 0) & (pess", "mask & (mask < 0) & (pess")],
    ),
    Mistake(
        "The ratio is upside down: it is exp(logp − old_logp).",
        [("ratio = delta.exp()", "delta = -delta\n    ratio = delta.exp()")],
    ),
    Mistake(
        "The clip of the ratio is symmetric. Its bounds are 1 − clip_low and 1 + clip_high.",
        [("1 + clip_high", "1 + clip_low")],
    ),
    Mistake("f is not used: multiply the advantages by it.", [("A_tilde = A * f", "A_tilde = A")]),
    Mistake(
        "The sign is wrong: the loss is minimized, so it is −A · f · ratio.",
        [("0.0).sum() /", "0.0).sum() / -")],
    ),
]

GRADIENT_MISTAKES = [
    Mistake(
        "Only the last part's gradient is left: do not set gradients to zero between the parts.",
        [
            (
                "        input_ids, mask, old",
                "        policy.model.zero_grad()\n        input_ids, mask, old",
            )
        ],
    ),
    Mistake(
        "You add the means of the parts up. All parts need one denominator: the tokens (or the "
        "responses) of the whole mini-batch.",
        [("num_tokens=num_tokens", "num_tokens=None"), ("len(mini_batch) if", "len(part) if")],
    ),
    Mistake(
        "You take the mean of the parts' means. All parts need one denominator: the tokens (or "
        "the responses) of the whole mini-batch.",
        [
            ("num_tokens=num_tokens", "num_tokens=len(parts) * mask.sum()"),
            (
                "num_responses=num_responses",
                "num_responses=num_responses and len(parts) * len(part)",
            ),
        ],
    ),
    Mistake(
        "You call backward for one part only.",
        [("        policy.backward(loss", "        if i == len(parts): policy.backward(loss")],
    ),
    Mistake(
        "You use the present log-probs as old_logp, so every ratio is 1. collate returns old_logp.",
        [("            old_logp,\n", "            logp.detach(),\n")],
    ),
]


@dataclass
class Problem:
    cases: Callable[[], list[Case]]
    run: Callable[[Any, Case], Outputs]
    mistakes: list[Mistake]


PROBLEMS = {
    "group_advantages": Problem(advantage_cases, run_group_advantages, ADVANTAGE_MISTAKES),
    "token_logprobs": Problem(logprob_cases, run_token_logprobs, LOGPROB_MISTAKES),
    "future_kl": Problem(future_kl_cases, run_future_kl, FUTURE_KL_MISTAKES),
    "influence_weight": Problem(weight_cases, run_influence_weight, WEIGHT_MISTAKES),
    "fipo_loss": Problem(loss_cases, run_fipo_loss, LOSS_MISTAKES),
    "add_gradients": Problem(gradient_cases, run_add_gradients, GRADIENT_MISTAKES),
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


def is_result(outputs: Outputs) -> bool:
    return all(isinstance(value, Tensor) for value in outputs.values())


def child(path: Path, name: str, inputs: Path, results: Path) -> None:
    """Call the student's function on every case, and write what it returns or raises."""
    limit_memory()
    answers = []
    try:
        module = load_student(path)
        # The other functions are fipo.py's, so that a mistake costs the points of one problem.
        for other in POINTS:
            if other != name:
                setattr(module, other, getattr(fipo, other))
        if not hasattr(module, name):
            raise AttributeError(f"there is no function {name}")
    except BaseException as error:
        torch.save([{"error": explain(error, path)}], results)
        return
    for case in torch.load(inputs, weights_only=True):
        try:
            started = time.perf_counter()
            outputs = PROBLEMS[name].run(module, case)
            seconds = time.perf_counter() - started
            if not is_result(outputs):
                raise TypeError(f"{name} must return tensors")
            outputs = {key: value.detach().clone() for key, value in outputs.items()}
            answers.append({"outputs": outputs, "seconds": seconds})
        except NotImplementedError:
            answers.append({"error": "not solved yet"})
        except BaseException as error:
            answers.append({"error": explain(error, path)})
    torch.save(answers, results)


def call_student(path: Path, name: str, cases: list[Case]) -> list[dict[str, Any]] | str:
    """Return an answer for every case, or a sentence if there are none."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        results = Path(folder) / "results.pt"
        torch.save(cases, inputs)
        words = [sys.executable, __file__, "--child", str(path), name, str(inputs), str(results)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(words, start_new_session=True, **quiet)
        try:
            process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            return f"It was ended after {TIME_LIMIT} seconds: is there an endless loop?"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not results.exists():
            return "The process ended without a result: does your code end it?"
        return torch.load(results, weights_only=True)


# ------------------------------------------------------------------------------------------ Grading
def with_mistake(name: str, mistake: Mistake) -> Any:
    """fipo.py's functions, with this mistake in one of them."""
    right = getattr(fipo, name)
    source = mistake.code or textwrap.dedent(inspect.getsource(right))
    for old, new in mistake.edits:
        if old not in source:
            raise ValueError(f"fipo.{name} does not contain {old!r}")
        source = source.replace(old, new)
    names = vars(fipo) | {"right": right, "discounted": discounted}
    exec(compile(source, f"{name} with a mistake", "exec"), names)
    return SimpleNamespace(**names)


def same(left: Outputs, right: Outputs) -> bool:
    for key, value in left.items():
        other = right[key]
        if value.shape != other.shape:
            return False
        if not torch.allclose(value.float(), other.float(), rtol=1e-4, atol=1e-5, equal_nan=True):
            return False
    return True


def run_all(problem: Problem, module: Any, cases: list[Case]) -> list[Outputs]:
    results = []
    for case in cases:
        outputs = problem.run(module, copy.deepcopy(case))
        results.append({key: value.detach() for key, value in outputs.items()})
    return results


def diagnose(name: str, cases: list[Case], got: list[Outputs]) -> str | None:
    """The sentence of the known mistake that gives exactly this result."""
    problem = PROBLEMS[name]
    if name == "future_kl" and not got[-1]["F"].isfinite().all():
        expected = run_all(problem, fipo, cases[:-1])
        if all(same(a, b) for a, b in zip(expected, got)):
            return OVERFLOW
    for mistake in problem.mistakes:
        wrong = run_all(problem, with_mistake(name, mistake), cases)
        if all(same(a, b) for a, b in zip(wrong, got)):
            return mistake.sentence
    return None


def shorten(value: Any) -> Any:
    """At most five tokens of the first row, rounded."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        return round(value.item(), 4)
    row = value[:1, :5] if value.dim() > 1 else value[:5]
    return [[round(x, 4) for x in r] for r in row.tolist()] if value.dim() > 1 else row.tolist()


def difference(case: Case, expected: Outputs, got: Outputs) -> str:
    """The first output that differs, with the inputs of its case."""
    given = ", ".join(f"{key}={shorten(value)}" for key, value in case.items())
    for key, value in expected.items():
        if got[key].shape != value.shape:
            shapes = f"{list(value.shape)} expected, {list(got[key].shape)} got"
            return f"The shape of {key} is wrong: {shapes}. Inputs: {given}"
        if not same({key: value}, {key: got[key]}):
            # Show the first row in which they differ.
            row = 0
            if value.dim() > 1:
                is_same = [same({key: a}, {key: b}) for a, b in zip(value, got[key])]
                row = is_same.index(False)
                value = value[row : row + 1]
                got = {key: got[key][row : row + 1]}
            return (
                f"{key} is wrong in row {row}: expected {shorten(value)}, got {shorten(got[key])}. "
                f"Inputs (first row, at most 5 tokens): {given}"
            )
    return ""


def grade_function(path: Path, name: str) -> tuple[int, str]:
    """Grade one of the problems 1 to 6. Returns the points, and a sentence if some are missing."""
    points = POINTS[name]
    problem = PROBLEMS[name]
    cases = problem.cases()
    extra = [speed_case()] * 3 if name == "future_kl" else []
    answers = call_student(path, name, cases + extra)
    if isinstance(answers, str):
        return 0, answers
    for answer in answers[: len(cases)]:
        if "error" in answer:
            return 0, answer["error"]
    got = [answer["outputs"] for answer in answers]
    expected = run_all(problem, fipo, cases)
    wrong = [i for i in range(len(cases)) if not same(expected[i], got[i])]
    if wrong:
        first = wrong[0]
        sentence = diagnose(name, cases, got[: len(cases)])
        return 0, sentence or difference(cases[first], expected[first], got[first])
    if extra:
        return grade_speed(points, answers[len(cases) :])
    return points, ""


def grade_speed(points: int, answers: list[dict[str, Any]]) -> tuple[int, str]:
    """Compare the time for 32 × 20480 tokens with that of fipo.future_kl."""
    case = speed_case()
    own_times = []
    for _ in range(3):
        started = time.perf_counter()
        fipo.future_kl(**case)
        own_times.append(time.perf_counter() - started)
    limit = max(25 * min(own_times), 0.03)
    times = [answer.get("seconds", math.inf) for answer in answers]
    if min(times) <= limit:
        return points, ""
    spent = f"{min(times):.2f} s" if math.isfinite(min(times)) else "too much memory"
    return points - SPEED_POINTS, (
        f"F is right, but 32 responses of 20,480 tokens take {spent} (limit {limit:.2f} s): "
        "avoid a loop over tokens and a matrix of T × T."
    )


def grade_training(path: Path) -> tuple[bool, str]:
    """Put the student's functions into fipo and train for eight steps."""
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
    settings = "--steps 8 --eval_every 8 --study_seeds 0 --seed 0"
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
        child(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
    elif sys.argv[1:2] == ["--train"]:
        train_with(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(sys.argv[1:]))

"""Measures a GPU with one command, in less than eight minutes.

python scripts/bench_gpu.py                      # one GPU of 80 GB; writes assets/results/gpu.csv
python scripts/bench_gpu.py model-7B step        # some parts only; the rows of the others stay
python scripts/bench_gpu.py --tiny --csv FILE    # the same code at small size, also without a GPU

  model-0.5B  Scoring and one update of 1k, 8k and 20k tokens at Qwen2.5's shapes, with logits in
  model-1.5B  chunks and in full. Weights are random. Weights, gradients and moments are bfloat16,
  model-7B    so that 7B fits. The plan therefore holds 8 bytes per parameter between steps. Full
              logits are measured without entropy, which is in their favour.
  future_kl   Future-KL at 16 × 20,480, and at 2048 × 20,480, where the start of kernels is a small
              part of the time.
  sampler     HFSampler at the 0.5B shape with 64 and 256 rows and prompts of different lengths. As
              in training, it samples from a bfloat16 copy of the weights. For comparison, it also
              samples from the float32 weights under autocast.
  step        Two steps of `fipo.py train` at the 0.5B shape, with 4 updates each. Weights,
              gradients and moments are float32.
  resume      `fipo.py train`, killed after a checkpoint and resumed, and two uninterrupted runs.
  embedded    The run of train_small.py with seed 0. Its base model is made on the GPU, so it is not
              the one that a CPU makes.

Each part runs in its own process. Neither network, DeepSpeed nor vLLM is needed. The rest of
requirements.txt is, with torch 2.11 or newer. What does not fit in memory is skipped with a
message, and what takes too long is stopped.

MFU is the FLOPs of plan.py over time, as a share of the rate of one large bfloat16 product on the
same card, and of the plan's H100. Scoring counts as one forward pass and an update as three;
recomputation does not count. Peak memory is that of tensors, on a GPU only. Times of model and
future_kl are medians after a warm-up, and the others are from one run. The sampler is measured
without and with cuDNN's attention, which may have to plan anew for every length.
"""

import argparse
import contextlib
import csv
import functools
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import that reads it
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fipo
import plan
import train_small
from bench_future_kl import in_float64, seconds
from bench_memory import full_logits

ROOT = Path(__file__).parents[1]
COLUMNS = ["part", "case", "what", "value", "device", "torch", "transformers"]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPES = {
    "0.5B": dict(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "1.5B": dict(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7B": dict(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
SHORT_RUN = dict(
    group_size=8,
    prompts_per_batch=4,
    prompts_per_mini_batch=2,
    max_response=32,
    overlong_buffer=8,
    tokens_per_micro_batch=512,
)


@dataclass(frozen=True)
class Size:
    """The size of everything. The defaults are for a GPU, and TINY tries the code."""

    shape: dict[str, int] = field(default_factory=dict)  # replaces values of SHAPES
    tokens: tuple[int, ...] = (1024, 8192, 20480)
    product: int = 8192  # rows of the multiplied matrices
    copied: int = 2**28  # float32 numbers
    deltas: tuple[tuple[int, int], ...] = ((16, 20480), (2048, 20480))
    rows: tuple[int, int] = (64, 256)
    response: int = 256
    prompts: int = 16  # per step
    pretraining: int = 1000  # steps
    embedded: dict[str, int] = field(default_factory=dict)  # replaces values of EMBEDDED


TINY = Size(
    shape=dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    tokens=(64,),
    product=512,
    copied=2**20,
    deltas=((4, 300),),
    rows=(16, 32),
    response=8,
    prompts=4,
    pretraining=60,
    embedded=SHORT_RUN | dict(steps=2, eval_every=2),
)
# Records the values of a case of the part that is being measured.
Record = Callable[[str, dict[str, float | str]], None]

# ------------------------------------------------------------------------------- results and memory


def record_values(
    path: Path, part: str, device: str, case: str, values: dict[str, float | str]
) -> None:
    """Print the values and append a row for each at once: the process may be stopped at any time.

    The name of a value may be all there is to say. Its value is then "".
    """
    words = [f"  {part}"]
    if case:
        words.append(case)
    rows = []
    for what, value in values.items():
        words.append(what if value == "" else f"{what} {value:.4g}")
        rows.append([part, case, what, value, device, torch.__version__, transformers.__version__])
    fipo.say("  ".join(words))
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows(rows)


def read_results(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def remove_results(path: Path, parts: list[str]) -> None:
    """Remove the rows of parts that will be measured again."""
    rows = [row for row in read_results(path) if row["part"] not in parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def is_out_of_memory(error: Exception) -> bool:
    """Recognise the errors of torch, cuBLAS and the CPU. fipo.py may have wrapped them."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    messages = ("out of memory", "ALLOC_FAILED", "allocate memory")
    return any(message in str(error) for message in messages)


@contextlib.contextmanager
def skip_if_out_of_memory(record: Record, case: str) -> Iterator[None]:
    """Skip a case that does not fit in memory, and record that."""
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        record(case, {"does not fit": ""})


def reset_peak() -> None:
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | str:
    """Peak memory of all tensors on the GPU since `reset_peak`. Without a GPU, ""."""
    return torch.cuda.max_memory_allocated() / plan.GIB if GPU else ""


# ------------------------------------------------------------------------------------ random models


def qwen(name: str, size: Size) -> Qwen2Config:
    return Qwen2Config(**SHAPES[name] | size.shape)


def random_weights(shape: Qwen2Config) -> Qwen2ForCausalLM:
    with DEVICE:
        return AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)


class RandomPolicy(fipo.Policy):
    """fipo.Policy with random bfloat16 weights. Its `path` is the shape of the model."""

    def load(self, device: torch.device | None) -> None:
        self.tokenizer = train_small.character_tokenizer()
        self.model = random_weights(self.path)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), weight_decay=self.cfg.weight_decay, fused=True
        )


def random_rollout(vocabulary: int, tokens: int) -> fipo.Rollout:
    """A rollout of random tokens, of which the first one is the prompt."""
    ids = torch.randint(vocabulary, (tokens,)).tolist()
    problem = fipo.Problem("", "", ids[:1])
    no_logp = array("f", [0.0]) * (tokens - 1)
    return fipo.Rollout(problem, array("i", ids[1:]), no_logp, advantage=1.0)


def random_model(folder: Path, size: Size) -> fipo.Config:
    """Save a random model of the 0.5B shape, and return settings for a step on sums of digits."""
    settings = train_small.embedded_settings(folder, 0)
    settings["model"] = str(folder / "model")
    random_weights(qwen("0.5B", size)).save_pretrained(settings["model"])
    train_small.character_tokenizer().save_pretrained(settings["model"])
    train_small.make_embedded(settings, 0)  # makes the problems only, because the model exists
    settings |= dict(
        out=str(folder / "run"),
        eval_data="",
        sampler="hf",
        dtype="auto",
        steps=2,
        dynamic_sampling=False,
        lr=1e-6,
        prompts_per_batch=size.prompts,
        prompts_per_mini_batch=size.prompts // 4,
        max_response=size.response,
        overlong_buffer=0,
        gradient_checkpointing=True,
    )
    return fipo.Config(**settings)


# ---------------------------------------------------------------------------------------- the parts


def product_rate(rows: int) -> float:
    """FLOP/s of one large bfloat16 product."""
    a, b = torch.randn(2, rows, rows, device=DEVICE, dtype=torch.bfloat16)
    return 2 * rows**3 / seconds(lambda: a @ b, 30)


def measure_model(name: str, record: Record, size: Size, work: Path) -> None:
    # 1) the model, and the rate to compare with
    rate = product_rate(size.product)
    shape = qwen(name, size)
    settings = dict(model="-", data="-", out="-", sampler="hf", dtype="bfloat16")
    cfg = fipo.resolve(fipo.Config(**settings, gradient_checkpointing=True))
    policy = RandomPolicy(shape, cfg)
    policy.tolerance = math.inf  # no sampler gave these responses their log-probs
    parameters = sum(weight.numel() for weight in policy.model.parameters())
    record("", {"TFLOP/s of the product": rate / 1e12, "billion parameters": parameters / 1e9})

    # 2) what is measured
    def logprobs_in_full(
        ids: torch.Tensor, mask: torch.Tensor, with_entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with policy.autocast():
            logp = full_logits(policy.model, ids, mask)
        logp = torch.nn.functional.pad(logp, (1, 0))
        return logp, torch.zeros_like(logp)

    def score(rollout: fipo.Rollout) -> None:
        fipo.score_old_logp(policy, [[rollout]])

    def update(rollout: fipo.Rollout) -> None:
        fipo.add_gradients(policy, [rollout], cfg)
        policy.step(cfg.lr)

    def measure_pass(what: str, run: Callable, passes: int, tokens: int, way: str) -> None:
        policy.optimizer.zero_grad()  # a pass that did not fit may have left some gradients
        case = f"{what}, {tokens} tokens, {way}"
        with skip_if_out_of_memory(record, case):
            rollout = random_rollout(shape.vocab_size, tokens)
            reset_peak()
            spent = seconds(lambda: run(rollout), 2)
            flops = passes * tokens * plan.forward_flops(shape, parameters, tokens)
            values = {"tokens/s": tokens / spent, "seconds": spent, "MFU": flops / spent / rate}
            values["peak GiB"] = peak_gib()
            values["MFU of 989 TFLOP/s"] = flops / spent / plan.PEAK_FLOPS
            if what == "update" and way == "chunks":
                planned = 8 * parameters + plan.pass_bytes(shape, tokens, min(tokens, 1024))
                values["peak GiB by the plan"] = planned / plan.GIB
            record(case, values)

    # 3) the lengths. After the first update, the moments are always in memory
    with skip_if_out_of_memory(record, "moments"):
        update(random_rollout(shape.vocab_size, 64))
    ways = {"chunks": policy.logprobs, "full logits": logprobs_in_full}
    for tokens in size.tokens:
        for way, logprobs in ways.items():
            policy.logprobs = logprobs
            measure_pass("scoring", score, 1, tokens, way)
            measure_pass("update", update, 3, tokens, way)


def measure_future_kl(record: Record, size: Size, work: Path) -> None:
    source, target = torch.randn(2, size.copied, device=DEVICE)
    rate = 8 * size.copied / seconds(lambda: target.copy_(source), 30)  # bytes/s, read and written
    record("", {"GB/s of a copy": rate / 1e9})
    for B, T in size.deltas:
        case = f"{B} × {T}"
        with skip_if_out_of_memory(record, case):
            delta = 0.1 * torch.randn(B, T, device=DEVICE)
            mask = torch.ones_like(delta, dtype=torch.bool)
            run = functools.partial(fipo.future_kl, delta, mask)
            spent = seconds(run, 51)
            first_rows = delta[:16].cpu()
            difference = (run()[:16].cpu() - in_float64(first_rows, 32.0)).abs()
            error = difference / in_float64(first_rows.abs(), 32.0)
            # The least there is to move: Δ and the mask are read, F is written.
            share = 9 * B * T / spent / rate
            values = {"ms": spent * 1e3, "share of the copy": share, "error": error.max().item()}
            record(case, values)


def sample_problems(groups: int) -> list[fipo.Problem]:
    """Random prompts of 128, 120, …, 72 tokens."""
    problems = []
    for i in range(groups):
        ids = torch.randint(100, (128 - 8 * (i % 8),))
        problems.append(fipo.Problem("", "", ids.tolist()))
    return problems


def measure_sampler(record: Record, size: Size, work: Path) -> None:
    cfg = random_model(work / "sampler", size)
    sampler = fipo.HFSampler(fipo.Policy(cfg.model, cfg))
    copy = sampler.model
    trained = sampler.policy.model
    few, many = size.rows
    for rows, cudnn, model, how in (
        (few, False, copy, "without cuDNN's attention"),
        (many, False, copy, "without cuDNN's attention"),
        (few, True, copy, "with cuDNN's attention"),
        (few, False, trained, "under autocast"),
        (many, False, trained, "under autocast"),
    ):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        sampler.model = model
        autocast = sampler.policy.autocast() if model is trained else contextlib.nullcontext()
        problems = sample_problems(rows // 16)
        seeds = list(range(len(problems)))
        case = f"{rows} rows, 128 + {size.response} tokens, {how}"
        with skip_if_out_of_memory(record, case), autocast:
            sampler.generate(problems, seeds, 16, 4, 1.0, 1.0)  # warms up
            start = time.perf_counter()
            groups = sampler.generate(problems, seeds, 16, size.response, 1.0, 1.0)
            spent = time.perf_counter() - start  # the last token has reached the host
            rollouts = itertools.chain.from_iterable(groups)
            tokens = sum(len(rollout.response_ids) for rollout in rollouts)
            record(case, {"tokens/s": tokens / spent, "seconds": spent})


def measure_step(record: Record, size: Size, work: Path) -> None:
    # 1) two steps. Random tokens are never right, so every other response is called right. No
    #    checkpoint is written: its 6 GB would say nothing about a step.
    cfg = random_model(work / "step", size)
    verdicts = itertools.cycle((True, False))
    check_first_update = fipo.check_first_update
    first_updates = []

    def keep_first_update(metrics: dict[str, float], tolerance: float) -> None:
        first_updates.append(metrics | {"tolerance": tolerance})
        check_first_update(metrics, tolerance)

    reset_peak()
    with (
        mock.patch.dict(fipo.VERIFY, dapo=lambda *_: next(verdicts)),
        mock.patch.object(fipo, "check_first_update", keep_first_update),
        mock.patch.object(fipo.Run, "save", lambda run: None),
    ):
        # A FipoError if the ratio is not 1, or if the sampler holds other weights.
        fipo.train(cfg)
    peak = peak_gib()

    # 2) the results, of which the first step warms up
    lines = train_small.read_jsonl(Path(cfg.out) / "metrics.jsonl")[1:]
    for first, line in zip(first_updates, lines, strict=True):
        values = {}
        for name in ("rollout", "score", "update"):
            values[f"{name} seconds"] = line[f"time/{name}"]
        values["tokens/s"] = line["tokens_per_second"]
        values["mismatch"] = line["sampler_mismatch"]
        values["tolerance"] = first["tolerance"]
        values["|Δ| at the first update"] = first["drift"]
        values["ratio at the first update"] = math.exp(-first["ppo_kl"])
        values["f at the first update"] = first["influence_mean"]
        record(f"step {line['step']}", values)
    record("", {"peak GiB": peak})


def make_embedded(out: Path, base: Path, steps: int) -> dict[str, Any]:
    """Settings of the embedded run. Its base model is made on the device, outside the cache."""
    settings = train_small.embedded_settings(out, steps)
    settings |= dict(model=str(base), sampler="hf")
    with DEVICE:
        train_small.make_embedded(settings, steps)
    return settings


def largest_differences(run: Path, other: Path) -> dict[str, float]:
    """Compare two runs: metrics.jsonl except times, and the weights at the end."""
    in_metrics = 0.0
    lines = train_small.read_jsonl(run / "metrics.jsonl")
    other_lines = train_small.read_jsonl(other / "metrics.jsonl")
    for line, other_line in zip(lines, other_lines, strict=True):
        for name, value in line.items():
            if "time/" not in name and name != "tokens_per_second":
                in_metrics = max(in_metrics, abs(value - other_line[name]))
    in_weights = 0.0
    weights = load_file(fipo.newest_checkpoint(run) / "model.safetensors")
    other_weights = load_file(fipo.newest_checkpoint(other) / "model.safetensors")
    for name, weight in weights.items():
        difference = (weight - other_weights[name]).abs().max().item()
        in_weights = max(in_weights, difference)
    return {
        "largest difference in metrics": float(in_metrics),
        "largest difference in weights": in_weights,
    }


def train_and_kill(settings: dict[str, Any], out: Path) -> int:
    """Start `fipo.py train` and kill it after two checkpoints. Returns the step of the newest."""
    words = [sys.executable, ROOT / "fipo.py", "train", "--steps", "1000", "--out", out]
    for name, value in settings.items():
        if value != "":
            words += [f"--{name}", str(value)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("checkpoints/step_*/state.json"))) < 2:
        time.sleep(0.01)
    process.kill()
    status = process.wait()
    ended = f"the run to be killed ended by itself, with status {status}."
    fipo.require(status == -signal.SIGKILL, ended)
    state = json.loads((fipo.newest_checkpoint(out) / "state.json").read_text())
    return state["step"]


def measure_resume(record: Record, size: Size, work: Path) -> None:
    out = work / "resume"
    steps = min(120, size.pretraining)
    settings = make_embedded(out, work / f"base-{steps}", steps) | SHORT_RUN
    settings |= dict(eval_data="", save_every=1)
    step = train_and_kill(settings, out / "killed")
    for name in ("killed", "uninterrupted", "again"):
        run = dict(steps=step + 2, resume=name == "killed", out=str(out / name))
        fipo.train(fipo.Config(**settings | run))
    uninterrupted = out / "uninterrupted"
    resumed = largest_differences(uninterrupted, out / "killed")
    record("killed and resumed", {"from step": step} | resumed)
    record("uninterrupted, twice", largest_differences(uninterrupted, out / "again"))


def measure_embedded(record: Record, size: Size, work: Path) -> None:
    out = work / "embedded"
    start = time.perf_counter()
    settings = make_embedded(out, work / f"base-{size.pretraining}", size.pretraining)
    made = time.perf_counter()
    settings |= size.embedded
    with contextlib.suppress(fipo.NoSignal):  # the run may end early, when all answers are right
        fipo.train(fipo.Config(**settings, out=str(out / "run")))
    end = time.perf_counter()
    record("", {"base model seconds": made - start, "run seconds": end - made})
    lines = train_small.read_jsonl(out / "run" / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/accuracy" in line]
    for line in (evaluated[0], evaluated[-1]):
        values = {"accuracy": line["eval/accuracy"], "mean length": line["eval/response_length"]}
        record(f"step {line['step']}", values)


# ------------------------------------------------------------------------ a process for every part


@dataclass(frozen=True)
class Part:
    measure: Callable[[Record, Size, Path], None]
    limit: int  # seconds after which it is stopped


# The longest part is last, so that the others do not wait for it.
PARTS = {
    "model-0.5B": Part(functools.partial(measure_model, "0.5B"), 120),
    "model-1.5B": Part(functools.partial(measure_model, "1.5B"), 120),
    "model-7B": Part(functools.partial(measure_model, "7B"), 120),
    "future_kl": Part(measure_future_kl, 60),
    "sampler": Part(measure_sampler, 120),
    "step": Part(measure_step, 120),
    "resume": Part(measure_resume, 120),
    "embedded": Part(measure_embedded, 240),
}
WHOLE = "whole part seconds"  # recorded when a part ends, even if it failed


def measure_parts(parts: list[str], size: Size, path: Path, work: Path) -> None:
    """Measure parts in this process. If one fails, the next one still runs."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    device = torch.cuda.get_device_name() if GPU else "CPU"
    for part in parts:
        start = time.perf_counter()
        record = functools.partial(record_values, path, part, device)
        try:
            with skip_if_out_of_memory(record, ""):
                PARTS[part].measure(record, size, work)
        except Exception as error:
            traceback.print_exc()
            message = " ".join(repr(error).split())
            record("", {f"failed: {message[:200]}": ""})
        record("", {WHOLE: time.perf_counter() - start})


def run_in_own_process(words: list[str], limit: float) -> str:
    """Have parts measured. Returns what to record for those that did not end."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, __file__, *words],
        stdin=subprocess.DEVNULL,
        process_group=0,
        env=environment,
    )
    try:
        status = child.wait(limit)
        return f"failed: its process ended with status {status}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        # The group includes the processes that the child has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def incomplete_parts(path: Path, parts: list[str], outcome: str) -> list[str]:
    """The parts that failed or did not end. Records `outcome` for those that did not end."""
    ended = set()
    incomplete = set()
    for row in read_results(path):
        if row["what"] == WHOLE:
            ended.add(row["part"])
        if row["what"].startswith("failed"):
            incomplete.add(row["part"])
    for part in parts:
        if part not in ended:
            record_values(path, part, "", "", {outcome: ""})
            incomplete.add(part)
    return [part for part in parts if part in incomplete]


def supervise(parts: list[str], path: Path, tiny: bool, words: list[str], minutes: float) -> None:
    """Have each part measured in its own process. A part without time left keeps its rows."""
    # SIGTERM has to end the child too, so it becomes an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    start = time.monotonic()
    incomplete = []
    # Tiny parts share a process, because they take less time than its start.
    batches = [parts] if tiny else [[part] for part in parts]
    with tempfile.TemporaryDirectory() as work:
        for batch in batches:
            left = minutes * 60 - (time.monotonic() - start)
            if left < 1:
                incomplete += batch
                fipo.say(f"  {', '.join(batch)}  not begun: no time is left")
                continue
            remove_results(path, batch)
            limit = min(left, sum(PARTS[part].limit for part in batch))
            call = [*batch, *words, "--csv", str(path), "--work", work]
            outcome = run_in_own_process(call, limit)
            incomplete += incomplete_parts(path, batch, outcome)
    print(f"{len(parts)} parts, {time.monotonic() - start:.0f} s", flush=True)
    fipo.require(not incomplete, f"not measured to the end: {', '.join(incomplete)}.")


def main(argv: list[str]) -> None:
    # 1) the command line
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{names} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small size, all in one process")
    csv_help = "where rows go (default: assets/results/gpu.csv; with --tiny, nowhere)"
    parser.add_argument("--csv", type=Path, help=csv_help)
    tokens_help = "lengths of the model parts (default: 1024 8192 20480)"
    parser.add_argument("--tokens", type=int, nargs="+", help=tokens_help)
    minutes_help = "skip the parts that are left after this time (default: 7.5)"
    parser.add_argument("--minutes", type=float, default=7.5, help=minutes_help)
    # The temporary folder. `supervise` gives it to the process that measures.
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)

    # 2) supervise the parts, or measure them if this is the process of a part
    with fipo.report_errors(), tempfile.TemporaryDirectory() as nowhere:
        unknown = ", ".join(part for part in given.parts if part not in PARTS)
        fipo.require(not unknown, f"there is no part {unknown}: choose from {names}.")
        can_run = given.tiny or GPU
        fipo.require(can_run, "there is no GPU here: --tiny tries everything without one.")
        size = TINY if given.tiny else Size()
        words = ["--tiny"] if given.tiny else []
        if given.tokens:
            size = replace(size, tokens=given.tokens)
            words += ["--tokens", *map(str, given.tokens)]
        if given.work:
            measure_parts(given.parts, size, given.csv, given.work)
            return
        parts = [part for part in PARTS if part in given.parts or not given.parts]
        results = Path(nowhere) if given.tiny else ROOT / "assets" / "results"
        path = given.csv or results / "gpu.csv"
        supervise(parts, path, given.tiny, words, given.minutes)


if __name__ == "__main__":
    main(sys.argv[1:])

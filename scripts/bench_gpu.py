"""One command that measures a GPU: each part in a process of its own, all of them in less than eight minutes.

python scripts/bench_gpu.py                      # one GPU of 80 GB; writes assets/results/gpu.csv
python scripts/bench_gpu.py model-7B step        # some parts only; the rows of the others stay
python scripts/bench_gpu.py --tiny --csv FILE    # the same code at small size, with or without a GPU: half a minute

  model-0.5B  Qwen2.5's shape with random bfloat16 weights: scoring and one update of 1k, 8k and 20k tokens, logits in
  model-1.5B  chunks and in full. Gradients and moments are bfloat16 as well, so that 7B fits: what the plan holds from
  model-7B    step to step is 8 bytes a parameter here. The full logits are without entropy, which favours them
  future_kl   Future-KL at 16 × 20,480; and at 2048 × 20,480, where starting kernels is not what takes the time
  sampler     HFSampler at the 0.5B shape, 64 and 256 rows, prompts of different lengths, as training uses it: from a
              bfloat16 copy of the weights. For comparison, from the float32 weights under autocast
  step        two steps of `fipo.py train` at the 0.5B shape, 4 updates each; weights, gradients, moments in float32
  resume      `fipo.py train` killed behind a checkpoint and resumed, beside two runs that nothing interrupted
  embedded    the run of train_small.py, seed 0, but its base model is made on the GPU: another one than the CPU makes

Neither network, DeepSpeed nor vLLM is needed; the rest of requirements.txt is, with torch from 2.11 on. What does not
fit in memory is said and passed over; what takes too long is stopped. MFU is plan.py's FLOPs (scoring one forward pass,
an update three: what is recomputed does not count) over time, as a share of what the card does in one large bfloat16
product, and of the plan's H100. Peak memory is that of tensors, on a GPU only. Times of model and future_kl are medians
after a warm-up, the others are of one run. Attention by cuDNN may have to plan anew for every length, which a sampler
would feel at every token: it is measured without and with it.
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
from dataclasses import dataclass, replace
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
NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
SHAPES = {
    "0.5B": (151_936, 896, 4864, 24, 14, 2, True),
    "1.5B": (151_936, 1536, 8960, 28, 12, 2, True),
    "7B": (152_064, 3584, 18944, 28, 28, 4, False),
}
SHORT_RUN = dict(group_size=8, prompts_per_batch=4, prompts_per_mini_batch=2, max_response=32, overlong_buffer=8,
                 tokens_per_micro_batch=512)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How large everything is: as here on a GPU, TINY to try the code."""

    shape: tuple[int, ...] = ()  # in the place of what a shape begins with
    tokens: tuple[int, ...] = (1024, 8192, 20480)
    side: int = 8192  # of the matrices multiplied
    copied: int = 2**28  # numbers in float32
    deltas: tuple[tuple[int, int], ...] = ((16, 20480), (2048, 20480))
    rows: tuple[int, ...] = (64, 256)
    response: int = 256
    prompts: int = 16  # of a step
    pretraining: int = 1000
    embedded: tuple[tuple[str, int], ...] = ()  # what differs from train_small.EMBEDDED


TINY = Size((512, 64, 128, 2, 4, 2), (64,), 512, 2**20, ((4, 300),), (16, 32), 8, 4, 60,
            (*SHORT_RUN.items(), ("steps", 2), ("eval_every", 2)))  # fmt: skip
Note = Callable[[str, dict[str, float | str]], None]

# ------------------------------------------------------------------------------------------------ notes and memory


def note(path: Path, part: str, device: str, case: str, values: dict[str, float | str]) -> None:
    """Add a row for each value, at once: the process may be stopped at any time."""
    shown = (what if value == "" else f"{what} {value:.4g}" for what, value in values.items())
    fipo.say("  ".join(filter(None, (f"  {part}", case, *shown))))
    versions = [device, torch.__version__, transformers.__version__]
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows([part, case, what, value, *versions] for what, value in values.items())


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def forget(path: Path, parts: list[str]) -> None:
    """Drop the rows of what is measured anew."""
    rows = [row for row in read(path) if row["part"] not in parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        (writer := csv.DictWriter(file, COLUMNS)).writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def what_fits(say: Note, case: str) -> Iterator[None]:
    """What does not fit in memory is said and passed over."""
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
    try:
        yield
    except Exception as error:  # torch, cuBLAS and the CPU have words of their own, which fipo.py may repeat
        told = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "allocate memory"))
        if not (told or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
            raise
        say(case, {"does not fit": ""})


def measured(run: Callable[[], object], repeats: int) -> tuple[float, float | str]:
    """Seconds of one call, and the peak of memory in GiB, with all that was there before."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    spent = seconds(run, repeats)
    return spent, torch.cuda.max_memory_allocated() / plan.GIB if GPU else ""


# ------------------------------------------------------------------------------------------------------- the parts


def qwen(name: str, size: Size) -> Qwen2Config:
    return Qwen2Config(**dict(zip(NAMES, (*size.shape, *SHAPES[name][len(size.shape) :]))))


def random_weights(shape: Qwen2Config) -> Qwen2ForCausalLM:
    with DEVICE:  # drawn where they are used
        return AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)


def product_rate(side: int) -> float:
    a, b = torch.randn(2, side, side, device=DEVICE, dtype=torch.bfloat16)
    return 2 * side**3 / seconds(lambda: a @ b, 30)


class RandomPolicy(fipo.Policy):
    """The project's policy with bfloat16 weights, and a shape in the place of the path that they would be read from."""

    def load(self) -> None:
        self.tokenizer = train_small.character_tokenizer()
        self.model = random_weights(self.path)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=self.cfg.weight_decay, fused=True)


def random_rollout(vocabulary: int, tokens: int, prompt: int = 1) -> fipo.Rollout:
    ids = torch.randint(vocabulary, (tokens,)).tolist()
    response = array("i", ids[prompt:])
    return fipo.Rollout(fipo.Problem("", "", ids[:prompt]), response, array("f", [0.0] * len(response)), advantage=1.0)


def measure_model(name: str, say: Note, size: Size, work: Path) -> None:
    shape, rate = qwen(name, size), product_rate(size.side)
    given = dict(model="-", data="-", out="-", sampler="hf", dtype="bfloat16", gradient_checkpointing=True)
    policy = RandomPolicy(shape, cfg := fipo.resolve(fipo.Config(**given)))
    policy.tolerance = math.inf  # no sampler has seen these responses
    chunked, parameters = policy.logprobs, sum(p.numel() for p in policy.model.parameters())
    say("", {"TFLOP/s of the product": rate / 1e12, "billion parameters": parameters / 1e9})

    def in_full(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with policy.autocast():
            logp = torch.nn.functional.pad(full_logits(policy.model, ids, mask), (1, 0))
        return logp, torch.zeros_like(logp)

    def score(rollout: fipo.Rollout) -> None:
        fipo.score_old_logp(policy, [[rollout]])

    def update(rollout: fipo.Rollout) -> None:
        fipo.add_gradients(policy, [rollout], cfg)
        policy.step(cfg.lr)

    with what_fits(say, "moments"):
        update(random_rollout(shape.vocab_size, 64))  # from here on, scoring has the moments beside it as well
    for tokens, way in itertools.product(size.tokens, ("chunks", "full logits")):
        policy.logprobs = chunked if way == "chunks" else in_full
        flops = tokens * plan.forward_flops(shape, parameters, tokens)
        saved, layer = plan.activations(shape, tokens)
        planned = 8 * parameters + saved + max(layer, plan.logits(shape, min(tokens, 1024)))
        for what, run, passes in (("scoring", score, 1), ("update", update, 3)):
            policy.optimizer.zero_grad()  # a pass that did not fit may have left some
            with what_fits(say, case := f"{what}, {tokens} tokens, {way}"):
                spent, peak = measured(functools.partial(run, random_rollout(shape.vocab_size, tokens)), 2)
                done = passes * flops / spent
                say(case, {"tokens/s": tokens / spent, "seconds": spent, "MFU": done / rate, "peak GiB": peak,
                           f"MFU of {plan.PEAK / 1e12:.0f} TFLOP/s": done / plan.PEAK})  # fmt: skip
                if (what, way) == ("update", "chunks"):
                    say(case, {"peak GiB by the plan": planned / plan.GIB})


def measure_future_kl(say: Note, size: Size, work: Path) -> None:
    source, target = torch.randn(2, size.copied, device=DEVICE)
    rate = 2 * 4 * size.copied / seconds(lambda: target.copy_(source), 30)
    say("", {"GB/s of a copy": rate / 1e9})
    for B, T in size.deltas:
        with what_fits(say, case := f"{B} × {T}"):
            delta = 0.1 * torch.randn(B, T, device=DEVICE)
            run = functools.partial(fipo.future_kl, delta, torch.ones_like(delta, dtype=torch.bool))
            spent, few = seconds(run, 51), delta[:16].cpu()
            error = (run()[:16].cpu() - in_float64(few, 32.0)).abs() / in_float64(few.abs(), 32.0)
            share = 9 * B * T / spent / rate  # Δ and mask are read, F is written: the least there is to move
            say(case, {"ms": spent * 1e3, "share of the copy": share, "error": error.max().item()})


def random_model(folder: Path, size: Size) -> fipo.Config:
    """A folder with random weights of the 0.5B shape, and settings for a step with it on sums of digits."""
    settings = train_small.embedded_settings(folder, 0) | dict(model=str(folder / "model"))
    random_weights(qwen("0.5B", size)).save_pretrained(settings["model"])
    train_small.character_tokenizer().save_pretrained(settings["model"])
    train_small.make_embedded(settings, 0)  # the model is there, so this makes the problems
    return fipo.Config(**settings | dict(
        out=str(folder / "run"), eval_data="", sampler="hf", dtype="auto", steps=2, dynamic_sampling=False, lr=1e-6,
        prompts_per_batch=size.prompts, prompts_per_mini_batch=size.prompts // 4, max_response=size.response,
        overlong_buffer=0, gradient_checkpointing=True,
    ))  # fmt: skip


def measure_sampler(say: Note, size: Size, work: Path) -> None:
    cfg = random_model(work / "sampler", size)
    sampler = fipo.HFSampler(fipo.Policy(cfg.model, cfg))
    few, many = size.rows
    copy, trained = sampler.model, sampler.policy.model
    for rows, cudnn, model, how in (
        (few, False, copy, "without cuDNN's attention"),
        (many, False, copy, "without cuDNN's attention"),
        (few, True, copy, "with cuDNN's attention"),
        (few, False, trained, "under autocast"),
        (many, False, trained, "under autocast"),
    ):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        sampler.model = model
        lengths = [128 - 8 * (i % 8) for i in range(rows // 16)]
        problems = [random_rollout(100, length, prompt=length).problem for length in lengths]
        autocast = sampler.policy.autocast() if model is trained else contextlib.nullcontext()
        with what_fits(say, case := f"{rows} rows, 128 + {size.response} tokens, {how}"), autocast:
            sampler.generate(problems, list(range(len(problems))), 16, 4, 1.0, 1.0)  # warms up
            start = time.perf_counter()
            groups = sampler.generate(problems, list(range(len(problems))), 16, size.response, 1.0, 1.0)
            spent = time.perf_counter() - start  # it has brought the last token to the host
            tokens = sum(len(r.response_ids) for group in groups for r in group)
            say(case, {"tokens/s": tokens / spent, "seconds": spent})


def measure_step(say: Note, size: Size, work: Path) -> None:
    cfg, right, firsts = random_model(work / "step", size), itertools.cycle((True, False)), []
    check = fipo.check_first_update

    def seen(metrics: dict[str, float], tolerance: float) -> None:
        firsts.append(metrics | {"tolerance": tolerance})
        check(metrics, tolerance)

    with (
        mock.patch.dict(fipo.VERIFY, dapo=lambda *_: next(right)),  # random tokens never are; every other one shall be
        mock.patch.object(fipo, "check_first_update", seen),
        mock.patch.object(fipo.Run, "save", lambda run: None),  # 6 GB that tell nothing about a step
    ):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        fipo.train(cfg)  # a FipoError if the ratio is not 1, or if the sampler holds other weights
        lines = train_small.read_jsonl(Path(cfg.out) / "metrics.jsonl")[1:]
        for first, line in zip(firsts, lines, strict=True):  # the first step warms up
            spent = {f"{name} seconds": line[f"time/{name}"] for name in ("rollout", "score", "update")}
            say(f"step {line['step']}", spent | {
                "tokens/s": line["tokens_per_second"], "mismatch": line["sampler_mismatch"],
                "tolerance": first["tolerance"], "|Δ| at the first update": first["drift"],
                "ratio at the first update": math.exp(-first["ppo_kl"]),
                "f at the first update": first["influence_mean"]})  # fmt: skip
        say("", {"peak GiB": torch.cuda.max_memory_allocated() / plan.GIB if GPU else ""})


def embedded(out: Path, base: Path, steps: int) -> dict[str, Any]:
    """Settings of the embedded run with a base model that was pretrained on the device, outside the cache."""
    settings = train_small.embedded_settings(out, steps) | dict(model=str(base), sampler="hf")
    with DEVICE:
        train_small.make_embedded(settings, steps)
    return settings


def apart(run: Path, other: Path) -> dict[str, float]:
    """How far two runs are apart: in metrics.jsonl, but for times, and in the weights at the end."""
    lines = zip(*(train_small.read_jsonl(out / "metrics.jsonl") for out in (run, other)), strict=True)
    logged = max(abs(a[k] - b[k]) for a, b in lines for k in a if "time/" not in k and k != "tokens_per_second")
    mine, theirs = (load_file(fipo.newest_checkpoint(out) / "model.safetensors") for out in (run, other))
    weights = max((mine[name] - theirs[name]).abs().max().item() for name in mine)
    return {"largest difference in metrics": float(logged), "largest difference in weights": weights}


def measure_resume(say: Note, size: Size, work: Path) -> None:
    out, steps = work / "resume", min(120, size.pretraining)
    settings = embedded(out, work / f"base-{steps}", steps) | SHORT_RUN | dict(eval_data="", save_every=1)
    flags = [word for name, value in settings.items() if value != "" for word in (f"--{name}", str(value))]
    words = [sys.executable, ROOT / "fipo.py", "train", *flags, "--steps", "1000", "--out", out / "killed"]
    victim = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while victim.poll() is None and len(list((out / "killed").glob("checkpoints/step_*/state.json"))) < 2:
        time.sleep(0.01)
    victim.kill()
    ended = victim.wait()
    fipo.require(ended == -signal.SIGKILL, f"the run to be killed ended by itself, with status {ended}.")
    step = json.loads((fipo.newest_checkpoint(out / "killed") / "state.json").read_text())["step"]
    for name in ("killed", "uninterrupted", "again"):
        more = dict(steps=step + 2, resume=name == "killed", out=str(out / name))
        fipo.train(fipo.Config(**settings | more))
    say("killed and resumed", {"from step": step} | apart(out / "uninterrupted", out / "killed"))
    say("uninterrupted, twice", apart(out / "uninterrupted", out / "again"))


def measure_embedded(say: Note, size: Size, work: Path) -> None:
    start, out = time.perf_counter(), work / "embedded"
    settings = embedded(out, work / f"base-{size.pretraining}", size.pretraining) | dict(size.embedded)
    made = time.perf_counter()
    with contextlib.suppress(fipo.NoSignal):  # nothing left to learn
        fipo.train(fipo.Config(**settings, out=str(out / "run")))
    say("", {"base model seconds": made - start, "run seconds": time.perf_counter() - made})
    lines = [line for line in train_small.read_jsonl(out / "run" / "metrics.jsonl") if "eval/accuracy" in line]
    for line in (lines[0], lines[-1]):
        say(f"step {line['step']}", {"accuracy": line["eval/accuracy"], "mean length": line["eval/response_length"]})


# ---------------------------------------------------------------------------------------- a process for every part
# With the seconds after which a part is stopped. The longest is last: the others do not wait for it.
PARTS: dict[str, tuple[Callable[[Note, Size, Path], None], int]] = {
    **{f"model-{name}": (functools.partial(measure_model, name), 120) for name in SHAPES},
    "future_kl": (measure_future_kl, 60), "sampler": (measure_sampler, 120), "step": (measure_step, 120),
    "resume": (measure_resume, 120), "embedded": (measure_embedded, 240),
}  # fmt: skip
WHOLE, AMISS = "whole part seconds", ("failed", "stopped")


def measure(parts: list[str], size: Size, path: Path, work: Path) -> None:
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    for part in parts:
        start, device = time.perf_counter(), torch.cuda.get_device_name() if GPU else "CPU"
        say = functools.partial(note, path, part, device)
        try:
            with what_fits(say, ""):
                PARTS[part][0](say, size, work)
        except Exception as error:
            traceback.print_exc()
            say("", {f"failed: {' '.join(repr(error).split())[:200]}": ""})
        say("", {WHOLE: time.perf_counter() - start})


def in_own_process(words: list[str], limit: float) -> str:
    """Have parts measured. Returns what shall be said of those that were not."""
    child = subprocess.Popen([sys.executable, __file__, *words], stdin=subprocess.DEVNULL, process_group=0,
                             env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    try:
        return f"failed: its process ended with status {child.wait(limit)}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what it has started
        child.wait()


def supervise(parts: list[str], path: Path, tiny: bool, words: list[str], minutes: float) -> None:
    start, bad = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending the process that measures
    with tempfile.TemporaryDirectory() as work:
        for several in [parts] if tiny else [[part] for part in parts]:  # tiny ones take less time than their start
            left = minutes * 60 - (time.monotonic() - start)
            if left < 1:  # what was measured of it before stays
                bad += several
                fipo.say(f"  {', '.join(several)}  not begun: no time is left")
                continue
            forget(path, several)
            limit = min(left, sum(PARTS[part][1] for part in several))
            how = in_own_process([*several, *words, "--csv", str(path), "--work", work], limit)
            done = {row["part"] for row in read(path) if row["what"] == WHOLE}
            for part in several:
                if part not in done:
                    note(path, part, "", "", {how: ""})
            bad += {row["part"] for row in read(path) if row["part"] in several and row["what"].startswith(AMISS)}
    print(f"{len(parts)} parts, {time.monotonic() - start:.0f} s", flush=True)
    fipo.require(not bad, f"not measured to the end: {', '.join(part for part in parts if part in bad)}.")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="everything at small size, in one process")
    parser.add_argument("--csv", type=Path, help="where rows go (default: assets/results/gpu.csv; with --tiny nowhere)")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the model parts (default: 1024 8192 20480)")
    parser.add_argument("--minutes", type=float, default=7.5, help="after these the rest is left out (default: 7.5)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # the process of a part is given its folder
    given = parser.parse_args(argv)
    size = replace(TINY if given.tiny else Size(), **{"tokens": given.tokens} if given.tokens else {})
    with fipo.report_errors(), tempfile.TemporaryDirectory() as nowhere:
        unknown = ", ".join(part for part in given.parts if part not in PARTS)
        fipo.require(not unknown, f"there is no part {unknown}: choose from {', '.join(PARTS)}.")
        fipo.require(given.tiny or GPU, "there is no GPU here: --tiny tries everything without one.")
        if given.work:
            return measure(given.parts, size, given.csv, given.work)
        words = ["--tiny"] * given.tiny + (["--tokens", *map(str, given.tokens)] if given.tokens else [])
        results = Path(nowhere) if given.tiny else ROOT / "assets" / "results"
        parts = [part for part in PARTS if part in given.parts or not given.parts]
        supervise(parts, given.csv or results / "gpu.csv", given.tiny, words, given.minutes)


if __name__ == "__main__":
    main(sys.argv[1:])

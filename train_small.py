"""The run that anyone can start: `python train_small.py`, on any machine.

Without a GPU, it is the *embedded run*. A tiny Qwen2 that reads characters is pretrained, once, for
about two minutes, on a corpus that resembles the internet: most answers to a sum are short and
sloppy, some are worked out, and a few are also checked in reverse order. In this corpus, longer
answers are rarer and more often right. Then FIPO rewards right answers to new problems, and the
model learns to think longer. At the end, scripts/tokens.py studies which tokens the training has
changed (`--study_seeds 0` leaves this out).

With a GPU, it trains Qwen2.5-0.5B on GSM8K. `--model` chooses another model, with or without a GPU.
All settings of `fipo.py train` can be given. Everything a run writes is in --out.

  python train_small.py --algorithm dapo --compare runs/fipo-0
  python train_small.py --model Qwen/Qwen2.5-1.5B --steps 200
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

import fipo
from fipo import say

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---------------------------------------------------------------------------------------- Settings
EMBEDDED = {
    "steps": 32,
    "group_size": 16,
    "prompts_per_batch": 32,
    "prompts_per_mini_batch": 4,
    "max_prompt": 16,
    "max_response": 96,
    "overlong_buffer": 16,
    "lr": 1e-4,
    "warmup_steps": 1,
    "rollout_rows": 512,
    "tokens_per_micro_batch": 16384,
    "eval_every": 8,
    "eval_samples": 1,
    "eval_top_p": 1.0,
    "dtype": "float32",
}
QWEN = {
    "model": "Qwen/Qwen2.5-0.5B",
    "data": "openai/gsm8k:main",
    "eval_data": "openai/gsm8k:main:test",
    "steps": 100,
    "group_size": 8,
    "prompts_per_batch": 64,
    "prompts_per_mini_batch": 16,
    "max_prompt": 512,
    "max_response": 1024,
    "overlong_buffer": 256,
    "rollout_rows": 256,
    "tokens_per_micro_batch": 16384,
    "gradient_checkpointing": True,
    "eval_every": 20,
    "eval_samples": 1,
    "eval_top_p": 1.0,
}

# ---------------------------------------------------------------------------------------- The task
# A problem is a sum of five digits from 1 to 6.
OPERANDS = 5
LARGEST = 6
# The corpus: (style, share of the documents, probability of a slip in each addition, documents per
# pretraining batch). The loss weights the batch by the shares, so that the model sees the corpus
# while less time goes into its noise.
STYLES = [("short", 0.83, None, 32), ("worked", 0.14, 0.01, 26), ("checked", 0.03, 0.0, 6)]
CHARACTERS = "0123456789+=,?\n:Answer "
END = "<|endoftext|>"
HELD_OUT = slice(0, 512)
FOR_RL = slice(512, 3072)
FOR_CORPUS = slice(3072, None)


def all_problems() -> list[list[int]]:
    """Every sum, in the same order on every machine. HELD_OUT, FOR_RL, FOR_CORPUS are its parts."""
    sums = sorted(map(list, itertools.product(range(1, LARGEST + 1), repeat=OPERANDS)))
    return random.Random(0).sample(sums, len(sums))


def question(digits: list[int]) -> str:
    return "+".join(map(str, digits)) + "=?\n"


def worked_sum(digits: list[int], slip: float, rng: random.Random) -> tuple[str, int]:
    """Add from left to right, each time off by one with probability `slip`. Returns text, total."""
    total = digits[0]
    additions = []
    for digit in digits[1:]:
        result = total + digit
        if rng.random() < slip:
            result += rng.choice([-1, 1])
        additions.append(f"{total}+{digit}={result}")
        total = result
    return ",".join(additions) + "\n", total


def answer(digits: list[int], style: str, slip: float | None, rng: random.Random) -> str:
    """The answer of a document.

    A short one is a guess, off by 1 to 3 in four of five cases. A checked one adds the digits a
    second time, in reverse order, and states the second result.
    """
    if style == "short":
        miss = rng.choice([-3, -2, -1, 1, 2, 3]) if rng.random() < 0.8 else 0
        return f"Answer: {max(OPERANDS, sum(digits) + miss)}"
    text, total = worked_sum(digits, slip, rng)
    if style == "checked":
        check, total = worked_sum(digits[::-1], slip, rng)
        text += check
    return f"{text}Answer: {total}"


# ---------------------------------------------------------------------------------- The base model
def character_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokenizer without merges reads characters. It writes space as Ġ, line break as Ċ."""
    characters = CHARACTERS.replace(" ", "Ġ").replace("\n", "Ċ")
    tokens = [END, *dict.fromkeys(characters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=END, pad_token=END, unk_token=END)


def documents(
    style: str,
    slip: float | None,
    n: int,
    problems: list[list[int]],
    tokenizer: Any,
    rng: random.Random,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n documents of one style: ids and labels [n, L], −100 for prompt and padding."""
    drawn = rng.choices(problems, k=n)
    prompts = tokenizer([question(digits) for digits in drawn])["input_ids"]
    texts = [answer(digits, style, slip, rng) + END for digits in drawn]
    answers = tokenizer(texts)["input_ids"]
    ids = [torch.tensor(p + a) for p, a in zip(prompts, answers)]
    labels = [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers)]
    return (
        pad_sequence(ids, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
    )


def pretrain(folder: Path, steps: int, lr: float = 5e-3) -> None:
    """Make the base model: a Hugging Face folder with a Qwen2 that answers as the corpus does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = character_tokenizer()
    problems = all_problems()[FOR_CORPUS]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step in (bar := trange(steps, desc="pretraining", leave=False, disable=None)):
        warmup = min(1, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = lr * warmup * max(0.02, 1 - step / steps)
        # 1) Documents of every style, with the weight of one document in the corpus.
        batch = []
        for style, share, slip, n in STYLES:
            ids, labels = documents(style, slip, n, problems, tokenizer, rng)
            batch.append((share / n, ids, labels))
        weighted_tokens = sum(weight * (labels >= 0).sum() for weight, _, labels in batch)
        # 2) One update on the weighted mean over tokens.
        total_loss = 0.0
        for weight, ids, labels in batch:
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            targets = labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            (loss * weight / weighted_tokens).backward()
            total_loss += (loss * weight / weighted_tokens).item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total_loss:.3f}", refresh=False)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():  # another run has made it in the meantime
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def embedded_settings(out: Path, pretrain_steps: int) -> dict[str, Any]:
    """Settings of the embedded run, with its base model in the cache and its problems in `out`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fipo"
    recipe = fipo.derive_seed(OPERANDS, LARGEST, STYLES, CHARACTERS, pretrain_steps)
    return EMBEDDED | {
        "model": str(cache / f"base-{recipe:08x}"),
        "data": str(out / "problems" / "data.jsonl"),
        "eval_data": str(out / "problems" / "eval_data.jsonl"),
    }


def make_embedded(settings: dict[str, Any], pretrain_steps: int) -> None:
    """Make the base model, unless it is in the cache, and the problem files."""
    base = Path(settings["model"])
    if base.is_dir():
        say(f"base model: {base} (cached)")
    else:
        say(f"base model: {base} (pretraining for {pretrain_steps} steps, once)")
        pretrain(base, pretrain_steps)
    for name, part in (("data", FOR_RL), ("eval_data", HELD_OUT)):
        path = Path(settings[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            for digits in all_problems()[part]:
                row = {"prompt": question(digits), "answer": str(sum(digits))}
                file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------------------- The results
def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(out: Path, compare: str) -> None:
    """Compare before and after on held-out problems: a table, three responses and pictures.

    `compare` is the folder of another run, whose curves are drawn as well, or empty.
    """
    lines = read_jsonl(out / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/accuracy" in line]
    fipo.require(
        evaluated, f"the run in {out} is done, but without --eval_data there is nothing to report."
    )
    before = evaluated[0]
    after = evaluated[-1]
    # 1) The table.
    last = f"step {after['step']}"
    say(f"\n{'held-out problems':24}{'before':>10}{last:>10}")
    accuracies = [f"{line['eval/accuracy']:10.1%}" for line in (before, after)]
    lengths = [f"{line['eval/response_length']:10.1f}" for line in (before, after)]
    say(f"{'accuracy':24}{''.join(accuracies)}")
    say(f"{'mean length, tokens':24}{''.join(lengths)}")
    # 2) Responses to the same problems, before and after.
    samples = [row for row in read_jsonl(out / "samples.jsonl") if row["kind"] == "eval"]
    first_samples = [row for row in samples if row["step"] == before["step"]]
    last_samples = {str(row["prompt"]): row for row in samples if row["step"] == after["step"]}
    for old in first_samples:
        prompt = old["prompt"] if isinstance(old["prompt"], str) else old["prompt"][-1]["content"]
        say(f"\n{prompt.strip()}   (right: {old['answer']})")
        for when, sample in (("before", old), ("after", last_samples[str(old["prompt"])])):
            verdict = "right" if sample["correct"] else "wrong"
            text = sample["response"].strip().replace("\n", "\n" + " " * 16)
            say(f"  {when:7}{verdict:7}{text}")
    # 3) The pictures.
    say(f"\ncurves: {out / 'curves.png'}")
    plot_curves([out, Path(compare)] if compare else [out], out / "curves.png")
    if any(line.get("influence_mean", 1) != 1 for line in lines):  # f is 1 in DAPO and GRPO
        say(f"influence weight f: {out / 'influence.png'}")
        plot_influence(lines, out / "influence.png")
    say(f"numbers: {out / 'metrics.jsonl'}")
    say(f"model: {out / 'checkpoints'}")


def draw(axis: Any, lines: list[dict[str, Any]], name: str, **style: Any) -> list[float]:
    """Draw a metric over the steps that logged it, and return its values. Shares are per cent."""
    rows = [line for line in lines if name in line]
    factor = 100 if name.endswith("accuracy") else 1
    values = [factor * row[name] for row in rows]
    axis.plot([row["step"] for row in rows], values, **style)
    axis.set_xlabel("step")
    axis.locator_params("x", integer=True)
    axis.grid(alpha=0.3)
    return values


# The same colors as in the other pictures of this project.
COLORS = {"fipo": "#D55E00", "dapo": "#0072B2", "grpo": "#777777"}


def plot_curves(runs: list[Path], path: Path) -> None:
    """Plot accuracy and response length of one run (solid) or two (the second dashed)."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), constrained_layout=True)
    accuracy, length = axes
    for run, linestyle in zip(runs, ("-", "--")):
        config = json.loads((run / "config.json").read_text())
        color = COLORS[config["algorithm"]]
        name = f"{config['algorithm'].upper()}, seed {config['seed']}"
        lines = read_jsonl(run / "metrics.jsonl")
        rollouts: dict[str, Any] = {"color": color, "linestyle": linestyle}
        held_out = rollouts | {"label": f"{name}, held out", "marker": "o"}
        rollouts |= {"label": f"{name}, rollouts", "linewidth": 1, "alpha": 0.4}
        draw(accuracy, lines, "accuracy", **rollouts)
        draw(accuracy, lines, "eval/accuracy", **held_out)
        draw(length, lines, "response_length/mean", **rollouts)
        draw(length, lines, "eval/response_length", **held_out)
    accuracy.set(title="Accuracy, %", ylim=(0, 102))
    length.set(title="Response length, tokens", ylim=(0, None))
    accuracy.legend(fontsize="small")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def plot_influence(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot the mean influence weight of each step. The title says how far it is from 1."""
    figure, axis = plt.subplots(figsize=(8, 3), constrained_layout=True)
    means = draw(axis, lines, "influence_mean", color="C2", label="all updates of a step")
    means += draw(
        axis, lines, "influence_last", color="C2", linestyle="--", label="last update of a step"
    )
    distances = [100 * abs(mean - 1) for mean in means]
    title = f"Mean f differs from 1 by {min(distances):.1f} to {max(distances):.1f} %"
    axis.set(title=title, ylabel="mean f of all tokens")
    axis.legend()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def study_tokens(cfg: fipo.Config, seeds: int, is_embedded: bool) -> None:
    """Study which tokens this run has changed, in float32: rounding would look like a change."""
    sys.path.insert(0, str(Path(__file__).parent / "scripts"))
    from tokens import TokensConfig, run_tokens

    say("\nWhich tokens did RL change?")
    study = TokensConfig(
        base=cfg.model,
        trained=str(fipo.newest_checkpoint(Path(cfg.out))),
        data=cfg.eval_data or cfg.data,
        out=str(Path(cfg.out) / "tokens"),
        seeds=seeds,
        seed=cfg.seed,
        max_prompt=cfg.max_prompt,
        max_response=cfg.max_response,
        verifier=cfg.verifier,
        rollout_rows=cfg.rollout_rows,
        tokens_per_micro_batch=cfg.tokens_per_micro_batch,
    )
    if not is_embedded:  # token replacement needs both models in memory
        study.problems = 32
        study.replacement = False
    run_tokens(study)


# -------------------------------------------------------------------------------- The command line
HELP = f"""usage: python train_small.py [--help] [--SETTING VALUE …]

Without a GPU: a tiny Qwen2 learns to think longer, on sums of digits, within minutes.
With a GPU: Qwen2.5-0.5B on GSM8K. The settings to know first:

  --algorithm  fipo (default), dapo or grpo
  --model      another model: a folder or a hub name; trained on GSM8K or --data
  --data       problems: a .jsonl, .json or .parquet file, or a hub name
  --steps      rollout batches to train on (embedded: {EMBEDDED["steps"]}, else {QWEN["steps"]})
  --seed       of sampling and mini-batches (default: 0)
  --out        folder of the run (default: runs/ALGORITHM-SEED); --resume continues it

All settings of `python fipo.py train --help` are accepted, and three more:
  --compare         folder of another run, drawn dashed in curves.png; a finished run
                    redraws its pictures when started with --resume --out FOLDER
  --pretrain_steps  of making the embedded base model (default: 1000)
  --study_seeds     of the token study at the end (default: 3; 0: none)
"""


def parser() -> fipo.Parser:
    usage = HELP.splitlines()[0].removeprefix("usage: ")
    parser = fipo.Parser(fipo.Config, usage=usage, allow_abbrev=False)
    parser.format_help = lambda: HELP  # argparse's own would fill three screens
    parser.add_argument("--compare", default="")
    parser.add_argument("--pretrain_steps", type=int, default=1000)
    parser.add_argument("--study_seeds", type=int, default=3)
    return parser


def configure(argv: list[str], defaults: dict[str, Any]) -> fipo.Config:
    """The settings of the command line, over `defaults`, over those of fipo.py."""
    with_defaults = parser()
    is_grpo = with_defaults.parse_args(argv).algorithm == "grpo"
    if is_grpo:  # it has no length penalty, as its preset says
        defaults = {name: value for name, value in defaults.items() if name != "overlong_buffer"}
    with_defaults.set_defaults(**defaults)
    settings = vars(with_defaults.parse_args(argv))
    del settings["compare"]
    del settings["pretrain_steps"]
    del settings["study_seeds"]
    return fipo.Config(**settings)


def hub_has(model: str) -> bool:
    say(f"looking for {model} on the hub")
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return False
    return True


def run(argv: list[str]) -> None:
    # 1) Choose the model and its settings.
    given = parser().parse_args(argv)
    out = Path(given.out or f"runs/{given.algorithm}-{given.seed}")
    has_gpu = torch.cuda.is_available()
    is_embedded = not (given.model or (has_gpu and hub_has(QWEN["model"])))
    if is_embedded:
        reason = "the hub cannot be reached" if has_gpu else "no GPU here"
        say(f"embedded run: a tiny Qwen2 on sums of digits ({reason})")
        defaults = embedded_settings(out, given.pretrain_steps)
    else:
        model = given.model or QWEN["model"]
        device = "a GPU" if has_gpu else "the CPU, which will be slow"
        say(f"{model} on {given.data or 'GSM8K'}, on {device}")
        has_vllm = has_gpu and importlib.util.find_spec("vllm")
        defaults = QWEN | {"model": model, "sampler": "vllm" if has_vllm else "hf"}
    cfg = configure(argv, defaults | {"out": str(out)})

    # 2) Report mistakes before anything is made.
    fipo.resolve(cfg)
    fipo.check_launcher(cfg.deepspeed)
    fipo.require(
        not given.compare or (Path(given.compare) / "metrics.jsonl").exists(),
        f"--compare {given.compare} is not the folder of a run: it has no metrics.jsonl.",
    )
    if is_embedded:
        make_embedded(defaults, given.pretrain_steps)

    # 3) Train. When almost every answer is right, a lack of signal is a success.
    try:
        fipo.train(cfg)
    except fipo.NoSignal as end:
        trained = [line for line in read_jsonl(out / "metrics.jsonl") if "accuracy" in line]
        if not trained or trained[-1]["accuracy"] < 0.9:
            raise
        say(f"nothing is left to learn: {end}")

    # 4) Show the results.
    report(out, given.compare)
    if given.study_seeds and os.environ.get("WORLD_SIZE", "1") == "1":
        study_tokens(cfg, given.study_seeds, is_embedded)


def main(argv: list[str]) -> None:
    with fipo.report_errors():
        run(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

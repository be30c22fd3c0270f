"""The run anyone can make: `python train_small.py`, with no argument, on any machine.

Without a GPU, or without a model to be had, it is the *embedded* run. A tiny Qwen2 that reads characters is first
pretrained, once, for about two minutes, on a corpus like the internet's: most answers to a sum are short and sloppy,
some are worked out, and a few are then checked in reverse order. In it, longer is rarer and more often right. Then FIPO
rewards right answers on problems that were not in the corpus, and the model comes to think longer. At the end it is
asked which tokens that has changed (scripts/tokens.py; `--study_seeds 0` leaves it out).

With a GPU it trains Qwen2.5-0.5B on GSM8K; `--model` chooses another model. Every setting of `fipo.py train` can be
given here too. All of a run lies under --out.

  python train_small.py --algorithm dapo --seed 1 --out runs/dapo-1
  python train_small.py --model Qwen/Qwen2.5-1.5B --steps 200
"""

from __future__ import annotations

import dataclasses
import functools
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
from tqdm import trange
from transformers import AutoConfig, HfArgumentParser, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

import fipo
from fipo import say

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ------------------------------------------------------------------------------------------------------- Settings
EMBEDDED = dict(
    steps=32, group_size=16, prompts_per_batch=32, prompts_per_mini_batch=4, max_prompt=16, max_response=96,
    overlong_buffer=16, lr=1e-4, warmup_steps=1, rollout_rows=512, tokens_per_micro_batch=16384, eval_every=8,
    eval_samples=1, eval_top_p=1.0, dtype="float32",
)  # fmt: skip
QWEN = dict(
    model="Qwen/Qwen2.5-0.5B", data="openai/gsm8k:main", eval_data="openai/gsm8k:main:test", steps=100, group_size=8,
    prompts_per_batch=64, prompts_per_mini_batch=16, max_prompt=512, max_response=1024, overlong_buffer=256,
    rollout_rows=256, tokens_per_micro_batch=16384, gradient_checkpointing=True, eval_every=20, eval_samples=1,
    eval_top_p=1.0,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------- The task
OPERANDS, LARGEST = 5, 6  # a problem is a sum of five digits from 1 to 6
# What the corpus holds: style, share of documents, chance of a slip in each addition; and how many documents of the
# style a pretraining batch takes. They are weighed to the shares: the same corpus, with less time spent on its noise.
STYLES = [("short", 0.83, None, 32), ("worked", 0.14, 0.01, 26), ("checked", 0.03, 0.0, 6)]
CHARACTERS = "0123456789+=,?\n:Answer "
END = "<|endoftext|>"


def all_problems() -> list[list[int]]:
    """Every sum there is, in an order that is the same on every machine: held out, for RL, for the corpus."""
    sums = itertools.product(range(1, LARGEST + 1), repeat=OPERANDS)
    return random.Random(0).sample(sorted(map(list, sums)), LARGEST**OPERANDS)


HELD_OUT, FOR_RL, FOR_CORPUS = slice(0, 512), slice(512, 3072), slice(3072, None)


def question(digits: list[int]) -> str:
    return "+".join(map(str, digits)) + "=?\n"


def steps_of(digits: list[int], slip: float, rng: random.Random) -> tuple[str, int]:
    """Additions from left to right, each off by one with chance `slip`; and where they arrive."""
    total, steps = digits[0], []
    for digit in digits[1:]:
        result = total + digit + (rng.choice([-1, 1]) if rng.random() < slip else 0)
        steps.append(f"{total}+{digit}={result}")
        total = result
    return ",".join(steps) + "\n", total


def answer(digits: list[int], style: str, slip: float | None, rng: random.Random) -> str:
    """A document's answer. Short: a guess, off by 1 to 3 in four of five. Checked: what the second pass arrives at."""
    if style == "short":
        miss = rng.choice([-3, -2, -1, 1, 2, 3]) if rng.random() < 0.8 else 0
        return f"Answer: {max(OPERANDS, sum(digits) + miss)}"
    work, total = steps_of(digits, slip, rng)
    if style == "checked":
        check, total = steps_of(digits[::-1], slip, rng)
        work += check
    return f"{work}Answer: {total}"


# ------------------------------------------------------------------------------------------------- The base model


def character_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own tokenizer without merges: it reads characters (and writes the space as Ġ, the line break as Ċ)."""
    characters = CHARACTERS.replace(" ", "Ġ").replace("\n", "Ċ")
    vocabulary = {c: i for i, c in enumerate([END, *dict.fromkeys(characters)])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=END, pad_token=END, unk_token=END)


def documents(style: str, slip: float | None, n: int, problems: list[list[int]], tokenizer: Any,
              rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`n` documents of one style: ids [n, L], and the same with −100 for what is not to be learnt (prompt, padding)."""
    drawn = rng.choices(problems, k=n)
    prompts = tokenizer([question(digits) for digits in drawn])["input_ids"]
    answers = tokenizer([answer(digits, style, slip, rng) + END for digits in drawn])["input_ids"]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([torch.tensor(p + a) for p, a in zip(prompts, answers)])
    return ids, pad([torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers)], padding_value=-100)


def pretrain(folder: Path, steps: int, lr: float = 5e-3) -> None:
    """Make the base model, an ordinary Hugging Face folder: a Qwen2 trained to continue a prompt as the corpus does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rng, tokenizer, problems = random.Random(0), character_tokenizer(), all_problems()[FOR_CORPUS]
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
                    bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in (bar := trange(steps, desc="pretraining", leave=False, disable=None)):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * max(0.02, 1 - step / steps)
        parts = [(share / n, *documents(style, slip, n, problems, tokenizer, rng)) for style, share, slip, n in STYLES]
        tokens = sum(weight * (labels >= 0).sum() for weight, _, labels in parts)
        total = 0.0
        for weight, ids, labels in parts:
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
            (loss * weight / tokens).backward()
            total += (loss * weight / tokens).item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():  # another run made it meanwhile
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def embedded_settings(out: Path, pretrain_steps: int) -> dict[str, Any]:
    """Settings of the embedded run. Its base model has its place in the cache, its problems theirs under `out`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fipo"
    recipe = fipo.derive_seed(OPERANDS, LARGEST, STYLES, CHARACTERS, pretrain_steps)
    files = {name: str(out / "problems" / f"{name}.jsonl") for name in ("data", "eval_data")}
    return EMBEDDED | files | {"model": str(cache / f"base-{recipe:08x}")}


def make_embedded(settings: dict[str, Any], pretrain_steps: int) -> None:
    """Make the base model, if the cache does not hold it, and the problem files."""
    base = Path(settings["model"])
    say(f"base model: {base} " + ("(cached)" if base.is_dir() else f"(pretraining for {pretrain_steps} steps, once)"))
    if not base.is_dir():
        pretrain(base, pretrain_steps)
    for name, part in (("data", FOR_RL), ("eval_data", HELD_OUT)):
        path = Path(settings[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": question(digits), "answer": str(sum(digits))} for digits in all_problems()[part]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------- What came out


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(out: Path) -> None:
    """Before and after on problems never trained on: a table, three responses, curves.png."""
    lines = read_jsonl(out / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/accuracy" in line]
    fipo.require(evaluated, f"the run in {out} is done, but without --eval_data there is nothing to report.")
    before, after = evaluated[0], evaluated[-1]
    say(f"\n{'held-out problems':24}{'before':>10}{'step ' + str(after['step']):>10}")
    for name, key, form in (("accuracy", "accuracy", "10.1%"), ("mean length, tokens", "response_length", "10.1f")):
        say(f"{name:24}{before['eval/' + key]:{form}}{after['eval/' + key]:{form}}")
    samples = [s for s in read_jsonl(out / "samples.jsonl") if s["kind"] == "eval"]
    for old in [s for s in samples if s["step"] == before["step"]]:
        new = next(s for s in samples if s["step"] == after["step"] and s["prompt"] == old["prompt"])
        prompt = old["prompt"] if isinstance(old["prompt"], str) else old["prompt"][-1]["content"]
        say(f"\n{prompt.strip()}   (right: {old['answer']})")
        for when, sample in (("before", old), ("after", new)):
            verdict = "right" if sample["correct"] else "wrong"
            say(f"  {when:7}{verdict:7}" + sample["response"].strip().replace("\n", "\n" + " " * 16))
    plot_curves(lines, out / "curves.png")
    say(f"\npicture: {out / 'curves.png'}   numbers: {out / 'metrics.jsonl'}   model: {out / 'checkpoints'}")


def plot_curves(lines: list[dict[str, Any]], path: Path) -> None:
    trained = [line for line in lines if "accuracy" in line]
    evaluated = [line for line in lines if "eval/accuracy" in line]
    figure, ((accuracy, length), (influence, entropy)) = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True)

    def draw(axes: Any, rows: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, **style)

    draw(accuracy, trained, "accuracy", "rollouts", color="C0")
    draw(accuracy, evaluated, "eval/accuracy", "held out", color="C1", marker="o")
    accuracy.set(title="Accuracy", ylim=(0, 1.02))
    draw(length, trained, "response_length/mean", "rollouts", color="C0")
    draw(length, evaluated, "eval/response_length", "held out", color="C1", marker="o")
    length.set(title="Response length, tokens", ylim=(0, None))
    draw(influence, trained, "influence/mean", "mean f, all updates", color="C2")
    draw(influence, trained, "influence/last", "mean f, last update", color="C2", linestyle="--")
    influence.set(title="Influence weight f, and share of tokens at its bounds")
    share = influence.twinx()
    draw(share, trained, "influence/frac_low", "share at the lower bound", color="C7", linestyle=":")
    draw(share, trained, "influence/frac_high", "share at the upper bound", color="C3", linestyle=":")
    share.set(ylim=(0, 1), ylabel="share")
    draw(entropy, trained, "entropy", "rollouts", color="C4")
    entropy.set(title="Entropy of the policy, nats a token", ylim=(0, None))
    for axes in (accuracy, length, entropy, influence):
        axes.set_xlabel("step")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend(handles=axes.lines)
    both = [*influence.lines, *share.lines]
    influence.legend(handles=both, fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def study_tokens(cfg: fipo.Config, seeds: int, embedded: bool) -> None:
    """The closing act: which tokens did this run change? Token replacement only if both models are tiny."""
    sys.path.insert(0, str(Path(__file__).parent / "scripts"))
    from tokens import TokensConfig, run_tokens

    say("\nwhich tokens did RL change?")
    names = {f.name for f in dataclasses.fields(fipo.SharedConfig)} | {"tokens_per_micro_batch"}
    shared = {n: getattr(cfg, n) for n in names - {"dtype", "problems"}}  # float32: rounding would look like a change
    out, trained = Path(cfg.out) / "tokens", fipo.newest_checkpoint(Path(cfg.out))
    less = {} if embedded else dict(problems=32, replacement=False)
    how = shared | dict(base=cfg.model, trained=str(trained), data=cfg.eval_data or cfg.data, out=str(out), seeds=seeds)
    run_tokens(TokensConfig(**how | less))


def hub_has(model: str) -> bool:
    say(f"seeking {model} on the hub")
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return False
    return True


HELP = f"""usage: python train_small.py [--help] [--SETTING VALUE …]

Without a GPU: a tiny Qwen2 learns to think longer, on sums of digits, within minutes.
With one: Qwen2.5-0.5B on GSM8K. The settings a person wants first:

  --algorithm  fipo (default), dapo or grpo
  --model      another model: a folder or a hub name; trained on GSM8K or --data
  --data       problems: a .jsonl, .json or .parquet file, or a hub name
  --steps      batches of rollouts to train on (embedded: {EMBEDDED["steps"]}, else {QWEN["steps"]})
  --seed       of sampling and mini-batches (default: 0)
  --out        folder of the run (default: runs/ALGORITHM-SEED); --resume goes on with it

All settings of `python fipo.py train --help` can be given too, and two more:
  --pretrain_steps  of making the embedded base model (default: 1000)
  --study_seeds     of the token study at the end (default: 3; 0: none)
"""


def parser() -> HfArgumentParser:
    usage = HELP.splitlines()[0].removeprefix("usage: ")
    parser = HfArgumentParser(fipo.Config, usage=usage, allow_abbrev=False)
    parser.format_help = lambda: HELP  # argparse's would fill three screens
    parser.add_argument("--pretrain_steps", type=int, default=1000)
    parser.add_argument("--study_seeds", type=int, default=3)
    return parser


def configure(argv: list[str], defaults: dict[str, Any]) -> fipo.Config:
    """The settings given, over `defaults`, over those of fipo.py."""
    with_defaults = parser()
    if with_defaults.parse_args(argv).algorithm == "grpo":  # it has no length penalty: let its preset say so
        defaults = {name: value for name, value in defaults.items() if name != "overlong_buffer"}
    with_defaults.set_defaults(**defaults)
    given = vars(with_defaults.parse_args(argv))
    del given["pretrain_steps"], given["study_seeds"]
    return fipo.Config(**given)


def run(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    out = Path(given.out or f"runs/{given.algorithm}-{given.seed}")
    gpu = torch.cuda.is_available()
    embedded = not (given.model or (gpu and hub_has(QWEN["model"])))
    if embedded:
        say(f"embedded run: a tiny Qwen2 on sums of digits ({'the hub cannot be reached' if gpu else 'no GPU here'})")
        defaults = embedded_settings(out, given.pretrain_steps)
    else:
        defaults = QWEN | ({"model": given.model} if given.model else {})
        say(f"{defaults['model']} on {given.data or 'GSM8K'}, on {'a GPU' if gpu else 'the CPU, which will be slow'}")
    cfg = configure(argv, defaults | {"out": str(out)})
    fipo.resolve(cfg)  # mistakes are reported before anything is made
    fipo.check_launcher(cfg.deepspeed)
    if embedded:
        make_embedded(defaults, given.pretrain_steps)
    try:
        fipo.train(cfg)
    except fipo.NoSignal as end:
        trained = [line for line in read_jsonl(out / "metrics.jsonl") if "accuracy" in line]
        if not trained or trained[-1]["accuracy"] < 0.9:
            raise
        say(f"nothing left to learn: {end}")
    report(out)
    if given.study_seeds and os.environ.get("WORLD_SIZE", "1") == "1":
        study_tokens(cfg, given.study_seeds, embedded)


def main(argv: list[str]) -> None:
    with fipo.one_clear_sentence():
        run(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

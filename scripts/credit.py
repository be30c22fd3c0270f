"""Does FIPO's weight f find the tokens that matter? A study of credit on the embedded task.

The embedded task (train_small.py) is small enough to estimate the value V of every prefix of a
response: the share of its sampled continuations that are correct. The change ΔV at a token says how
much the token decided, and f is compared with it.

python scripts/credit.py truth       # 1  values of all prefixes of 128 responses, at four steps
python scripts/credit.py gradients   # 3  the angle between FIPO's and DAPO's gradients
python scripts/credit.py matters     # 4  training with f, and with an oracle that estimates values
python scripts/credit.py half        # 4  training on half of the tokens, chosen by F
python scripts/credit.py report      # 2, 5  tables and pictures of all parts
python scripts/credit.py pictures    # 5  assets/credit*.png, drawn from assets/results

Each part saves its results in runs/credit and skips what is done. It runs two processes at a time,
with one thread each. `report` writes there, too. The results in assets were made with the version
of commit 4efe0ea and also hold results of parts that this script no longer has.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":
    # Set before torch is imported, and inherited by all processes.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import bench_compare
import fipo
import train_small
from fipo import Config, Groups, HFSampler, Policy, Rollout

RUNS = Path(__file__).parents[1] / "runs" / "credit"
PRETRAIN_STEPS = 1000  # of the base model
SEEDS = range(5)  # of `truth` and `gradients`
STEPS = (1, 4, 10, 20)
CONTINUATIONS = 128  # of each prefix
BEST_LR = float(bench_compare.BEST_LR)  # DAPO's
RANGES = {
    "[1, 1.2]": (1.0, 1.2),
    "[0.8, 1.2]": (0.8, 1.2),
    "[0.5, 2]": (0.5, 2.0),
    "unclipped": (0.0, math.inf),
}
Numbers = dict[str, float]


def settings(**changes: Any) -> Config:
    """The embedded run's settings with `changes`. Makes its model and problems if needed."""
    defaults = train_small.embedded_settings(RUNS / "task", PRETRAIN_STEPS)
    if not Path(defaults["eval_data"]).exists():
        train_small.make_embedded(defaults, PRETRAIN_STEPS)
    defaults["out"] = str(RUNS)
    return fipo.resolve(train_small.configure([], defaults | changes))


def truth_file(seed: int, step: int) -> Path:
    return RUNS / "truth" / f"{seed}-{step}.pt"


def gradient_file(seed: int) -> Path:
    return RUNS / "gradients" / f"{seed}.json"


def updates(cfg: Config) -> Iterator[tuple[int, int, Policy, Groups]]:
    """Train as fipo.train does, without evaluation or warm-up, and pause before every update.

    Yields the step, the index of the update, the policy, and all mini-batches of the step.
    """
    policy = Policy(cfg.model, cfg)
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    sampler = HFSampler(policy)
    cursor = 0
    for step in range(1, cfg.steps + 1):
        groups, _, cursor = fipo.collect_rollouts(sampler, problems, cfg, step, cursor)
        fipo.assign_rewards(groups, cfg)
        fipo.assign_advantages(groups)
        mini_batches = fipo.split_mini_batches(groups, cfg, step)
        fipo.score_old_logp(policy, mini_batches)
        for i, mini_batch in enumerate(mini_batches):
            yield step, i, policy, mini_batches
            fipo.add_gradients(policy, mini_batch, cfg)
            policy.step(cfg.lr)


# ---------------------------------------------------------------------------------- 1. The truth
def values(
    policy: Policy,
    rollouts: list[Rollout],
    n: int,
    cfg: Config,
    purpose: Any,
    sure: float = math.inf,
) -> list[Tensor]:
    """The value V of every prefix of every response, [T + 1] each.

    V[t] is the share of n continuations after t response tokens that are correct. V[0] is the
    prompt's value and V[T] the outcome. V.diff(), [T], is the change ΔV at every token. A prefix
    that responses share is estimated once. `purpose` seeds the sampling.

    A token sampled with probability `sure` or more keeps the value of the prefix before it, which
    saves time. V is a mean over what the token could have been, so |ΔV| ≤ 1 − π(token). What this
    leaves out goes to the next token that is not sure.
    """
    # 1) collect the prefixes whose values are estimated
    problems = {}  # prefix, with the prompt -> problem
    rows = []  # for every response, the prefix that gives the value after t tokens
    for r in rollouts:
        row = []
        for t in range(len(r.response_ids)):
            if t == 0 or math.exp(r.sampler_logp[t - 1]) < sure:
                prefix = (*r.problem.prompt_ids, *r.response_ids[:t])
                problems[prefix] = r.problem
            row.append(prefix)
        rows.append(row)

    # 2) estimate them, those of similar length together
    sampler = HFSampler(policy)
    prefixes = sorted(problems, key=lambda prefix: (len(prefix), prefix))
    size = max(1, cfg.rollout_rows // n)
    estimates = {}
    for start in fipo.progress(range(0, len(prefixes), size), desc="values"):
        chunk = {prefix: problems[prefix] for prefix in prefixes[start : start + size]}
        estimates |= shares_correct(sampler, chunk, n, cfg, purpose)

    # 3) put them together
    result = []
    for r, row in zip(rollouts, rows):
        V = [estimates[prefix] for prefix in row]
        result.append(torch.tensor([*V, float(r.correct)]))
    return result


def shares_correct(
    sampler: HFSampler,
    problems: dict[tuple[int, ...], fipo.Problem],
    n: int,
    cfg: Config,
    purpose: Any,
) -> Numbers:
    """Continue every prefix n times. Returns the share of correct continuations of each."""
    prompts = []
    seeds = []
    room = 0
    for prefix, problem in problems.items():
        length = len(problem.prompt_ids)
        prompts.append(replace(problem, prompt_ids=list(prefix)))
        seeds.append(fipo.derive_seed(purpose, prefix[:length], prefix[length:]))
        room = max(room, length + cfg.max_response - len(prefix))
    groups = sampler.generate(prompts, seeds, n, room, cfg.temperature, 1.0)
    shares = {}
    for (prefix, problem), group in zip(problems.items(), groups):
        for r in group:
            response = [*prefix, *r.response_ids][len(problem.prompt_ids) :]
            # The shortest prefix gives the others more room than they may use.
            r.response_ids = response[: cfg.max_response]
        fipo.grade(group, sampler.policy, cfg.verifier)
        shares[prefix] = sum(r.correct for r in group) / n
    return shares


def record_truth(seed: int) -> None:
    """Save the values of the last two mini-batches of the steps in STEPS, and what the loss saw."""
    if truth_file(seed, STEPS[-1]).exists():
        return
    recorded = {}
    cfg = settings(seed=seed, steps=STEPS[-1], rollout_rows=256)
    for step, i, policy, mini_batches in updates(cfg):
        if step in STEPS and i == 0:
            rollouts = mini_batches[-2] + mini_batches[-1]
            V = values(policy, rollouts, CONTINUATIONS, cfg, (seed, "value"))
            rows = {"V": V, "entropy": entropies(policy, rollouts)}
            recorded[step] = rollouts, rows

    # All updates are done, so r.logp is log π_θ as it was just before the update on r.
    os.makedirs(RUNS / "truth", exist_ok=True)
    for step, (rollouts, rows) in recorded.items():
        for name in ("advantage", "old_logp", "logp"):
            rows[name] = [getattr(r, name) for r in rollouts]
        torch.save(rows, truth_file(seed, step))


@torch.no_grad()
def entropies(policy: Policy, rollouts: list[Rollout]) -> list[Tensor]:
    """The entropy of π at the response tokens, [T] each."""
    input_ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    _, entropy = fipo.token_logprobs(policy.model, input_ids, mask)
    return [row[is_response] for row, is_response in zip(entropy, mask)]


# ------------------------------------------------------------- 2. Which scores find the key tokens
KEY = 3.29  # standard errors of ΔV; by chance, one token in a thousand is that far off
LEAD = 16  # tokens before a key token that are looked at
FINDERS = {
    "|Δ|": "|Δ|",
    "|F|": "|F|",
    "|F − Δ|": "|F| without Δ itself",
    "|past − Δ|": "|the past| without Δ",
    "F": "F",
    "f": "f in [1, 1.2]",
    "|log f|": "|log f|, f in [0.8, 1.2]",
    "entropy": "entropy",
    "−log π_old": "−log π_old",
    "left": "tokens left",
}
LEADERS = ("|Δ|", "|F − Δ|", "|past − Δ|", "f", "future of −log π_old")


def auc(score: pd.Series, positive: pd.Series, stratum: pd.Series | int = 0) -> float:
    """The probability that a positive token has a higher score than another one. Ties count half.

    A positive is only compared with others of the same stratum. NaN if there is no such pair.
    """
    table = pd.DataFrame({"score": score, "stratum": stratum, "other": ~positive})
    strata = table.groupby("stratum")
    rank = strata["score"].rank()
    rank_among_positives = table[positive].groupby("stratum")["score"].rank()
    wins = (rank - rank_among_positives).sum()  # of positives; NaN for the others
    others = strata["other"].transform("sum")
    pairs = others[positive].sum()
    return wins / pairs if pairs else math.nan


def scores(delta: Tensor, advantages: Tensor, mask: Tensor, tau: float = 32.0) -> dict[str, Tensor]:
    """What Δlog p says of every token. [B, T] each -> [B, T] each."""
    F, f = fipo.influence_weight(delta, advantages, mask, tau=tau)
    _, wide_f = fipo.influence_weight(delta, advantages, mask, tau=tau, weight_range=(0.8, 1.2))
    backwards = fipo.future_kl(delta.flip(1), mask.flip(1), tau)
    past = backwards.flip(1)
    return {
        "F": F,
        "f": f,
        "|Δ|": delta.abs(),
        "|F|": F.abs(),
        "|F − Δ|": (F - delta).abs(),
        "|past − Δ|": (past - delta).abs(),
        "|log f|": wide_f.log().abs(),
    }


def z_score(before: Tensor, after: Tensor, n: int) -> Tensor:
    """The difference of two shares of n trials, in standard errors.

    One success and one failure are added to each (Agresti and Caffo), or 0 and 1 had no error.
    """
    p = (before * n + 1) / (n + 2)
    q = (after * n + 1) / (n + 2)
    variance = (p * (1 - p) + q * (1 - q)) / (n + 2)
    return (q - p) / variance.sqrt()


def until_next(key: Tensor) -> Tensor:
    """The distance to the next key token: 0 at a key token, inf if none follows. [B, T] each."""
    place = torch.arange(key.shape[1])
    key_place = torch.where(key, place, math.inf)
    next_from_the_end = key_place.flip(1).cummin(1).values
    return next_from_the_end.flip(1) - place


def padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def read_tokens(seed: int, step: int) -> pd.DataFrame:
    """Scores and truth of every token of a step's responses: one row each."""
    rows = torch.load(truth_file(seed, step), weights_only=True)

    # 1) what the loss saw, [B, T] as all below
    old_logp = padded(rows["old_logp"])
    delta = padded(rows["logp"]) - old_logp
    is_token = [torch.ones_like(row, dtype=torch.bool) for row in rows["logp"]]
    mask = padded(is_token)
    advantages = torch.tensor(rows["advantage"])[:, None]  # [B, 1]
    columns = scores(delta, advantages, mask) | {
        "entropy": padded(rows["entropy"]),
        "−log π_old": -old_logp,
        "unsure": old_logp < math.log(0.9),
        "future of −log π_old": fipo.future_kl(-old_logp, mask) + old_logp,
        "left": mask.flip(1).cumsum(1).flip(1),
    }

    # 2) the truth
    V = padded(rows["V"])  # [B, T + 1]
    jump = z_score(V[:, :-1], V[:, 1:], CONTINUATIONS)
    key = (jump.abs() > KEY) & mask
    columns |= {"key": key, "ahead": until_next(key)}
    return pd.DataFrame({name: column[mask].numpy() for name, column in columns.items()})


def rank(t: pd.DataFrame) -> Numbers:
    """The share of key tokens, and how well scores find them and what leads to them.

    The tokens d before a key token are compared with tokens that have no key token here or among
    the next LEAD, and as many tokens left, over which F sums. NaN where there is no such token.
    """
    unsure = t[t["unsure"]]
    result = {
        "tokens": len(t),
        "unsure tokens, share": t["unsure"].mean(),
        "key tokens, share": t["key"].mean(),
    }
    for name in FINDERS:
        area = auc(t[name], t["key"])
        area_among_unsure = auc(unsure[name], unsure["key"])
        result[f"AUC, at the update, {name}"] = area
        result[f"AUC among unsure tokens, at the update, {name}"] = area_among_unsure
    for d in range(LEAD + 1):
        compared = t[(t["ahead"] == d) | (t["ahead"] > LEAD)]
        for name in LEADERS:
            area = auc(compared[name], compared["ahead"] == d, compared["left"])
            result[f"{d} before, at the update, {name}"] = area
    return result


# -------------------------------------------------------------------- 3. How f turns the gradient
def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=0).item()


DAPO_RANGE = (1.0, 1.0)


def gradient(
    policy: Policy,
    mini_batch: list[Rollout],
    cfg: Config,
    weight_range: tuple[float, float] = DAPO_RANGE,
) -> Tensor:
    """The gradient of the loss as one vector. The policy is left as it was."""
    fipo.add_gradients(policy, mini_batch, replace(cfg, weight_range=list(weight_range)))
    vector = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.optimizer.zero_grad()
    return vector


def compare_gradients(policy: Policy, mini_batch: list[Rollout], cfg: Config) -> Numbers:
    """Cosine and norm of FIPO's gradient relative to DAPO's, for every range of f."""
    row = {}
    dapo = gradient(policy, mini_batch, cfg)
    for name, weight_range in RANGES.items():
        g = gradient(policy, mini_batch, cfg, weight_range)
        row[f"cosine: {name}"] = cosine(g, dapo)
        row[f"norm: {name}"] = (g.norm() / dapo.norm()).item()
    return row


def record_gradients(seed: int) -> None:
    """Save one row for every update of the steps in STEPS."""
    if gradient_file(seed).exists():
        return
    rows = []
    cfg = settings(seed=seed, steps=STEPS[-1], lr=BEST_LR)
    for step, i, policy, mini_batches in updates(cfg):
        if step not in STEPS:
            continue
        row = {"seed": seed, "step": step, "update": i + 1}
        if i > 0:  # at the first update f is 1
            row |= compare_gradients(policy, mini_batches[i], cfg)
        if i + 1 < len(mini_batches):
            here = gradient(policy, mini_batches[i], cfg)
            other = gradient(policy, mini_batches[i + 1], cfg)
            row["cosine: another mini-batch"] = cosine(here, other)
        rows.append(row)
    os.makedirs(RUNS / "gradients", exist_ok=True)
    gradient_file(seed).write_text(json.dumps(rows))


# -------------------------------------------------------------- 4. Training with f or an oracle
FEW = 32  # continuations of a prefix for the oracle
JUMP = 0.2  # the ΔV at which the oracle's f reaches its upper bound
ARM_SEEDS = range(10)
SMALL = dict(
    group_size=8,
    prompts_per_batch=16,
    prompts_per_mini_batch=2,
    max_gen_rounds=100,
    lr=BEST_LR,
    rollout_rows=256,
)
DAPO = SMALL | dict(algorithm="dapo")
WIDE = SMALL | dict(weight_range=[0.5, 2.0])

# Part -> arm -> settings
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "matters": {
        "dapo": DAPO,
        "fipo": SMALL,
        "fipo-wide": WIDE,
        "oracle": SMALL,
        "oracle-wide": WIDE,
    },
    "half": {"largest": DAPO, "random": DAPO, "smallest": DAPO},
}


def use_oracle(cfg: Config) -> None:
    """Make fipo.py multiply advantages by the oracle's f. V is estimated at every step."""
    score_old_logp = fipo.score_old_logp
    collate = fipo.collate

    def score_and_estimate(policy: Policy, mini_batches: Groups) -> dict:
        rollouts = fipo.flatten(mini_batches)
        V = values(policy, rollouts, FEW, cfg, (cfg.seed, "oracle"), sure=0.95)
        for r, V_of_r in zip(rollouts, V):
            r.advantages = r.advantage * oracle_weight(r, V_of_r.diff(), *cfg.weight_range)
        return score_old_logp(policy, mini_batches)

    def collate_tokens(rollouts: list[Rollout], device: torch.device) -> tuple[Tensor, ...]:
        input_ids, mask, old_logp, _ = collate(rollouts, device)
        by_token = torch.cat([r.advantages for r in rollouts])
        advantages = torch.zeros(mask.shape).masked_scatter(mask, by_token)
        return input_ids, mask, old_logp, advantages  # [B, L] each

    fipo.score_old_logp = score_and_estimate
    fipo.collate = collate_tokens


def oracle_weight(r: Rollout, delta_V: Tensor, low: float, high: float) -> Tensor:
    """The oracle's f: large where V moved towards the outcome, small where it moved away."""
    towards = delta_V if r.correct else -delta_V
    return (high ** (towards / JUMP)).clamp(low, high)


def learn_from_half(which: str, seed: int) -> None:
    """Make fipo.py train on half of the tokens of a mini-batch, which is one micro-batch.

    The half has the largest F, the smallest, or is random. At the first update F is 0 but for
    rounding, so there the half is random.
    """
    influence_weight = fipo.influence_weight

    def select_half(
        delta: Tensor, advantages: Tensor, mask: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        F, _ = influence_weight(delta, advantages, mask, **options)
        if which == "random" or delta.abs().max() <= 1e-3:
            draw = fipo.derive_seed(seed, mask.sum().item(), delta.sum().item())
            order = torch.rand(F.shape, generator=torch.Generator().manual_seed(draw))
        elif which == "largest":
            order = F
        else:
            order = -F
        order = order.masked_fill(~mask, -math.inf).flatten()
        rank = order.argsort(descending=True).argsort()
        chosen = rank < mask.sum() // 2
        return F, 2.0 * chosen.view_as(F)  # twice, so that the loss is still a mean over tokens

    fipo.influence_weight = select_half


def train_arm(part: str, arm: str, seed: int) -> None:
    """Do one run, in a process of its own, since it may replace functions of fipo.py."""
    out = RUNS / part / f"{arm}-{seed}"
    if (out / "done").exists():
        return
    cfg = settings(
        **ARMS[part][arm],
        seed=seed,
        out=str(out),
        resume=True,
        eval_every=2,
        save_every=8,
        log_samples=0,
    )
    if arm.startswith("oracle"):
        use_oracle(cfg)
        cfg = replace(cfg, weight_range=list(DAPO_RANGE))  # the oracle's f is in the advantages
    elif part == "half":
        learn_from_half(arm, seed)
    fipo.train(cfg)
    (out / "done").touch()
    shutil.rmtree(out / "checkpoints")


def run_in_processes(job: Callable[[Any], None], arguments: Iterable[Any]) -> None:
    """Call job(argument) for every argument, two at a time, each in a new process."""
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        # The list raises the first error, and then nothing more is started.
        list(pool.map(job, arguments))


# ----------------------------------------------------------------------------------- 5. The report
def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean of every column, half of its 95 % interval, and the number of seeds with a value."""
    spreads = {}
    for name, column in rows.items():
        numbers = column.dropna().tolist()
        if numbers:
            spreads[name] = (*bench_compare.interval(numbers), len(numbers))
    names = ["mean", "half", "n"]
    return pd.DataFrame.from_dict(spreads, orient="index", columns=names, dtype=float)


def read_run(folder: Path) -> dict[str, Any]:
    """Area under the accuracy curve, final accuracy and length, and the curve of a run."""
    evaluations = bench_compare.read_curve(folder)
    arm, seed = folder.name.rsplit("-", 1)
    row = {"part": folder.parent.name, "arm": arm, "seed": int(seed)}
    row |= bench_compare.summary(evaluations)
    row["curve"] = " ".join(f"{line['eval/accuracy']:.4f}" for line in evaluations)
    return row


def compare_arms(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every arm over seeds, and its differences to the other arms, paired by seed."""
    arms = {}
    for arm, rows in runs.groupby("arm"):
        arms[arm] = rows.set_index("seed")[["area", "final", "length"]]
    result = {}
    for arm, numbers in arms.items():
        columns = [numbers]
        for other, other_numbers in arms.items():
            if other != arm:
                columns.append((numbers - other_numbers).add_suffix(f" − {other}"))
        result[arm] = over_seeds(pd.concat(columns, axis=1))
    return result


def report() -> None:
    """Write the results of all parts as tables and as pictures."""
    # 1) means over seeds
    truth = {}
    for step in STEPS:
        rows = [rank(read_tokens(seed, step)) for seed in SEEDS]
        truth[f"step {step}"] = over_seeds(pd.DataFrame(rows))
    rows = [pd.read_json(gradient_file(seed)) for seed in SEEDS]
    gradients = pd.concat(rows, ignore_index=True)
    by_step = gradients.groupby(["seed", "step"]).mean()
    by_seed = by_step.groupby("seed").mean()
    folders = sorted(done.parent for done in RUNS.glob("*/*/done"))
    runs = pd.DataFrame([read_run(folder) for folder in folders])

    # 2) tables
    tables = truth | {"gradients": over_seeds(by_seed)} | compare_arms(runs)
    pd.concat(tables).to_csv(RUNS / "credit.csv")
    runs.to_csv(RUNS / "credit_runs.csv", index=False)

    # 3) pictures
    draw_all(tables, runs, RUNS, {})


# -------------------------------------------------------------------------------- The pictures
# What the committed results say, as titles of the pictures.
FINDINGS = {
    "credit": "An oracle with f in [0.5, 2] gains 1.7 points, FIPO none",
    "credit_steps": "The oracle is ahead early, FIPO at no step beyond the noise",
    "credit_half": "Training on half of the tokens costs 3 points by largest F, 5 at random",
    "credit_finds": "|Δ| finds the tokens that decide, f hardly does",
    "credit_leads": "|F| finds what leads to a token that decides, no better than −log π_old",
    "credit_angle": "f in [1, 1.2] turns the gradient by 3 degrees",
}
FIPO_COLOR = bench_compare.COLORS["fipo"]
ORACLE_COLOR = "#009e73"
HALF_COLOR = "#555555"
# Arm -> label and color
ARM_STYLES = {
    "dapo": ("DAPO", bench_compare.COLORS["dapo"]),
    "fipo": ("FIPO, f in [1, 1.2]", FIPO_COLOR),
    "fipo-wide": ("FIPO, f in [0.5, 2]", FIPO_COLOR),
    "oracle": ("oracle, f in [1, 1.2]", ORACLE_COLOR),
    "oracle-wide": ("oracle, f in [0.5, 2]", ORACLE_COLOR),
    "values": ("ΔV in place of A", "#cc79a7"),
}
HALF_STYLES = {
    "moved": ("largest |Δ|", HALF_COLOR),
    "largest": ("largest F", FIPO_COLOR),
    "random": ("random", HALF_COLOR),
    "smallest": ("smallest F", FIPO_COLOR),
}
SCORE_COLORS = {
    "−log π_old": "#56b4e9",
    "entropy": "#999999",
    "|Δ|": "black",
    "|F|": "#e69f00",
    "|F − Δ|": "#e69f00",
    "f": FIPO_COLOR,
    "|past − Δ|": "#999999",
    "future of −log π_old": "#56b4e9",
}


def read_committed() -> dict[str, pd.DataFrame]:
    """The tables of `report`, from assets/results/credit.json."""
    saved = json.loads((bench_compare.RESULTS / "credit.json").read_text())
    parts = {f"step {step}": rows for step, rows in saved["truth"].items()}
    parts["gradients"] = saved["gradients"]["lr 0.0002"]
    for name, rows in saved["runs"].items():
        part, arm = name.split(": ")
        if part in ARMS:
            parts[arm] = rows
    tables = {}
    for name, rows in parts.items():
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "half", "n"])
        tables[name] = table.rename(index=lambda row: row.replace("− DAPO", "− dapo"))
    return tables


def pictures() -> None:
    """Draw the committed results."""
    runs = pd.read_csv(bench_compare.RESULTS / "credit_runs.csv")
    draw_all(read_committed(), runs, bench_compare.ASSETS, FINDINGS)


def draw_all(
    tables: dict[str, pd.DataFrame], runs: pd.DataFrame, folder: Path, titles: dict[str, str]
) -> None:
    """Draw all pictures into a folder."""
    draws = {
        "credit": partial(draw_gains, tables=tables, styles=ARM_STYLES),
        "credit_half": partial(draw_gains, tables=tables, styles=HALF_STYLES),
        "credit_steps": partial(draw_steps, runs=runs),
        "credit_finds": partial(draw_finders, tables=tables),
        "credit_leads": partial(draw_leads, tables=tables),
        "credit_angle": partial(draw_angles, gradients=tables["gradients"]),
    }
    with plt.rc_context(bench_compare.STYLE):
        for name, draw in draws.items():
            figure, axes = plt.subplots(figsize=(8, 4))
            draw(axes)
            axes.set_title(titles.get(name, ""))
            figure.savefig(folder / f"{name}.png")
            plt.close(figure)


def write_beside(axes: plt.Axes, y: float, text: str) -> None:
    """Write text to the right of the axes."""
    axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center")


def draw_gains(
    axes: plt.Axes, tables: dict[str, pd.DataFrame], styles: dict[str, tuple[str, str]]
) -> None:
    """The difference of every arm to DAPO in the area under its accuracy curve."""
    arms = [arm for arm in styles if arm in tables]
    for place, arm in enumerate(arms):
        _, color = styles[arm]
        if arm == "dapo":
            axes.plot(0, place, "o", color=color)
            continue
        gain = 100 * tables[arm].loc["area − dapo"]
        axes.errorbar(gain["mean"], place, xerr=gain["half"], fmt="o", color=color, capsize=4)
        text = f"{gain['mean']:+.1f} ± {gain['half']:.1f}"
        write_beside(axes, place, text.replace("-", "−"))
    axes.axvline(0, color=ARM_STYLES["dapo"][1], zorder=1)
    axes.set_yticks(range(len(arms)), [styles[arm][0] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel(
        "area under held-out accuracy − DAPO's, percentage points\n"
        "(mean over seeds and 95 % interval)"
    )


def draw_steps(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """The difference from DAPO in accuracy at every evaluation, paired by seed."""
    curves = {}
    for arm, rows in runs[runs["part"] == "matters"].groupby("arm"):
        curves[arm] = 100 * rows.set_index("seed")["curve"].str.split(expand=True).astype(float)
    for arm in ("oracle-wide", "fipo"):
        label, color = ARM_STYLES[arm]
        difference = over_seeds(curves[arm] - curves["dapo"])
        steps = 2 * difference.index  # a run is evaluated at every second step
        lower = difference["mean"] - difference["half"]
        upper = difference["mean"] + difference["half"]
        axes.plot(steps, difference["mean"], marker=".", color=color, label=label)
        axes.fill_between(steps, lower, upper, color=color, alpha=0.2, linewidth=0)
    axes.axhline(0, color=ARM_STYLES["dapo"][1], label="DAPO", zorder=1)
    axes.set(xlabel="step", ylabel="held-out accuracy − DAPO's, points")
    axes.legend(loc="upper right", title="mean and 95 % interval")


def draw_finders(axes: plt.Axes, tables: dict[str, pd.DataFrame]) -> None:
    """How well scores find key tokens, at every step in STEPS."""
    scores_shown = ("−log π_old", "entropy", "|Δ|", "|F|", "f", "|F − Δ|")
    for place, score in enumerate(scores_shown):
        name = f"AUC, at the update, {score}"
        areas = pd.concat([tables[f"step {step}"].reindex([name]) for step in STEPS])
        heights = place + np.linspace(-0.25, 0.25, len(STEPS))  # from the first step to the last
        color = SCORE_COLORS[score]
        axes.errorbar(areas["mean"], heights, xerr=areas["half"], fmt="o", color=color, ms=4)
    axes.axvline(0.5, color="black", linewidth=1)
    axes.set_yticks(range(len(scores_shown)), [FINDERS[score] for score in scores_shown])
    axes.invert_yaxis()
    axes.set_xlim(0.2, 1.01)
    steps = ", ".join(str(step) for step in STEPS)
    axes.set_xlabel(f"AUC: 0.5 is guessing, 1 finds all (in each row, from the top: steps {steps})")


def draw_leads(axes: plt.Axes, tables: dict[str, pd.DataFrame]) -> None:
    """How well scores find the tokens before a key token, by the distance to it."""
    means = pd.DataFrame({step: tables[f"step {step}"]["mean"] for step in STEPS})
    for score in LEADERS:
        names = [f"{d} before, at the update, {score}" for d in range(LEAD + 1)]
        curve = means.reindex(names).mean(axis=1)
        label = FINDERS.get(score, score)
        axes.plot(range(LEAD + 1), curve, marker=".", color=SCORE_COLORS[score], label=label)
    axes.axhline(0.5, color="black", linewidth=1)
    axes.set(
        xlabel="tokens before the next one that decides",
        ylabel="AUC, mean of the steps",
        ylim=(0, 1),
    )
    axes.legend(loc="lower center", ncols=2)


def draw_angles(axes: plt.Axes, gradients: pd.DataFrame) -> None:
    """The angle to DAPO's gradient of FIPO's, and of DAPO's on another mini-batch."""
    labels = []
    for place, name in enumerate((*RANGES, "another mini-batch")):
        mean, half, _ = gradients.loc[f"cosine: {name}"]
        cosines = np.clip([mean + half, mean, mean - half], -1, 1)
        low, angle, high = np.degrees(np.arccos(cosines))
        text = f"{angle:.1f}°"
        if name not in RANGES:
            label = "DAPO, next mini-batch"
            color = ARM_STYLES["dapo"][1]
        else:
            label = f"FIPO, f in {name}" if name != "unclipped" else "FIPO, f unclipped"
            color = FIPO_COLOR
            a, b = RANGES[name]
            if math.isfinite(b):
                bound = math.degrees(math.acos(2 * math.sqrt(a * b) / (a + b)))
                axes.plot(bound, place, "|", color="black", markersize=18)
                text += f" (limit {bound:.1f}°)"
        labels.append(label)
        spread = [[angle - low], [high - angle]]
        axes.errorbar(angle, place, xerr=spread, fmt="o", color=color, capsize=4)
        write_beside(axes, place, text)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 90)
    axes.set_xlabel(
        "angle to DAPO's gradient, degrees\n"
        "(mean and 95 % interval; black: the limit for orthogonal token gradients)"
    )


# ------------------------------------------------------------------------------------ Command line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=["truth", "gradients", *ARMS, "report", "pictures"])
    part = parser.parse_args(argv).part
    with fipo.report_errors():
        if part == "report":
            report()
            return
        if part == "pictures":
            pictures()
            return
        settings()  # several processes will need the base model and the problems
        if part == "truth":
            run_in_processes(record_truth, SEEDS)
        elif part == "gradients":
            run_in_processes(record_gradients, SEEDS)
        else:
            for arm in ARMS[part]:
                run_in_processes(partial(train_arm, part, arm), ARM_SEEDS)


if __name__ == "__main__":
    main(sys.argv[1:])

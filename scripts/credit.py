"""Does FIPO's weight f find the tokens that matter? A study of credit on the embedded task.

The embedded task (train_small.py) is small enough to estimate the value V of every prefix of a
response: the share of its sampled continuations that are correct. The change ΔV at a token says how
much the token decided, and f is compared with it.

python scripts/credit.py truth       # 1  values of all prefixes of 128 responses, at four steps
python scripts/credit.py gradients   # 3  the angle between FIPO's and DAPO's gradients
python scripts/credit.py matters     # 4  training with f, and with an oracle that estimates values
python scripts/credit.py half        # 4  training on half of the tokens, chosen by F
python scripts/credit.py report      # 2, 5  tables and a picture of all parts

Each part saves its results in runs/credit and skips what is done. It runs two processes at a time,
with one thread each. `report` writes there, too. The files in assets were made with the version of
commit 4efe0ea and also hold results of parts that this script no longer has.
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
    "|Δ|": "|Δlog p|",
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


ARM_LABELS = {
    "fipo": "FIPO, f in [1, 1.2]",
    "fipo-wide": "FIPO, f in [0.5, 2]",
    "oracle": "oracle, f in [1, 1.2]",
    "oracle-wide": "oracle, f in [0.5, 2]",
    "largest": "half: largest F",
    "random": "half: random",
    "smallest": "half: smallest F",
}


def draw_finders(axes: plt.Axes, truth: dict[str, pd.DataFrame]) -> None:
    places = np.arange(len(FINDERS))
    for step, table in truth.items():
        names = [f"AUC, at the update, {name}" for name in FINDERS]
        areas = table.reindex(names)
        axes.errorbar(areas["mean"], places, xerr=areas["half"], fmt="o", label=step)
        places = places + 0.17  # the next step goes below
    axes.set(
        title="Which scores find the tokens that decide?",
        xlabel="AUC: 0.5 is guessing, 1 finds them all",
        xlim=(0.1, 1.02),
        yticks=range(len(FINDERS)),
        yticklabels=FINDERS.values(),
    )
    axes.axvline(0.5, color="grey")
    axes.invert_yaxis()
    axes.legend(loc="upper left")


def draw_leads(axes: plt.Axes, truth: dict[str, pd.DataFrame]) -> None:
    means = pd.DataFrame({step: table["mean"] for step, table in truth.items()})
    for score in LEADERS:
        names = [f"{d} before, at the update, {score}" for d in range(LEAD + 1)]
        curve = means.reindex(names).mean(axis=1)
        label = FINDERS.get(score, score)
        axes.plot(range(LEAD + 1), curve, marker=".", label=label)
    axes.set(
        title="Which scores find what leads to them?",
        xlabel="tokens before the next one that decides",
        ylabel="AUC, mean of the steps",
        ylim=(0, 1.02),
    )
    axes.axhline(0.5, color="grey")
    axes.legend(loc="lower right")


def draw_gains(axes: plt.Axes, arms: dict[str, pd.DataFrame]) -> None:
    gains = pd.DataFrame([100 * arms[arm].loc["area − dapo"] for arm in ARM_LABELS])
    labels = list(ARM_LABELS.values())
    axes.errorbar(gains["mean"], labels, xerr=gains["half"], fmt="o")
    axes.set(
        title="Does it change the accuracy?",
        xlabel="area under held-out accuracy − DAPO's, points",
    )
    axes.axvline(0, color="grey")
    axes.invert_yaxis()


def draw_angles(axes: plt.Axes, rows: pd.DataFrame) -> None:
    for name in ("another mini-batch", *RANGES):
        cosines = rows[f"cosine: {name}"].dropna()
        angles = np.degrees(np.arccos(cosines.clip(upper=1)))
        by_update = angles.groupby(rows["update"]).mean()
        label = f"FIPO, {name}" if name in RANGES else "DAPO on another mini-batch"
        axes.plot(by_update, marker=".", label=label)
    axes.set(
        title="How far is it to DAPO's gradient?",
        xlabel="update on one batch of rollouts",
        ylabel="degrees",
        yscale="log",
        ylim=(0.3, 200),
    )
    axes.legend(loc="lower right")


def report() -> None:
    """Write the results of all parts as tables and as a picture."""
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
    arms = compare_arms(runs)

    # 2) tables
    tables = truth | {"gradients": over_seeds(by_seed)} | arms
    pd.concat(tables).to_csv(RUNS / "credit.csv")
    runs.to_csv(RUNS / "credit_runs.csv", index=False)

    # 3) the picture
    figure, panels = plt.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    draw_finders(panels[0, 0], truth)
    draw_leads(panels[0, 1], truth)
    draw_gains(panels[1, 0], arms)
    draw_angles(panels[1, 1], gradients)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.savefig(RUNS / "credit.png", dpi=130)


# ------------------------------------------------------------------------------------ Command line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=["truth", "gradients", *ARMS, "report"])
    part = parser.parse_args(argv).part
    with fipo.report_errors():
        if part == "report":
            report()
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

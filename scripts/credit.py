"""Does FIPO's weight f find the tokens that matter? A study of credit on the embedded task.

The embedded task (train_small.py) is small enough to estimate the value V of every prefix of a
response: the share of its sampled continuations that are correct. The change ΔV at a token says how
much the token decided, and f is compared with it.

python scripts/credit.py truth       # 1  values of all prefixes of 128 responses, at four steps
python scripts/credit.py gradients   # 3  the angle between FIPO's and DAPO's gradients
python scripts/credit.py matters     # 4  training with f, and with an oracle that estimates values
python scripts/credit.py half        # 4  training on half of the tokens: largest F, smallest, …
python scripts/credit.py setting     # 4  settings in which f could matter more
python scripts/credit.py final       # 4  the best of these settings, on five other seeds
python scripts/credit.py report      # 2, 5  assets/results/credit*, assets/credit.png

Each part saves its results in runs/credit and skips what is done. It runs two processes at a time,
with one thread each.
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
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":
    # Set before torch is imported, and inherited by all processes.
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import bench_compare
import fipo
import train_small
from fipo import Config, HFSampler, Policy, Rollout

ROOT = Path(__file__).parents[1]
RUNS = Path(os.environ.get("CREDIT_RUNS", ROOT / "runs" / "credit"))
SEEDS = range(5)  # of `truth` and `gradients`
STEPS = (1, 4, 10, 20)
CONTINUATIONS = 64  # of each prefix, in each of two estimates
BEST_LR = float(bench_compare.BEST_LR)  # DAPO's
RATES = (1e-4, BEST_LR)  # of `gradients`
TAUS = (1, 8, 32, 128)
RANGES = {
    "[1, 1.2]": (1.0, 1.2),
    "[0.8, 1.2]": (0.8, 1.2),
    "[0.5, 2]": (0.5, 2.0),
    "unclipped": (0.0, math.inf),
}
Numbers = dict[str, float]


def settings(pretrain_steps: int = 1000, **changes: Any) -> Config:
    """The embedded run's settings with `changes`. Makes its model and problems if needed."""
    defaults = train_small.embedded_settings(RUNS / f"task-{pretrain_steps}", pretrain_steps)
    if not Path(defaults["eval_data"]).exists():
        train_small.make_embedded(defaults, pretrain_steps)
    defaults["out"] = str(RUNS)
    return fipo.resolve(train_small.configure([], defaults | changes))


def truth_file(seed: int, step: int) -> Path:
    return RUNS / "truth" / f"{seed}-{step}.pt"


def gradient_file(seed: int, lr: float) -> Path:
    return RUNS / "gradients" / f"{lr:g}-{seed}.json"


def updates(cfg: Config) -> Iterator[tuple[int, int, Policy, list[list[Rollout]]]]:
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
def prefix(r: Rollout, t: int) -> tuple[int, ...]:
    """The prompt and the first t tokens of the response."""
    return (*r.problem.prompt_ids, *r.response_ids[:t])


def needs_estimate(r: Rollout, t: int, sure: float) -> bool:
    return t == 0 or math.exp(r.sampler_logp[t - 1]) < sure


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
    sampler = HFSampler(policy)
    verify = fipo.VERIFY[cfg.verifier]

    # 1) collect the prefixes
    problems = {}
    for r in rollouts:
        for t in range(len(r.response_ids)):
            if needs_estimate(r, t, sure):
                problems[prefix(r, t)] = r.problem
    prefixes = sorted(problems, key=lambda ids: (len(ids), ids))

    # 2) continue each of them n times, those of similar length together
    estimates = {}
    size = max(1, cfg.rollout_rows // n)
    for start in fipo.progress(range(0, len(prefixes), size), desc="values"):
        chunk = prefixes[start : start + size]
        prompts = []
        seeds = []
        room = 0
        for ids in chunk:
            problem = problems[ids]
            length = len(problem.prompt_ids)
            prompts.append(replace(problem, prompt_ids=list(ids)))
            seeds.append(fipo.derive_seed(purpose, ids[:length], ids[length:]))
            room = max(room, length + cfg.max_response - len(ids))
        groups = sampler.generate(prompts, seeds, n, room, cfg.temperature, 1.0)
        for ids, group in zip(chunk, groups):
            problem = problems[ids]
            correct = 0
            for continuation in group:
                response = [*ids, *continuation.response_ids][len(problem.prompt_ids) :]
                # A short prefix in the chunk gives a long one more room than it may use.
                response = response[: cfg.max_response]
                text = policy.tokenizer.decode(response, skip_special_tokens=True)
                correct += verify(text, problem.answer)
            estimates[ids] = correct / n

    # 3) put them together
    result = []
    for r in rollouts:
        V = []
        for t in range(len(r.response_ids)):
            if needs_estimate(r, t, sure):
                value = estimates[prefix(r, t)]
            V.append(value)
        result.append(torch.tensor([*V, float(r.correct)]))
    return result


def record_truth(seed: int) -> None:
    """Save the values of the last two mini-batches of the steps in STEPS, and what the loss saw."""
    if truth_file(seed, STEPS[-1]).exists():
        return
    recorded = {}
    cfg = settings(seed=seed, steps=STEPS[-1], rollout_rows=256)
    for step, i, policy, mini_batches in updates(cfg):
        if step in STEPS and i == 0:
            rollouts = mini_batches[-2] + mini_batches[-1]
            V = []
            for repetition in (0, 1):
                purpose = (seed, "value", repetition)
                V.append(values(policy, rollouts, CONTINUATIONS, cfg, purpose))
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
    result = []
    for row, is_response in zip(entropy, mask):
        result.append(row[is_response])
    return result


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
LEADERS = (
    "|Δ|",
    "|F − Δ|",
    "|past − Δ|",
    "f",
    "future of −log π_old",
)


def auc(score: pd.Series, positive: pd.Series, stratum: pd.Series | int = 0) -> float:
    """The probability that a positive token has a higher score than another one. Ties count half.

    A positive is only compared with others of the same stratum. NaN if there is no such pair.
    """
    table = pd.DataFrame(
        {
            "score": score,
            "stratum": stratum,
            "other": ~positive,
        }
    )
    strata = table.groupby("stratum")
    rank = strata["score"].rank()
    rank_among_positives = table[positive].groupby("stratum")["score"].rank()
    wins = (rank - rank_among_positives).sum()  # of positives; NaN for the others
    others = strata["other"].transform("sum")
    pairs = others[positive].sum()
    return wins / pairs if pairs else math.nan


def scores(delta: Tensor, advantages: Tensor, mask: Tensor, tau: float = 32.0) -> dict[str, Tensor]:
    """What Δlog p says of every token. [B, T] each -> [B, T] each."""
    weigh = partial(fipo.influence_weight, delta, advantages, mask, tau=tau)
    F, f = weigh()
    _, wide_f = weigh(weight_range=(0.8, 1.2))
    backwards = fipo.future_kl(delta.flip(1), mask.flip(1), tau)
    past = backwards.flip(1)
    columns = {}
    columns["Δ"] = delta
    columns["F"] = F
    columns["f"] = f
    columns["|Δ|"] = delta.abs()
    columns["|F|"] = F.abs()
    columns["|F − Δ|"] = (F - delta).abs()
    columns["|past − Δ|"] = (past - delta).abs()
    columns["|log f|"] = wide_f.log().abs()
    return columns


def z_score(before: Tensor, after: Tensor, n: int) -> Tensor:
    """The difference of two shares of n trials, in standard errors.

    One success and one failure are added to each (Agresti and Caffo), or 0 and 1 had no error.
    """
    p = (before * n + 1) / (n + 2)
    q = (after * n + 1) / (n + 2)
    variance = (p * (1 - p) + q * (1 - q)) / (n + 2)
    return (q - p) / variance.sqrt()


def is_jump(before: Tensor, after: Tensor, n: int) -> Tensor:
    """Whether two values differ by more than the noise of n continuations each."""
    return z_score(before, after, n).abs() > KEY


def until_next(key: Tensor) -> Tensor:
    """The distance to the next key token: 0 at a key token, inf if none follows. [B, T] each."""
    place = torch.arange(key.shape[1])
    key_place = torch.where(key, place, math.inf)
    next_from_the_end = key_place.flip(1).cummin(1).values
    return next_from_the_end.flip(1) - place


def padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def read_tokens(seed: int, step: int, tau: float = 32.0) -> pd.DataFrame:
    """Scores and truth of every token of a step's responses: one row each."""
    rows = torch.load(truth_file(seed, step), weights_only=True)
    old_logp = padded(rows["old_logp"])  # [B, T], as all below
    delta = padded(rows["logp"]) - old_logp
    is_token = [torch.ones_like(row, dtype=torch.bool) for row in rows["logp"]]
    mask = padded(is_token)
    advantages = torch.tensor(rows["advantage"])[:, None].expand_as(mask)
    columns = scores(delta, advantages, mask, tau)
    columns["A"] = advantages
    columns["entropy"] = padded(rows["entropy"])
    columns["−log π_old"] = -old_logp
    columns["unsure"] = old_logp < math.log(0.9)
    columns["future of −log π_old"] = fipo.future_kl(-old_logp, mask, tau) + old_logp
    columns["left"] = mask.flip(1).cumsum(1).flip(1)

    first, second = (padded(V) for V in rows["V"])  # [B, T + 1]
    estimates = {"": (first + second) / 2, " 1": first, " 2": second}
    for half, V in estimates.items():
        n = CONTINUATIONS if half else 2 * CONTINUATIONS
        columns[f"ΔV{half}"] = V.diff()
        columns[f"key{half}"] = is_jump(V[:, :-1], V[:, 1:], n) & mask
    # Two estimates of the same prefix differ by noise only.
    columns["false"] = is_jump(first[:, :-1], second[:, :-1], CONTINUATIONS)
    columns["ahead"] = until_next(columns["key"])
    return pd.DataFrame({name: column[mask].numpy() for name, column in columns.items()})


def describe(t: pd.DataFrame) -> Numbers:
    """The key tokens: how many, how certain, and f there."""
    key = t["key"]
    bad = t["ΔV"] < 0
    means = {
        "unsure tokens, share": t["unsure"],
        "key tokens, share": key,
        "key tokens that are bad": bad[key],
        "key tokens that the other half finds, too": t["key 2"][t["key 1"]],
        "false alarms, share": t["false"],
        "f at good key tokens": t["f"][key & ~bad],
        "f at bad key tokens": t["f"][key & bad],
        "f elsewhere": t["f"][~key],
        "sure ones of the 8 before a key token": ~t["unsure"][t["ahead"].between(1, 8)],
    }
    result = {name: column.mean() for name, column in means.items()}
    noise = (t["ΔV 1"] - t["ΔV 2"]) / 2
    result["tokens"] = len(t)
    result["ΔV, rms"] = (t["ΔV"] ** 2).mean() ** 0.5
    result["noise of ΔV, rms"] = (noise**2).mean() ** 0.5
    result["correlation of two halves"] = t["ΔV 1"].corr(t["ΔV 2"])
    return result


def rank(t: pd.DataFrame) -> Numbers:
    """How well scores separate key tokens from others, good ones from bad, and what leads to them.

    The tokens d before a key token are compared with tokens that have no key token here or among
    the next LEAD, and as many tokens left, over which F sums.
    """
    result = {}
    unsure = t[t["unsure"]]
    for name in FINDERS:
        area = auc(t[name], t["key"])
        area_among_unsure = auc(unsure[name], unsure["key"])
        result[f"AUC, at the update, {name}"] = area
        result[f"AUC among unsure tokens, at the update, {name}"] = area_among_unsure
    key = t[t["key"]]
    is_good = key["ΔV"] >= 0
    for name in ("Δ", "F", "A"):
        result[f"good from bad, at the update, {name}"] = auc(key[name], is_good)
    leads_to_none = t["ahead"] > LEAD
    for d in range(LEAD + 1):
        is_lead = t["ahead"] == d
        compared = t[is_lead | leads_to_none]
        for name in LEADERS:
            area = auc(compared[name], is_lead[compared.index], compared["left"])
            result[f"{d} before, at the update, {name}"] = area
    return result


def find(seed: int, step: int) -> Numbers:
    """All numbers of part 2. NaN where there is no such token."""
    tokens = read_tokens(seed, step)
    result = describe(tokens) | rank(tokens)
    for tau in TAUS:
        tokens = read_tokens(seed, step, tau)
        for name in ("|F|", "f"):
            result[f"AUC, at the update, {name}, τ = {tau}"] = auc(tokens[name], tokens["key"])
    return result


# -------------------------------------------------------------------- 3. How f turns the gradient
def cosine_bound(low: float, high: float) -> float:
    """The least cosine of Σ w_t g_t to Σ g_t, for orthogonal g_t and weights w_t in [low, high].

    With p_t = |g_t|² / Σ|g|², cos = E[w] / √E[w²]. Since (w − a)(b − w) ≥ 0,
    E[w²] ≤ (a + b) E[w] − ab, so cos² ≥ m² / ((a + b) m − ab) with m = E[w]. That is smallest at
    m = 2ab / (a + b), where cos = 2√(ab) / (a + b) (Kantorovich). Where the g_t cancel, their sum
    can turn by any angle.
    """
    if high == math.inf:
        return 0.0
    return 2 * math.sqrt(low * high) / (low + high)


def cosine(a: Tensor, b: Tensor) -> float:
    a = a.double()
    b = b.double()
    return (a @ b / (a.norm() * b.norm())).item()


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


def squared_gradients(policy: Policy, r: Rollout) -> Tensor:
    """|g_t|² of every token's own gradient of DAPO's loss, which is a sum here, [T]."""
    input_ids, mask, old_logp, advantages = fipo.collate([r], policy.device)
    logp, _ = fipo.token_logprobs(policy.model, input_ids, mask)
    loss, _ = fipo.fipo_loss(
        logp, old_logp, advantages, mask, weight_range=DAPO_RANGE, num_tokens=1
    )
    (by_logp,) = torch.autograd.grad(loss, logp, retain_graph=True)
    token_losses = (logp * by_logp)[mask]  # their gradients are those of the loss
    parameters = list(policy.model.parameters())
    squares = []
    for token_loss in token_losses:
        parts = torch.autograd.grad(token_loss, parameters, retain_graph=True)
        square = sum(part.square().sum() for part in parts)
        squares.append(square)
    return torch.stack(squares)


def token_by_token(policy: Policy, mini_batch: list[Rollout], cfg: Config) -> Numbers:
    """How far DAPO's token gradients g_t cancel, and FIPO's cosine to DAPO if they were orthogonal.

    |Σg|² / Σ|g|² is 1 if they are orthogonal, and 0 if they cancel.
    """
    mean = gradient(policy, mini_batch, cfg).double()
    squares = torch.cat([squared_gradients(policy, r) for r in mini_batch]).double()
    total = (mean * len(squares)).square().sum()
    share = squares / squares.sum()
    row = {"|Σg|² / Σ|g|²": (total / squares.sum()).item()}
    for name, weight_range in RANGES.items():
        weights = []
        for r in mini_batch:
            mask = torch.ones(1, len(r.logp))
            delta = (r.logp - r.old_logp)[None]
            advantages = r.advantage * mask
            _, f = fipo.influence_weight(delta, advantages, mask, weight_range=weight_range)
            weights.append(f[0])
        w = torch.cat(weights).double()
        cosine_to_dapo = (share * w).sum() / (share * w * w).sum().sqrt()
        row[f"if orthogonal: {name}"] = cosine_to_dapo.item()
    return row


def record_gradients(seed: int) -> None:
    """Save one row for every update of the steps in STEPS, for every learning rate."""
    os.makedirs(RUNS / "gradients", exist_ok=True)
    for lr in RATES:
        file = gradient_file(seed, lr)
        if file.exists():
            continue
        rows = []
        cfg = settings(seed=seed, steps=STEPS[-1], lr=lr)
        for step, i, policy, mini_batches in updates(cfg):
            if step not in STEPS:
                continue
            row = compare_gradients(policy, mini_batches[i], cfg)
            if i + 1 < len(mini_batches):
                here = gradient(policy, mini_batches[i], cfg)
                other = gradient(policy, mini_batches[i + 1], cfg)
                row["cosine: another mini-batch"] = cosine(here, other)
            else:
                row |= token_by_token(policy, mini_batches[i], cfg)
            rows.append(row | {"seed": seed, "step": step, "update": i + 1})
        file.write_text(json.dumps(rows))


# -------------------------------------------------------------- 4. Training with f or an oracle
EVERY = 2  # steps between two evaluations
FEW = 32  # continuations of a prefix for the oracle
JUMP = 0.2  # the ΔV at which the oracle's f reaches its upper bound
SMALL = dict(
    group_size=8,
    prompts_per_batch=16,
    prompts_per_mini_batch=2,
    max_gen_rounds=100,
    lr=BEST_LR,
    rollout_rows=256,
)
DAPO = dict(algorithm="dapo")
WIDE = dict(weight_range=[0.5, 2.0])
PLAIN = dict(lr=BEST_LR)  # 8 updates a batch
MORE = dict(prompts_per_mini_batch=1, lr=5e-5)  # 32 updates a batch; DAPO's best learning rate
LONG = dict(lr=BEST_LR, pretrain_steps=3000)  # the longer horizon of bench_compare.py
HALVES = (
    "largest",
    "random",
    "smallest",
    "moved",
    "own-largest",
    "own-smallest",
    "own-early",
)

# Part -> arm -> settings
ARMS: dict[str, dict[str, dict[str, Any]]] = {}
ARMS["matters"] = {
    "dapo": SMALL | DAPO,
    "fipo": SMALL,
    "fipo-wide": SMALL | WIDE,
    "oracle": SMALL,
    "oracle-wide": SMALL | WIDE,
    "values": SMALL,
}
ARMS["half"] = {half: SMALL | DAPO for half in HALVES}
ARMS["setting"] = {
    "dapo": PLAIN | DAPO,
    "wide": PLAIN | WIDE,
    "more-dapo": MORE | DAPO,
    "more-fipo": MORE,
    "more-wide": MORE | WIDE,
    "long-dapo": LONG | DAPO,
    "long-wide": LONG | WIDE,
    "long-more-dapo": LONG | MORE | DAPO,
    "long-more-wide": LONG | MORE | WIDE,
}
# FIPO's best arm of `setting`, and DAPO with the same settings
ARMS["final"] = {arm: ARMS["setting"][arm] for arm in ("long-more-dapo", "long-more-wide")}
ARM_SEEDS = {
    "matters": range(10),
    "half": range(10),
    "setting": range(100, 102),
    "final": SEEDS,
}


def use_token_advantages(cfg: Config, advantages: Callable[[Rollout, Tensor], Tensor]) -> None:
    """Make fipo.py train with advantages(response, ΔV), [T]. ΔV is estimated at every step."""
    score_old_logp = fipo.score_old_logp
    collate = fipo.collate

    def score_and_estimate(policy: Policy, mini_batches: list[list[Rollout]]) -> dict:
        rollouts = [r for mini_batch in mini_batches for r in mini_batch]
        purpose = (cfg.seed, "oracle")
        V = values(policy, rollouts, FEW, cfg, purpose, sure=0.95)
        for r, V_of_r in zip(rollouts, V):
            r.advantages = advantages(r, V_of_r.diff())
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

    The half has the largest F, the smallest, the largest |Δlog p| ("moved"), or is random. With
    "own-", it is half of each response, where "early" takes the first tokens. At the first update
    F is 0 but for rounding, so there the half is random.
    """
    influence_weight = fipo.influence_weight
    criterion = which.removeprefix("own-")

    def select_half(
        delta: Tensor, advantages: Tensor, mask: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        F, _ = influence_weight(delta, advantages, mask, **options)
        if criterion == "random" or delta.abs().max() <= 1e-3:
            draw = fipo.derive_seed(seed, mask.sum().item(), delta.sum().item())
            order = torch.rand(F.shape, generator=torch.Generator().manual_seed(draw))
        elif criterion == "largest":
            order = F
        elif criterion == "smallest":
            order = -F
        elif criterion == "moved":
            order = delta.abs()
        else:
            order = -mask.cumsum(1).float()
        order = order.masked_fill(~mask, -math.inf)
        if not which.startswith("own-"):
            order = order.reshape(1, -1)  # rank all tokens together
        rank = order.argsort(1, descending=True).argsort(1)
        tokens = order.isfinite().sum(1, keepdim=True)
        chosen = rank < tokens // 2
        return F, 2.0 * chosen.view_as(F)  # twice, so that the loss is still a mean over tokens

    fipo.influence_weight = select_half


def train_arm(part: str, arm: str, seed: int) -> None:
    """Do one run, in a process of its own, since it may replace functions of fipo.py."""
    out = RUNS / part / f"{arm}-{seed}"
    if (out / "done").exists():
        return
    changes = ARMS[part][arm]
    if "pretrain_steps" in changes:
        bench_compare.lengthen_the_task()
    cfg = settings(
        **changes,
        seed=seed,
        out=str(out),
        resume=True,
        eval_every=EVERY,
        save_every=8,
        log_samples=0,
    )
    low, high = cfg.weight_range
    dapo = replace(cfg, weight_range=list(DAPO_RANGE))
    if arm.startswith("oracle"):
        use_token_advantages(cfg, lambda r, dV: r.advantage * oracle_weight(r, dV, low, high))
        cfg = dapo  # the oracle's f is part of these advantages
    elif arm == "values":
        use_token_advantages(cfg, lambda r, dV: dV)  # VinePPO's, without a length penalty
        cfg = dapo
    elif part == "half":
        learn_from_half(arm, seed)
    try:
        fipo.train(cfg)
    except fipo.NoSignal:
        last = train_small.read_jsonl(out / "metrics.jsonl")[-1]
        if last["accuracy"] < 0.9:
            raise
    (out / "done").touch()
    shutil.rmtree(out / "checkpoints")


def make_long_task(pretrain_steps: int) -> None:
    bench_compare.lengthen_the_task()
    settings(pretrain_steps)


def run_in_processes(job: Callable[[Any], None], arguments: Iterable[Any]) -> None:
    """Call job(argument) for every argument, two at a time, each in a new process."""
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        # The list raises the first error, and then nothing more is started.
        list(pool.map(job, arguments))


# ----------------------------------------------------------------------------------- 5. The report
class Spread(NamedTuple):
    mean: float
    half: float | None  # of the 95 % interval; None for one seed
    n: int


Table = dict[Any, dict[str, Spread]]


def over_seeds(rows: pd.DataFrame) -> dict[str, Spread]:
    """The spread of every column. A seed without a value is left out."""
    result = {}
    for name, column in rows.items():
        numbers = column.dropna().tolist()
        if numbers:
            result[name] = Spread(*bench_compare.interval(numbers), len(numbers))
    return result


def read_gradients(lr: float) -> pd.DataFrame:
    """The rows of all seeds. FIPO's are blank at the first update of a step, where f is 1."""
    rows = pd.concat([pd.read_json(gradient_file(seed, lr)) for seed in SEEDS], ignore_index=True)
    is_last = rows["cosine: another mini-batch"].isna()
    for name in RANGES:
        for column in (f"cosine: {name}", f"norm: {name}"):
            rows[column] = rows[column].where(rows["update"] > 1)
        rows[f"last cosine: {name}"] = rows[f"cosine: {name}"].where(is_last)
    return rows


def against_the_bound(rows: pd.DataFrame, name: str) -> Numbers:
    """The least cosine of all updates, and the share of them below the bound."""
    cosines = rows[f"cosine: {name}"].dropna()
    bound = cosine_bound(*RANGES[name])
    below = (cosines < bound).mean()
    return {"bound": bound, "least": cosines.min(), "below": below, "n": len(cosines)}


def read_run(folder: Path) -> dict[str, Any]:
    """Area under the accuracy curve, final accuracy and length, and the curve of a run."""
    steps = json.loads((folder / "config.json").read_text())["steps"]
    lines = train_small.read_jsonl(folder / "metrics.jsonl")
    evaluations = [line for line in lines if "eval/accuracy" in line]
    # A run that ended early, because all was right, stays where it was.
    last = evaluations[-1]
    for step in range(last["step"] + EVERY, steps + 1, EVERY):
        evaluations.append(last | {"step": step})
    arm, seed = folder.name.rsplit("-", 1)
    row = {"part": folder.parent.name, "arm": arm, "seed": int(seed)}
    row |= bench_compare.summary(evaluations)
    row["curve"] = " ".join(f"{line['eval/accuracy']:.4f}" for line in evaluations)
    return row


def rivals(part: str, arm: str) -> dict[str, str]:
    """The arms that an arm is compared with."""
    if part == "matters":
        fipo_arm = arm.replace("oracle", "fipo")
        return {"DAPO": "matters: dapo", "FIPO": f"matters: {fipo_arm}"}
    if part == "half":
        smallest = arm.replace("largest", "smallest")
        return {
            "DAPO": "matters: dapo",
            "random": "half: random",
            "smallest": f"half: {smallest}",
        }
    kind = arm.removesuffix(arm.split("-")[-1])  # "", "more-", "long-" or "long-more-"
    return {"DAPO": f"{part}: {kind}dapo"}


def against_rivals(runs: pd.DataFrame) -> Table:
    """Every arm over seeds, and its differences to its rivals, paired by seed."""
    arms = {}
    for (part, arm), rows in runs.groupby(["part", "arm"], sort=False):
        arms[f"{part}: {arm}"] = rows.set_index("seed")
    result = {}
    for name, rows in arms.items():
        numbers = rows[["area", "final", "length"]]
        columns = [numbers]
        for label, rival in rivals(*name.split(": ")).items():
            if rival in arms and rival != name:
                difference = numbers - arms[rival][numbers.columns]
                columns.append(difference.add_suffix(f" − {label}"))
        result[name] = over_seeds(pd.concat(columns, axis=1))
    return result


def report() -> None:
    """Write the results as tables and as a picture."""
    truth = {}
    for step in STEPS:
        numbers = [find(seed, step) for seed in SEEDS]
        truth[step] = over_seeds(pd.DataFrame(numbers))
    gradients = {}
    bounds = {}
    for lr in RATES:
        rows = read_gradients(lr)
        by_step = rows.groupby(["seed", "step"]).mean()
        by_seed = by_step.groupby("seed").mean()
        gradients[f"lr {lr:g}"] = over_seeds(by_seed.drop(columns="update"))
        for name in RANGES:
            bounds[f"lr {lr:g}, f in {name}"] = against_the_bound(rows, name)
    folders = sorted(done.parent for done in RUNS.glob("*/*/done"))
    runs = pd.DataFrame([read_run(folder) for folder in folders])

    results = {"truth": truth, "gradients": gradients, "bounds": bounds}
    results["runs"] = against_rivals(runs)
    out = ROOT / "assets" / "results"
    (out / "credit.json").write_text(json.dumps(results, indent=1) + "\n")
    runs.to_csv(out / "credit_runs.csv", index=False)
    draw(truth, results["runs"], rows, ROOT / "assets" / "credit.png")


ARM_LABELS = {
    "matters: fipo": "FIPO, f in [1, 1.2]",
    "matters: fipo-wide": "FIPO, f in [0.5, 2]",
    "matters: oracle": "oracle, f in [1, 1.2]",
    "matters: oracle-wide": "oracle, f in [0.5, 2]",
    "matters: values": "ΔV as the advantage",
    "half: largest": "half: largest F",
    "half: random": "half: random",
    "half: smallest": "half: smallest F",
    "half: moved": "half: largest |Δlog p|",
    "half: own-largest": "half of each response: largest F",
    "half: own-smallest": "half of each response: smallest F",
    "half: own-early": "half of each response: the first",
    "final: long-more-wide": "FIPO, the setting chosen",
}


def draw_finders(axes: plt.Axes, truth: Table) -> None:
    places = np.arange(len(FINDERS))
    for j, (step, numbers) in enumerate(truth.items()):
        spreads = [numbers[f"AUC, at the update, {name}"] for name in FINDERS]
        axes.errorbar(
            [spread.mean for spread in spreads],
            places + (j - 1.5) * 0.17,
            xerr=[spread.half or 0 for spread in spreads],
            fmt="o",
            markersize=4,
            label=f"step {step}",
        )
    axes.set(
        title="Which scores find the tokens that decide?",
        xlabel="AUC: 0.5 is guessing, 1 finds them all",
        xlim=(0.1, 1.02),
        yticks=places,
        yticklabels=FINDERS.values(),
    )
    axes.axvline(0.5, color="grey")
    axes.invert_yaxis()
    axes.legend(fontsize="small", loc="upper left")


def draw_leads(axes: plt.Axes, truth: Table) -> None:
    means = pd.DataFrame()  # one row for each name, one column for each step
    for step, numbers in truth.items():
        means[step] = pd.Series({name: spread.mean for name, spread in numbers.items()})
    for i, score in enumerate(LEADERS):
        names = [f"{d} before, at the update, {score}" for d in range(LEAD + 1)]
        curves = means.reindex(names)
        label = FINDERS.get(score, score)
        axes.plot(curves.to_numpy(), color=f"C{i}", linewidth=0.7, alpha=0.4)
        axes.plot(curves.mean(axis=1).to_numpy(), color=f"C{i}", marker=".", label=label)
    axes.set(
        title="Which scores find what leads to them?",
        xlabel="tokens before the next one that decides",
        ylabel="AUC (bold: mean of the steps)",
        ylim=(0, 1.02),
    )
    axes.axhline(0.5, color="grey")
    axes.legend(fontsize="small", loc="lower right")


def draw_gains(axes: plt.Axes, runs: Table) -> None:
    labels = []
    for arm, label in ARM_LABELS.items():
        gain = runs.get(arm, {}).get("area − DAPO")
        if gain:
            width = 100 * (gain.half or 0)
            axes.errorbar(100 * gain.mean, len(labels), xerr=width, fmt="o", color="C0")
            labels.append(f"{label} ({gain.n})")
    axes.set(
        title="Does it change the accuracy?",
        xlabel="area under held-out accuracy − DAPO's, points (seeds)",
        yticks=range(len(labels)),
        yticklabels=labels,
    )
    axes.axvline(0, color="grey")
    axes.invert_yaxis()


def degrees(cosines: Any) -> Any:
    return np.degrees(np.arccos(np.minimum(cosines, 1)))


def draw_angles(axes: plt.Axes, rows: pd.DataFrame) -> None:
    for i, name in enumerate(("another mini-batch", *RANGES)):
        angles = degrees(rows[f"cosine: {name}"].dropna())
        by_update = angles.groupby(rows["update"]).agg(["mean", "min", "max"])
        label = f"FIPO, {name}" if name in RANGES else "DAPO on another mini-batch"
        axes.plot(by_update["mean"], marker=".", color=f"C{i}", label=label)
        axes.fill_between(
            by_update.index,
            by_update["min"],
            by_update["max"],
            color=f"C{i}",
            linewidth=0,
            alpha=0.15,
        )
        if name in RANGES and name != "unclipped":
            bound = cosine_bound(*RANGES[name])
            axes.axhline(degrees(bound), color=f"C{i}", linestyle="--")
    axes.set(
        title="How far is it to DAPO's gradient?",
        xlabel="update on one batch of rollouts",
        ylabel="degrees (dashed: the bound)",
        yscale="log",
        ylim=(0.3, 200),
    )
    axes.legend(fontsize="small", loc="lower right")


def draw(truth: Table, runs: Table, gradients: pd.DataFrame, file: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    draw_finders(panels[0, 0], truth)
    draw_leads(panels[0, 1], truth)
    draw_gains(panels[1, 0], runs)
    draw_angles(panels[1, 1], gradients)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


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
            if part in ("setting", "final"):
                run_in_processes(make_long_task, [LONG["pretrain_steps"]])
            for arm in ARMS[part]:
                run_in_processes(partial(train_arm, part, arm), ARM_SEEDS[part])


if __name__ == "__main__":
    main(sys.argv[1:])

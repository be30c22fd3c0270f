"""Does f find the tokens that matter, and what can it do about them? FIPO's weight held against the truth.

On the embedded task (train_small.py) the value of every prefix can be had: by sampling what follows, many times. So
there is a truth about which token decided a response, and f can be compared with it.

python scripts/credit.py truth       # 1  the value of every prefix of 128 responses, at steps 1, 4, 10, 20
python scripts/credit.py finds       # 2  who finds the key tokens: Δlog p, F, f, the past, entropy, −log π_old
python scripts/credit.py gradients   # 3  how far f turns DAPO's gradient, beside the bound and the noise
python scripts/credit.py tune        #    DAPO's learning rates for parts 4 to 6, on seeds to choose by
python scripts/credit.py matters     # 4  training with f, and with an oracle that estimates the values
python scripts/credit.py half        # 5  training on half of the tokens: with the largest f, the smallest, random ones
python scripts/credit.py setting     # 6  settings in which f has more to say: a choice, on the same seeds
python scripts/credit.py final       #    … and the one chosen, on five others
python scripts/credit.py report      # assets/results/credit.json and credit_runs.csv, assets/credit.png

A part does what is not done yet, in runs/credit, two processes at a time, a thread each; started again, it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # of all processes

import datasets
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bench_compare
import fipo
import train_small
from bench_compare import interval
from fipo import Rollout

ROOT = Path(__file__).parents[1]
RUNS = Path(os.environ.get("CREDIT_RUNS", ROOT / "runs" / "credit"))
SEEDS, STEPS, CONTINUATIONS = range(5), (1, 4, 10, 20), 64  # of parts 1 to 3
BEST_LR = float(bench_compare.BEST_LR)  # DAPO's, by `tune` too
RATES = (1e-4, BEST_LR)  # of part 3: the embedded run's is the first
TAUS = (1, 8, 32, 128)
RANGES = {"[1, 1.2]": (1.0, 1.2), "[0.8, 1.2]": (0.8, 1.2), "[0.5, 2]": (0.5, 2.0),
          "unclipped": (0.0, math.inf)}  # fmt: skip
LEAD, NONE = 16, 10**6  # tokens before a key token that are looked at; no key token follows
LEADERS = ("|Δ|", "|F|", "|F − Δ|", "|past − Δ|", "f", "future of −log π_old")


def settings(**changed: Any) -> fipo.Config:
    """The embedded run with what is changed. Its base model and its problems are made if they are not there yet."""
    steps = changed.pop("pretrain_steps", 1000)
    defaults = train_small.embedded_settings(RUNS / f"task-{steps}", steps)
    if not (Path(defaults["model"]).is_dir() and Path(defaults["eval_data"]).exists()):
        train_small.make_embedded(defaults, steps)
    return fipo.resolve(train_small.configure([], defaults | {"out": str(RUNS)} | changed))


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:  # under its name, or not at all
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file.with_suffix(".partial"))
    file.with_suffix(".partial").rename(file)


def write_json(file: Path, rows: Any) -> None:
    write_whole(file, lambda path: path.write_text(json.dumps(rows, indent=1) + "\n"))


def truth_file(seed: int, step: int) -> Path:
    return RUNS / "truth" / f"{seed}-{step}.pt"


def gradient_file(seed: int, lr: float) -> Path:
    return RUNS / "gradients" / f"{lr:g}-{seed}.json"


def arm_folder(part: str, arm: str, seed: int) -> Path:
    return RUNS / part / f"{arm}-{seed}"


def updates(cfg: fipo.Config) -> Iterator[tuple[int, int, fipo.HFSampler, list[list[Rollout]]]]:
    """fipo.train without evaluation and logs, one process: halts before every update, so that it can be looked at.
    Yields step, number of the update, sampler (with the policy) and the mini-batches of the step."""
    policy = fipo.Policy(cfg.model, cfg)
    problems, sampler, cursor = fipo.encode_problems(cfg.data, policy, cfg), fipo.HFSampler(policy), 0
    for step in range(1, cfg.steps + 1):
        groups, _, cursor = fipo.collect_rollouts(sampler, problems, cfg, step, cursor)
        fipo.assign_rewards(groups, cfg)
        fipo.assign_advantages(groups)
        mini_batches = fipo.split_mini_batches(groups, cfg, step)
        fipo.score_old_logp(policy, mini_batches)
        for i, mini_batch in enumerate(mini_batches):
            yield step, i, sampler, mini_batches
            fipo.add_gradients(policy, mini_batch, cfg)
            policy.step(cfg.lr * min(1.0, step / max(cfg.warmup_steps, 1)))


# -------------------------------------------------------------------------------------------------- 1. The truth
def values(sampler: fipo.HFSampler, rollouts: list[Rollout], n: int, cfg: fipo.Config, what_for: Any,
           sure: float = math.inf) -> list[Tensor]:  # fmt: skip
    """V of every prefix of every response, [T + 1] each: the share of `n` continuations under the sampler's policy that
    are right. V[0] is the prompt's, V[T] the outcome: nothing follows a whole response. ΔV = V.diff(), [T], belongs to
    the tokens, and its sum is outcome − V[0]. A prefix that responses share is continued once for all of them.

    To save time, a token sampled with a probability of `sure` or more keeps the value before it: V is a mean over what
    the token could have been, so |ΔV| ≤ 1 − π(token). What that leaves out falls to the next token that is not sure."""
    asked_at = [[t for t in range(len(r.response_ids)) if t == 0 or math.exp(r.sampler_logp[t - 1]) < sure]
                for r in rollouts]  # fmt: skip
    asked = {(*r.problem.prompt_ids, *r.response_ids[:t]): r.problem for r, at in zip(rollouts, asked_at) for t in at}
    ordered, size, V = sorted(asked, key=lambda ids: (len(ids), ids)), max(1, cfg.rollout_rows // n), {}
    for i in fipo.progress(range(0, len(ordered), size), desc="values"):
        chunk = ordered[i : i + size]  # of like lengths
        starts = [len(asked[ids].prompt_ids) for ids in chunk]
        seeds = [fipo.derive_seed(what_for, ids[:start], ids[start:]) for ids, start in zip(chunk, starts)]
        room = max(start + cfg.max_response - len(ids) for ids, start in zip(chunk, starts))
        prompts = [replace(asked[ids], prompt_ids=list(ids)) for ids in chunk]
        groups = sampler.generate(prompts, seeds, n, room, cfg.temperature, 1.0)
        for ids, start, group in zip(chunk, starts, groups):
            responses = [[*ids, *r.response_ids][start : start + cfg.max_response] for r in group]
            texts = [sampler.policy.tokenizer.decode(response, skip_special_tokens=True) for response in responses]
            V[ids] = fmean(fipo.VERIFY[cfg.verifier](text, asked[ids].answer) for text in texts)
    found = []
    for r, at in zip(rollouts, asked_at):
        V_t: list[float] = []
        for t in range(len(r.response_ids)):
            V_t.append(V[*r.problem.prompt_ids, *r.response_ids[:t]] if t in at else V_t[-1])
        found.append(torch.tensor([*V_t, float(r.correct)]))
    return found


def z_score(before: Tensor, after: Tensor, n: int) -> Tensor:
    """How many standard errors two shares of n trials are apart (Agresti and Caffo: one success and one failure are
    added to each, or 0 of n and n of n would have no error)."""
    p, q = ((x * n + 1) / (n + 2) for x in (before, after))
    return (q - p) / ((p * (1 - p) + q * (1 - q)) / (n + 2)).sqrt()


KEY = 3.29  # standard errors; by chance one token in a thousand is as far off


def record_truth(seed: int) -> None:
    """Part 1 for one seed: for each step a file with what the loss saw of the last two mini-batches, and the values."""
    files, kept = {step: truth_file(seed, step) for step in STEPS}, None
    if all(file.exists() for file in files.values()):
        return
    cfg = settings(seed=seed, steps=STEPS[-1] + 1, rollout_rows=256)
    for step, i, sampler, mini_batches in updates(cfg):
        if i == 0 and kept:  # that step is over: log π_θ at the update, and after all updates
            file, rollouts, rows = kept
            rows |= {"logp": [r.logp for r in rollouts], "after": score(sampler.policy, rollouts)[0]}
            write_whole(file, partial(torch.save, rows))
            kept = None
        if i == 0 and step in files and not files[step].exists():
            rollouts = mini_batches[-2] + mini_batches[-1]
            kept = files[step], rollouts, {
                "ids": [list(r.response_ids) for r in rollouts], "advantage": [r.advantage for r in rollouts],
                "old_logp": [r.old_logp for r in rollouts], "entropy": score(sampler.policy, rollouts)[1],
                "V": [values(sampler, rollouts, CONTINUATIONS, cfg, (seed, "value", again)) for again in (0, 1)],
            }  # fmt: skip


@torch.no_grad()
def score(policy: fipo.Policy, rollouts: list[Rollout]) -> tuple[list[Tensor], list[Tensor]]:
    """log π and entropy of the responses' tokens, [T] each."""
    policy.model.eval()
    input_ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    return tuple([row[where] for row, where in zip(x, mask)] for x in policy.logprobs(input_ids, mask))


# -------------------------------------------------------------------------------------------- 2. Who finds it
def auc(score: Tensor, positive: Tensor) -> float:
    """The chance that a positive has a higher score than another: 0.5 is guessing. Ties count half. [N], [N] bool."""
    hits, others = score[positive].double(), score[~positive].double().sort().values
    below = [torch.searchsorted(others, hits, right=right).double() for right in (False, True)]
    return (sum(below) / 2 / len(others)).mean().item()  # NaN where one side is empty


def auc_within(score: Tensor, positive: Tensor, stratum: Tensor) -> float:
    """The same, but a positive is compared with others of its own stratum only. [N], [N] bool, [N]."""
    wins = pairs = 0.0
    for value in stratum[positive].unique():
        here = stratum == value
        n = positive[here].sum().item() * (~positive[here]).sum().item()
        wins, pairs = wins + (n * auc(score[here], positive[here]) if n else 0.0), pairs + n
    return wins / pairs if pairs else math.nan


def future_sum(x: Tensor, tau: float) -> Tensor:  # F's sum over one response, of anything: [T] -> [T]
    return fipo.future_kl(x[None], torch.ones(1, len(x)), tau)[0]


def weigh(delta: Tensor, advantage: float, **how: Any) -> tuple[Tensor, Tensor]:  # F and f of one response, [T] each
    one = torch.ones(1, len(delta), dtype=torch.bool)
    F, f = fipo.influence_weight(delta[None], advantage * one, one, **how)
    return F[0], f[0]


def scores(delta: Tensor, advantage: float, tau: float = 32.0) -> dict[str, Tensor]:
    """What a loss can know of each token of a response from its Δlog p, [T] each."""
    F, f = weigh(delta, advantage, tau=tau)
    _, wide = weigh(delta, advantage, tau=tau, weight_range=RANGES["[0.8, 1.2]"])
    past = future_sum(delta.flip(0), tau).flip(0)
    return {"Δ": delta, "|Δ|": delta.abs(), "F": F, "|F|": F.abs(), "|F − Δ|": (F - delta).abs(), "f": f,
            "|log f|": wide.log().abs(), "|past − Δ|": (past - delta).abs()}  # fmt: skip


FINDERS = {"|Δ|": "|Δlog p|", "|F|": "|F|", "|F − Δ|": "|F| without Δ itself", "|past − Δ|": "|the past| without Δ",
           "F": "F", "f": "f in [1, 1.2]", "|log f|": "|log f|, f in [0.8, 1.2]", "entropy": "entropy",
           "−log π_old": "−log π_old", "left": "tokens left"}  # fmt: skip


def until_next(key: Tensor) -> Tensor:
    """How many tokens before the next key token each is, 0 for itself; more than LEAD if none follows. [T] -> [T]."""
    ahead, until = torch.zeros(len(key)), NONE
    for t in reversed(range(len(key))):
        until = 0 if key[t] else until + 1
        ahead[t] = until
    return ahead


def read_truth(seed: int, step: int, when: str = "logp", tau: float = 32.0) -> dict[str, Tensor]:
    """All tokens of the responses, [N] each: scores, ΔV by all continuations and by each half of them, key or not, and
    how many tokens before the next key token. `when`: Δ as the loss saw it ("logp"), or after the step ("after")."""
    rows, n = torch.load(truth_file(seed, step), weights_only=True), CONTINUATIONS
    tokens: list[dict[str, Tensor]] = []
    for i, (first, second) in enumerate(zip(*rows["V"])):
        V, T, A = (first + second) / 2, len(rows["ids"][i]), rows["advantage"][i]
        is_key = [z_score(v[:-1], v[1:], m).abs() > KEY for v, m in ((V, 2 * n), (first, n), (second, n))]
        unsure = -rows["old_logp"][i]
        future = future_sum(unsure, tau) - unsure
        known = {"A": torch.full((T,), A), "entropy": rows["entropy"][i], "−log π_old": unsure,
                 "future of −log π_old": future, "left": torch.arange(T, 0, -1.0)}  # fmt: skip
        same = z_score(first[:-1], second[:-1], n).abs() > KEY  # one prefix twice: what differs is noise
        truth = {"ΔV": V.diff(), "ΔV 1": first.diff(), "ΔV 2": second.diff(), "key": is_key[0], "key 1": is_key[1],
                 "key 2": is_key[2], "ahead": until_next(is_key[0]), "false": same}  # fmt: skip
        tokens.append(scores(rows[when][i] - rows["old_logp"][i], A, tau) | known | truth)
    return {name: torch.cat([each[name] for each in tokens]) for name in tokens[0]}


def unsure_tokens(t: dict[str, Tensor]) -> Tensor:  # others cannot be key by more than 0.1
    return t["−log π_old"] > -math.log(0.9)


def describe(t: dict[str, Tensor]) -> dict[str, float]:
    """What the key tokens are like, how sure that is, and f there."""
    key, bad, dV, unsure = t["key"], t["ΔV"] < 0, t["ΔV"], unsure_tokens(t)
    lead = (t["ahead"] > 0) & (t["ahead"] <= 8)
    mean = {"key tokens, share": key, "false alarms, share": t["false"], "key tokens that are bad": bad[key],
            "key tokens that the other half finds, too": t["key 2"][t["key 1"]],
            "f at good key tokens": t["f"][key & ~bad], "f at bad key tokens": t["f"][key & bad],
            "f elsewhere": t["f"][~key], "tokens with A > 0": t["A"] > 0,
            "of the half with the largest F": t["A"][t["F"] > t["F"].median()] > 0,
            "unsure tokens, share": unsure, "sure ones of the 8 before a key token": ~unsure[lead]}  # fmt: skip
    return {name: x.float().mean().item() for name, x in mean.items()} | {
        "tokens": len(key), "key tokens": key.sum().item(), "ΔV, rms": dV.square().mean().sqrt().item(),
        "noise of ΔV, rms": (t["ΔV 1"] - t["ΔV 2"]).square().mean().sqrt().item() / 2,
        "correlation of two halves": torch.corrcoef(torch.stack([t["ΔV 1"], t["ΔV 2"]]))[0, 1].item(),
        "smallest jump of a key token": min(dV[key].abs().tolist(), default=math.nan)}  # fmt: skip


def rank_tokens(t: dict[str, Tensor], name: str) -> dict[str, float]:
    """How well every score tells key tokens from the rest, and the good ones from the bad."""
    key, dV, unsure, found = t["key"], t["ΔV"], unsure_tokens(t), {}
    for which in FINDERS:
        found[f"AUC, {name}, {which}"] = auc(t[which], key)
        found[f"AUC among unsure tokens, {name}, {which}"] = auc(t[which][unsure], key[unsure])
        found[f"AUC of |ΔV| > 0.2, {name}, {which}"] = auc(t[which], dV.abs() > 0.2)
    return found | {f"good from bad, {name}, {which}": auc(t[which][key], dV[key] >= 0) for which in ("Δ", "F", "A")}


def rank_leads(t: dict[str, Tensor], name: str) -> dict[str, float]:
    """How well scores tell the tokens d before a key token from those with none here or among the next LEAD, and as
    many tokens left: F sums over them."""
    found = {}
    for d in range(LEAD + 1):
        there = t["ahead"] == d
        some = there | (t["ahead"] > LEAD)
        for which in LEADERS:
            found[f"{d} before, {name}, {which}"] = auc_within(t[which][some], there[some], t["left"][some])
    return found


def find_at(seed: int, step: int) -> dict[str, float]:
    """Part 2 for one seed and step: a flat table of numbers. NaN where there is nothing to tell."""
    found = describe(read_truth(seed, step))
    for when, name in (("logp", "at the update"), ("after", "after the step")):
        t = read_truth(seed, step, when)
        found |= rank_tokens(t, name) | rank_leads(t, name)
        for tau in TAUS:
            at = read_truth(seed, step, when, tau)
            found |= {f"AUC, {name}, {which}, τ = {tau}": auc(at[which], at["key"]) for which in ("|F|", "f")}
    return found


# ---------------------------------------------------------------------------------- 3. What f does with it
def cosine_bound(low: float, high: float) -> float:
    """Weights w in [low, high] on orthogonal token gradients g_t turn their sum by no more than this cosine.

    With p_t = |g_t|² / Σ|g|²: cos = E[w] / √E[w²], and (w − a)(b − w) ≥ 0 gives E[w²] ≤ (a + b) E[w] − ab. Then
    cos² ≥ m² / ((a + b) m − ab) with m = E[w], smallest at m = 2ab / (a + b): cos ≥ 2√(ab) / (a + b) (Kantorovich).
    Where token gradients cancel, their sum is small beside its parts, and weights may turn it by any angle."""
    return 2 * math.sqrt(low * high) / (low + high) if math.isfinite(high) else 0.0


def gradient(policy: fipo.Policy, mini_batch: list[Rollout], cfg: fipo.Config, bounds: tuple[float, float]) -> Tensor:
    """The loss's gradient with f in `bounds`, as one vector. Weights and optimiser stay."""
    fipo.add_gradients(policy, mini_batch, replace(cfg, weight_range=list(bounds)))
    vector = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.optimizer.zero_grad()
    return vector


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return (a @ b / (a.norm() * b.norm())).item()


def squared_gradients(policy: fipo.Policy, r: Rollout, cfg: fipo.Config) -> Tensor:
    """|g_t|² of every token's own gradient of DAPO's loss, [T], with 1 for the common denominator."""
    input_ids, mask, old_logp, advantages = fipo.collate([r], policy.device)
    logp, _ = policy.logprobs(input_ids, mask)
    how = dict(weight_range=(1.0, 1.0), clip_low=cfg.clip_low, clip_high=cfg.clip_high, num_tokens=1)
    loss, _ = fipo.fipo_loss(logp, old_logp, advantages, mask, **how)
    (by_logp,) = torch.autograd.grad(loss, logp, retain_graph=True)
    weights, squares = list(policy.model.parameters()), []
    for at in mask[0].nonzero()[:, 0].tolist():  # 0 where the ratio is clipped
        parts = torch.autograd.grad(logp[0, at] * by_logp[0, at], weights, retain_graph=True)
        squares.append(sum(part.square().sum().item() for part in parts))
    return torch.tensor(squares)


def token_by_token(policy: fipo.Policy, mini_batch: list[Rollout], cfg: fipo.Config, total: Tensor) -> dict[str, float]:
    """How far DAPO's token gradients g_t cancel (|Σg|² / Σ|g|²: 1 if orthogonal), what share of Σ|g|² the top tenth of
    the tokens has, and what f would do if they were orthogonal. `total`: the gradient of their mean."""
    squares = torch.cat([squared_gradients(policy, r, cfg) for r in mini_batch]).double()
    share = squares / squares.sum()
    row = {"|Σg|² / Σ|g|²": (total.double().square().sum() * len(squares) ** 2 / squares.sum()).item(),
           "share of the top tenth": share.sort(descending=True).values[: len(share) // 10].sum().item()}  # fmt: skip
    for name, bounds in RANGES.items():
        f = torch.cat([weigh(r.logp - r.old_logp, r.advantage, weight_range=bounds)[1] for r in mini_batch]).double()
        row[f"if orthogonal: {name}"] = ((share * f).sum() / (share * f * f).sum().sqrt()).item()
    return row


def agreement(vectors: list[Tensor]) -> float:
    """The mean cosine between two of the vectors."""
    unit, n = torch.stack([v / v.norm() for v in vectors]), len(vectors)
    return (unit.sum(0).square().sum().item() - n) / (n * (n - 1))


def compare_gradients(policy: fipo.Policy, mini_batch: list[Rollout], cfg: fipo.Config) -> tuple[dict, dict]:
    """FIPO's gradient against DAPO's on the same mini-batch and weights, for each range of f: cosine and ratio of the
    norms; and as vectors DAPO's gradient and FIPO's turn, the part of its direction that is not DAPO's."""
    dapo, row = gradient(policy, mini_batch, cfg, (1.0, 1.0)), {}
    vectors = {"DAPO": dapo}
    for name, bounds in RANGES.items():
        g = gradient(policy, mini_batch, cfg, bounds)
        row |= {f"cosine: {name}": cosine(g, dapo), f"norm: {name}": (g.norm() / dapo.norm()).item()}
        vectors[name] = g / g.norm() - row[f"cosine: {name}"] * dapo / dapo.norm()
    return row, vectors


def record_gradients(seed: int, lr: float) -> None:
    """Part 3 for one seed and learning rate: a JSON file of rows, one for each update."""
    file, rows = gradient_file(seed, lr), []
    if file.exists():
        return
    cfg = settings(seed=seed, steps=STEPS[-1], lr=lr)
    seen: list[dict[str, Tensor]] = []  # the vectors of a step's updates
    for step, i, sampler, mini_batches in updates(cfg):
        if step in STEPS:
            row, vectors = compare_gradients(sampler.policy, mini_batches[i], cfg)
            seen.append(vectors)
            if i + 1 < len(mini_batches):  # the next mini-batch has taught nothing yet either
                other = gradient(sampler.policy, mini_batches[i + 1], cfg, (1.0, 1.0))
                row["cosine: another mini-batch"] = cosine(vectors["DAPO"], other)
            else:  # at a first update FIPO does not turn
                row |= {f"agreement: {name}": agreement([each[name] for each in seen[1:]]) for name in vectors}
                row |= token_by_token(sampler.policy, mini_batches[i], cfg, vectors["DAPO"])
                seen.clear()
            rows.append({"lr": lr, "seed": seed, "step": step, "update": i + 1} | row)
    write_json(file, rows)


# -------------------------------------------------------------------------------------- 4. – 6. Training with it
SMALL = dict(group_size=8, prompts_per_batch=16, prompts_per_mini_batch=2, max_gen_rounds=100, lr=BEST_LR,
             rollout_rows=256)  # fmt: skip
FEW, SURE = 32, 0.95  # the oracle's continuations of a prefix; and the tokens it takes to move the value by nothing
JUMP = 0.2  # a move of the value by so much brings the oracle's f to its upper bound
WIDE = dict(weight_range=[0.5, 2.0])
PLAIN, MORE = dict(lr=BEST_LR), dict(prompts_per_mini_batch=1, lr=5e-5)  # 8 updates a batch, and 32
LONG = dict(lr=BEST_LR, pretrain_steps=3000)  # the longer horizon of scripts/bench_compare.py
TUNING, ARM_SEEDS = range(100, 102), range(10)  # seeds to choose by; of parts 4 and 5
EVERY = 2  # steps between two evaluations

# Part -> arm -> what it changes in fipo.py (see train_arm), settings, seeds
ARMS: dict[str, dict[str, tuple[str, dict[str, Any], Any]]] = {
    "tune": {f"{kind}dapo-{lr:g}": ("", how | dict(algorithm="dapo", lr=lr), TUNING)
             for kind, how, rates in (("", SMALL, (1e-4, 2e-4, 4e-4)), ("more-", MORE, (2.5e-5, 5e-5, 1e-4, 2e-4)))
             for lr in rates},
    "matters": {
        "dapo": ("", SMALL | dict(algorithm="dapo"), ARM_SEEDS),
        "fipo": ("", SMALL, ARM_SEEDS),
        "fipo-wide": ("", SMALL | WIDE, ARM_SEEDS),
        "oracle": ("oracle", SMALL, ARM_SEEDS),
        "oracle-wide": ("oracle", SMALL | WIDE, ARM_SEEDS),
        "values": ("values", SMALL, ARM_SEEDS),
    },
    "half": {name: (name, SMALL | dict(algorithm="dapo"), ARM_SEEDS)
             for name in ("largest", "random", "smallest", "moved", "own-largest", "own-smallest", "own-early")},
    "setting": {f"{kind}{name}": ("", how | change, TUNING)
                for kind, how in {"": PLAIN, "more-": MORE, "long-": LONG, "long-more-": LONG | MORE}.items()
                for name, change in {"dapo": dict(algorithm="dapo"), "wide": WIDE}.items()}
               | {"more-fipo": ("", MORE, TUNING)},
}  # fmt: skip
CHOSEN = "long-more-wide"  # where FIPO's area was least below DAPO's in `setting`, on the seeds to choose by
ARMS["final"] = {arm: (*ARMS["setting"][arm][:2], SEEDS) for arm in (CHOSEN, CHOSEN.replace("wide", "dapo"))}


def know_values(cfg: fipo.Config, weigh: Callable[[Rollout, Tensor], Tensor]) -> None:
    """Let fipo.py train with the advantages weigh(response, ΔV), [T]. ΔV is estimated at every step, at each
    eighth once more: `oracle/correlation` in metrics.jsonl is that of both."""
    score_old_logp, collate, calls = fipo.score_old_logp, fipo.collate, itertools.count()

    def value(policy: fipo.Policy, mini_batches: list[list[Rollout]]) -> dict[str, float]:
        rollouts = [r for mini_batch in mini_batches for r in mini_batch]
        estimate = partial(values, fipo.HFSampler(policy), rollouts, FEW, cfg, sure=SURE)
        moves = [V.diff() for V in estimate((cfg.seed, "oracle"))]
        for r, delta_V in zip(rollouts, moves):
            r.advantages = weigh(r, delta_V)
        metrics = score_old_logp(policy, mini_batches)
        if next(calls) % 8 == 0:
            both = torch.stack([torch.cat(moves), torch.cat([V.diff() for V in estimate((cfg.seed, "again"))])])
            metrics["oracle/correlation"] = torch.corrcoef(both)[0, 1].item()
        return metrics

    def with_advantages(rollouts: list[Rollout], device: torch.device) -> tuple[Tensor, ...]:
        input_ids, mask, old_logp, _ = collate(rollouts, device)
        advantages = torch.zeros(mask.shape)
        advantages[mask] = torch.cat([r.advantages for r in rollouts])
        return input_ids, mask, old_logp, advantages  # [B, L]

    fipo.score_old_logp, fipo.collate = value, with_advantages


def oracle_weight(r: Rollout, delta_V: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The oracle's f: large where a token moved the value the way the outcome went, small where against it."""
    toward = delta_V if r.correct else -delta_V
    return (bounds[1] ** (toward / JUMP)).clamp(*bounds)


def learn_from_half(which: str, seed: int) -> None:
    """Let fipo.py learn from half of the tokens, each counting twice: those with the largest F (f before its bounds),
    the smallest, or random ones; and, since F may only go with them, those that moved most or that come first. Of a
    mini-batch (in one micro-batch), or with "own-" of each response. At a first update F is 0 but for rounding, so
    there the half is random."""
    weigh = fipo.influence_weight

    def choose(delta_logp: Tensor, advantages: Tensor, mask: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        F, _ = weigh(delta_logp, advantages, mask, **how)
        chance = fipo.derive_seed(seed, mask.sum().item(), delta_logp.sum().item())
        rank = torch.rand(F.shape, generator=torch.Generator().manual_seed(chance))
        ranks = {"largest": F, "smallest": -F, "moved": delta_logp.abs(), "early": -mask.cumsum(1).float()}
        if delta_logp.abs().max() > 1e-3:
            rank = ranks.get(which.removeprefix("own-"), rank)
        order = rank.masked_fill(~mask, -math.inf)
        place = order.argsort(1, descending=True).argsort(1)  # of a token among its response's, [B, L]
        if not which.startswith("own"):
            place = order.flatten().argsort(descending=True).argsort().view_as(F)
        size = mask.sum(1, keepdim=True) if which.startswith("own") else mask.sum()
        return F, 2.0 * (mask & (place < size // 2))

    fipo.influence_weight = choose


def train_arm(part: str, arm: str, seed: int) -> None:
    """One run of a part, in a process of its own, since it changes fipo.py; its output goes to a file."""
    out, (change, how, _) = arm_folder(part, arm, seed), ARMS[part][arm]
    if (out / "done").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if "pretrain_steps" in how:
            bench_compare.lengthen_the_task()
        cfg = settings(**how, seed=seed, eval_every=EVERY, save_every=8, log_samples=0)
        cfg, bounds = replace(cfg, out=str(out), resume=True), tuple(cfg.weight_range)
        if change == "oracle":
            know_values(cfg, lambda r, delta_V: r.advantage * oracle_weight(r, delta_V, bounds))
        elif change == "values":  # VinePPO's advantage: what the token did to the value, without a penalty for length
            know_values(cfg, lambda r, delta_V: delta_V)
        elif change:
            learn_from_half(change, seed)
        try:  # the oracle's f is in its advantages already
            fipo.train(replace(cfg, weight_range=[1.0, 1.0]) if change else cfg)
        except fipo.NoSignal:
            if train_small.read_jsonl(out / "metrics.jsonl")[-1]["accuracy"] < 0.9:
                raise  # else all is right, and nothing left to learn
    (out / "done").touch()
    shutil.rmtree(out / "checkpoints")


def make_long_base() -> None:
    bench_compare.lengthen_the_task()
    settings(**LONG)


def train_arms(part: str) -> None:
    if any("pretrain_steps" in how for _, how, _ in ARMS[part].values()):
        side_by_side([make_long_base])  # in a process of its own, since it changes train_small.py
    jobs = [(seed, arm) for arm, (_, _, seeds) in ARMS[part].items() for seed in seeds]
    side_by_side([partial(train_arm, part, arm, seed) for seed, arm in sorted(jobs)])


# --------------------------------------------------------------------------------------------- What came out
Spread = tuple[float, float | None, int]  # mean over seeds, half of its 95 % interval, number of seeds


def spread_of(values: list[float]) -> Spread:
    return *interval(values), len(values)


def over_seeds(rows: list[dict[str, float]]) -> dict[str, Spread]:
    """Every number over the rows that have it: a seed without a good key token tells nothing about those."""
    known = {name: [row[name] for row in rows if math.isfinite(row[name])] for name in rows[0]}
    return {name: spread_of(values) for name, values in known.items() if values}


def read_gradients(lr: float) -> list[dict[str, float]]:
    files = [gradient_file(seed, lr) for seed in SEEDS]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())]
    fipo.require(rows, f"{RUNS}/gradients has no rows for lr {lr:g}: run `credit.py gradients` first.")
    return rows


def gradients_at(rows: list[dict[str, float]]) -> dict[str, float]:
    """The updates of one step and seed: means from the second update on, and what is told of the last one."""
    names = [f"{what}: {name}" for name in RANGES for what in ("cosine", "norm")]
    found = {name: fmean(row[name] for row in rows[1:]) for name in names}
    found |= {f"last cosine: {name}": rows[-1][f"cosine: {name}"] for name in RANGES}
    found["cosine: another mini-batch"] = fmean(row["cosine: another mini-batch"] for row in rows[:-1])
    return found | {name: rows[-1][name] for name in rows[-1] if name not in rows[0]}


def gradient_tables(lr: float) -> dict[str, dict[str, Spread]]:
    """Over seeds: every step, and the mean of the steps."""
    rows, by_seed, tables = read_gradients(lr), {}, {}
    for row in rows:
        by_seed.setdefault(row["seed"], {}).setdefault(row["step"], []).append(row)
    seeds = [{step: gradients_at(of_step) for step, of_step in steps.items()} for steps in by_seed.values()]
    for step in STEPS:
        tables[f"lr {lr:g}, step {step}"] = over_seeds([steps[step] for steps in seeds])
    means = [{name: fmean(found[name] for found in steps.values()) for name in steps[STEPS[0]]} for steps in seeds]
    return tables | {f"lr {lr:g}": over_seeds(means)}


def against_the_bound(lr: float) -> dict[str, dict[str, float]]:
    """The least cosine of all updates after a first one, and the share of them below the bound."""
    rows = [row for row in read_gradients(lr) if row["update"] > 1]
    found = {}
    for name, bounds in RANGES.items():
        bound, cosines = cosine_bound(*bounds), [row[f"cosine: {name}"] for row in rows]
        below = fmean(x < bound for x in cosines)
        found[f"lr {lr:g}, f in {name}"] = {"bound": bound, "least": min(cosines), "below": below, "n": len(cosines)}
    return found


def read_run(part: str, arm: str, seed: int) -> dict[str, Any]:
    """Area under the accuracy curve, final accuracy and length; means of what is logged; the curve. A run that ended
    early, with nothing left to learn, stays where it was."""
    folder = arm_folder(part, arm, seed)
    lines = train_small.read_jsonl(folder / "metrics.jsonl")
    steps = json.loads((folder / "config.json").read_text())["steps"]
    seen = [x for x in lines if "eval/accuracy" in x]
    seen += [seen[-1] | {"step": step} for step in range(seen[-1]["step"] + EVERY, steps + 1, EVERY)]
    logged = {name: [x[name] for x in lines if name in x] for name in ("oracle/correlation", "influence_last")}
    means = {name: fmean(values) if values else None for name, values in logged.items()}
    curve = [x["eval/accuracy"] for x in seen]
    return {"part": part, "arm": arm, "seed": seed, **bench_compare.summary(seen), **means, "curve": curve}


def read_runs() -> list[dict[str, Any]]:  # all that are done
    every = [(part, arm, seed) for part, arms in ARMS.items() for arm, (_, _, seeds) in arms.items() for seed in seeds]
    return [read_run(*which) for which in every if (arm_folder(*which) / "done").exists()]


def rivals(part: str, arm: str) -> dict[str, tuple[str, str]]:
    """What an arm is compared with, as part and arm: DAPO with the same settings; an oracle with FIPO in the same range
    of f; a half with a random one, and the largest F with the smallest."""
    kind = arm.removesuffix(arm.split("-")[-1]) if part in ("setting", "final") else ""
    found = {"DAPO": ("matters" if part == "half" else part, f"{kind}dapo")}
    if "oracle" in arm:
        found["FIPO"] = part, arm.replace("oracle", "fipo")
    if part == "half":
        found |= {"random": (part, "random"), "smallest": (part, arm.replace("largest", "smallest"))}
    return {name: other for name, other in found.items() if other != (part, arm)}


def against_rivals(runs: list[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Part and arm -> over seeds, and the differences to its rivals, paired by seed."""
    by_arm: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in runs:
        by_arm.setdefault((row["part"], row["arm"]), {})[row["seed"]] = row
    found = {}
    for which, mine in by_arm.items():
        columns = {key: [row[key] for row in mine.values() if row[key] is not None]
                   for key in ("area", "final", "length", "oracle/correlation", "influence_last")}  # fmt: skip
        for name, rival in rivals(*which).items():
            pairs = [(row, by_arm[rival][seed]) for seed, row in mine.items() if seed in by_arm.get(rival, {})]
            columns |= {f"{key} − {name}": [a[key] - b[key] for a, b in pairs] for key in ("area", "final", "length")}
        found[": ".join(which)] = {key: spread_of(values) for key, values in columns.items() if values}
    return found


def told(value: Any) -> str:
    if isinstance(value, tuple):
        mean, half, n = value
        return f"{mean:.4g}" + ("" if half is None else f" ± {half:.2g}") + f" ({n})"
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")


def table(what: str, columns: dict[Any, dict[str, Any]]) -> None:
    print(" | ".join([f"\n{what}", *map(str, columns)]))
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        print(" | ".join([name, *(told(column.get(name)) for column in columns.values())]))


def find() -> dict[int, dict[str, Spread]]:
    """Part 2: for every step its numbers, over seeds."""
    found = {}
    for step in STEPS:
        seeds = [seed for seed in SEEDS if truth_file(seed, step).exists()]
        fipo.require(seeds, f"{RUNS}/truth has no file of step {step}: run `credit.py truth` first.")
        found[step] = over_seeds([find_at(seed, step) for seed in fipo.progress(seeds, desc=f"step {step}")])
    table("step", found)
    return found


def report() -> None:
    results: dict[str, Any] = {"truth": find(), "gradients": {}, "bounds": {}}
    for lr in RATES:
        results["gradients"] |= gradient_tables(lr)
        results["bounds"] |= against_the_bound(lr)
    runs = read_runs()
    results["runs"] = against_rivals(runs)
    for name in ("gradients", "bounds", "runs"):
        table(name, results[name])
    out = ROOT / "assets" / "results"
    write_json(out / "credit.json", results)
    rows = [row | {"curve": " ".join(f"{x:.4f}" for x in row["curve"])} for row in runs]
    datasets.Dataset.from_list(rows).to_csv(out / "credit_runs.csv")
    draw(results, ROOT / "assets" / "credit.png")


ARM_LABELS = {
    "matters: fipo": "FIPO, f in [1, 1.2]", "matters: fipo-wide": "FIPO, f in [0.5, 2]",
    "matters: oracle": "oracle, f in [1, 1.2]", "matters: oracle-wide": "oracle, f in [0.5, 2]",
    "matters: values": "ΔV as the advantage", "half: largest": "half: largest F", "half: random": "half: random",
    "half: smallest": "half: smallest F", "half: moved": "half: largest |Δlog p|",
    "half: own-largest": "half of each response: largest F", "half: own-smallest": "half of each response: smallest F",
    "half: own-early": "half of each response: the first", f"final: {CHOSEN}": "FIPO, the setting chosen",
}  # fmt: skip


def draw_finders(axes: plt.Axes, truth: dict[int, dict[str, Spread]]) -> None:
    for j, (step, found) in enumerate(truth.items()):
        spread = [found[f"AUC, at the update, {which}"] for which in FINDERS]
        where = [i + (j - 1.5) * 0.17 for i in range(len(FINDERS))]
        width = [half or 0 for _, half, _ in spread]
        axes.errorbar([m for m, *_ in spread], where, xerr=width, fmt="o", ms=4, label=f"step {step}")
    axes.set(title="Who finds the tokens that decide?", xlabel="AUC: 0.5 is guessing, 1 finds them all",
             yticks=range(len(FINDERS)), yticklabels=FINDERS.values(), xlim=(0.1, 1.02))  # fmt: skip
    axes.axvline(0.5, color="grey", lw=1)
    axes.invert_yaxis()
    axes.legend(fontsize="small", loc="upper left")


def draw_leads(axes: plt.Axes, truth: dict[int, dict[str, Spread]]) -> None:
    for i, which in enumerate(which for which in LEADERS if which != "|F|"):
        names = [f"{d} before, at the update, {which}" for d in range(LEAD + 1)]
        for found in truth.values():
            one = [found.get(name, [math.nan])[0] for name in names]
            axes.plot(range(LEAD + 1), one, color=f"C{i}", lw=0.7, alpha=0.4)
        at = [fmean(found[name][0] for found in truth.values() if name in found) for name in names]
        axes.plot(range(LEAD + 1), at, color=f"C{i}", marker=".", label=FINDERS.get(which, which))
    axes.set(title="And what leads to them?", xlabel="tokens before the next one that decides",
             ylabel="AUC (bold: mean of the steps)", ylim=(0.0, 1.02))  # fmt: skip
    axes.axhline(0.5, color="grey", lw=1)
    axes.legend(fontsize="small", loc="lower right")


def degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(1.0, cosine)))


def draw_turns(axes: plt.Axes, rows: list[dict[str, float]]) -> None:
    for name, bounds in {"another mini-batch": None, **RANGES}.items():
        at: dict[int, list[float]] = {}  # number of the update -> degrees, of all seeds and steps
        for row in rows:
            if f"cosine: {name}" in row and (row["update"] > 1 or not bounds):  # at a first update f is 1
                at.setdefault(row["update"], []).append(degrees(row[f"cosine: {name}"]))
        label = f"FIPO, {name}" if bounds else "DAPO on another mini-batch"
        (line,) = axes.plot(list(at), [fmean(x) for x in at.values()], marker=".", label=label)
        axes.fill_between(list(at), *zip(*((min(x), max(x)) for x in at.values())), alpha=0.15, lw=0)
        if bounds and math.isfinite(bounds[1]):
            axes.axhline(degrees(cosine_bound(*bounds)), color=line.get_color(), ls="--", lw=1)
    axes.set(title="How far is it to DAPO's gradient?", xlabel="update on one batch of rollouts",
             ylabel="degrees (dashed: the bound)", yscale="log", ylim=(0.3, 200))  # fmt: skip
    axes.legend(fontsize="small", loc="lower right")


def draw_gains(axes: plt.Axes, runs: dict[str, dict[str, Spread]]) -> None:
    gains = {arm: runs[arm]["area − DAPO"] for arm in ARM_LABELS if "area − DAPO" in runs.get(arm, {})}
    for i, (arm, (mean, half, _)) in enumerate(gains.items()):
        color = f"C{list(ARMS).index(arm.split(':')[0])}"
        axes.errorbar(100 * mean, i, xerr=100 * (half or 0), fmt="o", color=color, ms=5)
    labels = [f"{ARM_LABELS[arm]} ({n})" for arm, (_, _, n) in gains.items()]
    axes.set(title="Does it matter?", xlabel="area under held-out accuracy − DAPO's, points (seeds)",
             yticks=range(len(gains)), yticklabels=labels)  # fmt: skip
    axes.axvline(0, color="grey", lw=1)
    axes.invert_yaxis()


def draw(results: dict[str, Any], path: Path) -> None:
    figure, ((finds, leads), (matters, turns)) = plt.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    draw_finders(finds, results["truth"])
    draw_leads(leads, results["truth"])
    draw_gains(matters, results["runs"])
    draw_turns(turns, read_gradients(RATES[-1]))
    for axes in (finds, leads, turns, matters):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ Command line
def side_by_side(jobs: list[Callable[[], None]]) -> None:
    """Two at a time, each in a process of its own."""
    settings()  # what all of them read
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        try:
            for done in fipo.progress([pool.submit(job) for job in jobs], desc="runs"):
                done.result()
        finally:  # after Ctrl-C or a mistake, nothing new is begun
            pool.shutdown(cancel_futures=True)


def main(argv: list[str]) -> None:
    parts = {
        "truth": lambda: side_by_side([partial(record_truth, seed) for seed in SEEDS]),
        "gradients": lambda: side_by_side([partial(record_gradients, s, lr) for s in SEEDS for lr in RATES]),
        "finds": find,
        "report": report,
    } | {part: partial(train_arms, part) for part in ARMS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    with fipo.report_errors():
        parts[parser.parse_args(argv).part]()


if __name__ == "__main__":
    main(sys.argv[1:])

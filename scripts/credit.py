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
RATES = (1e-4, 2e-4)  # of part 3: the embedded run's, and the best of scripts/bench_compare.py
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
    files, kept = {step: RUNS / "truth" / f"{seed}-{step}.pt" for step in STEPS}, None
    if all(file.exists() for file in files.values()):
        return
    (RUNS / "truth").mkdir(parents=True, exist_ok=True)
    cfg = settings(seed=seed, steps=STEPS[-1] + 1, rollout_rows=256)
    for step, i, sampler, mini_batches in updates(cfg):
        if i == 0 and kept:  # that step is over: log π_θ at the update, and after all updates
            file, rollouts, rows = kept
            rows |= {"logp": [r.logp for r in rollouts], "after": score(sampler.policy, rollouts)[0]}
            torch.save(rows, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)
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


def scores(delta: Tensor, advantage: float, tau: float = 32.0) -> dict[str, Tensor]:
    """What a loss can know of each token of a response from its Δlog p, [T] each."""
    one = torch.ones(1, len(delta), dtype=torch.bool)
    weigh = partial(fipo.influence_weight, delta[None], advantage * one, one, tau=tau)
    F, f = (x[0] for x in weigh())
    wide = weigh(weight_range=RANGES["[0.8, 1.2]"])[1][0]
    past = fipo.future_kl(delta.flip(0)[None], one, tau)[0].flip(0)
    return {"Δ": delta, "|Δ|": delta.abs(), "F": F, "|F|": F.abs(), "|F − Δ|": (F - delta).abs(), "f": f,
            "|log f|": wide.log().abs(), "|past − Δ|": (past - delta).abs()}  # fmt: skip


FINDERS = {"|Δ|": "|Δlog p|", "|F|": "|F|", "|F − Δ|": "|F| without Δ itself", "|past − Δ|": "|the past| without Δ",
           "F": "F", "f": "f in [1, 1.2]", "|log f|": "|log f|, f in [0.8, 1.2]", "entropy": "entropy",
           "−log π_old": "−log π_old", "left": "tokens left"}  # fmt: skip


def read_truth(seed: int, step: int, when: str = "logp", tau: float = 32.0) -> dict[str, Tensor]:
    """All tokens of the responses, [N] each: scores, ΔV by all continuations and by each half of them, key or not, and
    how many tokens before the next key token. `when`: Δ as the loss saw it ("logp"), or after the step ("after")."""
    rows, n = torch.load(RUNS / "truth" / f"{seed}-{step}.pt", weights_only=True), CONTINUATIONS
    tokens: list[dict[str, Tensor]] = []
    for i, (first, second) in enumerate(zip(*rows["V"])):
        V, T, A = (first + second) / 2, len(rows["ids"][i]), rows["advantage"][i]
        is_key = [z_score(v[:-1], v[1:], m).abs() > KEY for v, m in ((V, 2 * n), (first, n), (second, n))]
        ahead, until = torch.zeros(T), NONE
        for t in reversed(range(T)):
            until = 0 if is_key[0][t] else until + 1
            ahead[t] = until
        unsure = -rows["old_logp"][i]
        ahead_of_it = fipo.future_kl(unsure[None], torch.ones(1, T), tau)[0] - unsure  # F's sum, of what DAPO knows
        known = {"A": torch.full((T,), A), "entropy": rows["entropy"][i], "−log π_old": unsure,
                 "future of −log π_old": ahead_of_it, "left": torch.arange(T, 0, -1.0)}  # fmt: skip
        same = z_score(first[:-1], second[:-1], n).abs() > KEY  # one prefix twice: what differs is noise
        truth = {"ΔV": V.diff(), "ΔV 1": first.diff(), "ΔV 2": second.diff(), "key": is_key[0], "key 1": is_key[1],
                 "key 2": is_key[2], "ahead": ahead, "false": same}  # fmt: skip
        tokens.append(scores(rows[when][i] - rows["old_logp"][i], A, tau) | known | truth)
    return {name: torch.cat([each[name] for each in tokens]) for name in tokens[0]}


def find_at(seed: int, step: int) -> dict[str, float]:
    """Part 2 for one seed and step: a flat table of numbers. NaN where there is nothing to tell."""
    t = read_truth(seed, step)
    key, bad, dV = t["key"], t["ΔV"] < 0, t["ΔV"]
    mean = {"key tokens, share": key, "false alarms, share": t["false"], "key tokens that are bad": bad[key],
            "key tokens that the other half finds, too": t["key 2"][t["key 1"]],
            "f at good key tokens": t["f"][key & ~bad], "f at bad key tokens": t["f"][key & bad],
            "f elsewhere": t["f"][~key], "tokens with A > 0": t["A"] > 0,
            "of the half with the largest F": t["A"][t["F"] > t["F"].median()] > 0}  # fmt: skip
    found = {name: x.float().mean().item() for name, x in mean.items()} | {
        "tokens": len(key), "key tokens": key.sum().item(), "ΔV, rms": dV.square().mean().sqrt().item(),
        "noise of ΔV, rms": (t["ΔV 1"] - t["ΔV 2"]).square().mean().sqrt().item() / 2,
        "correlation of two halves": torch.corrcoef(torch.stack([t["ΔV 1"], t["ΔV 2"]]))[0, 1].item(),
        "smallest jump of a key token": min(dV[key].abs().tolist(), default=math.nan)}  # fmt: skip
    unsure = t["−log π_old"] > -math.log(0.9)  # others cannot be key by more than 0.1
    found["unsure tokens, share"] = unsure.float().mean().item()
    lead = (t["ahead"] > 0) & (t["ahead"] <= LEAD // 2)
    found["sure ones of the 8 before a key token"] = (~unsure[lead]).float().mean().item()
    for when, name in (("logp", "at the update"), ("after", "after the step")):
        t = read_truth(seed, step, when)
        for which in FINDERS:
            found[f"AUC, {name}, {which}"] = auc(t[which], key)
            found[f"AUC among unsure tokens, {name}, {which}"] = auc(t[which][unsure], key[unsure])
            found[f"AUC of |ΔV| > 0.2, {name}, {which}"] = auc(t[which], dV.abs() > 0.2)
        found |= {f"good from bad, {name}, {which}": auc(t[which][key], ~bad[key]) for which in ("Δ", "F", "A")}
        for tau in TAUS:
            at = read_truth(seed, step, when, tau)
            found |= {f"AUC, {name}, {which}, τ = {tau}": auc(at[which], key) for which in ("|F|", "f")}
        for d in range(LEAD + 1):  # tokens d before a key token, against those with none here or among the next LEAD
            there = t["ahead"] == d
            some = there | (t["ahead"] > LEAD)
            for which in LEADERS:  # with as many tokens left: F sums over them
                found[f"{d} before, {name}, {which}"] = auc_within(t[which][some], there[some], t["left"][some])
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
        f = torch.cat([weight_of(r, bounds) for r in mini_batch]).double()
        row[f"if orthogonal: {name}"] = ((share * f).sum() / (share * f * f).sum().sqrt()).item()
    return row


def weight_of(r: Rollout, bounds: tuple[float, float]) -> Tensor:  # f of a response's tokens at the update on it, [T]
    delta, one = (r.logp - r.old_logp)[None], torch.ones(1, len(r.logp), dtype=torch.bool)
    return fipo.influence_weight(delta, r.advantage * one, one, weight_range=bounds)[1][0]


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
    file, rows = RUNS / "gradients" / f"{lr:g}-{seed}.json", []
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
SMALL = dict(group_size=8, prompts_per_batch=16, prompts_per_mini_batch=2, max_gen_rounds=100, lr=2e-4,
             rollout_rows=256)  # fmt: skip
FEW, SURE = 32, 0.95  # the oracle's continuations of a prefix; and the tokens it takes to move the value by nothing
JUMP = 0.2  # a move of the value by so much brings the oracle's f to its upper bound
WIDE = dict(weight_range=[0.5, 2.0])
PLAIN, MORE = dict(lr=2e-4), dict(prompts_per_mini_batch=1, lr=5e-5)  # 8 updates a batch, and 32
LONG = dict(lr=2e-4, pretrain_steps=3000)  # the longer horizon of scripts/bench_compare.py
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
    """Let fipo.py train with the advantages weigh(response, ΔV), [T]. ΔV is estimated at every step, and now and then
    once more: `oracle/correlation` in metrics.jsonl is that of both."""
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
    out, (change, how, _) = RUNS / part / f"{arm}-{seed}", ARMS[part][arm]
    if (out / "done").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if "long" in arm:
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
    if any("long" in arm for arm in ARMS[part]):
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
    files = [RUNS / "gradients" / f"{lr:g}-{seed}.json" for seed in SEEDS]
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


def against_the_bound(lr: float) -> dict[str, dict[str, float]]:
    """The least cosine of all updates after a first one, and the share of them below the bound."""
    rows = [row for row in read_gradients(lr) if row["update"] > 1]
    found = {}
    for name, bounds in RANGES.items():
        bound, cosines = cosine_bound(*bounds), [row[f"cosine: {name}"] for row in rows]
        below = fmean(x < bound for x in cosines)
        found[f"lr {lr:g}, f in {name}"] = {"bound": bound, "least": min(cosines), "below": below, "n": len(cosines)}
    return found


def read_runs() -> list[dict[str, Any]]:
    """Every run that is done: part, arm, seed; area under the accuracy curve, final accuracy and length; the curve.
    A run that ended early, with nothing left to learn, stays where it was."""
    rows = []
    for part, arms in ARMS.items():
        for arm, (_, _, seeds) in arms.items():
            for seed in seeds:
                folder = RUNS / part / f"{arm}-{seed}"
                if (folder / "done").exists():
                    lines = train_small.read_jsonl(folder / "metrics.jsonl")
                    seen = [x for x in lines if "eval/accuracy" in x]
                    steps = json.loads((folder / "config.json").read_text())["steps"]
                    seen += [seen[-1] | {"step": step} for step in range(seen[-1]["step"] + EVERY, steps + 1, EVERY)]
                    logged = {name: [x[name] for x in lines if name in x]
                              for name in ("oracle/correlation", "influence/last")}  # fmt: skip
                    means = {name: fmean(values) if values else None for name, values in logged.items()}
                    rows.append({"part": part, "arm": arm, "seed": seed, **bench_compare.summary(seen), **means,
                                 "curve": [x["eval/accuracy"] for x in seen]})  # fmt: skip
    return rows


def against_dapo(runs: list[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Part and arm -> over seeds, and the difference to DAPO with the same settings, paired by seed; of an oracle also
    that to FIPO with the same range of f, of a half that to a random one, and to the one
    with the smallest F."""
    by_arm: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in runs:
        by_arm.setdefault((row["part"], row["arm"]), {})[row["seed"]] = row
    found = {}
    for (part, arm), mine in by_arm.items():
        kind = arm.removesuffix(arm.split("-")[-1]) if part in ("setting", "final") else ""
        dapo = by_arm.get(("matters" if part == "half" else part, f"{kind}dapo"), {})
        result = {}
        for key in ("area", "final", "length", "oracle/correlation", "influence/last"):
            have = {seed: row[key] for seed, row in mine.items() if row[key] is not None}
            if have:
                result[key] = spread_of(list(have.values()))
        others = {"DAPO": dapo}
        if "oracle" in arm:
            others["FIPO"] = by_arm.get((part, arm.replace("oracle", "fipo")), {})
        if part == "half":
            others |= {name: by_arm.get((part, which), {}) for name, which in
                       {"random": "random", "smallest": arm.replace("largest", "smallest")}.items()}  # fmt: skip
        for name, other in others.items():
            for key in ("area", "final", "length"):
                both = [row[key] - other[seed][key] for seed, row in mine.items() if seed in other]
                if both and mine is not other:
                    result[f"{key} − {name}"] = spread_of(both)
        found[f"{part}: {arm}"] = result
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
        seeds = [seed for seed in SEEDS if (RUNS / "truth" / f"{seed}-{step}.pt").exists()]
        fipo.require(seeds, f"{RUNS}/truth has no file of step {step}: run `credit.py truth` first.")
        found[step] = over_seeds([find_at(seed, step) for seed in fipo.progress(seeds, desc=f"step {step}")])
    table("step", found)
    return found


def report() -> None:
    results: dict[str, Any] = {"truth": find(), "gradients": {}, "bounds": {}}
    for lr in RATES:
        by_step, rows = {}, read_gradients(lr)
        for step in STEPS:
            of_seeds = [[x for x in rows if (x["seed"], x["step"]) == (seed, step)] for seed in SEEDS]
            by_step[step] = [gradients_at(of_seed) for of_seed in of_seeds if of_seed]
            results["gradients"][f"lr {lr:g}, step {step}"] = over_seeds(by_step[step])
        over_steps = [{name: fmean(row[name] for row in of_seed) for name in of_seed[0]}
                      for of_seed in zip(*by_step.values())]  # fmt: skip
        results["gradients"][f"lr {lr:g}"] = over_seeds(over_steps)
        results["bounds"] |= against_the_bound(lr)
    runs = read_runs()
    results["runs"] = against_dapo(runs)
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


def draw(results: dict[str, Any], path: Path) -> None:
    figure, ((finds, leads), (matters, turns)) = plt.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    truth = results["truth"].items()
    for j, (step, found) in enumerate(truth):
        spread = [found[f"AUC, at the update, {which}"] for which in FINDERS]
        where = [i + (j - 1.5) * 0.17 for i in range(len(FINDERS))]
        width = [half or 0 for _, half, _ in spread]
        finds.errorbar([m for m, *_ in spread], where, xerr=width, fmt="o", ms=4, label=f"step {step}")
    finds.set(title="Who finds the tokens that decide?", xlabel="AUC: 0.5 is guessing, 1 finds them all",
              yticks=range(len(FINDERS)), yticklabels=FINDERS.values(), xlim=(0.1, 1.02))  # fmt: skip
    finds.axvline(0.5, color="grey", lw=1)
    finds.invert_yaxis()
    for i, which in enumerate(which for which in LEADERS if which != "|F|"):
        names = [f"{d} before, at the update, {which}" for d in range(LEAD + 1)]
        for _, found in truth:
            one = [found.get(name, [math.nan])[0] for name in names]
            leads.plot(range(LEAD + 1), one, color=f"C{i}", lw=0.7, alpha=0.4)
        at = [fmean(found[name][0] for _, found in truth if name in found) for name in names]
        leads.plot(range(LEAD + 1), at, color=f"C{i}", marker=".", label=FINDERS.get(which, which))
    leads.set(title="And what leads to them?", xlabel="tokens before the next one that decides",
              ylabel="AUC (bold: mean of the steps)", ylim=(0.0, 1.02))  # fmt: skip
    leads.axhline(0.5, color="grey", lw=1)
    for name, bounds in {"another mini-batch": None, **RANGES}.items():
        at: dict[int, list[float]] = {}  # number of the update -> degrees, of all seeds and steps
        for row in read_gradients(RATES[-1]):
            if f"cosine: {name}" in row and (row["update"] > 1 or not bounds):  # at a first update f is 1
                at.setdefault(row["update"], []).append(math.degrees(math.acos(min(1.0, row[f"cosine: {name}"]))))
        label = f"FIPO, {name}" if bounds else "DAPO on another mini-batch"
        (line,) = turns.plot(list(at), [fmean(x) for x in at.values()], marker=".", label=label)
        turns.fill_between(list(at), *zip(*((min(x), max(x)) for x in at.values())), alpha=0.15, lw=0)
        if bounds and math.isfinite(bounds[1]):
            turns.axhline(math.degrees(math.acos(cosine_bound(*bounds))), color=line.get_color(), ls="--", lw=1)
    turns.set(title="How far is it to DAPO's gradient?", xlabel="update on one batch of rollouts",
              ylabel="degrees (dashed: the bound)", yscale="log", ylim=(0.3, 200))  # fmt: skip
    known = {arm: found["area − DAPO"] for arm, found in results["runs"].items() if "area − DAPO" in found}
    gains = {arm: known[arm] for arm in ARM_LABELS if arm in known}
    for i, (arm, (mean, half, _)) in enumerate(gains.items()):
        color = f"C{list(ARMS).index(arm.split(':')[0])}"
        matters.errorbar(100 * mean, i, xerr=100 * (half or 0), fmt="o", color=color, ms=5)
    labels = [f"{ARM_LABELS[arm]} ({n})" for arm, (_, _, n) in gains.items()]
    matters.set(title="Does it matter?", xlabel="area under held-out accuracy − DAPO's, points (seeds)",
                yticks=range(len(gains)), yticklabels=labels)  # fmt: skip
    matters.axvline(0, color="grey", lw=1)
    matters.invert_yaxis()
    for axes in (finds, leads, turns, matters):
        axes.grid(alpha=0.3)
    for axes, where in ((finds, "upper left"), (leads, "lower right"), (turns, "lower right")):
        axes.legend(fontsize="small", loc=where)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ Command line
def write_json(file: Path, rows: Any) -> None:  # whole or not at all
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".partial").write_text(json.dumps(rows, indent=1) + "\n")
    file.with_suffix(".partial").rename(file)


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
    with fipo.one_clear_sentence():
        parts[parser.parse_args(argv).part]()


if __name__ == "__main__":
    main(sys.argv[1:])

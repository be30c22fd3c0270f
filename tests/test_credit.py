"""Values of prefixes, scores of tokens, gradients and training arms of scripts/credit.py."""

import dataclasses
import functools
import json
import math
import random
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch

import credit
import fipo

REPLACED = {name: getattr(fipo, name) for name in ("score_old_logp", "collate", "influence_weight")}


@pytest.fixture
def embedded(small, monkeypatch, tmp_path):
    """Replace the embedded run by two steps with two updates each, in a folder of its own."""

    def settings(pretrain_steps=0, **changes):
        defaults = {"rollout_rows": 512, "warmup_steps": 1}
        return fipo.resolve(dataclasses.replace(small, **defaults | changes))

    monkeypatch.setattr(credit, "settings", settings)
    monkeypatch.setattr(credit, "RUNS", tmp_path / "credit")
    monkeypatch.setattr(credit, "STEPS", (1, 2))
    monkeypatch.setattr(credit, "CONTINUATIONS", 4)
    monkeypatch.setattr(credit, "SEEDS", range(2))
    monkeypatch.setattr(credit, "RATES", (1e-3,))
    return settings


@pytest.fixture
def restore_fipo():
    """Undo what an arm replaces in fipo.py. Returns the function that does so."""

    def restore():
        for name, function in REPLACED.items():
            setattr(fipo, name, function)

    yield restore
    restore()


@pytest.fixture
def first_batch(embedded):
    """Settings, policy and responses before the first update."""
    cfg = embedded()
    _, _, policy, mini_batches = next(credit.updates(cfg))
    return cfg, policy, [r for mini_batch in mini_batches for r in mini_batch]


def weights_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained_weights(out) -> torch.Tensor:
    checkpoint = fipo.newest_checkpoint(Path(out))
    return weights_of(fipo.AutoModelForCausalLM.from_pretrained(checkpoint))


# ---------------------------------------------------------------------------------- 1. The truth
def test_values_sum_to_the_outcome_and_depend_on_the_prefix_only(first_batch):
    cfg, policy, rollouts = first_batch
    rollouts = rollouts[::2]
    V = credit.values(policy, rollouts, 8, cfg, "test")
    by_prompt = {}
    for v, r in zip(V, rollouts):
        assert len(v) == len(r.response_ids) + 1
        assert v.diff().sum().item() == pytest.approx(r.correct - v[0].item(), abs=1e-6)
        by_prompt.setdefault(r.problem.prompt, set()).add(v[0].item())
    assert all(len(found) == 1 for found in by_prompt.values())
    assert len(set.union(*by_prompt.values())) > 1

    in_reverse = credit.values(policy, rollouts[::-1], 8, cfg, "test")
    assert all(torch.equal(a, b) for a, b in zip(V, in_reverse[::-1]))
    with_another_seed = credit.values(policy, rollouts, 8, cfg, "another")
    assert not all(torch.equal(a, b) for a, b in zip(V, with_another_seed))


class DecidedByOneToken:
    """A sampler under which a response is correct if and only if one token is that of `rollout`."""

    def __init__(self, policy, rollout, place):
        self.start = len(rollout.problem.prompt_ids)
        self.place = place
        self.token = rollout.response_ids[place]
        self.right = policy.tokenizer(f"0\nAnswer: {rollout.problem.answer}")["input_ids"]
        self.wrong = policy.tokenizer("0\nAnswer: none")["input_ids"]

    def generate(self, problems, seeds, n, max_tokens, temperature, top_p):
        groups = []
        for problem in problems:
            token = problem.prompt_ids[self.start :][self.place : self.place + 1]
            answer = self.right if token == [self.token] else self.wrong
            groups.append([fipo.Rollout(problem, answer) for _ in range(n)])
        return groups


def test_the_deciding_token_gets_the_whole_change_of_value(first_batch, monkeypatch):
    cfg, policy, rollouts = first_batch
    for place in (0, 2, 5):
        # The response must leave room for the sampler's answer.
        r = next(r for r in rollouts if r.correct and place + 1 < len(r.response_ids) < 16)
        sampler = DecidedByOneToken(policy, r, place)
        monkeypatch.setattr(credit, "HFSampler", lambda policy, sampler=sampler: sampler)
        (V,) = credit.values(policy, [r], 3, cfg, "test")
        assert V.diff().nonzero().flatten().tolist() == [place]
        assert V.diff()[place] == 1


def test_value_of_a_prompt_is_the_accuracy_of_its_responses(first_batch):
    cfg, policy, rollouts = first_batch
    some = [dataclasses.replace(r, response_ids=r.response_ids[:1]) for r in rollouts]
    some = some[:: cfg.group_size]
    V = credit.values(policy, some, 256, cfg, "test")
    problems = [r.problem for r in some]
    groups = fipo.sample(fipo.HFSampler(policy), problems, ("accuracy",), cfg, 256, 1.0, 1.0)
    for v, group in zip(V, groups):
        accuracy = fmean(r.correct for r in group)
        assert v[0].item() == pytest.approx(accuracy, abs=0.15)  # over 3 standard errors


def test_continuations_stop_at_the_length_limit(embedded):
    cfg = embedded(max_response=4, overlong_buffer=0)
    policy = fipo.Policy(cfg.model, cfg)
    problem = fipo.encode_problems(cfg.data, policy, cfg)[0]
    # "Answer:" alone has more than four tokens, so no continuation can be correct.
    ids = policy.tokenizer(f"Answer: {problem.answer}")["input_ids"]
    r = fipo.Rollout(problem, response_ids=ids[:4], sampler_logp=[0.0] * 4)
    V = credit.values(policy, [r], 16, cfg, "test")
    assert V[0].tolist() == [0.0] * 5


def test_sure_tokens_keep_the_value_before_them(first_batch):
    cfg, policy, rollouts = first_batch
    some = rollouts[::4]
    exact = credit.values(policy, some, 32, cfg, "test")
    V = credit.values(policy, some, 32, cfg, "test", sure=0.9)
    errors = []
    for v, v_exact, r in zip(V, exact, some):
        sure = torch.tensor(r.sampler_logp[:-1]).exp() >= 0.9  # the last token decides the outcome
        assert sure.any()
        assert not v[:-1].diff()[sure].any()
        errors.append((v - v_exact)[:-1].abs().mean().item())
    assert fmean(errors) < 0.1


def test_noise_rarely_makes_a_key_token():
    generator = torch.Generator().manual_seed(0)
    n = 64
    p = torch.rand(50_000, generator=generator)
    once = torch.binomial(torch.full_like(p, n), p, generator=generator) / n
    again = torch.binomial(torch.full_like(p, n), p, generator=generator) / n
    assert credit.is_jump(once, again, n).float().mean() < 0.002
    assert credit.z_score(torch.tensor(0.5), torch.tensor(0.9), n) > credit.KEY
    assert credit.z_score(torch.tensor(0.9), torch.tensor(0.5), n) < -credit.KEY
    assert torch.isfinite(credit.z_score(torch.tensor(0.0), torch.tensor(0.0), n))


# ------------------------------------------------------------- 2. Which scores find the key tokens
def test_auc_matches_counting_by_hand():
    score = pd.Series([3.0, 1.0, 2.0, 0.0, 2.0])
    positive = pd.Series([True, True, False, False, False])
    assert credit.auc(score, positive) == pytest.approx((3 + 1) / 6)  # 3 wins three, 1 wins one
    assert credit.auc(-score, positive) == pytest.approx(1 - 4 / 6)
    tie = credit.auc(pd.Series([2.0, 2.0, 1.0]), pd.Series([True, False, False]))
    assert tie == pytest.approx(0.75)
    assert credit.auc(pd.Series([1.0] * 4), pd.Series([True, False, False, True])) == 0.5
    assert math.isnan(credit.auc(score, pd.Series([False] * 5)))
    assert math.isnan(credit.auc(score, pd.Series([True] * 5)))


def test_auc_compares_within_strata_only():
    score = pd.Series([1.0, 0, 0, 9, 8, 0])
    positive = pd.Series([True, False, False, False, True, True])
    # 1 wins twice, 8 loses to 9, and the last one has nothing to be compared with.
    stratum = pd.Series([0, 0, 0, 1, 1, 2])
    assert credit.auc(score, positive, stratum) == pytest.approx(2 / 3)
    one_stratum = pd.Series([0.0] * 6)
    assert credit.auc(score, positive, one_stratum) == pytest.approx(credit.auc(score, positive))
    assert math.isnan(credit.auc(score, positive, pd.Series(range(6))))


def test_scores_match_the_loss_and_the_past_looks_back():
    delta = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    found = {name: x[0] for name, x in credit.scores(delta, 1.0 * mask, mask, tau=1.0).items()}
    assert found["F"].tolist() == pytest.approx([0.075, 0.15, 0.3, 0, 0])
    assert found["|F − Δ|"].tolist() == pytest.approx([0.075, 0.15, 0, 0, 0])
    assert found["|past − Δ|"].tolist() == pytest.approx([0, 0, 0, 0.15, 0.075])
    assert found["f"].tolist() == pytest.approx([math.exp(0.075), math.exp(0.15), 1.2, 1, 1])
    negative = credit.scores(-delta, -1.0 * mask, mask)
    assert negative["f"].tolist() == [[1.0] * 5]
    assert negative["|log f|"][0, 2] == pytest.approx(math.log(1 / 0.8))


def test_key_tokens_and_their_leads_are_told_apart(monkeypatch):
    """By hand: two responses of five tokens, with a key token at place 3 of the first one."""
    key = torch.zeros(2, 5, dtype=torch.bool)
    key[0, 3] = True
    ahead = credit.until_next(key)
    assert ahead[0, :4].tolist() == [3, 2, 1, 0]
    assert torch.isinf(ahead[0, 4]) and torch.isinf(ahead[1]).all()

    t = pd.DataFrame({"key": key.flatten(), "ahead": ahead.flatten()})
    t["key 1"] = t["key 2"] = t["key"]
    t["ΔV"] = t["ΔV 1"] = t["ΔV 2"] = t["key"] * -0.5
    t["false"] = False
    t["left"] = [5.0, 4, 3, 2, 1] * 2
    t["A"] = [-1.0] * 5 + [1.0] * 5
    t["unsure"] = [False, True, False, True, False] + [False, False, True, False, False]
    t["−log π_old"] = t["unsure"].map({True: 1.0, False: 0.01})
    t["f"] = t["key"].map({True: 1.2, False: 1.0})
    for name in ("Δ", *credit.FINDERS, *credit.LEADERS):
        if name not in t:
            t[name] = -t["ahead"]

    found = credit.describe(t)
    assert found["key tokens, share"] == pytest.approx(0.1)
    assert found["key tokens that are bad"] == 1
    assert found["unsure tokens, share"] == pytest.approx(0.3)
    assert found["sure ones of the 8 before a key token"] == pytest.approx(2 / 3)
    assert found["f at bad key tokens"] == pytest.approx(1.2) and found["f elsewhere"] == 1
    assert math.isnan(found["f at good key tokens"])
    monkeypatch.setattr(credit, "LEAD", 4)
    ranked = credit.rank(t)
    assert ranked["AUC, at the update, f"] == 1
    assert ranked["AUC, at the update, −log π_old"] == pytest.approx(8 / 9)  # two ties of nine
    assert ranked["2 before, at the update, |F − Δ|"] == 1
    assert ranked["2 before, at the update, f"] == 0.5
    assert math.isnan(ranked["4 before, at the update, |F − Δ|"])


# -------------------------------------------------------------------- 3. How f turns the gradient
def test_bound_holds_for_orthogonal_gradients_and_is_reached():
    rng = random.Random(0)
    for _ in range(300):
        low = rng.uniform(0.1, 1)
        high = low * rng.uniform(1, 10)
        n = rng.randint(1, 40)
        directions = torch.linalg.qr(torch.randn(64, n, dtype=torch.double)).Q
        g = directions * torch.rand(n, dtype=torch.double) ** 4
        weights = [rng.choice([low, high, rng.uniform(low, high)]) for _ in range(n)]
        w = torch.tensor(weights, dtype=torch.double)
        bound = credit.cosine_bound(low, high)
        assert credit.cosine((g * w).sum(1), g.sum(1)) >= bound - 1e-9
    assert credit.cosine_bound(1, 1.2) == pytest.approx(0.9959, abs=5e-5)
    assert credit.cosine_bound(0, math.inf) == 0
    # In the worst case, squared norms are inverse to the weights.
    w = torch.tensor([0.5, 2.0])
    g = torch.tensor([2.0, 0.5]).sqrt()
    assert credit.cosine(w * g, g) == pytest.approx(credit.cosine_bound(0.5, 2.0))


def test_bound_does_not_hold_where_gradients_cancel():
    g = torch.tensor([[1.0, 0.1], [-0.9, 0.0]])
    w = torch.tensor([[1.0], [1.2]])
    assert credit.cosine((w * g).sum(0), g.sum(0)) < credit.cosine_bound(1.0, 1.2)
    assert g.sum(0).square().sum() / g.square().sum() < 0.1


def test_comparing_gradients_leaves_training_unchanged(embedded):
    """`updates` is the loop of fipo.train. f turns the gradient from the second update on."""
    cfg = embedded(lr=1e-3, group_size=4)
    fipo.train(cfg)
    for _, i, policy, mini_batches in credit.updates(cfg):
        row = credit.compare_gradients(policy, mini_batches[i], cfg)
        once = credit.gradient(policy, mini_batches[i], cfg)
        again = credit.gradient(policy, mini_batches[i], cfg, (1.0, 1.0))
        assert credit.cosine(once, again) == pytest.approx(1, abs=1e-9)
        for name in credit.RANGES:
            if i == 0:
                assert row[f"cosine: {name}"] == pytest.approx(1, abs=1e-7)
                assert row[f"norm: {name}"] == pytest.approx(1, abs=1e-4)
            else:
                assert row[f"cosine: {name}"] < 1 - 1e-6
                assert abs(row[f"norm: {name}"] - 1) > 1e-6
        credit.token_by_token(policy, mini_batches[i][:2], cfg)
        credit.values(policy, mini_batches[i][:2], 2, cfg, "test")
    assert torch.equal(weights_of(policy.model), trained_weights(cfg.out))


def test_gradient_of_a_single_token_is_the_gradient_of_the_loss(first_batch):
    cfg, policy, rollouts = first_batch
    r = next(r for r in rollouts if len(r.response_ids) > 3)
    first = {name: getattr(r, name)[:1] for name in ("response_ids", "sampler_logp", "old_logp")}
    one = dataclasses.replace(r, **first)
    total = credit.gradient(policy, [one], cfg).square().sum().item()
    assert credit.squared_gradients(policy, one).tolist() == pytest.approx([total], rel=1e-3)
    row = credit.token_by_token(policy, [one], cfg)
    assert row["|Σg|² / Σ|g|²"] == pytest.approx(1, rel=1e-3)
    assert row["if orthogonal: [1, 1.2]"] == pytest.approx(1)


# -------------------------------------------------------------- 4. Training with f or an oracle
def test_oracle_weight_follows_the_outcome():
    right = fipo.Rollout(fipo.Problem("", ""), correct=True)
    wrong = fipo.Rollout(fipo.Problem("", ""), correct=False)
    delta_V = torch.tensor([0.5, 0.0, -0.5, 0.01])
    assert credit.oracle_weight(right, delta_V, 0.5, 2.0)[:3].tolist() == [2.0, 1.0, 0.5]
    assert credit.oracle_weight(wrong, delta_V, 0.5, 2.0)[:3].tolist() == [0.5, 1.0, 2.0]
    small = 1.2 ** (0.01 / credit.JUMP)
    weight = credit.oracle_weight(right, delta_V, 1.0, 1.2)
    assert weight.tolist() == pytest.approx([1.2, 1.0, 1.0, small])


def test_token_advantages_reach_the_loss(embedded, restore_fipo, monkeypatch):
    """With the response's advantage at every token the run is DAPO's, and with others it is not."""
    monkeypatch.setattr(credit, "FEW", 4)
    cfg = embedded(algorithm="dapo", group_size=4)
    fipo.train(cfg)
    dapo = trained_weights(cfg.out)
    seen = []

    def response_advantage(r, delta_V):
        seen.append(len(delta_V) == len(r.response_ids))
        return torch.full_like(delta_V, r.advantage)

    for advantages, is_dapo in ((response_advantage, True), (lambda r, delta_V: delta_V, False)):
        restore_fipo()
        credit.use_token_advantages(cfg, advantages)
        out = f"{cfg.out}-{is_dapo}"
        fipo.train(dataclasses.replace(cfg, out=out))
        assert torch.equal(trained_weights(out), dapo) == is_dapo
    assert seen == [True] * (cfg.steps * cfg.prompts_per_batch * cfg.group_size)


@pytest.mark.parametrize("which", credit.HALVES)
def test_half_of_the_tokens_are_trained_on(which, restore_fipo):
    delta = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)) * 0.1
    place = torch.arange(10.0).expand(3, 10)
    mask = place < torch.tensor([[10], [6], [4]])
    A = torch.tensor([[1.0], [-1.0], [1.0]]).expand(3, 10)
    plain, _ = fipo.influence_weight(delta, A, mask)
    credit.learn_from_half(which, seed=0)
    F, f = fipo.influence_weight(delta, A, mask)
    chosen = f > 0
    assert torch.equal(F, plain)
    assert not f[~mask].any()
    assert set(f.unique().tolist()) == {0.0, 2.0}
    assert chosen.sum() == 10  # of 20
    by_response = which.startswith("own-")
    if by_response:
        assert chosen.sum(1).tolist() == [5, 3, 2]
    orders = {"largest": F, "smallest": -F, "moved": delta.abs(), "early": -place}
    order = orders.get(which.removeprefix("own-"))
    if order is not None:
        for row in range(3) if by_response else [slice(None)]:
            others = mask[row] & ~chosen[row]
            assert order[row][chosen[row]].min() > order[row][others].max()
    # Before any update F is rounding only, so the half is random.
    _, first = fipo.influence_weight(delta * 1e-7, A, mask)
    assert (first > 0).sum() == 10
    assert not torch.equal(first, f)


def test_every_arm_trains_once(embedded, restore_fipo, monkeypatch):
    monkeypatch.setattr(credit, "FEW", 2)
    few = dict(group_size=4, prompts_per_batch=4, prompts_per_mini_batch=2, steps=1)
    cfg = embedded()
    blank = dataclasses.replace(cfg, weight_range=None, clip_high=None, eval_data=cfg.data)

    def settings(**changes):
        return fipo.resolve(dataclasses.replace(blank, **changes | few))

    monkeypatch.setattr(credit, "settings", settings)
    losses = set()
    runs = []
    arms = (
        ("matters", "dapo"),
        ("matters", "oracle-wide"),
        ("matters", "values"),
        ("half", "largest"),
    )
    for part, arm in arms:
        restore_fipo()  # every run has a process of its own
        credit.train_arm(part, arm, 0)
        out = credit.RUNS / part / f"{arm}-0"
        assert not (out / "checkpoints").exists()
        log = (out / "metrics.jsonl").read_bytes()
        credit.train_arm(part, arm, 0)
        assert log == (out / "metrics.jsonl").read_bytes()
        losses.add(str([json.loads(line).get("loss") for line in log.splitlines()]))
        runs.append(credit.read_run(out))
    assert len(losses) == 4
    found = credit.against_rivals(pd.DataFrame(runs))
    assert "area − DAPO" not in found["matters: dapo"]
    assert found["half: largest"]["area − DAPO"].n == 1


# ----------------------------------------------------------------------------------- 5. The report
def test_truth_and_gradients_are_recorded_once_and_reported(embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(credit, "ROOT", tmp_path)
    monkeypatch.setattr(credit, "LEAD", 3)
    monkeypatch.setattr(credit, "KEY", 1.0)  # four continuations are noisy
    settings = functools.partial(embedded, prompts_per_mini_batch=1, group_size=4)
    monkeypatch.setattr(credit, "settings", settings)
    for seed in credit.SEEDS:
        credit.record_truth(seed)
        credit.record_gradients(seed)
    files = list(credit.RUNS.rglob("*.*"))
    stamps = [file.stat().st_mtime_ns for file in files]
    credit.record_truth(0)
    credit.record_gradients(0)
    assert stamps == [file.stat().st_mtime_ns for file in files]

    for seed in credit.SEEDS:
        rows = torch.load(credit.truth_file(seed, 2), weights_only=True)
        assert len(rows["logp"]) == 8 and len(rows["V"]) == 2
        moved = torch.cat(rows["logp"]) - torch.cat(rows["old_logp"])
        assert moved.abs().max() > 1e-3

    t = credit.read_tokens(0, 2, tau=8.0)
    length = int(t["left"][0])
    future = 0.0
    for i in reversed(range(length)):
        assert t["future of −log π_old"][i] == pytest.approx(future, abs=1e-4)
        future = 2 ** (-1 / 8) * (future + t["−log π_old"][i])

    run = credit.RUNS / "matters" / "fipo-0"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"steps": 8}))
    evaluations = [
        {"step": step, "eval/accuracy": accuracy, "eval/response_length": 9.0}
        for step, accuracy in ((0, 0.2), (2, 0.6), (4, 1.0))
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, evaluations)))
    (run / "done").touch()

    (tmp_path / "assets" / "results").mkdir(parents=True)
    credit.report()
    results = json.loads((tmp_path / "assets" / "results" / "credit.json").read_text())
    at = results["truth"]["2"]
    assert 0 < at["key tokens, share"][0] < 1
    assert at["AUC, at the update, |F|"] == at["AUC, at the update, |F|, τ = 32"]
    gradients = results["gradients"]["lr 0.001"]
    bounds = results["bounds"]["lr 0.001, f in [0.8, 1.2]"]
    assert bounds["least"] < 1 - 1e-6
    assert bounds["bound"] == pytest.approx(0.9798, abs=5e-5)
    assert bounds["least"] <= gradients["cosine: [0.8, 1.2]"][0]
    assert bounds["n"] == 2 * 2 * 3
    assert gradients["|Σg|² / Σ|g|²"][0] > 0
    assert gradients["cosine: another mini-batch"][0] < 0.99
    assert results["runs"]["matters: fipo"]["final"][0] == 1.0
    runs = pd.read_csv(tmp_path / "assets" / "results" / "credit_runs.csv")
    # The run ended after step 4 of 8 and keeps its last accuracy.
    assert runs["curve"][0] == "0.2000 0.6000 1.0000 1.0000 1.0000"
    assert runs["area"][0] == pytest.approx((0.4 + 0.8 + 1 + 1) / 4)
    assert (tmp_path / "assets" / "credit.png").stat().st_size > 10_000


def test_over_seeds_leaves_out_missing_values_and_counts_the_rest():
    rows = [{"x": 1.0, "y": math.nan}, {"x": 3.0, "y": 2.0}, {"x": math.nan, "y": math.nan}]
    found = credit.over_seeds(pd.DataFrame(rows).assign(z=math.nan))
    assert (found["x"].mean, found["x"].n) == (2.0, 2)
    assert found["y"] == (2.0, None, 1)
    assert "z" not in found


def test_arms_are_compared_with_their_rivals_on_the_same_seeds():
    areas = {
        ("setting", "dapo", 0): 0.1,
        ("setting", "dapo", 1): 0.2,
        ("setting", "wide", 1): 0.5,
        ("setting", "more-dapo", 1): 0.3,
        ("setting", "more-wide", 1): 0.7,
        ("matters", "dapo", 1): 0.0,
        ("matters", "fipo-wide", 1): 0.2,
        ("matters", "oracle-wide", 1): 0.8,
        ("half", "largest", 1): 0.9,
        ("half", "random", 1): 0.5,
        ("half", "smallest", 1): 0.3,
    }
    runs = pd.DataFrame([(*arm, area, 0.5, 1.0) for arm, area in areas.items()])
    runs.columns = ["part", "arm", "seed", "area", "final", "length"]
    found = credit.against_rivals(runs)

    def differences(rival):
        name = f"area − {rival}"
        return {arm: numbers[name].mean for arm, numbers in found.items() if name in numbers}

    assert differences("DAPO") == pytest.approx(
        {
            "setting: wide": 0.3,
            "setting: more-wide": 0.4,
            "matters: fipo-wide": 0.2,
            "matters: oracle-wide": 0.8,
            "half: largest": 0.9,
            "half: random": 0.5,
            "half: smallest": 0.3,
        }
    )
    assert differences("FIPO") == pytest.approx({"matters: oracle-wide": 0.6})
    assert differences("random") == pytest.approx({"half: largest": 0.4, "half: smallest": -0.2})
    assert differences("smallest") == pytest.approx({"half: largest": 0.6})

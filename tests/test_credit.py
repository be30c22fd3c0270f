"""The truth about tokens, who finds it, and what f makes of DAPO's gradient (scripts/credit.py)."""

import dataclasses
import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
import torch

import credit
import fipo


@pytest.fixture
def embedded(small, monkeypatch, tmp_path):
    """The script in a folder of its own, with a run of two steps with two updates each for the embedded one."""

    def settings(**changed):
        changed.pop("pretrain_steps", None)
        return fipo.resolve(dataclasses.replace(small, **{"rollout_rows": 512} | changed))

    monkeypatch.setattr(credit, "settings", settings)
    monkeypatch.setattr(credit, "RUNS", tmp_path / "credit")
    monkeypatch.setattr(credit, "STEPS", (1, 2))
    monkeypatch.setattr(credit, "CONTINUATIONS", 4)
    monkeypatch.setattr(credit, "SEEDS", range(2))
    monkeypatch.setattr(credit, "RATES", (3e-4,))
    return settings


@pytest.fixture
def as_it_was(monkeypatch):
    """What an arm changes in fipo.py is undone at the end of the test."""
    for name in ("score_old_logp", "collate", "influence_weight"):
        monkeypatch.setattr(fipo, name, getattr(fipo, name))


def first_batch(cfg):
    """Sampler and responses at the first update of a run."""
    _, _, sampler, mini_batches = next(credit.updates(cfg))
    return sampler, [r for mini_batch in mini_batches for r in mini_batch]


def weights_of(folder) -> torch.Tensor:
    model = fipo.AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -------------------------------------------------------------------------------------------------- 1. The truth
def test_changes_of_value_add_up_to_the_outcome_minus_the_prompts_value(embedded):
    cfg = embedded()
    sampler, rollouts = first_batch(cfg)
    V = credit.values(sampler, rollouts, 8, cfg, "test")
    assert {len(v) - len(r.response_ids) for v, r in zip(V, rollouts)} == {1}
    for v, r in zip(V, rollouts):
        assert v.diff().sum().item() == pytest.approx(r.correct - v[0].item(), abs=1e-6)
    by_prompt = {}
    for v, r in zip(V, rollouts):
        by_prompt.setdefault(r.problem.prompt, set()).add(v[0].item())
    assert all(len(found) == 1 for found in by_prompt.values()), "a prompt has one value"
    assert len({value for found in by_prompt.values() for value in found}) > 1
    again = credit.values(sampler, rollouts[::-1], 8, cfg, "test")[::-1]
    assert all(torch.equal(a, b) for a, b in zip(V, again)), "the same question, the same answer"
    assert not all(torch.equal(a, b) for a, b in zip(V, credit.values(sampler, rollouts, 8, cfg, "another")))


class Foreseen:
    """A sampler under which a response is right if and only if its `place`-th token is the one of `rollout`."""

    def __init__(self, sampler, rollout, place):
        self.policy, self.start = sampler.policy, len(rollout.problem.prompt_ids)
        self.place, self.token = place, rollout.response_ids[place]
        self.answers = {right: self.policy.tokenizer(f"0\nAnswer: {answer}")["input_ids"]
                        for right, answer in ((True, rollout.problem.answer), (False, "none"))}  # fmt: skip

    def generate(self, problems, seeds, n, max_tokens, temperature, top_p):
        groups = []
        for problem in problems:
            sure = problem.prompt_ids[self.start :][self.place : self.place + 1] == [self.token]
            groups.append([fipo.Rollout(problem, self.answers[sure]) for _ in range(n)])
        return groups


@pytest.mark.parametrize("place", [0, 2, 5])
def test_the_token_that_decides_has_the_whole_change(embedded, place):
    """By hand: the value is 0 before the token that makes a response right, and 1 behind it."""
    cfg = embedded()
    sampler, rollouts = first_batch(cfg)
    r = next(r for r in rollouts if r.correct and place + 1 < len(r.response_ids) < 16)  # room for the stub's answer
    (V,) = credit.values(Foreseen(sampler, r, place), [r], 3, cfg, "test")
    assert V.diff().nonzero().flatten().tolist() == [place] and V.diff()[place] == 1


def test_the_prompts_value_is_the_accuracy_of_responses_to_it(embedded):
    cfg = embedded()
    sampler, rollouts = first_batch(cfg)
    some = rollouts[:: cfg.group_size]
    values = [v[0].item() for v in credit.values(sampler, some, 256, cfg, "test")]
    groups = fipo.sample(sampler, [r.problem for r in some], ("accuracy",), cfg, 256, 1.0, 1.0)
    for value, group in zip(values, groups):
        right = fmean(r.correct for r in group)
        assert value == pytest.approx(right, abs=0.15)  # more than 3 standard errors of the difference


def test_a_value_takes_no_more_tokens_than_the_response_may_have(embedded):
    """The prefix of an unfinished response at its limit has nothing left to win by."""
    cfg = embedded(max_response=4, overlong_buffer=0)
    policy = fipo.Policy(cfg.model, cfg)
    problem = fipo.encode_problems(cfg.data, policy, cfg)[0]
    ids = policy.tokenizer(f"Answer: {problem.answer}")["input_ids"]
    r = fipo.Rollout(problem, response_ids=ids[:4], sampler_logp=[0.0] * 4)
    V = credit.values(fipo.HFSampler(policy), [r], 16, cfg, "test")
    assert V[0].tolist() == [0.0] * 5  # "Answer:" alone has more than four tokens


def test_sure_tokens_keep_the_value_before_them(embedded):
    cfg = embedded()
    sampler, rollouts = first_batch(cfg)
    rollouts = rollouts[::4]
    whole = credit.values(sampler, rollouts, 32, cfg, "test")
    V, near = credit.values(sampler, rollouts, 32, cfg, "test", sure=0.9), []
    for v, exact, r in zip(V, whole, rollouts):
        inner = torch.tensor(r.sampler_logp[:-1]).exp() >= 0.9  # the last token's is the outcome
        assert inner.any() and not v[:-1].diff()[inner].any()
        near.append((v - exact)[:-1].abs().mean().item())
    assert fmean(near) < 0.1


def test_the_noise_rarely_passes_for_a_key_token():
    generator, n = torch.Generator().manual_seed(0), 64
    p = torch.rand(50_000, generator=generator)
    once, again = (torch.binomial(torch.full_like(p, n), p, generator=generator) / n for _ in range(2))
    assert (credit.z_score(once, again, n).abs() > credit.KEY).float().mean() < 0.002
    assert credit.z_score(torch.tensor(0.5), torch.tensor(0.9), n) > credit.KEY
    assert credit.z_score(torch.tensor(0.9), torch.tensor(0.5), n) < -credit.KEY
    assert torch.isfinite(credit.z_score(torch.tensor(0.0), torch.tensor(0.0), n))


def test_the_loop_that_is_looked_at_is_the_training_loop(embedded):
    cfg = embedded()
    fipo.train(cfg)
    *_, (_, _, sampler, _) = credit.updates(cfg)
    mine = torch.cat([p.detach().flatten() for p in sampler.policy.model.parameters()])
    assert torch.equal(mine, weights_of(fipo.newest_checkpoint(Path(cfg.out))))


# ------------------------------------------------------------------------------------------- 2. Who finds it
def test_auc_by_hand():
    score, positive = torch.tensor([3.0, 1.0, 2.0, 0.0, 2.0]), torch.tensor([True, True, False, False, False])
    assert credit.auc(score, positive) == pytest.approx((3 + 1) / 6)  # 3 beats three, 1 beats one of three
    assert credit.auc(torch.tensor([2.0, 2.0, 1.0]), torch.tensor([True, False, False])) == pytest.approx(0.75)  # a tie
    assert credit.auc(-score, positive) == pytest.approx(1 - 4 / 6)
    assert credit.auc(torch.ones(4), torch.tensor([True, False, False, True])) == 0.5
    assert math.isnan(credit.auc(score, torch.zeros(5, dtype=torch.bool)))


def test_auc_within_strata_compares_like_with_like():
    stratum = torch.tensor([0, 0, 0, 1, 1, 2])
    score, positive = torch.tensor([1.0, 0, 0, 9, 8, 0]), torch.tensor([True, False, False, False, True, True])
    assert credit.auc_within(score, positive, stratum) == pytest.approx(2 / 3)  # 1 beats two, 8 loses to 9, 0 is alone
    assert credit.auc_within(score, positive, torch.zeros(6)) == pytest.approx(credit.auc(score, positive))
    assert math.isnan(credit.auc_within(score, positive, torch.arange(6)))


def test_scores_are_those_of_the_loss_and_the_past_looks_back():
    delta = torch.tensor([0.0, 0.0, 0.3, 0.0, 0.0])
    found = credit.scores(delta, 1.0, tau=1.0)
    assert found["F"].tolist() == pytest.approx([0.075, 0.15, 0.3, 0, 0])
    assert found["|F − Δ|"].tolist() == pytest.approx([0.075, 0.15, 0, 0, 0])
    assert found["|past − Δ|"].tolist() == pytest.approx([0, 0, 0, 0.15, 0.075])
    assert found["f"].tolist() == pytest.approx([math.exp(0.075), math.exp(0.15), 1.2, 1, 1])
    assert credit.scores(-delta, -1.0)["f"].tolist() == [1.0] * 5
    assert credit.scores(-delta, -1.0)["|log f|"][2] == pytest.approx(math.log(1 / 0.8))


def test_key_tokens_are_described_and_what_leads_to_them_is_told_apart(monkeypatch):
    """By hand: a key token at place 3 of the first response, none in the second; all have five tokens."""
    key = torch.tensor([False, False, False, True, False] + [False] * 5)
    ahead = torch.cat([credit.until_next(key[:5]), credit.until_next(key[5:])])
    assert ahead[:4].tolist() == [3, 2, 1, 0] and (ahead[4:] > credit.LEAD).all()
    dV = torch.where(key, -0.5, 0.0)
    sure = torch.tensor([True, False, True, False, True] + [True, True, False, True, True])
    t = {"key": key, "key 1": key, "key 2": key, "ΔV": dV, "ΔV 1": dV, "ΔV 2": dV, "false": ~key & False,
         "ahead": ahead, "left": torch.tensor([5.0, 4, 3, 2, 1] * 2), "A": torch.tensor([-1.0] * 5 + [1.0] * 5),
         "−log π_old": torch.where(sure, 0.01, 1.0), "f": torch.where(key, 1.2, 1.0)}  # fmt: skip
    t |= {which: ahead.neg() for which in ("Δ", *credit.FINDERS, *credit.LEADERS) if which not in t}
    found = credit.describe(t)
    assert found["key tokens, share"] == pytest.approx(0.1) and found["key tokens that are bad"] == 1
    assert found["unsure tokens, share"] == pytest.approx(0.3)
    assert found["sure ones of the 8 before a key token"] == pytest.approx(2 / 3)
    assert found["f at bad key tokens"] == pytest.approx(1.2) and found["f elsewhere"] == 1
    assert math.isnan(found["f at good key tokens"]) and found["smallest jump of a key token"] == 0.5
    ranked = credit.rank_tokens(t, "now")
    assert ranked["AUC, now, f"] == 1 and ranked["AUC, now, −log π_old"] == pytest.approx(8 / 9)  # two ties of nine
    monkeypatch.setattr(credit, "LEAD", 4)
    leads = credit.rank_leads(t, "now")
    assert leads["2 before, now, |F|"] == 1 and leads["2 before, now, f"] == 0.5
    assert math.isnan(leads["4 before, now, |F|"])


# ------------------------------------------------------------------------------ 3. What f does with it
def test_the_bound_holds_on_orthogonal_gradients_and_is_reached():
    rng = random.Random(0)
    for _ in range(300):
        low = rng.uniform(0.1, 1)
        high, n = low * rng.uniform(1, 10), rng.randint(1, 40)
        g = torch.linalg.qr(torch.randn(64, n, dtype=torch.double)).Q * torch.rand(n, dtype=torch.double) ** 4
        w = torch.tensor([rng.choice([low, high, rng.uniform(low, high)]) for _ in range(n)], dtype=torch.double)
        assert credit.cosine((g * w).sum(1), g.sum(1)) >= credit.cosine_bound(low, high) - 1e-9
    assert credit.cosine_bound(1, 1.2) == pytest.approx(0.9959, abs=5e-5)
    low, high = 0.5, 2.0  # the worst: squares of the norms as high to low
    w, g = torch.tensor([low, high]), torch.tensor([high, low]).sqrt()
    assert credit.cosine(w * g, g) == pytest.approx(credit.cosine_bound(low, high))
    assert credit.cosine_bound(0, math.inf) == 0


def test_where_gradients_cancel_the_bound_does_not_hold():
    g = torch.tensor([[1.0, 0.1], [-0.9, 0.0]])
    w = torch.tensor([[1.0], [1.2]])
    assert credit.cosine((w * g).sum(0), g.sum(0)) < credit.cosine_bound(1.0, 1.2)
    assert g.sum(0).square().sum() / g.square().sum() < 0.1  # what `token_by_token` tells of it


def test_f_of_1_leaves_the_gradient_and_at_a_first_update_f_is_1(embedded):
    cfg = embedded(lr=1e-3, warmup_steps=0)
    for _, i, sampler, mini_batches in credit.updates(cfg):
        row, vectors = credit.compare_gradients(sampler.policy, mini_batches[i], cfg)
        again = credit.gradient(sampler.policy, mini_batches[i], cfg, (1.0, 1.0))
        assert credit.cosine(vectors["DAPO"], again) == pytest.approx(1, abs=1e-9)
        for name in credit.RANGES:
            if i == 0:
                assert row[f"cosine: {name}"] == pytest.approx(1, abs=1e-7)
                assert row[f"norm: {name}"] == pytest.approx(1, abs=1e-4)
            else:
                assert row[f"cosine: {name}"] < 1 - 1e-6 and abs(row[f"norm: {name}"] - 1) > 1e-6
                assert abs(credit.cosine(vectors[name], vectors["DAPO"])) < 1e-2  # the turn is across


def test_looking_changes_nothing(embedded):
    cfg = embedded()
    ends = []
    for look in (True, False):
        for _, i, sampler, mini_batches in credit.updates(cfg):
            if look:
                _, vectors = credit.compare_gradients(sampler.policy, mini_batches[i], cfg)
                credit.token_by_token(sampler.policy, mini_batches[i][:2], cfg, vectors["DAPO"])
                credit.values(sampler, mini_batches[i][:2], 2, cfg, "test")
        ends.append(torch.cat([p.detach().flatten() for p in sampler.policy.model.parameters()]))
    assert torch.equal(*ends)


def test_token_gradients_are_the_parts_of_the_whole(embedded):
    """Of a response with one token, the token's gradient is the loss's."""
    cfg = embedded()
    _, _, sampler, mini_batches = next(credit.updates(cfg))
    policy, r = sampler.policy, next(r for r in mini_batches[0] if len(r.response_ids) > 3)
    one = dataclasses.replace(
        r, response_ids=r.response_ids[:1], sampler_logp=r.sampler_logp[:1], old_logp=r.old_logp[:1]
    )
    total = credit.gradient(policy, [one], cfg, (1.0, 1.0))
    assert credit.squared_gradients(policy, one, cfg).tolist() == pytest.approx([total.square().sum().item()], rel=1e-3)
    row = credit.token_by_token(policy, [one], cfg, total)
    assert row["|Σg|² / Σ|g|²"] == pytest.approx(1, rel=1e-3) and row["if orthogonal: [1, 1.2]"] == pytest.approx(1)


def test_agreement_is_the_mean_cosine_of_pairs():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert credit.agreement([x, y]) == pytest.approx(0)
    assert credit.agreement([x, 3 * x, -x]) == pytest.approx(-1 / 3)
    assert credit.agreement([x, x + y / 2]) == pytest.approx(math.sqrt(0.5))


# ------------------------------------------------------------------------------- 4. – 6. Training with it
def test_the_oracle_weighs_what_moved_the_value_the_way_the_outcome_went(embedded):
    right, wrong = (fipo.Rollout(fipo.Problem("", ""), correct=c) for c in (True, False))
    delta_V = torch.tensor([0.5, 0.0, -0.5, 0.01])
    assert credit.oracle_weight(right, delta_V, (0.5, 2.0))[:3].tolist() == [2.0, 1.0, 0.5]
    assert credit.oracle_weight(wrong, delta_V, (0.5, 2.0))[:3].tolist() == [0.5, 1.0, 2.0]
    assert credit.oracle_weight(right, delta_V, (1.0, 1.2))[:3].tolist() == pytest.approx([1.2, 1.0, 1.0])
    assert credit.oracle_weight(right, delta_V, (1.0, 1.2))[3] == pytest.approx(1.2 ** (0.01 / credit.JUMP))


def test_advantages_of_tokens_reach_the_loss(embedded, as_it_was):
    """With the response's own advantage at each token the run is DAPO's, with others it is not."""
    cfg = embedded(algorithm="dapo")
    fipo.train(cfg)
    before, collate, ends = (fipo.score_old_logp, fipo.collate), fipo.collate, []
    for i, weigh in enumerate((lambda r, dV: torch.full_like(dV, r.advantage), lambda r, dV: dV)):
        fipo.score_old_logp, fipo.collate = before
        seen = []
        credit.know_values(cfg, lambda r, dV, weigh=weigh, seen=seen: seen.append((r, dV)) or weigh(r, dV))
        fipo.train(dataclasses.replace(cfg, out=cfg.out + str(i)))
        ends.append(weights_of(fipo.newest_checkpoint(Path(cfg.out + str(i)))))
        assert len(seen) == 2 * cfg.prompts_per_batch * cfg.group_size
        assert all(len(dV) == len(r.response_ids) for r, dV in seen)
    assert collate is not fipo.collate
    whole = weights_of(fipo.newest_checkpoint(Path(cfg.out)))
    assert torch.equal(ends[0], whole) and not torch.equal(ends[1], whole)


@pytest.mark.parametrize("which", credit.ARMS["half"])
def test_half_of_the_tokens_are_learnt_from(which, as_it_was):
    delta = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)) * 0.1
    mask, A = torch.arange(10) < torch.tensor([[10], [6], [4]]), torch.tensor([[1.0], [-1.0], [1.0]]).expand(3, 10)
    plain, _ = fipo.influence_weight(delta, A, mask)
    credit.learn_from_half(which, seed=0)
    F, f = fipo.influence_weight(delta, A, mask)
    assert torch.equal(F, plain) and not f[~mask].any() and set(f.unique().tolist()) == {0.0, 2.0}
    assert (f > 0).sum() == 10  # of 20
    if which.startswith("own"):
        assert (f > 0).sum(1).tolist() == [5, 3, 2]
    by = {"largest": F, "smallest": -F, "moved": delta.abs(), "early": -torch.arange(10.0).expand(3, 10)}
    by = by.get(which.removeprefix("own-"))
    if by is not None:
        for chosen, row, counts in zip(f > 0, by, mask) if which.startswith("own") else [(f > 0, by, mask)]:
            assert row[chosen].min() > row[counts & ~chosen].max()
    _, first = fipo.influence_weight(delta * 1e-7, A, mask)  # before any update F is nothing but rounding
    assert (first > 0).sum() == 10 and not torch.equal(first, f)


def test_every_arm_trains_and_is_not_repeated(embedded, as_it_was, monkeypatch):
    before = {name: getattr(fipo, name) for name in ("score_old_logp", "collate", "influence_weight")}
    curves = {}
    monkeypatch.setattr(credit, "FEW", 2)
    few = dict(group_size=8, prompts_per_batch=4, prompts_per_mini_batch=2, steps=1)
    for part, arm in (("matters", "dapo"), ("matters", "oracle-wide"), ("matters", "values"), ("half", "largest")):
        change, how, seeds = credit.ARMS[part][arm]
        monkeypatch.setitem(credit.ARMS[part], arm, (change, how | few, [0]))
        for name, value in before.items():  # each runs in a process of its own
            setattr(fipo, name, value)
        cfg = embedded()
        blank = dataclasses.replace(cfg, weight_range=None, clip_high=None, eval_data=cfg.data)
        monkeypatch.setattr(credit, "settings", lambda **how: fipo.resolve(dataclasses.replace(blank, **how)))  # noqa
        credit.train_arm(part, arm, 0)
        assert not (credit.RUNS / part / f"{arm}-0" / "checkpoints").exists()
        log = (credit.RUNS / part / f"{arm}-0" / "metrics.jsonl").read_bytes()
        credit.train_arm(part, arm, 0)
        assert log == (credit.RUNS / part / f"{arm}-0" / "metrics.jsonl").read_bytes()
        curves[arm] = [json.loads(line).get("loss") for line in log.splitlines()]
    assert len({str(curve) for curve in curves.values()}) == 4, "the arms differ"
    found = credit.against_rivals(credit.read_runs())
    assert "area − DAPO" not in found["matters: dapo"] and found["half: largest"]["area − DAPO"]


# --------------------------------------------------------------------------------------- the command
def test_parts_1_to_3_and_the_report(embedded, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(credit, "ROOT", tmp_path)
    monkeypatch.setattr(credit, "LEAD", 3)
    monkeypatch.setattr(credit, "KEY", 1.0)  # four continuations tell little
    monkeypatch.setattr(credit, "settings", lambda **how: embedded(prompts_per_mini_batch=1, **how))
    for seed in credit.SEEDS:
        credit.record_truth(seed)
        credit.record_gradients(seed, 3e-4)
    for file in (credit.RUNS / "truth").glob("*-2.pt"):
        rows = torch.load(file, weights_only=True)
        assert len(rows["ids"]) == 16 and len(rows["V"]) == 2
        moved = torch.cat(rows["logp"]) - torch.cat(rows["old_logp"])
        after = torch.cat(rows["after"]) - torch.cat(rows["old_logp"])
        assert moved.abs().max() > 1e-3 and not torch.equal(moved, after)
    stamps = {file: file.stat().st_mtime_ns for file in credit.RUNS.rglob("*.*")}
    credit.record_truth(0)
    credit.record_gradients(0, 3e-4)
    assert stamps == {file: file.stat().st_mtime_ns for file in credit.RUNS.rglob("*.*")}, "nothing is done twice"

    t, future = credit.read_truth(0, 2, tau=8.0), 0.0
    last = (t["left"] == 1).nonzero()[0, 0].item()  # of the first response
    for i in reversed(range(last + 1)):
        assert t["future of −log π_old"][i].item() == pytest.approx(future, abs=1e-4)
        future = 2 ** (-1 / 8) * (future + t["−log π_old"][i].item())

    credit.report()
    results = json.loads((tmp_path / "assets" / "results" / "credit.json").read_text())
    at = results["truth"]["2"]
    assert 0 < at["key tokens, share"][0] < 1
    assert at["AUC, at the update, |F|"] != at["AUC, after the step, |F|"]
    assert at["AUC, at the update, |F|"] == at["AUC, at the update, |F|, τ = 32"]
    gradients = results["gradients"]["lr 0.0003, step 2"]
    bounds = results["bounds"]["lr 0.0003, f in [0.8, 1.2]"]
    assert bounds["least"] < 1 - 1e-6 and bounds["bound"] == pytest.approx(0.9798, abs=5e-5)
    assert bounds["least"] <= gradients["cosine: [0.8, 1.2]"][0] and bounds["n"] == 2 * 2 * 3
    assert gradients["|Σg|² / Σ|g|²"][0] > 0 and gradients["cosine: another mini-batch"][0] < 0.99
    assert (tmp_path / "assets" / "credit.png").stat().st_size > 10_000
    assert "AUC, at the update, |F|" in capsys.readouterr().out


def test_a_part_that_lacks_another_says_so(embedded):
    for part in (credit.find, lambda: credit.read_gradients(3e-4)):
        with pytest.raises(fipo.FipoError, match="run `credit.py (truth|gradients)` first"):
            part()


def test_seeds_that_have_nothing_to_tell_are_left_out_and_counted():
    found = credit.over_seeds([{"x": 1.0, "y": math.nan}, {"x": 3.0, "y": 2.0}, {"x": math.nan, "y": math.nan}])
    assert found["x"][::2] == (2.0, 2) and found["y"] == (2.0, None, 1)


def test_arms_are_compared_with_dapo_of_their_own_setting():
    """On the same seeds."""
    base = {"final": 0.5, "length": 1.0, "oracle/correlation": None, "influence_last": None}
    areas = {("setting", "dapo", 0): 0.1, ("setting", "dapo", 1): 0.2, ("setting", "wide", 1): 0.5,
             ("setting", "more-dapo", 1): 0.3, ("setting", "more-wide", 1): 0.7,
             ("matters", "dapo", 1): 0.0, ("half", "largest", 1): 0.9, ("half", "random", 1): 0.5,
             ("half", "smallest", 1): 0.3, ("matters", "fipo-wide", 1): 0.2,
             ("matters", "oracle-wide", 1): 0.8}  # fmt: skip
    runs = [base | dict(zip(("part", "arm", "seed"), which), area=area) for which, area in areas.items()]
    found = credit.against_rivals(runs)
    assert {name: row["area − DAPO"][0] for name, row in found.items() if "area − DAPO" in row} == pytest.approx(
        {"setting: wide": 0.3, "setting: more-wide": 0.4, "half: largest": 0.9, "half: random": 0.5,
         "half: smallest": 0.3, "matters: fipo-wide": 0.2, "matters: oracle-wide": 0.8})  # fmt: skip
    assert [name for name, row in found.items() if "area − FIPO" in row] == ["matters: oracle-wide"]
    assert [name for name, row in found.items() if "area − random" in row] == ["half: largest", "half: smallest"]
    assert [name for name, row in found.items() if "area − smallest" in row] == ["half: largest"]
    assert found["matters: oracle-wide"]["area − FIPO"][0] == pytest.approx(0.6)
    assert found["half: largest"]["area − random"][0] == pytest.approx(0.4)
    assert found["half: largest"]["area − smallest"][0] == pytest.approx(0.6)


def test_the_command_has_its_help(capsys):
    with pytest.raises(SystemExit):
        credit.main(["--help"])
    said = capsys.readouterr().out
    assert all(part in said for part in ("truth", "finds", "gradients", "matters", "half", "setting", "report"))

"""Values of prefixes, scores of tokens, gradients and training arms of scripts/credit.py."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch

import bench_compare
import credit
import fipo

pytestmark = pytest.mark.slow

REPLACED = {name: getattr(fipo, name) for name in ("score_old_logp", "collate", "influence_weight")}


@pytest.fixture
def embedded(small, monkeypatch, tmp_path):
    """Replace the embedded run by two steps with two updates each, in a folder of its own."""

    def settings(**changes):
        defaults = {"rollout_rows": 512, "warmup_steps": 1}
        return fipo.resolve(dataclasses.replace(small, **defaults | changes))

    monkeypatch.setattr(credit, "settings", settings)
    monkeypatch.setattr(credit, "RUNS", tmp_path / "credit")
    monkeypatch.setattr(credit, "STEPS", (1, 2))
    monkeypatch.setattr(credit, "CONTINUATIONS", 4)
    monkeypatch.setattr(credit, "SEEDS", range(2))
    monkeypatch.setattr(credit, "BEST_LR", 1e-3)
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


def are_equal(rows, others) -> bool:
    return all(torch.equal(row, other) for row, other in zip(rows, others))


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
        value = v[0].item()
        assert v.diff().sum().item() == pytest.approx(r.correct - value, abs=1e-6)
        assert by_prompt.setdefault(r.problem.prompt, value) == value
    assert len(set(by_prompt.values())) > 1

    in_reverse = credit.values(policy, rollouts[::-1], 8, cfg, "test")
    assert are_equal(V, in_reverse[::-1])
    with_another_seed = credit.values(policy, rollouts, 8, cfg, "another")
    assert not are_equal(V, with_another_seed)


class DecidedByOneToken:
    """A sampler under which a response is correct if and only if one token is that of `rollout`."""

    def __init__(self, policy, rollout, place):
        self.policy = policy
        self.start = len(rollout.problem.prompt_ids)
        self.place = place
        self.token = rollout.response_ids[place]
        self.right = policy.tokenizer(f"0\nAnswer: {rollout.problem.answer}")["input_ids"]
        self.wrong = policy.tokenizer("0\nAnswer: none")["input_ids"]

    def generate(self, problems, seeds, n, max_tokens, temperature, top_p):
        groups = []
        for problem in problems:
            response = problem.prompt_ids[self.start :]
            has_token = response[self.place : self.place + 1] == [self.token]
            answer = self.right if has_token else self.wrong
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
        change = V.diff()
        assert change.nonzero().flatten().tolist() == [place]
        assert change[place] == 1


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
        before_the_last = v[:-1]
        assert not before_the_last.diff()[sure].any()
        error = before_the_last - v_exact[:-1]
        errors.append(error.abs().mean().item())
    assert fmean(errors) < 0.1


def test_noise_rarely_makes_a_key_token():
    generator = torch.Generator().manual_seed(0)
    n = 64
    p = torch.rand(50_000, generator=generator)
    trials = torch.full_like(p, n)
    once = torch.binomial(trials, p, generator=generator) / n
    again = torch.binomial(trials, p, generator=generator) / n
    is_key = credit.z_score(once, again, n).abs() > credit.KEY
    assert is_key.float().mean() < 0.002
    before = torch.tensor([0.5, 0.9, 0.0])
    after = torch.tensor([0.9, 0.5, 0.0])
    up, down, none = credit.z_score(before, after, n)
    assert up > credit.KEY
    assert down < -credit.KEY
    assert torch.isfinite(none)


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
    expected = {
        "F": [0.075, 0.15, 0.3, 0, 0],
        "|F − Δ|": [0.075, 0.15, 0, 0, 0],
        "|past − Δ|": [0, 0, 0, 0.15, 0.075],
        "f": [math.exp(0.075), math.exp(0.15), 1.2, 1, 1],
    }
    found = credit.scores(delta, 1.0 * mask, mask, tau=1.0)
    for name, values in expected.items():
        assert found[name][0].tolist() == pytest.approx(values)
    negative = credit.scores(-delta, -1.0 * mask, mask)
    assert negative["f"].tolist() == [[1.0] * 5]
    assert negative["|log f|"][0, 2] == pytest.approx(math.log(1 / 0.8))


def test_key_tokens_and_their_leads_are_told_apart(monkeypatch):
    """By hand: two responses of five tokens, with a key token at place 3 of the first one."""
    key = torch.zeros(2, 5, dtype=torch.bool)
    key[0, 3] = True
    ahead = credit.until_next(key)
    assert ahead[0, :4].tolist() == [3, 2, 1, 0]
    assert torch.isinf(ahead[0, 4])
    assert torch.isinf(ahead[1]).all()

    t = pd.DataFrame({"key": key.flatten(), "ahead": ahead.flatten()})
    t["left"] = [5.0, 4, 3, 2, 1] * 2
    t["unsure"] = [False, True, False, True, False] + [False, False, True, False, False]
    t["−log π_old"] = t["unsure"].map({True: 1.0, False: 0.01})
    t["f"] = t["key"].map({True: 1.2, False: 1.0})
    for name in (*credit.FINDERS, *credit.LEADERS):
        if name not in t:
            t[name] = -t["ahead"]

    monkeypatch.setattr(credit, "LEAD", 4)
    ranked = credit.rank(t)
    assert ranked["key tokens, share"] == pytest.approx(0.1)
    assert ranked["unsure tokens, share"] == pytest.approx(0.3)
    assert ranked["AUC, at the update, f"] == 1
    assert ranked["AUC, at the update, −log π_old"] == pytest.approx(8 / 9)  # two ties of nine
    assert ranked["2 before, at the update, |F − Δ|"] == 1
    assert ranked["2 before, at the update, f"] == 0.5
    assert math.isnan(ranked["4 before, at the update, |F − Δ|"])


# -------------------------------------------------------------------- 3. How f turns the gradient
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
        credit.values(policy, mini_batches[i][:2], 2, cfg, "test")
    assert torch.equal(weights_of(policy.model), trained_weights(cfg.out))


# -------------------------------------------------------------- 4. Training with f or an oracle
def test_oracle_weight_follows_the_outcome():
    right = fipo.Rollout(fipo.Problem("", ""), correct=True)
    wrong = fipo.Rollout(fipo.Problem("", ""), correct=False)
    delta_V = torch.tensor([0.5, 0.0, -0.5, 0.01])
    for_right = credit.oracle_weight(right, delta_V, 0.5, 2.0)
    for_wrong = credit.oracle_weight(wrong, delta_V, 0.5, 2.0)
    assert for_right[:3].tolist() == [2.0, 1.0, 0.5]
    assert for_wrong[:3].tolist() == [0.5, 1.0, 2.0]
    small = 1.2 ** (0.01 / credit.JUMP)
    weight = credit.oracle_weight(right, delta_V, 1.0, 1.2)
    assert weight.tolist() == pytest.approx([1.2, 1.0, 1.0, small])


def test_the_oracle_reaches_the_loss(embedded, restore_fipo, monkeypatch):
    """With an oracle's f of 1 at every token the run is DAPO's, and with [0.5, 2] it is not."""
    monkeypatch.setattr(credit, "FEW", 4)
    cfg = embedded(algorithm="dapo", group_size=4)
    fipo.train(cfg)
    dapo = trained_weights(cfg.out)
    oracle_weight = credit.oracle_weight
    has_right_length = []

    def watched_weight(r, delta_V, low, high):
        has_right_length.append(len(delta_V) == len(r.response_ids))
        return oracle_weight(r, delta_V, low, high)

    monkeypatch.setattr(credit, "oracle_weight", watched_weight)
    for weight_range in ([1.0, 1.0], [0.5, 2.0]):
        restore_fipo()
        credit.use_oracle(dataclasses.replace(cfg, weight_range=weight_range))
        out = f"{cfg.out}-{weight_range[1]}"
        fipo.train(dataclasses.replace(cfg, out=out))
        is_dapo = weight_range == [1.0, 1.0]
        assert torch.equal(trained_weights(out), dapo) == is_dapo
    assert has_right_length == [True] * (2 * cfg.steps * cfg.prompts_per_batch * cfg.group_size)


@pytest.mark.parametrize("which", credit.ARMS["half"])
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
    others = mask & ~chosen
    if which == "largest":
        assert F[chosen].min() > F[others].max()
    if which == "smallest":
        assert F[chosen].max() < F[others].min()
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
    arms = (("matters", "dapo"), ("matters", "oracle-wide"), ("half", "largest"))
    for part, arm in arms:
        restore_fipo()  # every run has a process of its own
        credit.train_arm(part, arm, 0)
        out = credit.RUNS / part / f"{arm}-0"
        assert not (out / "checkpoints").exists()
        log = (out / "metrics.jsonl").read_bytes()
        credit.train_arm(part, arm, 0)
        assert log == (out / "metrics.jsonl").read_bytes()
        last = json.loads(log.splitlines()[-1])
        losses.add(last["loss"])
        runs.append(credit.read_run(out))
    assert len(losses) == 3
    found = credit.compare_arms(pd.DataFrame(runs))
    assert "area − dapo" not in found["dapo"].index
    assert found["largest"].loc["area − dapo", "n"] == 1


# ----------------------------------------------------------------------------------- 5. The report
def write_run(part, arm, accuracies):
    """Write what a finished run of seed 0 leaves, with an evaluation every second step."""
    run = credit.RUNS / part / f"{arm}-0"
    run.mkdir(parents=True)
    evaluations = []
    for i, accuracy in enumerate(accuracies):
        line = {"step": 2 * i, "eval/accuracy": accuracy, "eval/response_length": 9.0}
        evaluations.append(json.dumps(line))
    (run / "metrics.jsonl").write_text("\n".join(evaluations))
    (run / "done").touch()


def test_truth_and_gradients_are_recorded_once_and_reported(embedded, monkeypatch):
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
        assert len(rows["logp"]) == len(rows["V"]) == 8
        moved = torch.cat(rows["logp"]) - torch.cat(rows["old_logp"])
        assert moved.abs().max() > 1e-3

    t = credit.read_tokens(0, 2)
    length = int(t["left"][0])
    future = 0.0
    for i in reversed(range(length)):
        assert t["future of −log π_old"][i] == pytest.approx(future, abs=1e-4)
        future = 2 ** (-1 / 32) * (future + t["−log π_old"][i])

    for part, arms in credit.ARMS.items():
        for arm in arms:
            write_run(part, arm, [0.2, 0.6, 1.0] if arm == "fipo" else [0.2, 0.4, 0.6])
    credit.report()
    results = pd.read_csv(credit.RUNS / "credit.csv", index_col=[0, 1])["mean"]
    assert 0 < results["step 2", "key tokens, share"] < 1
    assert 0.1 < results["step 2", "AUC, at the update, |F|"] < 1
    gradients = results["gradients"]
    assert gradients["cosine: [0.8, 1.2]"] < 1 - 1e-6
    assert gradients["cosine: another mini-batch"] < 0.99
    assert results["fipo", "final"] == 1.0
    assert results["fipo", "area − dapo"] == pytest.approx(0.6 - 0.4)
    runs = pd.read_csv(credit.RUNS / "credit_runs.csv").set_index("arm")
    assert runs["curve"]["fipo"] == "0.2000 0.6000 1.0000"
    assert runs["area"]["fipo"] == pytest.approx((0.4 + 0.8) / 2)
    assert drawn_names(credit.RUNS) == set(credit.FINDINGS)


def drawn_names(folder):
    return {path.stem for path in folder.glob("*.png") if path.stat().st_size > 10_000}


def test_the_committed_results_can_be_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_compare, "ASSETS", tmp_path)
    credit.pictures()
    bench_compare.pictures()
    assert drawn_names(tmp_path) == {*credit.FINDINGS, "compare", "qwen"}


def test_titles_of_the_pictures_agree_with_the_committed_results():
    tables = credit.read_committed()
    gains = {}
    for arm in (*credit.ARM_STYLES, *credit.HALF_STYLES):
        if arm != "dapo":
            gains[arm] = tables[arm].loc["area − dapo"]
            assert gains[arm]["n"] == 10
    assert gains["oracle-wide"]["mean"] == pytest.approx(0.017, abs=5e-4)
    assert gains["oracle-wide"]["mean"] > gains["oracle-wide"]["half"]
    for arm in ("fipo", "fipo-wide"):
        assert gains[arm]["mean"] < 0
    assert gains["largest"]["mean"] == pytest.approx(-0.03, abs=5e-3)
    assert gains["random"]["mean"] == pytest.approx(-0.05, abs=5e-3)
    cosine = tables["gradients"].loc["cosine: [1, 1.2]", "mean"]
    assert math.degrees(math.acos(cosine)) == pytest.approx(3, abs=0.5)


def test_over_seeds_leaves_out_missing_values_and_counts_the_rest():
    rows = [{"x": 1.0, "y": math.nan}, {"x": 3.0, "y": 2.0}, {"x": math.nan, "y": math.nan}]
    found = credit.over_seeds(pd.DataFrame(rows).assign(z=math.nan))
    assert found.loc["x", ["mean", "n"]].tolist() == [2.0, 2]
    assert found.loc["y", ["mean", "n"]].tolist() == [2.0, 1]
    assert math.isnan(found.loc["y", "half"])
    assert "z" not in found.index


def test_arms_are_compared_on_the_same_seeds():
    areas = {
        ("dapo", 0): 0.1,
        ("dapo", 1): 0.2,
        ("fipo", 1): 0.5,
        ("random", 0): 0.4,
        ("random", 1): 0.3,
    }
    runs = pd.DataFrame([(*arm, area, 0.5, 1.0) for arm, area in areas.items()])
    runs.columns = ["arm", "seed", "area", "final", "length"]
    found = credit.compare_arms(runs)
    differences = {}
    for arm, numbers in found.items():
        for name, numbers_of_row in numbers.iterrows():
            if name.startswith("area − "):
                differences[arm, name] = numbers_of_row["mean"]
    assert differences == pytest.approx(
        {
            ("dapo", "area − fipo"): -0.3,
            ("dapo", "area − random"): -0.2,
            ("fipo", "area − dapo"): 0.3,
            ("fipo", "area − random"): 0.2,
            ("random", "area − dapo"): 0.2,
            ("random", "area − fipo"): -0.2,
        }
    )

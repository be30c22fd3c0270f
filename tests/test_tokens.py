"""Which tokens did RL change: the measures, token replacement, the token map."""

import dataclasses
import gc
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from array import array
from html.parser import HTMLParser

import matplotlib.image
import pytest
import torch
from conftest import ROOT, flags, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import fipo
import tokens
from fipo import derive_seed
from tokens import ReplacingSampler, Response, TokensConfig, compare


@pytest.fixture(scope="module")
def trained(base, sums, tmp_path_factory) -> str:
    """The base after two batches of rollouts at a high learning rate: near it, and yet another policy."""
    out = tmp_path_factory.mktemp("trained")
    cfg = fipo.Config(model=base, data=sums, out=str(out / "run"), steps=2, group_size=8, prompts_per_batch=4,
                      prompts_per_mini_batch=2, max_prompt=16, max_response=32, overlong_buffer=8, lr=1e-3,
                      warmup_steps=0)  # fmt: skip
    fipo.train(cfg)
    return str(out / "run" / "checkpoints" / "step_000002")


@pytest.fixture(scope="module")
def cfg(base, trained, sums) -> TokensConfig:
    return TokensConfig(data=sums, max_prompt=16, max_response=24, base=base, trained=trained, problems=6, seeds=2)


@pytest.fixture(scope="module")
def pair(cfg):
    return {"base": fipo.Policy(cfg.base, cfg), "trained": fipo.Policy(cfg.trained, cfg)}


@pytest.fixture(scope="module")
def problems(cfg, pair):
    return fipo.encode_problems(cfg.data, pair["base"], cfg)[: cfg.problems]


SEEDS = list(range(6))


def alone(policy, problems, seeds=SEEDS):
    """Both responses to each problem, problem by problem."""
    groups = fipo.HFSampler(policy).generate(problems, seeds, 2, 24, 1.0, 1.0)
    return [Response(**vars(r)) for group in groups for r in group]


def replaced(pair, problems, writer, criterion, threshold, extrapolate=0.0):
    sampler = ReplacingSampler(pair, writer, criterion, threshold, extrapolate)
    return [r for group in sampler.generate(problems, SEEDS, 2, 24, 1.0, 1.0) for r in group]


def ids(responses):
    return [list(r.response_ids) for r in responses]


# -------------------------------------------------------------------------------------------------------- measures


def test_the_measures_are_their_formulas():
    """Each against a sum over the vocabulary, term by term, in double precision."""
    torch.manual_seed(0)
    base, trained = (3 * torch.randn(5, 7), 3 * torch.randn(5, 7))
    token = torch.tensor([0, 6, 3, 3, 1])
    found = compare(base.log_softmax(-1), trained.log_softmax(-1), token)
    for n in range(5):
        q, p = (x[n].double().softmax(-1).tolist() for x in (base, trained))
        m = [(a + b) / 2 for a, b in zip(p, q)]
        kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q))  # noqa: E731
        expected = {
            "delta_logp": math.log(p[token[n]] / q[token[n]]),
            "kl": kl(p, q),
            "js": (kl(p, m) + kl(q, m)) / 2,
            "entropy_base": -sum(a * math.log(a) for a in q),
            "entropy_trained": -sum(a * math.log(a) for a in p),
            "base": math.log(q[token[n]]),
            "trained": math.log(p[token[n]]),
        }
        assert {name: values[n].item() for name, values in found.items()} == pytest.approx(expected, abs=1e-5)
    assert set(found) == {*tokens.MEASURES, "base", "trained"}


def test_equal_policies_do_not_differ():
    logp = torch.randn(4, 9).log_softmax(-1)
    found = compare(logp, logp, torch.zeros(4).long())
    assert all(found[name].abs().max() < 1e-6 for name in ("delta_logp", "kl", "js"))


def test_two_models_are_measured_at_each_token_of_each_response(cfg, pair, problems):
    """However the responses are cut into passes and the logits into chunks: as from the models' full logits."""
    responses = [r for who in pair for r in alone(pair[who], problems)]
    for tokens_per_micro_batch, chunk in ((32768, 1024), (64, 5)):
        tokens.measure(responses, dataclasses.replace(cfg, tokens_per_micro_batch=tokens_per_micro_batch), chunk)
        for r in responses:
            row = torch.tensor([[*r.problem.prompt_ids, *r.response_ids]])
            start = len(r.problem.prompt_ids)
            with torch.no_grad():
                logp = [pair[who].model(row).logits[0, start - 1 : -1].log_softmax(-1) for who in pair]
            for name, direct in compare(*logp, row[0, start:]).items():
                torch.testing.assert_close(r.measures[name], direct, atol=2e-5, rtol=1e-4)
    assert tokens.values_of(responses, "delta_logp").abs().max() > 0.1, "the models must differ"


def test_the_extreme_tokens_are_shown_in_their_context(cfg, pair, problems):
    responses = alone(pair["base"], problems)
    tokens.measure(responses, cfg)
    found = tokens.summarize("base", responses, pair["base"].tokenizer, 1e-3)
    every = tokens.values_of(responses, "delta_logp").sort().values
    smallest, largest = found["smallest_delta_logp"], found["largest_delta_logp"]
    assert smallest[0]["delta_logp"] == every[0].item() and largest[0]["delta_logp"] == every[-1].item()
    texts = [pair["base"].tokenizer.decode([*r.problem.prompt_ids, *r.response_ids]) for r in responses]
    for shown, sign in ((smallest, 1), (largest, -1)):
        assert len(shown) == 20 == len({(t["before"], t["token"]) for t in shown}), "twenty, each once"
        assert [t["delta_logp"] for t in shown] == sorted((t["delta_logp"] for t in shown), key=lambda x: sign * x)
        assert all(any(t["before"] + t["token"] + t["after"] in text for text in texts) for t in shown)
    below = found["share_below"]["delta_logp"]
    assert below["0.1"] == pytest.approx((every.abs() < 0.1).float().mean().item())
    assert 0 < below["0.01"] <= below["0.1"] <= below["1"] <= 1
    assert found["accuracy"] == sum(r.correct for r in responses) / len(responses)
    assert found["response_length"] == sum(len(r.response_ids) for r in responses) / len(responses)


def test_a_model_that_scales_its_logits_is_refused(cfg, pair, problems):
    """Scores are made from hidden states and head: where a model does more behind its head, they would be wrong."""
    responses = alone(pair["base"], problems)
    tokens.measure(responses, cfg)
    tokens.summarize("base", responses, pair["base"].tokenizer, 1e-3)
    responses[0].sampler_logp = array("f", [x - 1 for x in responses[0].sampler_logp])
    with pytest.raises(fipo.FipoError, match="scales or caps its logits"):
        tokens.summarize("base", responses, pair["base"].tokenizer, 1e-3)


# ----------------------------------------------------------------------------------------------- token replacement


@pytest.mark.parametrize("criterion", tokens.CRITERIA)
@pytest.mark.parametrize("writer, other", [("base", "trained"), ("trained", "base")])
def test_never_is_the_writer_and_always_is_the_other_model(pair, problems, writer, other, criterion):
    never = replaced(pair, problems, writer, criterion, math.inf)
    assert ids(never) == ids(alone(pair[writer], problems)) and not any(r.replaced for r in never)
    always = replaced(pair, problems, writer, criterion, -math.inf)
    assert ids(always) == ids(alone(pair[other], problems, [derive_seed(seed, "other") for seed in SEEDS]))
    assert all(r.replaced == len(r.response_ids) for r in always)
    assert ids(never) != ids(always)


def test_replaced_tokens_are_counted(pair, problems):
    """The random criterion fires where its own random number is high: count these numbers."""
    responses = replaced(pair, problems, "base", "random", 0.7)
    generators = [torch.Generator().manual_seed(derive_seed(seed, "random")) for seed in SEEDS]
    u = torch.cat([torch.rand(2, 24, generator=generator) for generator in generators])
    for r, numbers in zip(responses, u):
        assert r.replaced == (numbers[: len(r.response_ids)] >= 0.7).sum().item()
    assert all(sum(r.replaced for r in responses[j::2]) > 0 for j in (0, 1))


def test_what_is_written_together_does_not_depend_on_what_is_beside_it(pair, problems):
    together = replaced(pair, problems, "base", "random", 0.5)
    sampler = ReplacingSampler(pair, "base", "random", 0.5, 0.0)
    for i, problem in enumerate(problems):
        (group,) = sampler.generate([problem], [SEEDS[i]], 2, 24, 1.0, 1.0)
        assert ids(group) == ids(together[2 * i : 2 * i + 2])


@pytest.mark.parametrize("writer, sign", [("base", -1), ("trained", 1)])
def test_a_token_is_replaced_where_the_other_model_likes_it_less(cfg, pair, problems, writer, sign):
    """Base writes: Δlog p ≤ −threshold; trained writes: Δlog p ≥ threshold. Until it fires, the writer's own text."""
    own, threshold = alone(pair[writer], problems), 0.05
    tokens.measure(own, cfg)
    changed = 0
    for r, new in zip(own, ids(replaced(pair, problems, writer, "delta_logp", threshold))):
        fires = (sign * r.measures["delta_logp"] >= threshold).nonzero()[:, 0].tolist()
        first = fires[0] if fires else len(r.response_ids)
        assert new[:first] == list(r.response_ids)[:first]
        changed += new != list(r.response_ids)
        assert fires or new == list(r.response_ids)
    assert changed, "some token must be replaced for this to say anything"


def test_extrapolation_goes_beyond_the_trained_model(cfg, pair, problems):
    """Drawn from softmax((1 + γ) log π_RL − γ log π_base), at every position."""
    for r in replaced(pair, problems, "base", "extrapolated", -math.inf, extrapolate=0.5):
        row, start = torch.tensor([[*r.problem.prompt_ids, *r.response_ids]]), len(r.problem.prompt_ids)
        with torch.no_grad():
            base, trained = (pair[who].model(row).logits[0, start - 1 : -1].log_softmax(-1) for who in pair)
        beyond = (1.5 * trained - 0.5 * base).log_softmax(-1)
        chosen = torch.tensor(list(r.response_ids))[:, None]
        torch.testing.assert_close(torch.tensor(r.sampler_logp), beyond.gather(1, chosen)[:, 0], atol=1e-4, rtol=1e-4)
    assert (beyond - trained).abs().max() > 1e-3


def test_the_sweep(cfg, pair, problems):
    """Thresholds fall as fractions rise; curves begin near nothing; what is reported is what a run at that threshold
    gives, response by response, from the same seeds as the writer's own responses."""
    written = {who: tokens.write(fipo.HFSampler(pair[who]), who, problems, cfg) for who in pair}
    for who in pair:
        seeds = [derive_seed(cfg.seed, "tokens", who, i) for i in range(len(problems))]
        own = fipo.HFSampler(pair[who]).generate(problems, seeds, cfg.seeds, cfg.max_response, 1.0, 1.0)
        assert [list(r.response_ids) for seed in zip(*own) for r in seed] == ids(written[who])
    tokens.measure(written["base"] + written["trained"], cfg)
    rows = tokens.replace_tokens(problems, written, dataclasses.replace(cfg, rollout_rows=8))  # in two batches
    for writer, criterion in {(row["writer"], row["criterion"]) for row in rows}:
        mine = [row for row in rows if (row["writer"], row["criterion"]) == (writer, criterion)]
        thresholds = [row["threshold"] for row in mine]
        assert thresholds == sorted(thresholds, reverse=True) and thresholds[-1] > 0
        assert max(mine[0]["fraction"]) < 0.1
    random = [row for row in rows if row["criterion"] == "random"]
    assert len(random) == 2 * len(tokens.FRACTIONS)
    for row, fraction in zip(random, 2 * tokens.FRACTIONS):
        assert sum(row["fraction"]) / cfg.seeds == pytest.approx(fraction, abs=0.1)
    row = next(row for row in rows if (row["writer"], row["criterion"]) == ("base", "kl"))
    seeds = [derive_seed(cfg.seed, "tokens", "base", i) for i in range(len(problems))]
    sampler = ReplacingSampler(pair, "base", "kl", row["threshold"], 0.0)
    groups = sampler.generate(problems, seeds, cfg.seeds, cfg.max_response, 1.0, 1.0)
    for j in range(cfg.seeds):
        seed = [group[j] for group in groups]
        assert row["fraction"][j] == sum(r.replaced for r in seed) / sum(len(r.response_ids) for r in seed)
        read = [pair["base"].tokenizer.decode(list(r.response_ids), skip_special_tokens=True) for r in seed]
        right = [fipo.verify(text, problem.answer) for text, problem in zip(read, problems)]
        assert row["accuracy"][j] == sum(right) / len(right)


def test_a_pair_without_a_difference_has_no_curve(cfg, base, problems, pair):
    """Where nothing changed, no token is to be replaced: Δlog p and KL do not fire at thresholds of 0."""
    same = dataclasses.replace(cfg, trained=base)
    written = {who: tokens.write(fipo.HFSampler(pair["base"]), who, problems, same) for who in pair}
    tokens.measure(written["base"] + written["trained"], same)
    found = {row["criterion"] for row in tokens.replace_tokens(problems, written, same)}
    assert found == {"entropy", "random"}


def test_the_fraction_that_is_needed():
    points = [(0.0, 0.2, 0.0), (0.1, 0.6, 0.0), (0.3, 0.97, 0.0), (0.2, 1.0, 0.0)]
    assert tokens.fraction_needed(points, end=1.0, share=0.5) == (0.0, 0.1)
    assert tokens.fraction_needed(points, end=1.0, share=0.9) == (0.1, 0.3)
    assert tokens.fraction_needed(points, end=1.0) == (0.1, 0.3)
    assert tokens.fraction_needed(points[:2], end=1.0) is None
    assert tokens.fraction_needed([(0.0, 0.9, 0.0), (0.1, 0.3, 0.0)], end=0.3) == (0.0, 0.1), "downwards too"
    assert tokens.fraction_needed(points, end=0.2) is None, "nowhere to go: both models are as good"


# ---------------------------------------------------------------------------------------------------- the token map


class Page(HTMLParser):
    """The tags, styles and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.marks, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "i":
            self.marks.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


def test_the_token_map_needs_nothing_but_itself():
    odd = ['<b>"', "&amp;", "\n", "é", "'"]
    rows = [{"caption": "a <caption>", "prompt": "p & q", "tokens": odd, "delta_logp": [-2.0, 0, 1, 0.5, 1e-9],
             "F": [0.1, -0.1, 0, 0, 0], "f": [1.2, 1, 1, 1, 1]},
            {"caption": "no update", "prompt": "p", "tokens": ["x"], "delta_logp": [4.0]}]  # fmt: skip
    text = tokens.token_map(rows, "A note.")
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags) and "://" not in text and "url(" not in text
    assert page.tags.count("input") == 3 and "a <caption>" in page.text and "p & q" in page.text
    assert "".join(odd).replace("\n", "⏎\n") in page.text
    first, last = page.marks[0], page.marks[-1]
    assert "Δlog p -2, F 0.1, f 1.2" in first["title"] and "Δlog p 4" in last["title"] and "F" not in last["title"]
    assert "--delta_logp-line:dotted" in first["style"] and "--delta_logp-line:solid" in last["style"]
    assert f"--delta_logp:{tokens.shade(-0.5)}" in first["style"] and f"--f:{tokens.shade(1)}" in first["style"]
    legend = re.findall(r'class="legend f">f: (.*?)</div>', text)[0]
    assert re.findall(r">([^<>]+)</b>", legend) == ["1", "1.2"], "the ends that occur, and the neutral value"


def test_a_character_of_several_tokens_is_shown_once(reader):
    """Byte tokens: é is two of them, 思 three. Nothing is lost, and nothing is torn."""
    tokenizer = AutoTokenizer.from_pretrained(reader)
    for text in ("aé思b", "x" * 30 + "思考 é", "\n\n$$<b>"):
        shown = list(tokens.token_texts(tokenizer(text)["input_ids"], tokenizer))
        assert "".join(shown).replace("▯", "") == text and "\ufffd" not in "".join(shown)
        assert len(shown) == len(text.encode())


def test_colours_have_a_sign_and_a_strength():
    assert tokens.shade(0) == "#ffffff"
    red, blue = int(tokens.shade(1)[1:3], 16), int(tokens.shade(1)[5:7], 16)
    assert red > blue and int(tokens.shade(-1)[5:7], 16) > int(tokens.shade(-1)[1:3], 16)


def test_a_run_keeps_F_and_f_of_its_last_update(trained):
    kept = list(tokens.last_update_of(trained))
    assert len(kept) == 3 and all(r.problem.prompt_ids for r in kept), "--log_samples of them"
    for r in kept:
        F, f = r.measures["F"], r.measures["f"]
        assert len(F) == len(f) == len(r.response_ids)
        torch.testing.assert_close(f, F.exp().clamp(1.0, 1.2))
        assert F.abs().max() > 1e-4, "the second update of a batch: the policy has moved"


def test_F_and_f_of_the_last_update_are_those_of_the_loss(tmp_path):
    """From stored log-probs: Δ, the M filter, the discounted sum over what follows, the clipped weight."""
    torch.manual_seed(0)
    old = -torch.rand(12)
    delta = torch.randn(12) * 0.3
    delta[5], delta[8], delta[10] = 3.0, 1.5, -30.0  # run away, r = 20 > 10; r = 4.5 > 3, the safety threshold; Δ < −20
    unseen = {"step": 7, "kind": "train", "correct": False}  # another rank trained on it
    row = unseen | {"prompt_ids": [1], "response_ids": list(range(12)), "advantage": -1.0, "old_logp": old.tolist(),
                    "logp": (old + delta).tolist()}  # fmt: skip
    rows = [row, row | {"step": 8}, row | {"kind": "eval"}, unseen, row | {"correct": True, "advantage": 0.5}]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    settings = {"tau": 4.0, "weight_range": [0.8, 1.2], "safety": 3.0, "dual_clip": 10.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    checkpoint = tmp_path / "checkpoints" / "step_000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 7}')
    worse, better = list(tokens.last_update_of(str(checkpoint)))
    assert not worse.correct and better.correct
    moved = [max(d, -20.0) if math.exp(d) <= 10 else 0.0 for d in delta.tolist()]
    F = [sum(2 ** (-(k - t) / 4) * moved[k] for k in range(t, 12)) for t in range(12)]
    f = [min(max(math.exp(x), 0.8), 1.2) for x in F]
    for r in (worse, better):
        assert r.measures["F"].tolist() == pytest.approx(F, abs=1e-5)
    assert better.measures["f"].tolist() == pytest.approx(f, abs=1e-5)
    f = [min(w, 1.0) if d > math.log(3) else w for w, d in zip(f, delta.tolist())]
    assert worse.measures["f"].tolist() == pytest.approx(f, abs=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"dual_clip": "Infinity"}))  # of GRPO
    assert len(list(tokens.last_update_of(str(checkpoint)))) == 2


def test_the_weights_shown_are_those_the_loss_uses():
    torch.manual_seed(1)
    for sign in (1.0, -1.0):
        r, delta, mask = Response(fipo.Problem("", "")), 2 * torch.randn(1, 300), torch.ones(1, 300).bool()
        how = dict(tau=5.0, weight_range=(0.5, 1.5), safety=3.0, dual_clip=10.0)
        _, metrics = fipo.fipo_loss(delta, torch.zeros(1, 300), torch.tensor([sign]), mask, **how)
        tokens.add_weights(r, delta[0], sign, **how)
        assert metrics["future_kl_mean"] == pytest.approx(r.measures["F"].mean().item(), rel=1e-5)
        for name in ("mean", "min", "max"):
            assert metrics[f"influence_{name}"] == pytest.approx(getattr(r.measures["f"], name)().item(), rel=1e-5)


def test_a_checkpoint_has_the_last_update_of_its_own_step(trained, base, tmp_path):
    """An older checkpoint has its own; another model, or a step of which nothing was logged, has none."""
    run = tmp_path / "run"
    shutil.copytree(fipo.Path(trained).parents[1], run)
    newest, rows = run / "checkpoints" / "step_000002", read_jsonl(run / "samples.jsonl")
    for step in (1, 2):
        (newest / "state.json").write_text(json.dumps({"step": step}))
        of_step = [row["response_ids"] for row in rows if (row["kind"], row["step"]) == ("train", step)]
        assert ids(list(tokens.last_update_of(str(newest)))) == of_step and len(of_step) == 3
    assert not list(tokens.last_update_of(base))
    write_jsonl(run / "samples.jsonl", [row for row in rows if row["step"] != 2])
    assert not list(tokens.last_update_of(str(newest)))
    (run / "samples.jsonl").write_text("{")
    with pytest.raises(fipo.FipoError, match="reading .*samples.jsonl"):
        list(tokens.last_update_of(str(newest)))


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_numbers_pictures_and_a_map(cfg, pair, tmp_path, capsys):
    out = tmp_path / "study"
    tokens.main(flags(dataclasses.replace(cfg, out=str(out), problems=3)))
    assert {p.name for p in out.iterdir()} == {
        "metrics.json", "histograms.png", "replacement.png", "token_map.html", "token_map.png"}  # fmt: skip
    assert all(p.stat().st_size > 5000 for p in out.iterdir())
    found = json.loads((out / "metrics.json").read_text())
    assert set(found["base"]["share_below"]) == set(tokens.MEASURES) and len(found["base"]["largest_delta_logp"]) == 20
    curves = {(row["writer"], row["criterion"]) for row in found["replacement"]}
    assert len(curves) == 9
    for who in ("base", "trained"):
        problems = fipo.encode_problems(cfg.data, pair[who], cfg)[:3]
        own = tokens.write(fipo.HFSampler(pair[who]), who, problems, cfg)
        assert found[who]["accuracy"] == sum(r.correct for r in own) / 6
    start, end = found["base"]["accuracy"], found["trained"]["accuracy"]
    for criterion, needed in found["fraction_needed"].items():
        direct = tokens.fraction_needed(tokens.curve(found["replacement"], "base", criterion, start), end)
        assert needed == (list(direct) if direct else None)
    assert all(len(row["fraction"]) == len(row["accuracy"]) == 2 for row in found["replacement"])
    assert "last update" in (out / "token_map.html").read_text()
    printed = capsys.readouterr().out
    assert "written by the base model: accuracy" in printed and str(out) in printed


def test_the_command_has_its_help():
    """As a file of its own, from anywhere: the settings, and what it does."""
    words = [sys.executable, str(ROOT / "scripts" / "tokens.py"), "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, cwd="/", check=True).stdout
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(TokensConfig)) and "Δlog p" in shown


def test_a_picture_of_any_response(tmp_path):
    """Longer than the picture, with what matplotlib would take for mathematics, and what its font has not."""
    long = {"caption": "right", "prompt": "$x^", "tokens": ["$$", "word ", "\\frac", "思", "\n"] * 60}
    for view in tokens.VIEWS:
        long[view] = [1.0, 0.5, 1.1, 1.0, 1.0] * 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens.draw_token_map(long, tmp_path / "map.png")
    width, height = matplotlib.image.imread(tmp_path / "map.png").shape[1::-1]
    assert 500 < width < 2000 and 500 < height < 2000


def test_white_space_is_seen():
    shown = [tokens.visible(token) for token in ("  ", " a", "\n\n", "\t", "")]
    assert shown == ["··", " a", "⏎\n⏎\n", "⇥", ""]


def test_a_response_beyond_what_a_browser_likes_is_cut(reader):
    n = tokens.MOST + 5
    r = Response(fipo.Problem("", "", [40]), array("i", [66] * n), measures={"delta_logp": torch.zeros(n)})
    written = {"base": [r], "trained": [r]}
    rows, _ = tokens.choose_for_map(written, [], AutoTokenizer.from_pretrained(reader))
    for row in rows:
        assert f"first {tokens.MOST} of {n}" in row["caption"]
        assert len(row["tokens"]) == tokens.MOST == len(row["delta_logp"]) == len(row["F"]) == len(row["f"])


def test_any_pair_of_folders_will_do(cfg, trained, tmp_path):
    """Without a kept update, F and f take the base for π_old, and the map says so."""
    plain = tmp_path / "plain"
    shutil.copytree(trained, plain, ignore=shutil.ignore_patterns("state.json"))
    tokens.main(flags(dataclasses.replace(cfg, trained=str(plain), out=str(tmp_path / "o"), problems=2,
                                          replacement=False)))  # fmt: skip
    assert "No update is kept" in (tmp_path / "o" / "token_map.html").read_text()
    found = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert all({"delta_logp", "F", "f"} <= set(row) for row in found["token_map"]) and "replacement" not in found


def test_one_model_is_in_memory_at_a_time(cfg, tmp_path, monkeypatch):
    layers = weakref.WeakSet()

    class Counted(fipo.Policy):
        def __init__(self, *args):
            gc.collect()
            assert not layers, "weights of the other model are still held"
            super().__init__(*args)
            layers.add(self.model.base_model.layers[0])

    monkeypatch.setattr(fipo, "Policy", Counted)
    tokens.run_tokens(dataclasses.replace(cfg, out=str(tmp_path / "o"), problems=2, replacement=False))


def test_prompts_and_eos_are_the_trained_models_for_both(cfg, trained, tmp_path, monkeypatch):
    """An EOS and a chat template that only the trained model has: base responses follow them, and never stays never."""
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = json.loads((other / "generation_config.json").read_text())
    comma = AutoTokenizer.from_pretrained(trained)(",")["input_ids"]
    (other / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [0, *comma]}))
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}1+1=")
    cfg = dataclasses.replace(cfg, trained=str(other), out=str(tmp_path / "o"), problems=4, max_prompt=24)
    tokens.run_tokens(cfg)
    found = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert all(row["prompt"].endswith("1+1=") for row in found["token_map"] if row["caption"].startswith("written"))
    assert not any("," in "".join(row["tokens"][:-1]) for row in found["token_map"] if "written" in row["caption"])
    first = next(row for row in found["replacement"] if (row["writer"], row["criterion"]) == ("base", "delta_logp"))
    assert sum(first["fraction"]) / cfg.seeds < 0.2

    class Recorded(ReplacingSampler):
        def generate(self, *args):
            groups = super().generate(*args)
            texts[self.writer] = [r for seed in zip(*groups) for r in seed]
            return groups

    def replace_tokens(problems, written, cfg):
        alone.update(written)
        return replace(problems, written, cfg)

    texts, alone, replace = {}, {}, tokens.replace_tokens
    never = [(writer, "delta_logp", math.inf) for writer in ("base", "trained")]
    monkeypatch.setattr(tokens, "rules", lambda written: never)
    monkeypatch.setattr(tokens, "ReplacingSampler", Recorded)
    monkeypatch.setattr(tokens, "replace_tokens", replace_tokens)
    tokens.run_tokens(cfg)
    assert all(ids(texts[writer]) == ids(alone[writer]) for writer in ("base", "trained"))


def fails(given: list[str], capsys, match: str) -> None:
    with pytest.raises(SystemExit) as stop:
        tokens.main(given)
    assert re.search(match, str(stop.value.code)), stop.value.code


def test_mistakes_are_told_in_a_sentence(cfg, reader, tmp_path, capsys):
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "o"))
    fails(flags(dataclasses.replace(cfg, trained=reader)), capsys, "different tokenizers")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    fails(flags(dataclasses.replace(cfg, data=str(empty))), capsys, "is empty")
    fails(flags(dataclasses.replace(cfg, base="")), capsys, "--base is missing")
    fails(flags(dataclasses.replace(cfg, trained="")), capsys, "--trained is missing")
    fails(flags(dataclasses.replace(cfg, out="")), capsys, "--out is missing")
    fails(flags(dataclasses.replace(cfg, base="no/where")), capsys, "tokenizer of 'no/where'")
    fails(flags(dataclasses.replace(cfg, seeds=0)), capsys, "--seeds is 0")
    fails(flags(dataclasses.replace(cfg, extrapolate=-1.0)), capsys, "--extrapolate is -1")


def test_heads_that_differ_are_told(cfg, base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(other)
    fails(flags(dataclasses.replace(cfg, trained=str(other), out=str(tmp_path / "o"))), capsys, "different tokenizers")


def test_what_is_next_to_nothing_has_no_colour():
    """Else an F of rounding alone would glow like one that moves f."""
    (places,), _ = tokens.shades([{"F": [1e-6, -5e-6, 0.0]}], "F")
    assert max(map(abs, places)) < 0.01
    (places,), ends = tokens.shades([{"F": [0.5, -0.25]}], "F")
    assert places == [1.0, -0.5] and ends == {"-0.25": -0.5, "0": 0.0, "0.5": 1.0}

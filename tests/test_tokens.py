"""scripts/tokens.py: the measures, token replacement, the token map and the command."""

import gc
import itertools
import json
import math
import re
import runpy
import shutil
import sys
import warnings
import weakref
from array import array
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import ROOT, flags, read_jsonl, small_config, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import fipo
import tokens
from fipo import derive_seed
from tokens import ReplacingSampler, Response, TokensConfig, compare

SEEDS = list(range(6))


@pytest.fixture(scope="module")
def trained(base, sums, tmp_path_factory) -> str:
    """The base model after two batches of rollouts, with a learning rate high enough to see it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    cfg = replace(small_config(base, sums, run), lr=1e-3, warmup_steps=0)
    fipo.train(cfg)
    return str(run / "checkpoints" / "step_000002")


@pytest.fixture(scope="module")
def cfg(base, trained, sums) -> TokensConfig:
    return TokensConfig(
        data=sums,
        max_prompt=16,
        max_response=24,
        base=base,
        trained=trained,
        problems=6,
        seeds=2,
    )


@pytest.fixture(scope="module")
def pair(cfg):
    return {"base": fipo.Policy(cfg.base, cfg), "trained": fipo.Policy(cfg.trained, cfg)}


@pytest.fixture(scope="module")
def problems(cfg, pair):
    return fipo.encode_problems(cfg.data, pair["base"], cfg)[: cfg.problems]


def generate(sampler, problems, seeds=SEEDS) -> list[Response]:
    """Return two responses to each problem, problem by problem."""
    groups = sampler.generate(problems, seeds, 2, 24, 1.0, 1.0)
    return [Response(**vars(r)) for r in itertools.chain(*groups)]


@pytest.fixture(scope="module")
def alone(cfg, pair, problems):
    """What each model writes by itself, with its measures."""
    written = {who: generate(fipo.HFSampler(policy), problems) for who, policy in pair.items()}
    tokens.measure([*written["base"], *written["trained"]], cfg)
    return written


@pytest.fixture(scope="module")
def alone_as_other(pair, problems):
    """What each model writes by itself with the random numbers of the model that replaces."""
    seeds = [derive_seed(seed, "other") for seed in SEEDS]
    samplers = {who: fipo.HFSampler(policy) for who, policy in pair.items()}
    return {who: generate(sampler, problems, seeds) for who, sampler in samplers.items()}


def ids(responses):
    return [list(r.response_ids) for r in responses]


def logp_of(policy, r):
    """Return the log-probs of a model at the tokens of a response, [T, V]."""
    row = torch.tensor([[*r.problem.prompt_ids, *r.response_ids]])
    with torch.no_grad():
        logits = policy.model(row).logits[0, len(r.problem.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)


# --------------------------------------------------------------------------------------- measures
def kl_by_hand(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def entropy_by_hand(p):
    return -sum(a * math.log(a) for a in p)


def test_measures_match_their_formulas():
    """Compare each with a sum over the vocabulary in double precision."""
    torch.manual_seed(0)
    base = 3 * torch.randn(5, 7)
    trained = 3 * torch.randn(5, 7)
    token = torch.tensor([0, 6, 3, 3, 1])
    found = compare(base.log_softmax(-1), trained.log_softmax(-1), token)
    for n in range(5):
        q = base[n].double().softmax(-1).tolist()
        p = trained[n].double().softmax(-1).tolist()
        expected = {
            "delta_logp": math.log(p[token[n]] / q[token[n]]),
            "kl": kl_by_hand(p, q),
            "entropy_base": entropy_by_hand(q),
            "entropy_trained": entropy_by_hand(p),
            "base": math.log(q[token[n]]),
            "trained": math.log(p[token[n]]),
        }
        row = {name: values[n].item() for name, values in found.items()}
        assert row == pytest.approx(expected, abs=1e-5)
    assert set(found) == {*tokens.MEASURES, "base", "trained"}


def test_measures_of_equal_models_are_zero():
    logp = torch.randn(4, 9).log_softmax(-1)
    found = compare(logp, logp, torch.zeros(4).long())
    for name in ("delta_logp", "kl"):
        assert found[name].abs().max() < 1e-6


@pytest.mark.parametrize("max_tokens, chunk", [(32768, 1024), (64, 5)])
def test_measure_matches_the_full_logits(cfg, pair, alone, max_tokens, chunk):
    """The result depends on neither the size of the passes nor that of the chunks of logits."""
    cfg = replace(cfg, tokens_per_micro_batch=max_tokens)
    responses = [replace(r, measures={}) for r in alone["base"] + alone["trained"]]
    tokens.measure(responses, cfg, chunk)
    for r in responses:
        token = torch.tensor(list(r.response_ids))
        expected = compare(logp_of(pair["base"], r), logp_of(pair["trained"], r), token)
        for name, values in expected.items():
            torch.testing.assert_close(r.measures[name], values, atol=2e-5, rtol=1e-4)
    largest = tokens.values_of(responses, "delta_logp").abs().max()
    assert largest > 0.1, "the models must differ for this test"


def test_summarize_reports_accuracy_length_and_share_below(pair, alone):
    responses = alone["base"]
    found = tokens.summarize("base", responses, pair["base"].tokenizer, 1e-3)
    below = found["share_below"]["delta_logp"]
    size = tokens.values_of(responses, "delta_logp").abs()
    assert below["0.1"] == pytest.approx((size < 0.1).float().mean().item())
    assert 0 < below["0.01"] <= below["0.1"] <= below["1"] <= 1
    assert found["accuracy"] == sum(r.correct for r in responses) / len(responses)
    tokens_in_all = sum(len(r.response_ids) for r in responses)
    assert found["response_length"] == tokens_in_all / len(responses)


@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_tokens_are_listed_in_their_context(pair, alone, sign):
    tokenizer = pair["base"].tokenizer
    found = tokens.summarize("base", alone["base"], tokenizer, 1e-3)
    shown = found["largest_delta_logp" if sign > 0 else "smallest_delta_logp"]
    every = tokens.values_of(alone["base"], "delta_logp").sort(descending=sign > 0).values
    values = [row["delta_logp"] for row in shown]
    assert values[0] == every[0].item()
    assert values == sorted(values, reverse=sign > 0)
    assert len(shown) == 20
    assert len({(row["before"], row["token"]) for row in shown}) == 20
    texts = [tokenizer.decode([*r.problem.prompt_ids, *r.response_ids]) for r in alone["base"]]
    for row in shown:
        context = row["before"] + row["token"] + row["after"]
        assert any(context in text for text in texts)


def test_summarize_rejects_a_model_that_scales_its_logits(pair, alone):
    """Scoring applies the head to the hidden states, and so misses what a model does after it."""
    tokenizer = pair["base"].tokenizer
    tokens.summarize("base", alone["base"], tokenizer, 1e-3)
    changed = [replace(r) for r in alone["base"]]
    changed[0].sampler_logp = array("f", [logp - 1 for logp in changed[0].sampler_logp])
    with pytest.raises(fipo.FipoError, match="scales or caps its logits"):
        tokens.summarize("base", changed, tokenizer, 1e-3)


# ------------------------------------------------------------------------------ token replacement
@pytest.mark.parametrize("criterion", tokens.CRITERIA)
@pytest.mark.parametrize("writer, other", [("base", "trained"), ("trained", "base")])
def test_infinite_thresholds_leave_one_model_alone(
    pair, problems, alone, alone_as_other, writer, other, criterion
):
    never = generate(ReplacingSampler(pair, writer, criterion, math.inf), problems)
    assert ids(never) == ids(alone[writer])
    assert not any(r.replaced for r in never)
    always = generate(ReplacingSampler(pair, writer, criterion, -math.inf), problems)
    assert ids(always) == ids(alone_as_other[other])
    assert all(r.replaced == len(r.response_ids) for r in always)
    assert ids(never) != ids(always)


def test_random_criterion_replaces_where_its_random_number_is_high(pair, problems):
    responses = generate(ReplacingSampler(pair, "base", "random", 0.7), problems)
    numbers = []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(derive_seed(seed, "random"))
        numbers += torch.rand(2, 24, generator=generator)
    for r, u in zip(responses, numbers):
        assert r.replaced == (u[: len(r.response_ids)] >= 0.7).sum().item()
    for j in (0, 1):
        assert sum(r.replaced for r in responses[j::2]) > 0


def test_replacement_does_not_depend_on_the_rest_of_the_batch(pair, problems):
    sampler = ReplacingSampler(pair, "base", "random", 0.5)
    together = generate(sampler, problems)
    for i, problem in enumerate(problems):
        group = generate(sampler, [problem], [SEEDS[i]])
        assert ids(group) == ids(together[2 * i : 2 * i + 2])


@pytest.mark.parametrize("writer, sign", [("base", -1), ("trained", 1)])
def test_delta_logp_replaces_tokens_that_the_other_model_likes_less(
    pair, problems, alone, writer, sign
):
    """Up to the first token that fires, a response is the writer's own."""
    threshold = 0.05
    sampler = ReplacingSampler(pair, writer, "delta_logp", threshold)
    responses = generate(sampler, problems)
    changed = 0
    for own, new in zip(alone[writer], responses):
        own_ids = list(own.response_ids)
        new_ids = list(new.response_ids)
        fires = (sign * own.measures["delta_logp"] >= threshold).tolist()
        first = fires.index(True) if any(fires) else len(own_ids)
        assert new_ids[:first] == own_ids[:first]
        assert any(fires) or new_ids == own_ids
        changed += new_ids != own_ids
    assert changed, "a token must be replaced for this test"


FRACTIONS = (0.01, 0.08, 0.3)  # fewer than in tokens.py, to save time


@pytest.fixture(scope="module")
def study(cfg, tmp_path_factory):
    """The settings of a whole study, written by the command. Its rollouts need two batches."""
    out = tmp_path_factory.mktemp("study") / "out"
    cfg = replace(cfg, out=str(out), problems=3, rollout_rows=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "FRACTIONS", FRACTIONS)
        tokens.main(flags(cfg))
    return cfg


@pytest.fixture(scope="module")
def metrics(study):
    return json.loads((Path(study.out) / "metrics.json").read_text())


def seeds_of(writer, study, problems):
    return [derive_seed(study.seed, "tokens", writer, i) for i in range(len(problems))]


@pytest.mark.parametrize("who", ["base", "trained"])
def test_write_samples_one_response_per_problem_and_seed(study, metrics, pair, problems, who):
    problems = problems[: study.problems]
    sampler = fipo.HFSampler(pair[who])
    responses = tokens.write(sampler, who, problems, study)
    expected = generate(sampler, problems, seeds_of(who, study, problems))
    assert ids(responses) == ids(expected[::2] + expected[1::2])
    assert metrics[who]["accuracy"] == sum(r.correct for r in responses) / len(responses)


def test_thresholds_of_a_curve_fall_from_rare_replacement_to_frequent(metrics):
    curves = {}
    for row in metrics["replacement"]:
        curves.setdefault((row["writer"], row["criterion"]), []).append(row)
    assert len(curves) == 8
    for rows in curves.values():
        thresholds = [row["threshold"] for row in rows]
        assert thresholds == sorted(thresholds, reverse=True)
        assert thresholds[-1] > 0
        assert max(rows[0]["fraction"]) < 0.1


def test_random_criterion_replaces_the_fractions_asked_for(study, metrics):
    rows = [row for row in metrics["replacement"] if row["criterion"] == "random"]
    assert len(rows) == 2 * len(FRACTIONS)
    for row, fraction in zip(rows, 2 * FRACTIONS):
        assert sum(row["fraction"]) / study.seeds == pytest.approx(fraction, abs=0.1)


def test_rows_of_replacement_match_a_run_with_their_threshold(study, metrics, pair, problems):
    """The seeds are those of the writer's own responses."""
    problems = problems[: study.problems]
    kl_rows = [row for row in metrics["replacement"] if row["criterion"] == "kl"]
    row = kl_rows[0]
    assert row["writer"] == "base"
    sampler = ReplacingSampler(pair, "base", "kl", row["threshold"])
    responses = generate(sampler, problems, seeds_of("base", study, problems))
    tokenizer = pair["base"].tokenizer
    for j in range(study.seeds):
        of_seed = responses[j :: study.seeds]
        length = sum(len(r.response_ids) for r in of_seed)
        assert row["fraction"][j] == sum(r.replaced for r in of_seed) / length
        right = 0
        for r in of_seed:
            text = tokenizer.decode(list(r.response_ids), skip_special_tokens=True)
            right += fipo.verify(text, r.problem.answer)
        assert row["accuracy"][j] == right / len(of_seed)
    for row in metrics["replacement"]:
        assert len(row["fraction"]) == len(row["accuracy"]) == study.seeds


def test_equal_models_have_no_curve_of_delta_logp_or_kl(cfg, base, alone):
    """Thresholds of 0, which would replace tokens that did not change, are left out."""
    written = {}
    for who, responses in alone.items():
        written[who] = [replace(r, measures={}) for r in responses]
    same = replace(cfg, trained=base)
    tokens.measure(written["base"] + written["trained"], same)
    criteria = {criterion for _, criterion, _ in tokens.rules(written)}
    assert criteria == {"entropy", "random"}


def test_fraction_needed_is_where_the_curve_first_covers_the_share():
    points = [(0.0, 0.2, 0.0), (0.1, 0.6, 0.0), (0.3, 0.97, 0.0), (0.2, 1.0, 0.0)]
    assert tokens.fraction_needed(points, end=1.0, share=0.5) == (0.0, 0.1)
    assert tokens.fraction_needed(points, end=1.0, share=0.9) == (0.1, 0.3)
    assert tokens.fraction_needed(points, end=1.0) == (0.1, 0.3)
    assert tokens.fraction_needed(points[:2], end=1.0) is None
    falling = [(0.0, 0.9, 0.0), (0.1, 0.3, 0.0)]
    assert tokens.fraction_needed(falling, end=0.3) == (0.0, 0.1)
    assert tokens.fraction_needed(points, end=0.2) is None, "both models are equally good"


# ---------------------------------------------------------------------------------- the token map
class Page(HTMLParser):
    """The tags, the tokens' attributes and the text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags = []
        self.tokens = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "i":
            self.tokens.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


def test_token_map_is_a_page_without_scripts_or_links():
    odd = ['<b>"', "&amp;", "\n", "é", "'"]
    updated = {
        "caption": "a <caption>",
        "verdict": "a <verdict>",
        "prompt": "p & q",
        "tokens": odd,
        "delta_logp": [-2.0, 0, 1, 0.5, 1e-9],
        "delta": [0.2, -0.1, 0, 0, 0],
        "F": [0.1, -0.1, 0, 0, 0],
        "f": [1.2, 1, 1, 1, 1],
    }
    other = {"caption": "", "verdict": "", "prompt": "", "tokens": ["x"], "delta_logp": [4.0]}
    html = tokens.token_map([updated, other])
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "://" not in html
    assert "url(" not in html
    assert page.tags.count("input") == 4
    for text in ("a <caption>, a <verdict>", "p & q", "".join(odd).replace("\n", "⏎\n")):
        assert text in page.text
    first = page.tokens[0]
    last = page.tokens[-1]
    assert first["title"] == f"{odd[0]!r}: Δ(RL − base) -2, Δ 0.2, F 0.1, f 1.2"
    assert last["title"] == "'x': Δ(RL − base) 4"
    assert "--delta_logp-line:dotted" in first["style"]
    assert "--delta_logp-line:solid" in last["style"]
    assert f"--delta_logp:{tokens.shade(-0.5)}" in first["style"]
    assert f"--f:{tokens.shade(1)}" in first["style"]
    legend = re.findall(r'class="legend f">f: (.*?)</div>', html)[0]
    assert re.findall(r">([^<>]+)</b>", legend) == ["1", "1.2"], "the neutral value and the largest"


@pytest.mark.parametrize("text", ["aé思b", "x" * 30 + "思考 é", "\n\n$$<b>"])
def test_a_character_of_several_tokens_is_shown_once(reader, text):
    """The tokens are bytes: é is two of them, 思 three."""
    tokenizer = AutoTokenizer.from_pretrained(reader)
    shown = list(tokens.token_texts(tokenizer(text)["input_ids"], tokenizer))
    joined = "".join(shown)
    assert joined.replace("▯", "") == text
    assert "\ufffd" not in joined
    assert len(shown) == len(text.encode())


def test_shade_is_white_at_0_orange_above_and_blue_below():
    assert tokens.shade(0) == "#ffffff"
    orange = tokens.shade(1)
    blue = tokens.shade(-1)
    assert int(orange[1:3], 16) > int(orange[5:7], 16)
    assert int(blue[1:3], 16) < int(blue[5:7], 16)


def test_scale_leaves_negligible_values_white():
    """Otherwise an F of rounding errors would be coloured like one that moves f."""
    scale = tokens.Scale([{"F": [1e-6, -5e-6, 0.0]}], "F")
    assert max(abs(scale.place(value)) for value in (1e-6, -5e-6, 0.0)) < 0.01
    scale = tokens.Scale([{"F": [0.5, -0.25]}], "F")
    assert [scale.place(0.5), scale.place(-0.25)] == [1.0, -0.5]
    assert scale.ends == {-0.25: -0.5, 0.0: 0.0, 0.5: 1.0}
    scale = tokens.Scale([{"f": [1.2, 1.000001]}], "f")
    assert list(scale.ends) == [1.0, 1.2]


def test_white_space_is_made_visible():
    shown = [tokens.visible(token) for token in ("  ", " a", "\n\n", "\t", "")]
    assert shown == ["··", " a", "⏎\n⏎\n", "⇥", ""]


def test_long_responses_are_cut_in_the_map(reader):
    n = tokens.MAX_TOKENS + 5
    measures = {name: torch.zeros(n) for name in tokens.VIEWS}
    r = Response(fipo.Problem("", "", [40]), array("i", [66] * n), measures=measures)
    rows = tokens.choose_for_map({"base": [r]}, [r], AutoTokenizer.from_pretrained(reader))
    assert len(rows) == 2
    for row in rows:
        assert f"first {tokens.MAX_TOKENS} of {n}" in row["caption"]
        for name in ("tokens", *tokens.VIEWS):
            assert len(row[name]) == tokens.MAX_TOKENS


def test_picture_shows_part_of_a_long_response_without_warnings(tmp_path):
    """Its text includes what matplotlib would read as mathematics, and a glyph its font lacks."""
    row = {"question": "$x^", "verdict": "wrong: answered $"}
    row["tokens"] = ["$$", "word ", "\\frac", "思", "\n"] * 60
    for view in tokens.VIEWS:
        row[view] = [1.0, 0.5, 1.1, 1.0, 1.0] * 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens.draw_token_map(row, tmp_path / "map.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "map.png").shape
    assert 500 < width < 2000
    assert 500 < height < 2000


@pytest.mark.parametrize("F", [[-2.0, -3.0, 0.0], [0.5, 0.6, 0.0], [0.0, 0.0, 0.0]])
def test_picture_marks_the_token_that_carries_back(tmp_path, monkeypatch, F):
    """An arrow lies under the tokens before it. Where F < 0, a note says that f is 1."""
    row = {"question": "q", "verdict": "right", "tokens": ["a", "b", "c"]}
    row |= {"delta": [0.0, F[1], 0.0], "F": F, "f": [max(1.0, min(1.2, 1 + x)) for x in F]}
    figures = []
    monkeypatch.setattr(tokens.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    tokens.draw_token_map(row, tmp_path / "map.png")
    delta_panel, _, F_panel, _, f_panel, _ = figures[0].axes
    is_framed = [bar.get_edgecolor()[:3] == (0, 0, 0) for bar in delta_panel.patches]
    assert is_framed == [False, F[1] != 0, False]
    arrows = [text.xy for text in F_panel.texts if not text.get_text()]
    assert arrows == ([(0, 0.85)] if F[1] else [])
    note = "F < 0 → f = 1" in f_panel.get_title(loc="left")
    assert note == (F[1] < 0)


def test_title_of_the_picture_has_the_question_and_the_answers():
    added = fipo.Problem(fipo.QUESTION.format(question="A story.\nHow many?"), "19")
    chat = fipo.Problem([{"role": "user", "content": "1+2=?\n"}], "3")
    assert [tokens.question(problem) for problem in (added, chat)] == ["How many?", "1+2=?"]
    r = Response(added, text="so\nAnswer: 20")
    assert tokens.verdict(r) == "wrong: answered 20, right is 19"
    assert "answered nothing" in tokens.verdict(replace(r, text="20"))
    assert tokens.verdict(replace(r, correct=True)) == "right"


# ------------------------------------------------------------------------------------- F and f
def test_last_update_is_logged_with_F_and_f(trained):
    responses = tokens.last_update_of(trained)
    assert len(responses) == 3, "--log_samples is 3"
    for r in responses:
        F = r.measures["F"]
        f = r.measures["f"]
        assert r.problem.prompt_ids
        assert len(F) == len(f) == len(r.response_ids)
        torch.testing.assert_close(f, F.exp().clamp(1.0, 1.2))
        assert F.abs().max() > 1e-4, "the policy has moved before the second update of a batch"


def test_F_and_f_of_the_last_update_match_the_definition(tmp_path):
    """Compute M, F and f from the stored log-probs of a response."""
    torch.manual_seed(0)
    old = -torch.rand(12)
    delta = torch.randn(12) * 0.3
    delta[5] = 3.0  # ratio 20, above the dual-clip ratio 10
    delta[8] = 1.5  # ratio 4.5, above the safety threshold 3
    delta[10] = -30.0  # clamped to −20
    other_rank = {"step": 7, "kind": "train", "correct": False}
    row = other_rank | {
        "prompt": "p",
        "answer": "a",
        "response": "r",
        "prompt_ids": [1],
        "response_ids": list(range(12)),
        "advantage": -1.0,
        "old_logp": old.tolist(),
        "logp": (old + delta).tolist(),
    }
    next_step = row | {"step": 8}
    evaluation = row | {"kind": "eval"}
    right = row | {"correct": True, "advantage": 0.5}
    write_jsonl(tmp_path / "samples.jsonl", [row, next_step, evaluation, other_rank, right])
    settings = {"tau": 4.0, "weight_range": [0.8, 1.2], "safety": 3.0, "dual_clip": 10.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    checkpoint = tmp_path / "checkpoints" / "step_000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 7}')
    worse, better = tokens.last_update_of(str(checkpoint))
    assert not worse.correct
    assert better.correct

    kept = []
    for d in delta.tolist():
        kept.append(max(d, -20.0) if math.exp(d) <= 10 else 0.0)
    F = []
    for t in range(12):
        F.append(sum(2 ** (-(k - t) / 4) * kept[k] for k in range(t, 12)))
    f = [min(max(math.exp(x), 0.8), 1.2) for x in F]
    safe_f = [min(x, 1.0) if d > math.log(3) else x for x, d in zip(f, delta.tolist())]
    for r in (worse, better):
        clamped = [max(d, -20.0) for d in delta.tolist()]
        assert r.measures["delta"].tolist() == pytest.approx(clamped, abs=1e-5)
        assert r.measures["F"].tolist() == pytest.approx(F, abs=1e-5)
    assert better.measures["f"].tolist() == pytest.approx(f, abs=1e-5)
    assert worse.measures["f"].tolist() == pytest.approx(safe_f, abs=1e-5)

    of_grpo = settings | {"dual_clip": "Infinity"}
    (tmp_path / "config.json").write_text(json.dumps(of_grpo))
    assert len(tokens.last_update_of(str(checkpoint))) == 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_F_and_f_match_the_metrics_of_the_loss(sign):
    torch.manual_seed(1)
    delta = 2 * torch.randn(1, 300)
    old = torch.zeros(1, 300)
    mask = torch.ones(1, 300).bool()
    settings = dict(tau=5.0, weight_range=(0.5, 1.5), safety=3.0, dual_clip=10.0)
    _, metrics = fipo.fipo_loss(delta, old, torch.tensor([sign]), mask, **settings)
    r = Response(fipo.Problem("", ""))
    tokens.add_weights(r, delta[0], sign, **settings)
    F = r.measures["F"]
    f = r.measures["f"]
    assert metrics["future_kl_mean"] == pytest.approx(F.mean().item(), rel=1e-5)
    assert metrics["influence_mean"] == pytest.approx(f.mean().item(), rel=1e-5)
    assert metrics["influence_min"] == pytest.approx(f.min().item(), rel=1e-5)
    assert metrics["influence_max"] == pytest.approx(f.max().item(), rel=1e-5)


def test_last_update_belongs_to_the_step_of_the_checkpoint(trained, base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(Path(trained).parents[1], run)
    checkpoint = run / "checkpoints" / "step_000002"
    rows = read_jsonl(run / "samples.jsonl")
    for step in (1, 2):
        (checkpoint / "state.json").write_text(json.dumps({"step": step}))
        expected = []
        for row in rows:
            if row["kind"] == "train" and row["step"] == step:
                expected.append(row["response_ids"])
        assert len(expected) == 3
        assert ids(tokens.last_update_of(str(checkpoint))) == expected
    assert not tokens.last_update_of(base), "it is not the checkpoint of a run"
    write_jsonl(run / "samples.jsonl", [row for row in rows if row["step"] != 2])
    assert not tokens.last_update_of(str(checkpoint)), "nothing was logged of its step"
    (run / "samples.jsonl").write_text("{")
    with pytest.raises(fipo.FipoError, match="reading .*samples.jsonl"):
        tokens.last_update_of(str(checkpoint))


# ------------------------------------------------------------------------------------ the command
def test_command_writes_numbers_pictures_and_a_map(study, metrics):
    files = {path.name: path for path in Path(study.out).iterdir()}
    assert set(files) == {
        "metrics.json",
        "replacement.png",
        "token_map.html",
        "token_map.png",
    }
    assert all(path.stat().st_size > 5000 for path in files.values())
    assert set(metrics["base"]["share_below"]) == set(tokens.MEASURES)
    assert len(metrics["base"]["largest_delta_logp"]) == 20
    start = metrics["base"]["accuracy"]
    end = metrics["trained"]["accuracy"]
    for criterion, needed in metrics["fraction_needed"].items():
        points = tokens.curve(metrics["replacement"], "base", criterion, start)
        expected = tokens.fraction_needed(points, end)
        assert needed == (list(expected) if expected else None)
    assert "last update" in files["token_map.html"].read_text()


def test_help_runs_from_any_folder_and_lists_the_settings(monkeypatch, capsys):
    """Run the script as a program that has to find fipo.py by itself."""
    script = str(ROOT / "scripts" / "tokens.py")
    own_folders = {str(ROOT), str(ROOT / "scripts"), ""}
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in own_folders])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.delitem(sys.modules, "fipo")
    monkeypatch.chdir("/")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert not stop.value.code
    shown = capsys.readouterr().out
    for field in fields(TokensConfig):
        assert f"--{field.name}" in shown
    assert "Δ(RL − base)" in shown


def test_the_map_of_models_without_a_run_has_no_update(cfg, trained, tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(trained, plain, ignore=shutil.ignore_patterns("state.json"))
    out = tmp_path / "out"
    cfg = replace(cfg, trained=str(plain), out=str(out), problems=2, replacement=False)
    tokens.main(flags(cfg))
    assert {path.name for path in out.iterdir()} == {"metrics.json", "token_map.html"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["token_map"]) == 6
    for row in metrics["token_map"]:
        assert "delta_logp" in row
        assert not {"delta", "F", "f"} & set(row)
    assert "replacement" not in metrics
    printed = capsys.readouterr().out
    assert "written by the base model: accuracy" in printed
    assert str(out) in printed


def test_only_one_model_is_in_memory_at_a_time(cfg, tmp_path, monkeypatch):
    layers = weakref.WeakSet()

    class Counted(fipo.Policy):
        def __init__(self, *args):
            gc.collect()
            assert not layers, "the weights of the other model are still in memory"
            super().__init__(*args)
            layers.add(self.model.base_model.layers[0])

    monkeypatch.setattr(fipo, "Policy", Counted)
    cfg = replace(cfg, out=str(tmp_path / "out"), problems=2, replacement=False)
    tokens.run_tokens(cfg)


def test_both_models_use_the_prompts_and_eos_of_the_trained_one(
    cfg, trained, tmp_path, monkeypatch
):
    """Give only the trained model another chat template, and the comma as an EOS token."""
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = json.loads((other / "generation_config.json").read_text())
    comma = AutoTokenizer.from_pretrained(trained)(",")["input_ids"]
    config["eos_token_id"] = [0, *comma]
    (other / "generation_config.json").write_text(json.dumps(config))
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}1+1=")
    alone = {}
    never_replaced = {}
    all_rules = tokens.rules

    def few_rules(written):
        """Return the first rule of delta_logp, and a rule for each writer that never fires."""
        alone.update(written)
        rules = [rule for rule in all_rules(written) if rule[:2] == ("base", "delta_logp")]
        never = [(writer, "delta_logp", math.inf) for writer in written]
        return [rules[0], *never]

    class Recorded(ReplacingSampler):
        def generate(self, *args):
            groups = super().generate(*args)
            if self.threshold == math.inf:
                by_seed = itertools.chain(*zip(*groups))
                never_replaced[self.writer] = list(by_seed)
            return groups

    monkeypatch.setattr(tokens, "rules", few_rules)
    monkeypatch.setattr(tokens, "ReplacingSampler", Recorded)
    out = tmp_path / "out"
    cfg = replace(cfg, trained=str(other), out=str(out), problems=4, max_prompt=24)
    tokens.run_tokens(cfg)
    metrics = json.loads((out / "metrics.json").read_text())
    written = [row for row in metrics["token_map"] if row["caption"].startswith("written")]
    assert written
    for row in written:
        assert row["prompt"].endswith("1+1=")
        assert "," not in "".join(row["tokens"][:-1])
    first = metrics["replacement"][0]
    assert sum(first["fraction"]) / cfg.seeds < 0.2
    for writer in ("base", "trained"):
        assert ids(never_replaced[writer]) == ids(alone[writer])


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("base", "", "--base is missing"),
        ("trained", "", "--trained is missing"),
        ("out", "", "--out is missing"),
        ("base", "no/where", "tokenizer of 'no/where'"),
        ("seeds", 0, "--seeds is 0"),
    ],
)
def test_wrong_settings_are_reported_in_one_sentence(cfg, tmp_path, setting, value, message):
    cfg = replace(cfg, out=str(tmp_path / "out"))
    assert_rejected(replace(cfg, **{setting: value}), message)


def test_an_empty_file_of_problems_is_reported(cfg, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    cfg = replace(cfg, out=str(tmp_path / "out"), data=str(empty))
    assert_rejected(cfg, "is empty")


def test_several_processes_are_rejected(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_rejected(replace(cfg, out=str(tmp_path / "out")), "runs in one process")


def test_models_with_different_tokenizers_are_rejected(cfg, reader, tmp_path):
    cfg = replace(cfg, out=str(tmp_path / "out"), trained=reader)
    assert_rejected(cfg, "different tokenizers")


def test_models_with_heads_of_different_size_are_rejected(cfg, base, tmp_path):
    larger = tmp_path / "larger"
    shutil.copytree(base, larger)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(larger)
    cfg = replace(cfg, out=str(tmp_path / "out"), trained=str(larger))
    assert_rejected(cfg, "different tokenizers")


def assert_rejected(cfg: TokensConfig, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        tokens.main(flags(cfg))
    assert message in str(stop.value.code)

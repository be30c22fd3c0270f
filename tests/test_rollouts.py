"""Rollouts, log-probs and evaluation: the sampler and the trainer use one policy."""

import dataclasses
import itertools
import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_composite

import fipo
from fipo import HFSampler, Policy, Problem, Rollout, flatten, token_logprobs


@pytest.fixture(scope="module")
def policy(base) -> Policy:
    return Policy(base, fipo.Config(model=base, max_response=32, tokens_per_micro_batch=512))


PROMPTS = ["1+2+3+4=?\n", "9+9=?\n", "5+5+5+5+5+5=?\n", "1+1+1=?\n", "7=?\n"]


@pytest.fixture(scope="module")
def problems(policy) -> list[Problem]:
    """Problems with prompts of different lengths."""
    return [Problem(prompt, "10", policy.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


def generate(policy, problems, n=4, rows=512, temperature=1.0, seed=1) -> fipo.Groups:
    cfg = dataclasses.replace(policy.cfg, rollout_rows=rows, max_response=24)
    return list(fipo.sample(HFSampler(policy), problems, (seed,), cfg, n, temperature, 1.0))


def response_ids(groups: fipo.Groups) -> list[list[int]]:
    return [list(r.response_ids) for r in flatten(groups)]


@pytest.fixture(scope="module")
def rollouts(policy, problems) -> list[Rollout]:
    """One response to each problem."""
    return [group[0] for group in generate(policy, problems)]


def full_logprobs(model, ids, temperature):
    """Return log π and entropy at each position, from logits [B, L, V]."""
    logp = (model(ids).logits.float() / temperature).log_softmax(-1)[:, :-1]
    entropy = -(logp.exp() * logp).sum(-1)
    token_logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
    pad = torch.nn.functional.pad
    return pad(token_logp, (1, 0)), pad(entropy, (1, 0))


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_log_probs(policy, problems, monkeypatch, temperature):
    """Left padding, the shared prefill and the shrinking batch do not change them."""
    monkeypatch.setattr(policy.cfg, "temperature", temperature)
    sampled = flatten(generate(policy, problems, temperature=temperature))
    assert fipo.score_old_logp(policy, [sampled])["sampler_mismatch"] < 1e-5


def test_sampling_at_temperature_0_is_greedy_decoding(policy, problems):
    for first, second in generate(policy, problems, n=2, temperature=1e-6):
        ids = torch.tensor([first.problem.prompt_ids])
        settings = {"do_sample": False, "max_new_tokens": 24}
        greedy = policy.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        expected = greedy[0, ids.shape[1] :].tolist()
        assert list(first.response_ids) == list(second.response_ids) == expected


def test_responses_end_with_their_first_eos_or_at_the_limit(policy, problems):
    (eos,) = policy.eos
    responses = response_ids(generate(policy, problems, n=16))
    ended = [ids for ids in responses if eos in ids]
    cut = [ids for ids in responses if eos not in ids]
    assert ended
    assert cut
    for ids in ended:
        assert ids.index(eos) == len(ids) - 1
    for ids in cut:
        assert len(ids) == 24


def test_responses_depend_on_the_seed_and_not_on_rows_decoded_together(policy, problems):
    groups = generate(policy, problems, rows=512)
    assert [group[0].problem for group in groups] == problems
    assert all(len(group) == 4 for group in groups)
    expected = response_ids(groups)
    assert len(set(map(tuple, expected))) > 10  # otherwise the test proves little
    for rows in (4, 8, 512):
        assert response_ids(generate(policy, problems, rows=rows)) == expected
    assert response_ids(generate(policy, problems, seed=2)) != expected


def test_a_model_whose_config_has_parts_is_sampled_and_trained(tmp_path):
    """Models that also see name their context in a part of their config, not at the top."""
    tiny_composite(tmp_path)
    settings = {"max_response": 8, "overlong_buffer": 0}
    cfg = fipo.resolve(fipo.Config(model=str(tmp_path), data="d", out="o", **settings))
    policy = Policy(cfg.model, cfg)
    assert not hasattr(policy.model.config, "max_position_embeddings")
    assert policy.context == 77
    problems = [Problem("", "1", [3, 4, 5]), Problem("", "1", [3, 4, 5, 6, 7])]
    groups = HFSampler(policy).generate(problems, [1, 2], 2, cfg.max_response, 1.0, 1.0)
    assert fipo.score_old_logp(policy, groups)["sampler_mismatch"] < 1e-5
    sampled = flatten(groups)
    for r, advantage in zip(sampled, (1.0, -1.0, 1.0, -1.0)):
        r.advantage = advantage
    assert fipo.add_gradients(policy, sampled, cfg)["drift"] < 1e-5
    assert policy.step(1e-4) > 0


def test_sample_token_draws_from_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    u = torch.linspace(0, 1 - 2**-24, 2000)
    token, logp = fipo.sample_token(logits, 0.7, u)
    assert set(token.tolist()) == {0, 1}  # the smallest set that reaches 0.7
    assert logp.exp()[token == 0][0].item() == pytest.approx(0.5 / 0.8)
    assert (token == 0).float().mean().item() == pytest.approx(0.625, abs=1e-3)
    likeliest, _ = fipo.sample_token(logits, 0.1, u)
    assert set(likeliest.tolist()) == {0}  # the nucleus is never empty
    token, _ = fipo.sample_token(logits, 1.0, u)
    assert token.bincount().tolist() == pytest.approx([1000, 600, 300, 100], abs=2)


# --------------------------------------------------------------------------------------- log-probs


def gradients(model) -> list[torch.Tensor]:
    """Return the gradients of all parameters and reset them."""
    grads = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_in_chunks_match_full_logits(policy, rollouts, chunk, temperature):
    model = policy.model
    model.zero_grad()
    ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    logp, entropy = token_logprobs(model, ids, mask, temperature, chunk)
    full_logp, full_entropy = full_logprobs(model, ids, temperature)
    expected = torch.where(mask, full_logp, 0.0)
    torch.testing.assert_close(logp, expected)
    expected_entropy = torch.where(mask, full_entropy, 0.0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    weight = torch.randn(logp.shape)
    (logp * weight).sum().backward()
    grads = gradients(model)
    (expected * weight).sum().backward()
    for grad, expected_grad in zip(grads, gradients(model), strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


class Bigram(torch.nn.Module):
    """The smallest model that token_logprobs accepts. Its head has a bias, as that of Phi."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 5)
        self.head = torch.nn.Linear(5, 11)

    def base_model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache  # the cache of a whole batch would take memory
        return SimpleNamespace(last_hidden_state=self.embed(input_ids))

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_token_logprobs_match_a_computation_token_by_token(dtype, rounding):
    """For a mask of integers with gaps: float32 from the head on, with gradients for its bias."""
    model = Bigram().to(dtype)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 1, 1]])
    logp, entropy = token_logprobs(model, ids, mask, 0.7, chunk=2)
    expected = torch.zeros(2, 5)
    expected_entropy = torch.zeros(2, 5)
    weight = model.head.weight.float()
    bias = model.head.bias.float()
    # The first token of a row has no log-prob, because nothing precedes it.
    for row, t in [(0, 1), (0, 3), (1, 3), (1, 4)]:
        hidden = model.embed(ids[row, t - 1]).float()
        pi = (torch.nn.functional.linear(hidden, weight, bias) / 0.7).softmax(-1)
        expected[row, t] = pi[ids[row, t]].log()
        expected_entropy[row, t] = -(pi * pi.log()).sum()
    assert logp.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    grads = torch.autograd.grad(logp.sum(), list(model.parameters()))
    expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, atol=rounding, rtol=rounding)


def test_token_logprobs_have_a_default_temperature_of_1_and_an_optional_entropy():
    model = Bigram()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    mask = torch.ones(1, 5)
    logp, entropy = token_logprobs(model, ids, mask)
    explicit_logp, explicit_entropy = token_logprobs(model, ids, mask, 1.0)
    assert torch.equal(logp, explicit_logp)
    assert torch.equal(entropy, explicit_entropy)
    logp_only, no_entropy = token_logprobs(model, ids, mask, with_entropy=False)
    assert torch.equal(logp, logp_only)
    assert not no_entropy.any()
    assert entropy.any()


def test_token_logprobs_keep_no_tensor_of_all_logits_for_backward(policy, problems):
    sampled = flatten(generate(policy, problems, n=8))
    ids, mask, _, _ = fipo.collate(sampled, policy.device)
    vocab_size = policy.model.config.vocab_size
    sizes = []

    def record(x: torch.Tensor) -> torch.Tensor:
        if x.shape and x.shape[-1] == vocab_size:
            sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        token_logprobs(policy.model, ids, mask, chunk=32)
        assert not sizes
        full_logprobs(policy.model, ids, 1.0)
    assert max(sizes) >= mask.sum() * vocab_size  # the hook does see full logits


def test_padding_on_the_right_does_not_change_log_probs(policy, rollouts):
    ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    together, _ = token_logprobs(policy.model, ids, mask)
    for i, r in enumerate(rollouts):
        own_ids, own_mask, _, _ = fipo.collate([r], policy.device)
        alone, _ = token_logprobs(policy.model, own_ids, own_mask)
        torch.testing.assert_close(alone[own_mask], together[i][mask[i]], atol=1e-5, rtol=1e-5)


def test_eos_is_trained_and_padding_is_not_where_both_are_one_token(policy):
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == 0
    short = Rollout(Problem("7=?\n", "7", [8, 14, 15]), array("i", [8, 0]))
    long = Rollout(Problem("9+9=?\n", "18", [10, 11, 10, 14, 15]), array("i", [2, 9, 1, 0]))
    ids, mask, _, _ = fipo.collate([short, long], policy.device)
    assert ids[0].tolist() == [8, 14, 15, 8, 0, 0, 0, 0, 0]
    assert mask[0].int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert mask[1].int().tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_gradient_checkpointing_does_not_change_gradients(base, problems):
    r = Rollout(problems[0], array("i", [2, 3, 4, 0]))
    grads = []
    for is_on in (False, True):
        policy = Policy(base, fipo.Config(model=base, gradient_checkpointing=is_on))
        ids, mask, _, _ = fipo.collate([r], policy.device)
        policy.model.train()
        assert policy.model.is_gradient_checkpointing == is_on
        policy.logprobs(ids, mask)[0].sum().backward()
        grads.append(gradients(policy.model))
    for without, with_checkpointing in zip(*grads):
        torch.testing.assert_close(without, with_checkpointing)


# -------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def evaluate_groups(monkeypatch):
    """Evaluate groups of responses that are given instead of sampled. Returns the scores."""

    def evaluate(groups: fipo.Groups, **settings) -> fipo.Metrics:
        monkeypatch.setattr(fipo, "sample", lambda *_: iter(groups))
        scores, _ = fipo.evaluate(None, [], fipo.EvalConfig(**settings))
        return scores

    return evaluate


def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(evaluate_groups):
    for n in range(1, 7):
        for num_right in range(n + 1):
            verdicts = [True] * num_right + [False] * (n - num_right)
            group = [Rollout(Problem("", "1"), array("i", [1]), correct=c) for c in verdicts]
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(verdicts, k))
                expected = sum(map(any, subsets)) / len(subsets)
                scores = evaluate_groups([group], eval_samples=n, eval_k=k)
                assert scores["eval/pass"] == pytest.approx(expected)
            k_is_n = evaluate_groups([group], eval_samples=n, eval_k=0)
            assert k_is_n["eval/pass"] == float(num_right > 0)


DAPO_VOTES = [
    (["1", "2", "1"], True),
    (["1", "2", "2"], False),
    (["", "", "1"], True),  # responses without an answer do not vote
    (["", ""], False),
    (["1", "2"], True),  # a tie goes to the answer that was given first
    (["2", "1"], False),
]


@pytest.mark.parametrize("answers, is_right", DAPO_VOTES, ids=str)
def test_majority_vote_with_dapo(answers, is_right):
    group = []
    for answer in answers:
        text = f"Answer: {answer}" if answer else "hm"
        group.append(Rollout(Problem("", "1"), text=text, correct=answer == "1"))
    assert fipo.majority_correct(group, "dapo") == is_right


SEVENS = [r"\boxed{7}"] * 2
IS_25 = ["so $x=25$", "Answer: 25.", r"\boxed{25}", "It is **25**."]
HALVES = ["Answer: 1/2", "Answer: 0.5", r"Answer: 50\%"]
FACTORS = ["Answer: (x-1)(x+1)", "Answer: x^2-1", r"\boxed{-1+x^2}"]
NAMES = ["Answer: Evelyn", r"Answer: \text{evelyn}", "Answer: evelyn"]
MATH_VOTES = [
    ("25", [*SEVENS, *IS_25], True),
    ("7", [*SEVENS, *IS_25], False),
    ("0.5", ["Answer: 1/3", "Answer: 1/3", *HALVES, "hm", "hm", "hm", "hm"], True),
    ("x^2-1", [FACTORS[0], "Answer: y", "Answer: y", *FACTORS[1:]], True),
    (r"\text{Evelyn}", ["Answer: 1, 2", "Answer: {2, 1}", *NAMES], True),
    ("1", ["hm"], False),
]


@pytest.mark.parametrize("truth, texts, is_right", MATH_VOTES, ids=str)
def test_majority_vote_with_math_counts_equal_mathematics_together(truth, texts, is_right):
    group = []
    for text in texts:
        is_correct = fipo.verify_math(text, truth)
        group.append(Rollout(Problem("", truth), text=text, correct=is_correct))
    assert fipo.majority_correct(group, "math") == is_right


NO_ANSWER = [
    ("dapo", r"\boxed{1}", 'there is no "Answer:" line in the last 300 characters of any'),
    ("math", "hm", 'math-verify finds no "Answer:" line, number or formula in any'),
]


@pytest.mark.parametrize("verifier, text, cause", NO_ANSWER)
@pytest.mark.parametrize("max_response, num_cut", [(2, 2), (3, 0)])
def test_evaluate_reports_that_no_response_names_an_answer(
    evaluate_groups, capsys, verifier, text, cause, max_response, num_cut
):
    group = [Rollout(Problem("", "1"), array("i", [1, 2]), text=text) for _ in range(2)]
    evaluate_groups([group], eval_samples=2, verifier=verifier, max_response=max_response)
    output = capsys.readouterr().out
    assert f"no response of this evaluation gives an answer: {cause}" in output
    assert f"and {num_cut} of 2 are cut" in output


@pytest.mark.parametrize("verifier, text", [("dapo", "Answer: 2"), ("math", "2")])
@pytest.mark.parametrize("max_response", [2, 3])
def test_evaluate_prints_nothing_if_responses_name_answers(
    evaluate_groups, capsys, verifier, text, max_response
):
    group = [Rollout(Problem("", "1"), array("i", [1, 2]), text=text) for _ in range(2)]
    evaluate_groups([group], eval_samples=2, verifier=verifier, max_response=max_response)
    assert capsys.readouterr().out == ""


def test_evaluate_measures_accuracy_and_pass_at_k_of_sampled_responses(base, sums):
    lengths = {"max_prompt": 16, "max_response": 32}
    evaluation = {"eval_samples": 8, "eval_k": 2, "eval_top_p": 1.0}
    cfg = fipo.EvalConfig(model=base, data=sums, **lengths, **evaluation)
    policy = Policy(base, cfg)
    problems = fipo.encode_problems(sums, policy, cfg)
    scores, groups = fipo.evaluate(HFSampler(policy), problems, cfg)
    num_right = 0
    num_pairs_right = 0
    for group in groups:
        verdicts = [fipo.verify(r.text, r.problem.answer) for r in group]
        num_right += sum(verdicts)
        for seed in range(400):
            num_pairs_right += any(random.Random(seed).sample(verdicts, 2))
    assert scores["eval/accuracy"] == pytest.approx(num_right / (8 * len(groups)))
    assert 0 < scores["eval/accuracy"] < scores["eval/pass"] < 1
    assert scores["eval/pass"] == pytest.approx(num_pairs_right / (400 * len(groups)), abs=0.02)

"""Rollouts, log-probs and evaluation: one policy, seen by the sampler and by the trainer."""

import dataclasses
import importlib.metadata
import itertools
import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_composite

import fipo
from fipo import HFSampler, Policy, Problem, Rollout, token_logprobs


@pytest.fixture(scope="module")
def policy(base) -> Policy:
    return Policy(base, fipo.Config(model=base, max_response=32, tokens_per_micro_batch=512))


@pytest.fixture(scope="module")
def problems(policy) -> list[Problem]:
    prompts = [
        "1+2+3+4=?\n",
        "9+9=?\n",
        "5+5+5+5+5+5=?\n",
        "1+1+1=?\n",
        "7=?\n",
    ]  # of different lengths
    return [Problem(p, "10", policy.tokenizer(p)["input_ids"]) for p in prompts]


def generate(policy, problems, n=4, rows=512, temperature=1.0, top_p=1.0, seed=1):
    cfg = dataclasses.replace(policy.cfg, rollout_rows=rows, max_response=24)
    return list(fipo.sample(HFSampler(policy), problems, (seed,), cfg, n, temperature, top_p))


def full_logprobs(model, ids, temperature):
    """The plain way, holding [B, L, V]: log π and entropy of token t at position t."""
    logp = (model(ids).logits.float() / temperature).log_softmax(-1)[:, :-1]
    entropy = -(logp.exp() * logp).sum(-1)
    pad = torch.nn.functional.pad
    return pad(logp.gather(-1, ids[:, 1:, None])[..., 0], (1, 0)), pad(entropy, (1, 0))


# -------------------------------------------------------------------------------------------------------- sampling


def test_sampler_and_trainer_are_one_policy(policy, problems):
    """Left padding, the shared prefill and the shrinking batch: the log-probs are those of a plain forward pass."""
    for temperature in (1.0, 0.7):
        policy.cfg.temperature = temperature
        rollouts = [r for g in generate(policy, problems, temperature=temperature) for r in g]
        assert fipo.score_old_logp(policy, [rollouts])["sampler_mismatch"] < 1e-5
    policy.cfg.temperature = 1.0


def test_cold_sampling_is_greedy_decoding(policy, problems):
    for group in generate(policy, problems, n=2, temperature=1e-6):
        ids = torch.tensor([group[0].problem.prompt_ids])
        greedy = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
        )
        greedy = greedy[0, ids.shape[1] :].tolist()
        assert list(group[0].response_ids) == list(group[1].response_ids) == greedy


def test_a_response_ends_with_its_first_eos_or_at_the_limit(policy, problems):
    (eos,) = policy.eos
    rollouts = [r for g in generate(policy, problems, n=16) for r in g]
    ended = [r for r in rollouts if eos in r.response_ids]
    assert 0 < len(ended) < len(rollouts), "both kinds must occur for this test to say anything"
    assert all(r.response_ids.index(eos) == len(r.response_ids) - 1 for r in ended)
    assert all(len(r.response_ids) == 24 for r in rollouts if r not in ended)


def test_how_many_rows_are_decoded_at_a_time_changes_nothing(policy, problems):
    """A response depends on the seed of its problem and its place in the group, not on its neighbours."""
    groups = generate(policy, problems, rows=512)
    assert [g[0].problem for g in groups] == problems and all(len(g) == 4 for g in groups)
    assert len({tuple(r.response_ids) for g in groups for r in g}) > 10, (
        "they must differ for this to say anything"
    )
    for rows in (4, 8):
        again = generate(policy, problems, rows=rows)
        assert [[r.response_ids for r in g] for g in again] == [
            [r.response_ids for r in g] for g in groups
        ]


def test_a_model_of_several_parts_is_read_sampled_and_trained(tmp_path):
    """As one that also sees: its context is named in a part of its config, not at the top."""
    tiny_composite(tmp_path)
    cfg = fipo.resolve(
        fipo.Config(model=str(tmp_path), data="d", out="o", max_response=8, overlong_buffer=0)
    )
    p = Policy(cfg.model, cfg)
    assert not hasattr(p.model.config, "max_position_embeddings") and p.context == 77
    two = [Problem("", "1", [3, 4, 5]), Problem("", "1", [3, 4, 5, 6, 7])]
    groups = HFSampler(p).generate(two, [1, 2], 2, cfg.max_response, 1.0, 1.0)
    assert fipo.score_old_logp(p, groups)["sampler_mismatch"] < 1e-5
    for r, advantage in zip(groups[0] + groups[1], (1.0, -1.0, 1.0, -1.0)):
        r.advantage = advantage
    assert fipo.add_gradients(p, groups[0] + groups[1], cfg)["drift"] < 1e-5 and p.step(1e-4) > 0


def test_same_seed_same_rollouts(policy, problems):
    texts = [
        [r.response_ids for g in generate(policy, problems, seed=s) for r in g] for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_nucleus():
    logits, u = (
        torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4),
        torch.linspace(0, 1 - 2**-24, 2000),
    )
    token, logp = fipo.sample_token(logits, 0.7, u)
    assert set(token.tolist()) == {0, 1}  # the smallest set that reaches 0.7
    assert logp.exp()[token == 0][0].item() == pytest.approx(0.5 / 0.8)
    assert (token == 0).float().mean().item() == pytest.approx(0.625, abs=1e-3)
    assert set(fipo.sample_token(logits, 0.1, u)[0].tolist()) == {0}  # never empty
    assert fipo.sample_token(logits, 1.0, u)[0].bincount().tolist() == pytest.approx(
        [1000, 600, 300, 100], abs=2
    )


# ------------------------------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_log_probs_and_gradients_are_the_full_ones(policy, problems, chunk, temperature):
    rollouts = [g[0] for g in generate(policy, problems)]
    ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    model = policy.model
    for p in model.parameters():
        p.grad = None
    logp, entropy = token_logprobs(model, ids, mask, temperature, chunk)
    weight = torch.randn(logp.shape)
    (logp * weight).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    full, full_entropy = full_logprobs(model, ids, temperature)
    torch.testing.assert_close(logp, torch.where(mask, full, 0.0))
    torch.testing.assert_close(entropy, torch.where(mask, full_entropy, 0.0), atol=1e-5, rtol=1e-5)
    (torch.where(mask, full, 0.0) * weight).sum().backward()
    for ours, theirs in zip(grads, [p.grad for p in model.parameters()]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    model.zero_grad()


class Bigram(torch.nn.Module):
    """The least that token_logprobs asks of a model; its head has a bias, as Phi's does."""

    def __init__(self, vocabulary: int = 11, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = (
            torch.nn.Embedding(vocabulary, width),
            torch.nn.Linear(width, vocabulary),
        )

    def base_model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache, "keys and values of a whole batch would be kept for nothing"
        return SimpleNamespace(last_hidden_state=self.embed(input_ids))

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_log_probs_token_by_token(dtype, rounding):
    """Any mask, of any type; float32 from the head on; gradients for the head's bias too, none through entropy."""
    model = Bigram().to(dtype)
    ids, mask = (
        torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]),
        torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 1, 1]]),
    )
    logp, entropy = token_logprobs(model, ids, mask, 0.7, chunk=2)
    expected, expected_entropy = torch.zeros(2, 5), torch.zeros(2, 5)
    for row, t in [
        (0, 1),
        (0, 3),
        (1, 3),
        (1, 4),
    ]:  # nothing comes before the first token: it has no log-prob
        hidden, head = model.embed(ids[row, t - 1]).float(), model.head
        pi = (
            torch.nn.functional.linear(hidden, head.weight.float(), head.bias.float()) / 0.7
        ).softmax(-1)
        expected[row, t] = pi[ids[row, t]].log()
        expected_entropy[row, t] = -(pi * pi.log()).sum()
    assert logp.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    ours, theirs = (
        torch.autograd.grad(x.sum(), list(model.parameters())) for x in (logp, expected)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=rounding, rtol=rounding)


def test_temperature_is_1_unless_given():
    model, ids, mask = Bigram(), torch.tensor([[3, 1, 4, 1, 5]]), torch.ones(1, 5)
    assert all(
        map(torch.equal, token_logprobs(model, ids, mask), token_logprobs(model, ids, mask, 1.0))
    )


def test_no_tensor_of_all_logits_is_kept_for_backward(policy, problems):
    rollouts = [r for g in generate(policy, problems, n=8) for r in g]
    ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    V, N, sizes = policy.model.config.vocab_size, int(mask.sum()), []

    def record(x: torch.Tensor) -> torch.Tensor:
        if x.shape and x.shape[-1] == V:
            sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        token_logprobs(policy.model, ids, mask, chunk=32)
        assert not sizes
        full_logprobs(policy.model, ids, 1.0)
    assert max(sizes) >= N * V, "the hook must see full logits where they are kept"


def test_padding_on_the_right_changes_nothing(policy, problems):
    rollouts = [g[0] for g in generate(policy, problems)]
    ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    together, _ = token_logprobs(policy.model, ids, mask)
    for i, r in enumerate(rollouts):
        alone_ids, alone_mask, _, _ = fipo.collate([r], policy.device)
        alone, _ = token_logprobs(policy.model, alone_ids, alone_mask)
        torch.testing.assert_close(alone[alone_mask], together[i][mask[i]], atol=1e-5, rtol=1e-5)


def test_eos_is_trained_and_pad_is_not_even_when_they_are_the_same_token(policy):
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == 0
    short, long = Problem("7=?\n", "7", [8, 14, 15]), Problem("9+9=?\n", "18", [10, 11, 10, 14, 15])
    rollouts = [Rollout(short, array("i", [8, 0])), Rollout(long, array("i", [2, 9, 1, 0]))]
    ids, mask, _, _ = fipo.collate(rollouts, policy.device)
    assert ids[0].tolist() == [8, 14, 15, 8, 0, 0, 0, 0, 0]
    assert mask[0].tolist() == [False, False, False, True, True, False, False, False, False]
    assert mask[1].tolist() == [False] * 5 + [True] * 4


def test_gradient_checkpointing_changes_memory_not_numbers(base, problems):
    grads = []
    for flag in (False, True):
        p = Policy(base, fipo.Config(model=base, gradient_checkpointing=flag))
        ids, mask, _, _ = fipo.collate([Rollout(problems[0], array("i", [2, 3, 4, 0]))], p.device)
        p.model.train()
        assert p.model.is_gradient_checkpointing == flag
        p.logprobs(ids, mask)[0].sum().backward()
        grads.append([x.grad for x in p.model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------------------- evaluation


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(monkeypatch):
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for c in range(n + 1):
            if k <= n:
                right = [True] * c + [False] * (n - c)
                groups = [
                    [
                        Rollout(Problem("", "1"), array("i", [1]), correct=correct)
                        for correct in right
                    ]
                ]
                monkeypatch.setattr(fipo, "sample", lambda *_, groups=groups: iter(groups))
                cfg = fipo.EvalConfig(eval_samples=n, eval_k=k)
                subsets = list(itertools.combinations(right, k))
                metrics, _ = fipo.evaluate(None, [groups[0][0].problem], cfg)
                assert metrics["eval/pass"] == pytest.approx(sum(map(any, subsets)) / len(subsets))
                assert fipo.evaluate(
                    None, [groups[0][0].problem], dataclasses.replace(cfg, eval_k=0)
                )[0]["eval/pass"] == float(c > 0), "0: k = n"


def test_majority_vote():
    def group(*answers):
        return [
            Rollout(Problem("", "1"), text=f"Answer: {a}" if a else "hm", correct=a == "1")
            for a in answers
        ]

    assert fipo.majority_correct(group("1", "2", "1"), "dapo")
    assert not fipo.majority_correct(group("1", "2", "2"), "dapo")
    assert fipo.majority_correct(group("", "", "1"), "dapo")  # no answer, no vote
    assert not fipo.majority_correct(group("", ""), "dapo")
    assert fipo.majority_correct(group("1", "2"), "dapo") and not fipo.majority_correct(
        group("2", "1"), "dapo"
    )  # ties


def test_majority_vote_counts_equal_mathematics_together_with_the_math_verifier():
    def group(truth, *texts):
        return [
            Rollout(Problem("", truth), text=t, correct=fipo.verify_math(t, truth)) for t in texts
        ]

    texts = [r"\boxed{7}", r"\boxed{7}", "so $x=25$", "Answer: 25.", r"\boxed{25}", "It is **25**."]
    assert fipo.majority_correct(group("25", *texts), "math") and not fipo.majority_correct(
        group("7", *texts), "math"
    )
    texts = [
        "Answer: 1/3",
        "Answer: 1/3",
        "Answer: 1/2",
        "Answer: 0.5",
        r"Answer: 50\%",
        "hm",
        "hm",
        "hm",
        "hm",
    ]
    assert fipo.majority_correct(group("0.5", *texts), "math")
    texts = ["Answer: (x-1)(x+1)", "Answer: y", "Answer: y", "Answer: x^2-1", r"\boxed{-1+x^2}"]
    assert fipo.majority_correct(group("x^2-1", *texts), "math")
    texts = [
        "Answer: 1, 2",
        "Answer: {2, 1}",
        "Answer: Evelyn",
        r"Answer: \text{evelyn}",
        "Answer: evelyn",
    ]
    assert fipo.majority_correct(group(r"\text{Evelyn}", *texts), "math")
    assert not fipo.majority_correct(group("1", "hm"), "math")


@pytest.mark.parametrize("verifier, text, said", [
    ("dapo", r"\boxed{1}", 'there is no "Answer:" line in the last 300 characters of any, and 2 of 2 are cut'),
    ("math", "hm", 'math-verify finds no "Answer:" line, number or formula in any, and 2 of 2 are cut'),
    ("dapo", "Answer: 2", None),
    ("math", "2", None),
])  # fmt: skip
def test_evaluate_reports_that_no_response_names_an_answer(
    monkeypatch, capsys, verifier, text, said
):
    rollouts = [Rollout(Problem("", "1"), array("i", [1, 2]), text=text) for _ in range(2)]
    monkeypatch.setattr(fipo, "sample", lambda *_: iter([rollouts]))
    for max_response in (2, 3):
        cfg = fipo.EvalConfig(eval_samples=2, verifier=verifier, max_response=max_response)
        fipo.evaluate(None, [rollouts[0].problem], cfg)
        out = capsys.readouterr().out
        if said:
            assert "no response of this evaluation names an answer" in out
            assert (said in out) == (max_response == 2)
        else:
            assert out == ""


def test_evaluate_reports_avg_cons_pass_and_length(base, sums):
    cfg = fipo.EvalConfig(
        model=base,
        data=sums,
        max_prompt=16,
        max_response=32,
        eval_samples=8,
        eval_k=2,
        eval_top_p=1.0,
    )
    p = Policy(base, cfg)
    problems = fipo.encode_problems(sums, p, cfg)
    metrics, groups = fipo.evaluate(HFSampler(p), problems, cfg)
    right = [[fipo.verify(r.text, r.problem.answer) for r in g] for g in groups]
    assert metrics["eval/accuracy"] == pytest.approx(sum(map(sum, right)) / (8 * len(groups)))
    assert 0 < metrics["eval/accuracy"] < metrics["eval/pass"] < 1
    pairs = [any(random.Random(i).sample(g, 2)) for g in right for i in range(400)]
    assert metrics["eval/pass"] == pytest.approx(sum(pairs) / len(pairs), abs=0.02)

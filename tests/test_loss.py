"""Advantages, Future-KL and the FIPO loss: the authors' numbers, the definitions, and what must not matter."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

import fipo
from fipo import (
    Problem,
    Rollout,
    assign_advantages,
    fipo_loss,
    future_kl,
    group_advantages,
    influence_weight,
)

CASES = json.loads((Path(__file__).parent / "data" / "fipo_loss.json").read_text())["cases"]
SEVEN_B = dict(weight_range=(0.8, 1.2), safety=3.0)


def settings(config: dict) -> dict:
    """The release's configuration in this project's words."""
    eps, high_only = config["eps_f"], config["high_only"]
    weight_range = (0.0, math.inf) if eps == 0 else ((1.0 if high_only else 1 - eps), 1 + eps)
    names = ("tau", "safety", "clip_low", "clip_high", "dual_clip")
    return {name: config[name] for name in names} | {"weight_range": weight_range}


def random_case(B: int = 6, T: int = 40, scale: float = 0.3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g) * 3
    logp = old + scale * torch.randn(B, T, generator=g)
    length = torch.randint(1, T + 1, (B, 1), generator=g)
    return logp, old, torch.randn(B, generator=g), torch.arange(T) < length


def loss_and_grad(logp, old, advantages, mask, **kw):
    logp = logp.clone().requires_grad_()
    loss, metrics = fipo_loss(logp, old, advantages, mask, **kw)
    loss.backward()
    return loss.item(), logp.grad, metrics


def weight(delta: list[float], advantage: float, **kw):
    """F and f of one response, as lists."""
    delta = torch.tensor([delta])
    F, f = influence_weight(
        delta, torch.full_like(delta, advantage), torch.ones_like(delta).bool(), **kw
    )
    return F[0].tolist(), f[0].tolist()


def naive_future_kl(delta: torch.Tensor, mask: torch.Tensor, tau: float) -> torch.Tensor:
    """The definition, O(T²), float64."""
    t = torch.arange(delta.shape[1])
    decay = torch.where(t >= t[:, None], 2.0 ** (-(t - t[:, None]).double() / tau), 0.0)  # [t, k]
    return torch.where(mask, delta, 0.0).double() @ decay.T


# -------------------------------------------------------------------------------------------------- the release


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_loss_gradient_and_statistics_are_the_release_s(case):
    tensors = [torch.tensor(case[k]) for k in ("logp", "old_logp", "advantages", "mask")]
    loss, grad, metrics = loss_and_grad(*tensors, **settings(case["config"]))
    expected = case["expected"]
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
    torch.testing.assert_close(grad, torch.tensor(expected["grad"]), atol=1e-5, rtol=0)
    for name in (
        "clip_frac",
        "dual_clip_frac",
        "ppo_kl",
        "influence_mean",
        "influence_min",
        "influence_max",
    ):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name


def test_the_cases_exercise_every_branch():
    """Otherwise parity proves little: clipping, dual clipping, the drop and the safety clamp all occur."""
    seen = [loss_and_grad(*(torch.tensor(c[k]) for k in ("logp", "old_logp", "advantages", "mask")),
                          **settings(c["config"]))[2] for c in CASES]  # fmt: skip
    for name in (
        "clip_frac",
        "dual_clip_frac",
        "dropped_sequences",
        "influence_frac_low",
        "influence_frac_high",
    ):
        assert any(m[name] > 0 for m in seen), name
    assert any(
        (
            (torch.tensor(c["logp"]) - torch.tensor(c["old_logp"])).exp() > c["config"]["safety"]
        ).any()
        for c in CASES
    )


# --------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_advantages_are_rewards_in_units_of_their_group_s_standard_deviation(dtype):
    A = group_advantages(torch.tensor([[1, -1, -1, -1], [2, 4, 4, 6]], dtype=dtype))
    assert A.dtype == torch.float32
    assert A[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)  # std with n − 1 is 1
    assert A[1].tolist() == pytest.approx([-(1.5**0.5), 0, 0, 1.5**0.5], abs=1e-5)  # it is √(8/3)


def test_an_advantage_s_denominator_is_the_standard_deviation_plus_1e_6():
    A = group_advantages(torch.tensor([[0.0, 2e-6]]))  # the standard deviation is √2 · 1e-6
    assert A.tolist() == [pytest.approx([-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)], rel=1e-4)]


def test_equal_rewards_teach_exactly_nothing():
    """Though their mean rounds: by 1e-6, noise of 1e-7 would be an advantage of 0.1."""
    for G in range(2, 33):
        for reward in (0.1, -1.0, -1.3, 1 - 1 / 3):
            assert not group_advantages(torch.full((2, G), reward)).any()


def test_a_group_has_two_responses_at_least():
    assert group_advantages(torch.tensor([[1.0, 1.0]])).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))


def test_each_response_is_given_its_advantage():
    rewards = [[1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [-1.5, 1.0, 0.5, 1.0]]
    groups = [[Rollout(Problem("", ""), reward=r) for r in group] for group in rewards]
    assign_advantages(groups)
    assert [[r.advantage for r in group] for group in groups] == group_advantages(
        torch.tensor(rewards)
    ).tolist()
    assert all(type(r.advantage) is float for group in groups for r in group)


# ---------------------------------------------------------------------------------------------------- Future-KL


@pytest.mark.parametrize("T", [1, 2, 127, 128, 129, 257, 1000, 20480])
@pytest.mark.parametrize("tau", [1.0, 8.0, 32.0, 256.0, 1e6])
def test_future_kl_is_its_definition(T, tau):
    g = torch.Generator().manual_seed(T)
    B = {129: 140, 20480: 1}.get(T, 3)  # also more rows than tokens
    delta, mask = torch.randn(B, T, generator=g), torch.rand(B, T, generator=g) < 0.9
    F = future_kl(delta, mask, tau)
    if T < 2000:
        exact, size = naive_future_kl(delta, mask, tau), naive_future_kl(delta.abs(), mask, tau)
    else:  # the recurrence, in Python floats, which are float64
        exact, size = (
            torch.zeros(B, T + 1, dtype=torch.float64),
            torch.zeros(B, T + 1, dtype=torch.float64),
        )
        gamma, d = 2 ** (-1 / tau), torch.where(mask, delta, 0.0)[0].tolist()
        for t in reversed(range(T)):
            exact[0, t] = d[t] + gamma * exact[0, t + 1].item()
            size[0, t] = abs(d[t]) + gamma * size[0, t + 1].item()
        exact, size = exact[:, :T], size[:, :T]
    assert F.shape == delta.shape and F.dtype == torch.float32
    assert (
        (F - exact).abs() <= 1e-6 * size + 1e-12
    ).all()  # F itself crosses zero: measure against the sum of |Δ|


@pytest.mark.parametrize("kind", ["alternating", "huge then tiny", "one spike", "all masked"])
def test_future_kl_on_adversarial_input(kind):
    T = 700
    delta, mask = torch.zeros(1, T), torch.ones(1, T, dtype=torch.bool)
    if kind == "alternating":
        delta[0] = 20.0 * (-1) ** torch.arange(T)
    elif kind == "huge then tiny":
        delta[0] = torch.logspace(1, -20, T)
    elif kind == "one spike":
        delta[0, -1] = 20.0
    else:
        delta[0], mask[0] = math.nan, False
    exact, size = naive_future_kl(delta, mask, 32.0), naive_future_kl(delta.abs(), mask, 32.0)
    assert ((future_kl(delta, mask) - exact).abs() <= 1e-6 * size + 1e-12).all()


def test_gamma_halves_the_weight_after_tau_tokens_and_masked_tokens_carry_nothing():
    delta = torch.zeros(1, 100)
    delta[0, 64], delta[0, 90] = 1.0, torch.inf
    mask = torch.ones(1, 100, dtype=torch.bool)
    mask[0, 90] = False
    F = future_kl(delta, mask, tau=32.0)[0]
    assert F[64] == 1 and F[65] == 0
    assert F[32].item() == pytest.approx(0.5) and F[0].item() == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_future_kl_computes_in_float32_whatever_comes_in(dtype):
    delta = torch.randn(2, 300).to(dtype)
    mask = torch.ones(2, 300)
    with torch.autocast("cpu", torch.bfloat16):  # an ambient autocast must not round γ or F either
        F = future_kl(delta, mask)
    assert F.dtype == torch.float32
    exact, size = (
        naive_future_kl(delta, mask.bool(), 32.0),
        naive_future_kl(delta.abs(), mask.bool(), 32.0),
    )
    assert ((F - exact).abs() <= 1e-6 * size).all()


# ---------------------------------------------------------------------------------------- the influence weight f


def test_f_by_hand():
    """Two tokens, τ = 1, so γ = ½: F = (Δ₁ + Δ₂/2, Δ₂)."""
    old, logp = torch.zeros(1, 2), torch.tensor([[0.10, 0.06]])
    _, grad, metrics = loss_and_grad(
        logp, old, torch.tensor([1.0]), torch.ones(1, 2), tau=1.0, weight_range=(0.5, 2.0)
    )
    f = torch.tensor([0.13, 0.06]).exp()
    assert metrics["influence_mean"] == pytest.approx(f.mean().item())
    torch.testing.assert_close(
        grad, -(f * logp.exp()) / 2
    )  # no gradient through f, else Δ would appear in it
    assert metrics["future_kl_mean"] == pytest.approx((0.13 + 0.06) / 2)


def test_tokens_that_ran_away_do_not_count_in_F():
    logp = torch.tensor([[0.1, math.log(11.0)]])  # r₂ = 11 > c = 10: M₂ = 0
    _, _, metrics = loss_and_grad(
        logp, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2), weight_range=(0.5, 2.0)
    )
    assert metrics["future_kl_mean"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "how", [dict(), SEVEN_B, dict(tau=3.0, weight_range=(0.0, math.inf), safety=1.5, dual_clip=3)]
)
def test_influence_weight_is_its_definition(how):
    """Token by token, in Python floats, which are float64."""
    s = dict(tau=32.0, weight_range=(1.0, 1.2), safety=10.0, dual_clip=10.0) | how
    logp, old, A, mask = random_case(B=8, scale=1.2)
    advantages = A[:, None].expand_as(logp)
    F, f = influence_weight(logp - old, advantages, mask, **how)
    for b, t in mask.nonzero().tolist():
        future = [(k, d) for k, d in enumerate((logp - old)[b].tolist()) if k >= t and mask[b, k]]
        exact = sum(
            2 ** (-(k - t) / s["tau"]) * d for k, d in future if math.exp(d) <= s["dual_clip"]
        )
        weight = min(max(math.exp(exact), s["weight_range"][0]), s["weight_range"][1])
        if A[b] < 0 and math.exp(future[0][1]) > s["safety"]:
            weight = min(max(weight, 0.8), 1.0)
        assert F[b, t].item() == pytest.approx(exact, abs=2e-5) and f[b, t].item() == pytest.approx(
            weight, rel=2e-5
        )


def test_influence_weight_is_what_the_loss_multiplies_the_advantage_with():
    logp, old, A, mask = random_case(scale=0.5)
    F, f = influence_weight(logp - old, A[:, None], mask, **SEVEN_B)
    loss, grad, metrics = loss_and_grad(logp, old, A, mask, **SEVEN_B)
    dapo_loss, dapo_grad, _ = loss_and_grad(logp, old, A[:, None] * f, mask, weight_range=(1, 1))
    assert f[mask].unique().numel() > 10, "they must differ for this to say anything"
    assert loss == dapo_loss and torch.equal(grad, dapo_grad)
    assert metrics["influence_mean"] == f[mask].mean() and metrics[
        "future_kl_mean"
    ] == pytest.approx(F[mask].mean())


def test_defaults_are_the_paper_s_at_32b_in_the_loss_as_in_the_command():
    paper = dict(
        tau=32.0, weight_range=(1.0, 1.2), safety=10.0, clip_low=0.2, clip_high=0.28, dual_clip=10.0
    )
    for function in (future_kl, influence_weight, fipo_loss):
        defaults = {
            k: p.default for k, p in inspect.signature(function).parameters.items() if k in paper
        }
        assert defaults == {k: paper[k] for k in defaults} and "tau" in defaults
    command = vars(fipo.Config()) | fipo.PRESETS["fipo"]
    assert {k: command[k] for k in paper} == paper | {"weight_range": [1.0, 1.2]}


def test_where_advantage_is_negative_and_the_ratio_unsafe_f_is_clamped_to_0_8_and_1():
    """r = 4 and a safety of 3; then what follows decides on F, and so on exp F = 4 or ¼."""
    for delta, free in [([math.log(4.0), 0.0], 4.0), ([math.log(4.0), -math.log(16.0)], 0.25)]:
        for advantage, expected in [(-1.0, min(max(free, 0.8), 1.0)), (0.0, free), (1.0, free)]:
            f = weight(delta, advantage, tau=1e9, weight_range=(0.0, 9.0), safety=3.0)[1][0]
            assert f == pytest.approx(expected), (free, advantage)


def test_a_ratio_that_equals_a_bound_is_within_it():
    """M_t = 1[r_t ≤ c]; f is clamped where r_t > safety; a token is dual-clipped where r_t > c."""
    delta = 0.7
    r = torch.tensor(delta).exp().item()
    F, f = weight([delta], -1.0, weight_range=(0.0, 9.0), safety=r, dual_clip=r)
    assert F == [pytest.approx(delta)] and f == [r]
    case = torch.full((1, 2), delta), torch.zeros(1, 2), -torch.ones(1), torch.ones(1, 2)
    loss, _, metrics = loss_and_grad(*case, weight_range=(1, 1), dual_clip=r)
    assert (
        loss == pytest.approx(r) and metrics["dual_clip_frac"] == metrics["dropped_sequences"] == 0
    )
    _, _, metrics = loss_and_grad(*case, weight_range=(1, 1), dual_clip=r - 1e-6)
    assert metrics["dual_clip_frac"] == metrics["dropped_sequences"] == 1


def test_to_the_gradient_f_is_a_constant():
    delta = torch.tensor([[0.1, 0.05]], requires_grad=True)
    F, f = influence_weight(delta, torch.ones(1, 2), torch.ones(1, 2).bool())
    assert 1 < f.min() and f.max() < 1.2 and not F.requires_grad and not f.requires_grad


# ---------------------------------------------------------------------------------------- the loss: DAPO, GRPO, FIPO


def ppo_token_losses(logp, old, A, low, high, c):
    r = (logp - old).exp()
    loss = torch.maximum(-A[:, None] * r, -A[:, None] * r.clamp(1 - low, 1 + high))
    return torch.where(A[:, None] < 0, torch.minimum(loss, -A[:, None] * c), loss)


def test_weight_range_one_one_is_dapo():
    logp, old, A, mask = random_case(scale=0.2)
    loss, _, metrics = loss_and_grad(logp, old, A, mask, weight_range=(1, 1))
    dapo = ppo_token_losses(logp, old, A, 0.2, 0.28, 10.0)[mask].mean()
    assert loss == pytest.approx(dapo.item(), abs=1e-6)
    assert metrics["influence_min"] == metrics["influence_max"] == 1


@pytest.mark.parametrize("kw", [dict(), dict(num_responses=6)])
def test_advantages_may_be_given_token_by_token(kw):
    logp, old, A, mask = random_case()
    expected = loss_and_grad(logp, old, A, mask, **kw)
    whole = loss_and_grad(logp, old, A[:, None].expand_as(logp), mask, **kw)
    assert (
        whole[0] == expected[0] and torch.equal(whole[1], expected[1]) and whole[2] == expected[2]
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_log_ratios_are_clamped_to_20(sign):
    delta = torch.tensor([[sign * 25.0]])
    loss, grad, metrics = loss_and_grad(delta, torch.zeros(1, 1), torch.tensor([-float(sign)]), torch.ones(1, 1),
                                        dual_clip=math.inf, weight_range=(1, 1))  # fmt: skip
    assert loss == pytest.approx(sign * math.exp(sign * 20.0)) and grad == 0  # −A r
    assert metrics["ppo_kl"] == -sign * 20 and metrics["future_kl_mean"] == sign * 20


def test_before_any_update_fipo_is_dapo():
    logp, _, A, mask = random_case()
    for kw in (dict(), SEVEN_B):
        fipo_result, dapo_result = (
            loss_and_grad(logp, logp, A, mask, **k) for k in (kw, dict(weight_range=(1, 1)))
        )
        assert fipo_result[0] == dapo_result[0] and torch.equal(fipo_result[1], dapo_result[1])


@pytest.mark.parametrize("counts", [dict(), dict(num_tokens=2), dict(num_responses=1)])
@pytest.mark.parametrize("safety, f", [(10.0, 1.0), (15.0, 1.2)])
def test_one_dual_clipped_token_costs_c_and_teaches_nothing(safety, f, counts):
    """A < 0 and r = 12 > c = 10: −Ã c in place of −Ã r. F = γ 0.3, so f is cut to 1.2, and to 1 where 12 is unsafe."""
    case = (
        torch.tensor([[math.log(12.0), 0.3]]),
        torch.zeros(1, 2),
        -torch.ones(1),
        torch.ones(1, 2),
    )
    loss, grad, metrics = loss_and_grad(*case, safety=safety, **counts)
    second = 1.2 * math.exp(0.3)
    assert loss == pytest.approx((10 * f + second) / 2) and grad.tolist() == [
        [0, pytest.approx(second / 2)]
    ]
    assert (
        metrics["dual_clip_frac"] == 0.5
        and metrics["dropped_sequences"] == metrics["dropped_tokens"] == 0
    )


def two_dual_clipped():
    """Three tokens, of which two have A < 0 and r > c; and a response of two at r = 1 with A = 1."""
    logp = torch.zeros(2, 3)
    logp[0, :2] = math.log(12.0)
    return logp, torch.zeros(2, 3), torch.tensor([-1.0, 1.0]), torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    "counts, denominator",
    [
        (dict(), 2),
        (dict(num_tokens=5), 5),
        (dict(num_responses=2), 4),
        (dict(num_tokens=5, num_responses=2), 4),
    ],
    ids=["counted here", "tokens", "responses", "both: responses"],
)
def test_more_than_one_dual_clipped_token_drops_the_response(counts, denominator):
    """From the sum; from the count only where it is taken here. A response's mean is over its two tokens."""
    loss, grad, metrics = loss_and_grad(*two_dual_clipped(), **counts)
    assert metrics["dropped_sequences"] == 1 and metrics["dropped_tokens"] == 3
    assert metrics["dual_clip_frac"] == pytest.approx(2 / 5)
    assert loss == pytest.approx(-2 / denominator)
    torch.testing.assert_close(
        grad, torch.tensor([[0.0] * 3, [-1 / denominator, -1 / denominator, 0.0]])
    )


def test_where_every_response_is_dropped_there_is_no_loss_but_there_are_statistics():
    logp, old, A, mask = (x[:1] for x in two_dual_clipped())
    logp[0, 2] = 0.3  # its f is cut to 1.2
    loss, grad, metrics = loss_and_grad(logp, old, A, mask)
    assert loss == 0 and not grad.any() and metrics["dropped_sequences"] == 1
    assert metrics["influence_mean"] == pytest.approx((1 + 1 + 1.2) / 3)


def test_grpo_by_hand_on_three_tokens():
    """One group of two responses with one and two tokens: GRPO is the mean of each response's own mean."""
    old, logp = torch.zeros(2, 2), torch.tensor([[0.5, 0.0], [0.1, -0.5]])
    mask = torch.tensor([[1, 0], [1, 1]])
    A = group_advantages(torch.tensor([[1.0, -1.0]]))[0]
    assert A.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)
    first = -A[0] * 1.2  # e^0.5 is clipped to 1.2
    second = (-A[1] * math.exp(0.1) + -A[1] * 0.8) / 2  # A < 0: e^−0.5 is raised to 0.8
    loss, _ = fipo_loss(
        logp, old, A, mask, weight_range=(1, 1), clip_high=0.2, dual_clip=math.inf, num_responses=2
    )
    assert loss.item() == pytest.approx(((first + second) / 2).item())


# --------------------------------------------------------------------------------------------------- statistics


def test_shares_of_tokens_whose_weight_is_cut_by_more_than_rounding():
    """Rounding is less than 1e-4: eight responses of one token, of which F is Δ."""
    lo, hi = 0.8, 1.2
    logp = torch.tensor(
        [[lo - 1.02e-4], [lo - 0.98e-4], [lo], [1], [hi], [hi + 0.98e-4], [hi + 1.02e-4], [2]]
    ).log()
    case = logp, torch.zeros(8, 1), torch.ones(8), torch.ones(8, 1)
    metrics = loss_and_grad(*case, weight_range=(lo, hi))[2]
    assert metrics["influence_frac_low"] == 1 / 8 and metrics["influence_frac_high"] == 2 / 8
    assert metrics["influence_min"] == pytest.approx(lo) and metrics[
        "influence_max"
    ] == pytest.approx(hi)
    one = torch.full((1, 1), 0.5), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1)
    w = torch.tensor(0.5).exp().item()  # cut by 1e-4 is not yet cut by more
    assert loss_and_grad(*one, weight_range=(w + 1e-4, 9.0))[2]["influence_frac_low"] == 0
    assert loss_and_grad(*one, weight_range=(0.0, w - 1e-4))[2]["influence_frac_high"] == 0


@pytest.mark.parametrize("counts", [dict(), dict(num_tokens=50), dict(num_responses=7)])
def test_statistics_by_hand(counts):
    """Nine tokens in three responses, of which the last is dropped: statistics are of all tokens, whatever the count.

    τ = 1, so γ = ½. With A > 0 one ratio is cut by the upper clip, with A < 0 two are raised to the lower. Two tokens
    have run away: they do not count in F, and their own f is 1 at most.
    """
    logp, mask = (
        torch.full((3, 4), 9.0),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool(),
    )
    logp[mask] = torch.tensor([0.1, 0.5, 0.0, 0.2, -0.5, math.log(12.0), math.log(12.0), 0.8, -0.6])
    F = torch.tensor([0.35, 0.5, 0.0, -0.05, -0.5, 0.125, 0.25, 0.5, -0.6])
    f = torch.tensor([1.2, 1.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.2, 1.0])
    _, _, metrics = loss_and_grad(
        logp, torch.zeros(3, 4), torch.tensor([1.0, -1, -1]), mask, tau=1.0, **counts
    )
    expected = dict(clip_frac=3 / 9, dual_clip_frac=2 / 9, ppo_kl=-logp[mask].mean(), influence_mean=f.mean(),
                    influence_min=1, influence_max=1.2, influence_frac_low=3 / 9, influence_frac_high=4 / 9,
                    future_kl_mean=F.mean(), dropped_sequences=1, dropped_tokens=4)  # fmt: skip
    assert metrics == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-6
    )


# --------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize(
    "how", [dict(), dict(num_responses=6, dual_clip=math.inf)], ids=["FIPO", "GRPO"]
)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_positions_may_hold_anything(poison, how):
    logp, old, A, mask = random_case()
    mask[0] = False  # a row without any token
    A[0] = math.nan
    clean = loss_and_grad(logp, old, A.nan_to_num(), mask, **how)
    assert clean[1].isfinite().all()
    for x, y in [(poison, 0.0), (0.0, poison), (poison, poison)]:
        bad_logp, bad_old = torch.where(mask, logp, x), torch.where(mask, old, y)
        advantages = torch.where(mask, A[:, None], poison)
        loss, grad, metrics = loss_and_grad(bad_logp, bad_old, advantages, mask, **how)
        assert loss == clean[0] and torch.equal(grad, clean[1]) and metrics == clean[2]


def test_all_masked_and_one_token():
    loss, grad, metrics = loss_and_grad(
        torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3)
    )
    assert loss == 0 and (grad == 0).all()
    assert {k: v for k, v in metrics.items() if v} == {
        "influence_mean": 1,
        "influence_min": 1,
        "influence_max": 1,
    }
    loss, grad, _ = loss_and_grad(
        torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1)
    )
    assert loss == -1 and grad.item() == -1


@pytest.mark.parametrize("pad", [1, 100, 200])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, pad):
    logp, old, A, mask = random_case(scale=0.4)
    amount = (pad, 0) if side == "left" else (0, pad)
    padded = [torch.nn.functional.pad(x, amount) for x in (logp, old)]
    loss, grad, metrics = loss_and_grad(
        *padded, A, torch.nn.functional.pad(mask, amount), **SEVEN_B
    )
    expected = loss_and_grad(logp, old, A, mask, **SEVEN_B)
    inner = grad[:, pad:] if side == "left" else grad[:, :-pad]
    assert loss == pytest.approx(expected[0], abs=1e-6)
    torch.testing.assert_close(inner, expected[1], atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(expected[2], abs=1e-6)


@pytest.mark.parametrize("count", ["num_tokens", "num_responses"])
def test_row_order_and_micro_batches_change_nothing(count):
    logp, old, A, mask = random_case(B=12, scale=1.5)  # wild enough that responses are dropped
    how = SEVEN_B | {count: 12 if count == "num_responses" else mask.sum().item()}
    whole, grad, metrics = loss_and_grad(logp, old, A, mask, **how)
    assert metrics["dropped_sequences"] > 0
    order = torch.randperm(12)
    shuffled, shuffled_grad, _ = loss_and_grad(
        logp[order], old[order], A[order], mask[order], **how
    )
    assert shuffled == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(shuffled_grad, grad[order])
    for size in (1, 5):
        parts = [
            loss_and_grad(*(x[i : i + size] for x in (logp, old, A, mask)), **how)
            for i in range(0, 12, size)
        ]
        assert sum(p[0] for p in parts) == pytest.approx(whole, abs=1e-6)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad)
    if count == "num_tokens":  # without a count, the loss takes that of the tokens it keeps
        kept = mask.sum().item() - metrics["dropped_tokens"]
        assert loss_and_grad(logp, old, A, mask, **SEVEN_B)[0] * kept == pytest.approx(
            whole * how[count], rel=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_loss_is_float32_whatever_comes_in(dtype):
    logp, old, A, mask = random_case()
    rounded = [x.to(dtype).float() for x in (logp, old, A)]
    expected, _ = fipo_loss(*rounded, mask)
    for i in range(3):
        given = rounded[:i] + [rounded[i].to(dtype)] + rounded[i + 1 :]
        loss, _ = fipo_loss(*given, mask)
        assert loss.dtype == torch.float32 and loss == expected
    loss, _ = fipo_loss(*(x.to(dtype) for x in rounded), mask)
    assert loss.dtype == torch.float32 and loss == expected


def test_the_loss_can_be_copied_with_nothing_but_torch():
    namespace = {"torch": torch}
    for function in (future_kl, influence_weight, fipo_loss, fipo.loss_metrics, group_advantages):
        exec(inspect.getsource(function), namespace)
    logp, old, A, mask = random_case()
    assert namespace["fipo_loss"](logp, old, A, mask)[0] == fipo_loss(logp, old, A, mask)[0]
    assert torch.equal(namespace["group_advantages"](A[None]), group_advantages(A[None]))

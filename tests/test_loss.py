"""Advantages, Future-KL and the FIPO loss: the numbers of the authors' release, the definitions
in plain Python, and what must not change the result."""

import doctest
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
SEVEN_B = {"weight_range": (0.8, 1.2), "safety": 3.0}  # the paper's settings for 7B
DAPO = {"weight_range": (1, 1)}
UNBOUNDED = {"weight_range": (0.0, math.inf)}


def release_tensors(case: dict) -> list[torch.Tensor]:
    return [torch.tensor(case[name]) for name in ("logp", "old_logp", "advantages", "mask")]


def release_settings(config: dict) -> dict:
    """The configuration of the release, in the names of fipo.py."""
    eps = config["eps_f"]
    lowest = 1.0 if config["high_only"] else 1 - eps
    names = ("tau", "safety", "clip_low", "clip_high", "dual_clip")
    settings = {name: config[name] for name in names}
    return settings | (UNBOUNDED if eps == 0 else {"weight_range": (lowest, 1 + eps)})


def random_case(B: int = 6, T: int = 40, scale: float = 0.3) -> list[torch.Tensor]:
    """Return logp, old_logp [B, T], advantages [B] and mask [B, T]."""
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(B, T, generator=g) * 3
    logp = old + scale * torch.randn(B, T, generator=g)
    length = torch.randint(1, T + 1, (B, 1), generator=g)
    advantages = torch.randn(B, generator=g)
    return [logp, old, advantages, torch.arange(T) < length]


def case_of(logp, advantages, mask=None) -> list[torch.Tensor]:
    """A case whose old_logp is 0, so that logp is Δ."""
    logp = torch.as_tensor(logp)
    mask = torch.ones_like(logp) if mask is None else torch.as_tensor(mask)
    return [logp, torch.zeros_like(logp), torch.tensor(advantages), mask]


def loss_and_grad(logp, old, advantages, mask, **settings):
    logp = logp.clone().requires_grad_()
    loss, metrics = fipo_loss(logp, old, advantages, mask, **settings)
    loss.backward()
    return loss.item(), logp.grad, metrics


def assert_same(result, expected) -> None:
    """Two results of loss_and_grad must be equal to the last bit."""
    assert result[0] == expected[0]
    assert torch.equal(result[1], expected[1])
    assert result[2] == expected[2]


def weight(delta: list[float], advantage: float, **settings):
    """F and f of one response, as lists."""
    delta = torch.tensor([delta])
    advantages = torch.full_like(delta, advantage)
    F, f = influence_weight(delta, advantages, torch.ones_like(delta).bool(), **settings)
    return F[0].tolist(), f[0].tolist()


def exact_future_kl(delta: torch.Tensor, mask: torch.Tensor, tau: float) -> torch.Tensor:
    """Future-KL in float64: its definition, or its recurrence where T² is too much."""
    delta = torch.where(mask, delta, 0.0).double()
    T = delta.shape[1]
    if T < 2000:
        distance = torch.arange(T) - torch.arange(T)[:, None]  # k − t
        decay = torch.where(distance >= 0, 2.0 ** (-distance.double() / tau), 0.0)
        return delta @ decay.T
    rows = []
    for row in delta.tolist():
        future = 0.0
        sums = []
        for d in reversed(row):
            future = d + 2 ** (-1 / tau) * future
            sums.append(future)
        rows.append(sums[::-1])
    return torch.tensor(rows, dtype=torch.float64)


def assert_is_future_kl(F, delta, mask, tau: float = 32.0, smallest: float = 1e-12) -> None:
    """F crosses zero, so its error is compared with the discounted sum of |Δ|."""
    assert F.shape == delta.shape
    assert F.dtype == torch.float32
    error = (F - exact_future_kl(delta, mask, tau)).abs()
    assert (error <= 1e-6 * exact_future_kl(delta.abs(), mask, tau) + smallest).all()


# ------------------------------------------------------------------------------------- the release


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_loss_gradient_and_metrics_match_the_release(case):
    loss, grad, metrics = loss_and_grad(*release_tensors(case), **release_settings(case["config"]))
    expected = case["expected"]
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
    torch.testing.assert_close(grad, torch.tensor(expected["grad"]), atol=1e-5, rtol=0)
    names = ["clip_frac", "dual_clip_frac", "ppo_kl"]
    names += ["influence_mean", "influence_min", "influence_max"]
    for name in names:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name


def test_the_cases_of_the_release_reach_every_branch():
    """Clipping, dual clipping, dropped responses and the safety clamp must all occur."""
    results = []
    has_unsafe_token = False
    for case in CASES:
        tensors = release_tensors(case)
        results.append(loss_and_grad(*tensors, **release_settings(case["config"]))[2])
        ratio = (tensors[0] - tensors[1]).exp()
        has_unsafe_token |= (ratio > case["config"]["safety"]).any().item()
    names = ["clip_frac", "dual_clip_frac", "dropped_sequences"]
    for name in [*names, "influence_frac_low", "influence_frac_high"]:
        assert any(metrics[name] > 0 for metrics in results), name
    assert has_unsafe_token


# -------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_advantages_are_centered_rewards_over_the_standard_deviation(dtype):
    A = group_advantages(torch.tensor([[1, -1, -1, -1], [2, 4, 4, 6]], dtype=dtype))
    assert A.dtype == torch.float32
    # The standard deviations with n − 1 are 1 and √(8/3).
    assert A[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert A[1].tolist() == pytest.approx([-(1.5**0.5), 0, 0, 1.5**0.5], abs=1e-5)


def test_advantages_add_1e_6_to_the_standard_deviation():
    A = group_advantages(torch.tensor([[0.0, 2e-6]]))  # the standard deviation is √2 · 1e-6
    expected = 1 / (2**0.5 + 1)
    assert A.tolist() == [pytest.approx([-expected, expected], rel=1e-4)]


def test_equal_rewards_give_advantages_of_exactly_zero():
    """Rounding of the mean by 1e-7, divided by 1e-6, would be an advantage of 0.1."""
    for G in range(2, 33):
        for reward in (0.1, -1.0, -1.3, 1 - 1 / 3):
            assert not group_advantages(torch.full((2, G), reward)).any()


def test_advantages_need_groups_of_two():
    assert group_advantages(torch.tensor([[1.0, 1.0]])).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))


def test_assign_advantages_gives_each_response_its_own():
    rewards = [[1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [-1.5, 1.0, 0.5, 1.0]]
    groups = []
    for group in rewards:
        groups.append([Rollout(Problem("", ""), reward=reward) for reward in group])
    assign_advantages(groups)
    expected = group_advantages(torch.tensor(rewards)).flatten().tolist()
    advantages = [r.advantage for r in fipo.flatten(groups)]
    assert advantages == expected
    assert all(type(advantage) is float for advantage in advantages)


# --------------------------------------------------------------------------------------- Future-KL


@pytest.mark.parametrize("T", [1, 2, 127, 128, 129, 257, 1000, 20480])
@pytest.mark.parametrize("tau", [1.0, 8.0, 32.0, 256.0, 1e6])
def test_future_kl_matches_the_definition(T, tau):
    g = torch.Generator().manual_seed(T)
    B = {129: 140, 20480: 1}.get(T, 3)  # also more rows than tokens
    delta = torch.randn(B, T, generator=g)
    mask = torch.rand(B, T, generator=g) < 0.9
    assert_is_future_kl(future_kl(delta, mask, tau), delta, mask, tau)


ADVERSARIAL = {
    "alternating": 20.0 * (-1) ** torch.arange(700),
    "huge then tiny": torch.logspace(1, -20, 700),
    "one spike": torch.nn.functional.one_hot(torch.tensor(699)) * 20.0,
    "all masked": torch.full((700,), math.nan),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_future_kl_matches_the_definition_on_adversarial_input(kind):
    delta = ADVERSARIAL[kind][None]
    mask = ~delta.isnan()
    assert_is_future_kl(future_kl(delta, mask), delta, mask)


def test_future_kl_halves_the_weight_after_tau_tokens_and_ignores_masked_tokens():
    delta = torch.zeros(1, 100)
    delta[0, 64] = 1.0
    delta[0, 90] = torch.inf
    mask = torch.ones(1, 100, dtype=torch.bool)
    mask[0, 90] = False
    F = future_kl(delta, mask, tau=32.0)[0]
    assert F[64] == 1
    assert F[65] == 0
    assert F[32].item() == pytest.approx(0.5)
    assert F[0].item() == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_future_kl_computes_in_float32_for_every_dtype_and_under_autocast(dtype):
    delta = torch.randn(2, 300).to(dtype)
    mask = torch.ones(2, 300)
    with torch.autocast("cpu", torch.bfloat16):
        F = future_kl(delta, mask)
    assert_is_future_kl(F, delta, mask.bool(), smallest=0)


# ---------------------------------------------------------------------------- the influence weight


def test_influence_weight_of_two_tokens_by_hand():
    """With τ = 1, γ = ½ and F = (Δ₁ + Δ₂/2, Δ₂)."""
    case = case_of([[0.10, 0.06]], [1.0])
    _, grad, metrics = loss_and_grad(*case, tau=1.0, weight_range=(0.5, 2.0))
    f = torch.tensor([0.13, 0.06]).exp()
    assert metrics["influence_mean"] == pytest.approx(f.mean().item())
    # With a gradient through f, Δ would appear here.
    torch.testing.assert_close(grad, -(f * case[0].exp()) / 2)
    assert metrics["future_kl_mean"] == pytest.approx((0.13 + 0.06) / 2)


def test_tokens_above_the_dual_clip_do_not_count_in_future_kl():
    case = case_of([[0.1, math.log(11.0)]], [1.0])  # r₂ = 11 > c = 10, so M₂ = 0
    metrics = loss_and_grad(*case, weight_range=(0.5, 2.0))[2]
    assert metrics["future_kl_mean"] == pytest.approx(0.05)


def exact_influence_weight(deltas: list[float], advantage: float, settings: dict):
    """F and f of the first of `deltas`, in Python floats, which are float64."""
    F = 0.0
    for distance, delta in enumerate(deltas):
        if math.exp(delta) <= settings["dual_clip"]:
            F += 2 ** (-distance / settings["tau"]) * delta
    lowest, highest = settings["weight_range"]
    f = min(max(math.exp(F), lowest), highest)
    if advantage < 0 and math.exp(deltas[0]) > settings["safety"]:
        f = min(max(f, 0.8), 1.0)
    return F, f


OTHER = UNBOUNDED | {"tau": 3.0, "safety": 1.5, "dual_clip": 3}
PAPER = {
    "tau": 32.0,
    "weight_range": (1.0, 1.2),
    "safety": 10.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 10.0,
}


@pytest.mark.parametrize("settings", [{}, SEVEN_B, OTHER], ids=["32B", "7B", "other"])
def test_influence_weight_matches_the_definition(settings):
    logp, old, A, mask = random_case(B=8, scale=1.2)
    delta = logp - old
    F, f = influence_weight(delta, A[:, None].expand_as(logp), mask, **settings)
    for b, t in mask.nonzero().tolist():
        deltas = delta[b, t:][mask[b, t:]].tolist()
        exact_F, exact_f = exact_influence_weight(deltas, A[b].item(), PAPER | settings)
        assert F[b, t].item() == pytest.approx(exact_F, abs=2e-5)
        assert f[b, t].item() == pytest.approx(exact_f, rel=2e-5)


def test_the_loss_multiplies_the_advantage_by_the_influence_weight():
    logp, old, A, mask = random_case(scale=0.5)
    F, f = influence_weight(logp - old, A[:, None], mask, **SEVEN_B)
    assert f[mask].unique().numel() > 10  # otherwise the test proves little
    loss, grad, metrics = loss_and_grad(logp, old, A, mask, **SEVEN_B)
    dapo_loss, dapo_grad, _ = loss_and_grad(logp, old, A[:, None] * f, mask, **DAPO)
    assert loss == dapo_loss
    assert torch.equal(grad, dapo_grad)
    assert metrics["influence_mean"] == f[mask].mean()
    assert metrics["future_kl_mean"] == pytest.approx(F[mask].mean())


def test_defaults_of_functions_and_command_are_those_of_the_paper_at_32b():
    for function in (future_kl, influence_weight, fipo_loss):
        parameters = inspect.signature(function).parameters
        assert "tau" in parameters
        for name in PAPER.keys() & parameters.keys():
            assert parameters[name].default == PAPER[name], name
    command = vars(fipo.Config()) | fipo.PRESETS["fipo"]
    assert command["weight_range"] == [1.0, 1.2]
    for name in PAPER.keys() - {"weight_range"}:
        assert command[name] == PAPER[name], name


@pytest.mark.parametrize("second_ratio, unclamped", [(1.0, 4.0), (1 / 16, 0.25)])
def test_weights_of_unsafe_tokens_are_clamped_where_the_advantage_is_negative(
    second_ratio, unclamped
):
    """The first ratio is 4, above the safety of 3. The second one makes exp F = 4 or ¼."""
    delta = [math.log(4.0), math.log(second_ratio)]
    clamped = min(max(unclamped, 0.8), 1.0)
    for advantage, expected in [(-1.0, clamped), (0.0, unclamped), (1.0, unclamped)]:
        _, f = weight(delta, advantage, tau=1e9, weight_range=(0.0, 9.0), safety=3.0)
        assert f[0] == pytest.approx(expected)


def test_a_ratio_that_equals_a_bound_is_within_it():
    """The bounds are those of the M filter, of the safety clamp and of the dual clip."""
    delta = 0.7
    r = torch.tensor(delta).exp().item()
    F, f = weight([delta], -1.0, weight_range=(0.0, 9.0), safety=r, dual_clip=r)
    assert F == [pytest.approx(delta)]
    assert f == [r]
    case = case_of([[delta, delta]], [-1.0])
    loss, _, metrics = loss_and_grad(*case, **DAPO, dual_clip=r)
    assert loss == pytest.approx(r)
    assert metrics["dual_clip_frac"] == metrics["dropped_sequences"] == 0
    metrics = loss_and_grad(*case, **DAPO, dual_clip=r - 1e-6)[2]
    assert metrics["dual_clip_frac"] == metrics["dropped_sequences"] == 1


def test_the_influence_weight_has_no_gradient():
    delta = torch.tensor([[0.1, 0.05]], requires_grad=True)
    F, f = influence_weight(delta, torch.ones(1, 2), torch.ones(1, 2).bool())
    assert 1 < f.min()
    assert f.max() < 1.2
    assert not F.requires_grad
    assert not f.requires_grad


# -------------------------------------------------------------------- the loss of DAPO, GRPO, FIPO


def test_weight_range_one_one_is_dapo():
    logp, old, A, mask = random_case(scale=0.2)
    loss, _, metrics = loss_and_grad(logp, old, A, mask, **DAPO)
    A = A[:, None]
    ratio = (logp - old).exp()
    ppo = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.28))
    expected = torch.where(A < 0, torch.minimum(ppo, -A * 10.0), ppo)[mask].mean()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["influence_min"] == metrics["influence_max"] == 1


@pytest.mark.parametrize("settings", [{}, {"num_responses": 6}])
def test_advantages_may_be_given_per_token(settings):
    logp, old, A, mask = random_case()
    per_token = A[:, None].expand_as(logp)
    result = loss_and_grad(logp, old, per_token, mask, **settings)
    assert_same(result, loss_and_grad(logp, old, A, mask, **settings))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_log_ratios_are_clamped_to_20(sign):
    case = case_of([[sign * 25.0]], [-sign])
    loss, grad, metrics = loss_and_grad(*case, **DAPO, dual_clip=math.inf)
    assert loss == pytest.approx(sign * math.exp(sign * 20.0))  # −A r
    assert grad == 0
    assert metrics["ppo_kl"] == -sign * 20
    assert metrics["future_kl_mean"] == sign * 20


@pytest.mark.parametrize("settings", [{}, SEVEN_B], ids=["32B", "7B"])
def test_fipo_equals_dapo_before_any_update(settings):
    logp, _, A, mask = random_case()
    loss, grad, _ = loss_and_grad(logp, logp, A, mask, **settings)
    dapo_loss, dapo_grad, _ = loss_and_grad(logp, logp, A, mask, **DAPO)
    assert loss == dapo_loss
    assert torch.equal(grad, dapo_grad)


@pytest.mark.parametrize("counts", [{}, {"num_tokens": 2}, {"num_responses": 1}], ids=str)
@pytest.mark.parametrize("safety, f", [(10.0, 1.0), (15.0, 1.2)])
def test_a_dual_clipped_token_costs_c_and_has_no_gradient(safety, f, counts):
    """With A < 0 and r = 12 > c = 10, the token costs −Ã c and not −Ã r.

    F = γ · 0.3, so f is cut to 1.2, and to 1 where a ratio of 12 is unsafe.
    """
    case = case_of([[math.log(12.0), 0.3]], [-1.0])
    loss, grad, metrics = loss_and_grad(*case, safety=safety, **counts)
    second = 1.2 * math.exp(0.3)
    assert loss == pytest.approx((10 * f + second) / 2)
    assert grad.tolist() == [[0, pytest.approx(second / 2)]]
    assert metrics["dual_clip_frac"] == 0.5
    assert metrics["dropped_sequences"] == metrics["dropped_tokens"] == 0


def two_dual_clipped():
    """Two of three tokens have A < 0 and r > c. Another response has two tokens, r = A = 1."""
    logp = torch.zeros(2, 3)
    logp[0, :2] = math.log(12.0)
    return case_of(logp, [-1.0, 1.0], [[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    "counts, denominator",
    [
        ({}, 2),
        ({"num_tokens": 5}, 5),
        ({"num_responses": 2}, 4),  # the mean of a response is over its two tokens
        ({"num_tokens": 5, "num_responses": 2}, 4),  # num_responses decides
    ],
    ids=str,
)
def test_a_response_with_two_dual_clipped_tokens_is_dropped(counts, denominator):
    """It is dropped from the sum, but from the denominator only where none is given."""
    loss, grad, metrics = loss_and_grad(*two_dual_clipped(), **counts)
    assert metrics["dropped_sequences"] == 1
    assert metrics["dropped_tokens"] == 3
    assert metrics["dual_clip_frac"] == pytest.approx(2 / 5)
    assert loss == pytest.approx(-2 / denominator)
    of_token = -1 / denominator
    expected = torch.tensor([[0.0, 0.0, 0.0], [of_token, of_token, 0.0]])
    torch.testing.assert_close(grad, expected)


def test_metrics_cover_dropped_responses():
    logp, old, A, mask = (x[:1] for x in two_dual_clipped())
    logp[0, 2] = 0.3  # its f is cut to 1.2
    loss, grad, metrics = loss_and_grad(logp, old, A, mask)
    assert loss == 0
    assert not grad.any()
    assert metrics["dropped_sequences"] == 1
    assert metrics["influence_mean"] == pytest.approx((1 + 1 + 1.2) / 3)


def test_grpo_by_hand_is_the_mean_over_the_means_of_responses():
    """One group of two responses, with one and two tokens."""
    A = group_advantages(torch.tensor([[1.0, -1.0]]))[0]
    assert A.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)
    first = -A[0] * 1.2  # e^0.5 is clipped to 1.2
    second = (-A[1] * math.exp(0.1) + -A[1] * 0.8) / 2  # A < 0: e^−0.5 is raised to 0.8
    case = case_of([[0.5, 0.0], [0.1, -0.5]], A.tolist(), [[1, 0], [1, 1]])
    loss, _ = fipo_loss(*case, **DAPO, clip_high=0.2, dual_clip=math.inf, num_responses=2)
    assert loss.item() == pytest.approx(((first + second) / 2).item())


# ----------------------------------------------------------------------------------------- metrics


def test_weights_count_as_cut_if_they_are_cut_by_more_than_rounding():
    """Rounding is at most 1e-4. In responses of one token, F is Δ."""
    low = [0.8 - 1.02e-4, 0.8 - 0.98e-4, 0.8]
    high = [1.2, 1.2 + 0.98e-4, 1.2 + 1.02e-4, 2]
    ratios = torch.tensor([*low, 1, *high])
    case = case_of(ratios.log()[:, None], [1.0] * 8)
    metrics = loss_and_grad(*case, weight_range=(0.8, 1.2))[2]
    assert metrics["influence_frac_low"] == 1 / 8
    assert metrics["influence_frac_high"] == 2 / 8
    assert metrics["influence_min"] == pytest.approx(0.8)
    assert metrics["influence_max"] == pytest.approx(1.2)
    # A weight that is cut by exactly 1e-4 does not count yet.
    case = case_of([[0.5]], [1.0])
    w = torch.tensor(0.5).exp().item()
    metrics = loss_and_grad(*case, weight_range=(w + 1e-4, 9.0))[2]
    assert metrics["influence_frac_low"] == 0
    metrics = loss_and_grad(*case, weight_range=(0.0, w - 1e-4))[2]
    assert metrics["influence_frac_high"] == 0


@pytest.mark.parametrize("counts", [{}, {"num_tokens": 50}, {"num_responses": 7}], ids=str)
def test_metrics_by_hand(counts):
    """Nine tokens in three responses, the last of which is dropped. All of them count.

    τ = 1, so γ = ½. With A > 0 one ratio is cut by the upper clip, with A < 0 two are raised to the
    lower one. Two ratios are above the dual clip: they do not count in F, and their f is at most 1.
    """
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    delta = torch.tensor([0.1, 0.5, 0.0, 0.2, -0.5, math.log(12.0), math.log(12.0), 0.8, -0.6])
    F = torch.tensor([0.35, 0.5, 0.0, -0.05, -0.5, 0.125, 0.25, 0.5, -0.6])
    f = torch.tensor([1.2, 1.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.2, 1.0])
    logp = torch.full((3, 4), 9.0)
    logp[mask] = delta
    case = case_of(logp, [1.0, -1.0, -1.0], mask)
    metrics = loss_and_grad(*case, tau=1.0, **counts)[2]
    expected = {
        "clip_frac": 3 / 9,
        "dual_clip_frac": 2 / 9,
        "ppo_kl": -delta.mean().item(),
        "influence_mean": f.mean().item(),
        "influence_min": 1,
        "influence_max": 1.2,
        "influence_frac_low": 3 / 9,
        "influence_frac_high": 4 / 9,
        "future_kl_mean": F.mean().item(),
        "dropped_sequences": 1,
        "dropped_tokens": 4,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------- what must not change results


GRPO = {"num_responses": 6, "dual_clip": math.inf}


@pytest.mark.parametrize("settings", [{}, GRPO], ids=["FIPO", "GRPO"])
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_positions_may_hold_anything(poison, settings):
    logp, old, A, mask = random_case()
    mask[0] = False  # a row without any token
    A[0] = math.nan
    clean = loss_and_grad(logp, old, A.nan_to_num(), mask, **settings)
    assert clean[1].isfinite().all()
    advantages = torch.where(mask, A[:, None], poison)
    for in_logp, in_old in [(poison, 0.0), (0.0, poison), (poison, poison)]:
        bad_logp = torch.where(mask, logp, in_logp)
        bad_old = torch.where(mask, old, in_old)
        assert_same(loss_and_grad(bad_logp, bad_old, advantages, mask, **settings), clean)


def test_a_batch_without_tokens_and_a_batch_of_one_token():
    case = case_of(torch.zeros(2, 3), [1.0, 1.0], torch.zeros(2, 3))
    loss, grad, metrics = loss_and_grad(*case)
    assert loss == 0
    assert (grad == 0).all()
    not_zero = {name: value for name, value in metrics.items() if value}
    assert not_zero == {"influence_mean": 1, "influence_min": 1, "influence_max": 1}
    loss, grad, _ = loss_and_grad(*case_of([[0.0]], [1.0]))
    assert loss == -1
    assert grad.item() == -1
    _, _, metrics = loss_and_grad(*case_of([[0.125]], [1.0]))
    assert metrics["ppo_kl"] == -0.125
    assert metrics["future_kl_mean"] == 0.125


@pytest.mark.parametrize("pad", [1, 100, 200])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, pad):
    logp, old, A, mask = random_case(scale=0.4)
    amount = (pad, 0) if side == "left" else (0, pad)
    padded = [torch.nn.functional.pad(x, amount) for x in (logp, old, mask)]
    loss, grad, metrics = loss_and_grad(padded[0], padded[1], A, padded[2], **SEVEN_B)
    expected = loss_and_grad(logp, old, A, mask, **SEVEN_B)
    inner = grad[:, pad:] if side == "left" else grad[:, :-pad]
    assert loss == pytest.approx(expected[0], abs=1e-6)
    torch.testing.assert_close(inner, expected[1], atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(expected[2], abs=1e-6)


@pytest.mark.parametrize("name", ["num_tokens", "num_responses"])
def test_order_of_rows_and_size_of_micro_batches_change_nothing(name):
    case = random_case(B=12, scale=1.5)  # ratios so large that responses are dropped
    num_tokens = case[3].sum().item()
    denominator = 12 if name == "num_responses" else num_tokens
    settings = SEVEN_B | {name: denominator}
    loss, grad, metrics = loss_and_grad(*case, **settings)
    assert metrics["dropped_sequences"] > 0
    order = torch.randperm(12)
    shuffled_loss, shuffled_grad, _ = loss_and_grad(*(x[order] for x in case), **settings)
    assert shuffled_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(shuffled_grad, grad[order])
    for size in (1, 5):
        losses = []
        grads = []
        for part in zip(*(x.split(size) for x in case)):
            part_loss, part_grad, _ = loss_and_grad(*part, **settings)
            losses.append(part_loss)
            grads.append(part_grad)
        assert sum(losses) == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(torch.cat(grads), grad)
    if name == "num_tokens":  # without a count, the loss divides by the tokens that it keeps
        num_kept = num_tokens - metrics["dropped_tokens"]
        uncounted = loss_and_grad(*case, **SEVEN_B)[0]
        assert uncounted * num_kept == pytest.approx(loss * num_tokens, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", ["logp", "old_logp", "advantages", "all"])
def test_the_loss_is_computed_in_float32_for_every_dtype(given, dtype):
    logp, old, A, mask = random_case()
    tensors = {"logp": logp, "old_logp": old, "advantages": A}
    rounded = {name: x.to(dtype).float() for name, x in tensors.items()}
    expected, _ = fipo_loss(**rounded, mask=mask)
    inputs = dict(rounded)
    for name in tensors:
        if given in (name, "all"):
            inputs[name] = rounded[name].to(dtype)
    loss, _ = fipo_loss(**inputs, mask=mask)
    assert loss.dtype == torch.float32
    assert loss == expected


def test_the_loss_functions_run_from_their_source_with_only_torch():
    namespace = {"torch": torch}
    for function in (future_kl, influence_weight, fipo_loss, fipo.loss_metrics, group_advantages):
        exec(inspect.getsource(function), namespace)
    logp, old, A, mask = random_case()
    assert namespace["fipo_loss"](logp, old, A, mask) == fipo_loss(logp, old, A, mask)
    assert torch.equal(namespace["group_advantages"](A[None]), group_advantages(A[None]))


def test_the_examples_in_the_docstrings_are_right():
    results = doctest.testmod(fipo)
    assert results.attempted >= 8
    assert results.failed == 0

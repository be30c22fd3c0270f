"""Future-KL and the FIPO loss: the authors' numbers, the definitions, and what must not matter."""

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fipo
from fipo import fipo_loss, future_kl, group_advantages

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
    for name in ("clip_frac", "dual_clip_frac", "ppo_kl", "influence_mean", "influence_min", "influence_max"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name


def test_the_cases_exercise_every_branch():
    """Otherwise parity proves little: clipping, dual clipping, the drop and the safety clamp all occur."""
    seen = [loss_and_grad(*(torch.tensor(c[k]) for k in ("logp", "old_logp", "advantages", "mask")),
                          **settings(c["config"]))[2] for c in CASES]  # fmt: skip
    for name in ("clip_frac", "dual_clip_frac", "dropped_sequences", "influence_frac_low", "influence_frac_high"):
        assert any(m[name] > 0 for m in seen), name
    assert any(
        ((torch.tensor(c["logp"]) - torch.tensor(c["old_logp"])).exp() > c["config"]["safety"]).any() for c in CASES
    )


# ---------------------------------------------------------------------------------------------------- Future-KL


@pytest.mark.parametrize("T", [1, 2, 127, 128, 129, 257, 1000, 20480])
@pytest.mark.parametrize("tau", [1.0, 8.0, 32.0, 256.0, 1e6])
def test_future_kl_is_its_definition(T, tau):
    g = torch.Generator().manual_seed(T)
    B = 3 if T < 2000 else 1
    delta, mask = torch.randn(B, T, generator=g), torch.rand(B, T, generator=g) < 0.9
    F = future_kl(delta, mask, tau)
    if T < 2000:
        exact, size = naive_future_kl(delta, mask, tau), naive_future_kl(delta.abs(), mask, tau)
    else:  # the recurrence, in Python floats, which are float64
        exact, size = torch.zeros(B, T + 1, dtype=torch.float64), torch.zeros(B, T + 1, dtype=torch.float64)
        gamma, d = 2 ** (-1 / tau), torch.where(mask, delta, 0.0)[0].tolist()
        for t in reversed(range(T)):
            exact[0, t] = d[t] + gamma * exact[0, t + 1].item()
            size[0, t] = abs(d[t]) + gamma * size[0, t + 1].item()
        exact, size = exact[:, :T], size[:, :T]
    assert F.shape == delta.shape and F.dtype == torch.float32
    assert ((F - exact).abs() <= 1e-6 * size + 1e-12).all()  # F itself crosses zero: measure against the sum of |Δ|


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
    exact, size = naive_future_kl(delta, mask.bool(), 32.0), naive_future_kl(delta.abs(), mask.bool(), 32.0)
    assert ((F - exact).abs() <= 1e-6 * size).all()


# --------------------------------------------------------------------------------------------- DAPO, GRPO, f


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


def test_before_any_update_fipo_is_dapo():
    logp, _, A, mask = random_case()
    for kw in (dict(), SEVEN_B):
        fipo_result, dapo_result = (loss_and_grad(logp, logp, A, mask, **k) for k in (kw, dict(weight_range=(1, 1))))
        assert fipo_result[0] == dapo_result[0] and torch.equal(fipo_result[1], dapo_result[1])


def test_f_by_hand():
    """Two tokens, τ = 1, so γ = ½: F = (Δ₁ + Δ₂/2, Δ₂)."""
    old, logp = torch.zeros(1, 2), torch.tensor([[0.10, 0.06]])
    _, grad, metrics = loss_and_grad(logp, old, torch.tensor([1.0]), torch.ones(1, 2), tau=1.0, weight_range=(0.5, 2.0))
    f = torch.tensor([0.13, 0.06]).exp()
    assert metrics["influence_mean"] == pytest.approx(f.mean().item())
    torch.testing.assert_close(grad, -(f * logp.exp()) / 2)  # no gradient through f, else Δ would appear in it
    assert metrics["future_kl_mean"] == pytest.approx((0.13 + 0.06) / 2)


def test_where_advantage_is_negative_and_the_ratio_unsafe_f_is_clamped_to_at_most_one():
    old, logp = torch.zeros(2, 1), torch.full((2, 1), math.log(4.0))  # r = 4 > 3, F = log 4, exp F = 4
    A, mask = torch.tensor([-1.0, 1.0]), torch.ones(2, 1)
    _, _, metrics = loss_and_grad(logp, old, A, mask, **SEVEN_B)
    assert metrics["influence_min"] == 1 and metrics["influence_max"] == pytest.approx(1.2)


def test_tokens_that_ran_away_do_not_count_in_F():
    logp = torch.tensor([[0.1, math.log(11.0)]])  # r₂ = 11 > c = 10: M₂ = 0
    _, _, metrics = loss_and_grad(logp, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2), weight_range=(0.5, 2.0))
    assert metrics["future_kl_mean"] == pytest.approx(0.05)


def test_more_than_one_dual_clipped_token_drops_the_response_from_sum_and_count():
    logp, old = torch.zeros(2, 3), torch.zeros(2, 3)
    logp[0, :2] = math.log(12.0)  # A < 0 and r > c twice
    A, mask = torch.tensor([-1.0, 1.0]), torch.ones(2, 3)
    loss, grad, metrics = loss_and_grad(logp, old, A, mask)
    assert metrics["dropped_sequences"] == 1 and metrics["dropped_tokens"] == 3
    assert loss == pytest.approx(-1.0) and (grad[0] == 0).all()
    torch.testing.assert_close(grad[1], torch.full((3,), -1 / 3))
    assert loss_and_grad(logp, old, A, mask, num_tokens=6)[0] == pytest.approx(-0.5)


def test_grpo_by_hand_on_three_tokens():
    """One group of two responses with one and two tokens: GRPO is the mean of each response's own mean."""
    old, logp = torch.zeros(2, 2), torch.tensor([[0.5, 0.0], [0.1, -0.5]])
    mask = torch.tensor([[1, 0], [1, 1]])
    A = group_advantages(torch.tensor([[1.0, -1.0]]))[0]
    assert A.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)
    first = -A[0] * 1.2  # e^0.5 is clipped to 1.2
    second = (-A[1] * math.exp(0.1) + -A[1] * 0.8) / 2  # A < 0: e^−0.5 is raised to 0.8
    loss, _ = fipo_loss(logp, old, A / mask.sum(1), mask, weight_range=(1, 1), clip_high=0.2, dual_clip=math.inf,
                        num_tokens=2)  # fmt: skip
    assert loss.item() == pytest.approx(((first + second) / 2).item())


def test_group_advantages():
    A = group_advantages(torch.tensor([[1.0, -1.0, -1.0, -1.0], [0.1] * 4]))
    assert A[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)  # std with n − 1 is 1
    assert (A[1] == 0).all()  # exactly, not rounding noise over 1e-6
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))


# --------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_positions_may_hold_anything(poison):
    logp, old, A, mask = random_case()
    mask[0] = False  # a row without any token
    A[0] = math.nan
    clean = loss_and_grad(logp, old, A.nan_to_num(), mask)
    for x, y in [(poison, 0.0), (0.0, poison), (poison, poison)]:
        bad_logp, bad_old = torch.where(mask, logp, x), torch.where(mask, old, y)
        advantages = torch.where(mask, A[:, None], poison)
        loss, grad, metrics = loss_and_grad(bad_logp, bad_old, advantages, mask)
        assert loss == clean[0] and torch.equal(grad, clean[1]) and metrics == clean[2]


def test_all_masked_and_one_token():
    loss, grad, metrics = loss_and_grad(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3))
    assert loss == 0 and (grad == 0).all() and all(math.isfinite(v) for v in metrics.values())
    loss, grad, _ = loss_and_grad(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1))
    assert loss == -1 and grad.item() == -1


@pytest.mark.parametrize("pad", [1, 100, 200])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, pad):
    logp, old, A, mask = random_case(scale=0.4)
    amount = (pad, 0) if side == "left" else (0, pad)
    padded = [torch.nn.functional.pad(x, amount) for x in (logp, old)]
    loss, grad, metrics = loss_and_grad(*padded, A, torch.nn.functional.pad(mask, amount), **SEVEN_B)
    expected = loss_and_grad(logp, old, A, mask, **SEVEN_B)
    inner = grad[:, pad:] if side == "left" else grad[:, :-pad]
    assert loss == pytest.approx(expected[0], abs=1e-6)
    torch.testing.assert_close(inner, expected[1], atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(expected[2], abs=1e-6)


def test_row_order_and_micro_batches_change_nothing():
    logp, old, A, mask = random_case(B=12, scale=1.5)  # wild enough that responses are dropped
    whole, grad, metrics = loss_and_grad(logp, old, A, mask, **SEVEN_B)
    assert metrics["dropped_sequences"] > 0
    order = torch.randperm(12)
    shuffled, shuffled_grad, _ = loss_and_grad(logp[order], old[order], A[order], mask[order], **SEVEN_B)
    assert shuffled == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(shuffled_grad, grad[order])
    kept = mask.sum().item() - metrics["dropped_tokens"]
    for size in (1, 5):
        parts = [loss_and_grad(logp[i : i + size], old[i : i + size], A[i : i + size], mask[i : i + size],
                               num_tokens=kept, **SEVEN_B) for i in range(0, 12, size)]  # fmt: skip
        assert sum(p[0] for p in parts) == pytest.approx(whole, abs=1e-6)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad)


def test_bfloat16_log_probs_give_a_float32_loss():
    logp, old, A, mask = random_case()
    loss, _ = fipo_loss(logp.bfloat16(), old.bfloat16(), A, mask)
    expected, _ = fipo_loss(logp.bfloat16().float(), old.bfloat16().float(), A, mask)
    assert loss.dtype == torch.float32 and loss == expected


def test_the_loss_can_be_copied_with_nothing_but_torch():
    namespace = {"torch": torch}
    for function in (fipo.future_kl, fipo.fipo_loss, fipo.group_advantages):
        exec(inspect.getsource(function), namespace)
    logp, old, A, mask = random_case()
    assert namespace["fipo_loss"](logp, old, A, mask)[0] == fipo_loss(logp, old, A, mask)[0]
    assert torch.equal(namespace["group_advantages"](A[None]), group_advantages(A[None]))


def test_the_loss_can_be_imported_where_only_torch_is_installed():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'tqdm', 'datasets', 'numpy']))"
    code = f"{blocked}; import torch, fipo; print(fipo.future_kl(torch.ones(1, 2), torch.ones(1, 2), 1.0).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=fipo.__file__.rsplit("/", 1)[0], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[[1.5, 1.0]]", done.stderr

"""assignment/make.py and grade.py, with a solution that was written without fipo.py's code."""

import ast
import copy
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT, finished, launch

import fipo

sys.path.insert(0, str(ROOT / "assignment"))

import grade  # noqa: E402
import make  # noqa: E402

FIPO = ROOT / "fipo.py"
STUDENT = make.student_file(FIPO.read_text())
GRADE = ROOT / "assignment" / "grade.py"

# A complete solution in the style of a student: the bodies of the six functions.
ADVANTAGES = """
if rewards.size(1) == 1:
    raise ValueError("one response is no group")
shifted = rewards - rewards[:, :1]
G = rewards.shape[1]
mean = shifted.sum(dim=1, keepdim=True) / G
variance = ((shifted - mean) ** 2).sum(dim=1, keepdim=True) / (G - 1)
return (shifted - mean) / (variance.sqrt() + 1e-6)
"""

LOGPROBS = """
logits = model(input_ids=input_ids).logits.float()
log_pi = torch.log_softmax(logits[:, :-1] / temperature, dim=-1)
next_ids = input_ids[:, 1:]
logp = log_pi.gather(2, next_ids.unsqueeze(2)).squeeze(2)
entropy = torch.zeros_like(logp)
if with_entropy:
    entropy = -(log_pi.exp() * log_pi).sum(dim=2).detach()
keep = response_mask[:, 1:]
logp = torch.nn.functional.pad(logp * keep, (1, 0))
entropy = torch.nn.functional.pad(entropy * keep, (1, 0))
return logp, entropy
"""

# In blocks of 64 tokens: a matrix within the blocks, and a loop over the blocks.
FUTURE_KL = """
gamma = 2 ** (-1 / tau)
size = 64
x = (delta_logp * mask).float()
B, T = x.shape
x = torch.nn.functional.pad(x, (0, -T % size)).view(B, -1, size)
k = torch.arange(size)
exponent = (k[:, None] - k[None, :]).float()
weights = torch.where(exponent >= 0, gamma**exponent, 0.0)
F = x @ weights
later = torch.zeros(B, 1)
for block in reversed(range(F.shape[1])):
    F[:, block] += later * gamma ** (size - k)
    later = F[:, block, :1]
return F.reshape(B, -1)[:, :T]
"""

# As most would write it first: right, but slow.
LOOP = """
gamma = 2 ** (-1 / tau)
F = torch.zeros_like(delta_logp)
after = torch.zeros(delta_logp.shape[0])
for t in reversed(range(delta_logp.shape[1])):
    after = delta_logp[:, t] * mask[:, t] + gamma * after
    F[:, t] = after
return F
"""

QUADRATIC = """
gamma = 2 ** (-1 / tau)
T = delta_logp.shape[1]
t = torch.arange(T)
weights = torch.where(t[:, None] >= t, gamma ** (t[:, None] - t).float(), 0.0)
return (delta_logp * mask) @ weights
"""

CUMSUM = """
t = torch.arange(delta_logp.shape[1]).DTYPE()
growth = 2 ** (t / tau)
terms = (delta_logp * mask) / growth
return (terms.flip(1).cumsum(1).flip(1) * growth).float()
"""

WEIGHT = """
delta_logp = delta_logp.detach()
ratio = torch.exp(delta_logp)
M = torch.where(ratio > dual_clip, 0.0, mask.float())
F = future_kl(delta_logp, M, tau)
low, high = weight_range
f = torch.clamp(torch.exp(F), low, high)
too_large = (ratio > safety) & (advantages < 0)
f[too_large] = f[too_large].clamp(0.8, 1.0)
return F, f
"""

LOSS = """
inside = mask == 1
if advantages.dim() == 1:
    advantages = advantages.unsqueeze(1).expand_as(mask)
logp = logp.masked_fill(~inside, 0.0)
old_logp = old_logp.masked_fill(~inside, 0.0)
delta = (logp - old_logp).clamp(-20, 20)
F, f = influence_weight(
    delta, advantages, mask, tau=tau, weight_range=weight_range, safety=safety, dual_clip=dual_clip
)
weighted = f * advantages
ratio = torch.exp(delta)
gain = torch.min(weighted * ratio, weighted * ratio.clamp(1 - clip_low, 1 + clip_high))
is_capped = inside & (weighted < 0) & (ratio > dual_clip)
gain = torch.where(is_capped, weighted * dual_clip, gain)
dropped = is_capped.sum(dim=1, keepdim=True) > 1
used = inside & ~dropped
gain = torch.where(used, gain, 0.0)
if num_responses is not None:
    lengths = inside.sum(dim=1).clamp(min=1)
    loss = -(gain.sum(dim=1) / lengths).sum() / num_responses
elif num_tokens is not None:
    loss = -gain.sum() / num_tokens
else:
    loss = -gain.sum() / used.sum().clamp(min=1)
is_clipped = inside & (gain < weighted * ratio)
return loss, loss_metrics(delta, F, f, inside, is_clipped, is_capped, dropped, weight_range)
"""

GRADIENTS = """
policy.model.train()
n = 0
for rollout in mini_batch:
    n += len(rollout.response_ids)
responses = None
if cfg.loss_mean == "response":
    responses = len(mini_batch)
parts = micro_batches(mini_batch, cfg.tokens_per_micro_batch)
results = []
for number, part in enumerate(parts):
    ids, mask, old, advantages = collate(part, policy.device)
    new, _ = policy.logprobs(ids, mask)
    settings = dict(tau=cfg.tau, safety=cfg.safety, clip_low=cfg.clip_low)
    settings["weight_range"] = tuple(cfg.weight_range)
    settings["clip_high"] = cfg.clip_high
    settings["dual_clip"] = cfg.dual_clip
    loss, metrics = fipo_loss(
        new, old, advantages, mask, num_tokens=n, num_responses=responses, **settings
    )
    policy.backward(loss, is_last=number == len(parts) - 1)
    share = mask.sum().item() / n
    metrics["loss"] = loss.item() / share
    metrics["drift"] = (new - old).detach().abs().sum().item() / mask.sum().item()
    results.append((share, metrics))
return average_metrics(results)
"""

SOLUTION = {
    "group_advantages": ADVANTAGES,
    "token_logprobs": LOGPROBS,
    "future_kl": FUTURE_KL,
    "influence_weight": WEIGHT,
    "fipo_loss": LOSS,
    "add_gradients": GRADIENTS,
}

# Wrong solutions. Each is an edit of the solution: problem, words of the diagnosis, and pairs of
# old and new text. An empty old text stands for the whole body.
WRONG = {
    "groups of one accepted": (
        "group_advantages",
        "ValueError",
        ("rewards.size(1) == 1", "False"),
    ),
    "ratios unbounded": ("fipo_loss", "clamp Δ to", (".clamp(-20, 20)", "")),
    "num_tokens before num_responses": (
        "fipo_loss",
        "num_responses counts",
        ("if num_responses is not None", "if num_responses is not None and num_tokens is None"),
    ),
    "is_last for all parts": ("add_gradients", "is_last", ("number == len(parts) - 1", "True")),
    "is_last for none": ("add_gradients", "is_last", ("number == len(parts) - 1", "False")),
    "one part": (
        "add_gradients",
        "micro_batches gives the parts",
        ("micro_batches(mini_batch, cfg.tokens_per_micro_batch)", "[mini_batch]"),
    ),
    "loss.backward": (
        "add_gradients",
        "Call policy.backward",
        ("policy.backward(loss, is_last=number == len(parts) - 1)", "loss.backward()"),
    ),
    "biased std": ("group_advantages", "biased", ("(G - 1)", "G")),
    "biased std by torch, and the mean not exact": (
        "group_advantages",
        "biased",
        ("", "return (rewards - rewards.mean(1, True)) / (rewards.std(1, False, True) + 1e-6)"),
    ),
    "epsilon inside": (
        "group_advantages",
        "inside the square root",
        ("variance.sqrt() + 1e-6", "(variance + 1e-6).sqrt()"),
    ),
    "no epsilon": ("group_advantages", "epsilon of 1e-6 is missing", (" + 1e-6", "")),
    "epsilon 1e-8": ("group_advantages", "epsilon of 1e-6 is missing", ("1e-6", "1e-8")),
    "std of the batch": (
        "group_advantages",
        "The std is that of the whole batch",
        ("variance.sqrt()", "rewards.std()"),
    ),
    "mean and std of the batch": (
        "group_advantages",
        "Mean and std are those of the whole batch",
        ("", "return (rewards - rewards.mean()) / (rewards.std() + 1e-6)"),
    ),
    "columns": (
        "group_advantages",
        "columns",
        ("dim=1", "dim=0"),
        ("rewards.shape[1]", "rewards.shape[0]"),
        ("rewards[:, :1]", "rewards[:1]"),
    ),
    "no std": ("group_advantages", "do not divide by the std", ("/ (variance.sqrt() + 1e-6)", "")),
    "variance": ("group_advantages", "by the variance", (".sqrt()", "")),
    "equal rewards": (
        "group_advantages",
        "equal rewards does not get zeros",
        ("", "return (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)"),
    ),
    "equal rewards without an epsilon": (
        "group_advantages",
        "epsilon of 1e-6 is missing",
        ("", "return (rewards - rewards.mean(1, True)) / rewards.std(1, keepdim=True)"),
    ),
    # -------------------------------------------------------------------------------------------
    "logits of the token itself": (
        "token_logprobs",
        "off by one: the logits",
        ("logits[:, :-1]", "logits[:, 1:]"),
    ),
    "mask not shifted": (
        "token_logprobs",
        "mask is off by one",
        ("response_mask[:, 1:]", "response_mask[:, :-1]"),
    ),
    "prompt counted": (
        "token_logprobs",
        "Log-probs of the prompt are not 0",
        ("keep = response_mask[:, 1:]", "keep = 1.0"),
    ),
    "prompt counted in the entropy only": (
        "token_logprobs",
        "Log-probs of the prompt are not 0",
        ("entropy * keep", "entropy"),
    ),
    "no temperature": ("token_logprobs", "temperature is missing", (" / temperature", "")),
    "times temperature": ("token_logprobs", "multiply the logits", ("/ temp", "* temp")),
    "temperature after the softmax": (
        "token_logprobs",
        "before log_softmax",
        (" / temperature, dim=-1)", ", dim=-1) / temperature"),
    ),
    "padded on the right": (
        "token_logprobs",
        "at the wrong positions",
        ("(1, 0)", "(0, 1)"),
    ),
    "padded on the right, masked afterwards": (
        "token_logprobs",
        "at the wrong positions",
        ("(1, 0)", "(0, 1)"),
        ("response_mask[:, 1:]", "response_mask[:, :-1]"),
    ),
    "not padded": (
        "token_logprobs",
        "positions are lost",
        ("return logp, entropy", "return logp[:, 1:], entropy[:, 1:]"),
    ),
    "detached": ("token_logprobs", "no gradient", ("return logp,", "return logp.detach(),")),
    "probabilities": ("token_logprobs", "probabilities", ("(logp * keep", "(logp.exp() * keep")),
    "sign of the entropy": ("token_logprobs", "wrong sign", ("= -(log_pi", "= (log_pi")),
    "entropy always": ("token_logprobs", "Without with_entropy", ("if with_entropy", "if True")),
    "mask as attention": (
        "token_logprobs",
        "does not see the prompt",
        ("(input_ids=input_ids)", "(input_ids=input_ids, attention_mask=response_mask)"),
    ),
    # -------------------------------------------------------------------------------------------
    "past": ("future_kl", "sums over the past", ("", LOOP.replace("reversed", ""))),
    "past by a transposed matrix": (
        "future_kl",
        "sums over the past",
        ("", QUADRATIC.replace("@ weights", "@ weights.T")),
    ),
    "past, and Δ itself left out": (
        "future_kl",
        "sums over the past",
        ("", QUADRATIC.replace(">=", "<").replace("(t[:, None] - t)", "(t - t[:, None])")),
    ),
    "Δ itself left out": ("future_kl", "leaves out Δ_t", ("", QUADRATIC.replace(">=", ">"))),
    "Δ itself left out, and the exponent smaller": (
        "future_kl",
        "leaves out Δ_t",
        ("", QUADRATIC.replace(">=", ">").replace("- t).float()", "- t - 1).float()")),
    ),
    "exponents off by one": (
        "future_kl",
        "powers of γ are off by one",
        ("", QUADRATIC.replace("- t).float()", "- t + 1).float()")),
    ),
    "not flipped back": ("future_kl", "reversed", ("[:, :T]", "[:, :T].flip(1)")),
    "1 / tau": ("future_kl", "γ = 1/τ", ("2 ** (-1 / tau)", "1 / tau")),
    "1 - 1 / tau": ("future_kl", "γ = 1 − 1/τ", ("2 ** (-1 / tau)", "1 - 1 / tau")),
    "exp(-1 / tau)": (
        "future_kl",
        "γ = e^(−1/τ)",
        ("2 ** (-1 / tau)", "2.718281828 ** (-1 / tau)"),
    ),
    "2 ** -tau": ("future_kl", "γ = 2^(−τ)", ("2 ** (-1 / tau)", "2 ** -tau")),
    "tau ignored": ("future_kl", "ignores the argument tau", ("-1 / tau", "-1 / 32")),
    "no decay": ("future_kl", "no decay", ("", LOOP.replace("gamma * after", "after"))),
    "no mask": ("future_kl", "Masked tokens are counted", ("(delta_logp * mask)", "delta_logp")),
    "mask at the end": ("future_kl", "masked at the end", ("[:, :T]", "[:, :T] * mask")),
    "mask of F alone": (
        "future_kl",
        "mask F_t instead",
        ("(delta_logp * mask)", "delta_logp"),
        ("[:, :T]", "[:, :T] * mask"),
    ),
    "stops at the mask": (
        "future_kl",
        "stops at a masked token",
        ("", LOOP.replace("F[:, t] = after", "after = after * mask[:, t]\n    F[:, t] = after")),
    ),
    "overflow": ("future_kl", "γ^(−t) overflows", ("", CUMSUM.replace("DTYPE", "float"))),
    "overflow in float64": (
        "future_kl",
        "γ^(−t) overflows",
        ("", CUMSUM.replace("DTYPE", "double")),
    ),
    # -------------------------------------------------------------------------------------------
    "clip before exp": (
        "influence_weight",
        "clip F before exp",
        ("torch.clamp(torch.exp(F), low, high)", "torch.exp(torch.clamp(F, low, high))"),
    ),
    "no clip": (
        "influence_weight",
        "do not clip",
        ("torch.clamp(torch.exp(F), low, high)", "F.exp()"),
    ),
    "range ignored": (
        "influence_weight",
        "ignore the argument weight_range",
        ("low, high)", "1, 1.2)"),
    ),
    "safety ignored": ("influence_weight", "ignore the argument safety", ("> safety", "> 10")),
    "tau not passed on": ("influence_weight", "ignore the argument tau", ("M, tau)", "M)")),
    "safety for all": ("influence_weight", "every token", (" & (advantages < 0)", "")),
    "safety where A > 0": ("influence_weight", "where A > 0", ("advantages < 0", "advantages > 0")),
    "safety for all ratios": ("influence_weight", "wherever A < 0", ("(ratio > safety) & ", "")),
    "no safety": (
        "influence_weight",
        "safety rule is missing",
        ("f[too_large] = f[too_large].clamp(0.8, 1.0)", ""),
    ),
    "safety sets 1": ("influence_weight", "set f to 1", ("f[too_large].clamp(0.8, 1.0)", "1.0")),
    "M on both sides": (
        "influence_weight",
        "M also drops",
        ("ratio > dual_clip", "delta_logp.abs() > torch.tensor(dual_clip).log()"),
    ),
    "M missing": (
        "influence_weight",
        "must not count in F",
        ("torch.where(ratio > dual_clip, 0.0, mask.float())", "mask"),
    ),
    "M reversed": (
        "influence_weight",
        "wrong way round",
        ("ratio > dual_clip", "ratio <= dual_clip"),
    ),
    "M without mask": ("influence_weight", "Masked tokens count", ("mask.float()", "1.0")),
    "gradient of f": (
        "influence_weight",
        "f has a gradient",
        ("delta_logp.detach()", "1 * delta_logp"),
    ),
    # -------------------------------------------------------------------------------------------
    "max for min": ("fipo_loss", "smaller of the two losses", ("torch.min", "torch.max")),
    "dual clip for all": ("fipo_loss", "also acts where A > 0", (" & (weighted < 0)", "")),
    "dual clip as a maximum of gains": (
        "fipo_loss",
        "also acts where A > 0",
        ("torch.where(is_capped, weighted * dual_clip, gain)", "gain.max(weighted * dual_clip)"),
    ),
    "drop where A > 0": (
        "fipo_loss",
        "drop responses with large ratios",
        ("is_capped.sum(", "(inside & (ratio > dual_clip)).sum("),
    ),
    "mean of the responses' means": (
        "fipo_loss",
        "average each response first",
        (
            "loss = -gain.sum() / used.sum().clamp(min=1)",
            "loss = -(gain.sum(1) / inside.sum(1).clamp(min=1)).mean()",
        ),
    ),
    "mean of the kept responses' means": (
        "fipo_loss",
        "average each response first",
        (
            "loss = -gain.sum() / used.sum().clamp(min=1)",
            "loss = -(gain.sum(1) / inside.sum(1).clamp(min=1)).sum() / (~dropped).sum()",
        ),
    ),
    "mean over the responses": (
        "fipo_loss",
        "divide by the number of responses",
        ("used.sum().clamp(min=1)", "mask.shape[0]"),
    ),
    "drop at one": (
        "fipo_loss",
        "one dual-clipped token",
        ("keepdim=True) > 1", "keepdim=True) > 0"),
    ),
    "no drop": ("fipo_loss", "do not drop", ("used = inside & ~dropped", "used = inside")),
    "tokens dropped": ("fipo_loss", "drop dual-clipped tokens", ("& ~dropped", "& ~is_capped")),
    "dropped tokens in the mean": (
        "fipo_loss",
        "dropped responses must not count",
        ("used.sum().clamp", "inside.sum().clamp"),
    ),
    "padding in the mean": (
        "fipo_loss",
        "masked positions",
        ("used.sum().clamp(min=1)", "mask.numel()"),
    ),
    "num_tokens ignored": ("fipo_loss", "ignore num_tokens", ("num_tokens is not None", "False")),
    "num_tokens ignored, all tokens": (
        "fipo_loss",
        "ignore num_tokens",
        ("num_tokens is not None", "False"),
        ("used.sum().clamp", "inside.sum().clamp"),
    ),
    "num_responses ignored": (
        "fipo_loss",
        "ignore num_responses",
        ("num_responses is not None", "False"),
    ),
    "own number of responses": (
        "fipo_loss",
        "responses of this call",
        ("/ num_responses", "/ mask.shape[0]"),
    ),
    "no dual clip": (
        "fipo_loss",
        "dual clip is missing",
        ("gain = torch.where(is_capped, weighted * dual_clip, gain)", ""),
    ),
    "ratio upside down": (
        "fipo_loss",
        "upside down",
        ("ratio = torch.exp(delta)", "ratio = (-delta).exp()"),
    ),
    "Δ upside down": (
        "fipo_loss",
        "upside down",
        ("(logp - old_logp)", "(old_logp - logp)"),
    ),
    "no exp": ("fipo_loss", "exp is missing", ("ratio = torch.exp(delta)", "ratio = delta")),
    "no clip of the ratio": (
        "fipo_loss",
        "ratio is not clipped",
        ("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio"),
    ),
    "clipped alone": (
        "fipo_loss",
        "clipped ratio alone",
        ("torch.min(weighted * ratio, weighted * ratio.clamp", "(weighted * ratio.clamp"),
    ),
    "symmetric clip": ("fipo_loss", "symmetric", ("1 + clip_high", "1 + clip_low")),
    "f not used": ("fipo_loss", "f is not used", ("f * advantages", "advantages")),
    "tau not passed to the weight": ("fipo_loss", "pass all settings", ("tau=tau, ", "")),
    "sign": ("fipo_loss", "sign is wrong", ("-gain", "gain"), ("-(gain", "(gain")),
    "no gradient": ("fipo_loss", "no gradient", ("torch.exp(delta)", "torch.exp(delta.detach())")),
    "infinite at masked positions": (
        "fipo_loss",
        "−inf · 0 is NaN",
        ("logp = logp.masked_fill(~inside, 0.0)\n", ""),
        ("old_logp = old_logp.masked_fill(~inside, 0.0)\n", ""),
        ("gain = torch.where(used, gain, 0.0)", "gain = gain * used"),
    ),
    "advantages per response only": (
        "fipo_loss",
        "wrong for advantages [B, T]",
        ("advantages.unsqueeze(1)", "advantages.unsqueeze(1)"),
        (
            "if advantages.dim() == 1:",
            "if advantages.dim() == 2:\n    advantages = advantages * 0\nelse:",
        ),
    ),
    # -------------------------------------------------------------------------------------------
    "zero_grad between": (
        "add_gradients",
        "do not set gradients to zero between",
        ("    policy.backward", "    policy.model.zero_grad()\n    policy.backward"),
    ),
    "zero_grad of the optimizer": (
        "add_gradients",
        "do not set gradients to zero between",
        ("    ids, mask,", "    policy.optimizer.zero_grad()\n    ids, mask,"),
    ),
    "zero_grad at the end": (
        "add_gradients",
        "no gradient at the end",
        ("return average", "policy.model.zero_grad()\nreturn average"),
    ),
    "sum of means": (
        "add_gradients",
        "add the means of the parts up",
        ("num_tokens=n, num_responses=responses, ", ""),
    ),
    "sum of means, tokens alone": (
        "add_gradients",
        "add the means of the parts up",
        ("num_tokens=n", "num_tokens=mask.sum()"),
    ),
    "sum of means, responses alone": (
        "add_gradients",
        "add the means of the parts up",
        ("num_responses=responses", "num_responses=responses and len(part)"),
    ),
    "mean of means": (
        "add_gradients",
        "mean of the parts' means",
        ("num_tokens=n", "num_tokens=None"),
        ("num_responses=responses", "num_responses=responses and len(part)"),
        ("backward(loss", "backward(loss / len(parts)"),
    ),
    "mean of means without num_responses": (
        "add_gradients",
        "mean of the parts' means",
        ("num_tokens=n, num_responses=responses, ", ""),
        ("backward(loss", "backward(loss / len(parts)"),
    ),
    "divided twice": (
        "add_gradients",
        "divide by the number of parts",
        ("backward(loss", "backward(loss / len(parts)"),
    ),
    "backward after the loop": (
        "add_gradients",
        "Only the gradient of the last part",
        ("    policy.backward(loss, is_last=number == len(parts) - 1)\n", ""),
        ("return average", "policy.backward(loss, is_last=True)\nreturn average"),
    ),
    "prompts in the denominator": (
        "add_gradients",
        "counts the prompts",
        ("len(rollout.response_ids)", "rollout.total_tokens"),
    ),
    "old_logp not used": (
        "add_gradients",
        "every ratio is 1",
        ("        new, old,", "        new, new.detach(),"),
    ),
    "num_responses missing": (
        "add_gradients",
        "num_responses is missing",
        ("num_responses=responses, ", ""),
    ),
    "num_responses always": (
        "add_gradients",
        "although cfg.loss_mean is token",
        ('if cfg.loss_mean == "response"', "if True"),
    ),
    "settings missing": ("add_gradients", "all settings of cfg", (", **settings", "")),
    "clip_high missing": (
        "add_gradients",
        "all settings of cfg",
        ('settings["clip_high"] = cfg.clip_high', ""),
    ),
    "optimizer step": (
        "add_gradients",
        "step the optimizer",
        ("return average", "policy.optimizer.step()\nreturn average"),
    ),
}


def edited(body, *edits):
    for old, new in edits:
        if not old:
            body = new
        else:
            assert old in body, f"the solution does not contain {old!r}"
            body = body.replace(old, new)
    return body


def student(folder, more="", **bodies):
    """A file as make.py makes it, with these bodies of functions, and more code at its end."""
    text = STUDENT
    for name, body in bodies.items():
        head, tail = text.split(f"\ndef {name}(")
        body = textwrap.indent(body.strip("\n"), "    ")
        tail = tail.replace("    raise NotImplementedError", body, 1)
        text = f"{head}\ndef {name}({tail}"
    path = folder / "student.py"
    path.write_text(text + more)
    return path


@pytest.fixture
def here(monkeypatch):
    """Call the student's functions in this process, which starts no other."""

    def call(path, name, cases):
        return list(grade.answers_of(path, name, copy.deepcopy(cases)))

    monkeypatch.setattr(grade, "call_student", call)


# --------------------------------------------------------------------------------------- Solutions
@pytest.mark.parametrize("name", SOLUTION)
def test_independent_solution_gets_full_points(name, tmp_path, here):
    path = student(tmp_path, **SOLUTION)
    assert grade.grade_function(path, name) == (make.POINTS[name], "")


@pytest.mark.parametrize("body", [QUADRATIC, LOOP], ids=["quadratic", "loop"])
def test_slow_future_kl_loses_only_the_points_for_speed(body, tmp_path, here, monkeypatch):
    if body == QUADRATIC:  # instead of 1.7 GB for a matrix
        body = body + "\n"
        body = body.replace("t = torch", "if T > 5000:\n    raise MemoryError\nt = torch", 1)
    points, sentence = grade.grade_function(student(tmp_path, future_kl=body), "future_kl")
    assert points == make.POINTS["future_kl"] - grade.SPEED_POINTS
    assert "F is right, but" in sentence
    assert "avoid a loop over tokens" in sentence


def test_speed_run_without_a_result_loses_only_its_points(tmp_path, here, monkeypatch):
    def call(path, name, cases):
        is_for_speed = cases[0]["mask"].shape[1] > 5000
        return [{"error": "It was ended."}] if is_for_speed else right_call(path, name, cases)

    right_call = grade.call_student
    monkeypatch.setattr(grade, "call_student", call)
    points, sentence = grade.grade_function(student(tmp_path, **SOLUTION), "future_kl")
    assert points == make.POINTS["future_kl"] - grade.SPEED_POINTS
    assert "too much time or memory" in sentence


def test_future_kl_is_also_checked_where_its_speed_is(tmp_path, here):
    body = FUTURE_KL.replace("[:, :T]", "[:, :T].where(torch.arange(T) < 5000, 0.0)")
    points, sentence = grade.grade_function(student(tmp_path, future_kl=body), "future_kl")
    assert points == 0
    assert "wrong for 20,480 tokens" in sentence


@pytest.mark.slow
def test_command_gives_fipo_full_points_and_trains_with_a_students_functions(tmp_path):
    training = launch([str(GRADE), str(student(tmp_path, **SOLUTION)), "7"])
    grading = launch([str(GRADE), str(FIPO)])
    assert finished(grading).splitlines()[-1] == "total 100 of 100 points"
    assert "the run learns" in finished(training)


# ---------------------------------------------------------------------------------- Wrong solutions
@pytest.mark.parametrize("mistake", WRONG)
def test_mistake_is_named(mistake, tmp_path, here):
    name, words, *edits = WRONG[mistake]
    path = student(tmp_path, **{name: edited(SOLUTION[name], *edits)})
    points, sentence = grade.grade_function(path, name)
    assert points == 0
    assert words in sentence


def test_command_names_a_mistake_in_each_problem(tmp_path, here, capsys):
    chosen = [
        "biased std",
        "not padded",
        "1 / tau",
        "clip before exp",
        "drop at one",
        "mean of means",
    ]
    bodies = {}
    for mistake in chosen:
        name, _, *edits = WRONG[mistake]
        bodies[name] = edited(SOLUTION[name], *edits)
    assert grade.main([str(student(tmp_path, **bodies))]) == 1
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "total 0 of 100 points"
    text = " ".join(output.split())
    for mistake in chosen:
        assert WRONG[mistake][1] in text


@pytest.mark.parametrize("name", SOLUTION)
def test_known_mistakes_differ_from_the_solution_and_from_each_other(name):
    problem = grade.PROBLEMS[name]
    right = grade.run_all(problem, fipo, problem.cases())
    results = [("", right), *grade.known_results(name)]

    def equal(a, b):
        for i in range(len(right)):
            if i not in problem.special:
                if not all(grade.same(a[i][key], b[i][key]) for key in right[i]):
                    return False
        return True

    for i, (sentence, outputs) in enumerate(results):
        for earlier, earlier_outputs in results[:i]:
            assert not equal(outputs, earlier_outputs), (earlier, sentence)


# Mistakes that the grader does not know, the problem, and words of the smallest failing case.
UNKNOWN = {
    "twice the advantage": (
        "group_advantages",
        "expected [0.57735, 0.57735, -1.1547], got [1.1547, 1.1547, -2.3094]. "
        "Inputs: rewards=[1, 1, -1]",
        ("return", "return 2 *"),
    ),
    "log-probs in bits": (
        "token_logprobs",
        "logp is wrong in row 0 at position 2",
        ("logp * keep", "logp * keep / 0.6931"),
    ),
    "every second token": (
        "future_kl",
        "expected [3, 4, 4], got [2, 2, 4]. Inputs: delta_logp=[1, 2, 4], mask=[1, 1, 1], tau=1",
        ("", "F = delta_logp * mask\nF[:, :-2] += F[:, 2:] / 4\nreturn F"),
    ),
    "only 40 tokens": (
        "future_kl",
        "in row 0 at position 0",
        ("", QUADRATIC.replace("0.0)\n", "0.0)\nweights[t[:, None] - t > 40] = 0\n")),
    ),
    "f is rounded": (
        "influence_weight",
        "f is wrong in row 0",
        ("return F, f", "return F, f.round()"),
    ),
    "loss of another scale": (
        "fipo_loss",
        "Inputs: logp=[-2.9, -3.2, -2.5], old_logp=[-3, -3, -3], advantages=[1], mask=[1, 1, 0]",
        ("loss = -gain.sum() / used", "loss = -3 * gain.sum() / used"),
    ),
    "gradient of another scale": (
        "add_gradients",
        "gradient is wrong in row",
        ("backward(loss", "backward(7 * loss"),
    ),
}


@pytest.mark.parametrize("mistake", UNKNOWN)
def test_unknown_mistake_is_shown_by_its_smallest_case(mistake, tmp_path, here):
    name, words, *edits = UNKNOWN[mistake]
    path = student(tmp_path, **{name: edited(SOLUTION[name], *edits)})
    points, sentence = grade.grade_function(path, name)
    assert points == 0
    assert words in sentence
    assert "expected" in sentence
    known = [*grade.PROBLEMS[name].mistakes, *grade.PROBLEMS[name].special.values()]
    assert sentence not in known
    for row in sentence.split("[")[1:]:
        assert row.split("]")[0].count(",") < 5, "at most five tokens"


def test_difference_shows_the_tokens_that_differ(tmp_path, here):
    body = FUTURE_KL.replace("return F.reshape(B, -1)[:, :T]", "F = F.reshape(B, -1)[:, :T]")
    body += "if T == 50:\n    F[2, 33] += 1\nreturn F\n"
    path = student(tmp_path, future_kl=body)
    _, sentence = grade.grade_function(path, "future_kl")
    case = grade.future_kl_cases()[2]
    shown = grade.short(case["delta_logp"][2, 33:38])
    assert "in row 2 at position 33" in sentence
    assert f"delta_logp={shown}" in sentence


# ------------------------------------------------------------------------------- No usable results
BROKEN = {
    "missing": ("", "", "has no function future_kl"),
    "not solved": ("raise NotImplementedError", "", "Not solved yet."),
    "exception": ("return 1 / 0", "", "ZeroDivisionError in line"),
    "name error": ("return delta", "", "NameError in line"),
    "SystemExit": ("raise SystemExit", "", "SystemExit in line"),
    "None": ("pass", "", "must return F (Tensor), but it returns NoneType"),
    "list": ("return delta_logp.tolist()", "", "must return F (Tensor), but it returns list"),
    "pair": ("return mask, mask", "", "must return F (Tensor), but it returns Tensor, Tensor"),
    "shape": (
        FUTURE_KL.replace("[:, :T]", "[0, :T]"),
        "",
        "The shape of F is wrong: expected [1, 3]",
    ),
    "NaN": (FUTURE_KL.replace("[:, :T]", "[:, :T] * float('nan')"), "", "got [nan, nan, nan]"),
    "dtype": (
        FUTURE_KL.replace("[:, :T]", "[:, :T].double()"),
        "",
        "F has the right values, but must be torch.float32, not torch.float64",
    ),
    "in place": ("delta_logp *= mask\n" + FUTURE_KL, "", "changes its arguments in place"),
    "syntax": ("", "\nthis is no Python\n", "SyntaxError in line"),
    "import": ("", "\nimport no_such_module\n", "ModuleNotFoundError in line"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_no_usable_result_is_one_sentence(what, tmp_path, here):
    body, more, words = BROKEN[what]
    path = student(tmp_path, more, **({"future_kl": body} if body else {}))
    if what == "missing":
        path.write_text(path.read_text().replace("def future_kl", "def future_KL"))
    points, sentence = grade.grade_function(path, "future_kl")
    assert points == 0
    assert words in sentence
    assert "Traceback" not in sentence
    assert "\n" not in sentence


def test_loss_that_is_a_number_is_one_sentence(tmp_path, here):
    path = student(tmp_path, fipo_loss=LOSS.replace("return loss,", "return loss.item(),"))
    expected = (
        "The function must return loss (Tensor) and metrics (dict), but it returns float, dict."
    )
    assert grade.grade_function(path, "fipo_loss") == (0, expected)


# Code that runs when the student's file is imported, which ends or disturbs the process.
TOUCH = """
class Malicious:
    def __reduce__(self):
        import pathlib
        return pathlib.Path.touch, (pathlib.Path("{touched}"),)
"""
WRITE = """
import sys
torch.save([Malicious()] * 4, sys.argv[-1])
os._exit(0)
"""
HOSTILE = {
    "exit": ("\nos._exit(0)\n", "ended without a result"),
    "loop": ("\nwhile True:\n    pass\n", "ended after 5 seconds"),
    "pickle": (TOUCH + WRITE, "ended without a result"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_one_sentence(what, tmp_path, monkeypatch):
    code, words = HOSTILE[what]
    touched = tmp_path / "touched"
    path = student(tmp_path, code.replace("{touched}", str(touched)), **SOLUTION)
    if what == "loop":
        monkeypatch.setattr(grade, "TIME_LIMIT", 5)
    started = time.perf_counter()
    points, sentence = grade.grade_function(path, "group_advantages")
    assert points == 0
    assert words in sentence
    assert time.perf_counter() - started < grade.TIME_LIMIT + 3
    assert not touched.exists()


@pytest.mark.slow
def test_printing_is_ignored_and_missing_points_give_status_1(tmp_path):
    loud = "print('word ' * 100_000)\nraise ValueError('no')"
    path = student(tmp_path, group_advantages=loud)
    output = finished(launch([str(GRADE), str(path), "1"]), status=1)
    problem, sentence, total = output.splitlines()
    assert problem.split() == ["problem", "1", "group_advantages", "0", "of", "10"]
    assert sentence.strip().startswith("ValueError in line")
    assert sentence.endswith("of student.py: no")
    assert total == "total 0 of 10 points"


def test_empty_file_gets_no_points(tmp_path, here, capsys):
    path = student(tmp_path)
    assert grade.main([str(path)]) == 1
    output = capsys.readouterr().out
    assert output.count("Not solved yet.") == 6
    assert output.splitlines()[-1] == "total 0 of 100 points"
    assert "Traceback" not in output


def test_wrong_arguments_are_one_sentence(tmp_path):
    path = student(tmp_path)
    for words in ([str(tmp_path / "none.py")], [str(path), "8"], [str(path), "1", "2"]):
        with pytest.raises(SystemExit, match=r"^grade.py: "):
            grade.main(words)


# ------------------------------------------------------------------------------------ student.py
def functions(text):
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def test_student_file_has_signatures_and_docstrings_but_no_solution():
    originals = functions(FIPO.read_text())
    for name, node in functions(STUDENT).items():
        original = originals[name]
        assert ast.unparse(node.args) == ast.unparse(original.args)
        assert ast.get_docstring(node) == ast.get_docstring(original)
        if name in make.POINTS:
            rest = [ast.unparse(statement) for statement in node.body[1:]]
            assert rest == ["raise NotImplementedError"]
    assert functions(STUDENT).keys() >= make.POINTS.keys()


def test_student_file_needs_only_torch(tmp_path):
    path = student(tmp_path)
    code = "import sys, student; print('transformers' in sys.modules, 'fipo' in sys.modules)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=path.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}


def test_make_does_not_overwrite_a_file(tmp_path, capsys):
    path = tmp_path / "student.py"
    make.main([str(path)])
    assert path.read_text() == STUDENT
    path.write_text("my work")
    with pytest.raises(SystemExit, match="exists"):
        make.main([str(path)])
    assert path.read_text() == "my work"

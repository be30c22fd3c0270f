"""Which tokens did RL change? Compares a model before and after training, token by token.

Both models write responses to the same problems, and both score every token of them. Δlog p = log π_RL − log π_base
has a sign (arXiv 2603.22117); KL, JS divergence and entropy, which it is held against, have none. All are in nats, at
temperature 1, over the whole vocabulary. This Δ spans all of training, that of fipo.py the updates of one batch.
Token replacement is the test that decides: one model writes, and where a criterion fires, that one token is drawn from
the other. How few tokens carry the base model to the trained model's accuracy?

  python scripts/tokens.py --base DIR --trained DIR --data FILE --out DIR

writes metrics.json, histograms.png, replacement.png, token_map.html and, of one response, token_map.png.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import os
import sys
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, Literal

import matplotlib
import torch
from transformers import AutoConfig, AutoTokenizer, DynamicCache, HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))
import fipo  # noqa: E402
from fipo import Problem, arg, derive_seed, explain, progress, require, sample_token, say, uniform  # noqa: E402

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt  # noqa: E402


# ------------------------------------------------------------------------------------------------------- Settings
@dataclass
class TokensConfig(fipo.SharedConfig):
    """Settings of this command."""

    base: str = arg("", "model folder or hub name before training")
    trained: str = arg("", "the same model after training, as OUT/checkpoints/step_…")
    problems: int = arg(128, "problems taken from --data, from its start")
    seeds: int = arg(3, "responses per problem; spreads are taken over them")
    tokens_per_micro_batch: int = arg(32768, "padded tokens per forward pass of scoring")
    replacement: bool = arg(True, "do token replacement, which needs both models in memory at once")
    extrapolate: float = arg(0.1, "γ of the extrapolation (1 + γ) log π_RL − γ log π_base")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("float32", "compute dtype; bfloat16's rounding shows in Δlog p")
    sampler: ClassVar[str] = "hf"  # both models are looked into at every token
    tensor_parallel: ClassVar[int] = 1


def check(cfg: TokensConfig) -> None:
    """Refuse settings that cannot work, and models that do not share their tokens."""
    fipo.check(cfg)
    for name in ("base", "trained", "out"):
        require(getattr(cfg, name), f"--{name} is missing.")
    for name, least in {"problems": 1, "seeds": 1, "extrapolate": 0}.items():
        require(getattr(cfg, name) >= least, f"--{name} is {getattr(cfg, name)}: it must be at least {least}.")
    require(os.environ.get("WORLD_SIZE", "1") == "1", "the token study runs in one process: start it by python.")
    tokens = []
    for path in (cfg.base, cfg.trained):
        with explain(f"reading the tokenizer of {path!r}, a model folder or hub name,"):
            head = AutoConfig.from_pretrained(path).get_text_config().vocab_size
            tokens.append((head, AutoTokenizer.from_pretrained(path).get_vocab()))
    require(tokens[0] == tokens[1], f"{cfg.base} and {cfg.trained} have different tokenizers or vocabularies: "
            "Δlog p compares the same tokens, so give a model and what it was trained into.")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- Measures
@dataclass
class Response(fipo.Rollout):
    """A rollout, and what is found out about its tokens."""

    measures: dict[str, torch.Tensor] = field(default_factory=dict)  # [T] each
    replaced: int = 0  # tokens that token replacement drew from the other model


MEASURES = {"delta_logp": "Δlog p", "kl": "KL(π_RL ‖ π_base)", "js": "JS divergence",
            "entropy_base": "entropy of π_base", "entropy_trained": "entropy of π_RL"}  # fmt: skip


def compare(base: torch.Tensor, trained: torch.Tensor, token: torch.Tensor) -> dict[str, torch.Tensor]:
    """The MEASURES, and each model's log-prob of the token, from the log-probs of both. [N, V], [N, V], [N] -> [N]."""

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    logp_base, logp_trained = (p.gather(1, token[:, None])[:, 0] for p in (base, trained))
    middle = torch.logaddexp(base, trained) - math.log(2)
    return {
        "delta_logp": logp_trained - logp_base,
        "kl": kl(trained, base),
        "js": (kl(trained, middle) + kl(base, middle)) / 2,
        "entropy_base": -(base.exp() * base).sum(-1),
        "entropy_trained": -(trained.exp() * trained).sum(-1),
        "base": logp_base,
        "trained": logp_trained,
    }


def hidden_states(policy: fipo.Policy, passes: list[list[Response]]) -> Iterator[torch.Tensor]:
    """What a model hands to its head to predict the response tokens of each pass, [N, D]."""
    for part in progress(passes, desc="score"):
        ids, mask, *_ = fipo.collate(part, policy.device)
        with policy.autocast():
            hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        yield hidden[:, :-1][mask[:, 1:].bool()]


@torch.no_grad()
def measure(responses: list[Response], cfg: TokensConfig, chunk: int = 256) -> None:
    """Fill `measures`.

    One model after the other is in memory: of the base only its head stays, and its hidden states, on the host (4 bytes
    times hidden size times tokens). Logits are there for `chunk` tokens at a time.
    """
    passes = fipo.micro_batches(responses, cfg.tokens_per_micro_batch)
    policy = fipo.Policy(cfg.base, cfg)
    kept, base_head = [h.cpu() for h in hidden_states(policy, passes)], policy.model.get_output_embeddings()
    del policy
    policy = fipo.Policy(cfg.trained, cfg)
    heads = (base_head, policy.model.get_output_embeddings())
    for part, *hidden in zip(passes, kept, hidden_states(policy, passes)):
        tokens = torch.tensor([token for r in part for token in r.response_ids])
        found = []
        for *both, token in zip(*(x.to(policy.device).split(chunk) for x in (*hidden, tokens))):
            logp = [head(h).float().log_softmax(-1) for head, h in zip(heads, both)]  # [chunk, V] each
            found.append(compare(*logp, token))
        for name in found[0]:
            values = torch.cat([each[name] for each in found]).cpu()
            for r, row in zip(part, values.split([len(r.response_ids) for r in part])):
                r.measures[name] = row


def values_of(responses: list[Response], name: str) -> torch.Tensor:
    return torch.cat([r.measures[name] for r in responses])


def require_true_scores(written: dict[str, list[Response]], tolerance: float) -> None:
    """What scored the responses must be what wrote them: else the model does more behind its head than we know."""
    for who, responses in written.items():
        sampled = torch.cat([torch.tensor(r.sampler_logp) for r in responses])
        apart = (values_of(responses, who) - sampled).abs().mean().item()
        require(apart <= tolerance, f"the {who} model's log-probs, scored, differ by {apart:.2g} a token from those it "
                "sampled with: it scales or caps its logits, which the token study cannot follow.")  # fmt: skip


def extremes(responses: list[Response], tokenizer: Any, sign: int, n: int = 20) -> list[dict[str, Any]]:
    """The `n` tokens with the largest sign · Δlog p, each between its neighbours; repeated contexts are shown once."""
    places = [(r, i) for r in responses for i in range(len(r.response_ids))]
    found: dict[Any, dict[str, Any]] = {}
    for k in (sign * values_of(responses, "delta_logp")).argsort(descending=True).tolist():
        r, i = places[k]
        ids, at = [*r.problem.prompt_ids, *r.response_ids], len(r.problem.prompt_ids) + i
        parts = {"before": ids[max(at - 24, 0) : at], "token": ids[at : at + 1], "after": ids[at + 1 : at + 9]}
        row = {"delta_logp": r.measures["delta_logp"][i].item()} | {k: tokenizer.decode(v) for k, v in parts.items()}
        found.setdefault((row["before"], row["token"]), row)
        if len(found) == n:
            break
    return list(found.values())


def summarize(who: str, responses: list[Response], tokenizer: Any) -> dict[str, Any]:
    """What is counted of one model's responses; the main of it is said."""
    below = {name: {str(x): (values_of(responses, name).abs() < x).float().mean().item() for x in (0.01, 0.1, 1)}
             for name in MEASURES}  # fmt: skip
    accuracy, length = fipo.group_accuracy(responses), mean(len(r.response_ids) for r in responses)
    say(f"written by the {who} model: accuracy {accuracy:.1%}, mean length {length:.1f}, |Δlog p| of tokens: "
        + ", ".join(f"{share:.1%} below {x}" for x, share in below["delta_logp"].items()))  # fmt: skip
    return {"accuracy": accuracy, "response_length": length, "share_below": below,
            "smallest_delta_logp": extremes(responses, tokenizer, -1),
            "largest_delta_logp": extremes(responses, tokenizer, 1)}  # fmt: skip


def draw_histograms(written: dict[str, list[Response]], path: Path) -> None:
    """The MEASURES over all tokens that the base and the trained model wrote; the y-axis is logarithmic."""
    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axes, (name, title) in zip(panels.flat, MEASURES.items()):
        values = [values_of(responses, name).numpy() for responses in written.values()]
        axes.hist(values, bins=60, histtype="step", log=True, label=[f"written by the {who} model" for who in written])
        axes.set(title=title, xlabel="nats", ylabel="tokens")
    panels[1, 2].axis("off")
    panels[1, 2].legend(*axes.get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- Token replacement
CRITERIA = {"delta_logp": "Δlog p", "kl": "KL", "entropy": "entropy of the writer", "random": "random",
            "extrapolated": "Δlog p, extrapolated"}  # fmt: skip
FRACTIONS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.3)  # of the writer's own tokens on which to fire


@dataclass(frozen=True)
class Rule:
    """`writer` writes; where the score reaches `threshold`, the token is drawn from the other model instead."""

    writer: str  # base or trained
    criterion: str  # of CRITERIA
    threshold: float = 0.0

    def score(self, found: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the criterion looks at, of what is found at a token."""
        if self.criterion in ("kl", "random"):
            return found[self.criterion]
        if self.criterion == "entropy":
            return found[f"entropy_{self.writer}"]
        return -found["delta_logp"] if self.writer == "base" else found["delta_logp"]  # the other model likes it less


def rules(written: dict[str, list[Response]]) -> Iterator[Rule]:
    """For each writer and criterion the thresholds that fire on FRACTIONS of the writer's own tokens."""
    for writer, criterion in itertools.product(written, CRITERIA):
        if (writer, criterion) == ("trained", "extrapolated"):  # it goes beyond the trained model, not the base
            continue
        found = {name: values_of(written[writer], name) for name in MEASURES}
        if criterion == "random":
            thresholds = [1 - fraction for fraction in FRACTIONS]
        else:
            scores = Rule(writer, criterion).score(found).sort().values
            thresholds = [scores[int((1 - fraction) * len(scores))].item() for fraction in FRACTIONS]
        for threshold in thresholds:
            if threshold > 0:  # else fewer tokens changed than that: it would fire where RL changed nothing
                yield Rule(writer, criterion, threshold)


class ReplacingSampler:
    """Samples with both models, as a rule says. Each of the two draws by random numbers of its own.

    So a rule that never fires leaves the response that the writer alone gives to these seeds, and one that always fires
    leaves the other's.
    """

    ranks = 1  # as fipo.sample asks of a sampler

    def __init__(self, pair: dict[str, fipo.Policy], rule: Rule, extrapolate: float = 0.0) -> None:
        self.pair, self.policy, self.rule = pair, pair["trained"], rule
        self.extrapolate = extrapolate if rule.criterion == "extrapolated" else 0.0

    @torch.no_grad()
    def generate(self, problems: list[Problem], seeds: list[int], n: int, max_tokens: int, temperature: float,
                 top_p: float) -> list[list[Response]]:  # fmt: skip
        """As HFSampler.generate, but for the lines on what is drawn from whom."""
        models, device = [self.pair[who].model.eval() for who in ("base", "trained")], self.policy.device
        eos = torch.tensor(self.policy.eos, device=device)
        u_own = uniform(seeds, n, max_tokens, device)  # [R, max_tokens]
        u_other = uniform([derive_seed(seed, "other") for seed in seeds], n, max_tokens, device)
        u_random = uniform([derive_seed(seed, "random") for seed in seeds], n, max_tokens, device)
        longest = max(len(p.prompt_ids) for p in problems)
        pad = [longest - len(p.prompt_ids) for p in problems]  # on the left, so that all rows grow at the same place
        ids = torch.tensor([[0] * k + p.prompt_ids for k, p in zip(pad, problems)], device=device)  # [P, L]
        mask = torch.tensor([[0] * k + [1] * (longest - k) for k in pad], device=device)  # [P, L]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        caches = [DynamicCache(config=model.config) for model in models]
        responses = [Response(problem) for problem in problems for _ in range(n)]
        row = torch.arange(len(responses), device=device)  # which response each row of the batch belongs to
        with self.policy.autocast():
            for step in range(max_tokens):
                how = dict(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, logits_to_keep=1)
                outs = [model(**how, past_key_values=cache) for model, cache in zip(models, caches)]
                both = [(out.logits[:, -1].float() / temperature).log_softmax(-1) for out in outs]  # [rows, V] each
                if step == 0:  # a prompt is read once per group, not once per response
                    both, mask = [x.repeat_interleave(n, 0) for x in both], mask.repeat_interleave(n, 0)
                    for cache in caches:
                        cache.batch_repeat_interleave(n)
                own, other = both if self.rule.writer == "base" else both[::-1]
                token, logp = sample_token(own, top_p, u_own[row, step])
                fires = self.rule.score(compare(*both, token) | {"random": u_random[row, step]}) >= self.rule.threshold
                beyond = other + self.extrapolate * (other - own) if self.extrapolate else other
                new, new_logp = sample_token(beyond, top_p, u_other[row, step])
                token, logp = torch.where(fires, new, token), torch.where(fires, new_logp, logp)
                for r, t, lp, fired in zip(row.tolist(), token.tolist(), logp.tolist(), fires.tolist()):
                    responses[r].response_ids.append(t)
                    responses[r].sampler_logp.append(lp)
                    responses[r].replaced += fired
                alive = ~torch.isin(token, eos)
                if not alive.any():
                    break
                if not alive.all():  # finished rows leave the batch instead of being decoded as padding
                    row, token, mask = row[alive], token[alive], mask[alive]
                    for cache in caches:
                        cache.batch_select_indices(alive.nonzero()[:, 0])
                mask = torch.cat([mask, mask.new_ones(len(row), 1)], 1)
                ids, positions = token[:, None], mask.sum(1, keepdim=True) - 1
        return [responses[i * n : (i + 1) * n] for i in range(len(problems))]


def sample_by_seed(sampler: Any, who: str, problems: list[Problem], cfg: TokensConfig) -> list[tuple[Any, ...]]:
    """For each of `seeds` a verified response to each problem; what `who` draws is the same whoever helps."""
    return list(zip(*fipo.sample(sampler, problems, (cfg.seed, "tokens", who), cfg, cfg.seeds, 1.0, 1.0)))


def replace_tokens(problems: list[Problem], written: dict[str, list[Response]],
                   cfg: TokensConfig) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each rule: fraction replaced and accuracy, a value per seed. Both models are in memory."""
    pair, rows = {"base": fipo.Policy(cfg.base, cfg), "trained": fipo.Policy(cfg.trained, cfg)}, []
    for rule in progress(list(rules(written)), desc="replace"):
        by_seed = sample_by_seed(ReplacingSampler(pair, rule, cfg.extrapolate), rule.writer, problems, cfg)
        fraction = [sum(r.replaced for r in seed) / sum(len(r.response_ids) for r in seed) for seed in by_seed]
        accuracy = [fipo.group_accuracy(seed) for seed in by_seed]
        rows.append(dataclasses.asdict(rule) | {"fraction": fraction, "accuracy": accuracy})
    return rows


def curve(rows: list[dict[str, Any]], writer: str, criterion: str, start: float) -> list[tuple[float, float, float]]:
    """Fraction replaced, accuracy and its standard deviation over seeds, from no replacement on."""
    mine = [row for row in rows if (row["writer"], row["criterion"]) == (writer, criterion)]
    spread = stdev if mine and len(mine[0]["accuracy"]) > 1 else lambda values: 0.0
    return [(0.0, start, 0.0)] + [(mean(r["fraction"]), mean(r["accuracy"]), spread(r["accuracy"])) for r in mine]


def fraction_needed(points: list[tuple[float, float, float]], end: float,
                    share: float = 0.95) -> tuple[float, float] | None:  # fmt: skip
    """Between which fractions replaced a curve first has `share` of the way from its start to `end`; None: never."""
    way = end - points[0][1]
    for (x0, *_), (x1, y, _) in itertools.pairwise(points):
        if way and (y - points[0][1]) / way >= share - 1e-9:
            return min(x0, x1), x1
    return None


def draw_replacement(rows: list[dict[str, Any]], accuracy: dict[str, float], path: Path) -> None:
    """Accuracy against the fraction of tokens replaced, a line for each criterion, with its standard deviation."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    for axes, writer, other in zip(panels, accuracy, reversed(accuracy)):
        for i, (criterion, name) in enumerate(CRITERIA.items()):
            x, y, spread = zip(*curve(rows, writer, criterion, accuracy[writer]))
            if len(x) > 1:
                line = "--" if criterion == "extrapolated" else "-"  # it mostly lies upon Δlog p
                axes.errorbar(x, y, spread, label=name, color=f"C{i}", marker="os^Dx"[i], ms=4, capsize=2, ls=line)
        for who, level in accuracy.items():
            axes.axhline(level, color="0.5", ls="--", lw=1)
            axes.annotate(f"{who} alone", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set(title=f"the {writer} model writes, tokens come from the {other} model", xlabel="fraction replaced")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CRITERIA))
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------- The token map
VIEWS = {"delta_logp": ("Δlog p", 0.0), "F": ("F", 0.0), "f": ("f", 1.0)}  # name, neutral value
MOST = 2000  # tokens shown of a response: a browser tires of more
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token map</title><style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
header {{ position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc }} input {{ margin-left: 2em }}
h3 {{ margin-bottom: 0 }}
p {{ font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }}
.prompt {{ color: #777; font-size: 80%; line-height: 1.4; max-height: 20em; overflow: auto; margin: .3em 0 }}
i {{ font-style: normal; border-bottom: 3px none #000; box-shadow: -1px 0 #eee; padding: .1em 0 }}
.legend {{ display: none }} .legend b {{ font-weight: normal; padding: .2em 1em }}
* {{ print-color-adjust: exact; -webkit-print-color-adjust: exact }}
{rules}</style><h2>Which tokens did RL change?</h2><div>Δlog p = log π_RL − log π_base. {note} Underlined: above the
neutral value; dotted: below. Each view has its own scale. Point at a token for its values.</div>
<header>Colour by {switches}{legends}</header>{body}</html>"""


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token where it stands; a character of several tokens shows at the last of them."""
    starts = [max(i - 8, 0) for i in range(len(ids))]
    upto = [tokenizer.decode(list(ids[a : i + 1])).rstrip("\ufffd") for i, a in enumerate(starts)]
    before = [tokenizer.decode(list(ids[a:i])).rstrip("\ufffd") for i, a in enumerate(starts)]
    return [text[len(prefix) :] or "▯" for text, prefix in zip(upto, before)]


def visible(token: str) -> str:
    """White space that would not be seen: line breaks, tabs, and spaces where a token is nothing else."""
    token = token if token.strip(" ") else "·" * len(token)
    return token.replace("\t", "⇥").replace("\n", "⏎\n")


def shade(x: float) -> str:
    """A colour for x from −1 to 1 that every kind of colour-blindness tells apart: blue, white at 0, orange."""
    full = (230, 97, 1) if x > 0 else (44, 123, 182)
    return "#" + "".join(f"{round(255 + (c - 255) * abs(x) ** 0.5):02x}" for c in full)  # √: small values show too


def shades(rows: list[dict[str, Any]], view: str) -> tuple[list[list[float]], dict[str, float]]:
    """Each token's place between −1 and 1 in a view, 0 being neutral; and the places of the view's ends, by value."""
    neutral = VIEWS[view][1]
    values = [value for row in rows for value in row.get(view, [])] + [neutral]
    largest = max(abs(value - neutral) for value in values) or 1.0
    places = [[(value - neutral) / largest for value in row.get(view, [])] for row in rows]
    return places, {f"{end:.3g}": (end - neutral) / largest for end in sorted({min(values), neutral, max(values)})}


def section(row: dict[str, Any], styles: list[str]) -> str:
    """One response: caption, prompt, and each token in its style with its values on hover."""
    tokens = ""
    for i, (token, style) in enumerate(zip(row["tokens"], styles)):
        values = ", ".join(f"{VIEWS[view][0]} {row[view][i]:.6g}" for view in VIEWS if view in row)
        title = f"{html.escape(repr(token))}: {values}"
        tokens += f'<i style="{style}" title="{title}">{html.escape(visible(token))}</i>'
    return (f'<section><h3>{html.escape(row["caption"])}</h3><p class="prompt">{html.escape(row["prompt"].strip())}</p>'
            f"<p>{tokens}</p></section>\n")  # fmt: skip


def token_map(rows: list[dict[str, Any]], note: str) -> str:
    """Responses (caption, prompt, tokens, VIEWS) as one HTML page that needs no script: CSS switches the view."""
    css, switches, legends, styles = "", "", "", [[""] * len(row["tokens"]) for row in rows]
    for view, (name, _) in VIEWS.items():
        places, ends = shades(rows, view)
        for style, place in zip(styles, places):
            for i, x in enumerate(place):
                line = "none" if abs(x) < 0.01 else "solid" if x > 0 else "dotted"  # for prints in grey
                style[i] += f"--{view}:{shade(x)};--{view}-line:{line};"
        css += f"body:has(#{view}:checked) i {{ background: var(--{view}); border-bottom-style: var(--{view}-line) }} "
        css += f"#{view}:checked ~ .{view} {{ display: block }}\n"
        switches += f'<input type="radio" name="view" id="{view}"{"" if switches else " checked"}>'
        switches += f'<label for="{view}">{name}</label>'
        boxes = "".join(f'<b style="background:{shade(x)}">{value}</b>' for value, x in ends.items())
        legends += f'<div class="legend {view}">{name}: {boxes}</div>'
    body = "".join(map(section, rows, styles))
    return PAGE.format(rules=css, note=html.escape(note), switches=switches, legends=legends, body=body)


def draw_token_map(row: dict[str, Any], path: Path, columns: int = 90, most: int = 10) -> None:
    """One response of the token map as a picture, coloured by each view; at most `most` lines of it."""
    spots, x, y = [], 0, 0  # text, column, line
    for token in row["tokens"]:
        text = visible(token).replace("\n", "")
        if x + len(text) > columns:
            x, y = 0, y + 1
        spots.append((text, x, y))
        x, y = (0, y + 1) if "\n" in token else (x + len(text), y)
    shown = [spot for spot in spots if spot[2] < most]
    lines, width = 1 + shown[-1][2], max(x + len(text) for text, x, _ in shown)
    views = [view for view in VIEWS if view in row]
    figure, panels = plt.subplots(len(views), 1, squeeze=False, layout="constrained",
                                  figsize=(max(0.11 * width, 6), (0.28 * lines + 0.4) * len(views)))  # fmt: skip
    prompt, left = row["prompt"].strip(), len(spots) - len(shown)
    title = [prompt] if len(prompt) <= 60 and "\n" not in prompt else []  # a longer one is left to the page
    title += [row["caption"]] + ([f"({left} more tokens)"] if left else [])
    figure.suptitle("   ".join(title), fontsize="medium", parse_math=False)
    for axes, view in zip(panels[:, 0], views):
        (places,), ends = shades([row], view)
        for (text, x, y), place in zip(shown, places):
            axes.add_patch(plt.Rectangle((x, y), len(text), 0.9, fc=shade(place), ec="0.85", lw=0.5))
            axes.text(x + len(text) / 2, y + 0.5, text, family="monospace", ha="center", va="center", parse_math=False)
        colours = [f"{'white' if not x else 'orange' if x > 0 else 'blue'} {value}" for value, x in ends.items()]
        axes.set_title(f"{VIEWS[view][0]}: {', '.join(colours)}", loc="left", fontsize="small")
        axes.set(xlim=(-0.1, width + 0.1), ylim=(lines, -0.1))
        axes.axis("off")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # not every character is in the font: a box will do
        figure.savefig(path, dpi=130)
    plt.close(figure)


def add_weights(r: Response, delta_logp: torch.Tensor, advantage: float, **how: Any) -> None:
    """F and f of a response, as the loss has them."""
    delta = delta_logp.clamp(-20.0, 20.0)[None]  # [1, T]
    F, f = fipo.influence_weight(delta, torch.tensor([[advantage]]), torch.ones_like(delta).bool(), **how)
    r.measures |= {"F": F[0], "f": f[0]}


def last_update_of(trained: str) -> list[Response]:
    """The responses a run keeps of its last update, with F and f, if `trained` is its checkpoint; else none."""
    checkpoint = Path(trained).resolve()
    state, run = checkpoint / "state.json", checkpoint.parent.parent
    if not state.exists() or not (run / "last_update.jsonl").exists():
        return []
    step, settings = fipo.read_json(str(state))["step"], fipo.read_json(str(run / "config.json"))
    how = {name: settings[name] for name in ("tau", "weight_range", "safety", "dual_clip")}
    kept = []
    with explain(f"reading {run / 'last_update.jsonl'}"):
        for row in map(json.loads, (run / "last_update.jsonl").read_text().splitlines()):
            if row["step"] == step:  # else the run went on after this checkpoint
                problem = Problem("", "", row["prompt_ids"])
                kept.append(Response(problem, array("i", row["response_ids"]), correct=row["correct"]))
                delta_logp = torch.tensor(row["logp"]) - torch.tensor(row["old_logp"])
                add_weights(kept[-1], delta_logp, row["advantage"], **how)
    return kept


def choose_for_map(written: dict[str, list[Response]], updated: list[Response], tokenizer: Any) -> tuple[list, str]:
    """Rows for the map: three responses of each model, or of the base and the last update's; whence their F and f."""
    chosen = [("written by the base model", r) for r in written["base"][:3]]
    note = "F and f are those of the last update in training, of the responses it trained on."
    chosen += [("trained on in the last update", r) for r in updated]
    if not updated:
        note = "No update is kept with the trained weights: F and f are as if all of training had been one."
        chosen += [("written by the trained model", r) for r in written["trained"][:3]]
        for _, r in chosen:  # π_old is the base, π_θ the trained model
            add_weights(r, r.measures["delta_logp"], 1.0 if r.correct else -1.0)
    rows = []
    for title, r in chosen:
        more = f" (the first {MOST} of {len(r.response_ids)} tokens)" if len(r.response_ids) > MOST else ""
        row = {"caption": f"{title}: {'right' if r.correct else 'wrong'}{more}"}
        row |= {"prompt": tokenizer.decode(r.problem.prompt_ids)}
        row |= {"tokens": token_texts(r.response_ids[:MOST], tokenizer)}
        rows.append(row | {view: r.measures[view][:MOST].tolist() for view in VIEWS if view in r.measures})
    return rows, note


# ---------------------------------------------------------------------------------------------------- The command
def write_alone(policy: fipo.Policy, who: str, problems: list[Problem], cfg: TokensConfig) -> list[Response]:
    """`seeds` responses to each problem by one model, in the order of seeds."""
    return [Response(**vars(r)) for seed in sample_by_seed(fipo.HFSampler(policy), who, problems, cfg) for r in seed]


def write_both(cfg: TokensConfig) -> tuple[dict[str, list[Response]], list[Problem], Any, float]:
    """Responses of each model alone, one after the other in memory; the problems, the tokenizer, rounding's tolerance.

    Prompts and EOS are the trained model's for both.
    """
    policy = fipo.Policy(cfg.trained, cfg)
    eos, tokenizer, tolerance = policy.eos, policy.tokenizer, policy.tolerance
    problems = fipo.encode_problems(cfg.data, policy, cfg)[: cfg.problems]
    trained = write_alone(policy, "trained", problems, cfg)
    del policy
    policy = fipo.Policy(cfg.base, cfg)
    policy.eos = eos
    return {"base": write_alone(policy, "base", problems, cfg), "trained": trained}, problems, tokenizer, tolerance


def run_tokens(cfg: TokensConfig) -> None:
    """Measures of both models' responses, the token map, token replacement; all under --out."""
    check(cfg)
    out = fipo.make_folder(Path(cfg.out))
    written, problems, tokenizer, tolerance = write_both(cfg)
    updated = last_update_of(cfg.trained)
    measure([*written["base"], *written["trained"], *updated], cfg)
    require_true_scores(written, tolerance)
    found: dict[str, Any] = {"settings": dataclasses.asdict(cfg)}
    for who, responses in written.items():
        found[who] = summarize(who, responses, tokenizer)
    draw_histograms(written, out / "histograms.png")
    rows, note = choose_for_map(written, updated, tokenizer)
    (out / "token_map.html").write_text(token_map(rows, note), encoding="utf-8")
    draw_token_map(rows[-1], out / "token_map.png")
    found["token_map"] = rows
    (out / "metrics.json").write_text(json.dumps(found, indent=1))
    if cfg.replacement:
        rows, accuracy = replace_tokens(problems, written, cfg), {who: found[who]["accuracy"] for who in written}
        draw_replacement(rows, accuracy, out / "replacement.png")
        needed = {c: fraction_needed(curve(rows, "base", c, accuracy["base"]), accuracy["trained"]) for c in CRITERIA}
        shares = (f"{CRITERIA[c]} {f'{x[0]:.1%} to {x[1]:.1%}' if x else 'not reached'}" for c, x in needed.items())
        say("tokens to replace in the base model's responses for 95 % of the way to the trained model's accuracy: "
            + ", ".join(shares))  # fmt: skip
        found |= {"replacement": rows, "fraction_needed": needed}
        (out / "metrics.json").write_text(json.dumps(found, indent=1))
    say(f"numbers, token map and pictures: {out}")


def main(argv: list[str]) -> None:
    usage = "python scripts/tokens.py [--help] [--SETTING VALUE …]"
    parser = HfArgumentParser(TokensConfig, usage=usage, description=__doc__.split("\n\n")[1], allow_abbrev=False)
    with fipo.one_clear_sentence():
        run_tokens(TokensConfig(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main(sys.argv[1:])

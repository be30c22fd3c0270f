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

import html
import itertools
import json
import math
import os
import sys
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, Literal

import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, DynamicCache, HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))
import fipo  # noqa: E402
from fipo import Problem, arg, derive_seed, explain, progress, require, sample_token, say  # noqa: E402


# ------------------------------------------------------------------------------------------------------- Settings
@dataclass
class TokensConfig(fipo.SharedConfig):
    base: str = arg("", "model folder or hub name before training")
    trained: str = arg("", "the same model after training, as OUT/checkpoints/step_…")
    problems: int = arg(128, "the first so many problems of --data (0: all)")
    seeds: int = arg(3, "responses per problem; spreads are taken over them")
    tokens_per_micro_batch: int = arg(32768, "padded tokens per forward pass of scoring")
    replacement: bool = arg(True, "do token replacement, which needs both models in memory at once")
    extrapolate: float = arg(0.1, "γ of the extrapolation (1 + γ) log π_RL − γ log π_base")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("float32", "compute dtype; bfloat16's rounding shows in Δlog p")
    sampler: ClassVar[str] = "hf"  # both models are looked into at every token


def check(cfg: TokensConfig) -> None:
    fipo.check(cfg)
    require(cfg.out, "--out is missing.")
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
    measures: dict[str, torch.Tensor] = field(default_factory=dict)  # [T] each: what is found out about its tokens
    replaced: int = 0  # tokens that token replacement drew from the other model


MEASURES = {"delta_logp": "Δlog p", "kl": "KL(π_RL ‖ π_base)", "js": "JS divergence",
            "entropy_base": "entropy of π_base", "entropy_trained": "entropy of π_RL"}  # fmt: skip


def compare(base: torch.Tensor, trained: torch.Tensor, token: torch.Tensor) -> dict[str, torch.Tensor]:
    """The MEASURES, and each model's log-prob of the token, from the log-probs of both. [N, V], [N, V], [N] -> [N]."""

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    both = {"base": base, "trained": trained}
    logp = {who: p.gather(1, token[:, None])[:, 0] for who, p in both.items()}
    entropy = {f"entropy_{who}": -(p.exp() * p).sum(-1) for who, p in both.items()}
    middle = torch.logaddexp(base, trained) - math.log(2)
    js = (kl(trained, middle) + kl(base, middle)) / 2
    return {"delta_logp": logp["trained"] - logp["base"], "kl": kl(trained, base), "js": js} | entropy | logp


def hidden_states(policy: fipo.Policy, parts: list[list[Response]]) -> Iterator[torch.Tensor]:
    """What a model hands to its head to predict the tokens of each response, [T, D]."""
    for part in progress(parts, desc="score"):
        ids, mask, *_ = fipo.collate(part, policy.device)
        with policy.autocast():
            hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        yield from (row[where] for row, where in zip(hidden[:, :-1], mask[:, 1:]))


@torch.no_grad()
def measure(responses: list[Response], cfg: TokensConfig, chunk: int = 256) -> None:
    """Fill `measures`. One model is in memory at a time; of the base, its head stays, and on the host its states."""
    parts = fipo.micro_batches(responses, cfg.tokens_per_micro_batch)
    policy = fipo.Policy(cfg.base, cfg)
    kept, base_head = [h.cpu() for h in hidden_states(policy, parts)], policy.model.get_output_embeddings()
    del policy
    policy = fipo.Policy(cfg.trained, cfg)
    heads = base_head, policy.model.get_output_embeddings()
    for r, *hidden in zip(itertools.chain(*parts), kept, hidden_states(policy, parts)):
        found = []
        for *both, token in zip(*(x.to(policy.device).split(chunk) for x in (*hidden, torch.tensor(r.response_ids)))):
            logp = [head(h).float().log_softmax(-1) for head, h in zip(heads, both)]  # [chunk, V] each
            found.append(compare(*logp, token))
        r.measures |= {name: torch.cat([each[name] for each in found]).cpu() for name in found[0]}


def values_of(responses: list[Response], name: str) -> torch.Tensor:
    return torch.cat([r.measures[name] for r in responses])


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


def summarize(who: str, responses: list[Response], tokenizer: Any, tolerance: float) -> dict[str, Any]:
    sampled = torch.tensor([logp for r in responses for logp in r.sampler_logp])
    apart = (values_of(responses, who) - sampled).abs().mean().item()  # or the model does more behind its head
    require(apart <= tolerance, f"the {who} model's log-probs, scored, differ by {apart:.2g} a token from those it "
            "sampled with: it scales or caps its logits, which the token study cannot follow.")  # fmt: skip
    below = {name: {str(x): (values_of(responses, name).abs() < x).float().mean().item() for x in (0.01, 0.1, 1)}
             for name in MEASURES}  # fmt: skip
    accuracy, length = mean(r.correct for r in responses), mean(len(r.response_ids) for r in responses)
    say(f"written by the {who} model: accuracy {accuracy:.1%}, mean length {length:.1f}, |Δlog p| of tokens: "
        + ", ".join(f"{share:.1%} below {x}" for x, share in below["delta_logp"].items()))  # fmt: skip
    return {"accuracy": accuracy, "response_length": length, "share_below": below,
            "smallest_delta_logp": extremes(responses, tokenizer, -1),
            "largest_delta_logp": extremes(responses, tokenizer, 1)}  # fmt: skip


def draw_histograms(written: dict[str, list[Response]], path: Path) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    *panels, empty = figure.subplots(2, 3).flat
    for axes, (name, title) in zip(panels, MEASURES.items()):
        values = [values_of(responses, name).numpy() for responses in written.values()]
        axes.hist(values, bins=60, histtype="step", log=True, label=[f"written by the {who} model" for who in written])
        axes.set(title=title, xlabel="nats", ylabel="tokens")
    empty.axis("off")
    empty.legend(*axes.get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=130)


# ---------------------------------------------------------------------------------------------- Token replacement
CRITERIA = {"delta_logp": "Δlog p", "kl": "KL", "entropy": "entropy of the writer", "random": "random",
            "extrapolated": "Δlog p, extrapolated"}  # fmt: skip
FRACTIONS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.3)  # of the writer's own tokens on which to fire


def score(writer: str, criterion: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a criterion looks at, of what is found at a token; with Δlog p: does the other model like it less?"""
    looks_at = {"kl": "kl", "entropy": f"entropy_{writer}", "random": "random"}.get(criterion)
    return found[looks_at] if looks_at else -found["delta_logp"] if writer == "base" else found["delta_logp"]


def rules(written: dict[str, list[Response]]) -> Iterator[tuple[str, str, float]]:
    """Writer, criterion, threshold: from that score on, the other model draws. It fires on FRACTIONS of own tokens."""
    for writer, criterion in itertools.product(written, CRITERIA):
        if (writer, criterion) == ("trained", "extrapolated"):  # it goes beyond the trained model, not the base
            continue
        thresholds = [1 - fraction for fraction in FRACTIONS]
        if criterion != "random":
            found = {name: values_of(written[writer], name) for name in MEASURES}
            scores = score(writer, criterion, found).sort().values
            thresholds = [scores[int(share * len(scores))].item() for share in thresholds]
        yield from ((writer, criterion, x) for x in thresholds if x > 0)  # at 0 it would fire where RL changed nothing


class ReplacingSampler:
    """Samples with both models. Each draws by its own random numbers: where nothing fires, as the writer does alone."""

    ranks = 1  # as fipo.sample asks of a sampler

    def __init__(self, pair: dict[str, Any], writer: str, criterion: str, threshold: float, gamma: float) -> None:
        self.pair, self.policy, self.writer, self.criterion = pair, pair["trained"], writer, criterion
        self.threshold, self.gamma = threshold, gamma if criterion == "extrapolated" else 0.0

    @torch.no_grad()
    def generate(self, problems: list[Problem], seeds: list[int], n: int, max_tokens: int, temperature: float,
                 top_p: float) -> list[list[Response]]:  # fmt: skip
        """As HFSampler.generate, but for the lines on what is drawn from whom."""
        models, device = [self.pair[who].model.eval() for who in ("base", "trained")], self.policy.device
        eos = torch.tensor(self.policy.eos, device=device)
        draws = [[seed, derive_seed(seed, "other"), derive_seed(seed, "random")] for seed in seeds]
        u = [[torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(s)) for s in three] for three in draws]
        u = torch.cat([torch.stack(three) for three in u], 1).to(device)  # [3, R, max_tokens]
        responses = [Response(problem) for problem in problems for _ in range(n)]
        prompts = [torch.tensor(r.problem.prompt_ids, device=device) for r in responses]
        left = dict(batch_first=True, padding_side="left")  # so that all rows grow at the same place
        ids, mask = pad_sequence(prompts, **left), pad_sequence([torch.ones_like(p) for p in prompts], **left)  # [R, L]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        caches = [DynamicCache(config=model.config) for model in models]
        row = torch.arange(len(responses), device=device)  # which response each row of the batch belongs to
        with self.policy.autocast():
            for step in range(max_tokens):
                how = dict(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, logits_to_keep=1)
                outs = [model(**how, past_key_values=cache) for model, cache in zip(models, caches)]
                both = [(out.logits[:, -1].float() / temperature).log_softmax(-1) for out in outs]  # [rows, V] each
                own, other = both if self.writer == "base" else both[::-1]
                u_own, u_other, u_rule = u[:, row, step]
                token, logp = sample_token(own, top_p, u_own)
                fires = score(self.writer, self.criterion, compare(*both, token) | {"random": u_rule}) >= self.threshold
                new, new_logp = sample_token(other + self.gamma * (other - own), top_p, u_other)
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


def write(sampler: Any, who: str, problems: list[Problem], cfg: TokensConfig) -> list[Response]:
    """`seeds` responses to each problem, in the order of seeds; what `who` draws is the same whoever helps."""
    groups = fipo.sample(sampler, problems, (cfg.seed, "tokens", who), cfg, cfg.seeds, 1.0, 1.0)
    return [Response(**vars(r)) for seed in zip(*groups) for r in seed]


def replace_tokens(problems: list[Problem], written: dict[str, list[Response]], cfg: TokensConfig) -> list[dict]:
    """A row for each rule: fraction replaced and accuracy, a value per seed. Both models are in memory."""
    pair, rows = {"base": fipo.Policy(cfg.base, cfg), "trained": fipo.Policy(cfg.trained, cfg)}, []
    for writer, criterion, threshold in progress(list(rules(written)), desc="replace"):
        sampler = ReplacingSampler(pair, writer, criterion, threshold, cfg.extrapolate)
        counts = [(r.replaced, len(r.response_ids), r.correct) for r in write(sampler, writer, problems, cfg)]
        replaced, length, correct = torch.tensor(counts).double().view(cfg.seeds, -1, 3).sum(1).T  # [seeds] each
        row = {"writer": writer, "criterion": criterion, "threshold": threshold}
        rows.append(row | {"fraction": (replaced / length).tolist(), "accuracy": (correct / len(problems)).tolist()})
    return rows


def curve(rows: list[dict[str, Any]], writer: str, criterion: str, start: float) -> list[tuple[float, float, float]]:
    """Fraction replaced, accuracy and its standard deviation over seeds, from no replacement on."""
    mine = [(r["fraction"], r["accuracy"]) for r in rows if (r["writer"], r["criterion"]) == (writer, criterion)]
    return [(0.0, start, 0.0)] + [(mean(x), mean(y), stdev(y) if len(y) > 1 else 0.0) for x, y in mine]


def fraction_needed(points: list[tuple], end: float, share: float = 0.95) -> tuple[float, float] | None:
    """Between which fractions replaced a curve first has `share` of the way from its start to `end`; None: never."""
    way = end - points[0][1]
    for (x0, *_), (x1, y, _) in itertools.pairwise(points):
        if way and (y - points[0][1]) / way >= share - 1e-9:
            return min(x0, x1), x1
    return None


def draw_replacement(rows: list[dict[str, Any]], accuracy: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, writer, other in zip(panels, accuracy, reversed(accuracy)):
        for i, (criterion, name) in enumerate(CRITERIA.items()):
            x, y, spread = zip(*curve(rows, writer, criterion, accuracy[writer]))
            if len(x) > 1:
                line = "--" if criterion == "extrapolated" else "-"  # it mostly lies upon Δlog p
                axes.errorbar(x, y, spread, label=name, color=f"C{i}", marker="os^Dx"[i], ms=4, capsize=2, ls=line)
        for who, level in accuracy.items():
            axes.axhline(level, color="0.5", ls="--", lw=1)
            axes.annotate(f"{who} alone", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        title = f"the {writer} model writes, tokens come from the {other} model"
        axes.set(title=title, xlabel="fraction replaced", ylabel="accuracy")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CRITERIA))
    figure.savefig(path, dpi=130)


# --------------------------------------------------------------------------------------------------- The token map
VIEWS = {"delta_logp": ("Δlog p", 0.0), "F": ("F", 0.0), "f": ("f", 1.0)}  # name, neutral value
MOST = 2000  # tokens shown of a response: a browser tires of more
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token map</title><style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }} h3 {{ margin-bottom: 0 }}
header {{ position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc }} input {{ margin-left: 2em }}
p {{ font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }}
.prompt {{ color: #777; font-size: 80%; line-height: 1.4; max-height: 20em; overflow: auto; margin: .3em 0 }}
i {{ font-style: normal; border-bottom: 3px none #000; box-shadow: -1px 0 #eee; padding: .1em 0 }}
.legend {{ display: none }} .legend b {{ font-weight: normal; padding: .2em 1em }}
* {{ print-color-adjust: exact; -webkit-print-color-adjust: exact }}
{rules}</style><h2>Which tokens did RL change?</h2><div>Δlog p = log π_RL − log π_base. {note} Underlined: above the
neutral value; dotted: below. Each view has its own scale. Point at a token for its values.</div>
<header>Colour by {switches}{legends}</header>{body}</html>"""


def token_texts(ids: list[int], tokenizer: Any) -> Iterator[str]:
    """The text of each token where it stands; a character of several tokens shows at the last of them."""
    for i in range(len(ids)):
        before, upto = (tokenizer.decode(ids[max(i - 8, 0) : end]).rstrip("\ufffd") for end in (i, i + 1))
        yield upto[len(before) :] or "▯"


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
    largest = max(0.01, *(abs(value - neutral) for value in values))  # what is less is next to nothing: no colour
    places = [[(value - neutral) / largest for value in row.get(view, [])] for row in rows]
    return places, {f"{end:.3g}": (end - neutral) / largest for end in sorted({min(values), neutral, max(values)})}


def token_map(rows: list[dict[str, Any]], note: str) -> str:
    """Responses (caption, prompt, tokens, VIEWS) as one HTML page that needs no script: CSS switches the view."""
    css, switches, legends, body, styles = "", "", "", "", [[""] * len(row["tokens"]) for row in rows]
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
    for row, style in zip(rows, styles):
        body += f'<h3>{html.escape(row["caption"])}</h3><p class="prompt">{html.escape(row["prompt"].strip())}</p><p>'
        for i, token in enumerate(row["tokens"]):
            values = ", ".join(f"{VIEWS[view][0]} {row[view][i]:.6g}" for view in VIEWS if view in row)
            title = f"{html.escape(repr(token))}: {values}"
            body += f'<i style="{style[i]}" title="{title}">{html.escape(visible(token))}</i>'
        body += "</p>\n"
    return PAGE.format(rules=css, note=html.escape(note), switches=switches, legends=legends, body=body)


def draw_token_map(row: dict[str, Any], path: Path, columns: int = 90, most: int = 10) -> None:
    """One response of the token map as a picture, coloured by each view; at most `most` lines of it."""
    shown, x, y = [], 0, 0  # text, column, line
    for token in row["tokens"]:
        text = visible(token).replace("\n", "")
        if x + len(text) > columns:
            x, y = 0, y + 1
        if y >= most:
            break
        shown.append((text, x, y))
        x, y = (0, y + 1) if "\n" in token else (x + len(text), y)
    lines, width = 1 + shown[-1][2], max(x + len(text) for text, x, _ in shown)
    figure = Figure(figsize=(max(0.11 * width, 6), (0.28 * lines + 0.4) * len(VIEWS)), layout="constrained")
    prompt, left = row["prompt"].strip(), len(row["tokens"]) - len(shown)
    title = [prompt] if len(prompt) <= 60 and "\n" not in prompt else []  # a longer one is left to the page
    title += [row["caption"]] + ([f"({left} more tokens)"] if left else [])
    figure.suptitle("   ".join(title), fontsize="medium", parse_math=False)
    for axes, view in zip(figure.subplots(len(VIEWS)), VIEWS):
        (places,), ends = shades([row], view)
        for (text, x, y), place in zip(shown, places):
            axes.barh(y, len(text), 0.9, x, align="edge", fc=shade(place), ec="0.85", lw=0.5)
            axes.text(x + len(text) / 2, y + 0.5, text, family="monospace", ha="center", va="center", parse_math=False)
        hue = {end: "white" if abs(x) < 0.01 else "orange" if x > 0 else "blue" for end, x in ends.items()}
        colours = [f"{colour} {end}" for end, colour in hue.items()]
        axes.set_title(f"{VIEWS[view][0]}: {', '.join(colours)}", loc="left", fontsize="small")
        axes.set(xlim=(-0.1, width + 0.1), ylim=(lines, -0.1))
        axes.axis("off")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # not every character is in the font: a box will do
        figure.savefig(path, dpi=130)


def add_weights(r: Response, delta_logp: torch.Tensor, advantage: float, **how: Any) -> None:
    """F and f of a response, as the loss has them."""
    delta = delta_logp.clamp(-20.0, 20.0)[None]  # [1, T]
    F, f = fipo.influence_weight(delta, torch.tensor([[advantage]]), torch.ones_like(delta).bool(), **how)
    r.measures |= {"F": F[0], "f": f[0]}


def last_update_of(trained: str) -> Iterator[Response]:
    """What a run has logged of the last update before its checkpoint `trained`, with F and f; none of other folders."""
    checkpoint = Path(trained).resolve()
    run = checkpoint.parent.parent
    if not ((checkpoint / "state.json").exists() and (run / "samples.jsonl").exists()):
        return
    with explain(f"reading config.json and samples.jsonl in {run}"):
        state, settings = (json.loads(path.read_text()) for path in (checkpoint / "state.json", run / "config.json"))
        how = {name: settings[name] for name in ("tau", "safety")}
        how["dual_clip"] = float(settings["dual_clip"])  # "Infinity" is text in JSON
        how["weight_range"] = [float(bound) for bound in settings["weight_range"]]
        for row in map(json.loads, (run / "samples.jsonl").read_text().splitlines()):
            if row["kind"] == "train" and row["step"] == state["step"] and "logp" in row:
                problem, ids = Problem("", "", row["prompt_ids"]), array("i", row["response_ids"])
                r = Response(problem, ids, correct=row["correct"])
                add_weights(r, torch.tensor(row["logp"]) - torch.tensor(row["old_logp"]), row["advantage"], **how)
                yield r


def choose_for_map(written: dict[str, list[Response]], updated: list[Response], tokenizer: Any) -> tuple[list, str]:
    """Rows for the map: three responses of each model, or of the base and the last update's; whence their F and f."""
    chosen = [("written by the base model", r) for r in written["base"][:3]]
    note = "F and f are those of the last update in training, of the responses it trained on."
    distinct = {(*r.problem.prompt_ids, *r.response_ids): r for r in updated}  # late in a run many are alike
    chosen += [("trained on in the last update", r) for r in distinct.values()]
    if not updated:
        note = "No update is kept with the trained weights: F and f are as if all of training had been one."
        chosen += [("written by the trained model", r) for r in written["trained"][:3]]
        for _, r in chosen:  # π_old is the base, π_θ the trained model
            add_weights(r, r.measures["delta_logp"], 1.0 if r.correct else -1.0)
    rows = []
    for title, r in chosen:
        more = f" (the first {MOST} of {len(r.response_ids)} tokens)" if len(r.response_ids) > MOST else ""
        rows.append({"caption": f"{title}: {'right' if r.correct else 'wrong'}{more}",
                     "prompt": tokenizer.decode(r.problem.prompt_ids),
                     "tokens": list(token_texts(list(r.response_ids[:MOST]), tokenizer))}
                    | {view: r.measures[view][:MOST].tolist() for view in VIEWS if view in r.measures})  # fmt: skip
    return rows, note


# ---------------------------------------------------------------------------------------------------- The command
def run_tokens(cfg: TokensConfig) -> None:
    check(cfg)
    out = Path(cfg.out)
    with explain(f"making the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)
    policy = fipo.Policy(cfg.trained, cfg)
    eos, tokenizer, tolerance = policy.eos, policy.tokenizer, policy.tolerance
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    trained = write(fipo.HFSampler(policy), "trained", problems, cfg)
    del policy  # one model after the other is in memory
    policy = fipo.Policy(cfg.base, cfg)
    policy.eos = eos  # prompts and EOS are the trained model's for both
    written = {"base": write(fipo.HFSampler(policy), "base", problems, cfg), "trained": trained}
    del policy
    updated = list(last_update_of(cfg.trained))
    measure([*written["base"], *trained, *updated], cfg)
    found = {"settings": asdict(cfg)} | {who: summarize(who, rs, tokenizer, tolerance) for who, rs in written.items()}
    found["token_map"], note = choose_for_map(written, updated, tokenizer)
    (out / "metrics.json").write_text(json.dumps(found, indent=1))
    (out / "token_map.html").write_text(token_map(found["token_map"], note), encoding="utf-8")
    most = max((row for row in found["token_map"] if "F" in row), key=lambda row: max(map(abs, row["F"])))
    draw_token_map(most, out / "token_map.png")
    draw_histograms(written, out / "histograms.png")
    if cfg.replacement:
        rows, accuracy = replace_tokens(problems, written, cfg), {who: found[who]["accuracy"] for who in written}
        needed = {c: fraction_needed(curve(rows, "base", c, accuracy["base"]), accuracy["trained"]) for c in CRITERIA}
        shares = (f"{CRITERIA[c]} {f'{x[0]:.1%} to {x[1]:.1%}' if x else 'not reached'}" for c, x in needed.items())
        say("tokens to replace in the base model's responses for 95 % of the way to the trained model's accuracy: "
            + ", ".join(shares))  # fmt: skip
        found |= {"replacement": rows, "fraction_needed": needed}
        (out / "metrics.json").write_text(json.dumps(found, indent=1))
        draw_replacement(rows, accuracy, out / "replacement.png")
    say(f"numbers, token map and pictures: {out}")


def main(argv: list[str]) -> None:
    usage = "python scripts/tokens.py [--help] [--SETTING VALUE …]"
    parser = HfArgumentParser(TokensConfig, usage=usage, description=__doc__.split("\n\n")[1], allow_abbrev=False)
    with fipo.one_clear_sentence():
        run_tokens(TokensConfig(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main(sys.argv[1:])

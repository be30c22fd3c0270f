"""Which tokens did RL change? Compares a model before and after training, token by token.

Both models write responses to the same problems, and both score every token of all responses.
Δ(RL − base) = log π_RL − log π_base is signed (arXiv 2603.22117). It is compared with KL and
entropy, which are not. All are in nats, at temperature 1, over the whole vocabulary.
Δ(RL − base) spans the whole training, whereas Δ, as in fipo.py, spans the updates on one batch.
Token replacement then tests which of these measures finds the tokens that matter: one model
writes, and wherever a criterion fires, that one token is drawn from the other model. How few
replaced tokens bring the base model to the trained model's accuracy?

  python scripts/tokens.py --base DIR --trained DIR --data FILE --out DIR

writes metrics.json, replacement.png and token_map.html. If --trained is a checkpoint of fipo.py,
the map also has the last update's Δ, F and f, and token_map.png shows them for one response.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import textwrap
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal

import jinja2  # installed with torch
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, DynamicCache

sys.path.insert(0, str(Path(__file__).parents[1]))
import fipo  # noqa: E402
from fipo import (  # noqa: E402
    Problem,
    derive_seed,
    progress,
    require,
    sample_token,
    say,
    setting,
    user_error,
)


# --------------------------------------------------------------------------------------- Settings
@dataclass
class TokensConfig(fipo.SharedConfig):
    base: str = setting("", "model folder or hub name before training")
    trained: str = setting(
        "", "the same model after training, for example OUT/checkpoints/step_000400"
    )
    problems: int = setting(128, "use only the first N problems of --data (0: all)")
    seeds: int = setting(3, "responses per problem; spreads are taken over them", least=1)
    tokens_per_micro_batch: int = setting(
        32768, "tokens per forward pass of scoring, padding included", least=1
    )
    replacement: bool = setting(True, "run token replacement, which holds both models in memory")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "float32", "compute dtype; the rounding of bfloat16 is visible in Δ(RL − base)"
    )


def check_settings(cfg: TokensConfig) -> None:
    fipo.check_values(cfg, "base", "trained", "data", "out")
    is_single = os.environ.get("WORLD_SIZE", "1") == "1"
    require(is_single, "the token study runs in one process: start it with python.")
    require(
        vocabulary(cfg.base) == vocabulary(cfg.trained),
        f"{cfg.base} and {cfg.trained} have different tokenizers or vocabularies: Δ(RL − base) "
        "compares the same tokens, so --trained must be a model that was trained from --base.",
    )


def vocabulary(path: str) -> tuple[int, dict[str, int]]:
    """Return the vocabulary size of a model and the token ids of its tokenizer."""
    with user_error(f"reading the tokenizer of {path!r}, a model folder or hub name,"):
        size = AutoConfig.from_pretrained(path).get_text_config().vocab_size
        return size, AutoTokenizer.from_pretrained(path).get_vocab()


# --------------------------------------------------------------------------------------- Measures
# delta_logp is Δ(RL − base), and kl is KL(π_RL ‖ π_base).
MEASURES = ("delta_logp", "kl", "entropy_base", "entropy_trained")


@dataclass
class Response(fipo.Rollout):
    """A rollout with what this study measures at its tokens."""

    measures: dict[str, Tensor] = field(default_factory=dict)  # [T] each
    replaced: int = 0  # number of tokens that came from the other model


Written = dict[str, list[Response]]  # by the model that wrote them, "base" or "trained"
Row = dict[str, Any]


def entropy(p: Tensor) -> Tensor:
    """Return the entropy from the log-probs p. [N, V] -> [N]."""
    return -(p.exp() * p).sum(-1)


def compare(base: Tensor, trained: Tensor, token: Tensor) -> dict[str, Tensor]:
    """Return the MEASURES, and the log-prob of the token under each model.

    The arguments are the log-probs of both models and the token. [N, V], [N, V], [N] -> [N] each.
    """
    base_logp = base.gather(1, token[:, None])[:, 0]
    trained_logp = trained.gather(1, token[:, None])[:, 0]
    return {
        "delta_logp": trained_logp - base_logp,
        "kl": (trained.exp() * (trained - base)).sum(-1),
        "entropy_base": entropy(base),
        "entropy_trained": entropy(trained),
        "base": base_logp,
        "trained": trained_logp,
    }


def hidden_states(policy: fipo.Policy, parts: list[list[Response]]) -> Iterator[Tensor]:
    """Yield the states from which the head predicts the tokens of each response, [T, D]."""
    for part in progress(parts, desc="score"):
        ids, mask, *_ = fipo.collate(part, policy.device)
        with policy.autocast():
            hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for row, predicts_response in zip(hidden[:, :-1], mask[:, 1:]):
            yield row[predicts_response]


@torch.no_grad()
def measure(responses: list[Response], cfg: TokensConfig, chunk: int = 256) -> None:
    """Fill in `measures`, with logits of `chunk` tokens at a time.

    Only one model is in memory at a time. The hidden states of the base model wait on the host for
    the trained model to be scored, and its head stays on the device.
    """
    parts = fipo.micro_batches(responses, cfg.tokens_per_micro_batch)
    policy = fipo.Policy(cfg.base, cfg)
    base_head = policy.model.get_output_embeddings()
    base_states = [states.cpu() for states in hidden_states(policy, parts)]
    del policy
    policy = fipo.Policy(cfg.trained, cfg)
    trained_head = policy.model.get_output_embeddings()
    trained_states = hidden_states(policy, parts)
    for r, base, trained in zip(itertools.chain(*parts), base_states, trained_states):
        token = torch.tensor(r.response_ids, device=policy.device)
        states = zip(base.to(policy.device).split(chunk), trained.split(chunk), token.split(chunk))
        chunks = []
        for base_chunk, trained_chunk, token_chunk in states:
            base_logp = base_head(base_chunk).float().log_softmax(-1)  # [chunk, V]
            trained_logp = trained_head(trained_chunk).float().log_softmax(-1)
            chunks.append(compare(base_logp, trained_logp, token_chunk))
        for name in chunks[0]:
            r.measures[name] = torch.cat([values[name] for values in chunks]).cpu()


def values_of(responses: list[Response], name: str) -> Tensor:
    return torch.cat([r.measures[name] for r in responses])


def extremes(responses: list[Response], tokenizer: Any, sign: int) -> list[Row]:
    """Return the 20 tokens with the largest sign · Δ(RL − base), each between its neighbours.

    A token that occurs again in the same context is listed once.
    """
    places = []
    for r in responses:
        for i, delta_logp in enumerate(r.measures["delta_logp"].tolist()):
            places.append((delta_logp, r, i))
    places.sort(key=lambda place: -sign * place[0])
    rows = {}
    for delta_logp, r, i in places:
        ids = [*r.problem.prompt_ids, *r.response_ids]
        at = len(r.problem.prompt_ids) + i
        row = {
            "delta_logp": delta_logp,
            "before": tokenizer.decode(ids[max(at - 24, 0) : at]),
            "token": tokenizer.decode(ids[at]),
            "after": tokenizer.decode(ids[at + 1 : at + 9]),
        }
        rows.setdefault((row["before"], row["token"]), row)
        if len(rows) == 20:
            break
    return list(rows.values())


def summarize(who: str, responses: list[Response], tokenizer: Any, tolerance: float) -> Row:
    """Report the responses that a model wrote, and return their part of metrics.json."""
    sampled = torch.cat([torch.tensor(r.sampler_logp) for r in responses])
    error = (values_of(responses, who) - sampled).abs().mean().item()
    require(
        error <= tolerance,
        f"the log-probs of the {who} model differ by {error:.2g} a token between sampling and "
        "scoring: it scales or caps its logits, which the token study does not support.",
    )
    share_below = {}
    for name in MEASURES:
        size = values_of(responses, name).abs()
        share_below[name] = {str(x): (size < x).float().mean().item() for x in (0.01, 0.1, 1)}
    accuracy = fmean(r.correct for r in responses)
    length = fmean(len(r.response_ids) for r in responses)
    shares = [f"{share:.1%} below {x}" for x, share in share_below["delta_logp"].items()]
    say(
        f"written by the {who} model: accuracy {accuracy:.1%}, mean length {length:.1f}, "
        f"|Δ(RL − base)| of tokens: {', '.join(shares)}"
    )
    return {
        "accuracy": accuracy,
        "response_length": length,
        "share_below": share_below,
        "smallest_delta_logp": extremes(responses, tokenizer, -1),
        "largest_delta_logp": extremes(responses, tokenizer, 1),
    }


# ------------------------------------------------------------------------------ Token replacement
CRITERIA = {
    "delta_logp": "Δ(RL − base)",
    "kl": "KL",
    "entropy": "entropy of the writer",
    "random": "random",
}
FRACTIONS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.3)  # of the writer's own tokens


def score(writer: str, criterion: str, measures: dict[str, Tensor]) -> Tensor:
    """Return the score of each token. A criterion fires where it reaches the threshold."""
    if criterion in ("kl", "random"):
        return measures[criterion]
    if criterion == "entropy":
        return measures[f"entropy_{writer}"]
    # Δ(RL − base), with the sign that makes it high where the other model likes the token less.
    return -measures["delta_logp"] if writer == "base" else measures["delta_logp"]


def rules(written: Written) -> Iterator[tuple[str, str, float]]:
    """Yield the writer, the criterion and the threshold of each point of the curves.

    The thresholds are such that a criterion fires on FRACTIONS of what the writer writes by itself.
    """
    shares = [1 - fraction for fraction in FRACTIONS]
    for writer, criterion in itertools.product(written, CRITERIA):
        thresholds = shares  # the random criterion compares them with uniform random numbers
        if criterion != "random":
            measures = {name: values_of(written[writer], name) for name in MEASURES}
            scores = score(writer, criterion, measures).sort().values
            thresholds = [scores[int(share * len(scores))].item() for share in shares]
        for threshold in thresholds:
            # A threshold of 0 would replace tokens that RL did not change.
            if threshold > 0:
                yield writer, criterion, threshold


def uniform(seeds: list[int], n: int, max_tokens: int, device: torch.device) -> Tensor:
    """Return random numbers in [0, 1) for `n` responses per seed, [R, max_tokens]."""
    numbers = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        numbers.append(torch.rand(n, max_tokens, generator=generator))
    return torch.cat(numbers).to(device)


@dataclass
class ReplacingSampler:
    """Samples from `writer` and, where the criterion fires, draws the token from the other model.

    It has the interface that `fipo.sample` expects of a sampler. Each model draws with its own
    random numbers. Up to the first replacement, a response is what the writer writes by itself.
    """

    pair: dict[str, fipo.Policy]  # "base" and "trained"
    writer: str
    criterion: str
    threshold: float
    ranks: ClassVar[int] = 1

    @property
    def policy(self) -> fipo.Policy:
        return self.pair["trained"]

    @torch.no_grad()
    def generate(
        self,
        problems: list[Problem],
        seeds: list[int],
        n: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[list[Response]]:
        """Sample `n` responses to each problem, as HFSampler.generate does with one model."""
        device = self.policy.device
        eos = torch.tensor(self.policy.eos, device=device)
        models = [self.pair[who].model.eval() for who in ("base", "trained")]

        # 1) Random numbers for the writer, the other model and the random criterion.
        other_seeds = [derive_seed(seed, "other") for seed in seeds]
        random_seeds = [derive_seed(seed, "random") for seed in seeds]
        own_u = uniform(seeds, n, max_tokens, device)  # [R, max_tokens]
        other_u = uniform(other_seeds, n, max_tokens, device)
        random_u = uniform(random_seeds, n, max_tokens, device)

        # 2) One row per response, padded on the left so that all rows grow at the same column.
        groups = []
        prompts = []
        for problem in problems:
            groups.append([Response(problem) for _ in range(n)])
            prompts += [torch.tensor(problem.prompt_ids, device=device)] * n
        responses = list(itertools.chain(*groups))
        ones = [torch.ones_like(prompt) for prompt in prompts]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")  # [R, L]
        mask = pad_sequence(ones, batch_first=True, padding_side="left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        caches = [DynamicCache(config=model.config) for model in models]
        row = torch.arange(len(responses), device=device)  # the response of each row

        for step in range(max_tokens):
            # 3) The log-probs of the next token under both models.
            inputs = dict(input_ids=ids, position_ids=positions, attention_mask=mask)
            logps = []
            for model, cache in zip(models, caches):
                with self.policy.autocast():
                    output = model(
                        **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
                logits = output.logits[:, -1].float()
                logps.append((logits / temperature).log_softmax(-1))  # [rows, V]
            own, other = logps if self.writer == "base" else reversed(logps)

            # 4) The writer's token, or the other model's where the criterion fires.
            token, logp = sample_token(own, top_p, own_u[row, step])
            measures = compare(*logps, token) | {"random": random_u[row, step]}
            fires = score(self.writer, self.criterion, measures) >= self.threshold
            new_token, new_logp = sample_token(other, top_p, other_u[row, step])
            token = torch.where(fires, new_token, token)
            logp = torch.where(fires, new_logp, logp)
            columns = (row.tolist(), token.tolist(), logp.tolist(), fires.tolist())
            for i, token_id, token_logp, is_replaced in zip(*columns):
                responses[i].response_ids.append(token_id)
                responses[i].sampler_logp.append(token_logp)
                responses[i].replaced += is_replaced

            # 5) Finished rows leave the batch.
            alive = ~torch.isin(token, eos)
            if not alive.any():
                break
            if not alive.all():
                row = row[alive]
                token = token[alive]
                mask = mask[alive]
                for cache in caches:
                    cache.batch_select_indices(alive)
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(ids.shape)], 1)
            positions = mask.sum(1, keepdim=True) - 1
        return groups


def write(sampler: Any, who: str, problems: list[Problem], cfg: TokensConfig) -> list[Response]:
    """Return `cfg.seeds` responses to each problem: all of the first seed, then of the next one.

    The random numbers depend on `who` writes, but not on the sampler.
    """
    purpose = (cfg.seed, "tokens", who)
    groups = fipo.sample(sampler, problems, purpose, cfg, cfg.seeds, 1.0, 1.0)
    by_seed = itertools.chain(*zip(*groups))
    return [Response(**vars(r)) for r in by_seed]


def replace_tokens(problems: list[Problem], written: Written, cfg: TokensConfig) -> list[Row]:
    """Return, for each rule, the fraction replaced and the accuracy, with one value per seed."""
    pair = {"base": fipo.Policy(cfg.base, cfg), "trained": fipo.Policy(cfg.trained, cfg)}
    rows = []
    for writer, criterion, threshold in progress(list(rules(written)), desc="replace"):
        sampler = ReplacingSampler(pair, writer, criterion, threshold)
        responses = write(sampler, writer, problems, cfg)
        fractions = []
        accuracies = []
        for start in range(0, len(responses), len(problems)):
            seed = responses[start : start + len(problems)]
            tokens = sum(len(r.response_ids) for r in seed)
            fractions.append(sum(r.replaced for r in seed) / tokens)
            accuracies.append(fmean(r.correct for r in seed))
        row = {"writer": writer, "criterion": criterion, "threshold": threshold}
        rows.append(row | {"fraction": fractions, "accuracy": accuracies})
    return rows


Point = tuple[float, float, float]  # fraction replaced, accuracy, its deviation over seeds


def curve(rows: list[Row], writer: str, criterion: str, start: float) -> list[Point]:
    """Return the points of a curve. The first is the writer alone, whose accuracy is `start`."""
    points = [(0.0, start, 0.0)]
    for row in rows:
        if (row["writer"], row["criterion"]) == (writer, criterion):
            accuracy = row["accuracy"]
            deviation = stdev(accuracy) if len(accuracy) > 1 else 0.0
            points.append((fmean(row["fraction"]), fmean(accuracy), deviation))
    return points


def fraction_needed(
    points: list[Point], end: float, share: float = 0.95
) -> tuple[float, float] | None:
    """Return the two fractions between which a curve first covers `share` of its way to `end`.

    The result is None if it never does, or if the curve starts at `end`.
    """
    start = points[0][1]
    if start == end:
        return None
    for (before, *_), (after, accuracy, _) in itertools.pairwise(points):
        if (accuracy - start) / (end - start) >= share - 1e-9:
            return min(before, after), after
    return None


def draw_replacement(rows: list[Row], accuracy: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, writer, other in zip(panels, accuracy, reversed(accuracy)):
        for marker, (criterion, name) in zip("os^D", CRITERIA.items()):
            points = 100 * torch.tensor(curve(rows, writer, criterion, accuracy[writer]))
            axes.errorbar(*points.T, label=name, marker=marker, ms=4, capsize=2)
        for who, level in accuracy.items():
            axes.axhline(100 * level, color="0.5", ls="--")
            transform = axes.get_yaxis_transform()
            axes.text(1.02, 100 * level, f"{who}\nalone", transform=transform, va="center")
        title = f"The {writer} model writes,\ntokens come from the {other} model"
        axes.set(title=title, xlabel="tokens replaced, %", ylim=(0, 106))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    handles = panels[0].get_legend_handles_labels()
    title = (
        "A curve folds back where the replacements make responses longer,\n"
        "so that the replaced tokens are a smaller share of them."
    )
    figure.legend(*handles, loc="outside lower center", ncols=len(CRITERIA), title=title)
    figure.savefig(path, dpi=160)


# ---------------------------------------------------------------------------------- The token map
VIEWS = {"delta_logp": "Δ(RL − base)", "delta": "Δ", "F": "F", "f": "f"}
# The views of token_map.png.
PANELS = {
    "delta": "Δ: how much more likely the token has become (log π_θ − log π_old)",
    "F": "F: Δ summed from the end, with decay; the framed token's Δ carries back",
    "f": "f: the factor by which the token's advantage is multiplied",
}
MAX_TOKENS = 2000  # of a response in the token map; more would slow the browser down
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token map</title><style>
body { font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
h3 { margin-bottom: 0 }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc }
input { margin-left: 2em }
p { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
.prompt { color: #777; font-size: 80%; line-height: 1.4; max-height: 20em; overflow: auto;
  margin: .3em 0 }
i { font-style: normal; border-bottom: 3px none #000; box-shadow: -1px 0 #eee; padding: .1em 0 }
.legend { display: none } .legend b { font-weight: normal; padding: .2em 1em }
* { print-color-adjust: exact; -webkit-print-color-adjust: exact }
{% for view in views -%}
body:has(#{{ view }}:checked) i {
  background: var(--{{ view }}); border-bottom-style: var(--{{ view }}-line) }
#{{ view }}:checked ~ .{{ view }} { display: block }
{% endfor -%}
</style><h2>Which tokens did RL change?</h2><div>Δ(RL − base) = log π_RL − log π_base.
Δ, F and f are those of the last update in training, of responses that it trained on. A token is
underlined if its value is above the neutral value, with dots if it is below. Each view has its own
scale. Point at a token to see its values.</div>
<header>Colour by
{%- for view, name in views.items() %}
<input type="radio" name="view" id="{{ view }}"{% if loop.first %} checked{% endif %}>
<label for="{{ view }}">{{ name }}</label>
{%- endfor %}
{%- for view, scale in scales.items() %}
<div class="legend {{ view }}">{{ views[view] }}: {% for value, place in scale.ends.items() -%}
<b style="background:{{ shade(place) }}">{{ "%.3g" | format(value) }}</b>{% endfor %}</div>
{%- endfor %}</header>
{%- for row in rows %}
<h3>{{ row.caption }}, {{ row.verdict }}</h3><p class="prompt">{{ row.prompt.strip() }}</p><p>
{%- for token in row.tokens -%}
{%- set i = loop.index0 -%}
<i style="
{%- for view, scale in scales.items() if view in row -%}
{%- set place = scale.place(row[view][i]) -%}
--{{ view }}:{{ shade(place) }};--{{ view }}-line:{{ underline(place) }};
{%- endfor %}" title="{{ repr(token) }}:
{%- for view, name in views.items() if view in row %} {{ name }} {{ "%.6g" | format(row[view][i]) }}
{%- if not loop.last %},{% endif %}{% endfor %}">{{ visible(token) }}</i>
{%- endfor %}</p>
{%- endfor %}</html>"""


def token_texts(ids: list[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text that each token adds to the tokens before it.

    A character that consists of several tokens appears at the last one, and as ▯ at the others.
    """
    for i in range(len(ids)):
        first = max(i - 8, 0)
        before = tokenizer.decode(ids[first:i]).rstrip("\ufffd")
        text = tokenizer.decode(ids[first : i + 1]).rstrip("\ufffd")
        yield text[len(before) :] or "▯"


def visible(token: str) -> str:
    """Replace line breaks, tabs, and the spaces of a blank token by visible characters."""
    if not token.strip(" "):
        token = "·" * len(token)
    return token.replace("\t", "⇥").replace("\n", "⏎\n")


def shade(place: float) -> str:
    """Return the colour of a place between −1 (blue) and 1 (orange), with white at 0.

    Blue and orange can be told apart with every kind of colour-blindness.
    """
    full = (230, 97, 1) if place > 0 else (44, 123, 182)
    strength = abs(place) ** 0.5  # the root makes small values visible
    return "#" + "".join(f"{round(255 + (c - 255) * strength):02x}" for c in full)


def underline(place: float) -> str:
    """Return the style of the line under a token. It shows the sign in black and white."""
    if abs(place) < 0.01:
        return "none"
    return "solid" if place > 0 else "dotted"


COLOURS = ListedColormap([shade(percent / 100) for percent in range(-100, 101)])


class Scale:
    """Maps the values of a view to places between −1 and 1, with the neutral value at 0.

    `ends` holds the places of the smallest, the neutral and the largest value, in this order. A
    smallest or largest value next to the neutral one is left out.
    """

    def __init__(self, rows: list[Row], view: str) -> None:
        self.neutral = 1.0 if view == "f" else 0.0
        values = [self.neutral]
        for row in rows:
            values += row.get(view, [])
        # Values within 0.01 of the neutral one are negligible, so they must stay near white.
        self.largest = max(0.01, max(values) - self.neutral, self.neutral - min(values))
        self.ends = {}
        for value in (min(values), self.neutral, max(values)):
            if value == self.neutral or abs(self.place(value)) >= 0.01:
                self.ends[value] = self.place(value)

    def place(self, value: float) -> float:
        return (value - self.neutral) / self.largest


def token_map(rows: list[Row]) -> str:
    """Return an HTML page of responses, each with a caption, a prompt, tokens and VIEWS.

    The page needs no script: CSS switches between the views.
    """
    template = jinja2.Template(PAGE, autoescape=True)
    scales = {view: Scale(rows, view) for view in VIEWS}
    functions = dict(repr=repr, shade=shade, underline=underline, visible=visible)
    return template.render(rows=rows, views=VIEWS, scales=scales, **functions)


def lay_out(tokens: list[str], columns: int, max_lines: int) -> list[tuple[str, int, int]]:
    """Return the text, the column and the line of each token that fits into `max_lines` lines."""
    placed = []
    column = 0
    line = 0
    for token in tokens:
        text = visible(token).replace("\n", "")
        if column + len(text) > columns:
            column = 0
            line += 1
        if line == max_lines:
            break
        placed.append((text, column, line))
        column += len(text)
        if "\n" in token:
            column = columns  # the next token begins a new line
    return placed


def draw_token_map(row: Row, path: Path) -> None:
    """Draw the first lines of one response of the token map, with a panel for each of PANELS.

    A frame marks the token at which F changes most. An arrow leads from it to the tokens before it,
    to which F carries this change back.
    """
    placed = lay_out(row["tokens"], columns=90, max_lines=10)
    lines = placed[-1][2] + 1
    width = max(column + len(text) for text, column, _ in placed)
    F = [*row["F"], 0.0]
    source = max(range(len(placed)), key=lambda i: abs(F[i] - F[i + 1]) if i else 0.0)
    title = f"{row['question']}\n{row['verdict']}"
    if len(placed) < len(row["tokens"]):
        title += f" ({len(row['tokens']) - len(placed)} more tokens)"
    size = (max(0.11 * width, 6), (0.34 * lines + 0.35) * len(PANELS) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    panels = figure.subplots(len(PANELS), 2, width_ratios=(60, 1))
    for (axes, bar), (view, name) in zip(panels, PANELS.items()):
        # 1) The tokens, and in the panel of F an arrow under those that the change reaches.
        scale = Scale([row], view)
        for i, ((text, column, line), value) in enumerate(zip(placed, row[view])):
            frame = dict(ec="0.85", lw=0.5)
            if i == source > 0:
                frame = dict(ec="black", lw=1.5, zorder=2)
            colour = shade(scale.place(value))
            axes.barh(line, len(text), 0.7, column, align="edge", fc=colour, **frame)
            centre = (column + len(text) / 2, line + 0.37)
            font = dict(family="monospace", ha="center", va="center", parse_math=False)
            axes.text(*centre, text, **font)
            if view == "F" and i < source:
                style = dict(arrowstyle="-" if column else "->", shrinkA=0, shrinkB=0)
                start = (column + len(text), line + 0.85)
                axes.annotate("", (column, line + 0.85), start, arrowprops=style)
        # 2) The scale.
        if len(scale.ends) > 1:
            norm = CenteredNorm(scale.neutral, scale.largest)
            figure.colorbar(ScalarMappable(norm, COLOURS), cax=bar)
            bar.set_ylim(min(scale.ends), max(scale.ends))  # the values that occur
            bar.locator_params(nbins=3)
        else:
            bar.axis("off")
            if min(F) < -0.01 and max(F) < 0.01:
                name += " (F < 0 → f = 1, as DAPO)"
        axes.set_title(name, loc="left", fontsize="small")
        axes.set(xlim=(-0.1, width + 0.1), ylim=(lines, -0.1))
        axes.axis("off")
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, without a warning.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=130)


def add_weights(r: Response, delta_logp: Tensor, advantage: float, **settings: Any) -> None:
    """Add Δ, F and f of a response to its measures, as the loss computes them."""
    delta = delta_logp.clamp(-20.0, 20.0)[None]  # [1, T]
    mask = torch.ones_like(delta).bool()
    F, f = fipo.influence_weight(delta, torch.tensor([[advantage]]), mask, **settings)
    r.measures |= {"delta": delta[0], "F": F[0], "f": f[0]}


def last_update_of(trained: str) -> list[Response]:
    """Return the responses that a run logged for the last update before a checkpoint.

    They have Δ, F and f of this update. There are none if `trained` is not a checkpoint of a run
    with logs.
    """
    checkpoint = Path(trained).resolve()
    run = checkpoint.parent.parent
    if not ((checkpoint / "state.json").exists() and (run / "samples.jsonl").exists()):
        return []
    responses = []
    with user_error(f"reading config.json and samples.jsonl in {run}"):
        state = json.loads((checkpoint / "state.json").read_text())
        config = json.loads((run / "config.json").read_text())
        settings = {
            "tau": config["tau"],
            "safety": config["safety"],
            # JSON has no infinity, so it is stored as text.
            "weight_range": [float(bound) for bound in config["weight_range"]],
            "dual_clip": float(config["dual_clip"]),
        }
        for line in (run / "samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            # Log-probs are logged only for responses that rank 0 trained on.
            if row["kind"] != "train" or row["step"] != state["step"] or "logp" not in row:
                continue
            problem = Problem(row["prompt"], row["answer"], row["prompt_ids"])
            ids = array("i", row["response_ids"])
            r = Response(problem, ids, text=row["response"], correct=row["correct"])
            delta_logp = torch.tensor(row["logp"]) - torch.tensor(row["old_logp"])
            add_weights(r, delta_logp, row["advantage"], **settings)
            responses.append(r)
    return responses


def question(problem: Problem) -> str:
    """Return the last line of a prompt, without the instructions that fipo.py adds to it."""
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    before, after = fipo.QUESTION.split("{question}")
    lines = prompt.removeprefix(before).removesuffix(after).strip().split("\n")
    return textwrap.shorten(lines[-1], 70)


def verdict(r: Response) -> str:
    if r.correct:
        return "right"
    answered = fipo.extract_answer(r.text) or 'nothing after "Answer:"'
    return textwrap.shorten(f"wrong: answered {answered}, right is {r.problem.answer}", 70)


def choose_for_map(written: Written, updated: list[Response], tokenizer: Any) -> list[Row]:
    """Return the rows of the token map: responses of the last update, then three of each model.

    The first is the one with the largest |F|.
    """
    # Late in a run, many responses are identical.
    distinct = {(*r.problem.prompt_ids, *r.response_ids): r for r in updated}
    by_influence = sorted(distinct.values(), key=lambda r: -r.measures["F"].abs().max())
    chosen = [("trained on in the last update", r) for r in by_influence]
    for who, responses in written.items():
        chosen += [(f"written by the {who} model", r) for r in responses[:3]]
    rows = []
    for title, r in chosen:
        if len(r.response_ids) > MAX_TOKENS:
            title += f" (the first {MAX_TOKENS} of {len(r.response_ids)} tokens)"
        row = {
            "caption": title,
            "question": question(r.problem),
            "verdict": verdict(r),
            "prompt": tokenizer.decode(r.problem.prompt_ids),
            "tokens": list(token_texts(list(r.response_ids[:MAX_TOKENS]), tokenizer)),
        }
        for view in VIEWS:
            if view in r.measures:
                row[view] = r.measures[view][:MAX_TOKENS].tolist()
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------ The command
def run_tokens(cfg: TokensConfig) -> None:
    check_settings(cfg)
    out = Path(cfg.out)
    with user_error(f"making the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)

    # 1) Both models write responses, one model in memory at a time. Both use the prompts and the
    #    EOS tokens of the trained model.
    policy = fipo.Policy(cfg.trained, cfg)
    tokenizer = policy.tokenizer
    tolerance = policy.tolerance
    eos = policy.eos
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    trained = write(fipo.HFSampler(policy), "trained", problems, cfg)
    del policy
    policy = fipo.Policy(cfg.base, cfg)
    policy.eos = eos
    base = write(fipo.HFSampler(policy), "base", problems, cfg)
    del policy
    written = {"base": base, "trained": trained}

    # 2) Both models score all responses.
    updated = last_update_of(cfg.trained)
    measure([*base, *trained, *updated], cfg)
    metrics = {"settings": asdict(cfg)}
    for who, responses in written.items():
        metrics[who] = summarize(who, responses, tokenizer, tolerance)
    map_rows = choose_for_map(written, updated, tokenizer)
    metrics["token_map"] = map_rows
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (out / "token_map.html").write_text(token_map(map_rows), encoding="utf-8")
    if updated:
        draw_token_map(map_rows[0], out / "token_map.png")

    # 3) Token replacement, with both models in memory.
    if cfg.replacement:
        rows = replace_tokens(problems, written, cfg)
        accuracy = {who: metrics[who]["accuracy"] for who in written}
        needed = {}
        ranges = []
        for criterion, name in CRITERIA.items():
            points = curve(rows, "base", criterion, accuracy["base"])
            needed[criterion] = fraction_needed(points, accuracy["trained"])
            if needed[criterion]:
                ranges.append("{} {:.1%} to {:.1%}".format(name, *needed[criterion]))
            else:
                ranges.append(f"{name} not reached")
        say(
            "tokens to replace in the base model's responses for 95 % of the way to the trained "
            f"model's accuracy: {', '.join(ranges)}"
        )
        metrics |= {"replacement": rows, "fraction_needed": needed}
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
        draw_replacement(rows, accuracy, out / "replacement.png")
    say(f"numbers, token map and pictures: {out}")


def main(argv: list[str]) -> None:
    parser = fipo.Parser(
        TokensConfig,
        usage="python scripts/tokens.py [--help] [--SETTING VALUE …]",
        description=__doc__.split("\n\n")[1],
        allow_abbrev=False,
    )
    with fipo.report_errors():
        settings = parser.parse_args(argv)
        run_tokens(TokensConfig(**vars(settings)))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Compares the memory of fipo.token_logprobs with that of full logits, for growing lengths.

python scripts/bench_memory.py          # four minutes on two cores, 10 GB
python scripts/bench_memory.py whole    # about thirty minutes

The first command writes assets/results/memory.csv, the second assets/results/memory_20k.csv.

Each case is one forward and backward pass. The model has the head of Qwen2.5-0.5B (151,936 × 896,
tied) and one of its layers, so that the vocabulary dominates. Each case runs in its own process.
Its peak is the largest resident set, less the memory used before the pass. `whole` has all 24
layers, 20,480 tokens and gradient checkpointing. Its peak includes weights and gradients.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pandas
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from fipo import token_logprobs

RESULTS = Path(__file__).parents[1] / "assets" / "results"
VOCABULARY = 151_936
CASES = {
    "layer": [
        ("chunks", 1024),
        ("chunks", 2048),
        ("chunks", 4096),
        ("chunks", 8192),
        ("full logits", 1024),
        ("full logits", 2048),
        ("full logits", 4096),
    ],
    "whole": [("whole", 20480)],
}


def full_logits(model: Qwen2ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probs of the tokens the plain way, by way of [1, L, V] logits and their log-softmax."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    return logp[..., 0] * mask[:, 1:]


def make_model(method: str) -> Qwen2ForCausalLM:
    """A Qwen2 model with random weights, whose gradients exist before the pass as well as after."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24 if method == "whole" else 1,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    model = Qwen2ForCausalLM(config)
    if method == "whole":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    return model


def resident_gib() -> float:
    """The largest memory of this process so far."""
    return getrusage(RUSAGE_SELF).ru_maxrss / 2**20


def measure(method: str, length: int) -> dict[str, Any]:
    """Measure one forward and backward pass of `length` tokens."""
    torch.manual_seed(0)
    model = make_model(method)
    ids = torch.randint(VOCABULARY, (1, length))
    mask = torch.ones(1, length, dtype=torch.bool)
    before = 0.0 if method == "whole" else resident_gib()
    start = time.perf_counter()
    if method == "full logits":
        logp = full_logits(model, ids, mask)
    else:
        logp, _ = token_logprobs(model, ids, mask)
    logp.sum().backward()
    peak = resident_gib() - before
    squares = sum(weight.grad.double().square().sum() for weight in model.parameters())
    return {
        "method": method,
        "tokens": length,
        "peak_gib": peak,
        "seconds": time.perf_counter() - start,
        "gradient_norm": squares.sqrt().item(),
    }


def run_cases(name: str) -> None:
    """Measure each case in its own process and write the CSV."""
    rows = []
    for method, length in CASES[name]:
        words = [sys.executable, __file__, "--case", method, str(length)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    file = "memory_20k.csv" if name == "whole" else "memory.csv"
    pandas.DataFrame(rows).to_csv(RESULTS / file, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=CASES,
        default="layer",
        help="layer: one layer (default); whole: all 24 layers",
    )
    # One case, in the process that `run_cases` starts for it.
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        method, length = given.case
        print(json.dumps(measure(method, int(length))))
    else:
        run_cases(given.what)


if __name__ == "__main__":
    main()

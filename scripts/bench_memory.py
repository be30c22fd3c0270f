"""Memory of log-probs: token_logprobs against full logits, forward and backward, vocabulary 151,936, growing length.

python scripts/bench_memory.py          # writes assets/results/memory.csv; four minutes on two cores, 10 GB
python scripts/bench_memory.py whole    # writes assets/results/memory_20k.csv; about thirty minutes

The model has the head of Qwen2.5-0.5B (151,936 × 896, tied) and one of its layers, so that the vocabulary's part shows.
Each case is a process of its own; its peak is the largest resident set, less what it had before the pass. `whole` is
all 24 layers at 20,480 tokens with gradient checkpointing; its peak is that of the process, weights and gradients too.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import datasets
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from fipo import token_logprobs

RESULTS = Path(__file__).parents[1] / "assets" / "results"
V = 151_936
CASES = {
    "layer": [("chunks", 1024), ("chunks", 2048), ("chunks", 4096), ("chunks", 8192), ("full logits", 1024),
              ("full logits", 2048), ("full logits", 4096)],
    "whole": [("whole", 20480)],
}  # fmt: skip


def full_logits(model: Qwen2ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The plain way: [1, L, V] logits, their log-softmax, the tokens' entries."""
    logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]


def case(method: str, length: int) -> None:
    torch.manual_seed(0)
    layers = 24 if method == "whole" else 1
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=896, intermediate_size=4864,
                                         num_hidden_layers=layers, num_attention_heads=14, num_key_value_heads=2,
                                         tie_word_embeddings=True, max_position_embeddings=32768))  # fmt: skip
    if method == "whole":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for weight in model.parameters():  # the gradient's own memory is there before as well as after
        weight.grad = torch.zeros_like(weight)
    ids, mask = torch.randint(V, (1, length)), torch.ones(1, length, dtype=torch.bool)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    before = 0 if method == "whole" else before
    logp = full_logits(model, ids, mask) if method == "full logits" else token_logprobs(model, ids, mask)[0]
    logp.sum().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    norm = sum(w.grad.double().square().sum() for w in model.parameters()).sqrt().item()
    print(json.dumps({"method": method, "tokens": length, "peak_gib": (after - before) / 2**20,
                      "seconds": time.perf_counter() - start, "gradient_norm": norm}))  # fmt: skip


def main(what: str) -> None:
    rows: list[dict] = []
    for method, length in CASES[what]:
        words = [sys.executable, __file__, "--case", method, str(length)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    datasets.Dataset.from_list(rows).to_csv(RESULTS / ("memory_20k.csv" if what == "whole" else "memory.csv"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=CASES, default="layer", help="one layer (default), or all 24")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # one case, in a process of its own
    given = parser.parse_args()
    if given.case:
        case(given.case[0], int(given.case[1]))
    else:
        main(given.what)

"""Memory of log-probs: token_logprobs against full logits, forward and backward, vocabulary 151,936, growing length.

python tests/bench/memory.py          # writes assets/results/memory.csv; four minutes on two cores, 10 GB
python tests/bench/memory.py whole    # writes assets/results/memory_20k.csv; about twenty minutes

The model has the head of Qwen2.5-0.5B (151,936 × 896, tied) and one of its layers, so that the vocabulary's part shows.
Each case is a process of its own; its peak is the largest resident set, less what it had before the pass. `whole` is
all 24 layers at 20,480 tokens with gradient checkpointing; its peak is that of the process, weights and gradients too.
"""

import json
import resource
import subprocess
import sys
import time

import torch
from results import ROOT, write_csv
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(ROOT))

from fipo import token_logprobs  # noqa: E402

V = 151_936


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


def main(which: str) -> None:
    rows, cases = [], (("chunks", (1024, 2048, 4096, 8192)), ("full logits", (1024, 2048, 4096)))
    for method, lengths in cases if which == "memory" else (("whole", (20480,)),):
        for length in lengths:
            words = [sys.executable, __file__, method, str(length)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], flush=True)
    write_csv(f"{which}.csv", rows)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        case(sys.argv[1], int(sys.argv[2]))
    else:
        main("memory_20k" if sys.argv[1:] == ["whole"] else "memory")

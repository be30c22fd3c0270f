"""Measures how bfloat16 rounds Δlog p and F, with the head in bfloat16 and in float32.

python scripts/bench_rounding.py --model DIR --data gsm8k/train.jsonl

It takes a minute for 135M parameters on two cores. The responses are the answers of the first
problems in the file. One AdamW step with learning rate 1e-6 makes half of them more likely and the
others less likely. The reference is Δ in float32. Each weight is first moved by up to 0.4 %,
because the weights of a 4-bit model lie on a grid. On that grid, a step of 1e-6 decides how
bfloat16 rounds many weights, and Δ appears 15 times as large.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import fipo
from bench_memory import full_logits


def read_texts(tokenizer: Any, data: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and response_mask [n, L] of the first problems and their worked answers."""
    ids = []
    is_response = []
    for row in list(fipo.read_rows(data))[:n]:
        prompt = fipo.encode_prompt(row["question"], tokenizer)
        response = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        ids.append(torch.tensor(prompt + response))
        is_response.append(torch.arange(len(ids[-1])) >= len(prompt))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(is_response, batch_first=True)


@torch.no_grad()
def logprobs(
    model: torch.nn.Module, ids: torch.Tensor, is_response: torch.Tensor
) -> dict[str, torch.Tensor]:
    """log p [n, L] of the responses: in float32, and under autocast with each of the two heads."""
    exact, _ = fipo.token_logprobs(model, ids, is_response)
    with torch.autocast("cpu", torch.bfloat16):
        float32_head, _ = fipo.token_logprobs(model, ids, is_response)
        bfloat16_head = full_logits(model, ids, is_response)
    bfloat16_head = torch.nn.functional.pad(bfloat16_head, (1, 0))
    return {"exact": exact, "float32 head": float32_head, "bfloat16 head": bfloat16_head}


def update(model: torch.nn.Module, ids: torch.Tensor, is_response: torch.Tensor) -> None:
    """One AdamW step that makes every other response more likely and the rest less likely."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=0.1)
    advantages = torch.ones(len(ids), 1)
    advantages[1::2] = -1.0
    logp, _ = fipo.token_logprobs(model, ids, is_response)
    loss = -(logp * advantages).sum() / is_response.sum()
    loss.backward()
    optimizer.step()


def main(path: str, data: str, n: int) -> None:
    # 1) the model, off its grid, and the texts
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + (torch.rand_like(weight) - 0.5) / 128)
    ids, is_response = read_texts(tokenizer, data, n)

    # 2) Δ and F of one update
    old = logprobs(model, ids, is_response)
    update(model, ids, is_response)
    new = logprobs(model, ids, is_response)
    delta = {}
    F = {}
    for name in new:
        delta[name] = new[name] - old[name]
        F[name] = fipo.future_kl(delta[name], is_response)

    # 3) the means over all tokens
    def mean_size(values: torch.Tensor) -> float:
        return values[is_response].abs().mean().item()

    size = mean_size(delta["exact"])
    size_of_F = mean_size(F["exact"])
    print(f"{is_response.sum()} tokens; exact: mean |Δ| {size:.3f}, mean |F| {size_of_F:.3f}")
    for name in ("bfloat16 head", "float32 head"):
        error = mean_size(delta[name] - delta["exact"])
        error_of_F = mean_size(F[name] - F["exact"])
        print(f"{name}: mean error of Δ {error:.3f}, of F {error_of_F:.3f} (ln 1.2 = 0.182)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--responses", type=int, default=16, help="number of responses (16)")
    given = parser.parse_args()
    with fipo.report_errors():
        main(given.model, given.data, given.responses)

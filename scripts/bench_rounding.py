"""Rounding of Δlog p and F in bfloat16, with the head in bfloat16 and in float32.

python scripts/bench_rounding.py --model DIR --data gsm8k/train.jsonl     # a minute for 135M parameters on two cores

The responses are the answers of the first problems in the file. One AdamW step of size 1e-6 raises half of them and
lowers the others. The truth is Δ in float32. Each weight is first moved by up to 0.4 %, because the weights of a 4-bit
model lie on a grid. There, a step of 1e-6 decides how bfloat16 rounds many of them, and Δ seems 15 times as large.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import fipo


def read_texts(tokenizer: object, data: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and response_mask [n, L] of the first problems, with their worked answers as responses."""
    rows = list(fipo.read_rows(data))[:n]
    prompts = [fipo.encode_prompt(row["question"], tokenizer) for row in rows]
    responses = [tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in rows]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses))
    ids = torch.zeros(n, longest, dtype=torch.long)
    is_response = torch.zeros(n, longest, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        is_response[i, len(prompt) : end] = True
    return ids, is_response


def with_bfloat16_head(model: torch.nn.Module, ids: torch.Tensor, is_response: torch.Tensor) -> torch.Tensor:
    logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logp, (1, 0)) * is_response


@torch.no_grad()
def measure(model: torch.nn.Module, ids: torch.Tensor, is_response: torch.Tensor) -> dict[str, torch.Tensor]:
    exact, _ = fipo.token_logprobs(model, ids, is_response)
    with torch.autocast("cpu", torch.bfloat16):
        float32_head, _ = fipo.token_logprobs(model, ids, is_response)
        bfloat16_head = with_bfloat16_head(model, ids, is_response)
    return {"exact": exact, "float32 head": float32_head, "bfloat16 head": bfloat16_head}


def main(path: str, data: str, n: int) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + (torch.rand_like(weight) - 0.5) / 128)
    ids, is_response = read_texts(tokenizer, data, n)

    old = measure(model, ids, is_response)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=0.1)
    advantages = torch.tensor([1.0, -1.0]).repeat(n)[:n, None]
    logp, _ = fipo.token_logprobs(model, ids, is_response)
    (-(logp * advantages).sum() / is_response.sum()).backward()
    optimizer.step()
    new = measure(model, ids, is_response)

    delta = {name: new[name] - old[name] for name in new}
    F = {name: fipo.future_kl(delta[name], is_response) for name in delta}
    print(f"{is_response.sum()} tokens; exact: mean |Δ| {delta['exact'][is_response].abs().mean():.3f}, "
          f"mean |F| {F['exact'][is_response].abs().mean():.3f}")  # fmt: skip
    for name in ("bfloat16 head", "float32 head"):
        error = {what: (x[name] - x["exact"])[is_response].abs().mean() for what, x in (("Δ", delta), ("F", F))}
        print(f"{name}: mean error of Δ {error['Δ']:.3f}, of F {error['F']:.3f} (ln 1.2 = 0.182)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--responses", type=int, default=16, help="how many (16)")
    given = parser.parse_args()
    with fipo.report_errors():
        main(given.model, given.data, given.responses)

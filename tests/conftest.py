"""Shared pieces: a base model made in seconds (real signal, not a mock), and settings small enough for a laptop."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fipo  # noqa: E402
import train_small  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A Qwen2 folder that answers some sums right and most wrong: pretrained for 120 steps."""
    folder = tmp_path_factory.mktemp("base") / "model"
    train_small.pretrain(folder, steps=120)
    return str(folder)


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> str:
    """A file of sums the base model was not trained on."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    digits = train_small.all_problems()[train_small.FOR_RL][:64]
    write_jsonl(path, [{"prompt": train_small.question(d), "answer": str(sum(d))} for d in digits])
    return str(path)


@pytest.fixture
def small(base, sums, tmp_path) -> fipo.Config:
    """A run of two steps with two updates each, in seconds."""
    return fipo.Config(
        model=base, data=sums, out=str(tmp_path / "run"), steps=2, group_size=8, prompts_per_batch=4,
        prompts_per_mini_batch=2, max_prompt=16, max_response=32, overlong_buffer=8, lr=1e-4, warmup_steps=2,
        tokens_per_micro_batch=512, eval_samples=2, eval_every=2, save_every=2,
    )  # fmt: skip


def flags(cfg: fipo.EvalConfig) -> list[str]:
    """The command line that means `cfg`."""
    words: list[str] = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default:
            words += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def shared_data(name: str) -> str:
    """A public data file (GSM8K, AIME 2024) under FIPO_DATA; without it the test is skipped."""
    path = Path(os.environ.get("FIPO_DATA", "")) / name
    if not path.is_file():
        pytest.skip(f"FIPO_DATA does not hold {name}")
    return str(path)

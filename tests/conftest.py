"""Shared pieces: a base model made in seconds (real signal, not a mock), and settings small enough for a laptop."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # threads that spin stall one another where cores are shared
os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # read at import: without it, a missing model is sought for a minute

import psutil
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

ROOT = Path(__file__).parent.parent
EXTENSIONS = ROOT / ".pytest_cache" / "torch_extensions"  # DeepSpeed's, compiled once
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
ZERO_3 = str(ROOT / "ds_config.json")
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

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


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> str:
    """A Qwen2 folder with random weights that reads any text, as bytes."""
    folder = tmp_path_factory.mktemp("reader") / "model"
    end = "<|endoftext|>"
    vocabulary = {c: i for i, c in enumerate([end, *sorted(ByteLevel.alphabet())])}
    Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token=end, pad_token=end, unk_token=end
    ).save_pretrained(folder)
    config = Qwen2Config(vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
                         eos_token_id=0)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def tiny_composite(folder: Path) -> None:
    """A model whose config has parts, for text and for images, and names no context of its own."""
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = shape | dict(
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        max_position_embeddings=77,
        eos_token_id=0,
    )
    config = Gemma3Config(text_config=text, vision_config=shape | dict(image_size=28, patch_size=14),
                          mm_tokens_per_image=4, eos_token_id=0)  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    train_small.character_tokenizer().save_pretrained(folder)


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


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_by_deepspeed():
    """A lock of a build that was killed would stop all later ones; on a CPU each run leaves 69 MB of shared memory."""
    for lock in EXTENSIONS.rglob("lock"):
        lock.unlink()
    before = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    yield
    for buffer in set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) - before:
        buffer.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------- runs in several processes
@pytest.fixture(scope="session")
def zero(tmp_path_factory):
    """A DeepSpeed file like ours with other values in zero_optimization."""

    def changed(**values) -> str:
        config = json.loads(Path(ZERO_3).read_text())
        config["zero_optimization"] |= values
        path = tmp_path_factory.mktemp("zero") / "ds_config.json"
        path.write_text(json.dumps(config))
        return str(path)

    return changed


SCRIPTS = Path(sys.executable).parent  # where the environment's own `deepspeed` is


def environment(**more: str) -> dict[str, str]:
    return (
        os.environ
        | {
            "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        | more
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(words: list[str], ranks: int = 0, by: str = "torchrun", **env: str) -> subprocess.Popen:
    """Start a script in one process, or by a launcher in several."""
    if ranks or "RANK" in env:
        pytest.importorskip("deepspeed")  # it is installed on Linux only
    launchers = {
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", str(ranks)],
        "deepspeed": ["deepspeed", "--master_port", free_port(), "--num_gpus", str(ranks)],
    }
    first = launchers[by] if ranks else [sys.executable]
    return subprocess.Popen([*first, *words], env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)  # fmt: skip


def finished(process: subprocess.Popen, status: int = 0, seconds: float = 300) -> str:
    """The output of a run that has to end with `status`."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == status, output
    return output


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(2400):
        if (out / "metrics.jsonl").exists() and any(
            line["step"] >= step for line in read_jsonl(out / "metrics.jsonl")
        ):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


def timeless(lines: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for line in lines
    ]


def alike(out: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Two runs logged the same numbers and wrote the same responses, on however many ranks each of them ran."""
    mine, theirs = (timeless(read_jsonl(folder / "metrics.jsonl")) for folder in (out, other))
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance * 0.1)
    mine, theirs = (read_jsonl(folder / "samples.jsonl") for folder in (out, other))
    trained = {
        "prompt_ids",
        "response_ids",
        "advantage",
        "old_logp",
        "logp",
    }  # held by the rank that trained on a row
    assert any(trained <= row.keys() for row in mine + theirs), (
        "nothing was kept of what the loss saw"
    )
    for a, b in zip(mine, theirs, strict=True):
        assert {k: v for k, v in a.items() if k not in trained} == {
            k: v for k, v in b.items() if k not in trained
        }
        for name in trained & a.keys() & b.keys():
            near = 0 if name.endswith("_ids") else tolerance
            assert a[name] == pytest.approx(b[name], rel=near, abs=near), name


def second_rank(process: subprocess.Popen) -> int:
    """The process id of rank 1 in a run that `process` has started."""
    started = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if p.environ().get("RANK") == "1"
    ]
    return min(started, key=lambda p: p.create_time()).pid  # later ones are helpers of its own

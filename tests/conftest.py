"""Shared fixtures and helpers: small models, small data, and runs in several processes."""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

# Threads that wait by spinning slow each other down where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without this, transformers looks for a missing model on the hub for a minute. Read at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".pytest_cache"  # kept between sessions
# DeepSpeed compiles its extensions once for each environment.
EXTENSIONS = CACHE / "torch_extensions" / Path(sys.prefix).name
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
# The launchers of this environment, and its ninja: another version would compile everything again.
SCRIPTS = Path(sys.executable).parent
os.environ["PATH"] = f"{SCRIPTS}:{os.environ['PATH']}"
ZERO_3 = str(ROOT / "ds_config.json")
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import fipo  # noqa: E402
import train_small  # noqa: E402

torch.set_num_threads(2)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes more than a second or two; leave out with -m 'not slow'"
    )


# ---------------------------------------------------------------------------------- models and data
PRETRAIN_STEPS = 120


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A Qwen2 folder that answers some sums right and most wrong.

    It is pretrained once and cached until train_small.py or a library changes. Tests get a copy.
    """
    recipe = Path(train_small.__file__).read_text()
    versions = f"{PRETRAIN_STEPS} {torch.__version__} {transformers.__version__}"
    key = hashlib.sha256((recipe + versions).encode()).hexdigest()[:16]
    cached = CACHE / f"base-{key}"
    if not cached.is_dir():
        train_small.pretrain(cached, steps=PRETRAIN_STEPS)
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(cached, folder)
    return str(folder)


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> str:
    """A file of sums the base model was not trained on."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    problems = train_small.all_problems()[train_small.FOR_RL][:64]
    rows = [{"prompt": train_small.question(p), "answer": str(sum(p))} for p in problems]
    write_jsonl(path, rows)
    return str(path)


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> str:
    """A Qwen2 folder with random weights that reads any text, as bytes."""
    folder = tmp_path_factory.mktemp("reader") / "model"
    end = "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate([end, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token=end, pad_token=end, unk_token=end
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def tiny_composite(folder: Path) -> None:
    """Save a model with parts for text and for images, whose config names no context of its own."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
        "max_position_embeddings": 77,
        "eos_token_id": 0,
    }
    image = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=shape | text,
        vision_config=shape | image,
        mm_tokens_per_image=4,
        eos_token_id=0,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    train_small.character_tokenizer().save_pretrained(folder)


def small_config(model: str, data: str, out: Path) -> fipo.Config:
    """A run of two steps with two updates each, which takes less than a second."""
    return fipo.Config(
        model=model,
        data=data,
        out=str(out),
        steps=2,
        group_size=8,
        prompts_per_batch=4,
        prompts_per_mini_batch=2,
        max_prompt=16,
        max_response=32,
        overlong_buffer=8,
        lr=1e-4,
        warmup_steps=2,
        tokens_per_micro_batch=512,
        eval_samples=2,
        eval_every=2,
        save_every=2,
    )


@pytest.fixture
def small(base, sums, tmp_path) -> fipo.Config:
    return small_config(base, sums, tmp_path / "run")


# -------------------------------------------------------------------------------------------- files
def flags(cfg: fipo.EvalConfig) -> list[str]:
    """The command line that gives the settings `cfg`."""
    words: list[str] = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value == field.default:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{field.name}", *map(str, values)]
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


# ------------------------------------------------------------------------ runs in several processes
@pytest.fixture(scope="session", autouse=True)
def clean_up_after_deepspeed():
    """Remove the lock of a build that was killed, and the shared memory that each run leaves.

    The next build would wait for the lock forever. On a CPU, each run leaves 69 MB.
    """
    for lock in EXTENSIONS.rglob("lock"):
        lock.unlink()
    memory = Path("/dev/shm")
    pattern = "deepspeed_allreduce_buffer_*"
    before = set(memory.glob(pattern))
    yield
    for buffer in set(memory.glob(pattern)) - before:
        buffer.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def zero(tmp_path_factory):
    """Writes a DeepSpeed file like ds_config.json, with other values in zero_optimization."""

    def write(**values) -> str:
        config = json.loads(Path(ZERO_3).read_text())
        config["zero_optimization"] |= values
        path = tmp_path_factory.mktemp("zero") / "ds_config.json"
        path.write_text(json.dumps(config))
        return str(path)

    return write


def environment(**more: str) -> dict[str, str]:
    """The variables for a process on the CPU that uses one thread."""
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | more


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(words: list[str], ranks: int = 0, by: str = "torchrun", **env: str) -> subprocess.Popen:
    """Start a script in one process, or with a launcher in several."""
    if ranks or "RANK" in env:
        pytest.importorskip("deepspeed")  # it is installed on Linux only
    launchers = {
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", str(ranks)],
        "deepspeed": ["deepspeed", "--master_port", free_port(), "--num_gpus", str(ranks)],
    }
    first_words = launchers[by] if ranks else [sys.executable]
    return subprocess.Popen(
        [*first_words, *words],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen, status: int = 0, seconds: float = 300) -> str:
    """Wait for the end of a process, check its exit status, and return its output."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == status, output
    return output


def has_logged_step(out: Path, step: int) -> bool:
    path = out / "metrics.jsonl"
    return path.exists() and any(line["step"] >= step for line in read_jsonl(path))


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until a run in another process has logged a step."""
    for _ in range(2400):
        if has_logged_step(out, step):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not logged within two minutes")


def timeless(lines: list[dict]) -> list[dict]:
    """Rows of metrics.jsonl without durations, which differ between equal runs."""
    rows = []
    for line in lines:
        names = [name for name in line if not name.startswith("time/")]
        rows.append({name: line[name] for name in names if name != "tokens_per_second"})
    return rows


# In samples.jsonl, only the rank that trained on a response has these columns.
TRAINED = {"prompt_ids", "response_ids", "advantage", "old_logp", "logp"}


def without_trained(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TRAINED}


def assert_runs_equal(out: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Check that two runs logged the same numbers and responses, on however many ranks each ran."""
    lines = timeless(read_jsonl(out / "metrics.jsonl"))
    other_lines = timeless(read_jsonl(other / "metrics.jsonl"))
    for line, expected in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(expected, rel=tolerance, abs=tolerance * 0.1)
    rows = read_jsonl(out / "samples.jsonl")
    other_rows = read_jsonl(other / "samples.jsonl")
    assert any(row.keys() >= TRAINED for row in rows + other_rows), "no row has what the loss saw"
    for row, expected in zip(rows, other_rows, strict=True):
        assert without_trained(row) == without_trained(expected)
        for name in TRAINED & row.keys() & expected.keys():
            allowed = 0 if name.endswith("_ids") else tolerance
            assert row[name] == pytest.approx(expected[name], rel=allowed, abs=allowed), name


def second_rank(process: subprocess.Popen) -> int:
    """The process id of rank 1 in a run that `process` has started."""
    children = psutil.Process(process.pid).children(recursive=True)
    of_rank_1 = [child for child in children if child.environ().get("RANK") == "1"]
    first = min(of_rank_1, key=lambda child: child.create_time())  # later ones are its helpers
    return first.pid

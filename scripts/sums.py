"""Write problems for a small language model: sums of four numbers between 10 and 99.

  python scripts/sums.py DIR

writes DIR/train.jsonl with 1000 problems and DIR/eval.jsonl with 64 others. Each prompt contains
one worked example. It is a chat with an empty system message, because the chat templates of some
models would otherwise add a system message of about 20 tokens.
"""

import json
import random
import sys
from pathlib import Path

EXAMPLE = "3 + 4 + 5\n3 + 4 = 7\n7 + 5 = 12\nAnswer: 12\n\n"


def problem(numbers: tuple[int, ...]) -> dict:
    question = " + ".join(map(str, numbers))
    prompt = [
        {"role": "system", "content": ""},
        {"role": "user", "content": f"{EXAMPLE}{question}\n"},
    ]
    return {"prompt": prompt, "answer": str(sum(numbers))}


def main(folder: Path) -> None:
    rng = random.Random(0)
    distinct = {}
    while len(distinct) < 1064:
        numbers = tuple(rng.randint(10, 99) for _ in range(4))
        distinct[numbers] = problem(numbers)
    lines = [json.dumps(row) + "\n" for row in distinct.values()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.jsonl").write_text("".join(lines[:64]))
    (folder / "train.jsonl").write_text("".join(lines[64:]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

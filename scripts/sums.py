"""Problems for a small language model: sums of four numbers from 10 to 99, with one worked example in the prompt.

  python scripts/sums.py DIR       # writes DIR/train.jsonl (1000 problems) and DIR/eval.jsonl (64 others)

The prompt is a chat with an empty system message, so that the template does not add 20 tokens of its own.
"""

import json
import random
import sys
from pathlib import Path

EXAMPLE = "3 + 4 + 5\n3 + 4 = 7\n7 + 5 = 12\nAnswer: 12\n\n"


def row(numbers: tuple[int, ...]) -> dict:
    content = EXAMPLE + " + ".join(map(str, numbers)) + "\n"
    prompt = [{"role": "system", "content": ""}, {"role": "user", "content": content}]
    return {"prompt": prompt, "answer": str(sum(numbers))}


def main(folder: Path) -> None:
    rng, problems = random.Random(0), {}
    while len(problems) < 1064:
        problems[tuple(rng.randint(10, 99) for _ in range(4))] = None
    rows = [row(numbers) for numbers in problems]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("eval", rows[:64]), ("train", rows[64:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Turn grade-school-math's example_model_solutions.jsonl, whose solutions are marked right or wrong, into preferences.

python docs/examples/gsm8k_preferences.py example_model_solutions.jsonl pairs.jsonl labels.jsonl
"""

import json
import sys
from itertools import product
from pathlib import Path


def main(source: str, pairs: str, labels: str) -> None:
    """Write a pair for each right and wrong solution of a question, and each solution with its label."""
    with Path(source).open() as lines, Path(pairs).open("w") as paired, Path(labels).open("w") as labelled:
        for line in lines:
            row = json.loads(line)
            prompt = f"Q: {row['question']}\nA:"
            marked = {f" {s['solution']}": s["is_correct"] for s in row.values() if isinstance(s, dict)}
            for solution, is_correct in marked.items():
                print(json.dumps({"prompt": prompt, "completion": solution, "label": is_correct}), file=labelled)
            for chosen, rejected in product(marked, marked):
                if marked[chosen] and not marked[rejected]:
                    print(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}), file=paired)


if __name__ == "__main__":
    main(*sys.argv[1:])

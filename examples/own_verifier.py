"""A task with a verifier of your own: a function, and a file of prompts. Here an answer counts if it is a palindrome.

python examples/own_verifier.py words.jsonl        # rows like {"prompt": "A palindrome of 5 letters:", "length": 5}
tokencredit train --task examples/own_verifier.py:verify --option path=words.jsonl --model MODEL --out runs/words
"""

import sys

from tokencredit import tasks
from tokencredit.tasks import Verdict


def verify(completion, row, truncated=False):
    """A verdict says what went wrong besides; True or False would do."""
    words = completion.split()
    if truncated or not words:
        reason = "truncated" if truncated else "unparsed"
        return Verdict(correct=False, parsed=False, reason=reason)
    right = len(words[-1]) == row["length"] and words[-1] == words[-1][::-1]
    return Verdict(correct=right, parsed=True, reason="correct" if right else "wrong")


if __name__ == "__main__":
    task = tasks.load(f"{__file__}:verify", path=sys.argv[1])
    for row in task.rows("train") + task.rows("test"):
        for completion in ("level", "a palindrome is kayak", "lever", ""):
            print(f"{row['prompt']!r} {completion!r}: {task.verify(completion, row).reason}")

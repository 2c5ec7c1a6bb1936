"""math-verify as it comes, in a process of its own: a JSON question per line in, whether it accepts per line out.

It reads with both of its mathematical readers, and the plain one evaluates text as Python: hence the limits, and hence
no import of this outside its process.
"""

import json
import logging
import os
import resource
import sys


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    readers = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    for line in sys.stdin:
        question = json.loads(line)
        try:
            gold = parse(f"\\boxed{{{question['gold']}}}", extraction_config=readers)
            accepted = bool(verify(gold, parse(question["completion"], extraction_config=readers)))
        except Exception:  # what it cannot read, it does not accept
            accepted = False
        print(json.dumps(accepted), file=answers, flush=True)


if __name__ == "__main__":
    main()

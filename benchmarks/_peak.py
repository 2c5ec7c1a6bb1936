"""Runs `tokencredit` with the arguments that follow and prints, as its last line, what that took of memory and time:

    python benchmarks/_peak.py evaluate --prompts 16      # ... {"peak_gib": 1.04, "seconds": 21.3, "code": 0}

peak_gib: the largest resident set of this process or of one that it started; seconds: of processor, theirs too.
"""

import json
import resource
import sys

from _result import peak_gib
from tokencredit.cli import main

code = main(sys.argv[1:])
own, started = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
peak = max(peak_gib(), started.ru_maxrss / 2**20)
seconds = sum(used.ru_utime + used.ru_stime for used in (own, started))
print(json.dumps({"peak_gib": peak, "seconds": seconds, "code": code}))

"""`tokencredit` whose processes kill themselves, as the kernel would, when they have done a step of training.

torchrun --standalone --nproc_per_node 2 tests/train_killed.py STEP RANK[,RANK] train --device cpu ...
"""

import os
import signal
import sys

from tokencredit.cli import main
from tokencredit.progress import TrainProgress

if __name__ == "__main__":
    step, ranks = int(sys.argv.pop(1)), sys.argv.pop(1).split(",")
    told = TrainProgress.listen

    def listen(self, event, figures):
        told(self, event, figures)
        if event == "step" and figures["step"] == step and os.environ["RANK"] in ranks:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainProgress.listen = listen
    sys.exit(main())

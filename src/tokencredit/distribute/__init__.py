"""Work on several machines or GPUs, by Ray: workers that each hold a policy, and this process, which cuts the work into
pieces, hands them out and alone writes what comes back.

    workers     which are asked for: --ray, --workers, --gpus-per-worker
    cluster     a Ray of this machine, or one that runs already
    site        what a process elsewhere needs in order to be one of the command's
    host        what a worker holds: a policy, opened from names and numbers; and what it is, as a hash and a version
    pool        the workers, and pieces of work on their way to them
    lost        a piece that nobody could do

What a piece is, and that it comes out the same wherever it is done, is for those who cut the work (`pivotality.crew`).
Ray is imported when a cluster is asked for.
"""

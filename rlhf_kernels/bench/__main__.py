"""`python -m rlhf_kernels.bench`."""

import io
import sys

from rlhf_kernels.bench.cli import main

if __name__ == "__main__":
    # Into a pipe or a file, too, each line comes when it is printed: a run takes minutes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    main()

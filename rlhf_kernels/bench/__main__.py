"""`python -m rlhf_kernels.bench`."""

from rlhf_kernels.bench.cli import main

if __name__ == "__main__":
    main()

"""The whole of RLHF on a real 135M-parameter chat model: ``python -m rlhf.demo``."""

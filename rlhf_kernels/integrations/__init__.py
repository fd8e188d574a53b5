"""Our kernels under the names of other PPO codebases: one module for each, imported when asked for.

    from rlhf_kernels.integrations import verl

    with verl.patched():
        ...  # verl's own code, on these kernels

`verl` is for verl 0.9, `trl` for TRL 1.12, `openrlhf` for OpenRLHF 0.11: each lists what
it takes over.
Importing a module here imports nothing of its peer; `patch` and `patched` do.
"""

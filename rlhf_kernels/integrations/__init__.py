"""Our kernels under the names of other PPO codebases: one module for each, imported when asked for.

    from rlhf_kernels.integrations import verl

    with verl.patched():
        ...  # verl's own code, on these kernels

Importing a module here imports nothing of its peer; `patch` and `patched` do.
"""

"""A rank of a run on Transformer Engine over the stand-ins: `python -m tests.te_on_cpu.train`, with torchrun's
variables.
"""

if __name__ == "__main__":  # and not in the process that Megatron-Core spawns to write checkpoints
    from tests.te_on_cpu import ranks  # noqa: F401  installs it

    from megatron_fipo.config.configure import run_with_config  # isort: skip
    from megatron_fipo.train import main  # isort: skip

    run_with_config(main)

"""`python -m megatron_fipo`: see cli.py."""

from megatron_fipo.cli import main

main()

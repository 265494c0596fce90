"""The command `megatron-fipo`, also `python -m megatron_fipo`: the entry point of all commands.

Each command is its own module, which is imported only when the command is used. So --help is fast.
"""

import difflib
import importlib.metadata
import runpy
import sys

COMMANDS = {
    "train": ("megatron_fipo.train", "train a model, or resume a run"),
    "evaluate": ("megatron_fipo.evaluate", "accuracy of a model on problems, with intervals"),
    "compare": ("megatron_fipo.compare", "compare runs: what differs, which is better, and how certain that is"),
    "inspect": ("megatron_fipo.inspect", "what a run's directory contains, and what the model wrote in a step"),
    "preflight": (
        "megatron_fipo.preflight",
        "estimate memory and time of a run, and check its weights, before it starts",
    ),
    "planner": ("megatron_fipo.planner", "the best modes, splits of nodes and layouts of a model on a cluster"),
    "simulate": (
        "megatron_fipo.simulate",
        "simulate a run: step time and idle share of synchronous, overlapped and colocated modes",
    ),
    "doctor": ("megatron_fipo.doctor", "what this machine has, what is missing for a run, and how to fix it"),
    "export": ("megatron_fipo.export", "a run's model as a Hugging Face directory, to serve, evaluate or share"),
    "serve": ("megatron_fipo.engines.server", "a rollout server for runs elsewhere (vLLM's own options)"),
}
EXAMPLES = """
  megatron-fipo train                                    the embedded model, on this machine
  megatron-fipo train algorithm=dapo run.steps=10        other settings; train --help lists them
  megatron-fipo train -m algorithm=fipo,dapo run.seed=1,2,3    six runs, one after the other, and a table
  megatron-fipo evaluate model.path=runs/mine            how good is its newest checkpoint?
  megatron-fipo compare runs/fipo runs/dapo              is one better, or is that the seed?
  megatron-fipo preflight experiment=fipo_32b            does it fit, and how long is a step?
  megatron-fipo export runs/mine my-model                its newest checkpoint, for transformers and vLLM
  megatron-fipo COMMAND --help                           what a command takes"""


def usage() -> str:
    """Return the text of --help."""
    rows = "\n".join(f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items())
    return f"usage: megatron-fipo COMMAND [key=value ...]\n\n{rows}\n\nexamples:{EXAMPLES}"


def main() -> None:
    """Run the command that the first argument names, with the other arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name == "--version":
        print(f"megatron-fipo {importlib.metadata.version('megatron_fipo')}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1, cutoff=0.5)
        instead = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: megatron-fipo {name}: no such command; {instead}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

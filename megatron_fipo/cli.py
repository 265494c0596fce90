"""The command `megatron-fipo`, and `python -m megatron_fipo`: one name for everything that one starts by hand.

A command is a module of its own, and is imported when it is asked for: help takes a moment, not seconds.
"""

import difflib
import importlib.metadata
import runpy
import sys

COMMANDS = {
    "train": ("megatron_fipo.train", "train a model, or go on with a run"),
    "evaluate": ("megatron_fipo.evaluate", "accuracy of a model on problems, with intervals"),
    "compare": ("megatron_fipo.compare", "runs side by side: what differs, which is better, and how sure that is"),
    "inspect": ("megatron_fipo.inspect", "what a run's directory holds, and what the model wrote in a step"),
    "preflight": ("megatron_fipo.preflight", "memory, time and weights of a configuration, before it costs an hour"),
    "planner": ("megatron_fipo.planner", "the fastest layouts of a model on a cluster"),
    "simulate": (
        "megatron_fipo.simulate",
        "who waits for whom: synchronous, overlapped and colocated, in made-up time",
    ),
    "doctor": ("megatron_fipo.doctor", "what this machine has and lacks, and what mends it"),
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
    """What --help prints."""
    rows = "\n".join(f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items())
    return f"usage: megatron-fipo COMMAND [key=value ...]\n\n{rows}\n\nexamples:{EXAMPLES}"


def main() -> None:
    """Run the command that the first argument names, with the others."""
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

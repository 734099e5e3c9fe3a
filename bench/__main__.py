"""The command line of the benchmarks: `python -m bench COMMAND`; `python -m bench COMMAND --help` lists its options."""

import argparse
import importlib
import sys

#: command: (module with the `main` that it runs, help). Modules are imported on demand: a GPU machine may lack some dependencies.
COMMANDS = {
    "run": ("run", "time all ops and their peers in parts; store and render the results"),
    "compare": ("compare", "fail if our kernels became slower than the stored results of this machine"),
    "report": ("report", "render README's table, docs/results/bench.md and the pictures from the stored results"),
    "store": ("results", "store files of `pytest bench --benchmark-json=FILE`"),
    "gpu": ("gpu_report", "test and time on a GPU in resumable steps, and pack an archive"),
    "gpu-import": ("gpu_archive", "store and render the results in an archive of `gpu`"),
    "gpu-smoke": ("gpu_smoke", "check every op on this GPU against fp64; a step of `gpu`"),
    "step": ("step", "time one training step and one sampling run of a whole model"),
    "evaluation": ("evaluation", "time the evaluation of photographs, also against another checkout"),
    "how-long": ("how_long", "print the tables of docs/guides/how_long.md: the work of the recipes and their hours"),
    "memory": ("memory", "print the memory table of the neural field"),
    "preferences": ("preferences", "write the default GPU backend of each op"),
}


def main(arguments=None):
    commands = "\n".join(f"  {name:12} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\n\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    given = parser.parse_args(arguments)
    module = importlib.import_module(f".{COMMANDS[given.command][0]}", __package__)
    return module.main(given.options)


if __name__ == "__main__":
    sys.exit(main())

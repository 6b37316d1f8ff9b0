"""Runs the console command: `kd-jax VERB ...` is `python -m kd_jax.VERB ...`.

kd-jax main --config=quickstart      # an experiment of kd_jax, or the path of your own file
kd-jax configs                       # lists the experiments
kd-jax VERB --help
"""

import importlib
import importlib.metadata
import os
import sys

VERBS = {
    "main": "run an experiment: train teacher, baseline and student, export, compare",
    "evaluate": "evaluate a checkpoint, a stage of a run, or a file of predictions",
    "predict": "label a file of texts, or answer questions, with a trained model",
    "embed": "compute the vectors of a file of texts, with a sentence embedder",
    "generate": "write texts after a file of prompts or chats, with a trained model",
    "export": "write a Hugging Face checkpoint of a stage of a run",
    "compare": "put finished runs side by side in one report",
    "plan": "tell sizes, FLOPs and memory of an experiment before it runs",
    "configs": "list the experiments that come with kd_jax",
    "keys": "print the keys of a config, or of a section of it, with their meaning",
}


def main() -> None:
    """Runs the command named by the first argument; exits the program if it fails."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help", "help"):
        rows = "\n".join(f"  {name:<9} {what}" for name, what in VERBS.items())
        print(f"{__doc__}\nVerbs:\n{rows}")
    elif verb == "--version":
        print(f"kd_jax {importlib.metadata.version('kd_jax')}")
    elif verb not in VERBS:
        print(f"error: kd-jax {verb}: have {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"kd-jax {verb}", *sys.argv[2:]]
        module = "experiments" if verb == "configs" else verb
        try:
            importlib.import_module(f"kd_jax.{module}").main()
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

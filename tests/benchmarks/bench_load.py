"""Loading a checkpoint of 498 MB, GPT-2 small in float32: seconds and memory of its own, before the first forward pass.

Each load in a process of its own, in turn; the file is in the system's cache. What is imported before is not counted. Memory of
its own is what the process holds and shares with nobody: pages that were written, or are mapped by it alone and not clean.
"""

import json
import statistics
import subprocess
import sys
import tempfile

from alternate import arguments, environment, keep_to, machine_from_child, show, table, write_json

MEASURE = """
import json, time
{imports}

def own():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")) / 1024

before, start = own(), time.perf_counter()
model = {load}
print(json.dumps({{"seconds": time.perf_counter() - start, "private": own() - before}}))
"""
SIDES = {
    "minilora": ("from minilora import models\nmodels.load", "models.load(FOLDER)"),
    "transformers": ("import torch, transformers\ntransformers.utils.logging.disable_progress_bar()\n"
                     "from transformers import GPT2LMHeadModel", "GPT2LMHeadModel.from_pretrained(FOLDER)"),
}
GOALS = {"seconds": 0.5, "private": 40.0}


def python(code):
    return subprocess.run([sys.executable, "-c", code], env=environment(), check=True, text=True, capture_output=True).stdout


def main():
    options = arguments(__doc__, rounds=7).parse_args()
    keep_to(options.threads)
    facts = machine_from_child()
    print(f"{__doc__.splitlines()[0]}\n\n{show(facts)}\n")
    with tempfile.TemporaryDirectory() as folder:
        python(f"from minilora import models, nn\nmodels.save(nn.GPT2(nn.GPT2Config(), rng=0), {folder!r})")
        codes = {name: MEASURE.format(imports=imports, load=load.replace("FOLDER", repr(folder)))
                 for name, (imports, load) in SIDES.items()}
        results = {name: [] for name in codes}
        for code in codes.values():
            python(code)
        for _ in range(options.rounds):
            for name, code in codes.items():
                results[name].append(json.loads(python(code)))
    rows = [[name, *(f"{statistics.median(r[key] for r in rounds):.3f}" for key in GOALS),
             f"{min(r['seconds'] for r in rounds):.3f}"] for name, rounds in results.items()]
    print(table(["side", "seconds", "MB of its own", "least seconds"], rows) + "\n")
    comparisons = [{"figure": key, "median": statistics.median(r[key] for r in results["minilora"]), "goal": goal}
                   for key, goal in GOALS.items()]
    write_json(options, facts, {"sides": results, "comparisons": comparisons})


if __name__ == "__main__":
    main()

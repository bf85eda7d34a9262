"""What `import minilora` costs over `import numpy` alone: time and memory, each import in a fresh process, in turn.

What is public is loaded when it is first used: here all that training needs is. The memory is the peak resident set of the
process. Medians over rounds, and of the differences round by round.
"""

import json
import statistics
import subprocess
import sys

from alternate import arguments, environment, keep_to, machine_from_child, show, table, write_json

MEASURE = """
import json, sys, time
start = time.perf_counter()
{imports}
seconds = time.perf_counter() - start
modules = sorted(sys.modules)
import resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({{"seconds": seconds, "bytes": peak, "modules": modules}}))
"""
USED = "minilora.Tensor, minilora.nn, minilora.ops, minilora.optim, minilora.lora, minilora.record"  # loaded when first used
SIDES = {"numpy alone": "import numpy", "numpy, then minilora": f"import numpy\nimport minilora\n{USED}"}
GOALS = {"seconds": (50, "ms", 1e3), "bytes": (15, "MB", 1e-6)}


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], env=environment(), check=True, text=True, capture_output=True)


def imported(imports):
    # A child starts with its parent's peak resident set, so this process imports nothing large itself.
    return json.loads(python("-c", MEASURE.format(imports=imports)).stdout)


def slowest(new, rows):
    """(module, own microseconds, microseconds with what it imports) of the slowest new modules, slowest first."""
    found = []
    for line in python("-X", "importtime", "-c", SIDES["numpy, then minilora"]).stderr.splitlines()[1:]:
        own, total, name = line.removeprefix("import time:").split("|")
        if name.strip() in new:
            found.append((name.strip(), int(own), int(total)))
    return sorted(found, key=lambda row: -row[1])[:rows]


def main():
    options = arguments(__doc__, rounds=25).parse_args()
    keep_to(options.threads)  # the children too
    facts = machine_from_child()
    print(f"{__doc__.splitlines()[0]}\n\n{show(facts)}\n")
    for imports in SIDES.values():
        imported(imports)  # compiles the bytecode and reads the files into memory
    results = {name: [] for name in SIDES}
    for _ in range(options.rounds):
        for name, imports in SIDES.items():
            results[name].append(imported(imports))
    print(f"{options.rounds} rounds\n")
    rows = []
    for name, rounds in results.items():
        medians = [scale * statistics.median(r[key] for r in rounds) for key, (_, _, scale) in GOALS.items()]
        rows.append([name, *(f"{value:.1f}" for value in medians), len(rounds[0]["modules"])])
    print(table(["side", "ms", "MB", "modules"], rows) + "\n")
    alone, both = results.values()
    rows = []
    for key, (goal, unit, scale) in GOALS.items():
        extra = scale * statistics.median(b[key] - a[key] for a, b in zip(alone, both))
        rows.append([f"import minilora over numpy, {unit}", f"{extra:.1f}", goal, "yes" if extra <= goal else "no"])
    print(table(["difference", "median", "goal", "reached"], rows) + "\n")
    new = sorted(set(both[0]["modules"]) - set(alone[0]["modules"]))
    others = [name for name in new if name.partition(".")[0] != "minilora"]
    print(f"{len(new)} modules that numpy alone does not import; not minilora's own: {', '.join(others) or 'none'}\n")
    print(table(["slowest of them", "own us", "with what they import, us"], slowest(new, 12)))
    for result in alone + both:
        result["modules"] = len(result["modules"])
    comparisons = [dict(zip(("difference", "median", "goal", "reached"), row)) for row in rows]
    write_json(options, facts, {"sides": results, "comparisons": comparisons, "modules": new})


if __name__ == "__main__":
    main()

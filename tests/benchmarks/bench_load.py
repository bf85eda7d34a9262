"""Opening a checkpoint of 500 MB: time and private memory until the first forward pass may begin, each in a fresh process.

A random GPT-2 of the small shape is written into a temporary folder: config.json and model.safetensors, float32. It is in the
system's cache, as after a first run. The sides take turns; the time is that of the load alone, after all imports. The memory
is what the system counts as private and written to (Private_Dirty), of the whole process and what the load adds to it: pages
of a mapped file are not in it, since they are the cache's and can be dropped. Linux only, for the memory.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from alternate import arguments, environment, keep_to, machine_from_child, show, table, write_json

LAYERS, WIDTH, VOCABULARY, LENGTH = 12, 768, 50257, 1024
GOALS = {"seconds": 0.5, "megabytes": 40.0}

MEASURE = """
import json, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
{imports}

def private():
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1e3

before = private()
start = time.perf_counter()
loaded = {load}
seconds = time.perf_counter() - start
after = private()
print(json.dumps(dict(seconds=seconds, whole=after, added=after - before, parameters={count})))
"""
SIDES = {
    "formats.open_state": dict(
        imports="from minilora.formats import open_state",
        load="dict(open_state(folder / 'model.safetensors'))",
        count="sum(array.size for array in loaded.values())"),
    "models.load": dict(
        imports="from minilora import models; models.load",
        load="models.load(folder)",
        count="sum(p.size for p in loaded.parameters())"),
    "transformers": dict(
        imports="import torch; from transformers import AutoModelForCausalLM; import transformers.models.gpt2.modeling_gpt2",
        load="AutoModelForCausalLM.from_pretrained(folder)",
        count="sum(p.numel() for p in loaded.parameters())"),
}


def shapes():
    """Names and shapes of GPT-2's checkpoint; a linear weight is stored (in, out)."""
    yield "wte.weight", (VOCABULARY, WIDTH)
    yield "wpe.weight", (LENGTH, WIDTH)
    for i in range(LAYERS):
        for name, inner, outer in [("attn.c_attn", WIDTH, 3 * WIDTH), ("attn.c_proj", WIDTH, WIDTH),
                                   ("mlp.c_fc", WIDTH, 4 * WIDTH), ("mlp.c_proj", 4 * WIDTH, WIDTH)]:
            yield f"h.{i}.{name}.weight", (inner, outer)
            yield f"h.{i}.{name}.bias", (outer,)
        for name in ("ln_1", "ln_2"):
            yield from ((f"h.{i}.{name}.{kind}", (WIDTH,)) for kind in ("weight", "bias"))
    yield from ((f"ln_f.{kind}", (WIDTH,)) for kind in ("weight", "bias"))


def make_checkpoint(folder):
    """Write the checkpoint in a child, so that this process stays small: a child starts with its parent's memory."""
    code = """
import json, sys
from pathlib import Path
import numpy as np
from minilora.formats import save_state

folder, shapes, config = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
random = np.random.default_rng(0)
tensors = {name: 0.02 * random.standard_normal(shape, "float32") for name, shape in shapes}
save_state(folder / "model.safetensors", tensors, {"format": "pt"})
(folder / "config.json").write_text(config)
"""
    config = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new", n_ctx=LENGTH,
                  n_embd=WIDTH, n_head=12, n_layer=LAYERS, n_positions=LENGTH, vocab_size=VOCABULARY, layer_norm_epsilon=1e-5,
                  attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, initializer_range=0.02, bos_token_id=50256,
                  eos_token_id=50256)
    subprocess.run([sys.executable, "-c", code, folder, json.dumps(list(shapes())), json.dumps(config)], env=environment(),
                   check=True)


def measured(name, folder):
    done = subprocess.run([sys.executable, "-c", MEASURE.format(**SIDES[name]), folder], env=environment(), check=True,
                          text=True, capture_output=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--only", metavar="TEXT", default="", help="only sides with TEXT in their name")
    options = parser.parse_args()
    keep_to(options.threads)
    facts = machine_from_child()
    print(f"{__doc__.splitlines()[0]}\n\n{show(facts)}\n")
    results = {name: [] for name in SIDES if options.only in name}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        for name in results:
            measured(name, folder)  # compiles the bytecode, and reads the files into the cache
        for number in range(options.rounds):
            for name in list(results)[::-1 if number % 2 else 1]:
                results[name].append(measured(name, folder))
    print(f"{size / 1e6:.0f} MB, {options.rounds} rounds, medians\n")
    medians = {name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
               for name, rounds in results.items()}
    print(table(["side", "seconds", "private, MB", "added by the load, MB", "parameters"],
                [[name, f"{m['seconds']:.4f}", f"{m['whole']:.1f}", f"{m['added']:.1f}", f"{m['parameters']:.0f}"]
                 for name, m in medians.items()]))
    if "models.load" in medians:
        ours = medians["models.load"]
        rows = [["models.load, seconds", f"{ours['seconds']:.3f}", GOALS["seconds"], ours["seconds"] < GOALS["seconds"]],
                ["models.load, private MB", f"{ours['whole']:.1f}", GOALS["megabytes"], ours["whole"] < GOALS["megabytes"]]]
        print("\n" + table(["figure", "median", "goal", "reached"], [[*row[:3], "yes" if row[3] else "no"] for row in rows]))
        if "transformers" in medians:
            pairs = [a["seconds"] / b["seconds"] for a, b in zip(results["models.load"], results["transformers"])]
            print(f"\ntime of models.load / time of from_pretrained, median of the rounds: {statistics.median(pairs):.3f}")
    write_json(options, facts, {"sides": results, "medians": medians, "bytes": size})


if __name__ == "__main__":
    main()

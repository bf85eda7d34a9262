"""Merging an adapter into the files of a base: time and peak private memory, against a copy, the arithmetic alone, and peft.

A random Llama-shaped checkpoint in bfloat16, in shards, and a rank-16 adapter on all its linear layers are written into a
temporary folder (twice to three times the size of the checkpoint is needed there, 10 GB by default; --folder says where), and
removed afterwards. Each side runs in a process of its own, in turn, with the files in the system's cache. Its time counts from
when its imports are done until the result is on the disk; what is not written of earlier turns is written before. Beside the
time stands the processor time of all cores, which a busy machine stretches less. The memory is the largest anonymous one
(RssAnon, sampled every 10 ms): pages of mapped files are not in it. Linux only.

    merge               minilora.formats.merge_files, with report and patch (the default)
    merge, no patch     the same without a patch: what peft gives
    copy                a plain copy of all files, brought to the disk
    arithmetic          float32(W) + (s B) A rounded to bfloat16, BLAS's products, on all cores, of the mapped files
    peft                from_pretrained, merge_and_unload, save_pretrained

peft runs in the Python given by --peft, which has torch, transformers and peft.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alternate import arguments, environment, machine_from_child, show, table, write_json

WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY, RANK = 2048, 5632, 32, 4, 32000, 16
GOALS = {"private": 600.0, "floor": 1.5, "peft memory": 0.15, "peft time": 0.7}

MAKE = """
import json, sys
from pathlib import Path
import ml_dtypes, numpy as np
from minilora import formats, lora

folder, layers, shard, shapes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
rng = np.random.default_rng(0)




pool = (0.02 * rng.standard_normal(1 << 24, "float32")).astype(ml_dtypes.bfloat16)
tensors, updates = {}, {}
for name, shape in shapes:
    size = int(np.prod(shape))
    at = int(rng.integers(len(pool)))
    tensors[name] = np.ones(shape, ml_dtypes.bfloat16) if len(shape) == 1 else \\
        np.resize(np.roll(pool, at), size).reshape(shape)
    if "proj" in name:
        A = rng.standard_normal((16, shape[1]), "float32") / np.float32(shape[1] ** 0.5)
        B = rng.standard_normal((shape[0], 16), "float32") * np.float32(0.01 * 0.02 * shape[1] ** 0.5 / 2 / 4)
        updates[name[:-7]] = formats.Update("linear", A, B, 2.0)
formats.save_state(folder / "base" / "model.safetensors", tensors, {"format": "pt"}, max_shard_bytes=shard)
config = lora.Config(r=16, lora_alpha=32, target_modules=sorted({name.split(".")[-1] for name in updates}),
                     task_type="CAUSAL_LM")
formats.write_adapter(formats.SavedAdapter(updates, config), folder / "adapter")
"""

TIMED = """
import json, sys, time
from pathlib import Path
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
{imports}
start, used = time.perf_counter(), time.process_time()
{work}
print(json.dumps(dict(seconds=time.perf_counter() - start, cpu=time.process_time() - used)))
"""

SYNC = """
import os
for path in out.rglob("*"):
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
"""

ARITHMETIC = """
def one(name):
    u, W = updates[name[:-7]], state[name]
    A, sB = u.A, np.float32(u.s) * u.B
    rows = max(1, (1 << 20) // W.shape[1])
    for i in range(0, len(W), rows):
        (W[i:i + rows].astype("float32") + sB[i:i + rows] @ A).astype(W.dtype)
    state.let_go(name, 0, W.nbytes)

saved = formats.read_adapter(folder / "adapter")
updates = saved.updates
state = formats.open_state(folder / "base" / "model.safetensors.index.json")
spread_out(one, [name for name in state if name[:-7] in updates], cores())
"""

MERGE = "report = merge_files(folder / 'base', folder / 'adapter', out{more})"
SIDES = {
    "merge": ("from minilora.formats import merge_files", MERGE.format(more="")),
    "merge, no patch": ("from minilora.formats import merge_files", MERGE.format(more=", patch=False")),
    "copy": ("import shutil", "shutil.copytree(folder / 'base', out)" + SYNC),
    "arithmetic": ("import numpy as np; from minilora import formats; from minilora.parallel import cores, spread_out; "
                   "formats.read_adapter, formats.open_state", ARITHMETIC),
    "peft": ("import torch; from transformers import AutoModelForCausalLM; from peft import PeftModel",
             "model = AutoModelForCausalLM.from_pretrained(folder / 'base', dtype=torch.bfloat16)\n"
             "model = PeftModel.from_pretrained(model, str(folder / 'adapter')).merge_and_unload()\n"
             "model.save_pretrained(out, max_shard_size='1GB')" + SYNC),
}


def shapes(layers):
    """Names and shapes of a Llama's checkpoint."""
    head = WIDTH // HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for i in range(layers):
        for name, out, inner in [("self_attn.q_proj", WIDTH, WIDTH), ("self_attn.k_proj", KV_HEADS * head, WIDTH),
                                 ("self_attn.v_proj", KV_HEADS * head, WIDTH), ("self_attn.o_proj", WIDTH, WIDTH),
                                 ("mlp.gate_proj", INNER, WIDTH), ("mlp.up_proj", INNER, WIDTH),
                                 ("mlp.down_proj", WIDTH, INNER)]:
            yield f"model.layers.{i}.{name}.weight", (out, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def make(folder, layers, shard):
    (folder / "base").mkdir()
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=WIDTH, intermediate_size=INNER,
                  num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=layers, vocab_size=VOCABULARY,
                  max_position_embeddings=2048, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False,
                  torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    (folder / "base" / "config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-c", MAKE, folder, str(layers), str(shard), json.dumps(list(shapes(layers)))],
                   env=environment(), check=True)


def measured(name, folder, python):
    """One turn: seconds, and the largest anonymous memory in MB."""
    imports, work = SIDES[name]
    out = folder / "out"
    os.sync()
    child = subprocess.Popen([python if name == "peft" else sys.executable, "-c", TIMED.format(imports=imports, work=work),
                              folder, out], env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peak, status = 0.0, Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            peak = max(peak, *(float(line.split()[1]) / 1e3 for line in status.read_text().splitlines()
                               if line.startswith("RssAnon")), 0.0)
        except OSError:
            pass
        time.sleep(0.01)
    said, complained = child.communicate()
    shutil.rmtree(out, ignore_errors=True)
    if child.returncode:
        raise SystemExit(f"{name}: {complained[-2000:]}")
    return {**json.loads(said.splitlines()[-1]), "private": peak}


def report(results):
    medians = {name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
               for name, rounds in results.items()}
    print(table(["side", "seconds", "of all cores", "peak private, MB"],
                [[name, f"{m['seconds']:.2f}", f"{m['cpu']:.2f}", f"{m['private']:.0f}"] for name, m in medians.items()]))

    def ratios(number, *below, key="seconds"):
        return statistics.median(one[key] / sum(results[name][i][key] for name in below)
                                 for i, one in enumerate(results[number]))

    figures = []
    for name in [name for name in medians if name.startswith("merge")]:
        figures.append((f"{name}: private MB", medians[name]["private"], GOALS["private"]))
        if {"copy", "arithmetic"} <= medians.keys():
            figures += [(f"{name} / (copy + arithmetic)", ratios(name, "copy", "arithmetic"), GOALS["floor"]),
                        ("the same, seconds of all cores", ratios(name, "copy", "arithmetic", key="cpu"), GOALS["floor"])]
        if "peft" in medians:
            figures += [(f"{name} / peft, memory", ratios(name, "peft", key="private"), GOALS["peft memory"]),
                        (f"{name} / peft, time", ratios(name, "peft"), GOALS["peft time"]),
                        ("the same, seconds of all cores", ratios(name, "peft", key="cpu"), GOALS["peft time"])]
    print("\n" + table(["figure, median of rounds", "", "goal", "reached"],
                       [[what, f"{value:.3g}", goal, "yes" if value <= goal else "no"] for what, value, goal in figures]))
    return medians


def main():
    parser = arguments(__doc__, rounds=3, sizes={"layers": 31})
    parser.add_argument("--folder", help="where to make the temporary folder")
    parser.add_argument("--peft", metavar="PYTHON", default="", help="the Python that has torch, transformers and peft")
    parser.add_argument("--only", metavar="TEXT", default="", help="only sides with TEXT in their name")
    options = parser.parse_args()
    layers = 1 if options.quick else options.layers
    facts = machine_from_child()
    print(f"{__doc__.splitlines()[0]}\n\n{show(facts)}\n")
    sides = [name for name in SIDES if options.only in name and (name != "peft" or options.peft)]
    results = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_merge_") as temporary:
        folder = Path(temporary)
        make(folder, layers, 1 << 30 if layers > 10 else 1 << 27)
        size = sum(path.stat().st_size for path in (folder / "base").iterdir())
        for number in range(options.rounds):
            for name in sides[::-1 if number % 2 else 1]:
                results[name].append(measured(name, folder, options.peft))
    print(f"{size / 1e9:.2f} GB, {options.rounds} rounds, medians\n")
    medians = report(results)
    write_json(options, facts, {"sides": results, "medians": medians, "bytes": size})


if __name__ == "__main__":
    main()

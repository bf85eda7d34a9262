"""One training step of the synthetic shift: minilora (CuPy) against torch and peft on the same GPU.

The step, the data and the sides are those of bench_step.py, in true float32 unless the line "TF32" says otherwise.
minilora draws its indices on the host and sends them over, as it always does; torch draws them on the device. A turn is
timed on the wall clock, from an idle device to an idle device, so that launches, waiting and computing all count. torch's
LoRA steps also run as CUDA graphs, and minilora's recorded. With --device cpu all sides run on the CPU.

How the sides alternate, and why in processes of their own: alternate.py.
"""

import functools

import bench_step
from alternate import card, compare, comparison_table, run, timed

PROBE = """
import json, os, subprocess, minilora
problem = minilora.backend.gpu_problem()
if problem:
    raise SystemExit(problem)
try:
    import peft, torch
except ImportError as error:
    raise SystemExit(f"{error}: python -m pip install 'minilora[bench]'")
if not torch.cuda.is_available():
    raise SystemExit("minilora can use the GPU, but this torch cannot: install a build of torch for CUDA")
import cupy
card = torch.cuda.get_device_properties(0)
asked = "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"
print(json.dumps({
    "GPU": f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors",
    "driver": subprocess.run(asked, capture_output=True, text=True).stdout.strip() + " (driver, highest clock, power limit)",
    "CuPy": f"{cupy.__version__}, CUDA runtime {cupy.cuda.runtime.runtimeGetVersion()}",
    "CUDA": f"torch is built for {torch.version.cuda}",
    "TF32": f"CuPy {os.environ.get('CUPY_TF32', '0')}, torch {int(torch.backends.cuda.matmul.allow_tf32)}",
}))
"""


def cupy_product():
    """The frozen product alone: what no LoRA step without a cache can go below."""
    import cupy
    import minilora
    minilora.use("gpu")
    X, _, W, _ = bench_step.data()
    x, W = minilora.to_device(X[:bench_step.BATCH].copy()), minilora.to_device(W)
    y = cupy.empty((bench_step.BATCH, bench_step.D_OUT), "float32")
    return timed(lambda: cupy.matmul(x, W.T, out=y), minilora.synchronize)


def sides(device, quick):
    """Those of bench_step.py on one device; on a GPU also torch's steps as CUDA graphs, and the product alone."""
    torch_device = "cuda" if device == "gpu" else device
    chosen = {name: functools.partial(setup, device if name.startswith("minilora") else torch_device)
              for name, setup in bench_step.SIDES.items() if "alone" not in name and "NumPy" not in name}
    if device == "gpu":
        chosen["torch, LoRA as in the article, CUDA graph"] = functools.partial(bench_step.torch_article, "cuda", True)
        chosen["peft, LoRA, CUDA graph"] = functools.partial(bench_step.peft_lora, "cuda", True)
        chosen["minilora, LoRA, recorded"] = functools.partial(bench_step.minilora_lora, "gpu", True)
        chosen["minilora, full rank, recorded"] = functools.partial(bench_step.minilora_full, "gpu", True)
        chosen["minilora, LoRA, cached frozen output, recorded"] = functools.partial(bench_step.minilora_cached, "gpu", True)
        chosen["CuPy, frozen product alone"] = cupy_product
    chosen["torch, frozen product alone"] = functools.partial(bench_step.torch_product, torch_device)
    return chosen


def report(results):
    comparisons = bench_step.report(results, goals=False)  # the goals are for the CPU
    graphs = compare(results, [
        ("LoRA, recorded / torch as in the article, CUDA graph", "minilora, LoRA, recorded",
         "torch, LoRA as in the article, CUDA graph"),
        ("LoRA, recorded / peft, CUDA graph", "minilora, LoRA, recorded", "peft, LoRA, CUDA graph"),
        ("LoRA, recorded / torch as in the article", "minilora, LoRA, recorded", "torch, LoRA as in the article"),
        ("LoRA, recorded / peft", "minilora, LoRA, recorded", "peft, LoRA"),
        ("LoRA, recorded / LoRA", "minilora, LoRA, recorded", "minilora, LoRA"),
        ("full rank, recorded / torch", "minilora, full rank, recorded", "torch, full rank"),
    ])
    if graphs:
        print("\n" + comparison_table(graphs))
    return comparisons + graphs


if __name__ == "__main__":
    run(__file__, __doc__, sides, report, rounds=20, steps=500, facts=functools.partial(card, PROBE), devices=("gpu", "cpu"))

"""One training step of a GPT-2-small shape on a GPU: LoRA in minilora (CuPy) against transformers + peft, eager and as a graph.

The sides are those of bench_gpt2.py at batch 8 x 512, in true float32 unless the line "TF32" says otherwise. Besides: minilora
with a recorded step, with attention in one block, and with all weights trained. "held" is what each library's pool has taken of
the card's memory. With --device cpu all sides run on the CPU, without the graph.

How the sides alternate, and why in processes of their own: alternate.py.
"""

import functools

import bench_gpt2
from alternate import compare, comparison_table, median, quartiles, run, table
from bench_gpu_step import card

TINY = dict(LAYERS=2, D=12, HEADS=2, VOCABULARY=101, BATCH=2, TIME=80, POSITIONS=80)  # --quick


def in_blocks(scores, device):
    """minilora with blocks of so many scores in all."""
    from minilora.kernels import gpu_attention
    gpu_attention.SCORES = scores
    return bench_gpt2.minilora_lora(device)


def sides(device, quick):
    for name, value in (TINY if quick else dict(BATCH=8, TIME=512)).items():
        setattr(bench_gpt2, name, value)
    torch_device = "cuda" if device == "gpu" else device
    chosen = {
        "minilora, LoRA": functools.partial(bench_gpt2.minilora_lora, device),
        "transformers + peft, LoRA": functools.partial(bench_gpt2.peft_lora, torch_device),
        "minilora, full fine-tuning": functools.partial(bench_gpt2.minilora_full, device),
    }
    if device == "gpu":
        chosen |= {
            "transformers + peft, LoRA, CUDA graph": functools.partial(bench_gpt2.peft_lora, "cuda", True),
            "minilora, LoRA, recorded": functools.partial(bench_gpt2.minilora_lora, "gpu", True),
            "minilora, LoRA, attention in one block": functools.partial(in_blocks, 1 << 40, device),
        }
    return chosen


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        held = f"{median(rounds, 'held'):.0f}" if "held" in rounds[0] else ""
        rows.append([name, f"{1e3 * median(rounds):.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                     f"{median(rounds, 'peak'):.0f}", held])
    print(table(["side", "ms a step", "quartiles", "peak MB of the process", "held MB of the card"], rows) + "\n")
    other, own = "transformers + peft, LoRA", "minilora, LoRA"
    on_card = all("held" in rounds[0] for rounds in results.values())
    comparisons = compare(results, [
        ("LoRA / transformers + peft", own, other),
        ("LoRA / transformers + peft, memory held", own, other, None, "held" if on_card else "peak"),
        ("LoRA, recorded / transformers + peft, CUDA graph", f"{own}, recorded", f"{other}, CUDA graph"),
        ("LoRA / transformers + peft, CUDA graph", own, f"{other}, CUDA graph"),
        ("LoRA / the same, attention in one block", own, f"{own}, attention in one block"),
        ("LoRA / full fine-tuning", own, "minilora, full fine-tuning"),
    ])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__.split("\n")[0], sides, report, rounds=4, steps=5, facts=card, devices=("gpu", "cpu"))

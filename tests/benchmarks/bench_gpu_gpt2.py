"""One training step of a GPT-2-small shape on a GPU: LoRA in minilora (CuPy) against transformers + peft, in three precisions.

The sides are those of bench_gpt2.py at batch 8 x 512, each eager and as a graph: minilora.record, and CUDA graphs of torch.

    LoRA                true float32 on both sides
    TF32                products in TF32: minilora.use("gpu", tf32=True), torch.set_float32_matmul_precision("high")
    bf16 base           minilora: frozen weights held in bfloat16 and multiplied as they are (quant.half_products), all else in
                        float32 with products in TF32. transformers + peft: the model in bfloat16, adapters in float32
    bf16 autocast       transformers + peft: the model in float32, its products and attention cast to bfloat16

"held" is what each library's pool has taken of the card's memory, "loss" that of the last step: minilora's sides begin with the
same frozen weights, as do torch's. With --device cpu the float32 sides run on the CPU. `--only bf16` runs some of all.

How the sides alternate, and why in processes of their own: alternate.py.
"""

import functools

import bench_gpt2
from alternate import card, compare, comparison_table, median, quartiles, run, table
from bench_gpu_step import PROBE

TINY = dict(LAYERS=2, D=12, HEADS=2, VOCABULARY=101, BATCH=2, TIME=80, POSITIONS=80)  # --quick
OWN, OTHER = "minilora, LoRA", "transformers + peft, LoRA"
MODES = {  # name: (settings of minilora, settings of torch); None where a side has no such mode
    "": ({}, {}),
    ", TF32": (dict(tf32=True), dict(tf32=True)),
    ", bf16 base": (dict(tf32=True, base="bfloat16"), dict(base="bfloat16")),
    ", bf16 autocast": (None, dict(autocast=True)),
}


def sides(device, quick):
    for name, value in (TINY if quick else dict(BATCH=8, TIME=512)).items():
        setattr(bench_gpt2, name, value)
    ways = (OWN, ", recorded", bench_gpt2.minilora_lora, device), (OTHER, ", CUDA graph", bench_gpt2.peft_lora, "cuda")
    if device == "cpu":
        return {OWN: functools.partial(bench_gpt2.minilora_lora, device),
                OTHER: functools.partial(bench_gpt2.peft_lora, device),
                "minilora, full fine-tuning": functools.partial(bench_gpt2.minilora_full, device)}
    chosen = {}
    for graph in (False, True):
        for mode, settings in MODES.items():
            for (side, as_graph, make, where), known in zip(ways, settings):
                if known is not None:
                    chosen[side + mode + as_graph * graph] = functools.partial(make, where, graph, **known)
    return chosen | {"minilora, full fine-tuning": functools.partial(bench_gpt2.minilora_full, device)}


def comparisons_of(on_card):
    """(label, side, other side, goal, key) for each mode, eager and as graphs; then memory."""
    held = "held" if on_card else "peak"
    pairs = [(mode, OWN + mode, OTHER + other) for mode, other in (
        ("", ""), (", TF32", ", TF32"), (", bf16 base", ", bf16 base"), (", bf16 base", ", bf16 autocast"))]
    for _, own, other in pairs:
        yield f"{own} / {other.removeprefix(OTHER + ', ')}", own, other, 0.95, "seconds"
        yield "    recorded / CUDA graph", f"{own}, recorded", f"{other}, CUDA graph", None, "seconds"
        yield "    memory held", own, other, 0.5, held
    yield "LoRA, TF32 / true float32", f"{OWN}, TF32", OWN, None, "seconds"
    yield "LoRA, bf16 base / true float32", f"{OWN}, bf16 base", OWN, None, "seconds"
    yield "LoRA / full fine-tuning", OWN, "minilora, full fine-tuning", None, "seconds"


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        held = f"{median(rounds, 'held'):.0f}" if "held" in rounds[0] else ""
        rows.append([name, f"{1e3 * median(rounds):.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                     f"{median(rounds, 'peak'):.0f}", held, f"{rounds[-1]['loss']:.4f}"])
    print(table(["side", "ms a step", "quartiles", "peak MB of the process", "held MB of the card", "loss"], rows) + "\n")
    comparisons = compare(results, list(comparisons_of(all("held" in rounds[0] for rounds in results.values()))))
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__.split("\n")[0], sides, report, rounds=3, steps=5, facts=functools.partial(card, PROBE),
        devices=("gpu", "cpu"))

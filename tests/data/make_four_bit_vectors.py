"""Write tests/data/four_bit_vectors.npz: matrices, and what bitsandbytes makes of them on a CPU, with one thread.

    python tests/data/make_four_bit_vectors.py          needs torch and bitsandbytes; made with 2.14 and 0.50.2
"""

import pathlib
import sys

import bitsandbytes.functional as F
import numpy
import torch

CASES = {  # name: shape, kind, blocksize, dtype, double
    "nf4": ((40, 64), "nf4", 64, "float32", True),
    "odd": ((9, 65), "nf4", 64, "float32", True),
    "many": ((300, 32), "nf4", 32, "bfloat16", True),
    "single": ((11, 33), "nf4", 128, "float16", False),
    "fp4": ((13, 64), "fp4", 64, "float32", True),
    "fp4_odd": ((3, 43), "fp4", 64, "bfloat16", False),
}


def main() -> None:
    torch.set_num_threads(1)
    rng, held = numpy.random.default_rng(20261127), {}
    for name, (shape, kind, blocksize, dtype, double) in CASES.items():
        drawn = rng.normal(size=shape) * rng.choice([0.02, 1.0, 30.0])
        drawn[1], drawn[2, :20] = 0.0, drawn[2, :20] * 1e-5
        W = torch.tensor(drawn, dtype=getattr(torch, dtype))
        codes, state = F.quantize_4bit(W, blocksize=blocksize, quant_type=kind, compress_statistics=double)
        arrays = {"W": W.float() if dtype == "float32" else W.view(torch.int16), "codes": codes.reshape(-1),
                  "absmax": state.absmax}
        if dtype == "float32":  # others are rounded when they are decoded
            arrays["decoded"] = F.dequantize_4bit(codes, state)
        if double:
            arrays |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
        held |= {f"{name}.{key}": value.numpy() for key, value in arrays.items()}
        held[f"{name}.settings"] = numpy.array([kind, str(blocksize), dtype])
    held["map"] = F.create_dynamic_map().numpy()
    for kind in ("nf4", "fp4"):
        held[kind] = F.get_4bit_type(kind, device="cpu").numpy()
    numpy.savez_compressed(pathlib.Path(__file__).with_name("four_bit_vectors.npz"), **held)
    print(f"{len(held)} arrays", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Make lora_linear_torch.npz: what PEFT's LoRA layer computes, and PyTorch's gradients of it, in float64.

    python tests/data/make_lora_vectors.py

Run with the versions that the file itself names. A tool for the maintainers: the tests read the file and need neither
PyTorch nor PEFT. The parity tests compare with the versions that are installed.

The file holds one flat array a case, and "about", a JSON text: the versions, and for each case its settings and the
names and shapes of the arrays that follow one another in the flat one.
"""
import json
from pathlib import Path

import numpy as np
import peft
import torch

TARGET = Path(__file__).with_name("lora_linear_torch.npz")
# name: input shape, out, r, lora_alpha, bias
CASES = {
    "plain": ((5, 7), 4, 3, 6.0, True),
    "alpha_is_not_r": ((6, 4), 5, 2, 5.0, True),
    "no_bias": ((3, 6), 8, 4, 1.0, False),
    "three_axes": ((2, 3, 5), 4, 2, 16.0, True),
    "one_row_rank_one": ((1, 3), 2, 1, 0.5, True),
    "rank_above_both": ((4, 3), 2, 5, 10.0, True),
    "at_the_start": ((5, 6), 3, 2, 4.0, True),
}
STEPS = 5  # of AdamW, on the mean square of the output


class Model(torch.nn.Module):
    def __init__(self, n_in, out, bias):
        super().__init__()
        self.fc = torch.nn.Linear(n_in, out, bias=bias)

    def forward(self, x):
        return self.fc(x)


def vectors(shape, out, r, alpha, bias, start, seed):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["fc"], bias="none")
    model = peft.get_peft_model(Model(shape[-1], out, bias), config).double()
    layer = model.base_model.model.fc
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(torch.randn_like(A))
        if not start:  # with B = 0 the gradient of A says nothing
            B.copy_(torch.randn_like(B))
    W, b = layer.base_layer.weight, layer.base_layer.bias
    x = torch.randn(shape, dtype=torch.float64)
    inputs = {"x": x, "A": A, "B": B, "W": W} | ({"b": b} if bias else {})
    for array in inputs.values():
        array.requires_grad_(True)
    y = model(x)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    values = inputs | {"dy": dy, "y": y} | {f"d{name}": dx for name, dx in zip(inputs, gradients)}
    values = {name: to_numpy(value) for name, value in values.items()}

    optimizer = torch.optim.AdamW([A, B], lr=0.05, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x.detach()) ** 2).mean().backward()
        optimizer.step()
    return values | {"A_trained": to_numpy(A), "B_trained": to_numpy(B)}


def to_numpy(value):
    return value.detach().numpy().copy()


if __name__ == "__main__":
    versions = f"torch {torch.__version__}, peft {peft.__version__}, numpy {np.__version__}"
    about, flat = {"versions": versions, "cases": {}}, {}
    for seed, (name, case) in enumerate(CASES.items()):
        arrays = vectors(*case, name == "at_the_start", seed)
        flat[name] = np.concatenate([array.ravel() for array in arrays.values()])
        about["cases"][name] = {"r": case[2], "lora_alpha": case[3],
                                "shapes": {key: array.shape for key, array in arrays.items()}}
    np.savez_compressed(TARGET, about=np.array(json.dumps(about)), **flat)
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes, {versions}")

"""What transformers computes with tiny models, for where it is not installed: `python tests/data/make_model_vectors.py`.

For each architecture: config.json, names and shapes of the tensors (their numbers are `checkpoint_cases.numbers`), outputs,
loss, and of each gradient g the number sum(g * numbers("gradient", shape)). All in float64.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint_cases import ARCHITECTURES, SIZES, batch, labels_of, numbers  # noqa: E402

WHERE = Path(__file__).with_name("model_vectors.json")


def vectors(architecture):
    family, kind = ARCHITECTURES[architecture]
    config = transformers.AutoConfig.for_model(family, **SIZES[family])
    if kind in ("text", "tokens"):
        config.num_labels = 3
    model = getattr(transformers, architecture)(config).double().eval()
    model.config.architectures, model.config.dtype = [architecture], "float64"
    state = model.state_dict()
    shared = getattr(model, "_tied_weights_keys", None) or {}
    with torch.no_grad():
        for name, p in model.named_parameters(remove_duplicate=False):
            if name not in shared:
                p.copy_(torch.tensor(numbers(name, tuple(p.shape))))
    ids, mask = batch(family, "left")
    labels = labels_of(kind, ids, mask)
    result = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    output = result.last_hidden_state if kind == "hidden" else result.logits
    if kind == "hidden":
        loss = ((output * torch.tensor(mask)[..., None]) ** 2).mean()
    else:
        logits, targets = (output[:, :-1], torch.tensor(labels)[:, 1:]) if kind == "next" else (output, torch.tensor(labels))
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    loss.backward()
    gradients = {name: float((p.grad.numpy() * numbers("gradient", tuple(p.shape))).sum())
                 for name, p in model.named_parameters(remove_duplicate=False) if name not in shared and p.grad is not None}
    output = output.detach().numpy()
    if kind != "text":
        output = np.where(mask[..., None] == 1, output, 0.0)  # nobody reads what stands at padding
    return {"config": json.loads(model.config.to_json_string(use_diff=False)), "output": output.tolist(), "loss": loss.item(),
            "tensors": {name: [*tensor.shape] for name, tensor in state.items() if name not in shared}, "gradients": gradients}


if __name__ == "__main__":
    made = {name: vectors(name) for name in ARCHITECTURES}
    made["made with"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    WHERE.write_text(json.dumps(made, separators=(",", ":")) + "\n")

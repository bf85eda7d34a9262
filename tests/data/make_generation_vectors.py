"""Make generation_transformers.json: what transformers writes with tiny models, and what it makes of logits.

    python tests/data/make_generation_vectors.py

Run with the versions that the file itself names. A tool for the maintainers: the tests read the file and need neither PyTorch
nor transformers. The parity tests compare with the versions that are installed. The models and the logits are drawn by
generation_cases.py from seeds.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

TARGET = Path(__file__).with_name("generation_transformers.json")
TESTS = TARGET.parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "parity"), str(TESTS.parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from generation_cases import N, PROCESSED, PROMPTS, SETTINGS, logits, model_of, seen  # noqa: E402
from test_models_generate import continued  # noqa: E402
from test_torch_transformer import MAKERS, TRANSPOSED, names  # noqa: E402


def theirs(family):
    own = model_of(family)
    other = MAKERS[family](torch, transformers, own.config).eval()
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in own.state_dict().items():
            turned = value.T if family == "gpt2" and name.endswith(TRANSPOSED) else value
            parameters[names(family)[name][0]].copy_(torch.tensor(turned))
    return other


def processed(temperature, k, p, penalty):
    classes, ids, z = transformers.generation.logits_process, torch.tensor(seen()), torch.tensor(logits(ties=False))
    steps = [penalty and classes.RepetitionPenaltyLogitsProcessor(penalty), classes.TemperatureLogitsWarper(temperature),
             k and classes.TopKLogitsWarper(k), p and classes.TopPLogitsWarper(p)]
    for step in filter(None, steps):
        z = step(ids, z)
    return [[round(x, 12) for x in row] for row in z.softmax(dim=-1).tolist()]


def main():
    texts = {}
    for family in ("gpt2", "llama"):
        other = theirs(family)
        for name, settings in SETTINGS.items():
            texts[f"{family} {name}"] = [continued(torch, other, [prompt], [[1] * len(prompt)], **settings)[0]
                                         for prompt in PROMPTS]
    about = SimpleNamespace(torch=torch.__version__, transformers=transformers.__version__, new_tokens=N)
    vectors = {"about": vars(about), "texts": texts, "probabilities": {name: processed(*PROCESSED[name]) for name in PROCESSED}}
    TARGET.write_text(json.dumps(vectors, separators=(",", ":")).replace('],"', '],\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

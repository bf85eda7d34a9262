"""kernels/ is speed only: with the folder deleted, everything still runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import minilora

STEP = """
import minilora, numpy
layer = minilora.lora.Linear(4, 3, r=2, lora_dropout=0.5, rng=0)
optimizer = minilora.optim.Adam(layer.parameters())
x = minilora.tensor(numpy.ones((5, 4), "float32"))
minilora.ops.mse(minilora.ops.gelu(layer(x)), numpy.zeros((5, 3), "float32")).backward()
optimizer.step()
print(minilora.__file__, layer.lora_B.data.any())
"""


def test_a_step_runs_without_the_folder(tmp_path):
    package = Path(minilora.__file__).parent
    shutil.copytree(package, tmp_path / "minilora", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    done = subprocess.run([sys.executable, "-W", "error", "-c", STEP], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "minilora" / "__init__.py"), "True"]

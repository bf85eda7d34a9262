"""`minilora merge`, `unmerge` and `verify`."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora.cli.main import main
from minilora.formats import load_state, open_state

ROOT = Path(__file__).resolve().parents[2]


def said(capsys, *words, status=0):
    assert main([*words, "--json", "--quiet"]) == status
    return json.loads(capsys.readouterr().out)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_and_back(there, capsys):
    report = said(capsys, "merge", "base", "adapter", "-o", "merged")
    assert report["schema"] == "minilora.merge/1" and report["written"] and len(report["tensors"]) == 14
    assert all(0.99 < row["gain"] < 1.01 for row in report["tensors"])
    tuned, merged = (load_state(name + "/model.safetensors") for name in ("tuned", "merged"))
    for name, array in tuned.items():
        np.testing.assert_array_equal(merged[name], array)
    rehearsed = said(capsys, "unmerge", "merged", "-o", "again", "--dry-run")
    assert not rehearsed["written"] and rehearsed["restored"] == 14 and not Path("again").exists()
    report = said(capsys, "unmerge", "merged", "-o", "again")
    assert report["schema"] == "minilora.unmerge/1" and report["restored"] == 14
    assert files_in(there / "again") == files_in(there / "base")
    report = said(capsys, "verify", "merged", "base", "adapter")
    assert report["schema"] == "minilora.verify/1" and report["sound"] and not report["different"]


def test_weights_and_dtype(there, capsys):
    report = said(capsys, "merge", "base", "adapter=0.5", "other=-0.25", "-o", "out", "--dtype", "float16", "--rounding",
                  "stochastic", "--seed", "3", "--no-patch")
    assert report["adapters"] == {"adapter": 0.5, "other": -0.25} and report["patch_nbytes"] == 0
    assert set(open_state("out/model.safetensors").dtypes.values()) == {"F16"}
    assert said(capsys, "verify", "out", "base", "adapter=0.5", "other=-0.25")["sound"]
    wrong = said(capsys, "verify", "out", "base", "adapter=0.5", status=3)
    assert not wrong["sound"] and "model.layers.0.self_attn.q_proj.weight" in wrong["different"]


def test_verify_says_which_tensor_in_words(there, capsys):
    main(["merge", "base", "adapter", "-o", "merged", "--quiet"])
    part, entry = open_state("merged/model.safetensors").place("model.norm.weight")
    data = bytearray(part.path.read_bytes())
    data[part.header.start + entry.begin] ^= 1
    part.path.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", "merged", "base", "adapter"]) == 3
    assert "differs: model.norm.weight: 1 of 16 numbers" in capsys.readouterr().out


def test_rehearsal_writes_nothing(there, capsys):
    before = sorted(there.rglob("*"))
    report = said(capsys, "merge", "base", "adapter", "-o", "merged", "--dry-run")
    assert not report["written"] and len(report["tensors"]) == 14 and sorted(there.rglob("*")) == before
    assert main(["merge", "base", "adapter", "-o", "merged", "--dry-run"]) == 0
    assert "nothing was written: this was a rehearsal" in capsys.readouterr().out


@pytest.mark.parametrize("words, code, text", [
    (["merge", "base", "adapter", "-o", "base"], 1, "from which the result is made"),
    (["merge", "base", "adapter", "-o", "tuned"], 1, "--overwrite"),
    (["merge", "adapter", "base", "-o", "out"], 1, "this is an adapter, and a base is expected"),
    (["merge", "base", "nobody", "-o", "out"], 1, "no such file"),
    (["merge", "encoder", "adapter", "-o", "out"], 1, "nothing was written"),
    (["merge", "base", "adapter=x", "-o", "out"], 2, "ADAPTER=WEIGHT"),
    (["merge", "base", "adapter", "-o", "out", "--memory", "lots"], 2, "expected a size"),
    (["merge", "base", "adapter", "-o", "out", "--memory", "1KB"], 1, "give more"),
    (["merge", "base", "adapter", "-o", "out", "--names", "thinker"], 2, "OLD=NEW"),
    (["unmerge", "base", "-o", "out"], 1, "no minilora_patch.safetensors"),
    (["verify", "nobody", "base", "adapter"], 1, "no such file"),
])
def test_what_is_refused(there, capsys, words, code, text):
    before = sorted(there.rglob("*"))
    assert main(words) == code
    assert text in capsys.readouterr().err and sorted(there.rglob("*")) == before


def test_names_of_another_program(there, capsys):
    from minilora import formats

    saved = formats.read_adapter("adapter")
    odd = formats.SavedAdapter({f"thinker.{path}": u for path, u in saved.updates.items()}, saved.config)
    formats.write_adapter(odd, "odd")
    assert main(["merge", "base", "odd", "-o", "out"]) == 1
    assert "mapping={'thinker.': ''}" in capsys.readouterr().err
    said(capsys, "merge", "base", "odd", "-o", "out", "--names", "thinker.=")
    assert said(capsys, "verify", "out", "base", "odd", "--names", "thinker.=")["sound"]


def test_no_library_that_merging_does_not_need(there):
    code = ("import sys; from minilora.cli.main import main; main(['merge', 'base', 'adapter', '-o', 'm', '--quiet']); "
            "print([name for name in ('matplotlib', 'tokenizers', 'cupy', 'torch', 'minilora.models') if name in sys.modules])")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": paths})
    assert done.stdout.splitlines()[-1] == "[]"

"""What a verb loads: for its help nothing, for its work no package that it does not need."""
import json
import os
import subprocess
import sys
from pathlib import Path

from minilora.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["cupy", "matplotlib", "tokenizers", "torch", "transformers", "peft", "scipy", "sklearn", "pandas", "gguf", "mpi4py",
         "safetensors", "jinja2", "huggingface_hub"]
# What the example of a verb may load; these run last.
NEEDS = {"check": {"gguf"},
         "train": {"tokenizers", "jinja2", "matplotlib", "mpi4py"}, "eval": {"tokenizers", "jinja2", "mpi4py"},
         "generate": {"tokenizers", "jinja2"}, "embed": {"tokenizers"}}

HELP = """
import io, sys
from contextlib import redirect_stdout
from minilora.cli.main import VERBS, main
loaded = {}
for verb in VERBS:
    with redirect_stdout(io.StringIO()):
        if main([verb, "--help"]):
            raise SystemExit(verb)
    loaded[verb] = sorted(name for name in ("numpy", "minilora.engine") if name in sys.modules)
import json
print(json.dumps(loaded))
"""
EXAMPLES = """
import io, json, os, re, shlex, shutil, sys
from contextlib import redirect_stderr, redirect_stdout
from minilora.cli.main import main, verb_named
class Terminal(io.StringIO):
    def isatty(self):
        return True
loaded, wide = {}, []
for verb in sys.argv[1:]:
    os.chdir(shutil.copytree(os.environ["EXAMPLES"], os.path.join(os.environ["WORK"], verb)))
    for line in verb_named(verb).EPILOG.splitlines():
        if line.startswith("  minilora "):
            out, err = Terminal(), Terminal()
            with redirect_stdout(out), redirect_stderr(err):
                status = main(shlex.split(line, comments=True)[1:])
            if status:
                raise SystemExit(f"{line}: exit code {status}")
            shown = err.getvalue() + ("" if "--json" in line else out.getvalue())
            shown = shown.replace(os.environ["WORK"], "WORK")  # a folder's name is as long as the machine makes it
            wide += [f"{line}: {part}" for part in re.split("[\\n\\r]", shown) if len(part) > 80]
    loaded[verb] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([loaded, wide]))
"""


def child(code, *words, **more):
    """Run it without assertions, in ASCII, and with errors for warnings: a user may have it so."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", **more}
    done = subprocess.run([sys.executable, "-O", "-W", "error", "-c", code, *words], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_loads_neither_numpy_nor_the_engine():
    """Which of them does is the first that is not empty: they run one after the other in one process."""
    assert {verb: names for verb, names in child(HELP).items() if names} == {}


def test_work_loads_no_package_that_it_does_not_need_and_its_output_fits_a_terminal(examples, tmp_path):
    verbs = sorted((verb for verb in VERBS if not NEEDS.get(verb)), key=list(VERBS).index)
    found, wide = child(EXAMPLES, *verbs, EXAMPLES=str(examples), WORK=str(tmp_path), COLUMNS="80")
    assert {verb: heavy for verb, names in found.items() if (heavy := set(HEAVY) & set(names))} == {}
    assert [line for line in wide if f"python {ROOT}" not in line] == []  # a line to type is as long as it is

"""What a user installs: metadata, optional dependencies, the type marker, and what the tree must not hold."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHES = {
    "__pycache__", "build", "dist", "runs", "htmlcov", ".git", ".pytest_cache", ".mypy_cache", ".hypothesis",
}
TEXT = {".py", ".md", ".cfg", ".toml", ".txt", ".cu", ".cuh", ".rst", ".yml", ".yaml", ".json", ".ipynb", ".sh", ""}


def project_files():
    """Every file of the project: no caches, no build products, no virtual environment inside the tree."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(
            name for name in folders
            if name not in CACHES and not name.endswith(".egg-info")
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        )
        for name in sorted(names):
            if name != ".git":  # of a worktree: a file that says where the repository is
                yield Path(folder) / name


@pytest.fixture(scope="module")
def metadata():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text):
    return [line for line in text.splitlines() if line]


def test_pyproject_only_names_the_build_system():
    # A [project] table would override setup.cfg, other tables would split the settings over two files.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"^\s*\[+([^\]]+)\]+", text, re.MULTILINE) == ["build-system"]


def test_setup_cfg_holds_no_bare_per_cent_sign():
    # setuptools interpolates every section, also those of other tools. Comments count too: a simpler rule.
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "%" not in re.sub(r"%\(\w+\)s", "", text)


def test_setuptools_can_interpolate_every_value():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    for section in parser.sections():
        assert dict(parser.items(section))


def test_numpy_is_the_only_requirement(metadata):
    assert requirements(metadata["options"]["install_requires"]) == ["numpy>=2.0"]
    assert metadata["options"]["python_requires"] == ">=3.10"


def test_classifiers_name_every_python_from_the_oldest_that_is_allowed(metadata):
    classifiers = requirements(metadata["metadata"]["classifiers"])
    assert len(classifiers) == len(set(classifiers))
    versions = [int(line.rpartition(".")[2]) for line in classifiers if re.search(r":: 3\.\d+$", line)]
    assert metadata["options"]["python_requires"] == f">=3.{versions[0]}"
    assert versions == list(range(versions[0], versions[-1] + 1))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python 3.{versions[0]} or newer" in readme and f"on Python 3.{versions[0]} to" in readme


def test_classifiers_exist(metadata):
    # An index refuses an upload with a classifier that it does not know.
    trove_classifiers = pytest.importorskip("trove_classifiers")
    assert set(requirements(metadata["metadata"]["classifiers"])) <= trove_classifiers.classifiers


def test_extras(metadata):
    extras = {name: requirements(text) for name, text in metadata["options.extras_require"].items()}
    assert set(extras) == {"gpu12", "gpu13", "models", "gguf", "demos", "notebooks", "mpi", "test", "bench"}
    # Plain "cupy" is a source build that clashes with the wheels.
    assert not any(re.match(r"cupy\b(?!-cuda)", line) for lines in extras.values() for line in lines)
    # Tests run the demos without a picture where matplotlib is absent, so two packages are enough.
    assert [re.split(r"[<>=\[]", line)[0] for line in extras["test"]] == ["pytest", "hypothesis"]


def test_readme_installs_extras_that_exist(metadata):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"\.\[([\w,]+)\]", readme) for extra in group.split(",")}
    assert {"demos", "test"} <= named <= set(metadata["options.extras_require"])


def test_package_is_marked_as_typed(metadata):
    assert (ROOT / "minilora" / "py.typed").read_bytes() == b""
    assert "py.typed" in metadata["options.package_data"]["minilora"]


def test_an_editable_install_is_a_path_that_editors_and_mypy_follow(metadata):
    # setuptools' default is an import hook, which only a running Python can follow: mypy finds no minilora then.
    assert metadata["editable_wheel"]["mode"] == "compat"
    assert "tests/typed_user.py" in metadata["mypy"]["files"]
    assert "typed_user.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_folder_with_code_is_a_package():
    # `packages = find:` leaves a folder without __init__.py out of the wheel, silently.
    folders = {path.parent for path in (ROOT / "minilora").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


SHIPPED = {"minilora", "tests", "demos", "docs", ".ci"}


def built_sdist(source, into):
    """What a packager's tool does, offline: ask the build backend, in a folder that holds pyproject.toml."""
    code = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(into)], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist of a copy of the tree: setuptools writes beside what it packs, and reads what it wrote before."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    for path in project_files():
        if path.parent == ROOT or path.relative_to(ROOT).parts[0] in SHIPPED:
            copy = folder / "tree" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    # What a run of the tests leaves behind must not be packed.
    (folder / "tree" / "tests" / "__pycache__").mkdir()
    (folder / "tree" / "tests" / "__pycache__" / "test_x.cpython-311.pyc").write_bytes(b"x")
    with tarfile.open(built_sdist(folder / "tree", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow  # .ci/run compares the sdist with the tree, too
def test_sdist_is_whole_and_holds_nothing_generated(sdist):
    made = ("PKG-INFO", "minilora.egg-info/")  # by setuptools, which also rewrites setup.cfg
    packed = {name: data for name, data in files_in(sdist).items() if not name.startswith(made)}
    names = {path.relative_to(ROOT).as_posix() for path in project_files() if path.relative_to(ROOT).parts[0] in SHIPPED}
    names |= {"setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
    assert (names - set(packed), set(packed) - names) == (set(), set())
    assert [name for name in names - {"setup.cfg"} if packed[name] != (ROOT / name).read_bytes()] == []


def test_readme_commands_name_files_of_the_tree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"python (?:-m pytest )?((?:demos|tests|docs)/[\w/.]+)", readme)
    assert "demos/check_gradients.py" in named and [name for name in named if not (ROOT / name).is_file()] == []
    # The sdist is built by CI as well, which compares its wheel with the tree's and runs the README's file of tests in it.
    (tests,) = {name for name in named if name.startswith("tests/")}
    assert f"pytest -q -p no:cacheprovider {tests}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_what_ci_names_is_there():
    """A file that was moved would end the run after twenty minutes of it."""
    named = re.findall(r"(?<![\w./])(?:demos|tests)/[\w/]+(?:\.py)?", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []


def test_version_is_the_newest_in_the_changelog():
    source = (ROOT / "minilora" / "release.py").read_text(encoding="utf-8")
    # setuptools reads the literal without importing the package.
    (version,) = re.findall(r'^__version__(?:: \w+)? = "([^"]+)"$', source, re.MULTILINE)
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] in (version, "Unreleased")


USED = "minilora.Tensor, minilora.nn, minilora.ops, minilora.optim, minilora.lora, minilora.record"  # loaded when first used


def test_import_loads_no_optional_package():
    probe = (
        "import sys, minilora\n"
        f"{USED}\n"
        "print(minilora.__version__)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[1].split()
    optional = {"cupy", "cupyx", "matplotlib", "tqdm", "torch", "scipy", "peft", "transformers", "pytest"}
    assert "numpy" in loaded
    assert optional.intersection(loaded) == set()


def test_import_alone_loads_nothing():
    """`minilora --help` pays for what is imported here: not for NumPy, and not for the engine."""
    code = ("import sys, minilora, minilora.cli.main; "
            "print(*sorted(name for name in sys.modules if name.startswith(('numpy', 'minilora'))))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["minilora", "minilora.cli", "minilora.cli.main", "minilora.cli.terms", "minilora.errors",
                                   "minilora.flags", "minilora.release", "minilora.terminal"]


@pytest.mark.parametrize("first", ["engine", "walk", "ops", "tensor", "nn", "lora", "formats", "optim.adam", "ops.linear"])
def test_any_file_may_be_imported_first(first):
    code = (f"import minilora.{first}, minilora; t = minilora.tensor([1.0]); assert callable(minilora.tensor); "
            "assert type(t) is minilora.Tensor and minilora.engine.backward is minilora.backward; "
            "from minilora.tensor import Tensor; assert Tensor is minilora.Tensor")
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def test_files_are_named_after_what_they_hold():
    anything = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    assert [str(path.relative_to(ROOT)) for path in project_files() if path.name in anything] == []


PRIVATE = {
    "private address": (
        r"\b(?:10[.]\d{1,3}|192[.]168|172[.](?:1[6-9]|2\d|3[01]))[.]\d{1,3}[.]\d{1,3}\b(?![.\d])"
    ),
    "URL of a host without a public name": (
        r"https?://(?!localhost\b|127[.])(?:[\w-]+|[\w.-]+[.](?:internal|local|lan|corp|intranet|home))"
        r"(?=[/:\s\"')>]|$)"
    ),
    "folder of one machine": r"(?<![\w.~-])/(?:home|root|Users|work|mnt|scratch)/[\w.-]+",
}


def private_lines(text):
    return [
        f"{number}: {kind}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for kind, pattern in PRIVATE.items() if re.search(pattern, line)
    ]


def test_no_line_names_a_private_host_or_folder():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in project_files() if path.suffix in TEXT and path != Path(__file__).resolve()
        for line in private_lines(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("line", [
    "http://10.1.2.3/simple", "192.168.0.7:8080", "host 172.20.1.1", "https://pypi.internal/simple",
    "https://buildbox/job/3", "http://cache.lan", "open('/home/ann/data.npz')", "cd /root/x",
])
def test_private_lines_are_found(line):
    assert private_lines(line)


@pytest.mark.parametrize("line", [
    "https://pypi.org/simple/", "http://localhost:8000", "numpy 2.10.0, version 10.2.1", "threading.local()",
    "python demos/synthetic_shift.py --out runs/home", "docs/work/notes.md", "#!/bin/bash", "x / work",
])
def test_public_lines_pass(line):
    assert not private_lines(line)


def test_import_reads_no_more_of_numpy_than_numpy_does():
    """numpy.random, which an annotation that is evaluated reads, costs 20 ms: as much as all of minilora."""
    code = f"import sys, numpy; before = set(sys.modules); import minilora; {USED}; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.partition(".")[0] for name in loaded if not name.startswith("minilora")}
    assert "numpy" not in foreign, [name for name in loaded if name.startswith("numpy")]


def test_no_parity_file_skips_itself_while_it_is_imported():
    """Any run, whatever it selects, would report a skip; .ci/run takes a skip for a compiler that was not asked."""
    skipping = [path.name for path in sorted((ROOT / "tests" / "parity").glob("*.py"))
                if re.search(r"^(\w+ = )?pytest\.importorskip", path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert skipping == []

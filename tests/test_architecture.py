"""The arrows between the rooms of the package, and what a room may hold.

Read from the syntax tree: nothing is imported. Each rule is a function from one module to its complaints.
The rules run over the package, and over planted offences below: a rule that has stopped biting is noticed.
"""

import ast
import functools
import itertools
import os
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minilora"

# room: the rooms it may import. Its own room is always allowed. A new room needs a line here.
ARROWS = {
    "errors": set(),
    "release": set(),
    "calls": {"elsewhere", "errors"},
    "elsewhere": set(),
    "flags": set(),
    "shown": {"terminal"},
    "tables": {"terminal"},
    "later": {"calls", "unsupported"},
    "terminal": set(),
    "half": {"calls"},
    "probe": set(),
    "settings": {"errors"},
    "choice": {"errors"},
    "versions": {"choice", "kernels"},
    "tensor_cores": {"choice", "errors"},
    "values": {"errors"},
    "typing": set(),
    "node": set(),
    "replay": {"errors"},
    "device": {"errors", "replay", "tensor_cores", "versions"},
    "asked": set(),
    "outside": {"asked", "backend", "replay", "tensor"},
    "graphs": {"backend", "calls", "errors", "outside", "replay", "settings"},
    "stored": {"device"},
    "backend": {"calls", "device", "errors", "probe", "stored", "tensor_cores", "values", "versions"},
    "handle": {"backend", "calls", "errors", "values"},
    "unsupported": {"errors"},
    "recording": {"errors"},
    "gathered": {"errors"},
    "ledger": {"complaints", "node", "shown", "terminal"},
    "engine": {"backend", "errors", "half", "ledger", "recording", "stored", "tensor", "values", "walk"},
    "complaints": {"errors", "node", "typing"},
    "walk": {"backend", "complaints", "engine", "errors", "half", "replay", "tensor", "gathered"},
    "tensor": {"backend", "calls", "engine", "handle", "ops", "errors", "replay", "stored", "unsupported", "gathered"},
    "ops": {"engine", "backend", "errors", "later", "settings", "stored", "values"},
    "nn": {"backend", "calls", "engine", "errors", "ops", "parts", "replay", "settings", "shown", "stored", "tables",
           "tensor", "unsupported"},
    "optim": {"backend", "errors", "later", "replay", "settings", "stored", "tensor", "unsupported"},
    "tuners": {"backend", "engine", "errors", "later", "nn", "ops", "replay", "settings", "shown", "stored", "tensor"},
    "quant": {"backend", "engine", "errors", "later", "nn", "parallel", "settings", "shown", "stored", "tables", "tensor"},
    "collective": {"errors"},
    "parts": {"errors"},
    "blas": set(),
    "parallel": {"backend", "blas", "engine", "errors", "gathered", "half", "parts", "settings", "tensor", "walk"},
    "formats": {"backend", "engine", "errors", "flags", "later", "lora", "nn", "parallel", "quant", "settings", "shown",
                "stored", "tables", "tensor", "tuners"},
    "models": {"calls", "nn", "ops", "engine", "tensor", "backend", "errors", "settings", "formats", "parallel", "quant",
               "stored", "unsupported"},
    "lora": {"backend", "engine", "errors", "half", "hollow", "later", "nn", "ops", "optim", "quant", "shown", "stored",
             "tables", "tensor", "terminal"},
    "train": {"backend", "blas", "calls", "collective", "engine", "errors", "flags", "formats", "graphs", "half", "later",
              "lora", "nn", "ops", "optim", "outside", "parallel", "parts", "quant", "recording", "release", "replay",
              "settings", "shown", "stored", "tables", "tensor", "terminal", "tuners"},
    "hollow": {"backend", "device", "engine", "errors", "nn", "optim", "stored", "tensor", "versions"},
    "drawing": {"backend", "calls", "complaints", "engine", "errors", "recording", "settings", "stored", "tensor", "walk"},
    "testing": {"backend", "calls", "complaints", "engine", "errors", "shown", "tensor"},
    "kernels": {"backend", "collective", "errors", "graphs", "ops", "optim", "lora", "outside", "quant", "recording", "replay",
                "stored", "tensor"},
}
UNBOUND = {"__init__", "__main__", "cli", "puzzles"}  # the public face, the command line and the exercises may import all
# (from, to): the only names that may cross this arrow.
NARROW = {("optim", "tensor"): {"Parameter"}, ("kernels", "lora"): {"gradient", "gradients"}}
LAZY = {("versions", "kernels")}  # inside functions only: without a GPU nothing of it is read
AGAINST = {("nn/__init__.py", "models"): "whole models are public as nn.GPT2 too, and live in models"}
# (file, room): a file that alone may import it.
ALONE = {("ops/recompute.py", room): "an operation that is a graph of others: it makes one, and walks it"
         for room in ("gathered", "parts", "tensor", "walk")} | {
    ("ops/weights.py", room): "an operation that holds the graph of a network: it makes its leaves, and walks it"
    for room in ("gathered", "tensor", "walk")}
# Rooms inside lora/, and the files that stand beside them: gradient, config <- gradients, algebra, merging <- layers <- ...
GROUND = {"gradient", "config", "config_checks", "undo"}
INNER_ARROWS = {
    "gradients": GROUND,
    "algebra": GROUND,
    "merging": GROUND,
    "layers": GROUND | {"gradients", "algebra", "merging"},
    "adapters": GROUND | {"gradients", "algebra", "merging", "layers"},
    "planning": GROUND | {"gradients", "algebra", "merging", "layers", "adapters"},
}
CIRCLE = {"tensor", "engine", "walk", "ops"}  # Python's operators force one circle of files; it lies in these rooms
# (file, file): an arrow back that is left out where circles are looked for, and why nothing can do without it.
BACK = {("models/model.py", "models/__init__.py"):
        "model.save(folder) is models.save: what writes a model knows every family, and each family its models"}
DERIVATIVES = ("ops/", "lora/gradient.py", "lora/gradients/", "kernels/")  # where an operation may stand

# Rooms whose identifiers may say LoRA. kernels/ overrides the op of lora/gradient.py for one device.
KNOW_LORA = {"lora", "kernels", "train", "formats", "cli"} | UNBOUND

# (file, name used): why an operation may compute with numpy itself and not with self.xp. Empty so far.
NUMPY_IN_OPS = {}
# (file, function): why it may import a module whose name it computes.
COMPUTED_IMPORTS = {
    ("later.py", "get"): "what a program does not use costs no import",
    ("__init__.py", "__getattr__"): "models and testing are loaded when first used",
    ("formats/adapters/registry.py", "dialect_named"): "each dialect is loaded when a file is read or written",
    ("cli/main.py", "verb_named"): "a verb loads what it needs, and no other's",
    ("models/__init__.py", "__getattr__"): "a family that is not used costs no import",
    ("versions.py", "load"): "the overrides of a device stand in the file named after it",
}

FILE_LINES, FUNCTION_LINES = 300, 50
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
NETWORK = {
    "socket", "ssl", "urllib", "http", "ftplib", "smtplib", "poplib", "imaplib", "xmlrpc", "socketserver",
    "webbrowser", "requests", "httpx", "aiohttp", "urllib3", "huggingface_hub",
}
CODE_OR_SHELL = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "pty", "code"}
RUN_BUILTINS = {"eval", "exec", "compile"}
RUN_OS = ("system", "popen", "exec", "spawn", "posix_spawn")


class Module:
    """One parsed file: `name` is its path inside the package, `room` the first part of it."""

    def __init__(self, name, source):
        self.name, self.lines = name, source.count("\n")
        path = PurePosixPath(name)
        self.room = path.parts[0] if len(path.parts) > 1 else path.stem
        self.tree = ast.parse(source, name)
        self.nodes = [*ast.walk(self.tree)]
        for parent in self.nodes:
            for child in ast.iter_child_nodes(parent):
                child.parent = parent

    def at(self, node, text):
        return f"{self.name}:{node.lineno}: {text}"

    def walk(self, *kinds):
        return (node for node in self.nodes if isinstance(node, kinds))


def ancestors(node):
    while hasattr(node, "parent"):
        node = node.parent
        yield node


def function_of(node):
    """The name of the innermost function around `node`, or None at module level."""
    functions = (above for above in ancestors(node) if isinstance(above, FUNCTION))
    return next((function.name for function in functions), None)


def for_typing_only(node):
    """Under `if TYPE_CHECKING:`, which never runs: a name for an annotation, not an arrow."""
    blocks = (above for above in ancestors(node) if isinstance(above, ast.If))
    return any("TYPE_CHECKING" in ast.unparse(block.test) for block in blocks)


def dotted(node):
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


@functools.cache
def imports(module):
    """(node, absolute dotted name) of everything imported, relative imports resolved."""
    return [*_imports(module)]


def _imports(module):
    folder = ("minilora", *PurePosixPath(module.name).parts[:-1])
    for node in module.walk(ast.Import, ast.ImportFrom, ast.Call):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[:len(folder) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node, ".".join([*base, alias.name])) for alias in node.names)
        elif dotted(node.func).split(".")[-1] in ("import_module", "__import__") and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else "<computed>"
            level = len(name) - len(name.lstrip("."))
            yield node, ".".join([*folder[:len(folder) - level + 1], name[level:]]) if level else name


def arrows_point_one_way(module):
    if module.room in UNBOUND:
        return
    if module.room not in ARROWS:
        yield f"{module.name}: the room {module.room!r} has no line in ARROWS"
        return
    for node, name in imports(module):
        package, _, inner = name.partition(".")
        if package != "minilora" or for_typing_only(node):
            continue
        room, _, item = inner.partition(".")
        arrow = (module.room, room)
        if room not in ARROWS:
            yield module.at(node, f"imports {name}: take it from the room that defines it")
        elif (module.name, room) in AGAINST and function_of(node):
            continue
        elif room != module.room and room not in ARROWS[module.room] and (module.name, room) not in ALONE:
            yield module.at(node, f"imports {name}: {module.room} may not depend on {room}")
        elif arrow in NARROW and item.partition(".")[0] not in NARROW[arrow]:
            yield module.at(node, f"imports {name}: only {sorted(NARROW[arrow])} may cross from {room}")
        elif arrow in LAZY and not function_of(node):
            yield module.at(node, f"imports {name} at module level, not inside a function")


def arrows_inside_lora_point_one_way(module):
    parts = PurePosixPath(module.name).with_suffix("").parts
    if parts[0] != "lora" or len(parts) == 2 and parts[1] == "__init__":
        return
    room = parts[1]
    if room not in GROUND | INNER_ARROWS.keys():
        yield f"{module.name}: the room {room!r} of lora/ has no line in INNER_ARROWS"
        return
    for node, name in imports(module):
        package, _, inner = name.partition("minilora.lora.")
        if package or not inner or for_typing_only(node):
            continue
        other = inner.partition(".")[0]
        if other != room and other not in INNER_ARROWS.get(room, GROUND):
            yield module.at(node, f"imports {name}: inside lora/, {room} may not depend on {other}")


def derivatives_stay_at_home(module):
    for node in module.walk(ast.ClassDef):
        if "Op" in map(dotted, node.bases) and not module.name.startswith(DERIVATIVES):
            yield module.at(node, f"the operation {node.name} belongs into one of {', '.join(DERIVATIVES)}")


def names_are_apart(module):
    """Inside a room a name does not repeat that of the room: lora/merging/report.py, not merging_report.py."""
    *rooms, name = PurePosixPath(module.name).with_suffix("").parts
    if rooms and rooms[-1] != "kernels" and (name.startswith(f"{rooms[-1]}_") or name.endswith(f"_{rooms[-1]}")):
        yield f"{module.name}: repeats the name of its room"


def cupy_stays_in_its_rooms(module):
    for node, name in imports(module):
        if name.partition(".")[0] not in ("cupy", "cupyx"):
            continue
        if module.room not in ("backend", "probe", "kernels"):
            yield module.at(node, f"imports {name}: only backend.py, probe.py and kernels/ do")
        elif not (function_of(node) or for_typing_only(node)):
            yield module.at(node, f"imports {name} at module level, not inside a function")


def operations_compute_through_xp(module):
    """In ops/ numpy may serve annotations only: its functions fail on device arrays or copy them."""
    if module.room != "ops":
        return
    aliases = {
        alias.asname or "numpy"
        for node in module.walk(ast.Import) for alias in node.names if alias.name.split(".")[0] == "numpy"
    }
    for node in module.walk(ast.ImportFrom):
        if (node.module or "").partition(".")[0] == "numpy" and node.module != "numpy.typing":
            yield module.at(node, "imports names out of numpy: write np.name, which this rule can follow")
    for node in module.walk(ast.Name):
        if node.id not in aliases or in_annotation(node):
            continue
        used = node
        while isinstance(used.parent, ast.Attribute):
            used = used.parent
        if (module.name, dotted(used)) not in NUMPY_IN_OPS:
            yield module.at(node, f"computes with {dotted(used)}: use self.xp")


def in_annotation(node):
    child = node
    for above in ancestors(node):
        if isinstance(above, ast.arg) or (isinstance(above, ast.AnnAssign) and child is above.annotation):
            return True
        if isinstance(above, FUNCTION):
            return child is above.returns
        if isinstance(above, ast.AnnAssign) and "TypeAlias" in ast.unparse(above.annotation):
            return True
        child = above
    return False


def modules_hold_no_arithmetic(module):
    if module.room != "nn":
        return
    for node in module.walk(ast.BinOp, ast.AugAssign):
        if isinstance(node.op, ast.MatMult):
            yield module.at(node, "multiplies matrices: call an op")
    for node in module.walk(ast.Attribute):
        if node.attr == "xp":
            yield module.at(node, "reaches for .xp: call an op")


def identifiers(module):
    for node in module.nodes:
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield node, value


def only_lora_names_lora(module):
    if module.room in KNOW_LORA:
        return
    for node, name in identifiers(module):
        if "lora" in name.lower().replace("minilora", ""):
            yield f"{module.name}:{getattr(node, 'lineno', '?')}: the identifier {name!r} names LoRA"


def files_and_functions_are_short(module):
    if module.lines > FILE_LINES:
        yield f"{module.name}: {module.lines} lines, more than {FILE_LINES}: it is two files"
    for node in module.walk(*FUNCTION):
        has_docstring = ast.get_docstring(node, clean=False) is not None
        docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
        lines = node.end_lineno - node.lineno + 1 - docstring
        if lines > FUNCTION_LINES:
            yield module.at(node, f"{node.name} has {lines} lines without its docstring, more than {FUNCTION_LINES}")


def no_pickle_no_code_no_shell_no_network(module):
    for node, name in imports(module):
        if name.partition(".")[0] in NETWORK | CODE_OR_SHELL:
            yield module.at(node, f"imports {name}")
        if name == "<computed>" and (module.name, function_of(node)) not in COMPUTED_IMPORTS:
            yield module.at(node, "imports a module whose name is computed")
        if name.startswith("os.") and name[3:].startswith(RUN_OS):
            yield module.at(node, f"imports {name}")
    for node in module.walk(ast.Call):
        called = dotted(node.func)
        if called.removeprefix("builtins.") in RUN_BUILTINS:
            yield module.at(node, f"calls {called}")
        if called.startswith("os.") and called[3:].startswith(RUN_OS):
            yield module.at(node, f"calls {called}")
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                yield module.at(node, "allows pickle")


RULES = [
    arrows_point_one_way, arrows_inside_lora_point_one_way, derivatives_stay_at_home, names_are_apart,
    cupy_stays_in_its_rooms, operations_compute_through_xp, modules_hold_no_arithmetic, only_lora_names_lora,
    files_and_functions_are_short, no_pickle_no_code_no_shell_no_network,
]


@pytest.fixture(scope="module")
def package():
    return [
        Module(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule, package):
    complaints = [text for module in package for text in rule(module)]
    assert not complaints, "\n" + "\n".join(complaints)


WIDTH = 128  # flake8's, which reads Python alone


def wide_lines(name, text):
    return [f"{name}:{i}: {len(line)} columns, more than {WIDTH}" for i, line in enumerate(text.splitlines(), 1)
            if len(line.expandtabs()) > WIDTH]


def test_lines_of_cuda_are_short():
    texts = {path.name: path.read_text(encoding="utf-8") for path in (PACKAGE / "kernels" / "cuda").glob("*.cu*")}
    assert {name.partition(".")[2] for name in texts} == {"cu", "cuh"}
    assert not [complaint for name, text in texts.items() for complaint in wide_lines(name, text)]


def test_a_wide_line_is_found():
    (complaint,) = wide_lines("rows.cu", "x" * WIDTH + "\n" + "x" * (WIDTH + 1) + "\n")
    assert complaint.startswith("rows.cu:2: 129 columns")


def files_imported(module, names):
    """The files that a module names: to run, lazily, or for its types; the __init__ of a package only if it is named itself.

    An import that stands in a function, or under TYPE_CHECKING, starts; but who reads the one file has to read the other.
    """
    for node, name in imports(module):
        parts = name.split(".")
        if parts[0] == "minilora":
            for end in range(len(parts), 1, -1):
                path = "/".join(parts[1:end])
                found = [file for file in (f"{path}.py", f"{path}/__init__.py") if file in names]
                if found:
                    yield from () if (module.name, found[0]) in BACK else found[:1]
                    break


def circles(modules):
    """Sets of files each of which names, by some way, every other one."""
    names = {module.name for module in modules}
    needs = {module.name: set(files_imported(module, names)) for module in modules}
    reach = {name: set() for name in names}
    for name, seen in reach.items():
        frontier = [*needs[name]]
        while frontier:
            other = frontier.pop()
            if other not in seen:
                seen.add(other)
                frontier += needs[other]
    return {frozenset(other for other in seen if name in reach[other]) for name, seen in reach.items() if name in seen}


def test_no_circle_of_files_but_one(package):
    found = [sorted(circle) for circle in circles(package)
             if not {PurePosixPath(name).with_suffix("").parts[0] for name in circle} <= CIRCLE]
    assert not found, f"files that name each other: {found}. Where does what they share belong?"


def test_a_circle_is_found():
    sources = {"lora/layers/a.py": "from .b import x\n", "lora/layers/b.py": "def f():\n    from ..merging import c\n",
               "lora/merging/c.py": "from ..layers.a import y\nfrom .d import z\n", "lora/merging/d.py": "x = 1\n"}
    modules = [Module(name, source) for name, source in sources.items()]
    assert circles(modules) == {frozenset({"lora/layers/a.py", "lora/layers/b.py", "lora/merging/c.py"})}
    assert circles(modules[1:]) == set()


@pytest.mark.parametrize("line", [
    "from .fitting import Fitting", "def f():\n    from .fitting import Fitting", "import minilora.formats.merging.fitting",
    "if TYPE_CHECKING:\n    from .fitting import Fitting", "def f():\n    import_module('.fitting', __name__)",
    "if typing.TYPE_CHECKING:\n    from minilora.formats.merging import fitting"])
def test_a_circle_that_closes_late_or_for_types_only_is_found(line):
    fitting, heads = "formats/merging/fitting.py", "formats/merging/heads.py"
    assert circles([Module(fitting, "from .heads import is_new\n"), Module(heads, f"{line}\n")]) == {
        frozenset({fitting, heads})}


@pytest.mark.parametrize("arrow", BACK, ids=" to ".join)
def test_an_arrow_back_closes_a_circle(arrow, package, monkeypatch):
    """Where it has become lawful, nobody need know of it."""
    monkeypatch.delitem(BACK, arrow)
    assert any(set(arrow) <= circle for circle in circles(package))


def test_no_two_files_of_a_room_differ_by_an_ending(package):
    """adapted, adapter, adapting: nobody could say where a line belongs."""
    rooms = {}
    for module in package:
        path = PurePosixPath(module.name)
        if path.stem != "__init__":
            rooms.setdefault(path.parent, set()).add(path.stem)
    endings = ("", "s", "ed", "er", "or", "ing", "able", "ion", "ment", "e", "es")
    for room, names in rooms.items():
        for a, b in itertools.combinations(sorted(names), 2):
            stem = len(os.path.commonprefix([a, b]))
            assert stem < 4 or a[stem:] not in endings or b[stem:] not in endings, f"{room}: {a} and {b}"


def test_every_exception_is_in_use(package):
    used = {(module.name, dotted(node)) for module in package for node in module.walk(ast.Attribute)}
    assert set(NUMPY_IN_OPS) <= used
    functions = {(module.name, node.name) for module in package for node in module.walk(*FUNCTION)}
    assert set(COMPUTED_IMPORTS) <= functions
    crossed = {(module.name, name.split(".")[1]) for module in package for _, name in imports(module)
               if name.startswith("minilora.")}
    assert set(AGAINST) | set(ALONE) <= crossed


OFFENCES = [
    (arrows_point_one_way, "errors.py", "from minilora import backend"),
    (arrows_point_one_way, "ops/add.py", "from ..tensor import Tensor"),
    (arrows_point_one_way, "ops/add.py", "from .. import nn"),
    (arrows_point_one_way, "nn/linear.py", "from minilora.lora.gradient import delta"),
    (arrows_point_one_way, "nn/linear.py", "from minilora import Tensor"),
    (arrows_point_one_way, "optim/adam.py", "import minilora.ops"),
    (arrows_point_one_way, "optim/adam.py", "from minilora.tensor import Tensor"),
    (arrows_point_one_way, "nn/linear.py", "def f():\n    from ..models import GPT2"),
    (arrows_point_one_way, "nn/__init__.py", "import_module('..models', __name__)"),
    (arrows_point_one_way, "models/bodies/gpt2.py", "from ...lora import gradient"),
    (arrows_inside_lora_point_one_way, "lora/merging/weight.py", "from ..layers.base import layers_of"),
    (arrows_inside_lora_point_one_way, "lora/algebra/factors.py", "def f():\n    import minilora.lora.merging"),
    (arrows_inside_lora_point_one_way, "lora/config.py", "from .gradients import dora"),
    (arrows_inside_lora_point_one_way, "lora/cellar/wine.py", "x = 1"),
    (derivatives_stay_at_home, "lora/layers/rows.py", "class AddRows(Op): ..."),
    (derivatives_stay_at_home, "nn/linear.py", "class Linear(engine.Op, Op): ..."),
    (names_are_apart, "lora/merging/merging_report.py", "x = 1"),
    (names_are_apart, "lora/planning/more_planning.py", "x = 1"),
    (arrows_point_one_way, "kernels/gpu/elementwise.py", "from minilora.lora.layers import Linear"),
    (arrows_point_one_way, "backend.py", "from minilora.kernels import cpu"),
    (arrows_point_one_way, "backend.py", "def f():\n    from minilora import engine"),
    (arrows_point_one_way, "testing.py", "def f():\n    importlib.import_module('minilora.nn')"),
    (arrows_point_one_way, "cellar.py", "x = 1"),
    (cupy_stays_in_its_rooms, "ops/add.py", "def f():\n    import cupy"),
    (cupy_stays_in_its_rooms, "nn/linear.py", "from cupyx import scatter_add"),
    (cupy_stays_in_its_rooms, "backend.py", "import cupy"),
    (cupy_stays_in_its_rooms, "testing.py", "importlib.import_module('cupy.cuda')"),
    (operations_compute_through_xp, "ops/exp.py", "import numpy as np\ndef f(x):\n    return np.exp(x)"),
    (operations_compute_through_xp, "ops/exp.py", "import numpy as np\ndef f(x=np.zeros(1)): ..."),
    (operations_compute_through_xp, "ops/exp.py", "from numpy import exp"),
    (modules_hold_no_arithmetic, "nn/linear.py", "y = x @ w"),
    (modules_hold_no_arithmetic, "nn/linear.py", "y @= w"),
    (modules_hold_no_arithmetic, "nn/linear.py", "y = device.xp.exp(x)"),
    (only_lora_names_lora, "nn/linear.py", "def f(lora_alpha): ..."),
    (only_lora_names_lora, "nn/linear.py", "class LoRALinear: ..."),
    (only_lora_names_lora, "optim/adam.py", "f(lora_A=1)"),
    (only_lora_names_lora, "engine.py", "x = module.lora"),
    (files_and_functions_are_short, "engine.py", "x = 1\n" * 301),
    (files_and_functions_are_short, "engine.py", "def f():\n" + "    x = 1\n" * 50),
    (files_and_functions_are_short, "engine.py", "def f(x,\n      y):\n" + "    x = 1\n" * 49),
    (files_and_functions_are_short, "engine.py", 'def f():\n    """Text."""\n    # why\n' + "    x = 1\n" * 49),
    (no_pickle_no_code_no_shell_no_network, "backend.py", "import pickle"),
    (no_pickle_no_code_no_shell_no_network, "backend.py", "from urllib.request import urlopen"),
    (no_pickle_no_code_no_shell_no_network, "backend.py", "def f():\n    import subprocess"),
    (no_pickle_no_code_no_shell_no_network, "backend.py", "x = eval('1')"),
    (no_pickle_no_code_no_shell_no_network, "backend.py", "os.system('ls')"),
    (no_pickle_no_code_no_shell_no_network, "backend.py", "from os import popen"),
    (no_pickle_no_code_no_shell_no_network, "backend.py", "__import__(name)"),
    (no_pickle_no_code_no_shell_no_network, "formats/npz.py", "np.load(f, allow_pickle=True)"),
]


@pytest.mark.parametrize(("rule", "name", "source"), OFFENCES)
def test_offence_is_found(rule, name, source):
    assert list(rule(Module(name, source + "\n")))


LAWFUL = [
    ("ops/add.py", "from ..engine import Op\nfrom .sum import Sum\nfrom minilora.errors import ShapeError"),
    ("ops/add.py", "if TYPE_CHECKING:\n    from minilora.tensor import Tensor"),
    ("ops/exp.py", "import numpy as np\ndef f(x: np.ndarray) -> np.ndarray:\n    y: np.ndarray = x"),
    ("ops/exp.py", "import numpy as np\nArray: TypeAlias = np.ndarray"),
    ("backend.py", "def f():\n    import cupy"),
    ("versions.py", "def f():\n    from minilora.kernels import gpu"),
    ("kernels/gpu/elementwise.py", "from minilora.lora.gradient import LoRALinear\nfrom minilora.lora.gradients import fused"),
    ("optim/adam.py", "from minilora.tensor import Parameter"),
    ("nn/__init__.py", "def f():\n    import_module('..models', __name__)"),
    ("lora/layers/base.py", "from ..merging.mergeable import Update\nfrom .. import gradient"),
    ("lora/gradients/rows.py", "class AddRows(Op): ..."),
    ("nn/module.py", "def eval(self):\n    self.train(False)\nmodel.eval()\nerror = errors.MiniloraError"),
    ("__init__.py", "from minilora import lora, nn"),
    ("engine.py", 'def f():\n    """' + "text\n" * 60 + '    """\n    return "lora_alpha"'),
    ("engine.py", 'def f():\n    """Text."""\n' + "    x = 1\n" * 49),
]


@pytest.mark.parametrize(("name", "source"), LAWFUL)
def test_lawful_code_passes(name, source):
    assert [text for rule in RULES for text in rule(Module(name, source + "\n"))] == []

"""A GPU for the CUDA kernels, on the CPU: their text compiled as C++, and run with every thread of every block.

`Emulator.kernel` stands in for `minilora.kernels.launch.kernel`. A launch is checked as no GPU checks it:

- the arguments have the types of the parameters, and arrays are contiguous;
- the kernel works on copies between walls of NaN, so that a write outside is seen and a read outside spoils the result;
- arrays behind a pointer to const keep their values;
- all threads of a block meet at the same barriers;
- the threads between two barriers, and the blocks, run in three different orders, and all bits of the results agree: there is
  no race whose outcome depends on the order. (Of other races: test_races.py.)

What a GPU adds, and this cannot show: its own rounding of exp, log, tanh and division, speed, and launches that fail.
"""
from __future__ import annotations

import ctypes
import functools
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import standin
from standin.counts import count, perform

from minilora.kernels import launch

HEADER = Path(__file__).with_name("emulator.h")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)")
TYPES = {"float": np.float32, "double": np.float64, "int": np.int32, "long long": np.int64,
         "unsigned int": np.uint32, "unsigned short": np.uint16, "unsigned long long": np.uint64}
# The second line: longjmp leaves a stack for another, which glibc takes for an attack; and static variables stay the library's.
OPTIONS = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-U_FORTIFY_SOURCE",
           "-fno-gnu-unique"]  # #pragma unroll is NVRTC's
SEPARATE = ["-ffp-contract=off"]
JOINED = ["-O3", "-ffp-contract=fast"] + ["-mfma"] * (platform.machine() == "x86_64")  # a product and a sum rounded once
WALL = 512  # elements on each side of an array
ORDERS = (0, 1, 2)


class LaunchError(AssertionError):
    """A kernel was started wrongly, or did what it may not do."""


def parameters(text):
    """kernel name -> [(type, is a pointer, to const)]."""
    T = re.search(r"#define T (\w+)", text)[1]
    found = {}
    for name, listed in KERNEL.findall(text):
        found[name] = []
        for parameter in listed.split(","):
            const, kind, star = re.fullmatch(r"\s*(const )?([\w ]+?)\s*(\*?)\s*(?:__restrict__ )?\w+", parameter).groups()
            found[name].append((T if kind == "T" else kind, bool(star), bool(const)))
    return found


def rounding():
    """Whether products and sums are joined is for the options of NVRTC to say; without a word it joins them."""
    return SEPARATE if "--fmad=false" in launch.OPTIONS else JOINED


def compiled(text, folder, name):
    """The text as a library whose function run_<kernel> takes an array of addresses of the arguments."""
    runs = ""
    for kernel, listed in parameters(text).items():
        values = ", ".join(f"*({'const ' * const}{kind} {'*' * pointer}*)a[{i}]"
                           for i, (kind, pointer, const) in enumerate(listed))
        runs += f'extern "C" void run_{kernel}(void **a) {{ {kernel}({values}); }}\n'
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(f'#include "{HEADER}"\n#line 1\n{text}\n{runs}')
    done = subprocess.run(["g++", *OPTIONS, *rounding(), "-o", library, source], capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(done.stderr)
    return ctypes.CDLL(str(library))


class Emulator:
    """Compiles each text at its first use. `grid` and `threads` take the place of what is asked for, if they are numbers."""

    def __init__(self, folder, texts):
        self.folder, self.texts = Path(folder), texts
        self.libraries, self.parameters = {}, {}
        self.grid = self.threads = None
        self.launches = []  # (name, grid, threads) as asked for

    def kernel(self, text, name, T):
        module = f"{text}_{T}"
        if module not in self.libraries:
            self.libraries[module] = compiled(self.texts[module], self.folder, module)
            self.parameters[module] = parameters(self.texts[module])
        return Kernel(self, self.libraries[module], f"{name}_{T}", self.parameters[module][f"{name}_{T}"])


class Kernel:
    def __init__(self, emulator, library, name, listed):
        self.emulator, self.name, self.parameters = emulator, name, listed
        self.launch, self.run = library.launch, getattr(library, f"run_{name}")

    def __call__(self, grid, block, arguments):
        (grid,), (threads,) = grid, block
        if not 0 < grid < 2 ** 31 or not 0 < threads <= 1024:
            raise LaunchError(f"{self.name}: {grid} blocks of {threads} threads")
        count(self.name, "launches")
        self.emulator.launches.append((self.name, grid, threads))
        grid, threads = self.emulator.grid or grid, self.emulator.threads or threads
        hosts = self.checked(arguments)
        self.refuse_overlaps(list({a.ctypes.data: a for a in hosts if a.ndim}.values()))
        perform(lambda: self.execute(hosts, grid, threads))

    def execute(self, hosts, grid, threads):
        """In all orders on copies between walls; what was written goes back."""
        arrays = {a.ctypes.data: a for a in hosts if a.ndim}
        results = []
        for order in ORDERS:
            walled = {address: Walled(a) for address, a in arrays.items()}
            self.start([walled[a.ctypes.data].inside if a.ndim else a for a in hosts], grid, threads, 0, grid, order)
            for w in walled.values():
                w.check(self.name)
            results.append([w.inside for w in walled.values()])
        written = {a.ctypes.data for a, (_, pointer, const) in zip(hosts, self.parameters) if a.ndim and not const}
        for a, *in_orders in zip(arrays.values(), *results):
            if any(other.tobytes() != in_orders[0].tobytes() for other in in_orders[1:]):
                raise LaunchError(f"{self.name}: a race: the result depends on the order of the threads")
            if a.ctypes.data in written:
                a[...] = in_orders[0]
            elif in_orders[0].tobytes() != a.tobytes():
                raise LaunchError(f"{self.name}: an array behind a pointer to const has changed")

    def checked(self, arguments):
        """Host arrays (or numbers, as arrays without axes) for all arguments, after a look at their types."""
        if len(arguments) != len(self.parameters):
            raise LaunchError(f"{self.name}: {len(arguments)} arguments for {len(self.parameters)} parameters")
        hosts = []
        for i, (given, (kind, pointer, _)) in enumerate(zip(arguments, self.parameters)):
            host = getattr(given, "_host", given)  # of the stand-in's array
            host = np.int64(host) if type(host) is int else host  # as CuPy does
            null = pointer and type(given) is np.uint64 and given == 0
            if not null and (isinstance(host, np.ndarray) != pointer or getattr(host, "dtype", None) != TYPES[kind]):
                raise LaunchError(f"{self.name}: argument {i} should be {kind}{' *' * pointer}, got {type(given).__name__} of "
                                  f"{getattr(host, 'dtype', None)}")
            if pointer and not null and not host.flags.c_contiguous:
                raise LaunchError(f"{self.name}: argument {i} is not contiguous")
            hosts.append(np.asarray(host).reshape(-1) if pointer and not null else np.asarray(host))
        return hosts

    def refuse_overlaps(self, arrays):
        for i, one in enumerate(arrays):
            if any(np.may_share_memory(one, other) for other in arrays[:i]):
                raise LaunchError(f"{self.name}: two arguments overlap and are not the same array")

    def start(self, hosts, grid, threads, first, stop, order=0):
        """Run some blocks of a grid on these very arrays, and on numbers given as arrays without axes."""
        pointers = [ctypes.c_void_p(a.ctypes.data) if a.ndim else None for a in hosts]
        values = (ctypes.c_void_p * len(hosts))(*[
            a.ctypes.data if pointer is None else ctypes.addressof(pointer) for a, pointer in zip(hosts, pointers)])
        line = self.launch(self.run, values, grid, threads, first, stop, order)
        if line:
            raise LaunchError(f"{self.name}: not all threads of a block reached the barrier in line {line}")


class Walled:
    """A copy of an array in the middle of memory that no kernel may touch, as far from a multiple of 16 bytes as the array."""

    def __init__(self, a):
        poison = np.nan if a.dtype.kind == "f" else np.iinfo(a.dtype).max
        first = WALL + a.ctypes.data % 16 // a.itemsize
        self.memory = np.full(a.size + 2 * WALL + 16, poison, a.dtype)
        self.inside = self.memory[first:first + a.size]
        self.inside[...] = a
        self.walls = self.memory[:first], self.memory[first + a.size:]
        self.before = [wall.tobytes() for wall in self.walls]

    def check(self, name):
        if [wall.tobytes() for wall in self.walls] != self.before:
            raise LaunchError(f"{name}: wrote outside an array")


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="kernels")


def skip_without_compiler():
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulator is made for g++ on Linux")


@functools.cache
def emulator():
    """The emulator of the library's kernels, one for all tests."""
    skip_without_compiler()
    return Emulator(_folder().name, launch.sources())


@contextmanager
def emulated_device():
    """The stand-in as the current device, with the overrides of the GPU and emulated launches."""
    machine = emulator()
    machine.grid, machine.threads, machine.launches = None, None, []
    with standin.card(machine.kernel, "emulated"):
        yield machine

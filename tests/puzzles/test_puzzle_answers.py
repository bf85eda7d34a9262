"""The puzzles themselves: solved, answered wrongly in the usual ways, and answered by chance or by accident."""
import doctest
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import minilora
from minilora import puzzles
from minilora.puzzles.catalogue import PUZZLES, number_of
from minilora.puzzles.grading.judge import grade, grade_file
from minilora.puzzles.grading.answers import own
from minilora.puzzles.puzzle import UNWRITTEN, Function, Operation, called
from minilora.puzzles.source import load

ROOT = Path(__file__).resolve().parents[2]
EACH = pytest.mark.parametrize("puzzle", PUZZLES.values(), ids=PUZZLES)
FUNCTIONS = [puzzle for puzzle in PUZZLES.values() if isinstance(puzzle, Function)]
OPERATIONS = [puzzle for puzzle in PUZZLES.values() if isinstance(puzzle, Operation)]
PLAIN = [puzzle for puzzle in FUNCTIONS if puzzle.name not in ("scaling", "start", "unmerge")]  # arrays in, arrays out
MISTAKES = [(puzzle, mistake) for puzzle in PUZZLES.values() for mistake in puzzle.mistakes]


def flat(text):
    return " ".join(text.split())


def test_there_are_enough_and_each_stands_once():
    assert len(PUZZLES) >= 18 and len({name.lower() for name in PUZZLES}) == len(PUZZLES)
    assert {type(puzzle) for puzzle in PUZZLES.values()} == {Function, Operation}


@EACH
def test_the_solution_passes_and_its_example_is_true(puzzle, tmp_path):
    path = tmp_path / "answer.py"
    text = puzzle.file(number_of(puzzle), puzzle.answer)
    path.write_text(text)
    assert str(grade_file(puzzle, path)) == f"{puzzle.name}: passed"
    module = load(text, str(path))
    example = doctest.DocTestParser().get_doctest(module.__doc__, vars(module), puzzle.name, str(path), 0)
    failed, tried = doctest.DocTestRunner().run(example)
    assert tried and not failed


@EACH
def test_the_stub_is_not_written_yet(puzzle, tmp_path):
    path = tmp_path / "answer.py"
    path.write_text(puzzle.file(number_of(puzzle)))
    graded = grade_file(puzzle, path)
    assert graded.status == "unwritten" and "not written yet" in str(graded) and "Traceback" not in str(graded)
    assert "raise NotImplementedError(...) is still there: write your line in its place" in str(graded)


@EACH
def test_the_texts_keep_to_their_form(puzzle):
    file = puzzle.file(number_of(puzzle))
    assert file.isascii() and "\\" not in puzzle.task and max(map(len, file.splitlines())) <= 79
    assert len(puzzle.teaches) <= 54 and not puzzle.teaches.endswith(".")
    assert UNWRITTEN in file and puzzle.find in puzzle.code
    assert len(puzzle.mistakes) >= 4, "the usual wrong answers"
    page = puzzle.see.partition(":")[0].partition(",")[0].partition(" (")[0]
    assert (ROOT / page).is_file(), f"{puzzle.see}: not there"
    name = puzzle.see.partition(": ")[2]
    assert re.search(rf"^(class|def) {name}\b", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE) or not name


@EACH
def test_there_are_three_hints_and_none_is_the_answer(puzzle):
    assert len(puzzle.hints) == len(set(puzzle.hints)) == 3
    answers = [puzzle.answer] if isinstance(puzzle.answer, str) else puzzle.answer
    code = [flat(line) for text in answers for line in text.split("\n")]
    for text in (*puzzle.hints, puzzle.task):
        assert not [line for line in code if flat(line) in flat(text) or flat(line).partition("= ")[2] not in ("", "self.W")
                    and flat(line).partition("= ")[2] in flat(text) and len(code) == 1], text


@pytest.mark.parametrize(("puzzle", "mistake"), MISTAKES, ids=[f"{p.name}-{m.text}"[:60] for p, m in MISTAKES])
def test_a_usual_mistake_is_told_in_the_words_promised(puzzle, mistake, tmp_path):
    path = tmp_path / "answer.py"
    path.write_text(puzzle.file(number_of(puzzle), mistake.text))
    graded = grade_file(puzzle, path)
    assert not graded and graded.status in ("wrong", "broken")
    assert mistake.why or mistake.says
    assert flat(mistake.why) in flat(str(graded)) and mistake.says in flat(str(graded)), str(graded)
    assert "minilora" + "/puzzles/" not in str(graded) and max(map(len, str(graded).splitlines())) <= 79 + len(str(path))
    if graded.status == "broken" and getattr(puzzle, "run", called) is called:
        assert re.search(re.escape(str(path)) + r":\d+: \w*Error", flat(str(graded)))


def test_explanations_are_not_mixed_up():
    """Two mistakes of one puzzle never have the same explanation, and none is left without words."""
    for puzzle in PUZZLES.values():
        whys = [mistake.why for mistake in puzzle.mistakes if mistake.why]
        assert len(whys) == len(set(whys)), puzzle.name


# -- by chance ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]), number=st.integers(0, len(PLAIN) - 1))
def test_wrong_numbers_of_the_right_shape_never_pass(seed, size, number):
    puzzle, rng = PLAIN[number], np.random.default_rng(seed)
    solution = own(puzzle, puzzle.answer)

    def near(value):
        return value + np.asarray(size * rng.standard_normal(value.shape), value.dtype) if value.size else value

    def answer(*inputs):
        given = solution(*inputs)
        return tuple(map(near, given)) if isinstance(given, tuple) else near(given)

    graded = grade(puzzle, answer)
    assert graded.status == "wrong" and "nan" not in str(graded)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]), number=st.integers(0, len(OPERATIONS) - 1))
def test_wrong_gradients_of_an_operation_never_pass(seed, size, number):
    puzzle = OPERATIONS[number]

    class Noisy(own(puzzle, puzzle.answer)):
        def backward(self, dy):
            rng = np.random.default_rng(seed)
            return tuple(dx if dx is None else dx * (1.0 + size * rng.standard_normal()) for dx in super().backward(dy))

    assert grade(puzzle, Noisy).status == "wrong"


@settings(max_examples=5)
@given(numbers=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=6))
def test_numbers_out_of_nowhere_never_pass(numbers):
    array = np.array(numbers)
    for puzzle in FUNCTIONS:
        for value in (array, array[:, None], float(array[0]), (array,) * max(2, len(puzzle.outputs)), numbers):
            assert not grade(puzzle, lambda *inputs, value=value: value), puzzle.name


# -- by accident -------------------------------------------------------------------------------------------------------


def around(puzzle, before=lambda *inputs: inputs, after=lambda result, *inputs: result):
    solution = own(puzzle, puzzle.answer)
    return lambda *inputs: after(solution(*before(*inputs)), *inputs)


@pytest.mark.parametrize("puzzle", PLAIN, ids=lambda puzzle: puzzle.name)
def test_an_answer_that_writes_into_its_inputs_is_refused(puzzle):
    def spoil(result, *inputs):
        array = next(value for value in inputs for value in (value if isinstance(value, list) else [value])
                     if isinstance(value, np.ndarray))
        array[...] = 0
        return result

    graded = grade(puzzle, around(puzzle, after=spoil))
    assert not graded and "changed: others hold the same array" in flat(str(graded))


@pytest.mark.parametrize("puzzle", PLAIN, ids=lambda puzzle: puzzle.name)
def test_an_answer_that_turns_float32_into_float64_is_refused(puzzle):
    def widen(result, *inputs):
        return tuple(map(widen, result)) if isinstance(result, tuple) else np.float64(1.0) * result

    graded = grade(puzzle, around(puzzle, after=widen))
    assert not graded and "is float64 although the inputs are float32" in flat(str(graded))


@pytest.mark.parametrize("puzzle", PLAIN, ids=lambda puzzle: puzzle.name)
def test_an_answer_that_is_right_at_one_size_only_is_refused(puzzle):
    first = []

    def small(result, *inputs):
        key = [np.shape(value) for value in inputs if isinstance(value, np.ndarray)]
        first.append(key)
        zero = [np.zeros_like(value) for value in result] if isinstance(result, tuple) else np.zeros_like(result)
        return result if key == first[0] else tuple(zero) if isinstance(result, tuple) else zero

    solution = around(puzzle, after=small)
    if puzzle.name == "accumulate":  # its arrays lie in a list
        solution = around(puzzle, after=lambda result, gradients, counts: result if len(set(counts)) > 1 else result * 0)
    if puzzle.name == "adam":
        solution = around(puzzle, after=lambda result, *inputs: result if inputs[4] == 1 else result[::-1])
    assert not grade(puzzle, solution)


def test_an_answer_that_uses_its_array_again_is_refused():
    kept = []

    def dx(dy, W):
        for array in kept:
            array[...] = 0
        kept.append(dy @ W)
        return kept[-1]

    assert "the second call changed what the first had returned" in flat(str(puzzles.check("dx", dx)))


def test_a_view_of_dy_is_fine_where_nothing_writes_into_it():
    assert own(PUZZLES["unbroadcast"], PUZZLES["unbroadcast"].answer)
    assert puzzles.check("unbroadcast", lambda dy, shape: dy if dy.shape == shape else
                         own(PUZZLES["unbroadcast"], PUZZLES["unbroadcast"].answer)(dy, shape))


def test_a_loop_is_allowed():
    def backward_W(dy, x):
        dW = np.zeros((dy.shape[1], x.shape[1]), dy.dtype)
        for n in range(len(x)):
            for k in range(dy.shape[1]):
                for i in range(x.shape[1]):
                    dW[k, i] += dy[n, k] * x[n, i]
        return dW

    assert puzzles.check("dW", backward_W)


@pytest.mark.parametrize(("answer", "said"), [
    (lambda dy, W: None, "is its return missing?"),
    (lambda dy, W: ..., "not written yet"),
    (lambda dy, W: (dy @ W).tolist(), "return dx itself"),
    (lambda dy, W: (dy @ W,), "gave a tuple: return dx itself"),
    (lambda dy, W: minilora.tensor(dy @ W, "float64"), "is a Tensor, and should be an array"),
    (lambda dy, W: "dx", "is a str, and should be an array"),
    (lambda dy, W: (dy @ W).astype(complex), "is complex128"),
    (lambda dy, W: (dy @ W) * np.nan, "not finite"),
    (lambda dy, W: 0.0 * (dy @ W), "all zero"),
    (lambda dy, W: (dy @ W).astype(object), "dx"),
    (lambda dy, W: 1 // 0, "ZeroDivisionError"),
    (lambda dy, W: W @ dy, "ValueError: a @ b, where a has 4 columns and b has 5 rows: they must be equal"),
    (lambda dy, W: (dy @ W).sum(axis=0), "it is the sum of the reference over axis 0: leave that sum out"),
    (lambda dy, W: 0.5 * (dy @ W)[0], "axis 0 of the reference is not there: was it summed away"),
    (lambda dy: dy, "backward_x is called with dy and W: too many positional arguments"),
    (lambda: 0, "Write def backward_x(dy, W)"),
    (7, "is an int, and must be a function"),
    (None, "is a NoneType, and must be a function"),
    (int, "TypeError"),
])
def test_an_answer_of_another_kind_is_told(answer, said):
    graded = puzzles.check("dx", answer)
    assert not graded and said in flat(str(graded)), str(graded)


@pytest.mark.parametrize(("answer", "said"), [
    (lambda dy: dy, "keep it a class that begins with class LowRank(Op)"),
    (object, "keep it a class"),
    (None, "keep it a class"),
    (minilora.engine.Op, "has no forward"),
    (minilora.ops.Linear, "LowRank"),
])
def test_an_operation_of_another_kind_is_told(answer, said):
    graded = puzzles.check("dA", answer)
    assert not graded and (said in flat(str(graded)) or answer is minilora.ops.Linear), str(graded)


def test_a_forward_that_was_changed_is_told():
    puzzle = PUZZLES["dA"]

    class Easier(own(puzzle, puzzle.answer)):
        def forward(self, x, A, B):
            return 0.0 * super().forward(x, A, B)

        def backward(self, dy):
            return tuple(dx if dx is None else 0.0 * dx for dx in super().backward(dy))

    assert "forward gives other numbers than it did" in flat(str(grade(puzzle, Easier)))


def test_an_operation_in_one_precision_only_is_told():
    puzzle = PUZZLES["paths"]

    class Wide(own(puzzle, puzzle.answer)):
        def backward(self, dy):
            return tuple(dx if dx is None else np.float64(1.0) * dx for dx in super().backward(dy))

    graded = grade(puzzle, Wide)
    assert not graded and "float32" in str(graded) and "Python floats" in flat(str(graded))


# -- as in a notebook --------------------------------------------------------------------------------------------------


def test_a_notebook_has_the_same_grader(capsys, device):
    with minilora.no_grad():
        assert puzzles.check("DX", lambda dy, W: dy @ W) and puzzles.check("2", lambda dy, W: dy @ W)
        assert puzzles.check("dA", own(PUZZLES["dA"], PUZZLES["dA"].answer))
    wrong = puzzles.check("dx", lambda dy, W: (dy @ W) / len(dy))
    assert repr(wrong) == str(wrong) and "no average here" in flat(str(wrong)) and wrong.file == ""
    with pytest.raises(minilora.testing.GradcheckError, match="no average here"):
        wrong.check()
    puzzles.hint("dA", 3)
    assert "transposed u" in capsys.readouterr().out
    puzzles.show("dA")
    assert capsys.readouterr().out == PUZZLES["dA"].file(number_of(PUZZLES["dA"]))
    puzzles.show("dA", solution=True)
    assert textwrap.indent(PUZZLES["dA"].answer, " " * 8) in capsys.readouterr().out
    assert puzzles.names() == tuple(PUZZLES) and minilora.puzzles is puzzles


@pytest.mark.parametrize(("call", "said"), [
    (lambda: puzzles.check("dZ", None), "there is no puzzle 'dZ'"),
    (lambda: puzzles.hint("lengt"), "did you mean 'length'"),
    (lambda: puzzles.hint("dA", 4), "hints 1, 2 and 3, not 4"),
    (lambda: puzzles.show("99"), "1 to 23"),
])
def test_a_wrong_call_is_told(call, said):
    with pytest.raises(minilora.errors.ConfigError, match=re.escape(said)):
        call()

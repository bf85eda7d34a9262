"""Pictures of graphs: what they say is what was computed, nothing is changed by them, and anything may be drawn."""
import gc
import re
import time
import unicodedata
import weakref
from xml.etree import ElementTree

import numpy as np
import pytest
from cases import CASES, one_of_each
from conftest import fetch, place
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora import Parameter, Tensor, drawing, engine, errors, lora, nn, no_grad, ops
from minilora.drawing.words import columns

SVG = "{http://www.w3.org/2000/svg}"


def layer(x, W, b, A, B):
    z = ops.linear(x, A)
    y = ops.linear(x, W, b) + 2.0 * ops.linear(z, B)
    return {"z": z, "y": y}


def worked_example():
    x, W, b, A, B, dy = (place(v, "float64") for v in (
        [[1, 0, 2], [-1, 1, 1]], [[1, 0, -1], [2, 1, 0]], [1, -1], [[1, 2, 1]], [[1], [-2]], [[1, 2], [3, -1]]))
    return minilora.draw(layer, x=x, W=Tensor(W), b=Tensor(b), A=A, B=B, gradient=dy)


def nodes_of(picture):
    return {node.label: node for node in picture.graph.nodes}


def rectangles(picture):
    """(x, y, right, bottom) of the boxes in an SVG."""
    root = ElementTree.fromstring(picture.svg())
    boxes = []
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("class") == "node":
            x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
            boxes.append((x, y, x + width, y + height))
    return boxes, [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "edge"]


def check(picture):
    """What holds for every picture."""
    lines = str(picture).split("\n")
    assert max(map(columns, lines)) <= 80 and not any(unicodedata.category(c) in ("Cc", "Cs") for line in lines for c in line)
    graph = picture.graph
    printed = str(picture)
    assert all(re.search(rf"{re.escape(node.op[:20])}", printed) for node in graph.nodes)
    boxes, edges = rectangles(picture)
    shown = [node for node in graph.nodes if not node.inside]
    assert len(boxes) == len(shown)
    assert len(edges) == sum(not graph.nodes[edge.source].inside for edge in graph.edges)
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert right > left and bottom > top
        for a, b, c, d in boxes[:i]:
            assert right < a or c < left or bottom < b or d < top
    for path in edges:  # upright pieces run past all boxes, curves lie between the layers
        points = [float(number) for number in re.findall(r"-?[\d.]+", path)]
        x, y = points[:2]
        assert any(left < x < right and abs(bottom - y) < 0.11 for left, _, right, bottom in boxes)
        for command, numbers in re.findall(r"([VC])([^VC]*)", path):
            *_, last = values = [float(number) for number in numbers.split()]
            low, high = sorted((y, last))
            wide = sorted((x, values[-2] if command == "C" else x))
            for left, top, right, bottom in boxes:
                assert wide[1] <= left or right <= wide[0] or high <= top + 0.11 or bottom <= low + 0.11
            x, y = (values[-2] if command == "C" else x), last
        assert any(left < x < right and abs(top - y) < 0.11 for left, top, right, _ in boxes)
    assert picture.svg() == picture.svg() == picture._repr_svg_() and repr(picture) == str(picture)


# -- what it says --------------------------------------------------------------------------------------------------------


def test_the_worked_example(device):
    picture = worked_example()
    nodes = nodes_of(picture)
    assert nodes["z"].value == ("3", "2") and nodes["z"].gradient == ("-6", "10")
    assert nodes["y"].value == ("6 -11", "3 -10") and nodes["y"].gradient == ("1  2", "3 -1")
    assert nodes["x"].gradient == ("-1 -10 -7", "11  19  7") and nodes["A"].gradient == ("-16 10 -2",)
    assert nodes["B"].gradient == ("18", " 8") and nodes["W"].norm == nodes["b"].norm == ""
    assert [nodes[name].kind for name in ("x", "W", "A")] == ["parameter", "constant", "parameter"]
    x, z = [node.label for node in picture.graph.nodes].index("x"), picture.graph.nodes.index(nodes["z"])
    (edge,) = [edge for edge in picture.graph.edges if (edge.source, edge.target) == (x, z)]
    assert edge.norm == f"{np.linalg.norm([[-6, -12, -6], [10, 20, 10]]):.3g}"
    check(picture)


def test_text_of_the_worked_example(device):
    assert str(worked_example()).splitlines()[:8] == [
        "    ○ x: parameter                                       (2, 3)",
        "      value  1 0 2    grad -1 -10 -7",
        "            -1 1 1         11  19  7",
        "    ○ A: parameter                                       (1, 3)",
        "      value 1 2 1    grad -16 10 -2",
        "●   z = Linear(x, A)                                     (2, 1)        keeps 0 B",
        "│     ↑  x 28.6",
        "│     value 3    grad -6",
    ]


def test_a_graph_is_drawn_as_it_is_remembered(device):
    model = nn.Sequential(lora.Linear(6, 5, r=2, rng=0), nn.Tanh(), lora.Linear(5, 4, r=2, rng=1)).to(device=device)
    loss = ops.mse(model(Tensor(place(np.ones((10, 6)), "float32"))), Tensor(place(np.zeros((10, 4)), "float32")))
    picture, rows = minilora.draw(loss, model), engine.ledger(loss).rows
    shown = [node for node in picture.graph.nodes if node.op]
    assert [(node.op, node.shape, node.kept) for node in shown] == [(row.op, row.shape, row.nbytes) for row in rows]
    assert shown[0].path.startswith("0") and shown[0].arguments[3:] == ("lora_A", "lora_B")
    check(picture)
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert nodes_of(picture)[name].norm == f"{np.linalg.norm(fetch(p.grad).astype('float64')):.3g}"


def test_every_edge_has_the_norm_of_its_own_part(device):
    p = Parameter(place([3.0, 4.0], "float64"))
    picture = minilora.draw((p * 2.0 + p * 5.0).sum(), {"p": p})
    parts = [edge.norm for edge in picture.graph.edges if picture.graph.nodes[edge.source].label == "p"]
    assert sorted(parts) == ["2.83", "7.07"]
    assert nodes_of(picture)["p"].gradient == ("7 7",)
    check(minilora.draw((p * p).sum()))  # two lines between the same two


def test_the_cotangent(device):
    p = Parameter(place([1.0, 2.0], "float64"))
    y = p * 3.0
    assert nodes_of(minilora.draw(y, {"p": p}))["p"].gradient == ("3 3",)
    assert nodes_of(minilora.draw(y, {"p": p}, gradient=[1.0, -1.0]))["p"].gradient == ("3 -3",)
    assert nodes_of(minilora.draw(y, {"p": p}, gradient=Tensor(place([0.0, 1.0], "float64"))))["p"].gradient == ("0 3",)
    assert nodes_of(minilora.draw(y, {"p": p}, backward=False))["p"].norm == ""
    with pytest.raises(errors.ShapeError):
        minilora.draw(y, gradient=[1.0])


# -- nothing is changed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", one_of_each(CASES))
def test_a_graph_that_was_drawn_is_as_good_as_new(case):
    """Every operation there is, also those that hold a graph of their own, which a backward uses up."""
    rng = np.random.default_rng(0)
    arrays = case.inputs(rng)
    results = []
    for draws in (0, 2):
        parameters = [Parameter(a.copy()) for a in arrays]
        y = case.call(*parameters)
        dy = np.random.default_rng(1).standard_normal(y.shape)
        pictures = [minilora.draw(y, gradient=np.asarray(dy)) for _ in range(draws)]
        assert all(p.grad is None for p in parameters)
        y.backward(np.asarray(dy))
        results.append([p.grad for p in parameters])
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)
    assert str(pictures[0]) == str(pictures[1]) and pictures[0].svg() == pictures[1].svg()
    check(pictures[0])


def test_kernels_are_drawn_and_walked_afterwards():
    """Above some size other versions of the operations run, which reuse memory more boldly."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((520, 260)).astype("float32")
    results = []
    for draws in (0, 1):
        model = nn.Sequential(nn.LayerNorm(260), lora.Linear(260, 260, r=2, rng=0), nn.GELU(), nn.Linear(260, 260, rng=1))
        loss = ops.cross_entropy(ops.softmax(model(Tensor(x))) * 9.0, np.arange(520) % 260)
        for _ in range(draws):
            minilora.draw(loss, model)
        loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 6
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)


def test_optimizers_and_retained_gradients_notice_nothing(device):
    p = Parameter(place([1.0, 2.0], "float64"))
    optimizer = minilora.optim.SGD([p], lr=0.5)
    z = (p * 3.0).retain_grad()
    loss = (z * z).sum()
    minilora.draw(loss)
    assert z.grad is None and p.grad is None
    loss.backward()
    optimizer.step()
    np.testing.assert_array_equal(fetch(z.grad), [6.0, 12.0])
    np.testing.assert_array_equal(fetch(p.data), [1.0 - 9.0, 2.0 - 18.0])


def test_a_part_that_is_computed_twice(device):
    model = nn.Sequential(nn.Linear(3, 3, rng=0), nn.Tanh()).to(device=device)
    model.grad_checkpoint = True
    x = Tensor(place(np.ones((2, 3)), "float32"))
    picture = minilora.draw(lambda x: model(x).sum(), model, x=x)
    assert [node.op for node in picture.graph.nodes if node.op] == ["Recompute", "Sum"]
    assert nodes_of(picture)["0.weight"].norm not in ("", "0")
    check(picture)


def test_a_picture_holds_no_array():
    p = Parameter(np.ones(3))
    loss = (p * 2.0).sum()
    picture, node = minilora.draw(loss), weakref.ref(loss.node)
    gc.disable()
    try:
        del loss
        assert node() is None and str(picture)
    finally:
        gc.enable()


def test_a_watcher_of_another_stays(device):
    seen = []
    token = minilora.recording.watcher.set(lambda op, inputs, y: seen.append(op))
    try:
        minilora.draw(lambda x: x * 2.0, x=[1.0])
        assert not seen
        Tensor(place([1.0], "float32")) * 2.0
        assert len(seen) == 1
    finally:
        minilora.recording.watcher.reset(token)


# -- whatever is drawn ---------------------------------------------------------------------------------------------------


STEPS = st.lists(st.tuples(st.sampled_from("add mul one neg sum".split()), st.integers(0, 30), st.integers(0, 30)), max_size=14)


def program(steps, pool):
    for name, i, j in steps:
        a, b = pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]
        pool.append({"add": lambda: a + b, "mul": lambda: a * b, "one": lambda: ops.exp(a * 0.1), "neg": lambda: -a,
                     "sum": lambda: a.sum() + b}[name]())
    return pool[-1]


@given(STEPS, st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())
@settings(max_examples=max(60, settings().max_examples))
def test_random_graphs(steps, trainable, function):
    leaves = {name: Parameter(np.full((2,), 0.5), trainable=t) for name, t in zip("abc", trainable)}
    if function:
        picture = minilora.draw(lambda **given: program(steps, list(given.values())), **leaves)
    else:
        y = program(steps, list(leaves.values()))
        if y.node is None:
            return
        picture = minilora.draw(y, leaves)
        assert sum(bool(node.op) for node in picture.graph.nodes) == len(engine.ledger(y).rows)
    check(picture)
    targets = [(edge.target, edge.port) for edge in picture.graph.edges]
    assert targets == sorted(set(targets)) and all(edge.source < edge.target for edge in picture.graph.edges)


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_names_are_text_and_nothing_else(one, other):
    p = Parameter(np.ones(2))
    z = p * 2.0
    picture = minilora.draw((z * z).sum(), {one: p, other + "\x00": z})
    check(picture)


@pytest.mark.parametrize("name", ["<b>&amp;\"'</b>", "a\nb", "]]>", "\x1b[31m", "\ud800", "\u202eabc", "名前" * 30, "{}", "{0.x}",
                                  "#1"], ids=range(10))
def test_odd_names(name):
    p = Parameter(np.ones(2))
    loss = (p * 2.0).sum()
    for picture in (minilora.draw(loss, {name: p}), minilora.draw(loss, {name: loss}),
                    minilora.draw(lambda x: {name: x * 2.0}, x=[1.0])):
        check(picture)
        root = ElementTree.fromstring(picture.svg())
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {"svg", "g", "title", "rect", "path", "text"}


@pytest.mark.parametrize("value", [
    np.nan, np.inf, [np.nan, -np.inf, 1e300], [], [[]], [[[1.0, 2.0]]], 1e-320, np.ones((2, 0, 3)), [-0.0]], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_odd_numbers(value, dtype, device):
    with np.errstate(all="ignore"):
        array = np.array(value, "float64").astype(dtype)
    array.setflags(write=False)
    with np.errstate(invalid="ignore", over="ignore"):
        picture = minilora.draw(lambda x: x * 2.0, x=place(array))
    check(picture)
    assert nodes_of(picture)["x"].shape == array.shape and nodes_of(picture)["x"].dtype == dtype


def test_whole_numbers_are_no_parameters(device):
    table = Parameter(place(np.ones((5, 2)), "float32"))
    ids = place([[1, 2]], "int64")
    picture = minilora.draw(lambda ids: ops.embedding(ids, table), {"table": table}, ids=ids)
    assert nodes_of(picture)["table"].norm == "2"
    check(picture)


@pytest.mark.parametrize("given", [None, 3, "text", True, (1, 2), ["a"], [[1.0], [1.0, 2.0]], np.float32(2.0), {"a": 1}],
                         ids=str)
def test_other_inputs_go_in_as_they_are(given):
    seen = []
    minilora.draw(lambda x, setting: seen.append(setting) or x * 2.0, x=[1.0], setting=given)
    assert seen[0] is given


def test_leaves_alone():
    p = Parameter(np.ones(2))
    for picture in (minilora.draw(p, {"p": p}), minilora.draw(lambda p: p, p=p),
                    minilora.draw(lambda x: x, x=Tensor(np.ones(2)))):
        assert len(picture.graph.nodes) == 1 and not picture.graph.edges
        check(picture)


def test_constants_only_and_without_a_graph(device):
    picture = minilora.draw(lambda x: x * 2.0 + 1.0, x=Tensor(place([1.0], "float32")))
    assert [node.op for node in picture.graph.nodes] == ["", "Mul", "Add"] and "grad" not in str(picture)
    check(picture)
    with no_grad():  # what draw computes, it computes with a graph
        assert nodes_of(minilora.draw(lambda x: x * 2.0, x=[1.0]))["x"].gradient == ("2",)


def test_an_operation_of_the_user(device):
    odd = type("A<b>\n&", (engine.Op,), {"forward": lambda self, x: x + 0.0, "backward": lambda self, dy: (dy,)})
    check(minilora.draw(lambda x: engine.apply(odd, x), x=[1.0]))


def test_a_wrong_backward_is_named_as_in_a_walk():
    wrong = type("Wrong", (engine.Op,), {"forward": lambda self, x: x + 0.0, "backward": lambda self, dy: (dy[:1],)})
    p = Parameter(np.ones(2))
    y = engine.apply(wrong, p)
    with pytest.raises(errors.GraphError, match="Wrong.backward"):
        minilora.draw(y)
    with pytest.raises(errors.GraphError, match="Wrong.backward"):
        y.sum().backward()


def test_numbers_stand_in_the_box_of_their_operation():
    picture = minilora.draw(lambda x: 2.0 * x, x=[1.0]).svg()
    assert "Mul(2, ↓)" in picture and "↓: what the arrow brings" in picture
    assert "↓" not in minilora.draw(lambda x: x * x, x=[1.0]).svg()


def test_a_value_from_before(device):
    p = Parameter(place([1.0], "float64"))
    h = p * 2.0
    picture = minilora.draw(lambda h: h * 3.0, h=h)
    assert nodes_of(picture)["h"].kind == "earlier" and nodes_of(picture)["h"].gradient == ("3",)
    h.sum().backward()
    with pytest.raises(errors.GraphError, match=r"draw\(f, x=x\)"):
        minilora.draw(lambda h: h * 3.0, h=h)


def test_weights_in_low_precision():
    model = nn.Sequential(lora.Linear(64, 4, r=2, rng=0))
    minilora.quant.quantize(model, "nf4")
    picture = minilora.draw(model, x=Tensor(np.ones((2, 64), "float32")))
    assert "nf4" in {node.dtype for node in picture.graph.nodes}
    check(picture)


def test_a_transformer():
    config = nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = nn.GPT2(config, rng=0)
    lora.inject(model, lora.Config(r=2, target_modules=["c_attn", "c_proj", "c_fc"]), rng=0)
    ids = np.array([[1, 2, 3, 4]])
    check(minilora.draw(model(ids).sum(), model))
    picture = minilora.draw(lambda: model(ids).sum(), model)
    check(picture)
    assert any(node.path == "h.1.mlp.c_fc" for node in picture.graph.nodes)


# -- sizes ---------------------------------------------------------------------------------------------------------------


def chain(length):
    p = Parameter(np.ones(2))
    h = p
    for _ in range(length):
        h = h + p
    return h.sum(), p


def test_ten_thousand_operations():
    loss, p = chain(10_000)
    start = time.perf_counter()
    picture = minilora.draw(loss, {"p": p})
    text, image = str(picture), picture.svg()
    assert time.perf_counter() - start < 60  # about 3 s; n² would be hours
    assert "... 9,702 more operations ..." in text and len(picture.graph.nodes) == 301 and len(image) < 1_000_000
    assert nodes_of(picture)["p"].gradient == ("10001 10001",)
    loss.backward()


@pytest.mark.parametrize("limit", [4, 5, 12, 13, 40])
def test_what_is_left_out_is_said(limit):
    loss, p = chain(30)
    picture = minilora.draw(loss, {"p": p}, limit=limit)
    check(picture)
    if limit < 32:
        assert len(picture.graph.nodes) == limit + 1
        left = 32 - limit
        assert f"... {left} more operations ..." in str(picture)
    else:
        assert "more operations" not in str(picture)


def test_many_values_at_a_time():
    """More rails than there is room for: names alone say what is used."""
    p = Parameter(np.ones(2))
    values = [p * float(i) for i in range(40)]
    picture = minilora.draw(ops.concatenate(values).sum())
    check(picture)
    assert "│" not in str(picture) and "#41 = " in str(picture)


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_a_used_graph_says_what_to_do(device):
    p = Parameter(place([1.0], "float64"))
    loss = (p * 2.0).sum()
    loss.backward()
    with pytest.raises(errors.GraphError, match=r"before backward\(\).*draw\(f, x=x\)"):
        minilora.draw(loss)
    with pytest.raises(errors.GraphError, match="no graph"):
        minilora.draw(Tensor(place([1.0], "float64")))


@pytest.mark.parametrize(("call", "error"), [
    (lambda p: minilora.draw(3.0), errors.DTypeError),
    (lambda p: minilora.draw(np.ones(2)), errors.DTypeError),
    (lambda p: minilora.draw(p * 2.0, x=p), errors.ConfigError),
    (lambda p: minilora.draw(p * 2.0, [p]), errors.DTypeError),
    (lambda p: minilora.draw(p * 2.0, {"p": 3.0}), errors.DTypeError),
    (lambda p: minilora.draw(p * 2.0, limit=3), errors.ConfigError),
    (lambda p: minilora.draw(lambda: 3.0), errors.DTypeError),
    (lambda p: minilora.draw(lambda: {}), errors.DTypeError),
    (lambda p: minilora.draw(lambda: {"y": None}), errors.DTypeError),
], ids=range(9))
def test_mistakes(call, error):
    with pytest.raises(error, match="draw|limit"):
        call(Parameter(np.ones(2)))


def test_a_failing_function_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError):
        minilora.draw(lambda x: 1 / 0, x=[1.0])
    assert minilora.recording.watcher.get() is None


def test_public_names():
    assert minilora.draw is drawing.draw and {"draw", "drawing"} <= set(dir(minilora))


@pytest.mark.parametrize("size", [2, 6, 7, 50])
def test_a_nan_is_seen_in_a_norm_beside_an_infinity(size):
    from minilora.drawing.numbers import norm
    array = np.ones(size)
    array[-1] = np.inf
    assert norm(array) == norm(-array) == "inf"
    array[0] = np.nan
    assert norm(array) == "nan"
    assert norm(np.full(size, 1e200)) == f"{1e200 * size ** 0.5:.3g}"
    assert norm(np.zeros((size, 0))) == norm(np.zeros(size)) == "0"

"""Products of 16 bits by request: on the emulator, whose cuBLAS adds up in float32, and on a card (-m gpu)."""
import emulator
import numpy
import pytest
import standin
from conftest import fetch, need_gpu, place

import minilora
from minilora import backend, lora, nn, quant
from minilora.quant.halves import narrowed, widened
from minilora.quant.sixteen import Sixteen


U = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}


@pytest.fixture(params=["float16", "bfloat16"])
def kind(request):
    return request.param


def made(kind, bias=True):
    """A layer with an adapter on the host, and its input."""
    rng = numpy.random.default_rng(1)
    with backend.use("cpu"):
        layer = lora.Linear(16, 24, r=2, bias=bias, rng=0)
        layer.lora_B.data[...] = rng.normal(size=layer.lora_B.shape)
        quant.quantize(layer, kind)
    return layer, rng.normal(size=(5, 16)).astype("float32")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def card(request):
    if request.param == "emulated":
        with emulator.emulated_device():
            yield backend.current_device()
    else:
        need_gpu()
        with backend.use("gpu", tf32=False) as device:
            yield device


def rounded(x, kind):
    return quant.stored(x, kind).dense().astype("float64") if x.size else x.astype("float64")


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
def test_products_of_16_bits_are_made_by_request(kind, card, by_columns):
    rng = numpy.random.default_rng(1)
    W = rng.standard_normal((24, 16)).astype("float32")
    held = quant.stored(W.T.copy().T if by_columns else W, kind)
    exact = held.dense().astype("float64")
    layer = nn.Linear(16, 24, bias=False, rng=0).requires_grad(False)
    layer.weight.data = held
    layer.to(card.name)
    assert quant.half_products(layer) == 1
    held = layer.weight.data
    for product, n, matrix in ((held.after_transposed, 16, exact.T), (held.after, 24, exact)):
        a = rng.standard_normal((5, n)).astype("float32")
        given = place(a)
        y = fetch(product(given))
        assert y.dtype == "float32"
        numpy.testing.assert_allclose(y, rounded(a, kind) @ matrix, rtol=1e-5, atol=1e-5)
        error = abs(y - a.astype("float64") @ matrix)
        assert (error <= (U[kind] + 1e-6) * (abs(a) @ abs(matrix))).all() and error.max() > 1e-5
        out = place(numpy.full((7, len(matrix.T)), numpy.nan), "float32")
        assert product(given, out[1:6]) is not None and (fetch(out)[1:6] == y).all()
        columns = place(numpy.repeat(a, 2, axis=1))[:, ::2]  # of any strides
        assert (fetch(product(columns)) == y).all()
    given = place(rng.standard_normal((5, 16)), "float32")
    quant.half_products(layer, on=False)
    decoded = layer.weight.data.after_transposed(given)
    numpy.testing.assert_allclose(fetch(decoded), fetch(given) @ exact.T, rtol=1e-5, atol=1e-5)
    assert held.after_transposed(place(numpy.zeros((0, 16), "float32"))).shape == (0, 24)


def test_a_product_of_16_bits_is_two_launches_and_no_wait(kind):
    layer, _ = made(kind)
    with emulator.emulated_device() as machine:
        layer.to("emulated")
        quant.half_products(layer)
        held, x = layer.weight.data, place(numpy.ones((5, 16)), "float32")
        for product, given in ((held.after_transposed, x), (held.after, place(numpy.ones((5, 24)), "float32"))):
            with standin.counting() as counts:
                product(given)
            assert counts.launches == 2 and not counts.syncs and not counts.h2d
        assert [name for name, *_ in machine.launches] == [f"to_{kind}_float"] * 2


def test_a_bias_is_added_by_the_product(kind, card):
    """Where the library can; a trained one among others in an optimizer's array may lie at any address."""
    rng = numpy.random.default_rng(1)
    for n, bias in ((24, rng.standard_normal(24)), (1, rng.standard_normal(1))):
        layer = nn.Linear(16, n, rng=0).requires_grad(False)
        layer.bias.data[...] = place(bias, "float32")
        quant.quantize(layer, kind)
        quant.half_products(layer)
        exact, x = fetch(layer.weight.data.dense()).astype("float64"), rng.standard_normal((2, 5, 16)).astype("float32")
        expected = (rounded(x.reshape(-1, 16), kind) @ exact.T + bias.astype("float32")).reshape(2, 5, n)
        numpy.testing.assert_allclose(fetch(layer(place(x))), expected, rtol=1e-5, atol=1e-5)
        if card.name == "emulated":
            with standin.counting() as counts:
                layer(place(x))
            assert counts.launches == 2, counts  # x rounded, and the product
        lying = place(numpy.zeros(n + 1), "float32")
        lying[1:] = layer.bias.data
        layer.bias.data = lying[1:]
        numpy.testing.assert_allclose(fetch(layer(place(x))), expected, rtol=1e-5, atol=1e-5)
        trained = minilora.Parameter(place(x))
        layer(trained).sum().backward()
        dy = numpy.ones((10, n), "float32")  # exact in 16 bits
        numpy.testing.assert_allclose(fetch(trained.grad).reshape(10, 16), dy @ exact, rtol=1e-5, atol=1e-5)


def numbers():
    """Every number of both kinds, what lies between two, and right beside the middle; any bits at all."""
    rng, upper = numpy.random.default_rng(0), numpy.arange(2 ** 16, dtype="uint32") << 16
    with numpy.errstate(all="ignore"):
        half = numpy.arange(2 ** 16, dtype="uint16").view("float16").astype("float32").view("uint32")
        between = half[:-1] // 2 + half[1:] // 2 + (half[:-1] & half[1:] & 1)
    bits = [rng.integers(0, 2 ** 32, 20000, dtype="uint32"), half, half[:-1] + 0x1000, between]
    bits += [upper + numpy.uint32(n) for n in (0, 0x7fff, 0x8000, 0x8001)] + [x + numpy.uint32(1) for x in bits[2:4]]
    special = numpy.array([65504, 65519.996, 65520, 2.0 ** -24, 2.0 ** -25, 3e-8, 1.5 * 2.0 ** -24, 0, -0.0, 3.4e38, 1e-45],
                          "float32")
    return numpy.concatenate([*bits, special.view("uint32")]).astype("uint32").view("float32")


def test_the_kernel_rounds_as_numpy_does(kind, card):
    x = numbers()
    with numpy.errstate(all="ignore"):
        expected = narrowed(x, kind)
    got = card.resolve(narrowed)(place(x), kind)
    assert got.dtype == expected.dtype and got.shape == x.shape
    got = fetch(got)
    none = numpy.isnan(x)
    numpy.testing.assert_array_equal(got.view("uint16")[~none], expected.view("uint16")[~none])
    assert numpy.isnan(widened(got[none])).all() and numpy.isnan(widened(expected[none])).all()
    for shape in ((0, 3), (1, 1), (3, 0)):
        assert card.resolve(narrowed)(place(numpy.ones(shape), "float32"), kind).shape == shape
    wide = place(numpy.ones((2, 2)), "float64")
    assert widened(fetch(card.resolve(narrowed)(wide, kind))).tolist() == [[1.0, 1.0]] * 2


def test_the_reference_rounds_as_ml_dtypes_does():
    ml_dtypes, x = pytest.importorskip("ml_dtypes"), numbers()
    x = x[~numpy.isnan(x)]
    with numpy.errstate(all="ignore"):
        numpy.testing.assert_array_equal(narrowed(x, "bfloat16"), x.astype(ml_dtypes.bfloat16).view("uint16"))


def language_model(kind, halves=True):
    model = nn.GPT2(nn.GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2), rng=0)
    lora.inject(model, lora.Config(r=2, lora_alpha=4, target_modules=["c_attn"], init_lora_weights=False), rng=0)
    if kind:
        quant.quantize(model, kind)
        assert quant.half_products(model, halves) == 10  # two tables and four matrices a block
    return model


def gradients(model, ids):
    for p in model.parameters():
        p.grad = None
    loss = model.loss(ids, ids)
    loss.backward()
    return [fetch(loss), *(fetch(p.grad) for p in model.parameters() if p.trainable)]


def test_a_whole_step_is_near_that_of_decoded_weights(kind, card):
    """By so much as the derivation of `half_products` lets expect; float16 loses the small gradients of the head, here few."""
    ids = numpy.random.default_rng(0).integers(0, 31, (3, 12))
    decoded, halves = (gradients(language_model(kind, on), ids) for on in (False, True))
    far = 12 * U[kind]
    assert abs(halves[0] - decoded[0]) < far * decoded[0]
    for one, other in zip(halves[1:], decoded[1:]):
        assert numpy.linalg.norm(one - other) < far * numpy.linalg.norm(other)
    assert any((one != other).any() for one, other in zip(halves, decoded))


def test_a_step_on_16_bits_decodes_no_weight_and_multiplies_none_in_float32(kind):
    """Of GPT-2's four matrices a block and its head: forward and for dx, but where nothing below is trained."""
    ids = numpy.random.default_rng(0).integers(0, 31, (3, 12))
    with emulator.emulated_device(), pytest.MonkeyPatch.context() as patch:
        model = language_model(kind)
        rows = []
        patch.setattr(Sixteen, "decoded", lambda self, low, high, real=Sixteen.decoded: rows.append(high - low) or real(
            self, low, high))
        products, lower = backend.current_device().xp._libraries
        gradients(model, ids)
        del rows[:], products.kinds[:], lower.kinds[:]
        with standin.counting() as counts:
            model.loss(ids, ids).backward()
        assert sorted(rows) == [12, 36] and not counts.syncs  # looked up: places and tokens
        factors = {"float16": 2, "bfloat16": 14}[kind]
        assert (products.kinds + lower.kinds).count((factors, 68)) == 2 * 9 - 1
        assert lower.kinds == [(factors, 68)] * 8  # the biases, those of adapted layers too
        for p in model.parameters():
            if not p.trainable and p.data.ndim == 2:
                assert p.data.nbytes == 2 * p.data.size
        asked = zip(products.calls[-len(products.kinds):], products.kinds)
        assert all(min(sizes[2:5]) < 16 for sizes, (a, _) in asked if a == 0)  # attention, and adapters


def test_a_recorded_step_on_16_bits_has_the_bits_of_a_step(kind, card):
    results = []
    for record in (lambda step: step, minilora.record):
        model = language_model(kind)
        optimizer = minilora.optim.Adam([p for p in model.parameters() if p.trainable], lr=1e-2)

        def step(ids):
            loss = model.loss(ids, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        run, rng = record(step), numpy.random.default_rng(0)
        results.append([fetch(run(rng.integers(0, 31, (2, 8)))).item() for _ in range(5)])
    assert results[0] == results[1] and results[0][-1] != results[0][0]


def test_a_recorded_step_sees_the_request(kind, card):
    """Made, taken back, and the weights exchanged: each time the step is recorded anew."""
    losses = []
    for record in (lambda step: step, minilora.record):
        model, ids, seen = language_model(None), place(numpy.random.default_rng(0).integers(0, 31, (2, 8))), []
        step = record(lambda ids: model.loss(ids, ids))
        for change in (lambda: None, lambda: quant.quantize(model, kind), lambda: quant.half_products(model),
                       lambda: quant.half_products(model, False), lambda: quant.dequantize(model)):
            change()
            seen.append([fetch(step(ids)).item() for _ in range(3)])  # called, recorded, replayed
        losses.append(seen)
    assert losses[0] == losses[1] and losses[0][1] != losses[0][2] != losses[0][3] == losses[0][1]


def test_any_length_and_address(kind, card):
    """Four numbers at a time where both addresses allow it."""
    x = numpy.random.default_rng(0).standard_normal(70).astype("float32")
    lying = place(x)
    for first in range(5):
        for n in (1, 2, 3, 4, 5, 7, 8, 33):
            got = fetch(card.resolve(narrowed)(lying[first:first + n], kind))
            numpy.testing.assert_array_equal(got, narrowed(x[first:first + n], kind))


def test_float64_and_the_reference_mode_decode(kind, card):
    layer, x = made(kind)
    exact = layer.weight.data.dense().astype("float64")
    layer.to(card.name)
    quant.half_products(layer)
    held = layer.weight.data.astype("float64")
    numpy.testing.assert_allclose(fetch(held.after_transposed(place(x, "float64"))), x @ exact.T, rtol=1e-12)
    with backend.use(card.name, kernels=False):
        numpy.testing.assert_allclose(fetch(layer.weight.data.after_transposed(place(x))), x @ exact.T, rtol=1e-5, atol=1e-5)


def step(layer, x):
    given = minilora.Parameter(x)
    for p in layer.parameters():
        p.grad = None
    y = layer(given)
    y.sum().backward()
    return [fetch(a) for a in (y.data, given.grad, *(p.grad for p in layer.parameters() if p.trainable))]


def test_moved_it_computes_what_it_computes_on_the_host(kind, card):
    layer, x = made(kind)
    with backend.use("cpu"):
        expected = step(layer, x)
    layer.to(card.name)
    assert layer.weight.data.device is card and layer.weight.data.kind == kind
    for one, other in zip(step(layer, place(x)), expected):
        numpy.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_what_is_moved_there_and_back_keeps_its_bits(kind, card):
    if kind == "bfloat16":
        pytest.importorskip("ml_dtypes")  # whose numbers a state dict holds
    layer, _ = made(kind)
    before = layer.weight.data.codes.copy()
    layer.to(card.name)
    state = layer.state_dict()
    numpy.testing.assert_array_equal(state["weight"].view("uint16"), before.view("uint16"))
    layer.load_state_dict(state)
    replaced = layer.weight.data.replaced(place([1, 3]), place(numpy.zeros((2, 16)), "float32"))
    assert not fetch(replaced.rows(1, 2)).any() and not fetch(replaced.take(place([3]))).any()
    assert fetch(replaced.rows(0, 1)).any()
    lora.merge(layer.eval())
    lora.unmerge(layer)
    layer.to("cpu")
    numpy.testing.assert_array_equal(layer.weight.data.codes.view("uint16"), before.view("uint16"))

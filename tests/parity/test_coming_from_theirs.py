"""The left columns of docs/coming_from.md against torch and peft, the page's two trainings, and what it says of the two.

Run with -m parity, where torch and peft are installed.
"""
import dataclasses
import inspect
import re
import warnings

import numpy as np
import pytest
from coming_from import ANY, PAGE, Of, Wrong, resolve, table_rows
from test_docs import fenced_blocks

import minilora
from minilora import formats, lora, nn, ops

pytestmark = pytest.mark.parity

ROWS = table_rows()
OF_PYTORCH = {"Tensors", "Gradients", "Functions", "Modules", "Optimizers and training"}


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def peft(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        import peft.helpers
        import peft.optimizers
        import peft.utils.hotswap
    return peft


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def values(text):
    return dict.fromkeys(text.split(), ANY)


@pytest.mark.parametrize("row", [row for row in ROWS if row.section in OF_PYTORCH], ids=lambda row: f"{row.line}")
def test_pytorch_has_the_left_side(torch, row):
    tensor, module = Of(torch.Tensor), Of(torch.nn.Module)
    names = dict(torch=torch, nn=torch.nn, F=torch.nn.functional, x=tensor, y=tensor, p=tensor, loss=tensor, model=module,
                 optimizer=torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]), print=print,
                 **values("array ids labels logits data f gradient path state"))
    said = PAGE.read_text(encoding="utf-8").splitlines()[row.line - 1]
    assert row.theirs or said.startswith(("| a loop of your own |", "| a picture by torchviz |"))
    for text in row.theirs:
        resolve(text, names)


def test_peft_has_the_fields(peft):
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    told = set()
    for row in (row for row in ROWS if row.section == "LoraConfig, field by field"):
        for text in row.theirs:
            name, _, value = text.partition("=")
            told.add(name)
            if value:
                peft.LoraConfig(**{"target_modules": ["a"], "loftq_config": {"loftq_bits": 4}, name: eval(value)})
    assert told == fields, f"not told: {fields - told}; not PEFT's: {told - fields}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.section == "Models and adapters"], ids=lambda row: f"{row.line}")
def test_peft_has_the_calls(peft, torch, row):
    names = dict(peft=peft, torch=torch, transformers=pytest.importorskip("transformers"), model=wrapped(torch, peft),
                 **values("base config folder state repo"))
    combining = str(inspect.signature(peft.LoraModel.add_weighted_adapter).parameters["combination_type"].annotation)
    for text in row.theirs:
        if text.startswith("combination_type="):
            assert text.partition('"')[2].strip('"') in re.findall(r"'(\w+)'", combining)
        elif re.fullmatch(r"\w+=True", text):
            assert text.partition("=")[0] in inspect.signature(peft.PeftModel.from_pretrained).parameters
        else:
            resolve(text, names)


def test_a_planted_fault_is_found(torch):
    for text in ("torch.concatenated([x])", "x.viewed(3)", "torch.optim.AdamW(model.parameters(), rate=1.0)"):
        with pytest.raises(Wrong):
            resolve(text, dict(torch=torch, x=Of(torch.Tensor), model=Of(torch.nn.Module)))


# -- the two trainings -----------------------------------------------------------------------------------------------

def both_trainings():
    """The code of the page's first two blocks, each cut where the optimizer is made."""
    blocks = fenced_blocks(PAGE.read_text(encoding="utf-8"), PAGE.name)
    ours = next(block.code for block in blocks if block.info == ["python"])
    theirs = next(block.code for block in blocks if block.info == ["Python", "torch"])
    return [re.split(r"(?m)^(?=optimizer = )", text, maxsplit=1) for text in (ours, theirs)]


def test_both_trainings_are_one(torch, peft, tmp_path, monkeypatch, capsys):
    (begin, train), (begin_theirs, train_theirs) = both_trainings()
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    ours, theirs = {}, {}
    exec(begin, ours)
    base = {name: p.data.copy() for name, p in ours["model"].named_parameters() if name.endswith(("weight", "bias"))}
    factors = lora.lora_state_dict(ours["model"])
    printed = capsys.readouterr().out
    exec(train, ours)
    monkeypatch.chdir(tmp_path / "theirs")
    capsys.readouterr()
    exec(begin_theirs, theirs)
    assert capsys.readouterr().out == printed, "print_trainable_parameters prints another line"
    inner = theirs["model"].base_model.model
    with torch.no_grad():
        for name, value in base.items():
            layer, kind = name.split(".")
            getattr(inner[int(layer)].base_layer if hasattr(inner[int(layer)], "base_layer") else inner[int(layer)],
                    kind).copy_(torch.tensor(value))
        for name, value in factors.items():
            layer, factor = name.split(".")
            getattr(inner[int(layer)], factor)["default"].weight.copy_(torch.tensor(value))
    exec(train_theirs, theirs)
    assert len(ours["losses"]) == len(theirs["losses"]) == 100
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=2e-4)
    np.testing.assert_allclose(ours["losses"][:20], theirs["losses"][:20], rtol=1e-6)

    x = np.random.default_rng(1).standard_normal((9, 16)).astype("float32")
    mine, other = ours["model"](x).data, theirs["model"](torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(mine, other, rtol=1e-2, atol=1e-2)

    rebuilt = nn.Sequential(nn.Linear(16, 64, rng=0), nn.ReLU(), nn.Linear(64, 2, rng=0))  # each reads the other's folder
    rebuilt.load_state_dict(base)
    formats.load_adapter(rebuilt, tmp_path / "theirs" / "signs")
    np.testing.assert_allclose(rebuilt(x).data, other, rtol=1e-4, atol=1e-4)
    plain = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    plain.load_state_dict({name: torch.tensor(value) for name, value in base.items()})
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "ours" / "signs")
    np.testing.assert_allclose(loaded(torch.tensor(x)).detach().numpy(), mine, rtol=1e-4, atol=1e-4)


# -- what the page says of them --------------------------------------------------------------------------------------

def wrapped(torch, peft, **settings):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], **settings))


def test_what_is_said_of_peft(torch, peft, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["0", "seven"])
    peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), config)  # and not a word about "seven"
    model = wrapped(torch, peft)
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["2"]))
    assert model.active_adapters == ["default"]
    model.save_pretrained(tmp_path / "saved")
    model.load_adapter(tmp_path / "saved", "c")
    assert model.active_adapters == ["default"]
    model.set_adapter("b")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"b"}
    model.delete_adapter("b")
    assert len(model.active_adapters) == 1
    assert set(wrapped(torch, peft, task_type="SEQ_CLS").modules_to_save) == {"classifier", "score"}
    model = wrapped(torch, peft)
    with pytest.raises(ValueError, match="training mode"):
        model(torch.ones(2, 3), adapter_names=["default", "__base__"])
    half = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4).half()), peft.LoraConfig(target_modules=["0"]))
    assert {str(p.dtype) for p in half.parameters() if p.requires_grad} == {"torch.float32"}
    trainable, every = wrapped(torch, peft).get_nb_trainable_parameters()
    ours = nn.Sequential(nn.Linear(3, 4, rng=0), nn.ReLU(), nn.Linear(4, 2, rng=0))
    lora.inject(ours, lora.Config(r=2, target_modules=["0"]), rng=0)
    counted = minilora.summary(ours)
    assert (counted.trained, counted.trained + counted.frozen) == (trainable, every)
    assert (peft.LoraConfig().r, peft.LoraConfig().lora_alpha) == (lora.Config().r, lora.Config().lora_alpha) == (8, 8)


@pytest.mark.parametrize("kind, exact", [("cat", True), ("svd", True), ("linear", False)])
def test_what_is_said_of_combinations(torch, peft, kind, exact):
    torch.manual_seed(0)
    model = wrapped(torch, peft, init_lora_weights=False)
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    options = {"svd_rank": 3} if kind == "svd" else {}
    model.base_model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "c", combination_type=kind, **options)
    D = {name: model.base_model.model[0].get_delta_weight(name).detach().numpy() for name in ("default", "b", "c")}
    wanted = 0.7 * D["default"] + 0.3 * D["b"]
    assert (np.linalg.norm(D["c"] - wanted) < 1e-5 * np.linalg.norm(wanted)) == exact


def test_what_is_said_of_pytorch(torch):
    F = torch.nn.functional
    x = torch.arange(6.0).reshape(2, 3)
    assert x.transpose(0, 1).shape == (3, 2) and [len(part) for part in torch.split(torch.ones(6, 2), 2)] == [2, 2, 2]
    assert (torch.ones(2) + torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert (torch.tensor([1, 2]) + 1.5).dtype == torch.float32
    assert torch.isnan(F.cross_entropy(torch.ones(2, 3), torch.tensor([-100, -100])))
    assert F.cross_entropy(torch.zeros(2, 3, 5), torch.zeros(2, 5, dtype=torch.long)).item() == pytest.approx(np.log(3.0))
    values = np.array([-1.5, 0.3, 2.0], "float32")
    ours = minilora.tensor(values)
    np.testing.assert_allclose(F.gelu(torch.tensor(values)).numpy(), ops.gelu(ours, approximate="none").data, atol=1e-6)
    assert abs(F.gelu(torch.tensor(values)).numpy() - ops.gelu(ours).data).max() > 1e-4
    assert torch.nn.RMSNorm(4).eps is None and torch.nn.LayerNorm(4).eps == nn.LayerNorm(4).eps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(15):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] > 0.4
    for theirs, mine in ((torch.optim.AdamW, minilora.optim.AdamW), (torch.optim.Adam, minilora.optim.Adam)):
        defaults = theirs([torch.nn.Parameter(torch.ones(1))]).defaults
        mine = mine([minilora.Parameter([1.0])]).groups[0].settings
        assert {name: defaults[name] for name in mine} == dict(mine)
    q, k = (np.random.default_rng(i).standard_normal((1, 2, 3 + 2 * i, 4)).astype("float32") for i in (0, 1))
    mask = np.array([[True, False, True, True, False]] * 3)
    tensors = [torch.tensor(array) for array in (q, k, k)]
    np.testing.assert_allclose(F.scaled_dot_product_attention(*tensors, attn_mask=torch.tensor(mask)).numpy(),
                               ops.attention(*map(minilora.tensor, (q, k, k)), mask=mask).data, atol=1e-6)
    first = np.tril(np.ones((3, 5), bool))
    np.testing.assert_allclose(F.scaled_dot_product_attention(*tensors, is_causal=True).numpy(),
                               ops.attention(*map(minilora.tensor, (q, k, k)), mask=first).data, atol=1e-6)
    last = np.tril(np.ones((3, 5), bool), 2)
    np.testing.assert_allclose(ops.attention(*map(minilora.tensor, (q, k, k)), causal=True).data,
                               ops.attention(*map(minilora.tensor, (q, k, k)), mask=last).data, atol=1e-6)


@pytest.mark.parametrize("name, gives", [("amax", [0.5, 0.5, 0.0]), ("max", [1.0, 0.0, 0.0])])
def test_which_of_equal_values_gets_the_gradient(torch, name, gives):
    x = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    largest = getattr(x, name)(dim=1)
    (largest if name == "amax" else largest.values).sum().backward()
    assert x.grad[0].tolist() == gives
    p = minilora.Parameter(np.array([[1.0, 1.0, 0.0]], "float32"))
    ops.max(p, axis=1).sum().backward()
    assert p.grad[0].tolist() == [0.5, 0.5, 0.0]

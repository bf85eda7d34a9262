"""Files of tensors between here and torch: every dtype of both, and checkpoints in several files that transformers reads."""
import warnings

import numpy as np
import pytest

from minilora.formats import load_state, open_state, save_state

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        return pytest.importorskip("torch")


DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "uint32", "float32", "float64", "int64",
          "uint64", "complex64", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def drawn(torch, name, shape):
    """A tensor of torch whose bits are drawn; every pattern of a byte for the small ones."""
    dtype = getattr(torch, name)
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    bits = np.random.default_rng(len(name) + count).integers(0, 2 if name == "bool" else 256, count, dtype="uint8")
    return torch.frombuffer(bytearray(bits.tobytes()), dtype=dtype).reshape(shape) if count else torch.zeros(shape, dtype=dtype)


def test_every_dtype_both_ways(tmp_path, torch):
    pytest.importorskip("ml_dtypes")
    theirs = pytest.importorskip("safetensors.torch")
    tensors = {f"{name}.{len(shape)}": drawn(torch, name, shape) for name in DTYPES for shape in [(), (3, 5), (0, 2), (256,)]}
    theirs.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    state = open_state(tmp_path / "theirs.safetensors")
    save_state(tmp_path / "ours.safetensors", state, state.metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    back = theirs.load_file(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        assert state[name].shape == tuple(tensor.shape) and back[name].dtype == tensor.dtype
        numbers = tensor.to(torch.float64).numpy() if not tensor.is_complex() else tensor.numpy()
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(state[name].astype(numbers.dtype), numbers, name)


def test_transformers_reads_our_shards_and_we_read_theirs(tmp_path, torch):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    state = load_state(tmp_path / "theirs" / "model.safetensors.index.json")
    own = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name in state}
    assert len(own) == len(state) and all(np.array_equal(state[name], own[name]) for name in own)
    (tmp_path / "ours").mkdir()
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "ours")
    save_state(tmp_path / "ours" / "model.safetensors", own, {"format": "pt"}, max_shard_bytes=3000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    for _ in range(2):  # the second time over the shards of the first
        again, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        x = torch.arange(8)[None]
        assert torch.equal(again.eval()(x).logits, model(x).logits)
        save_state(tmp_path / "ours" / "model.safetensors", own, {"format": "pt"}, max_shard_bytes=3000)

"""merge_files: the numbers, whatever the kind, dtype, number of adapters, size of blocks and shards."""
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging_cases import DTYPES, LAYERS, adapter, base_tensors, drawn, dtype_of, files_in, update, write_base

from minilora import formats, lora, nn, models
from minilora.errors import ConfigError, FileError, StateError
from minilora.formats import TokenRows, load_state, merge_files, unmerge_files, verify_files
from minilora.lora.merging import arithmetic

KEEP = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def oracle(W, parts):
    """W + sum of w s B A in float64, in the words of each kind; DoRA by its definition."""
    W = W.astype("float64")
    total = W.copy()
    for u, weight in parts:
        A, B = u.A.astype("float64"), u.B.astype("float64")
        if u.kind == "embedding":
            D = u.s * (B @ A).T
        else:
            A, B = A.reshape(len(A), -1), B.reshape(len(B), -1)
            groups = len(A) // B.shape[1]
            blocks = [B[g * len(B) // groups:(g + 1) * len(B) // groups] @ A[g * B.shape[1]:(g + 1) * B.shape[1]]
                      for g in range(groups)]
            D = u.s * np.concatenate(blocks).reshape(W.shape)
        new = W + D
        if u.magnitude is not None:
            axes = (0,) if u.kind == "embedding" else tuple(range(1, W.ndim))
            c = np.sqrt((new * new).sum(axis=axes, keepdims=True))
            new = new / c * u.magnitude.astype("float64").reshape(c.shape)
        total += weight * (new - W)
    return total


def close(got, expected, dtype):
    eps = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]  # factors are float32 throughout
    np.testing.assert_allclose(got.astype("float64"), expected, rtol=eps, atol=eps)


@KEEP
@given(dtype=st.sampled_from(DTYPES), kinds=st.sets(st.sampled_from(sorted(LAYERS)), min_size=1),
       count=st.integers(1, 3), dora=st.booleans(), bias=st.booleans(), shard=st.sampled_from([None, 300, 2000]),
       block=st.sampled_from([1, 7, 64, 1 << 15]), memory=st.sampled_from([1 << 18, 1 << 29]),
       how=st.sampled_from(["nearest", "stochastic"]), seed=st.integers(0, 2 ** 32 - 1))
def test_every_kind_and_back(tmp_path_factory, dtype, kinds, count, dora, bias, shard, block, memory, how, seed):
    """W' is the sum rounded; blocks and memory change no bit; the way back gives every byte of every file."""
    folder = tmp_path_factory.mktemp("merge")
    rng, tensors = np.random.default_rng(seed), base_tensors(dtype, seed)
    write_base(folder / "base", tensors, {"model_type": "odd"}, shard)
    given, parts = [], {}
    for i in range(count):
        updates = {}
        for path in kinds:
            kind, shape = LAYERS[path]
            with_dora = dora and i == 0
            u = update(rng, kind, shape, r=int(rng.integers(1, 4)), dora=tensors[f"{path}.weight"] if with_dora else None,
                       bias=bias and not dora and kind != "embedding", s=float(rng.uniform(0.2, 2)))
            updates[path] = u
            parts.setdefault(path, []).append((u, 0.5 + i))
        given.append((adapter(updates), 0.5 + i))
    report = merge_files(folder / "base", given, folder / "out", rounding=how, seed=seed)
    state = {name: array for path in (folder / "out").glob("model*.safetensors") for name, array in load_state(path).items()}
    for name, W in tensors.items():
        path = name.removesuffix(".weight")
        if path in parts:
            close(state[name], oracle(W, parts[path]), dtype)
        elif name.endswith(".bias") and bias and not dora and name[:-5] in parts:
            close(state[name], W + sum(w * u.s * u.bias.astype("float64") for u, w in parts[name[:-5]]), dtype)
        else:
            assert state[name].tobytes() == W.tobytes() and state[name].dtype == W.dtype
    assert {row.path for row in report.rows} == {f"{path}.weight" for path in kinds}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "BLOCK", block)
        merge_files(folder / "base", given, folder / "again", rounding=how, seed=seed, memory=memory)
        unmerge_files(folder / "again", folder / "back")
    assert weights(folder / "again") == weights(folder / "out")
    assert files_in(folder / "back") == files_in(folder / "base")
    assert verify_files(folder / "out", folder / "base", given).sound


def weights(folder):
    return {name: data for name, data in files_in(folder).items() if not name.startswith("minilora_")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_the_merge_of_one_weight_in_memory(tmp_path, dtype):
    rng, W = np.random.default_rng(0), base_tensors(dtype)["body.fc.weight"]
    u = update(rng, "linear", W.shape, r=3, s=0.7)
    write_base(tmp_path / "base", {"fc.weight": W})
    merge_files(tmp_path / "base", adapter({"fc": u}), tmp_path / "out")
    expected = lora.merge_weight(W, (u.A, u.B, 0.7), allow_lossy=True).weight
    assert load_state(tmp_path / "out" / "model.safetensors")["fc.weight"].tobytes() == expected.tobytes()


def model(seed=0):
    config = models.LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=1, intermediate_size=24, max_position_embeddings=16)
    return models.Llama(config, rng=seed)


def trained(base, config, seed=1):
    lora.inject(base, config, rng=seed)
    rng = np.random.default_rng(seed)
    for _, p in base.named_parameters():
        if p.trainable:
            p.data[...] += rng.normal(0.0, 0.05, p.shape)
    return base


ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("options", [dict(), dict(use_rslora=True), dict(use_dora=True), dict(init_lora_weights="pissa"),
                                     dict(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 1.0}),
                                     dict(modules_to_save=["lm_head"]), dict(trainable_token_indices=[1, 7, 39]),
                                     dict(target_modules=[*ADAPTED, "embed_tokens", "lm_head"])],
                         ids=lambda options: "-".join(options) or "plain")
def test_equal_to_lora_merge_on_the_loaded_model(tmp_path, options):
    """Bit for bit: the layers are the same, and so is the arithmetic."""
    config = lora.Config(**{"r": 2, "lora_alpha": 3, "target_modules": ADAPTED, **options})
    models.save(model(), tmp_path / "base")
    formats.save_adapter(trained(model(), config), tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = models.load(tmp_path / "base")
    formats.load_adapter(merged, tmp_path / "adapter")
    lora.bake(merged)
    models.save(merged, tmp_path / "baked")
    got, expected = (load_state(tmp_path / name / "model.safetensors") for name in ("out", "baked"))
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].tobytes() == array.tobytes(), name
    ids = np.array([[1, 2, 39]])
    np.testing.assert_array_equal(models.load(tmp_path / "out")(ids).data, models.load(tmp_path / "baked")(ids).data)
    unmerge_files(tmp_path / "out", tmp_path / "back")
    assert files_in(tmp_path / "back") == files_in(tmp_path / "base")


def test_matrices_stored_the_other_way_round(tmp_path):
    """GPT-2: square ones too, with the names of the hub's file, which has no prefix; equal to rounding, and to the bit where s
    is a power of two: there the transposed factors are the same products."""
    config = models.GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    for s in (2, 3):
        models.save(models.GPT2(config, rng=0), tmp_path / f"base{s}")
        adapted = lora.Config(r=2, lora_alpha=2 * s, target_modules=["c_attn", "c_proj", "c_fc"])
        base = trained(models.GPT2(config, rng=0), adapted)
        formats.save_adapter(base, tmp_path / f"adapter{s}")
        merge_files(tmp_path / f"base{s}", tmp_path / f"adapter{s}", tmp_path / f"out{s}")
        lora.bake(base)
        models.save(base, tmp_path / f"baked{s}")
        got, expected = (load_state(tmp_path / name / "model.safetensors") for name in (f"out{s}", f"baked{s}"))
        for name, array in expected.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-7)
            assert s != 2 or got[name].tobytes() == array.tobytes()
        unmerge_files(tmp_path / f"out{s}", tmp_path / f"back{s}")
        assert files_in(tmp_path / f"back{s}") == files_in(tmp_path / f"base{s}")


@pytest.mark.parametrize("model_type, said, turned", [("gpt2", False, True), ("llama", True, False), (None, True, True),
                                                      (None, False, False)])
def test_a_square_matrix_is_turned_by_what_is_known(tmp_path, model_type, said, turned):
    rng = np.random.default_rng(0)
    W, u = drawn(rng, (6, 6)), update(rng, "linear", (6, 6))
    write_base(tmp_path / "base", {"h.0.attn.c_proj.weight": W}, model_type and {"model_type": model_type})
    one = adapter({"h.0.attn.c_proj": u})
    one = dataclasses.replace(one, config=dataclasses.replace(one.config, fan_in_fan_out=said))
    merge_files(tmp_path / "base", one, tmp_path / "out")
    D = u.s * u.B @ u.A
    np.testing.assert_allclose(load_state(tmp_path / "out" / "model.safetensors")["h.0.attn.c_proj.weight"],
                               W + (D.T if turned else D), rtol=1e-5, atol=1e-6)


def test_convolution_with_groups(tmp_path):
    rng = np.random.default_rng(0)
    W, u = drawn(rng, (6, 2, 3)), update(rng, "convolution", (6, 2, 3), r=4, groups=2)
    write_base(tmp_path / "base", {"conv.weight": W})
    merge_files(tmp_path / "base", adapter({"conv": u}), tmp_path / "out")
    close(load_state(tmp_path / "out" / "model.safetensors")["conv.weight"], oracle(W, [(u, 1.0)]), "float32")


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype(tmp_path, dtype, to):
    """All floats are converted, the config says so, and the way back has the old header, index and config."""
    rng, tensors = np.random.default_rng(0), base_tensors(dtype)
    config = {"model_type": "odd", "torch_dtype": dtype, "text_config": {"dtype": dtype}}
    write_base(tmp_path / "base", tensors, config, shard=500)
    one = adapter({"body.fc": update(rng, "linear", (12, 10))}, saved={"body.norm.weight": drawn(rng, (7,))},
                  tokens={"body.emb": TokenRows((3, 19), drawn(rng, (2, 6)))})
    report = merge_files(tmp_path / "base", one, tmp_path / "out", dtype=to)
    state = formats.open_state(tmp_path / "out" / "model.safetensors.index.json")
    assert {array.dtype.name for name, array in state.items() if name != "body.ids"} == {to}
    assert state["body.ids"].tobytes() == tensors["body.ids"].tobytes()
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["torch_dtype"] == said["text_config"]["dtype"] == to and said["model_type"] == "odd"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in state.values())
    np.testing.assert_array_equal(state["body.square.weight"], tensors["body.square.weight"].astype(dtype_of(to)))
    close(state["body.fc.weight"], oracle(tensors["body.fc.weight"], [(one.updates["body.fc"], 1.0)]),
          to if dtype_of(to).itemsize == 2 else dtype)
    assert report.converted or to == dtype
    unmerge_files(tmp_path / "out", tmp_path / "back")
    assert files_in(tmp_path / "back") == files_in(tmp_path / "base")
    assert verify_files(tmp_path / "out", tmp_path / "base", one).sound


def test_headers_and_small_files_stay_byte_for_byte(tmp_path):
    base = write_base(tmp_path / "base", base_tensors(), {"a": 1}, shard=900)
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    (base / ".cache").mkdir()
    report = merge_files(base, adapter({"body.fc": update(np.random.default_rng(0), "linear", (12, 10))}), tmp_path / "out")
    was, now = files_in(base), files_in(tmp_path / "out")
    assert now.keys() == {*was, "minilora_patch.safetensors", "minilora_merge.json"} - {"pytorch_model.bin"}
    changed = [name for name in now.keys() & was.keys() if now[name] != was[name]]
    assert len(changed) == 1 and changed[0].startswith("model-")
    assert any("pytorch_model.bin" in note for note in report.notes)
    n = 8 + int.from_bytes(was[changed[0]][:8], "little")
    assert now[changed[0]][:n] == was[changed[0]][:n] and len(now[changed[0]]) == len(was[changed[0]])


def test_two_merges_are_the_same_bytes(tmp_path):
    base = write_base(tmp_path / "base", base_tensors("float16"))
    one = adapter({path: update(np.random.default_rng(0), *LAYERS[path]) for path in LAYERS})
    for name in "ab":
        merge_files(base, one, tmp_path / name, rounding="stochastic", seed=3)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    merge_files(base, one, tmp_path / "c", rounding="stochastic", seed=4)
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_a_swallowed_update_is_told_and_stochastic_rounding_keeps_it(tmp_path):
    rng, W = np.random.default_rng(0), drawn(np.random.default_rng(1), (64, 64), "float16")
    write_base(tmp_path / "base", {"fc.weight": W})
    one = adapter({"fc": update(rng, "linear", W.shape, size=2e-4)})
    report = merge_files(tmp_path / "base", one, tmp_path / "out")
    (warning,) = report.warnings
    assert report.rows[0].unmoved > 0.01 and "--rounding stochastic" in warning and "--dtype float32" in warning
    kept = merge_files(tmp_path / "base", one, tmp_path / "kept", rounding="stochastic")
    assert abs(kept.rows[0].gain - 1) < abs(report.rows[0].gain - 1)
    assert not merge_files(tmp_path / "base", one, tmp_path / "wide", dtype="float32").warnings


def test_rehearsal_and_no_patch(tmp_path):
    base = write_base(tmp_path / "base", base_tensors())
    one = adapter({"body.fc": update(np.random.default_rng(0), "linear", (12, 10))})
    seen = []
    rehearsed = merge_files(base, one, tmp_path / "out", dry_run=True, progress=lambda name, n: seen.append(name))
    assert not (tmp_path / "out").exists() and sorted(seen) == sorted(base_tensors())
    report = merge_files(base, one, tmp_path / "out", patch=False)
    assert [row[:8] for row in report.rows] == [row[:8] for row in rehearsed.rows] and report.patch_nbytes == 0
    assert not (tmp_path / "out" / "minilora_patch.safetensors").exists()
    with pytest.raises(FileError, match="no minilora_patch.safetensors"):
        unmerge_files(tmp_path / "out", tmp_path / "back")


def test_too_little_memory_is_said_before(tmp_path):
    base = write_base(tmp_path / "base", base_tensors())
    one = adapter({"body.fc": update(np.random.default_rng(0), "linear", (12, 10))})
    with pytest.raises(ConfigError, match="memory: body.* needs 1 MB .* and memory is 0.00[0-9]* MB"):
        merge_files(base, one, tmp_path / "out", memory=1 << 10)
    assert not (tmp_path / "out").exists()


def test_what_overflows_is_named_and_nothing_is_left(tmp_path):
    W = np.full((4, 5), 60000, "float16")
    base = write_base(tmp_path / "base", {"fc.weight": W})
    u = formats.Update("linear", np.ones((1, 5), "float32"), np.full((4, 1), 9000, "float32"), 1.0)
    with pytest.raises(StateError, match="fc.weight: .*overflows float16"):
        merge_files(base, adapter({"fc": u}), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_private_memory_does_not_grow_with_the_tensor(tmp_path):
    """tracemalloc counts what NumPy allocates: for a tensor eight times as large as another, the same."""
    import tracemalloc

    peaks = []
    for rows in (1 << 12, 1 << 15):
        base = write_base(tmp_path / f"base{rows}", {"fc.weight": np.ones((rows, 128), "float32")})
        u = formats.Update("linear", np.ones((1, 128), "float32"), np.ones((rows, 1), "float32"), 1.0)
        tracemalloc.start()
        merge_files(base, adapter({"fc": u}), tmp_path / f"out{rows}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (2 << 20) < 8 << 20


def test_a_float64_linear_layer_of_a_model(tmp_path):
    layer = nn.Sequential(nn.Linear(5, 4, dtype="float64", rng=0))
    formats.save_state(tmp_path / "plain.safetensors", layer.state_dict())
    trained(layer, lora.Config(r=2, target_modules=["0"], lora_bias=True))
    formats.save_adapter(layer, tmp_path / "adapter")
    merge_files(tmp_path / "plain.safetensors", tmp_path / "adapter", tmp_path / "out")
    lora.bake(layer)
    for name, array in load_state(tmp_path / "out" / "plain.safetensors").items():
        assert array.tobytes() == layer.state_dict()[name].tobytes()

"""`minilora inspect`: adapters of every dialect, models, files of tensors, and what is none of them."""
import json
import shutil

import example_folder
import numpy as np
import pytest

from minilora import formats, lora, models, nn
from minilora.cli.main import main
from minilora.cli.reports.adapter import as_low_rank, short_names
from minilora.formats.adapters.saved import Update

ADAPTER_KEYS = ["schema", "kind", "path", "dialect", "base", "task_type", "rule", "start", "ranks", "scalings", "numbers",
                "bytes", "dtypes", "layers", "saved", "biases", "tokens", "fingerprint", "metadata", "notes"]
LAYER_KEYS = ["path", "kind", "shape", "r", "s", "lora_alpha", "dtype", "norm_A", "norm_B", "untrained", "dora", "bias",
              "norm_D", "singular_values", "rank", "effective_rank", "stable_rank", "rank_99"]
TENSOR_KEYS = ["tensors", "numbers", "bytes", "dtypes", "metadata", "nonfinite", "notes"]
BASE_KEYS = ["schema", "kind", "path", "model_type", "architectures", "sizes", "dtype", "tied", "readable", "problem",
             "sentence_encoder", "tokenizer", "files", *TENSOR_KEYS]


def reported(capsys, *words):
    assert main(["inspect", *map(str, words), "--json"]) == 0, capsys.readouterr()
    return json.loads(capsys.readouterr().out)


def shown(capsys, *words):
    assert main(["inspect", *map(str, words)]) == 0, capsys.readouterr()
    return capsys.readouterr().out


def refused(capsys, *words, status=1):
    assert main(["inspect", *map(str, words)]) == status
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and "\x1b" not in err
    return err


def test_an_adapter(examples, capsys):
    report = reported(capsys, examples / "adapter")
    assert list(report) == ADAPTER_KEYS and report["kind"] == "adapter" and report["schema"] == "minilora.inspect/1"
    assert report["dialect"] == "peft" and report["ranks"] == [4] and report["scalings"] == [2.0] and report["start"] is True
    assert len(report["layers"]) == 14 and list(report["layers"][0]) == LAYER_KEYS
    saved = formats.read_adapter(examples / "adapter")
    for row in report["layers"]:
        update = saved.updates[row["path"]]
        D = update.s * update.B.astype(float) @ update.A.astype(float)
        sigma = np.linalg.svd(D, compute_uv=False)[:4]
        np.testing.assert_allclose(row["singular_values"], sigma, rtol=1e-6)
        np.testing.assert_allclose(row["norm_D"], np.linalg.norm(D), rtol=1e-6)
        p = sigma / sigma.sum()
        np.testing.assert_allclose(row["effective_rank"], np.exp(-(p * np.log(p)).sum()), rtol=1e-6)
        assert row["lora_alpha"] == 8 and row["rank"] == 4 and not row["untrained"]
    assert report["fingerprint"]["weights"] == 14


def test_text_and_layers(examples, capsys):
    text = shown(capsys, examples / "adapter")
    assert "s = alpha / r: r 4, s 2" in text and "q_proj     2  16 x 16" in text
    assert max(map(len, text.split("\n")[7:])) <= 80
    assert "model.layers.1.self_attn.q_proj" in shown(capsys, examples / "adapter", "--layers")


def test_an_untrained_adapter(tmp_path, capsys):
    model = example_folder.llama()
    lora.inject(model, lora.Config(r=2, target_modules=["q_proj"], use_rslora=True), rng=0)
    formats.save_adapter(model, tmp_path / "new")
    text = shown(capsys, tmp_path / "new")
    assert "note: lora_B is all zero: untrained" in text and "alpha / sqrt(r)" in text
    report = reported(capsys, tmp_path / "new")
    assert all(row["untrained"] and row["rank"] == 0 and row["lora_alpha"] == 8 for row in report["layers"])


@pytest.mark.parametrize("dialect", ["peft", "loralib", "mlx", "kohya", "diffusers"])
def test_every_dialect(dialect, tmp_path, capsys, examples):
    saved = formats.read_adapter(examples / "adapter")
    options = {"diffusers": {"component": "text_encoder"}}.get(dialect, {})
    formats.write_adapter(saved, tmp_path / "a", dialect, **options)
    more = ["--dialect", "loralib", "--alpha", "8"] if dialect == "loralib" else []
    report = reported(capsys, tmp_path / "a", *more)
    assert report["kind"] == "adapter" and report["dialect"] == dialect
    assert sorted(row["norm_D"] for row in report["layers"]) == pytest.approx(sorted(
        as_low_rank(update).norm() for update in saved.updates.values()), rel=1e-5)


def test_nan_is_told_and_not_refused(tmp_path, examples, capsys):
    state = formats.load_state(examples / "adapter" / "adapter_model.safetensors")
    first = sorted(state)[0]
    state[first][0, :2] = np.nan, np.inf
    shutil.copytree(examples / "adapter", tmp_path / "bad")
    formats.save_state(tmp_path / "bad" / "adapter_model.safetensors", state)
    report = reported(capsys, tmp_path / "bad")
    assert any("1 NaN and 1 inf" in note for note in report["notes"])
    assert report["layers"][0]["norm_D"] is None and report["layers"][1]["norm_D"] > 0
    assert "1 NaN and 1 inf" in shown(capsys, tmp_path / "bad")


def test_a_model(examples, capsys):
    report = reported(capsys, examples / "base")
    assert list(report) == BASE_KEYS and report["kind"] == "base" and report["readable"] and report["tied"] is False
    assert report["numbers"] == sum(p.size for p in models.load(examples / "base").parameters()) and report["nonfinite"] is None
    assert report["sizes"]["num_hidden_layers"] == 2 and report["dtypes"] == {"F32": report["numbers"]}
    text = shown(capsys, examples / "encoder", "--numbers")
    assert "a sentence encoder" in text and "all numbers finite" in text and "read here  yes" in text


def test_a_model_that_is_not_read_here(tmp_path, examples, capsys):
    shutil.copytree(examples / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "mam\x1b[2Jba"}))
    text = shown(capsys, tmp_path / "base")
    assert "read here    no" in text and "not read here" in text and "\x1b" not in text and "lm_head.weight" in text


def test_a_model_in_parts(tmp_path, capsys):
    models.save(example_folder.llama(), tmp_path / "parts", max_shard_bytes=8000)
    report = reported(capsys, tmp_path / "parts")
    assert sum(name.startswith("model-") for name in report["files"]) > 1 and report["readable"]
    assert reported(capsys, tmp_path / "parts" / "model.safetensors.index.json")["kind"] == "tensors"


def test_a_file_of_tensors(tmp_path, capsys):
    state = {f"x.{i}\x1b[31m": np.full((2, 3), np.nan if i else 1.0, "float32") for i in range(2)}
    formats.save_state(tmp_path / "x.safetensors", {**state, "one": np.float64(1.0)}, {"made\x1b[2J": "by\u202e me" * 40})
    report = reported(capsys, tmp_path / "x.safetensors", "--numbers")
    assert list(report) == ["schema", "kind", "path", *TENSOR_KEYS] and report["numbers"] == 13 and report["bytes"] == 56
    assert report["nonfinite"] == {"x.1\x1b[31m": "6 NaN"}
    text = shown(capsys, tmp_path / "x.safetensors", "--numbers", "--layers")
    assert "\x1b" not in text and "\u202e" not in text and "made\\x1b[2J: by\\u202e me" in text and "one number" in text


def test_an_empty_file_of_tensors(tmp_path, capsys):
    formats.save_state(tmp_path / "none.safetensors", {})
    assert "0 in 0 tensors" in shown(capsys, tmp_path / "none.safetensors")


@pytest.mark.parametrize(("content", "said"), [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "pointer of Git LFS"),
    (b"\x80\x02}q\x00.", "pickle"), (b"PK\x03\x04" + b"\0" * 60, "zip"), (b"\xff" * 20, "header"), (b"{}", "JSON"),
])
def test_what_is_no_file_of_tensors(content, said, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert said in refused(capsys, tmp_path / "x.safetensors")


def test_a_file_that_was_cut(tmp_path, examples, capsys):
    whole = (examples / "base" / "model.safetensors").read_bytes()
    for size in (4, 100, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        assert "cut off" in refused(capsys, tmp_path / "x.safetensors")


def test_what_is_not_there(tmp_path, capsys, examples):
    assert "there is no such file or folder" in refused(capsys, tmp_path / "nothing\x1b[2J")
    assert "neither a model" in refused(capsys, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    assert "pickle" in refused(capsys, tmp_path)
    assert "missing: PATH" in refused(capsys, status=2)
    assert "did you mean '--layers'" in refused(capsys, examples / "adapter", "--layer", status=2)


def test_several_adapters_in_one_folder(tmp_path, examples, capsys):
    for name in ("one", "two"):
        shutil.copytree(examples / "adapter", tmp_path / name)
    assert "in folders of their own" in refused(capsys, tmp_path)
    assert reported(capsys, tmp_path, "--name", "two")["kind"] == "adapter"


def test_groups_of_a_convolution(tmp_path):
    layer = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, rng=0))
    lora.inject(layer, lora.Config(r=4, target_modules=["0"]), rng=0)
    rng = np.random.default_rng(0)
    for _, p in layer.named_parameters():
        if p.trainable:
            p.data[...] = rng.standard_normal(p.shape)
    before = layer[0].weight.data.copy()
    (update,) = formats.saved_adapter(layer).updates.values()
    lora.merge(layer)
    D = layer[0].weight.data - before
    own = as_low_rank(update)
    whole = np.zeros((6, 4, 3, 3))
    whole[:3, :2], whole[3:, 2:] = D[:3], D[3:]
    np.testing.assert_allclose(own.norm(), np.linalg.norm(whole), rtol=1e-5)
    np.testing.assert_allclose(own.dense().reshape(whole.shape), whole, atol=1e-5)


def test_short_names():
    assert short_names(["a.*.q", "a.*.k", "b.*.q"]) == {"a.*.q": "a.*.q", "a.*.k": "k", "b.*.q": "b.*.q"}
    assert short_names(["q"]) == {"q": "q"}


def test_rank_one_and_half_precision():
    update = Update("linear", np.ones((1, 3), "float16"), np.ones((2, 1), "float16"), 0.5)
    assert as_low_rank(update).norm() == pytest.approx(0.5 * 6 ** 0.5)


# -- section 7 ---------------------------------------------------------------------------------------------------------


def written(folder, state_from, seed, r=3, paths=None, out=None):
    """A drawn adapter for the layers of another, of another rank."""
    saved, rng = formats.read_adapter(state_from), np.random.default_rng(seed)
    updates = {path: Update("linear", rng.standard_normal((r, u.A.shape[1])).astype("float32"),
                            rng.standard_normal((out or u.B.shape[0], r)).astype("float32"), 0.5)
               for path, u in saved.updates.items() if paths is None or path in paths}
    config = lora.Config(r=r, lora_alpha=0.5 * r, target_modules=list(updates))
    formats.write_adapter(formats.SavedAdapter(updates, config), folder)
    return folder


def test_analysis_of_one_adapter(examples, capsys):
    report = reported(capsys, examples / "adapter", "--analysis")
    assert list(report) == [*ADAPTER_KEYS, "analysis"] and report["analysis"]["against"] is None
    for row, layer in zip(report["analysis"]["layers"], report["layers"]):
        assert row["path"] == layer["path"] and row["similarity"] is row["amplification"] is None
        assert all(row[key] == layer[key] for key in ("effective_rank", "stable_rank", "rank_99"))
    text = shown(capsys, examples / "adapter", "--analysis")
    assert "Which rank is used?" in text and "amplified" not in text and "directions" not in text
    assert max(map(len, text.split("\n"))) <= 86


def test_analysis_against_another_adapter_and_a_base(examples, tmp_path, capsys):
    other = written(tmp_path / "other", examples / "adapter", 1)
    words = (examples / "adapter", "--against", other, "--base", examples / "base")
    rows = {row["path"]: row for row in reported(capsys, *words)["analysis"]["layers"]}
    one, two = (formats.read_adapter(path).updates for path in (examples / "adapter", other))
    weights = dict(models.load(examples / "base").named_modules())
    assert rows.keys() == one.keys()
    for path, row in rows.items():
        D, E = (u.s * u.B.astype(float) @ u.A.astype(float) for u in (one[path], two[path]))
        (U, _, V), (_, _, V2) = np.linalg.svd(D), np.linalg.svd(E)
        phi = [[np.linalg.norm(V[:i] @ V2[:j].T) ** 2 / min(i, j) for j in range(1, 4)] for i in range(1, 5)]
        np.testing.assert_allclose(row["similarity"]["V"]["grid"], phi, atol=1e-6)
        W = weights[path].weight.numpy().astype(float)
        inside = np.linalg.norm(U[:, :4].T @ W @ V[:4].T)
        found = row["amplification"]
        assert found["along_update"] == pytest.approx(inside, rel=1e-5)
        assert found["factor"] == pytest.approx(np.linalg.norm(D) / inside, rel=1e-5)
        assert found["along_weight"] == pytest.approx(np.linalg.norm(np.linalg.svd(W)[1][:4]), rel=1e-5)
    text = shown(capsys, *words)
    assert text.index("Which rank is used?") < text.index("The same directions?") < text.index("What is amplified?")
    assert "model.layers.1.self_attn.q_proj" in shown(capsys, *words, "--layers")


def test_analysis_of_a_transposed_base(tmp_path, capsys):
    rng = np.random.default_rng(0)
    W = {"h.0.attn.c_attn.weight": rng.standard_normal((6, 18)).astype("float32"),
         "h.0.attn.c_proj.weight": rng.standard_normal((6, 6)).astype("float32")}
    (tmp_path / "base").mkdir()
    formats.save_state(tmp_path / "base" / "model.safetensors", W)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    updates = {name.removesuffix(".weight"): Update("linear", rng.standard_normal((2, 6)).astype("float32"),
                                                    rng.standard_normal((w.shape[1], 2)).astype("float32"), 1.0)
               for name, w in W.items()}
    config = lora.Config(r=2, lora_alpha=2, target_modules=list(updates), fan_in_fan_out=True)
    formats.write_adapter(formats.SavedAdapter(updates, config), tmp_path / "a")
    rows = {row["path"]: row for row in reported(capsys, tmp_path / "a", "--base", tmp_path / "base")["analysis"]["layers"]}
    for path, update in updates.items():
        U, _, V = np.linalg.svd(update.B.astype(float) @ update.A)
        inside = np.linalg.norm(U[:, :2].T @ W[f"{path}.weight"].T.astype(float) @ V[:2].T)
        assert rows[path]["amplification"]["along_update"] == pytest.approx(inside, rel=1e-5)


def test_analysis_says_what_it_leaves_out(tmp_path, examples, capsys):
    shutil.copytree(examples / "adapter", tmp_path / "odd")
    state = formats.load_state(tmp_path / "odd" / "adapter_model.safetensors")
    names = [name for name in sorted(state) if "lora_B" in name]
    state[names[0]][...] = 0.0
    state[names[1]][0, 0] = np.nan
    formats.save_state(tmp_path / "odd" / "adapter_model.safetensors", state)
    last = sorted(formats.read_adapter(examples / "adapter").updates)[-1]
    one = written(tmp_path / "one", examples / "adapter", 2, paths=[last])
    report = reported(capsys, tmp_path / "odd", "--base", examples / "base", "--against", one)["analysis"]
    assert len(report["layers"]) == 13 and len(report["notes"]) == 3
    assert sum(row["amplification"] is not None for row in report["layers"]) == 12
    text = shown(capsys, tmp_path / "odd", "--analysis")
    assert "note: left out, since their numbers are not finite: " in text and "has no directions: " in text


def test_analysis_beside_another_base_is_noted(tmp_path, examples, capsys):
    shutil.copytree(examples / "base", tmp_path / "base")
    state = formats.load_state(tmp_path / "base" / "model.safetensors")
    formats.save_state(tmp_path / "base" / "model.safetensors", {name: array * 2.0 for name, array in state.items()})
    notes = reported(capsys, examples / "adapter", "--base", tmp_path / "base")["analysis"]["notes"]
    assert any("another base" in note for note in notes)


@pytest.mark.parametrize("flag", ["--analysis", "--against", "--base"])
def test_analysis_needs_an_adapter(flag, tmp_path, examples, capsys):
    formats.save_state(tmp_path / "x.safetensors", {"x": np.ones(2)})
    more = [] if flag == "--analysis" else [examples / "adapter"]
    for place in (examples / "base", tmp_path / "x.safetensors"):
        assert "look at the updates of an adapter" in refused(capsys, place, flag, *more, status=2)


def test_analysis_refuses_what_does_not_fit(tmp_path, examples, capsys):
    wide = written(tmp_path / "wide", examples / "adapter", 3, out=7)
    assert "is it an adapter of another model?" in refused(capsys, examples / "adapter", "--against", wide)
    saved = formats.read_adapter(wide)
    renamed = {f"x.{i}": update for i, update in enumerate(saved.updates.values())}
    formats.write_adapter(formats.SavedAdapter(renamed, lora.Config(r=3, target_modules=list(renamed))), tmp_path / "apart")
    assert "no layer in common" in refused(capsys, examples / "adapter", "--against", tmp_path / "apart")
    assert "is no base of" in refused(capsys, wide, "--base", examples / "base")
    assert "no such file" in refused(capsys, examples / "adapter", "--base", tmp_path / "nothing")

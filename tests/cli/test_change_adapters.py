"""`minilora combine`, `resize`, `diff` and `convert`: what they write, say, and refuse."""
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from minilora import formats, lora
from minilora.cli.main import main
from minilora.formats.adapters.saved import SavedAdapter, Update


def made(rng, r, s, paths=("h.0.attn", "h.0.mlp"), **fields):
    updates = {path: Update("linear", rng.standard_normal((r, 6)).astype("float32"),
                            rng.standard_normal((5, r)).astype("float32"), s, **fields) for path in paths}
    return SavedAdapter(updates, lora.Config(r=r, lora_alpha=s * r, target_modules=list(paths), use_dora=bool(fields)))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The current folder, with adapters in it: one, two, dora."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    formats.write_adapter(made(rng, 3, 0.5), "one")
    formats.write_adapter(made(rng, 2, 2.0, ["h.0.attn"]), "two")
    formats.write_adapter(made(rng, 2, 1.0, magnitude=np.ones(5, "float32")), "dora")
    return tmp_path


def ran(capsys, *words, status=0):
    got = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert got == status, (out, err)
    return out, err


def reported(capsys, *words, status=0):
    return json.loads(ran(capsys, *words, "--json", "--quiet", status=status)[0])


def dense(path):
    return {name: u.s * u.B.astype("float64") @ u.A.astype("float64") for name, u in formats.read_adapter(path).updates.items()}


def bytes_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def test_combine_writes_the_weighted_sum(folders, capsys):
    out, _ = ran(capsys, "combine", "one=0.5", "two=-2", "-o", "sum")
    one, two, both = dense("one"), dense("two"), dense("sum")
    np.testing.assert_allclose(both["h.0.attn"], 0.5 * one["h.0.attn"] - 2 * two["h.0.attn"], atol=1e-5)
    np.testing.assert_allclose(both["h.0.mlp"], 0.5 * one["h.0.mlp"], atol=1e-5)
    assert "3+2  -> 5" in out and "3+0  -> 3" in out and "wrote sum" in out and max(map(len, out.splitlines())) <= 80
    report = reported(capsys, "combine", "one", "two", "--how", "svd", "--rank", 2, "-o", "cut")
    assert report["schema"] == "minilora.combine/1" and [row["rank_after"] for row in report["layers"]] == [2, 2]
    assert report["numbers_before"] > report["numbers"]
    ran(capsys, "combine", "one", "two", "--how", "svd", "--rank", 2, "-o", "again")
    assert bytes_of("cut") == bytes_of("again")


@pytest.mark.parametrize("how", ["ties", "dare", "dare_ties"])
def test_combine_with_a_seed_is_the_same_again(how, folders, capsys):
    for out in ("a", "b"):
        ran(capsys, "combine", "one", "two", "--how", how, "-o", out)
    assert bytes_of("a") == bytes_of("b")
    ran(capsys, "combine", "one", "two", "--how", how, "--fast", "--seed", 3, "-o", "c")


def test_resize(folders, capsys):
    out, _ = ran(capsys, "resize", "one", "--rank", 1, "-o", "small")
    assert "3  -> 1" in out and {u.r for u in formats.read_adapter("small").updates.values()} == {1}
    best = [np.sqrt((np.linalg.svd(D, compute_uv=False)[1:] ** 2).sum()) for D in dense("one").values()]
    rows = reported(capsys, "resize", "one", "--rank", 1, "--dry-run", "-o", "nothing")["layers"]
    assert [row["error"] for row in rows] == pytest.approx(best, rel=1e-5) and not Path("nothing").exists()
    assert reported(capsys, "resize", "one", "--energy", 0.9, "-o", "e")["energy"] >= 0.9
    assert formats.read_adapter("one").config.lora_alpha == 1.5  # the source is as it was


def test_diff_says_whether_it_is_the_same_function(folders, capsys):
    ran(capsys, "resize", "one", "--rank", 64, "-o", "same")
    assert "the same function" in ran(capsys, "diff", "one", "same")[0]
    ran(capsys, "combine", "one", "-o", "balanced")
    assert reported(capsys, "diff", "one", "balanced")["same"]
    out, _ = ran(capsys, "diff", "one", "two", status=3)
    assert "not the same function: 2 of 2" in out and max(map(len, out.splitlines())) <= 80
    ran(capsys, "resize", "one", "--rank", 2, "-o", "near")
    ran(capsys, "diff", "one", "near", status=3)
    ran(capsys, "diff", "one", "near", "--tolerance", 1)
    ran(capsys, "diff", "one", "dora", status=3)
    ran(capsys, "convert", "one", "--to", "mlx", "--write", "num_layers=1", "--names", "h.=model.layers.", "-o", "mlx")
    ran(capsys, "diff", "one", "mlx", status=3)
    ran(capsys, "diff", "one", "mlx", "--names", "model.layers.=h.")


@pytest.mark.parametrize(("to", "write", "read"), [
    ("mlx", ["--write", "pad=true", "--write", "num_layers=1"], []),
    ("kohya", [], ["--read", 'modules=["h.0.attn", "h.0.mlp"]']),
    ("diffusers", ["--write", "component=unet"], []), ("loralib", [], ["--read", "lora_alpha=1.5"]), ("peft", [], [])])
def test_convert_there_and_back(to, write, read, folders, capsys):
    out, _ = ran(capsys, "convert", "one", "--to", to, *write, "-o", "there")
    assert f"peft -> {to}: 2 updates, ranks 3" in out
    rename = ["--names", "unet.="] if to == "diffusers" else ["--names", "lora_unet_="] if to == "kohya" and not read else []
    ran(capsys, "convert", "there", "--to", "peft", *read, *rename, "-o", "back")
    ran(capsys, "diff", "one", "back")


def test_convert_takes_names_of_modules_from_the_base(folders, capsys):
    formats.save_state("base.safetensors", {"h.0.attn.weight": np.zeros((5, 6)), "h.0.mlp.weight": np.zeros((5, 6))})
    ran(capsys, "convert", "one", "--to", "kohya", "-o", "one.safetensors")
    ran(capsys, "convert", "one.safetensors", "--to", "peft", "--base", "base.safetensors", "-o", "back")
    ran(capsys, "diff", "one", "back")


def test_what_a_dialect_cannot_say_is_refused_and_nothing_is_written(folders, capsys):
    _, err = ran(capsys, "convert", "dora", "--to", "gguf", "-o", "out", status=1)
    assert "h.0.attn" in err and "DoRA" in err or "gguf" in err
    _, err = ran(capsys, "convert", "dora", "--to", "loralib", "-o", "out", status=1)
    assert "DoRA" in err and not Path("out").exists()
    _, err = ran(capsys, "convert", "one", "--to", "mlx", "--write", "foldd=true", "-o", "out", status=1)
    assert "foldd" in err and "fold" in err
    formats.write_adapter(dataclasses.replace(made(np.random.default_rng(0), 2, 1.0), config=lora.Config(
        r=2, lora_alpha=2, target_modules=["attn", "mlp"], init_lora_weights="pissa")), "moved")
    _, err = ran(capsys, "convert", "moved", "--to", "kohya", "-o", "out", status=1)
    assert "pissa" in err and "save_adapter" in err


@pytest.mark.parametrize(("words", "status", "said"), [
    (["combine", "one", "dora", "-o", "out"], 1, ["dora: h.0.attn", "DoRA", "extract"]),
    (["combine", "one", "missing", "-o", "out"], 1, ["missing"]),
    (["combine", "one", "two", "-o", "one"], 1, ["input one"]),
    (["combine", "one", "two", "-o", "dora"], 1, ["exists", "--overwrite"]),
    (["combine", "one", "two", "-o", "one/inside"], 1, ["input one"]),
    (["combine", "one", "--rank", "2", "-o", "out"], 1, ["rank", "how='svd'"]),
    (["combine", "one", "--saved", "2", "-o", "out"], 2, ["--saved 2"]),
    (["combine", "one", "--saved", "all", "-o", "out"], 1, ["saved", "average"]),
    (["combine", "one", "-o", "out", "--how", "mean"], 2, ["mean", "dare_ties"]),
    (["combine", "-o", "out"], 2, ["ADAPTER"]),
    (["resize", "one", "-o", "out"], 2, ["--rank", "--energy"]),
    (["resize", "one", "--rank", "0", "-o", "out"], 1, ["r "]),
    (["resize", "one", "--energy", "95", "-o", "out"], 1, ["energy"]),
    (["resize", "dora", "--rank", "1", "-o", "out"], 1, ["DoRA"]),
    (["resize", "one", "--rank", "1", "-o", "out", "--read", "r"], 2, ["KEY=VALUE"]),
    (["diff", "one", "missing"], 1, ["missing"]),
    (["diff", "one", "two", "--tolerance", "-1"], 2, ["--tolerance"]),
    (["convert", "one", "--to", "torch", "-o", "out"], 2, ["torch", "mlx"]),
    (["convert", "one", "--to", "mlx", "--names", "x.=y.", "-o", "out"], 1, ["x."]),
    (["convert", "one", "--to", "mlx", "--names", "x", "-o", "out"], 2, ["OLD=NEW"]),
    (["convert", "one", "--to", "gguf", "--base", "one", "-o", "out"], 2, ["config.json"]),
    (["convert", "one", "--to", "peft", "--names", "h.0.attn=h.0.mlp", "-o", "out"], 1, ["h.0.mlp"]),
])
def test_mistakes_are_told_and_change_nothing(words, status, said, folders, capsys):
    before = {name: bytes_of(name) for name in ("one", "two", "dora")}
    out, err = ran(capsys, *words, status=status)
    assert out == "" and all(word in err for word in said), err
    assert {name: bytes_of(name) for name in ("one", "two", "dora")} == before
    assert sorted(os.listdir()) == ["dora", "one", "two"]


def test_a_damaged_file_and_nan(folders, capsys):
    file = Path("two/adapter_model.safetensors")
    whole = file.read_bytes()
    for broken in (whole[:40], b"", whole[:-8]):
        file.write_bytes(broken)
        for line in ("combine one two -o out", "resize two --rank 1 -o out", "diff one two", "convert two --to mlx -o out"):
            _, err = ran(capsys, *line.split(), status=1)
            assert "adapter_model.safetensors" in err
    bad = formats.read_adapter("one")
    bad = dataclasses.replace(bad, updates={p: dataclasses.replace(u, B=u.B * np.nan) for p, u in bad.updates.items()})
    formats.write_adapter(bad, "nan")
    _, err = ran(capsys, "combine", "one", "nan", "-o", "out", status=1)
    assert "NaN" in err
    _, err = ran(capsys, "diff", "one", "nan", "--read", "allow_nonfinite=true", status=1)
    assert "NaN" in err and not Path("out").exists()


def test_overwrite_and_dry_run(folders, capsys):
    before = bytes_of("dora")
    out, _ = ran(capsys, "resize", "one", "--rank", "1", "-o", "dora", "--overwrite", "--dry-run")
    assert "would write dora" in out and bytes_of("dora") == before
    ran(capsys, "resize", "one", "--rank", "1", "-o", "dora", "--overwrite")
    assert formats.read_adapter("dora").updates["h.0.attn"].r == 1
    for name in ("convert one --to mlx -o out --dry-run", "combine one -o out --dry-run"):
        ran(capsys, *name.split())
        assert not Path("out").exists()


def test_options_from_a_file(folders, capsys):
    Path("c.json").write_text(json.dumps({"combine": {"how": "svd", "rank": 1, "read": ["allow_nonfinite=true"]}}))
    report = reported(capsys, "combine", "one", "two", "--config", "c.json", "-o", "out")
    assert [row["rank_after"] for row in report["layers"]] == [1, 1]
    assert "how = \"svd\"" in ran(capsys, "combine", "one", "--config", "c.json", "-o", "out", "--print-config")[0]


@pytest.fixture
def checkpoints(folders):
    """tuned is base with one in it, but for its rounding; a norm was trained too."""
    rng = np.random.default_rng(1)
    base = {"h.0.attn.weight": rng.standard_normal((5, 6)), "h.0.mlp.weight": rng.standard_normal((5, 6)),
            "norm.weight": np.ones(6)}
    D = dense("one")
    for folder, tensors in (("base", base), ("tuned", {**{f"{path}.weight": base[f"{path}.weight"] + D[path] for path in D},
                                                       "norm.weight": np.full(6, 2.0)})):
        Path(folder).mkdir()
        formats.save_state(f"{folder}/model.safetensors", tensors)


def test_extract(checkpoints, capsys):
    _, err = ran(capsys, "extract", "tuned", "base", "--rank", 3, "-o", "found", status=1)
    assert "norm.weight" in err and "--rest save" in err and not Path("found").exists()
    out, _ = ran(capsys, "extract", "tuned", "base", "--rank", 3, "--rest", "save", "-o", "found")
    assert "5  -> 3" in out and "1 arrays saved whole" in out and max(map(len, out.splitlines())) <= 80
    ran(capsys, "extract", "tuned", "base", "--rank", 3, "--rest", "drop", "-o", "plain")
    ran(capsys, "diff", "one", "plain")
    ran(capsys, "diff", "one", "found", status=3)
    report = reported(capsys, "extract", "tuned", "base", "--energy", 0.9, "--only", "mlp", "--dry-run", "-o", "nothing")
    assert [row["path"] for row in report["layers"]] == ["h.0.mlp"] and not report["written"] and not Path("nothing").exists()
    reported(capsys, "extract", "tuned", "base", "--rank", 2, "--fast", "--rest", "drop", "-o", "fast")


@pytest.mark.parametrize(("words", "status", "said"), [
    (["tuned", "base", "-o", "out"], 2, ["--rank", "--energy"]),
    (["tuned", "base", "--rank", "1", "-o", "base"], 1, ["input base"]),
    (["tuned", "base", "--rank", "1", "-o", "base/inside"], 1, ["input base"]),
    (["tuned", "tuned", "--rank", "1", "-o", "out"], 1, ["same weights"]),
    (["tuned", "one", "--rank", "1", "-o", "out"], 1, ["adapter"]),
    (["tuned", "missing", "--rank", "1", "-o", "out"], 1, ["missing"]),
    (["tuned", "base", "--rank", "1", "--only", "mpl", "-o", "out"], 1, ["mpl", "mlp"]),
    (["tuned", "base", "--rank", "1", "--groups", "mlp", "-o", "out"], 2, ["MODULE=N"]),
    (["tuned", "base", "--energy", "0.9", "--fast", "-o", "out"], 1, ["needs r"]),
])
def test_mistakes_of_extract(words, status, said, checkpoints, capsys):
    out, err = ran(capsys, "extract", *words, status=status)
    assert out == "" and all(word in err for word in said), err
    assert not Path("out").exists()


@pytest.mark.parametrize(("words", "flag"), [
    (["convert", "there", "--to", "peft", "-o", "out"], "--read lora_alpha=16"),
    (["diff", "there", "one"], "--read lora_alpha=16"),
    (["convert", "one", "--to", "mlx", "--write", "foldd=true", "-o", "out"], "--write fold=true"),
    (["convert", "two_ranks", "--to", "mlx", "-o", "out"], "--write fold=true"),
])
def test_an_option_that_an_error_names_is_told_as_a_flag(words, flag, folders, capsys):
    formats.write_adapter(formats.read_adapter("one"), "there", "loralib")
    rng = np.random.default_rng(0)
    formats.write_adapter(dataclasses.replace(made(rng, 3, 0.5), updates={
        **made(rng, 3, 0.5, ["a.fc"]).updates, **made(rng, 2, 0.3, ["b.fc"]).updates}), "two_ranks")
    _, err = ran(capsys, *words, status=1)
    assert flag in err and "KEY=VALUE" in err, err

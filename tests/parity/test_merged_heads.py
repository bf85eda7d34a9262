"""A base with a classifier's head merged into it, read by transformers."""
import json

import numpy as np
import pytest

from minilora import formats, lora, models
from minilora.cli.loading import modules_of_head

pytestmark = pytest.mark.parity

IDS = [[3, 5, 7, 9, 11], [1, 2, 4, 8, 16]]
SMALL = dict(vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
             max_position_embeddings=16)
BASES = {"bert": lambda: models.Bert(models.BertConfig(**SMALL), rng=0),
         "bert without a pooler": lambda: models.Bert(models.BertConfig(**SMALL), False, rng=0),
         "roberta": lambda: models.Roberta(models.RobertaConfig(**SMALL), rng=0),
         "deberta": lambda: models.DebertaV2(models.DebertaV2Config(**SMALL), rng=0),
         "llama": lambda: models.Llama(models.LlamaConfig(num_key_value_heads=1, pad_token_id=0, **SMALL), rng=0)}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("head, task, auto", [("sequence_classification", "SEQ_CLS", "AutoModelForSequenceClassification"),
                                              ("token_classification", "TOKEN_CLS", "AutoModelForTokenClassification")])
def test_transformers_reads_the_classifier(tmp_path, kind, head, task, auto):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    models.save(BASES[kind](), tmp_path / "base")
    model = models.load(tmp_path / "base", head=head, labels=["bad", "good", "so so"], rng=3)
    lora.inject(model, lora.Config(r=2, target_modules="all-linear", task_type=task,
                                   modules_to_save=modules_of_head(model)), rng=1)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        if p.trainable:
            p.data = p.data + (0.05 * rng.standard_normal(p.shape)).astype("float32")
    formats.save_adapter(model, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"labels": ["bad", "good", "so so"]}))
    formats.merge_files(tmp_path / "base", tmp_path / "run", tmp_path / "merged")
    theirs, told = getattr(transformers, auto).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"]
    assert theirs.config.id2label == {0: "bad", 1: "good", 2: "so so"}
    with torch.no_grad():
        np.testing.assert_allclose(theirs.eval()(torch.tensor(IDS)).logits.numpy(), model.eval()(IDS).data, atol=1e-6)

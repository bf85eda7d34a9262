"""One training step of a small DeBERTa-v3 and of a small Qwen3, random weights: LoRA in minilora against transformers + peft.

On the CPU, in float32: 6 layers, width 384, 6 heads; 32 texts of 32 tokens; LoRA of rank 8 on queries and values, Adam with
its defaults, no dropout. DeBERTa with 256 buckets, shared projections and normalised distances, as v3 has them, two classes
behind its pooler; Qwen3 with 3 key and value heads of 64, an MLP of 3 d, 8,192 tokens, and the loss of the next token. A step:
forward, loss, backward, Adam; the whole batch at once.

How the sides alternate, and why in processes of their own: alternate.py. On a machine with other work the ratio of the minima
and that of the CPU times say most; with --threads 1 they should agree.
"""

import alternate
import numpy
from alternate import compare, comparison_table, median, quartiles, run, table, timed

SIZES = {"layers": 6, "width": 384, "heads": 6, "rows": 32, "tokens": 32, "rank": 8}
WORDS, TOKENS, CLASSES, ALPHA = 30522, 8192, 2, 16
alternate.WARM_UP = 2


def data(vocabulary):
    rng = numpy.random.default_rng(0)
    return rng.integers(1, vocabulary, (SIZES["rows"], SIZES["tokens"])), rng.integers(0, CLASSES, SIZES["rows"])


def deberta_fields():
    d = SIZES["width"]
    return dict(vocab_size=WORDS, hidden_size=d, num_hidden_layers=SIZES["layers"], intermediate_size=4 * d,
                num_attention_heads=SIZES["heads"], relative_attention=True, position_buckets=256, max_relative_positions=-1,
                pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
                hidden_dropout_prob=0.0)


def qwen_fields():
    return dict(vocab_size=TOKENS, hidden_size=SIZES["width"], num_hidden_layers=SIZES["layers"],
                intermediate_size=3 * SIZES["width"], num_attention_heads=SIZES["heads"],
                num_key_value_heads=SIZES["heads"] // 2, head_dim=64)


def minilora_step(model, targets, loss_of):
    import minilora
    from minilora import lora
    lora.inject(model, lora.Config(r=SIZES["rank"], lora_alpha=ALPHA, target_modules=targets), rng=0)
    optimizer = minilora.optim.Adam([p for p in model.parameters() if p.trainable])

    def step():
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step)


def minilora_deberta():
    from minilora import models
    ids, labels = data(WORDS)
    model = models.DebertaV2Classifier(models.DebertaV2Config(**deberta_fields()), models.Labels(CLASSES), rng=0)
    return minilora_step(model, ["query_proj", "value_proj"], lambda model: model(ids, labels))


def minilora_qwen():
    from minilora import models
    ids, _ = data(TOKENS)
    return minilora_step(models.Llama(models.Qwen3Config(**qwen_fields()), rng=0), ["q_proj", "v_proj"],
                         lambda model: model.loss(ids, ids))


def peft_step(model, targets, arguments):
    import peft
    import torch
    model = peft.get_peft_model(model, peft.LoraConfig(r=SIZES["rank"], lora_alpha=ALPHA, target_modules=targets))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step():
        loss = model(**arguments).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step)


def peft_deberta():
    import torch
    import transformers
    ids, labels = map(torch.from_numpy, data(WORDS))
    config = transformers.DebertaV2Config(**deberta_fields(), attention_probs_dropout_prob=0.0, num_labels=CLASSES)
    return peft_step(transformers.DebertaV2ForSequenceClassification(config), ["query_proj", "value_proj"],
                     dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids)))


def peft_qwen():
    import torch
    import transformers
    ids = torch.from_numpy(data(TOKENS)[0])
    config = transformers.Qwen3Config(**qwen_fields(), use_cache=False)
    return peft_step(transformers.Qwen3ForCausalLM(config), ["q_proj", "v_proj"], dict(input_ids=ids, labels=ids))


SIDES = {
    "DeBERTa, minilora": minilora_deberta,
    "DeBERTa, transformers + peft": peft_deberta,
    "Qwen3, minilora": minilora_qwen,
    "Qwen3, transformers + peft": peft_qwen,
}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{median(rounds):.3f}", f"{low:.3f} to {high:.3f}", f"{min(r['seconds'] for r in rounds):.3f}",
                     f"{median(rounds, 'cpu'):.3f}", f"{median(rounds, 'faults'):.0f}"])
    print(table(["side", "s a step", "quartiles", "least", "CPU s", "page faults"], rows) + f"\n\n{SIZES}\n")
    comparisons = compare(results, [
        (f"{name}: {what}minilora / transformers + peft", f"{name}, minilora", f"{name}, transformers + peft", limit, *key)
        for name in ("DeBERTa", "Qwen3") for what, limit, key in (("", 1.0, ()), ("CPU time, ", None, ("cpu",)))])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, SIDES, report, rounds=7, steps=3, sizes=SIZES)

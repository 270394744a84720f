"""The same under the Hugging Face Trainer (`pip install transformers accelerate`), with a small BERT of its own.

python examples/train_hf_trainer.py
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import mpsearch


class Parity(Dataset[dict[str, torch.Tensor]]):
    """Sequences of 16 tokens; the label says whether the first token is among the second half."""

    def __init__(self, samples: int) -> None:
        self.tokens = torch.randint(2, 32, (samples, 16), generator=torch.Generator().manual_seed(samples))
        self.labels = (self.tokens[:, 8:] == self.tokens[:, :1]).any(1).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def main(steps: int = 50) -> float:
    """The training loss of the quantized network after `steps`."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **shape))
    batch = Parity(64).tokens
    graph = mpsearch.inspect_model(model, batch)
    config = mpsearch.PrecisionConfig.uniform(
        [layer.name for layer in graph.quantizable], mpsearch.LayerPrecision.shorthand("w4a8")
    )
    quantized = mpsearch.prepare_for_training(model, config, batch, graph.layers)
    arguments = TrainingArguments("trainer-output", max_steps=steps, report_to=[], save_strategy="no", use_cpu=True)
    return float(Trainer(model=quantized, args=arguments, train_dataset=Parity(1024)).train().training_loss)


if __name__ == "__main__":
    print(f"training loss {main():.3f}")

"""A task of one's own: the next letter of Python's own help (bits per letter; less is better).

mpsearch check own_language_model.yaml, with `task: {factory: "own_language_model:task"}`, in this folder.
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 128)

    def forward(self, x):
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.layer(self.embedding(x), src_mask=future))


class Task:
    name, metric = "one-layer/help", "bpc"

    def float_model(self):
        torch.manual_seed(0)
        return Network()

    def batches(self, split):
        letters = torch.tensor([min(ord(letter), 127) for letter in "".join(map(topics.get, sorted(topics)))])
        blocks = letters[: len(letters) // 33 * 33].reshape(-1, 33)[{"train": 0, "val": 1, "test": 2}[split] :: 60]
        return [(blocks[:, :-1], blocks[:, 1:])]

    def loss(self, output, target):
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def train(self, model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for x, y in 30 * self.batches("train"):
            optimizer.zero_grad()
            self.loss(model(x), y).backward()
            optimizer.step()


task = Task

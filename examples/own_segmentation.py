"""A task of one's own: which pixels of a picture belong to a digit (mean IoU).

mpsearch check own_segmentation.yaml, with `task: {factory: "own_segmentation:task"}`, in this folder.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


def network() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 2, 1))


class Task:
    name, metric = "three-convolutions/digit-ink", "miou"

    def float_model(self):
        torch.manual_seed(0)
        return network()

    def batches(self, split):
        ink = torch.from_numpy(load_digits().images[{"train": 0, "val": 1, "test": 2}[split] :: 3]).unsqueeze(1)
        noisy = ink / 16 + 0.5 * torch.randn(ink.shape, generator=torch.Generator().manual_seed(0))
        return [(noisy.float(), (ink[:, 0] > 6).long())]

    def loss(self, output, target):
        return F.cross_entropy(output, target)

    def train(self, model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for x, y in 60 * self.batches("train"):
            optimizer.zero_grad()
            self.loss(model(x), y).backward()
            optimizer.step()


task = Task

"""A task of one's own: where the bright square of a picture is (mAP; pip install 'mpsearch[metrics]').

mpsearch check own_detection.yaml, with `task: {factory: "own_detection:task"}` and `trial: {distill: false}`, as a
detector trains by its own loss; in this folder.
"""

import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator


def network() -> nn.Module:
    body = nn.Sequential()
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        body.extend([nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()])
    body.out_channels = 32
    anchors = AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    return FCOS(body, 2, min_size=64, max_size=64, anchor_generator=anchors, detections_per_img=5)


class Task:
    name, metric = "fcos/squares", "map50"

    def float_model(self):
        torch.manual_seed(0)
        return network()

    def batches(self, split):
        random = torch.Generator().manual_seed(len(split))
        images, targets = list(0.5 * torch.rand(64, 3, 64, 64, generator=random)), []
        for image in images:
            x, y = torch.randint(4, 44, (2,), generator=random).tolist()
            image[:, y : y + 16, x : x + 16] += 0.5
            targets.append({"boxes": torch.tensor([[x, y, x + 16.0, y + 16.0]]), "labels": torch.tensor([1])})
        return [((images[i : i + 16], targets[i : i + 16]), targets[i : i + 16]) for i in range(0, 64, 16)]

    def loss(self, output, target):
        return sum(output.values())

    def train(self, model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        for (images, targets), _ in 15 * self.batches("train"):
            optimizer.zero_grad()
            self.loss(model(images, targets), targets).backward()
            optimizer.step()


task = Task

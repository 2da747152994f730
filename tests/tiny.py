"""A segmentation network of a few hundred parameters with batch norm and dropout, and training as `train` does it."""

from types import SimpleNamespace

import torch
from torch import nn

from ltseg_core.methods.base import Stage
from ltseg_core.models import SegmentationNetwork
from ltseg_core.stats import ClassCounts
from ltseg_core.train import Learner

C, D = 4, 6
COUNTS = ClassCounts(torch.tensor([8000, 1500, 200, 10]), torch.tensor([40, 30, 12, 3]))


class Encoder(nn.Sequential):
    output_stride = 4

    def __init__(self):
        super().__init__(nn.Conv2d(3, 5, 4, stride=4), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, x):
        return [super().forward(x)]


class Decoder(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(5, D, 1), nn.BatchNorm2d(D), nn.ReLU(), nn.Dropout2d(0.3))

    def forward(self, maps):
        return super().forward(maps[-1])


def tiny_network(seed=0, kernel=1) -> SegmentationNetwork:
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Conv2d(D, C, kernel, padding=kernel // 2), nn.Identity(), nn.Identity())
    network = SegmentationNetwork(SimpleNamespace(encoder=Encoder(), decoder=Decoder(), segmentation_head=head))
    for module in network.modules():  # statistics unlike those of a fresh network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return network


def batch(seed=0, size=(18, 23), images=2):
    """Images and labels; the size is no multiple of the stride, class 3 is rare, a corner is ignored."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (images, *size), generator=g)
    target[0, 5, 6:8] = 3
    target[:, :3, :4] = 255
    return torch.rand(images, 3, *size, generator=g), target


def train_steps(stage: Stage, steps=3, lr=0.1, decay=0.0) -> Learner:
    """Optimiser steps on one stage, with its frozen modules treated as the training loop treats them."""
    learner = Learner(stage)
    for module in stage.frozen:
        module.requires_grad_(False)
    learner.train()
    for module in stage.frozen:
        module.eval()
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=lr, weight_decay=decay)
    for step in range(steps):
        optimizer.zero_grad()
        learner(*batch(seed=step)).backward()
        optimizer.step()
    return learner


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], module: nn.Module) -> dict[str, bool]:
    return {name: torch.equal(before[name], tensor) for name, tensor in module.state_dict().items()}

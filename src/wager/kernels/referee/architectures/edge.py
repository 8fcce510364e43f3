"""Small convolutional networks and detection: ConvNeXt V2, MobileNetV4, EfficientNetV2, YOLOv10."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wager.kernels.referee import operators as op
from wager.kernels.referee.architectures.parts import floats

INPUTS = floats((2, 3, 64, 64), (1, 3, 48, 48))


class ConvNext(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.stem, self.stem_norm = op.Conv2d(3, width, 4, 4), op.LayerNorm(width, 1e-6)
        self.depthwise, self.norm = op.Conv2d(width, width, 7, 1, 3, width), op.LayerNorm(width, 1e-6)
        self.up, self.act, self.grn, self.down = (
            op.Linear(width, 4 * width, True),
            op.GELU(),
            op.GlobalResponseNorm(4 * width),
            op.Linear(4 * width, width, True),
        )
        self.pool, self.head = op.GlobalAvgPool2d(), op.Linear(width, 100, True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + self.down(self.grn(self.act(self.up(h)))).permute(0, 3, 1, 2)
        return self.head(self.pool(x))


class ConvNormAct(nn.Module):
    def __init__(self, i: int, o: int, kernel: int, stride: int = 1, groups: int = 1, act: op.Operator | None = None):
        super().__init__()
        self.conv, self.norm, self.act = (
            op.Conv2d(i, o, kernel, stride, kernel // 2, groups, False),
            op.BatchNorm2d(o),
            act,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.pool, self.shrink, self.act = op.GlobalAvgPool2d(), op.Linear(channels, channels // 4, True), op.SiLU()
        self.grow, self.gate = op.Linear(channels // 4, channels, True), op.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.grow(self.act(self.shrink(self.pool(x)))))[..., None, None]


class InvertedBottleneck(nn.Module):
    """Depthwise, expand, depthwise, project: MobileNetV4's universal block (arXiv 2404.10518)."""

    def __init__(self, i: int, o: int, expand: int, stride: int, act: type[op.Operator], before: bool, squeeze: bool):
        super().__init__()
        wide = i * expand
        layers: list[nn.Module] = [ConvNormAct(i, i, 3, 1, i)] if before else []
        layers += [ConvNormAct(i, wide, 1, 1, 1, act()), ConvNormAct(wide, wide, 3, stride, wide, act())]
        layers += [SqueezeExcite(wide)] if squeeze else []
        self.layers, self.same = nn.Sequential(*layers, ConvNormAct(wide, o, 1)), stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.same else self.layers(x)


class Classifier(nn.Module):
    def __init__(self, *layers: nn.Module, width: int):
        super().__init__()
        self.layers, self.pool, self.head = nn.Sequential(*layers), op.GlobalAvgPool2d(), op.Linear(width, 100, True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layers(x)))


class Yolo(nn.Module):
    """A cross-stage block, fast pyramid pooling, an upsampled merge and a dense head of boxes and classes."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem = nn.Sequential(
            ConvNormAct(3, width, 3, 2, act=op.SiLU()), ConvNormAct(width, 2 * width, 3, 2, act=op.SiLU())
        )
        self.split, self.inner = (
            ConvNormAct(2 * width, 2 * width, 1, act=op.SiLU()),
            ConvNormAct(width, width, 3, act=op.SiLU()),
        )
        self.join, self.deep = (
            ConvNormAct(3 * width, 2 * width, 1, act=op.SiLU()),
            ConvNormAct(2 * width, 2 * width, 3, 2, act=op.SiLU()),
        )
        self.pool, self.pooled, self.up = (
            op.MaxPool2d(5, 1, 2),
            ConvNormAct(8 * width, 2 * width, 1, act=op.SiLU()),
            op.Upsample(),
        )
        self.head, self.distribution = op.Conv2d(4 * width, 4 * 16 + 20, 1), op.Softmax()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(self.stem(x)).chunk(2, 1)
        fine = self.join(torch.cat((a, b, self.inner(b)), 1))
        deep = self.deep(fine)
        levels = [deep]
        for _ in range(3):
            levels.append(self.pool(levels[-1]))
        merged = torch.cat((self.up(self.pooled(torch.cat(levels, 1))), fine), 1)
        boxes, classes = self.head(merged).flatten(2).transpose(1, 2).split((64, 20), -1)
        sides = self.distribution(boxes.unflatten(-1, (4, 16))) @ torch.arange(16.0)
        return torch.cat((sides, classes), -1)


ENTRIES = {
    "convnextv2": (ConvNext, INPUTS),
    "mobilenetv4": (
        lambda: Classifier(
            ConvNormAct(3, 16, 3, 2, act=op.ReLU()), InvertedBottleneck(16, 24, 4, 2, op.ReLU, True, False),
            InvertedBottleneck(24, 24, 4, 1, op.ReLU, True, False), width=24,
        ),
        INPUTS,
    ),
    "efficientnetv2": (
        lambda: Classifier(
            ConvNormAct(3, 16, 3, 2, act=op.SiLU()), ConvNormAct(16, 24, 3, 2, act=op.SiLU()),
            InvertedBottleneck(24, 24, 4, 1, op.SiLU, False, True), width=24,
        ),
        INPUTS,
    ),
    "yolov10": (Yolo, INPUTS),
}  # fmt: skip

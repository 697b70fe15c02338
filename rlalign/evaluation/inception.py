"""The Inception network of FID: InceptionV3 as TensorFlow published it in 2015. torchvision's differs a little.

Average pooling leaves the padding out, the last block takes a maximum where others average, and there are 1,008
classes. Its weights are called as in torchvision, and in the file pt_inception-2015-12-05-6726825d.pth.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import inception as tv

SIDE, CLASSES = 299, 1008


class FidInception(nn.Module):
    """uint8 pictures [B, 3, H, W] -> [B, 2048]: the last pooling's output."""

    def __init__(self) -> None:
        super().__init__()
        network = tv.Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
        network.Mixed_5b, network.Mixed_5c, network.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        widths = (128, 160, 160, 192)
        network.Mixed_6b, network.Mixed_6c, network.Mixed_6d, network.Mixed_6e = (_C(768, width) for width in widths)
        network.Mixed_7b, network.Mixed_7c = _E(1280, last=False), _E(2048, last=True)
        network.dropout, network.fc = nn.Identity(), nn.Identity()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        pixels = pictures.to(next(self.parameters()))
        resized = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self.network((resized - 128) / 128)

    @staticmethod
    def read(path: Path) -> "FidInception":
        """From safetensors; ValueError for weights of something else."""
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        network = FidInception()
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
        try:
            network.network.load_state_dict(own)
        except RuntimeError:  # names or shapes differ
            wanted = len(network.network.state_dict())
            raise ValueError(
                f"{path} does not hold the weights of FID's Inception network: {wanted} tensors with torchvision's "
                "names, and fc's beside them"
            ) from None
        return network.requires_grad_(False).eval()


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(tv.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]


class _C(tv.InceptionC):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels_7x7=width)

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average(x)),
        ]


class _E(tv.InceptionE):
    def __init__(self, channels: int, last: bool) -> None:
        super().__init__(channels)
        self.last = last

    def _forward(self, x: Tensor) -> list[Tensor]:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else _average(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(pooled),
        ]

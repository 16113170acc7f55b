"""Set-up shared by all tests."""

from __future__ import annotations

import torch

# torchvision (which timm imports) expects these on a torch without its compiled ops.
_torchvision = torch.library.Library("torchvision", "DEF")
_torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

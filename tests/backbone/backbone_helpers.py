"""What tests of backbones share: checkpoint contents and matches made by hand, and a small network's weights."""

from pathlib import Path

import timm
import torch

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.checkpoint_metadata import Metadata
from odcft.backbone.tensor_matching import Match

PATH = Path("somewhere.pth")


def contents(*state_dicts, container="torch", names=(), hints=(), metadata=None):
    named = {str(number) if number else "": tensors for number, tensors in enumerate(state_dicts)}
    return Contents(PATH, container, named, list(names), list(hints), metadata or Metadata())


def matched(where="the file itself", dropped=(), count=0, expected=0, misfits=()):
    tensors = {str(number): torch.zeros(1) for number in range(count)}
    return Match(tensors, where, expected, [], list(dropped), [], dict.fromkeys(misfits, torch.zeros(1)), [])


def resnet_state():
    """The state dict of a small ResNet with a classifier of 7 classes."""
    torch.manual_seed(5)
    return timm.create_model("test_resnet", num_classes=7).state_dict()


def equal(backbone, state):
    """Whether a backbone has exactly these weights."""
    return all(torch.equal(tensor, state[name]) for name, tensor in backbone.net.state_dict().items())

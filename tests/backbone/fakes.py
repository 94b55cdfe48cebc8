"""Checkpoint contents and matches made by hand, for the tests that recognise architectures, families and inputs."""

from pathlib import Path

import torch

from odcft.backbone.checkpoint_files import Contents
from odcft.backbone.metadata import Metadata
from odcft.backbone.tensor_matching import Match

PATH = Path("somewhere.pth")


def contents(*state_dicts, container="torch", names=(), hints=(), metadata=None):
    named = {str(number) if number else "": tensors for number, tensors in enumerate(state_dicts)}
    return Contents(PATH, container, named, list(names), list(hints), metadata or Metadata())


def matched(where="the file itself", dropped=(), count=0, expected=0, misfits=()):
    tensors = {str(number): torch.zeros(1) for number in range(count)}
    return Match(tensors, where, expected, [], list(dropped), [], dict.fromkeys(misfits, torch.zeros(1)), [])

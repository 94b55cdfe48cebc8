import json

import pytest
import timm
import torch

from odcft.backbone.inspection import describe
from odcft.backbone.load import load_backbone
from odcft.progress import Progress


@pytest.fixture
def moco(tmp_path):
    """A file of query and key encoder, heads and a queue."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=0).state_dict()
    state = {f"module.encoder_q.{name}": tensor for name, tensor in net.items()}
    state |= {f"module.encoder_k.{name}": tensor + 1 for name, tensor in net.items()}
    state |= {"module.encoder_q.fc.weight": torch.ones(4, 4), "module.queue": torch.ones(4, 8)}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    return tmp_path / "moco.pth"


def test_a_person_sees_what_it_is_its_stages_what_was_left_out_and_the_input(moco):
    values, drawing = describe(load_backbone(moco))
    lines = list(drawing.lines())
    assert lines[0].startswith("moco · test_resnet · RGB 160")
    assert "  backbone   90 of 90 tensors under state_dict/module.encoder_q." in lines
    assert any(line.startswith("    layer1 · ") and line.endswith("parameters") for line in lines)
    assert "  backbones  2 complete ones in this file" in lines
    assert any("the query encoder is the one that is trained" in line for line in lines)
    assert any("take it with --part state_dict/module.encoder_k." in line for line in lines)
    assert "  left out   92 tensors" in lines
    for start in ("copies (", "head (a classifier", "queue (features"):
        assert any(line.startswith(f"    {start}") for line in lines)
    assert any(line.startswith("  input      RGB, values 0..1, mean 0.5") for line in lines)
    assert json.loads(json.dumps(values))["left_out"]["queue"]["count"] == 1
    assert values["parts"][1] == {"where": "state_dict/module.encoder_k.", "same": False}


def test_a_terminal_gets_a_tree_in_which_names_do_nothing(moco, capsys):
    from rich.console import Console

    from odcft.text import Branch

    progress = Progress()
    progress.console = Console(stderr=True, force_terminal=True, color_system=None, width=70, soft_wrap=True)
    _, drawing = describe(load_backbone(moco))
    drawing.add("note \x9b2J[red]\u202e").add("below")
    progress.draw(drawing)
    shown = capsys.readouterr().err
    assert "├── backbone   90 of 90 tensors" in shown
    assert r"└── note \x9b2J[red]\u202e" in shown
    assert "    └── below" in shown
    assert max(map(len, shown.splitlines())) <= 70
    progress = Progress()
    progress.draw(Branch("a", [Branch("b\n")]))
    assert capsys.readouterr().err == "a\n  b\\n\n"


def test_transformers_say_which_sizes_they_take(tmp_path):
    lines = list(describe(load_backbone("scratch:test_vit"))[1].lines())
    assert lines[0].endswith("RGB 160, or any multiple of 16")
    assert not any("fine-tuning shows it" in line for line in lines)


@pytest.mark.slow
def test_what_fine_tuning_will_show_a_large_transformer():
    lines = list(describe(load_backbone("scratch:vit_small_patch14_dinov2"))[1].lines())
    assert lines[0].endswith("RGB 518, or any multiple of 14")
    assert any("fine-tuning shows it 224 pixels or fewer" in line for line in lines)
    assert describe(load_backbone("scratch:mixer_s32_224"))[1].text.endswith("RGB 224 only")

"""Make a plain `import timm` work in this .venv with a CPU build of torch (odcft/torchvision_on_cpu.py says why)."""

import site
from pathlib import Path

# At start-up Python runs every line of a .pth file that starts with "import". This one does not import torch.
Path(site.getsitepackages()[0], "odcft_torchvision_on_cpu.pth").write_text("import odcft.torchvision_on_cpu\n")

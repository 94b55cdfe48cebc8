"""Make plain `import timm` work in this .venv too when torch is a CPU build (reason: odcft/torchvision_on_cpu.py)."""

import site
from pathlib import Path

# Python runs a line of a .pth file that starts with "import" at start-up. This one imports no torch.
Path(site.getsitepackages()[0], "odcft_torchvision_on_cpu.pth").write_text("import odcft.torchvision_on_cpu\n")

"""`python -m odcft`, and `torchrun -m odcft`."""

from odcft.cli import main

if __name__ == "__main__":
    main()

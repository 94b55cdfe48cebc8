"""Write odcft/timm_index.json: for each of timm's networks how many tensors it has, and the fingerprints of some.

    python tools/index_timm.py            (some ten minutes; again for every new timm)

They are the four that fewest other networks have, and the first convolution, whatever its channels. Networks with the
same tensors are one entry, under the name that `recognition.COMMON` has or else the shortest. What differs with the
size of the input is left out.
"""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch

from odcft.backbone.architecture_recognition import COMMON, any_channels, fingerprint

OUT = Path(__file__).parent.parent / "odcft" / "timm_index.json"
WITH_THE_INPUT = ("pos_embed", "relative_position", "attn_mask", "rope", "rel_pos", "num_batches_tracked")


def fingerprints(name: str) -> tuple[int, list[int], list[int]]:
    """How many tensors a network has, the fingerprints of its first convolutions, and of what else does not depend on
    the input.
    """
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, num_classes=0)
    first = net.pretrained_cfg.get("first_conv") or ()
    firsts = tuple(f"{conv}." for conv in ((first,) if isinstance(first, str) else first))
    tensors = net.state_dict()
    kept = [n for n in tensors if not n.startswith(firsts) and not any(word in n for word in WITH_THE_INPUT)]
    return (
        len(tensors),
        [fingerprint(n, any_channels(t.shape)) for n, t in tensors.items() if n.startswith(firsts) and t.ndim == 4],
        [fingerprint(n, tensors[n].shape) for n in kept],
    )


def main() -> None:
    """Build all networks on the meta device, count, and write."""
    warnings.filterwarnings("ignore")
    found: dict[str, tuple[int, list[int], list[int]]] = {}
    same: dict[tuple[int, frozenset[int]], str] = {}
    for name in sorted(sys.argv[1:] or timm.list_models(), key=lambda n: (n not in COMMON, len(n), n)):
        try:
            count, firsts, prints = fingerprints(name)
        except Exception as error:  # some need packages or a network
            print(f"{name} left out: {error!r:.100}", file=sys.stderr)
            continue
        if same.setdefault((count, frozenset(firsts + prints)), name) == name:
            found[name] = count, firsts, prints
    how_many = Counter(one for _, _, prints in found.values() for one in set(prints))
    index = {
        name: [count, *firsts[:1], *sorted(dict.fromkeys(prints), key=lambda one: how_many[one])[:4]]
        for name, (count, firsts, prints) in sorted(found.items())
    }
    lines = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in index.items())
    OUT.write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(index)} networks in {OUT}")


if __name__ == "__main__":
    main()

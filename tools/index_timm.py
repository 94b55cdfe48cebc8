"""Write timm_index.json: how many tensors each of timm's networks has, and fingerprints of some.

    python tools/index_timm.py            (takes about ten minutes; run it again for every new version of timm)

The fingerprints are of the four tensors that the fewest other networks have, and of the first convolution, whatever its
number of channels. Networks with the same tensors share one entry, under the name that is in `COMMON`, or else the
shortest. Tensors that depend on the input size are left out.
"""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch

from odcft.backbone.architecture_recognition import COMMON_ARCHITECTURES, fingerprint, without_input_channels

OUT = Path(__file__).parent.parent / "odcft" / "backbone" / "timm_index.json"
WITH_THE_INPUT = ("pos_embed", "relative_position", "attn_mask", "rope", "rel_pos", "num_batches_tracked")


def fingerprints(name: str) -> tuple[int, list[int], list[int]]:
    """The number of tensors of a network, and fingerprints: those of its first convolutions, and of its other tensors.

    Tensors that depend on the input size have none.
    """
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, num_classes=0)
    first = net.pretrained_cfg.get("first_conv") or ()
    firsts = tuple(f"{conv}." for conv in ((first,) if isinstance(first, str) else first))
    tensors = net.state_dict()
    kept = [n for n in tensors if not n.startswith(firsts) and not any(word in n for word in WITH_THE_INPUT)]
    return (
        len(tensors),
        [
            fingerprint(n, without_input_channels(t.shape))
            for n, t in tensors.items()
            if n.startswith(firsts) and t.ndim == 4
        ],
        [fingerprint(n, tensors[n].shape) for n in kept],
    )


def main() -> None:
    """Build all networks on the meta device, count their fingerprints, and write the index."""
    warnings.filterwarnings("ignore")
    found: dict[str, tuple[int, list[int], list[int]]] = {}
    same: dict[tuple[int, frozenset[int]], str] = {}
    for name in sorted(sys.argv[1:] or timm.list_models(), key=lambda n: (n not in COMMON_ARCHITECTURES, len(n), n)):
        try:
            count, firsts, prints = fingerprints(name)
        except Exception as error:  # some need other packages or network access
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

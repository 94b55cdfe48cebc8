"""Settings that make recipe `small` plain ODC: the paper's neck, whose output fills the memory, and labels alone."""

PLAIN_ODC = [
    *("neck.hidden=512", "neck.relu=true", "memory.start_layer=last", "memory.start_features=neck"),
    *("memory.instance_share=0", "optim.freeze=0", "optim.skip_padding=false", "optim.lr=0.03"),
]

"""The Mamba block and language model, its checkpoint, and one token of it in C++."""

from lib.mamba.model import (
    MambaBlock,
    MambaConfig,
    MambaLM,
    MambaMixer,
    RMSNorm,
    State,
    deepen,
    from_weights,
    load,
    save,
)

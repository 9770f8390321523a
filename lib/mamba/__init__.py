"""The Mamba block and language model, its checkpoint, and one token of it in C++."""

from lib.mamba.checkpoint import deepen, from_weights, load, save
from lib.mamba.mamba2 import Mamba2Config, Mamba2LM, Mamba2Mixer
from lib.mamba.mamba3 import Mamba3Config, Mamba3LM, Mamba3Mixer
from lib.mamba.model import (
    Block,
    LanguageModel,
    MambaBlock,
    MambaConfig,
    MambaLM,
    MambaMixer,
    RMSNorm,
    State,
)

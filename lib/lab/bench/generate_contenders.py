"""Who takes part in the benchmark of generation.

Our Mamba in C++ and in PyTorch, transformers' Mamba with the same weights, and a GPT-2 of equal
size.
"""

import torch
from torch import nn

from lib.lab.bench.timing import Contender
from lib.lab.peers import language_models
from lib.mamba import model as mamba
from lib.mamba import step_cpu

NAMES = ("stepper", "pytorch", "transformers_mamba", "gpt2", "gpt2_static")
SEGMENT = 4096  # a prompt is read in pieces of this length, so that its memory stays small
WARM = 3  # tokens before a timing begins
PREFILL = "the model read random tokens up to there"
COPIED = "the state that ours has reached there is copied into its cache"
RANDOM = "its cache is filled with random numbers up to there"


class Contenders:
    """The contenders of one comparison.

    The three Mambas have equal weights; all weights are random.
    """

    def __init__(self, config: mamba.MambaConfig, positions: list[int], tokens: int, seed: int = 0):
        torch.manual_seed(seed)
        self.model = mamba.MambaLM(config).eval()
        self.longest = max(positions) + tokens + WARM + 1
        self.states: dict[int, mamba.State] = {}

    def state(self, position: int) -> mamba.State:
        """Ours after `position` random tokens."""
        if position not in self.states:
            random = torch.Generator().manual_seed(position)
            tokens = torch.randint(self.model.config.vocab_size, (1, position), generator=random)
            state = None
            for segment in tokens.split(SEGMENT, 1):
                _, state = self.model.prefill(segment, state)
            self.states[position] = state
        return self.states[position]

    def get(self, name: str) -> Contender:
        """Bring a contender, or raise `UserError` saying why it cannot be had."""
        return {
            "stepper": self._stepper,
            "pytorch": self._pytorch,
            "transformers_mamba": self._their_mamba,
            "gpt2": self._gpt2,
            "gpt2_static": lambda: self._gpt2(static=True),
        }[name]()

    def _stepper(self) -> Contender:
        fast = step_cpu.Stepper(self.model)

        def begin(position):
            fast.load(self.state(position))
            return fast.step, fast.state_bytes

        return Contender(
            "stepper",
            "ours, C++",
            "lib.mamba.step_cpu.Stepper.step",
            begin,
            _facts(self.model, PREFILL),
        )

    def _pytorch(self) -> Contender:
        def begin(position):
            state = self.state(position)

            def read(token):
                nonlocal state
                logits, state = self.model.step(token, state)
                return logits

            return read, lambda: _bytes(t for layer in state for t in layer)

        return Contender(
            "pytorch", "ours, PyTorch", "lib.mamba.MambaLM.step", begin, _facts(self.model, PREFILL)
        )

    def _their_mamba(self) -> Contender:
        transformers = language_models.package()
        model = language_models.mamba(self.model).eval()
        taps = self.model.config.d_conv

        def begin(position):
            cache = transformers.DynamicCache(config=model.config)
            for i, (window, h) in enumerate(self.state(position)):
                # it keeps one input more, unread
                window = torch.nn.functional.pad(window.transpose(1, 2), (1, 0))
                cache.update_conv_state(window, i, conv_kernel_size=taps)
                cache.update_recurrent_state(h, i)
            layers = cache.layers
            return (
                lambda token: model(token[None], cache=cache, use_cache=True).logits[:, -1],
                lambda: _bytes(
                    t for layer in layers for t in (layer.conv_states[0], layer.recurrent_states[0])
                ),
            )

        return Contender(
            "transformers_mamba",
            "transformers' Mamba",
            "its MambaForCausalLM with its cache",
            begin,
            _facts(model, COPIED),
        )

    def _gpt2(self, static: bool = False) -> Contender:
        transformers = language_models.package()
        model = language_models.gpt2(self.model, self.longest).eval()
        config = model.config
        heads, size = config.n_head, config.n_embd // config.n_head

        def begin(position):
            cache = (
                transformers.StaticCache(config=config, max_cache_len=self.longest)
                if static
                else transformers.DynamicCache(config=config)
            )
            random = torch.Generator().manual_seed(position)
            for i in range(config.n_layer):
                cache.update(*torch.randn(2, 1, heads, position, size, generator=random), i)
            layers = cache.layers
            return (
                lambda token: model(token[None], cache=cache, use_cache=True).logits[:, -1],
                lambda: _bytes(t for layer in layers for t in (layer.keys, layer.values)),
            )

        facts = _facts(model, RANDOM)
        if static:
            return Contender(
                "gpt2_static",
                "GPT-2, static cache",
                "transformers' GPT2LMHeadModel with a StaticCache, "
                "long enough for the last position",
                begin,
                facts,
            )
        return Contender(
            "gpt2", "GPT-2", "transformers' GPT2LMHeadModel with its DynamicCache", begin, facts
        )


def _facts(model: nn.Module, reached: str) -> dict:
    """How it comes to a position, and its size."""
    return {"reached": reached, "parameters": language_models.count(model)}


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)

"""Who takes part in the benchmark of generation.

Our Mamba in C++ and in PyTorch, transformers' Mamba with the same weights, and a GPT-2 of equal size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.env.errors import UserError
from lib.mamba import model as mamba
from lib.mamba import step_cpu as mamba_cpu

NAMES = ("stepper", "pytorch", "transformers_mamba", "gpt2", "gpt2_static")
SEGMENT = 4096  # a prompt is read in pieces of this length, so that its memory stays small
WARM = 3  # tokens before a timing begins
PREFILL = "the model read random tokens up to there"
COPIED = "the state that ours has reached there is copied into its cache"
RANDOM = "its cache is filled with random numbers up to there"


@dataclass(frozen=True)
class Contender:
    """One way to generate. `begin(position)` gives a function token -> logits of the next, (1, V)."""

    name: str
    label: str  # as the figure calls it
    timed: str  # what its timing contains
    reached: str  # how it comes to a position
    parameters: int
    begin: Callable[[int], tuple[Callable[[Tensor], Tensor], Callable[[], int]]]  # the second counts its cache's bytes


class Rivals:
    """The contenders of one comparison; equal weights for the three Mambas, random ones throughout."""

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
        return {"stepper": self._stepper, "pytorch": self._pytorch, "transformers_mamba": self._their_mamba,
                "gpt2": self._gpt2, "gpt2_static": lambda: self._gpt2(static=True)}[name]()

    def _stepper(self) -> Contender:
        fast = mamba_cpu.Stepper(self.model)

        def begin(position):
            fast.load(self.state(position))
            return fast.step, fast.state_bytes
        return Contender("stepper", "ours, C++", "lib.mamba.step_cpu.Stepper.step", PREFILL,
                         self.model.parameter_count(), begin)

    def _pytorch(self) -> Contender:
        def begin(position):
            state = self.state(position)

            def read(token):
                nonlocal state
                logits, state = self.model.step(token, state)
                return logits
            return read, lambda: _bytes(t for layer in state for t in layer)
        return Contender("pytorch", "ours, PyTorch", "lib.mamba.MambaLM.step", PREFILL,
                         self.model.parameter_count(), begin)

    def _their_mamba(self) -> Contender:
        transformers = transformers_package()
        ours = self.model.config
        config = transformers.MambaConfig(
            vocab_size=ours.vocab_size, hidden_size=ours.d_model, num_hidden_layers=ours.n_layer,
            state_size=ours.d_state, conv_kernel=ours.d_conv, expand=ours.expand, time_step_rank=ours.rank,
            use_bias=ours.bias, use_conv_bias=ours.conv_bias, layer_norm_epsilon=ours.norm_eps,
            tie_word_embeddings=ours.tied)
        model = transformers.MambaForCausalLM(config).eval()
        model.load_state_dict(self.model.state_dict(), strict=False)  # lm_head is the embedding

        def begin(position):
            cache = transformers.DynamicCache(config=config)
            for i, (window, h) in enumerate(self.state(position)):
                window = torch.nn.functional.pad(window.transpose(1, 2), (1, 0))  # it keeps one input more, unread
                cache.update_conv_state(window, i, conv_kernel_size=ours.d_conv)
                cache.update_recurrent_state(h, i)
            layers = cache.layers
            return (lambda token: model(token[None], cache=cache, use_cache=True).logits[:, -1],
                    lambda: _bytes(t for layer in layers for t in (layer.conv_states[0], layer.recurrent_states[0])))
        return Contender("transformers_mamba", "transformers' Mamba", "its MambaForCausalLM with its cache", COPIED,
                         _count(model), begin)

    def _gpt2(self, static: bool = False) -> Contender:
        transformers = transformers_package()
        config, model = self._equal_gpt2(transformers)
        heads, size = config.n_head, config.n_embd // config.n_head

        def begin(position):
            cache = (transformers.StaticCache(config=config, max_cache_len=self.longest) if static else
                     transformers.DynamicCache(config=config))
            random = torch.Generator().manual_seed(position)
            for i in range(config.n_layer):
                cache.update(*torch.randn(2, 1, heads, position, size, generator=random), i)
            layers = cache.layers
            return (lambda token: model(token[None], cache=cache, use_cache=True).logits[:, -1],
                    lambda: _bytes(t for layer in layers for t in (layer.keys, layer.values)))
        if static:
            return Contender("gpt2_static", "GPT-2, static cache", "transformers' GPT2LMHeadModel with a StaticCache, "
                             "long enough for the last position", RANDOM, _count(model), begin)
        return Contender("gpt2", "GPT-2", "transformers' GPT2LMHeadModel with its DynamicCache", RANDOM, _count(model),
                         begin)

    def _equal_gpt2(self, transformers):
        """A GPT-2 of our width and number of parameters, its table of positions not counted."""
        ours, wanted = self.model.config, self.model.parameter_count()
        width = ours.d_model
        heads = max(1, width // 64)
        while width % heads:
            heads -= 1
        layers = max(1, round((wanted - ours.vocab_size * width) / (12 * width**2)))

        def build(inner):
            torch.manual_seed(0)
            config = transformers.GPT2Config(
                vocab_size=ours.vocab_size, n_positions=self.longest, n_embd=width, n_layer=layers, n_head=heads,
                n_inner=inner)
            return config, transformers.GPT2LMHeadModel(config).eval()
        found = _count(build(4 * width)[1])  # the rest goes into the width of its feed-forward layers
        return build(max(1, round(4 * width + (wanted - found) / layers / (2 * width + 1))))


def transformers_package():
    """transformers, without its advice; `UserError` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed: run pip install 'transformers>=5.24,<6'") from error
    transformers.logging.set_verbosity_error()  # it would advise kernels that a CPU cannot run
    return transformers


def _count(model) -> int:
    """Parameters, each once, a GPT-2's table of positions not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

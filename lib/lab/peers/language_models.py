"""transformers' language models beside ours: its Mambas with our weights, our Mamba-2 with its,
and a GPT-2 of our size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib.env.errors import UserError
from lib.mamba.mamba2 import Mamba2Config, Mamba2LM
from lib.mamba.model import MambaLM


def package():
    """transformers, without its advice; `UserError` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "transformers is not installed: run pip install 'transformers>=5.24,<6'"
        ) from error
    transformers.logging.set_verbosity_error()  # it would advise kernels that a CPU cannot run
    return transformers


def mamba(ours: MambaLM) -> nn.Module:
    """Its `MambaForCausalLM` with our weights."""
    transformers = package()
    config = ours.config
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.d_state,
            conv_kernel=config.d_conv,
            expand=config.expand,
            time_step_rank=config.rank,
            use_bias=config.bias,
            use_conv_bias=config.conv_bias,
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tied,
        )
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)  # a tied lm_head is the embedding
    return theirs


def mamba2(ours: Mamba2LM) -> nn.Module:
    """Its `Mamba2ForCausalLM` with our weights."""
    transformers = package()
    config = ours.config
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.d_state,
            num_heads=config.n_head,
            head_dim=config.head_dim,
            n_groups=1,
            conv_kernel=config.d_conv,
            expand=config.expand,
            use_bias=config.bias,
            use_conv_bias=config.conv_bias,
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=True,
        )
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)  # the tied lm_head is the embedding
    return theirs


def ours_of_mamba2(weights: Mapping[str, Tensor], config: Mamba2Config) -> Mamba2LM:
    """A model out of named tensors, ours, transformers' or mamba-ssm's, of the sizes in `config`.

    Raises `UserError` where they do not fit it, or have an output layer that is not the embedding.
    """
    weights = {
        name.replace("backbone.embedding.", "backbone.embeddings."): tensor.float()
        for name, tensor in weights.items()
    }
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights.get("backbone.embeddings.weight", head)):
        raise UserError(
            "these weights have an output layer of their own: the Mamba-2 of this course "
            "has its embedding there"
        )
    model = Mamba2LM(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            "these weights are not those of a Mamba-2 of this configuration, with one "
            "group of B and C: compare its sizes with theirs"
        ) from error
    return model.eval()


def gpt2(ours: MambaLM, positions: int) -> nn.Module:
    """A `GPT2LMHeadModel` of our width and number of parameters, for texts of so many positions."""
    transformers = package()
    config = ours.config
    width = config.d_model
    wanted = ours.parameter_count()
    heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
    layers = max(1, round((wanted - config.vocab_size * width) / (12 * width**2)))

    def build(inner: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=config.vocab_size,
                    n_positions=positions,
                    n_embd=width,
                    n_layer=layers,
                    n_head=heads,
                    n_inner=inner,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    resid_pdrop=0.0,
                    attn_implementation="sdpa",
                )
            )

    missing = wanted - count(build(4 * width))  # goes into the width of the feed-forward layers
    return build(max(1, round(4 * width + missing / layers / (2 * width + 1))))


def count(model: nn.Module) -> int:
    """Parameters, each once, a GPT-2's table of positions not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)

"""What a checkpoint folder may say of itself.

Its facts and sizes are checked before a weight is read.
"""

from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lib.env.errors import UserError
from lib.env.schema import read_json
from lib.env.tensors import open_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
AGAIN = "fetch the checkpoint again"
Size = Annotated[int, Field(ge=1, le=2**20)]
Small = Annotated[float, Field(gt=0, le=1)]


class Description(TypedDict, total=False):
    """config.json in transformers' names and in mamba-ssm's.

    `lib.mamba.checkpoint` looks at what else it says.
    """

    __pydantic_config__ = ConfigDict(extra="allow")
    vocab_size: Required[Size]
    hidden_size: Size
    d_model: Size
    num_hidden_layers: Size
    n_layer: Size
    state_size: Size
    conv_kernel: Size
    expand: Size
    intermediate_size: Size
    time_step_min: Small
    time_step_max: Small
    layer_norm_epsilon: Small
    pad_vocab_size_multiple: Size
    use_bias: bool
    use_conv_bias: bool
    tie_word_embeddings: bool
    model_type: str
    hidden_act: str
    ssm_cfg: dict[str, Any] | None


def check_checkpoint(folder: str | Path) -> Description:
    """The content of config.json, where it and the list of tensors in model.safetensors make sense.

    Nothing is said of whether the weights are those of a Mamba.
    Raises `UserError`, which names the file and the fact that is wrong.
    """
    config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    description = read_json(config, Description, do=AGAIN)
    for ours, theirs in (("hidden_size", "d_model"), ("num_hidden_layers", "n_layer")):
        if ours not in description and theirs not in description:
            raise UserError(f"{config} is damaged ({ours} is missing): {AGAIN}")
    with open_tensors(weights, do=AGAIN) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    for name, shape in shapes.items():
        if not shape or 0 in shape:
            raise UserError(f"{weights} is damaged ({name[:80]} has shape {tuple(shape)}): {AGAIN}")
    return description

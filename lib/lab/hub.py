"""Put the shipped model on the Hub of Hugging Face: `python -m lib.lab.hub OWNER/NAME`.

Without `--send` it is a rehearsal: the folder is opened, its card is read as the Hub reads it, and
what would be uploaded is listed. Nothing leaves the machine.
"""

import argparse
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from lib.env.errors import UserError
from lib.generate.player import MODEL, load_model

FILES = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokens.json")


def checked(folder: Path) -> ModelCard:
    """The card of a complete model folder.

    Raises `UserError` for what is missing or cannot be opened.
    """
    load_model(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: make it with python -m lib.lab.release"
        )
    try:
        card = ModelCard.load(folder / "README.md")
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"the header of {folder / 'README.md'} cannot be read: "
            "make it with python -m lib.lab.release"
        ) from error
    if not card.data.license or not card.data.eval_results:
        raise UserError(
            f"the header of {folder / 'README.md'} lacks the licence or the results: "
            "make it with python -m lib.lab.release"
        )
    return card


def send(folder: Path, repository: str) -> str:
    """Upload the files, and return where they are. Raises `UserError` where the Hub refuses."""
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(FILES))
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise UserError(
            f"the Hub refused ({str(error).splitlines()[0]}): run hf auth login first, "
            f"and check that {repository} is yours"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Check the model's folder, list what the Hub would get, and with --send upload it."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.hub", description=main.__doc__)
    parser.add_argument("repository", metavar="OWNER/NAME", help="where on the Hub")
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="folder of the model (default: data/model)"
    )
    parser.add_argument(
        "--send", action="store_true", help="upload it; without this, nothing leaves the machine"
    )
    args = parser.parse_args(argv)
    try:
        validate_repo_id(args.repository)
    except HFValidationError as error:
        raise UserError(f"{args.repository!r} is no name on the Hub: give OWNER/NAME") from error
    card = checked(args.model)
    for name in FILES:
        print(f"{name:20} {(args.model / name).stat().st_size:>12,} bytes")
    result = card.data.eval_results[0]
    print(
        f"licence {card.data.license}, "
        f"{result.metric_value} {result.metric_type} on {result.dataset_name}"
    )
    if args.send:
        print(send(args.model, args.repository))
    else:
        print(
            "a rehearsal: with --send these files would go to "
            f"https://huggingface.co/{args.repository}"
        )


if __name__ == "__main__":
    from lib.env.errors import cli

    cli(main)

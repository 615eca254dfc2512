"""Weights from the Hugging Face hub, or one line that says which are missing and how to get them."""

from pathlib import Path

from huggingface_hub import hf_hub_download

from rewards import BadInput


def from_hub(load, name, *args, **options):
    """load(name, ...), such as CLIPModel.from_pretrained; name is a hub id or a local folder.

    Raises BadInput when the weights are neither in the local cache nor to be downloaded.
    """
    try:
        return load(name, *args, **options)
    except (OSError, ValueError) as error:  # what the libraries raise without network, file, access or sense
        reason = str(error).strip().split("\n")[0][:120]
        raise BadInput(
            f"cannot load {name}: run `hf download {name}` where there is a network, or give a local folder "
            f"({reason})"
        ) from None


def file_from_hub(name, filename):
    """Path of one file of a local folder, or of a hub repository."""
    path = Path(name, filename)
    return path if path.is_file() else from_hub(lambda name: hf_hub_download(name, filename), name)

"""Optional parts of an installation, named with the command that adds them."""

import importlib

# Library, as it is imported -> the extra of pyproject.toml that installs it.
EXTRAS = {
    "torch": "torch",
    "accelerate": "train", "rich": "train", "safetensors": "train", "tensorboard": "train", "timm": "train",
    "torchmetrics": "train", "torchvision": "train",
    "submitit": "sweep",
    "jinja2": "report", "matplotlib": "report",
    "brevitas": "brevitas",
    "huggingface_hub": "hub",
    "onnx": "export", "onnx_ir": "export", "onnxruntime": "export", "onnxscript": "export",
}  # fmt: skip


class MissingExtra(ImportError):
    """A library that an extra would install."""


def require(*libraries: str) -> None:
    """Raises MissingExtra when one of `libraries` is not there."""
    for library in libraries:
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            raise naming_extra(error) from error


def naming_extra(error: ModuleNotFoundError) -> ImportError:
    """The error in words that say how to install what is missing; as it is, where no extra has it."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return error
    return MissingExtra(
        f'{library} is not installed; add it with: pip install "edgeqat[{EXTRAS[library]}]"'
    )

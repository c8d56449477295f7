"""Optional parts of an installation, named with the command that adds them."""

import importlib.util


def require(*modules: str, extra: str) -> None:
    """Raises ImportError when one of `modules`, which the extra `extra` installs, is not there."""
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        raise ImportError(f'{", ".join(missing)}: not installed; add it with: pip install "edgeqat[{extra}]"')


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # of a module that stands in sys.modules without a specification
        return False

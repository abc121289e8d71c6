"""The engines' packages, which only `blipfit[cluster]` installs."""

from typing import Any, Literal

from blipfit.errors import UserError


def load_engine(package: Literal["submitit", "ray"]) -> Any:
    """Import submitit or ray. Raises UserError if it is not installed."""
    try:
        if package == "submitit":
            import submitit

            return submitit
        import ray

        return ray
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise UserError(f"{package} is not installed; it is an extra: pip install 'blipfit[cluster]'") from None
